"""The picture of ``bench kernel --device cuda``: how near LMINF comes to its device's limits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vllm_lminf.cli.bench.device_job import (
    CONTENDERS,
    FULL,
    SHOWN,
    DeviceCaseResult,
    DeviceJob,
    DeviceResult,
)
from vllm_lminf.cli.bench.device_report import (
    bandwidth_share,
    flatness,
    of_kind,
    throughput_share,
)
from vllm_lminf.cli.plot import COLORS, GREY

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = (
    *("#9cc3e4", COLORS["lminf"], "#123f66"),
    *("#5aa02c", "#8c6bb1", COLORS["full"], "#e8a33d", GREY),
)
"""One for each of CONTENDERS."""


def draw_device(job: DeviceJob, result: DeviceResult, path: Path) -> None:
    """Draw decode, prefill and long contexts beside each other, and save them as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    decode, prefill, contexts = figure.subplots(1, 3)
    for axes, kind, share in (
        (decode, "decode", bandwidth_share),
        (prefill, "prefill", throughput_share),
    ):
        cases = of_kind(result, kind)  # type: ignore[arg-type]
        for name, color in zip(CONTENDERS, _COLORS, strict=True):
            shares = [
                (place, 100 * share(case, result, name))
                for place, case in enumerate(cases)
                if name in case.seconds
            ]
            if shares and name != FULL:
                axes.plot(*zip(*shares, strict=True), color=color, label=name, marker="o")
        _finish(axes, [_label(case) for case in cases])
    decode.set_title("Decode: bandwidth, % of what is achieved")
    prefill.set_title("Prefill: operations, % of what is achieved")
    lengths, spreads = zip(*flatness(result), strict=True)
    contexts.plot([s.median for s in spreads], color=COLORS["lminf"], marker="o", label=SHOWN)
    contexts.axhline(1, color=GREY, linestyle="--", linewidth=1)
    contexts.set_title("Decode: time / that of the shortest context")
    _finish(contexts, [str(length) for length in lengths])
    contexts.set_ylim(0, 1.2 * max(1, *(s.high for s in spreads)))
    decode.legend(fontsize=7)
    figure.suptitle(
        f"{result.device}: heads {job.heads}, window {job.window}, {job.dtype}",
        fontsize=13,
        fontweight="bold",
    )
    figure.savefig(path)


def _label(case: DeviceCaseResult) -> str:
    return f"{case.case.requests} × {case.case.queries}"


def _finish(axes: Axes, labels: list[str]) -> None:
    axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right", fontsize=8)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
