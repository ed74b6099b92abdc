"""Window attention with its log-sum-exp, as another library hands it over, in float64."""

import dataclasses

import torch

from tests.kernels.batches import Batch
from vllm_lminf.kernels.base import ScoreRules
from vllm_lminf.pattern import LambdaPattern


def window_attention(batch: Batch, rules: ScoreRules) -> tuple[torch.Tensor, torch.Tensor]:
    """The window alone, without sinks.

    Returns:
        Its attention [tokens, heads, head_size] and log-sum-exp [heads, tokens].
    """
    pattern = LambdaPattern(0, batch.pattern.n_local, batch.pattern.distance_limit)
    alone = dataclasses.replace(rules, sinks=None)
    window = dataclasses.replace(batch, pattern=pattern)
    return window.run_oracle(rules=alone), log_sum_exp(window, alone)


def log_sum_exp(batch: Batch, rules: ScoreRules) -> torch.Tensor:
    """The oracle's log-sum-exp [heads, tokens], the sinks included.

    With values of one and one more key of score 0 and value 0, an output is Z / (Z + 1) for a sum
    of exponentials Z.
    """
    num_heads = batch.stretches[0].query.shape[1]
    ones = [dataclasses.replace(s, value=torch.ones_like(s.value)) for s in batch.stretches]
    extra = dataclasses.replace(rules, sinks=torch.zeros(num_heads, dtype=torch.float64))
    share = dataclasses.replace(batch, stretches=ones).run_oracle(rules=extra)[..., 0]
    lse = (share / (1 - share)).log()
    if rules.sinks is not None:
        lse = torch.logaddexp(lse, rules.sinks.double())
    return lse.T
