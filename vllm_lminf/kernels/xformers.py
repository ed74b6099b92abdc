"""Λ-attention by xformers: partial attention over the window and over the prefix, merged.

How a request's queries are attended depends on how many they are:

- A few, as in decoding: each is a sequence of its own, whose keys are a stretch of pages of the
  cache (a paged bias with gaps), for the split-KV kernel. The block table is cut down to the
  window first, so that its cost doesn't grow with the sequence. Nothing waits for the device.
- More: the window's keys are copied together, and attended in one call for all such requests,
  under a mask that is causal and local from the bottom right. How long requests are must be known
  on the host for that.

Global keys behind the window are copied too, turned back to position 0, and attended by queries
that are turned to the distance limit. Where the limit is larger than the window, those that are
nearer than the limit are attended as they are in the cache, as a third part.
"""

import importlib.metadata
import importlib.util
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from packaging.version import Version

from vllm_lminf.kernels.base import DeviceBatch, LayerConfig, PagedCache
from vllm_lminf.kernels.triton.layer import TritonCacheKernel
from vllm_lminf.rope import rotate

if TYPE_CHECKING:
    from vllm_lminf.kernels.xformers_plan import Operators, Part, Plan

_DTYPES = (torch.float16, torch.bfloat16)
_HEAD_SIZES = (16, 32, 64, 128, 256)

_LAST_WITH_BLOCK_POINTERS = "0.0.35"
_FIRST_TRITON_WITHOUT = (3, 9)


def _flash_attn_reasons() -> list[str]:
    """Why the installed flash-attn keeps xformers from being imported: it takes some versions of
    it, and no others. Which ones stands in its source."""
    xformers, flash_attn = (importlib.util.find_spec(name) for name in ("xformers", "flash_attn"))
    if flash_attn is None or xformers is None or xformers.origin is None:
        return []
    source = (Path(xformers.origin).parent / "ops/fmha/flash.py").read_text(encoding="utf-8")
    bounds = dict(re.findall(r'FLASH_VER_(MIN|LAST) = parse_version\("([^"]+)"\)', source))
    if bounds.keys() != {"MIN", "LAST"}:
        return []  # another xformers, which may take any
    version = "of no version"  # FlashAttention 4 alone has no package around it
    if flash_attn.origin is not None:
        told = Path(flash_attn.origin).read_text(encoding="utf-8")
        version = (re.findall(r'^__version__ = "([^"]+)"', told, re.MULTILINE) or [version])[0]
        ignored = os.environ.get("XFORMERS_IGNORE_FLASH_VERSION_CHECK", "0") == "1"
        fits = version[0].isdigit() and (
            Version(bounds["MIN"]) <= Version(version) <= Version(bounds["LAST"])
        )
        if fits or ignored:
            return []
    return [
        f"flash-attn {version} is installed, and xformers can't be imported beside it: pip install "
        f'"flash-attn>={bounds["MIN"]},<={bounds["LAST"]}", or uninstall it (PyTorch brings one '
        "that xformers takes instead), or choose kernel triton"
    ]


def _library_reasons() -> list[str]:
    """Why the installed xformers can't be used. It isn't imported for that: it would look for a
    device."""
    if missing := [name for name in ("xformers", "triton") if not importlib.util.find_spec(name)]:
        return [f"{name} isn't installed: pip install {name}" for name in missing]
    xformers, triton = (importlib.metadata.version(name) for name in ("xformers", "triton"))
    major, minor = triton.split(".")[:2]
    if xformers == _LAST_WITH_BLOCK_POINTERS and (int(major), int(minor)) >= _FIRST_TRITON_WITHOUT:
        return [
            f"Triton {triton} has no block pointers, which the split-KV kernel of xformers "
            f'{xformers} is written with: pip install "triton<3.9", or choose kernel triton',
            *_flash_attn_reasons(),
        ]
    return _flash_attn_reasons()


class XformersKernel(TritonCacheKernel):
    """See the module. For prefill it has to know lengths on the host, so no step is captured.

    Raises:
        ValueError: a rule isn't served.
        RuntimeError: the installed xformers can't be imported, or has no operator for prefill.
    """

    @classmethod
    def unsupported_reasons(cls, layer: LayerConfig) -> list[str]:
        heads, capability, block_size = layer.heads, layer.capability, layer.block_size
        on_cuda = layer.device.type == "cuda"
        sizes = ", ".join(map(str, _HEAD_SIZES))
        table = (
            (not on_cuda, f"xformers runs on CUDA devices, not on {layer.device.type!r}"),
            (
                on_cuda and capability is None,
                "xformers is used with its operators for NVIDIA's devices alone: choose kernel "
                "triton",
            ),
            (
                on_cuda and capability is not None and capability < (8, 0),
                "compute capability {}.{}: xformers' operators take 8.0 and newer".format(
                    *capability or (0, 0)
                ),
            ),
            (
                heads.dtype not in _DTYPES,
                f"{heads.dtype}: xformers' operators take float16 and bfloat16; choose --dtype "
                "bfloat16, or kernel triton",
            ),
            (
                layer.cache_dtype != heads.dtype,
                f"a cache of {layer.cache_dtype}: xformers' operators take a cache of the model's "
                "own dtype; choose --kv-cache-dtype auto, or kernel triton",
            ),
            (
                heads.head_size not in _HEAD_SIZES,
                f"heads of {heads.head_size} dimensions: xformers' operators take {sizes}; choose "
                "kernel triton",
            ),
            (
                block_size % 16 != 0,
                f"blocks of {block_size} tokens: xformers' operators take multiples of 16; set "
                "--block-size 16",
            ),
            (
                layer.rules.softcap is not None,
                "a soft-cap on scores: xformers' operators have none; choose kernel triton",
            ),
            (
                layer.rules.alibi_slopes is not None,
                "ALiBi: xformers' operators have none; choose kernel triton",
            ),
        )
        return [reason for applies, reason in table if applies] + _library_reasons()

    def __init__(self, layer: LayerConfig, operators: "Operators | None" = None) -> None:
        """
        Args:
            layer: the layer.
            operators: what to compute with; xformers' own choice if left out.
        """
        # xformers is looked for where it is needed, and nowhere else.
        try:
            from vllm_lminf.kernels import xformers_plan
        except ImportError as error:
            raise RuntimeError(
                f"kernel 'xformers': the installed xformers can't be imported ({error}); mend what "
                "is named, or choose kernel triton"
            ) from error
        heads, rules = layer.heads, layer.rules
        if rules.softcap is not None or rules.alibi_slopes is not None:
            raise ValueError("xformers' operators serve neither a soft-cap nor ALiBi")
        super().__init__(layer)
        self._planning = xformers_plan
        self._operators = operators or xformers_plan.default_operators()
        self._group = heads.num_heads // heads.num_kv_heads
        self._pattern = layer.pattern
        self._rotation = layer.far_rotation
        self._scale = float(rules.scale)
        self._sinks = None
        if rules.sinks is not None:
            self._sinks = rules.sinks.detach().view(1, heads.num_kv_heads, self._group, 1)

    def temporary_bytes(self, num_tokens: int, max_requests: int) -> int:
        """At the most: every request in prefill, and far out, so that each one's window and prefix
        are copied."""
        heads, pattern = self._heads, self._pattern
        requests = max(1, min(max_requests, num_tokens // self._planning.FEW_QUERIES))
        keys = num_tokens + requests * (pattern.n_local - 1)
        prefix = requests * (pattern.n_global + 63)
        key_bytes = 2 * heads.num_kv_heads * heads.head_size * heads.dtype.itemsize
        # Copies, and their places of three numbers; global keys are turned in float32.
        copies = keys * (key_bytes + 24) + prefix * (3 * key_bytes + 24)
        # Queries, turned in float32, and parts of the result with what joins them in float32.
        row_bytes = heads.num_heads * heads.head_size * (4 * heads.dtype.itemsize + 4 * 4)
        return copies + num_tokens * row_bytes

    def attend(
        self, query: torch.Tensor, cache: PagedCache, batch: DeviceBatch, output: torch.Tensor
    ) -> None:
        """See `Kernel`.

        Args:
            query: see `Kernel`.
            cache: likewise, in any memory order in which tokens are evenly spaced from block to
                block, see `xformers_plan.Pages`. The slots before a window, in the block where it
                starts, hold finite numbers: they are the request's own.
            batch: see `Kernel`.
            output: likewise.

        Raises:
            ValueError: the cache's memory order isn't served.
        """
        if query.shape[0] == 0 or batch.seq_lens.shape[0] == 0:
            return
        source, head_size = self._planning.Source, self._heads.head_size
        pages = self._planning.Pages.of(cache)
        plan = self._plan(batch, query.shape[0], cache.key.shape[2], pages.pages_per_block)
        keys = {source.CACHE: (pages.key, pages.value)}
        if plan.window is not None:
            copies = plan.window.copy_of(cache.key), plan.window.copy_of(cache.value)
            keys[source.WINDOW] = self._as_row(copies[0]), self._as_row(copies[1])
        turned = query
        if plan.prefix is not None:
            key, value = plan.prefix.copy_of(cache.key), plan.prefix.copy_of(cache.value)
            if self._rotation is not None and plan.query_turn and plan.key_turn:
                key = rotate(key, *plan.key_turn, self._rotation.is_neox_style)
                turned = rotate(query, *plan.query_turn, self._rotation.is_neox_style)
            keys[source.PREFIX] = self._as_row(key), self._as_row(value)
        joint = _Joint(query.shape[0])
        for part in plan.parts:
            queries = part.rows_of(turned if part.source is source.PREFIX else query)
            queries = queries.reshape(1, -1, self._heads.num_kv_heads, self._group, head_size)
            joint.add(part, *self._attend(queries, *keys[part.source], part))
        output.copy_(joint.finished(self._sinks).view(output.shape))

    def warm_up(self, cache: PagedCache, max_requests: int, max_query_len: int) -> None:
        """See `Kernel`. Requests stand at position 0 of the cache's first block, which belongs to
        nobody: what is read there is used for nothing."""
        super().warm_up(cache, max_requests, max_query_len)
        heads, device = self._heads, cache.key.device
        few = [1 << n for n in range((max_requests - 1).bit_length() + 1)]
        many = min(max_query_len, self._planning.FEW_QUERIES + 1)
        for requests, queries in [*((n, 1) for n in few), (1, many)]:
            rows = requests * queries
            shape = 2, rows, heads.num_heads, heads.head_size
            query, output = torch.zeros(shape, dtype=heads.dtype, device=device)
            start = torch.arange(0, rows + 1, queries, dtype=torch.int32, device=device)
            lens = torch.full_like(start[1:], queries)
            table = torch.zeros_like(lens[:, None])
            self.attend(query, cache, DeviceBatch(start, lens, table, queries), output)

    def _plan(
        self, batch: DeviceBatch, num_tokens: int, block_size: int, pages_per_block: int
    ) -> "Plan":
        """The batch's plan, made by the first of the layers that are alike."""
        arguments = (
            num_tokens, self._pattern, self._rotation, block_size, pages_per_block, self._operators,
        )  # fmt: skip
        name = ("xformers", *arguments)
        if name not in batch.shared:
            batch.shared[name] = self._planning.make_plan(batch, *arguments)
        plan: Plan = batch.shared[name]
        return plan

    def _as_row(self, half: torch.Tensor) -> torch.Tensor:
        """Tokens [..., num_kv_heads, head_size] as [1, tokens, num_kv_heads, 1, head_size]."""
        return half.reshape(1, -1, self._heads.num_kv_heads, 1, self._heads.head_size)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, part: "Part"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A part's attention [1, num_rows, num_kv_heads, group, head_size], and its log-sum-exp
        [1, num_kv_heads, group, num_rows]."""
        from xformers.ops.fmha import memory_efficient_attention_partial

        shape = (-1, -1, -1, self._group, -1)
        result, lse = memory_efficient_attention_partial(
            query,
            key.expand(shape),
            value.expand(shape),
            part.bias,
            scale=self._scale,
            op=part.operator,
        )
        return result[:, : part.num_rows], lse[..., : part.num_rows].float()


class _Joint:
    """What the parts so far come to: one softmax over all their keys."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._result: Any = None
        self._lse: Any = None

    def add(self, part: "Part", result: torch.Tensor, lse: torch.Tensor) -> None:
        """Adds a part's attention; see `XformersKernel._attend`."""
        from xformers.ops.fmha import merge_attentions

        if self._result is None and part.rows is None:
            self._result, self._lse = result, lse
            return
        if self._result is None:
            shape = (1, self._num_tokens, *result.shape[2:])
            self._result = result.new_zeros(shape, dtype=torch.float32)
            self._lse = lse.new_full((*lse.shape[:3], self._num_tokens), -torch.inf)
        before = self._result, self._lse
        if part.rows is not None:
            before = self._result[:, part.rows], self._lse[..., part.rows]
        merged = merge_attentions([before[0], result], [before[1], lse], output_dtype=torch.float32)
        if part.rows is None:
            self._result, self._lse = merged
        else:
            self._result = self._result.float().index_copy(1, part.rows, merged[0])
            self._lse = self._lse.index_copy(3, part.rows, merged[1])

    def finished(self, sinks: torch.Tensor | None) -> torch.Tensor:
        """The attention [1, num_tokens, num_kv_heads, group, head_size].

        Args:
            sinks: [1, num_kv_heads, group, 1]: the score of one more key, whose value is zero.
        """
        result: torch.Tensor = self._result
        if sinks is not None:
            joint = torch.logaddexp(self._lse, sinks.float())
            share = (self._lse - joint).exp().permute(0, 3, 1, 2)
            result = result * share[..., None]
        return result
