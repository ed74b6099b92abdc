"""Λ-attention through xformers on a device, against the oracle."""

import pytest
import torch

from tests.kernels.batches import Case, make_batch
from tests.kernels.cases import assert_close
from tests.kernels.triton.cases import exact_and_tolerance
from tests.kernels.xformers_batches import by_id, far_by_id, make_layer, near, run
from vllm_lminf.kernels.base import ScoreRules
from vllm_lminf.kernels.xformers import XformersKernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True, scope="module")
def installed() -> None:
    """Skips by name where the installed xformers, or the device, doesn't serve."""
    capability = None if torch.version.hip else torch.cuda.get_device_capability()
    batch = make_batch(Case("decode", ((1, 1),), heads=(2, 1)))
    layer = batch.layer(torch.bfloat16, device="cuda", capability=capability)
    if reasons := XformersKernel.unsupported_reasons(layer):
        pytest.skip("; ".join(reasons))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@by_id
def test_the_oracle(case: Case, dtype: torch.dtype) -> None:
    batch = make_batch(case)
    exact, tolerance = exact_and_tolerance(batch, dtype)
    output = run(batch, dtype, make_layer(batch, dtype, device="cuda"), device="cuda")
    assert output.dtype == dtype
    assert_close(output, exact, tolerance)


@far_by_id
def test_far_positions(case: Case) -> None:
    """Up to 2**31 - 1."""
    _, tolerance = exact_and_tolerance(make_batch(near(case)), torch.float16)
    batch = make_batch(case)
    layer = make_layer(batch, torch.float16, device="cuda")
    output = run(batch, torch.float16, layer, device="cuda")
    assert_close(output, batch.run_literal(), tolerance)


@pytest.mark.parametrize("pattern", [(10, 48, 48), (20, 37, 90), (0, 300, 300)], ids=str)
def test_sinks(pattern: tuple[int, int, int]) -> None:
    case = Case("sinks", ((0, 12), (150, 1), (99, 9)), pattern=pattern)
    batch = make_batch(case)
    sinks = torch.tensor([2.0, -30.0, 0.0, 5.0, -torch.inf, 40.0])
    rules = ScoreRules(batch.scale, sinks=sinks)
    exact, tolerance = exact_and_tolerance(batch, torch.bfloat16, rules)
    rules.sinks = sinks.cuda()
    layer = make_layer(batch, torch.bfloat16, rules, device="cuda")
    assert_close(run(batch, torch.bfloat16, layer, device="cuda"), exact, tolerance)


def test_decoding_in_a_graph() -> None:
    """A captured step, replayed over tensors that have other requests in them."""
    decode = Case("decode", ((300, 1), (120, 1)), heads=(4, 2), pattern=(20, 37, 90))
    batches = [make_batch(decode, seed) for seed in (1, 2)]
    layer = make_layer(batches[0], torch.bfloat16, device="cuda")
    expected = [run(batch, torch.bfloat16, layer, device="cuda") for batch in batches]
    told, cache = batches[0].device_batch("cuda"), batches[0].empty_cache(torch.bfloat16, "cuda")
    run(batches[0], torch.bfloat16, layer, cache=cache, device="cuda")
    query = batches[0].query(torch.bfloat16).cuda()
    output = torch.full_like(query, torch.nan)
    told.shared.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.attend(query, cache, told, output)
    for batch, result in zip(batches, expected, strict=True):
        run(batch, torch.bfloat16, layer, cache=cache, device="cuda")
        told.block_table.copy_(batch.block_table)
        query.copy_(batch.query(torch.bfloat16))
        graph.replay()
        assert torch.equal(output.cpu(), result)
