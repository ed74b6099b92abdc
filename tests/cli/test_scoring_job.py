"""From raw measurements to figures."""

import json
from collections.abc import Callable
from dataclasses import asdict

import pytest

from vllm_lminf.cli.scoring_job import (
    NLL_BUCKET,
    PrefillStep,
    ScoringResult,
    nll_at,
    nll_curve,
    seconds_to_reach,
)

STEPS = [PrefillStep(100, 1.0, 1), PrefillStep(200, 3.0, 2), PrefillStep(250, 4.0, 2)]


def test_nll_is_the_mean_of_the_tokens_just_before_the_length() -> None:
    nll = [float(k) for k in range(1, 5000)]  # nll[k] belongs to token k + 1
    assert nll_at(nll, 10) == pytest.approx((5 + 6 + 7 + 8 + 9) / 5)
    assert nll_at(nll, 5000) == pytest.approx((4999 + 3976) / 2)


def test_nll_curve_has_whole_buckets_only() -> None:
    assert nll_curve([2.0] * (2 * NLL_BUCKET + 5)) == [2.0, 2.0]


@pytest.mark.parametrize(
    ("length", "seconds"), [(50, 0.5), (100, 1.0), (150, 2.0), (200, 3.0), (250, 4.0)]
)
def test_time_inside_a_chunk_is_proportional(length: int, seconds: float) -> None:
    assert seconds_to_reach(STEPS, length) == pytest.approx(seconds)


def test_a_length_that_was_not_reached_has_no_time() -> None:
    with pytest.raises(ValueError, match="251 tokens"):
        seconds_to_reach(STEPS, 251)


def test_results_survive_json(sample_result: Callable[..., ScoringResult]) -> None:
    result = sample_result("lminf", [2048, 4096])
    assert ScoringResult.from_json(json.loads(json.dumps(asdict(result)))) == result
