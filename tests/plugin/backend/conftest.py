"""What the tests of vLLM's side of attention share."""

from collections.abc import Iterator

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs

from vllm_lminf.plugin import register


@pytest.fixture(autouse=True, scope="package")
def config(model_path: str) -> Iterator[VllmConfig]:
    """An engine's configuration with LMINF selected, current as it is while a model is built."""
    register()
    arguments = EngineArgs(
        model=model_path,
        attention_backend="LMINF",
        max_model_len=100_000,
        additional_config={"lminf": {"n_global": 4, "n_local": 512, "distance_limit": 600}},
    )
    config = arguments.create_engine_config()
    with set_current_vllm_config(config):
        yield config


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
