"""The kernel of a layer: chosen, made, and called in the same way whichever it is."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol
from weakref import WeakValueDictionary

import torch
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionCGSupport

from vllm_lminf.errors import BuildError, UnsupportedError
from vllm_lminf.kernels import flash, reference, xformers
from vllm_lminf.kernels.base import Heads, PagedCache, Rotation, ScoreRules, Situation
from vllm_lminf.kernels.cpu.kernel import CpuLayer, serves
from vllm_lminf.kernels.registry import choose
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.plugin import versions
from vllm_lminf.plugin.metadata import LambdaMetadata
from vllm_lminf.plugin.rotary import Rotary

logger = init_logger("vllm.lminf")

Scales = tuple[torch.Tensor, torch.Tensor]
"""What stored keys and values are multiplied with; each float32, of one element."""


@dataclass(frozen=True)
class Layer:
    """What a kernel is made for.

    Attributes:
        situation: where the layer runs, and what it is.
        rules: how its products become scores.
        rotary: its exact rotation, or None where nothing is rotated.
        compiled: the compiled kernel for CPUs, or None where it can't be had.
        device: where the model is.
        engine: what the layer is part of; layers of one engine run one after the other.
        decode_len: queries of a request that decodes, its drafts included.
    """

    situation: Situation
    rules: ScoreRules
    rotary: Rotary | None
    compiled: CpuLayer | None
    device: torch.device
    engine: object
    decode_len: int = 1

    @property
    def alike(self) -> Hashable:
        """Equal for layers that kernels are compiled for alike."""
        rotary, rules = self.far_rotary, self.rules
        style = None if rotary is None else (rotary.spec.rotary_dim, rotary.spec.is_neox_style)
        sinks = None if rules.sinks is None else rules.sinks.dtype
        return self.situation, style, rules.softcap, sinks

    @property
    def far_rotary(self) -> Rotary | None:
        """Without global tokens nothing is ever beyond the limit, and nothing is turned."""
        return self.rotary if self.situation.pattern.n_global > 0 else None


class Kernel(Protocol):
    """Writing and attending go by the same kernel, since each has an order of its own in which a
    block stores its keys and values.

    Attributes:
        in_graphs: which steps may be captured in a CUDA graph: those in which nothing waits for
            the device, and what is launched depends on shapes alone.
    """

    in_graphs: ClassVar[AttentionCGSupport]

    def write_cache(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        scales: Scales | None,
    ) -> None:
        """Stores keys and values in their slots; see `vllm_lminf.kernels.reference.write_cache`."""

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: LambdaMetadata,
        output: torch.Tensor,
        scales: Scales | None,
    ) -> None:
        """Attention of a batch; see `vllm_lminf.kernels.reference.lambda_attention`."""

    def warm_up(
        self,
        kv_cache: torch.Tensor,
        max_requests: int,
        max_query_len: int,
        scales: Scales | None,
    ) -> None:
        """Compiles and loads whatever the two above may launch; see `LayerKernel`."""


class _ForHosts:
    """What the kernels that compile nothing at run time have in common."""

    in_graphs: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    def warm_up(
        self,
        kv_cache: torch.Tensor,
        max_requests: int,
        max_query_len: int,
        scales: Scales | None,
    ) -> None:
        """Nothing to do."""


def scales_of(layer: Any) -> Scales | None:
    """What the stored keys and values of one of vLLM's layers are multiplied with."""
    key_scale, value_scale = getattr(layer, "_k_scale", None), getattr(layer, "_v_scale", None)
    return None if key_scale is None or value_scale is None else (key_scale, value_scale)


class LayerKernel:
    """What a layer does with its cache, by the kernel that suits this cache.

    Which one that is settles with the first cache that is asked about, since vLLM chooses block
    sizes once the model stands.

    Args:
        asked: the setting "kernel".
        layer: the layer; block size and dtype of its cache are provisional.
    """

    def __init__(self, asked: str, layer: Layer) -> None:
        self._asked = asked
        self._layer = layer
        self._settled: dict[tuple[int, torch.dtype], tuple[str, Kernel]] = {}
        # vLLM counts what is on the device once the model is loaded, before there is a cache.
        self._likely = choose(asked, layer.situation).kernel
        self._workspace = _workspace(layer) if self._likely in _ON_GPUS else None

    def name(self, block_size: int, dtype: torch.dtype) -> str:
        """Which kernel runs on such a cache; one of the settings.

        Raises:
            UnsupportedError: the one that was asked for doesn't.
        """
        return self._settle(block_size, dtype)[0]

    def in_graphs(self, block_size: int, dtype: torch.dtype) -> AttentionCGSupport:
        """Which steps of the kernel for such a cache may be captured in a CUDA graph."""
        return self._settle(block_size, dtype)[1].in_graphs

    def compiled_for(self, kv_cache: torch.Tensor) -> Hashable:
        """Equal for layers and caches whose kernels are compiled alike."""
        name, _ = self._settle(kv_cache.shape[2], kv_cache.dtype)
        return name, self._layer.alike, kv_cache.dtype, kv_cache.shape[1:], kv_cache.stride()

    def warm_up(
        self,
        kv_cache: torch.Tensor,
        max_requests: int,
        max_query_len: int,
        scales: Scales | None = None,
    ) -> None:
        """Compiles and loads what steps of up to so many requests and queries may launch."""
        kernel = self._settle(kv_cache.shape[2], kv_cache.dtype)[1]
        kernel.warm_up(kv_cache, max_requests, max_query_len, scales)

    def take_memory(self, num_tokens: int, max_requests: int) -> None:
        """Takes, for a moment, as much memory of the device as a step does besides its results."""
        if self._likely in _ON_GPUS:
            size = _ON_GPUS[self._likely](self._layer.situation, num_tokens, max_requests)
            torch.empty(size, dtype=torch.uint8, device=self._layer.device)

    def write_cache(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        scales: Scales | None = None,
    ) -> None:
        """Stores keys and values in their slots; see `Kernel`."""
        kernel = self._settle(kv_cache.shape[2], kv_cache.dtype)[1]
        kernel.write_cache(key, value, kv_cache, slot_mapping, scales)

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: LambdaMetadata,
        output: torch.Tensor,
        scales: Scales | None = None,
    ) -> None:
        """Attention of a batch; see `Kernel`."""
        kernel = self._settle(kv_cache.shape[2], kv_cache.dtype)[1]
        kernel.attend(query, kv_cache, metadata, output, scales)

    def _settle(self, block_size: int, dtype: torch.dtype) -> tuple[str, Kernel]:
        settled = self._settled.get((block_size, dtype))
        if settled is None:
            layer = self._layer
            # vLLM stores 8-bit numbers as bytes; the layer's own setting says what they are.
            cache_dtype = layer.situation.cache_dtype if dtype == torch.uint8 else dtype
            situation = replace(layer.situation, block_size=block_size, cache_dtype=cache_dtype)
            name = self._choose(situation)
            settled = name, _MAKERS[name](replace(layer, situation=situation))
            self._settled[block_size, dtype] = settled
        return settled

    def _choose(self, situation: Situation) -> str:
        choice = choose(self._asked, situation)
        if choice.kernel is None:
            raise UnsupportedError(choice.reasons)
        if choice.kernel == "cpu" and self._layer.compiled is None:
            return "reference"  # an automatic choice; said when it couldn't be compiled
        if choice.against:
            logger.warning_once(
                "the much slower PyTorch kernel runs%s: %s",
                "" if situation.device_type == "cpu" else ", outside of CUDA graphs",
                "; ".join(choice.reasons),
            )
        return choice.kernel


class CompiledKernel(_ForHosts):
    """`vllm_lminf.kernels.cpu.kernel`."""

    def __init__(self, layer: Layer) -> None:
        if layer.compiled is None:
            raise ValueError("the layer wasn't compiled")
        self._layer = layer.compiled
        self._rotary, self._pattern = layer.far_rotary, layer.situation.pattern

    def write_cache(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        scales: Scales | None,
    ) -> None:
        """See `Kernel`."""
        self._layer.write_cache(key, value, kv_cache, slot_mapping)

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: LambdaMetadata,
        output: torch.Tensor,
        scales: Scales | None,
    ) -> None:
        """See `Kernel`."""
        batch = metadata.cpu_batch(self._rotary, self._pattern)
        self._layer.lambda_attention(query, kv_cache, batch, output)


class ReferenceKernel(_ForHosts):
    """`vllm_lminf.kernels.reference`. It goes through a batch on the host, which means on a GPU
    that the first layer of every step waits for the device."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer

    def write_cache(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        scales: Scales | None,
    ) -> None:
        """See `Kernel`."""
        reference.write_cache(key, value, kv_cache, slot_mapping)

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: LambdaMetadata,
        output: torch.Tensor,
        scales: Scales | None,
    ) -> None:
        """See `Kernel`."""
        pattern, rotary = self._layer.situation.pattern, self._layer.far_rotary
        reference.lambda_attention(
            query,
            kv_cache,
            metadata.batch.block_table,
            metadata.query_start_loc.tolist(),
            metadata.seq_lens.tolist(),
            pattern,
            rules=self._layer.rules,
            far=None if rotary is None else metadata.far(rotary, pattern),
            output=output,
        )


class _GpuKernel:
    """What the kernels for GPUs have in common: the cache is written by Triton's."""

    def __init__(self, layer: Layer) -> None:
        from vllm_lminf.kernels.triton.layer import TritonLayer

        self._cache_dtype = layer.situation.cache_dtype
        self._triton = TritonLayer(*_description(layer), _workspace(layer))
        self._attending: Any = self._triton

    def write_cache(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        scales: Scales | None,
    ) -> None:
        """See `Kernel`."""
        cache = paged_cache(kv_cache, self._cache_dtype, scales)
        self._triton.write_cache(key, value, cache, slot_mapping)

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: LambdaMetadata,
        output: torch.Tensor,
        scales: Scales | None,
    ) -> None:
        """See `Kernel`."""
        cache = paged_cache(kv_cache, self._cache_dtype, scales)
        self._attending.lambda_attention(query, cache, metadata.batch, output)

    def warm_up(
        self,
        kv_cache: torch.Tensor,
        max_requests: int,
        max_query_len: int,
        scales: Scales | None,
    ) -> None:
        """See `Kernel`."""
        cache = paged_cache(kv_cache, self._cache_dtype, scales)
        self._attending.warm_up(cache, max_requests, max_query_len)
        if self._attending is not self._triton:
            self._triton.warm_up(cache, 1, 1)  # writes the cache


class TritonKernel(_GpuKernel):
    """`vllm_lminf.kernels.triton`."""

    in_graphs: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS


class XformersKernel(_GpuKernel):
    """`vllm_lminf.kernels.xformers`. For prefill it has to know lengths on the host."""

    in_graphs: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    def __init__(self, layer: Layer) -> None:
        from vllm_lminf.kernels.xformers import XformersLayer

        super().__init__(layer)
        self._attending = XformersLayer(*_description(layer))


class FlashKernel(_GpuKernel):
    """`vllm_lminf.kernels.flash`. That its launches may be captured was never tried."""

    in_graphs: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    def __init__(self, layer: Layer) -> None:
        from vllm_lminf.kernels.flash import FlashLayer

        super().__init__(layer)
        attend = versions.flash_attention(layer.situation.heads.head_size)
        self._attending = FlashLayer(*_description(layer), _workspace(layer), attend)


class HybridKernel(_GpuKernel):
    """`vllm_lminf.kernels.hybrid`. Steps in which every request decodes are Triton's alone."""

    in_graphs: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, layer: Layer) -> None:
        from vllm_lminf.kernels.hybrid import HybridLayer

        super().__init__(layer)
        attend = versions.flash_attention(layer.situation.heads.head_size)
        self._attending = HybridLayer(
            *_description(layer), _workspace(layer), attend, layer.decode_len
        )


_MAKERS: dict[str, Callable[[Layer], Kernel]] = {
    "cpu": CompiledKernel,
    "flash": FlashKernel,
    "hybrid": HybridKernel,
    "reference": ReferenceKernel,
    "triton": TritonKernel,
    "xformers": XformersKernel,
}


_ON_GPUS: dict[str | None, Callable[[Situation, int, int], int]] = {
    "flash": flash.temporary_bytes,
    "hybrid": flash.temporary_bytes,
    "triton": lambda *_: 0,
    "xformers": xformers.temporary_bytes,
}
"""The kernels that Triton's are part of, each with the bytes that a step of so many tokens and
requests allocates for a while."""


def paged_cache(kv_cache: torch.Tensor, dtype: torch.dtype, scales: Scales | None) -> PagedCache:
    """vLLM's cache as the kernels for GPUs take it.

    Args:
        kv_cache: see `vllm_lminf.kernels.reference.split_cache`; 8-bit numbers as bytes.
        dtype: what is stored.
        scales: vLLM gives every layer some; numbers of 16 bits and more are stored as they are.
    """
    if dtype.itemsize > 1 or scales is None:
        return PagedCache(*reference.split_cache(kv_cache.view(dtype)))
    return PagedCache(*reference.split_cache(kv_cache.view(dtype)), *scales)


def _description(layer: Layer) -> tuple[Heads, LambdaPattern, ScoreRules, Rotation | None]:
    """A layer, in the terms of the kernels for GPUs."""
    rotary, situation = layer.far_rotary, layer.situation
    rotation = None if rotary is None else Rotation(rotary.tables, rotary.spec.is_neox_style)
    return situation.heads, situation.pattern, layer.rules, rotation


_workspaces: WeakValueDictionary[tuple[int, Heads, torch.device], Any] = WeakValueDictionary()


def _workspace(layer: Layer) -> Any:
    """Room for the kernels of an engine's layers with such heads. It lives as long as they do."""
    from vllm_lminf.kernels.triton.layer import Workspace

    key = id(layer.engine), layer.situation.heads, layer.device
    workspace = _workspaces.get(key)
    if workspace is None:
        workspace = _workspaces[key] = Workspace(layer.situation.heads, layer.device)
    return workspace


def compile_layer(
    asked: str, device: torch.device, heads: Heads, rules: ScoreRules
) -> CpuLayer | None:
    """The compiled kernel for a layer, or None where it isn't asked for or can't be had.

    Args:
        asked: the setting "kernel".
        device: where the model is.
        heads: the layer's.
        rules: how products become scores.

    Raises:
        UnsupportedError: it was asked for by name and can't be compiled.
    """
    if asked not in ("auto", "cpu") or device.type != "cpu":
        return None
    if not serves(heads.dtype, heads.head_size):
        return None  # said once a cache is there, with all other reasons
    try:
        return CpuLayer(heads.num_heads, heads.num_kv_heads, heads.head_size, heads.dtype, rules)
    except BuildError as error:
        if asked == "cpu":
            raise UnsupportedError([f"kernel 'cpu': {error}"]) from error
        logger.warning_once("the much slower PyTorch kernel runs: %s", error)
        return None
