"""Who takes part in `benchmarks.kernels`: LMINF's kernels, and what else runs on the device.

A contender is made for a batch by a function that is known by name. One whose library isn't there,
or that doesn't take what it is given, is absent, with the reason.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.sequences import N_GLOBALS, SHOWN_N_GLOBAL, Batch, Sequences
from vllm_lminf.kernels.base import (
    DeviceBatch,
    FlashAttentionProvider,
    Heads,
    Kernel,
    LayerConfig,
    PagedCache,
    Rotation,
    ScoreRules,
)
from vllm_lminf.kernels.flash import WindowTable
from vllm_lminf.kernels.registry import kernel_class
from vllm_lminf.pattern import LambdaPattern


def lminf(n_global: int) -> str:
    """The name of LMINF's own kernel for the device with so many global tokens."""
    return f"LMINF, n_global {n_global}"


SHOWN = lminf(SHOWN_N_GLOBAL)
LMINF_XFORMERS = "LMINF through xformers"
LMINF_FLASH = "LMINF through FlashAttention"
LMINF_HYBRID = "LMINF hybrid"
VLLM_WINDOW = "vLLM, same window"
VLLM_FULL = "vLLM, full attention"
FLASH_WINDOW = "FlashAttention, same window"
FLEX_WINDOW = "FlexAttention, same window"
TORCH_FULL = "PyTorch, full attention"
OTHERS_OWN = (VLLM_WINDOW, VLLM_FULL, FLASH_WINDOW, FLEX_WINDOW, TORCH_FULL)
"""Contenders that are others' work alone."""


class AbsentError(Exception):
    """A contender can't take part; the text says why."""


@dataclass
class Contender:
    """A kernel on a batch.

    Attributes:
        pattern: what it computes, in the oracle's terms.
        run: computes, and returns the output [rows, num_heads, head_size] in whatever shape.
    """

    pattern: LambdaPattern
    run: Callable[[], torch.Tensor]


Make = Callable[[Batch], Contender]
Attend = Callable[..., Any]
"""A ``flash_attn_varlen_func``, its version given."""


class Lminf:
    """LMINF's kernels on a device's sequences; those of one device share what layers share.

    Args:
        sequences: what is attended to.
        name: of the kernel that writes the cache.
        cache: written here.
    """

    def __init__(self, sequences: Sequences, name: str, cache: PagedCache) -> None:
        self._sequences, self._name, self._cache = sequences, name, cache
        self._shared: dict[Any, Any] = {}
        writer = self.kernel(name, self.pattern(0))
        sequences.fill(lambda k, v, slots: writer.write_cache(k, v, cache, slots))

    def pattern(self, n_global: int) -> LambdaPattern:
        """The Λ with the setting's window."""
        window = self._sequences.setting.window
        return LambdaPattern(n_global, window, window)

    def kernel(self, name: str, pattern: LambdaPattern) -> Kernel:
        """A kernel by its name in the registry.

        Raises:
            AbsentError: it has reasons against these layers.
        """
        sequences, setting = self._sequences, self._sequences.setting
        shape, capability = sequences.shape, None
        if setting.device.type == "cuda" and torch.version.hip is None:
            capability = torch.cuda.get_device_capability()
        layer = LayerConfig(
            heads=Heads(shape.num_heads, shape.num_kv_heads, shape.head_size, setting.dtype),
            pattern=pattern,
            rules=ScoreRules(sequences.scale),
            cache_dtype=setting.dtype,
            block_size=setting.block_size,
            device=setting.device,
            capability=capability,
            rotation=Rotation(sequences.tables, sequences.rotary.is_neox_style),
            flash_attention=VLLM_FLASH_ATTENTION,
            shared=self._shared,
        )
        found = kernel_class(name)
        if reasons := found.unsupported_reasons(layer) or found.unavailable_reasons(layer):
            raise AbsentError("; ".join(reasons))
        return found(layer)

    def contender(
        self, batch: Batch, name: str | None = None, n_global: int = SHOWN_N_GLOBAL
    ) -> Contender:
        """A kernel on a batch. What a step computes once for all layers is computed by its first
        call, which isn't timed."""
        pattern = self.pattern(n_global)
        kernel, described = self.kernel(name or self._name, pattern), described_batch(batch)
        output = torch.full_like(batch.query, torch.nan)

        def run() -> torch.Tensor:
            kernel.attend(batch.query, self._cache, described, output)
            return output

        return Contender(pattern, run)


def described_batch(batch: Batch) -> DeviceBatch:
    """A batch as the kernels are told of it."""
    return DeviceBatch(
        batch.query_start_loc,
        batch.seq_lens,
        batch.block_table,
        batch.max_query_len,
        batch.query_start_loc_cpu,
        batch.seq_lens_cpu,
    )


class CpuContenders:
    """LMINF's compiled kernel beside vLLM's own for CPUs; each keeps its order within a block.

    Both are given what a step computes once for all layers; that isn't timed.
    """

    def __init__(self, sequences: Sequences) -> None:
        import vllm._custom_ops as ops
        from vllm.platforms import current_platform
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        current_platform.import_kernels()
        # In an engine, PyTorch's products of matrices have asked the system for AMX before.
        torch.cpu._init_amx()
        setting, shape = sequences.setting, sequences.shape
        self._ops, self._sequences = ops, sequences
        self.isa: str = _get_attn_isa(setting.dtype, setting.block_size, shape.head_size, "auto")
        size = (sequences.num_blocks, shape.num_kv_heads, setting.block_size, 2 * shape.head_size)
        cache = torch.full(size, torch.nan, dtype=setting.dtype)
        self._lminf = Lminf(sequences, "cpu", PagedCache.of(cache, setting.dtype))
        self._vllm_cache = torch.zeros(size, dtype=setting.dtype)
        sequences.fill(self._write_vllm)

    def makers(self) -> Iterator[tuple[str, Make]]:
        """Every contender, by name."""
        yield VLLM_WINDOW, partial(self._vllm, window=self._sequences.setting.window)
        for n_global in N_GLOBALS:
            yield lminf(n_global), partial(self._lminf.contender, n_global=n_global)
        yield VLLM_FULL, partial(self._vllm, window=None)

    def _vllm_halves(self) -> tuple[torch.Tensor, torch.Tensor]:
        blocks, num_kv_heads, block_size, double = self._vllm_cache.shape
        joined = self._vllm_cache.view(blocks, num_kv_heads, 2 * block_size, double // 2)
        key, value = joined.chunk(2, dim=2)
        return key, value

    def _write_vllm(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        self._ops.cpu_attn_reshape_and_cache(
            *(key, value, *self._vllm_halves(), slots, self.isa),
            k_scale=1.0,
            v_scale=1.0,
            kv_cache_dtype="auto",
        )

    def _vllm(self, batch: Batch, window: int | None) -> Contender:
        """vLLM's kernel; None is full attention."""
        sequences, shape = self._sequences, self._sequences.shape
        span = sequences.length if window is None else window
        sliding_window = -1 if window is None else window
        metadata = self._ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(batch.requests),
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_size,
            seq_lens=batch.seq_lens,
            dtype=sequences.setting.dtype,
            query_start_loc=batch.query_start_loc,
            causal=True,
            sliding_window_size=sliding_window,
            isa=self.isa,
            enable_kv_split=True,
            dynamic_causal=None,
            kv_cache_dtype="auto",
        )
        key_cache, value_cache = self._vllm_halves()
        output = torch.full_like(batch.query, torch.nan)

        def run() -> torch.Tensor:
            self._ops.cpu_attention_with_kv_cache(
                query=batch.query,
                key_cache=key_cache,
                value_cache=value_cache,
                output=output,
                query_start_loc=batch.query_start_loc,
                seq_lens=batch.seq_lens,
                scale=sequences.scale,
                causal=True,
                alibi_slopes=None,
                sliding_window=sliding_window,
                block_table=batch.block_table,
                softcap=0,
                scheduler_metadata=metadata,
                s_aux=None,
                dynamic_causal=None,
                k_scale=1.0,
                v_scale=1.0,
                kv_cache_dtype="auto",
            )
            return output

        return Contender(LambdaPattern(0, span, span), run)


class GpuContenders:
    """LMINF's kernels for GPUs beside others'; PyTorch and Triton are all that they need."""

    def __init__(self, sequences: Sequences) -> None:
        self._sequences, setting, shape = sequences, sequences.setting, sequences.shape
        self._window = LambdaPattern(0, setting.window, setting.window)
        # A block's tokens lie before its heads in memory, as in vLLM's caches for GPUs.
        size = (sequences.num_blocks, setting.block_size, shape.num_kv_heads, shape.head_size)
        key, value = (
            torch.full(size, torch.nan, dtype=setting.dtype, device=setting.device) for _ in "kv"
        )
        self._cache = PagedCache(key.transpose(1, 2), value.transpose(1, 2))
        self._lminf = Lminf(sequences, "triton", self._cache)

    def makers(self) -> Iterator[tuple[str, Make]]:
        """Every contender, by name."""
        for n_global in N_GLOBALS:
            yield lminf(n_global), partial(self._lminf.contender, n_global=n_global)
        yield LMINF_XFORMERS, partial(self._lminf.contender, name="xformers")
        yield LMINF_FLASH, partial(self._lminf.contender, name="flash")
        yield LMINF_HYBRID, partial(self._lminf.contender, name="hybrid")
        yield FLASH_WINDOW, self._flash_window
        if self._sequences.is_complete:
            yield FLEX_WINDOW, self._flex_window
            yield TORCH_FULL, self._torch_full

    def _flash_window(self, batch: Batch) -> Contender:
        """FlashAttention's own window: vLLM's over the cache, or that of the package flash-attn."""
        shared = {
            "softmax_scale": self._sequences.scale,
            "causal": True,
            "window_size": (self._window.n_local - 1, 0),
        }
        try:
            attend = vllm_flash_attention()
        except AbsentError as absent:
            if find_spec("flash_attn") is None:
                raise AbsentError(f"{absent}; flash-attn isn't installed either") from absent
            if not self._sequences.is_complete:
                raise AbsentError(f"{absent}; flash-attn takes no such pages") from absent
            contiguous = importlib.import_module("flash_attn").flash_attn_func
            rows = [x.transpose(1, 2) for x in self._rows(batch)]
            return Contender(self._window, lambda: contiguous(*rows, **shared))
        output = torch.full_like(batch.query, torch.nan)
        key, value = (half.transpose(1, 2) for half in (self._cache.key, self._cache.value))
        # Without the entries of freed blocks, which hold NaN: its tiles reach behind the window.
        cut = WindowTable.of(described_batch(batch), self._window.n_local, key.shape[1])

        def run() -> torch.Tensor:
            attend(
                batch.query,
                key,
                value,
                max_seqlen_q=batch.max_query_len,
                cu_seqlens_q=batch.query_start_loc,
                max_seqlen_k=cut.longest,
                seqused_k=cut.seq_lens,
                block_table=cut.block_table,
                out=output,
                **shared,
            )
            return output

        return Contender(self._window, run)

    def _rows(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values copied together, as PyTorch takes them: [requests, heads,
        tokens, head_size]."""

        def copied(half: torch.Tensor) -> torch.Tensor:
            tokens = half[batch.block_table.long()].transpose(2, 3).flatten(1, 2)
            return tokens[:, : self._sequences.length]

        query = batch.query.view(len(batch.requests), batch.max_query_len, *batch.query.shape[1:])
        rows = query, copied(self._cache.key), copied(self._cache.value)
        query, key, value = (x.transpose(1, 2).contiguous() for x in rows)
        return query, key, value

    def _flex_window(self, batch: Batch) -> Contender:
        """FlexAttention, whose block mask skips what no window sees; keys aren't paged."""
        attention = importlib.import_module("torch.nn.attention.flex_attention")
        sequences, window = self._sequences, self._window.n_local
        offset, device = sequences.length - batch.max_query_len, sequences.setting.device

        def is_seen(request: Any, head: Any, row: Any, column: Any) -> Any:
            distance = row + offset - column
            return (distance >= 0) & (distance < window)

        mask = attention.create_block_mask(
            is_seen, None, None, batch.max_query_len, sequences.length, device=device
        )
        attend = attention.flex_attention
        if device.type == "cuda":
            # Compiled afresh for every batch: past some number of shapes it would not be at all.
            torch.compiler.reset()
            attend = torch.compile(attend, dynamic=False)
        query, key, value = self._rows(batch)

        def run() -> torch.Tensor:
            result: torch.Tensor = attend(
                query, key, value, block_mask=mask, scale=sequences.scale, enable_gqa=True
            )
            return result.transpose(1, 2)

        return Contender(self._window, run)

    def _torch_full(self, batch: Batch) -> Contender:
        """PyTorch's own attention over all keys, which aren't paged."""
        bias = importlib.import_module("torch.nn.attention.bias")
        length, mask = self._sequences.length, None
        query, key, value = self._rows(batch)
        if batch.max_query_len > 1:
            mask = bias.causal_lower_right(batch.max_query_len, length)

        def run() -> torch.Tensor:
            result = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=self._sequences.scale, enable_gqa=True
            )
            return result.transpose(1, 2)

        return Contender(LambdaPattern(0, length, length), run)


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


def _reasons_against_flash() -> list[str]:
    try:
        vllm_flash_attention()
    except AbsentError as absent:
        return [str(absent)]
    return []


VLLM_FLASH_ATTENTION = FlashAttentionProvider(
    _reasons_against_flash, lambda head_size: vllm_flash_attention()
)
