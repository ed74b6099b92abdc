"""The settings: where they come from, and what is refused, all of it at once."""

import pytest

from vllm_lminf.config import BACKEND_NAME, DEFAULT_N_GLOBAL, Settings, SettingsError
from vllm_lminf.pattern import LambdaPattern


def read(section: object = None, **environ: str) -> Settings:
    """Settings from a section "lminf" and from variables."""
    return Settings.read({} if section is None else {"lminf": section}, environ)


class TestSources:
    def test_nothing_set(self) -> None:
        assert read() == Settings(n_global=DEFAULT_N_GLOBAL, n_local=None, distance_limit=None)

    def test_default_prefix_is_the_papers(self) -> None:
        assert 10 <= DEFAULT_N_GLOBAL <= 100

    def test_section(self) -> None:
        section = {"n_global": 4, "n_local": 100, "distance_limit": 120}
        assert read(section) == Settings(4, 100, 120)

    def test_variables(self) -> None:
        settings = read(
            VLLM_LMINF_N_GLOBAL="4", VLLM_LMINF_N_LOCAL="100", VLLM_LMINF_DISTANCE_LIMIT="120"
        )
        assert settings == Settings(4, 100, 120)

    def test_section_comes_before_variables_one_by_one(self) -> None:
        settings = read({"n_local": 200}, VLLM_LMINF_N_LOCAL="100", VLLM_LMINF_DISTANCE_LIMIT="300")
        assert settings == Settings(DEFAULT_N_GLOBAL, 200, 300)

    def test_kernel(self) -> None:
        assert read().kernel == "auto"
        assert read({"kernel": "reference"}).kernel == "reference"
        assert read(VLLM_LMINF_KERNEL="cpu").kernel == "cpu"

    def test_zero_is_a_value(self) -> None:
        assert read({"n_global": 0}, VLLM_LMINF_N_GLOBAL="4").n_global == 0
        assert read(VLLM_LMINF_N_GLOBAL="0").n_global == 0

    def test_variables_of_others_are_ignored(self) -> None:
        assert read(VLLM_LOGGING_LEVEL="DEBUG", LMINF_N_LOCAL="3", HOME="/") == Settings()

    @pytest.mark.parametrize("additional_config", [None, {}, {"other": {"n_local": 3}}, object()])
    def test_no_section(self, additional_config: object) -> None:
        assert Settings.read(additional_config, {}) == Settings()


class TestPattern:
    def test_from_the_trained_length(self) -> None:
        assert Settings().pattern(8192) == LambdaPattern(DEFAULT_N_GLOBAL, 8192, 8192)

    def test_set_window_comes_before_the_trained_length(self) -> None:
        assert Settings(4, 100).pattern(8192) == LambdaPattern(4, 100, 100)
        assert Settings(4, 10_000).pattern(8192) == LambdaPattern(4, 10_000, 10_000)

    def test_limit_of_its_own(self) -> None:
        assert Settings(4, 100, 120).pattern(8192) == LambdaPattern(4, 100, 120)

    def test_unknown_trained_length(self) -> None:
        assert Settings(4, 100).pattern(None) == LambdaPattern(4, 100, 100)
        with pytest.raises(SettingsError, match="set n_local"):
            Settings().pattern(None)

    def test_limit_below_the_trained_length(self) -> None:
        with pytest.raises(SettingsError, match=r"distance_limit is 100, below n_local.* 8192"):
            Settings(distance_limit=100).pattern(8192)


class TestRefusals:
    @pytest.mark.parametrize("name", ["n_global", "n_local", "distance_limit"])
    @pytest.mark.parametrize("value", [-1, 1.0, 2.5, "10", True, None, [10]], ids=repr)
    def test_values_in_the_section(self, name: str, value: object) -> None:
        with pytest.raises(SettingsError) as refusal:
            read({name: value})
        (problem,) = refusal.value.problems
        assert f'"{name}" in lminf is {value!r}' in problem
        assert "whole number" in problem

    @pytest.mark.parametrize("name", ["N_GLOBAL", "N_LOCAL", "DISTANCE_LIMIT"])
    @pytest.mark.parametrize("value", ["-1", "1.5", "many", "", "1e3"], ids=repr)
    def test_values_of_variables(self, name: str, value: str) -> None:
        with pytest.raises(SettingsError) as refusal:
            read(**{f"VLLM_LMINF_{name}": value})
        (problem,) = refusal.value.problems
        assert problem.startswith(f"VLLM_LMINF_{name} is ")
        assert value in problem

    @pytest.mark.parametrize("value", ["CPU", "cuda", "", None, 1, ["cpu"]], ids=repr)
    def test_kernels_that_there_are_not(self, value: object) -> None:
        with pytest.raises(SettingsError) as refusal:
            read({"kernel": value})
        (problem,) = refusal.value.problems
        assert f'"kernel" in lminf is {value!r}: it must be one of ' in problem
        assert problem.endswith("auto, triton, hybrid, xformers, flash, cpu, reference")

    @pytest.mark.parametrize("name", ["n_local", "distance_limit"])
    def test_zero_where_it_means_nothing(self, name: str) -> None:
        with pytest.raises(SettingsError, match=f'"{name}" in lminf is 0'):
            read({name: 0})

    def test_unknown_key(self) -> None:
        with pytest.raises(SettingsError, match=r'"window" in lminf.*n_global, n_local'):
            read({"window": 4096})

    def test_unknown_variable(self) -> None:
        with pytest.raises(SettingsError, match=r"VLLM_LMINF_WINDOW.*VLLM_LMINF_N_LOCAL"):
            read(VLLM_LMINF_WINDOW="4096")

    @pytest.mark.parametrize("section", [4096, "n_local=3", [1], None], ids=repr)
    def test_section_that_is_no_object(self, section: object) -> None:
        with pytest.raises(SettingsError, match="must be an object"):
            Settings.read({"lminf": section}, {})

    def test_limit_below_the_window(self) -> None:
        with pytest.raises(SettingsError, match=r"distance_limit is 50, below n_local.* 100"):
            read({"n_local": 100}, VLLM_LMINF_DISTANCE_LIMIT="50")

    def test_everything_wrong_in_one_message(self) -> None:
        with pytest.raises(SettingsError) as refusal:
            read(
                {"n_global": -1, "windows": 3},
                VLLM_LMINF_N_LOCAL="100",
                VLLM_LMINF_DISTANCE_LIMIT="50",
                VLLM_LMINF_SINKS="4",
            )
        message = str(refusal.value)
        assert len(refusal.value.problems) == 4
        assert all(problem in message for problem in refusal.value.problems)
        for named in ('"n_global" in lminf is -1', '"windows"', "VLLM_LMINF_SINKS"):
            assert named in message
        assert "distance_limit is 50" in message

    def test_message_says_what_is_allowed_and_where_to_set_it(self) -> None:
        with pytest.raises(SettingsError) as refusal:
            read({"n_global": -1})
        message = str(refusal.value)
        assert message.startswith(BACKEND_NAME)
        assert "--additional-config" in message
        for name in ("n_global", "n_local", "distance_limit"):
            assert f"{name}: a whole number" in message
            assert f"VLLM_LMINF_{name.upper()}" in message

    def test_is_a_value_error(self) -> None:
        """vLLM's command line prints these without a traceback of its own."""
        assert issubclass(SettingsError, ValueError)
