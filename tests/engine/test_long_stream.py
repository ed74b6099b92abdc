"""A request of a million tokens, and what the model says at its end."""

import statistics
import time
from pathlib import Path

import pytest
import torch
from vllm import LLM, SamplingParams

from tests.engine.conftest import Engine, block_pool
from tests.engine.oracle_model import oracle_logprobs, save_tiny_llama
from vllm_lminf.pattern import LambdaPattern

pytestmark = pytest.mark.engine

LENGTH = 1_000_000
NEW_TOKENS = 24
PATTERN = LambdaPattern(n_global=10, n_local=256, distance_limit=256)
CHUNK = 4096
ROUNDS = 9


def report_latency(llm: LLM, prompt: list[int], chunks: list[float]) -> None:
    """Prints what a step costs at the end of the stream over what it costs at its start. Nothing is
    asserted: other work on the machine would show in it.

    For decoding, requests at both lengths take turns; the long one is served from the prefix cache.
    """
    quarter = len(chunks) // 4
    early, late = statistics.median(chunks[:quarter]), statistics.median(chunks[-quarter:])
    print(f"\nprefill, a chunk in the last quarter over one in the first: {late / early:.3f}")
    ratios = []
    for turn in range(ROUNDS):
        milliseconds = []
        for length in (CHUNK, LENGTH):
            sampling = SamplingParams(
                temperature=0, max_tokens=60, detokenize=False, ignore_eos=True
            )
            request = {"prompt_token_ids": prompt[:length]}
            llm.llm_engine.add_request(f"{length} {turn}", request, sampling)
            steps = []
            while llm.llm_engine.has_unfinished_requests():
                start = time.perf_counter()
                llm.llm_engine.step()
                steps.append(1e3 * (time.perf_counter() - start))
            milliseconds.append(statistics.median(steps[5:-1]))
        ratios.append(milliseconds[1] / milliseconds[0])
    print(
        f"decode, a token at {LENGTH:,} over one at {CHUNK:,}: {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f} in {ROUNDS} rounds; {milliseconds[1]:.2f} ms)"
    )


def test_a_million_tokens(engine: Engine, tmp_path: Path) -> None:
    """Blocks held stay constant from the first full window on, and the log-probabilities at the end
    are those of a fresh float64 model that is given no more than the live tokens.

    With one layer, keys and values depend on their own token alone; so the first tokens and the
    window, set side by side, score exactly as they do a million positions apart.
    """
    model = save_tiny_llama(tmp_path / "model", 2, 1, 64, trained_length=256, num_layers=1)
    generator = torch.Generator().manual_seed(5)
    prompt = torch.randint(0, 512, (LENGTH,), generator=generator).tolist()
    held, seconds = [], []
    with engine(
        model,
        block_size=128,
        max_num_batched_tokens=CHUNK,
        max_model_len=LENGTH + 100,
        num_gpu_blocks_override=64,
    ) as llm:
        pool = block_pool(llm)
        whole = pool.get_num_free_blocks()
        sampling = SamplingParams(
            temperature=0, max_tokens=NEW_TOKENS, logprobs=0, detokenize=False, ignore_eos=True
        )
        llm.llm_engine.add_request("long", {"prompt_token_ids": prompt}, sampling)
        outputs = []
        while llm.llm_engine.has_unfinished_requests():
            start = time.perf_counter()
            outputs += llm.llm_engine.step()
            seconds.append(time.perf_counter() - start)
            held.append(whole - pool.get_num_free_blocks())
        assert pool.get_num_free_blocks() == whole
        report_latency(llm, prompt, seconds[1 : LENGTH // CHUNK])
    completion = outputs[-1].outputs[0]
    assert len(completion.token_ids) == NEW_TOKENS

    prefill = held[1 : LENGTH // CHUNK]
    assert set(prefill) <= {prefill[0], prefill[0] + 1}
    assert max(held) <= PATTERN.max_blocks_held(128, CHUNK, LENGTH)
    # One pinned block, and a window of 256 tokens over three blocks at the most.
    assert max(held[-NEW_TOKENS + 1 : -1]) <= 1 + 3
    tokens = prompt + list(completion.token_ids)
    chosen = zip(completion.logprobs, completion.token_ids, strict=True)
    got = [step[token].logprob for step, token in chosen]
    expected = []
    for i in range(NEW_TOKENS):
        window = tokens[LENGTH + i - PATTERN.n_local : LENGTH + i]
        live = [*tokens[: PATTERN.n_global], *window, tokens[LENGTH + i]]
        expected.append(oracle_logprobs(model, live, PATTERN, torch.float64)[-1])
    torch.testing.assert_close(
        torch.tensor(got, dtype=torch.float64), torch.stack(expected), rtol=0, atol=3e-5
    )
