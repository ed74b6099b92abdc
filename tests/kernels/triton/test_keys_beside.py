"""The same as `test_keys` for what Triton does beside other libraries: the merge, the hybrid layer,
the rotation of queries and keys."""

from typing import Any

import pytest
import torch

from tests.kernels.layers import provider
from tests.kernels.triton.test_keys import (
    H100,
    HEADS,
    MAX_REQUESTS,
    MAX_TOKENS,
    batches,
    make_cache,
    make_kernel,
    recorded,
)
from vllm_lminf.kernels.base import Heads, Kernel
from vllm_lminf.kernels.flash import FlashKernel
from vllm_lminf.kernels.hybrid import HybridKernel
from vllm_lminf.kernels.triton.rotary import rotary_embedding
from vllm_lminf.rope import RotationTables


def attend(query: torch.Tensor, *_: Any, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashAttention, which only makes room for its log-sum-exps."""
    return arguments["out"], torch.empty(query.shape[1], query.shape[0])


@pytest.mark.parametrize("kind", [FlashKernel, HybridKernel])
@pytest.mark.parametrize("heads", HEADS[:2], ids=str)
def test_warm_up_covers_all_batches(heads: Heads, kind: type[Kernel]) -> None:
    layer = make_kernel(heads, H100, kind, decode_len=4, flash_attention=provider(attend))
    cache = make_cache(heads)
    with recorded() as warm:
        layer.warm_up(cache, MAX_REQUESTS, MAX_TOKENS)
    with recorded() as serving:
        for rows, batch in batches(MAX_REQUESTS, MAX_TOKENS):
            query = torch.empty(rows, 2 * heads.num_heads, heads.head_size, dtype=heads.dtype)
            query = query[:, : heads.num_heads]
            output = torch.empty(rows, heads.num_heads, heads.head_size, dtype=heads.dtype)
            layer.attend(query, cache, batch, output)
    assert serving - warm == set()
    assert "merge_kernel" in {name for name, _ in serving}
    # Beside what is launched here, warm-up writes the cache, and merges batches of a few queries,
    # which the hybrid layer leaves to Triton's own kernel.
    assert {name for name, _ in warm - serving} <= {"write_kernel", "merge_kernel"}


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_size"), [(32, 8, 128), (9, 3, 72)])
def test_one_rotation_for_all_batches(num_heads: int, num_kv_heads: int, head_size: int) -> None:
    """Every layer of a model turns heads by the same kernel, whatever the step's size: the first
    run of the model compiles it."""
    tables = RotationTables(torch.ones(head_size // 2)).tables
    arguments = tables, head_size, True, 1.0
    sizes = [num_heads * head_size, num_kv_heads * head_size, num_kv_heads * head_size]
    with recorded() as keys:
        for rows in (*range(1, 40), 2048):
            query, key, _ = torch.empty(rows, sum(sizes), dtype=torch.bfloat16).split(sizes, dim=1)
            positions = torch.zeros(rows + rows % 3, dtype=torch.int64)[rows % 3 :]
            rotary_embedding(positions, query, key, *arguments)
            rotary_embedding(positions, query.contiguous(), key.contiguous(), *arguments)
    assert {name for name, _ in keys} == {"rotary_kernel"}
    assert len(keys) == 1
