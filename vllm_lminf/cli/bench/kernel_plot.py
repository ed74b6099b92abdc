"""The picture of ``bench kernel``: how LMINF's time compares with vLLM's, case by case."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vllm_lminf.cli.bench.kernel_job import N_GLOBALS, KernelJob, KernelResult
from vllm_lminf.cli.bench.kernel_report import beside_vllm, rotation_ratio
from vllm_lminf.cli.bench.spread import Spread
from vllm_lminf.cli.plot import COLORS, GREY

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHADES = ("#9cc3e4", COLORS["lminf"], "#123f66")
"""One for each of N_GLOBALS."""


def draw_kernel(job: KernelJob, result: KernelResult, path: Path) -> None:
    """Draw attention and rotation beside vLLM's own, whose time is 1, and save them as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    attention, rotation = figure.subplots(1, 2, width_ratios=(2, 1))
    for place, (n_global, color) in enumerate(zip(N_GLOBALS, SHADES, strict=True)):
        spreads = [beside_vllm(case, n_global) for case in result.cases]
        _bars(attention, spreads, place - 1, color, f"n_global {n_global}")
    _bars(rotation, [rotation_ratio(r) for r in result.rotations], 0, COLORS["lminf"], None)

    attention.set_title(f"Attention, window {job.window} of {job.length} tokens, {job.dtype}")
    rotation.set_title("Rotation of queries and keys")
    _finish(attention, [f"{c.case.heads}\n{c.case.batch}" for c in result.cases])
    _finish(rotation, [f"{r.heads}\n{r.tokens}" for r in result.rotations])
    attention.set_ylabel("time / vLLM's own (lower is better)")
    figure.legend(loc="outside lower left", ncols=len(N_GLOBALS), edgecolor="none")
    figure.suptitle(
        "LMINF's kernels beside vLLM's own at the same window", fontsize=13, fontweight="bold"
    )
    figure.savefig(path)


def _bars(axes: Axes, spreads: list[Spread], place: int, color: str, label: str | None) -> None:
    """One bar for every spread, as high as its median, with a line between its quartiles."""
    width = 0.26
    places = [index + place * width for index in range(len(spreads))]
    medians = [spread.median for spread in spreads]
    reach = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
    axes.bar(places, medians, width, color=color, label=label)
    axes.errorbar(places, medians, reach, fmt="none", ecolor=GREY, elinewidth=1.2, capsize=2)


def _finish(axes: Axes, labels: list[str]) -> None:
    axes.axhline(1, color=GREY, linestyle="--", linewidth=1)
    axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right", fontsize=8)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
