"""Λ-attention by FlashAttention: its windowed kernel, and a small one that joins the prefix in.

Made for prefill on devices where FlashAttention knows their hardware best, from compute capability
9.0 on. The function that attends is the caller's: vLLM ships one.
"""

from collections.abc import Callable

import torch

from vllm_lminf.kernels.interface import (
    DeviceBatch,
    Heads,
    PagedCache,
    Rotation,
    ScoreRules,
    Situation,
)
from vllm_lminf.kernels.triton import layer as triton_layer
from vllm_lminf.kernels.triton.layer import TritonLayer, Workspace
from vllm_lminf.pattern import LambdaPattern

Attend = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""vLLM's ``flash_attn_varlen_func``, with its ``fa_version`` already given."""

_DTYPES = (torch.float16, torch.bfloat16)


def reasons_against(situation: Situation) -> list[str]:
    """Why FlashAttention can't run a layer; empty where it can."""
    reasons = []
    heads, capability = situation.heads, situation.capability
    if situation.device_type != "cuda" or capability is None:
        reasons.append("vLLM's FlashAttention runs on NVIDIA's devices: choose kernel triton")
    elif capability < (8, 0):
        reasons.append(
            f"compute capability {capability[0]}.{capability[1]}: FlashAttention takes 8.0 and "
            "newer"
        )
    if heads.dtype not in _DTYPES:
        reasons.append(
            f"{heads.dtype}: FlashAttention takes float16 and bfloat16; choose --dtype bfloat16, "
            "or kernel triton"
        )
    if situation.cache_dtype != heads.dtype:
        reasons.append(
            f"a cache of {situation.cache_dtype}: FlashAttention would round the queries to it "
            "too; choose --kv-cache-dtype auto, or kernel triton"
        )
    if heads.head_size % 8 != 0 or heads.head_size > 256:
        reasons.append(
            f"heads of {heads.head_size} dimensions: FlashAttention takes multiples of 8 up to "
            "256; choose kernel triton"
        )
    if situation.block_size % 16 != 0:
        reasons.append(
            f"blocks of {situation.block_size} tokens: FlashAttention takes multiples of 16; set "
            "--block-size 16"
        )
    if situation.has_alibi:
        reasons.append("ALiBi: FlashAttention 3 and newer have none; choose kernel triton")
    return reasons + [f"the prefix: {reason}" for reason in triton_layer.reasons_against(situation)]


class FlashLayer:
    """What a layer does with its cache.

    Args:
        heads: the layer's.
        pattern: its Λ.
        rules: how its products become scores; without ALiBi.
        rotation: the model's RoPE, or None where nothing is rotated.
        workspace: shared with the other layers, see `TritonLayer`.
        attend: FlashAttention.

    Raises:
        ValueError: a rule isn't served.
    """

    def __init__(
        self,
        heads: Heads,
        pattern: LambdaPattern,
        rules: ScoreRules,
        rotation: Rotation | None,
        workspace: Workspace,
        attend: Attend,
    ) -> None:
        if rules.alibi_slopes is not None:
            raise ValueError("FlashAttention 3 and newer serve no ALiBi")
        self._attend = attend
        self._window = [pattern.n_local - 1, 0]
        self._scale = float(rules.scale)
        self._softcap = rules.softcap or 0.0
        self._joining = TritonLayer(heads, pattern, rules, rotation, workspace)

    def lambda_attention(
        self, query: torch.Tensor, cache: PagedCache, batch: DeviceBatch, output: torch.Tensor
    ) -> None:
        """Attention of a batch of requests, prefill and decode mixed freely.

        Args:
            query: rotated by its true position; shape [num_tokens, num_heads, head_size]; rows
                past the last request's are padding.
            cache: the keys and values, those of this step included, in any memory order.
            batch: the batch.
            output: written in place; of query's shape.
        """
        if query.shape[0] == 0 or batch.seq_lens.shape[0] == 0:
            return
        _, lse = self._attend(
            query,
            cache.key.transpose(1, 2),
            cache.value.transpose(1, 2),
            max_seqlen_q=batch.max_query_len,
            cu_seqlens_q=batch.query_start_loc,
            max_seqlen_k=batch.block_table.shape[1] * cache.key.shape[2],
            seqused_k=batch.seq_lens,
            softmax_scale=self._scale,
            causal=True,
            window_size=self._window,
            softcap=self._softcap,
            block_table=batch.block_table,
            return_softmax_lse=True,
            out=output,
        )
        self._joining.join_global_branch(query, cache, batch, output, lse)
