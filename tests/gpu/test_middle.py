"""Real vLLM that recalls the middle on a device, eager and with CUDA graphs, by both of vLLM's
runners: the oracle's numbers from an archive in pinned host memory."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from vllm import LLM

    from vllm_lminf.plugin.archive_backend import Archive

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM"),
]

N_GLOBAL, N_LOCAL, BLOCK = 5, 40, 16
TOP_K, DISTANCE, ROWS, FROM_LAYER = 4, 30, 20, 2
PAGE_BYTES = 3 * 2 * (BLOCK * (2 * 64 * 4 + 64 + 8) + 64 * 4)
"""Of the three layers that recall, with two key heads of 64."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, of which the last three recall."""
    from vllm.platforms import current_platform

    from tests.engine.oracle_model import save_tiny_llama

    if current_platform.device_type != "cuda":
        pytest.skip(f"this vLLM is for {current_platform.device_type}: needs one for GPUs")
    folder = tmp_path_factory.mktemp("model") / "model"
    return save_tiny_llama(folder, 4, 2, 64, trained_length=64, num_layers=4)


def middle_of(llm: LLM) -> Any:
    from vllm_lminf.plugin.config import LambdaConfig

    return LambdaConfig.of(llm.llm_engine.vllm_config).middle


def archives(llm: LLM) -> list[Archive]:
    from vllm_lminf.plugin.archive_backend import Archive

    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    return [layer for layer in layers if isinstance(layer, Archive)]


def start(model: Path, pages: int, **arguments: Any) -> Any:
    from tests.engine.conftest import start_engine

    middle = {
        "middle_top_k": TOP_K,
        "middle_rows": ROWS,
        "middle_from_layer": FROM_LAYER,
        "middle_distance": DISTANCE,
        "archive_gib": (pages + 1) * PAGE_BYTES / (1 << 30),
    }
    given = {"max_num_batched_tokens": 128, "max_model_len": 400, **arguments}
    return start_engine(
        model, n_global=N_GLOBAL, n_local=N_LOCAL, middle=middle, block_size=BLOCK, **given
    )


class TestEngine:
    """An archive of 40 pages of 16 tokens: two requests of 300 tokens fit, and not three."""

    PAGES = 40

    @pytest.fixture(
        scope="class",
        params=[(runner, eager) for runner in ("1", "0") for eager in (True, False)],
        ids=["newer-eager", "newer-graphs", "older-eager", "older-graphs"],
    )
    @classmethod
    def llm(cls, request: pytest.FixtureRequest, model: Path) -> Iterator[LLM]:
        newer, eager = request.param
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            patch.setenv("VLLM_USE_V2_MODEL_RUNNER", newer)
            patch.delenv("VLLM_ATTENTION_BACKEND", raising=False)
            with start(model, cls.PAGES, enforce_eager=eager, disable_log_stats=False) as llm:
                config = llm.llm_engine.vllm_config
                assert config.use_v2_model_runner == (newer == "1")
                graphs = config.compilation_config.cudagraph_mode
                assert graphs.has_full_cudagraphs() == (not eager)
                yield llm

    def test_its_archives_are_pinned(self, llm: LLM) -> None:
        """Views of the host's memory, of which warming up and capturing have written the null page
        alone, if any."""
        found = archives(llm)
        assert len(found) == 3
        for archive in found:
            assert archive.pages is not None
            assert archive.pages.is_cuda
            assert archive.pages.shape == (self.PAGES + 1, PAGE_BYTES // 3)
            assert not archive.pages[1:].any()

    def test_equal_to_the_oracle(self, llm: LLM, model: Path) -> None:
        """Prompts in one chunk and in several, below and beyond the window, that mix with decodes;
        then decodes alone, which whole graphs may hold."""
        from tests.engine.traffic import ask, assert_equal_to_oracle, lambda_pattern, tokens

        assert llm.reset_prefix_cache()
        prompts = [tokens(n, seed=n) for n in (1, 40, 47, 48, 130, 200, 300)]
        answers = ask(llm, prompts, 40)
        assert_equal_to_oracle(model, answers, lambda_pattern(llm), middle_of(llm))

    def test_whatever_shares_the_archive(self, llm: LLM, model: Path) -> None:
        """More requests than it holds: some wait, and some are preempted and computed again. What
        nobody holds is full of NaN in the second run."""
        from tests.engine.poison import assert_poison_changes_no_bit
        from tests.engine.traffic import ask, assert_equal_to_oracle, lambda_pattern, tokens

        prompts = [tokens(200 + 11 * n, seed=n) for n in range(8)]
        answers = assert_poison_changes_no_bit(llm, lambda: ask(llm, prompts, 60))
        assert_equal_to_oracle(model, answers, lambda_pattern(llm), middle_of(llm))

    def test_the_next_turn(self, llm: LLM, model: Path) -> None:
        """Of the first turn's blocks those are taken over in which no row looked."""
        from tests.engine.poison import assert_poison_changes_no_bit
        from tests.engine.traffic import ask, assert_equal_to_oracle, lambda_pattern, tokens

        prompt = tokens(250)

        def scenario() -> list:
            (first,) = ask(llm, [prompt], 16)
            return [first, *ask(llm, [prompt + first.tokens + tokens(50, seed=1)], 16)]

        answers = assert_poison_changes_no_bit(llm, scenario)
        assert [answer.num_cached for answer in answers] == [0, 224]
        assert_equal_to_oracle(model, answers, lambda_pattern(llm), middle_of(llm))

    def test_searches_are_counted(self, llm: LLM) -> None:
        """Nearly all are certain at once."""
        from tests.engine.traffic import ask, tokens
        from vllm_lminf.plugin.metrics import SEARCHES, SEARCHES_REPEATED

        for seed in range(4):
            ask(llm, [tokens(300, seed=seed)], 80)
        shown = {
            metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")
        }
        searches, repeated = (shown[f"vllm:{name}"] for name in (SEARCHES, SEARCHES_REPEATED))
        assert searches > 3 * 4 * 80
        assert repeated <= 0.05 * searches


def test_speculated_tokens(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rejected drafts leave nothing in the archive: a prompt that repeats itself, drafts that are
    often wrong, in graphs."""
    from tests.engine.traffic import ask, assert_equal_to_oracle, lambda_pattern, tokens

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
    with start(model, 60, enforce_eager=False, speculative_config=drafts) as llm:
        prompts = [tokens(30, seed=seed) * 6 for seed in range(3)]
        answers = ask(llm, prompts, 60)
        assert_equal_to_oracle(model, answers, lambda_pattern(llm), middle_of(llm))


@pytest.mark.parametrize("kernel", ["triton", "reference"])
def test_by_name(kernel: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.engine.traffic import ask, assert_equal_to_oracle, lambda_pattern, tokens

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with start(model, 60, enforce_eager=True, kernel=kernel) as llm:
        answers = ask(llm, [tokens(n, seed=n) for n in (47, 200)], 20)
        assert_equal_to_oracle(model, answers, lambda_pattern(llm), middle_of(llm))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_workers(model: Path) -> None:
    """Each pins the archive of its own heads."""
    from vllm import LLM, SamplingParams

    from tests.engine.test_middle import settings
    from tests.engine.traffic import tokens
    from vllm_lminf.middle import Middle

    middle = settings(Middle(TOP_K, distance=DISTANCE, rows=ROWS, from_layer=FROM_LAYER))
    said = []
    for size in (1, 2):
        llm = LLM(
            str(model),
            attention_backend="LMINF",
            additional_config={"lminf": {"n_local": N_LOCAL, **middle}},
            dtype="float32",
            tensor_parallel_size=size,
            skip_tokenizer_init=True,
            max_model_len=400,
            block_size=BLOCK,
            gpu_memory_utilization=0.2,
        )
        sampling = SamplingParams(temperature=0, max_tokens=20, detokenize=False, ignore_eos=True)
        (output,) = llm.generate([{"prompt_token_ids": tokens(300)}], sampling, use_tqdm=False)
        said.append(list(output.outputs[0].token_ids))
        del llm
    assert said[0] == said[1]
