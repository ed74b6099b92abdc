"""What every kernel is made from."""

from collections.abc import Hashable

import torch

from tests.kernels.layers import make_layer
from vllm_lminf.kernels.base import Heads
from vllm_lminf.middle import Middle
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.rope import RotarySpec


def signature(n_global: int, half: int, is_neox: bool, recalls: bool) -> Hashable:
    """Of a layer whose rotation has so many pairs."""
    return make_layer(
        Heads(4, 2, 64, torch.float16),
        LambdaPattern(n_global, 20, 20),
        rotary=RotarySpec(torch.ones(half), is_neox),
        middle=Middle(5, 11, 1) if recalls else None,
    ).signature


def test_layers_with_a_middle_are_told_apart_by_their_rotation() -> None:
    """Even without global tokens, where nothing else is rotated."""
    assert signature(0, 16, True, recalls=False) == signature(0, 32, False, recalls=False)
    assert signature(0, 16, True, recalls=True) != signature(0, 32, True, recalls=True)
    assert signature(0, 16, True, recalls=True) != signature(0, 16, False, recalls=True)
    assert signature(0, 16, True, recalls=True) != signature(0, 16, True, recalls=False)
    assert signature(5, 16, True, recalls=True) != signature(5, 32, True, recalls=True)
    assert signature(5, 16, True, recalls=False) != signature(5, 32, True, recalls=False)
