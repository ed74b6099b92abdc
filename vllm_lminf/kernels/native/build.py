"""Compiles the C++ kernels for this machine, once; later starts load what is there.

There is a library for each storage type, so that a model waits for its own alone: about two
seconds. A library's name is a hash of everything that it depends on: the sources, the compiler, the
flags and the CPU. Of processes that start at once one compiles and the others wait for it; the file
is written under a name of its own and then renamed, which is atomic, so that none sees half of it.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

SOURCES = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared")
_COMPILERS = ("g++", "c++", "clang++")
_TIMEOUT_S = 300
_STORAGE = {"float32": "Float32", "float16": "Float16", "bfloat16": "BFloat16"}  # of vector.h


class BuildError(RuntimeError):
    """The kernels can't be compiled or loaded here; the message says why and what to do."""


@functools.cache
def load_library(dtype: str) -> ctypes.CDLL:
    """The compiled kernels, built first if this is the first time.

    Args:
        dtype: what queries, keys and values are stored in: "float32", "float16" or "bfloat16".

    Raises:
        BuildError: there is no compiler, or it failed.
    """
    compiler = _compiler()
    path = _cache_dir() / f"kernels-{dtype}-{_fingerprint(compiler)}.so"
    if not path.exists():
        with _alone(path):
            if not path.exists():
                _compile(compiler, path, dtype)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(
            f"{path} does not load: {error}. Remove it to have it built anew"
        ) from error


def start(dtype: str) -> None:
    """Starts to compile in the background, so that the kernels are there once they are needed.

    Whoever calls `load_library` then learns what went wrong, if anything did.
    """

    def build() -> None:
        with contextlib.suppress(BuildError):
            load_library(dtype)

    threading.Thread(target=build, name="lminf-build", daemon=True).start()


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One at a time, of all processes and threads that want this file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock").open("w")
    except OSError as error:
        raise BuildError(f"the kernels can't be compiled into {path.parent}: {error}") from error
    with lock:
        # A file system without locks costs a second compilation, and no more.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compiler() -> list[str]:
    named = os.environ.get("CXX")
    for command in [named] if named else _COMPILERS:
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    looked_for = f"CXX={named}" if named else ", ".join(_COMPILERS)
    raise BuildError(f"no C++ compiler found ({looked_for}): install g++, or name one with CXX")


def _cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vllm-lminf"


def _fingerprint(compiler: list[str]) -> str:
    digest = hashlib.sha256()
    for source in sorted(SOURCES.glob("*.[ch]*")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=False).stdout
    digest.update(repr((compiler, FLAGS, platform.machine(), _cpu_features())).encode() + version)
    return digest.hexdigest()[:20]


def _cpu_features() -> str:
    """What -march=native depends on: a cache folder may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    named = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(named)}))


def _compile(compiler: list[str], path: Path, dtype: str) -> None:
    storage = f"-DLMINF_STORAGE={_STORAGE[dtype]}"
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder:
            built = Path(folder) / path.name
            command = [*compiler, *FLAGS, storage, "-o", str(built), str(SOURCES / "kernels.cpp")]
            result = subprocess.run(
                command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
            )
            if result.returncode != 0:
                raise BuildError(f"{shlex.join(command)} failed:\n{result.stderr.strip()}")
            built.replace(path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the kernels can't be compiled into {path.parent}: {error}") from error
