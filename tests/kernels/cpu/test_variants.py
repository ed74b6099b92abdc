"""The compiled kernels built in other ways, with some of their tests run again on each build."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_lminf.kernels.cpu import build

HERE = Path(__file__).parent
FILES = HERE / "test_kernel.py", HERE / "test_recall.py"
# Unaligned rows, poisoned caches, splits, far rotations, rules; some of each.
SELECTION = "apart or slots or queries or rotation or rules or threads or (decode and h9)"
# Units of both kinds, groups of heads of all sizes, segments, the index.
SELECTION += " or (test_recall and (h9 or h14 or across or segments or lower or radius))"


def run_tests(flags: str, cache: Path, selection: str = SELECTION, **environ: str) -> None:
    command = [sys.executable, "-m", "tests.kernels.cpu.with_flags", flags]
    environ = {"XDG_CACHE_HOME": str(cache), **environ}
    assert " passed" in run_selection(command, selection, os.environ | environ)


def run_selection(command: list[str], selection: str, environ: dict[str, str]) -> str:
    result = subprocess.run(
        [*command, *map(str, FILES), "-k", selection],
        env=environ,
        cwd=HERE.parents[2],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


def test_no_access_out_of_bounds(tmp_path: Path) -> None:
    """AddressSanitizer and UBSan watch every access and every operation."""
    libraries = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    run_tests(
        "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all",
        tmp_path,
        LD_PRELOAD=":".join(libraries),
        # Python and torch leave memory to the end of the process on purpose.
        ASAN_OPTIONS="detect_leaks=0",
    )


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are x86 instruction sets")
@pytest.mark.parametrize("instructions", ["x86-64-v3", "skylake-avx512"])
def test_without_the_newest_instructions(instructions: str, tmp_path: Path) -> None:
    """With AVX2, and with AVX-512 that has no dot products of bfloat16."""
    wanted = "avx2" if instructions == "x86-64-v3" else "avx512dq"
    if wanted not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this CPU has no {wanted}")
    run_tests(f"-march={instructions}", tmp_path)


COMPILERS = [f"g++-{n}" for n in range(10, 15)] + [f"clang++-{n}" for n in range(14, 20)]
# Some of each of the above, once more: what differs between compilers shows anywhere.
FEWER = "apart or (rotation and 48 and not 700) or (rules and sinks and 48) or (decode and h9)"
FEWER += " or (test_recall and (h9 or across or lower or (radius and growing)))"


def skip_without(*commands: str) -> None:
    for command in commands:
        if shutil.which(command) is None:
            pytest.skip(f"{command} isn't installed (make compilers installs what there is)")


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compilers(compiler: str, tmp_path: Path) -> None:
    skip_without(compiler)
    usual = shutil.which("g++")
    if usual and Path(shutil.which(compiler)).samefile(usual):
        pytest.skip(f"{compiler} is g++ here, which all other tests compile with")
    run_tests("", tmp_path, FEWER, CXX=compiler)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are x86 instruction sets")
@pytest.mark.parametrize("compiler", ["g++", "clang++-14"])
def test_without_conversions_of_float16(compiler: str, tmp_path: Path) -> None:
    skip_without(compiler)
    run_tests("-march=x86-64", tmp_path, f"({FEWER}) and float16", CXX=compiler)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are x86 instruction sets")
@pytest.mark.parametrize("compiler", COMPILERS)
def test_compilers_know_avx512(compiler: str, tmp_path: Path) -> None:
    """Compiled, whatever this CPU is; without optimisation, which takes most of the time."""
    skip_without(compiler)
    for instructions, storage in (
        ("sapphirerapids", "BFloat16"),
        ("skylake-avx512", "BFloat16"),
        ("skylake-avx512", "Float16"),
    ):
        machine = [f"-march={instructions}", f"-DLMINF_STORAGE={storage}"]
        flags = [flag for flag in build.FLAGS if flag not in ("-O3", "-shared")]
        command = [compiler, *flags, "-O0", "-c", *machine, "-o", str(tmp_path / "object")]
        command.append(str(build.SOURCES / "kernels.cpp"))
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[:4000]


ARM = {
    "g++-dot-products": ("aarch64-linux-gnu-g++ -march=armv8.2-a+bf16", "max", FEWER),
    "g++-without": ("aarch64-linux-gnu-g++", "cortex-a72", f"({FEWER}) and float16"),
    "clang++-dot-products": (
        "clang++-14 --target=aarch64-linux-gnu -march=armv8.2-a+bf16",
        "max",
        f"({FEWER}) and bfloat16",
    ),
}


@pytest.mark.parametrize(("compiler", "cpu", "selection"), ARM.values(), ids=ARM)
def test_arm(compiler: str, cpu: str, selection: str, tmp_path: Path) -> None:
    """On an emulated CPU with dot products of bfloat16, and on one without."""
    skip_without(shlex.split(compiler)[0], "aarch64-linux-gnu-g++", "qemu-aarch64")
    emulator = f"qemu-aarch64 -cpu {cpu} -L /usr/aarch64-linux-gnu"
    command = [
        sys.executable,
        "-m",
        "tests.kernels.cpu.emulated",
        compiler,
        emulator,
        str(tmp_path),
    ]
    result = run_selection(command, selection, os.environ | {"OMP_NUM_THREADS": "2"})
    assert " passed" in result
    code = subprocess.run(
        ["aarch64-linux-gnu-objdump", "-d", str(tmp_path / "emulated-bfloat16")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert ("bfdot" in code) == (cpu == "max")
