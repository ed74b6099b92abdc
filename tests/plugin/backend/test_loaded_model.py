"""From a layer to the model around it."""

import pytest
import torch
from torch import nn

from tests.plugin.backend.models import Model, by_rotary_module
from vllm_lminf.errors import UnsupportedError
from vllm_lminf.plugin.backend import LambdaAttentionImpl
from vllm_lminf.plugin.loaded_model import LoadedModels


class Holder(nn.Module):
    """vLLM's attention layer, as far as it matters here: it holds an implementation."""

    def __init__(self, impl: object) -> None:
        super().__init__()
        self.impl = impl


class Impl:
    pass


def parts(**modules: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, part in modules.items():
        setattr(module, name, part)
    return module


def test_finds_the_outermost_module() -> None:
    loaded, impl = LoadedModels(), Impl()
    loaded.expect(impl)
    attention = parts(other=nn.Linear(2, 2), attn=Holder(impl))
    model = parts(model=parts(layers=nn.ModuleList([attention])), head=nn.Linear(2, 2))
    assert loaded.join(impl) is model


def test_finds_a_model_that_was_whole_before_its_layers_came() -> None:
    """As where vLLM puts its layers into Hugging Face's modules."""
    loaded, impls = LoadedModels(), [Impl(), Impl()]
    attention = [nn.Module(), nn.Module()]
    model = parts(model=parts(layers=nn.ModuleList(attention)))
    for module, impl in zip(attention, impls, strict=True):
        loaded.expect(impl)
        module.attn = Holder(impl)
    model.head = nn.Linear(2, 2)
    assert [loaded.join(impl) for impl in impls] == [model, model]


def test_two_models() -> None:
    """A draft model is built after the model, in the same process."""
    loaded, impls = LoadedModels(), [Impl(), Impl()]
    found = []
    for impl in impls:
        loaded.expect(impl)
        model = parts(model=parts(attn=Holder(impl)))
        found.append((model, loaded.join(impl)))
    assert all(model is joined for model, joined in found)


def test_listens_only_while_a_layer_is_waiting() -> None:
    hooks = nn.modules.module._global_module_registration_hooks
    before = len(hooks)
    loaded, impls = LoadedModels(), [Impl(), Impl()]
    for impl in impls:
        loaded.expect(impl)
    model = parts(a=Holder(impls[0]), b=Holder(impls[1]))
    assert len(hooks) == before + 1
    loaded.join(impls[0])
    assert len(hooks) == before + 1
    assert loaded.join(impls[1]) is model
    assert len(hooks) == before


def test_stops_listening_for_layers_that_are_gone() -> None:
    hooks = nn.modules.module._global_module_registration_hooks
    before = len(hooks)
    loaded = LoadedModels()
    loaded.expect(Impl())
    parts(a=nn.Linear(2, 2))
    assert len(hooks) == before


def test_a_layer_in_no_module_is_refused() -> None:
    loaded, impl = LoadedModels(), Impl()
    loaded.expect(impl)
    layer = Holder(impl)
    with pytest.raises(UnsupportedError, match="in no module"):
        loaded.join(layer.impl)


def test_new_weights_leave_a_ready_layer_as_it_is() -> None:
    impl: LambdaAttentionImpl = Model(by_rotary_module).load().impls[0]
    impl.make_ready(None)
    kernel = impl.kernel
    impl.process_weights_after_loading(torch.float32)
    assert impl.kernel is kernel
