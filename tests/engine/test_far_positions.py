"""Rotations at positions far beyond any trained length, by the module that an engine ends up with.

Every kind of RoPE gets a real engine on a tiny model; its rotary module is taken out of the model
and called as the model calls it, at positions up to 2**31 - 1. What it should give is computed with
60 digits. The frequencies themselves are the model's, in float32 as vLLM and Hugging Face have
them; they are compared with their formulas in float64.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mpmath
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from vllm import LLM

from tests.engine.conftest import Engine
from tests.engine.families import make_config
from vllm_lminf.pattern import MAX_POSITION
from vllm_lminf.plugin.hugging_face import ExactPositionEmbeddings
from vllm_lminf.plugin.rotary import ExactRotaryEmbedding
from vllm_lminf.rope import RotarySpec

pytestmark = pytest.mark.engine

TRAINED_LENGTH = 1024
HEAD_SIZE = 64
THETA = 10_000.0
PHASE_TOLERANCE = 1e-6  # radians

POSITIONS = [
    *(0, 1, 1000, TRAINED_LENGTH - 1, TRAINED_LENGTH, TRAINED_LENGTH + 1),
    *(10**6 - 1, 10**6, 10**6 + 1, 2**20 - 1, 2**20),
    *(10**8 - 1, 10**8, 10**8 + 1, 99_999_989),
    *(2**30 - 1, 2**30, 2**31 - 3, MAX_POSITION - 1, MAX_POSITION),
]

Start = Callable[..., AbstractContextManager[LLM]]


def plain(rotary_dim: int = HEAD_SIZE, theta: float = THETA) -> torch.Tensor:
    """arXiv 2104.09864: theta ** (-2k / d)."""
    return theta ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)


def llama3() -> torch.Tensor:
    """Long waves are stretched by the factor 8, short ones stay, those between are mixed."""
    inv_freq = plain()
    turns = 256 * inv_freq / (2 * math.pi)
    smooth = ((turns - 1.0) / (4.0 - 1.0)).clamp(0, 1)
    return (1 - smooth) * inv_freq / 8 + smooth * inv_freq


def yarn() -> torch.Tensor:
    """arXiv 2309.00071: by how often a pair turns in 256 tokens, between 1 and 32 times."""

    def pair_that_turns(times: float) -> float:
        return HEAD_SIZE * math.log(256 / (times * 2 * math.pi)) / (2 * math.log(THETA))

    low, high = math.floor(pair_that_turns(32)), math.ceil(pair_that_turns(1))
    ramp = ((torch.arange(HEAD_SIZE // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    return plain() / 4 * ramp + plain() * (1 - ramp)


def mixed_ntk() -> torch.Tensor:
    pairs = torch.arange(1, HEAD_SIZE // 2 + 1, dtype=torch.float64)
    return plain() / (math.log(4.0) / (HEAD_SIZE / 2) ** 0.6 * pairs**0.6).exp()


SHORT_FACTORS = [1.0 + 0.05 * k for k in range(HEAD_SIZE // 2)]
LONG_FACTORS = [2.0 + 0.5 * k for k in range(HEAD_SIZE // 2)]


def longrope(factors: list[float]) -> torch.Tensor:
    return plain() / torch.tensor(factors, dtype=torch.float64)


@dataclass(frozen=True)
class Kind:
    """One kind of RoPE, and a family that has it.

    Attributes:
        config_class, settings: the tiny model's.
        inv_freq: the frequencies by formula; one per kind of layer.
        magnitude: factor on rotated vectors.
        is_neox_style: how pairs lie.
        distance_limit: LMINF's setting, where it matters.
        keeps_float32: whether cosines and sines are float32 in every model.
    """

    config_class: str
    settings: dict[str, Any]
    inv_freq: list[torch.Tensor]
    magnitude: float = 1.0
    is_neox_style: bool = True
    distance_limit: int | None = None
    keeps_float32: bool = False


def llama(inv_freq: torch.Tensor, magnitude: float = 1.0, **rope: Any) -> Kind:
    return Kind("LlamaConfig", {"rope_parameters": _rope(**rope)}, [inv_freq], magnitude)


def _rope(rope_type: str = "default", **rope: Any) -> dict[str, Any]:
    return {"rope_type": rope_type, "rope_theta": THETA, **rope}


def _phi3(limit: int, factors: list[float]) -> Kind:
    settings = {
        "original_max_position_embeddings": 256,
        "rope_parameters": _rope(
            "longrope",
            short_factor=SHORT_FACTORS,
            long_factor=LONG_FACTORS,
            original_max_position_embeddings=256,
        ),
    }
    magnitude = math.sqrt(1 + math.log(TRAINED_LENGTH / 256) / math.log(256))
    return Kind("Phi3Config", settings, [longrope(factors)], magnitude, distance_limit=limit)


def _hugging_face(config_class: str, factor: float = 1.0, **kind: bool) -> Kind:
    settings = {"rope_parameters": _rope(partial_rotary_factor=factor), "head_dim": HEAD_SIZE}
    inv_freq = [plain(int(HEAD_SIZE * factor))]
    return Kind(config_class, settings, inv_freq, **kind)


_YARN_MAGNITUDE = 0.1 * math.log(4.0) + 1.0
_SCALED = {"original_max_position_embeddings": 256, "factor": 4.0}

KINDS = {
    "default": llama(plain()),
    "linear": llama(plain() / 4, rope_type="linear", factor=4.0),
    "llama3": llama(
        llama3(),
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=256,
    ),
    "yarn": llama(yarn(), _YARN_MAGNITUDE, rope_type="yarn", **_SCALED),
    "dynamic ntk": llama(plain(), rope_type="dynamic", factor=4.0),
    "ntk alpha": llama(
        plain(theta=THETA * 50.0 ** (HEAD_SIZE / (HEAD_SIZE - 2))),
        rope_type="dynamic",
        alpha=50.0,
        factor=1.0,
    ),
    "ntk by parts": llama(mixed_ntk(), rope_type="ntk", factor=4.0, mixed_b=0.6),
    "longrope short": _phi3(256, SHORT_FACTORS),
    "longrope long": _phi3(257, LONG_FACTORS),
    "partial": Kind(
        "StableLmConfig", {"rope_parameters": _rope(partial_rotary_factor=0.25)}, [plain(16)]
    ),
    "interleaved": Kind("GPTJConfig", {"rotary_dim": 32}, [plain(32)], is_neox_style=False),
    "per layer": Kind(
        "Gemma3TextConfig",
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 128,
            "head_dim": HEAD_SIZE,
            "rope_parameters": {
                "sliding_attention": _rope(),
                "full_attention": _rope("linear", factor=8.0, rope_theta=1e6),
            },
        },
        [plain(), plain(theta=1e6) / 8],
    ),
    "gpt-neox": _hugging_face("GPTNeoXConfig", 0.25),
    "phi": _hugging_face("PhiConfig", 0.5),
    "glm": _hugging_face("GlmConfig", 0.5, is_neox_style=False),
    "olmo2": _hugging_face("Olmo2Config", keeps_float32=True),
}


@pytest.fixture
def start(engine: Engine, tmp_path: Path) -> Start:
    """``with start(kind, **arguments) as llm``: on two layers with one head of 64 dimensions, of
    the kind's family; only their positions matter, so the weights are vLLM's dummies."""

    def start(kind: Kind, **arguments: Any) -> AbstractContextManager[LLM]:
        shape = {
            "hidden_size": HEAD_SIZE,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "intermediate_size": 32,
            "vocab_size": 64,
            "max_position_embeddings": TRAINED_LENGTH,
            "tie_word_embeddings": kind.config_class == "Gemma3TextConfig",
        }
        make_config(kind.config_class, shape | kind.settings).save_pretrained(tmp_path / "model")
        defaults = {
            "n_local": 128,
            "distance_limit": kind.distance_limit,
            "max_model_len": 4096,
            "load_format": "dummy",
            "kv_cache_memory_bytes": 1 << 24,
        }
        return engine(tmp_path / "model", **(defaults | arguments))

    return start


def model_of(llm: LLM) -> nn.Module:
    model: nn.Module = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    return model


def rotary_modules(llm: LLM) -> list[tuple[nn.Module, RotarySpec]]:
    """Every rotary module of an engine's model, in the order of its layers, and the rotation that
    was found at the layers that use it."""
    model = model_of(llm)
    layers = [layer for m in model.modules() if (layer := getattr(m, "impl", None)) is not None]
    found = {layer.rotary for layer in layers}
    kinds = (ExactRotaryEmbedding, ExactPositionEmbeddings)
    return [
        (module, one.spec)
        for module in model.modules()
        if isinstance(module, kinds)
        for one in module.rotations
        if one in found
    ]


class Turn(nn.Module):
    """Cosines and sines of every pair, got out of a rotary module the way a model uses it."""

    def __init__(self, rotary: nn.Module, spec: RotarySpec) -> None:
        super().__init__()
        self.rotary = rotary
        self.is_neox_style = spec.is_neox_style
        self.pairs = spec.inv_freq.numel()
        unit = torch.zeros(self.pairs, 2)
        unit[:, 0] = 1  # turned by an angle, it becomes the angle's cosine and sine
        if spec.is_neox_style:
            unit = unit.T
        head = torch.full([getattr(rotary, "head_size", 2 * self.pairs)], 7.0)
        head[: 2 * self.pairs] = unit.flatten()
        self.heads = {dtype: head.to(dtype) for dtype in (torch.float32, torch.bfloat16)}

    def forward(self, positions: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """In float32 and in bfloat16: two tensors [num_tokens, pairs]."""
        return [self._of(head, positions) for head in self.heads.values()]

    def _of(self, head: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(self.rotary, ExactPositionEmbeddings):
            cos, sin = self.rotary(head, positions[None])
            return cos[0, :, : self.pairs], sin[0, :, : self.pairs]
        key = head.expand(positions.shape[0], -1).contiguous()
        query = key.repeat(1, 2)  # two heads
        query, key = self.rotary(positions, query, key)
        query = query.view(key.shape[0], 2, -1)[:, 1]
        turned, rest = key.split([2 * self.pairs, key.shape[1] - 2 * self.pairs], dim=-1)
        # Nothing but zero if query and key are turned alike, and the rest is left as it was.
        difference = (query - key).abs().sum() + (rest - 7).abs().sum()
        if self.is_neox_style:
            return (turned + difference).view(-1, 2, self.pairs).unbind(1)
        return (turned + difference).view(-1, self.pairs, 2).unbind(2)


def exact_rotation(inv_freq: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cosines and sines of POSITIONS, each product and each function rounded once, to float64."""
    with mpmath.workdps(60):
        phases = [[mpmath.mpf(p) * mpmath.mpf(f) for f in inv_freq.tolist()] for p in POSITIONS]
        return tuple(
            torch.tensor(
                [[float(f(phase)) for phase in row] for row in phases], dtype=torch.float64
            )
            for f in (mpmath.cos, mpmath.sin)
        )


def largest_phase_error(
    turned: list[tuple[torch.Tensor, torch.Tensor]],
    exact: tuple[torch.Tensor, ...],
    magnitude: float,
    rounded_dtype: torch.dtype = torch.bfloat16,
) -> float:
    """Of the float32 result, in radians.

    In bfloat16 no phase can be told that well: every value is what the exact one rounds to, give or
    take the tolerance.

    Args:
        turned: of a model in float32, and of one in bfloat16.
        exact: cosines and sines, float64.
        magnitude: factor on both.
        rounded_dtype: what a model in bfloat16 gets.
    """
    (cos, sin), rounded = turned
    assert cos.dtype == torch.float32
    cos, sin = cos.double() / magnitude, sin.double() / magnitude
    torch.testing.assert_close(
        cos.square() + sin.square(), torch.ones_like(cos), rtol=0, atol=PHASE_TOLERANCE
    )
    slack = PHASE_TOLERANCE * magnitude
    for values, wanted in zip(rounded, exact, strict=True):
        assert values.dtype == rounded_dtype
        assert (values >= (wanted * magnitude - slack).to(rounded_dtype)).all()
        assert (values <= (wanted * magnitude + slack).to(rounded_dtype)).all()
    return float(
        torch.atan2(sin * exact[0] - cos * exact[1], cos * exact[0] + sin * exact[1]).abs().max()
    )


@pytest.mark.parametrize("name", KINDS)
def test_exact_at_any_position(start: Start, name: str, said: list[str]) -> None:
    """Called as by an engine without a compiler, and traced for one: whole, for any number of
    tokens at once, without a look at what the positions are."""
    kind = KINDS[name]
    rounded_dtype = torch.float32 if kind.keeps_float32 else torch.bfloat16
    errors = []
    with start(kind) as llm:
        modules = rotary_modules(llm)
        assert len(modules) == len(kind.inv_freq)
        for (rotary, spec), inv_freq in zip(modules, kind.inv_freq, strict=True):
            torch.testing.assert_close(spec.inv_freq, inv_freq, rtol=1e-6, atol=0)
            assert spec.magnitude == pytest.approx(kind.magnitude)
            assert spec.is_neox_style == kind.is_neox_style
            turn, exact = Turn(rotary, spec), exact_rotation(spec.inv_freq)
            counter = CompileCounter()
            torch.compiler.reset()
            traced = torch.compile(turn, backend=counter, fullgraph=True, dynamic=True)
            traced(torch.tensor([3, 1, 4]))
            num_graphs = counter.frame_count
            for called in (turn, traced):
                turned = called(torch.tensor(POSITIONS))
                errors.append(largest_phase_error(turned, exact, spec.magnitude, rounded_dtype))
            assert counter.frame_count == num_graphs
    assert max(errors) < PHASE_TOLERANCE
    print(f"\n{name}: largest phase error {max(errors):.1e} rad")
    # Which factors LongRoPE takes is said in one line of the log; other kinds have no choice.
    wanted = {
        "longrope short": ["LongRoPE: distance_limit 256 takes the short factors"],
        "longrope long": ["LongRoPE: distance_limit 257 takes the long factors"],
    }
    choices = [line.partition(" (")[0] for line in said if line.startswith("LongRoPE: ")]
    assert choices == wanted.get(name, [])


def test_exact_when_compiled(start: Start) -> None:
    """By the compiler that vLLM uses, which fuses the turn with what is around it."""
    with start(KINDS["yarn"]) as llm:
        ((rotary, spec),) = rotary_modules(llm)
        torch.compiler.reset()
        turned = torch.compile(Turn(rotary, spec), fullgraph=True, dynamic=True)(
            torch.tensor(POSITIONS)
        )
        exact = exact_rotation(spec.inv_freq)
        assert largest_phase_error(turned, exact, spec.magnitude) < PHASE_TOLERANCE


@pytest.mark.parametrize("name", ["longrope long", "phi"])
def test_tables_do_not_grow_with_the_length(start: Start, name: str, said: list[str]) -> None:
    """And what is told of the first engine of a process is told of the second, too."""
    sizes = []
    for max_model_len in (4096, 1_000_000):
        with start(KINDS[name], max_model_len=max_model_len) as llm:
            tensors = [*model_of(llm).parameters(), *model_of(llm).buffers()]
            sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors))
            ((rotary, _),) = rotary_modules(llm)
            assert sum(table.untyped_storage().nbytes() for table in rotary.buffers()) <= 4 << 20
    assert sizes[0] == sizes[1]
    assert sum(line.startswith("LMINF is active: ") for line in said) == 2
    assert sum(line.startswith("LongRoPE: ") for line in said) == (2 if "longrope" in name else 0)
