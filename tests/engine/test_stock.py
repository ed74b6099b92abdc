"""LMINF beside stock vLLM: equal where they must be, and absent where it isn't selected."""

from pathlib import Path

import pytest
import torch
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.kv_cache_interface import FullAttentionSpec

from tests.engine.conftest import Engine, kv_cache_manager
from tests.engine.test_exactness import engine_logprobs, random_prompts

pytestmark = pytest.mark.engine


def test_shorter_than_the_window_equals_stock_and_unset_is_stock(
    engine: Engine, model_path: str
) -> None:
    """One prompt below n_local through both, in float32; and what an engine without LMINF is made
    of, with the plugin installed and loaded, is vLLM's own."""
    prompts = [[t * 90 for t in p] for p in random_prompts([5, 700])]
    with engine(Path(model_path), backend=None, max_model_len=1000) as llm:
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        attention = runner.model.model.layers[0].self_attn
        assert attention.attn.get_attn_backend() is CPUAttentionBackend
        assert type(attention.rotary_emb) is RotaryEmbedding
        (group,) = kv_cache_manager(llm).kv_cache_config.kv_cache_groups
        assert type(group.kv_cache_spec) is FullAttentionSpec
        stock = engine_logprobs(llm, prompts, 12)
    with engine(Path(model_path), max_model_len=1_000_000, kv_cache_memory_bytes=1 << 30) as llm:
        ours = engine_logprobs(llm, prompts, 12)
    for (stock_tokens, stock_logprobs), (tokens, logprobs) in zip(stock, ours, strict=True):
        assert tokens == stock_tokens
        # Stock angles are float32 products: off by up to 2**-15 rad at position 700.
        torch.testing.assert_close(logprobs, stock_logprobs, rtol=0, atol=1e-3)
