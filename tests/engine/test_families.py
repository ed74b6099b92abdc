"""Every model family through vLLM beyond its trained length, against the oracle in Hugging Face's
code of that family, in float32; and the families that are refused.

The tolerance is test_exactness's, for its reason. A Λ that is off by one token in any of its three
numbers moves a log-probability by 3e-3 or more in every family with full attention.
"""

from pathlib import Path

import pytest
import torch
import transformers
from vllm.engine.arg_utils import EngineArgs

from tests.engine.conftest import Engine
from tests.engine.families import (
    FAMILIES,
    LEARNED_POSITIONS,
    TRAINED_LENGTH,
    OracleModel,
)
from tests.engine.test_exactness import TOLERANCE, engine_logprobs, random_prompts
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.startup import UnsupportedError

pytestmark = pytest.mark.engine

PATTERN = LambdaPattern(n_global=10, n_local=48, distance_limit=TRAINED_LENGTH)


@pytest.mark.parametrize("family", FAMILIES)
def test_oracle_is_the_model_inside_the_window(tmp_path: Path, family: str) -> None:
    """Where the Λ hides nothing, the oracle must be what Hugging Face computes: this checks scale,
    rotation, soft-capping, sinks and the convention of native windows."""
    model = OracleModel(FAMILIES[family], FAMILIES[family].save(tmp_path / "model"))
    (prompt,) = random_prompts([PATTERN.n_local])
    expected = model.logprobs(prompt, pattern=None)
    torch.testing.assert_close(model.logprobs(prompt, PATTERN), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_engine_equals_oracle(engine: Engine, tmp_path: Path, family: str) -> None:
    """Prompts up to five trained lengths in one batch, in chunks that cut through the windows."""
    path = FAMILIES[family].save(tmp_path / "model")
    model = OracleModel(FAMILIES[family], path)
    with engine(
        path,
        n_global=PATTERN.n_global,
        n_local=PATTERN.n_local,
        distance_limit=PATTERN.distance_limit,
        block_size=16,
        max_num_batched_tokens=48,
        max_model_len=1000,
    ) as llm:
        results = engine_logprobs(llm, random_prompts([1, 63, 64, 65, 150, 300]), 8)
    for tokens, logprobs in results:
        expected = model.logprobs(tokens, PATTERN)
        assert logprobs.shape == expected.shape
        assert torch.isfinite(logprobs).all()
        torch.testing.assert_close(logprobs, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", LEARNED_POSITIONS)
def test_learned_positions_are_refused(engine: Engine, tmp_path: Path, family: str) -> None:
    path = LEARNED_POSITIONS[family].save(tmp_path / "model")
    with (
        pytest.raises(UnsupportedError, match=r"layer \S+\.0\.\S*attn: .* has no rotary module"),
        engine(path, max_model_len=TRAINED_LENGTH),
    ):
        pass


def configuration_error(folder: Path, config: transformers.PreTrainedConfig) -> str:
    """What building an engine's configuration for a model raises: nothing is loaded for that."""
    config.save_pretrained(folder)
    arguments = EngineArgs(str(folder), skip_tokenizer_init=True, attention_backend="LMINF")
    with pytest.raises(ValueError) as error:  # noqa: PT011
        arguments.create_engine_config()
    return str(error.value)


def test_mpt_is_no_longer_known_to_vllm(tmp_path: Path) -> None:
    """vLLM's own limitation: it dropped MPT in 0.28, with LMINF or without."""
    config = transformers.MptConfig(architectures=["MPTForCausalLM"])
    message = configuration_error(tmp_path, config)
    assert "MPTForCausalLM was supported in vLLM until v0.28" in message


def test_mrope_is_refused(tmp_path: Path) -> None:
    config = transformers.Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        num_hidden_layers=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    )
    assert "M-RoPE: a multimodal position is no single distance" in configuration_error(
        tmp_path, config
    )


def test_latent_attention_is_refused(tmp_path: Path) -> None:
    config = transformers.DeepseekV2Config(
        architectures=["DeepseekV2ForCausalLM"], num_hidden_layers=2
    )
    assert "multi-head latent attention (MLA)" in configuration_error(tmp_path, config)
