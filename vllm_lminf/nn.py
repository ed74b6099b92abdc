"""LM-Infinite's attention as a plain torch module: differentiable, in linear memory, without vLLM.

Queries are taken in tiles. The keys that a tile sees, its window and the global keys behind it,
share one softmax. Both passes hold the scores of one tile at a time, and between the passes only
q, k and v are kept: the backward computes every tile's scores again.
"""

import functools
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from vllm_lminf.pattern import MAX_POSITION, LambdaPattern, shown
from vllm_lminf.rope import RotationTables, rotate

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_MAX_SCORES = 2**22
"""Scores of a tile, over all heads and sequences. A backward holds up to ten tensors of that size,
some 150 MB in float32."""
_MIN_ROWS = 16
"""Rows of a tile, however many heads and sequences there are: fewer make slow products."""


class LMInfinite(torch.nn.Module):
    """Λ-shaped attention with RoPE and a limit on distances (LM-Infinite, arXiv 2308.16137).

    A query at position ``i`` sees the key at ``j <= i`` where ``j < n_global`` or
    ``i - j < n_local``, and scores it at the distance ``min(i - j, distance_limit)``. For the
    first ``n_local`` tokens that is plain causal attention with RoPE. However long its input, a
    model meets no larger distance than ``distance_limit`` and no more than
    ``n_global + n_local`` keys at a time.

    Memory grows linearly with the length, in the forward and in the backward. There are no
    parameters and no buffers: projections are the caller's, and q and k come without RoPE.
    ``torch.compile`` takes the attention as one operator.

    Example:
        >>> attention = LMInfinite(d_model=256, n_global=10, l_pretrain=2048, num_heads=4)
        >>> q, k, v = torch.randn(3, 1, 5000, 256, requires_grad=True)
        >>> attention(q, k, v).shape
        torch.Size([1, 5000, 256])

    Args:
        d_model: width of q, k and v; each head owns ``d_model / num_heads`` neighbours of it.
        n_global: how many of the first tokens every token sees; the paper takes 10 to 100, and 0
            is a plain sliding window.
        l_pretrain: tokens of context that the model was trained with.
        num_heads: heads that d_model is split into.
        n_local: how many of the latest tokens a token sees, itself included. Default: l_pretrain.
        distance_limit: no pair is scored at a larger distance; n_local or more. Default:
            l_pretrain.
        rope_theta: base of RoPE's frequencies.
        is_neox_style: pairs of rotated dimensions are (k, k + head_size / 2) when true (NeoX,
            LLaMA), (2k, 2k + 1) otherwise (GPT-J).
        scale: factor on every score. Default: ``head_size ** -0.5``.

    Raises:
        ValueError: arguments that can't be honoured; the message names every one.
    """

    def __init__(
        self,
        d_model: int,
        n_global: int,
        l_pretrain: int,
        num_heads: int = 1,
        *,
        n_local: int | None = None,
        distance_limit: int | None = None,
        rope_theta: float = 10000.0,
        is_neox_style: bool = True,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        problems = [
            *_heads_problems(d_model, num_heads),
            *_lengths_problems(n_global, l_pretrain, n_local, distance_limit),
            *_factor_problems("rope_theta", rope_theta),
            *([] if scale is None else _factor_problems("scale", scale)),
        ]
        if problems:
            raise ValueError(f"LMInfinite can't be built: {'; '.join(problems)}")
        self.d_model = d_model
        self.num_heads = num_heads
        self.pattern = LambdaPattern(
            n_global,
            l_pretrain if n_local is None else n_local,
            l_pretrain if distance_limit is None else distance_limit,
        )
        self.rope_theta = float(rope_theta)
        self.is_neox_style = is_neox_style
        self.scale = (d_model // num_heads) ** -0.5 if scale is None else float(scale)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention of every token over the tokens that it sees; the first token has position 0.

        Args:
            q: queries, not rotated; shape [batch, seq, d_model], float64, float32, bfloat16 or
                float16. Products are formed in this dtype, the softmax in float32 or wider.
            k: keys, not rotated; q's shape, dtype and device.
            v: values; q's shape, dtype and device.

        Returns:
            Shape [batch, seq, d_model], in q's dtype. It can be differentiated once.

        Raises:
            ValueError: shapes, dtypes or devices that don't fit; the message names every one.
        """
        if problems := _tensor_problems({"q": q, "k": k, "v": v}, self.d_model):
            raise ValueError(f"LMInfinite can't attend: {'; '.join(problems)}")
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)) for x in (q, k, v))
        output: torch.Tensor = torch.ops.lminf.tiled_attention(
            q,
            k,
            v,
            self.pattern.n_global,
            self.pattern.n_local,
            self.pattern.distance_limit,
            self.rope_theta,
            self.is_neox_style,
            self.scale,
        )
        return output.flatten(-2)

    def extra_repr(self) -> str:
        """The settings, as ``print`` shows them."""
        return (
            f"d_model={self.d_model}, num_heads={self.num_heads}, "
            f"n_global={self.pattern.n_global}, n_local={self.pattern.n_local}, "
            f"distance_limit={self.pattern.distance_limit}, rope_theta={self.rope_theta}, "
            f"is_neox_style={self.is_neox_style}, scale={self.scale:.6g}"
        )


def _is_whole(value: object, minimum: int) -> bool:
    if isinstance(value, bool) or not isinstance(value, int):
        return False
    return minimum <= value <= MAX_POSITION


def _whole_problems(values: dict[str, int], minimum: int) -> list[str]:
    return [
        f"{name} is {shown(value)}: it must be a whole number, {minimum} or more, and "
        f"{MAX_POSITION} at most"
        for name, value in values.items()
        if not _is_whole(value, minimum)
    ]


def _heads_problems(d_model: int, num_heads: int) -> list[str]:
    if problems := _whole_problems({"d_model": d_model, "num_heads": num_heads}, 1):
        return problems
    if d_model % num_heads:
        return [f"d_model is {d_model}: it must be a multiple of num_heads, which is {num_heads}"]
    if (head_size := d_model // num_heads) % 2:
        return [
            f"d_model is {d_model} and num_heads is {num_heads}, so heads have {head_size} "
            "dimensions: it must be an even number, because RoPE rotates pairs of them"
        ]
    return []


def _lengths_problems(
    n_global: int, l_pretrain: int, n_local: int | None, distance_limit: int | None
) -> list[str]:
    given = {"l_pretrain": l_pretrain}
    if n_local is not None:
        given["n_local"] = n_local
    if distance_limit is not None:
        given["distance_limit"] = distance_limit
    problems = _whole_problems({"n_global": n_global}, 0) + _whole_problems(given, 1)
    window, limit = given.get("n_local", l_pretrain), given.get("distance_limit", l_pretrain)
    if _is_whole(window, 1) and _is_whole(limit, 1) and limit < window:
        problems.append(
            f"distance_limit is {limit}, below n_local, which is {window}: it must be n_local or "
            "more, or keys inside the window would be scored at a distance that is not theirs "
            "(both default to l_pretrain)"
        )
    return problems


def _factor_problems(name: str, value: float) -> list[str]:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and 0 < value <= sys.float_info.max:
        return []
    return [f"{name} is {shown(value)}: it must be a finite number above 0"]


def _tensor_problems(tensors: dict[str, torch.Tensor], d_model: int) -> list[str]:
    problems = [
        f"{name} has the shape {list(x.shape)}: it must be [batch, seq, {d_model}]"
        for name, x in tensors.items()
        if x.dim() != 3 or x.shape[-1] != d_model
    ]
    if not problems and any(x.shape != tensors["q"].shape for x in tensors.values()):
        shapes = ", ".join(f"{name} has {list(x.shape)}" for name, x in tensors.items())
        problems.append(f"shapes differ: {shapes}")
    problems += [
        f"{name} is {x.dtype}: it must be one of {', '.join(map(str, _DTYPES))}"
        for name, x in tensors.items()
        if x.dtype not in _DTYPES
    ]
    if any(x.dtype != tensors["q"].dtype for x in tensors.values()):
        dtypes = ", ".join(f"{name} is {x.dtype}" for name, x in tensors.items())
        problems.append(f"dtypes differ: {dtypes}")
    if any(x.device != tensors["q"].device for x in tensors.values()):
        devices = ", ".join(f"{name} is on {x.device}" for name, x in tensors.items())
        problems.append(f"devices differ: {devices}")
    return problems


@dataclass(frozen=True)
class _Rope:
    """RoPE over all dimensions of a head."""

    theta: float
    is_neox_style: bool

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """``x`` [batch, tokens, num_heads, head_size] rotated by ``positions`` [tokens]."""
        return rotate(x, *self._angles(x, positions), self.is_neox_style)

    def rotate_back(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The inverse of `rotate`, which is also its gradient."""
        cos, sin = self._angles(x, positions)
        return rotate(x, cos, -sin, self.is_neox_style)

    def _angles(
        self, x: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        head_size = x.shape[-1]
        if x.dtype == torch.float64:
            # The tables are float32. A float64 product is good to 1e-6 rad up to their end too.
            inv_freq = _inv_freq(head_size, self.theta).to(x.device)
            angles = positions.to(torch.float64)[:, None] * inv_freq
            return angles.cos(), angles.sin()
        cos, sin = _rotation_tables(head_size, self.theta, x.device)(positions)
        return cos, sin


def _inv_freq(head_size: int, theta: float) -> torch.Tensor:
    """Radians per position of every pair; float64 of shape [head_size / 2], on the CPU."""
    exponents = torch.arange(0, head_size, 2, dtype=torch.float64, device="cpu") / head_size
    return theta**-exponents


@functools.lru_cache(maxsize=16)
def _rotation_tables(head_size: int, theta: float, device: torch.device) -> RotationTables:
    """Tables that all layers of a model share.

    They aren't a module's buffers, because ``module.to(torch.bfloat16)`` would round them.
    """
    return RotationTables(_inv_freq(head_size, theta), device)


@dataclass(frozen=True)
class _Tile:
    """Consecutive queries and the keys that they see, as ranges of positions.

    A global key within the limit of some queries and beyond that of others is in two ranges.

    Attributes:
        queries: the tile's rows.
        clamped: global keys beyond the distance limit of the last query.
        middle: global keys behind the window of the first query, but within its limit.
        window: keys from the window of the first query up to the last query.
    """

    queries: range
    clamped: range
    middle: range
    window: range

    @property
    def columns(self) -> tuple[range, range, range]:
        """The keys in the order in which a tile has them."""
        return self.clamped, self.middle, self.window

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of ``x`` [batch, seq, ...] that the columns stand for."""
        return torch.cat([x[:, _rows(keys)] for keys in self.columns], dim=1)

    def scatter_add(self, total: torch.Tensor, columns: torch.Tensor) -> None:
        """Adds columns to the rows of ``total`` [batch, seq, ...] that they stand for."""
        parts = columns.split([len(keys) for keys in self.columns], dim=1)
        for keys, part in zip(self.columns, parts, strict=True):
            total[:, _rows(keys)] += part


def _rows(positions: range) -> slice:
    return slice(positions.start, positions.stop)


def _positions(ranges: Iterable[range], device: torch.device) -> torch.Tensor:
    return torch.cat([torch.arange(keys.start, keys.stop, device=device) for keys in ranges])


def _tiles(query: torch.Tensor, pattern: LambdaPattern) -> Iterator[_Tile]:
    """Tiles over all queries, in order; ``query`` has the shape [batch, seq, num_heads, head_size].

    Example: ``n_global=3, n_local=4, distance_limit=6``, a tile of the queries 8 to 11. Their
    windows start at 5 or later. Key 2 is within the limit of query 8, and all three global keys
    are beyond that of query 11: ``clamped=range(3), middle=range(2, 3), window=range(5, 12)``.
    """
    batch, seq, num_heads, _ = query.shape
    columns = min(seq, pattern.n_global + pattern.n_local)
    fitting = _MAX_SCORES // max(1, batch * num_heads * columns)
    # Rows beyond a quarter of the window would mostly add pairs that the mask hides.
    rows = max(_MIN_ROWS, min(fitting, max(64, pattern.n_local // 4)))
    for start in range(0, seq, rows):
        end = min(start + rows, seq)
        behind, window = pattern.intervals(start)
        reach = max(0, start - pattern.distance_limit)
        yield _Tile(
            queries=range(start, end),
            clamped=range(min(pattern.n_global, max(0, end - 1 - pattern.distance_limit))),
            middle=range(reach, max(reach, behind.stop)),
            window=range(window.start, end),
        )


@dataclass(frozen=True)
class _Scored:
    """One tile after its softmax. The distance of its first ``num_clamped`` columns is the limit.

    Attributes:
        query: rotated by ``query_positions``; [batch, rows, num_heads, head_size].
        clamped_query: the same queries rotated by the distance limit.
        key: rotated by ``key_positions``; [batch, columns, num_heads, head_size].
        value: same shape.
        weights: float32 or wider; [batch, num_heads, rows, columns].
        query_positions: [rows].
        clamped_positions: the distance limit for every row.
        key_positions: [columns]; 0 for the clamped ones.
        num_clamped: see above.
        rope: the rotation.
        scale: the factor on scores.
    """

    query: torch.Tensor
    clamped_query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    weights: torch.Tensor
    query_positions: torch.Tensor
    clamped_positions: torch.Tensor
    key_positions: torch.Tensor
    num_clamped: int
    rope: _Rope
    scale: float

    def output(self) -> torch.Tensor:
        """Shape [batch, rows, num_heads, head_size]."""
        return torch.einsum("bhij,bjhd->bihd", self.weights.to(self.value.dtype), self.value)

    def gradients(self, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the tile's queries, keys and values, before rotation; ``grad`` is the output's."""
        weights, num_clamped = self.weights, self.num_clamped
        grad_value = torch.einsum("bhij,bihd->bjhd", weights.to(grad.dtype), grad)
        grad_weights = torch.einsum("bihd,bjhd->bhij", grad, self.value).to(weights.dtype)
        mean = (weights * grad_weights).sum(dim=-1, keepdim=True)
        grad_scores = grad_weights.sub_(mean).mul_(weights).mul_(self.scale).to(grad.dtype)
        clamped, near = grad_scores[..., :num_clamped], grad_scores[..., num_clamped:]
        clamped_query = torch.einsum("bhij,bjhd->bihd", clamped, self.key[:, :num_clamped])
        near_query = torch.einsum("bhij,bjhd->bihd", near, self.key[:, num_clamped:])
        clamped_key = torch.einsum("bhij,bihd->bjhd", clamped, self.clamped_query)
        near_key = torch.einsum("bhij,bihd->bjhd", near, self.query)
        return (
            self.rope.rotate_back(near_query, self.query_positions)
            + self.rope.rotate_back(clamped_query, self.clamped_positions),
            self.rope.rotate_back(torch.cat((clamped_key, near_key), dim=1), self.key_positions),
            grad_value,
        )


def _score(
    tile: _Tile,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: LambdaPattern,
    rope: _Rope,
    scale: float,
) -> _Scored:
    """Rotates a tile's queries and keys and computes its softmax; see `_tiled_attention`."""
    num_clamped = len(tile.clamped)
    i = _positions([tile.queries], query.device)
    j = _positions(tile.columns, query.device)
    clamped_positions = torch.full_like(i, pattern.distance_limit)
    key_positions = torch.cat((torch.zeros_like(j[:num_clamped]), j[num_clamped:]))
    rows = query[:, _rows(tile.queries)]
    near_query, clamped_query = rope.rotate(rows, i), rope.rotate(rows, clamped_positions)
    rotated_key = rope.rotate(tile.gather(key), key_positions)
    scores = torch.cat(
        (
            torch.einsum("bihd,bjhd->bhij", clamped_query, rotated_key[:, :num_clamped]),
            torch.einsum("bihd,bjhd->bhij", near_query, rotated_key[:, num_clamped:]),
        ),
        dim=-1,
    ).to(torch.promote_types(query.dtype, torch.float32))

    difference = i[:, None] - j
    beyond = difference > pattern.distance_limit
    visible = (difference >= 0) & ((j < pattern.n_global) | (difference < pattern.n_local))
    in_column = torch.cat((beyond[:, :num_clamped], ~beyond[:, num_clamped:]), dim=1)
    scores.mul_(scale).masked_fill_(~(visible & in_column), -math.inf)
    return _Scored(
        query=near_query,
        clamped_query=clamped_query,
        key=rotated_key,
        value=tile.gather(value),
        weights=scores.softmax(dim=-1),
        query_positions=i,
        clamped_positions=clamped_positions,
        key_positions=key_positions,
        num_clamped=num_clamped,
        rope=rope,
        scale=scale,
    )


@torch.library.custom_op("lminf::tiled_attention", mutates_args=())
def _tiled_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    n_global: int,
    n_local: int,
    distance_limit: int,
    rope_theta: float,
    is_neox_style: bool,
    scale: float,
) -> torch.Tensor:
    """Λ-attention over [batch, seq, num_heads, head_size].

    An operator of its own, so that a compiler need not unroll the tiles.
    """
    pattern = LambdaPattern(n_global, n_local, distance_limit)
    rope = _Rope(rope_theta, is_neox_style)
    output = torch.empty_like(query)
    with torch.autocast(query.device.type, enabled=False):
        for tile in _tiles(query, pattern):
            # No name holds a tile's scores, or they would stand beside those of the next.
            output[:, _rows(tile.queries)] = _score(
                tile, query, key, value, pattern, rope, scale
            ).output()
    return output


@torch.library.custom_op("lminf::tiled_attention_backward", mutates_args=())
def _tiled_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    n_global: int,
    n_local: int,
    distance_limit: int,
    rope_theta: float,
    is_neox_style: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, in their dtypes; grad is the output's."""
    pattern = LambdaPattern(n_global, n_local, distance_limit)
    rope = _Rope(rope_theta, is_neox_style)
    # A global key gets a term from every tile, too many for a sum in bfloat16.
    wide = torch.promote_types(query.dtype, torch.float32)
    grad_query = torch.empty_like(query)
    grad_key = torch.zeros_like(key, dtype=wide)
    grad_value = torch.zeros_like(value, dtype=wide)
    with torch.autocast(query.device.type, enabled=False):
        for tile in _tiles(query, pattern):
            rows = _rows(tile.queries)
            grad_query[:, rows], grad_keys, grad_values = _score(
                tile, query, key, value, pattern, rope, scale
            ).gradients(grad[:, rows])
            tile.scatter_add(grad_key, grad_keys)
            tile.scatter_add(grad_value, grad_values)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


@_tiled_attention.register_fake
def _(query: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(query)


@_tiled_attention_backward.register_fake
def _(
    _grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.settings = inputs[3:]


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grads = torch.ops.lminf.tiled_attention_backward(grad, *ctx.saved_tensors, *ctx.settings)
    return *grads, *(None for _ in ctx.settings)


_tiled_attention.register_autograd(_backward, setup_context=_setup_context)
