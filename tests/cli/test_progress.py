"""Progress on a terminal and elsewhere."""

import io
import time

import pytest
from rich.console import Console

from vllm_lminf.cli.progress import display


def test_plain_lines_come_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    out = io.StringIO()
    console = Console(file=out, force_terminal=False)
    with display(console, ["LMINF"], 4096) as shown:
        shown.show("LMINF", {"event": "phase", "text": "scoring"})
        now += 1
        shown.show("LMINF", {"event": "progress", "done": 1024})
        now += 10
        shown.show("LMINF", {"event": "progress", "done": 2048})
        shown.finish("LMINF")
    assert out.getvalue().splitlines() == [
        "[   0 s] LMINF: scoring",
        "[  11 s] LMINF: 2048 of 4096 tokens",
        "[  11 s] LMINF: done",
    ]


def test_bars_on_a_terminal() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with display(console, ["full attention", "LMINF"], 4096) as shown:
        shown.show("full attention", {"event": "phase", "text": "scoring"})
        shown.show("full attention", {"event": "progress", "done": 2048})
        shown.finish("full attention")
    text = out.getvalue()
    for words in ("full attention", "4096/4096", "done", "waiting"):
        assert words in text
