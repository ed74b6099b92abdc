"""The compiled kernels touch no memory that isn't theirs: their tests again, under sanitizers."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
# Unaligned rows, poisoned caches, splits, far rotations, rules; a few of each.
SELECTION = "apart or slots or queries or rotation_ or rules or threads or decode and h9"


def test_no_access_out_of_bounds(tmp_path: Path) -> None:
    libraries = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    command = [sys.executable, "-m", "tests.kernels.under_sanitizers"]
    result = subprocess.run(
        [*command, str(HERE / "test_cpu.py"), "-k", SELECTION],
        env=os.environ
        | {
            "LD_PRELOAD": ":".join(libraries),
            # Python and torch leave memory to the end of the process on purpose.
            "ASAN_OPTIONS": "detect_leaks=0:handle_segv=1",
            "XDG_CACHE_HOME": str(tmp_path),
        },
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert " passed" in result.stdout
