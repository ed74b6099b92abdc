"""What every layer needs to know of a batch, put together once a step."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec

from vllm_lminf.errors import UnsupportedError
from vllm_lminf.kernels.base import DeviceBatch
from vllm_lminf.kernels.cpu.kernel import CpuBatch
from vllm_lminf.kernels.reference import FarRotations, far_rotations
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.plugin import trained_length
from vllm_lminf.plugin.checks import pattern_of
from vllm_lminf.plugin.config import BACKEND_NAME
from vllm_lminf.plugin.kv_cache import LambdaSpec
from vllm_lminf.plugin.patterns import cache_pattern
from vllm_lminf.plugin.rotary import Rotary
from vllm_lminf.plugin.speculation import target_of

logger = init_logger("vllm.lminf")


@dataclass
class LambdaMetadata(AttentionMetadata):
    """A batch, as the kernels want it.

    What kernels on the host need is fetched when the first of them asks, and that waits for the
    device; kernels on the device need none of it.

    Attributes:
        num_actual_tokens: no row of the query from here on belongs to a request.
        batch: where the requests' rows, keys and blocks are, on the model's device.
    """

    num_actual_tokens: int
    batch: DeviceBatch
    _far: dict[tuple[Rotary, LambdaPattern], FarRotations] = field(default_factory=dict)
    _cpu: dict[tuple[Rotary | None, LambdaPattern], CpuBatch] = field(default_factory=dict)

    @cached_property
    def query_start_loc(self) -> torch.Tensor:
        """Offsets of the requests' rows; int32 [num_requests + 1], on the CPU."""
        return self.batch.query_start_loc.cpu()

    @cached_property
    def seq_lens(self) -> torch.Tensor:
        """Every request's tokens in the cache, this step's included; int32 [num_requests], on the
        CPU."""
        return self.batch.seq_lens.cpu()

    @cached_property
    def positions(self) -> torch.Tensor:
        """Where the requests' rows stand; int64 [query_start_loc[-1]], on the model's device."""
        query_lens = self.query_start_loc.diff()
        offset_in_request = torch.arange(int(self.query_start_loc[-1]))
        offset_in_request -= self.query_start_loc[:-1].repeat_interleave(query_lens)
        positions = (self.seq_lens - query_lens).repeat_interleave(query_lens) + offset_in_request
        return positions.to(self.batch.seq_lens.device, torch.int64)

    def far(self, rotary: Rotary, pattern: LambdaPattern) -> FarRotations:
        """The far rotations of this batch, computed by the first layer that asks for them."""
        if (rotary, pattern) not in self._far:
            self._far[rotary, pattern] = far_rotations(
                rotary.tables, rotary.spec.is_neox_style, self.positions, pattern
            )
        return self._far[rotary, pattern]

    def cpu_batch(self, rotary: Rotary | None, pattern: LambdaPattern) -> CpuBatch:
        """This batch as the compiled kernels want it, put together by the first layer that asks."""
        if (rotary, pattern) not in self._cpu:
            far = None if rotary is None else self.far(rotary, pattern)
            self._cpu[rotary, pattern] = CpuBatch(
                self.query_start_loc, self.seq_lens, self.batch.block_table, pattern, far
            )
        return self._cpu[rotary, pattern]


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
        learnt = trained_length.of(target_of(vllm_config))
        sentences = [*learnt.remarks]
        if None in windows:
            _log_what_is_active(kv_cache_spec, vllm_config, layers)
            sentences += trained_length.distances_beyond(learnt, pattern_of(vllm_config))
        else:
            _warn_if_all_layers_have_windows(vllm_config)
        for sentence in sentences:
            logger.warning_once("%s", sentence)

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
    ) -> AttentionCGSupport:
        """What every layer's kernel may be captured for: all batches, prefill among them, or those
        in which every request decodes, or none, which leaves graphs of what is between the layers'
        attention."""
        kernels = [
            layer.impl.kernel
            for layer in get_layers_from_vllm_config(vllm_config, Attention).values()
        ]
        if not isinstance(kv_cache_spec, LambdaSpec) or None in kernels:
            return AttentionCGSupport.NEVER
        cache = kv_cache_spec.block_size, kv_cache_spec.dtype
        supported = [kernel.in_graphs(*cache) for kernel in kernels]
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
        logger.warning_once(
            "%s is selected, and every layer of this model has a sliding window of its own, which "
            "it keeps: n_global, n_local and distance_limit change nothing. Positions are exact "
            "beyond the trained length",
            BACKEND_NAME,
        )


def _log_what_is_active(spec: LambdaSpec, config: VllmConfig, layers: Iterable[Attention]) -> None:
    model, pattern = config.model_config, pattern_of(config)
    impls: list[Any] = [layer.impl for layer in layers]
    kernels = {impl.kernel.name(spec.block_size, spec.dtype) for impl in impls if impl.kernel}
    logger.info_once(
        "%s is active: kernel %s, n_global %d, n_local %d, distance_limit %d, "
        "trained length %s, max_model_len %d; a request holds at most %d blocks of %d tokens",
        BACKEND_NAME,
        ", ".join(sorted(kernels)) or "unknown",
        pattern.n_global,
        pattern.n_local,
        pattern.distance_limit,
        trained_length.of(target_of(config)).length or "unknown",
        model.max_model_len,
        spec.max_admission_blocks_per_request(config.max_in_flight_tokens, model.max_model_len),
        spec.block_size,
    )
