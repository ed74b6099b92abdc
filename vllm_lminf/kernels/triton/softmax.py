"""Scores, and the softmax that goes over them tile by tile, in powers of two."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# A maximum of no scores. Finite, so that differences from it are numbers.
NOTHING = tl.constexpr(-1e30)


@triton.jit
def score(products, distances, slopes, scale, SOFTCAP: tl.constexpr):
    """Scores from products of queries and keys, and the factor that is left to apply to them.

    Without bias and cap nothing is done here: the factor ``scale * log2(e)`` is then applied in
    the same instruction that subtracts the maximum.

    Args:
        products: float32 [rows, keys].
        distances: int32 [rows, keys], used for ALiBi only: no more than the limit.
        slopes: float32 [rows], ALiBi's, or None.
        scale: what a product is multiplied with.
    """
    if SOFTCAP is not None:
        # tanh(x) = 1 - 2 / (exp(2x) + 1), which neither overflows nor cancels at its ends.
        doubled = tl.exp2(products * (scale * (2 * LOG2_E / SOFTCAP)))
        products = (SOFTCAP * LOG2_E) * (1 - 2 / (doubled + 1))
        unit = 1.0
    elif slopes is not None:
        products = products * (scale * LOG2_E)
        unit = 1.0
    else:
        unit = scale * LOG2_E
    if slopes is not None:
        products -= (slopes * LOG2_E)[:, None] * distances.to(tl.float32)
    return products, unit


@triton.jit
def update(weighted, total, largest, scores, unit, value):
    """One step of a softmax whose keys arrive tile by tile.

    Args:
        weighted: float32 [rows, dims]: values so far, times ``2 ** (score - largest)``.
        total: float32 [rows]: the sum of these powers.
        largest: float32 [rows]: the largest score so far.
        scores: float32 [rows, keys]; minus infinity for a key that a row doesn't see.
        unit: positive; what scores are to be multiplied with.
        value: [keys, dims], finite everywhere.
    """
    new_largest = tl.maximum(largest, tl.max(scores, axis=1) * unit)
    powers = tl.exp2(scores * unit - new_largest[:, None])
    shrink = tl.exp2(largest - new_largest)
    total = total * shrink + tl.sum(powers, axis=1)
    weighted = weighted * shrink[:, None]
    weighted = tl.dot(powers.to(value.dtype), value, weighted, input_precision="ieee")
    return weighted, total, new_largest


@triton.jit
def begin(sinks, heads, is_first):
    """The largest score and the sum of powers before the first key arrives.

    Args:
        sinks: the score of one more key, whose value is zero, for every head; or None.
        heads: int32 [rows].
        is_first: whether the sink is this program's to count.
    """
    largest = tl.full(heads.shape, NOTHING, tl.float32)
    total = tl.zeros(heads.shape, tl.float32)
    if sinks is not None:
        sink = tl.maximum(tl.load(sinks + heads).to(tl.float32) * LOG2_E, NOTHING)
        largest = tl.where(is_first, sink, largest)
        total = tl.where(is_first, 1.0, total)
    return largest, total
