"""Which blocks a request holds, on vLLM's own pool, allocator and prefix cache."""

import random
from itertools import chain

import pytest
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.request import Request

from tests.plugin.kv_cache.simulation import Simulation, make_spec
from vllm_lminf.plugin.kv_cache import LambdaManager

# n_global, n_local, block_size
SHAPES = [
    (0, 16, 16),
    (0, 2, 4),
    (3, 7, 4),
    (4, 8, 4),
    (5, 9, 4),
    (10, 48, 16),
    (17, 5, 16),
    (33, 20, 16),
    (2, 6, 1),
]
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "G{}-W{}-B{}".format(*s))


def tokens(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(1000), k=count)


class TestOneRequest:
    @by_shape
    @pytest.mark.parametrize("chunk", [1, 16, 37])
    @pytest.mark.parametrize("enable_caching", [True, False], ids=["cached", "uncached"])
    def test_prompt_longer_than_the_pool(
        self, shape: tuple[int, int, int], chunk: int, enable_caching: bool
    ) -> None:
        """In a pool of exactly the blocks that admission asks for."""
        spec = make_spec(*shape)
        cap = spec.max_admission_blocks_per_request(chunk, 10**6)
        simulation = Simulation(spec, cap, chunk, enable_caching=enable_caching)
        request = simulation.request(tokens(4 * cap * spec.block_size))
        assert simulation.run(request, chunk) == 0
        for _ in range(3 * spec.block_size):
            request.append_output_token_ids(7)
            assert simulation.step(request, 1)
            simulation.settle(request)
        simulation.free(request)
        assert simulation.num_free == cap

    def test_block_list_of_a_long_request(self) -> None:
        """One pinned block, a gap, and the window: 40 tokens, whose next query at 40 reaches back
        to 34, in block 8."""
        simulation = Simulation(make_spec(3, 7, 4), 20, 40)
        request = simulation.request(tokens(41))
        assert simulation.admit(request, 40) == 0
        simulation.settle(request)
        assert simulation.step(request, 1)
        assert simulation.entries_held(request) == [0, 8, 9, 10]

    def test_blocks_are_freed_at_the_exact_token(self) -> None:
        """Block 1 ends with position 7: the query at 13 is the last whose window reaches it."""
        simulation = Simulation(make_spec(3, 7, 4), 20, 20)
        request = simulation.request(tokens(13))
        simulation.run(request, 13)
        for _ in range(2):
            request.append_output_token_ids(1)
        assert simulation.step(request, 1)
        simulation.settle(request)
        assert 1 in simulation.entries_held(request)
        assert simulation.step(request, 1)
        assert 1 not in simulation.entries_held(request)

    def test_pinned_blocks_are_the_same_throughout(self) -> None:
        simulation = Simulation(make_spec(17, 20, 16), 30, 16)
        request = simulation.request(tokens(2000))
        assert simulation.admit(request, 16) == 0
        first = simulation.blocks(request)[0].block_id
        assert simulation.step(request, 16)
        simulation.settle(request)
        second = simulation.blocks(request)[1].block_id
        while request.num_computed_tokens < request.num_tokens:
            assert simulation.step(request, 16)
            simulation.settle(request)
            assert [b.block_id for b in simulation.blocks(request)[:2]] == [first, second]

    @by_shape
    def test_steps_in_flight_keep_what_they_read(self, shape: tuple[int, int, int]) -> None:
        """With steps that have not settled, nothing is freed that their queries see."""
        spec = make_spec(*shape)
        simulation = Simulation(spec, 200, 3 * 24)
        request = simulation.request(tokens(600))
        assert simulation.admit(request, 24) == 0
        while request.num_computed_tokens < request.num_tokens:
            # Two steps run ahead of the one that has arrived.
            request.num_in_flight_tokens = min(request.num_in_flight_tokens, 48)
            assert simulation.step(request, 24)
        simulation.settle(request)
        request.append_output_token_ids(7)
        assert simulation.step(request, 1)
        simulation.free(request)
        assert simulation.num_free == 200

    def test_extra_retained_tokens_delay_freeing(self) -> None:
        plain = Simulation(make_spec(3, 7, 4), 60, 16)
        retaining = Simulation(make_spec(3, 7, 4, extra_retained_tokens=4), 60, 16)
        held = []
        for simulation in (plain, retaining):
            request = simulation.request(tokens(200))
            simulation.run(request, 16)
            held.append(len(simulation.entries_held(request)))
        assert held[1] == held[0] + 1

    @by_shape
    def test_pool_is_whole_after_an_abort_at_any_point(self, shape: tuple[int, int, int]) -> None:
        spec = make_spec(*shape)
        simulation = Simulation(spec, 60, 16)
        for last in range(0, 12, 2):
            request = simulation.request(tokens(200, seed=last))
            assert simulation.admit(request, 16) == 0
            for _ in range(last):
                simulation.settle(request)
                assert simulation.step(request, 16)
            simulation.free(request)
            assert simulation.num_free == 60

    def test_freeing_a_request_that_was_never_admitted(self) -> None:
        simulation = Simulation(make_spec(3, 7, 4), 20, 16)
        simulation.free(simulation.request(tokens(50)))
        assert simulation.num_free == 20

    def test_freeing_returns_no_null_block(self) -> None:
        simulation = Simulation(make_spec(3, 7, 4), 20, 16)
        request = simulation.request(tokens(60))
        simulation.run(request, 16)
        held = [b for b in simulation.blocks(request) if not b.is_null]
        assert simulation.kv.pop_blocks_for_free(request) == held
        simulation.pool.free_blocks(reversed(held))
        assert simulation.num_free == 20


class TestAdmission:
    def test_the_cap_is_that_of_the_pattern(self) -> None:
        simulation = Simulation(make_spec(10, 48, 16), 100, 32)
        assert simulation.cap == simulation.pattern.max_blocks_held(16, 32, 10**6)

    @by_shape
    def test_prompt_larger_than_the_pool_is_admitted(self, shape: tuple[int, int, int]) -> None:
        spec = make_spec(*shape)
        cap = spec.max_admission_blocks_per_request(16, 10**6)
        simulation = Simulation(spec, cap, 16)
        assert simulation.admit(simulation.request(tokens(5 * cap * spec.block_size)), 16) == 0

    @by_shape
    def test_refused_when_the_cap_does_not_fit(self, shape: tuple[int, int, int]) -> None:
        """Even though its first chunk would."""
        spec = make_spec(*shape)
        cap = spec.max_admission_blocks_per_request(16, 10**6)
        simulation = Simulation(spec, cap - 1, 16)
        request = simulation.request(tokens(5 * cap * spec.block_size))
        assert simulation.admit(request, 1) is None
        assert simulation.num_free == cap - 1

    def test_short_prompt_needs_no_more_than_its_length(self) -> None:
        simulation = Simulation(make_spec(10, 48, 16), 2, 1000)
        assert simulation.admit(simulation.request(tokens(32)), 32) == 0
        assert simulation.num_free == 0

    def test_blocks_that_others_hold_are_not_free(self) -> None:
        simulation = Simulation(make_spec(10, 48, 16), 15, 16)
        first, second = (simulation.request(tokens(1000, seed)) for seed in (1, 2))
        simulation.run(first, 16)
        assert simulation.cap == 6
        assert len(simulation.entries_held(first)) == 5
        assert simulation.run(second, 16) == 0
        third = simulation.request(tokens(1000, seed=3))
        assert simulation.admit(third, 16) is None
        simulation.free(first)
        assert simulation.admit(third, 16) == 0

    def test_a_step_without_room_changes_nothing(self) -> None:
        simulation = Simulation(make_spec(4, 8, 4), 6, 4)
        first, second = (simulation.request(tokens(8, seed)) for seed in (1, 2))
        assert simulation.run(first, 8) == simulation.run(second, 8) == 0
        for request in (first, second):
            request.append_output_token_ids([5] * 4)
        assert simulation.step(first, 4)
        assert simulation.step(second, 4)
        second.append_output_token_ids(5)
        simulation.settle(first)
        simulation.settle(second)
        # The first one's next block is there only once it has freed one of its own.
        first.append_output_token_ids(5)
        assert not simulation.step(first, 1)
        simulation.free(second)
        assert simulation.step(first, 1)


class TestPrefixCache:
    """Block size 4, n_global 3 and n_local 7: one pinned block, and for a hit of 40 tokens, whose
    next query at 40 reaches back to 34, blocks 8 and 9."""

    @pytest.fixture
    def simulation(self) -> Simulation:
        return Simulation(make_spec(3, 7, 4), 60, 16)

    @pytest.fixture
    def first(self, simulation: Simulation) -> Request:
        """A request of 41 tokens that ran and ended; its ten full blocks are in the cache."""
        request = simulation.request(tokens(41))
        assert simulation.run(request, 8) == 0
        simulation.free(request)
        return request

    def test_full_repeat(self, simulation: Simulation, first: Request) -> None:
        again = simulation.request(tokens(41))
        assert simulation.admit(again, 8) == 40
        assert simulation.entries_held(again) == [0, 8, 9, 10]

    def test_last_token_is_always_computed(self, simulation: Simulation, first: Request) -> None:
        assert simulation.admit(simulation.request(tokens(40)), 8) == 36

    def test_hit_while_the_first_still_runs(self, simulation: Simulation) -> None:
        request = simulation.request(tokens(41))
        simulation.run(request, 8)
        again = simulation.request(tokens(41))
        assert simulation.admit(again, 8) == 40
        assert simulation.blocks(again)[9] is simulation.blocks(request)[9]
        simulation.free(request)
        simulation.free(again)
        assert simulation.num_free == 60

    def test_a_hit_may_be_longer_than_the_pool(self) -> None:
        simulation = Simulation(make_spec(3, 7, 4), 20, 8)
        request = simulation.request(tokens(1001))
        simulation.run(request, 8)
        simulation.free(request)
        assert simulation.run(simulation.request(tokens(1001)), 8) == 1000

    @pytest.mark.parametrize("shared", [0, 3, 4, 5, 18, 20, 39])
    def test_shared_prefix_only(self, simulation: Simulation, first: Request, shared: int) -> None:
        other = simulation.request(tokens(41)[:shared] + tokens(30, seed=1))
        assert simulation.run(other, 8) == shared // 4 * 4
        # And what it adds is found in turn.
        simulation.free(other)
        longer = simulation.request([*other.prompt_token_ids, 1, 2, 3, 4, 5])
        assert simulation.run(longer, 8) == other.num_tokens // 4 * 4

    def test_different_first_token(self, simulation: Simulation, first: Request) -> None:
        assert simulation.admit(simulation.request([9999, *tokens(41)[1:]]), 8) == 0

    def test_without_the_pinned_block_there_is_no_hit(
        self, simulation: Simulation, first: Request
    ) -> None:
        simulation.evict(first, 0)
        assert simulation.admit(simulation.request(tokens(41)), 8) == 0

    @pytest.mark.parametrize(("evicted", "hit"), [(0, 0), (1, 4), (2, 8)])
    def test_hit_ends_before_a_missing_pinned_block(self, evicted: int, hit: int) -> None:
        simulation = Simulation(make_spec(9, 7, 4), 60, 16)
        request = simulation.request(tokens(41))
        simulation.run(request, 8)
        simulation.free(request)
        simulation.evict(request, evicted)
        assert simulation.admit(simulation.request(tokens(41)), 8) == hit

    @pytest.mark.parametrize(
        ("evicted", "hit"),
        [
            ([9], 36),  # Block 9 is lost; a hit of 36 needs 7 and 8.
            ([8], 32),  # Every window with block 8 is lost; a hit of 32 needs 6 and 7.
            ([9, 7], 28),  # 36 needs 7: a hit of 28 needs 5 and 6.
            ([8, 6, 4, 2], 8),  # A hit of 8 needs 0 and 1.
            ([8, 6, 4, 2, 1], 4),
            ([9, 8, 7, 6, 5, 4, 3, 2, 1], 4),
        ],
        ids=str,
    )
    def test_hit_ends_before_a_missing_window_block(
        self, simulation: Simulation, first: Request, evicted: list[int], hit: int
    ) -> None:
        for entry in evicted:
            simulation.evict(first, entry)
        assert simulation.run(simulation.request(tokens(41)), 8) == hit

    def test_blocks_in_the_gap_are_not_needed(self, simulation: Simulation, first: Request) -> None:
        for entry in range(1, 8):
            simulation.evict(first, entry)
        assert simulation.run(simulation.request(tokens(41)), 8) == 40

    def test_a_hit_leaves_blocks_in_the_gap_free(
        self, simulation: Simulation, first: Request
    ) -> None:
        again = simulation.request(tokens(41))
        simulation.admit(again, 8)
        gap = [simulation.cached(first, entry) for entry in range(1, 8)]
        assert all(block is not None and block.ref_cnt == 0 for block in gap)

    def test_blocks_in_the_gap_are_left_out_of_any_list(
        self, simulation: Simulation, first: Request
    ) -> None:
        """Also of one that names every block of the sequence."""
        again = simulation.request(tokens(41))
        every = [simulation.cached(first, entry) for entry in range(10)]
        arguments = (again.request_id, 44, every, 40, 40, 44)
        # Blocks 0, 8 and 9 leave the free ones, and the tokens from 40 on get a new one.
        assert simulation.manager.get_num_blocks_to_allocate(*arguments) == 3 + 1
        simulation.manager.add_local_computed_blocks(again.request_id, every, 40, 0)
        assert simulation.entries_held(again) == [0, 8, 9]
        assert simulation.num_free == 60 - 3

    def test_without_a_prefix_only_the_window_is_needed(self) -> None:
        simulation = Simulation(make_spec(0, 7, 4), 60, 16)
        request = simulation.request(tokens(41))
        simulation.run(request, 8)
        simulation.free(request)
        for entry in range(8):
            simulation.evict(request, entry)
        assert simulation.run(simulation.request(tokens(41)), 8) == 40

    def test_a_window_of_one_token_needs_nothing_from_the_cache(self) -> None:
        """A token that sees itself alone can be computed without any that came before it."""
        simulation = Simulation(make_spec(0, 1, 4), 10, 8)
        assert simulation.run(simulation.request(tokens(41)), 8) == 40
        assert simulation.num_free == 9

    def test_blocks_are_found_again_after_preemption(self, simulation: Simulation) -> None:
        request = simulation.request(tokens(200))
        assert simulation.admit(request, 16) == 0
        for _ in range(5):
            simulation.settle(request)
            assert simulation.step(request, 16)
        simulation.free(request)
        assert simulation.run(request, 16) == 96

    def test_evictable_hits_count_against_the_pool(self) -> None:
        """A hit on idle blocks takes them out of the free ones: a pool that is full but for them
        has no room for the rest of the request."""
        simulation = Simulation(make_spec(3, 7, 4), 8, 4)
        request = simulation.request(tokens(9))
        simulation.run(request, 4)
        simulation.free(request)
        other = simulation.request(tokens(16, seed=1))
        simulation.run(other, 4)
        assert simulation.num_free == 4
        again = simulation.request(tokens(30))
        # The hit takes two of the four, and admission asks for the cap of five.
        assert simulation.cap == 5
        assert simulation.admit(again, 4) is None

    def test_no_lookup_when_caching_is_off(self) -> None:
        simulation = Simulation(make_spec(3, 7, 4), 60, 16, enable_caching=False)
        for _ in range(2):
            request = simulation.request(tokens(41))
            assert simulation.run(request, 8) == 0
            simulation.free(request)

    @pytest.mark.parametrize(("evicted", "hit"), [(None, 36), (9, 32), (8, 28), (3, 36), (0, 0)])
    def test_with_eagle_the_last_block_is_computed_again(
        self, evicted: int | None, hit: int
    ) -> None:
        simulation = Simulation(make_spec(3, 7, 4), 60, 16, use_eagle=True)
        request = simulation.request(tokens(41))
        simulation.run(request, 8)
        simulation.free(request)
        if evicted is not None:
            simulation.evict(request, evicted)
        assert simulation.admit(simulation.request(tokens(41)), 8) == hit

    @pytest.mark.parametrize(
        ("max_length", "alignment", "hit"), [(40, 4, 40), (39, 4, 36), (40, 16, 32), (15, 16, 0)]
    )
    def test_lookup_respects_length_and_alignment(
        self, simulation: Simulation, first: Request, max_length: int, alignment: int, hit: int
    ) -> None:
        (blocks,), length = self.lookup(simulation, first, max_length, alignment)
        assert length == hit
        kept = {*chain(*simulation.pattern.kept_blocks(hit, 4, hit // 4))}
        assert [b.is_null for b in blocks] == [entry not in kept for entry in range(hit // 4)]

    def test_lookup_of_the_documented_example(self) -> None:
        simulation = Simulation(make_spec(2, 6, 4), 60, 16)
        request = simulation.request(tokens(17))
        simulation.run(request, 16)
        (blocks,), length = self.lookup(simulation, request, 16, 4)
        assert length == 16
        assert [b.is_null for b in blocks] == [False, True, False, False]

    def test_lookup_refuses_other_kinds_of_cache(
        self, simulation: Simulation, first: Request
    ) -> None:
        spec = simulation.spec
        other = FullAttentionSpec(
            block_size=4, num_kv_heads=1, head_size=8, dtype=spec.dtype, sliding_window=None
        )
        with pytest.raises(TypeError, match="LambdaSpec"):
            LambdaManager.find_longest_cache_hit(
                first.block_hashes, 40, [0], simulation.pool, other, False, 4
            )

    @staticmethod
    def lookup(
        simulation: Simulation, request: Request, max_length: int, alignment: int
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        return LambdaManager.find_longest_cache_hit(
            request.block_hashes,
            max_length,
            [0],
            simulation.pool,
            simulation.spec,
            drop_eagle_block=False,
            alignment_tokens=alignment,
        )
