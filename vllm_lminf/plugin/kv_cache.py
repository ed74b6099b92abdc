"""The KV cache of a layer under the Λ: its spec, its block manager, and what to do where it is too
small.

A request holds the pinned blocks, and those that its window still reaches.

A request's block list keeps one entry for every block of the sequence, in order; an entry whose
block was freed is vLLM's null block. So a long request's list reads, for one pinned block::

    [pinned, null, null, ..., null, window, window, ...]

A null entry is never read: the attention kernel looks at no position between the global tokens
and the window.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from vllm.config import VllmConfig
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec, SlidingWindowSpec

from vllm_lminf.pattern import LambdaPattern, cdiv
from vllm_lminf.plugin.config import BACKEND_NAME, LambdaConfig


@dataclass(frozen=True, kw_only=True)
class LambdaSpec(SlidingWindowSpec):
    """Blocks behind the window are freed, all but those that hold a global token.

    A subclass of `SlidingWindowSpec` because vLLM takes the admission cap from that class and its
    subclasses only. ``sliding_window`` is the Λ's n_local.

    Attributes:
        n_global: leading tokens whose blocks stay as long as the request.
        distance_limit: part of what the layer computes; the allocator doesn't use it.
        num_lookahead_tokens: slots that a draft model fills beyond the tokens in flight.
    """

    n_global: int
    distance_limit: int
    num_lookahead_tokens: int = 0

    @classmethod
    def of(cls, spec: AttentionSpec, pattern: LambdaPattern, num_lookahead_tokens: int = 0) -> Self:
        """The cache that vLLM planned for a layer, kept by this Λ."""
        return cls(
            block_size=spec.block_size,
            num_kv_heads=spec.num_kv_heads,
            head_size=spec.head_size,
            head_size_v=spec.head_size_v,
            dtype=spec.dtype,
            kv_quant_mode=spec.kv_quant_mode,
            max_tp_shards=spec.max_tp_shards,
            page_size_padded=spec.page_size_padded,
            sliding_window=pattern.n_local,
            n_global=pattern.n_global,
            distance_limit=pattern.distance_limit,
            num_lookahead_tokens=num_lookahead_tokens,
        )

    @property
    def pattern(self) -> LambdaPattern:
        return LambdaPattern(self.n_global, self.sliding_window, self.distance_limit)

    @property
    def num_retained_tokens(self) -> int:
        """Tokens below a step's first position that the worker leaves in the block table, where
        0 stands for all of them. From 0.33 on the worker blanks entries below a plain window; it
        must not blank the pinned ones."""
        return 0

    def max_admission_blocks_per_request(
        self, max_in_flight_tokens: int, max_model_len: int
    ) -> int:
        return self.pattern.max_blocks_held(
            self.block_size,
            max_in_flight_tokens + self.num_lookahead_tokens,
            max_model_len,
            self.extra_retained_tokens,
        )

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(
            isinstance(spec, LambdaSpec) and spec.pattern == self.pattern
            for spec in kv_cache_specs.values()
        )


class LambdaManager(SingleTypeKVCacheManager):
    """Frees blocks that leave the window while the request runs; keeps the global prefix pinned."""

    kv_cache_spec: LambdaSpec

    def __init__(self, kv_cache_spec: LambdaSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.pattern = kv_cache_spec.pattern
        self.num_pinned_blocks = self.pattern.num_pinned_blocks(self.block_size)
        self._num_freed_blocks = 0

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """Tokens behind the window of the next query, global ones included."""
        behind = self.pattern.window_start(num_computed_tokens)
        return max(0, behind - self.kv_cache_spec.extra_retained_tokens)

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Frees what left the window, pinned blocks excepted; freed entries become null blocks."""
        freed = self._freed_blocks(processed_computed_tokens)
        free_before = self.block_pool.get_num_free_blocks()
        self._remove_blocks_in_range(request_id, freed.start, freed.stop)
        self._num_freed_blocks += self.block_pool.get_num_free_blocks() - free_before

    def take_num_freed_blocks(self) -> int:
        """Blocks that went back to the pool because a window moved past them, since the last
        call; a block that another request still holds did not."""
        taken, self._num_freed_blocks = self._num_freed_blocks, 0
        return taken

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """Blocks that must be free for this request to get slots for ``num_tokens`` tokens.

        Entries that are freed already, or that a prefix-cache hit leaves out, cost nothing. With
        ``apply_admission_cap`` it is what the request needs until its end: never more than the
        cap, since blocks are freed as fast as new ones are taken.
        """
        num_required = cdiv(num_tokens, self.block_size)
        held = self.req_to_blocks.get(request_id, [])
        if request_id in self.num_cached_block and not apply_admission_cap:
            return max(num_required - len(held), 0)
        entries = [*held, *self._keep_live(new_computed_blocks, total_computed_tokens)]
        num_held = sum(not block.is_null for block in entries)
        num_new = num_required - len(entries)
        if apply_admission_cap and self.max_admission_blocks_per_request is not None:
            num_new = min(num_new, self.max_admission_blocks_per_request - num_held)
        touched = self._get_num_evictable_blocks(entries[len(held) :])
        return max(num_new, 0) + touched

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Takes over the blocks of a prefix-cache hit, those that no query will see left out."""
        req_blocks = self.req_to_blocks[request_id]
        total = num_local_computed_tokens + num_external_computed_tokens
        kept = self._keep_live(new_computed_blocks, total)
        self.block_pool.touch([block for block in kept if not block.is_null])
        req_blocks.extend(kept)
        self.num_cached_block[request_id] = len(req_blocks)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """The blocks of a request that ends; null blocks, here in the middle too, left out."""
        return [b for b in super().pop_blocks_for_free(request_id) if not b.is_null]

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """The longest prefix that the cache can stand in for.

        A block's hash covers everything before it, so a hit of ``h`` tokens needs no more than the
        pinned blocks and the blocks that hold the window before ``h``; entries between are null.

        Example: block size 4, n_global 2, n_local 6. A hit of 16 tokens needs block 0, and for
        the next query at 16, whose window starts at 11, blocks 2 and 3:
        ``[b0, null, b2, b3]``.
        """
        if not isinstance(kv_cache_spec, LambdaSpec):
            raise TypeError(f"LambdaManager serves LambdaSpec groups, not {kv_cache_spec!r}")
        pattern, block_size = kv_cache_spec.pattern, kv_cache_spec.block_size
        hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            block_size,
            supports_fine_grained_hash_lookup=cls.supports_fine_grained_hash_lookup,
            alignment_tokens=alignment_tokens,
        )
        null_entry = [block_pool.null_block] * len(kv_cache_group_ids)
        found: dict[int, list[KVCacheBlock]] = {}

        def is_cached(block: int) -> bool:
            if block not in found:
                cached = block_pool.get_cached_block(hashes[block], kv_cache_group_ids)
                found[block] = cached or []
            return bool(found[block])

        num_pinned = pattern.num_pinned_blocks(block_size)
        num_leading = 0
        max_blocks = min(max_length // block_size, len(hashes))
        while num_leading < min(num_pinned, max_blocks) and is_cached(num_leading):
            num_leading += 1
        if num_leading < num_pinned:
            max_blocks = num_leading

        num_hit = max_blocks
        while num_hit > 0:
            # With EAGLE the hit's last block is computed again, so the hit is one block shorter
            # than what was found.
            hit_tokens = (num_hit - 1 if drop_eagle_block else num_hit) * block_size
            if hit_tokens % alignment_tokens:
                num_hit -= 1
                continue
            freed = pattern.freed_blocks(
                hit_tokens, block_size, kv_cache_spec.extra_retained_tokens
            )
            missing = next(
                (b for b in range(num_hit - 1, freed.stop - 1, -1) if not is_cached(b)), None
            )
            if missing is None:
                break
            # Every longer hit whose window holds the missing block fails too.
            num_hit = missing
        else:
            return tuple([] for _ in kv_cache_group_ids), 0

        num_kept = hit_tokens // block_size
        entries = [null_entry if b in freed else found[b] for b in range(num_kept)]
        return tuple([entry[g] for entry in entries] for g in range(len(null_entry))), hit_tokens

    def _freed_blocks(self, num_computed_tokens: int) -> range:
        return self.pattern.freed_blocks(
            num_computed_tokens, self.block_size, self.kv_cache_spec.extra_retained_tokens
        )

    def _keep_live(
        self, computed_blocks: Sequence[KVCacheBlock], num_computed_tokens: int
    ) -> list[KVCacheBlock]:
        """The leading entries of a block list, with null for what is freed at this length."""
        freed = self._freed_blocks(num_computed_tokens)
        return [
            self._null_block if b in freed else block for b, block in enumerate(computed_blocks)
        ]


Specs = dict[str, KVCacheSpec]
"""The caches of a worker's layers, by layer."""


def advice(config: VllmConfig, specs: Sequence[Specs], available_memory: Sequence[int]) -> str:
    """A sentence or two: what a request takes under the Λ, and which n_local would fit.

    Args:
        config: the engine's.
        specs: of every worker, the caches of its layers.
        available_memory: of every worker, in bytes.
    """
    n_local = LambdaConfig.of(config).n_local
    fits = _largest_n_local(config, specs, available_memory)
    smaller = (
        f"n_local {fits} fits"
        if fits
        else "no n_local fits with this n_global and this many tokens in flight"
    )
    return (
        f"With {BACKEND_NAME} a request takes no more memory the longer it gets, so a smaller "
        "max_model_len hardly helps. What a request holds follows from n_local, which is "
        f"{n_local}, n_global, and --max-num-batched-tokens, which is "
        f"{config.scheduler_config.max_num_batched_tokens}: {smaller}."
    )


def _largest_n_local(
    config: VllmConfig, specs: Sequence[Specs], available_memory: Sequence[int]
) -> int:
    """The largest window, in steps of 16 tokens, with which one request fits; 0 if there is none.

    A layer with a window of its own keeps it. One block is left to vLLM, which puts it aside.
    """
    n_local = LambdaConfig.of(config).n_local

    def fits(window: int) -> bool:
        for layers, memory in zip(specs, available_memory, strict=True):
            needed = 0
            for spec in layers.values():
                cut = spec
                if isinstance(spec, LambdaSpec) and spec.pattern.n_local == n_local:
                    pattern = replace(spec.pattern, n_local=window)
                    cut = LambdaSpec.of(spec, pattern, spec.num_lookahead_tokens)
                needed += cut.max_memory_usage_bytes(config) + cut.page_size_bytes
            if needed > memory:
                return False
        return True

    low, high = 0, n_local // 16
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(16 * middle) else (low, middle - 1)
    return 16 * low
