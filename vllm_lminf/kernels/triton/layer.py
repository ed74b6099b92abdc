"""One layer's Λ-attention by Triton kernels: which of them are launched, and with what.

Nothing waits for the device and nothing is allocated but by shapes, so a step may be captured in a
CUDA graph: grids and sizes follow from the shapes of the tensors and from
`DeviceBatch.max_query_len`. Triton is imported once a layer is made.
"""

import importlib.util
import os
from typing import Any, ClassVar

import torch

from vllm_lminf.kernels.archive import RecallBatch
from vllm_lminf.kernels.base import (
    Captures,
    DeviceBatch,
    Heads,
    Kernel,
    LayerConfig,
    PagedCache,
)
from vllm_lminf.kernels.triton.plan import (
    MAX_DECODE_ROWS,
    MOST_TILE_KEYS,
    Plan,
    Step,
    decode_plan,
    decode_rows,
    hardware_of,
    merge_plan,
    most_partial_rows,
    plan_step,
    power_of_two,
    searches_of_every_kind,
    steps_of_every_kind,
)
from vllm_lminf.kernels.triton.recaller import Recaller, reasons_against_recalling
from vllm_lminf.pattern import cdiv

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
_UNINTERPRETED = (torch.bfloat16, *_FP8_DTYPES)
_MAX_GROUP = 128
_MAX_HEAD_SIZE = 256


class Workspace:
    """Where programs that share a tile's keys leave their results; one for all layers of an engine.

    Layers run one after the other on one stream, so they don't disturb each other.

    Args:
        heads: of the layer with the most query heads per key head, or the largest head size.
        device: of the cache.
    """

    def __init__(self, heads: Heads, device: torch.device) -> None:
        self.hardware = hardware_of(device)
        size = most_partial_rows(heads, self.hardware) * (power_of_two(heads.head_size) + 1)
        self._floats = torch.empty(size, dtype=torch.float32, device=device)

    def partial_results(self, rows: int, dims: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for results [rows, dims] and their log-sum-exps [rows], each in a row."""
        return self._floats, self._floats[rows * dims :]

    @classmethod
    def of(cls, layer: LayerConfig) -> "Workspace":
        """That of a layer's engine, for such heads; made by the first layer that asks."""
        key = "workspace", layer.heads, layer.device
        workspace: Workspace | None = layer.shared.get(key)
        if workspace is None:
            workspace = layer.shared[key] = cls(layer.heads, layer.device)
        return workspace


class TritonCacheKernel(Kernel):
    """What the kernels for GPUs have in common: Triton's writes the cache."""

    preferred_block_size: ClassVar[int | None] = MOST_TILE_KEYS

    def __init__(self, layer: LayerConfig) -> None:
        # Triton is looked for where it is needed, and nowhere else.
        from vllm_lminf.kernels.triton.cache import write_kernel

        self._write_kernel = write_kernel
        self._heads = layer.heads
        self._dims = max(16, power_of_two(layer.heads.head_size))

    def write_cache(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: PagedCache,
        slot_mapping: torch.Tensor,
    ) -> None:
        num_tokens = slot_mapping.shape[0]
        if num_tokens == 0:
            return
        num_kv_heads = self._heads.num_kv_heads
        tile_heads = min(power_of_two(num_kv_heads), max(1, 2048 // self._dims))
        narrow = cache.key.dtype in _FP8_DTYPES
        self._write_kernel[num_tokens, cdiv(num_kv_heads, tile_heads)](
            key, value, cache.key, cache.value, slot_mapping, cache.key_scale, cache.value_scale,
            *self._row_strides(key, value), *cache.key.stride()[:3], *cache.value.stride()[:3],
            NUM_KV_HEADS=num_kv_heads, TILE_HEADS=tile_heads, HEAD_SIZE=self._heads.head_size,
            DIMS=self._dims, BLOCK_SIZE=cache.key.shape[2],
            LARGEST=torch.finfo(cache.key.dtype).max if narrow else None,
        )  # fmt: skip

    def warm_up(self, cache: PagedCache, max_requests: int, max_query_len: int) -> None:
        heads, device = self._heads, cache.key.device
        rows = torch.empty(1, heads.num_heads, heads.head_size, dtype=heads.dtype, device=device)
        rows = rows[:, : heads.num_kv_heads]
        self.write_cache(rows, rows, cache, torch.full((1,), -1, device=device))

    def _row_strides(self, *rows: torch.Tensor) -> tuple[int, ...]:
        """Strides of tokens and heads of every tensor.

        Raises:
            ValueError: a row doesn't start at a multiple of 8 elements, as the kernels take it to.
        """
        strides = tuple(stride for x in rows for stride in x.stride()[:2])
        if any(stride % 8 for stride in strides):
            raise ValueError(f"strides {strides}: the Triton kernels take multiples of 8")
        return strides


class TritonKernel(TritonCacheKernel):
    """See the module.

    Raises:
        ValueError: the scale isn't positive.
    """

    captures: ClassVar[Captures] = Captures.ALWAYS
    recalls: ClassVar[bool] = True

    @classmethod
    def unsupported_reasons(cls, layer: LayerConfig) -> list[str]:
        heads, cache_dtype, block_size = layer.heads, layer.cache_dtype, layer.block_size
        on_cpu, capability = layer.device.type == "cpu", layer.capability or (99, 0)
        named = "compute capability {}.{}".format(*capability)
        interprets = os.environ.get("TRITON_INTERPRET") == "1"
        divides = heads.num_heads % heads.num_kv_heads == 0
        fits = heads.head_size % 8 == 0 and 16 <= heads.head_size <= _MAX_HEAD_SIZE
        table = (
            (
                importlib.util.find_spec("triton") is None,
                "Triton isn't installed: pip install triton",
            ),
            (
                on_cpu and not interprets,
                "Triton compiles for GPUs alone, and this is a CPU: set TRITON_INTERPRET=1 before "
                "the start to have its kernels interpreted, which is slow and meant for tests",
            ),
            (
                on_cpu and interprets and not {heads.dtype, cache_dtype}.isdisjoint(_UNINTERPRETED),
                f"{heads.dtype} over a cache of {cache_dtype}: Triton's interpreter computes "
                "products of bfloat16 wrongly and rounds to bfloat16 and float8 wrongly; choose "
                "--dtype float32 or float16, and their own cache",
            ),
            (
                layer.device.type not in ("cpu", "cuda"),
                f"Triton's kernels don't run on devices of type {layer.device.type!r}",
            ),
            (capability < (8, 0), f"{named}: the Triton kernels take 8.0 and newer"),
            (
                heads.dtype not in _DTYPES,
                f"{heads.dtype}: the Triton kernels take float32, float16 and bfloat16",
            ),
            (
                cache_dtype not in (heads.dtype, *_FP8_DTYPES),
                f"a cache of {cache_dtype}: the Triton kernels take {heads.dtype} as the queries "
                "are, or float8_e4m3fn or float8_e5m2",
            ),
            (
                cache_dtype == torch.float8_e4m3fn and capability < (8, 9),
                f"a cache of float8_e4m3fn on {named}: Triton converts it on 8.9 and newer; choose "
                "fp8_e5m2 or the model's own dtype",
            ),
            (
                not fits,
                f"heads of {heads.head_size} dimensions: the Triton kernels take multiples of 8 "
                f"from 16 to {_MAX_HEAD_SIZE}",
            ),
            (
                not divides,
                f"{heads.num_heads} heads over {heads.num_kv_heads}: they don't divide",
            ),
            (
                divides and heads.num_heads // heads.num_kv_heads > _MAX_GROUP,
                f"{heads.num_heads} heads over {heads.num_kv_heads}: the Triton kernels take up to "
                f"{_MAX_GROUP} query heads a key head",
            ),
            (
                block_size % 16 != 0,
                f"blocks of {block_size} tokens: the Triton kernels take multiples of 16",
            ),
        )
        reasons = [reason for applies, reason in table if applies]
        middle = layer.middle
        return reasons + ([] if middle is None else reasons_against_recalling(layer, middle))

    def __init__(self, layer: LayerConfig) -> None:
        from vllm_lminf.kernels.triton.attention import attention_kernel
        from vllm_lminf.kernels.triton.merge import merge_kernel
        from vllm_lminf.kernels.triton.reduce import reduce_kernel

        super().__init__(layer)
        heads, pattern = layer.heads, layer.pattern
        rules, rotation = layer.rules, layer.far_rotation
        if not rules.scale > 0:
            raise ValueError(f"scale is {rules.scale}: the Triton kernels take a positive one")
        self._attention_kernel = attention_kernel
        self._merge_kernel = merge_kernel
        self._reduce_kernel = reduce_kernel
        self._pattern = pattern
        self._workspace = Workspace.of(layer)
        self._steps: dict[tuple[int, int, torch.dtype], Step] = {}
        self._scale = float(rules.scale)
        self._slopes = None
        if rules.alibi_slopes is not None:
            self._slopes = rules.alibi_slopes.detach().to(torch.float32).contiguous()
        self._sinks = None if rules.sinks is None else rules.sinks.detach().contiguous()
        self._group = heads.num_heads // heads.num_kv_heads
        self._sizes = {
            "GROUP": self._group,
            "HEAD_SIZE": heads.head_size,
            "DIMS": self._dims,
        }
        self._angles, half, is_neox = None, 0, True
        if rotation is not None:
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
        self._recaller = None
        if layer.middle is not None:
            self._recaller = Recaller(layer, self._workspace.hardware)

    @property
    def search_counts(self) -> torch.Tensor | None:
        """See `SearchWorkspace.counts`; None for a layer without a middle."""
        return None if self._recaller is None else self._recaller.counts

    def temporary_bytes(self, num_tokens: int, max_requests: int) -> int:
        """Log-sum-exps, of a layer with a middle. Workspaces are there before."""
        if self._recaller is None:
            return 0
        return num_tokens * self._heads.num_heads * torch.float32.itemsize

    def write_archive(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        archive: torch.Tensor,
        batch: DeviceBatch,
        recall: RecallBatch,
    ) -> None:
        strides = self._row_strides(key, value)
        self._recalling().write(key, value, archive, batch, recall, strides)

    def attend_and_recall(
        self,
        query: torch.Tensor,
        cache: PagedCache,
        batch: DeviceBatch,
        archive: torch.Tensor,
        recall: RecallBatch,
        output: torch.Tensor,
    ) -> None:
        """See `Kernel`. The log-sum-exps in between are allocated, by the shape of query alone."""
        recaller = self._recalling()
        if batch.seq_lens.shape[0] == 0 or query.shape[0] == 0:
            return
        lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
        self._attend(query, cache, batch, output, lse)
        strides = self._row_strides(query, output)
        recaller.add(query, archive, batch, recall, output, lse, strides)

    def _recalling(self) -> Recaller:
        if self._recaller is None:
            raise ValueError("the kernel was made for a layer without a middle")
        return self._recaller

    def attend(
        self, query: torch.Tensor, cache: PagedCache, batch: DeviceBatch, output: torch.Tensor
    ) -> None:
        """See `Kernel`. Requests whose queries fit into one tile are always computed in the same
        way, whatever else is in the batch: by programs that split their keys. Longer ones have a
        launch of their own, of as many tiles as so many rows and requests can take.
        """
        self._attend(query, cache, batch, output)

    def _attend(
        self,
        query: torch.Tensor,
        cache: PagedCache,
        batch: DeviceBatch,
        output: torch.Tensor,
        output_lse: torch.Tensor | None = None,
    ) -> None:
        """The same.

        Args:
            output_lse: float32 [num_tokens, num_heads]: gets its log-sum-exps, in powers of two.
        """
        num_requests = batch.seq_lens.shape[0]
        if num_requests == 0 or query.shape[0] == 0:
            return
        step = self._step(num_requests, batch.max_query_len, cache.key.dtype)
        if step.short is not None:
            self._attend_short(query, cache, batch, output, output_lse, step.short, step.splits)
        if step.long is not None:
            plan = step.long
            tiles = query.shape[0] // plan.queries + num_requests
            self._attention_kernel[tiles, self._heads.num_kv_heads](
                *self._attention_arguments(
                    query, cache, batch, output, output_lse=output_lse, skip=step.skip
                ),
                **self._attention_sizes(cache, plan), TILE_KEYS=plan.keys, IS_DECODE=False,
            )  # fmt: skip

    def warm_up(self, cache: PagedCache, max_requests: int, max_query_len: int) -> None:
        """See `Kernel`. Launches kernels for requests that have no rows; in a layer with a middle
        those of `attend_and_recall` alone."""
        super().warm_up(cache, max_requests, max_query_len)
        heads, device = self._heads, cache.key.device
        query, output = torch.empty(
            2, 1, heads.num_heads, heads.head_size, dtype=heads.dtype, device=device
        )
        lse = None
        if self._recaller is not None:
            lse = torch.empty(1, heads.num_heads, device=device)
        for requests, queries in steps_of_every_kind(
            heads, self._pattern, cache.key.dtype, self._workspace.hardware, max_requests,
            max_query_len,
        ):  # fmt: skip
            batch = _without_rows(requests, queries, device)
            self._attend(query, cache, batch, output, lse)
        if self._recaller is not None and lse is not None:
            rows = query[:, : heads.num_kv_heads]
            nothing = torch.zeros(1, dtype=torch.int32, device=device)
            nowhere = torch.full((1,), -1, device=device)
            recall = RecallBatch(nothing[:, None], nowhere, nothing)
            pages = self._recaller.no_pages()
            self.write_archive(rows, rows, pages, _without_rows(1, 1, device), recall)
            strides = self._row_strides(query, output)
            for queries in searches_of_every_kind(heads, self._workspace.hardware, max_query_len):
                batch = _without_rows(1, queries, device)
                self._recaller.add(query, pages, batch, recall, output, lse, strides)

    def warm_up_merge(self, cache: PagedCache, max_query_len: int) -> None:
        """The same for what `merge_global_branch` can launch."""
        heads, device = self._heads, cache.key.device
        query, output = torch.empty(
            2, 1, heads.num_heads, heads.head_size, dtype=heads.dtype, device=device
        )
        lse = torch.empty(heads.num_heads, 1, device=device)
        seen = set()
        for queries in range(1, min(max_query_len, MAX_DECODE_ROWS + 1) + 1):
            plan = self._merge_plan(queries, cache.key.dtype)
            if plan not in seen:
                seen.add(plan)
                batch = _without_rows(1, queries, device)
                self.merge_global_branch(query, cache, batch, output, lse)

    def merge_global_branch(
        self,
        query: torch.Tensor,
        cache: PagedCache,
        batch: DeviceBatch,
        output: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        """Merges a finished window attention with the global keys behind the window, and the sinks.

        Args:
            query: see `attend`.
            cache: likewise.
            batch: likewise.
            output: the window's attention, replaced by the merged one; of query's shape.
            lse: float32 [num_heads, num_tokens], the natural logarithm of the window's sum of
                exponentials; replaced by the merged one.
        """
        num_requests = batch.seq_lens.shape[0]
        if num_requests == 0 or query.shape[0] == 0:
            return
        if self._pattern.n_global == 0 and self._sinks is None:
            return
        plan, is_decode = self._merge_plan(batch.max_query_len, cache.key.dtype)
        tiles = num_requests if is_decode else query.shape[0] // plan.queries + num_requests
        self._merge_kernel[tiles, self._heads.num_kv_heads](
            query, cache.key, cache.value, output, lse,
            *self._batch_arguments(cache, batch), self._scale, num_requests,
            *self._row_strides(query, output), *lse.stride(), *self._cache_strides(cache, batch),
            **self._attention_sizes(cache, plan), IS_DECODE=is_decode,
        )  # fmt: skip

    def _step(self, num_requests: int, max_query_len: int, cache_dtype: torch.dtype) -> Step:
        """What a batch launches; thought out once for batches that launch the same."""
        key = num_requests, min(max_query_len, MAX_DECODE_ROWS + 1), cache_dtype
        step = self._steps.get(key)
        if step is None:
            hardware = self._workspace.hardware
            step = plan_step(
                self._heads, self._pattern, cache_dtype, hardware, num_requests, max_query_len
            )
            self._steps[key] = step
        return step

    def _merge_plan(self, max_query_len: int, cache_dtype: torch.dtype) -> tuple[Plan, bool]:
        """Sizes for a batch, and whether one tile holds all queries of any request."""
        heads, pattern, hardware = self._heads, self._pattern, self._workspace.hardware
        plan = decode_plan(heads, pattern, cache_dtype, hardware, decode_rows(heads, max_query_len))
        if max_query_len <= plan.queries:
            return plan, True
        return merge_plan(heads, pattern, cache_dtype, hardware), False

    def _attend_short(
        self,
        query: torch.Tensor,
        cache: PagedCache,
        batch: DeviceBatch,
        output: torch.Tensor,
        output_lse: torch.Tensor | None,
        plan: Plan,
        splits: int,
    ) -> None:
        """Attention of the requests whose queries fit into one tile."""
        num_requests, heads = batch.seq_lens.shape[0], self._heads
        queries = min(batch.max_query_len, plan.queries)
        partial = lse = None
        num_rows = queries * self._group
        if splits > 1:
            rows = num_requests * heads.num_kv_heads * splits * num_rows
            partial, lse = self._workspace.partial_results(rows, self._dims)
        self._attention_kernel[num_requests, heads.num_kv_heads, splits](
            *self._attention_arguments(
                query, cache, batch, output, partial, lse,
                output_lse if splits == 1 else None, num_rows,
            ),
            **self._attention_sizes(cache, plan), TILE_KEYS=plan.keys, IS_DECODE=True,
        )  # fmt: skip
        if splits > 1:
            self._reduce_kernel[num_requests, queries, heads.num_heads](
                partial, lse, output, output_lse, batch.query_start_loc, *output.stride()[:2],
                splits, num_rows, plan.queries, NUM_KV_HEADS=heads.num_kv_heads, **self._sizes,
                num_warps=8 if self._dims > 128 else 4,
            )  # fmt: skip

    def _attention_arguments(
        self,
        query: torch.Tensor,
        cache: PagedCache,
        batch: DeviceBatch,
        output: torch.Tensor,
        partial: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        output_lse: torch.Tensor | None = None,
        num_rows: int = 0,
        skip: int = 0,
    ) -> tuple[Any, ...]:
        return (
            query, cache.key, cache.value, output, partial, lse, output_lse,
            *self._batch_arguments(cache, batch), self._scale, batch.seq_lens.shape[0], num_rows,
            skip, *self._row_strides(query, output), *self._cache_strides(cache, batch),
        )  # fmt: skip

    def _batch_arguments(self, cache: PagedCache, batch: DeviceBatch) -> tuple[Any, ...]:
        return (
            batch.query_start_loc, batch.seq_lens, batch.block_table, self._angles, self._slopes,
            self._sinks, cache.key_scale, cache.value_scale,
        )  # fmt: skip

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


def _without_rows(num_requests: int, max_query_len: int, device: torch.device) -> DeviceBatch:
    """Padding alone."""
    nothing = torch.zeros(num_requests + 1, dtype=torch.int32, device=device)
    return DeviceBatch(nothing, nothing[1:], nothing[1:, None], max_query_len)
