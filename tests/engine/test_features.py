"""What a request or an engine may ask for beside plain tokens.

A request's log-probabilities are compared with the oracle's of the same tokens, in float32, on
prompts of several windows. What an engine isn't served with is refused when it starts, by name.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.outputs import CompletionOutput
from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor

from tests.engine.conftest import Engine, block_pool
from tests.engine.families import make_config
from tests.engine.oracle_model import oracle_distributions, oracle_logprobs, save_tiny_llama
from tests.engine.test_exactness import TOLERANCE, engine_logprobs, random_prompts
from vllm_lminf.errors import UnsupportedError
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.plugin.checks import check

pytestmark = pytest.mark.engine

PATTERN = LambdaPattern(n_global=10, n_local=64, distance_limit=64)
(PROMPT,) = random_prompts([300])
DIGITS = range(10)
FORBIDDEN = 400


def save_tokenizer(folder: Path) -> None:
    """512 words: ten digits, and others; the last one ends a text."""
    words = [str(d) for d in DIGITS] + [f"word{i}" for i in range(10, 511)] + ["</s>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="word10"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.save_pretrained(folder)


class NothingAbove(LogitsProcessor):
    """A processor of a user's own: no token from FORBIDDEN on."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        pass

    def __init__(self, vllm_config: object, device: torch.device, is_pin_memory: bool) -> None:
        pass

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        pass

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        logits[:, FORBIDDEN:] = -torch.inf
        return logits


def assert_logprobs_are_the_oracles(
    model: Path, prompt: list[int], completion: CompletionOutput
) -> None:
    tokens = [*prompt, *completion.token_ids]
    chosen = zip(completion.logprobs, completion.token_ids, strict=True)
    got = torch.tensor([step[token].logprob for step, token in chosen], dtype=torch.float64)
    expected = oracle_logprobs(model, tokens, PATTERN, torch.float32)[-len(got) :]
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


class TestRequests:
    @pytest.fixture(scope="class")
    def model(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        path = save_tiny_llama(tmp_path_factory.mktemp("features") / "model", 4, 2, 64)
        save_tokenizer(path)
        return path

    @pytest.fixture(scope="class")
    def llm(self, class_engine: Engine, model: Path) -> Iterator[LLM]:
        with class_engine(
            model,
            n_global=PATTERN.n_global,
            n_local=PATTERN.n_local,
            max_model_len=1000,
            max_num_batched_tokens=128,
            block_size=16,
            skip_tokenizer_init=False,
            enable_prompt_embeds=True,
            logits_processors=[NothingAbove],
        ) as llm:
            yield llm

    @pytest.fixture(autouse=True)
    def nothing_is_left(self, llm: LLM) -> Iterator[None]:
        pool = block_pool(llm)
        free = pool.get_num_free_blocks()
        yield
        assert pool.get_num_free_blocks() == free

    @staticmethod
    def complete(llm: LLM, prompt: dict, **sampling: object) -> list[CompletionOutput]:
        defaults = {"temperature": 0, "max_tokens": 40, "logprobs": 0, "ignore_eos": True}
        (output,) = llm.generate([prompt], SamplingParams(**(defaults | sampling)), use_tqdm=False)
        return output.outputs

    def test_several_samples_of_one_prompt(self, llm: LLM, model: Path) -> None:
        samples = self.complete(llm, {"prompt_token_ids": PROMPT}, n=4, temperature=1.0)
        assert len({tuple(sample.token_ids) for sample in samples}) == 4
        for sample in samples:
            assert_logprobs_are_the_oracles(model, PROMPT, sample)

    def test_beam_search(self, llm: LLM, model: Path) -> None:
        """The oracle gives every beam its score; the best comes first."""
        parameters = BeamSearchParams(beam_width=3, max_tokens=12, ignore_eos=True)
        (output,) = llm.beam_search([{"prompt_token_ids": PROMPT}], parameters)
        assert len(output.sequences) == 3
        scores = [beam.cum_logprob for beam in output.sequences]
        assert scores == sorted(scores, reverse=True)
        for beam in output.sequences:
            assert len(beam.tokens) == len(PROMPT) + 12
            expected = oracle_logprobs(model, beam.tokens, PATTERN, torch.float32)[-12:].sum()
            assert beam.cum_logprob == pytest.approx(float(expected), abs=12 * TOLERANCE)

    def test_structured_output(self, llm: LLM, model: Path) -> None:
        structure = StructuredOutputsParams(regex="[0-9]{30}")
        (digits,) = self.complete(
            llm, {"prompt_token_ids": PROMPT}, structured_outputs=structure, max_tokens=30
        )
        assert len(digits.token_ids) == 30
        tokens = list(digits.token_ids)
        oracle = oracle_distributions(model, PROMPT + tokens, PATTERN, torch.float32)
        among_digits = oracle[-30:, list(DIGITS)].log_softmax(-1)
        assert tokens == among_digits.argmax(-1).tolist()
        got = [step[token].logprob for step, token in zip(digits.logprobs, tokens, strict=True)]
        assert got == pytest.approx(among_digits.max(-1).values.tolist(), abs=TOLERANCE)

    def test_logits_processors(self, llm: LLM, model: Path) -> None:
        """vLLM's biases and a class of the user's own; log-probabilities are those before them."""
        (biased,) = self.complete(llm, {"prompt_token_ids": PROMPT}, logit_bias={7: 5.0, 9: 5.0})
        assert max(biased.token_ids) < FORBIDDEN
        assert {7, 9} & set(biased.token_ids)
        assert_logprobs_are_the_oracles(model, PROMPT, biased)

    def test_prompt_of_embeddings(self, llm: LLM, model: Path) -> None:
        """The rows of the embedding table in place of the tokens: the same, bit for bit."""
        table = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
        (of_tokens,) = self.complete(llm, {"prompt_token_ids": PROMPT})
        (of_rows,) = self.complete(llm, {"prompt_embeds": table[PROMPT]})
        assert of_rows.token_ids == of_tokens.token_ids
        assert of_rows.logprobs == of_tokens.logprobs
        assert_logprobs_are_the_oracles(model, PROMPT, of_tokens)


GEMMA_3N = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size_per_layer_input": 512,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 8,
    "activation_sparsity_pattern": None,
    "tie_word_embeddings": True,
}
FP8_CACHE = {
    "quant_method": "compressed-tensors",
    "format": "dense",
    "config_groups": {},
    "ignore": ["lm_head"],
    "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
}
CONNECTOR = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")


class TestRefusals:
    """Real starts: the reason comes before a token is asked for."""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
            ({"kv_offloading_size": 1.0}, r"a KV connector \(OffloadingConnector"),
            ({"kv_transfer_config": CONNECTOR}, r"a KV connector \(ExampleConnector"),
            ({"runner": "pooling"}, "runner 'pooling': only text generation is served"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_features(
        self, engine: Engine, tmp_path: Path, arguments: dict[str, Any], message: str
    ) -> None:
        make_config("LlamaConfig", {}).save_pretrained(tmp_path)
        with pytest.raises(UnsupportedError, match=message), engine(tmp_path, **arguments):
            pass

    @pytest.mark.parametrize(
        ("config_class", "settings", "message"),
        [
            ("JambaConfig", {"num_key_value_heads": 2}, "state-space layers"),
            (
                "Gemma3nTextConfig",
                GEMMA_3N,
                r"KV sharing between layers \(here with \S*layers\.[01]\.self_attn\.attn\)",
            ),
            ("LlamaConfig", {"quantization_config": FP8_CACHE}, "kv_cache_dtype not supported"),
        ],
        ids=["hybrid Mamba", "KV sharing", "fp8 cache asked for by a checkpoint"],
    )
    def test_models(
        self,
        engine: Engine,
        tmp_path: Path,
        config_class: str,
        settings: dict[str, Any],
        message: str,
    ) -> None:
        make_config(config_class, settings).save_pretrained(tmp_path)
        with (
            pytest.raises(ValueError, match=f"LMINF can't serve(.|\n)*{message}"),
            engine(tmp_path, load_format="dummy"),
        ):
            pass

    def test_heads_that_are_turned_in_part(
        self, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """DeepSeek V2 without MLA: the last part of each head is turned, the first is not."""
        monkeypatch.setenv("VLLM_MLA_DISABLE", "1")
        heads = {"qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32}
        settings = heads | {"first_k_dense_replace": 2}
        make_config("DeepseekV2Config", settings).save_pretrained(tmp_path)
        with (
            pytest.raises(
                UnsupportedError,
                match=r"layers? \S+attn\b.*, 48 dimensions each, .* rotate 16 of them",
            ),
            engine(tmp_path, load_format="dummy"),
        ):
            pass

    def test_sleep_mode(self, tmp_path: Path) -> None:
        """vLLM offers it on no CPU, so the configuration is changed after it has been built."""
        make_config("LlamaConfig", {}).save_pretrained(tmp_path)
        arguments = EngineArgs(str(tmp_path), skip_tokenizer_init=True, attention_backend="LMINF")
        config = arguments.create_engine_config()
        config.model_config.enable_sleep_mode = True
        with pytest.raises(UnsupportedError, match="--enable-sleep-mode"):
            check(config)

    def test_multimodal_models(self, engine: Engine, tmp_path: Path) -> None:
        """Refused with audio, served without."""
        text = make_config("Qwen2Config", {"num_key_value_heads": 2}).to_dict()
        audio = {"encoder_layers": 1, "encoder_attention_heads": 2, "d_model": 32}
        transformers.Qwen2AudioConfig(
            text_config=text,
            audio_config=audio,
            architectures=["Qwen2AudioForConditionalGeneration"],
        ).save_pretrained(tmp_path)
        with (
            pytest.raises(UnsupportedError, match=r"audio.* --language-model-only"),
            engine(tmp_path, load_format="dummy"),
        ):
            pass
        with engine(
            tmp_path, load_format="dummy", language_model_only=True, max_model_len=1000
        ) as llm:
            ((tokens, _),) = engine_logprobs(llm, [PROMPT], 8)
            assert len(tokens) == len(PROMPT) + 8
