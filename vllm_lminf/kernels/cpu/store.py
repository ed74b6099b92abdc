"""Where compiled libraries are kept: in folders that nobody else can write, as whole files.

What is loaded runs with all that its user may do. So a folder counts only if it belongs to the user
(or to root) and nobody else can write to it or put another in its place, and a file only if it is
all of what was written: its length and its digest stand at its end, and it appears under its name
once it is on the disk.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path, PurePath

_MAGIC = b"lminf-1\n"
_TRAILER_BYTES = len(_MAGIC) + 8 + hashlib.sha256().digest_size
_MOST_BYTES = 1 << 26  # no library is near to it
_MOST_LINKS = 40  # as in Linux
_SCRATCH = "lminf-build-"
_ABANDONED_S = 3600
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class StoreError(RuntimeError):
    """A folder or a file that can't be trusted or used; the message says why."""


def open_folder(path: Path, home: Path | None) -> None:
    """Makes a folder where there is none, and makes sure that it is the user's alone.

    Everything on the way to it is checked from the root down, links included, or from the home down
    where it lies in the user's own: once a folder is known to be out of others' reach, so is what
    stands in it. What is made is made for the user alone, whatever the umask.

    Args:
        path: absolute.
        home: the user's home, absolute, or None where there is none.

    Raises:
        StoreError: it can't be made, or others could change what it holds.
    """
    try:
        _walk(path, home)
    except OSError as error:
        raise StoreError(f"{error.filename or path}: {error.strerror}") from error


def _walk(path: Path, home: Path | None) -> None:
    here, left = Path("/"), list(reversed(path.parts[1:]))
    if home is not None and path.is_relative_to(home) and _is_own(home):
        here, left = Path(os.path.realpath(home)), list(reversed(path.relative_to(home).parts))
    # Where root has no number of its own (in a user namespace), the root folder's owner is root.
    above = {0, os.geteuid(), os.lstat("/").st_uid}
    links = 0
    _check_folder(here, above, is_last=not left)
    while left:
        part = left.pop()
        if part == "..":
            here = here.parent
            continue
        there = here / part
        try:
            status = os.lstat(there)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):
                there.mkdir(0o700)
                there.chmod(0o700)
            status = os.lstat(there)
        if not stat.S_ISLNK(status.st_mode):
            here = there
            _check_folder(here, above, is_last=not left)
            continue
        links += 1
        if links > _MOST_LINKS:
            raise StoreError(f"{path}: it leads through too many links")
        if status.st_uid not in above:
            raise StoreError(f"{there} is a link of another user's (uid {status.st_uid})")
        target = PurePath(os.readlink(there))
        if target.is_absolute():
            here = Path("/")
            _check_folder(here, above, is_last=False)
        left += reversed(target.parts[1:] if target.is_absolute() else target.parts)
        if not left:
            _check_folder(here, above, is_last=True)


def _is_own(home: Path) -> bool:
    with contextlib.suppress(OSError):
        return home.stat().st_uid == os.geteuid()
    return False


def _check_folder(path: Path, above: set[int], *, is_last: bool) -> None:
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode):
        raise StoreError(f"{path} is not a folder")
    if status.st_uid not in ({0, os.geteuid()} if is_last else above):
        raise StoreError(f"{path} is another user's (uid {status.st_uid})")
    # In a sticky folder, as /tmp is, nobody can rename or remove what another owns.
    sticky = not is_last and status.st_mode & stat.S_ISVTX
    if status.st_mode & _OTHERS_WRITE and not sticky:
        raise StoreError(f"others can write to {path} (chmod go-w {path} changes that)")


def read(path: Path) -> bytes | None:
    """What `write` wrote to a file in a folder that was opened; None where there is no such file.

    Raises:
        StoreError: the file isn't whole, or not the user's alone.
    """
    try:
        # Without waiting for a writer, should it be a pipe.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        with open(os.open(path, flags), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_BYTES:
                raise StoreError(f"{path} is no library")
            if status.st_uid not in (0, os.geteuid()) or status.st_mode & _OTHERS_WRITE:
                raise StoreError(f"others can write to {path}, or it is another user's")
            sealed = file.read(_MOST_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror or error}") from error
    content = sealed[:-_TRAILER_BYTES]
    if not content or sealed != content + _trailer(content):
        raise StoreError(f"{path} is damaged")
    return content


def write(path: Path, content: bytes) -> None:
    """Puts a file in the place of whatever has that name: whole, or not at all.

    Raises:
        StoreError: it can't be written; what was there before still is.
    """
    try:
        with scratch_folder(path.parent) as folder:
            draft = Path(folder) / path.name
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            with open(os.open(draft, flags, 0o600), "wb") as file:
                file.write(content + _trailer(content))
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror or error}") from error


def _trailer(content: bytes) -> bytes:
    return _MAGIC + len(content).to_bytes(8, "little") + hashlib.sha256(content).digest()


@contextlib.contextmanager
def alone(path: Path, timeout_s: float) -> Iterator[None]:
    """One at a time, of all processes and threads that want to write this file.

    Where that can't be had, for lack of locks or for one who holds it too long, things are done
    twice, and no worse.

    Args:
        path: a file in a folder that was opened.
        timeout_s: how long to wait for others, in seconds.
    """
    lock = None
    with contextlib.suppress(OSError):
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        lock = os.open(path.with_suffix(".lock"), flags, 0o600)
    try:
        if lock is not None:
            _wait_for(lock, time.monotonic() + timeout_s)
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _wait_for(lock: int, deadline: float) -> None:
    while time.monotonic() < deadline:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.02)
        except OSError:
            return
        else:
            return


def scratch_folder(parent: Path) -> "tempfile.TemporaryDirectory[str]":
    """A folder of one's own that goes away again; those that killed processes left go too.

    Raises:
        OSError: it can't be made.
    """
    for left_over in parent.glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError):
            status = left_over.lstat()
            abandoned = time.time() - status.st_mtime > _ABANDONED_S
            if abandoned and status.st_uid == os.geteuid():
                shutil.rmtree(left_over)
    return tempfile.TemporaryDirectory(dir=parent, prefix=_SCRATCH, ignore_cleanup_errors=True)
