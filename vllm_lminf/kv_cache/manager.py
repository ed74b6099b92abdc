"""Which blocks a request holds under the Λ: the pinned ones, and those its window still reaches.

A request's block list keeps one entry for every block of the sequence, in order; an entry whose
block was freed is vLLM's null block. So a long request's list reads, for one pinned block::

    [pinned, null, null, ..., null, window, window, ...]

A null entry is never read: the attention kernel looks at no position between the global tokens
and the window.
"""

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_lminf.kv_cache.spec import LambdaSpec
from vllm_lminf.pattern import cdiv


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
