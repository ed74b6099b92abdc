"""Compiles the C++ kernels for this machine, once; later starts load what is there.

There is a library for each storage type, so that a model waits for its own alone: about two
seconds. A library's name is a hash of everything that it depends on: the sources, the compiler, the
flags and the CPU. Of processes that start at once one compiles and the others wait for it. It is
kept as `store.py` says, in the user's cache or else in a folder of the user's for temporary files;
where neither can be trusted or written, it is not kept, and each process compiles its own.

A library is loaded from memory: from a copy of what was checked that nobody can change any more,
and that doesn't go away with the file.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from vllm_lminf.errors import BuildError
from vllm_lminf.kernels.cpu import store

logger = logging.getLogger("vllm.lminf")

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-w")
_LIBRARIES = ("-lgomp",)  # see threads.h
_COMPILERS = (
    *("g++", "c++", "clang++"),
    *(f"g++-{version}" for version in range(14, 9, -1)),
    *(f"clang++-{version}" for version in range(19, 13, -1)),
)
_TIMEOUT_S = 300.0
_VERSION_TIMEOUT_S = 30.0
_MOST_OUTPUT = 1 << 20  # bytes; a compiler that prints more is no compiler
_MOST_SAID = 4000  # characters of it in a message
_ROOM = 1 << 24  # bytes that compiling takes, at the most
_MFD_CLOEXEC, _MFD_ALLOW_SEALING = 1, 2  # of Linux
_ADVICE = "Set XDG_CACHE_HOME to a folder that is yours alone"
_STORAGE = {"float32": "Float32", "float16": "Float16", "bfloat16": "BFloat16"}  # of vector.h
_ENTRY_POINTS = (
    *("lminf_attention", "lminf_write_cache", "lminf_rotate"),
    *("lminf_attend_and_recall", "lminf_write_archive", "lminf_ask_for_amx"),
)


def load_library(dtype: str) -> ctypes.CDLL:
    """The compiled kernels, built first if this is the first time.

    Args:
        dtype: what queries, keys and values are stored in: "float32", "float16" or "bfloat16".

    Raises:
        BuildError: there is no compiler, or it failed. It isn't tried again in this process.
    """
    with _one_thread:
        outcome = outcome_of(dtype)
    if isinstance(outcome, str):
        raise BuildError(outcome)
    return outcome


_one_thread = threading.Lock()


def where() -> tuple[str, Path | None, list[str]]:
    """What compiles the kernels, the folder in which they are kept, and why that isn't a better
    one; None where each process compiles its own.

    Raises:
        BuildError: there is no compiler.
    """
    folders, reasons = _folders()
    kept, why = folders[-1] if folders and not reasons else (None, reasons)
    return shlex.join(_compiler()), kept, why


@functools.cache
def outcome_of(dtype: str) -> ctypes.CDLL | str:
    """What came of the one attempt in this process to have the kernels: they, or why not."""
    try:
        return _library(dtype)
    except BuildError as error:
        return str(error)


def start(dtype: str) -> None:
    """Starts to compile in the background, so that the kernels are there once they are needed.

    Whoever calls `load_library` then learns what went wrong, if anything did.
    """

    def build() -> None:
        with contextlib.suppress(BuildError):
            load_library(dtype)

    threading.Thread(target=build, name="lminf-build", daemon=True).start()


def _library(dtype: str) -> ctypes.CDLL:
    compiler = _compiler()
    flags = (*_target_flags(), *FLAGS, f"-DLMINF_STORAGE={_STORAGE[dtype]}")
    name = f"kernels-{dtype}-{_fingerprint(compiler, flags)}.so"
    folders, reasons = _folders()
    for folder, why in folders:
        library = _kept(folder / name)
        if library is not None:
            _warn_of(folder, why)
            return library
    if reasons:
        _warn_once(f"each process compiles its own kernels: {'; '.join(reasons)}. {_ADVICE}")
        return _load(_compile(compiler, flags, None), name)
    folder, why = folders[-1]
    _warn_of(folder, why)
    with store.alone(folder / name, _TIMEOUT_S):
        library = _kept(folder / name)
        if library is not None:
            return library
        content = _compile(compiler, flags, folder)
        library = _load(content, name)  # only what loads is kept
        try:
            store.write(folder / name, content)
        except store.StoreError as error:
            _warn_once(f"each process compiles its own kernels: {error}. {_ADVICE}")
        return library


def _folders() -> tuple[list[tuple[Path, list[str]]], list[str]]:
    """Folders of the user's alone, best first, up to one that can be written.

    Returns:
        The folders, each with the reasons why there is no better one; and why none can be written,
        which is empty if the last one can.
    """
    reasons = []
    candidates = []
    home = None
    try:
        home = Path.home()
    except RuntimeError:
        reasons.append("the user has no home: HOME isn't set")
    if home is not None and not home.is_absolute():
        reasons.append(f"the home {home} isn't absolute")
        home = None
    named = os.environ.get("XDG_CACHE_HOME")
    if named and Path(named).is_absolute():
        candidates.append(Path(named) / "vllm-lminf")
        reasons.clear()
    else:
        if named:
            reasons.append(f"XDG_CACHE_HOME={named} isn't absolute")
        if home is not None:
            candidates.append(home / ".cache" / "vllm-lminf")
    try:
        candidates.append(Path(tempfile.gettempdir()) / f"vllm-lminf-{os.geteuid()}")
    except OSError as error:
        reasons.append(f"there is no folder for temporary files: {error}")
    folders = []
    for candidate in candidates:
        try:
            store.open_folder(candidate, home)
        except store.StoreError as error:
            reasons.append(str(error))
            continue
        folders.append((candidate, list(reasons)))
        if os.access(candidate, os.W_OK | os.X_OK):
            return folders, []
        reasons.append(f"{candidate} can't be written")
    return folders, reasons


def _warn_of(folder: Path, why: list[str]) -> None:
    if why:
        _warn_once(f"the compiled kernels are kept in {folder}: {'; '.join(why)}. {_ADVICE}")


def _kept(path: Path) -> ctypes.CDLL | None:
    try:
        content = store.read(path)
        return None if content is None else _load(content, path.name)
    except (store.StoreError, BuildError) as error:
        _warn_once(f"the kernels are compiled anew: {error}")
        return None


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def _compiler() -> list[str]:
    named = os.environ.get("CXX")
    if named and shutil.which(named):
        commands = [[named]]  # a path may have blanks in it
    else:
        try:
            commands = [shlex.split(command) for command in ([named] if named else _COMPILERS)]
        except ValueError as error:
            raise BuildError(f"CXX={named} is no command: {error}") from error
    for first, *others in filter(None, commands):
        found = shutil.which(first)
        if found:
            return [_absolute(found), *others]
    looked_for = f"CXX={named}" if named else ", ".join(_COMPILERS)
    raise BuildError(f"no C++ compiler found ({looked_for}): install g++, or name one with CXX")


def _absolute(path: str) -> str:
    try:
        return os.path.abspath(path)
    except OSError as error:
        raise BuildError(f"{path}: the current folder is gone: {error}") from error


def _target_flags() -> tuple[str, ...]:
    """For this CPU. On Arm by what it can do: an older compiler takes the CPU for the first of
    its kind, and not every one can be told to look."""
    if platform.machine() == "x86_64":
        return ("-march=native",)
    if platform.machine() == "aarch64" and "bf16" in _cpu_features().split():
        return ("-march=armv8.2-a+bf16",)
    return ()


def _fingerprint(compiler: list[str], flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for source in sorted(SOURCES.glob("*.[ch]*")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    _, version = _run([*compiler, "--version"], "/", _VERSION_TIMEOUT_S)
    command = (compiler, flags, _LIBRARIES, platform.machine(), _cpu_features())
    digest.update(repr(command).encode() + version)
    return digest.hexdigest()[:20]


def _cpu_features() -> str:
    """What the machine code depends on: a cache folder may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().decode(errors="replace").splitlines()
    except OSError:
        return f"unknown, of {platform.node()}"
    named = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(named)}))


def _compile(compiler: list[str], flags: tuple[str, ...], folder: Path | None) -> bytes:
    """A library, as it is in its file. It is made in the given folder, or among temporary files."""
    try:
        scratch = store.scratch_folder(_with_room(folder))
    except OSError as error:
        raise BuildError(f"there is no folder to compile in: {error}") from error
    with scratch:
        built = Path(scratch.name) / "kernels.so"
        command = [*compiler, *flags, "-o", str(built), str(SOURCES / "kernels.cpp"), *_LIBRARIES]
        status, output = _run(command, scratch.name, _TIMEOUT_S)
        said = _readable(output)
        if status != 0:
            ended = f"ended by signal {-status}" if status < 0 else f"exit status {status}"
            raise BuildError(f"{shlex.join(command)} failed ({ended}):\n{said}")
        try:
            return built.read_bytes()
        except OSError as error:
            raise BuildError(f"{shlex.join(command)} left no library: {error}\n{said}") from error


def _with_room(folder: Path | None) -> Path:
    parents = [] if folder is None else [folder]
    parents.append(Path(tempfile.gettempdir()))
    for parent in parents:
        status = os.statvfs(parent)
        if status.f_bavail * status.f_frsize >= _ROOM:
            return parent
    named = " nor in ".join(map(str, parents))
    raise OSError(f"no {_ROOM >> 20} MiB free in {named}; set TMPDIR to a folder that has room")


def _run(command: list[str], folder: str, timeout_s: float) -> tuple[int, bytes]:
    """Runs a compiler in a folder, which it has for its temporary files too.

    Returns:
        The exit status (a signal's number, negated) and what it printed.

    Raises:
        BuildError: it can't be run, doesn't end or prints without end. Nothing of it runs on then.
    """
    words = shlex.join(command)
    ours, theirs = os.pipe()
    os.set_blocking(ours, False)
    try:
        try:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=os.environ | {"LC_ALL": "C", "TMPDIR": folder},
                stdin=subprocess.DEVNULL,
                stdout=theirs,
                stderr=theirs,
                start_new_session=True,  # a group of its own, to be ended with all that it started
            )
        except OSError as error:
            raise BuildError(f"{words} can't be run: {error}") from error
        finally:
            os.close(theirs)
        try:
            return _wait(process, ours, words, timeout_s)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)
    finally:
        os.close(ours)


def _wait(
    process: subprocess.Popen[bytes], pipe: int, words: str, timeout_s: float
) -> tuple[int, bytes]:
    """Reads until the process ends. What it started may live on, and hold the pipe."""
    deadline = time.monotonic() + timeout_s
    output = bytearray()
    while True:
        status = process.poll()
        try:
            chunk = os.read(pipe, 1 << 16)
        except BlockingIOError:
            chunk = b""
        output += chunk
        if len(output) > _MOST_OUTPUT:
            raise BuildError(f"{words} prints without end: it is no compiler")
        if chunk:
            continue
        if status is not None:
            return status, bytes(output)
        if time.monotonic() > deadline:
            raise BuildError(f"{words} did not end within {timeout_s:g} s")
        time.sleep(0.01)


def _readable(output: bytes) -> str:
    """The beginning of what a compiler printed, where its first complaint is."""
    text = output.decode(errors="replace").strip()[:_MOST_SAID]
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _load(content: bytes, name: str) -> ctypes.CDLL:
    try:
        library = _from_memory(content, name)
    except OSError as error:
        library = _from_file(content, name, error)
    for function in _ENTRY_POINTS:
        if not hasattr(library, function):
            raise BuildError(f"{name} has no {function}: what compiled it is no C++ compiler")
    return library


def _from_memory(content: bytes, name: str) -> ctypes.CDLL:
    # By the C library, since some builds of Python have no os.memfd_create.
    create = getattr(ctypes.CDLL(None, use_errno=True), "memfd_create", None)
    if create is None:
        raise OSError("this C library has no memfd_create")
    descriptor = create(name.encode(), _MFD_CLOEXEC | _MFD_ALLOW_SEALING)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "no file in memory")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        # It stays open: the loader takes two files of one name for the same, and a number that was
        # free again would be the name of the next one.
        return ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    except OSError:
        os.close(descriptor)
        raise


def _from_file(content: bytes, name: str, why: OSError) -> ctypes.CDLL:
    """Where there are no files in memory, or none that may run: by a temporary one."""
    try:
        with store.scratch_folder(Path(tempfile.gettempdir())) as folder:
            file = Path(folder) / name
            file.write_bytes(content)
            return ctypes.CDLL(str(file))
    except OSError as error:
        raise BuildError(
            f"what was compiled loads neither from memory ({why}) nor from a temporary file "
            f"({error}): if programs may not run there, set TMPDIR to a folder where they may"
        ) from error
