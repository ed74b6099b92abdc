"""The kernels are compiled once, by real compilers, and what can't be compiled says why."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_lminf.kernels.native import build

LOAD = (
    "from vllm_lminf.kernels.native.build import load_library\n"
    'load_library("float32").lminf_attention'
)


@pytest.fixture(autouse=True)
def nothing_loaded() -> None:
    build.outcome_of.cache_clear()


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
        build, "_compile", lambda *args: (compiled.append(args), compile_once(*args))
    )
    build.start("float32")
    build.load_library("float32")
    assert len(compiled) == 1


def test_no_compiler(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -x")
    with pytest.raises(build.BuildError, match=r"CXX=no-such-compiler -x.*install g\+\+"):
        build.load_library("float32")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(build.BuildError, match=r"g\+\+, c\+\+, clang"):
        build.load_library("float32")


def test_a_compiler_that_fails(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own words are part of the message, and nothing is left behind."""
    monkeypatch.setenv("CXX", "g++ -include no-such-header.h")
    with pytest.raises(build.BuildError, match="no-such-header"):
        build.load_library("float32")
    assert [path.suffix for path in empty_cache.iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(build.BuildError, match="can't be compiled into"):
        build.load_library("float32")
