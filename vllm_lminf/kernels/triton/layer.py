"""One layer's Λ-attention by Triton kernels: which of them are launched, and with what.

Nothing waits for the device and nothing is allocated, so a step may be captured in a CUDA graph:
grids and sizes follow from the shapes of the tensors and from `DeviceBatch.max_query_len`. Triton
is imported once a layer is made.
"""

import importlib.util
import os
from typing import Any

import torch

from vllm_lminf.kernels.interface import (
    DeviceBatch,
    Heads,
    PagedCache,
    Rotation,
    ScoreRules,
    Situation,
)
from vllm_lminf.kernels.triton.plan import (
    Plan,
    decode_plan,
    decode_rows,
    hardware_of,
    join_plan,
    most_partial_rows,
    num_splits,
    power_of_two,
    prefill_plan,
)
from vllm_lminf.pattern import LambdaPattern, cdiv

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
_UNINTERPRETED = (torch.bfloat16, *_FP8_DTYPES)
_MAX_GROUP = 128
_MAX_HEAD_SIZE = 256


def reasons_against(situation: Situation) -> list[str]:
    """Why these kernels can't run a layer; empty where they can."""
    reasons = []
    heads, cache_dtype = situation.heads, situation.cache_dtype
    if importlib.util.find_spec("triton") is None:
        reasons.append("Triton isn't installed: pip install triton")
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    if situation.device_type == "cpu" and not interprets:
        reasons.append(
            "Triton compiles for GPUs alone, and this is a CPU: set TRITON_INTERPRET=1 before the "
            "start to have its kernels interpreted, which is slow and meant for tests"
        )
    elif situation.device_type == "cpu" and {heads.dtype, cache_dtype} & {*_UNINTERPRETED}:
        reasons.append(
            f"{heads.dtype} over a cache of {cache_dtype}: Triton's interpreter computes products "
            "of bfloat16 wrongly and rounds to bfloat16 and float8 wrongly; choose --dtype float32 "
            "or float16, and their own cache"
        )
    elif situation.device_type not in ("cpu", "cuda"):
        reasons.append(f"Triton's kernels don't run on devices of type {situation.device_type!r}")
    capability = situation.capability
    if capability is not None and capability < (8, 0):
        reasons.append(
            f"compute capability {capability[0]}.{capability[1]}: the Triton kernels take 8.0 and "
            "newer"
        )
    if heads.dtype not in _DTYPES:
        reasons.append(f"{heads.dtype}: the Triton kernels take float32, float16 and bfloat16")
    if cache_dtype not in (heads.dtype, *_FP8_DTYPES):
        reasons.append(
            f"a cache of {cache_dtype}: the Triton kernels take {heads.dtype} as the queries are, "
            "or float8_e4m3fn or float8_e5m2"
        )
    if cache_dtype == torch.float8_e4m3fn and capability is not None and capability < (8, 9):
        reasons.append(
            f"a cache of float8_e4m3fn on compute capability {capability[0]}.{capability[1]}: "
            "Triton converts it on 8.9 and newer; choose fp8_e5m2 or the model's own dtype"
        )
    if heads.head_size % 8 != 0 or not 16 <= heads.head_size <= _MAX_HEAD_SIZE:
        reasons.append(
            f"heads of {heads.head_size} dimensions: the Triton kernels take multiples of 8 from "
            f"16 to {_MAX_HEAD_SIZE}"
        )
    if heads.num_heads % heads.num_kv_heads != 0:
        reasons.append(f"{heads.num_heads} heads over {heads.num_kv_heads}: they don't divide")
    elif heads.num_heads // heads.num_kv_heads > _MAX_GROUP:
        reasons.append(
            f"{heads.num_heads} heads over {heads.num_kv_heads}: the Triton kernels take up to "
            f"{_MAX_GROUP} query heads a key head"
        )
    if situation.block_size % 16 != 0:
        reasons.append(
            f"blocks of {situation.block_size} tokens: the Triton kernels take multiples of 16"
        )
    return reasons


class Workspace:
    """Where programs that share a tile's keys leave their results; one for all layers of an engine.

    Layers run one after the other on one stream, so they don't disturb each other.

    Args:
        heads: of the layer with the most query heads per key head, or the largest head size.
        device: of the cache.
    """

    def __init__(self, heads: Heads, device: torch.device) -> None:
        self.hardware = hardware_of(device)
        rows = most_partial_rows(heads, self.hardware.multiprocessors)
        size = rows * (power_of_two(heads.head_size) + 1)
        self._floats = torch.empty(size, dtype=torch.float32, device=device)

    def splits(self, programs: int, pattern: LambdaPattern, plan: Plan, dims: int) -> int:
        """Among how many programs a tile's keys are split, for what there is room for."""
        room = self._floats.numel() // (programs * plan.rows * (dims + 1))
        wanted = num_splits(programs, pattern, plan, self.hardware.multiprocessors)
        return max(1, min(wanted, room))

    def partial_results(self, rows: int, dims: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for results [rows, dims] and their log-sum-exps [rows], each in a row."""
        return self._floats, self._floats[rows * dims :]


class TritonLayer:
    """What a layer does with its cache.

    Args:
        heads: the layer's.
        pattern: its Λ.
        rules: how its products become scores; the scale is positive.
        rotation: the model's RoPE, or None where nothing is rotated.
        workspace: shared with the other layers.

    Raises:
        ValueError: the scale isn't positive.
    """

    def __init__(
        self,
        heads: Heads,
        pattern: LambdaPattern,
        rules: ScoreRules,
        rotation: Rotation | None,
        workspace: Workspace,
    ) -> None:
        # Triton is looked for where it is needed, and nowhere else.
        from vllm_lminf.kernels.triton.attention import attention_kernel
        from vllm_lminf.kernels.triton.cache import write_kernel
        from vllm_lminf.kernels.triton.join import join_kernel
        from vllm_lminf.kernels.triton.reduce import reduce_kernel

        if not rules.scale > 0:
            raise ValueError(f"scale is {rules.scale}: the Triton kernels take a positive one")
        self._attention_kernel = attention_kernel
        self._join_kernel = join_kernel
        self._reduce_kernel = reduce_kernel
        self._write_kernel = write_kernel
        self._heads = heads
        self._pattern = pattern
        self._workspace = workspace
        self._scale = float(rules.scale)
        self._slopes = None
        if rules.alibi_slopes is not None:
            self._slopes = rules.alibi_slopes.detach().to(torch.float32).contiguous()
        self._sinks = None if rules.sinks is None else rules.sinks.detach().contiguous()
        self._dims = max(16, power_of_two(heads.head_size))
        self._group = heads.num_heads // heads.num_kv_heads
        self._sizes = {
            "GROUP": self._group,
            "HEAD_SIZE": heads.head_size,
            "DIMS": self._dims,
        }
        self._angles, half, is_neox = None, 0, True
        if rotation is not None and pattern.n_global > 0:
            tables = rotation.tables.tables
            # A cosine and its sine are one number to the kernels.
            self._angles = tables.view(torch.int64).squeeze(-1)
            half, is_neox = tables.shape[1], rotation.is_neox_style
        self._lambda = {
            "N_GLOBAL": pattern.n_global,
            "N_LOCAL": pattern.n_local,
            "LIMIT": pattern.distance_limit,
            "HALF": half,
            "IS_NEOX": is_neox,
            "SOFTCAP": rules.softcap,
        }

    def write_cache(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: PagedCache,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Stores keys and values in their slots.

        Args:
            key: shape [>= num_tokens, num_kv_heads, head_size]; rows past num_tokens are padding.
            value: same shape.
            cache: written in place, divided by its scales where it has some.
            slot_mapping: integers [num_tokens]: ``block * block_size + offset`` of every token, or
                a negative number for a token that has no slot.
        """
        num_tokens = slot_mapping.shape[0]
        if num_tokens == 0:
            return
        num_kv_heads = self._heads.num_kv_heads
        tile_heads = min(power_of_two(num_kv_heads), max(1, 2048 // self._dims))
        narrow = cache.key.dtype in _FP8_DTYPES
        self._write_kernel[num_tokens, cdiv(num_kv_heads, tile_heads)](
            key, value, cache.key, cache.value, slot_mapping, cache.key_scale, cache.value_scale,
            *key.stride()[:2], *value.stride()[:2], *cache.key.stride()[:3],
            *cache.value.stride()[:3],
            NUM_KV_HEADS=num_kv_heads, TILE_HEADS=tile_heads, HEAD_SIZE=self._heads.head_size,
            DIMS=self._dims, BLOCK_SIZE=cache.key.shape[2],
            LARGEST=torch.finfo(cache.key.dtype).max if narrow else None,
        )  # fmt: skip

    def lambda_attention(
        self, query: torch.Tensor, cache: PagedCache, batch: DeviceBatch, output: torch.Tensor
    ) -> None:
        """Attention of a batch of requests, prefill and decode mixed freely.

        Requests whose queries fit into one tile are always computed in the same way, whatever
        else is in the batch: by programs that split their keys. Longer ones have a launch of their
        own, of as many tiles as so many rows and requests can take.

        Args:
            query: rotated by its true position; shape [num_tokens, num_heads, head_size]; rows
                past the last request's are padding.
            cache: the keys and values, those of this step included.
            batch: the batch.
            output: written in place; of query's shape.
        """
        num_requests = batch.seq_lens.shape[0]
        if num_requests == 0 or query.shape[0] == 0:
            return
        heads, hardware = self._heads, self._workspace.hardware
        rows = decode_rows(heads, batch.max_query_len)
        short = decode_plan(heads, self._pattern, cache.key.dtype, hardware, rows)
        skip = 0
        if batch.max_query_len <= short.queries or num_requests > 1:
            self._attend_short(query, cache, batch, output, short)
            skip = short.queries
        if batch.max_query_len > short.queries:
            plan = prefill_plan(heads, self._pattern, cache.key.dtype, hardware)
            tiles = query.shape[0] // plan.queries + num_requests
            self._attention_kernel[tiles, heads.num_kv_heads](
                *self._attention_arguments(query, cache, batch, output, None, None),
                **self._attention_sizes(cache, plan),
                TILE_KEYS=plan.keys, IS_DECODE=False, SKIP=skip,
            )  # fmt: skip

    def join_global_branch(
        self,
        query: torch.Tensor,
        cache: PagedCache,
        batch: DeviceBatch,
        output: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        """Adds the global keys behind the window, and the sinks, to a finished window attention.

        Args:
            query: see `lambda_attention`.
            cache: likewise.
            batch: likewise.
            output: the window's attention, replaced by the joint one; of query's shape.
            lse: float32 [num_heads, num_tokens], the natural logarithm of the window's sum of
                exponentials; replaced by the joint one.
        """
        num_requests = batch.seq_lens.shape[0]
        if num_requests == 0 or query.shape[0] == 0:
            return
        if self._pattern.n_global == 0 and self._sinks is None:
            return
        heads, hardware = self._heads, self._workspace.hardware
        rows = decode_rows(heads, batch.max_query_len)
        plan = decode_plan(heads, self._pattern, cache.key.dtype, hardware, rows)
        tiles, is_decode = num_requests, batch.max_query_len <= plan.queries
        if not is_decode:
            plan = join_plan(heads, self._pattern, cache.key.dtype, hardware)
            tiles = query.shape[0] // plan.queries + num_requests
        self._join_kernel[tiles, heads.num_kv_heads](
            query, cache.key, cache.value, output, lse,
            *self._batch_arguments(cache, batch), *self._row_strides(query, output),
            *lse.stride(), *self._cache_strides(cache, batch),
            **self._attention_sizes(cache, plan), IS_DECODE=is_decode,
        )  # fmt: skip

    def _attend_short(
        self,
        query: torch.Tensor,
        cache: PagedCache,
        batch: DeviceBatch,
        output: torch.Tensor,
        plan: Plan,
    ) -> None:
        """Attention of the requests whose queries fit into one tile."""
        num_requests, num_kv_heads = batch.seq_lens.shape[0], self._heads.num_kv_heads
        programs = num_requests * num_kv_heads
        splits = self._workspace.splits(programs, self._pattern, plan, self._dims)
        partial = lse = None
        if splits > 1:
            rows = programs * splits * plan.rows
            partial, lse = self._workspace.partial_results(rows, self._dims)
        self._attention_kernel[num_requests, num_kv_heads, splits](
            *self._attention_arguments(query, cache, batch, output, partial, lse),
            **self._attention_sizes(cache, plan),
            TILE_KEYS=plan.keys, IS_DECODE=True, SKIP=0,
        )  # fmt: skip
        if splits > 1:
            queries = min(batch.max_query_len, plan.queries)
            self._reduce_kernel[num_requests, queries, self._heads.num_heads](
                partial, lse, output, batch.query_start_loc, *output.stride()[:2],
                NUM_SPLITS=splits, SPLITS=power_of_two(splits), NUM_KV_HEADS=num_kv_heads,
                **self._sizes, TILE_ROWS=plan.rows, TILE_QUERIES=plan.queries,
                num_warps=8 if self._dims > 128 else 4,
            )  # fmt: skip

    def _attention_arguments(
        self,
        query: torch.Tensor,
        cache: PagedCache,
        batch: DeviceBatch,
        output: torch.Tensor,
        partial: torch.Tensor | None,
        lse: torch.Tensor | None,
    ) -> tuple[Any, ...]:
        return (
            query, cache.key, cache.value, output, partial, lse,
            *self._batch_arguments(cache, batch), *self._row_strides(query, output),
            *self._cache_strides(cache, batch),
        )  # fmt: skip

    def _batch_arguments(self, cache: PagedCache, batch: DeviceBatch) -> tuple[Any, ...]:
        return (
            batch.query_start_loc, batch.seq_lens, batch.block_table, self._angles, self._slopes,
            self._sinks, cache.key_scale, cache.value_scale, self._scale, batch.seq_lens.shape[0],
        )  # fmt: skip

    def _row_strides(self, query: torch.Tensor, output: torch.Tensor) -> tuple[int, ...]:
        return (*query.stride()[:2], *output.stride()[:2])

    def _cache_strides(self, cache: PagedCache, batch: DeviceBatch) -> tuple[int, ...]:
        key, value = cache.key.stride(), cache.value.stride()
        return (*key[:3], *value[:3], batch.block_table.stride(0))

    def _attention_sizes(self, cache: PagedCache, plan: Plan) -> dict[str, Any]:
        return {
            **self._lambda,
            **self._sizes,
            "BLOCK_SIZE": cache.key.shape[2],
            "TILE_ROWS": plan.rows,
            "TILE_QUERIES": plan.queries,
            "TILE_GLOBAL": plan.global_keys,
            "enable_fp_fusion": True,
            "num_warps": plan.num_warps,
            "num_stages": plan.num_stages,
        }
