"""Λ-attention through vLLM's FlashAttention on a device, alone and beside Triton's kernels, against
the oracle."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from tests.kernels.batches import Case, make_batch
from tests.kernels.cases import assert_close
from tests.kernels.flash_batches import by_id, run
from tests.kernels.triton.cases import PATTERNS, exact_and_tolerance, rules_of
from vllm_lminf.kernels.flash import FlashKernel
from vllm_lminf.kernels.hybrid import HybridKernel

Attend = Callable[..., Any]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module", params=[2, 3, 4])
def attend(request: pytest.FixtureRequest) -> Attend:
    """FlashAttention of every version that the device and the installed vLLM have."""
    interface = pytest.importorskip("vllm.vllm_flash_attn.flash_attn_interface")
    if reason := interface.fa_version_unsupported_reason(request.param):
        pytest.skip(reason)
    if request.param == 4 and find_spec("cutlass") is None:
        pytest.skip("FlashAttention 4 needs nvidia-cutlass-dsl")
    return partial(interface.flash_attn_varlen_func, fa_version=request.param)


@pytest.mark.parametrize("kernel", [FlashKernel, HybridKernel])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@by_id
def test_the_oracle(
    case: Case, dtype: torch.dtype, kernel: type[FlashKernel | HybridKernel], attend: Attend
) -> None:
    batch = make_batch(case)
    exact, tolerance = exact_and_tolerance(batch, dtype)
    output = run(batch, dtype, attend, device="cuda", kernel=kernel)
    assert output.dtype == dtype
    assert_close(output, exact, tolerance)


@pytest.mark.parametrize("kernel", [FlashKernel, HybridKernel])
@pytest.mark.parametrize("names", ["softcap", "sinks", "softcap+sinks"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_rules(
    names: str,
    pattern: tuple[int, int, int],
    kernel: type[FlashKernel | HybridKernel],
    attend: Attend,
) -> None:
    batch = make_batch(Case(names, ((0, 30), (64, 20), (399, 1)), pattern=pattern))
    rules = rules_of(names, batch)
    exact, tolerance = exact_and_tolerance(batch, torch.bfloat16, rules)
    rules = rules_of(names, batch, "cuda")
    output = run(batch, torch.bfloat16, attend, rules, device="cuda", kernel=kernel)
    assert_close(output, exact, tolerance)
