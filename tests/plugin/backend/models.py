"""Models of one or more attention layers, small enough to see through, as vLLM builds and calls
them: tokens and positions in, the backend's own layers within."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.rotary_embedding import get_rope

from vllm_lminf.plugin.backend import LambdaAttentionImpl

HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 16

Turn = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], tuple[Any, Any]]
"""``turn(attention, positions, query, key)``: what a model does with a layer's raw queries and
keys, each [num_tokens, heads * head_size]."""


def make_rope(**parameters: Any) -> nn.Module:
    """vLLM's rotary module for such heads, with a table of 1024 positions."""
    rope = {"rope_theta": 1e4, "rope_type": "default", **parameters}
    return get_rope(HEAD_SIZE, 1024, True, rope, dtype=torch.float32)


def by_rotary_module(attention: Any, positions: Any, query: Any, key: Any) -> tuple[Any, Any]:
    """As nearly all models do."""
    turned: tuple[Any, Any] = attention.rotary_emb(positions, query, key)
    return turned


class Layer(nn.Module):
    """Stands for vLLM's attention layer, which holds the backend's."""

    def __init__(self, name: str, **arguments: Any) -> None:
        super().__init__()
        self.layer_name = name
        self.impl = LambdaAttentionImpl(
            HEADS, HEAD_SIZE, 0.25, **{"num_kv_heads": KV_HEADS, **arguments}
        )

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        heads = [x.view(len(x), -1, HEAD_SIZE) for x in (query, key, value)]
        output = torch.full_like(heads[0], torch.nan)
        return self.impl.forward(self, *heads, torch.empty(0), None, output).flatten(1)


class Attention(nn.Module):
    """Stands around it."""

    def __init__(self, name: str, turn: Turn, rope: nn.Module | None, **arguments: Any) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, (HEADS + 2 * KV_HEADS) * HEAD_SIZE)
        self.out = nn.Linear(HEADS * HEAD_SIZE, 32, bias=False)
        self.turn = turn
        if rope is not None:
            self.rotary_emb = rope
        self.attn = Layer(f"{name}.attn", **arguments)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        sizes = [HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE]
        query, key, value = self.qkv(hidden_states).split(sizes, dim=-1)
        query, key = self.turn(self, positions, query, key)
        return hidden_states + self.out(self.attn(query, key, value))


class Model(nn.Module):
    """A decoder; one layer for each function that turns its queries and keys."""

    def __init__(
        self, *turns: Turn, rope: nn.Module | None = None, learned: int = 0, **arguments: Any
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(100_000, 32)
        self.positions = nn.Embedding(learned, 32) if learned else None
        rope = make_rope() if rope is None else rope
        self.layers = nn.ModuleList(
            Attention(f"layers.{i}", turn, rope, **arguments) for i, turn in enumerate(turns)
        )

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: None = None,
    ) -> torch.Tensor:
        hidden_states = self.embed_tokens(input_ids)
        if self.positions is not None:
            hidden_states = hidden_states + self.positions(positions)
        for layer in self.layers:
            hidden_states = layer(positions, hidden_states)
        return hidden_states

    def load(self) -> "Model":
        """What vLLM does once weights are there."""
        for layer in self.layers:
            layer.attn.impl.process_weights_after_loading(torch.float32)
        return self

    @property
    def impls(self) -> list[LambdaAttentionImpl]:
        return [layer.attn.impl for layer in self.layers]
