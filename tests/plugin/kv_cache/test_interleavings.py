"""Random interleavings of all that a scheduler does, on vLLM's real `KVCacheManager`.

After every action the real blocks are compared with `tests.plugin.kv_cache.model`: what every
request holds and what it doesn't, in every group; that no block is held twice, lost, or free twice;
that no request exceeds its bound. A memory beside the pool keeps who wrote what, so that a query
that is shown another request's token is noticed. Some engines recall the middle: they have an
archive as well, with pages of its own, and what is written depends on which rows looked.

``LMINF_TEST_ACTIONS`` is how many actions are tried; the default is for every day.
"""

import os
from collections import Counter, deque
from dataclasses import dataclass, replace
from math import ceil, gcd, lcm
from operator import le, sub

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock, get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import (
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request

from tests.plugin.kv_cache.model import Layers, Running
from tests.plugin.kv_cache.simulation import make_spec
from vllm_lminf.middle import ALL_ROWS, Middle
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.plugin.archive import ArchiveSpec, mark_rows_that_look

DEFAULT_ACTIONS = 20_000
ACTIONS = int(os.environ.get("LMINF_TEST_ACTIONS", DEFAULT_ACTIONS))
ACTIONS_PER_POOL = 80

LONGEST_PROMPT = 150
MOST_WAITING = 4

which = st.integers(0, 7)


@dataclass(frozen=True)
class Group:
    """A KV cache group: kept by our manager, or by vLLM's own for windows."""

    layers: Layers
    is_ours: bool

    def spec(self, num_lookahead: int) -> KVCacheSpec:
        layers = self.layers
        if self.is_ours:
            spec = make_spec(layers.n_global, layers.n_local, layers.block_size)
            return replace(spec, num_lookahead_tokens=num_lookahead)
        return SlidingWindowSpec(
            block_size=layers.block_size,
            num_kv_heads=1,
            head_size=8,
            dtype=torch.float32,
            sliding_window=layers.n_local,
        )


@dataclass(frozen=True)
class ArchiveGroup:
    """The archive of a group that is ours: a page for every block of the sequence.

    Attributes:
        block_size: tokens of a page.
        num_pages: that requests can hold; the longest has room.
        rows: of a prompt look into the middle.
    """

    block_size: int
    num_pages: int
    rows: int

    def spec(self, num_lookahead: int) -> ArchiveSpec:
        return ArchiveSpec(
            block_size=self.block_size,
            num_kv_heads=1,
            head_size=16,
            dtype=torch.float32,
            dcp_sharded=False,
            num_pages=1 + self.num_pages,
            index_bits=8,
        )


@dataclass(frozen=True)
class Setup:
    """What an engine is started with.

    Attributes:
        groups: the KV cache groups.
        archive: one more, which has a pool of its own; None where nothing is recalled.
        room_for: how many requests fit at their largest, and how many more blocks there are.
        chunk: most tokens of a request in one step.
        num_ahead: most steps of a request in flight.
        num_lookahead: slots for a draft model, beyond the tokens of a step.
        max_length: most tokens of a request.
        is_reserved: whether a request is admitted only where all of it fits.
        is_cached: whether prefix caching is on.
        is_eagle: whether the last block of a hit is computed again, for a drafter.
        is_sparse: whether vLLM's own windows cache no more than what a repeated prompt needs.
    """

    groups: tuple[Group, ...]
    archive: ArchiveGroup | None
    room_for: tuple[int, int]
    chunk: int
    num_ahead: int
    num_lookahead: int
    max_length: int
    is_reserved: bool
    is_cached: bool
    is_eagle: bool
    is_sparse: bool

    def bound(self, layers: Layers) -> int:
        return layers.bound(self.num_ahead * self.chunk + self.num_lookahead, self.max_length)


@st.composite
def setups(draw: st.DrawFn) -> Setup:
    base = draw(st.sampled_from([1, 2, 4, 5]))
    recalls = draw(st.sampled_from([False, False, True]))
    # The longer window is larger than any pool of the shorter requests.
    endless = 200 if recalls else 10_000
    max_length, long_window = draw(st.sampled_from([(48, 300), (endless, 40)]))

    def group(is_ours: bool) -> Group:
        size = base * draw(st.sampled_from([1, 1, 1, 2, 3]))
        n_global = draw(st.sampled_from([0, 1, size - 1, size, size + 1, 3 * size + 1]))
        n_local = draw(st.sampled_from([1, 2, size, size + 1, 7, 2 * size + 3, long_window]))
        return Group(Layers(n_global if is_ours else 0, n_local, size), is_ours)

    others = draw(st.sampled_from([(), (), (), (), (True,), (True,), (False,), (False, True)]))
    groups = tuple(group(is_ours) for is_ours in draw(st.permutations([True, *others])))
    archive = None
    if recalls:
        size = next(each.layers.block_size for each in groups if each.is_ours)
        pages = ceil(max_length / size) + draw(st.sampled_from([0, 1, 8]))
        archive = ArchiveGroup(size, pages, rows=draw(st.sampled_from([1, 7, 30, ALL_ROWS])))
    return Setup(
        groups=groups,
        archive=archive,
        room_for=draw(st.sampled_from([(1, 0), (1, 1), (1, 4), (2, -1), (2, -1), (2, 0), (3, -1)])),
        chunk=draw(st.sampled_from([1, 2, 5, 12, 33])),
        num_ahead=draw(st.sampled_from([1, 1, 2, 3])),
        num_lookahead=0 if recalls else draw(st.sampled_from([0, 0, 3])),
        max_length=max_length,
        is_reserved=draw(st.booleans()),
        is_cached=draw(st.sampled_from([True, True, True, False])),
        is_eagle=not recalls and draw(st.sampled_from([False, False, True])),
        is_sparse=draw(st.booleans()),
    )


@dataclass(kw_only=True, eq=False)
class Life(Running):
    """A request from its admission to its end or preemption.

    Attributes:
        request: whose it is.
        num_known: tokens that the request had when it ended; None while it runs.
    """

    request: Request
    num_known: int | None = None


@dataclass(eq=False)
class Step:
    """A step that was scheduled and hasn't run.

    Attributes:
        life: whose it is.
        start: position of its first token; drafts that are rejected before it move it down.
        num_sure: its tokens that are no drafts.
        num_drafts: its last tokens, of which the model may reject some.
        samples: whether its output continues the request.
        tables: the request's blocks in every group, by id, when it was scheduled.
    """

    life: Life
    start: int
    num_sure: int
    num_drafts: int
    samples: bool
    tables: list[list[int]]

    @property
    def num_tokens(self) -> int:
        return self.num_sure + self.num_drafts


HAPPENED: Counter[str] = Counter()


class Interleavings(RuleBasedStateMachine):
    """Every rule is something that a scheduler does; steps run in the order they were scheduled."""

    @initialize(setup=setups())
    def start(self, setup: Setup) -> None:
        init_none_hash(sha256)
        self.setup = setup
        self.layers = [group.layers for group in setup.groups]
        self.all_ours = all(group.is_ours for group in setup.groups)
        requests, more = setup.room_for
        self.num_blocks = requests * sum(map(setup.bound, self.layers)) + more
        groups: list[Group | ArchiveGroup] = [*setup.groups]
        if setup.archive is not None:
            # All of its tokens are kept, and seen by rows that look.
            self.layers.append(Layers(setup.max_length, 1, setup.archive.block_size))
            groups.append(setup.archive)
        sizes = [layers.block_size for layers in self.layers]
        self.hash_size, self.hit_size = gcd(*sizes), lcm(*sizes)
        config = KVCacheConfig(
            1 + self.num_blocks,  # one is the null block
            kv_cache_tensors=[],
            kv_cache_groups=[
                KVCacheGroupSpec([f"layer {g}"], group.spec(setup.num_lookahead))
                for g, group in enumerate(groups)
            ],
            prefix_cache_retention_interval=0 if setup.is_sparse else None,
        )
        self.kv = KVCacheManager(
            config,
            max_model_len=setup.max_length,
            scheduler_block_size=self.hit_size,
            hash_block_size=self.hash_size,
            max_in_flight_tokens=setup.num_ahead * setup.chunk,
            enable_caching=setup.is_cached,
            use_eagle=setup.is_eagle,
        )
        self.pool = self.kv.block_pool
        self.pools = [each.block_pool for each in self.kv.coordinator.single_type_managers]
        self.hasher = get_request_block_hasher(self.hash_size, sha256)
        if setup.archive is not None:
            assert self.pools[-1] is not self.pool
            middle = Middle(1, distance=1, rows=setup.archive.rows)
            ours = next(each.layers for each in setup.groups if each.is_ours)
            self.first_with_a_middle = ours.n_global + ours.n_local
            pattern = LambdaPattern(ours.n_global, ours.n_local, ours.n_local)
            self.hasher = mark_rows_that_look(self.hasher, middle, pattern, self.hash_size)
        self.waiting: list[Request] = []
        self.running: list[Life] = []
        self.in_flight: deque[Step] = deque()
        self.memory: dict[tuple[bool, int, int], tuple[int, int]] = {}
        self.marks: dict[Request, list[int]] = {}
        self.last_token = 0
        self.conversations = [self.new_tokens(LONGEST_PROMPT) for _ in range(3)]
        HAPPENED["setups"] += 1

    # Requests come and go.

    @precondition(lambda self: len(self.waiting) < MOST_WAITING)
    @rule(which=which, cut=st.integers(0, LONGEST_PROMPT), num_own=st.integers(1, 40))
    def arrive(self, which: int, cut: int, num_own: int) -> None:
        """A request that continues a conversation from somewhere, possibly from its start."""
        shared = self.conversations[which % len(self.conversations)][: cut if which < 5 else None]
        tokens = (shared + self.new_tokens(num_own))[: self.setup.max_length - 1]
        request = Request(
            request_id=f"request {self.last_token}",
            prompt_token_ids=tokens,
            sampling_params=SamplingParams(max_tokens=10**9),
            pooling_params=None,
            block_hasher=self.hasher,
        )
        self.waiting.append(request)
        self.marks[request] = []

    @rule(which=which, num_tokens=st.integers(1, 33))
    def admit(self, which: int, num_tokens: int) -> None:
        """Looks the prefix cache up and takes the first step, where there is room."""
        if not self.waiting:
            self.arrive(which, 20 * which, 1 + 4 * which)
        request = self.waiting[which % len(self.waiting)]
        self.make_way(request)
        hit, num_hit, _ = self.kv.get_computed_blocks(request)
        self.check_hit(request, hit.blocks, num_hit)
        num_new = min(num_tokens, self.setup.chunk, request.num_tokens - num_hit)
        first, whole = self.num_to_take(request, num_hit + num_new, hit.blocks, num_hit)
        free = self.num_free()
        may_fit = self.fits(first) and (self.fits(whole) or not self.setup.is_reserved)
        slots = self.kv.allocate_slots(
            request,
            num_new,
            num_new_computed_tokens=num_hit,
            new_computed_blocks=hit,
            num_lookahead_tokens=self.setup.num_lookahead,
            full_sequence_must_fit=self.setup.is_reserved,
        )
        if slots is None:
            HAPPENED["refused"] += 1
            HAPPENED["refused by the archive"] += whole[1] > free[1]
            assert free != self.num_in_all(), "refused with all pools free"
            assert not may_fit or not self.all_ours, "refused although there is room"
            return
        left = tuple(map(sub, free, first))
        assert self.num_free() == left
        assert may_fit or not self.all_ours, "admitted although it may not fit"
        HAPPENED["admitted"] += 1
        HAPPENED["hit"] += num_hit > 0
        HAPPENED["hit of an archive"] += num_hit > 0 and self.setup.archive is not None
        request.num_computed_tokens = num_hit
        self.waiting.remove(request)
        life = Life(request=request, num_slots=num_hit, first_query=num_hit)
        self.running.append(life)
        self.scheduled(life, num_new, 0)

    @precondition(lambda self: self.running)
    @rule(which=which)
    def preempt(self, which: int) -> None:
        self.stop(self.running[which % len(self.running)], "preempted")

    @precondition(lambda self: self.running)
    @rule(which=which)
    def end(self, which: int) -> None:
        """Finished or aborted, with steps in flight or without."""
        life = self.running[which % len(self.running)]
        self.conversations[which % 3] = list(life.request.all_token_ids)
        self.stop(life, "ended")

    @rule()
    def end_all(self) -> None:
        for life in list(self.running):
            self.stop(life, "ended")
        assert self.num_free() == self.num_in_all()

    @precondition(lambda self: self.waiting)
    @rule(which=which)
    def abort_in_queue(self, which: int) -> None:
        self.kv.free(self.waiting.pop(which % len(self.waiting)))

    # Running requests advance; where none runs, one is admitted.

    @rule(which=which, num_tokens=st.integers(1, 33), num_steps=st.integers(1, 12))
    def chunk(self, which: int, num_tokens: int, num_steps: int) -> None:
        """Steps of a request, each of so many tokens of its prompt."""
        life = self.pick(which)
        for _ in range(num_steps):
            self.advance(life, num_tokens, 0)

    @rule(which=which, num_drafts=st.integers(0, 5), num_accepted=st.integers(0, 5))
    def decode(self, which: int, num_drafts: int, num_accepted: int) -> None:
        """The rest of a request's prompt, and a token with drafts that are judged at once."""
        life = self.pick(which)
        while life in self.running and life.request.num_computed_tokens < life.request.num_tokens:
            self.advance(life, self.setup.chunk, num_drafts)
        while any(step.life is life for step in self.in_flight):
            self.run_oldest(num_accepted)
        self.advance(life, self.setup.chunk, num_drafts)

    @rule(num_drafts=st.integers(0, 3))
    def batch(self, num_drafts: int) -> None:
        """All take a step."""
        self.pick(0)
        for life in list(self.running):
            self.advance(life, self.setup.chunk, num_drafts)

    @precondition(lambda self: self.in_flight)
    @rule(num_accepted=st.integers(0, 5), num_steps=st.integers(1, 6))
    def output(self, num_accepted: int, num_steps: int) -> None:
        """The oldest steps in flight run; of each one's drafts the first few are accepted."""
        for _ in range(min(num_steps, len(self.in_flight))):
            self.run_oldest(num_accepted)

    # The prefix cache loses what it holds.

    @precondition(lambda self: self.setup.is_cached)
    @rule(which=st.integers(0, 1000))
    def evict(self, which: int) -> None:
        """One block, in use or not; now and then all, which vLLM does where none is in use."""
        pool = self.pools[which % len(self.pools)]
        cached = [block for block in pool.blocks if block.block_hash is not None]
        if cached and which % 10:
            HAPPENED["evicted"] += 1
            pool.evict_blocks({cached[which % len(cached)].block_id})
        elif not which % 10:
            assert self.kv.reset_prefix_cache() == (not self.running)

    # What must hold, always.

    @invariant()
    def check(self) -> None:
        HAPPENED["checks"] += 1
        holders: dict[BlockPool, Counter[int]] = {pool: Counter() for pool in self.pools}
        for life in self.running:
            held: dict[BlockPool, list[int]] = {pool: [] for pool in self.pools}
            groups = zip(self.layers, self.pools, self.blocks_of(life.request), strict=True)
            for layers, pool, blocks in groups:
                assert [not block.is_null for block in blocks] == life.must_hold(layers)
                ids = [block.block_id for block in blocks if not block.is_null]
                assert len(ids) <= self.setup.bound(layers)
                held[pool] += ids
            for pool, ids in held.items():
                assert len(ids) == len(set(ids)), "a request holds a block twice"
                holders[pool].update(ids)
        assert not any(any(self.blocks_of(request)) for request in self.waiting)
        for pool, counts in holders.items():
            real = pool.blocks[1:]
            assert [block.ref_cnt for block in real] == [counts[block.block_id] for block in real]
            free = [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]
            assert len(free) == pool.get_num_free_blocks() == len(real) - len(counts)
            assert set(free).isdisjoint(counts)
            assert len(set(free)) == len(free)

    def num_free(self) -> tuple[int, int]:
        """Blocks of the device, and pages of the archive, if there is one."""
        pages = 0 if self.setup.archive is None else self.pools[-1].get_num_free_blocks()
        return self.pool.get_num_free_blocks(), pages

    def num_in_all(self) -> tuple[int, int]:
        archive = self.setup.archive
        return self.num_blocks, 0 if archive is None else archive.num_pages

    def fits(self, lacking: tuple[int, int]) -> bool:
        return all(map(le, lacking, self.num_free()))

    def check_hit(
        self, request: Request, hit: tuple[list[KVCacheBlock], ...], num_hit: int
    ) -> None:
        """The hit is the longest whose every needed block is cached, and has no other block.

        vLLM's own manager may ask for more than its window needs, and so give up sooner.
        """

        def is_cached(g: int, entry: int) -> bool:
            end = (entry + 1) * self.layers[g].block_size
            block_hash = request.block_hashes[end // self.hash_size - 1]
            return self.pools[g].get_cached_block(block_hash, [g]) is not None

        def can_hit(length: int) -> bool:
            return all(
                is_cached(g, entry)
                for g, layers in enumerate(self.layers)
                for entry in range(length // layers.block_size)
                if layers.needed(entry, length)
            )

        if not self.setup.is_cached:
            assert num_hit == 0
            return
        assert num_hit < request.num_tokens
        assert num_hit % self.hit_size == 0
        assert can_hit(num_hit)
        if self.all_ours and not self.setup.is_eagle:
            longer = range(num_hit + self.hit_size, request.num_tokens, self.hit_size)
            assert not any(map(can_hit, longer))
        is_ours = [*(group.is_ours for group in self.setup.groups), True]
        for layers, ours, blocks in zip(self.layers, is_ours, hit, strict=False):
            needed = [layers.needed(entry, num_hit) for entry in range(len(blocks))]
            assert len(blocks) * layers.block_size == num_hit
            assert [not block.is_null for block in blocks] == needed or not ours

    # The scheduler's part.

    def pick(self, which: int) -> Life:
        if not self.running:
            self.admit(which, self.setup.chunk)
        return self.running[which % len(self.running)]

    def advance(self, life: Life, num_tokens: int, num_drafts: int) -> None:
        """Schedules the next step of a request: known tokens, or where none is left the one that
        a step in flight will sample; behind the last of them drafts."""
        if life not in self.running:
            return
        request = life.request
        self.make_way(request)
        computed = request.num_computed_tokens
        room = self.setup.max_length - 1 - computed
        if room <= 0:
            self.stop(life, "ended")
            return
        left = max(request.num_tokens - computed, 1)
        num_sure = min(num_tokens, left, self.setup.chunk, room)
        if num_sure < left:
            num_drafts = 0
        num_drafts = min(num_drafts, self.setup.chunk - num_sure, room - num_sure)
        while not self.allocate(life, num_sure + num_drafts):
            victim = self.running[-1]
            self.stop(victim, "preempted")
            HAPPENED["no room"] += 1
            if victim is life:
                return
        self.scheduled(life, num_sure, num_drafts)

    def allocate(self, life: Life, num_new: int) -> bool:
        request = life.request
        computed = request.num_computed_tokens
        life.first_query = max(life.first_query, computed - request.num_in_flight_tokens)
        # What is freed counts as free: ask for it before, as `allocate_slots` does.
        self.kv.remove_skipped_blocks(request.request_id, life.first_query)
        self.check()
        lacking, _ = self.num_to_take(request, computed + num_new, self.blocks_of(request), 0)
        fits = self.fits(lacking)
        slots = self.kv.allocate_slots(
            request, num_new, num_lookahead_tokens=self.setup.num_lookahead
        )
        assert (slots is not None) == fits, (lacking, self.num_free())
        assert slots is not None or len(self.running) > 1, "no room with the pool for itself"
        return slots is not None

    def num_to_take(
        self, request: Request, end: int, blocks: tuple[list[KVCacheBlock], ...], num_hit: int
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """Blocks that leave the free ones, and pages: for the tokens up to ``end``, and for the
        whole request as far as it is known, in which no group exceeds its bound."""
        first, whole = [0, 0], [0, 0]
        end = min(end + self.setup.num_lookahead, self.setup.max_length)
        for layers, pool, entries in zip(self.layers, self.pools, blocks, strict=True):
            which = int(pool is not self.pool)
            kept = [b for e, b in enumerate(entries) if layers.needed(e, num_hit) and num_hit]
            idle = sum(block.ref_cnt == 0 for block in kept)
            first[which] += max(0, layers.num_blocks(end) - len(entries)) + idle
            lacking = layers.num_blocks(request.num_tokens) - len(entries)
            whole[which] += min(lacking, self.setup.bound(layers) - len(kept)) + idle
        return (first[0], first[1]), (whole[0], whole[1])

    def scheduled(self, life: Life, num_sure: int, num_drafts: int) -> None:
        request, start = life.request, life.request.num_computed_tokens
        end = start + num_sure + num_drafts
        life.num_slots = max(
            life.num_slots, min(end + self.setup.num_lookahead, self.setup.max_length)
        )
        tables = [[block.block_id for block in group] for group in self.blocks_of(request)]
        samples = start + num_sure >= request.num_tokens
        self.in_flight.append(Step(life, start, num_sure, num_drafts, samples, tables))
        request.num_computed_tokens = end
        request.num_in_flight_tokens += num_sure + num_drafts
        HAPPENED["steps"] += 1
        HAPPENED["drafts"] += num_drafts

    def make_way(self, request: Request) -> None:
        """Lets steps run until this request may have another one in flight."""
        ahead = [step for step in self.in_flight if step.life.request is request]
        for step in ahead[: max(0, len(ahead) + 1 - self.setup.num_ahead)]:
            while step in self.in_flight:
                self.run_oldest(num_accepted=1)

    def run_oldest(self, num_accepted: int) -> None:
        step = self.in_flight.popleft()
        life, request = step.life, step.life.request
        num_accepted = min(num_accepted, step.num_drafts)
        num_rejected = step.num_drafts - num_accepted
        request.num_in_flight_tokens -= step.num_tokens
        for later in self.in_flight:
            if later.life is life:
                later.start -= num_rejected
        if life.num_known is None:
            request.num_computed_tokens -= num_rejected
            HAPPENED["rejected"] += num_rejected
            if step.samples:
                request.append_output_token_ids(self.new_tokens(num_accepted + 1))
        num_true = request.num_tokens if life.num_known is None else life.num_known
        self.write_and_read(step, min(num_true, step.start + step.num_sure + num_accepted))

    def write_and_read(self, step: Step, true_end: int) -> None:
        """Writes a mark of the whole prefix for every token, as a key is one, and of which of its
        rows looked into the middle; drafts that are rejected and outputs that nobody waits for
        leave rubbish."""
        request, archive = step.life.request, self.setup.archive
        marks = self.marks[request]
        first_row = request.num_prompt_tokens
        if archive is not None:
            first_row = max(first_row - archive.rows, self.first_with_a_middle)
        for token in request.all_token_ids[len(marks) : true_end]:
            looks = archive is not None and len(marks) >= first_row
            marks.append(hash((marks[-1] if marks else 0, token, looks)))
        groups = zip(self.layers, self.pools, step.tables, strict=True)
        for g, (layers, pool, table) in enumerate(groups):
            size, of_archive = layers.block_size, pool is not self.pool
            for position in range(step.start, step.start + step.num_tokens):
                mark = marks[position] if position < true_end else 0
                assert table[position // size] != 0, "written to the null block"
                self.memory[of_archive, table[position // size], position % size] = (g, mark)
            if step.start < true_end:
                for seen in layers.visible(step.start, true_end - 1):
                    slot = self.memory.get((of_archive, table[seen // size], seen % size))
                    assert slot == (g, marks[seen]), f"position {seen} isn't what was written"

    def stop(self, life: Life, why: str) -> None:
        """Ends a life; its steps in flight still run, and nobody waits for their output.

        A scheduler with steps in flight may take the blocks first and free them later.
        """
        request = life.request
        life.num_known = request.num_tokens
        self.running.remove(life)
        if why == "preempted":
            self.kv.free(request)
            self.waiting.append(request)
        else:
            blocks = self.kv.pop_blocks_for_free(request)
            assert not self.all_ours or not any(block.is_null for block in blocks)
            self.pool.free_blocks(reversed(blocks))
        request.num_computed_tokens = 0
        HAPPENED[why] += 1

    def blocks_of(self, request: Request) -> tuple[list[KVCacheBlock], ...]:
        return tuple(map(list, self.kv.get_blocks(request.request_id).blocks))

    def new_tokens(self, count: int) -> list[int]:
        self.last_token += count
        return list(range(self.last_token - count, self.last_token))


def test_interleavings() -> None:
    HAPPENED.clear()
    run_state_machine_as_test(
        Interleavings,
        settings=settings(
            max_examples=ACTIONS // ACTIONS_PER_POOL,
            stateful_step_count=ACTIONS_PER_POOL,
            derandomize=ACTIONS == DEFAULT_ACTIONS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(dict(HAPPENED))
    of_an_archive = ("hit of an archive", "refused by the archive")
    of_all = ("hit", "refused", "no room", "preempted", "ended", "rejected", "evicted")
    for what in (*of_all, *of_an_archive):
        assert HAPPENED[what] > 0, f"nothing was ever {what}"
