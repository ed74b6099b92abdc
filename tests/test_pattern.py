"""The Λ in integers, against a count of what every query sees."""

from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_lminf.pattern import Interval, LambdaPattern, Pattern, cdiv, num_seen

# n_global, n_local, distance_limit, block_size
SHAPES = [
    (0, 1, 1, 1),
    (0, 4, 4, 4),
    (3, 4, 4, 2),
    (4, 8, 8, 4),
    (5, 7, 9, 4),
    (10, 48, 48, 16),
    (17, 5, 6, 16),
    (33, 20, 37, 16),
]

patterns = st.builds(
    lambda n_global, n_local, beyond: LambdaPattern(n_global, n_local, n_local + beyond),
    st.integers(0, 20),
    st.integers(1, 20),
    st.integers(0, 5),
)


@pytest.mark.parametrize(
    ("a", "b", "quotient"), [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2), (10**15 + 1, 10**15, 2)]
)
def test_cdiv_rounds_up(a: int, b: int, quotient: int) -> None:
    assert cdiv(a, b) == quotient


def test_window_counts_the_query_itself() -> None:
    pattern = LambdaPattern(n_global=0, n_local=4, distance_limit=4)
    assert [j for j in range(20) if pattern.visible(9, j)] == [6, 7, 8, 9]


def test_global_tokens_are_seen_from_anywhere_but_before_them() -> None:
    pattern = LambdaPattern(n_global=3, n_local=2, distance_limit=2)
    assert [j for j in range(20) if pattern.visible(10**9, j)] == [0, 1, 2]
    assert [j for j in range(20) if pattern.visible(1, j)] == [0, 1]


def test_no_query_sees_the_future() -> None:
    pattern = LambdaPattern(n_global=100, n_local=100, distance_limit=100)
    assert not any(pattern.visible(i, j) for i in range(20) for j in range(i + 1, 40))


def test_everything_is_seen_near_the_start() -> None:
    pattern = LambdaPattern(n_global=0, n_local=8, distance_limit=8)
    assert all(pattern.visible(i, j) for i in range(8) for j in range(i + 1))
    assert not pattern.visible(8, 0)


def seen(pattern: LambdaPattern, i: int) -> set[int]:
    return {j for interval in pattern.intervals(i) for j in interval.positions}


@given(patterns, patterns)
def test_union_shows_what_either_shows_and_is_the_smallest(
    first: LambdaPattern, second: LambdaPattern
) -> None:
    union = first.union(second)
    for i in range(60):
        assert seen(union, i) >= seen(first, i) | seen(second, i)
    for name in ("n_global", "n_local", "distance_limit"):
        assert getattr(union, name) in (getattr(first, name), getattr(second, name))


@given(pattern=patterns, i=st.integers(0, 60))
def test_intervals_are_what_the_definition_says(pattern: LambdaPattern, i: int) -> None:
    n_global, n_local = pattern.n_global, pattern.n_local
    visible = [j for j in range(i + 1) if j < n_global or i - j < n_local]
    distances = [min(i - j, pattern.distance_limit) for j in visible]
    intervals = pattern.intervals(i)
    assert [j for interval in intervals for j in interval.positions] == visible
    assert [d.distance(i, j) for d in intervals for j in d.positions] == distances
    assert [j for j in range(i + 5) if pattern.visible(i, j)] == visible
    assert [pattern.distance(i, j) for j in visible] == distances
    assert pattern.kept(i) == intervals


def test_an_interval_counts_distances_as_it_says() -> None:
    positions = range(4, 8)
    for interval, expected in (
        (Interval(4, 8), [6, 5, 4, 3]),
        (Interval(4, 8, max_distance=4), [4, 4, 4, 3]),
        (Interval(4, 8, min_distance=5), [6, 5, 5, 5]),
        (Interval(4, 8, min_distance=9, max_distance=9), [9, 9, 9, 9]),
    ):
        assert interval.positions == positions
        assert [interval.distance(10, j) for j in positions] == expected


@given(patterns, patterns, st.integers(0, 60))
def test_what_some_pattern_shows_is_counted_once(
    first: LambdaPattern, second: LambdaPattern, computed: int
) -> None:
    seen = [j for j in range(computed) if any(p.visible(computed, j) for p in (first, second))]
    assert num_seen([first, second], computed) == len(seen)
    assert num_seen([], computed) == 0


def test_distance_is_true_up_to_the_limit_and_the_limit_beyond() -> None:
    pattern = LambdaPattern(n_global=2, n_local=4, distance_limit=6)
    assert [pattern.distance(i, 0) for i in (0, 3, 5, 6, 7, 10**9)] == [0, 3, 5, 6, 6, 6]


@pytest.mark.parametrize(
    ("n_global", "n_local", "distance_limit", "named"),
    [
        (-1, 4, 4, "n_global"),
        (0, 0, 4, "n_local"),
        (0, -3, 4, "n_local"),
        (2, 4, 3, "below"),
        (2**31, 4, 4, "n_global"),
        (2, 4, 2**31, "distance_limit"),
        (2, 10**400, 10**400, "n_local is beyond 2147483647"),
    ],
)
def test_impossible_patterns_are_refused(
    n_global: int, n_local: int, distance_limit: int, named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        LambdaPattern(n_global, n_local, distance_limit)


def test_smallest_patterns_are_allowed() -> None:
    pattern = LambdaPattern(n_global=0, n_local=1, distance_limit=1)
    assert [j for j in range(10) if pattern.visible(7, j)] == [7]


@given(pattern=patterns, i=st.integers(0, 60))
def test_window_start_is_the_first_position_of_the_window(pattern: LambdaPattern, i: int) -> None:
    window = [j for j in range(i + 1) if i - j < pattern.n_local]
    assert pattern.window_start(i) == window[0]


@pytest.mark.parametrize(
    ("n_global", "block_size", "pinned"),
    [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2), (10, 16, 1), (100, 16, 7), (3, 1, 3)],
)
def test_pinned_blocks_are_those_with_a_global_token(
    n_global: int, block_size: int, pinned: int
) -> None:
    assert LambdaPattern(n_global, 4, 4).num_pinned_blocks(block_size) == pinned


def test_freed_blocks_of_the_documented_example() -> None:
    """The next query is at 11 and its window starts at 8."""
    pattern = LambdaPattern(3, 4, 4)
    assert pattern.freed_blocks(11, block_size=2) == (range(2, 4),)
    assert pattern.kept_blocks(11, 2, num_blocks=6) == [range(2), range(4, 6)]


@given(
    pattern=patterns,
    block_size=st.integers(1, 9),
    num_computed=st.integers(0, 90),
    retained=st.integers(0, 7),
)
def test_closed_forms_are_what_the_intervals_say(
    pattern: LambdaPattern, block_size: int, num_computed: int, retained: int
) -> None:
    derived = Pattern.freed_blocks(pattern, num_computed, block_size, retained)
    assert pattern.freed_blocks(num_computed, block_size, retained) == derived


@given(pattern=patterns, block_size=st.integers(1, 9), in_flight=st.integers(1, 30))
def test_the_bound_is_pinned_blocks_and_a_moving_part(
    pattern: LambdaPattern, block_size: int, in_flight: int
) -> None:
    """The number that pools were sized by before it was derived from intervals."""
    for longest in range(1, 120):
        pinned = cdiv(pattern.n_global, block_size)
        moving = cdiv(pattern.n_local - 1 + 3 + in_flight, block_size) + 1
        bound = pattern.max_blocks_held(block_size, in_flight, longest, extra_retained_tokens=3)
        assert bound == min(pinned + moving, cdiv(longest, block_size))


@given(pattern=patterns, block_size=st.integers(1, 9), num_computed=st.integers(0, 90))
def test_kept_and_freed_blocks_are_all_blocks(
    pattern: LambdaPattern, block_size: int, num_computed: int
) -> None:
    freed = {*chain(*pattern.freed_blocks(num_computed, block_size))}
    for num_blocks in range(30):
        kept = [*chain(*pattern.kept_blocks(num_computed, block_size, num_blocks))]
        assert kept == [block for block in range(num_blocks) if block not in freed]


@given(
    pattern=patterns,
    block_size=st.integers(1, 9),
    num_computed=st.integers(0, 90),
    retained=st.integers(0, 7),
)
def test_a_block_is_freed_exactly_when_no_later_query_sees_it(
    pattern: LambdaPattern, block_size: int, num_computed: int, retained: int
) -> None:
    # Queries that step back by `retained` are the ones the extra tokens are kept for.
    first_query = max(0, num_computed - retained)
    last_query = num_computed + 2 * block_size
    unseen = {
        block
        for block in range(cdiv(num_computed, block_size) + 1)
        if not any(
            pattern.visible(i, j)
            for i in range(first_query, last_query)
            for j in range(block * block_size, (block + 1) * block_size)
        )
    }
    freed = pattern.freed_blocks(num_computed, block_size, retained)
    assert [*chain(*freed)] == sorted(unseen)
    assert all(gap.step == 1 and gap for gap in freed)


@given(pattern=patterns, block_size=st.integers(1, 9), num_computed=st.integers(0, 90))
def test_freed_blocks_only_grow(pattern: LambdaPattern, block_size: int, num_computed: int) -> None:
    now = {*chain(*pattern.freed_blocks(num_computed, block_size))}
    later = {*chain(*pattern.freed_blocks(num_computed + 1, block_size))}
    assert now <= later


def held(pattern: LambdaPattern, block_size: int, num_computed: int, end: int) -> int:
    """Blocks of a request with num_computed settled tokens and slots up to ``end``."""
    return sum(map(len, pattern.kept_blocks(num_computed, block_size, cdiv(end, block_size))))


@pytest.mark.parametrize("in_flight", [1, 7, 16, 40])
@pytest.mark.parametrize(("n_global", "n_local", "limit", "block_size"), SHAPES)
def test_bound_on_held_blocks_holds_and_is_at_most_one_block_wide(
    n_global: int, n_local: int, limit: int, block_size: int, in_flight: int
) -> None:
    pattern = LambdaPattern(n_global, n_local, limit)
    longest = 600
    most = max(
        held(pattern, block_size, num_computed, min(num_computed + in_flight, longest))
        for num_computed in range(longest)
    )
    bound = pattern.max_blocks_held(block_size, in_flight, longest)
    assert most <= bound <= most + 1


@given(
    pattern=patterns,
    block_size=st.integers(1, 9),
    in_flight=st.integers(1, 30),
    longest=st.integers(1, 120),
)
@settings(deadline=None)
def test_bound_holds_for_any_length(
    pattern: LambdaPattern, block_size: int, in_flight: int, longest: int
) -> None:
    bound = pattern.max_blocks_held(block_size, in_flight, longest)
    assert bound <= cdiv(longest, block_size)
    for num_computed in range(longest):
        end = min(num_computed + in_flight, longest)
        assert held(pattern, block_size, num_computed, end) <= bound


def test_bound_does_not_depend_on_length() -> None:
    pattern = LambdaPattern(10, 4096, 4096)
    bounds = {pattern.max_blocks_held(16, 2048, length) for length in (10**5, 10**6, 2**31 - 1)}
    # One pinned block, the 4095 tokens behind a step of 2048, and one for alignment.
    assert bounds == {1 + 384 + 1}


def test_bound_counts_retained_tokens() -> None:
    pattern = LambdaPattern(0, 17, 17)
    without = pattern.max_blocks_held(8, 8, 10**6)
    assert pattern.max_blocks_held(8, 8, 10**6, extra_retained_tokens=8) == without + 1
