"""The offline example, run as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

EXAMPLE = Path(__file__).parents[2] / "examples" / "offline_batch.py"


def test_offline_batch(model_path: str) -> None:
    """Three prompts in one batch, the last beyond the trained length."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    result = subprocess.run(
        [
            sys.executable,
            str(EXAMPLE),
            "--model",
            model_path,
            "--lengths",
            "64,1000,8400",
            "--max-tokens",
            "16",
        ],
        capture_output=True,
        text=True,
        env=environment | {"COLUMNS": "120"},
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert "LMINF is active" in result.stdout + result.stderr
    assert "8400" in result.stdout
    assert "(beyond trained)" in result.stdout
    assert "The model was trained for 8192 tokens." in result.stdout
