"""Which kernel runs where: the one that was asked for, or the best that can."""

import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernels.layers import make_layer
from vllm_lminf.kernels.base import Heads, Kernel, LayerConfig, ScoreRules
from vllm_lminf.kernels.registry import NAMES, choose, kernel_class
from vllm_lminf.middle import Middle
from vllm_lminf.pattern import LambdaPattern

CPU = make_layer(Heads(8, 2, 64, torch.bfloat16), LambdaPattern(10, 4096, 4096))
HOPPER = replace(CPU, device=torch.device("cuda"), capability=(9, 0))
AMD = replace(HOPPER, capability=None)


@pytest.fixture(autouse=True)
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton as users have it."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """As if a package weren't installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a)
    )


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (CPU, "cpu"),
        (HOPPER, "hybrid"),
        (replace(HOPPER, capability=(8, 0)), "triton"),
        (replace(HOPPER, capability=(10, 0)), "triton"),
        (AMD, "triton"),
    ],
    ids=["cpu", "9.0", "8.0", "10.0", "amd"],
)
def test_automatic_choice(layer: LayerConfig, expected: str) -> None:
    choice = choose("auto", layer)
    assert choice.kernel == expected
    assert choice.against == {}


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (replace(CPU, block_size=8), "--block-size 8"),
        (replace(CPU, heads=Heads(8, 2, 72, torch.bfloat16)), "72 in bfloat16"),
        (replace(CPU, cache_dtype=torch.float16), "not in float16"),
        (replace(HOPPER, capability=(7, 5)), "compute capability 7.5"),
        (replace(HOPPER, heads=Heads(8, 2, 512, torch.bfloat16)), "512"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_best_does_not_serve(layer: LayerConfig, named: str) -> None:
    """The plain one does, and the reasons are there to be told."""
    choice = choose("auto", layer)
    assert choice.kernel == "reference"
    *_, reason = choice.reasons
    assert named in reason


def test_hybrid_gives_way_on_hopper() -> None:
    """To Triton's kernels, where FlashAttention isn't there or doesn't take the cache's dtype."""
    choice = choose("auto", replace(HOPPER, cache_dtype=torch.float8_e4m3fn))
    assert choice.kernel == "triton"
    assert list(choice.against) == ["hybrid"]
    choice = choose("auto", HOPPER, load=True)
    assert choice.kernel == "triton"
    assert choice.reasons == ["kernel 'hybrid': no FlashAttention was handed in"]


def test_a_block_size_makes_no_gpu_slow() -> None:
    choice = choose("auto", replace(HOPPER, block_size=8))
    assert choice.kernel is None
    assert list(choice.against) == ["hybrid", "triton"]
    assert all("blocks of 8 tokens" in reason for reason in choice.reasons)
    assert choose("reference", replace(HOPPER, block_size=8)).kernel == "reference"


def test_a_middle_makes_no_gpu_slow() -> None:
    """What Triton's kernels don't recall is refused, and `hybrid` gives way to them."""
    recalling = replace(HOPPER, middle=Middle(16, distance=2048, rows=64))
    assert choose("auto", recalling).kernel == "triton"
    blocks = replace(recalling, middle=Middle(4, distance=2048, rows=64, block_size=64))
    choice = choose("auto", blocks)
    assert choice.kernel is None
    assert list(choice.against) == ["hybrid", "triton"]
    assert choose("reference", blocks).kernel == "reference"
    on_cpu = replace(blocks, device=torch.device("cpu"), heads=Heads(8, 2, 72, torch.bfloat16))
    assert list(choose("auto", on_cpu).against) == ["cpu", "reference"]


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "triton")
    choice = choose("auto", HOPPER)
    assert choice.kernel == "reference"
    *_, reason = choice.reasons
    assert reason.startswith("kernel 'triton': Triton isn't installed")
    assert choose("triton", HOPPER).kernel is None


@pytest.mark.parametrize(
    ("kernel", "layer", "named"),
    [
        ("cpu", HOPPER, "it runs on CPUs, not on cuda"),
        ("triton", CPU, "TRITON_INTERPRET=1"),
        ("xformers", CPU, "not on 'cpu'"),
        ("xformers", AMD, "NVIDIA"),
        ("flash", CPU, "NVIDIA"),
        ("flash", AMD, "NVIDIA"),
        ("flash", replace(HOPPER, rules=ScoreRules(1.0, alibi_slopes=torch.zeros(8))), "ALiBi"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_no_other_takes_the_place_of_one_by_name(
    kernel: str, layer: LayerConfig, named: str
) -> None:
    choice = choose(kernel, layer)
    assert choice.kernel is None
    assert list(choice.against) == [kernel]
    assert named in "; ".join(choice.reasons)
    assert all(reason.startswith(f"kernel {kernel!r}: ") for reason in choice.reasons)


def test_interpreted_by_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    float32: dict[str, Any] = {
        "heads": Heads(8, 2, 64, torch.float32),
        "cache_dtype": torch.float32,
    }
    assert choose("triton", replace(CPU, **float32)).kernel == "triton"
    assert choose("auto", replace(CPU, **float32)).kernel == "cpu"


def test_nothing_that_serves() -> None:
    """Every kernel that was looked at has its reasons."""
    layer = replace(HOPPER, capability=(8, 0), cache_dtype=torch.float8_e4m3fn)
    choice = choose("auto", layer)
    assert choice.kernel is None
    assert list(choice.against) == ["triton", "reference"]


@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_is_there(name: str) -> None:
    kernel = kernel_class(name)
    assert issubclass(kernel, Kernel)
    assert isinstance(kernel.unsupported_reasons(HOPPER), list)
