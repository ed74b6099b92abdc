"""The plain kernel where it recalls from the middle, against the oracle, as an engine runs it."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.cases import assert_close
from tests.kernels.layers import int32_batch, make_layer
from tests.kernels.recall_batches import RECALL_CASES, RecallCase, Requests, middle
from vllm_lminf.kernels import recall as recall_module
from vllm_lminf.kernels.archive import RecallBatch
from vllm_lminf.kernels.base import Heads, LayerConfig, ScoreRules
from vllm_lminf.kernels.reference import ReferenceKernel
from vllm_lminf.kernels.registry import choose
from vllm_lminf.middle import Middle
from vllm_lminf.pattern import LambdaPattern

EXACT = 1e-11
"""As in `tests.kernels.test_reference`: float64 throughout."""

by_case = pytest.mark.parametrize("case", RECALL_CASES, ids=str)


def assert_all_close(
    outputs: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float
) -> None:
    for output, wanted in zip(outputs, expected, strict=True):
        assert_close(output, wanted, tolerance)


@pytest.mark.parametrize("together", [True, False], ids=["together", "alone"])
@pytest.mark.parametrize("chunk", [10**6, 33])
@by_case
def test_exactly_the_oracle(case: RecallCase, chunk: int, together: bool) -> None:
    """However prompts are cut, and whatever else is in a batch."""
    requests = Requests(case)
    outputs = requests.run(ReferenceKernel, case.steps(chunk, together))
    assert_all_close(outputs, requests.expected(), EXACT)


@pytest.mark.parametrize("chunk", [1, 2, 16, 17])
def test_chunks(chunk: int) -> None:
    case = RecallCase(((70, 75), (41, 44)), middle(rows=30))
    requests = Requests(case)
    outputs = requests.run(ReferenceKernel, case.steps(chunk, together=True))
    assert_all_close(outputs, requests.expected(), EXACT)


@pytest.mark.parametrize("unit", [1, 16])
@pytest.mark.parametrize(
    ("pattern", "page"),
    [
        ((5, 6, 6), 16),  # the window is smaller than a page
        ((16, 16, 16), 16),  # prefix and window end where pages do
        ((0, 1, 1), 16),
        ((17, 15, 30), 16),
        ((3, 40, 40), 32),
    ],
)
def test_every_length(pattern: tuple[int, int, int], page: int, unit: int) -> None:
    """From one token on, past the first that has a middle and some pages: as whole prompts, and
    each length as that of a decoded token."""
    most = pattern[0] + pattern[1] + 2 * page + 3
    prompts = tuple((n, n) for n in range(1, most))
    case = RecallCase(
        (*prompts, (1, most)),
        middle(top_k=2, block_size=unit),
        heads=(2, 1),
        pattern=pattern,
        block_size=page,
    )
    requests = Requests(case)
    outputs = requests.run(ReferenceKernel, case.steps(10**6, together=True))
    assert_all_close(outputs, requests.expected(), EXACT)


@st.composite
def cases(draw: st.DrawFn) -> RecallCase:
    n_local = draw(st.integers(1, 60))
    num_kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    head_size = draw(st.sampled_from([16, 48]))
    prompts = draw(
        st.lists(st.tuples(st.integers(1, 200), st.integers(0, 4)), min_size=1, max_size=4)
    )
    return RecallCase(
        tuple((prompt, prompt + new) for prompt, new in prompts),
        Middle(
            draw(st.integers(0, 8)),
            draw(st.integers(0, 300)),
            draw(st.sampled_from([1, 3, 50, 2**31 - 1])),
            block_size=draw(st.sampled_from([1, 1, 16, 32, 48])),
        ),
        heads=(num_kv_heads * group, num_kv_heads),
        head_size=head_size,
        block_size=draw(st.sampled_from([16, 32, 128])),
        pattern=(
            draw(st.integers(0, 40)),
            n_local,
            n_local + draw(st.sampled_from([0, 0, 1, 13, 200])),
        ),
        rotary_dim=draw(st.sampled_from([0, 4, 8, head_size])),
        is_neox_style=draw(st.booleans()),
        softcap=draw(st.sampled_from([None, None, 3.0])),
    )


@given(
    case=cases(),
    chunk=st.sampled_from([7, 64, 1000]),
    together=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_requests(case: RecallCase, chunk: int, together: bool, seed: int) -> None:
    requests = Requests(case, seed)
    outputs = requests.run(ReferenceKernel, case.steps(chunk, together))
    assert_all_close(outputs, requests.expected(), EXACT)


@pytest.mark.parametrize("scores", [1, 500, 10**4])
@pytest.mark.parametrize("unit", [1, 16])
def test_in_small_pieces(scores: int, unit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long requests are: few queries at once, and keys from an archive in several turns."""
    monkeypatch.setattr(recall_module, "_MAX_SCORES", scores)
    monkeypatch.setattr(recall_module, "_MAX_KEYS", 37)
    case = RecallCase(((200, 203), (90, 90)), middle(rows=120, block_size=unit))
    requests = Requests(case)
    outputs = requests.run(ReferenceKernel, case.steps(150, together=True))
    assert_all_close(outputs, requests.expected(), EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("unit", [1, 16])
def test_low_precision(dtype: torch.dtype, unit: int) -> None:
    """With the package's own tables. Which keys are best may be decided by rounding, so all are
    recalled. The archive rounds keys once more than the oracle does."""
    case = RecallCase(((100, 106), (60, 61)), middle(top_k=200, block_size=unit), head_size=64)
    requests = Requests(case)
    exact = requests.expected()
    outputs = requests.run(ReferenceKernel, case.steps(64, together=True), dtype, exact=False)
    rounded = requests.expected(dtype)
    loss = max((a.double() - b).abs().max().item() for a, b in zip(rounded, exact, strict=True))
    assert all(output.dtype == dtype for output in outputs)
    assert_all_close(outputs, exact, 4 * loss)


def test_rows_that_do_not_look_are_as_without_a_middle() -> None:
    """To the bit."""
    case = RecallCase(((90, 92),), middle(rows=3))
    none = RecallCase(((90, 92),), middle(top_k=0))
    (some,) = Requests(case).run(ReferenceKernel, case.steps(200, together=True), torch.float32)
    (plain,) = Requests(none).run(ReferenceKernel, none.steps(200, together=True), torch.float32)
    changed = (some != plain).flatten(1).any(dim=1)
    assert changed.tolist() == [i >= 87 for i in range(92)]


class TestArchive:
    @pytest.fixture
    def layer(self) -> LayerConfig:
        return RecallCase(((90, 90),), middle()).layer(torch.float32, exact=False)

    def test_what_is_written(self, layer: LayerConfig) -> None:
        """Keys without their rotation, values as they are, tokens without a slot nowhere, and the
        index as it was."""
        case = RecallCase(((40, 40),), middle())
        ((_, key, value),) = Requests(case).drawn
        assert case.rotary is not None
        rotated = Requests(case)._rotated([key, key, value])[1].float()
        slots = torch.arange(16, 56)
        slots[[3, 7]] = -1
        archive = torch.full((5, layer.archive_format.page_bytes), 255, dtype=torch.uint8)
        pages = torch.tensor([[1, 2, 3]], dtype=torch.int32)
        ReferenceKernel(layer).write_archive(
            rotated,
            value.float(),
            archive,
            int32_batch([0, 40], [40], [[0]]),
            RecallBatch(pages, slots, torch.zeros(1, dtype=torch.int32)),
        )
        keys, values = (x.transpose(1, 2).flatten(0, 1) for x in layer.archive_format.kept(archive))
        written = slots >= 0
        torch.testing.assert_close(keys[slots[written]], key[written].float(), rtol=0, atol=1e-5)
        assert torch.equal(values[slots[written]], value[written].float())
        untouched = torch.ones(80, dtype=torch.bool)
        untouched[slots[written]] = False
        assert keys[untouched].isnan().all()
        assert values[untouched].isnan().all()
        assert (archive[:, 2 * layer.archive_format.kept_bytes :] == 255).all()


class TestUnsupported:
    def reasons(self, head_size: int = 16, block_size: int = 16, **rules: Any) -> list[str]:
        layer = make_layer(
            Heads(4, 2, head_size, torch.float32),
            LambdaPattern(5, 20, 20),
            ScoreRules(0.3, **rules),
            middle=middle(),
            block_size=block_size,
        )
        return ReferenceKernel.unsupported_reasons(layer)

    def test_named(self) -> None:
        assert self.reasons() == []
        (alibi,) = self.reasons(alibi_slopes=torch.ones(4))
        assert "ALiBi" in alibi
        (sinks,) = self.reasons(sinks=torch.ones(4))
        assert "sinks" in sinks
        (blocks,) = self.reasons(block_size=24)
        assert "blocks of 24 tokens" in blocks
        (heads,) = self.reasons(head_size=40)
        assert "heads of 40 dimensions" in heads

    def test_chosen_where_the_best_recalls_nothing(self) -> None:
        layer = RecallCase(((90, 90),), middle()).layer(torch.float32, exact=False)
        assert choose("reference", layer).kernel == "reference"
