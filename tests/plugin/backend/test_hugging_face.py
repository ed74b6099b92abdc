"""Hugging Face's rotary modules: what is read from them, and what takes their place."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from vllm_lminf.errors import UnsupportedError
from vllm_lminf.pattern import MAX_POSITION
from vllm_lminf.plugin.hugging_face import is_rotary, make_exact

CPU = torch.device("cpu")
LIMIT = 256


def make_rotary(model_type: str, **settings: Any) -> nn.Module:
    """The rotary module of a tiny decoder."""
    rope = {"rope_type": "default", "rope_theta": 1e4}
    config = transformers.AutoConfig.for_model(
        model_type,
        **{
            "vocab_size": 8,
            "hidden_size": 64,
            "intermediate_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "max_position_embeddings": LIMIT,
            "pad_token_id": None,
            "rope_parameters": rope | settings.pop("rope", {}),
            **settings,
        },
    )
    rotary: nn.Module = transformers.AutoModel.from_config(config, dtype=torch.float32).rotary_emb
    assert is_rotary(rotary)
    return rotary


# Each hands its angles out in another layout, in another dtype, or for a part of each head.
MODELS = {
    "llama": {},
    "olmo2": {},
    "cohere": {},
    "glm": {},
    "gpt_neox": {"rope": {"partial_rotary_factor": 0.25}},
    "gpt_oss": {},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", MODELS)
def test_same_angles_exact_at_any_position(model_type: str, dtype: torch.dtype) -> None:
    original = make_rotary(model_type, **MODELS[model_type])
    exact = make_exact(original, "rotary", CPU, LIMIT)
    assert not is_rotary(exact)
    ways = [(r.spec.is_neox_style, float(r.spec.inv_freq[0])) for r in exact.rotations]
    assert ways == [(True, 1.0), (False, 1.0), (True, -1.0), (False, -1.0)]

    x = torch.zeros(1, dtype=dtype)
    near = torch.randint(0, 256, (1, 9))
    for angles, wanted in zip(exact(x, near), original(x, near), strict=True):
        assert angles.dtype == wanted.dtype
        torch.testing.assert_close(
            angles, wanted, rtol=0, atol=2e-5 + torch.finfo(angles.dtype).eps
        )
    far = torch.tensor([10**6, 10**9, MAX_POSITION])
    phase = far[:, None].double() * original.inv_freq.double()
    for rotary in exact.rotations:
        cos, sin = rotary.tables(far)
        direction = rotary.spec.inv_freq[0].sign()
        torch.testing.assert_close(cos, phase.cos().float(), rtol=0, atol=1e-6)
        torch.testing.assert_close(
            direction * sin, phase.sin(), rtol=0, atol=1e-6, check_dtype=False
        )


def test_types_of_layers_have_their_own() -> None:
    types = ["sliding_attention", "full_attention"]
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    }
    original = make_rotary("gemma3_text", layer_types=types, rope_parameters=rope)
    exact = make_exact(original, "rotary", CPU, LIMIT)
    x, near = torch.zeros(1), torch.randint(0, 256, (1, 9))
    for layer_type in types:
        given = zip(exact(x, near, layer_type), original(x, near, layer_type), strict=True)
        for angles, wanted in given:
            torch.testing.assert_close(angles, wanted, rtol=0, atol=2e-5)
    assert len(exact.rotations) == 8


def test_scaling_and_magnitude() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    original = make_rotary("olmo2", rope=yarn)
    exact = make_exact(original, "rotary", CPU, LIMIT)
    assert exact.rotations[0].spec.magnitude == original.attention_scaling > 1.0
    x, near = torch.zeros(1), torch.randint(0, 256, (1, 9))
    for angles, wanted in zip(exact(x, near), original(x, near), strict=True):
        torch.testing.assert_close(angles, wanted, rtol=0, atol=3e-5)


@pytest.mark.parametrize("limit", [LIMIT, LIMIT + 1])
def test_long_rope_goes_by_the_largest_distance(limit: int) -> None:
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.5] * 8,
        "long_factor": [3.0] * 8,
        "original_max_position_embeddings": LIMIT,
        "factor": 4.0,
    }
    original = make_rotary("llama", rope=rope, max_position_embeddings=4 * LIMIT)
    found = make_exact(original, "rotary", CPU, limit).rotations[0]
    plain = 1e4 ** (-torch.arange(0, 16, 2) / 16)
    factor = 1.5 if limit == LIMIT else 3.0
    torch.testing.assert_close(found.spec.inv_freq, (plain / factor).double(), rtol=1e-6, atol=0)


def test_dynamic_ntk_is_what_it_was_trained_with() -> None:
    original = make_rotary("llama", rope={"rope_type": "dynamic", "factor": 4.0})
    found = make_exact(original, "rotary", CPU, LIMIT).rotations[0]
    plain = 1e4 ** (-torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(found.spec.inv_freq, plain.double(), rtol=1e-6, atol=0)


class Rotary(nn.Module):
    """A module of somebody's own."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("inv_freq", torch.tensor([1.0, 0.5]))
        self.factor = factor

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple:
        angles = position_ids[..., None].float() * self.inv_freq * self.factor
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class TestOthers:
    def test_served_if_it_does_what_its_frequencies_say(self) -> None:
        found = make_exact(Rotary(), "rotary", CPU, LIMIT).rotations[0]
        assert found.spec.inv_freq.tolist() == [1.0, 0.5]

    def test_refused_if_it_does_something_else(self) -> None:
        with pytest.raises(UnsupportedError, match=r"layers\.3\.rope: .*Rotary: its cosines"):
            make_exact(Rotary(0.5), "layers.3.rope", CPU, LIMIT)

    def test_refused_if_it_is_called_otherwise(self) -> None:
        class OfLength(Rotary):
            def forward(self, seq_len: int) -> tuple:  # type: ignore[override]
                return super().forward(torch.zeros(1), torch.arange(seq_len))

        with pytest.raises(UnsupportedError, match=r"OfLength: it can't be read \(TypeError"):
            make_exact(OfLength(), "rope", CPU, LIMIT)

    def test_what_has_no_frequencies_is_none(self) -> None:
        assert not is_rotary(nn.Linear(2, 2))
