"""`benchmarks.engines`: what it refuses, and once for real."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from benchmarks import engines
from tests.engine.oracle_model import save_tiny_llama

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf-8")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--rounds 0 --decode-tokens -2", "--decode-tokens -2: it must be 1 or more"),
        ("--n-local 0", "--n-local 0: it must be 1 or more"),
        ("--n-global -1", "--n-global -1: it must be 0 or more"),
        ("--lengths 8k", "give whole numbers of tokens"),
        ("--lminf-lengths 3", "3 is too short"),
        ("--model nowhere", "it has no config.json"),
    ],
)
def test_refusals(
    options: str, reason: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = model.parent / "out" / "results.json"
    with pytest.raises(SystemExit, match="2"):
        engines.parse(["--model", str(model), "--output", str(output), *options.split()])
    assert reason in capsys.readouterr().err
    assert not output.parent.exists()


def test_defaults(model: Path) -> None:
    output = model.parent / "out" / "results.json"
    args = engines.parse(["--model", str(model), "--output", str(output)])
    trained = [1024, 4096, 8192, 16384, 32768]
    assert args.lengths_of == {"full": trained, "LMINF": [*trained, 131072]}


@pytest.mark.engine
def test_small_for_real(tmp_path: Path) -> None:
    """Three engines in one process, LMINF beyond the trained length, with and without its middle,
    and full attention up to it."""
    pytest.importorskip("matplotlib")
    model = save_tiny_llama(tmp_path / "model", 4, 2, 64, trained_length=512, num_layers=5)
    output = tmp_path / "results.json"
    options = "--dtype float32 --lengths 100,256,512 --lminf-lengths 1024 --n-local 128 --chunk 128"
    sizes = "--rounds 2 --decode-rounds 2 --decode-tokens 3 --middle-top-k 4 --archive-gib 1"
    where = ["--model", str(model), "--output", str(output)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.engines", *where, *options.split(), *sizes.split()],
        cwd=ROOT,
        env=os.environ | {"VLLM_ATTENTION_BACKEND": "LMINF"},  # which must not select it for both
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    data = json.loads(output.read_text(encoding="utf-8"))
    assert data["agreement"] < 1e-4
    assert data["setting"]["trained_length"] == 512
    chunks, decodes = pd.DataFrame(data["prefill"]), pd.DataFrame(data["decode"])
    # A chunk of one engine, then one of the other, as long as both have some.
    both = chunks[(chunks["round"] == 0) & (chunks["length"] == 256)]
    assert both["contender"].tolist() == ["full", "LMINF", "LMINF, middle"] * 2
    for length in (100, 256, 512, 1024):
        names = ["LMINF", "LMINF, middle"]
        if length < 1024:
            names = ["full", *names]
        assert decodes[decodes["length"] == length]["contender"].tolist() == names * 2
        for name in names:
            own = chunks[(chunks["length"] == length) & (chunks["contender"] == name)]
            assert own["end"].tolist() == [*range(128, length, 128), length] * 2
    # What is decoded from comes from the prefix cache, all but its last block.
    assert (decodes["length"] - decodes["cached_tokens"] <= 128).all()
    block = 5 * 128 * 2 * 2 * 64 * 4
    held = engines.held(data) / block
    assert held["full"].dropna().tolist() == [1, 3, 5]
    # One pinned block, and the window and the chunk of 128 each, spread over three.
    assert held["LMINF"].max() <= 4
    assert held["LMINF, middle"].equals(held["LMINF"].rename("LMINF, middle"))
    assert "With middle_top_k 4, a token after 1024 takes" in done.stdout
    assert output.with_suffix(".png").is_file()
    assert "times the tokens/s of 512" in done.stdout
