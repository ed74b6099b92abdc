"""The compiled kernels built in other ways, with some of their tests run again on each build."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Unaligned rows, poisoned caches, splits, far rotations, rules; some of each.
SELECTION = "apart or slots or queries or rotation or rules or threads or (decode and h9)"


def run_tests(flags: str, cache: Path, **environ: str) -> None:
    command = [sys.executable, "-m", "tests.kernels.with_flags", flags]
    result = subprocess.run(
        [*command, str(HERE / "test_cpu.py"), "-k", SELECTION],
        env=os.environ | {"XDG_CACHE_HOME": str(cache), **environ},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert " passed" in result.stdout


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
