"""The middle recalled, against the oracle; archive and cache hold NaN wherever nobody wrote."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from tests.kernels.batches import turn
from tests.kernels.cases import assert_close
from tests.kernels.layers import int32_batch, make_layer
from tests.kernels.recall_batches import RecallCase, Requests, middle
from vllm_lminf.kernels.archive import RecallBatch
from vllm_lminf.kernels.base import DeviceBatch, Heads, LayerConfig, PagedCache, ScoreRules
from vllm_lminf.kernels.triton import plan as plan_module
from vllm_lminf.kernels.triton.layer import TritonKernel
from vllm_lminf.kernels.triton.recaller import SearchWorkspace
from vllm_lminf.pattern import LambdaPattern

EXACT = 2e-5
"""In float32, of outputs of size 1: keys are turned twice, scores of size 10 are off by some units
in the last place."""

LAST = middle(rows=1)

CASES = [
    # How many, from one to more than there are.
    RecallCase(((44, 45),), middle(top_k=1, rows=1), heads=(2, 1)),
    RecallCase(((70, 71),), middle(top_k=40, rows=1), heads=(2, 1)),
    RecallCase(((44, 45),), middle(top_k=64, rows=1), heads=(2, 1)),
    # Pages that hold one tile, two tiles, and some whose tiles are smaller than they.
    RecallCase(((70, 70),), LAST, heads=(2, 1), block_size=32),
    RecallCase(((110, 110),), LAST, heads=(2, 1), block_size=48),
    RecallCase(((160, 160),), LAST, heads=(2, 1), block_size=128),
    # Heads.
    RecallCase(((40, 40),), LAST, heads=(9, 3), head_size=64),
    RecallCase(((40, 40),), LAST, heads=(3, 1), head_size=48),
    # Patterns: no prefix, windows smaller than a page, a limit beyond the window, no middle at all.
    RecallCase(((40, 40),), LAST, heads=(1, 1), pattern=(0, 20, 20)),
    RecallCase(((28, 34),), LAST, heads=(1, 1), pattern=(0, 1, 1)),
    RecallCase(((28, 34),), LAST, heads=(1, 1), pattern=(17, 6, 6)),
    RecallCase(((40, 40),), LAST, heads=(1, 1), pattern=(16, 16, 40)),
    RecallCase(((30, 31),), LAST, heads=(1, 1), pattern=(20, 30, 30)),
    # Rotations, and distances that are nearer and farther than where the queries stand.
    RecallCase(((40, 40),), middle(distance=0, rows=1), heads=(1, 1)),
    RecallCase(((40, 40),), middle(distance=3000, rows=1), heads=(1, 1)),
    RecallCase(((40, 40),), LAST, heads=(1, 1), rotary_dim=8, magnitude=1.3),
    RecallCase(((40, 40),), LAST, heads=(1, 1), rotary_dim=8, is_neox_style=False),
    RecallCase(((40, 40),), LAST, heads=(1, 1), rotary_dim=0),
    RecallCase(((40, 40),), LAST, heads=(1, 1), softcap=2.0),
]
MIXED = RecallCase(((1, 2), (44, 46), (35, 36), (24, 27)), middle(rows=2), heads=(1, 1))


def run(case: RecallCase, chunk: int = 10**6, together: bool = True) -> list[torch.Tensor]:
    steps = case.steps(chunk, together)
    return Requests(case).run(TritonKernel, steps, torch.float32, exact=False)


def assert_exact(case: RecallCase, outputs: list[torch.Tensor]) -> None:
    for output, expected in zip(outputs, Requests(case).expected(), strict=True):
        assert_close(output, expected, EXACT)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_oracle(case: RecallCase) -> None:
    assert_exact(case, run(case))


@pytest.mark.parametrize("chunk", [10**6, 17])
def test_batches(chunk: int) -> None:
    """Prompts whole and in chunks, beside requests that decode."""
    assert_exact(MIXED, run(MIXED, chunk))


def test_equal_to_the_bit_however_the_work_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs or many, all tiles in one launch or each in its own."""
    case = RecallCase(((70, 71), (40, 40)), middle(rows=5), heads=(1, 1))
    whole = run(case)
    monkeypatch.setattr(plan_module, "_MOST_SEARCH_SPLITS", 1)
    monkeypatch.setattr(plan_module, "search_room", lambda heads, block_size: 64)
    for output, other in zip(whole, run(case), strict=True):
        assert torch.equal(output, other)


def test_low_precision() -> None:
    """Which keys are best may be decided by rounding, so all are recalled. The archive rounds keys
    once more than the oracle does, and so is the output before the middle joins it."""
    case = RecallCase(((44, 45),), middle(top_k=64, rows=1), heads=(2, 1), head_size=64)
    requests = Requests(case)
    exact = requests.expected()
    outputs = requests.run(TritonKernel, case.steps(64, True), torch.float16, exact=False)
    rounded = requests.expected(torch.float16)
    loss = max((a.double() - b).abs().max().item() for a, b in zip(rounded, exact, strict=True))
    for output, wanted in zip(outputs, exact, strict=True):
        assert output.dtype == torch.float16
        assert_close(output, wanted, 4 * loss)


def test_rows_that_do_not_look_are_as_without_a_middle() -> None:
    """To the bit."""
    case = RecallCase(((38, 39),), middle(rows=2), heads=(1, 1))
    (some,) = run(case)
    (none,) = run(dataclasses.replace(case, middle=middle(top_k=0)))
    changed = (some != none).flatten(1).any(dim=1)
    assert changed.tolist() == [i >= 36 for i in range(39)]


class TestSearch:
    """One query behind a prompt of 100 tokens, one head, no rotation, one program."""

    NUM_KEYS, WINDOW = 101, 10

    @pytest.fixture
    def one_program(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plan_module, "_MOST_SEARCH_SPLITS", 1)

    def search(
        self, query: torch.Tensor, key: torch.Tensor, top_k: int = 3
    ) -> tuple[LayerConfig, list[int], list[int]]:
        """The layer, the positions of the keys that were recalled, and the counts."""
        num_keys, head_size = key.shape
        layer = make_layer(
            Heads(1, 1, head_size, torch.float32),
            LambdaPattern(0, self.WINDOW, self.WINDOW),
            ScoreRules(1e-25),
            middle=middle(top_k=top_k, rows=1),
        )
        kernel = TritonKernel(layer)
        num_pages = num_keys // 16 + 1
        archive = torch.full((num_pages, layer.archive_format.page_bytes), 255, dtype=torch.uint8)
        # All keys weigh the same, and each one's value has a dimension of its own.
        kept_keys, kept_values = layer.archive_format.kept(archive)
        where = torch.arange(num_keys)
        kept_keys[where // 16, 0, where % 16] = key
        kept_values[where // 16, 0, where % 16] = torch.eye(num_keys, head_size)
        pages = torch.arange(num_pages, dtype=torch.int32)[None]
        last = torch.arange(15, num_keys, 16)
        recall = RecallBatch(pages, last, torch.tensor([num_keys - 1], dtype=torch.int32))
        kernel.write_archive(
            key[last, None],
            torch.eye(num_keys, head_size)[last, None],
            archive,
            int32_batch([0, len(last)], [num_keys], [[0]]),
            recall,
        )
        cache = PagedCache(*torch.zeros(2, num_pages, 1, 16, head_size))
        output = torch.full((1, 1, head_size), torch.nan)
        one = int32_batch([0, 1], [num_keys], pages.tolist())
        kernel.attend_and_recall(query[None, None], cache, one, archive, recall, output)
        assert kernel.search_counts is not None
        (recalled,) = (output[0, 0] > 0).nonzero(as_tuple=True)
        return layer, recalled.tolist(), kernel.search_counts.tolist()

    def draw(self, head_size: int = 112) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        key = torch.randn(self.NUM_KEYS, head_size, generator=generator)
        return torch.randn(head_size, generator=generator), key

    @pytest.mark.usefixtures("one_program")
    def test_certain_at_once(self) -> None:
        query, key = self.draw()
        _, recalled, counts = self.search(query, key)
        best = (key[: -self.WINDOW] @ query).topk(3).indices
        assert recalled == sorted(best.tolist())
        assert counts == [1, 0]

    @pytest.mark.usefixtures("one_program")
    def test_best_keys_in_one_lane(self) -> None:
        """A scan keeps two of them; the third is found by looking again, and that is counted."""
        query, key = self.draw()
        for j in (7, 23, 39, 71):
            key[j] = (3 + j / 1000) * query
        _, recalled, counts = self.search(query, key)
        assert recalled == [23, 39, 71]
        assert counts == [1, 1]

    @pytest.mark.usefixtures("one_program")
    @pytest.mark.parametrize("size", [0.0, 1.0])
    def test_ties_go_to_lower_positions(self, size: float) -> None:
        """Of many equal keys, whatever lane they are in; also where all products are zero."""
        query, _ = self.draw()
        key = size * query.expand(self.NUM_KEYS, -1).contiguous()
        _, recalled, counts = self.search(query, key, top_k=5)
        assert recalled == [0, 1, 2, 3, 4]
        assert counts == [1, 1]

    @pytest.mark.parametrize("size", [1e-20, 1e-13, 1e12])
    def test_queries_of_any_size(self, size: float) -> None:
        query, key = self.draw()
        _, recalled, _ = self.search(size * query, key)
        best = (key[: -self.WINDOW] @ query).topk(3).indices
        assert recalled == sorted(best.tolist())

    @pytest.mark.parametrize("head_size", [112, 128])
    def test_bounds(self, head_size: int) -> None:
        """What a scan says of keys holds, and it keeps two of each lane."""
        query, key = self.draw(head_size)
        key = 0.1 * key + 5.0
        layer, _, _ = self.search(query, key)
        workspace = SearchWorkspace.of(layer)
        scores = (key.double() @ query.double())[: -self.WINDOW]
        splits = 7  # one for each page
        bounds, places = workspace.bounds[:splits], workspace.places[:splits].long()
        is_key = bounds > -torch.inf
        assert is_key.sum() == len(scores)
        assert places[is_key].sort().values.tolist() == [*range(len(scores))]
        above = bounds[is_key].double() - scores[places[is_key]]
        indexed = places[is_key] < 96
        assert (above >= 0).all()
        assert above[~indexed].isinf().all()
        # A step of the index is a 127th of the largest element of a key, less the mean.
        step = (key - key.mean(dim=0)).abs().max() / 127
        assert (above[indexed] < 2 * head_size**0.5 * query.norm() * step).all()


def write(
    key: torch.Tensor,
    rotary: Callable[[RecallCase], RecallCase] = lambda case: case,
) -> tuple[LayerConfig, torch.Tensor]:
    """A layer and its archive of one page, into which these keys were written from position 0 on;
    [num_tokens, 1, head_size]."""
    case = rotary(
        RecallCase(((9, 9),), middle(), heads=(1, 1), head_size=key.shape[-1], rotary_dim=0)
    )
    layer = case.layer(key.dtype, exact=False)
    archive = torch.full((2, layer.archive_format.page_bytes), 255, dtype=torch.uint8)
    recall = RecallBatch(
        torch.tensor([[1]], dtype=torch.int32),
        16 + torch.arange(len(key)),
        torch.zeros(1, dtype=torch.int32),
    )
    TritonKernel(layer).write_archive(
        key, 2 * key, archive, int32_batch([0, len(key)], [len(key)], [[1]]), recall
    )
    return layer, archive


class TestArchive:
    def index(
        self, layer: LayerConfig, archive: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The keys as the index has them, [16, head_size]; the radii; and the centre; float64."""
        size = layer.heads.head_size
        index = archive[1, 2 * layer.archive_format.kept_bytes :]
        codes = index[: 16 * size].view(torch.int8).view(16, size).double()
        scales, radii, centre = (
            index[16 * size :].view(torch.float32).double().split([16, 16, size])
        )
        return centre + scales[:, None] * codes, radii, centre

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize(
        "kind", ["normal", "far from zero", "one large", "equal", "zero", "tiny", "huge"]
    )
    def test_index(self, kind: str, dtype: torch.dtype) -> None:
        """No key is further from its index than its radius says, and that is hardly more."""
        key = torch.randn(16, 1, 48, generator=torch.Generator().manual_seed(1))
        if kind == "far from zero":
            key = 30 + key / 10
        elif kind == "one large":
            key[3, 0, 5] = 1000.0
        elif kind == "equal":
            key[:] = key[:1].clone()
        elif kind in ("zero", "tiny", "huge"):
            huge = 1e15 if dtype == torch.float32 else 1e4
            key *= {"zero": 0.0, "tiny": 1e-25, "huge": huge}[kind]
        key = key.to(dtype)
        layer, archive = write(key)
        kept, _ = layer.archive_format.kept(archive)
        assert torch.equal(kept[1, 0], key[:, 0])
        indexed, radii, centre = self.index(layer, archive)
        rest = (key[:, 0].double() - indexed).norm(dim=-1)
        largest = (key[:, 0].double() - centre).abs().amax(dim=-1)
        assert (rest <= radii).all()
        lengths = key[:, 0].double().norm(dim=-1) + centre.norm()
        assert (radii <= 48**0.5 * largest / 127 + 1e-4 * lengths + 2.0**-50).all()

    @pytest.mark.parametrize("wrong", [torch.nan, torch.inf, 3e38])
    def test_keys_that_cannot_be_bounded(self, wrong: float) -> None:
        key = torch.randn(16, 1, 48)
        key[5, 0, 7] = wrong
        layer, archive = write(key)
        _, radii, _ = self.index(layer, archive)
        assert radii.isinf().all()

    def test_pages_that_are_not_full_have_no_index(self) -> None:
        layer, archive = write(torch.randn(15, 1, 48))
        assert (archive[1, 2 * layer.archive_format.kept_bytes :] == 255).all()
        assert (archive[0] == 255).all()

    @pytest.mark.parametrize(("rotary_dim", "is_neox"), [(48, True), (20, True), (20, False)])
    def test_keys_far_away(self, rotary_dim: int, is_neox: bool) -> None:
        """Turned back as exactly as keys near by; others untouched, and tokens without a slot."""
        case = RecallCase(
            ((9, 9),), middle(), heads=(3, 3), head_size=48, rotary_dim=rotary_dim,
            is_neox_style=is_neox,
        )  # fmt: skip
        assert case.rotary is not None
        positions = torch.tensor([10**8 + 7, 10**8 + 8, 20, 2**31 - 2])
        key = torch.randn(5, 3, 48, generator=torch.Generator().manual_seed(2)).double()
        rotated = key.clone()
        rotated[:4] = turn(key[:4], positions, case.rotary)
        layer = case.layer(torch.float32, exact=False)
        archive = torch.full((3, layer.archive_format.page_bytes), 255, dtype=torch.uint8)
        # The last row is padding, and so is the request without rows.
        batch = int32_batch([0, 2, 2, 3, 4], [10**8 + 9, 5, 21, 2**31 - 1], [[0]] * 4)
        slots = torch.tensor([33, -1, 17, 5, 40])
        nothing = torch.zeros(4, dtype=torch.int32)
        recall = RecallBatch(nothing[:, None], slots, nothing)
        TritonKernel(layer).write_archive(rotated.float(), key.float(), archive, batch, recall)
        keys, values = (x.transpose(1, 2).flatten(0, 1) for x in layer.archive_format.kept(archive))
        for row in (0, 2, 3):
            assert_close(keys[slots[row]], key[row], 3e-6)
            assert torch.equal(keys[slots[row], :, rotary_dim:], key[row, :, rotary_dim:].float())
            assert torch.equal(values[slots[row]], key[row].float())
        untouched = torch.ones(48, dtype=torch.bool)
        untouched[[33, 17, 5]] = False
        assert keys[untouched].isnan().all()
        assert values[untouched].isnan().all()

    def test_archives_of_other_layers(self) -> None:
        layer, archive = write(torch.randn(2, 1, 48))
        recall = RecallBatch(*torch.zeros(3, 1, 1, dtype=torch.int32))
        key, batch = torch.zeros(1, 1, 48), int32_batch([0, 1], [1], [[0]])
        kernel = TritonKernel(layer)
        with pytest.raises(ValueError, match="bytes in pages of"):
            kernel.write_archive(key, key, archive[:, :-16], batch, recall)
        with pytest.raises(ValueError, match="without a middle"):
            TritonKernel(dataclasses.replace(layer, middle=None)).write_archive(
                key, key, archive, batch, recall
            )


def test_padding_requests_are_never_looked_up() -> None:
    """As a captured graph has them: without rows, of any length and any pages; and of the queries
    that there is room for only some are there."""
    case = RecallCase(((60, 61),), LAST, heads=(2, 1))
    layer, requests = case.layer(torch.float32, exact=False), Requests(case)
    query, key, value = (x.float() for x in requests._rotated(requests.drawn[0]))
    kernel = TritonKernel(layer)
    pages = torch.arange(4, dtype=torch.int32)[None]
    cache = PagedCache(*torch.full((2, 4, 1, 16, 16), torch.nan))
    archive = torch.full((4, layer.archive_format.page_bytes), 255, dtype=torch.uint8)
    slots = torch.arange(61)
    whole = int32_batch([0, 61], [61], pages.tolist())
    first = torch.tensor([59], dtype=torch.int32)
    kernel.write_cache(key, value, cache, slots)
    kernel.write_archive(key, value, archive, whole, RecallBatch(pages, slots, first))
    padding = torch.full((2, 4), 2**30, dtype=torch.int32)
    table = torch.cat((pages, padding))
    batch = DeviceBatch(
        torch.tensor([0, 1, 1, 1], dtype=torch.int32),
        torch.tensor([61, 2**31 - 1, 0], dtype=torch.int32),
        table,
        1,
    )
    recall = RecallBatch(table, slots[-1:], torch.tensor([59, 0, 0], dtype=torch.int32))
    (expected,) = requests.expected()
    rows = torch.cat((query[-1:], torch.full_like(query[:4], torch.nan)))
    for max_query_len in (1, 5):
        output = torch.full_like(rows, torch.nan)
        told = dataclasses.replace(batch, max_query_len=max_query_len)
        kernel.attend_and_recall(rows, cache, told, archive, recall, output)
        assert_close(output[:1], expected[-1:], EXACT)
        assert output[1:].isnan().all()
