"""A trained model through vLLM, far past its window, against the oracle in the same model."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tests.engine.conftest import Engine
from tests.engine.oracle_model import oracle_logprobs
from tests.engine.test_exactness import engine_logprobs
from vllm_lminf.pattern import LambdaPattern

pytestmark = pytest.mark.engine

TEXT = Path(__file__).parents[2] / "examples" / "data" / "alice.txt"


def test_prompt_logprobs_of_2000_tokens(engine: Engine, model_path: str) -> None:
    tokens = AutoTokenizer.from_pretrained(model_path)(TEXT.read_text()).input_ids[:2100]
    with engine(
        Path(model_path), n_local=256, max_model_len=1_000_000, max_num_batched_tokens=512
    ) as llm:
        ((all_tokens, logprobs),) = engine_logprobs(llm, [tokens], 20)
    pattern = LambdaPattern(n_global=10, n_local=256, distance_limit=256)
    expected = oracle_logprobs(Path(model_path), all_tokens, pattern, torch.float32)
    assert (logprobs - expected).abs().max() < 2e-3
