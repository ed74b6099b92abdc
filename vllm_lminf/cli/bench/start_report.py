"""The outcome of ``bench start`` as a table."""

from __future__ import annotations

from vllm_lminf.cli.bench.spread import Spread
from vllm_lminf.cli.bench.start_job import KINDS, StartResult
from vllm_lminf.cli.bench.tables import Table


def start_table(result: StartResult) -> Table:
    """How long each kind of start takes, and how much longer than vLLM's own in the same round."""
    alone = result.seconds["vLLM alone"]
    rows = []
    for kind in KINDS:
        seconds = result.seconds[kind]
        added = Spread.of([mine - own for mine, own in zip(seconds, alone, strict=True)])
        rows.append((kind, Spread.of(seconds).text(1), "" if seconds is alone else added.text(1)))
    return Table("Start of an engine", ("start", "seconds", "added"), rows)


def start_notes(result: StartResult) -> list[str]:
    """What a reader of the table must know."""
    return [
        "From a new process to the first token, eager on a CPU; medians of "
        f"{len(result.seconds['LMINF'])} rounds in which the kinds took turns, with quartiles; "
        "added: the differences in each round.",
        "First start: no kernel is compiled yet. vLLM's own caches are filled in all of them.",
    ]
