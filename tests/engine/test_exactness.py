"""Log-probabilities of tiny random models through vLLM, against the oracle, in float32."""

from pathlib import Path

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.config import CompilationMode

from tests.engine.conftest import Engine
from tests.engine.oracle_model import oracle_logprobs, save_tiny_llama
from vllm_lminf.pattern import LambdaPattern

pytestmark = pytest.mark.engine

# Both sides run in float32 and differ in the order of their sums. Logits are of the order of 10, so
# one rounding is 1e-6; a few tens of them meet in a log-probability.
TOLERANCE = 3e-5


def engine_logprobs(llm: LLM, prompts: list[list[int]], max_tokens: int) -> list[tuple]:
    """For every prompt: all tokens, prompt and generated, and their log-probabilities from the
    second on."""
    sampling = SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        prompt_logprobs=0,
        logprobs=0,
        detokenize=False,
        ignore_eos=True,
    )
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    results = []
    for prompt, output in zip(prompts, outputs, strict=True):
        generated = list(output.outputs[0].token_ids)
        tokens = prompt + generated
        entries = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        values = [entry[t].logprob for entry, t in zip(entries, tokens[1:], strict=True)]
        results.append((tokens, torch.tensor(values, dtype=torch.float64)))
    return results


def random_prompts(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 512, (n,), generator=generator).tolist() for n in lengths]


def assert_equal_to_oracle(
    llm: LLM, model: Path, prompts: list[list[int]], pattern: LambdaPattern, max_tokens: int
) -> None:
    for tokens, logprobs in engine_logprobs(llm, prompts, max_tokens):
        expected = oracle_logprobs(model, tokens, pattern, torch.float32)
        assert logprobs.shape == expected.shape
        assert torch.isfinite(logprobs).all()
        torch.testing.assert_close(logprobs, expected, rtol=0, atol=TOLERANCE)


# heads, kv heads, head size, block size, n_global, n_local, chunk
MODELS = [
    (4, 4, 64, 16, 10, 64, 2048),
    (4, 2, 64, 32, 5, 48, 32),
    (6, 2, 80, 64, 0, 50, 48),
    (4, 1, 96, 128, 17, 70, 64),
    (2, 2, 128, 256, 3, 33, 40),
    (2, 1, 256, 16, 40, 40, 24),
]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size", "block_size", "n_global", "n_local", "chunk"), MODELS
)
def test_engine_equals_oracle(
    engine: Engine,
    tmp_path: Path,
    heads: int,
    kv_heads: int,
    head_size: int,
    block_size: int,
    n_global: int,
    n_local: int,
    chunk: int,
) -> None:
    """Prompts from one token to several windows, in one batch: prefill in pieces of ``chunk``
    tokens mixes with decodes of the shorter ones; the second round runs on reused blocks."""
    model = save_tiny_llama(tmp_path / "model", heads, kv_heads, head_size)
    pattern = LambdaPattern(n_global, n_local, n_local)
    with engine(
        model,
        n_global=n_global,
        n_local=n_local,
        block_size=block_size,
        max_num_batched_tokens=chunk,
        max_model_len=100_000,
        enable_prefix_caching=False,
    ) as llm:
        lengths = [1, block_size, n_local, n_local + 1, 2 * n_local + 7, 5 * n_local]
        prompts = random_prompts(lengths)
        assert_equal_to_oracle(llm, model, prompts, pattern, max_tokens=20)
        assert_equal_to_oracle(llm, model, prompts[::-1], pattern, max_tokens=5)


def test_distance_limit_beyond_the_window(engine: Engine, tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model", 4, 2, 64)
    pattern = LambdaPattern(n_global=7, n_local=32, distance_limit=50)
    with engine(
        model, n_global=7, n_local=32, distance_limit=50, max_model_len=1000, block_size=16
    ) as llm:
        assert_equal_to_oracle(llm, model, random_prompts([31, 45, 60, 200]), pattern, 10)


def test_defaults_are_the_trained_length(engine: Engine, tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model", 4, 2, 64, trained_length=64)
    pattern = LambdaPattern(n_global=10, n_local=64, distance_limit=64)
    with engine(model, max_model_len=1000, block_size=16) as llm:
        assert_equal_to_oracle(llm, model, random_prompts([40, 300]), pattern, 8)


def test_compiled_model(engine: Engine, tmp_path: Path) -> None:
    """As vLLM runs by default: the model around the attention goes through torch.compile."""
    model = save_tiny_llama(tmp_path / "model", 4, 2, 64)
    pattern = LambdaPattern(n_global=10, n_local=64, distance_limit=64)
    with engine(model, max_model_len=1000, block_size=16, enforce_eager=False) as llm:
        mode = llm.llm_engine.vllm_config.compilation_config.mode
        assert mode != CompilationMode.NONE
        assert_equal_to_oracle(llm, model, random_prompts([40, 300]), pattern, 8)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_as_close_as_stock_vllm(
    engine: Engine, tmp_path: Path, dtype: str
) -> None:
    """Inside the window LMINF is plain causal attention: it may be no further from the truth than
    vLLM's own kernel in the same dtype is, up to the spread of such errors."""
    model = save_tiny_llama(tmp_path / "model", 4, 2, 64, trained_length=4096)
    prompt = random_prompts([600])
    errors = {}
    for backend in ("LMINF", None):
        with engine(model, backend=backend, dtype=dtype, max_model_len=1000) as llm:
            ((tokens, logprobs),) = engine_logprobs(llm, prompt, 1)
            pattern = LambdaPattern(10, 4096, 4096)
            expected = oracle_logprobs(model, tokens, pattern, torch.float64)
            errors[backend] = (logprobs - expected).square().mean().sqrt()
    assert errors["LMINF"] < 1.25 * errors[None]
