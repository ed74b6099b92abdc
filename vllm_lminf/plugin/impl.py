"""One attention layer: writes its keys and values, and attends under the Λ."""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl, AttentionLayer, AttentionType

from vllm_lminf.errors import UnsupportedError
from vllm_lminf.kernels.base import Heads, ScoreRules, Situation
from vllm_lminf.kernels.cpu.kernel import CpuLayer
from vllm_lminf.plugin import versions
from vllm_lminf.plugin.checks import cache_dtype_of, kernel_of, pattern_being_built, situation_of
from vllm_lminf.plugin.layer_kernel import Layer, LayerKernel, compile_layer, scales_of
from vllm_lminf.plugin.loaded_model import models
from vllm_lminf.plugin.metadata import LambdaMetadata
from vllm_lminf.plugin.patterns import layer_pattern
from vllm_lminf.plugin.probe import Watch
from vllm_lminf.plugin.rotary import Rotary
from vllm_lminf.plugin.warm_up import warm_up


class LambdaAttentionImpl(AttentionImpl[LambdaMetadata]):
    """Λ-attention of one layer; see `vllm_lminf.pattern` for what it computes."""

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
        self.model_pattern = pattern_being_built(self.engine)
        self.pattern = layer_pattern(self.model_pattern, sliding_window)
        self.device = torch.device("cpu")
        self.compiled: CpuLayer | None = None
        self.rotary: Rotary | None = None
        self.kernel: LayerKernel | None = None
        self.watch: Watch | None = None
        LambdaAttentionImpl.built_last = self
        models.expect(self)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Waits for the model to be whole; vLLM calls it once the weights are there.

        Raises:
            UnsupportedError: the layer is part of no model, or its kernel can't be had.
        """
        if self.kernel is not None:
            return  # new weights for a layer that runs
        self.device = next(models.join(self).parameters()).device
        if self.rules.alibi_slopes is not None:
            self.rules.alibi_slopes = self.rules.alibi_slopes.to(self.device)
        self.situation = self._situation(act_dtype)
        self.compiled = compile_layer(
            kernel_of(self.engine), self.device, self.situation.heads, self.rules
        )
        versions.register_warm_up(self.engine, warm_up)

    def make_ready(self, rotary: Rotary | None) -> None:
        """Gives the layer its kernel, without which it doesn't run.

        Args:
            rotary: by which its queries and keys are turned.
        """
        self.rotary = rotary
        layer = Layer(
            self.situation, self.rules, rotary, self.compiled, self.device, self.engine,
            decode_len=1 + self.engine.num_speculative_tokens,
        )  # fmt: skip
        self.kernel = LayerKernel(kernel_of(self.engine), layer)

    def _situation(self, act_dtype: torch.dtype) -> Situation:
        """Where this layer runs, its block size as far as it is known."""
        model = situation_of(self.engine, self.pattern)
        return replace(
            model,
            device_type=self.device.type,
            heads=Heads(self.num_heads, self.num_kv_heads, self.head_size, act_dtype),
            cache_dtype=cache_dtype_of(self.kv_cache_dtype, act_dtype) or act_dtype,
            has_rotation=self.rules.alibi_slopes is None,
            has_alibi=self.rules.alibi_slopes is not None,
            has_softcap=self.rules.softcap is not None,
            has_sinks=self.rules.sinks is not None,
        )

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Stores this step's keys and values; see `LayerKernel`."""
        self._ready_kernel().write_cache(key, value, kv_cache, slot_mapping, scales_of(layer))

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
            key: unused.
            value: unused.
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
            if self.watch is not None:
                self.watch(query, key, value)
            elif self.kernel is not None:
                max_requests = self.engine.scheduler_config.max_num_seqs
                self.kernel.take_memory(output.shape[0], max_requests)
            return output.zero_()
        n = attn_metadata.num_actual_tokens
        scales = scales_of(layer)
        self._ready_kernel().attend(query[:n], kv_cache, attn_metadata, output[:n], scales)
        return output

    def _ready_kernel(self) -> LayerKernel:
        if self.kernel is None:
            raise RuntimeError("the layer ran before it was known how it turns queries and keys")
        return self.kernel
