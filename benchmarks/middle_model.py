"""A Llama in Hugging Face's code whose attention is a Λ with its middle recalled: for studies.

Queries and keys reach the attention, and the cache, without rotation. Rows are taken in tiles, so
that long prompts fit, and no score is computed that no row needs. A test compares it with the
oracle.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AutoTokenizer, DynamicCache, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from vllm_lminf.middle import Middle
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.rope import RotationTables, rotate

_TILE = 128
"""Rows whose scores are held at a time."""


@dataclass
class Seen:
    """What the attention of one layer was asked.

    Attributes:
        layer: counted from 1.
        query: not rotated; [num_queries, num_heads, head_size]: the latest tokens.
        key: not rotated; [num_keys, num_kv_heads, head_size].
    """

    layer: int
    query: torch.Tensor
    key: torch.Tensor


class StudiedLlama:
    """A model, float32, and the cache of one sequence at a time.

    Attributes:
        pattern: what rows see anyway.
        tables: the model's rotation.
        num_layers, num_kv_heads, head_size: the model's.
    """

    def __init__(self, path: Path, pattern: LambdaPattern) -> None:
        self.pattern = pattern
        self._path = path
        self._model: Any = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
        config = self._model.config
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        inv_freq = 1.0 / config.rope_parameters["rope_theta"] ** exponents
        self.tables = RotationTables(inv_freq)
        self.num_layers: int = config.num_hidden_layers
        self.num_kv_heads: int = config.num_key_value_heads
        self.head_size: int = config.head_dim
        self._cache = DynamicCache()
        self._middle: Middle | None = None
        self._first_row = 0
        self._seen: list[Seen] | None = None

    @cached_property
    def tokenizer(self) -> Any:
        """The model's."""
        return AutoTokenizer.from_pretrained(self._path)

    @property
    def num_tokens(self) -> int:
        """Tokens in the cache."""
        return int(self._cache.get_seq_length())

    def start(self) -> None:
        """Empties the cache."""
        self._cache = DynamicCache()

    def go_back(self, num_tokens: int) -> None:
        """Leaves so many tokens in the cache."""
        if surplus := self.num_tokens - num_tokens:
            self._cache.crop(-surplus)

    @torch.inference_mode()
    def run(
        self,
        token_ids: list[int],
        middle: Middle | None = None,
        first_row: int = 0,
        num_logits: int = 1,
        chunk: int = 2048,
    ) -> torch.Tensor:
        """Computes tokens behind those in the cache.

        Args:
            token_ids: the tokens.
            middle: what is recalled; None for nothing.
            first_row: the position from which on queries look.
            num_logits: of how many of the last tokens logits are returned.
            chunk: most tokens of a forward pass before the last, which has num_logits.

        Returns:
            float32 [num_logits, vocabulary].
        """
        self._middle, self._first_row = middle, first_row
        behind = max(0, len(token_ids) - num_logits)
        with self._attention():
            for start in range(0, behind, chunk):
                self._forward(token_ids[start : min(start + chunk, behind)], 1)
            return self._forward(token_ids[behind:], num_logits)

    def watch(self, token_ids: list[int]) -> Iterator[Seen]:
        """What the layers are asked when these tokens come behind those in the cache."""
        self._seen = []
        self.run(token_ids, num_logits=len(token_ids))
        seen, self._seen = self._seen, None
        return iter(seen)

    def _forward(self, token_ids: list[int], num_logits: int) -> torch.Tensor:
        tokens = torch.tensor([token_ids])
        output = self._model(
            tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=num_logits
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    @contextmanager
    def _attention(self) -> Iterator[None]:
        """Makes Llama hand queries and keys without rotation to the attention of this class."""
        AttentionInterface.register("lminf_studied", self._attend)
        self._model.set_attn_implementation("lminf_studied")
        original = modeling_llama.apply_rotary_pos_emb
        modeling_llama.apply_rotary_pos_emb = lambda q, k, cos, sin, **_: (q, k)
        try:
            yield
        finally:
            modeling_llama.apply_rotary_pos_emb = original

    def _attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        **_: object,
    ) -> tuple[torch.Tensor, None]:
        layer = int(module.layer_idx) + 1  # type: ignore[arg-type]
        if self._seen is not None:
            self._seen.append(Seen(layer, query[0].transpose(0, 1), key[0].transpose(0, 1)))
        middle = self._middle
        if middle is not None and not middle.recalls(layer):
            middle = None
        output = attend(
            query[0], key[0], value[0], self.pattern, self.tables, scaling, middle, self._first_row
        )
        return output.transpose(0, 1)[None], None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: LambdaPattern,
    tables: RotationTables,
    scale: float,
    middle: Middle | None,
    first_row: int,
) -> torch.Tensor:
    """Attention of a sequence's latest tokens.

    Args:
        query: not rotated; [num_heads, num_queries, head_size].
        key: not rotated; [num_kv_heads, num_keys, head_size]; row j is position j.
        value: the same shape.
        pattern: what rows see anyway.
        tables: the rotation; pairs are NeoX's.
        scale: factor on every score.
        middle: what is recalled; None for nothing.
        first_row: the position from which on queries look.

    Returns:
        [num_heads, num_queries, head_size].
    """
    num_heads, num_queries = query.shape[:2]
    num_kv_heads, num_keys = key.shape[:2]
    start, near_start = num_keys - num_queries, pattern.window_start(num_keys - num_queries)
    query = query.unflatten(0, (num_kv_heads, num_heads // num_kv_heads))
    near_query = turn(query, torch.arange(start, num_keys), tables)
    near_key = turn(key[:, near_start:], torch.arange(near_start, num_keys), tables)
    output = torch.empty_like(query)
    for begin in range(0, num_queries, _TILE):
        rows = slice(begin, min(begin + _TILE, num_queries))
        i = torch.arange(start + rows.start, start + rows.stop)
        window = slice(pattern.window_start(int(i[0])), int(i[-1]) + 1)
        keys = near_key[:, window.start - near_start : window.stop - near_start]
        local, lse = _window(near_query[:, :, rows], keys, value[:, window], i, pattern, scale)
        parts = []
        if behind := min(pattern.n_global, pattern.window_start(int(i[-1]))):
            scores = _global_products(
                query[:, :, rows], near_query[:, :, rows], key[:, :behind], i, pattern, tables
            )
            parts.append((scores, value[:, None, None, :behind]))
        hidden = pattern.middle(int(i[-1]))
        if middle is not None and hidden and int(i[-1]) >= first_row:
            products = _middle_products(
                query[:, :, rows], key, i, hidden, pattern, middle.distance, first_row, tables
            )
            best, columns = _best(products, middle, hidden.start)
            heads = torch.arange(num_kv_heads)[:, None, None, None]
            parts.append((best, value[heads, columns + hidden.start]))
        output[:, :, rows] = _joined(local, lse, parts, scale)
    return output.flatten(0, 1)


def _joined(
    local: torch.Tensor,
    lse: torch.Tensor,
    parts: list[tuple[torch.Tensor, torch.Tensor]],
    scale: float,
) -> torch.Tensor:
    """One softmax over a window, [kv_heads, group, rows, head_size] with its log-sum-exp, and other
    keys: their products [kv_heads, group, rows, keys] and their values."""
    scores = [products * scale for products, _ in parts]
    joint = torch.cat([lse[..., None], *scores], dim=-1).logsumexp(dim=-1)
    total = (lse - joint).exp()[..., None] * local
    for part, (_, values) in zip(scores, parts, strict=True):
        weights = (part - joint[..., None]).exp()[..., None, :]
        total = total + (weights @ values)[..., 0, :]
    return total


def _window(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    i: torch.Tensor,
    pattern: LambdaPattern,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of rows at ``i`` to rotated keys that end with the last of them, and its
    log-sum-exp."""
    group, rows = query.shape[1:3]
    difference = i[:, None] - torch.arange(int(i[-1]) + 1 - key.shape[1], int(i[-1]) + 1)
    bias = torch.zeros_like(difference, dtype=query.dtype)
    bias.masked_fill_((difference < 0) | (difference >= pattern.n_local), -torch.inf)
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query.flatten(1, 2)[None],
        key[None],
        value[None],
        attn_mask=bias.repeat(group, 1)[None, None],
        scale=scale,
    )
    return output[0].unflatten(1, (group, rows)), lse[0].unflatten(1, (group, rows))


def turn(x: torch.Tensor, positions: torch.Tensor, tables: RotationTables) -> torch.Tensor:
    """``x`` [..., tokens, head_size] turned by ``positions`` [tokens]."""
    cos, sin = tables(positions)
    return rotate(x[..., None, :], cos, sin, is_neox_style=True)[..., 0, :]


def _products(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Of [kv_heads, group, rows, head_size] and [kv_heads, keys, head_size]."""
    rows = query.flatten(1, 2) @ key.transpose(1, 2)
    return rows.unflatten(1, query.shape[1:3])


def _global_products(
    query: torch.Tensor,
    near_query: torch.Tensor,
    key: torch.Tensor,
    i: torch.Tensor,
    pattern: LambdaPattern,
    tables: RotationTables,
) -> torch.Tensor:
    """Products of rows at ``i`` with global keys; minus infinity inside a row's window."""
    j = torch.arange(key.shape[1])
    near = _products(near_query, turn(key, j, tables))
    far = _products(turn(query, torch.full_like(i, pattern.distance_limit), tables), key)
    difference = i[:, None] - j
    products = torch.where(difference > pattern.distance_limit, far, near)
    return products.masked_fill(difference < pattern.n_local, -torch.inf)


def _middle_products(
    query: torch.Tensor,
    key: torch.Tensor,
    i: torch.Tensor,
    hidden: range,
    pattern: LambdaPattern,
    distance: int,
    first_row: int,
    tables: RotationTables,
) -> torch.Tensor:
    """Products of rows at ``i`` with the keys at ``hidden``; minus infinity where a row doesn't
    look, or sees the key anyway."""
    turned = turn(query, torch.full_like(i, distance), tables)
    products = _products(turned, key[:, hidden.start : hidden.stop])
    seen = i[:, None] - torch.arange(hidden.start, hidden.stop) < pattern.n_local
    return products.masked_fill_(seen | (i < first_row)[:, None], -torch.inf)


def _best(products: torch.Tensor, middle: Middle, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Products of the best units' keys, and their columns.

    Args:
        products: [kv_heads, group, rows, keys]; minus infinity where a row has no middle key.
        middle: what a unit is, and how many are recalled.
        start: position of the first key.
    """
    size = middle.block_size
    if size == 1:
        best = products.topk(min(middle.top_k, products.shape[-1]), dim=-1)
        return best.values, best.indices
    before = start % size
    padded = F.pad(products, (before, -(before + products.shape[-1]) % size), value=-torch.inf)
    ranks = padded.unflatten(-1, (-1, size)).amax(dim=-1).amax(dim=1, keepdim=True)
    blocks = ranks.topk(min(middle.top_k, ranks.shape[-1]), dim=-1).indices
    columns = (
        (blocks[..., None] * size + torch.arange(size))
        .flatten(-2)
        .expand_as(torch.empty(*products.shape[:3], blocks.shape[-1] * size))
    )
    columns_inside = (columns - before).clamp(0, products.shape[-1] - 1)
    return padded.gather(-1, columns), columns_inside
