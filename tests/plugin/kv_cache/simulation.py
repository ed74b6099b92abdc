"""A scheduler's calls on vLLM's real `KVCacheManager`, with a memory that remembers what it holds.

Every token that is computed leaves a mark of its whole prefix in its slot, as a real key does. A
query then finds out whether each slot that it sees still holds what its own request wrote, or what
another request with the same prefix did.
"""

from collections import Counter
from dataclasses import dataclass, field
from itertools import chain

import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock, get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from vllm_lminf.pattern import LambdaPattern, cdiv
from vllm_lminf.plugin.kv_cache import LambdaManager, LambdaSpec


def make_spec(
    n_global: int, n_local: int, block_size: int, extra_retained_tokens: int = 0
) -> LambdaSpec:
    return LambdaSpec(
        block_size=block_size,
        num_kv_heads=1,
        head_size=8,
        dtype=torch.float32,
        sliding_window=n_local,
        pattern=LambdaPattern(n_global, n_local, distance_limit=n_local),
        extra_retained_tokens=extra_retained_tokens,
    )


@dataclass
class _Held:
    """What a running request must hold.

    Attributes:
        freed: blocks of the sequence that were freed, or left out of a prefix-cache hit.
        num_entries: blocks of the sequence that have been asked for.
        marks: of every token, a mark of the prefix that ends with it.
    """

    freed: set[int]
    num_entries: int = 0
    marks: list[int] = field(default_factory=list)


class Simulation:
    """Requests on a pool of blocks. Every step checks everything that can be checked."""

    def __init__(
        self,
        spec: LambdaSpec,
        num_blocks: int,
        max_in_flight: int,
        max_model_len: int = 10**6,
        enable_caching: bool = True,
        use_eagle: bool = False,
    ) -> None:
        init_none_hash(sha256)
        self.spec = spec
        self.pattern = spec.pattern
        self.block_size = spec.block_size
        self.max_model_len = max_model_len
        self.cap = spec.max_admission_blocks_per_request(max_in_flight, max_model_len)
        self.enable_caching = enable_caching
        # One block of the pool is the null block.
        self.kv = KVCacheManager(
            KVCacheConfig(1 + num_blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
            max_model_len=max_model_len,
            scheduler_block_size=spec.block_size,
            hash_block_size=spec.block_size,
            max_in_flight_tokens=max_in_flight,
            enable_caching=enable_caching,
            use_eagle=use_eagle,
        )
        (manager,) = self.kv.coordinator.single_type_managers
        assert type(manager) is LambdaManager
        assert manager.max_admission_blocks_per_request == self.cap
        self.manager = manager
        self.pool = self.kv.block_pool
        self.num_blocks = num_blocks
        self.running: dict[str, Request] = {}
        self._held: dict[str, _Held] = {}
        self._memory = [[0] * spec.block_size for _ in range(1 + num_blocks)]
        self._count = 0

    @property
    def num_free(self) -> int:
        return self.pool.get_num_free_blocks()

    def request(self, tokens: list[int]) -> Request:
        """A new request, not admitted yet."""
        self._count += 1
        return Request(
            request_id=f"request-{self._count}",
            prompt_token_ids=tokens,
            sampling_params=SamplingParams(max_tokens=10**9),
            pooling_params=None,
            block_hasher=get_request_block_hasher(self.block_size, sha256),
        )

    def admit(self, request: Request, max_new: int) -> int | None:
        """Looks the prefix cache up and takes the first step, as the scheduler does.

        Returns:
            Tokens that came from the cache, or None when the pool has no room for the request.
        """
        hit, num_hit, _ = self.kv.get_computed_blocks(request)
        assert num_hit == self.expected_hit(request)
        freed = self._freed(num_hit)
        for entry, block in enumerate(hit.blocks[0]):
            assert block.is_null == (entry in freed), "a hit has other blocks than it needs"
        self._held[request.request_id] = _Held(freed)
        request.num_computed_tokens = 0
        num_new = min(max_new, request.num_tokens - num_hit)
        if not self._allocate(request, num_new, list(hit.blocks[0]), num_hit):
            del self._held[request.request_id]
            return None
        return num_hit

    def step(self, request: Request, max_new: int) -> bool:
        """Computes the next tokens of a running request; False when the pool has no room."""
        num_new = min(max_new, request.num_tokens - request.num_computed_tokens)
        return self._allocate(request, num_new, [], 0)

    def settle(self, request: Request) -> None:
        """The output of all steps so far has arrived."""
        request.num_in_flight_tokens = 0

    def run(self, request: Request, max_new: int) -> int | None:
        """Admits a request and computes its prompt; every step settles before the next."""
        num_hit = self.admit(request, max_new)
        if num_hit is None:
            return None
        self.settle(request)
        while request.num_computed_tokens < request.num_tokens:
            assert self.step(request, max_new), "no room for a request that was admitted"
            self.settle(request)
        return num_hit

    def free(self, request: Request) -> None:
        """The request ends, is aborted, or is preempted, possibly with steps in flight."""
        self.kv.free(request)
        request.num_computed_tokens = 0
        self.running.pop(request.request_id, None)
        self._held.pop(request.request_id, None)
        self.check()

    def blocks(self, request: Request) -> list[KVCacheBlock]:
        """The request's block list, null blocks included."""
        return list(self.kv.get_blocks(request.request_id).blocks[0])

    def entries_held(self, request: Request) -> list[int]:
        """Which blocks of the sequence the request holds."""
        return [e for e, block in enumerate(self.blocks(request)) if not block.is_null]

    def cached(self, request: Request, entry: int) -> KVCacheBlock | None:
        """The block in the prefix cache that stands for a block of this request."""
        found = self.pool.get_cached_block(request.block_hashes[entry], [0])
        return found[0] if found else None

    def evict(self, request: Request, entry: int) -> None:
        """Drops a block of this request from the prefix cache, wherever it is."""
        block = self.cached(request, entry)
        assert block is not None
        self.kv.evict_blocks({block.block_id})
        assert self.cached(request, entry) is None

    def expected_hit(self, request: Request) -> int:
        """The longest prefix whose pinned blocks and window are cached, by trying every length.

        One token at least is left to compute. With EAGLE the hit's last block is computed again:
        the hit ends one block before one that is cached.
        """
        if not self.enable_caching:
            return 0
        eagle = int(bool(self.kv.coordinator.eagle_group_ids))
        for num_found in range((request.num_tokens - 1) // self.block_size, eagle, -1):
            freed = self._freed((num_found - eagle) * self.block_size)
            if all(self.cached(request, e) for e in range(num_found) if e not in freed):
                return (num_found - eagle) * self.block_size
        return 0

    def check(self) -> None:
        """No block is lost, none is held by more than it counts, all others are free."""
        holders: Counter[int] = Counter()
        for request in self.running.values():
            held = self._held[request.request_id]
            blocks = self.blocks(request)
            assert len(blocks) == held.num_entries
            for entry, block in enumerate(blocks):
                assert block.is_null == (entry in held.freed), f"block {entry} of {len(blocks)}"
            ids = [block.block_id for block in blocks if not block.is_null]
            assert len(ids) == len(set(ids)), "a request holds a block twice"
            assert len(ids) <= self.cap
            holders.update(ids)
        for block in self.pool.blocks:
            if not block.is_null:
                assert block.ref_cnt == holders[block.block_id]
        assert self.num_free == self.num_blocks - len(holders)

    def _freed(self, num_computed: int) -> set[int]:
        return set(
            chain(
                *self.pattern.freed_blocks(
                    num_computed, self.block_size, self.spec.extra_retained_tokens
                )
            )
        )

    def _allocate(
        self, request: Request, num_new: int, hit: list[KVCacheBlock], num_hit: int
    ) -> bool:
        computed = request.num_computed_tokens + num_hit
        end = computed + num_new
        admission = request.request_id not in self.running
        held = self._held[request.request_id]
        settled = max(0, computed - request.num_in_flight_tokens)
        held.freed |= self._freed(settled)
        # What the manager says a step takes is asked once its frees are done, as vLLM does.
        self.kv.remove_skipped_blocks(request.request_id, settled)
        free_before = self.num_free
        arguments = (request.request_id, end, hit, computed, computed, end)
        predicted = self.manager.get_num_blocks_to_allocate(*arguments)
        must_be_free = predicted
        if admission:
            whole = self.manager.get_num_blocks_to_allocate(
                request.request_id, request.num_tokens, *arguments[2:5], request.num_tokens,
                apply_admission_cap=True,
            )  # fmt: skip
            assert whole == self._whole(request, hit)
            must_be_free = max(predicted, whole)
        allocated = self.kv.allocate_slots(
            request,
            num_new,
            num_new_computed_tokens=num_hit,
            new_computed_blocks=self.kv.create_kv_cache_blocks((hit,)),
            full_sequence_must_fit=admission,
        )
        if allocated is None:
            assert must_be_free > free_before, "refused although there was room"
            assert self.num_free == free_before
            self.check()
            return False
        assert must_be_free <= free_before
        assert free_before - self.num_free == predicted
        held.num_entries = max(held.num_entries, cdiv(end, self.block_size))
        self.running[request.request_id] = request
        request.num_computed_tokens = end
        request.num_in_flight_tokens += num_new
        self.check()
        self._write_and_read(request, computed, end)
        return True

    def _whole(self, request: Request, hit: list[KVCacheBlock]) -> int:
        """Blocks the request takes from the pool at most, from admission to the end of what it
        has: as many as it lacks, but never so many that it would hold more than the cap."""
        kept = [block for block in hit if not block.is_null]
        lacking = cdiv(request.num_tokens, self.block_size) - len(hit)
        idle = sum(block.ref_cnt == 0 for block in kept)
        return min(lacking, self.cap - len(kept)) + idle

    def _write_and_read(self, request: Request, start: int, end: int) -> None:
        marks = self._held[request.request_id].marks
        for token in request.all_token_ids[len(marks) : end]:
            marks.append(hash((marks[-1] if marks else 0, token)))
        blocks = self.blocks(request)
        for position in range(start, end):
            block = blocks[position // self.block_size]
            assert not block.is_null
            assert block.ref_cnt == 1, "a block that is written to is shared"
            self._memory[block.block_id][position % self.block_size] = marks[position]
        kept = chain(*(interval.positions for interval in self.pattern.kept(start)))
        for position in {*kept, *range(start, end)}:
            block = blocks[position // self.block_size]
            assert not block.is_null, f"position {position} is seen and its block is freed"
            slot = self._memory[block.block_id][position % self.block_size]
            assert slot == marks[position], f"position {position} was overwritten"
