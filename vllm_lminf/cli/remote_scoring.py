"""The child process of ``vllm-lminf eval nll --url``: a server scores the text."""

from __future__ import annotations

import time
from dataclasses import asdict

from vllm_lminf.cli.child import serve_job
from vllm_lminf.cli.openai_server import Server
from vllm_lminf.cli.scoring_job import (
    LengthFigures,
    ScoringJob,
    ScoringResult,
    nll_at,
    nll_curve,
)


def score(job: ScoringJob) -> ScoringResult:
    """Score the text in one request.

    Raises:
        RuntimeError: the server doesn't answer as it should.
    """
    if job.url is None:
        raise ValueError("no server to ask")
    server = Server(job.url, job.served_model)
    begin = time.perf_counter()
    nll = [-value for value in server.logprobs(job.token_ids)]
    return ScoringResult(
        engine=job.engine,
        figures=[LengthFigures(length, nll_at(nll, length)) for length in job.lengths],
        nll_curve=nll_curve(nll),
        total_seconds=time.perf_counter() - begin,
    )


def main() -> None:
    """Read a ``ScoringJob`` from stdin and answer with a ``ScoringResult``."""
    with serve_job() as (data, answers):
        answers.send("phase", text="scoring")
        answers.send("result", result=asdict(score(ScoringJob(**data))))


if __name__ == "__main__":
    main()
