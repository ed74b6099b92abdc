"""The oracle: attention under a pattern as its definition reads, on contiguous tensors.

It materialises every score, so it is for tests and for reading, in any dtype up to float64.
"""

import torch

from vllm_lminf.kernels.units import best_units
from vllm_lminf.middle import Middle
from vllm_lminf.pattern import Pattern
from vllm_lminf.rope import RotarySpec, rotate


def lambda_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: Pattern,
    *,
    scale: float,
    rotary: RotarySpec | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    query_start: int = 0,
    middle: Middle | None = None,
    prompt_len: int = 0,
) -> torch.Tensor:
    """Attention of each query to the intervals that it sees; under a Λ that is LM-Infinite's (arXiv
    2308.16137, section 3).

    A pair whose distance counts as ``d`` scores ``<R(d) q_i, k_j>``, where ``R(n)`` rotates by
    ``n`` positions. Where ``d`` is the pair's own, ``i - j``, that equals ``<R(i) q_i, R(j)
    k_j>``, which is how it is computed here.

    With ``middle``, queries from `Middle.first_row` on also attend to the best units of what the
    pattern hides of the past: its pairs count as ``middle.distance`` apart, and a unit is ranked by
    its largest product ``<R(middle.distance) q_i, k_j>``, before scale, softcap and bias. (Neither
    changes the order of the keys of a head; ALiBi's bias would change that of blocks which heads of
    different slopes have in common.)

    Args:
        query: not rotated; shape [num_queries, num_heads, head_size].
        key: not rotated; shape [num_keys, num_kv_heads, head_size]; row j is position j.
        value: shape [num_keys, num_kv_heads, head_size].
        pattern: what a query sees, and at which distances.
        scale: factor on every score.
        rotary: the model's RoPE, or None where it has none.
        alibi_slopes: ALiBi's slope for every head, shape [num_heads], or None.
        softcap: every score ``s`` becomes ``softcap * tanh(s / softcap)`` (Gemma 2), or None.
        sinks: for every head the score of one more key with a value of zero (gpt-oss), or None.
        query_start: position of the first query.
        middle: what is recalled from the middle, in a layer that recalls; None for nothing.
        prompt_len: tokens of the prompt, which decides who looks into the middle.

    Returns:
        Shape [num_queries, num_heads, head_size], in query's dtype.
    """
    group_size = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(group_size, dim=1)
    value = value.repeat_interleave(group_size, dim=1)
    i = torch.arange(query_start, query_start + query.shape[0])
    j = torch.arange(key.shape[0])
    difference = i[:, None] - j
    visible = torch.zeros_like(difference, dtype=torch.bool)
    distance = difference.clone()
    for row, position in enumerate(i.tolist()):
        for each in pattern.intervals(position):
            keys = slice(each.start, each.stop)
            visible[row, keys] = True
            distance[row, keys].clamp_(each.min_distance, each.max_distance)

    if rotary is None:
        scores = torch.einsum("ihd,jhd->hij", query, key)
    else:
        scores = torch.einsum("ihd,jhd->hij", _rotate(query, i, rotary), _rotate(key, j, rotary))
        moved = visible & (distance != difference)
        for d in distance[moved].unique().tolist():
            there = torch.einsum("ihd,jhd->hij", *_stationary(query, key, d, rotary))
            scores = torch.where(moved & (distance == d), there, scores)
    if middle is not None:
        looking = (i >= middle.first_row(prompt_len))[:, None] & (difference >= 0) & ~visible
        products = torch.einsum("ihd,jhd->hij", *_stationary(query, key, middle.distance, rotary))
        recalled = best_units(products, looking, middle, group_size)
        scores = torch.where(recalled, products, scores)
        distance = torch.where(recalled, middle.distance, distance)
        visible = visible | recalled
    scores = scores * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(scores.dtype)[:, None, None] * distance
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat((scores, column), dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[0]]
    return torch.einsum("hij,jhd->ihd", weights, value)


def _stationary(
    query: torch.Tensor, key: torch.Tensor, distance: int, rotary: RotarySpec | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys whose products are those at one distance, wherever they stand."""
    if rotary is None:
        return query, key
    rotated = _rotate(query, torch.tensor([distance]), rotary)
    return rotated, _rotate(key, torch.tensor([0]), rotary)


def _rotate(x: torch.Tensor, positions: torch.Tensor, rotary: RotarySpec) -> torch.Tensor:
    """``x`` as a model with this RoPE rotates it at ``positions``; the angles are float64."""
    angles = positions.to(torch.float64)[:, None] * rotary.inv_freq.to(torch.float64)
    cos = (angles.cos() * rotary.magnitude).to(x.dtype)
    sin = (angles.sin() * rotary.magnitude).to(x.dtype)
    return rotate(x, cos, sin, rotary.is_neox_style)
