"""The outcome of ``bench engine`` as figures and tables."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass

from vllm_lminf.cli.bench.engine_job import EngineJob, EngineResult, EngineRuns
from vllm_lminf.cli.bench.spread import Spread
from vllm_lminf.cli.bench.tables import Table, significant
from vllm_lminf.cli.report import SHORT_LABELS
from vllm_lminf.cli.scoring_job import ENGINE_NAMES, EngineName, seconds_to_reach

GIB = 1 << 30
DECODE_BASE = 2
PREFILL_BASE = 4
"""Lengths in n_local from which the longest one is compared: below, the window isn't full, or has
been for a small part of the prompt."""


@dataclass(frozen=True)
class Figures:
    """What one engine needs at one length, in every round.

    ``blocks`` is the most that the request held at once, in prefill and in decode.
    """

    prefill_seconds: list[float]
    decode_ms: list[float]
    blocks: int


def figures_at(runs: EngineRuns, length: int) -> Figures:
    """Reduce what an engine did to what it needs at a length."""
    own = [run for run in runs.prefill if run.tokens == length]
    longest = max(run.tokens for run in runs.prefill)
    prefill = own or [run for run in runs.prefill if run.tokens == longest]
    decodes = [run for run in runs.decode if run.length == length]
    held = [s.kv_blocks for run in prefill for s in run.steps if s.tokens <= length]
    return Figures(
        [seconds_to_reach(run.steps, length) for run in prefill],
        [statistics.median(run.step_ms) for run in decodes],
        max(*held, *(run.kv_blocks for run in decodes)),
    )


def engine_tables(job: EngineJob, result: EngineResult, pool_gib: float) -> list[Table]:
    """Everything that is shown of a run."""
    return [speed_table(job, result), memory_table(job, result, pool_gib)]


def speed_table(job: EngineJob, result: EngineResult) -> Table:
    """Prefill and decode of both engines, and how many times LMINF is faster."""
    rows = []
    for length in job.lengths_of("lminf"):
        lminf = figures_at(result.runs["lminf"], length)
        mine = _speeds(length, lminf)
        if length in job.lengths:
            full = figures_at(result.runs["full"], length)
            (prefill, ms), faster = _speeds(length, full), _times_faster(full, lminf)
        else:
            prefill, ms, faster = "", "", ("", "")
        rows.append((str(length), prefill, mine[0], faster[0], ms, mine[1], faster[1]))
    return Table(
        f"Speed of one request, {job.dtype}, n_local {job.lminf['n_local']}",
        (
            "length",
            "prefill\nfull\ntok/s",
            "prefill\nLMINF\ntok/s",
            "LMINF is\nfaster by",
            "decode\nfull\nms/tok",
            "decode\nLMINF\nms/tok",
            "LMINF is\nfaster by",
        ),
        rows,
    )


def memory_table(job: EngineJob, result: EngineResult, pool_gib: float) -> Table:
    """KV cache that a request holds, and how many such requests a pool of the given size takes."""
    rows = []
    for length in job.lengths_of("lminf"):
        cells = {name: _memory(job, result, name, length, pool_gib) for name in ENGINE_NAMES}
        (full_mb, full_fit), (lminf_mb, lminf_fit) = cells["full"], cells["lminf"]
        rows.append((str(length), full_mb, lminf_mb, full_fit, lminf_fit))
    fit = f"requests\nin {pool_gib:g} GiB,\n"
    kinds = [SHORT_LABELS[name] for name in ENGINE_NAMES]
    return Table(
        "KV cache",
        ("length", *(f"KV held\n{k}\nMB" for k in kinds), *(fit + k for k in kinds)),
        rows,
    )


def flatness(job: EngineJob, result: EngineResult) -> list[str]:
    """How LMINF at its longest length compares with a short one, in words."""
    runs, n_local, longest = result.runs["lminf"], job.lminf["n_local"], job.longest
    lines = []
    if (base := _base(job, DECODE_BASE * n_local)) is not None:
        far, near = figures_at(runs, longest).decode_ms, figures_at(runs, base).decode_ms
        ratio = Spread.of_ratios(far, near).text(3)
        lines.append(f"LMINF's decode at {longest} tokens takes {ratio} times that at {base}.")
    if (base := _base(job, PREFILL_BASE * n_local)) is not None:
        far = [longest / s for s in figures_at(runs, longest).prefill_seconds]
        # A length with prompts of its own has as many rounds as the longest one.
        near = [base / s for s in figures_at(runs, base).prefill_seconds]
        ratio = Spread.of_ratios(far, near).text(3)
        lines.append(
            f"LMINF's prefill of {longest} tokens runs at {ratio} times the tokens/s of {base}; "
            f"the first {n_local} of either see half a window."
        )
        if ratios := _late_over_early(runs, longest, n_local, base):
            lines.append(
                f"A chunk in their last quarter takes {Spread.of(ratios).text(3)} times one behind "
                f"the first {n_local} and before {base}."
            )
    return lines


def _late_over_early(runs: EngineRuns, longest: int, n_local: int, base: int) -> list[float]:
    """Of each prefill of the longest prompt, the times of chunks that all see a whole window."""
    ratios = []
    for run in runs.prefill:
        if run.tokens != longest:
            continue
        chunks = [
            (before.tokens, after.tokens, after.seconds - before.seconds)
            for before, after in itertools.pairwise(run.steps)
        ]
        early = [s for begin, end, s in chunks if n_local <= begin and end <= base]
        # The last one may be shorter.
        late = [s for begin, _, s in chunks[:-1] if begin >= longest * 3 // 4]
        if early and late:
            ratios.append(statistics.median(late) / statistics.median(early))
    return ratios


def engine_notes(job: EngineJob, result: EngineResult) -> list[str]:
    """What a reader of the tables must know."""
    lminf = result.runs["lminf"]
    lines = [
        f"Both engines in one process, in turns, {result.threads} threads; medians of {job.rounds} "
        f"(prefill) and {job.decode_rounds} (decode) rounds, ratios of each round with quartiles.",
        f"Prefill: a cold prompt in chunks of {job.chunk}. Decode: {job.decode_tokens} tokens of "
        "one greedy request whose prompt the prefix cache holds.",
        "KV held: the most at once, in prefill and decode, in blocks of "
        f"{lminf.block_size} tokens; a pool takes requests by it.",
        *flatness(job, result),
    ]
    trained = result.trained_length
    if trained is not None and trained < max(job.lengths):
        lines.append(
            f"Full attention beyond the trained length of {trained} tokens has a longer RoPE table "
            "here, for the sake of its times; what it answers there is no use."
        )
    return lines


def _base(job: EngineJob, least: int) -> int | None:
    """The shortest measured length that is not below ``least`` and not the longest one."""
    lengths = job.lengths_of("lminf")[:-1]
    return next((length for length in lengths if length >= least), None)


def _speeds(length: int, figures: Figures) -> tuple[str, str]:
    seconds = statistics.median(figures.prefill_seconds)
    return f"{length / seconds:.0f}", significant(statistics.median(figures.decode_ms))


def _times_faster(full: Figures, lminf: Figures) -> tuple[str, str]:
    return (
        str(Spread.of_ratios(full.prefill_seconds, lminf.prefill_seconds)),
        str(Spread.of_ratios(full.decode_ms, lminf.decode_ms)),
    )


def _memory(
    job: EngineJob, result: EngineResult, name: EngineName, length: int, pool_gib: float
) -> tuple[str, str]:
    """MB that a request holds, and how many of them the pool takes beside vLLM's null block."""
    if length not in job.lengths_of(name):
        return "", ""
    runs = result.runs[name]
    blocks = figures_at(runs, length).blocks
    pool_blocks = int(pool_gib * GIB) // runs.block_bytes - 1
    return significant(blocks * runs.block_bytes / 1e6), str(max(0, pool_blocks) // blocks)
