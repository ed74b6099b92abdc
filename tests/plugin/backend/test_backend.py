"""One attention layer, from vLLM's description of a batch to its output, on poisoned memory."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec

from vllm_lminf.errors import UnsupportedError
from vllm_lminf.kernels.host_batch import HostBatch
from vllm_lminf.kernels.oracle import lambda_attention
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.plugin.backend import (
    LambdaAttentionBackend,
    LambdaAttentionImpl,
    LambdaMetadata,
    LambdaMetadataBuilder,
)
from vllm_lminf.plugin.kv_cache import LambdaSpec

PATTERN = LambdaPattern(4, 512, 600)
FULL = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float32)
CPU = torch.device("cpu")


def make_impl(**arguments: Any) -> LambdaAttentionImpl:
    return LambdaAttentionImpl(4, 64, 0.125, **{"num_kv_heads": 2, **arguments})


def describe(requests: list[tuple[int, int]], padding: int = 0) -> CommonAttentionMetadata:
    """A batch of requests, each with tokens in the cache before and tokens of this step."""
    lens = [new for _, new in requests]
    starts = torch.tensor([0, *lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    seq_lens = torch.tensor([computed + new for computed, new in requests], dtype=torch.int32)
    blocks = -(-int(seq_lens.max()) // 16)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=seq_lens,
        num_reqs=len(requests),
        num_actual_tokens=sum(lens) + padding,
        max_query_len=max(lens),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=torch.arange(1, 1 + len(requests) * blocks).view(-1, blocks).int(),
        slot_mapping=torch.empty(0, dtype=torch.int64),
    )


def build(config: VllmConfig, batch: CommonAttentionMetadata) -> LambdaMetadata:
    spec = LambdaSpec.of(FULL, PATTERN)
    return LambdaMetadataBuilder(spec, ["layer"], config, CPU).build(0, batch)


class Model(nn.Module):
    """A model of one layer that is given nothing but positions to see, with a weight to have a
    device."""

    def __init__(self, impl: LambdaAttentionImpl) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8 * 64))
        rope = {"rope_theta": 1e4, "rope_type": "default"}
        self.rotary_emb = get_rope(64, 1024, True, rope, dtype=torch.float32)
        self.attn = nn.Module()
        self.attn.impl, self.attn.layer_name = impl, "layer"

    def turn(self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> Any:
        """The rotated queries and keys."""
        return self.rotary_emb(positions, query, key)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        heads = self.weight.view(8, 8, 64)[: len(input_ids)]
        query, key = self.turn(positions, heads[:, :4].clone(), heads[:, 4:6].clone())
        output, cache = torch.empty(len(input_ids), 4, 64), torch.empty(0)
        return self.attn.impl.forward(self.attn, query, key, heads[:, 6:], cache, None, output)


class TestSpec:
    def test_full_attention_becomes_the_pattern(self) -> None:
        make_impl()
        assert LambdaAttentionBackend.customize_spec(FULL) == LambdaSpec.of(FULL, PATTERN)

    @pytest.mark.parametrize(
        "spec",
        [
            replace(FULL, non_causal=True),
            MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=576, dtype=torch.float32),
        ],
        ids=lambda spec: type(spec).__name__,
    )
    def test_other_caches_are_refused_by_name(self, spec: Any) -> None:
        make_impl()
        with pytest.raises(UnsupportedError, match=type(spec).__name__):
            LambdaAttentionBackend.customize_spec(spec)

    def test_values_of_another_size_than_keys_are_refused(self) -> None:
        make_impl()
        with pytest.raises(UnsupportedError, match="keys of 64 dimensions and values of 32"):
            LambdaAttentionBackend.customize_spec(replace(FULL, head_size_v=32))

    def test_a_window_of_the_models_own_stays(self) -> None:
        make_impl()
        own = SlidingWindowSpec(
            block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float32, sliding_window=64
        )
        spec = LambdaAttentionBackend.customize_spec(own)
        assert spec == LambdaSpec.of(own, LambdaPattern(0, 64, 64))
        layer = make_impl(sliding_window=64)
        assert layer.pattern == LambdaPattern(0, 64, 64)
        assert LambdaAttentionBackend.customize_spec(FULL).pattern == PATTERN


class TestMetadata:
    def test_positions_of_a_mixed_batch(self, config: VllmConfig) -> None:
        metadata = build(config, describe([(7, 1), (0, 3), (10, 2)]))
        host = HostBatch.of(metadata.batch)
        assert host.positions.tolist() == [7, 0, 1, 2, 10, 11]
        assert host.query_start_loc.tolist() == [0, 1, 4, 6]
        assert host.seq_lens.tolist() == [8, 3, 12]
        assert metadata.num_actual_tokens == 6

    def test_padding_is_left_out(self, config: VllmConfig) -> None:
        metadata = build(config, describe([(7, 1), (0, 3)], padding=5))
        host = HostBatch.of(metadata.batch)
        assert host.query_start_loc[-1] == 4
        assert host.positions.shape == (4,)

    def test_nothing_waits_for_the_device(self, config: VllmConfig) -> None:
        """On a device from which no number can be read. Its batch lies in vLLM's own tensors."""
        batch = describe([(7, 1), (0, 3)], padding=2)
        on_device = replace(
            batch,
            query_start_loc=batch.query_start_loc.to("meta"),
            query_start_loc_cpu=None,
            seq_lens=batch.seq_lens.to("meta"),
            block_table_tensor=batch.block_table_tensor.to("meta"),
            slot_mapping=torch.empty(6, dtype=torch.int64, device="meta"),
        )
        spec = LambdaSpec.of(FULL, PATTERN)
        builder = LambdaMetadataBuilder(spec, ["layer"], config, torch.device("meta"))
        for built in (
            builder.build(0, on_device),
            builder.build_for_cudagraph_capture(on_device),
            builder.build_for_drafting(on_device, draft_index=1),
        ):
            assert built.batch.seq_lens.untyped_storage() is on_device.seq_lens.untyped_storage()
            assert built.batch.max_query_len == 3
            assert built.num_actual_tokens == 6
        first = builder.build_for_drafting(on_device, draft_index=0)
        assert first.batch.seq_lens.shape == (4,)
        with pytest.raises(NotImplementedError):
            HostBatch.of(first.batch)

    def test_rejected_drafts_are_requests_of_their_own(self, config: VllmConfig) -> None:
        """Rows without a slot, as the last of their request, or all of it, or none."""
        batch = describe([(10, 4), (5, 2), (0, 3)])
        slots = [3, 4, -1, -1, -1, -1, 7, 8, 9]
        batch = replace(batch, slot_mapping=torch.tensor([*slots, -1]), num_actual_tokens=10)
        builder = LambdaMetadataBuilder(LambdaSpec.of(FULL, PATTERN), ["layer"], config, CPU)
        metadata = builder.build_for_drafting(batch, draft_index=0)
        host = HostBatch.of(metadata.batch)
        assert host.query_start_loc.tolist() == [0, 2, 4, 4, 6, 9, 9]
        assert host.seq_lens.tolist() == [12, 2, 5, 2, 3, 0]
        assert host.positions.tolist() == [10, 11, 0, 1, 0, 1, 0, 1, 2]
        table = batch.block_table_tensor
        assert torch.equal(metadata.batch.block_table[::2], table)
        assert torch.equal(metadata.batch.block_table[1::2], table)
        assert metadata.batch.query_start_loc.dtype == torch.int32
        assert metadata.batch.seq_lens.dtype == torch.int32

    def test_graphs_need_a_layer_that_may_be_captured(self, config: VllmConfig) -> None:
        spec = LambdaSpec.of(FULL, PATTERN)
        support = LambdaMetadataBuilder.get_cudagraph_support(config, spec)
        assert support is AttentionCGSupport.NEVER

    def test_positions_do_not_overflow(self, config: VllmConfig) -> None:
        batch = describe([(7, 2)])
        batch.seq_lens[0] = 2**31 - 1
        metadata = build(config, batch)
        assert HostBatch.of(metadata.batch).positions.tolist() == [2**31 - 3, 2**31 - 2]

    def test_cache_of_another_engine_is_refused(self, config: VllmConfig) -> None:
        other = LambdaSpec.of(FULL, replace(PATTERN, n_global=5))
        for spec in (FULL, other):
            with pytest.raises(UnsupportedError, match="one engine at a time"):
                LambdaMetadataBuilder(spec, ["layer"], config, CPU)


class TestLayer:
    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            ({"attn_type": AttentionType.ENCODER_ONLY}, "encoder_only"),
            ({"kv_sharing_target_layer_name": "layer"}, "KV sharing"),
            ({"novelty": 1}, "'novelty'"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_unserved_layers_are_refused_by_name(
        self, arguments: dict[str, Any], named: str
    ) -> None:
        with pytest.raises(UnsupportedError, match=named) as refusal:
            make_impl(**arguments)
        assert len(refusal.value.reasons) == 1

    def test_every_reason_at_once(self) -> None:
        with pytest.raises(UnsupportedError) as refusal:
            make_impl(kv_sharing_target_layer_name="layer", attn_type="encoder", novelty=1)
        assert len(refusal.value.reasons) == 3

    def test_arguments_that_ask_for_nothing(self) -> None:
        make_impl(alibi_slopes=None, sliding_window=None, logits_soft_cap=0.0, novelty=None)

    def test_warm_up_computes_nothing(self) -> None:
        output = torch.full((3, 4, 64), torch.nan)
        nothing = torch.empty(0)
        make_impl().forward(None, nothing, nothing, nothing, nothing, None, output)
        assert (output == 0).all()

    def test_a_prompt_and_a_token_past_the_window(self, config: VllmConfig) -> None:
        """As a model runs it: its own rotary module replaced, keys written, queries attended to,
        in blocks of a cache that holds NaN before, with rows of padding."""
        impl = make_impl()
        model = Model(impl)
        impl.process_weights_after_loading(torch.float32)
        LambdaAttentionBackend.customize_spec(FULL)

        length = 700
        query = torch.randn(length, 4, 64)
        key, value = torch.randn(2, length, 2, 64)
        cache = torch.full((1 + 44, 2, 16, 2 * 64), torch.nan)
        outputs = []
        for start, end in ((0, 650), (650, 699), (699, 700)):
            batch = describe([(start, end - start)], padding=2)
            metadata = build(config, batch)
            positions = torch.arange(start, end)
            turned = model.turn(positions, *(x[start:end].clone() for x in (query, key)))
            slots = batch.block_table_tensor[0, positions // 16].long() * 16 + positions % 16
            impl.do_kv_cache_update(model.attn, turned[1], value[start:end], cache, slots)
            rows = torch.cat((turned[0], torch.full((2, 4, 64), torch.nan)))
            output = torch.full_like(rows, -7.0)
            impl.forward(model.attn, rows, turned[1], value[start:end], cache, metadata, output)
            assert (output[-2:] == -7).all()
            outputs.append(output[:-2])
        assert impl.rotary is not None
        arguments = {"scale": 0.125, "rotary": impl.rotary.spec}
        exact = lambda_attention(query.double(), key.double(), value.double(), PATTERN, **arguments)
        loss = (lambda_attention(query, key, value, PATTERN, **arguments) - exact).abs().max()
        error = (torch.cat(outputs) - exact).abs().max()
        assert error <= 3 * loss
