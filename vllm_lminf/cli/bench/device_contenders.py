"""The contenders of ``bench kernel --device cuda``: LMINF's kernels, and what others have.

PyTorch and Triton are all that is needed; a contender whose library isn't there, or doesn't take
what it is given, is absent, with the reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch

from vllm_lminf.cli.bench.device_data import Batch, Layer
from vllm_lminf.cli.bench.device_job import FLASH, FLEX, FULL, WINDOWED, XFORMERS, triton
from vllm_lminf.cli.bench.kernel_job import N_GLOBALS, SHOWN_N_GLOBAL
from vllm_lminf.kernels import base as kernels
from vllm_lminf.kernels import flash, registry
from vllm_lminf.pattern import LambdaPattern


class AbsentError(Exception):
    """A contender can't take part; the text says why."""


@dataclass
class Contender:
    """A kernel on a batch: what it computes, in the oracle's terms, and how to run it.

    Attributes:
        pattern: the Λ.
        run: computes, and returns the output [rows, num_heads, head_size] in whatever shape.
    """

    pattern: LambdaPattern
    run: Callable[[], torch.Tensor]


@dataclass
class Stage:
    """What all contenders of a layer are made with."""

    layer: Layer
    window: int
    shared: dict[Any, Any] = field(default_factory=dict)

    def layer_config(self, pattern: LambdaPattern) -> kernels.LayerConfig:
        """What LMINF's kernels are made from."""
        layer, capability = self.layer, None
        if layer.device.type == "cuda" and torch.version.hip is None:
            capability = torch.cuda.get_device_capability()
        return kernels.LayerConfig(
            heads=heads_of(layer),
            pattern=pattern,
            rules=kernels.ScoreRules(layer.scale),
            cache_dtype=layer.dtype,
            block_size=layer.block_size,
            device=layer.device,
            capability=capability,
            rotation=kernels.Rotation(layer.tables, layer.rotary.is_neox_style),
            flash_attention=kernels.FlashAttentionProvider(
                _absence_of_flash_attention, lambda _: vllm_flash_attention()
            ),
            shared=self.shared,
        )


def heads_of(layer: Layer) -> kernels.Heads:
    """The heads as kernels are told of them."""
    return kernels.Heads(*layer.heads, layer.dtype)


Attend = Callable[..., tuple[torch.Tensor, torch.Tensor]]
Making = Callable[[Batch, Stage], Contender]


def makers(batch: Batch) -> Iterator[tuple[str, Making]]:
    """Everything that could take part in a batch, by name."""
    for n_global in N_GLOBALS:
        yield triton(n_global), partial(_triton, n_global=n_global)
    yield XFORMERS, _xformers
    yield FLASH, _flash
    yield WINDOWED, _windowed
    if batch.is_complete:
        yield FLEX, _flex
        yield FULL, _full


def _own(batch: Batch, stage: Stage, n_global: int, name: str) -> Contender:
    """One of LMINF's own kernels."""
    pattern = LambdaPattern(n_global, stage.window, stage.window)
    config, kernel = stage.layer_config(pattern), registry.kernel_class(name)
    if reasons := kernel.unsupported_reasons(config) or kernel.unavailable_reasons(config):
        raise AbsentError("; ".join(reasons))
    attention, output = kernel(config), torch.full_like(batch.query, torch.nan)

    def run() -> torch.Tensor:
        attention.attend(batch.query, batch.cache, batch.told, output)
        return output

    return Contender(pattern, run)


def _triton(batch: Batch, stage: Stage, n_global: int) -> Contender:
    return _own(batch, stage, n_global, "triton")


def _xformers(batch: Batch, stage: Stage) -> Contender:
    return _own(batch, stage, SHOWN_N_GLOBAL, "xformers")


def _flash(batch: Batch, stage: Stage) -> Contender:
    return _own(batch, stage, SHOWN_N_GLOBAL, "flash")


def _absence_of_flash_attention() -> list[str]:
    try:
        vllm_flash_attention()
    except AbsentError as error:
        return [str(error)]
    return []


@cache
def vllm_flash_attention() -> Attend:
    """FlashAttention as vLLM ships it, in the newest version for the device.

    Raises:
        AbsentError: it isn't there, or has none for the device.
    """
    package = "vllm.vllm_flash_attn"
    if find_spec("vllm") is None:
        raise AbsentError("vLLM isn't installed, which ships it")
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise AbsentError(f"the installed vLLM has none: {error}") from error
    interface = importlib.import_module(f"{package}.flash_attn_interface")
    reasons = []
    for version in (3, 4, 2):
        reason = interface.fa_version_unsupported_reason(version)
        if reason is None:
            attend: Attend = partial(interface.flash_attn_varlen_func, fa_version=version)
            return attend
        reasons.append(reason)
    raise AbsentError("; ".join(reasons))


def _windowed(batch: Batch, stage: Stage) -> Contender:
    """FlashAttention's own window: vLLM's, over the paged cache, or the package flash-attn's."""
    told, pattern = batch.told, LambdaPattern(0, stage.window, stage.window)
    shared = {
        "softmax_scale": stage.layer.scale,
        "causal": True,
        "window_size": (stage.window - 1, 0),
    }
    try:
        attend = vllm_flash_attention()
    except AbsentError as absent:
        if find_spec("flash_attn") is None:
            raise AbsentError(f"{absent}; flash-attn isn't installed either") from absent
        if not batch.is_complete:
            raise AbsentError(f"{absent}; flash-attn takes no such pages") from absent
        contiguous = importlib.import_module("flash_attn").flash_attn_func
        rows = [x.transpose(1, 2) for x in _rows(batch)]
        return Contender(pattern, lambda: contiguous(*rows, **shared))
    output = torch.full_like(batch.query, torch.nan)
    key, value = (half.transpose(1, 2) for half in (batch.cache.key, batch.cache.value))
    # Without the entries of blocks that nobody has: its tiles reach behind the window.
    cut = flash.WindowTable.of(told, stage.window, key.shape[1])

    def run() -> torch.Tensor:
        attend(
            batch.query,
            key,
            value,
            max_seqlen_q=told.max_query_len,
            cu_seqlens_q=told.query_start_loc,
            max_seqlen_k=cut.longest,
            seqused_k=cut.seq_lens,
            block_table=cut.block_table,
            out=output,
            **shared,
        )
        return output

    return Contender(pattern, run)


def _rows(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values, copied together, as PyTorch takes them: [requests, heads, tokens,
    head_size]."""
    case, told = batch.case, batch.told

    def copied(half: torch.Tensor) -> torch.Tensor:
        return half[told.block_table.long()].transpose(2, 3).flatten(1, 2)[:, : case.length]

    query = batch.query.view(case.requests, case.queries, *batch.query.shape[1:])
    rows = query, copied(batch.cache.key), copied(batch.cache.value)
    query, key, value = (x.transpose(1, 2).contiguous() for x in rows)
    return query, key, value


def _flex(batch: Batch, stage: Stage) -> Contender:
    """FlexAttention, whose block mask skips what no window sees; keys aren't paged."""
    attention = importlib.import_module("torch.nn.attention.flex_attention")
    case, window, is_cpu = batch.case, stage.window, stage.layer.device.type == "cpu"
    offset = case.length - case.queries

    def is_seen(request: Any, head: Any, row: Any, column: Any) -> Any:
        distance = row + offset - column
        return (distance >= 0) & (distance < window)

    mask = attention.create_block_mask(
        is_seen, None, None, case.queries, case.length, device=stage.layer.device
    )
    attend = attention.flex_attention
    if not is_cpu:
        # Compiled afresh for every batch: past some number of shapes it would not be at all.
        torch.compiler.reset()
        attend = torch.compile(attend, dynamic=False)
    query, key, value = _rows(batch)

    def run() -> torch.Tensor:
        result: torch.Tensor = attend(
            query, key, value, block_mask=mask, scale=stage.layer.scale, enable_gqa=True
        )
        return result.transpose(1, 2)

    return Contender(LambdaPattern(0, window, window), run)


def _full(batch: Batch, stage: Stage) -> Contender:
    """PyTorch's own attention over all keys, which aren't paged."""
    bias = importlib.import_module("torch.nn.attention.bias")
    case = batch.case
    query, key, value = _rows(batch)
    mask = None if case.queries == 1 else bias.causal_lower_right(case.queries, case.length)

    def run() -> torch.Tensor:
        result = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=stage.layer.scale, enable_gqa=True
        )
        return result.transpose(1, 2)

    return Contender(LambdaPattern(0, case.length, case.length), run)
