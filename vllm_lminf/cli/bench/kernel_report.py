"""The outcome of ``bench kernel`` as tables, and as ratios for the picture."""

from __future__ import annotations

import statistics

from vllm_lminf.cli.bench.kernel_job import (
    LMINF_ROTARY,
    N_GLOBALS,
    PARTS,
    SHOWN_N_GLOBAL,
    VLLM_FULL,
    VLLM_ROTARY,
    VLLM_WINDOW,
    CaseResult,
    KernelJob,
    KernelResult,
    RotationResult,
    lminf,
)
from vllm_lminf.cli.bench.spread import Spread
from vllm_lminf.cli.bench.tables import Table, significant

SHOWN = lminf(SHOWN_N_GLOBAL)


def beside_vllm(result: CaseResult, n_global: int) -> Spread:
    """LMINF's time over that of vLLM's kernel at the same window."""
    return Spread.of_ratios(result.seconds[lminf(n_global)], result.seconds[VLLM_WINDOW])


def beside_parts(result: CaseResult) -> Spread:
    """The time of a mixed batch over the sum of those of its parts."""
    parts = [sum(seconds) for seconds in zip(*(result.seconds[p] for p in PARTS), strict=True)]
    return Spread.of_ratios(result.seconds[SHOWN], parts)


def mixed_ratios(cases: list[CaseResult]) -> str:
    """`beside_parts` of every mixed batch, in words."""
    return ", ".join(
        f"{beside_parts(case)} ({case.case.heads})" for case in cases if case.case.is_mixed
    )


def rotation_ratio(result: RotationResult) -> Spread:
    """The time of LMINF's rotation over that of vLLM's own."""
    return Spread.of_ratios(result.seconds[LMINF_ROTARY], result.seconds[VLLM_ROTARY])


def kernel_tables(job: KernelJob, result: KernelResult) -> list[Table]:
    """Everything that is shown of a run."""
    return [
        ratio_table(job, result.cases),
        time_table(job, result.cases),
        mixed_table(result.cases),
        rotation_table(result.rotations),
    ]


KEYS = ("heads", "requests\n× tokens")


def ratio_table(job: KernelJob, cases: list[CaseResult]) -> Table:
    """LMINF's time over that of vLLM's kernel at the same window."""
    rows = [
        (
            str(case.case.heads),
            case.case.batch,
            *(str(beside_vllm(case, n_global)) for n_global in N_GLOBALS),
        )
        for case in cases
    ]
    head = (*KEYS, *(f"LMINF / vLLM,\nn_global {n_global}" for n_global in N_GLOBALS))
    return Table(f"Attention beside vLLM's at the same window ({job.window})", head, rows, 2)


def time_table(job: KernelJob, cases: list[CaseResult]) -> Table:
    """Times and rates, full attention's among them."""
    rows = []
    for case in cases:
        time = statistics.median(case.seconds[SHOWN])
        full, gain = "", ""
        if VLLM_FULL in case.seconds:
            full = _ms(case.seconds[VLLM_FULL])
            ratio = Spread.of_ratios(case.seconds[VLLM_FULL], case.seconds[SHOWN])
            gain = significant(ratio.median, 2)
        rows.append(
            (
                str(case.case.heads),
                case.case.batch,
                _ms(case.seconds[VLLM_WINDOW]),
                significant(1000 * time),
                significant(case.kv_bytes[SHOWN] / time / 1e9),
                significant(case.flops[SHOWN] / time / 1e9),
                full,
                gain,
            )
        )
    head = (
        "vLLM\nms",
        "LMINF\nms",
        "LMINF\nGB/s",
        "LMINF\nGFLOP/s",
        "vLLM full\nms",
        "full /\nLMINF",
    )
    return Table(f"Times over {job.length} tokens, {job.dtype}", (*KEYS, *head), rows, 2)


def mixed_table(cases: list[CaseResult]) -> Table:
    """Mixed batches beside the sum of their parts."""
    rows = [
        (
            str(case.case.heads),
            case.case.batch,
            *(_ms(case.seconds[name]) for name in (*PARTS, SHOWN)),
            str(beside_parts(case)),
        )
        for case in cases
        if case.case.is_mixed
    ]
    return Table(
        "Mixed batches beside the sum of their parts",
        (*KEYS, "decodes\nms", "prefill\nms", "together\nms", "together /\nsum"),
        rows,
        num_keys=2,
    )


def rotation_table(rotations: list[RotationResult]) -> Table:
    """LMINF's rotation beside vLLM's own rotary operator."""
    rows = [
        (
            str(rotation.heads),
            str(rotation.tokens),
            *(
                significant(1e6 * statistics.median(rotation.seconds[name]))
                for name in (VLLM_ROTARY, LMINF_ROTARY)
            ),
            str(rotation_ratio(rotation)),
        )
        for rotation in rotations
    ]
    return Table(
        "Rotation of queries and keys, per layer",
        (KEYS[0], "tokens", "vLLM\nµs", "LMINF\nµs", "LMINF /\nvLLM"),
        rows,
        num_keys=2,
    )


def kernel_notes(job: KernelJob, result: KernelResult) -> list[str]:
    """What a reader of the tables must know."""
    return [
        f"Times, GB/s and GFLOP/s of LMINF are with n_global {SHOWN_N_GLOBAL}. Ratios: the median "
        f"of {job.rounds} rounds in which all took turns (and the quartiles); below 1 LMINF is "
        "faster.",
        "Heads: query heads/key heads/head size. "
        f"vLLM's kernel ran its variant {result.instructions!r}; {result.threads} threads. Every "
        "kernel was compared with the oracle first.",
    ]


def _ms(seconds: list[float]) -> str:
    return significant(1000 * statistics.median(seconds))
