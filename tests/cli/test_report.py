"""The table, the results file, the picture and the last line."""

import io
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from vllm_lminf.cli.report import Evaluation, print_table, serve_command, table_rows, write_results

Make = Callable[..., Evaluation]


def test_a_row_holds_each_figure_of_both_engines(sample_evaluation: Make) -> None:
    rows = table_rows(sample_evaluation())
    assert rows[0] == ["4096  ", "3.500", "3.000", "244", "500", "41.0", "40.0", "32", "67"]
    assert [row[0] for row in rows] == ["4096  ", "8192  ", "12288 *", "16384 *"]


def test_one_engine_alone_has_a_table(sample_evaluation: Make) -> None:
    assert table_rows(sample_evaluation("lminf"))[3] == [*("16384 *", "3.000", "500", "40.0", "67")]


def test_the_printed_table_explains_itself(sample_evaluation: Make) -> None:
    out = io.StringIO()
    console = Console(file=out, width=140)
    print_table(console, sample_evaluation())
    text = " ".join(out.getvalue().split())
    for words in ("* beyond the trained length of 8192", "log-prob head on", "128 tokens each"):
        assert words in text


def test_results_hold_every_figure(tmp_path: Path, sample_evaluation: Make) -> None:
    write_results(sample_evaluation(), tmp_path / "results.json")
    data = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert data["results"]["full"]["figures"][3]["kv_blocks"] == 128
    assert data["results"]["lminf"]["decode_runs"][0]["step_ms"] == [40.0, 41.0]
    assert data["versions"]["python"].startswith("3.")
    assert data["machine"]["cores"] >= 1


def test_the_serve_command_repeats_the_settings() -> None:
    plain = serve_command("my models/m", {})
    assert plain == (
        "VLLM_ATTENTION_BACKEND=LMINF vllm serve 'my models/m' --max-model-len 1000000"
    )
    words = shlex.split(serve_command("m", {"n_global": 4}))
    assert json.loads(words[-1]) == {"lminf": {"n_global": 4}}


@pytest.mark.parametrize("engines", [(), ("lminf",)])
def test_the_picture_is_drawn(
    tmp_path: Path, sample_evaluation: Make, engines: tuple[str, ...]
) -> None:
    pytest.importorskip("matplotlib")
    from vllm_lminf.cli.plot import draw

    draw(sample_evaluation(*engines), tmp_path / "lminf.png")
    assert (tmp_path / "lminf.png").read_bytes().startswith(b"\x89PNG")
