"""A model, its layers' cache and its batches, made by the functions of vLLM's newer model runner.

The platform is NVIDIA's and the tensors are the CPU's, where Triton's kernels are interpreted.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from vllm.compilation.backends import split_graph
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.parallel_state import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.warmup.jit_warmup import JitWarmupRegistry
from vllm.utils.network_utils import get_open_port
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.utils import (
    get_supported_kv_cache_layouts,
    record_kv_cache_layout,
)
from vllm.v1.worker.gpu.attn_utils import (
    build_attn_metadata,
    build_slot_mappings_by_layer,
    get_kv_cache_spec,
    init_attn_backend,
    init_kv_cache,
)

from tests.engine.oracle_model import oracle_logprobs, save_tiny_llama
from tests.engine.test_exactness import TOLERANCE
from tests.plugin.kv_cache.planning import get_kv_cache_configs
from vllm_lminf.kernels.base import PagedCache
from vllm_lminf.kernels.triton.layer import TritonKernel
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.plugin import register
from vllm_lminf.plugin.backend import LambdaAttentionBackend, LambdaMetadata
from vllm_lminf.plugin.kv_cache import LambdaSpec

PATTERN = LambdaPattern(n_global=5, n_local=24, distance_limit=30)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    return save_tiny_llama(path / "model", num_heads=4, num_kv_heads=2, head_size=16)


@pytest.fixture(scope="module")
def config(folder: Path) -> Iterator[VllmConfig]:
    register()
    from vllm import ModelRegistry

    ModelRegistry.register_model("LlamaForCausalLM", LlamaForCausalLM)
    settings = {"n_global": 5, "n_local": 24, "distance_limit": 30, "kernel": "triton"}
    config = EngineArgs(
        model=str(folder),
        attention_backend="LMINF",
        additional_config={"lminf": settings},
        dtype="float32",
        max_model_len=1000,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_num_seqs=4,
        compilation_config={"custom_ops": ["none"]},
    ).create_engine_config()
    assert config.use_v2_model_runner
    with pytest.MonkeyPatch.context() as patch, set_current_vllm_config(config):
        patch.setenv("VLLM_HOST_IP", "127.0.0.1")
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{get_open_port()}", 0, "gloo")
        initialize_model_parallel()
        yield config
        destroy_model_parallel()
        destroy_distributed_environment()


class Runner:
    """What vLLM's runner does around a model, request by request in blocks of their own.

    Memory that no request has written holds NaN, and so does what left a request's window: its
    entry in the block table becomes that of block 0.
    """

    BLOCKS = 8
    """For each request."""

    def __init__(self, model: nn.Module, config: VllmConfig) -> None:
        self.model, self.config = model, config
        layers = config.compilation_config.static_forward_context
        self.specs = get_kv_cache_spec(config)
        (layout,) = get_supported_kv_cache_layouts([LambdaAttentionBackend])
        record_kv_cache_layout(config.cache_config, layout.name)
        (self.pool,) = get_kv_cache_configs(config, [self.specs], [1 << 24])
        self.groups, self.graphs, sizes = init_attn_backend(self.pool, config, CPU)
        self.block_size = sizes[0]
        caches = init_kv_cache(
            layers, self.pool, CPU, sizes, config, attn_groups=[g for gs in self.groups for g in gs]
        )
        for cache in caches.values():
            cache.fill_(torch.nan)
        max_requests = config.scheduler_config.max_num_seqs
        self.block_table = torch.zeros(max_requests, self.BLOCKS, dtype=torch.int32)
        self.seq_lens = torch.zeros(max_requests, dtype=torch.int32)
        self.query_start_loc = torch.zeros(max_requests + 1, dtype=torch.int32)

    def metadata(
        self, batch: dict[int, tuple[int, int]], padded: int, for_capture: bool = False
    ) -> tuple[dict[str, LambdaMetadata], torch.Tensor, torch.Tensor]:
        """A step's metadata, its positions and its slots; requests' keys are rows of the tables."""
        lens = [end - start for start, end in batch.values()]
        positions = torch.cat([torch.arange(start, end) for start, end in batch.values()])
        slots = torch.full((sum(lens) + padded,), -1)
        self.block_table.zero_()
        self.seq_lens.zero_()
        self.query_start_loc.fill_(sum(lens))
        row = 0
        for r, (request, (start, end)) in enumerate(batch.items()):
            blocks = 1 + request * self.BLOCKS + torch.arange(self.BLOCKS, dtype=torch.int32)
            for freed in PATTERN.freed_blocks(start, self.block_size):
                blocks[freed.start : freed.stop] = 0
            self.block_table[r], self.seq_lens[r], self.query_start_loc[r] = blocks, end, row
            where = torch.arange(start, end)
            slots[row : row + end - start] = (
                blocks[where // self.block_size].long() * self.block_size + where % self.block_size
            )
            row += end - start
        num_requests = len(batch) + (1 if padded else 0)
        by_layer = build_attn_metadata(
            attn_groups=self.groups,
            num_reqs=num_requests,
            num_tokens=sum(lens) + padded,
            query_start_loc_gpu=self.query_start_loc[: num_requests + 1],
            query_start_loc_cpu=self.query_start_loc[: num_requests + 1].clone(),
            max_query_len=max(lens),
            seq_lens=self.seq_lens,
            max_seq_len=1000,
            block_tables=[self.block_table[:num_requests]],
            slot_mappings=slots[None],
            kv_cache_config=self.pool,
            for_cudagraph_capture=for_capture,
        )
        return by_layer, positions, slots

    def logprobs(
        self, tokens: dict[int, list[int]], batch: dict[int, tuple[int, int]], padded: int
    ) -> dict[int, torch.Tensor]:
        """Log-probabilities over the vocabulary after every token of the step."""
        by_layer, positions, slots = self.metadata(batch, padded)
        ids = torch.tensor([t for r, (a, b) in batch.items() for t in tokens[r][a:b]])
        ids, positions = (torch.nn.functional.pad(x, (0, padded)) for x in (ids, positions))
        mapping = build_slot_mappings_by_layer(slots[None], self.pool)
        with (
            torch.inference_mode(),
            set_forward_context(by_layer, self.config, num_tokens=len(ids), slot_mapping=mapping),
        ):
            hidden = self.model(ids, positions)
            scores = self.model.compute_logits(hidden).log_softmax(-1)
        ends = np.cumsum([b - a for a, b in batch.values()]).tolist()
        starts = [0, *ends[:-1]]
        return {r: scores[a:b] for r, a, b in zip(batch, starts, ends, strict=True)}


@pytest.fixture(scope="module")
def registry(config: VllmConfig) -> JitWarmupRegistry:
    """What vLLM works through before it captures graphs and says that it is ready."""
    return JitWarmupRegistry(config)


@pytest.fixture(scope="module")
def runner(config: VllmConfig, registry: JitWarmupRegistry) -> Runner:
    """A tiny Llama, loaded as vLLM loads it, on the CPU."""
    loader = get_model_loader(config.load_config)
    with registry.activate():
        with set_default_torch_dtype(torch.float32):
            model = initialize_model(vllm_config=config)
        loader.load_weights(model, config.model_config)
        process_weights_after_loading(model, config.model_config, CPU)
    return Runner(model.eval(), config)


class TestCache:
    def test_every_layer_has_the_lambdas(self, runner: Runner) -> None:
        assert {type(spec) for spec in runner.specs.values()} == {LambdaSpec}
        assert {spec.pattern for spec in runner.specs.values()} == {PATTERN}

    def test_the_worker_blanks_no_pinned_block(self, runner: Runner) -> None:
        """It blanks what is below a plain window, as far as this says."""
        assert {spec.num_retained_tokens for spec in runner.specs.values()} == {0}


class TestGraphs:
    def test_all_batches_may_be_captured(self, runner: Runner) -> None:
        assert runner.graphs.min_cg_support is AttentionCGSupport.ALWAYS

    @pytest.mark.parametrize("for_capture", [False, True])
    def test_a_batch_refers_to_tensors_that_stay(self, runner: Runner, for_capture: bool) -> None:
        """A captured graph reads each step's batch where that of its capture was."""
        by_layer, *_ = runner.metadata({0: (7, 8), 2: (0, 5)}, padded=3, for_capture=for_capture)
        (metadata,) = {id(m): m for m in by_layer.values()}.values()
        batch = metadata.batch
        for mine, theirs in (
            (batch.query_start_loc, runner.query_start_loc),
            (batch.seq_lens, runner.seq_lens),
            (batch.block_table, runner.block_table),
        ):
            assert mine.data_ptr() == theirs.data_ptr()
        assert batch.seq_lens.tolist() == [8, 5, 0]
        assert batch.query_start_loc.tolist() == [0, 1, 6, 6]
        assert batch.max_query_len == 5
        assert metadata.num_actual_tokens == 9

    def test_drafts_may_be_made_within_a_graph(self, runner: Runner) -> None:
        (builder,) = runner.groups[0][0].metadata_builders
        assert builder.supports_draft_decode_metadata_update
        by_layer, *_ = runner.metadata({0: (7, 8)}, padded=0)
        builder.update_draft_decode_metadata(next(iter(by_layer.values())))


class TestWarmUp:
    """What is launched then is held against all that serving launches in
    `tests.kernels.triton.test_keys`."""

    def test_once_for_layers_that_are_alike(
        self,
        runner: Runner,
        registry: JitWarmupRegistry,
        config: VllmConfig,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """After the caches are there, for the largest batches; nothing is written to the caches."""
        assert len(registry) == 1
        calls = []
        warm_up = TritonKernel.warm_up

        def record(self: TritonKernel, cache: PagedCache, *most: Any) -> None:
            calls.append(most)
            warm_up(self, cache, *most)

        monkeypatch.setattr(TritonKernel, "warm_up", record)
        layers = config.compilation_config.static_forward_context.values()
        before = [layer.kv_cache.clone() for layer in layers]
        registry.warmup()
        assert calls == [(4, config.scheduler_config.max_num_batched_tokens)]
        for layer, cache in zip(layers, before, strict=True):
            torch.testing.assert_close(layer.kv_cache, cache, rtol=0, atol=0, equal_nan=True)

    def test_memory_is_taken_before_there_is_a_cache(self, runner: Runner) -> None:
        """vLLM measures what is left for it once the model is loaded, and again in a run without
        attention."""
        for layer in runner.config.compilation_config.static_forward_context.values():
            impl = layer.impl
            (workspace,) = impl.layer_config.shared.values()
            assert impl.kernel._workspace is workspace
            kernel, _ = impl.bind(layer, layer.kv_cache)
            assert kernel._workspace is workspace


class TestCompiledPieces:
    """A compiled model is cut at every attention, and what a piece computes of the positions is
    computed in every piece."""

    def pieces(self, model: nn.Module, config: VllmConfig) -> list[list[str]]:
        """The operators of each piece between two layers' attention, by name."""
        graphs = []

        def cut(graph: torch.fx.GraphModule, _: object) -> Any:
            operators = config.compilation_config._attention_ops
            graphs.append(split_graph(graph, operators))
            return graph.forward

        torch._dynamo.reset()
        ids = torch.zeros(6, dtype=torch.int64)
        with torch.no_grad(), set_forward_context(None, config, num_tokens=6):
            torch.compile(model, backend=cut, fullgraph=True)(ids, torch.arange(6), None)
        ((_, pieces),) = graphs
        return [
            [str(node.target) for node in piece.graph.graph.nodes if node.op.startswith("call_")]
            for piece in pieces
            if not piece.is_splitting_graph
        ]

    def test_one_launch_turns_a_layers_heads(
        self, runner: Runner, config: VllmConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As with vLLM's own operator: one in each of the pieces that end in an attention, and
        nothing else of LMINF in any."""
        decoder = runner.model.model
        num_layers = len(decoder.layers)
        found = self.pieces(decoder, config)
        monkeypatch.setattr(config.compilation_config, "custom_ops", ["none", "+rotary_embedding"])
        stock = get_rope(16, 1000, True, {"rope_type": "default", "rope_theta": 10000.0})
        for layer in decoder.layers:
            monkeypatch.setitem(layer.self_attn._modules, "rotary_emb", stock)
        expected = self.pieces(decoder, config)
        assert len(found) == len(expected) == num_layers + 1
        for i, (piece, stocks) in enumerate(zip(found, expected, strict=True)):
            launches = [name for name in piece if name.startswith("lminf.")]
            assert launches == ["lminf.rotary_embedding"] * (i < num_layers)
            assert len(launches) == sum("_C.rotary_embedding" in name for name in stocks)
            # The others are views and the model's own.
            rest = Counter(piece) - Counter(stocks) - Counter(launches)
            assert set(rest) <= {"flatten", "<built-in function getitem>"}, rest


def test_as_the_oracle(runner: Runner, folder: Path) -> None:
    """Two requests through several windows: prefill in pieces, decodes, both in one step, rows
    and requests of padding."""
    generator = torch.Generator().manual_seed(2)
    tokens = {r: torch.randint(0, 512, (70,), generator=generator).tolist() for r in (0, 1)}
    steps = [
        ({0: (0, 33)}, 0),
        ({0: (33, 34), 1: (0, 20)}, 0),
        ({1: (20, 60), 0: (34, 35)}, 3),
        *(({0: (35 + i, 36 + i), 1: (60 + i, 61 + i)}, 2) for i in range(3)),
        ({0: (38, 70), 1: (63, 70)}, 0),
    ]
    found: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for batch, padded in steps:
        for request, scores in runner.logprobs(tokens, batch, padded).items():
            assert torch.isfinite(scores).all()
            found[request].append(scores)
    for request, pieces in found.items():
        scores = torch.cat(pieces)[:-1]
        following = torch.tensor(tokens[request][1:])
        logprobs = scores[torch.arange(len(following)), following].double()
        expected = oracle_logprobs(folder, tokens[request], PATTERN, torch.float32)
        torch.testing.assert_close(logprobs, expected, rtol=0, atol=TOLERANCE)
