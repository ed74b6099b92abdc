"""The best keys of many, found by scanning a small copy of them: an index of quantised keys.

A key ``x`` is centred and turned, and what that gives is rounded to ``bits`` bits an element: codes
``c``, one scale ``s`` and one radius ``rho`` a key. The scan of all codes gives an estimate of
every product ``q . x`` and a bound that is certain. A few candidates are scored exactly; where no
other key can reach the k-th best of them, they hold the exact top k.

The estimate. With the centre ``m`` and the orthogonal matrix ``R``::

    x = m + s R c + r                   r is what is left
    q . x = q . m + s (q R) . c + q . r

The random ``R`` makes all elements alike, so that one scale serves them (RaBitQ, arXiv 2405.12497);
of a few steps the one is taken whose codes point closest to where the key does (extended RaBitQ,
arXiv 2409.09913). ``s`` makes ``r`` shortest.

The bound. ``|q . r| <= |q| |r|`` by Cauchy and Schwarz, and ``|r|`` is measured, in float64, with
the codes, the scale, the centre and the matrix as they are stored. So it holds whatever rounding to
bits did, and however far ``R`` is from orthogonal.

Rounding. A sum of ``n`` products in float32, in any order, is off by ``n u / (1 - n u)`` of the sum
of their sizes at most, with ``u = 2**-24`` (Higham, Accuracy and Stability of Numerical Algorithms,
section 3.1); for ``q . x`` these sizes add up to ``|q| |x|`` at most. The two sums of the estimate,
the exact score and the few single operations around them are therefore within ``(2 n + 32) u |q|
(|m| + s |R c| + |r|)`` of the truth together. ``rho`` is ``|r|`` and this, without ``|q|``: a score
in float32 is ``|q| rho`` above its estimate at most.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

BITS = (1, 2, 3, 4, 8)
"""Bits an element that an index can have."""

_CLIPS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Largest elements that codes reach, as shares of a key's largest, of which the best is taken."""

_CERTIFYING_BITS = 4
"""From so many bits on, candidates are the keys that may score highest, since these decide whether
a result is certain. With fewer, where few results ever are, they are the keys with the highest
estimates, among which more of the best are found (docs/middle_search.md)."""

_UNDERFLOW = 2.0**-100
"""More than what all products of a score can lose below float32's smallest numbers."""


@dataclass(frozen=True)
class IndexFormat:
    """How an index stores a key of one head.

    Attributes:
        bits: of an element; one of `BITS`.
        head_size: elements; a multiple of 8.
    """

    bits: int
    head_size: int

    def __post_init__(self) -> None:
        problems = []
        if self.bits not in BITS:
            problems.append(f"bits is {self.bits}: it must be one of {', '.join(map(str, BITS))}")
        if self.head_size < 8 or self.head_size % 8:
            problems.append(f"head_size is {self.head_size}: it must be a multiple of 8")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def code_bytes(self) -> int:
        """Of the codes of a key."""
        return self.head_size * self.bits // 8

    @property
    def key_bytes(self) -> int:
        """Of a key: its codes, its scale and its radius."""
        return self.code_bytes + 2 * torch.float16.itemsize


@dataclass(frozen=True, eq=False)
class KeyIndex:
    """The index of a stretch of keys.

    Attributes:
        format: how keys are stored.
        codes: uint8 [num_kv_heads, num_keys, code_bytes]; see `_pack`.
        scale: float16 [num_kv_heads, num_keys].
        radius: float16 [num_kv_heads, num_keys]; no estimate is further from a score than that
            times the query's length.
        centre: float32 [num_kv_heads, head_size]; of the head, not of a key.
    """

    format: IndexFormat
    codes: torch.Tensor
    scale: torch.Tensor
    radius: torch.Tensor
    centre: torch.Tensor

    @classmethod
    def of(cls, key: torch.Tensor, bits: int, centre: torch.Tensor) -> "KeyIndex":
        """Indexes keys.

        Args:
            key: [num_keys, num_kv_heads, head_size], float32 or narrower, finite.
            bits: of an element of the index.
            centre: what is subtracted from the keys of a head, any dtype; [num_kv_heads,
                head_size]. The closer to their mean, the better.
        """
        stored = IndexFormat(bits, key.shape[-1])
        centre = centre.float()
        turn = _rotation(stored.head_size).to(key.device)
        centred = key.transpose(0, 1).double() - centre.double()[:, None]
        codes = _round(centred @ turn, bits)
        turned_back = codes @ turn.T
        # Squares of the largest float32 numbers fit into float64.
        square = turned_back.square().sum(dim=-1)
        best = (centred * turned_back).sum(dim=-1) / square
        scale = best.clamp(0, torch.finfo(torch.float16).max).half()
        rest = (centred - scale.double()[..., None] * turned_back).norm(dim=-1)
        sizes = centre.double().norm(dim=-1)[:, None] + scale.double() * square.sqrt() + rest
        rounding = (2 * stored.head_size + 32) * 2.0**-24
        return cls(
            stored,
            _pack(codes, bits),
            scale,
            _rounded_up(rest + rounding * sizes, torch.float16),
            centre,
        )

    @property
    def num_keys(self) -> int:
        return self.codes.shape[1]

    @property
    def num_bytes(self) -> int:
        """Of what is stored for keys; the centres, which don't grow with them, aside."""
        return self.codes.shape[0] * self.num_keys * self.format.key_bytes

    def scan(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Estimates of all products, and a bound on how far a float32 product is from each.

        Args:
            query: [num_queries, num_heads, head_size], float32 or narrower.

        Returns:
            Two of float32 [num_kv_heads, group * num_queries, num_keys]: rows are the queries of a
            group's first head, then those of its second. A bound is infinite where numbers are too
            large to tell.
        """
        query = _by_kv_head(query, self.centre.shape[0])
        turned = (query.double() @ _rotation(self.format.head_size).to(query.device)).float()
        codes = _unpack(self.codes, self.format.bits)
        estimate = (turned @ codes.transpose(1, 2)) * self.scale.float()[:, None]
        estimate += query.float() @ self.centre[..., None]
        length = _rounded_up(query.double().norm(dim=-1), torch.float32)
        bound = length[..., None] * self.radius.float()[:, None] + _UNDERFLOW
        unknown = ~(estimate.isfinite() & bound.isfinite())
        return estimate.masked_fill(unknown, 0.0), bound.masked_fill(unknown, torch.inf)


@dataclass(frozen=True, eq=False)
class Found:
    """The best keys of each query head.

    Attributes:
        keys: int64 [num_queries, num_heads, top_k]: best first, of equals the lower one first; -1
            behind the last where there are fewer.
        scores: float32 of the same shape: products of query and key; minus infinity for none.
        certified: bool [num_queries, num_heads]: whether these are the exact top k, that is, the
            ones that all keys' float32 scores give.
    """

    keys: torch.Tensor
    scores: torch.Tensor
    certified: torch.Tensor


def search(
    query: torch.Tensor,
    key: torch.Tensor,
    index: KeyIndex,
    num_visible: torch.Tensor,
    top_k: int,
    num_candidates: int,
) -> Found:
    """The keys with the largest products, of those that each query looks at.

    Args:
        query: [num_queries, num_heads, head_size], float32 or narrower.
        key: the keys that the index is of; [num_keys, num_kv_heads, head_size].
        index: their index.
        num_visible: int [num_queries]: a query looks at so many of the first keys.
        top_k: keys that each query head gets.
        num_candidates: keys of a query head that are scored exactly; top_k or more.
    """
    if num_candidates < top_k:
        raise ValueError(f"num_candidates is {num_candidates}, below top_k, which is {top_k}")
    num_queries, num_heads, _ = query.shape
    num_kv_heads, num_keys = key.shape[1], key.shape[0]
    group = num_heads // num_kv_heads
    hidden = torch.arange(num_keys, device=key.device) >= num_visible[:, None]
    hidden = hidden.repeat(group, 1)

    estimate, bound = index.scan(query)
    highest = (estimate + bound).masked_fill_(hidden, -torch.inf)
    estimate = estimate.masked_fill(bound.isinf(), torch.inf).masked_fill_(hidden, -torch.inf)
    order = highest if index.format.bits >= _CERTIFYING_BITS else estimate
    # In the order of their positions, so that a stable sort leaves equals in it.
    candidates = order.topk(min(num_candidates, num_keys), dim=-1).indices.sort(dim=-1).values
    others = highest.scatter(-1, candidates, -torch.inf).amax(dim=-1)

    heads = torch.arange(num_kv_heads, device=key.device)[:, None, None]
    gathered = key.transpose(0, 1)[heads, candidates].float()
    rows = _by_kv_head(query, num_kv_heads).float()
    scores = (gathered @ rows[..., None])[..., 0]
    scores = scores.masked_fill(
        hidden.expand(num_kv_heads, -1, -1).gather(-1, candidates), -torch.inf
    )
    scores, order = scores.sort(dim=-1, descending=True, stable=True)
    keys = candidates.gather(-1, order).masked_fill(scores == -torch.inf, -1)

    missing = (0, top_k - min(top_k, num_keys))
    scores = F.pad(scores[..., :top_k], missing, value=-torch.inf)
    keys = F.pad(keys[..., :top_k], missing, value=-1)
    last = scores[..., -1] if top_k else torch.full_like(others, torch.inf)
    certified = (others < last) | (others == -torch.inf)

    def by_query(x: torch.Tensor) -> torch.Tensor:
        split = x.unflatten(1, (group, num_queries)).flatten(0, 1)
        return split.transpose(0, 1)

    return Found(by_query(keys), by_query(scores), by_query(certified))


def _by_kv_head(query: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """[num_queries, num_heads, head_size] as [num_kv_heads, group * num_queries, head_size]."""
    return query.transpose(0, 1).unflatten(0, (num_kv_heads, -1)).flatten(1, 2)


@functools.lru_cache(maxsize=8)
def _rotation(head_size: int) -> torch.Tensor:
    """A random orthogonal matrix, always the same one in a process; float64 [head_size, head_size]
    on the CPU."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(head_size, head_size, dtype=torch.float64, generator=generator)
    rotation: torch.Tensor = torch.linalg.qr(drawn).Q
    return rotation


def _round(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Each row's codes: the odd multiples of 1/2 up to ``2**(bits - 1)``, in the direction closest
    to the row's."""
    half = 2.0 ** (bits - 1)
    largest = x.abs().amax(dim=-1, keepdim=True)
    # A row of zeros has any codes: its scale will be 0.
    largest = largest.masked_fill(largest == 0, 1.0)
    best = torch.empty_like(x)
    best_cosine = torch.full_like(largest, -torch.inf)
    for clip in _CLIPS if 1 < bits < 8 else (1.0,):
        codes = (x / (largest * (clip / half))).floor().clamp(-half, half - 1) + 0.5
        cosine = (codes * (x / largest)).sum(dim=-1, keepdim=True) / codes.norm(
            dim=-1, keepdim=True
        )
        better = cosine > best_cosine
        best = torch.where(better, codes, best)
        best_cosine = torch.where(better, cosine, best_cosine)
    return best


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes as bits of bytes, plane by plane, the highest bit of all elements first: [..., n] to
    uint8 [..., n * bits / 8]. In a plane, the first of eight elements has the lowest bit."""
    numbers = (codes + (2.0 ** (bits - 1) - 0.5)).to(torch.int16)
    weights = 2 ** torch.arange(8, dtype=torch.int16, device=codes.device)
    planes = [
        (((numbers >> bit) & 1).unflatten(-1, (-1, 8)) * weights).sum(dim=-1)
        for bit in reversed(range(bits))
    ]
    return torch.cat(planes, dim=-1).to(torch.uint8)


def _unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `_pack`, as float32."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    planes = ((packed[..., None] >> shifts) & 1).flatten(-2).unflatten(-1, (bits, -1)).float()
    weights = 2.0 ** torch.arange(bits - 1, -1, -1, device=packed.device)
    return torch.einsum("...bn,b->...n", planes, weights) - (2.0 ** (bits - 1) - 0.5)


def _rounded_up(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The smallest numbers of a dtype that are no less than ``x``, float64 and not negative."""
    rounded = x.to(dtype)
    # Floating-point numbers of one sign are ordered as their bits are.
    integers = {torch.float16: torch.int16, torch.float32: torch.int32}[dtype]
    below = rounded.double() < x
    return (rounded.view(integers) + below.to(integers)).view(dtype)
