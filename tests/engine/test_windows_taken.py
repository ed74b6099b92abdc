"""A model with windows of its own that an option takes away: it is still the model it was."""

from pathlib import Path

import pytest
import torch

from tests.engine.conftest import Engine
from tests.engine.families import FAMILIES, NATIVE_WINDOW, OracleModel
from tests.engine.test_exactness import TOLERANCE, engine_logprobs, random_prompts
from vllm_lminf.pattern import LambdaPattern

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    "arguments",
    [{"disable_sliding_window": True}, {"hf_overrides": {"sliding_window": None}}],
    ids=["--disable-sliding-window", "--hf-overrides"],
)
def test_without_global_tokens_it_equals_the_model_with_its_windows(
    engine: Engine, tmp_path: Path, arguments: dict[str, object]
) -> None:
    """Beyond the trained length: Hugging Face's own code, with the windows that it was trained on,
    which is what the default n_local makes of it."""
    family = FAMILIES["mistral-windowed"]
    path = family.save(tmp_path / "model")
    with engine(path, n_global=0, block_size=16, max_model_len=1000, **arguments) as llm:
        results = engine_logprobs(llm, random_prompts([1, 23, 24, 25, 65, 200]), 8)
    model = OracleModel(family, path)
    for tokens, logprobs in results:
        expected = model.logprobs(tokens, LambdaPattern(0, NATIVE_WINDOW, NATIVE_WINDOW))
        torch.testing.assert_close(logprobs, expected, rtol=0, atol=TOLERANCE)
