"""Real vLLM on a device, eager and with CUDA graphs, against the oracle."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM"),
]

N_GLOBAL, N_LOCAL, LIMIT = 5, 48, 60


@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "graphs"])
@pytest.mark.parametrize("kernel", ["auto", "triton", "reference"])
def test_as_the_oracle(
    kernel: str, enforce_eager: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts from one token to several windows in one batch, in float32: prefill in pieces that
    mix with the decodes of the others, then decodes alone, which a whole graph may hold."""
    from vllm.platforms import current_platform

    from tests.engine.conftest import start_engine
    from tests.engine.oracle_model import oracle_logprobs, save_tiny_llama
    from tests.engine.test_exactness import TOLERANCE, engine_logprobs, random_prompts
    from vllm_lminf.pattern import LambdaPattern

    if current_platform.device_type != "cuda":
        pytest.skip(f"this vLLM is for {current_platform.device_type}: needs one for GPUs")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    model = save_tiny_llama(tmp_path / "model", num_heads=4, num_kv_heads=2, head_size=64)
    pattern = LambdaPattern(N_GLOBAL, N_LOCAL, LIMIT)
    with start_engine(
        model,
        n_global=N_GLOBAL,
        n_local=N_LOCAL,
        distance_limit=LIMIT,
        kernel=kernel,
        block_size=16,
        max_num_batched_tokens=64,
        max_model_len=1000,
        enforce_eager=enforce_eager,
    ) as llm:
        config = llm.llm_engine.vllm_config
        graphs = config.compilation_config.cudagraph_mode
        assert graphs.has_full_cudagraphs() == (kernel != "reference" and not enforce_eager)
        results = engine_logprobs(llm, random_prompts([1, 16, 48, 49, 130, 300]), 20)
    for tokens, logprobs in results:
        expected = oracle_logprobs(model, tokens, pattern, torch.float32)
        torch.testing.assert_close(logprobs, expected, rtol=0, atol=TOLERANCE)
