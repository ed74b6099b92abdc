"""Which units of the middle are the best, where every key of it has been scored."""

import torch
import torch.nn.functional as F

from vllm_lminf.middle import Middle


def best_units(
    products: torch.Tensor,
    looking: torch.Tensor,
    middle: Middle,
    group_size: int,
    first_key: int = 0,
) -> torch.Tensor:
    """Which keys of the middle are recalled.

    Args:
        products: what keys are ranked by; [num_heads, num_queries, num_keys].
        looking: who looks at which key; bool [num_queries, num_keys].
        middle: what a unit is, and how many are recalled.
        group_size: query heads that share a key head.
        first_key: position of the first key; the others follow one by one.

    Returns:
        bool [num_heads, num_queries, num_keys].
    """
    num_keys, size = products.shape[-1], middle.block_size
    ranks, before = products.masked_fill(~looking, -torch.inf), first_key % size
    if size > 1:
        padding = (before, -(before + num_keys) % size)
        blocks = F.pad(ranks, padding, value=-torch.inf).unflatten(-1, (-1, size)).amax(dim=-1)
        shared = blocks.unflatten(0, (-1, group_size)).amax(dim=1)
        ranks = shared.repeat_interleave(group_size, dim=0)
    # What a stable sort would have first, for less: of units as good as the last one that is
    # recalled, those at lower positions.
    top_k = min(middle.top_k, ranks.shape[-1])
    least = ranks.topk(top_k).values[..., -1:] if top_k > 0 else torch.inf
    better, equal = ranks > least, ranks == least
    num_equal = top_k - better.sum(-1, keepdim=True)
    chosen = better | (equal & (equal.cumsum(-1, dtype=torch.int32) <= num_equal))
    if size > 1:
        chosen = chosen.repeat_interleave(size, dim=-1)[..., before : before + num_keys]
    return chosen & looking
