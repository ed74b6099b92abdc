"""What is refused, what is chosen on the host, and what is imported; without Triton."""

import dataclasses
import math
import re
import statistics
import subprocess
import sys

import pytest
import torch

from tests.kernels.layers import make_layer
from vllm_lminf.kernels.base import Heads, ScoreRules
from vllm_lminf.kernels.triton import layer as layer_module
from vllm_lminf.kernels.triton.layer import TritonKernel, Workspace
from vllm_lminf.kernels.triton.plan import (
    Hardware,
    decode_plan,
    decode_rows,
    plan_step,
    prefill_plan,
    slots_of,
)
from vllm_lminf.pattern import LambdaPattern, cdiv

LLAMA = Heads(32, 8, 128, torch.bfloat16)
PATTERN = LambdaPattern(10, 4096, 4096)
H200 = Hardware(False, 90, 132, 227 * 1024)
HOPPER = make_layer(LLAMA, PATTERN, device="cuda", capability=(9, 0))
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
