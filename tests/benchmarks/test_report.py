"""Tables, notes, pictures and the page, of results that are made up."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest

from benchmarks import engines, kernels, page, report
from tests.benchmarks.made_up import cpu_kernels, engines_data, gpu_kernels


def rows(text: str) -> list[list[str]]:
    """The cells of a Markdown table, its head first."""
    lines = [line[1:-1].split("|") for line in text.splitlines()]
    assert set("".join(lines.pop(1))) <= set(":-")
    return [[cell.strip() for cell in line] for line in lines]


def tables(program: ModuleType, data: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    """By title, a dictionary for every row."""
    found = {}
    for title, text in program.tables(data):
        head, *body = rows(text)
        found[title] = [dict(zip(head, row, strict=True)) for row in body]
    return found


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.009161, "0.00916"),
        (0.0999999, "0.100"),
        (0.999999, "1.00"),
        (1.0, "1.00"),
        (12.345, "12.3"),
        (402.4, "402"),
        (18432.0, "18400"),
        (0.0, "0.00"),
    ],
)
def test_three_significant_digits(value: float, text: str) -> None:
    assert report.significant(value) == text


def test_spreads() -> None:
    assert report.spread(pd.Series([2.0])) == "2.00 (2.00–2.00)"
    assert report.spread(pd.Series([10.0, 50.0, 20.0, 40.0, 30.0])) == "30.0 (20.0–40.0)"
    assert report.spread(pd.Series([1.0, 3.0]) / pd.Series([2.0, 2.0]), 3) == "1.000 (0.750–1.250)"
    assert report.spread(pd.Series([float("nan")])) == ""


def test_cpu_tables() -> None:
    """Ratios are of each round."""
    found = tables(kernels, cpu_kernels())
    ratios, times = found["Ratios of times"], found["Times"]
    assert len(ratios) == len(times) == 8
    first = ratios[0]
    assert (first["heads"], first["requests × tokens"], first["length"]) == (
        "4/2/64",
        "1 × 1",
        "700",
    )
    for n_global, ratio in ((0, "0.50"), (10, "0.60"), (100, "1.50")):
        assert (
            first[f"LMINF, n_global {n_global} / vLLM, same window"] == f"{ratio} ({ratio}–{ratio})"
        )
    assert first["LMINF, n_global 10 / vLLM, full attention"] == "0.10 (0.10–0.10)"
    (mixed, _) = [row for row in ratios if row["kind"] == "mixed"]
    assert mixed["requests × tokens"] == "3 × 1, 1 × 130"
    assert mixed["mixed / sum of its parts"] == "1.75 (1.63–1.88)"
    (mixed, _) = [row for row in times if row["kind"] == "mixed"]
    assert (mixed["decodes alone, ms"], mixed["prefill alone, ms"]) == ("0.150", "0.350")
    # Medians: 1.5 MB and 3 million operations in 0.6 and 1.2 ms.
    assert (mixed["LMINF ms"], mixed["LMINF GB/s"], mixed["LMINF GFLOP/s"]) == (
        *("0.900", "1.88", "3.75"),
    )
    assert (mixed["vLLM, same window, ms"], mixed["vLLM, full attention, ms"]) == ("1.50", "9.00")
    (rotation, *others) = found["Rotation of queries and keys, a layer"]
    assert len(others) == 3
    assert list(rotation.values()) == ["4/2/64", "1", "10.0", "12.5", "1.25 (0.88–1.62)"]
    notes = " ".join(kernels.notes(cpu_kernels()))
    assert "some device, torch 2.0; window 200" in notes
    assert "variant 'vec'" in notes


def test_gpu_tables() -> None:
    """1.5 MB in 1 and 2 ms, where 2 GB/s and 8 GFLOP/s are achieved; absences are told."""
    found = tables(kernels, gpu_kernels())
    ratios, times = found["Ratios of times"], found["Times"]
    xformers = "LMINF, n_global 10 / LMINF through xformers"
    assert [row[xformers] for row in ratios] == ["0.50 (0.50–0.50)", "", "", "", ""]
    for row in ratios:
        assert row["LMINF, n_global 100 / LMINF, n_global 0"] == "1.00 (1.00–1.00)"
        full = row["LMINF, n_global 10 / PyTorch, full attention"]
        assert full == ("" if row["kind"] == "context" else "0.50 (0.50–0.50)")
    for row in times:
        assert row["% of the device's GB/s"] == "56.2"  # the mean of the two rounds' rates
        assert row["% of the device's GFLOP/s"] == "28.1"
    contexts = found["Decode as the context grows"]
    assert [row["length"] for row in contexts] == ["200", "51200"]
    assert {row["/ the shortest"] for row in contexts} == {"1.000 (1.000–1.000)"}
    notes = " ".join(kernels.notes(gpu_kernels()))
    assert "Absent from 4 cases: LMINF through xformers: it isn't there." in notes
    assert "Achieved in this run: 2 GB/s" in notes


def test_who_is_always_absent_has_no_column() -> None:
    data = gpu_kernels()
    data["seconds"] = [r for r in data["seconds"] if r["contender"] != "LMINF through xformers"]
    head = next(iter(tables(kernels, data)["Ratios of times"]))
    assert not any("xformers" in name for name in head)


def test_engine_tables() -> None:
    (engine_rows,) = tables(engines, engines_data()).values()
    same = "1.00 (1.00–1.00)"
    shortest, _, longest, beyond = engine_rows
    assert shortest["prefill full tok/s"] == shortest["prefill LMINF tok/s"] == "75.0"
    assert shortest["prefill: LMINF is faster by"] == same
    assert longest["prefill: LMINF is faster by"] == "2.50 (2.50–2.50)"
    assert (longest["decode full ms/tok"], longest["decode LMINF ms/tok"]) == ("12.0", "6.00")
    assert longest["decode: LMINF is faster by"] == "2.00 (2.00–2.00)"
    assert (longest["KV held full MB"], longest["KV held LMINF MB"]) == ("5.24", "3.15")
    assert longest["requests in 4 GiB, full"] == str(4096 // 5)
    assert longest["requests in 4 GiB, LMINF"] == str(4096 // 3)
    assert (beyond["tokens"], beyond["prefill full tok/s"]) == ("1024", "")
    assert beyond["prefill LMINF tok/s"] == "96.0"


def test_flatness_is_told_of_lengths_that_are_long_enough() -> None:
    assert engines.flatness(engines_data()) == [
        "LMINF's decode at 1024 tokens takes 1.000 (1.000–1.000) times that at 256.",
        "LMINF's prefill of 1024 tokens runs at 1.000 (1.000–1.000) times the tokens/s of 512; the "
        "first 128 of either see half a window.",
        "A chunk in its last quarter takes 1.000 (1.000–1.000) times one behind the first 128 and "
        "before 512.",
    ]
    assert engines.flatness(engines_data((100,), 200)) == []
    assert any("trained length of 256" in line for line in engines.notes(engines_data()))


@pytest.mark.parametrize(
    ("program", "data"),
    [(kernels, cpu_kernels()), (kernels, gpu_kernels()), (engines, engines_data())],
    ids=["cpu", "gpu", "engines"],
)
def test_everything_is_written(
    program: ModuleType, data: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    output = tmp_path / "out.json"
    report.publish(output, data, program.tables, program.notes, program.draw)
    written = json.loads(output.read_text(encoding="utf-8"))
    assert written["versions"]["python"].startswith("3.")
    assert written["machine"]["cores"] >= 1
    around = ("versions", "machine")
    assert {k: v for k, v in written.items() if k not in around} == {
        k: v for k, v in json.loads(json.dumps(data)).items() if k not in around
    }
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for _, text in program.tables(written):
        assert text in printed
    for line in program.notes(written):
        assert line in printed


class TestPage:
    @pytest.fixture
    def copy(self, tmp_path: Path) -> Path:
        """A copy of the page, with results of both programs beside it."""
        copy = tmp_path / "benchmarks.md"
        copy.write_text(page.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
        folder = tmp_path / "benchmarks"
        folder.mkdir()
        for name, data in (("kernels-cpu", cpu_kernels()), ("engines-cpu", engines_data())):
            (folder / f"{name}.json").write_text(json.dumps(data), encoding="utf-8")
        return copy

    def test_tables_stand_between_the_marks(self, copy: Path) -> None:
        """And nowhere else; twice is once."""
        before, _, rest = copy.read_text(encoding="utf-8").partition(page.BEGIN)
        after = rest.partition(page.END)[2]
        page.write(copy)
        written = copy.read_text(encoding="utf-8")
        assert written.startswith(before)
        assert written.endswith(after)
        for words in (
            "0.60 (0.60–0.60)",
            "2.50 (2.50–2.50)",
            "some device, torch 2.0",
            "![kernels-cpu](benchmarks/kernels-cpu.png)",
        ):
            assert words in written
        page.write(copy)
        assert copy.read_text(encoding="utf-8") == written

    def test_refusals(self, copy: Path) -> None:
        copy.write_text("no marks", encoding="utf-8")
        with pytest.raises(SystemExit, match="has lost the marks"):
            page.write(copy)
        for results in (copy.parent / "benchmarks").iterdir():
            results.unlink()
        with pytest.raises(SystemExit, match="holds no results: run `make bench`"):
            page.write(copy)
