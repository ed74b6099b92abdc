"""The archive's pages: how many, whose, and which of them another request may share."""

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from tests.plugin.kv_cache.planning import get_kv_cache_configs
from tests.plugin.kv_cache.simulation import make_spec
from vllm_lminf.errors import UnsupportedError
from vllm_lminf.middle import ALL_ROWS, Middle
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.plugin import archive as archive_module
from vllm_lminf.plugin.archive import (
    ArchiveManager,
    ArchiveSpec,
    first_rows,
    mark_rows_that_look,
    plan,
)
from vllm_lminf.plugin.archive_backend import _allocate
from vllm_lminf.plugin.config import LambdaConfig, Settings, Trained
from vllm_lminf.plugin.kv_cache import LambdaSpec

BLOCK = 4
MIDDLE = Middle(2, distance=8, rows=3)
PATTERN = LambdaPattern(2, 6, 6)


def make_request(tokens: list[int], middle: Middle = MIDDLE) -> Request:
    init_none_hash(sha256)
    hasher = mark_rows_that_look(get_request_block_hasher(BLOCK, sha256), middle, PATTERN, BLOCK)
    make_request.count += 1
    return Request(
        request_id=f"request-{make_request.count}",
        prompt_token_ids=tokens,
        sampling_params=SamplingParams(max_tokens=1000),
        pooling_params=None,
        block_hasher=hasher,
    )


make_request.count = 0


class TestHashes:
    def test_blocks_before_the_first_row_that_looks_are_shared(self) -> None:
        """Of 23 tokens the last 3 look: five blocks are whole before row 20."""
        plain = make_request(list(range(23)), Middle(2, distance=8, rows=ALL_ROWS)).block_hashes
        marked = make_request(list(range(23))).block_hashes
        assert marked == plain[:5]
        longer = make_request(list(range(40))).block_hashes
        assert longer[:5] == plain

    def test_a_block_with_a_row_that_looks_is_shared_by_equal_prompts_alone(self) -> None:
        """Of 24 tokens the last 3 look, row 21 on: the block of rows 20 to 23 is marked."""
        tokens = list(range(24))
        assert make_request(tokens).block_hashes == make_request(tokens).block_hashes
        longer = make_request([*tokens, 24, 25, 26, 27])
        assert make_request(tokens).block_hashes[:5] == longer.block_hashes[:5]
        assert make_request(tokens).block_hashes[5] != longer.block_hashes[5]

    def test_generated_tokens_look(self) -> None:
        """Their blocks aren't those of a prompt that has the same tokens."""
        request = make_request(list(range(20)))
        for token in range(20, 40):
            request.append_output_token_ids(token)
        whole = make_request(list(range(60)))
        assert len(request.block_hashes) == 10
        assert request.block_hashes[:4] == whole.block_hashes[:4]
        assert not set(request.block_hashes[4:]) & set(whole.block_hashes)

    def test_rows_without_a_middle_are_shared(self) -> None:
        """Rows 2 to 4 of 5 look, and the first that sees anything there is row 8."""
        request = make_request(list(range(5)))
        for token in range(5, 16):
            request.append_output_token_ids(token)
        whole = make_request(list(range(30)))
        assert request.block_hashes[:2] == whole.block_hashes[:2]
        assert not set(request.block_hashes[2:]) & set(whole.block_hashes)

    def test_where_every_row_looks_all_is_shared(self) -> None:
        everywhere = Middle(2, distance=8, rows=ALL_ROWS)
        request = make_request(list(range(20)), everywhere)
        for token in range(20, 40):
            request.append_output_token_ids(token)
        whole = make_request(list(range(60)), everywhere)
        assert request.block_hashes == whole.block_hashes[:10]


@pytest.mark.parametrize(
    ("rows", "expected"), [(1, [0, 0, 9]), (3, [0, 0, 7]), (ALL_ROWS, [0, 0, 0])]
)
def test_first_rows(rows: int, expected: list[int]) -> None:
    found = first_rows(Middle(1, distance=1, rows=rows), torch.tensor([0, 1, 10]))
    assert found.dtype == torch.int32
    assert found.tolist() == expected
    assert found.tolist() == [Middle(1, distance=1, rows=rows).first_row(n) for n in (0, 1, 10)]


class Pools:
    """A Λ group and its archive behind vLLM's manager."""

    def __init__(self, num_blocks: int, num_pages: int) -> None:
        init_none_hash(sha256)
        archive = ArchiveSpec(
            block_size=BLOCK,
            num_kv_heads=1,
            head_size=16,
            dtype=torch.float32,
            dcp_sharded=False,
            num_pages=1 + num_pages,
            index_bits=8,
        )
        groups = [
            KVCacheGroupSpec(["layer"], make_spec(2, 6, BLOCK)),
            KVCacheGroupSpec(["layer.archive"], archive, host_resident=True),
        ]
        self.kv = KVCacheManager(
            KVCacheConfig(1 + num_blocks, [], groups, hisparse_host_num_blocks=num_pages),
            max_model_len=10_000,
            scheduler_block_size=BLOCK,
            hash_block_size=BLOCK,
            max_in_flight_tokens=8,
            enable_caching=True,
        )
        self.archive: Any = self.kv.coordinator.single_type_managers[1]
        assert type(self.archive) is ArchiveManager

    def run(self, request: Request) -> int | None:
        """Computes a prompt in steps of 8; tokens that came from the cache, or None: no room."""
        hit, num_hit, _ = self.kv.get_computed_blocks(request)
        arguments: dict[str, Any] = {
            "num_new_computed_tokens": num_hit,
            "new_computed_blocks": hit,
            "full_sequence_must_fit": True,
        }
        request.num_computed_tokens = 0
        while True:
            computed = request.num_computed_tokens + (num_hit if arguments else 0)
            num_new = min(8, request.num_tokens - computed)
            if num_new == 0:
                return num_hit
            if self.kv.allocate_slots(request, num_new, **arguments) is None:
                return None
            arguments = {}
            request.num_computed_tokens = computed + num_new


class TestPages:
    def test_a_page_for_every_block_of_the_sequence(self) -> None:
        pools, request = Pools(20, 50), make_request(list(range(90)))
        assert pools.run(request) == 0
        assert pools.archive.num_pages_held == 23
        held = pools.kv.get_blocks(request.request_id).blocks
        assert sum(not block.is_null for block in held[0]) <= 5
        assert len({block.block_id for block in held[1]}) == 23
        pools.kv.free(request)
        assert pools.archive.num_pages_held == 0

    def test_a_full_archive_makes_requests_wait(self) -> None:
        """The device's pool has room for all of them."""
        pools = Pools(1000, 50)
        first, second, third = (make_request([n, *range(100)]) for n in range(3))
        assert pools.run(first) == 0
        assert pools.run(second) is None
        assert pools.archive.num_pages_held == 26
        pools.kv.free(first)
        assert pools.run(second) == 0
        assert pools.run(third) is None
        pools.kv.free(second)
        assert pools.archive.num_pages_held == 0

    def test_a_hit_is_as_long_as_both_have_it(self) -> None:
        """Two requests share what was there before either looked; a page that is gone ends it."""
        pools = Pools(1000, 50)
        request = make_request(list(range(80)))
        assert pools.run(request) == 0
        pools.kv.free(request)
        again = make_request(list(range(80)))
        assert pools.run(again) == 76
        pools.kv.free(again)
        (page,) = pools.archive.block_pool.get_cached_block(request.block_hashes[9], [1])
        pools.archive.block_pool.evict_blocks({page.block_id})
        assert pools.run(make_request(list(range(80)))) == 36

    def test_a_reset_reaches_the_archive(self) -> None:
        """Stale pages must not come back with blocks that are computed anew."""
        pools = Pools(1000, 50)
        request = make_request(list(range(80)))
        pools.run(request)
        pools.kv.free(request)
        assert pools.kv.reset_prefix_cache()
        pool = pools.archive.block_pool
        assert not any(pool.get_cached_block(h, [1]) for h in request.block_hashes)


class TestPlan:
    """Layers from the second on recall, in an engine of 1000 tokens at the most."""

    GIB = 1 << 30

    @pytest.fixture
    def engine(self, stock_config: VllmConfig) -> VllmConfig:
        engine = deepcopy(stock_config)
        engine.cache_config.kv_cache_layout = "LBHNC"
        engine.model_config.max_model_len = 1000
        settings = Settings(n_local=48, middle_top_k=4, middle_from_layer=2, archive_gib=0.125)
        resolved = LambdaConfig.resolve(settings, Trained(length=64, longest=64))
        engine.additional_config = resolved.added_to({})
        return engine

    @staticmethod
    def spec(num_kv_heads: int, pattern: LambdaPattern) -> LambdaSpec:
        full = FullAttentionSpec(
            block_size=16, num_kv_heads=num_kv_heads, head_size=64, dtype=torch.bfloat16
        )
        return LambdaSpec.of(full, pattern)

    def planned(
        self, engine: VllmConfig, workers: list[dict[int, LambdaSpec]]
    ) -> list[KVCacheConfig]:
        named = [
            {f"model.layers.{layer}.self_attn.attn": spec for layer, spec in worker.items()}
            for worker in workers
        ]
        memory = [1 << 30] * len(workers)
        return plan(engine, get_kv_cache_configs(engine, named, memory))

    @staticmethod
    def archive(config: KVCacheConfig) -> tuple[list[str], ArchiveSpec]:
        group = config.kv_cache_groups[-1]
        assert group.host_resident
        assert config.hisparse_host_num_blocks == group.kv_cache_spec.num_pages - 1
        return [name.split(".")[2] for name in group.layer_names], group.kv_cache_spec

    @pytest.mark.parametrize(
        ("workers", "recalling"),
        [
            ([range(4)], [["1", "2", "3"]]),
            ([range(4), range(4)], [["1", "2", "3"], ["1", "2", "3"]]),
            ([range(1), range(1, 4)], [[], ["1", "2", "3"]]),
        ],
        ids=["one worker", "tensor parallel", "a stage that recalls nothing"],
    )
    def test_all_workers_together_have_what_is_set(
        self, engine: VllmConfig, workers: list[range], recalling: list[list[str]]
    ) -> None:
        spec = self.spec(2, LambdaConfig.of(engine).pattern)
        configs = self.planned(engine, [dict.fromkeys(layers, spec) for layers in workers])
        archives = [self.archive(config) for config in configs]
        assert [names for names, _ in archives] == recalling
        (archive,) = {spec for _, spec in archives}
        page_of_all = archive.page_size_bytes * sum(map(len, recalling))
        spare = self.GIB // 8 - archive.num_pages * page_of_all
        assert 0 <= spare < page_of_all

    @pytest.mark.parametrize(
        ("gib", "advice"),
        [
            (5e-4, r"of 752 tokens, .* 0\.\d+ or more, or max_model_len to 752 or less$"),
            (1e-9, r"of 0 tokens, and max_model_len is 1000: set archive_gib to 0\.\d+ or more$"),
        ],
    )
    def test_less_than_the_longest_sequence(
        self, engine: VllmConfig, gib: float, advice: str
    ) -> None:
        engine.additional_config["lminf"]["archive_gib"] = gib
        spec = self.spec(2, LambdaConfig.of(engine).pattern)
        with pytest.raises(UnsupportedError) as refusal:
            self.planned(engine, [dict.fromkeys(range(2), spec)])
        (reason,) = refusal.value.reasons
        assert re.search(advice, reason), reason

    @pytest.mark.parametrize(
        ("hosts", "backend", "fits"),
        [(1, "mp", False), (2, "mp", True), (1, "ray", True)],
        ids=["one host", "two hosts", "ray"],
    )
    def test_what_workers_of_one_host_take_is_held_against_its_memory(
        self,
        engine: VllmConfig,
        hosts: int,
        backend: str,
        fits: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Two workers with half of the archive each; a host, or its container, has three quarters
        of it. Where workers are placed at will, each is held against its own host alone."""
        monkeypatch.setattr(archive_module, "host_memory", lambda: 3 * self.GIB // 32)
        engine.parallel_config.world_size = 2
        engine.parallel_config.nnodes = hosts
        engine.parallel_config.distributed_executor_backend = backend
        spec = self.spec(2, LambdaConfig.of(engine).pattern)
        workers = [dict.fromkeys(range(4), spec)] * 2
        if fits:
            assert self.planned(engine, workers)
        else:
            match = r"0\.125, 0\.12 of them on this host, which has 0\.1 GiB .* container"
            with pytest.raises(UnsupportedError, match=match):
                self.planned(engine, workers)

    def test_pages_are_as_long_as_blocks(self, engine: VllmConfig) -> None:
        """vLLM gives layers with few key heads longer blocks, where others have more."""
        pattern = LambdaConfig.of(engine).pattern
        own = LambdaPattern(0, 32, 32)
        (config,) = self.planned(
            engine, [{n: self.spec(4, own) if n % 2 else self.spec(1, pattern) for n in range(6)}]
        )
        sizes = {
            spec.block_size
            for spec in (group.kv_cache_spec for group in config.kv_cache_groups[:-1])
            if spec.pattern == pattern
        }
        names, archive = self.archive(config)
        assert names == ["2", "4"]
        assert sizes == {archive.block_size} == {64}

    def test_layers_that_differ_in_their_keys(self, engine: VllmConfig) -> None:
        pattern = LambdaConfig.of(engine).pattern
        layers = {n: self.spec(1 if n == 3 else 2, pattern) for n in range(4)}
        with pytest.raises(UnsupportedError, match=r"2 x 64 in \S+\.1\.\S+, 1 x 64 in \S+\.3\."):
            self.planned(engine, [layers])
        del layers[3]
        assert self.archive(self.planned(engine, [layers])[0])[0] == ["1", "2"]


def test_the_system_may_make_huge_pages_of_the_memory() -> None:
    """It is asked to ("hg"), and most systems don't for memory that processes share ("sh")."""
    pages = _allocate(16, 1 << 20)
    assert pages.shape == (16, 1 << 20)
    at, flags = pages.data_ptr(), ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= at < int(match[2], 16)
        elif inside and line.startswith("VmFlags:"):
            flags = line
    assert " hg" in flags
    assert " sh" not in flags
