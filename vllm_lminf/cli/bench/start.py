"""The child process of ``bench start``: starts one engine, as a user's script would."""

from __future__ import annotations

import time

from vllm_lminf.cli.bench.start_job import StartJob
from vllm_lminf.cli.child import serve_job

CACHE_BYTES = 1 << 30
MAX_MODEL_LEN = 4096


def seconds_to_first_token(job: StartJob) -> float:
    """Start an engine and have it say one token."""
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    llm = LLM(
        model=job.model,
        dtype=job.dtype,
        max_model_len=MAX_MODEL_LEN,
        kv_cache_memory_bytes=CACHE_BYTES,
        enforce_eager=current_platform.is_cpu(),
        skip_tokenizer_init=True,
        seed=0,
    )
    params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
    llm.generate({"prompt_token_ids": [1, 2, 3]}, params, use_tqdm=False)
    return time.monotonic() - job.begin


def main() -> None:
    """Read a ``StartJob`` from stdin and answer with the seconds."""
    with serve_job() as (data, answers):
        answers.send("result", result=seconds_to_first_token(StartJob(**data)))


if __name__ == "__main__":
    main()
