"""Which drafters are served, and what a draft model is told. Configurations; no engine."""

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
from vllm.config import VllmConfig
from vllm.config.speculative import MTPModelTypes, SpeculativeMethod
from vllm.config.utils import replace
from vllm.engine.arg_utils import EngineArgs

from tests.engine import drafters
from vllm_lminf.errors import UnsupportedError
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.plugin import register, speculation
from vllm_lminf.plugin.checks import check
from vllm_lminf.plugin.config import LambdaConfig
from vllm_lminf.plugin.patterns import model_pattern

MILLION = 1_000_000


@pytest.fixture(autouse=True)
def plugin() -> None:
    register()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drafters.save_counting_model(tmp_path_factory.mktemp("speculation") / "model")


@pytest.fixture(scope="module")
def short_draft(model: Path) -> dict[str, Any]:
    return drafters.short_draft_model(model)


def build(model: Path, drafter: dict[str, Any], **arguments: Any) -> VllmConfig:
    return EngineArgs(
        str(model),
        attention_backend="LMINF",
        speculative_config=drafter,
        skip_tokenizer_init=True,
        max_model_len=MILLION,
        **arguments,
    ).create_engine_config()


class TestDraftModel:
    def test_same_backend_and_length(self, model: Path, short_draft: dict[str, Any]) -> None:
        drafter = build(model, short_draft).speculative_config
        assert drafter.attention_backend.name == "LMINF"
        assert drafter.draft_model_config.max_model_len == MILLION

    def test_a_length_that_is_asked_for_stays(
        self, model: Path, short_draft: dict[str, Any]
    ) -> None:
        drafter = build(model, short_draft | {"max_model_len": 20}).speculative_config
        assert drafter.draft_model_config.max_model_len == 20

    @pytest.mark.parametrize("name", ["LMINF", "lminf", "auto"])
    def test_backend_may_be_named(
        self, name: str, model: Path, short_draft: dict[str, Any]
    ) -> None:
        config = build(model, short_draft | {"attention_backend": name})
        assert config.speculative_config.attention_backend.name == "LMINF"

    def test_another_backend(self, model: Path, short_draft: dict[str, Any]) -> None:
        with pytest.raises(UnsupportedError, match="attention_backend CPU_ATTN"):
            build(model, short_draft | {"attention_backend": "CPU_ATTN"})

    def test_a_draft_model_that_is_not_served(
        self, model: Path, short_draft: dict[str, Any], tmp_path: Path
    ) -> None:
        draft = tmp_path / "draft"
        shutil.copytree(short_draft["model"], draft)
        config = json.loads((draft / "config.json").read_text())
        config["rope_parameters"]["mrope_section"] = [4, 6, 6]
        (draft / "config.json").write_text(json.dumps(config))
        with pytest.raises(UnsupportedError, match="the draft model: layers 0 to 0: M-RoPE"):
            build(model, short_draft | {"model": str(draft)})

    def test_parallel_drafting(self, model: Path, short_draft: dict[str, Any]) -> None:
        config = build(model, short_draft)
        config.speculative_config.parallel_drafting = True
        with pytest.raises(UnsupportedError, match="parallel_drafting"):
            check(config)

    def test_each_model_by_what_it_was_trained_on(
        self, model: Path, short_draft: dict[str, Any]
    ) -> None:
        """The engine's Λ is the model's, while either of them is built."""
        config = build(model, short_draft)
        own = LambdaPattern(10, drafters.TRAINED_LENGTH, drafters.TRAINED_LENGTH)
        half = drafters.TRAINED_LENGTH // 2
        draft_config = replace(config, model_config=config.speculative_config.draft_model_config)
        assert LambdaConfig.of(config).pattern == model_pattern(config) == own
        assert LambdaConfig.of(draft_config).pattern == own
        assert model_pattern(draft_config) == LambdaPattern(10, half, half)


def test_medusa_drafts_beyond_its_trained_length(model: Path) -> None:
    drafter = build(model, drafters.medusa(model)).speculative_config
    assert drafter.draft_model_config.max_model_len == MILLION


@pytest.mark.parametrize(
    ("pattern", "trained_length", "expected"),
    [
        ((10, 64, 64), 32, (10, 32, 32)),
        ((10, 64, 100), 80, (10, 64, 80)),
        ((10, 64, 100), 32, (10, 32, 32)),
        ((10, 64, 100), 100, (10, 64, 100)),
        ((10, 64, 64), 4096, (10, 64, 64)),
        ((10, 64, 64), None, (10, 64, 64)),
    ],
)
def test_draft_pattern(
    pattern: tuple[int, int, int], trained_length: int | None, expected: tuple[int, int, int]
) -> None:
    narrowed = speculation.draft_pattern(LambdaPattern(*pattern), trained_length)
    assert narrowed == LambdaPattern(*expected)


@pytest.mark.parametrize("method", sorted(speculation._UNSERVED))
def test_unserved_methods(method: str, model: Path) -> None:
    """Each is refused by its name, with the reason. Most need a checkpoint before vLLM makes a
    configuration of them, so it is a served one's that is given their names."""
    config = build(model, drafters.ngram(model))
    config.speculative_config.method = method
    with pytest.raises(UnsupportedError) as refusal:
        check(config)
    (reason,) = refusal.value.reasons
    assert f"speculative decoding with method '{method}': " in reason
    assert "served are ngram, draft_model, eagle, medusa" in reason


def test_every_method_of_vllm_is_judged() -> None:
    def flat(kind: Any) -> set[str]:
        return {kind} if isinstance(kind, str) else set().union(*map(flat, get_args(kind)))

    # vLLM calls all the model types of multi-token prediction by one method.
    methods = flat(SpeculativeMethod) - (flat(MTPModelTypes) - {"mtp"})
    assert methods == {*speculation.SERVED, *speculation._UNSERVED}
