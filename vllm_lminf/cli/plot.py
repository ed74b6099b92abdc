"""The picture of ``vllm-lminf eval nll``: quality, decode time and memory against length."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_lminf.cli.report import LABELS, Evaluation
from vllm_lminf.cli.scoring_job import NLL_BUCKET, SERVER, EngineName, LengthFigures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS: dict[EngineName, str] = {
    "full": "#b5541c",
    "lminf": "#1f6fb4",
    "server": "#3a7d44",
}
GREY = "#666666"

OTHERS: tuple[tuple[str, Callable[[LengthFigures], float | None]], ...] = (
    ("Decode time, ms per token", lambda f: f.decode_ms_per_token),
    ("KV blocks held by the request", lambda f: f.kv_blocks),
)
"""The panels beside quality, which an engine alone has figures for."""


def draw(evaluation: Evaluation, path: Path) -> None:
    """Draw three panels over the same lengths and save them as a PNG; of a server's figures the
    first alone.
    """
    from matplotlib.figure import Figure

    is_whole = SERVER not in evaluation.results
    figure = Figure(figsize=(13 if is_whole else 6.5, 4.2), dpi=150, layout="constrained")
    quality, *others = figure.subplots(1, 3 if is_whole else 1, squeeze=False)[0]
    for engine, result in evaluation.results.items():
        lengths = [f.length for f in result.figures]
        style: dict[str, Any] = {"color": COLORS[engine], "marker": "o", "markersize": 5}
        middles = [(k + 0.5) * NLL_BUCKET for k in range(len(result.nll_curve))]
        quality.plot(middles, result.nll_curve, color=COLORS[engine], linewidth=0.8, alpha=0.35)
        quality.plot(lengths, [f.nll for f in result.figures], label=LABELS[engine], **style)
        for axes, (_, figure_of) in zip(others, OTHERS, strict=False):
            axes.plot(lengths, [figure_of(f) for f in result.figures], **style)

    quality.set_title("NLL, nats per token (lower is better)")
    for axes, (title, _) in zip(others, OTHERS, strict=False):
        axes.set_title(title)
        axes.set_ylim(bottom=0)
    for axes in (quality, *others):
        _finish(axes, evaluation)
    quality.set_xlabel(f"tokens (thin: mean of every {NLL_BUCKET})")
    quality.legend(loc="upper left", framealpha=1, edgecolor="none")
    figure.suptitle(
        f"{Path(evaluation.model).name}: a text longer than the model was trained for",
        fontsize=13,
        fontweight="bold",
    )
    figure.savefig(path)


def _finish(axes: Axes, evaluation: Evaluation) -> None:
    """Give a panel its common x axis and the line at the trained length."""
    from matplotlib.ticker import FuncFormatter, MultipleLocator

    longest = max(evaluation.lengths)
    axes.set_xlim(0, longest * 1.03)
    if longest >= 4096:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}k" if x else "0"))
        axes.xaxis.set_major_locator(MultipleLocator(1 << (longest // 6).bit_length()))
    axes.set_xlabel("tokens")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    if evaluation.trained_length is not None and evaluation.trained_length <= longest:
        axes.axvline(evaluation.trained_length, color=GREY, linestyle="--", linewidth=1)
        axes.annotate(
            "trained length",
            (evaluation.trained_length, 0.02),
            xycoords=("data", "axes fraction"),
            xytext=(5, 0),
            textcoords="offset points",
            color=GREY,
            fontsize=9,
        )
