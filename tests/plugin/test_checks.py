"""From the user's arguments to a configuration: what selects LMINF, what it changes and refuses.

Real arguments, real configurations; no engine is started.
"""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import pytest
import torch
import transformers
import vllm.plugins
from vllm.config import KVTransferConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms.cpu import CpuPlatform
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from vllm_lminf.errors import SettingsError, UnsupportedError
from vllm_lminf.middle import Middle
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.plugin import patches, register, versions
from vllm_lminf.plugin.checks import _select, check
from vllm_lminf.plugin.config import (
    BACKEND_VARIABLE,
    DEFAULT_N_GLOBAL,
    VARIABLE_PREFIX,
    LambdaConfig,
    is_backend_name,
    is_near_miss,
)

MILLION = 1_000_000


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The plugin registered, and no variable of its own set."""
    for name in list(os.environ):
        if name.startswith(VARIABLE_PREFIX) or name == BACKEND_VARIABLE:
            monkeypatch.delenv(name)
    monkeypatch.delenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", raising=False)
    # vLLM does it once in a process, when the first arguments are made; tests that take the plugin
    # off must come after.
    vllm.plugins.load_general_plugins()
    register()
    yield
    register()


@pytest.fixture
def selected_by_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BACKEND_VARIABLE, "LMINF")


class Build:
    """Builds configurations of one model."""

    def __init__(self, model: str) -> None:
        self.model = model

    def __call__(self, **arguments: Any) -> VllmConfig:
        return EngineArgs(model=self.model, **arguments).create_engine_config()

    def selected(self, **arguments: Any) -> VllmConfig:
        return self(attention_backend="LMINF", **arguments)

    def from_command_line(self, *argv: str) -> VllmConfig:
        parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
        arguments = parser.parse_args(["--model", self.model, *argv])
        return EngineArgs.from_cli_args(arguments).create_engine_config()


@pytest.fixture
def build(model_path: str) -> Build:
    return Build(model_path)


def backend_of(config: VllmConfig) -> str | None:
    backend = config.attention_config.backend
    return None if backend is None else backend.name


class TestSelection:
    @pytest.mark.parametrize("name", ["LMINF", "lminf", "LMINF ", "LM_INF", "lm-inf"])
    def test_variable(self, name: str, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(BACKEND_VARIABLE, name)
        assert backend_of(build()) == "LMINF"

    @pytest.mark.parametrize(
        "arguments",
        [
            {"attention_backend": "LMINF"},
            {"attention_backend": "lminf"},
            {"attention_backend": "LM-Inf"},
            {"attention_config": {"backend": "LMINF"}},
        ],
        ids=str,
    )
    def test_argument(self, arguments: dict[str, Any], build: Build) -> None:
        assert backend_of(build(**arguments)) == "LMINF"

    def test_argument_as_a_member(self, build: Build) -> None:
        assert backend_of(build(attention_backend=patches.backend_member())) == "LMINF"

    @pytest.mark.parametrize(
        "argv",
        [
            ("--attention-backend", "LMINF"),
            ("--attention-backend", "lminf"),
            ("--attention-backend", "LM_INF "),
            ("--attention-config", '{"backend": "LMINF"}'),
            ("--attention-config.backend", "LMINF"),
        ],
        ids=" ".join,
    )
    def test_command_line(self, argv: tuple[str, ...], build: Build) -> None:
        assert backend_of(build.from_command_line(*argv)) == "LMINF"

    @pytest.mark.usefixtures("selected_by_variable")
    @pytest.mark.parametrize(
        "arguments",
        [{"attention_backend": "lminf"}, {"attention_config": {"backend": "LMINF"}}],
        ids=str,
    )
    def test_both(self, arguments: dict[str, Any], build: Build) -> None:
        assert backend_of(build(**arguments)) == "LMINF"

    @pytest.mark.usefixtures("selected_by_variable")
    @pytest.mark.parametrize(
        "arguments",
        [{"attention_backend": "auto"}, {"attention_config": {"backend": "auto"}}],
        ids=str,
    )
    def test_automatic_choice_leaves_it_to_the_variable(
        self, arguments: dict[str, Any], build: Build
    ) -> None:
        """To vLLM "auto" is the same as nothing."""
        assert backend_of(build(**arguments)) == "LMINF"

    @pytest.mark.usefixtures("selected_by_variable")
    @pytest.mark.parametrize(
        "arguments",
        [
            {"attention_backend": "CPU_ATTN"},
            {"attention_backend": AttentionBackendEnum.FLASH_ATTN},
            {"attention_config": {"backend": "CPU_ATTN"}},
        ],
        ids=str,
    )
    def test_contradiction(self, arguments: dict[str, Any], build: Build) -> None:
        with pytest.raises(UnsupportedError, match="contradict") as refusal:
            build(**arguments)
        (reason,) = refusal.value.reasons
        assert f"{BACKEND_VARIABLE} is LMINF" in reason
        assert "CPU_ATTN" in reason or "FLASH_ATTN" in reason

    @pytest.mark.parametrize("name", ["LMNIF", "LM-Infinite", '"LMINF"'])
    def test_near_misses_are_asked_about(
        self, name: str, build: Build, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Before vLLM advises anything for lengths that LMINF serves."""
        with pytest.raises(UnsupportedError, match=r"--attention-backend is .*was LMINF meant"):
            build(attention_backend=name, max_model_len=MILLION)
        monkeypatch.setenv(BACKEND_VARIABLE, name)
        with pytest.raises(UnsupportedError, match=f"{BACKEND_VARIABLE} is .*was LMINF meant"):
            build(max_model_len=MILLION)

    @pytest.mark.parametrize("name", sorted(AttentionBackendEnum.__members__))
    def test_names_of_vllm_are_its_own_affair(
        self, name: str, build: Build, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert is_backend_name(name) or not is_near_miss(name)
        monkeypatch.setenv(BACKEND_VARIABLE, name)
        assert _select(EngineArgs(build.model)) == is_backend_name(name)

    def test_for_some_layers_only(self, build: Build) -> None:
        with pytest.raises(UnsupportedError, match="backend_per_kind"):
            build(attention_config={"backend_per_kind": {"full_attention": "LMINF"}})

    @pytest.mark.usefixtures("selected_by_variable")
    def test_vllm_knows_the_variables(self, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
        """It refuses to start over unknown variables where it is asked to be strict."""
        monkeypatch.setenv("VLLM_LMINF_N_GLOBAL", "4")
        assert backend_of(build(fail_on_environ_validation=True)) == "LMINF"


class TestNotSelected:
    """Everything is as without the plugin."""

    @pytest.mark.parametrize(
        "arguments", [{}, {"attention_backend": "auto"}, {"attention_backend": "CPU_ATTN"}], ids=str
    )
    def test_same_configuration(self, arguments: dict[str, Any], build: Build) -> None:
        with_plugin = build(**arguments)
        patches.uninstall()
        without = build(**arguments)
        assert with_plugin.compute_hash() == without.compute_hash()
        assert backend_of(with_plugin) == backend_of(without) != "LMINF"
        assert with_plugin.model_config.max_model_len == 8192

    @pytest.mark.parametrize("variable", [None, "", "FLASH_ATTN"])
    def test_beyond_the_trained_length_vllm_refuses_as_ever(
        self, variable: str | None, build: Build, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if variable is not None:
            monkeypatch.setenv(BACKEND_VARIABLE, variable)
        messages = []
        for _ in ("with the plugin", "without"):
            with pytest.raises(ValueError, match="max_model_len") as refusal:
                build(max_model_len=MILLION)
            # The rest of the message holds addresses of objects.
            messages.append(str(refusal.value).partition("[type=")[0])
            patches.uninstall()
        assert messages[0] == messages[1]
        assert "8192" in messages[0]

    def test_its_own_settings_are_not_looked_at(
        self, build: Build, monkeypatch: pytest.MonkeyPatch, said: list[str]
    ) -> None:
        """But their owner is told."""
        assert backend_of(build()) is None
        assert said == []
        monkeypatch.setenv("VLLM_LMINF_N_LOCAL", "many")
        assert backend_of(build(additional_config={"lminf": {"windows": 3}})) is None
        (sentence,) = said
        assert sentence.startswith('VLLM_LMINF_N_LOCAL, "lminf" in --additional-config: set, and')
        assert "VLLM_ATTENTION_BACKEND=LMINF" in sentence

    @pytest.mark.parametrize("selected", [None, "CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN"])
    def test_cpu_platform_chooses_as_ever(self, selected: str | None) -> None:
        member = None if selected is None else AttentionBackendEnum[selected]
        config = AttentionSelectorConfig(64, torch.bfloat16, "auto", 16)
        with_plugin = CpuPlatform.get_attn_backend_cls(member, config, 9)
        patches.uninstall()
        assert with_plugin == CpuPlatform.get_attn_backend_cls(member, config, 9)
        assert with_plugin == AttentionBackendEnum.CPU_ATTN.get_path()

    def test_cpu_platform_refuses_as_ever(self) -> None:
        config = AttentionSelectorConfig(64, torch.bfloat16, "auto", 16, use_sparse=True)
        with pytest.raises(NotImplementedError):
            CpuPlatform.get_attn_backend_cls(None, config)


class TestSelected:
    @pytest.mark.parametrize("max_model_len", [100, 8192, MILLION, 2**31 - 1])
    def test_any_length_is_accepted(self, max_model_len: int, build: Build) -> None:
        config = build.selected(max_model_len=max_model_len)
        assert config.model_config.max_model_len == max_model_len
        assert backend_of(config) == "LMINF"

    @pytest.mark.usefixtures("selected_by_variable")
    def test_any_length_is_accepted_with_the_variable(self, build: Build) -> None:
        config = build.from_command_line("--max-model-len", str(MILLION))
        assert config.model_config.max_model_len == MILLION
        assert backend_of(config) == "LMINF"

    def test_length_is_the_trained_one_by_default(self, build: Build) -> None:
        assert build.selected().model_config.max_model_len == 8192

    @pytest.mark.parametrize("before", [None, "0", "1"])
    def test_permission_is_not_left_in_the_environment(
        self, before: str | None, build: Build, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """vLLM has a variable that lifts its check. It is lifted for this configuration alone,
        also where building it fails."""
        if before is not None:
            monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", before)
        build.selected(max_model_len=MILLION)
        assert os.environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN") == before
        with pytest.raises(ValueError, match="dtype"):
            build.selected(max_model_len=MILLION, dtype="no such type")
        assert os.environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN") == before

    def test_the_next_engine_without_it_is_refused(self, build: Build) -> None:
        build.selected(max_model_len=MILLION)
        with pytest.raises(ValueError, match="max_model_len"):
            build(max_model_len=MILLION)

    def test_pattern_follows_the_trained_length(self, build: Build) -> None:
        """Not max_model_len, which may be more or less."""
        for max_model_len in (None, 4096, MILLION):
            config = build.selected(max_model_len=max_model_len)
            assert LambdaConfig.of(config).pattern == LambdaPattern(10, 8192, 8192)

    def test_trained_length_is_that_of_the_checkpoint(self, build: Build) -> None:
        config = build.selected(hf_overrides={"max_position_embeddings": 4096})
        assert versions.trained_lengths(config.model_config)[0] == 4096
        assert LambdaConfig.of(config).pattern == LambdaPattern(10, 4096, 4096)

    def test_pattern_from_settings(self, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("VLLM_LMINF_N_GLOBAL", "4")
        config = build.selected(additional_config={"lminf": {"n_local": 512}})
        assert LambdaConfig.of(config).pattern == LambdaPattern(4, 512, 512)

    def test_settings_from_the_command_line(self, build: Build) -> None:
        config = build.from_command_line(
            "--attention-backend=LMINF",
            '--additional-config={"lminf": {"n_local": 512, "distance_limit": 600}}',
        )
        assert LambdaConfig.of(config).pattern == LambdaPattern(10, 512, 600)

    def test_cpu_platform_chooses_it(self) -> None:
        config = AttentionSelectorConfig(64, torch.bfloat16, "auto", 16)
        path = CpuPlatform.get_attn_backend_cls(patches.backend_member(), config, 9)
        assert path == "vllm_lminf.plugin.backend.LambdaAttentionBackend"

    def test_cpu_platform_refuses_what_the_backend_does_not_do(self) -> None:
        config = AttentionSelectorConfig(64, torch.bfloat16, "fp8", 16, use_mla=True, has_sink=True)
        with pytest.raises(ValueError, match="LMINF") as refusal:
            CpuPlatform.get_attn_backend_cls(patches.backend_member(), config, 9)
        for reason in ("kv_cache_dtype", "MLA", "sink"):
            assert reason in str(refusal.value)


class TestCompileCache:
    """What vLLM keys its compiled models by, in processes that know no variable of LMINF's."""

    def key(self, build: Build, **settings: int) -> str:
        return str(build.selected(additional_config={"lminf": settings}).compute_hash())

    def test_every_setting(self, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
        """However it was set, and also where it is the model that decides."""
        by_default = self.key(build)
        assert by_default == self.key(build, n_local=8192, distance_limit=8192, n_global=10)
        for name, value in (("n_local", 4096), ("distance_limit", 9000), ("n_global", 3)):
            by_argument = self.key(build, **{name: value})
            assert by_argument != by_default
            monkeypatch.setenv(VARIABLE_PREFIX + name.upper(), str(value))
            assert self.key(build) == by_argument
            monkeypatch.delenv(VARIABLE_PREFIX + name.upper())
        monkeypatch.setenv(VARIABLE_PREFIX + "KERNEL", "reference")
        assert self.key(build) != by_default

    def test_what_is_recorded_stays(self, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
        """Other entries are kept, the user's own object is left alone, and a process that is told
        otherwise by its environment goes by what was recorded."""
        mine = {"other": 1, "lminf": {"n_global": 4}}
        config = build.selected(additional_config=mine)
        assert config.additional_config["other"] == 1
        assert mine == {"other": 1, "lminf": {"n_global": 4}}
        monkeypatch.setenv(VARIABLE_PREFIX + "N_LOCAL", "77")
        assert LambdaConfig.of(config).pattern == LambdaPattern(4, 8192, 8192)

    def test_a_plain_dictionary(self, build: Build) -> None:
        """Which vLLM can print, hash and send to any process; there it is read, and no variable."""
        config = build.selected(additional_config={"lminf": {"n_global": 4}})
        section = config.additional_config["lminf"]
        assert json.loads(json.dumps(section)) == section
        sent = pickle.loads(pickle.dumps(config))
        assert LambdaConfig.of(sent) == LambdaConfig.of(config)
        assert LambdaConfig.of(config).trained.length == 8192

    def test_completing_it_again_changes_nothing(
        self, build: Build, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(VARIABLE_PREFIX + "N_GLOBAL", "4")
        config = build.selected(additional_config={"lminf": {"distance_limit": 9000}})
        before = config.additional_config
        again = copy.deepcopy(config)
        check(again)
        assert again.additional_config == before
        handed_on = build.selected(additional_config=before)
        assert handed_on.additional_config == before

    @pytest.mark.parametrize(("name", "other"), [("N_LOCAL", 77), ("N_GLOBAL", 5)])
    def test_completed_again_no_variable_is_read(
        self, name: str, other: int, build: Build, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One that lost against the user's own word, which is what would come by itself."""
        own = {"n_global": DEFAULT_N_GLOBAL, "n_local": 8192}
        monkeypatch.setenv(VARIABLE_PREFIX + name, str(other))
        config = build.selected(additional_config={"lminf": own})
        again = copy.deepcopy(config)
        check(again)
        assert LambdaConfig.of(again) == LambdaConfig.of(config)
        assert LambdaConfig.of(again).pattern == LambdaPattern(DEFAULT_N_GLOBAL, 8192, 8192)

    def test_what_followed_from_one_model_is_not_asked_of_another(
        self, build: Build, tmp_path: Path
    ) -> None:
        first = build.selected(additional_config={"lminf": {"n_global": 4}})
        second = build.selected(
            additional_config=first.additional_config,
            hf_overrides={"max_position_embeddings": 4096},
        )
        assert LambdaConfig.of(second).pattern == LambdaPattern(4, 4096, 4096)
        assert LambdaConfig.of(first).pattern == LambdaPattern(4, 8192, 8192)

    def test_engines_of_one_process_have_their_own(self, build: Build) -> None:
        configs = [
            build.selected(additional_config={"lminf": {"n_local": n, "kernel": kernel}})
            for n, kernel in ((512, "cpu"), (256, "reference"))
        ]
        found = [LambdaConfig.of(config) for config in configs]
        assert [(each.n_local, each.kernel) for each in found] == [(512, "cpu"), (256, "reference")]

    @pytest.mark.parametrize("given", [{}, {"lminf": {}}, {"lminf": {"n_local": 512}}], ids=str)
    def test_one_that_was_not_completed(self, given: dict[str, Any], build: Build) -> None:
        config = copy.copy(build.selected())
        config.additional_config = given
        with pytest.raises(RuntimeError, match=r"aren't resolved .*create_engine_config"):
            LambdaConfig.of(config)

    def test_what_can_hold_no_entry(self, build: Build) -> None:
        """vLLM takes any object that has a hash of its own."""
        config = copy.copy(build.selected())
        config.additional_config = SimpleNamespace(compute_hash=lambda: "")
        with pytest.raises(SettingsError, match="must be an object, as in"):
            check(config)

    def test_not_selected(self, build: Build) -> None:
        assert build(additional_config={"other": 1}).additional_config == {"other": 1}


class TestBadSettings:
    """Refused before anything of the model is looked at, every problem in one message."""

    def test_section(self, build: Build) -> None:
        section = {"n_global": -1, "n_local": "x", "distance_limit": True, "windows": 3}
        with pytest.raises(SettingsError) as refusal:
            build.selected(additional_config={"lminf": section})
        assert len(refusal.value.problems) == 4
        for name in section:
            assert f'"{name}"' in str(refusal.value)

    @pytest.mark.usefixtures("selected_by_variable")
    def test_variables(self, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
        values = {"N_GLOBAL": "-1", "N_LOCAL": "x", "DISTANCE_LIMIT": "0", "WINDOWS": "3"}
        for name, value in values.items():
            monkeypatch.setenv(VARIABLE_PREFIX + name, value)
        with pytest.raises(SettingsError) as refusal:
            build()
        assert len(refusal.value.problems) == 4
        for name in values:
            assert f"{VARIABLE_PREFIX}{name} is " in str(refusal.value)

    def test_both(self, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("VLLM_LMINF_N_LOCAL", "100")
        with pytest.raises(SettingsError) as refusal:
            build.selected(additional_config={"lminf": {"n_global": 1.5, "distance_limit": 99}})
        assert len(refusal.value.problems) == 2
        assert '"n_global" in lminf is 1.5' in str(refusal.value)
        assert "distance_limit is 99, below n_local, which is 100" in str(refusal.value)

    def test_no_section_but_something_else(self, build: Build) -> None:
        with pytest.raises(SettingsError, match="must be an object"):
            build.selected(additional_config={"lminf": 4096})

    def test_out_of_place(self, build: Build) -> None:
        with pytest.raises(SettingsError) as refusal:
            build.selected(
                additional_config={"LMINF": {}, "n_local": 3},
                hf_overrides={"lminf": {"n_global": 10**19}},
            )
        assert len(refusal.value.problems) == 3
        assert '"lminf" in --hf-overrides is not read' in str(refusal.value)

    def test_limit_below_the_trained_length(self, build: Build) -> None:
        """Known once the model is: its 8192 tokens are the window."""
        with pytest.raises(SettingsError, match="below n_local, which is 8192"):
            build.selected(additional_config={"lminf": {"distance_limit": 100}})

    def test_they_come_with_the_first_process(self, model_path: str) -> None:
        """A model that isn't there is not looked for."""
        arguments = EngineArgs(
            model=model_path, attention_backend="LMINF", additional_config={"lminf": {"n": 1}}
        )
        arguments.model = "/no/such/model"
        with pytest.raises(SettingsError):
            arguments.create_engine_config()


NGRAM_GPU = {"method": "ngram_gpu", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
MROPE = {"rope_type": "default", "rope_theta": 1e5, "mrope_section": [8, 12, 12]}


class TestUnserved:
    """Refused by name."""

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            ({"kv_cache_dtype": "int8_per_token_head"}, "--kv-cache-dtype int8_per_token_head"),
            ({"speculative_config": NGRAM_GPU}, "method 'ngram_gpu'"),
            (
                {
                    "kv_transfer_config": KVTransferConfig(
                        kv_connector="ExampleConnector", kv_role="kv_both"
                    )
                },
                "KV connector",
            ),
            (
                {"tensor_parallel_size": 9, "decode_context_parallel_size": 3},
                "context parallelism",
            ),
            ({"runner": "pooling"}, "runner 'pooling'"),
            ({"max_model_len": 2**31}, "max_model_len 2147483648"),
            ({"hf_overrides": {"rope_parameters": MROPE}}, "M-RoPE"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_feature(self, arguments: dict[str, Any], named: str, build: Build) -> None:
        assert build(**{**arguments, "max_model_len": None})
        with pytest.raises(UnsupportedError) as refusal:
            build.selected(**arguments)
        (reason,) = refusal.value.reasons
        assert named in reason
        assert named in str(refusal.value)

    @pytest.mark.parametrize("kv_cache_dtype", ["fp8", "fp8_e4m3", "fp8_e5m2"])
    def test_a_cache_of_8_bits_on_a_cpu(self, kv_cache_dtype: str, build: Build) -> None:
        """One reason for each kernel that an automatic choice has here."""
        with pytest.raises(UnsupportedError) as refusal:
            build.selected(kv_cache_dtype=kv_cache_dtype)
        cpu, reference = refusal.value.reasons
        for kernel, reason in (("cpu", cpu), ("reference", reference)):
            assert reason.startswith(f"kernel '{kernel}' with --kv-cache-dtype {kv_cache_dtype}: ")

    def test_every_reason_at_once(self, build: Build) -> None:
        with pytest.raises(UnsupportedError) as refusal:
            build.selected(kv_cache_dtype="fp8", speculative_config=NGRAM_GPU, max_model_len=2**31)
        assert len(refusal.value.reasons) == 4
        for named in ("--kv-cache-dtype fp8", "speculative", "max_model_len"):
            assert named in str(refusal.value)

    def test_a_bad_setting_beside_an_unserved_feature(self, build: Build) -> None:
        with pytest.raises(ValueError, match="LMINF") as refusal:
            build.selected(
                kv_cache_dtype="fp8", additional_config={"lminf": {"distance_limit": 100}}
            )
        for named in ("--kv-cache-dtype fp8", "distance_limit is 100, below n_local"):
            assert named in str(refusal.value)

    def test_message_says_how_to_go_on(self, build: Build) -> None:
        with pytest.raises(UnsupportedError) as refusal:
            build.selected(kv_cache_dtype="fp8")
        assert str(refusal.value).startswith("LMINF")
        assert BACKEND_VARIABLE in str(refusal.value)
        assert "--attention-backend" in str(refusal.value)

    @pytest.mark.parametrize("kv_cache_dtype", ["auto", "bfloat16", "float16"])
    def test_caches_that_are_served(self, kv_cache_dtype: str, build: Build) -> None:
        assert backend_of(build.selected(kv_cache_dtype=kv_cache_dtype)) == "LMINF"

    @pytest.mark.parametrize(
        ("configuration", "architecture", "named"),
        [
            (
                transformers.DeepseekV2Config(num_hidden_layers=2),
                "DeepseekV2ForCausalLM",
                "multi-head latent attention",
            ),
            (transformers.MambaConfig(num_hidden_layers=2), "MambaForCausalLM", "state-space"),
            (transformers.JambaConfig(), "JambaForCausalLM", "state-space"),
            (
                transformers.WhisperConfig(),
                "WhisperForConditionalGeneration",
                "encoder-decoder",
            ),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_model(
        self,
        configuration: transformers.PretrainedConfig,
        architecture: str,
        named: str,
        build: Build,
        tmp_path: Path,
    ) -> None:
        """A configuration and a tokenizer are all that is read of a model here."""
        configuration.architectures = [architecture]
        configuration.save_pretrained(tmp_path)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(Path(build.model) / name, tmp_path)
        other = Build(str(tmp_path))
        with pytest.raises(UnsupportedError) as refusal:
            other.selected()
        assert any(named in reason for reason in refusal.value.reasons)

    def test_nothing_is_wrong_with_the_example_model(self, build: Build) -> None:
        check(build.selected(max_model_len=MILLION))


NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}


class TestMiddle:
    """What is recalled: what it doesn't go with is refused, and what it needs is there."""

    def recalling(self, build: Build, section: dict[str, Any], **arguments: Any) -> VllmConfig:
        section = {"middle_top_k": 5, "kernel": "reference"} | section
        return build.selected(additional_config={"lminf": section}, **arguments)

    @pytest.mark.parametrize(
        ("section", "arguments", "named"),
        [
            ({"middle_from_layer": 31}, {}, "middle_from_layer 31: the model has 30 layers"),
            (
                {},
                {"hf_overrides": {"sliding_window": 512}},
                "every layer has a sliding window of its own",
            ),
            ({}, {"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8: the archive keeps no"),
            (
                {},
                {"disable_hybrid_kv_cache_manager": True},
                "--disable-hybrid-kv-cache-manager: the archive's blocks",
            ),
            ({"kernel": "xformers"}, {}, "kernel 'xformers': it recalls nothing from the middle"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_refused(
        self, section: dict[str, Any], arguments: dict[str, Any], named: str, build: Build
    ) -> None:
        with pytest.raises(UnsupportedError) as refusal:
            self.recalling(build, section, **arguments)
        assert any(named in reason for reason in refusal.value.reasons)

    def test_a_draft_model(self, build: Build) -> None:
        drafter = {"method": "draft_model", "model": build.model, "num_speculative_tokens": 2}
        with pytest.raises(UnsupportedError, match="method 'draft_model': a drafter with a KV"):
            self.recalling(build, {}, speculative_config=drafter)

    @pytest.mark.parametrize("kernel", ["auto", "reference"])
    @pytest.mark.parametrize("arguments", [{}, {"speculative_config": NGRAM}], ids=str)
    def test_served(self, kernel: str, arguments: dict[str, Any], build: Build) -> None:
        config = self.recalling(build, {"kernel": kernel}, **arguments)
        assert LambdaConfig.of(config).middle == Middle(5, 4096, rows=64, from_layer=5)

    def test_alibi(self, build: Build, tmp_path: Path) -> None:
        configuration = transformers.BloomConfig(n_layer=6)
        configuration.architectures = ["BloomForCausalLM"]
        configuration.save_pretrained(tmp_path)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(Path(build.model) / name, tmp_path)
        settings = {"n_local": 64, "middle_distance": 32}
        with pytest.raises(UnsupportedError, match="and ALiBi: at which distance"):
            self.recalling(Build(str(tmp_path)), settings)

    def test_settings_without_effect(self, build: Build, said: list[str]) -> None:
        """Told by name, once."""
        section = {"middle_rows": 1, "middle_from_layer": 100}
        config = build.selected(additional_config={"lminf": section})
        (sentence,) = said
        assert sentence.startswith("middle_rows, middle_from_layer: set, and without effect")
        assert LambdaConfig.of(config).middle is None
        check(copy.deepcopy(config))
        build.selected(additional_config={"lminf": {**section, "middle_top_k": 0}})
        assert len(said) == 1


class TestOtherProcesses:
    """vLLM pickles its configuration and unpickles it in a process that hasn't loaded plugins."""

    CHILD = """
import pickle, sys
from vllm.v1.attention.backends.registry import AttentionBackendEnum
assert "LMINF" not in AttentionBackendEnum.__members__
assert "vllm_lminf" not in sys.modules
for path in sys.argv[1:]:
    with open(path, "rb") as file:
        config = pickle.load(file)
    backend = config.attention_config.backend
    assert backend is AttentionBackendEnum["LMINF"], path
    print(backend.get_path(), config.model_config.max_model_len)
"""

    def test_configuration_survives(self, build: Build, tmp_path: Path) -> None:
        config = build.selected(max_model_len=MILLION)
        written = {
            "pickle": pickle.dumps(config),
            "multiprocessing": bytes(ForkingPickler.dumps(config)),
            "cloudpickle": cloudpickle.dumps(config),
        }
        for name, data in written.items():
            (tmp_path / name).write_bytes(data)
        result = subprocess.run(
            [sys.executable, "-c", self.CHILD, *(str(tmp_path / name) for name in written)],
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        expected = f"vllm_lminf.plugin.backend.LambdaAttentionBackend {MILLION}"
        assert result.stdout.splitlines()[-3:] == [expected] * 3

    def test_backends_of_vllm_are_pickled_as_ever(self) -> None:
        for member in AttentionBackendEnum:
            with_plugin = pickle.dumps(member)
            assert pickle.loads(with_plugin) is member
