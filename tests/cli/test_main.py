"""The command line itself: what it loads, and how it refuses."""

import subprocess
import sys
from pathlib import Path

import pytest

from vllm_lminf import __version__
from vllm_lminf.cli.eval import with_measure
from vllm_lminf.cli.main import build_parser, main

HEAVY = ("vllm", "torch", "transformers", "matplotlib", "rich", "numpy")


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("eval", "passkey"),
        ("eval nll", "--distance-limit"),
        ("eval passkey", "--depths"),
        ("eval ruler", "--tasks"),
        ("doctor", "--fix"),
        ("plan", "--memory"),
        ("serve", "--n-local"),
    ],
)
def test_help_loads_nothing_heavy(command: str, option: str) -> None:
    code = (
        "import sys\n"
        "from vllm_lminf.cli.main import main\n"
        "try:\n"
        f"    main({[*command.split(), '--help']})\n"
        "except SystemExit as stop:\n"
        "    assert stop.code == 0\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert option in done.stdout
    assert done.stderr.strip() == "[]"


def test_a_command_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "COMMAND" in capsys.readouterr().err


def test_options_of_eval() -> None:
    words = ["eval", "nll", "--model", "m", "--text", "t", "--output", "o"]
    args = build_parser().parse_args(words)
    assert (args.n_global, args.n_local, args.distance_limit) == (None, None, None)
    assert (args.engines, args.lengths, args.chunk) == (None, None, 2048)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("eval --model m", "eval nll --model m"),
        ("eval nll --model m", "eval nll --model m"),
        ("eval passkey --model m", "eval passkey --model m"),
        ("eval --help", "eval --help"),
        ("eval", "eval"),
        ("doctor --fix", "doctor --fix"),
        ("--version", "--version"),
    ],
)
def test_eval_alone_means_nll(given: str, meant: str) -> None:
    assert with_measure(given.split()) == meant.split()


def test_every_problem_is_named_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(
        [
            *("eval", "--model", str(tmp_path), "--text", str(tmp_path / "none.txt")),
            *("--output", str(tmp_path / "out"), "--chunk", "0", "--decode-tokens", "1"),
        ]
    )
    errors = capsys.readouterr().err
    assert status == 1
    for words in ("no config.json", "no such file", "--chunk 0", "--decode-tokens 1"):
        assert words in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command", [["-m", "vllm_lminf"], ["-c", "import vllm_lminf.cli.main as m; m.main()"]]
)
def test_version_loads_nothing_heavy(command: list[str]) -> None:
    """`vllm-lminf --version` and `python -m vllm_lminf --version`."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command, "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"vllm-lminf {__version__}\n")
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "vllm_lminf.cli.main" in loaded
    assert not loaded & set(HEAVY)
