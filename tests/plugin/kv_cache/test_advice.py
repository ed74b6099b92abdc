"""What a start says whose memory is too small for one request. No engine."""

import re
from pathlib import Path

import pytest
import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine import core
from vllm.v1.kv_cache_interface import FullAttentionSpec

from tests.engine.oracle_model import save_tiny_llama
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.plugin import register
from vllm_lminf.plugin.kv_cache import LambdaSpec

BLOCK_SIZE = 16
N_LOCAL = 1024
CHUNK = 256


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    register()
    return save_tiny_llama(tmp_path_factory.mktemp("advice") / "model", 4, 2, 64, N_LOCAL)


def make(path: Path, backend: str | None) -> VllmConfig:
    arguments = EngineArgs(
        str(path),
        attention_backend=backend,
        skip_tokenizer_init=True,
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=CHUNK,
        max_num_seqs=8,
        max_model_len=100_000 if backend else None,
    )
    config = arguments.create_engine_config()
    config.cache_config.kv_cache_layout = "LBHNC"
    return config


def layers(n_local: int) -> dict[str, LambdaSpec]:
    full = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=2, head_size=64, dtype=torch.float32
    )
    pattern = LambdaPattern(10, n_local, N_LOCAL)
    return {f"model.layers.{i}.self_attn.attn": LambdaSpec.of(full, pattern) for i in range(2)}


def memory(blocks: int) -> int:
    return 2 * blocks * layers(1)["model.layers.0.self_attn.attn"].page_size_bytes


def test_names_an_n_local_that_fits(path: Path) -> None:
    config = make(path, "LMINF")
    with pytest.raises(ValueError, match="needed, which is larger than the available") as refusal:
        core.get_kv_cache_configs(config, [layers(N_LOCAL)], [memory(50)])
    said = str(refusal.value)
    assert "a smaller max_model_len helps only below n_local and" in said
    assert f"which is {N_LOCAL}, n_global, and --max-num-batched-tokens, which is {CHUNK}" in said
    n_local = int(re.findall("n_local ([0-9]+) fits", said)[0])
    assert 16 <= n_local < N_LOCAL
    core.get_kv_cache_configs(config, [layers(n_local)], [memory(50)])
    with pytest.raises(ValueError, match="needed"):
        core.get_kv_cache_configs(config, [layers(n_local + 64)], [memory(50)])


def test_none_fits(path: Path) -> None:
    for available in (memory(3), 0):
        with pytest.raises(ValueError, match="no n_local fits"):
            core.get_kv_cache_configs(make(path, "LMINF"), [layers(N_LOCAL)], [available])


def test_other_engines_are_told_what_vllm_says(path: Path) -> None:
    full = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=2, head_size=64, dtype=torch.float32
    )
    with pytest.raises(ValueError, match="needed") as refusal:
        core.get_kv_cache_configs(make(path, None), [{"layer": full}], [memory(3)])
    assert "n_local" not in str(refusal.value)
