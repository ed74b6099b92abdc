"""A request's blocks under a policy: the spec says what one request may hold at most, the manager
gives blocks back while the request runs, and `advice` says what to do where memory is too small.

A request's block list has one entry for every block of the sequence, in order. An entry whose block
was freed is vLLM's null block. Under a Λ with one pinned block a long request's list reads::

    [pinned, null, null, ..., null, window, window, ...]

Null entries are never read: a kernel visits the intervals of the pattern alone, and what is freed
follows from the same intervals (`vllm_lminf.pattern.Pattern`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Self

from vllm.config import VllmConfig
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec, SlidingWindowSpec

from vllm_lminf.pattern import LambdaPattern, Pattern, cdiv
from vllm_lminf.plugin.config import BACKEND_NAME, LambdaConfig


@dataclass(frozen=True, kw_only=True)
class LambdaSpec(SlidingWindowSpec):
    """The KV cache of layers under one pattern.

    A subclass of `SlidingWindowSpec` because vLLM takes the admission cap from that class and its
    subclasses only.

    Attributes:
        pattern: what a request keeps. ``sliding_window`` repeats its n_local for vLLM.
        num_lookahead_tokens: slots that a draft model fills beyond the tokens in flight.
    """

    pattern: Pattern
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
            pattern=pattern,
            num_lookahead_tokens=num_lookahead_tokens,
        )

    @property
    def num_retained_tokens(self) -> int:
        """Tokens below a step's first position that the worker leaves in the block table, where
        0 stands for all of them. From 0.33 on the worker blanks entries below a plain window; it
        must not blank the pinned ones."""
        return 0

    def max_admission_blocks_per_request(
        self, max_in_flight_tokens: int, max_model_len: int
    ) -> int:
        """The most blocks that one request ever holds. vLLM sizes the pool by it, and admits a
        request when that many are free or will be."""
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
    """The blocks of all requests in the groups of layers that share one pattern.

    At each step vLLM first has `remove_skipped_blocks` free what no later query sees, then asks
    `get_num_blocks_to_allocate` what the step takes. A new request's prompt is looked up in the
    prefix cache before (`find_longest_cache_hit`), and what was found is taken over
    (`add_local_computed_blocks`).
    """

    kv_cache_spec: LambdaSpec

    def __init__(self, kv_cache_spec: LambdaSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.pattern = kv_cache_spec.pattern
        self.num_pinned_blocks = self.pattern.num_pinned_blocks(self.block_size)
        self._num_freed_blocks = 0

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """Tokens before the last interval that is kept, pinned ones included. vLLM asks for it
        where blocks come from a KV connector, which isn't served, and in methods that are
        overridden here."""
        kept = self.pattern.kept(
            max(0, num_computed_tokens - self.kv_cache_spec.extra_retained_tokens)
        )
        return kept[-1].start

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Frees what no later query sees; the entries become null blocks."""
        freed = self.pattern.freed_blocks(
            processed_computed_tokens, self.block_size, self.kv_cache_spec.extra_retained_tokens
        )
        if freed:
            free_before = self.block_pool.get_num_free_blocks()
            for gap in freed:
                self._remove_blocks_in_range(request_id, gap.start, gap.stop)
            self._num_freed_blocks += self.block_pool.get_num_free_blocks() - free_before

    def take_num_freed_blocks(self) -> int:
        """Blocks that `remove_skipped_blocks` gave back to the pool since the last call; one that
        another request still holds is not among them."""
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
        """Takes over the blocks of a prefix-cache hit; null blocks for what no query will see."""
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
        blocks that are kept once ``h`` tokens are computed; entries between are null.

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
        found: dict[int, list[KVCacheBlock]] = {}

        def is_cached(block: int) -> bool:
            if block not in found:
                cached = block_pool.get_cached_block(hashes[block], kv_cache_group_ids)
                found[block] = cached or []
            return bool(found[block])

        num_found = min(max_length // block_size, len(hashes))
        while num_found > 0:
            # With EAGLE the hit's last block is computed again, so the hit is one block shorter
            # than what was found.
            num_hit = num_found - 1 if drop_eagle_block else num_found
            if num_hit * block_size % alignment_tokens:
                num_found -= 1
                continue
            kept = pattern.kept_blocks(
                num_hit * block_size, block_size, num_found, kv_cache_spec.extra_retained_tokens
            )
            missing = next((b for b in chain(*kept) if not is_cached(b)), None)
            if missing is None:
                break
            # A hit that is shorter, and yet reaches over the missing block, keeps it too.
            num_found = missing
        else:
            return tuple([] for _ in kv_cache_group_ids), 0

        hit = tuple([block_pool.null_block] * num_hit for _ in kv_cache_group_ids)
        for block in chain(*kept):
            if block < num_hit:
                for entries, cached in zip(hit, found[block], strict=True):
                    entries[block] = cached
        return hit, num_hit * block_size

    def _keep_live(
        self, computed_blocks: Sequence[KVCacheBlock], num_computed_tokens: int
    ) -> list[KVCacheBlock]:
        """The leading entries of a block list, with null for what is freed at this length."""
        live = [self._null_block] * len(computed_blocks)
        for kept in self.pattern.kept_blocks(
            num_computed_tokens,
            self.block_size,
            len(computed_blocks),
            self.kv_cache_spec.extra_retained_tokens,
        ):
            live[kept.start : kept.stop] = computed_blocks[kept.start : kept.stop]
        return live


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
        else "no n_local fits with this n_global and so many tokens at once: lower the latter"
    )
    return (
        f"With {BACKEND_NAME} a request takes no more memory the longer it gets: a smaller "
        "max_model_len helps only below n_local and --max-num-batched-tokens together. What a "
        "request holds follows from n_local, which is "
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
                own = spec.pattern if isinstance(spec, LambdaSpec) else None
                if isinstance(own, LambdaPattern) and own.n_local == n_local:
                    pattern = replace(own, n_local=window)
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
