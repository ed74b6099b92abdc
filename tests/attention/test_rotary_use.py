"""Whether a layer's heads are turned by its rotary module: read from the module's own source."""

import pytest
import torch
from torch import nn

from vllm_lminf.attention.rotary import ExactRotaryEmbedding
from vllm_lminf.attention.rotary_use import check_use
from vllm_lminf.rope import RotarySpec
from vllm_lminf.startup import UnsupportedError


class Attention(nn.Module):
    """Stands around an attention layer, as a model's module does."""

    def __init__(self, windowed: bool = False) -> None:
        super().__init__()
        spec = RotarySpec(torch.ones(4, dtype=torch.float64), is_neox_style=True)
        self.rotary_emb = ExactRotaryEmbedding(spec, 8, torch.device("cpu"))
        self.windowed = windowed


class Always(Attention):
    def forward(self, positions, q, k):
        return self.rotary_emb(positions, q, k)


class InWindows(Attention):
    def forward(self, positions, q, k):
        if self.windowed:
            q, k = self.rotary_emb(positions, q, k)
        return q, k


class OutsideOfWindows(Attention):
    def forward(self, positions, q, k):
        if self.windowed:
            return q, k
        elif self.rotary_emb is not None:
            q, k = self.rotary_emb(positions, q, k)
        return q, k


class AfterAReturn(Attention):
    def forward(self, positions, q, k):
        if not self.windowed:
            return q, k
        return self.rotary_emb(positions, q, k)


class InEitherBranch(Attention):
    def forward(self, positions, q, k):
        if self.windowed:
            q, _ = self.rotary_emb(positions, q)
        else:
            q, k = self.rotary_emb(positions, q, k)
        return q, k


class InAnotherMethod(Attention):
    def forward(self, positions, q, k):
        return self._turn(positions, q, k)

    def _turn(self, positions, q, k):
        return self.rotary_emb(positions, q, k)


class Inherited(InWindows):
    pass


class BySomethingElse(Attention):
    def forward(self, positions, q, k):
        if k is not None:
            q, k = self.rotary_emb(positions, q, k)
        return q, k


class Never(Attention):
    def forward(self, positions, q, k):
        return q, k


def check(attention: Attention, head_size: int = 8) -> None:
    check_use(attention, attention.rotary_emb, "model.layers.3", head_size)


@pytest.mark.parametrize(
    "attention",
    [
        Always(),
        InWindows(windowed=True),
        OutsideOfWindows(windowed=False),
        AfterAReturn(windowed=True),
        InEitherBranch(windowed=True),
        InEitherBranch(windowed=False),
        InAnotherMethod(),
        Inherited(windowed=True),
    ],
    ids=lambda attention: f"{type(attention).__name__}-{attention.windowed}",
)
def test_used(attention: Attention) -> None:
    check(attention)


@pytest.mark.parametrize(
    "attention",
    [
        InWindows(windowed=False),
        OutsideOfWindows(windowed=True),
        AfterAReturn(windowed=False),
        Inherited(windowed=False),
        Never(),
    ],
    ids=lambda attention: type(attention).__name__,
)
def test_unused_is_refused_by_name(attention: Attention) -> None:
    name = type(attention).__name__
    with pytest.raises(
        UnsupportedError, match=rf"layer model\.layers\.3: {name} holds .*rotary_emb"
    ):
        check(attention)


def test_a_condition_on_what_is_not_known_yet_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"layer model\.layers\.3: .*not known.*'k'"):
        check(BySomethingElse())


def test_a_part_of_larger_heads_is_refused() -> None:
    """Which part, and whether anything is left between, doesn't show."""
    with pytest.raises(UnsupportedError, match=r"Always turns 8 dimensions .* in heads of 24"):
        check(Always(), head_size=24)
