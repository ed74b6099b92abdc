"""Models that vLLM runs in Hugging Face's code: what is found there, and what takes its place."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from vllm_lminf.attention.hugging_face import MODEL_TYPES, is_hugging_face, make_exact
from vllm_lminf.pattern import MAX_POSITION
from vllm_lminf.startup import UnsupportedError

CPU = torch.device("cpu")


def make_decoder(model_type: str, **rope: Any) -> nn.Module:
    config = transformers.AutoConfig.for_model(
        model_type,
        vocab_size=8,
        hidden_size=64,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        pad_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4} | rope,
    )
    return transformers.AutoModel.from_config(config, dtype=torch.float32)


def attention_modules(decoder: nn.Module) -> list[nn.Module]:
    return [m for n, m in decoder.named_modules() if n.endswith(("self_attn", "attention"))]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_same_angles_exact_at_any_position(model_type: str) -> None:
    decoder = make_decoder(model_type)
    original = decoder.rotary_emb
    first, second = attention_modules(decoder)
    assert is_hugging_face(first)
    exact = make_exact(first, "layer", CPU)
    assert decoder.rotary_emb is exact
    assert make_exact(second, "layer", CPU) is exact
    assert exact.spec.is_neox_style == (model_type != "glm")

    x = torch.zeros(1)
    near = torch.randint(0, 256, (1, 9))
    for angles, wanted in zip(exact(x, near), original(x, near), strict=True):
        torch.testing.assert_close(angles, wanted, rtol=0, atol=2e-5)
    far = torch.tensor([[10**6, 10**9, MAX_POSITION]])
    phase = (far[0, :, None].double() * original.inv_freq.double()).repeat(1, 2)
    cos, sin = exact(x, far)
    torch.testing.assert_close(cos[0], phase.cos().float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(sin[0], phase.sin().float(), rtol=0, atol=1e-6)


def test_every_decoder_has_its_own() -> None:
    decoders = [make_decoder("phi"), make_decoder("phi", rope_theta=1e6)]
    exact = [make_exact(attention_modules(d)[0], "layer", CPU) for d in decoders]
    assert [d.rotary_emb for d in decoders] == exact
    assert not torch.equal(exact[0].spec.inv_freq, exact[1].spec.inv_freq)


def test_scaling_and_magnitude() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    decoder = make_decoder("olmo2", **yarn)
    original = decoder.rotary_emb
    exact = make_exact(attention_modules(decoder)[0], "layer", CPU)
    assert exact.spec.magnitude == original.attention_scaling > 1.0
    x, near = torch.zeros(1), torch.randint(0, 256, (1, 9))
    for angles, wanted in zip(exact(x, near), original(x, near), strict=True):
        torch.testing.assert_close(angles, wanted, rtol=0, atol=3e-5)


def test_other_models_are_refused_by_name() -> None:
    """SmolLM3 has layers that don't rotate, which its modules don't show."""
    attention = attention_modules(make_decoder("smollm3"))[0]
    with pytest.raises(UnsupportedError, match=r"layer model\.layers\.0.*\(smollm3\)"):
        make_exact(attention, "model.layers.0.self_attn.attn", CPU)


def test_other_rotations_are_refused_by_name() -> None:
    decoder = make_decoder("olmo2", rope_type="dynamic", factor=2.0)
    with pytest.raises(UnsupportedError, match="'dynamic' is not served"):
        make_exact(attention_modules(decoder)[0], "layer", CPU)


def test_attention_outside_of_a_decoder_is_refused() -> None:
    decoder = make_decoder("phi")
    attention = attention_modules(decoder)[0]
    decoder.layers = nn.ModuleList()
    with pytest.raises(UnsupportedError, match="no rotary module in the modules around"):
        make_exact(attention, "layer", CPU)
