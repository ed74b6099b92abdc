"""Batches for the Triton kernels, on whatever device they run, and what they must get."""

import dataclasses

import pytest
import torch

from tests.kernels.batches import Batch, Case
from tests.kernels.cases import CASES, FAR_CASES, VERY_FAR_CASES
from vllm_lminf.kernels.base import ScoreRules
from vllm_lminf.pattern import cdiv

SERVED = [dataclasses.replace(case, block_size=16 * cdiv(case.block_size, 16)) for case in CASES]
"""Blocks of any number of tokens become multiples of 16."""

OTHERS = [
    # A block of no power of two; heads of no power of two with their rotation; a group of 71.
    Case("mixed", ((150, 1), (90, 40), (0, 33)), block_size=48),
    Case("mixed", ((150, 1), (90, 40)), heads=(2, 1), head_size=112, rotary_dim=56),
    Case("mixed", ((150, 1), (90, 9)), heads=(71, 1)),
    # Keys of a decode step split among programs, with and without a global branch; a step of
    # several tokens; windows shorter than the splits.
    Case("decode", ((700, 1), (747, 1), (200, 1), (3, 1)), pattern=(10, 300, 300)),
    Case("decode", ((500, 3), (499, 1), (1, 2)), block_size=128, pattern=(33, 250, 300)),
    Case("decode", ((900, 1),), heads=(8, 1), pattern=(0, 500, 500), block_size=32),
    Case("mixed", ((600, 1), (300, 40), (650, 2)), heads=(7, 1), pattern=(20, 257, 257)),
    # A prefix of several tiles.
    Case("mixed", ((700, 1), (490, 40)), pattern=(200, 30, 33), heads=(2, 1)),
]

FAR = [
    dataclasses.replace(case, block_size=16 * cdiv(case.block_size, 16))
    for case in [*FAR_CASES, *VERY_FAR_CASES]
]

PATTERNS = [(10, 48, 48), (20, 37, 90), (0, 300, 300)]
RULES = ["alibi", "softcap", "sinks", "softcap+sinks", "alibi+softcap+sinks"]

by_id = pytest.mark.parametrize("case", SERVED + OTHERS, ids=lambda case: case.id)
far_by_id = pytest.mark.parametrize("case", FAR, ids=lambda case: case.id)


def rules_of(names: str, batch: Batch, device: torch.device | str = "cpu") -> ScoreRules:
    """Rules of the named kinds for a batch of six heads."""
    rules = ScoreRules(batch.scale)
    if "alibi" in names:
        rules.alibi_slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.03, 0.01], device=device)
    if "softcap" in names:
        rules.softcap = 1.5
    if "sinks" in names:
        rules.sinks = torch.tensor([2.0, -30.0, 0.0, 5.0, -torch.inf, 40.0], device=device)
    return rules


def rules_case(names: str, pattern: tuple[int, int, int]) -> Case:
    """A batch for such rules: ALiBi takes the place of RoPE."""
    requests = ((0, 30), (64, 40), (399, 1), (250, 3))
    rotary_dim = 0 if "alibi" in names else None
    return Case(names, requests, pattern=pattern, rotary_dim=rotary_dim)


def exact_and_tolerance(
    batch: Batch, dtype: torch.dtype, rules: ScoreRules | None = None
) -> tuple[torch.Tensor, float]:
    """The result in float64, and three times what the oracle itself loses in this dtype: the
    kernels round once more where they merge branches and splits."""
    exact = batch.run_oracle(rules=rules)
    loss = (batch.run_oracle(dtype, rules).double() - exact).abs().max().item()
    return exact, 3 * loss
