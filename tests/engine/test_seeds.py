"""Requests with a seed of their own: the same tokens alone as in company, and however the prompt is
chunked, on CPUs, where stock vLLM dies of a prompt's first chunk that isn't its last."""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, SamplingParams

from tests.engine.conftest import Engine, start_engine
from tests.engine.oracle_model import save_tiny_llama
from tests.engine.traffic import scheduler, tokens

pytestmark = pytest.mark.engine

CHUNK = 48
LONG = tokens(700, seed=5)
COMPANY = [tokens(n, seed=n) for n in (10, 330, 40, 60)]
NEW = 60
SEED = 1234

Tokens = list[list[int]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"), 4, 2, 64, trained_length=64)


def start(engine: Engine, model: Path, chunk: int, **arguments: Any) -> Any:
    return engine(
        model,
        n_global=20,
        n_local=64,
        block_size=16,
        max_num_batched_tokens=chunk,
        max_model_len=10_000,
        enable_prefix_caching=False,
        **arguments,
    )


def seeded(**fields: Any) -> SamplingParams:
    return SamplingParams(
        **{"seed": SEED, "max_tokens": NEW, "ignore_eos": True, "detokenize": False} | fields
    )


def generate(llm: LLM, requests: list[tuple[list[int], SamplingParams]]) -> list[Tokens]:
    """For every request, the tokens of each of its answers."""
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
    outputs = llm.generate(prompts, [sampling for _, sampling in requests], use_tqdm=False)
    return [[list(one.token_ids) for one in output.outputs] for output in outputs]


def alone(llm: LLM, **fields: Any) -> Tokens:
    (answers,) = generate(llm, [(LONG, seeded(**fields))])
    return answers


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, Tokens]:
    """From an engine that takes the prompt in one piece, so that nothing is ever thrown away."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        monkeypatch.delenv("VLLM_ATTENTION_BACKEND", raising=False)
        with start(start_engine, model, 2048) as llm:
            found = {
                "one": alone(llm),
                "three": alone(llm, n=3),
                "top": alone(llm, top_k=20, top_p=0.9, min_p=0.01),
            }
    assert len({tuple(answer) for answer in found["three"]}) == 3
    return found


class TestChunks:
    """Fifteen chunks, in a pool of 28 blocks for five requests that would like 45."""

    @pytest.fixture(scope="class")
    @classmethod
    def llm(cls, class_engine: Engine, model: Path) -> Iterator[LLM]:
        with start(class_engine, model, CHUNK, num_gpu_blocks_override=29) as llm:
            yield llm

    def test_alone(self, llm: LLM, expected: dict[str, Tokens]) -> None:
        assert alone(llm) == expected["one"]
        assert alone(llm) == expected["one"]

    def test_several_answers(self, llm: LLM, expected: dict[str, Tokens]) -> None:
        assert alone(llm, n=3) == expected["three"]

    def test_filters(self, llm: LLM, expected: dict[str, Tokens]) -> None:
        assert alone(llm, top_k=20, top_p=0.9, min_p=0.01) == expected["top"]

    def test_logprobs_of_the_prompt(self, llm: LLM, expected: dict[str, Tokens]) -> None:
        assert alone(llm, prompt_logprobs=2, logprobs=2) == expected["one"]

    def test_in_company_and_preempted(
        self, llm: LLM, expected: dict[str, Tokens], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Beside requests with seeds, without, and greedy ones, whose own tokens are the same
        too."""
        caught: list[str] = []
        real = scheduler(llm)
        preempt = real._preempt_request

        def note(request: Any, *args: Any, **kwargs: Any) -> None:
            if request.sampling_params.seed is not None:
                caught.append(request.request_id)
            preempt(request, *args, **kwargs)

        monkeypatch.setattr(real, "_preempt_request", note)
        others = [
            seeded(seed=7),
            seeded(seed=8, temperature=0),
            SamplingParams(max_tokens=NEW, ignore_eos=True, detokenize=False),
            seeded(seed=9),
        ]
        company = list(zip(COMPANY, others, strict=True))
        answers = generate(llm, [*company, (LONG, seeded())])
        assert caught
        assert answers[-1] == expected["one"]
        for request, answer in zip(company, answers, strict=False):
            if request[1].seed is not None:
                assert generate(llm, [request]) == [answer]


def test_with_speculation(model: Path) -> None:
    """Served, and the same tokens each time. In company they differ from those alone: so they do
    in stock vLLM, with prompts in one piece.

    In another process, for the reason that stands in test_speculative.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        first, again, company = pool.submit(_speculate, model).result()
    assert first == again
    assert [len(answer) for answers in company for answer in answers] == 5 * [NEW]


def _speculate(model: Path) -> tuple[Tokens, Tokens, list[Tokens]]:
    os.environ["NUMBA_DISABLE_JIT"] = "1"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    ngrams = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
    with start(start_engine, model, CHUNK, speculative_config=ngrams) as llm:
        company = [(prompt, seeded(seed=n)) for n, prompt in enumerate([*COMPANY, LONG])]
        return alone(llm), alone(llm), generate(llm, company)


def test_stock_dies_of_it(engine: Engine, model: Path) -> None:
    """Where LMINF isn't selected vLLM is as it was. When this test fails, vLLM has been mended, and
    the wrapper around its sampling can go."""
    with engine(
        model, backend=None, max_model_len=64, max_num_batched_tokens=32, block_size=32
    ) as llm:
        prompt = [{"prompt_token_ids": LONG[:50]}]
        with pytest.raises(RuntimeError, match="CPU Generator does not use offset"):
            llm.generate(prompt, seeded(max_tokens=4), use_tqdm=False)
