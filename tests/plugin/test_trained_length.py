"""What LMINF takes for the trained length, whatever options make a configuration say.

Configurations of tiny models; no weights and no engine.
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

from tests.engine.families import make_config
from vllm_lminf.errors import UnsupportedError
from vllm_lminf.middle import Middle
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.plugin import register
from vllm_lminf.plugin.config import LambdaConfig
from vllm_lminf.plugin.trained_length import Trained, distances_beyond, layers_with_windows

LENGTH, WINDOW = 64, 24
_SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
_FULL, _SLIDING = "full_attention", "sliding_attention"
_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": LENGTH,
    "rope_theta": 10000.0,
}
_LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-yarn": ("LlamaConfig", {"rope_parameters": _YARN, "max_position_embeddings": 256}),
    "llama-linear": ("LlamaConfig", {"rope_parameters": _LINEAR}),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "mistral-0": ("MistralConfig", {"sliding_window": 0}),
    "qwen2": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0},
    ),
    "qwen2-off": ("Qwen2Config", {"use_sliding_window": False, "sliding_window": WINDOW}),
    "gemma-2": ("Gemma2Config", {"sliding_window": WINDOW, "head_dim": 32}),
}

Build = Callable[..., tuple[Trained, LambdaPattern]]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """``build(model, without=.., **arguments)``: what it was trained on, and the engine's Λ."""
    register()
    root = tmp_path_factory.mktemp("models")

    def of_engine(
        model: str, without: tuple[str, ...] = (), **arguments: Any
    ) -> tuple[Trained, LambdaPattern]:
        path: Path = root / "-".join((model, *without))
        if not path.exists():
            config_class, settings = MODELS[model]
            make_config(config_class, _SHAPE | settings).save_pretrained(path)
            config = json.loads((path / "config.json").read_text())
            for key in without:
                del config[key]
            (path / "config.json").write_text(json.dumps(config))
        config = EngineArgs(
            str(path), attention_backend="LMINF", skip_tokenizer_init=True, **arguments
        ).create_engine_config()
        resolved = LambdaConfig.of(config)
        return resolved.trained, resolved.pattern

    return of_engine


def _longer(config: Any) -> Any:
    config.update({"max_position_embeddings": 128})
    return config


# model, arguments, trained length, window that was taken away, what a remark says or None
TABLE: list[tuple[str, dict[str, Any], int, int | None, str | None]] = [
    ("llama", {}, 64, None, None),
    ("llama", {"max_model_len": 1000}, 64, None, None),
    ("llama", {"max_model_len": 32}, 64, None, None),
    ("llama", {"max_model_len": -1}, 64, None, None),
    ("llama", {"disable_sliding_window": True}, 64, None, None),
    ("llama-yarn", {}, 256, None, None),
    ("llama-linear", {}, 256, None, None),
    ("mistral", {}, 64, None, None),
    ("mistral-0", {}, 64, None, None),
    ("mistral-0", {"disable_sliding_window": True}, 64, None, None),
    ("qwen2", {}, 64, None, None),
    ("qwen2-off", {}, 64, None, None),
    ("qwen2-off", {"disable_sliding_window": True}, 64, None, None),
    ("gemma-2", {}, 64, None, None),
    *(
        (model, {"disable_sliding_window": True} | length, 24, 24, "--disable-sliding-window takes")
        for model in ("mistral", "qwen2", "gemma-2")
        for length in ({}, {"max_model_len": 1000})
    ),
    *(
        (model, {"hf_overrides": overrides}, length, window, remark)
        for model, overrides, length, window, remark in [
            ("mistral", {"sliding_window": None}, 24, 24, "--hf-overrides takes away"),
            ("mistral", {"sliding_window": 0}, 24, 24, "takes away"),
            ("mistral", {"sliding_window": 48}, 64, None, "widens sliding windows from 24"),
            ("mistral", {"sliding_window": 12}, 64, None, None),
            ("mistral", {"layer_types": [_FULL, _FULL]}, 24, 24, "takes away"),
            ("mistral", {"layer_types": [_FULL, _SLIDING]}, 24, 24, "takes away"),
            ("gemma-2", {"layer_types": [_FULL, _FULL]}, 24, 24, "takes away"),
            ("qwen2", {"use_sliding_window": False}, 64, None, None),
            ("qwen2", {"max_window_layers": 1}, 64, None, None),
            ("qwen2-off", {"use_sliding_window": True}, 64, None, None),
            ("llama", {"sliding_window": 24}, 64, None, None),
            ("llama", {"max_position_embeddings": 32}, 32, None, None),
            ("llama", {"max_position_embeddings": 128}, 64, None, "says 64 for the same rotation"),
            ("llama", {"model_max_length": 500}, 64, None, "says 64 for the same rotation"),
            ("llama", _longer, 64, None, "--hf-overrides says 128 tokens"),
            ("llama", {"rope_parameters": _YARN}, 64, None, None),
            (
                "llama",
                {"rope_parameters": _YARN, "max_position_embeddings": 256},
                256,
                None,
                "changes the rotation: 256 tokens",
            ),
            ("llama", {"rope_parameters": _LINEAR}, 256, None, "changes the rotation: 256"),
            ("llama", {"rope_scaling": _LINEAR}, 256, None, "changes the rotation: 256"),
        ]
    ),
]


def _name(value: object) -> str:
    # A function's own name: its address differs from process to process.
    return str(value).replace(repr(_longer), _longer.__name__)


@pytest.mark.parametrize(("model", "arguments", "length", "window", "remark"), TABLE, ids=_name)
def test_trained_length(
    model: str,
    arguments: dict[str, Any],
    length: int,
    window: int | None,
    remark: str | None,
    build: Build,
) -> None:
    """An option makes a configuration say more; the weights stay what they are."""
    found, pattern = build(model, **arguments)
    assert (found.length, found.longest, found.window) == (length, length, window)
    assert pattern == LambdaPattern(10, length, length)
    assert len(found.remarks) == (remark is not None)
    assert all(remark in sentence for sentence in found.remarks)


class TestDefaultOfTransformers:
    """A configuration that is silent is filled in without a word."""

    SILENT = ("max_position_embeddings",)

    def test_is_told(self, build: Build) -> None:
        found, _ = build("llama", self.SILENT)
        (sentence,) = found.remarks
        assert found.length == 2048
        assert "2048 is the default of LlamaConfig" in sentence
        assert "set n_local" in sentence

    def test_an_option_may_fill_it_in(self, build: Build) -> None:
        overrides = {"max_position_embeddings": 4096}
        found, _ = build("llama", self.SILENT, hf_overrides=overrides)
        assert found == Trained(4096, 4096)


class TestWindowsTakenAway:
    def test_a_wider_one_is_refused(self, build: Build) -> None:
        with pytest.raises(UnsupportedError, match="windows of 24 tokens") as refusal:
            build(
                "mistral",
                disable_sliding_window=True,
                additional_config={"lminf": {"n_local": 25}},
            )
        assert "--disable-sliding-window, and n_local 25" in str(refusal.value)

    def test_a_narrower_one(self, build: Build) -> None:
        settings = {"lminf": {"n_local": 20}}
        _, pattern = build("mistral", disable_sliding_window=True, additional_config=settings)
        assert pattern == LambdaPattern(10, 20, 20)


class TestDistancesBeyond:
    @pytest.mark.parametrize(
        ("pattern", "says"),
        [
            ((10, 64, 64), None),
            ((10, 32, 64), None),
            ((10, 65, 65), "n_local 65 is beyond the trained length, 64"),
            ((10, 64, 65), "distance_limit 65 is beyond the trained length, 64"),
        ],
    )
    def test_is_told(self, pattern: tuple[int, int, int], says: str | None) -> None:
        sentences = list(distances_beyond(Trained(64, 64), LambdaPattern(*pattern), None))
        assert len(sentences) == (says is not None)
        assert all(sentence.startswith(str(says)) for sentence in sentences)

    def test_distance_of_the_middle(self) -> None:
        def told(distance: int) -> list[str]:
            middle = Middle(5, distance, rows=1)
            return list(distances_beyond(Trained(64, 64), LambdaPattern(10, 64, 64), middle))

        assert told(64) == []
        (sentence,) = told(65)
        assert sentence.startswith("middle_distance 65 is beyond the trained length, 64")

    def test_long_factors_of_longrope_were_trained(self) -> None:
        assert not list(distances_beyond(Trained(64, 256), LambdaPattern(10, 256, 256), None))

    def test_nothing_is_known(self) -> None:
        assert not list(distances_beyond(Trained(None, None), LambdaPattern(1, 9, 9), None))


class TestLayersWithWindows:
    """What `vllm_lminf.plugin.checks` asks before any layer is there."""

    def of(self, everywhere: int | None = None, **config: Any) -> set[int]:
        text_config = SimpleNamespace(num_hidden_layers=4, **config)
        model: Any = SimpleNamespace(
            hf_text_config=text_config, get_total_num_hidden_layers=lambda: 4
        )
        return layers_with_windows(model, everywhere)

    def test_all(self) -> None:
        assert self.of(512) == {0, 1, 2, 3}

    def test_some(self) -> None:
        types = ["sliding_attention", "full_attention"] * 2
        assert self.of(layer_types=types, sliding_window=512) == {0, 2}

    def test_none(self) -> None:
        """A window that no layer is said to have, and types without a window."""
        assert self.of(sliding_window=512) == set()
        assert self.of(layer_types=["sliding_attention"] * 4, sliding_window=None) == set()
        assert self.of() == set()
