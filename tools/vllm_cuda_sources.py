"""Unpack the Python files of vLLM for GPUs, without its compiled parts, into a folder.

The wheel is the one that requirements-vllm-cuda.txt pins by hash. It is some 340 MB, of which the
57 MB of Python files stay. The folder appears under its name only when it is whole.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENTS = Path(__file__).parents[1] / "requirements-vllm-cuda.txt"
_KEPT = (".py", ".dist-info/METADATA", ".dist-info/entry_points.txt")


def download(folder: Path, pip_args: list[str]) -> Path:
    """Downloads the wheel for Linux on x86-64, whatever this machine is."""
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"),
        *("--only-binary", ":all:", "--platform", "manylinux_2_28_x86_64"),
        *("--implementation", "cp", "--abi", "abi3", "--python-version", "3.12"),
        *("--dest", str(folder), *pip_args, "--requirement", str(REQUIREMENTS)),
    ]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def unpack(wheel: Path, folder: Path) -> None:
    """Writes the Python files and the metadata."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(_KEPT):
                archive.extract(name, folder)


def main() -> int:
    """Downloads and unpacks; says what to type where that fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="the folder to make")
    parser.add_argument("pip_args", nargs="*", help="handed to pip, after --")
    options = parser.parse_args()
    output: Path = options.output
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        try:
            wheel = download(Path(scratch), options.pip_args)
        except subprocess.CalledProcessError:
            print(
                f"vLLM for GPUs couldn't be downloaded, which the tests need as it is pinned in "
                f"{REQUIREMENTS.name}. With a package index that has it, type: make vllm-cuda "
                "PIP_ARGS='--index-url ...'",
                file=sys.stderr,
            )
            return 1
        unpacked = Path(scratch) / "unpacked"
        unpack(wheel, unpacked)
        if output.exists():
            shutil.rmtree(output)
        unpacked.rename(output)
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
