"""vLLM's rotary modules: what is read from them, and what takes their place."""

from typing import Any

import pytest
import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding, get_rope

from tests.kernels.batches import turn
from vllm_lminf.errors import UnsupportedError
from vllm_lminf.plugin.rotary import ExactRotaryEmbedding, is_rotary, make_exact, read_spec

CPU = torch.device("cpu")
LIMIT = 600
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
SERVED = {
    "default": {"rope_type": "default"},
    "partial": {"rope_type": "default", "partial_rotary_factor": 0.5},
    "llama3": LLAMA3,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
    "ntk": {"rope_type": "ntk", "factor": 4.0},
    "mixed ntk": {"rope_type": "ntk", "factor": 4.0, "mixed_b": 0.6},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "dynamic alpha": {"rope_type": "dynamic", "alpha": 50.0},
}
UNSERVED = {
    "DynamicNTKScalingRotaryEmbedding": {
        "rope_type": "dynamic",
        "factor": 4.0,
        "max_trained_positions": 512,
    },
    "MRotaryEmbedding": {"rope_type": "default", "mrope_section": [8, 12, 12]},
}


def make_rope(
    parameters: dict[str, Any], is_neox_style: bool = True, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A rotary module of vLLM's, with a table for at least 1024 positions; a new one each time."""
    from vllm.model_executor.layers import rotary_embedding

    rotary_embedding._ROPE_DICT.clear()
    return get_rope(64, 1024, is_neox_style, {"rope_theta": 1e4, **parameters}, dtype=dtype)


@pytest.mark.parametrize("is_neox_style", [True, False], ids=["neox", "gptj"])
@pytest.mark.parametrize("kind", SERVED)
def test_exact_module_is_the_models_own(kind: str, is_neox_style: bool) -> None:
    """Wherever the model's own table is good: a float32 angle below 1024 rad is off by 2**-14."""
    module = make_rope(SERVED[kind], is_neox_style)
    exact = make_exact(module, "rotary", CPU, LIMIT)
    positions = torch.randint(0, 1024, (40,))
    query, key = torch.randn(40, 3 * 64), torch.randn(40, 64)
    expected = module.forward_native(positions, query.clone(), key.clone())
    for output, wanted in zip(exact(positions, query, key), expected, strict=True):
        assert output.shape == wanted.shape
        assert output.dtype == wanted.dtype
        torch.testing.assert_close(output, wanted, rtol=0, atol=8 * 2**-14)


@pytest.mark.parametrize("kind", SERVED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_spec_is_read_whatever_the_dtype(kind: str, dtype: torch.dtype) -> None:
    spec = read_spec(make_rope(SERVED[kind], dtype=dtype), "layer", LIMIT)
    assert spec.inv_freq.dtype == torch.float64
    assert spec.rotary_dim == (32 if kind == "partial" else 64)
    assert (spec.magnitude > 1.1) == (kind == "yarn")


@pytest.mark.parametrize("kind", SERVED)
def test_exact_beyond_the_models_table(kind: str) -> None:
    exact = make_exact(make_rope(SERVED[kind]), "rotary", CPU, LIMIT)
    positions = torch.tensor([5_000, 1_000_000])
    query = torch.randn(2, 3, 64)
    output, nothing = exact(positions, query)
    assert nothing is None
    expected = turn(query.double(), positions, exact.spec)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)


def test_heads_may_be_a_dimension_of_their_own() -> None:
    exact = make_exact(make_rope(SERVED["default"]), "rotary", CPU, LIMIT)
    positions, query = torch.arange(5), torch.randn(5, 3, 64)
    split, _ = exact(positions, query)
    flat, _ = exact(positions, query.flatten(1))
    assert split.shape == (5, 3, 64)
    assert torch.equal(split.flatten(1), flat)


@pytest.mark.parametrize("name", UNSERVED)
def test_other_kinds_are_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"layers\.3\.rotary: .*{name}"):
        make_exact(make_rope(UNSERVED[name]), "layers.3.rotary", CPU, LIMIT)


class TestKindsOfTomorrow:
    """A kind that vLLM has not got yet, derived from its plain one."""

    def make(self, kind: type[RotaryEmbedding]) -> RotaryEmbedding:
        return kind(64, 64, 1024, 1e4, True, torch.float32)

    def test_served_if_only_its_frequencies_are_its_own(self) -> None:
        class HalfAsFast(RotaryEmbedding):
            def _compute_inv_freq(self, base: float) -> torch.Tensor:
                return super()._compute_inv_freq(base) / 2

        plain, slow = (self.make(kind) for kind in (RotaryEmbedding, HalfAsFast))
        expected = read_spec(plain, "rotary", LIMIT).inv_freq / 2
        torch.testing.assert_close(read_spec(slow, "rotary", LIMIT).inv_freq, expected)

    def test_refused_if_it_turns_in_its_own_way(self) -> None:
        class Backwards(RotaryEmbedding):
            def forward_native(self, positions: Any, query: Any, key: Any = None) -> Any:
                return super().forward_native(-positions, query, key)

        with pytest.raises(UnsupportedError, match="Backwards"):
            read_spec(self.make(Backwards), "rotary", LIMIT)


@pytest.mark.parametrize(
    ("limit", "factor", "magnitude"), [(256, 1.5, 1.1), (257, 3.0, 1.2), (5000, 3.0, 1.2)]
)
def test_long_rope_goes_by_the_largest_distance(
    stock_config: VllmConfig, limit: int, factor: float, magnitude: float
) -> None:
    """Not by max_model_len, which is beyond 256 here and makes vLLM take the long factors."""
    parameters = {
        "rope_type": "longrope",
        "short_factor": [1.5] * 32,
        "long_factor": [3.0] * 32,
        "short_mscale": 1.1,
        "long_mscale": 1.2,
        "original_max_position_embeddings": 256,
    }
    with set_current_vllm_config(stock_config):
        module = make_rope(parameters)
    assert module.use_long_rope
    exact = make_exact(module, "rotary", CPU, limit)
    plain = 1e4 ** (-torch.arange(0, 64, 2) / 64)
    torch.testing.assert_close(exact.spec.inv_freq, (plain / factor).double(), rtol=1e-6, atol=0)
    assert exact.spec.magnitude == magnitude
    if limit > 256:
        positions = torch.randint(0, 256, (9,))
        query, key = torch.randn(9, 64), torch.randn(9, 64)
        for output, wanted in zip(
            exact(positions, query, key), module(positions, query, key), strict=True
        ):
            torch.testing.assert_close(output, wanted, rtol=0, atol=1e-4)


def test_table_that_says_something_else_is_refused() -> None:
    module = make_rope(SERVED["default"])
    module.base = 2e4
    with pytest.raises(UnsupportedError, match="table"):
        make_exact(module, "rotary", CPU, LIMIT)


def test_what_is_a_rotary_module(stock_config: VllmConfig) -> None:
    parameters = {"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
    with set_current_vllm_config(stock_config):
        long_rope = make_rope(parameters | {"original_max_position_embeddings": 256})
    assert is_rotary(long_rope)
    assert is_rotary(make_rope(SERVED["yarn"]))
    assert is_rotary(make_rope(UNSERVED["MRotaryEmbedding"]))
    exact = make_exact(long_rope, "rotary", CPU, LIMIT)
    assert not is_rotary(exact)
    assert not is_rotary(nn.Linear(2, 2))


def test_layers_that_share_a_module_share_its_replacement() -> None:
    module = make_rope(SERVED["default"])
    exact = make_exact(module, "rotary", CPU, LIMIT)
    assert isinstance(exact, ExactRotaryEmbedding)
    assert make_exact(module, "rotary", CPU, LIMIT) is exact


def test_models_with_other_limits_share_no_replacement(stock_config: VllmConfig) -> None:
    """vLLM makes one module for both, a model and its draft for instance."""
    parameters = {
        "rope_type": "longrope",
        "short_factor": [1.5] * 32,
        "long_factor": [3.0] * 32,
        "original_max_position_embeddings": 256,
    }
    with set_current_vllm_config(stock_config):
        module = make_rope(parameters)
    short, long = (make_exact(module, "rotary", CPU, limit) for limit in (256, 257))
    torch.testing.assert_close(short.spec.inv_freq, 2 * long.spec.inv_freq)


def test_models_that_read_the_table_themselves_are_refused() -> None:
    exact = make_exact(make_rope(SERVED["default"]), "rotary", CPU, LIMIT)
    with pytest.raises(UnsupportedError, match="a kernel of its own"):
        _ = exact.cos_sin_cache
