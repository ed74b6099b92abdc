"""The compiled CPU kernels against the oracle, on a cache that holds NaN wherever nobody wrote."""

import dataclasses

import pytest
import torch

from tests.kernels.batches import Case, make_batch
from tests.kernels.test_paged import CASES, FAR_CASES, VERY_FAR_CASES, assert_close
from vllm_lminf.kernels import cpu
from vllm_lminf.kernels.paged import ScoreRules

SERVED = [
    dataclasses.replace(case, block_size=-(-case.block_size // 16) * 16)
    for case in CASES
    if case.head_size % 16 == 0
]
by_id = pytest.mark.parametrize("case", SERVED, ids=lambda case: case.id)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@by_id
def test_low_precision(case: Case, dtype: torch.dtype) -> None:
    batch = make_batch(case)
    exact = batch.run_oracle()
    loss = (batch.run_oracle(dtype).double() - exact).abs().max().item()
    output = batch.run_cpu(dtype, batch.far(), ScoreRules(batch.scale))
    assert output.dtype == dtype
    assert_close(output, exact, 3 * loss)
