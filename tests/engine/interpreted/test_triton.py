"""Engines whose attention runs in Triton's kernels, interpreted: tokens and log-probabilities."""

from pathlib import Path

import pytest
import torch
from vllm import LLM, SamplingParams

from tests.engine import traffic
from tests.engine.conftest import Engine
from tests.engine.oracle_model import oracle_logprobs, save_tiny_llama
from tests.engine.test_exactness import TOLERANCE, engine_logprobs, random_prompts
from tests.engine.test_metrics import shown
from tests.engine.test_middle import settings
from vllm_lminf.middle import Middle
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.plugin import metrics, search_counts
from vllm_lminf.plugin.metrics import SEARCHES, SEARCHES_REPEATED

PATTERN = LambdaPattern(n_global=5, n_local=24, distance_limit=30)


def kernels(llm: LLM) -> set[str]:
    """What the layers of an engine in this process run."""
    config = llm.llm_engine.vllm_config
    layers = config.compilation_config.static_forward_context.values()
    return {layer.impl.kernel_name(16, torch.float32) for layer in layers}


def continued(llm: LLM, prompts: list[list[int]]) -> list[tuple]:
    """For every prompt: all tokens, and the log-probabilities of the generated ones. At least two
    blocks of each prompt come from the prefix cache."""
    sampling = SamplingParams(
        temperature=0, max_tokens=3, logprobs=0, detokenize=False, ignore_eos=True
    )
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    results = []
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.num_cached_tokens >= 32
        generated = list(output.outputs[0].token_ids)
        entries = zip(output.outputs[0].logprobs, generated, strict=True)
        values = [entry[token].logprob for entry, token in entries]
        results.append((prompt + generated, torch.tensor(values, dtype=torch.float64)))
    return results


def test_as_the_oracle_and_the_compiled_kernel(engine: Engine, tmp_path: Path) -> None:
    """Prompts from one token to several windows in one batch, prefilled in pieces that mix with
    the decodes of the others; then the longest ones again, on blocks that the prefix cache kept."""
    model = save_tiny_llama(tmp_path / "model", num_heads=4, num_kv_heads=2, head_size=16)
    prompts = random_prompts([1, 25, 47, 60])
    results: dict[str, list[tuple]] = {}
    for kernel in ("triton", "cpu"):
        with engine(
            model,
            n_global=PATTERN.n_global,
            n_local=PATTERN.n_local,
            distance_limit=PATTERN.distance_limit,
            kernel=kernel,
            block_size=16,
            max_num_batched_tokens=32,
            max_model_len=1000,
        ) as llm:
            assert kernels(llm) == {kernel}
            results[kernel] = engine_logprobs(llm, prompts, 4)
            results[kernel] += continued(llm, [[*prompt, 3] for prompt in prompts[-2:]])
    for (tokens, logprobs), (other_tokens, other_logprobs) in zip(*results.values(), strict=True):
        assert tokens == other_tokens
        torch.testing.assert_close(logprobs, other_logprobs, rtol=0, atol=TOLERANCE)
        expected = oracle_logprobs(model, tokens, PATTERN, torch.float32)[-len(logprobs) :]
        torch.testing.assert_close(logprobs, expected, rtol=0, atol=TOLERANCE)


def test_the_middle(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recalled by Triton's kernels; searches are counted."""
    monkeypatch.setattr(metrics, "INTERVAL_S", 0)
    monkeypatch.setattr(search_counts, "INTERVAL_S", 0)
    model = save_tiny_llama(tmp_path / "model", num_heads=2, num_kv_heads=1, head_size=16)
    middle = Middle(3, distance=30, rows=4, from_layer=2)
    with engine(
        model,
        n_global=5,
        n_local=16,
        kernel="triton",
        middle=settings(middle),
        block_size=16,
        max_num_batched_tokens=32,
        max_model_len=100,
        disable_log_stats=False,
    ) as llm:
        answers = traffic.ask(llm, [traffic.tokens(n, seed=n) for n in (3, 40)], 3)
        numbers = shown(llm)
    traffic.assert_equal_to_oracle(model, answers, LambdaPattern(5, 16, 16), middle)
    # Two heads, for the last four rows of the prompt and the tokens behind it, but for the last
    # steps': counts come one step late.
    assert 0 < numbers[SEARCHES] <= 2 * (4 + 2)
    assert numbers[SEARCHES_REPEATED] <= numbers[SEARCHES]
