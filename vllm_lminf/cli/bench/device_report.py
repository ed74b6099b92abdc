"""The outcome of ``bench kernel --device cuda`` as tables, and as figures for the picture."""

from __future__ import annotations

import statistics

from vllm_lminf.cli.bench.device_job import (
    FLASH,
    FLEX,
    FULL,
    OTHER_PATHS,
    OTHERS_OWN,
    SHOWN,
    WINDOWED,
    XFORMERS,
    DeviceCaseResult,
    DeviceJob,
    DeviceResult,
    Kind,
    triton,
)
from vllm_lminf.cli.bench.kernel_job import N_GLOBALS, SHOWN_N_GLOBAL
from vllm_lminf.cli.bench.spread import Spread
from vllm_lminf.cli.bench.tables import Table, significant

SHORT = {
    XFORMERS: "through\nxformers",
    FLASH: "through\nFlash",
    WINDOWED: "Flash,\nwindow",
    FLEX: "Flex,\nwindow",
    FULL: "full",
}
"""What a contender is called in the head of a column."""


def of_kind(result: DeviceResult, kind: Kind) -> list[DeviceCaseResult]:
    """The results of a kind of cases."""
    return [case for case in result.cases if case.case.kind == kind]


def ratio(case: DeviceCaseResult, name: str, other: str) -> Spread | None:
    """A contender's time over another's; None where one of them is absent."""
    if name not in case.seconds or other not in case.seconds:
        return None
    return Spread.of_ratios(case.seconds[name], case.seconds[other])


def bandwidth_share(case: DeviceCaseResult, result: DeviceResult, name: str = SHOWN) -> float:
    """Bytes that must be read a second, over what the device achieves."""
    return case.kv_bytes[name] / statistics.median(case.seconds[name]) / result.bandwidth


def throughput_share(case: DeviceCaseResult, result: DeviceResult, name: str = SHOWN) -> float:
    """Operations a second, over what the device achieves."""
    return case.flops[name] / statistics.median(case.seconds[name]) / result.throughput


def flatness(result: DeviceResult) -> list[tuple[int, Spread]]:
    """Lengths of context, and the time over that of the shortest."""
    cases = of_kind(result, "context")
    return [
        (case.case.length, Spread.of_ratios(case.seconds[SHOWN], cases[0].seconds[SHOWN]))
        for case in cases
    ]


def device_tables(job: DeviceJob, result: DeviceResult) -> list[Table]:
    """Everything that is shown of a run."""
    tables = []
    for kind, title in (("decode", "Decode"), ("prefill", "Prefill")):
        cases = of_kind(result, kind)  # type: ignore[arg-type]
        tables.append(_rates(f"{title}, window {job.window}, {job.dtype}", cases, result))
        tables.append(_ratios(f"{title}: the time of LMINF / that of others", cases, OTHERS_OWN))
        tables.append(_ratios(f"{title}: the same / LMINF by others' kernels", cases, OTHER_PATHS))
        tables.append(_global_ratios(f"{title}: the cost of global tokens", cases))
    tables.append(_contexts(job, result))
    return [table for table in tables if len(table.head) > table.num_keys]


def _keys(case: DeviceCaseResult) -> tuple[str, str]:
    return f"{case.case.requests} × {case.case.queries}", str(case.case.length)


_HEAD = ("requests\n× tokens", "context")


def _rates(title: str, cases: list[DeviceCaseResult], result: DeviceResult) -> Table:
    rows = []
    for case in cases:
        time = statistics.median(case.seconds[SHOWN])
        rows.append(
            (
                *_keys(case),
                significant(1e6 * time),
                significant(case.kv_bytes[SHOWN] / time / 1e9),
                f"{bandwidth_share(case, result):.0%}",
                significant(case.flops[SHOWN] / time / 1e12),
                f"{throughput_share(case, result):.0%}",
            )
        )
    share = "of what is\nachieved"
    head = ("LMINF\nµs", "LMINF\nGB/s", share, "LMINF\nTFLOP/s", share)
    return Table(title, (*_HEAD, *head), rows, 2)


def _ratios(title: str, cases: list[DeviceCaseResult], names: tuple[str, ...]) -> Table:
    others = [name for name in names if any(name in case.seconds for case in cases)]
    rows = [(*_keys(case), *(_cell(ratio(case, SHOWN, name)) for name in others)) for case in cases]
    return Table(title, (*_HEAD, *(SHORT[name] for name in others)), rows, 2)


def _global_ratios(title: str, cases: list[DeviceCaseResult]) -> Table:
    with_some = [n_global for n_global in N_GLOBALS if n_global > 0]
    rows = [
        (*_keys(case), *(_cell(ratio(case, triton(n), triton(0))) for n in with_some))
        for case in cases
    ]
    return Table(title, (*_HEAD, *(f"n_global {n} /\nn_global 0" for n in with_some)), rows, 2)


def _contexts(job: DeviceJob, result: DeviceResult) -> Table:
    rows = [
        (*_keys(case), significant(1e6 * statistics.median(case.seconds[SHOWN])), spread.text(3))
        for case, (_, spread) in zip(of_kind(result, "context"), flatness(result), strict=True)
    ]
    title = f"Decode at window {job.window} as the context grows"
    return Table(title, (*_HEAD, "LMINF\nµs", "/ that of the\nshortest"), rows, 2)


def _cell(spread: Spread | None) -> str:
    return "" if spread is None else str(spread)


def device_notes(job: DeviceJob, result: DeviceResult) -> list[str]:
    """What a reader of the tables must know."""
    libraries = ", ".join(f"{name} {version}" for name, version in result.libraries.items())
    notes = [
        f"{result.device}; {libraries}. Achieved in this run: {result.bandwidth / 1e9:.0f} GB/s, "
        f"the better of reading and copying, and {result.throughput / 1e12:.3g} TFLOP/s in a "
        f"product of matrices in {job.dtype}.",
        f"LMINF: its Triton kernel, n_global {SHOWN_N_GLOBAL}; heads {job.heads}, blocks of "
        f"{job.block_size} tokens. Ratios: the median of {job.rounds} rounds in which all took "
        "turns (and the quartiles); below 1 LMINF is faster. Times are the device's own, its "
        "caches emptied before every call. Every kernel was compared with the oracle first.",
    ]
    absent: dict[tuple[str, str], int] = {}
    for case in result.cases:
        for item in case.absent.items():
            absent[item] = absent.get(item, 0) + 1
    notes += [f"Absent from {n} batches: {name}: {why}" for (name, why), n in absent.items()]
    return notes
