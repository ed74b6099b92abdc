"""What every layer needs to know of a batch, put together once a step."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_lminf import compat
from vllm_lminf.attention.hugging_face import ExactPositionEmbeddings
from vllm_lminf.attention.patterns import cache_pattern
from vllm_lminf.attention.rotary import ExactRotaryEmbedding
from vllm_lminf.config import BACKEND_NAME
from vllm_lminf.kernels.cpu import CpuBatch
from vllm_lminf.kernels.paged import FarRotations, far_rotations
from vllm_lminf.kv_cache.spec import LambdaSpec
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.startup import UnsupportedError, pattern_of

logger = init_logger("vllm.lminf")

Rotary = ExactRotaryEmbedding | ExactPositionEmbeddings


@dataclass
class LambdaMetadata(AttentionMetadata):
    """A batch, as the kernel wants it.

    Attributes:
        num_actual_tokens: rows of the query that belong to a request; the rest is padding.
        query_start_loc: offsets of the requests' rows; int32 [num_requests + 1], on the CPU.
        seq_lens: every request's tokens in the cache, this step's included; int32 [num_requests],
            on the CPU.
        block_table: int32 [num_requests, max_blocks].
        positions: int64 [num_actual_tokens].
    """

    num_actual_tokens: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    positions: torch.Tensor
    _far: dict[tuple[Rotary, LambdaPattern], FarRotations] = field(default_factory=dict)
    _cpu: dict[tuple[Rotary | None, LambdaPattern], CpuBatch] = field(default_factory=dict)

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
                self.query_start_loc, self.seq_lens, self.block_table, pattern, far
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
        if None in windows:
            _log_what_is_active(kv_cache_spec, vllm_config, layers)
        else:
            _warn_if_all_layers_have_windows(vllm_config)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> LambdaMetadata:
        common = common_attn_metadata
        query_start_loc = common.query_start_loc_cpu[: common.num_reqs + 1]
        seq_lens = common.seq_lens[: common.num_reqs].cpu()
        query_lens = query_start_loc.diff()
        offset_in_request = torch.arange(int(query_start_loc[-1]))
        offset_in_request -= query_start_loc[:-1].repeat_interleave(query_lens)
        positions = (seq_lens - query_lens).repeat_interleave(query_lens) + offset_in_request
        return LambdaMetadata(
            num_actual_tokens=int(query_start_loc[-1]),
            query_start_loc=query_start_loc,
            seq_lens=seq_lens,
            block_table=common.block_table_tensor,
            positions=positions.to(self.device, torch.int64),
        )

    def build_for_drafting(
        self, common_attn_metadata: CommonAttentionMetadata, draft_index: int
    ) -> LambdaMetadata:
        common = common_attn_metadata
        if draft_index == 0:
            common = _set_rejected_drafts_apart(common)
        return self.build(common_prefix_len=0, common_attn_metadata=common, fast_build=True)


def _set_rejected_drafts_apart(common: CommonAttentionMetadata) -> CommonAttentionMetadata:
    """A draft model's first pass is given the drafts that were just rejected too, as the last rows
    of their request, and no slots to store their keys in. What is in those slots is older: the
    other rows must not come near it. So these rows become a request of their own, at the start of
    the same blocks; nobody looks at what it computes.
    """
    query_start_loc = common.query_start_loc_cpu[: common.num_reqs + 1]
    query_lens = query_start_loc.diff()
    rows = torch.arange(common.num_reqs).repeat_interleave(query_lens)
    without_slot = common.slot_mapping[: len(rows)].cpu() < 0
    rejected = torch.zeros_like(query_lens).index_add_(0, rows, without_slot.to(query_lens.dtype))
    if not rejected.any():
        return common
    seq_lens = common.seq_lens[: common.num_reqs].cpu()
    lens = torch.stack((query_lens - rejected, rejected), dim=1).flatten()
    ends = torch.stack((seq_lens - rejected, rejected), dim=1).flatten()
    block_table = common.block_table_tensor[: common.num_reqs].repeat_interleave(2, dim=0)
    kept = lens > 0
    return replace(
        common,
        num_reqs=int(kept.sum()),
        query_start_loc_cpu=torch.cat((query_start_loc[:1], lens[kept].cumsum(0))).int(),
        seq_lens=ends[kept],
        block_table_tensor=block_table[kept.to(block_table.device)],
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
        compat.trained_length(model) or "unknown",
        model.max_model_len,
        spec.max_admission_blocks_per_request(config.max_in_flight_tokens, model.max_model_len),
        spec.block_size,
    )
