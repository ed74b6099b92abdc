"""The global branch and the sinks, merged into a window attention that is finished."""

import pytest
import torch

from tests.kernels.batches import Batch, Case, make_batch
from tests.kernels.cases import assert_close
from tests.kernels.triton.cases import FAR, exact_and_tolerance, rules_case, rules_of
from tests.kernels.triton.window import log_sum_exp, window_attention
from vllm_lminf.kernels.base import ScoreRules
from vllm_lminf.kernels.triton.layer import TritonKernel

MIXED = ((150, 1), (90, 40), (0, 100), (47, 3))
CASES = [
    Case("mixed", MIXED),
    Case("decode", ((150, 1), (60, 2), (48, 1), (0, 1))),
    Case("mixed", MIXED, pattern=(1, 48, 48), block_size=32),
    Case("mixed", MIXED, pattern=(60, 20, 20), heads=(9, 3)),
    Case("mixed", MIXED, pattern=(20, 37, 90), head_size=80, rotary_dim=32, is_neox_style=False),
    Case("mixed", MIXED, pattern=(0, 48, 48)),
    Case("mixed", MIXED, rotary_dim=0, heads=(8, 1)),
]


def merge(
    batch: Batch, rules: ScoreRules, output: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    layer = TritonKernel(batch.layer(torch.float32, rules))
    cache = batch.empty_cache(torch.float32)
    batch.fill(layer, cache, torch.float32)
    output, lse = output.float(), lse.float().contiguous()
    layer.merge_global_branch(batch.query(torch.float32), cache, batch.device_batch(), output, lse)
    return output, lse


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_oracle(case: Case) -> None:
    batch = make_batch(case)
    rules = ScoreRules(batch.scale)
    exact, tolerance = exact_and_tolerance(batch, torch.float32)
    output, lse = merge(batch, rules, *window_attention(batch, rules))
    assert_close(output, exact, tolerance)
    # A log-sum-exp of size 8 holds two roundings of its own and those of scores of size 5.
    assert_close(lse, log_sum_exp(batch, rules), 32 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("names", ["alibi", "softcap", "sinks", "alibi+softcap+sinks"])
def test_rules(names: str) -> None:
    batch = make_batch(rules_case(names, (20, 37, 90)))
    rules = rules_of(names, batch)
    exact, tolerance = exact_and_tolerance(batch, torch.float32, rules)
    output, lse = merge(batch, rules, *window_attention(batch, rules))
    assert_close(output, exact, tolerance)
    # The largest sink is 40.
    assert_close(lse, log_sum_exp(batch, rules), 128 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("case", FAR[4:7:2], ids=lambda case: case.id)
def test_far_positions(case: Case) -> None:
    """The window's part comes from queries and keys that only see it."""
    batch = make_batch(case)
    full = batch.run_triton(torch.float32)
    window, lse = window_of_far(batch)
    output, _ = merge(batch, ScoreRules(batch.scale), window, lse)
    assert_close(output, full, 3e-6)
    assert (window - full).abs().max() > 1e-3, "nothing was there to merge"


def window_of_far(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Window attention of pairs that are scored by their rotated vectors, as they stand."""
    outputs, sums = [], []
    for stretch in batch.stretches:
        i, j = torch.tensor(stretch.query_positions), torch.tensor(stretch.key_positions)
        group = stretch.query.shape[1] // stretch.key.shape[1]
        query = batch._turn(stretch.query, stretch.query_positions)
        key = batch._turn(stretch.key, stretch.key_positions).repeat_interleave(group, dim=1)
        value = stretch.value.repeat_interleave(group, dim=1)
        behind = i[:, None] - j
        seen = (behind >= 0) & (behind < batch.pattern.n_local)
        scores = torch.einsum("ihd,jhd->hij", query, key) * batch.scale
        scores = scores.masked_fill(~seen, -torch.inf)
        outputs.append(torch.einsum("hij,jhd->ihd", scores.softmax(dim=-1), value))
        sums.append(scores.logsumexp(dim=-1))
    return torch.cat(outputs), torch.cat(sums, dim=1)


def test_nothing_behind_the_window_changes_nothing() -> None:
    """Not a bit, where no query sees a global key behind its window."""
    batch = make_batch(Case("mixed", ((40, 8), (0, 30), (47, 1))))
    output, lse = window_attention(batch, ScoreRules(batch.scale))
    merged, merged_lse = merge(batch, ScoreRules(batch.scale), output, lse)
    assert torch.equal(merged, output.float())
    assert torch.equal(merged_lse, lse.float())
