"""What a request or an engine may ask for, in an engine that recalls the middle.

A request's log-probabilities are compared with the oracle's, or with those of the same request
where nothing else runs.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from vllm import LLM, SamplingParams
from vllm.config import CompilationMode
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput
from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams

from tests.engine.conftest import Engine
from tests.engine.oracle_model import oracle_distributions, oracle_logprobs, save_tiny_llama
from tests.engine.test_exactness import TOLERANCE, engine_logprobs
from tests.engine.test_features import DIGITS, save_tokenizer
from tests.engine.test_middle import settings
from tests.engine.test_weights import save_adapter
from tests.engine.traffic import (
    alone,
    ask,
    assert_equal_to_oracle,
    assert_pool_is_whole,
    block_manager,
    finish,
    lambda_pattern,
    scheduler,
    step,
    submit,
    tokens,
)
from vllm_lminf.errors import UnsupportedError
from vllm_lminf.middle import Middle
from vllm_lminf.pattern import LambdaPattern

pytestmark = pytest.mark.engine

BLOCK = 16
PATTERN = LambdaPattern(5, 40, 40)
PROMPT = tokens(300)


class TestRequests:
    """Blocks of 16, prompts in chunks of 128, of which the last 20 rows look. The archive
    holds 960 tokens, and the device's pool many more."""

    MIDDLE = Middle(4, distance=30, rows=20, from_layer=2)
    MAX_MODEL_LEN = 600
    PAGES = 61

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("features") / "model"
        path = save_tiny_llama(folder, 4, 2, 32, trained_length=64, num_layers=4)
        save_tokenizer(path)
        return path

    @pytest.fixture(scope="class")
    @classmethod
    def llm(cls, class_engine: Engine, model: Path) -> Iterator[LLM]:
        with class_engine(
            model,
            n_global=5,
            n_local=40,
            middle=settings(cls.MIDDLE, archive_gib=cls.PAGES * 29184 / (1 << 30)),
            block_size=BLOCK,
            max_num_batched_tokens=128,
            max_model_len=cls.MAX_MODEL_LEN,
            skip_tokenizer_init=False,
            enable_prompt_embeds=True,
            scheduling_policy="priority",
        ) as llm:
            assert lambda_pattern(llm) == PATTERN
            yield llm

    @pytest.fixture(autouse=True)
    @staticmethod
    def nothing_is_left(llm: LLM) -> Iterator[None]:
        assert llm.reset_prefix_cache()
        yield
        assert_pool_is_whole(llm)

    @staticmethod
    def complete(llm: LLM, prompt: dict, **sampling: object) -> list[CompletionOutput]:
        defaults = {"temperature": 0, "max_tokens": 40, "logprobs": 0, "ignore_eos": True}
        (output,) = llm.generate([prompt], SamplingParams(**(defaults | sampling)), use_tqdm=False)
        return output.outputs

    def assert_is_the_oracles(
        self, model: Path, prompt: list[int], completion: CompletionOutput
    ) -> None:
        text = [*prompt, *completion.token_ids]
        chosen = zip(completion.logprobs, completion.token_ids, strict=True)
        got = torch.tensor([at[token].logprob for at, token in chosen], dtype=torch.float64)
        expected = oracle_logprobs(model, text, PATTERN, torch.float32, self.MIDDLE, len(prompt))[
            -len(got) :
        ]
        torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)

    def test_several_samples_of_one_prompt(self, llm: LLM, model: Path) -> None:
        samples = self.complete(llm, {"prompt_token_ids": PROMPT}, n=4, temperature=1.0)
        assert len({tuple(sample.token_ids) for sample in samples}) == 4
        for sample in samples:
            self.assert_is_the_oracles(model, PROMPT, sample)

    def test_seeds(self, llm: LLM, model: Path) -> None:
        """Chosen at random, in a batch and alone: the same."""
        sampling = SamplingParams(
            temperature=1.0, seed=5, max_tokens=20, logprobs=0, ignore_eos=True
        )
        prompts = [{"prompt_token_ids": tokens(n, seed=n)} for n in (300, 90, 210, 130, 60)]
        together = llm.generate(prompts, sampling, use_tqdm=False)
        for prompt, output in zip(prompts, together, strict=True):
            assert llm.reset_prefix_cache()
            (single,) = llm.generate([prompt], sampling, use_tqdm=False)
            assert single.outputs[0].token_ids == output.outputs[0].token_ids
            self.assert_is_the_oracles(model, prompt["prompt_token_ids"], output.outputs[0])

    def test_prompt_logprobs(self, llm: LLM, model: Path) -> None:
        """Of rows that look and of those that don't; and again, where the prompt is cached."""
        ask(llm, [PROMPT], 1)
        for text, logprobs in engine_logprobs(llm, [PROMPT, PROMPT[:61], PROMPT[:30]], 8):
            expected = oracle_logprobs(
                model, text, PATTERN, torch.float32, self.MIDDLE, len(text) - 8
            )
            torch.testing.assert_close(logprobs, expected, rtol=0, atol=TOLERANCE)

    def test_beam_search(self, llm: LLM, model: Path) -> None:
        """vLLM asks for each step of a beam as a prompt of its own, of which the last rows look."""
        length = 5
        parameters = BeamSearchParams(beam_width=2, max_tokens=length, ignore_eos=True)
        (output,) = llm.beam_search([{"prompt_token_ids": PROMPT}], parameters)
        for beam in output.sequences:
            expected = sum(
                oracle_logprobs(
                    model, beam.tokens[: n + 1], PATTERN, torch.float32, self.MIDDLE, n
                )[-1]
                for n in range(len(PROMPT), len(PROMPT) + length)
            )
            assert beam.cum_logprob == pytest.approx(float(expected), abs=length * TOLERANCE)

    def test_structured_output(self, llm: LLM, model: Path) -> None:
        structure = StructuredOutputsParams(regex="[0-9]{30}")
        (digits,) = self.complete(
            llm, {"prompt_token_ids": PROMPT}, structured_outputs=structure, max_tokens=30
        )
        oracle = oracle_distributions(
            model, PROMPT + list(digits.token_ids), PATTERN, torch.float32, self.MIDDLE, len(PROMPT)
        )
        among_digits = oracle[-30:, list(DIGITS)].log_softmax(-1)
        assert list(digits.token_ids) == among_digits.argmax(-1).tolist()

    def test_stop_strings_and_least_lengths(self, llm: LLM, model: Path) -> None:
        (whole,) = self.complete(llm, {"prompt_token_ids": PROMPT})
        words = whole.text.split()
        at = next(i for i in range(10, 40) if words[i] not in words[:i])
        (stopped,) = self.complete(llm, {"prompt_token_ids": PROMPT}, stop=[f"{words[at]} "])
        assert list(stopped.token_ids) == list(whole.token_ids)[: len(stopped.token_ids)]
        assert stopped.finish_reason == "stop"
        (longer,) = self.complete(
            llm,
            {"prompt_token_ids": PROMPT},
            stop_token_ids=[whole.token_ids[3]],
            min_tokens=12,
            max_tokens=12,
        )
        assert len(longer.token_ids) == 12
        self.assert_is_the_oracles(model, PROMPT, longer)

    def test_prompt_of_embeddings(self, llm: LLM, model: Path) -> None:
        """The rows of the embedding table in place of the tokens: the same, bit for bit."""
        table = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
        (of_tokens,) = self.complete(llm, {"prompt_token_ids": PROMPT})
        for _ in range(2):  # the second comes from the cache
            (of_rows,) = self.complete(llm, {"prompt_embeds": table[PROMPT]})
            assert of_rows.token_ids == of_tokens.token_ids
            assert of_rows.logprobs == of_tokens.logprobs
        self.assert_is_the_oracles(model, PROMPT, of_tokens)

    def test_longest_sequence(self, llm: LLM, model: Path) -> None:
        """It ends exactly at max_model_len."""
        prompts = [tokens(self.MAX_MODEL_LEN - n, seed=n) for n in (1, 30)]
        one, other = (self.complete(llm, {"prompt_token_ids": p}, max_tokens=None) for p in prompts)
        assert [len(one[0].token_ids), len(other[0].token_ids)] == [1, 30]
        self.assert_is_the_oracles(model, prompts[0], one[0])
        self.assert_is_the_oracles(model, prompts[1], other[0])

    def test_priorities(self, llm: LLM, model: Path) -> None:
        """Requests that count for more take the archive's pages from those that run."""
        prompts = [tokens(280 + 10 * n, seed=n) for n in range(4)]
        for number, prompt in enumerate(prompts):
            submit(llm, str(number), prompt, 60, priority=-number)
        answers, preempted = {}, set()
        while llm.llm_engine.has_unfinished_requests():
            answers |= step(llm)
            waiting = scheduler(llm).requests.values()
            preempted |= {each.priority for each in waiting if each.num_preemptions > 0}
        assert preempted
        assert min(preempted) > -len(prompts) + 1
        together = [answers[str(n)] for n in range(len(prompts))]
        assert_equal_to_oracle(model, [together[0], together[-1]], PATTERN, self.MIDDLE)
        assert [a.tokens for a in together] == [a.tokens for a in alone(llm, prompts, 60)]

    def test_a_prompt_that_arrives_in_pieces(self, llm: LLM) -> None:
        """Refused, since its length says which rows look."""
        process = llm.llm_engine.input_processor.process_inputs
        prompt = {"type": "token", "prompt_token_ids": PROMPT}
        for resumable in (False, True):
            with (
                pytest.raises(UnsupportedError, match="middle_rows 20, and a prompt that arrives")
                if resumable
                else nullcontext()
            ):
                process("piece", prompt, SamplingParams(), ("generate",), resumable=resumable)

    def test_reset_while_requests_run(self, llm: LLM, model: Path) -> None:
        prompts = [tokens(n, seed=n) for n in (300, 97, 350)]
        for number, prompt in enumerate(prompts):
            submit(llm, str(number), prompt, 30)
        answers = {}
        for count in range(30):
            answers |= step(llm)
            if count in (3, 12):
                assert not llm.reset_prefix_cache()
            if count == 20:
                assert llm.reset_prefix_cache(reset_running_requests=True)
        answers |= finish(llm)
        together = [answers[str(n)] for n in range(3)]
        assert_equal_to_oracle(model, together, PATTERN, self.MIDDLE)
        assert block_manager(llm).block_size == BLOCK


SHAPES = [
    pytest.param(
        Middle(4, distance=0, rows=20, from_layer=1),
        {"n_global": 0, "n_local": 40, "block_size": 16, "enable_prefix_caching": False},
        id="no global tokens",
    ),
    pytest.param(
        Middle(1000, distance=2**31 - 1, rows=150, from_layer=2),
        {"n_global": 20, "n_local": 40, "block_size": 16, "async_scheduling": False},
        id="global tokens on two pages, more units than there are",
    ),
    pytest.param(
        Middle(4, distance=30, rows=150, from_layer=2),
        {"n_global": 5, "n_local": 64, "block_size": 128},
        id="a window within a page",
    ),
    pytest.param(
        Middle(2, distance=30, rows=150, from_layer=2, block_size=64),
        {"n_global": 5, "n_local": 40, "block_size": 32, "async_scheduling": True},
        id="units of two pages",
    ),
    pytest.param(
        Middle(2, distance=30, rows=150, from_layer=2, block_size=48),
        {"n_global": 5, "n_local": 17, "block_size": 32},
        id="units across pages",
    ),
]


@pytest.mark.parametrize(("middle", "arguments"), SHAPES)
def test_shapes(engine: Engine, tmp_path: Path, middle: Middle, arguments: dict) -> None:
    """Twice, the second time from the cache where there is one."""
    model = save_tiny_llama(tmp_path / "model", 4, 2, 32, trained_length=64, num_layers=3)
    prompts = [tokens(n, seed=n) for n in (1, 64, 130, 300)]
    with engine(
        model, middle=settings(middle), max_num_batched_tokens=100, max_model_len=400, **arguments
    ) as llm:
        answers, again = ask(llm, prompts, 30), ask(llm, prompts, 30)
        assert_equal_to_oracle(model, answers, lambda_pattern(llm), middle)
        assert [a.tokens for a in again] == [a.tokens for a in answers]
        is_cached = arguments.get("enable_prefix_caching", True)
        assert any(answer.num_cached for answer in again) == is_cached


def test_compiled_model(engine: Engine, tmp_path: Path) -> None:
    """As vLLM runs by default: the model around the attention goes through torch.compile."""
    model = save_tiny_llama(tmp_path / "model", 4, 2, 32, trained_length=64, num_layers=3)
    middle = Middle(4, distance=30, rows=20, from_layer=2)
    with engine(
        model,
        n_global=5,
        n_local=40,
        middle=settings(middle),
        max_model_len=1000,
        block_size=16,
        enforce_eager=False,
    ) as llm:
        assert llm.llm_engine.vllm_config.compilation_config.mode != CompilationMode.NONE
        answers = ask(llm, [tokens(n, seed=n) for n in (40, 300)], 8)
        assert_equal_to_oracle(model, answers, lambda_pattern(llm), middle)


class TestWeights:
    """LoRA adapters, and weights that change while the engine runs."""

    MIDDLE = Middle(4, distance=30, rows=20, from_layer=2)

    def test_adapters(self, engine: Engine, tmp_path: Path) -> None:
        """Each comes twice, the second time from the cache; none is served what another left."""
        model = save_tiny_llama(tmp_path / "model", 4, 2, 32, trained_length=64, num_layers=3)
        (first, first_merged), (second, second_merged) = (
            save_adapter(model, tmp_path, seed) for seed in (1, 2)
        )
        adapters = [LoRARequest("first", 1, str(first)), LoRARequest("second", 2, str(second))]
        one, other = tokens(200, seed=1), tokens(300, seed=2)
        sampling = SamplingParams(
            temperature=0, max_tokens=16, logprobs=0, detokenize=False, ignore_eos=True
        )
        with engine(
            model,
            n_global=5,
            n_local=40,
            middle=settings(self.MIDDLE),
            block_size=16,
            max_model_len=1000,
            max_num_batched_tokens=96,
            enable_lora=True,
            max_loras=2,
            max_lora_rank=8,
        ) as llm:
            for prompts, lora_requests, equivalents, is_cached in (
                ([one, other], adapters, [first_merged, second_merged], False),
                ([one, other], adapters, [first_merged, second_merged], True),
                ([one, other], [None, None], [model, model], False),
                ([other, one], adapters, [first_merged, second_merged], False),
            ):
                requests = [{"prompt_token_ids": prompt} for prompt in prompts]
                outputs = llm.generate(
                    requests, sampling, use_tqdm=False, lora_request=lora_requests
                )
                for output, equivalent in zip(outputs, equivalents, strict=True):
                    assert (output.num_cached_tokens > 0) == is_cached
                    completion = output.outputs[0]
                    chosen = zip(completion.logprobs, completion.token_ids, strict=True)
                    got = torch.tensor([s[t].logprob for s, t in chosen], dtype=torch.float64)
                    text = [*output.prompt_token_ids, *completion.token_ids]
                    expected = oracle_logprobs(
                        equivalent, text, PATTERN, torch.float32, self.MIDDLE, len(text) - 16
                    )[-16:]
                    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)

    def test_reloaded(self, engine: Engine, tmp_path: Path) -> None:
        """New weights in the same engine, which answers as the new model then."""
        model = save_tiny_llama(tmp_path / "model", 4, 2, 32, trained_length=64, num_layers=3)
        _, other = save_adapter(model, tmp_path, 1)
        with engine(
            model,
            n_global=5,
            n_local=40,
            middle=settings(self.MIDDLE),
            block_size=16,
            max_model_len=1000,
            max_num_batched_tokens=96,
        ) as llm:
            assert_equal_to_oracle(model, ask(llm, [PROMPT], 12), PATTERN, self.MIDDLE)
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
            assert llm.reset_prefix_cache()
            assert_equal_to_oracle(other, ask(llm, [PROMPT], 12), PATTERN, self.MIDDLE)
