"""The picture of ``bench engine``: prefill, decode and memory against length."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_lminf.cli.bench.engine_job import EngineJob, EngineResult
from vllm_lminf.cli.bench.engine_report import figures_at
from vllm_lminf.cli.plot import COLORS
from vllm_lminf.cli.report import LABELS
from vllm_lminf.cli.scoring_job import ENGINE_NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_engine(job: EngineJob, result: EngineResult, path: Path) -> None:
    """Draw three panels over the same lengths and save them as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    prefill, decode, memory = figure.subplots(1, 3)
    for name in ENGINE_NAMES:
        runs, lengths = result.runs[name], job.lengths_of(name)
        figures = [figures_at(runs, length) for length in lengths]
        style: dict[str, Any] = {"color": COLORS[name], "marker": "o", "markersize": 5}
        speeds = [
            n / statistics.median(f.prefill_seconds) for n, f in zip(lengths, figures, strict=True)
        ]
        prefill.plot(lengths, speeds, label=LABELS[name], **style)
        decode.plot(lengths, [statistics.median(f.decode_ms) for f in figures], **style)
        memory.plot(lengths, [f.blocks * runs.block_bytes / 1e6 for f in figures], **style)
    prefill.set_title("Prefill, tokens per second")
    decode.set_title("Decode time, ms per token")
    memory.set_title("KV cache held by a request, MB")
    for axes in (prefill, decode, memory):
        _finish(axes, job.lengths_of("lminf"))
    prefill.legend(loc="best", framealpha=1, edgecolor="none")
    figure.suptitle(
        f"{Path(job.model).name}, n_local {job.lminf['n_local']}: the cost of length",
        fontsize=13,
        fontweight="bold",
    )
    figure.savefig(path)


def _finish(axes: Axes, lengths: list[int]) -> None:
    """Give a panel its x axis, in powers of two."""
    axes.set_xscale("log", base=2)
    labels = [f"{n / 1024:g}k" if n >= 1024 else str(n) for n in lengths]
    axes.set_xticks(lengths, labels)
    axes.minorticks_off()
    axes.set_xlabel("tokens")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
