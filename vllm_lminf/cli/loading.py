"""The child process of ``vllm-lminf doctor MODEL --load``: an engine starts, as it would to serve,
and ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_lminf.cli import outline
from vllm_lminf.cli.child import serve_job
from vllm_lminf.cli.inspection import InspectionJob

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine


def start(job: InspectionJob) -> LLMEngine:
    """Start the engine; raises what it does where it doesn't start."""
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine

    if job.model is None:
        raise ValueError("no model to start an engine with")
    arguments = outline.parse_engine_arguments(job.model, job.engine)
    return LLMEngine.from_engine_args(arguments, UsageContext.OPENAI_API_SERVER)


def main() -> None:
    """Read an ``InspectionJob`` from stdin; answer once the engine is there."""
    with serve_job() as (data, answers):
        engine = start(InspectionJob(**data))
        engine.engine_core.shutdown()
        answers.send("result", result=None)


if __name__ == "__main__":
    main()
