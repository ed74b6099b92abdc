"""`vllm serve --data-parallel-size 2`: two engines behind one address, each under the same Λ."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.engine.oracle_model import oracle_logprobs, save_tiny_llama
from tests.engine.test_exactness import TOLERANCE, random_prompts
from tests.server.byte_tokenizer import save_byte_tokenizer
from tests.server.conftest import serve
from vllm_lminf.pattern import LambdaPattern

pytestmark = pytest.mark.server

PATTERN = LambdaPattern(10, 64, 64)
LENGTHS = [1, 65, 200, 700]


def test_two_engines(tmp_path: Path) -> None:
    """Every prompt is asked twice, all at once; a pool holds half of the longest."""
    model = save_tiny_llama(tmp_path / "model", 2, 1, 32, num_layers=1)
    save_byte_tokenizer(model, 512)
    # A worker's threads keep to the cores that it is given here.
    cores = sorted(os.sched_getaffinity(0))
    bind = f"{cores[0]}|{cores[-1]}"
    with serve(
        str(model),
        tmp_path / "server.log",
        *("--data-parallel-size", "2", "--served-model-name", "tiny", "--dtype", "float32"),
        *("--max-model-len", "10000", "--block-size", "16", "--num-gpu-blocks-override", "22"),
        *("--max-num-batched-tokens", "64", "--kv-cache-memory-bytes", "64M"),
        VLLM_CPU_OMP_THREADS_BIND=bind,
    ) as server:
        client = server.client()

        def answer(prompt: list[int]) -> tuple[list[int], list[float]]:
            choice = client.completions.create(
                model="tiny",
                prompt=prompt,
                max_tokens=20,
                temperature=0,
                logprobs=1,
                extra_body={"return_token_ids": True, "ignore_eos": True},
            ).choices[0]
            return choice.token_ids, choice.logprobs.token_logprobs

        prompts = random_prompts(LENGTHS)
        with ThreadPoolExecutor(2 * len(prompts)) as pool:
            answers = list(pool.map(answer, prompts + prompts))
        page, log = server.page_of_metrics(), server.log
    for prompt, (tokens, logprobs) in zip(prompts + prompts, answers, strict=True):
        expected = oracle_logprobs(model, prompt + tokens, PATTERN, torch.float32)[-20:]
        got = torch.tensor(logprobs, dtype=torch.float64)
        torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)
    assert log.count("LMINF is active") == 2
    finished = [
        line
        for line in page.splitlines()
        if line.startswith("vllm:request_success_total") and 'finished_reason="length"' in line
    ]
    assert len(finished) == 2
    assert all(float(line.split()[-1]) > 0 for line in finished)
