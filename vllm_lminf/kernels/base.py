"""What a kernel is told, whichever kernel it is: the rules, the cache, the batch, the rotation."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.rope import RotationTables


@dataclass
class ScoreRules:
    """How a scaled product of query and key becomes a score.

    Attributes:
        scale: factor on every product.
        softcap: a score ``s`` becomes ``softcap * tanh(s / softcap)``; None leaves it.
        alibi_slopes: float32 [num_heads]; a pair at distance ``d`` loses ``slope * d``, with ``d``
            no more than the distance limit. None for no such bias.
        sinks: [num_heads]: the score of one more key, whose value is zero. None for no such key.
    """

    scale: float
    softcap: float | None = None
    alibi_slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None


@dataclass(frozen=True)
class Heads:
    """The heads of a layer.

    Attributes:
        num_heads: query heads.
        num_kv_heads: key heads; divides num_heads.
        head_size: dimensions of a head.
        dtype: of queries and outputs.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Rotation:
    """The model's RoPE, as a kernel turns with it: by whole positions, without its magnitude.

    Attributes:
        tables: exact angles of any position.
        is_neox_style: how pairs are laid out, see `vllm_lminf.rope.RotarySpec`.
    """

    tables: RotationTables
    is_neox_style: bool


@dataclass(frozen=True)
class PagedCache:
    """The keys and values of a layer, in blocks.

    Attributes:
        key: rotated; [num_blocks, num_kv_heads, block_size, head_size]; strides are free but for
            the last, which is 1. Of the queries' dtype, or float8_e4m3fn or float8_e5m2.
        value: the same.
        key_scale: what a stored key is multiplied with; float32 of one element on the cache's
            device. None for 1.
        value_scale: the same for values.
    """

    key: torch.Tensor
    value: torch.Tensor
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None


@dataclass(frozen=True)
class DeviceBatch:
    """A batch whose description lies on the device, so that nothing waits for it.

    Requests may be padding: without query rows, and of any seq_len.

    Attributes:
        query_start_loc: int32 [num_requests + 1]: request r owns the query rows from
            ``query_start_loc[r]`` to ``query_start_loc[r + 1]``, its latest tokens.
        seq_lens: int32 [num_requests]: tokens in the cache, these queries' own included.
        block_table: int32 [num_requests, max_blocks]. Entries of blocks that were freed are never
            followed.
        max_query_len: no request has more query rows; known on the host.
        query_start_loc_cpu, seq_lens_cpu: the same on the host, where they are there anyway; a
            kernel that needs them waits for the device without.
        shared: what a kernel works out of this batch for all layers. A batch is one step's, or one
            captured graph's: never changed and used again.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    max_query_len: int
    query_start_loc_cpu: torch.Tensor | None = None
    seq_lens_cpu: torch.Tensor | None = None
    shared: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class Situation:
    """Where a layer is to run, which decides what kernels can run it.

    Attributes:
        device_type: torch's name: "cpu" or "cuda", which stands for AMD's devices too.
        capability: a CUDA device's compute capability; None elsewhere, AMD included.
        heads: the layer's.
        pattern: the layer's Λ.
        cache_dtype: of stored keys and values.
        block_size: tokens of a block.
        has_rotation: whether the model has RoPE.
        has_alibi, has_softcap, has_sinks: see `ScoreRules`.
    """

    device_type: str
    capability: tuple[int, int] | None
    heads: Heads
    pattern: LambdaPattern
    cache_dtype: torch.dtype
    block_size: int
    has_rotation: bool
    has_alibi: bool = False
    has_softcap: bool = False
    has_sinks: bool = False
