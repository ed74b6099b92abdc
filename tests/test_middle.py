"""What is recalled from the middle, in integers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_lminf.middle import ALL_ROWS, Middle
from vllm_lminf.pattern import LambdaPattern


@given(st.integers(0, 20), st.integers(1, 20), st.integers(0, 60))
def test_the_middle_is_what_the_pattern_hides_of_the_past(
    n_global: int, n_local: int, i: int
) -> None:
    pattern = LambdaPattern(n_global, n_local, n_local)
    assert list(pattern.middle(i)) == [j for j in range(i) if not pattern.visible(i, j)]
    assert list(pattern.middle(i)) == [j for j in range(i) if n_global <= j <= i - n_local]


def test_the_first_middle_key_comes_when_one_leaves_the_window() -> None:
    pattern = LambdaPattern(n_global=3, n_local=4, distance_limit=4)
    assert [len(pattern.middle(i)) for i in range(9)] == [0, 0, 0, 0, 0, 0, 0, 1, 2]


@pytest.mark.parametrize(
    ("rows", "prompt_len", "first"),
    [(1, 5, 4), (2, 5, 3), (5, 5, 0), (6, 5, 0), (ALL_ROWS, 10**6, 0), (1, 1, 0), (3, 0, 0)],
)
def test_the_last_rows_of_the_prompt_look(rows: int, prompt_len: int, first: int) -> None:
    assert Middle(top_k=5, distance=4, rows=rows).first_row(prompt_len) == first


def test_layers_count_from_one() -> None:
    middle = Middle(top_k=5, distance=4, rows=1, from_layer=5)
    assert [layer for layer in range(1, 8) if middle.recalls(layer)] == [5, 6, 7]
    nothing = Middle(top_k=0, distance=4, rows=1)
    assert not any(nothing.recalls(layer) for layer in range(1, 8))


def test_all_that_is_impossible_is_named() -> None:
    with pytest.raises(ValueError, match=r"top_k is -1.*distance.*rows is 0.*from_layer.*block_si"):
        Middle(top_k=-1, distance=-1, rows=0, from_layer=0, block_size=0)
    with pytest.raises(ValueError, match=r"distance is 2147483648: it must be 0 or more"):
        Middle(top_k=1, distance=2**31, rows=1)
