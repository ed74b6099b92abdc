"""What is refused, what is chosen on the host, and what is imported; without Triton."""

import dataclasses
import itertools
import math
import re
import statistics
import subprocess
import sys

import pytest
import torch

from tests.kernels.layers import make_layer
from vllm_lminf.kernels.base import Heads, ScoreRules
from vllm_lminf.kernels.registry import choose
from vllm_lminf.kernels.triton import layer as layer_module
from vllm_lminf.kernels.triton.layer import TritonKernel, Workspace
from vllm_lminf.kernels.triton.plan import (
    Hardware,
    decode_plan,
    decode_rows,
    plan_search,
    plan_step,
    prefill_plan,
    search_keys,
    search_room,
    slots_of,
)
from vllm_lminf.middle import Middle
from vllm_lminf.pattern import LambdaPattern, cdiv

LLAMA = Heads(32, 8, 128, torch.bfloat16)
PATTERN = LambdaPattern(10, 4096, 4096)
H200 = Hardware(False, 90, 132, 227 * 1024)
HOPPER = make_layer(LLAMA, PATTERN, device="cuda", capability=(9, 0))
CPU_LAYER = make_layer(LLAMA, PATTERN)
RULES = ScoreRules(1.0, 2.0, torch.zeros(32), torch.zeros(32))


def test_what_runs() -> None:
    assert TritonKernel.unsupported_reasons(HOPPER) == []
    for changes in (
        {"capability": None},  # AMD
        {"capability": (8, 0), "cache_dtype": torch.float8_e5m2},
        {"cache_dtype": torch.float8_e4m3fn},
        {"heads": Heads(71, 1, 64, torch.float16), "cache_dtype": torch.float16},
        {"heads": dataclasses.replace(LLAMA, head_size=80)},
        {"block_size": 48, "rules": RULES},
    ):
        assert TritonKernel.unsupported_reasons(dataclasses.replace(HOPPER, **changes)) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": torch.device("cpu"), "capability": None}, "TRITON_INTERPRET=1"),
        ({"device": torch.device("xpu")}, "'xpu'"),
        ({"capability": (7, 5)}, r"7\.5.*8\.0"),
        ({"capability": (8, 6), "cache_dtype": torch.float8_e4m3fn}, r"8\.6.*8\.9.*fp8_e5m2"),
        ({"cache_dtype": torch.float16}, "a cache of torch.float16"),
        ({"cache_dtype": torch.float8_e4m3fnuz}, "float8_e4m3fnuz"),
        ({"heads": dataclasses.replace(LLAMA, dtype=torch.float64)}, "float64"),
        ({"heads": dataclasses.replace(LLAMA, head_size=100)}, "100 dimensions"),
        ({"heads": dataclasses.replace(LLAMA, head_size=512)}, "512 dimensions"),
        ({"heads": Heads(200, 1, 128, torch.bfloat16)}, "up to 128"),
        ({"heads": Heads(9, 2, 128, torch.bfloat16)}, "don't divide"),
        ({"block_size": 8}, "blocks of 8 tokens"),
    ],
    ids=str,
)
def test_what_is_refused(
    changes: dict[str, object], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    against = TritonKernel.unsupported_reasons(dataclasses.replace(HOPPER, **changes))
    assert any(re.search(reason, told) for told in against), against


RECALLING = dataclasses.replace(HOPPER, middle=Middle(5, 2048, 64))


def test_what_recalls() -> None:
    for changes in (
        {},
        {"middle": Middle(64, 0, 1, from_layer=5)},
        {"heads": Heads(9, 3, 48, torch.float16), "cache_dtype": torch.float16, "block_size": 48},
        {"rules": ScoreRules(1.0, softcap=30.0)},
    ):
        assert TritonKernel.unsupported_reasons(dataclasses.replace(RECALLING, **changes)) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rules": ScoreRules(1.0, alibi_slopes=torch.zeros(32))}, "ALiBi"),
        ({"rules": ScoreRules(1.0, sinks=torch.zeros(32))}, "sinks"),
        ({"middle": Middle(5, 2048, 64, block_size=128)}, "not blocks of 128.*middle_unit"),
        ({"middle": Middle(65, 2048, 64)}, "up to 64 tokens.*which is 65"),
        ({"cache_dtype": torch.float8_e5m2}, "an archive of torch.float8_e5m2"),
        ({"index_bits": 4}, "an index of 4 bits"),
        ({"heads": dataclasses.replace(LLAMA, head_size=72)}, "heads of 72 dimensions"),
    ],
    ids=str,
)
def test_what_is_not_recalled(changes: dict[str, object], reason: str) -> None:
    (against,) = TritonKernel.unsupported_reasons(dataclasses.replace(RECALLING, **changes))
    assert re.search(reason, against)
    without = dataclasses.replace(RECALLING, **{**changes, "middle": None})
    assert TritonKernel.unsupported_reasons(without) == []


def test_chosen_where_the_best_recalls_nothing() -> None:
    assert choose("auto", HOPPER).kernel == "hybrid"
    choice = choose("auto", RECALLING)
    assert choice.kernel == "triton"
    assert any("recalls nothing" in reason for reason in choice.against["hybrid"])


def test_temporary_bytes() -> None:
    """Of a step's log-sum-exps; what searches need is there before."""
    assert TritonKernel(dataclasses.replace(CPU_LAYER, middle=None)).temporary_bytes(100, 7) == 0
    layer = dataclasses.replace(CPU_LAYER, middle=Middle(5, 2048, 64))
    kernel = TritonKernel(layer)
    assert kernel.temporary_bytes(100, 7) == 4 * 100 * 32
    assert kernel.search_counts is TritonKernel(layer).search_counts


class TestSearches:
    @pytest.mark.parametrize("hardware", [H200, Hardware(True, 0, 304, 64 * 1024)], ids=str)
    @pytest.mark.parametrize(
        "heads", [LLAMA, Heads(71, 1, 64, torch.float16), Heads(16, 4, 256, torch.float32)], ids=str
    )
    @pytest.mark.parametrize("block_size", [16, 48, 128])
    def test_everything_has_room(self, heads: Heads, hardware: Hardware, block_size: int) -> None:
        group = heads.num_heads // heads.num_kv_heads
        for num_requests, max_query_len, max_pages in itertools.product(
            (1, 3, 64, 1024), (1, 4, 16, 17, 8192), (1, 1000)
        ):
            num_tokens = max(num_requests, max_query_len)
            plan = plan_search(
                heads, block_size, hardware, num_requests, num_tokens, max_query_len, max_pages
            )
            assert 1 <= plan.kept_rows <= plan.queries * group <= plan.rows
            assert plan.kept_rows >= group * min(plan.queries, max_query_len)
            assert not plan.is_decode or plan.queries >= max_query_len
            assert 1 <= plan.tiles_at_once <= plan.tiles
            rows = plan.tiles_at_once * heads.num_kv_heads * plan.splits * plan.kept_rows
            assert rows <= search_room(heads, block_size)
            assert plan.splits <= max(1, max_pages * block_size // search_keys(block_size))

    def test_few_programs_share_the_keys(self) -> None:
        """A step that decodes one request fills the device; one of many needs no splits; a prompt's
        many tiles are searched in few launches."""
        one = plan_search(LLAMA, 128, H200, 1, 1, 1, 1000)
        assert one.is_decode
        assert one.splits * LLAMA.num_kv_heads >= 2 * 128
        many = plan_search(LLAMA, 128, H200, 256, 256, 1, 1000)
        assert (many.splits, many.tiles_at_once) == (1, 256)
        prompt = plan_search(LLAMA, 128, H200, 1, 8192, 8192, 1000)
        assert cdiv(prompt.tiles, prompt.tiles_at_once) <= 64

    def test_tiles_divide_pages(self) -> None:
        assert [search_keys(size) for size in (16, 32, 48, 64, 128, 192)] == [
            16,
            32,
            16,
            64,
            64,
            64,
        ]


def test_all_reasons_at_once() -> None:
    bad = dataclasses.replace(HOPPER, capability=(7, 0), block_size=1, cache_dtype=torch.int8)
    assert len(TritonKernel.unsupported_reasons(bad)) == 3


def test_the_interpreter_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """It serves float32 and float16; what it computes wrongly is refused."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    cpu = dataclasses.replace(HOPPER, device=torch.device("cpu"), capability=None)
    for dtype in (torch.float32, torch.float16):
        heads = dataclasses.replace(LLAMA, dtype=dtype)
        assert (
            TritonKernel.unsupported_reasons(
                dataclasses.replace(cpu, heads=heads, cache_dtype=dtype)
            )
            == []
        )
        (reason,) = TritonKernel.unsupported_reasons(
            dataclasses.replace(cpu, heads=heads, cache_dtype=torch.float8_e5m2)
        )
        assert "wrongly" in reason
    (reason,) = TritonKernel.unsupported_reasons(cpu)
    assert "--dtype float32" in reason


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_module.importlib.util, "find_spec", lambda name: None)
    assert any(
        "pip install triton" in reason for reason in TritonKernel.unsupported_reasons(HOPPER)
    )


def test_triton_is_imported_with_the_first_layer_and_not_before() -> None:
    code = """if True:
        import sys
        import vllm_lminf.kernels.triton.layer
        import vllm_lminf.kernels.triton.plan
        assert "triton" not in sys.modules, "imported unasked"
        assert not any(name.startswith("vllm.") for name in sys.modules)
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_not_positive(scale: float) -> None:
    with pytest.raises(ValueError, match="scale is"):
        TritonKernel(make_layer(LLAMA, PATTERN, ScoreRules(scale)))


def filled(num_requests: int, num_kv_heads: int, hardware: Hardware) -> tuple[float, float]:
    """Of a decode step with 4 query heads to a key head: how full its waves are of programs, and of
    work, where each program takes as long as the longest."""
    heads = dataclasses.replace(LLAMA, num_heads=4 * num_kv_heads, num_kv_heads=num_kv_heads)
    step = plan_step(heads, PATTERN, torch.bfloat16, hardware, num_requests, 1)
    assert step.short is not None
    programs = num_requests * num_kv_heads
    waves = programs * step.splits / slots_of(hardware)
    tiles = PATTERN.n_local // step.short.keys + 2
    share = tiles / step.splits / cdiv(tiles, step.splits)
    return waves / math.ceil(waves), waves / math.ceil(waves) * share


class TestSplits:
    """A device has enough to do at any batch size, and splits always find their room."""

    def test_waves_are_full(self) -> None:
        """The served shapes, from two requests on: waves of programs to nine tenths. A split more
        where that fills them, none where it doesn't."""
        for num_requests in range(2, 257):
            programs, work = filled(num_requests, 8, H200)
            assert programs >= 0.9, num_requests
            assert work >= 0.88, num_requests

    @pytest.mark.parametrize("multiprocessors", [108, 128, 132, 142, 148, 170])
    @pytest.mark.parametrize("num_kv_heads", [4, 8, 32])
    def test_waves_of_other_devices(self, multiprocessors: int, num_kv_heads: int) -> None:
        """Two requests of few key heads have as many tiles as such a device runs programs, within
        a small factor: what is left idle is their rounding."""
        hardware = dataclasses.replace(H200, multiprocessors=multiprocessors)
        work = [filled(n, num_kv_heads, hardware)[1] for n in range(2, 257)]
        assert min(work) >= 0.68
        assert min(work[6:]) >= 0.8
        assert statistics.mean(work) >= 0.94

    @pytest.mark.parametrize("heads", [LLAMA, Heads(71, 1, 64, torch.float16)], ids=str)
    @pytest.mark.parametrize("max_query_len", [1, 2, 5, 16, 4096])
    def test_room(self, heads: Heads, max_query_len: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(layer_module, "hardware_of", lambda device: H200)
        workspace = Workspace(heads, torch.device("cpu"))
        group = heads.num_heads // heads.num_kv_heads
        for num_requests in range(1, 600):
            step = plan_step(heads, PATTERN, heads.dtype, H200, num_requests, max_query_len)
            if step.short is None or step.splits == 1:
                continue
            num_rows = min(max_query_len, step.short.queries) * group
            rows = num_requests * heads.num_kv_heads * step.splits * num_rows
            results, sums = workspace.partial_results(rows, heads.head_size)
            assert results.numel() >= rows * heads.head_size
            assert sums.numel() >= rows

    def test_tiles_hold_whole_groups(self) -> None:
        for group in (1, 2, 3, 4, 7, 8, 71, 128):
            heads = Heads(2 * group, 2, 128, torch.bfloat16)
            for rows in (decode_rows(heads, n) for n in (1, 3, 8, 1000)):
                plan = decode_plan(heads, PATTERN, torch.bfloat16, H200, rows)
                assert plan.queries >= 1
                assert plan.queries * group <= plan.rows
            plan = prefill_plan(heads, PATTERN, torch.bfloat16, H200)
            assert plan.queries >= 1
            assert plan.queries * group <= plan.rows
