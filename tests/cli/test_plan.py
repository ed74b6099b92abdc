"""The plan: its table around made-up figures, and the figures of real configurations. That they are
an engine's own is tested in tests/engine/test_middle.py.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.engine.families import FAMILIES
from tests.engine.oracle_model import save_tiny_llama
from vllm_lminf.cli import plan
from vllm_lminf.cli.main import main
from vllm_lminf.cli.outline import parse_engine_arguments
from vllm_lminf.cli.planning import Plan, PlanJob, Row, make_plan
from vllm_lminf.pattern import LambdaPattern, cdiv

MIB = 1 << 20


def rows(**changed: Any) -> list[Row]:
    """Blocks of 1 MiB: 10 for a request with full attention, 4 with LMINF; its archive takes 20."""
    common: dict[str, Any] = {"block_size": 128, "block_bytes": MIB, "pool_blocks": 39}
    lminf = {"n_local": 256, "archive_gib": 0.5}
    archive = {"archive_page_bytes": 2 * MIB, "archive_request_pages": 20, "archive_pages": 100}
    return [
        Row("full", None, request_blocks=10, **common),
        Row("lminf", lminf, request_blocks=4, **common),
        Row("middle", {**lminf, "middle_top_k": 16}, request_blocks=4, **common, **archive)
        if not changed
        else Row("middle", {**lminf, "middle_top_k": 16}, **changed),
    ]


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Row]], dict[str, Any]]:
    """Have the child process answer with these rows; returns what it was asked, once it was."""

    def answer_with(with_rows: list[Row]) -> dict[str, Any]:
        asked: dict[str, Any] = {}

        def ask_child(module: str, job: dict[str, Any], env: dict[str, str]) -> Any:
            asked.update(job, env=env)
            return asdict(Plan(1024, 2048, "cpu", with_rows))

        monkeypatch.setattr(plan, "ask_child", ask_child)
        return asked

    return answer_with


def run(folder: Path, *more: str) -> int:
    (folder / "config.json").write_text("{}", encoding="utf-8")
    words = ["plan", str(folder), "--max-model-len", "1280", "--memory", "40MiB", *more]
    return main(words)


def test_a_row_counts_whole_requests() -> None:
    full, lminf, middle = rows()
    assert [row.requests for row in (full, lminf, middle)] == [3, 9, 5]
    assert (full.request_bytes, middle.archive_request_bytes) == (10 * MIB, 40 * MIB)


def test_the_table(answer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer(rows())
    assert run(tmp_path) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        *("full attention 10.0 MiB - 3", "LMINF, n_local 256 4.00 MiB - 9"),
        *("LMINF, n_local 256, middle_top_k 16 4.00 MiB 40.0 MiB 5", "40.0 MiB"),
        *("in blocks of 128 tokens", "2048 tokens in flight", "archive_gib 0.5 holds 5"),
        "Trained on 1024 tokens",
    ):
        assert words in shown


def test_an_archive_that_is_too_small_says_which_would_do(
    answer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    *others, middle = rows()
    small = Row(**{**asdict(middle), "archive_pages": 19})
    answer([*others, small])
    assert run(tmp_path) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "holds 0 of these requests on the host: set it to 0.05 or more" in shown


def test_json(answer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer(rows())
    assert run(tmp_path, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["max_model_len"], data["memory_bytes"]) == (1280, 40 * MIB)
    assert [row["requests"] for row in data["rows"]] == [3, 9, 5]
    assert data["rows"][2]["archive_request_bytes"] == 40 * MIB


def test_what_the_child_is_asked(
    answer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "LMINF")
    asked = answer(rows())
    options = ["--n-local", "256", "1k", "--middle-top-k", "4", "--n-global", "4"]
    assert run(tmp_path, *options, "--kv-cache-dtype", "fp8", "--block-size=64") == 0
    assert asked["n_local"] == [256, 1000]
    assert asked["settings"] == {"n_global": 4}
    assert asked["middle_top_k"] == 4
    assert asked["engine"] == ["--kv-cache-dtype", "fp8", "--block-size=64"]
    assert asked["model"] == str(tmp_path)
    assert "VLLM_ATTENTION_BACKEND" not in asked["env"]


def test_a_middle_that_is_refused(
    answer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only who asks for it is turned away."""
    answer(rows(refused=["middle_top_k 16, and ALiBi"]))
    assert run(tmp_path) == 0
    assert "The middle isn't served: middle_top_k 16, and ALiBi" in " ".join(
        capsys.readouterr().out.split()
    )
    assert run(tmp_path, "--middle-top-k", "16") == 1
    assert "- middle_top_k 16, and ALiBi" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["none/at/all"], "none/at/all: no such folder"),
        (["."], "no config.json"),
    ],
)
def test_no_checkpoint(
    words: list[str],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *words, "--max-model-len", "1000", "--memory", "1GiB"]) == 1
    assert reason in capsys.readouterr().err


def test_the_plugin_is_shut_out(
    answer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answer(rows())
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert run(tmp_path) == 1
    assert "shuts this plugin out: add lminf to it" in capsys.readouterr().err


def test_a_setting_that_is_not_allowed(
    answer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(rows())
    assert run(tmp_path, "--n-global", "many") == 1
    assert "\"n_global\" in lminf is 'many'" in capsys.readouterr().err


def figures(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    """What ``--json`` prints of a real plan."""
    words = ["plan", str(folder), "--max-model-len", "5000", "--memory", "16MiB", "--json"]
    assert main([*words, "--skip-tokenizer-init", "--dtype", "float32", *more]) == 0
    data: dict[str, Any] = json.loads(capsys.readouterr().out)
    return data


def test_a_plain_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By hand: two layers, two key heads of 32, blocks of 16 tokens in float32."""
    model = save_tiny_llama(tmp_path, 4, 2, 32, trained_length=256)
    (model / "model.safetensors").unlink()  # no weights are read
    options = ["--block-size", "16", "--max-num-batched-tokens", "128"]
    data = figures(model, capsys, *options, "--middle-from-layer", "2", "--archive-gib", "0.01")
    full, *others = data["rows"]
    block = 2 * 2 * 32 * 2 * 4 * 16
    assert full["request_bytes"] == block * 313
    assert full["requests"] == ((16 << 20) // block - 1) // 313
    in_flight = data["max_in_flight_tokens"]
    assert in_flight % 128 == 0
    for row, n_local in zip(others, [256, 128, 64] * 2, strict=True):
        held = LambdaPattern(10, n_local, n_local).max_blocks_held(16, in_flight, 5000)
        assert row["request_bytes"] == block * held
        assert row["settings"]["n_local"] == n_local
    # One layer recalls; keys and values, then codes, scales and radii, centres.
    page = 2 * (16 * (2 * 32 * 4 + 32 + 8) + 32 * 4)
    assert [row["archive_request_bytes"] for row in others] == [0] * 3 + [313 * page] * 3
    assert others[3]["archive_pages"] == int(0.01 * (1 << 30)) // page - 1


def test_windows_of_a_model_s_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Gemma 3: two of four layers keep 24 tokens, whatever n_local is; without LMINF the other two
    keep all."""
    model = FAMILIES["gemma-3"].save(tmp_path)
    options = ["--block-size", "16", "--max-num-batched-tokens", "64", "--middle-top-k", "0"]
    data = figures(model, capsys, *options, "--n-local", "200", "100")
    full, wide, narrow = data["rows"]

    def bound(row: dict[str, Any], pattern: LambdaPattern) -> int:
        return pattern.max_blocks_held(row["block_size"], data["max_in_flight_tokens"], 5000)

    own = LambdaPattern(0, 24, 24)
    assert full["request_blocks"] == cdiv(5000, full["block_size"]) + bound(full, own)
    for row, n_local in ((wide, 200), (narrow, 100)):
        held = bound(row, own) + bound(row, LambdaPattern(10, n_local, n_local))
        assert row["request_blocks"] == held


def test_an_option_that_vllm_does_not_know() -> None:
    with pytest.raises(ValueError, match="unrecognized arguments: --no-such-option 4"):
        parse_engine_arguments("some-model", ["--no-such-option", "4"])


def test_figures_are_of_all_devices_together(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path, 4, 2, 32, trained_length=256)
    job = PlanJob(str(model), 5000, MIB, engine=["--tensor-parallel-size", "2"])
    with pytest.raises(ValueError, match="leave --tensor-parallel-size out"):
        make_plan(job)
