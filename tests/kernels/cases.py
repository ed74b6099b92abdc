"""Batches that every kernel is tested with, and how near a result must be. Needs torch alone."""

import torch

from tests.kernels.batches import Case

CASES = [
    # Kinds of batches.
    Case("decode", tuple((n, 1) for n in (0, 9, 10, 47, 48, 49, 57, 58, 300))),
    Case("prefill", ((0, 1), (0, 17), (0, 48), (0, 49), (0, 200))),
    Case("chunked", ((32, 16), (33, 100), (200, 64), (5, 7))),
    Case("mixed", ((120, 1), (0, 70), (64, 33), (0, 1), (300, 1), (250, 65))),
    # Heads and head sizes.
    Case("mixed", ((120, 1), (60, 33)), heads=(9, 3)),
    Case("mixed", ((120, 1), (60, 33)), heads=(4, 4), head_size=80),
    Case("mixed", ((120, 1), (60, 33)), heads=(8, 1), head_size=96),
    Case("mixed", ((120, 1), (60, 33)), heads=(4, 2), head_size=128),
    Case("mixed", ((120, 1), (60, 33)), heads=(2, 1), head_size=256),
    Case("mixed", ((120, 1), (60, 33)), heads=(1, 1)),
    # Blocks, from some that hold less than the prefix to some that hold more than the window.
    Case("mixed", ((150, 1), (90, 40), (0, 33)), block_size=1, head_size=64),
    Case("mixed", ((150, 1), (90, 40), (0, 33)), block_size=7),
    Case("mixed", ((150, 1), (90, 40), (0, 33)), block_size=32, pattern=(40, 48, 48)),
    Case("mixed", ((350, 1), (290, 40), (0, 33)), block_size=64, pattern=(10, 100, 120)),
    Case("mixed", ((700, 1), (490, 40), (0, 33)), block_size=128, pattern=(100, 200, 200)),
    Case("mixed", ((900, 1), (690, 40), (0, 33)), block_size=256, pattern=(300, 257, 300)),
    # Prefixes: none, one token, whole blocks, more than a block, more than the window.
    Case("mixed", ((150, 1), (90, 40), (0, 100)), pattern=(0, 48, 48)),
    Case("mixed", ((150, 1), (90, 40), (0, 100)), pattern=(1, 48, 48)),
    Case("mixed", ((150, 1), (90, 40), (0, 100)), pattern=(16, 48, 48)),
    Case("mixed", ((150, 1), (90, 40), (0, 100)), pattern=(33, 48, 48)),
    Case("mixed", ((150, 1), (90, 40), (0, 100)), pattern=(60, 20, 20)),
    Case("mixed", ((150, 1), (90, 40), (0, 100)), pattern=(500, 20, 20)),
    # Windows: one token, unaligned, as long as the longest sequence, longer.
    Case("mixed", ((150, 1), (90, 40), (0, 100)), pattern=(10, 1, 1)),
    Case("mixed", ((150, 1), (90, 40), (0, 100)), pattern=(10, 37, 37)),
    Case("mixed", ((150, 1), (90, 61), (0, 151)), pattern=(10, 151, 151)),
    Case("mixed", ((150, 1), (90, 40), (0, 100)), pattern=(10, 400, 400)),
    # Limits beyond the window: some far pairs at their true distance, some at the limit.
    Case("mixed", ((150, 1), (90, 40), (0, 100)), pattern=(10, 37, 38)),
    Case("mixed", ((150, 1), (90, 40), (0, 140)), pattern=(20, 37, 90)),
    Case("mixed", ((150, 1), (90, 40), (0, 140)), pattern=(20, 37, 1000)),
    # Rotations: partial, in pairs of neighbours, with a magnitude, none at all.
    Case("mixed", ((150, 1), (90, 40)), head_size=80, rotary_dim=32),
    Case("mixed", ((150, 1), (90, 40)), head_size=96, rotary_dim=24, is_neox_style=False),
    Case("mixed", ((150, 1), (90, 40)), head_size=256, rotary_dim=64, is_neox_style=False),
    Case("mixed", ((150, 1), (90, 40)), is_neox_style=False),
    Case("mixed", ((150, 1), (90, 40)), rotary_dim=16, magnitude=1.3),
    Case("mixed", ((150, 1), (90, 40)), rotary_dim=0),
    # A window so long that tiles have their full size.
    Case("chunked", ((1700, 1100),), heads=(2, 1), block_size=128, pattern=(10, 2048, 2048)),
]

FAR_CASES = [
    Case("decode", ((999_999, 1), (1_000_000, 1), (1_000_047, 1)), heads=(2, 1)),
    Case("chunked", ((1_000_000, 20), (2**20 - 5, 10)), heads=(2, 1), block_size=128),
    Case("mixed", ((1_500_000, 1), (20, 40), (10**6, 9)), heads=(2, 1), pattern=(20, 30, 33)),
    Case("decode", ((1_000_000, 1),), heads=(2, 1), rotary_dim=32, is_neox_style=False),
]

VERY_FAR_CASES = [
    Case("decode", ((10**8, 1),), heads=(2, 1), block_size=256),
    Case("chunked", ((10**8 + 200, 70),), heads=(2, 1), block_size=256),
    Case("decode", ((2**31 - 2, 1),), heads=(2, 1), block_size=256),
    Case("chunked", ((2**31 - 80, 79),), heads=(2, 1), block_size=256, pattern=(20, 30, 33)),
]


def assert_close(output: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert output.shape == expected.shape
    assert output.isfinite().all(), "not finite: was a slot read that no query sees?"
    error = (output.double() - expected.double()).abs().max().item()
    assert error <= tolerance, f"off by {error:.3g}, {tolerance:.3g} allowed"
