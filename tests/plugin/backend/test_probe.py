"""How layers turn queries and keys: found by running them; what is no rotation is refused."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs

from tests.plugin.backend.models import HEAD_SIZE, Model, by_rotary_module, make_rope
from vllm_lminf.errors import UnsupportedError
from vllm_lminf.plugin.loaded_model import models
from vllm_lminf.plugin.rotary import ExactRotaryEmbedding


def not_at_all(attention: Any, positions: Any, query: Any, key: Any) -> tuple[Any, Any]:
    return query, key


def keys_alone(attention: Any, positions: Any, query: Any, key: Any) -> tuple[Any, Any]:
    return query, attention.rotary_emb(positions, key.clone())[0]


def one_head_not(attention: Any, positions: Any, query: Any, key: Any) -> tuple[Any, Any]:
    turned, key = attention.rotary_emb(positions, query.clone(), key)
    return torch.cat((turned[:, :-HEAD_SIZE], query[:, -HEAD_SIZE:]), dim=-1), key


def trailing_dimensions(attention: Any, positions: Any, query: Any, key: Any) -> tuple[Any, Any]:
    """As in models with heads of two parts."""

    def turn(x: torch.Tensor) -> torch.Tensor:
        heads = x.view(len(x), -1, HEAD_SIZE).roll(HEAD_SIZE // 2, dims=-1)
        turned, _ = attention.rotary_emb(positions, heads.reshape(len(x), -1))
        return turned.view(heads.shape).roll(-HEAD_SIZE // 2, dims=-1).reshape(len(x), -1)

    return turn(query), turn(key)


def norm_behind(attention: Any, positions: Any, query: Any, key: Any) -> tuple[Any, Any]:
    """A norm behind the rotation, with a weight for each dimension."""
    weight = torch.linspace(0.5, 2.0, HEAD_SIZE)
    query, key = attention.rotary_emb(positions, query, key)
    return query * weight.repeat(4), key * weight.repeat(2)


def norm_before(attention: Any, positions: Any, query: Any, key: Any) -> tuple[Any, Any]:
    weight = torch.linspace(0.5, 2.0, HEAD_SIZE)
    return attention.rotary_emb(positions, query * weight.repeat(4), key * weight.repeat(2))


def faster(attention: Any, positions: Any, query: Any, key: Any) -> tuple[Any, Any]:
    """Positions that aren't vLLM's."""
    return attention.rotary_emb(positions * 2, query, key)


def by_temperature(attention: Any, positions: Any, query: Any, key: Any) -> tuple[Any, Any]:
    query, key = attention.rotary_emb(positions, query, key)
    return query * (1 + 0.1 * torch.log1p(torch.floor(positions / 9000)))[:, None], key


def constant_factor(attention: Any, positions: Any, query: Any, key: Any) -> tuple[Any, Any]:
    query, key = attention.rotary_emb(positions, query, key)
    return query * 0.3, key


def keys_by_temperature(attention: Any, positions: Any, query: Any, key: Any) -> tuple[Any, Any]:
    query, key = attention.rotary_emb(positions, query, key)
    return query, key * (1 + 0.1 * torch.log1p(torch.floor(positions / 9000)))[:, None]


class OfFloat32(nn.Module):
    """A rotation in a model's own code, whose angles lose digits with the position."""

    def forward(self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> Any:
        frequencies = 1e4 ** (-torch.arange(0, HEAD_SIZE, 2) / HEAD_SIZE)
        angles = (positions[:, None].float() * frequencies)[:, None]

        def turn(x: torch.Tensor) -> torch.Tensor:
            first, second = x.view(len(x), -1, HEAD_SIZE).chunk(2, dim=-1)
            cos, sin = angles.cos(), angles.sin()
            return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).flatten(
                1
            )

        return turn(query), turn(key)


def settle(model: Model) -> None:
    model.load()
    models.settle(model.impls[0].engine)


@pytest.mark.parametrize("turn", [by_rotary_module, norm_before, constant_factor])
def test_rotations(turn: Any) -> None:
    model = Model(turn, turn)
    settle(model)
    exact = model.layers[0].rotary_emb
    assert isinstance(exact, ExactRotaryEmbedding)
    assert model.layers[1].rotary_emb is exact
    for impl in model.impls:
        assert impl.rotary is exact.rotations[0]
        assert impl.kernel is not None
        assert impl.watch is None
    assert not exact._forward_pre_hooks


@pytest.mark.parametrize(
    "rope",
    [
        {"partial_rotary_factor": 0.5},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
        {"rope_type": "dynamic", "factor": 4.0},
    ],
    ids=str,
)
def test_kinds_of_rotation(rope: dict[str, Any]) -> None:
    model = Model(by_rotary_module, rope=make_rope(**rope))
    settle(model)
    assert model.impls[0].rotary is model.layers[0].rotary_emb.rotations[0]


def test_each_layer_has_its_own() -> None:
    model = Model(by_rotary_module, by_rotary_module)
    model.layers[1].rotary_emb = make_rope(rope_theta=1e6)
    settle(model)
    found = [impl.rotary.spec.inv_freq for impl in model.impls]
    assert not torch.equal(*found)
    for layer, rotary in zip(model.layers, found, strict=True):
        assert torch.equal(layer.rotary_emb.spec.inv_freq, rotary)


def test_wherever_the_rotary_module_is() -> None:
    """Held by the model, and by no layer."""
    rope = make_rope()
    model = Model(lambda a, positions, query, key: model.rotary(positions, query, key), rope=rope)
    del model.layers[0].rotary_emb
    model.rotary = rope
    settle(model)
    assert isinstance(model.rotary, ExactRotaryEmbedding)
    assert model.impls[0].rotary is model.rotary.rotations[0]


@pytest.mark.parametrize(
    "turn",
    [keys_alone, one_head_not, trailing_dimensions, norm_behind, faster, keys_by_temperature],
)
def test_anything_else_is_refused_by_name(turn: Any) -> None:
    model = Model(by_rotary_module, turn)
    with pytest.raises(UnsupportedError, match=r"layer layers\.1\.attn: .* aren't rotated by"):
        settle(model)
    assert [impl.kernel for impl in model.impls] == [None, None]
    assert not model.layers[0].rotary_emb._forward_pre_hooks


def test_angles_that_lose_digits_are_refused() -> None:
    """They look like the model's rotary module near position 0, and are noise at 100,000."""
    own = OfFloat32()
    model = Model(
        by_rotary_module, lambda attention, positions, query, key: own(positions, query, key)
    )
    with pytest.raises(UnsupportedError, match=r"layer layers\.1\.attn: .* aren't rotated by"):
        settle(model)


def test_layers_that_turn_nothing_are_refused_by_name() -> None:
    model = Model(not_at_all, by_rotary_module, *[not_at_all] * 3)
    with pytest.raises(
        UnsupportedError,
        match=r"layers layers\.0\.attn, layers\.2\.attn, layers\.3\.attn and 1 more: "
        r"its queries and keys don't depend on the position",
    ):
        settle(model)


def test_layers_in_windows_need_no_rotation() -> None:
    """All their distances are true ones."""
    model = Model(not_at_all, by_rotary_module, sliding_window=64)
    settle(model)
    assert model.impls[0].rotary is None
    assert model.impls[1].rotary is model.layers[1].rotary_emb.rotations[0]


@pytest.mark.parametrize("rows", [8, 200_000])
def test_learned_positions_are_refused(rows: int) -> None:
    """However few there are: none is looked up that isn't there."""
    with pytest.raises(UnsupportedError, match="its values depend on the position"):
        settle(Model(by_rotary_module, learned=rows))


class TestAlibi:
    def test_served(self) -> None:
        model = Model(not_at_all, alibi_slopes=[0.1] * 4)
        settle(model)
        assert model.impls[0].rotary is None
        assert model.impls[0].kernel is not None

    def test_rotation_as_well_is_refused(self) -> None:
        with pytest.raises(UnsupportedError, match="ALiBi, and its queries and keys are rotated"):
            settle(Model(by_rotary_module, alibi_slopes=[0.1] * 4))


class TestFactorOnQueries:
    def test_refused_beyond_the_trained_length(self) -> None:
        with pytest.raises(UnsupportedError) as refusal:
            settle(Model(by_temperature))
        (reason,) = refusal.value.reasons
        factor = 1 + 0.1 * math.log1p(99_999 // 9000)
        assert f"({factor:.3g} at 99999); --max-model-len 8192 serves" in reason

    def test_served_within_it(self, config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(config.model_config, "max_model_len", 8192)
        model = Model(by_temperature)
        settle(model)
        assert model.impls[0].rotary is not None


def test_kinds_that_are_not_served_are_refused_if_they_are_called() -> None:
    """A part of a model that isn't run, as for images, may have any."""
    mrope = make_rope(mrope_section=[2, 3, 3])
    model = Model(by_rotary_module)
    model.for_images = nn.Module()
    model.for_images.rotary = mrope
    settle(model)
    assert model.for_images.rotary is mrope
    assert not mrope._forward_pre_hooks
    with pytest.raises(UnsupportedError, match=r"layers\.0\.rotary_emb: .*MRotaryEmbedding"):
        settle(Model(by_rotary_module, rope=mrope))
    assert not mrope._forward_pre_hooks


def test_models_that_fail_are_refused_with_the_failure() -> None:
    def fail(attention: Any, positions: Any, query: Any, key: Any) -> tuple[Any, Any]:
        if positions.max() > 1024:
            raise IndexError("a table that ends")
        return by_rotary_module(attention, positions, query, key)

    with pytest.raises(UnsupportedError, match=r"up to 99999.*IndexError\('a table that ends'\)"):
        settle(Model(fail))


def test_numbers_that_say_nothing_are_refused() -> None:
    model = Model(by_rotary_module)
    model.layers[0].qkv.weight.data.zero_()
    model.layers[0].qkv.bias.data.zero_()
    with pytest.raises(UnsupportedError, match="doesn't show: a query that is zero"):
        settle(model)


def test_more_keys_than_tokens_are_refused() -> None:
    def repeat(attention: Any, positions: Any, query: Any, key: Any) -> tuple[Any, Any]:
        query, key = by_rotary_module(attention, positions, query, key)
        return query, key.repeat(2, 1)

    with pytest.raises(UnsupportedError, match=r"layers\.0\.attn: it has a key of 16 rows for 8"):
        settle(Model(repeat))


def test_models_that_are_called_otherwise_are_refused() -> None:
    class Recurrent(Model):
        def forward(self, input_ids: torch.Tensor, state: torch.Tensor) -> None:  # type: ignore[override]
            raise AssertionError

    with pytest.raises(UnsupportedError, match=r"Recurrent isn't .*but with input_ids, state"):
        settle(Recurrent(by_rotary_module))


def test_layers_that_are_not_run_are_refused() -> None:
    class Shallow(Model):
        def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> Any:  # type: ignore[override]
            return self.layers[0](positions, self.embed_tokens(input_ids))

    with pytest.raises(UnsupportedError, match=r"layer layers\.1\.attn: not run"):
        settle(Shallow(by_rotary_module, by_rotary_module))


def test_what_an_engine_left_that_failed_to_start_is_dropped(model_path: str) -> None:
    other = EngineArgs(model=model_path, attention_backend="LMINF").create_engine_config()
    with set_current_vllm_config(other):
        abandoned = Model(not_at_all).load()
    model = Model(by_rotary_module)
    settle(model)
    assert model.impls[0].kernel is not None
    assert abandoned.impls[0].kernel is None


def test_a_layer_that_was_not_settled_does_not_run() -> None:
    impl = Model(by_rotary_module).load().impls[0]
    with pytest.raises(RuntimeError, match="before it was known"):
        impl.do_kv_cache_update(None, *[torch.empty(0)] * 4)
