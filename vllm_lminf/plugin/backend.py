"""LMINF as vLLM selects, builds and calls it: the backend, one attention layer, a step's metadata.

A query goes from vLLM's attention layer to `LambdaAttentionImpl.forward` and from there to the
kernel's ``attend``.
"""

import weakref
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from vllm.config import (
    VllmConfig,
    get_current_vllm_config,
    get_current_vllm_config_or_none,
    get_layers_from_vllm_config,
)
from vllm.config.cache import CacheDType
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    KVCacheLayout,
    KVCacheSpec,
    SlidingWindowSpec,
)

from vllm_lminf.errors import UnsupportedError
from vllm_lminf.kernels import registry
from vllm_lminf.kernels.base import (
    Captures,
    DeviceBatch,
    Heads,
    Kernel,
    LayerConfig,
    PagedCache,
    Rotation,
    ScoreRules,
)
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.plugin import archive, log, patches, trained_length, versions
from vllm_lminf.plugin.archive_backend import Archive
from vllm_lminf.plugin.config import BACKEND_NAME, LambdaConfig
from vllm_lminf.plugin.kv_cache import LambdaSpec
from vllm_lminf.plugin.layer_config import (
    ANY_BLOCK_SIZE,
    cache_dtype_of,
    flash_attention,
    layer_config_of,
)
from vllm_lminf.plugin.loaded_model import models
from vllm_lminf.plugin.patterns import cache_pattern, layer_pattern, model_pattern
from vllm_lminf.plugin.probe import Watch
from vllm_lminf.plugin.rotary import Rotary

_FP8: tuple[CacheDType, ...] = ("fp8", "fp8_e4m3", "fp8_e5m2")

_GRAPHS = {
    Captures.NEVER: AttentionCGSupport.NEVER,
    Captures.DECODE: AttentionCGSupport.UNIFORM_BATCH,
    Captures.ALWAYS: AttentionCGSupport.ALWAYS,
}


class LambdaAttentionBackend(AttentionBackend):
    """LM-Infinite's Λ-shaped attention for decoders.

    vLLM asks a class what it can do, not an engine's layers. Where that depends on the kernel, it
    is the kernel of the engine whose model is being built, or was built last in this process.
    """

    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = [
        "auto",
        "float16",
        "bfloat16",
        *_FP8,
    ]

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type["LambdaAttentionImpl"]:
        return LambdaAttentionImpl

    @staticmethod
    def get_builder_cls() -> type["LambdaMetadataBuilder"]:
        return LambdaMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,
    ) -> list[int | MultipleOf]:
        """What the kernel takes, or the one that stands in for it."""
        return [MultipleOf(registry.block_multiple(_asked(), current_platform.device_type))]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """The kernel's, where nobody names one."""
        preferred = registry.preferred_block_size(_asked(), current_platform.device_type)
        if preferred is None:
            preferred = super().get_preferred_block_size(default_block_size)
        return preferred

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """A block's heads lie one after the other, so that a head's keys are one stretch."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: CacheDType | None) -> bool:
        if kv_cache_dtype in _FP8 and not current_platform.is_cuda_alike():
            return False
        supported: bool = super().supports_kv_cache_dtype(kv_cache_dtype)
        return supported

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: CacheDType | None,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        use_mm_prefix: bool,
        device_capability: DeviceCapability | None,
    ) -> str | None:
        """Every reason of every kernel that would have to do, if none can."""
        capability = None
        if current_platform.is_cuda() and device_capability is not None:
            capability = device_capability.major, device_capability.minor
        cache_dtype = cache_dtype_of(kv_cache_dtype or "auto", dtype)
        if cache_dtype is None:
            return None  # said by `supports_kv_cache_dtype`
        layer = LayerConfig(
            heads=Heads(1, 1, head_size, dtype),  # each layer looks again, with its own
            pattern=LambdaPattern(1, 1, 1),
            rules=ScoreRules(1.0, sinks=torch.zeros(1) if has_sink else None),
            cache_dtype=cache_dtype,
            block_size=block_size or ANY_BLOCK_SIZE,
            device=torch.device(current_platform.device_type),
            capability=capability,
        )
        choice = registry.choose(_asked(), layer)
        return "; ".join(choice.reasons) if choice.kernel is None else None

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Every layer's cache becomes that of a Λ, one with a window of its own included.

        vLLM puts a `SlidingWindowSpec` into one group with any other window of the same length,
        and would keep no pinned block for a Λ whose n_local is the window of other layers.

        vLLM names neither the layer nor the engine here, so it is the Λ of the model that this
        process built last; the metadata builder, which is told the engine, checks that it was.

        It is asked once all models of a process are there as they will run (adapters, drafters,
        buffers for communication), before memory is measured: the time to settle how layers rotate
        queries and keys.
        """
        engine = LambdaAttentionImpl.built_last.engine
        models.settle(engine)
        _give_archives(engine)
        return kept_by_its_pattern(engine, spec)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True


def kept_by_its_pattern(engine: VllmConfig, spec: AttentionSpec) -> LambdaSpec:
    """A layer's cache under the Λ that it sees, in place of what vLLM planned for it.

    Raises:
        UnsupportedError: it is of another kind than decoders' attention has.
    """
    if type(spec) is SlidingWindowSpec:
        own_window = spec.sliding_window
    elif type(spec) is FullAttentionSpec and not spec.non_causal:
        own_window = None
    else:
        raise UnsupportedError([f"a KV cache of kind {spec}: not served"])
    if spec.head_size_v != spec.head_size:
        sizes = f"keys of {spec.head_size} dimensions and values of {spec.head_size_v}"
        raise UnsupportedError([f"{sizes}: not served"])
    return LambdaSpec.of(spec, cache_pattern(engine, own_window), engine.num_lookahead_tokens)


def _give_archives(engine: VllmConfig) -> None:
    """Puts an archive beside every layer that recalls, as one more of vLLM's layers; once."""
    layers = get_layers_from_vllm_config(engine, Attention)
    context: dict[str, Any] = engine.compilation_config.static_forward_context
    patterns = {name: layer.impl.pattern for name, layer in layers.items()}
    for name in archive.recalling_layers(LambdaConfig.of(engine), patterns):
        impl, its_name = layers[name].impl, archive.archive_name(name)
        if its_name not in context:
            context[its_name] = impl.archive = Archive(its_name)
            patches.wrap_runner(engine)
            if impl.kernel.search_counts is not None:
                patches.wrap_outputs()


def _asked() -> str:
    """The setting "kernel" of the engine that is being built, or was built last."""
    engine = get_current_vllm_config_or_none()
    if engine is None:
        built_last = getattr(LambdaAttentionImpl, "built_last", None)
        engine = None if built_last is None else built_last.engine
    return registry.AUTOMATIC if engine is None else LambdaConfig.of(engine).kernel


@dataclass
class LambdaMetadata(AttentionMetadata):
    """A step's batch.

    Attributes:
        num_actual_tokens: no row of the query from here on belongs to a request.
        batch: where the requests' rows, keys and blocks are, on the model's device.
    """

    num_actual_tokens: int
    batch: DeviceBatch


class LambdaMetadataBuilder(AttentionMetadataBuilder[LambdaMetadata]):
    """Turns vLLM's description of a batch into ours."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names).values()
        windows = {layer.sliding_window for layer in layers} or {None}
        expected = {cache_pattern(vllm_config, window) for window in windows}
        if not isinstance(kv_cache_spec, LambdaSpec) or expected != {kv_cache_spec.pattern}:
            raise UnsupportedError(
                [
                    f"layers {layer_names[0]} and so on were given the KV cache {kv_cache_spec}, "
                    "which isn't this engine's Λ: build one engine at a time in a process"
                ]
            )
        # Drafts may be made within one captured graph, where a batch changes under its metadata.
        self.supports_draft_decode_metadata_update = (
            self.get_cudagraph_support(vllm_config, kv_cache_spec) is not AttentionCGSupport.NEVER
        )
        config = LambdaConfig.of(vllm_config)
        sentences = [*config.trained.remarks]
        if None in windows:
            _log_what_is_active(kv_cache_spec, vllm_config, layers)
            sentences += trained_length.distances_beyond(
                config.trained, config.pattern, config.middle
            )
        else:
            _warn_if_all_layers_have_windows(vllm_config)
        for sentence in sentences:
            log.warning(vllm_config, "%s", sentence)

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
    ) -> AttentionCGSupport:
        """What every layer's kernel may be captured for: all batches, prefill among them, or those
        in which every request decodes, or none, which leaves graphs of what is between the layers'
        attention."""
        layers = get_layers_from_vllm_config(vllm_config, Attention).values()
        impls: list[Any] = [layer.impl for layer in layers]
        if not isinstance(kv_cache_spec, LambdaSpec) or any(i.kernel is None for i in impls):
            return AttentionCGSupport.NEVER
        cache = kv_cache_spec.block_size, kv_cache_spec.dtype
        supported = [_GRAPHS[impl.kernel_for(*cache).captures] for impl in impls]
        return min(supported, key=lambda s: s.value, default=AttentionCGSupport.NEVER)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> LambdaMetadata:
        """Refers to vLLM's own tensors, so that nothing waits for the device, and a captured graph
        finds the batch of each step where it found that of its capture."""
        common = common_attn_metadata
        return LambdaMetadata(
            num_actual_tokens=common.num_actual_tokens,
            batch=DeviceBatch(
                query_start_loc=common.query_start_loc[: common.num_reqs + 1],
                seq_lens=common.seq_lens[: common.num_reqs],
                block_table=common.block_table_tensor[: common.num_reqs],
                max_query_len=common.max_query_len,
            ),
        )

    def build_for_drafting(
        self, common_attn_metadata: CommonAttentionMetadata, draft_index: int
    ) -> LambdaMetadata:
        metadata = self.build(common_prefix_len=0, common_attn_metadata=common_attn_metadata)
        if draft_index == 0:
            slots = common_attn_metadata.slot_mapping[: metadata.num_actual_tokens]
            metadata.batch = _set_rejected_drafts_apart(metadata.batch, slots)
        return metadata

    def update_draft_decode_metadata(self, metadata: LambdaMetadata) -> None:
        """Nothing to do: `build` refers to the tensors that the draft steps change."""


def _set_rejected_drafts_apart(batch: DeviceBatch, slot_mapping: torch.Tensor) -> DeviceBatch:
    """A draft model's first pass is given the drafts that were just rejected too, as the last rows
    of their request, and no slots to store their keys in. What is in those slots is older: the
    other rows must not come near it. So these rows become a request of their own, at the start of
    the same blocks; nobody looks at what it computes. Where nothing was rejected, it has no rows.

    Args:
        batch: as vLLM describes it.
        slot_mapping: [>= query_start_loc[-1]]; negative where there is no slot.
    """
    starts, ends = batch.query_start_loc[:-1].long(), batch.query_start_loc[1:].long()
    before = torch.nn.functional.pad((slot_mapping < 0).cumsum(0, dtype=torch.int32), (1, 0))
    rejected = before[ends] - before[starts]
    kept = batch.query_start_loc.diff() - rejected
    lens = torch.stack((kept, rejected), dim=1).flatten()
    return DeviceBatch(
        query_start_loc=torch.nn.functional.pad(lens.cumsum(0, dtype=torch.int32), (1, 0)),
        seq_lens=torch.stack((batch.seq_lens - rejected, rejected), dim=1).flatten(),
        block_table=batch.block_table.repeat_interleave(2, dim=0),
        max_query_len=batch.max_query_len,
    )


def _warn_if_all_layers_have_windows(config: VllmConfig) -> None:
    layers = get_layers_from_vllm_config(config, Attention).values()
    if all(layer.sliding_window is not None for layer in layers):
        log.warning(
            config,
            "%s is selected, and every layer of this model has a sliding window of its own, which "
            "it keeps: n_global, n_local and distance_limit change nothing. Positions are exact "
            "beyond the trained length",
            BACKEND_NAME,
        )


def _log_what_is_active(spec: LambdaSpec, config: VllmConfig, layers: Iterable[Attention]) -> None:
    model, resolved = config.model_config, LambdaConfig.of(config)
    impls: list[Any] = [layer.impl for layer in layers]
    kernels = {impl.kernel_name(spec.block_size, spec.dtype) for impl in impls if impl.kernel}
    log.info(
        config,
        "%s is active: kernel %s, n_global %d, n_local %d, distance_limit %d, "
        "trained length %s, max_model_len %d; a request holds at most %d blocks of %d tokens",
        BACKEND_NAME,
        ", ".join(sorted(kernels)) or "unknown",
        resolved.n_global,
        resolved.n_local,
        resolved.distance_limit,
        resolved.trained.length or "unknown",
        model.max_model_len,
        spec.max_admission_blocks_per_request(config.max_in_flight_tokens, model.max_model_len),
        spec.block_size,
    )


class LambdaAttentionImpl(AttentionImpl[LambdaMetadata]):
    """Λ-attention of one layer; see `vllm_lminf.pattern` for what it computes.

    Which kernel it runs is chosen once the weights are there, and looked at again for every size of
    blocks that its cache turns out to have, since vLLM chooses these once the model stands.
    """

    built_last: ClassVar["LambdaAttentionImpl"]

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **unknown: Any,
    ) -> None:
        unserved = {
            f"attention of type {attn_type!r}": attn_type != AttentionType.DECODER,
            f"KV sharing between layers (here with {kv_sharing_target_layer_name})": (
                kv_sharing_target_layer_name is not None
            ),
            **{
                f"the layer argument {name!r}": value is not None for name, value in unknown.items()
            },
        }
        if reasons := [f"{what}: not served" for what, present in unserved.items() if present]:
            raise UnsupportedError(reasons)
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.rules = ScoreRules(
            self.scale,
            logits_soft_cap or None,
            None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32),
            sinks,
        )
        self.engine = get_current_vllm_config()
        self.model_pattern = model_pattern(self.engine)
        self.pattern = layer_pattern(self.model_pattern, sliding_window)
        self.device = torch.device("cpu")
        self.rotary: Rotary | None = None
        self.watch: Watch | None = None
        self.archive: Archive | None = None
        self.kernel: Kernel | None = None
        self._kernels: dict[tuple[int, torch.dtype], tuple[str, Kernel]] = {}
        self._kv_cache: Callable[[], torch.Tensor | None] = _no_cache
        self._bound: tuple[Kernel, PagedCache]
        self._shared: dict[Hashable, Any] = {}
        before: LambdaAttentionImpl | None = getattr(LambdaAttentionImpl, "built_last", None)
        if before is not None and before.engine is self.engine:
            self._shared = before._shared
        LambdaAttentionImpl.built_last = self
        models.expect(self)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Chooses the kernel and waits for the model to be whole; vLLM calls it once the weights
        are there.

        Raises:
            UnsupportedError: the layer is part of no model, or its kernel can't be had.
        """
        self._kv_cache = _no_cache  # its scales may be others
        if self.kernel is not None:
            return  # new weights for a layer that runs
        self.device = next(models.join(self).parameters()).device
        if self.rules.alibi_slopes is not None:
            self.rules.alibi_slopes = self.rules.alibi_slopes.to(self.device)
        self.layer_config = self._layer_config(act_dtype)
        self.kernel_class = registry.kernel_class(self._choose(self.layer_config))
        versions.register_warm_up(self.engine, warm_up)

    def make_ready(self, rotary: Rotary | None) -> None:
        """Gives the layer its kernel, without which it doesn't run. vLLM counts what is on the
        device before there is a cache: a workspace is made here.

        Args:
            rotary: by which its queries and keys are rotated.
        """
        self.rotary = rotary
        rotation = None
        if rotary is not None:
            rotation = Rotation(rotary.tables, rotary.spec.is_neox_style)
        # vLLM has settled by now how long blocks are.
        block_size = self.engine.cache_config.block_size or self.layer_config.block_size
        self.layer_config = replace(self.layer_config, rotation=rotation, block_size=block_size)
        self.kernel = self.kernel_for(self.layer_config.block_size, self.layer_config.cache_dtype)

    def kernel_for(self, block_size: int, dtype: torch.dtype) -> Kernel:
        """The kernel for a cache in such blocks.

        Args:
            block_size: tokens of a block.
            dtype: of the cache, as vLLM types it.

        Raises:
            UnsupportedError: there is none, or not the one that was asked for.
        """
        return self._settled(block_size, dtype)[1]

    def kernel_name(self, block_size: int, dtype: torch.dtype) -> str:
        """Its name, one of the settings, and in brackets its variant; see `kernel_for`."""
        name, kernel = self._settled(block_size, dtype)
        return f"{name} ({kernel.variant})" if kernel.variant else name

    def _settled(self, block_size: int, dtype: torch.dtype) -> tuple[str, Kernel]:
        dtype = self._stored(dtype)
        settled = self._kernels.get((block_size, dtype))
        if settled is None:
            layer = replace(self.layer_config, block_size=block_size, cache_dtype=dtype)
            name = self._choose(layer)
            settled = self._kernels[block_size, dtype] = name, registry.kernel_class(name)(layer)
        return settled

    def _stored(self, dtype: torch.dtype) -> torch.dtype:
        """What a cache stores that vLLM types like this: 8-bit numbers are bytes to it; what they
        are, the layer was told."""
        return self.layer_config.cache_dtype if dtype == torch.uint8 else dtype

    def _choose(self, layer: LayerConfig) -> str:
        """The name of the kernel for a layer; says why where it isn't the best one there is."""
        choice = registry.choose(LambdaConfig.of(self.engine).kernel, layer, load=True)
        if choice.kernel is None:
            raise UnsupportedError(choice.reasons)
        if choice.against and choice.kernel != registry.PLAIN:
            log.info(self.engine, "kernel %r runs: %s", choice.kernel, "; ".join(choice.reasons))
        elif choice.against:
            log.warning(
                self.engine,
                "the much slower PyTorch kernel runs%s: %s",
                "" if layer.device.type == "cpu" else ", outside of CUDA graphs",
                "; ".join(choice.reasons),
            )
        return choice.kernel

    def _layer_config(self, act_dtype: torch.dtype) -> LayerConfig:
        """This layer, its block size as far as it is known."""
        resolved = LambdaConfig.of(self.engine)
        # Layers before the first that recalls run the same kernel, and have no archive.
        middle = resolved.middle if self.pattern == self.model_pattern else None
        return replace(
            layer_config_of(self.engine, self.pattern, middle, resolved.middle_index),
            heads=Heads(self.num_heads, self.num_kv_heads, self.head_size, act_dtype),
            rules=self.rules,
            cache_dtype=cache_dtype_of(self.kv_cache_dtype, act_dtype) or act_dtype,
            device=self.device,
            flash_attention=flash_attention(),
            shared=self._shared,
        )

    def bind(self, layer: Any, kv_cache: torch.Tensor) -> tuple[Kernel, PagedCache]:
        """The kernel for a cache, and the cache as kernels take it. They are kept as long as the
        cache is: vLLM hands over the same one at every step, but frees one that it measures with.

        Args:
            layer: vLLM's layer, which has the scales of a quantised cache.
            kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size].
        """
        if self.kernel is None:
            raise RuntimeError("the layer ran before it was known how it rotates queries and keys")
        kernel = self.kernel_for(kv_cache.shape[2], kv_cache.dtype)
        key_scale, value_scale = (getattr(layer, name, None) for name in ("_k_scale", "_v_scale"))
        cache = PagedCache.of(kv_cache, self._stored(kv_cache.dtype), key_scale, value_scale)
        self._kv_cache, self._bound = weakref.ref(kv_cache, self._unbind), (kernel, cache)
        return self._bound

    def _unbind(self, _: object) -> None:
        self._kv_cache = _no_cache
        del self._bound

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Stores this step's keys and values; see `Kernel.write_cache`."""
        kernel, cache = self._bound if self._kv_cache() is kv_cache else self.bind(layer, kv_cache)
        kernel.write_cache(key, value, cache, slot_mapping)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: LambdaMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attends; keys and values of this step are in the cache already.

        Args:
            layer: vLLM's layer, which has the scales of a quantised cache.
            query: rotated; shape [num_tokens, num_heads, head_size].
            key: rotated; shape [num_tokens, num_kv_heads, head_size]; goes into the archive, where
                the layer has one.
            value: the same.
            kv_cache: shape [num_blocks, num_kv_heads, block_size, 2 * head_size].
            attn_metadata: the batch; None in a warm-up run, which computes nothing, and where
                vLLM learns how much memory a step takes.
            output: written in place; shape [num_tokens, num_heads, head_size].
            output_scale: for a fused quantisation of the output, which is not offered.
            output_block_scale: likewise.
        """
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedError(["fused output quantisation: not served"])
        if attn_metadata is None:
            return self._forward_without_batch(query, key, value, output)
        kernel, cache = self._bound if self._kv_cache() is kv_cache else self.bind(layer, kv_cache)
        batch, rows = attn_metadata.batch, slice(attn_metadata.num_actual_tokens)
        if not len(query) == len(output) == rows.stop:
            query, written = query[rows], output[rows]
        else:
            written = output
        pages = None if self.archive is None else self.archive.pages
        if self.archive is None or pages is None:
            # No archive, or none yet: vLLM captures graphs to measure them before it plans caches.
            kernel.attend(query, cache, batch, written)
        else:
            recall = self.archive.batch()
            kernel.write_archive(key[rows], value[rows], pages, batch, recall)
            kernel.attend_and_recall(query, cache, batch, pages, recall, written)
        return output

    def _forward_without_batch(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor
    ) -> torch.Tensor:
        """Computes nothing. Takes, for a moment, as much memory of the device as a step does
        besides its results: vLLM measures it."""
        if self.watch is not None:
            self.watch(query, key, value)
        elif self.kernel is not None:
            max_requests = self.engine.scheduler_config.max_num_seqs
            size = self.kernel.temporary_bytes(output.shape[0], max_requests)
            torch.empty(size, dtype=torch.uint8, device=self.device)
        return output.zero_()


def _no_cache() -> None:
    """In place of a weak reference, where no cache is bound."""


def warm_up(engine: VllmConfig) -> None:
    """Compiles and loads what an engine's layers can launch, before vLLM says that it is ready.

    vLLM's own warm-up sends a few short prompts through the model. It reaches neither the kernels
    for longer ones, nor those for other numbers of requests; and where it is asked to, it ends an
    engine that compiles anything later. Layers that are alike launch the same: one of them does it.
    Their caches are there by then.
    """
    scheduler = engine.scheduler_config
    # A draft model's first pass may see each request as two, see `LambdaMetadataBuilder`.
    max_requests = scheduler.max_num_seqs * (1 if engine.speculative_config is None else 2)
    seen = set()
    for layer in get_layers_from_vllm_config(engine, Attention).values():
        impl, kv_cache = layer.impl, layer.kv_cache
        if not isinstance(impl, LambdaAttentionImpl) or impl.kernel is None or not kv_cache.numel():
            continue
        kernel, cache = impl.bind(layer, kv_cache)
        alike = (
            type(kernel),
            impl.layer_config.signature,
            kv_cache.dtype,
            kv_cache.shape[1:],
            kv_cache.stride(),
        )
        if alike not in seen:
            seen.add(alike)
            kernel.warm_up(cache, max_requests, scheduler.max_num_batched_tokens)
