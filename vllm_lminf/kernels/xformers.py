"""Λ-attention by xformers: partial attentions over the window and the global keys, merged.

`xformers_plan` works out, once a step, which partial attentions there are. Requests with a few
queries (decoding) read their keys from the cache's pages by the split-KV kernel, and nothing waits
for the device. For longer requests, whose lengths must be known on the host, the window's keys are
gathered and attended by FlashAttention. Global keys beyond the distance limit are gathered, rotated
back to position 0, and attended by queries rotated to the limit. Where the limit is larger than the
window, the global keys between the two are a third part, as they are in the cache.
"""

import os
import re
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from packaging.version import Version

from vllm_lminf.kernels.base import DeviceBatch, LayerConfig, PagedCache
from vllm_lminf.kernels.triton.layer import TritonCacheKernel

if TYPE_CHECKING:
    from vllm_lminf.kernels.xformers_plan import Operators

_HEAD_SIZES = (16, 32, 64, 128, 256)


def _library_reasons() -> list[str]:
    """Why the installed xformers can't be used. Importing it would look for a device: read its
    version and source instead."""
    if missing := [name for name in ("xformers", "triton") if not util.find_spec(name)]:
        return [f"{name} isn't installed: pip install {name}" for name in missing]
    reasons, triton = [], metadata.version("triton")
    if metadata.version("xformers") == "0.0.35" and Version(triton) >= Version("3.9.0.dev0"):
        reasons.append(
            f"Triton {triton} has no block pointers, which the split-KV kernel of xformers "
            '0.0.35 is written with: pip install "triton<3.9", or choose kernel triton'
        )
    return reasons + _extension_reasons() + _flash_attn_reasons()


def _extension_reasons() -> list[str]:
    """xformers takes nothing on a device without its compiled part, which is built for one version
    of CUDA. Loading it alone looks for no device."""
    xformers = util.find_spec("xformers")
    if xformers is None or xformers.origin is None or torch.version.cuda is None:
        return []
    advice = (
        "install an xformers that is built for this PyTorch: pip install -v --no-build-isolation "
        "git+https://github.com/facebookresearch/xformers, or choose kernel triton"
    )
    found = sorted(Path(xformers.origin).parent.glob("_C*.so"))
    if not found:
        return [f"the installed xformers has no compiled part: {advice}"]
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        built = f"PyTorch {torch.__version__} with CUDA {torch.version.cuda}"
        return [f"xformers' compiled part doesn't load beside {built} ({error}): {advice}"]
    return []


def _flash_attn_reasons() -> list[str]:
    """xformers can't be imported beside a flash-attn of other versions than its source names."""
    xformers, flash_attn = util.find_spec("xformers"), util.find_spec("flash_attn")
    if xformers is None or xformers.origin is None or flash_attn is None:
        return []
    source = Path(xformers.origin).with_name("ops").joinpath("fmha/flash.py").read_text("utf-8")
    bounds = dict(re.findall(r'FLASH_VER_(MIN|LAST) = parse_version\("([^"]+)"\)', source))
    if bounds.keys() != {"MIN", "LAST"}:
        return []  # another xformers, which may take any
    version = "of no version"  # FlashAttention 4 alone has no package around it
    if flash_attn.origin is not None:
        if os.environ.get("XFORMERS_IGNORE_FLASH_VERSION_CHECK", "0") == "1":
            return []
        package = Path(flash_attn.origin).read_text("utf-8")
        if found := re.search(r'^__version__ = "(\d[^"]*)"', package, re.MULTILINE):
            version = found[1]
            if Version(bounds["MIN"]) <= Version(version) <= Version(bounds["LAST"]):
                return []
    return [
        f"flash-attn {version} is installed, and xformers can't be imported beside it: pip install "
        f'"flash-attn>={bounds["MIN"]},<={bounds["LAST"]}", or uninstall it (PyTorch brings one '
        "that xformers takes instead), or choose kernel triton"
    ]


class XformersKernel(TritonCacheKernel):
    """See the module. For prefill it has to know lengths on the host, so no step is captured.

    Raises:
        ValueError: a rule isn't served.
        RuntimeError: the installed xformers can't be imported, or has no operator for prefill.
    """

    @classmethod
    def unsupported_reasons(cls, layer: LayerConfig) -> list[str]:
        heads, rules, on_cuda = layer.heads, layer.rules, layer.device.type == "cuda"
        capability = ".".join(map(str, layer.capability or ()))
        sizes = ", ".join(map(str, _HEAD_SIZES))
        instead = "choose kernel triton"
        table = (
            (not on_cuda, f"xformers runs on CUDA devices, not on {layer.device.type!r}"),
            (
                on_cuda and not capability,
                f"xformers' operators are used for NVIDIA's devices alone: {instead}",
            ),
            (
                on_cuda and (layer.capability or (8, 0)) < (8, 0),
                f"compute capability {capability}: xformers' operators take 8.0 and newer",
            ),
            (
                heads.dtype not in (torch.float16, torch.bfloat16),
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
                f"heads of {heads.head_size} dimensions: xformers' operators take {sizes}; "
                f"{instead}",
            ),
            (
                layer.block_size % 16 != 0,
                f"blocks of {layer.block_size} tokens: xformers' operators take multiples of 16; "
                "set --block-size 16",
            ),
            (
                rules.softcap is not None,
                f"a soft-cap on scores: xformers' operators have none; {instead}",
            ),
            (rules.alibi_slopes is not None, f"ALiBi: xformers' operators have none; {instead}"),
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
        rules = layer.rules
        if rules.softcap is not None or rules.alibi_slopes is not None:
            raise ValueError("xformers' operators serve neither a soft-cap nor ALiBi")
        super().__init__(layer)
        self._planning = xformers_plan
        self._operators = operators or xformers_plan.default_operators()
        self._pattern = layer.pattern
        self._rotation = layer.far_rotation
        self._scale = float(rules.scale)
        self._sinks = None if rules.sinks is None else rules.sinks.detach()

    def temporary_bytes(self, num_tokens: int, max_requests: int) -> int:
        """At the most: every request is in prefill, and so far out that its window and its global
        keys are gathered."""
        heads, pattern = self._heads, self._pattern
        requests = max(1, min(max_requests, num_tokens // self._planning.FEW_QUERIES))
        window = num_tokens + requests * (pattern.n_local - 1)
        prefix = requests * (pattern.n_global + 15)
        key_bytes = 2 * heads.num_kv_heads * heads.head_size * heads.dtype.itemsize
        # Gathered keys and values, and three integers for where each is; rotated in float32.
        gathered = window * (key_bytes + 24) + prefix * (3 * key_bytes + 24)
        # Queries, rotated in float32; partial results and their merge in float32.
        row_bytes = heads.num_heads * heads.head_size * (4 * heads.dtype.itemsize + 4 * 4)
        return gathered + num_tokens * row_bytes

    def attend(
        self, query: torch.Tensor, cache: PagedCache, batch: DeviceBatch, output: torch.Tensor
    ) -> None:
        """See `Kernel`. The cache may have any memory order in which tokens are evenly spaced from
        block to block, see `xformers_plan.Pages`. The slots before a window, in the block where it
        starts, hold finite numbers: they are the request's own.

        Raises:
            ValueError: the cache's memory order isn't served.
        """
        if query.shape[0] == 0 or batch.seq_lens.shape[0] == 0:
            return
        planning = self._planning
        pages = planning.Pages.of(cache)
        of_plan = (
            query.shape[0],
            self._pattern,
            self._rotation,
            *cache.key.shape[1:3],
            pages.pages_per_block,
            self._operators,
        )
        name = ("xformers", *of_plan)
        if name not in batch.shared:  # made by the first of the layers that are alike
            batch.shared[name] = planning.make_plan(batch, *of_plan)
        result, lse = planning.attend(
            batch.shared[name], query, cache, pages, self._scale, self._rotation
        )
        if self._sinks is not None:
            sinks = self._sinks.float().view(1, cache.key.shape[1], -1, 1)
            share = (lse - torch.logaddexp(lse, sinks)).exp()
            result = result * share.permute(0, 3, 1, 2)[..., None]
        output.copy_(result.view(output.shape))

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
