"""The kernels are compiled once, by real compilers, and what can't be compiled says why."""

import contextlib
import ctypes
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vllm_lminf.errors import BuildError
from vllm_lminf.kernels.cpu import build, store

LOAD = (
    'from vllm_lminf.kernels.cpu.build import load_library\nload_library("float32").lminf_attention'
)


@pytest.fixture(autouse=True)
def nothing_loaded() -> None:
    build.outcome_of.cache_clear()
    build._warn_once.cache_clear()


@pytest.fixture
def compiled_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "FLAGS", ("-O0", *build.FLAGS[1:]))


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vllm-lminf"


def load_in_a_process() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LOAD], stderr=subprocess.PIPE, text=True, env=os.environ
    )


def test_processes_that_start_at_once_and_one_that_starts_later(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, compiler = tmp_path / "log", tmp_path / "compiler"
    compiler.write_text(
        f"""#!/bin/sh
case "$*" in *--version*) ;; *) echo compiled >> {log};; esac
exec {shutil.which("g++")} "$@"
"""
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    for process in [load_in_a_process() for _ in range(2)]:
        assert process.wait(timeout=300) == 0, process.stderr.read()
    assert log.read_text().count("compiled") == 1, "one compiles, the others wait for it"
    assert [path.suffix for path in sorted(empty_cache.iterdir())] == [".lock", ".so"]

    later = load_in_a_process()
    assert later.wait(timeout=300) == 0, later.stderr.read()
    assert log.read_text().count("compiled") == 1


def test_threads_of_one_process_compile_once(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that `start` starts, and the layer that needs the kernels before it is done."""
    compiled = []
    compile_once = build._compile
    monkeypatch.setattr(
        build, "_compile", lambda *args: (compiled.append(args), compile_once(*args))[1]
    )
    build.start("float32")
    build.load_library("float32")
    assert len(compiled) == 1


def test_no_compiler(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -x")
    with pytest.raises(BuildError, match=r"CXX=no-such-compiler -x.*install g\+\+"):
        build.load_library("float32")
    build.outcome_of.cache_clear()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BuildError, match=r"g\+\+, c\+\+, clang"):
        build.load_library("float32")


def test_a_compiler_that_fails(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own words are part of the message, and nothing is left behind."""
    monkeypatch.setenv("CXX", "g++ -include no-such-header.h")
    with pytest.raises(BuildError, match="no-such-header"):
        build.load_library("float32")
    assert [path.suffix for path in empty_cache.iterdir()] == [".lock"]


def test_a_failure_is_told_to_all_and_not_repeated(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model has many layers, and each asks."""
    log = tmp_path / "log"
    use_script(tmp_path, monkeypatch, f"echo tried >> {log}; exit 1")
    for _ in range(3):
        with pytest.raises(BuildError, match="exit status 1"):
            build.load_library("float32")
    assert log.read_text().count("tried") == 2, "once for its version, once to compile"


def use_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    script = tmp_path / "a compiler"  # with a blank in its path
    script.write_text(f"#!/bin/sh\n{text}\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))


def command_lines() -> str:
    """Of all processes."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended since
            lines.append(path.read_text(errors="replace"))
    return "\n".join(lines)


BROKEN = {
    "ends-well-without-a-library": ("exit 0", "left no library"),
    "binary-garbage": ("head -c 3000 /dev/urandom; exit 3", "exit status 3"),
    "prints-without-end": ("yes", "without end"),
    "no-version": ("case $1 in --version) sleep 99;; esac", "--version did not end within"),
    "never-ends": ("case $1 in --version) exit 0;; esac; sleep 99", "did not end within"),
    "killed": ("case $1 in --version) exit 0;; esac; kill -9 $$", "ended by signal 9"),
    "no-library-but-text": (
        'while [ "$1" != -o ]; do shift || exit 0; done; echo hello > "$2"',
        "loads neither from memory .* nor from",
    ),
    "another-library": (
        'case $1 in --version) exit 0;; esac; while [ "$1" != -o ]; do shift; done; '
        'echo "int a;" | gcc -shared -x c -o "$2" -',
        "has no lminf_attention",
    ),
}


@pytest.mark.parametrize(("script", "named"), BROKEN.values(), ids=BROKEN)
def test_what_is_no_compiler(
    script: str,
    named: str,
    empty_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each is a reason, printable, and nothing of it is kept or runs on."""
    if "did not end" in named:
        monkeypatch.setattr(build, "_TIMEOUT_S", 0.5)
        monkeypatch.setattr(build, "_VERSION_TIMEOUT_S", 0.5)
    use_script(tmp_path, monkeypatch, script)
    with pytest.raises(BuildError, match=named) as failure:
        build.load_library("float32")
    assert all(c.isprintable() or c in "\n\t" for c in str(failure.value))
    assert not list(empty_cache.glob("*.so"))
    assert not list(empty_cache.glob(f"{store._SCRATCH}*"))
    assert str(tmp_path) not in command_lines()


@pytest.mark.parametrize(
    ("compiler", "named"),
    [
        ('g++ "', 'CXX=g.. " is no command: No closing quotation'),
        ("{folder}", "no C.. compiler found"),
        ("{folder}/empty", "can't be run: .*Exec format error"),
        ("{folder}/locked", "no C.. compiler found"),
        ("   ", "no C.. compiler found"),
    ],
    ids=["quote", "folder", "no-program", "not-executable", "blank"],
)
def test_what_cannot_be_run(
    compiler: str, named: str, empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").touch(0o755)
    (tmp_path / "locked").touch(0o644)
    monkeypatch.setenv("CXX", compiler.format(folder=tmp_path))
    with pytest.raises(BuildError, match=named):
        build.load_library("float32")


def test_a_cpu_that_cannot_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its libraries are shared with no other machine."""

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert platform.node() in build._cpu_features()


class TestKept:
    """What is in the cache is whole and the user's own, or isn't loaded."""

    @pytest.fixture
    def library(
        self,
        empty_cache: Path,
        tmp_path: Path,
        compiled_quickly: None,
        monkeypatch: pytest.MonkeyPatch,
    ) -> Path:
        (tmp_path / "temporary").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
        build.load_library("float32")
        build.outcome_of.cache_clear()
        (path,) = empty_cache.glob("*.so")
        return path

    @pytest.mark.parametrize(
        "damage",
        [
            lambda whole: whole[:20_000],
            lambda whole: whole[:-1],
            lambda whole: b"",
            lambda whole: bytes(len(whole)),
            lambda whole: whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:],
            lambda whole: whole + b"\0",
            lambda whole: whole[: -store._TRAILER_BYTES],
            lambda whole: whole[-store._TRAILER_BYTES :],
        ],
        ids=["20000-bytes", "last-byte", "empty", "zeros", "a-bit", "longer", "bare", "end-alone"],
    )
    def test_damaged(self, damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
        path = tmp_path / "library"
        content = os.urandom(30_000)
        store.write(path, content)
        assert store.read(path) == content
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(store.StoreError, match="damaged"):
            store.read(path)

    def test_damaged_is_built_anew(self, library: Path) -> None:
        """Even while it is loaded: what runs doesn't lie in the file."""
        loaded = build.load_library("float32")
        build.outcome_of.cache_clear()
        whole = library.read_bytes()
        os.truncate(library, 4096)
        with pytest.raises(store.StoreError, match="damaged"):
            store.read(library)
        call_without_work(loaded)
        call_without_work(build.load_library("float32"))
        assert library.read_bytes()[-8:] != b"\0" * 8
        assert len(library.read_bytes()) == len(whole)

    def test_whole_but_unfit_is_built_anew(self, library: Path) -> None:
        """As where a home is shared by systems with other C libraries."""
        store.write(library, b"no library of this system")
        call_without_work(build.load_library("float32"))
        assert store.read(library)[:4] == b"\x7fELF"

    @pytest.mark.parametrize("umask", [0, 0o22, 0o77], ids=oct)
    def test_nobody_else_can_write(
        self, umask: int, empty_cache: Path, compiled_quickly: None
    ) -> None:
        before = os.umask(umask)
        try:
            build.load_library("float32")
        finally:
            os.umask(before)
        modes = {p: stat.S_IMODE(p.stat().st_mode) for p in [empty_cache, *empty_cache.iterdir()]}
        assert modes.pop(empty_cache) == stat.S_IMODE(empty_cache.parent.stat().st_mode) == 0o700
        assert set(modes.values()) == {0o600}

    @pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777, 0o702], ids=oct)
    def test_a_folder_that_others_write_to(self, mode: int, library: Path, said: list[str]) -> None:
        """A planted library isn't loaded; the kernels are kept elsewhere, with one warning."""
        plant(library)
        library.parent.chmod(mode)
        call_without_work(build.load_library("float32"))
        (warning,) = said
        assert f"others can write to {library.parent}" in warning
        assert f"kept in {private_folder()}" in warning

    def test_a_parent_that_others_write_to(self, library: Path, said: list[str]) -> None:
        plant(library)
        library.parents[1].chmod(0o777)
        call_without_work(build.load_library("float32"))
        assert f"others can write to {library.parents[1]}" in said[0]
        library.parents[1].chmod(0o1777)  # as /tmp is
        store.open_folder(library.parent, None)

    @pytest.mark.parametrize("what", ["mode", "owner", "link", "pipe", "folder"])
    def test_a_file_that_is_not_the_users_own(self, what: str, library: Path) -> None:
        plant(library)
        if what == "mode":
            library.chmod(0o666)
        elif what == "owner":
            os.chown(library, SOMEBODY, SOMEBODY)
        elif what == "link":
            library.rename(library.with_suffix(".planted"))
            library.symlink_to(library.with_suffix(".planted"))
        elif what == "pipe":
            library.unlink()
            os.mkfifo(library)
        else:
            library.unlink()
            library.mkdir()
        call_without_work(build.load_library("float32"))

    def test_a_link_of_anothers(self, tmp_path: Path) -> None:
        (tmp_path / "mine").mkdir(mode=0o700)
        (tmp_path / "link").symlink_to("mine")
        store.open_folder(tmp_path / "link", None)
        os.chown(tmp_path / "link", SOMEBODY, SOMEBODY, follow_symlinks=False)
        with pytest.raises(store.StoreError, match="link of another user's"):
            store.open_folder(tmp_path / "link", None)

    def test_links_without_end(self, tmp_path: Path) -> None:
        (tmp_path / "a").symlink_to("b")
        (tmp_path / "b").symlink_to("a")
        with pytest.raises(store.StoreError, match="too many links"):
            store.open_folder(tmp_path / "a" / "c", None)

    def test_what_lies_above_the_home_is_not_the_users_affair(self, tmp_path: Path) -> None:
        home = tmp_path / "shared" / "home"
        home.mkdir(parents=True)
        (tmp_path / "shared").chmod(0o777)
        store.open_folder(home / ".cache" / "vllm-lminf", home)
        with pytest.raises(store.StoreError, match="others can write"):
            store.open_folder(home / ".cache" / "vllm-lminf", None)
        home.chmod(0o770)
        with pytest.raises(store.StoreError, match="others can write"):
            store.open_folder(home / ".cache" / "vllm-lminf", home)

    def test_without_files_in_memory(self, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object) -> None:
            raise OSError(1, "Operation not permitted")

        monkeypatch.setattr(build, "_from_memory", refuse)
        call_without_work(build.load_library("float32"))

    def test_leftovers_of_the_killed_go_away(self, library: Path) -> None:
        old, new = (library.parent / f"{store._SCRATCH}{name}" for name in ("old", "new"))
        for folder in (old, new):
            folder.mkdir()
            (folder / "draft.so").touch()
        os.utime(old, (0, 0))
        store.write(library, b"something")
        assert new.exists()
        assert not old.exists()


def call_without_work(library: ctypes.CDLL) -> None:
    """Runs some of its code: a library that was planted or torn would end the process."""
    library.lminf_rotate(None, None, ctypes.byref((ctypes.c_int64 * 16)()))


def plant(path: Path) -> None:
    """A sound library in an attacker's place, that ends the process which loads it."""
    source = "__attribute__((constructor)) void f(void) { __builtin_trap(); }"
    with tempfile.TemporaryDirectory() as folder:
        planted = Path(folder) / "planted.so"
        command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(planted)]
        subprocess.run(command, input=source, text=True, check=True)
        store.write(path, planted.read_bytes())


SOMEBODY = 12345
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")


def private_folder(uid: int | None = None) -> Path:
    return Path(tempfile.gettempdir()) / f"vllm-lminf-{os.geteuid() if uid is None else uid}"


AS_SOMEBODY = """
import logging, os, sys, tempfile
from pathlib import Path
from vllm_lminf.kernels.cpu import build
logging.basicConfig(format="%(message)s")
build.FLAGS = ("-O0", *build.FLAGS[1:])
os.setgroups([]); os.setgid(12345); os.setuid(12345)
for _ in range(2):
    build.load_library("float32").lminf_attention
    build.outcome_of.cache_clear()
"""


@root_only
class TestContainers:
    """Other users, homes and mounts, as containers have them. No case may raise anything but
    BuildError, and here even that isn't needed."""

    @pytest.fixture
    def temporary(self, tmp_path: Path) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder).chmod(0o1777)
            yield Path(folder)

    def load(self, temporary: Path, mount: str = "", **environ: str | None) -> str:
        environ = {"HOME": None, "XDG_CACHE_HOME": None, "TMPDIR": str(temporary)} | environ
        merged = os.environ | environ
        command = [sys.executable, "-c", AS_SOMEBODY]
        if mount:
            command = ["unshare", "-m", "sh", "-ec", f'{mount}\nexec "$@"', "-", *command]
        result = subprocess.run(
            command,
            env={name: value for name, value in merged.items() if value is not None},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr
        return result.stderr

    @pytest.mark.parametrize(
        ("environ", "named"),
        [
            ({}, "HOME isn't set"),
            ({"HOME": "/"}, "/.cache: Permission denied"),
            ({"HOME": "/root"}, "/root"),
            ({"HOME": "here"}, "the home here isn't absolute"),
            ({"XDG_CACHE_HOME": "here"}, "XDG_CACHE_HOME=here isn't absolute"),
            ({"XDG_CACHE_HOME": "/etc/passwd"}, "/etc/passwd is not a folder"),
            ({"XDG_CACHE_HOME": "/" + "x" * 300}, "File name too long"),
        ],
        ids=str,
    )
    def test_without_a_cache(self, environ: dict[str, str], named: str, temporary: Path) -> None:
        said = self.load(temporary, **environ)
        assert said.count("the compiled kernels are kept in") == 1
        assert named in said
        assert "Set XDG_CACHE_HOME" in said
        (kept,) = temporary.iterdir()
        assert kept.name == "vllm-lminf-12345"
        assert (kept.stat().st_uid, stat.S_IMODE(kept.stat().st_mode)) == (SOMEBODY, 0o700)

    def test_another_users_cache(self, temporary: Path) -> None:
        others = temporary / "cache" / "vllm-lminf"
        others.mkdir(parents=True, mode=0o755)
        os.chown(others, 54321, 54321)
        said = self.load(temporary, XDG_CACHE_HOME=str(others.parent))
        assert f"{others} is another user's (uid 54321)" in said

    def test_neither_a_cache_nor_a_private_folder(self, temporary: Path) -> None:
        """Somebody took its name: nothing is kept, and everything runs."""
        taken = temporary / "vllm-lminf-12345"
        taken.mkdir(mode=0o777)
        os.chown(taken, 54321, 54321)
        said = self.load(temporary)
        assert said.count("each process compiles its own kernels") == 1
        assert f"{taken} is another user's (uid 54321)" in said
        assert list(taken.iterdir()) == []

    @pytest.mark.parametrize(
        "options", ["noexec,mode=777", "size=64k,mode=777", "ro,mode=777"], ids=str
    )
    def test_mounts(self, options: str, temporary: Path) -> None:
        """Where no program may run, a library may be kept; a full disk and one that can't be
        written cost a compilation."""
        if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0:
            pytest.skip("this root may not mount anything")
        cache = temporary / "cache"
        cache.mkdir()
        mount = f"mount -t tmpfs -o {options.replace('777', '700')},uid=12345 cache {cache}"
        said = self.load(temporary, mount, XDG_CACHE_HOME=str(cache))
        if "noexec" in options:
            assert said == ""
        elif "size" in options:
            assert "No space left on device" in said
        else:
            assert "Read-only file system" in said

    def test_a_folder_for_temporary_files_that_is_missing(self, temporary: Path) -> None:
        missing = str(temporary / "missing")
        assert self.load(temporary, TMPDIR=missing, XDG_CACHE_HOME=str(temporary)) == ""
