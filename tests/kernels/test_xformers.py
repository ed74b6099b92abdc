"""What xformers is asked for, pair by pair, and what it isn't asked for at all.

Its own operators are interpreted in `tests.kernels.triton.interpreted.test_xformers`.
"""

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from xformers.ops import fmha
from xformers.ops.fmha import attn_bias

from tests.kernels.layers import make_layer
from vllm_lminf.kernels.base import (
    DeviceBatch,
    Heads,
    PagedCache,
    Rotation,
    ScoreRules,
)
from vllm_lminf.kernels.xformers import XformersKernel
from vllm_lminf.kernels.xformers_plan import (
    Operators,
    Pages,
    Part,
    default_operators,
    make_plan,
)
from vllm_lminf.pattern import LambdaPattern, cdiv
from vllm_lminf.rope import RotationTables

OPERATORS = Operators(fmha.triton_splitk.FwOp, None)
TABLES = RotationTables(torch.tensor([1.0, 0.1], dtype=torch.float64))


def make_batch(requests: list[tuple[int, int]], block_size: int) -> DeviceBatch:
    """Requests of so many tokens before and in this step, whose blocks no other has."""
    counts = [cdiv(computed + new, block_size) for computed, new in requests]
    table = torch.full((len(requests), max(counts) + 1), 2**30, dtype=torch.int32)
    for row, count in enumerate(counts):
        table[row, :count] = 1 + sum(counts[:row]) + torch.randperm(count)
    starts = torch.tensor([0, *(new for _, new in requests)]).cumsum(0)
    lens = torch.tensor([sum(request) for request in requests])
    return DeviceBatch(starts.int(), lens.int(), table, max(new for _, new in requests))


def mask_of(part: Part, num_tokens: int, num_keys: int) -> torch.Tensor:
    """Who sees whom [num_rows, num_keys], by xformers' own account of the bias."""
    bias = part.bias
    num_rows = num_tokens if part.rows is None else len(part.rows)
    if isinstance(bias, attn_bias.PagedBlockDiagonalGappyKeysMask):
        # The operator reads tensors, the account lists.
        keys = dataclasses.replace(
            bias.k_seqinfo,
            seqstart_py=bias.k_seqinfo.seqstart.tolist(),
            seqlen_py=bias.k_seqinfo.seqlen.tolist(),
        )
        assert bias.q_seqinfo.seqstart.tolist() == list(bias.q_seqinfo.seqstart_py)
        bias = dataclasses.replace(bias, k_seqinfo=keys)
        room = bias.block_tables.numel() * bias.page_size
        mask = bias.materialize((num_rows + part.padding, max(num_keys, room)))
        mask = torch.nn.functional.pad(mask, (0, num_keys), value=-math.inf)[:, :num_keys]
        assert (mask[num_rows:] == -math.inf).all()
    else:
        assert part.padding == 0
        mask = bias.materialize((num_rows, num_keys))
    assert set(mask.unique().tolist()) <= {0.0, -math.inf}
    return mask[:num_rows] == 0


def pairs_seen(
    plan: list[Part], batch: DeviceBatch, block_size: int
) -> dict[bool, Counter[tuple[int, int, int]]]:
    """How often (request, query position, key position) is scored, by whether it is turned."""
    num_tokens = int(batch.query_start_loc[-1])
    owner = torch.arange(len(batch.seq_lens)).repeat_interleave(batch.query_start_loc.diff())
    position = torch.arange(num_tokens) - batch.query_start_loc[owner + 1] + batch.seq_lens[owner]
    tokens = {}
    for request, seq_len in enumerate(batch.seq_lens.tolist()):
        for j in range(seq_len):
            block = int(batch.block_table[request, j // block_size])
            tokens[block * block_size + j % block_size] = request, j
    num_slots = (1 + max(slot // block_size for slot in tokens)) * block_size
    seen: dict[bool, Counter[tuple[int, int, int]]] = {False: Counter(), True: Counter()}
    for part in plan:
        slots = list(range(num_slots))
        if part.slots is not None:
            block, offset = part.slots
            slots = (block * block_size + offset).flatten().tolist()
        rows = range(num_tokens) if part.rows is None else part.rows.tolist()
        for row, column in mask_of(part, num_tokens, len(slots)).nonzero().tolist():
            request, j = tokens[slots[column]]
            query = rows[row]
            assert request == owner[query]
            seen[part.query_angles is not None][request, int(position[query]), j] += 1
    return seen


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[tuple[int, int]], int, LambdaPattern, bool]:
    n_local = draw(st.integers(1, 40))
    limit = n_local + draw(st.sampled_from([0, 0, 1, 13, 200]))
    pattern = LambdaPattern(draw(st.integers(0, 70)), n_local, limit)
    request = st.tuples(st.integers(0, 90), st.sampled_from([0, 1, 1, 5, 8, 9, 30]))
    requests = draw(
        st.lists(request, min_size=1, max_size=4).filter(lambda r: any(new for _, new in r))
    )
    return requests, draw(st.sampled_from([16, 32, 48, 64])), pattern, draw(st.booleans())


@given(batches(), st.integers(0, 2**16))
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_every_pair_is_scored_once(
    drawn: tuple[list[tuple[int, int]], int, LambdaPattern, bool], seed: int
) -> None:
    """The pairs that the Λ lets see each other, and none else: beyond the limit between turned
    vectors, within it between those that aren't; at the limit itself both are the same."""
    requests, block_size, pattern, rotates = drawn
    torch.manual_seed(seed)
    requests = [(computed, new) for computed, new in requests if computed + new]
    batch = make_batch(requests, block_size)
    rotation = Rotation(TABLES, True) if rotates else None
    num_tokens = int(batch.query_start_loc[-1])
    plan = make_plan(batch, num_tokens, pattern, rotation, 1, block_size, 1, OPERATORS)
    seen = pairs_seen(plan, batch, block_size)
    expected = {
        (request, i, j)
        for request, (computed, new) in enumerate(requests)
        for i in range(computed, computed + new)
        for j in range(i + 1)
        if pattern.visible(i, j)
    }
    assert seen[False] + seen[True] == Counter(expected)
    if rotates:
        assert all(i - j <= pattern.distance_limit for _, i, j in seen[False])
        assert all(i - j >= pattern.distance_limit for _, i, j in seen[True])


def test_padded_rows_see_nothing() -> None:
    batch = make_batch([(40, 1), (70, 2)], 16)
    for part in make_plan(batch, 6, LambdaPattern(10, 20, 30), None, 1, 16, 1, OPERATORS):
        assert part.rows is None
        assert not mask_of(part, 6, 200)[3:].any()


def test_the_cost_of_decoding_does_not_grow() -> None:
    """Tables are cut down to the window and the prefix, however long a request is."""
    shapes = set()
    for seq_len in (500, 10**6):
        table = torch.zeros(1, cdiv(seq_len, 16), dtype=torch.int32)
        tensors = (torch.tensor([0, 1]), torch.tensor([seq_len]))
        batch = DeviceBatch(*(x.int() for x in tensors), table, 1)
        plan = make_plan(
            batch, 1, LambdaPattern(10, 100, 120), Rotation(TABLES, True), 1, 16, 1, OPERATORS
        )
        shapes.add(tuple(part.bias.block_tables.shape for part in plan))
    assert shapes == {((1, 8), (1, 2), (1, 1))}


def test_few_programs_are_compiled() -> None:
    """Batches of any number of queries are of few sizes to the split-KV kernel."""
    sizes = set()
    for count in range(1, 65):
        batch = make_batch([(20, 1)] * count, 16)
        (part,) = make_plan(batch, count, LambdaPattern(0, 8, 8), None, 1, 16, 1, OPERATORS)
        sizes.add(count + part.padding)
    assert sizes == {1, 2, 4, 8, 16, 32, 64}


def test_no_grid_is_too_large() -> None:
    """CUDA allows 65535 programs along the dimension that sequences and heads are along: what is
    more is another part. Every row is in one."""
    batch = make_batch([(20, 1)] * 700, 16)
    parts = make_plan(batch, 700, LambdaPattern(0, 8, 8), None, 128, 16, 1, OPERATORS)
    assert [len(part.rows) + part.padding for part in parts] == [256, 256, 256]
    assert torch.cat([part.rows for part in parts]).tolist() == list(range(700))
    batch = make_batch([(30, 300), (20, 1), (0, 300)], 16)
    parts = make_plan(batch, 601, LambdaPattern(9, 8, 250), Rotation(TABLES, True), 512, 16, 1,
                      OPERATORS)  # fmt: skip
    seen = pairs_seen(parts, batch, 16)
    assert max((seen[False] + seen[True]).values()) == 1
    for part in parts:
        if isinstance(part.bias, attn_bias.PagedBlockDiagonalGappyKeysMask):
            assert len(part.bias.block_tables) * 512 <= 65535


class TestPages:
    @pytest.mark.parametrize("block_size", [16, 48])
    def test_views_of_a_cache(self, block_size: int) -> None:
        both = torch.randn(5, 3, 2, block_size, 8)
        pages = Pages.of(PagedCache(both[:, :, 0], both[:, :, 1]))
        assert pages.pages_per_block == 6
        for half, row in ((both[:, :, 0], pages.key), (both[:, :, 1], pages.value)):
            for block in range(5):
                start = block * pages.pages_per_block * block_size
                tokens = row[0, start : start + block_size, :, 0]
                assert torch.equal(tokens, half[block].transpose(0, 1))

    def test_uneven_blocks(self) -> None:
        storage = torch.zeros(4, 3 * 16 * 8 + 8)
        half = storage[:, : 3 * 16 * 8].view(4, 3, 16, 8)
        with pytest.raises(ValueError, match="evenly spaced from block to block"):
            Pages.of(PagedCache(half, half))

    def test_too_many_tokens(self) -> None:
        half = torch.empty(2**24 + 1, 8, 16, 8, device="meta")
        with pytest.raises(ValueError, match="counts tokens in 32 bits"):
            Pages.of(PagedCache(half, half))
        Pages.of(PagedCache(*(half.view(-1, 16, 8, 8).transpose(1, 2) for _ in range(2))))


SERVED = make_layer(
    Heads(32, 8, 128, torch.bfloat16),
    LambdaPattern(10, 4096, 4096),
    device="cuda",
    capability=(9, 0),
)


class TestRefusals:
    @pytest.fixture(autouse=True)
    def versions(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
        versions = {"xformers": "0.0.35", "triton": "3.8.0"}
        monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
        return versions

    def test_nothing_to_say(self) -> None:
        assert XformersKernel.unsupported_reasons(SERVED) == []

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"device": torch.device("cpu")}, "CUDA devices, not on 'cpu'"),
            ({"capability": None}, "for NVIDIA's devices alone"),
            ({"capability": (7, 5)}, "compute capability 7.5"),
            ({"heads": Heads(32, 8, 128, torch.float32)}, "torch.float32: "),
            ({"heads": Heads(32, 8, 96, torch.bfloat16)}, "heads of 96 dimensions"),
            ({"cache_dtype": torch.float8_e4m3fn}, "--kv-cache-dtype auto"),
            ({"block_size": 24}, "blocks of 24 tokens"),
            ({"rules": ScoreRules(1.0, softcap=2.0)}, "a soft-cap on scores"),
            ({"rules": ScoreRules(1.0, alibi_slopes=torch.zeros(32))}, "ALiBi"),
        ],
        ids=str,
    )
    def test_situations(self, change: dict[str, object], reason: str) -> None:
        reasons = XformersKernel.unsupported_reasons(dataclasses.replace(SERVED, **change))
        assert any(reason in given for given in reasons)

    def test_every_reason_at_once(self) -> None:
        changes = {"rules": ScoreRules(1.0, 2.0, torch.zeros(32)), "block_size": 24}
        assert len(XformersKernel.unsupported_reasons(dataclasses.replace(SERVED, **changes))) == 3

    def test_sinks_are_served(self) -> None:
        assert (
            XformersKernel.unsupported_reasons(
                dataclasses.replace(SERVED, rules=ScoreRules(1.0, sinks=torch.zeros(32)))
            )
            == []
        )

    @pytest.mark.parametrize("triton", ["3.9.0", "3.10.1", "4.0.0"])
    def test_triton_without_block_pointers(self, triton: str, versions: dict[str, str]) -> None:
        versions["triton"] = triton
        (reason,) = XformersKernel.unsupported_reasons(SERVED)
        assert f"Triton {triton} has no block pointers" in reason
        assert 'pip install "triton<3.9"' in reason
        versions["xformers"] = "0.0.36"
        assert XformersKernel.unsupported_reasons(SERVED) == []

    def test_a_compiled_part_that_does_not_load(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On a PyTorch for CUDA alone: the installed one wants libraries that aren't here."""
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        (reason,) = XformersKernel.unsupported_reasons(SERVED)
        assert "compiled part doesn't load beside PyTorch" in reason
        assert "_C" in reason
        assert "or choose kernel triton" in reason
        find = importlib.util.find_spec
        bare = importlib.util.spec_from_file_location("xformers", tmp_path / "__init__.py")
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: bare if name == "xformers" else find(name)
        )
        (reason,) = XformersKernel.unsupported_reasons(SERVED)
        assert reason.startswith("the installed xformers has no compiled part: install")

    @pytest.mark.parametrize(
        ("version", "is_refused"),
        [("2.7.0", True), ("2.7.1", False), ("2.8.4", False), ("2.8.5", True), ("3.0.0b1", True)],
    )
    def test_flash_attn_of_another_version(
        self, version: str, is_refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """xformers refuses to be imported beside it."""
        package = tmp_path / "flash_attn"
        package.mkdir()
        package.joinpath("__init__.py").write_text(f'__version__ = "{version}"\n')
        monkeypatch.syspath_prepend(tmp_path)
        reasons = XformersKernel.unsupported_reasons(SERVED)
        if is_refused:
            (reason,) = reasons
            assert reason.startswith(f"flash-attn {version} is installed, and xformers can't be")
            assert 'pip install "flash-attn>=2.7.1,<=2.8.4"' in reason
            monkeypatch.setenv("XFORMERS_IGNORE_FLASH_VERSION_CHECK", "1")
            assert XformersKernel.unsupported_reasons(SERVED) == []
        else:
            assert reasons == []

    def test_flash_attention_4_alone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is a folder in a package that isn't there."""
        (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
        monkeypatch.syspath_prepend(tmp_path)
        (reason,) = XformersKernel.unsupported_reasons(SERVED)
        assert "flash-attn of no version is installed" in reason

    def test_what_is_told_is_so(self, tmp_path: Path) -> None:
        """With such a flash-attn the import fails, and a layer says which kernel it was."""
        package = tmp_path / "flash_attn"
        package.mkdir()
        package.joinpath("__init__.py").write_text('__version__ = "2.0.0"\n')
        interface = package / "flash_attn_interface.py"
        interface.write_text("flash_attn_gpu = None\n")
        code = (
            "import torch\n"
            "from tests.kernels.layers import make_layer\n"
            "from vllm_lminf.kernels.base import Heads\n"
            "from vllm_lminf.kernels.xformers import XformersKernel\n"
            "from vllm_lminf.pattern import LambdaPattern\n"
            "heads = Heads(8, 2, 64, torch.bfloat16)\n"
            "XformersKernel(make_layer(heads, LambdaPattern(10, 64, 64)))\n"
        )
        path = os.pathsep.join([str(tmp_path), *sys.path])
        environment = os.environ | {"PYTHONPATH": path}
        ran = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert "RuntimeError: kernel 'xformers': the installed xformers can't be" in ran.stderr
        assert "Requires Flash-Attention version" in ran.stderr

    def test_nothing_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        assert XformersKernel.unsupported_reasons(SERVED) == [
            "xformers isn't installed: pip install xformers",
            "triton isn't installed: pip install triton",
        ]

    @pytest.mark.parametrize("name", ["softcap", "alibi_slopes"])
    def test_rules_of_a_layer(self, name: str) -> None:
        rules = ScoreRules(1.0, **{name: torch.ones(2) if name == "alibi_slopes" else 2.0})
        with pytest.raises(ValueError, match="neither a soft-cap nor ALiBi"):
            XformersKernel(dataclasses.replace(SERVED, rules=rules), OPERATORS)

    def test_no_flash_attention(self) -> None:
        """As it is on a CPU."""
        with pytest.raises(RuntimeError, match="finds no FlashAttention"):
            default_operators()


def test_asking_imports_nothing() -> None:
    """xformers looks for a device when it is imported: being asked, before there are workers, must
    not."""
    code = (
        "import sys, torch\n"
        "from tests.kernels.layers import make_layer\n"
        "from vllm_lminf.kernels.base import Heads\n"
        "from vllm_lminf.kernels.xformers import XformersKernel\n"
        "from vllm_lminf.pattern import LambdaPattern\n"
        "heads = Heads(8, 2, 64, torch.bfloat16)\n"
        "pattern = LambdaPattern(10, 64, 64)\n"
        "layer = make_layer(heads, pattern, device='cuda', capability=(9, 0))\n"
        "XformersKernel.unsupported_reasons(layer)\n"
        "assert not {'xformers', 'triton', 'vllm'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
