"""The settings: where they come from, and what is refused, all of it at once."""

import json

import pytest

from vllm_lminf.errors import SettingsError
from vllm_lminf.middle import ALL_ROWS, Middle
from vllm_lminf.pattern import LambdaPattern
from vllm_lminf.plugin.config import (
    BACKEND_NAME,
    BACKEND_VARIABLE,
    DEFAULT_N_GLOBAL,
    LambdaConfig,
    Settings,
    Trained,
    given_settings,
    is_backend_name,
    question_of_variables,
)


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
        assert read(VLLM_LOGGING_LEVEL="DEBUG", LMINF_HOME="/opt", HOME="/") == Settings()

    @pytest.mark.parametrize("additional_config", [None, {}, {"other": {"n_local": 3}}, object()])
    def test_no_section(self, additional_config: object) -> None:
        assert Settings.read(additional_config, {}) == Settings()

    @pytest.mark.parametrize("value", ["4096 ", " 4096", "\t4096\n"])
    def test_blanks_around_a_value(self, value: str) -> None:
        assert read(VLLM_LMINF_N_LOCAL=value).n_local == 4096
        assert read(VLLM_LMINF_KERNEL=" cpu ").kernel == "cpu"

    def test_addresses_of_services(self) -> None:
        """Kubernetes sets them in every container of a cluster with services of these names."""
        names = ["SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT", "PORT_8000_TCP"]
        names += ["PORT_8000_TCP_ADDR", "PORT_8000_TCP_PROTO", "SMOLLM2_SERVICE_HOST"]
        services = {
            f"{prefix}_{name}": "tcp://10.0.0.1:8000"
            for name in names
            for prefix in ("VLLM_LMINF", "LMINF")
        }
        assert read(**services) == Settings()
        assert given_settings({}, services) == []


class TestOutOfPlace:
    """What nothing would read is refused, with the place where it belongs."""

    @pytest.mark.parametrize(
        ("additional_config", "named"),
        [
            ({"LMINF": {"n_local": 4096}}, '"LMINF" in --additional-config'),
            ({"lm_inf": {"n_local": 4096}}, '"lm_inf" in'),
            ({"vllm-lminf": {}}, '"vllm-lminf" in'),
            ({"n_local": 4096}, '"n_local" in --additional-config'),
            ({"N_GLOBAL": 4}, '"n_global" belongs in "lminf"'),
            ({"distance-limit": 4}, '"distance_limit" belongs in "lminf"'),
            ({"kernel": "cpu"}, '"kernel" belongs in "lminf"'),
            ({"other": {"lminf": {}}}, '"lminf" in "other" in --additional-config'),
            ({"lminf": {}, "nlocal": 4096}, '"n_local" belongs in "lminf"'),
            ({"lminf": {"lminf": {"n_local": 1}}}, '"lminf" in lminf is not a setting'),
            ({"lminf": {"N_LOCAL": 4096}}, '"N_LOCAL" in lminf is not a setting (is "n_local"'),
            ({"lminf": {"n-global": 1}}, 'is "n_global" meant?'),
            ({"lminf": {"middle_row": 1}}, 'is "middle_rows" meant?'),
            ({"middle_top_k": 5}, '"middle_top_k" belongs in "lminf"'),
            ('{"lminf": {"n_local": 4096}}', 'additional_config is \'{"lminf"'),
            ([{"lminf": {}}], "it must be an object"),
            ({"lminf": '{"n_local": 4096}'}, "it must be an object of settings"),
        ],
        ids=str,
    )
    def test_additional_config(self, additional_config: object, named: str) -> None:
        with pytest.raises(SettingsError) as refusal:
            Settings.read(additional_config, {})
        (problem,) = refusal.value.problems
        assert named in problem

    def test_other_options(self) -> None:
        elsewhere = {"--hf-overrides": {"lminf": {"n_local": 1}}, "--model-loader": {"n_global": 1}}
        with pytest.raises(SettingsError) as refusal:
            Settings.read({}, {}, elsewhere)
        assert len(refusal.value.problems) == 2
        assert '"lminf" in --hf-overrides is not read' in refusal.value.problems[0]

    def test_what_others_read(self) -> None:
        """Below the top, names are those of somebody else; so are other kernels."""
        others = {"ascend": {"n_local": 3, "kernel": "cpu"}, "kernel": "theirs", 3: None}
        assert Settings.read(others, {}, {"--hf-overrides": lambda config: config}) == Settings()

    @pytest.mark.parametrize(
        ("variable", "meant"),
        [
            ("VLLM_LMINF_NLOCAL", "VLLM_LMINF_N_LOCAL"),
            ("VLLM_LM_INF_N_LOCAL", "VLLM_LMINF_N_LOCAL"),
            ("LMINF_N_LOCAL", "VLLM_LMINF_N_LOCAL"),
            ("vllm_lminf_n_local", "VLLM_LMINF_N_LOCAL"),
            ("VLLM_LMINFN_GLOBAL", "VLLM_LMINF_N_GLOBAL"),
            ("VLLM_N_GLOBAL", "VLLM_LMINF_N_GLOBAL"),
            ("VLLM_LMINF_DISTANCE", "VLLM_LMINF_DISTANCE_LIMIT"),
            ("VLLM_LMINF_KERNELS", "VLLM_LMINF_KERNEL"),
            ("VLLM_LMINF_MIDDLE_TOPK", "VLLM_LMINF_MIDDLE_TOP_K"),
            ("VLLM_MIDDLE_TOP_K", "VLLM_LMINF_MIDDLE_TOP_K"),
            ("LMINF_ARCHIVE_GB", "VLLM_LMINF_ARCHIVE_GIB"),
        ],
    )
    def test_variables(self, variable: str, meant: str) -> None:
        with pytest.raises(SettingsError) as refusal:
            read(**{variable: "4096"})
        (problem,) = refusal.value.problems
        assert problem.startswith(f"{variable} is not ")
        assert f"(is {meant} meant?)" in problem


class TestBackendName:
    @pytest.mark.parametrize(
        "name", ["LMINF", "lminf", "LM_INF", "lm-inf", "LMINF ", " Lm Inf", "l_m_i_n_f"]
    )
    def test_spellings(self, name: str) -> None:
        assert is_backend_name(name)
        assert question_of_variables({BACKEND_VARIABLE: name}) is None

    @pytest.mark.parametrize(
        "name",
        ["LMNIF", "LMIN", "LIMINF", "MINF", "LMINFF", "LM-Infinite", "LMInfinity", "vllm_lminf",
         '"LMINF"', "LM.INF", "LM\N{EN DASH}INF"],
    )  # fmt: skip
    def test_near_misses(self, name: str) -> None:
        assert not is_backend_name(name)
        question = question_of_variables({BACKEND_VARIABLE: name})
        assert question is not None
        assert question.startswith(BACKEND_VARIABLE)
        assert "was LMINF meant?" in question
        assert question_of_variables({BACKEND_VARIABLE: name}, {name.upper()}) is None

    @pytest.mark.parametrize(
        "name",
        ["", "auto", "FLASH_ATTN", "FLASHINFER", "FLASHINFER_MLA", "XFORMERS", "TORCH_SDPA",
         "CUSTOM", "TRITON_MLA", "PALLAS", "IPEX", "LINEAR", "CPU_ATTN", "FLEX_ATTENTION"],
    )  # fmt: skip
    def test_names_of_others(self, name: str) -> None:
        """Of vLLM's, of today and of before."""
        assert not is_backend_name(name)
        assert question_of_variables({BACKEND_VARIABLE: name}) is None

    @pytest.mark.parametrize(
        "variable", ["VLLM_ATTN_BACKEND", "vllm_attention_backend", "ATTENTION_BACKEND"]
    )
    def test_variables_that_nothing_reads(self, variable: str) -> None:
        question = question_of_variables({variable: "LMINF"})
        assert question is not None
        assert f"{variable} is 'LMINF' and isn't read: was {BACKEND_VARIABLE} meant?" in question

    def test_other_variables_that_name_it(self) -> None:
        assert question_of_variables({"VLLM_PLUGINS": "lminf", "JOB": "lminf"}) is None


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

    @pytest.mark.parametrize("name", ["n_global", "n_local", "distance_limit"])
    @pytest.mark.parametrize("value", [2**31, 10**19, 2**64, 10**5000], ids=["31", "19", "64", "5"])
    def test_values_beyond_the_largest_position(self, name: str, value: int) -> None:
        for given in ({name: value}, {"kernel": "cpu", name: value}):
            with pytest.raises(SettingsError) as refusal:
                read(given)
            (problem,) = refusal.value.problems
            assert f'"{name}" in lminf is ' in problem
            assert "to 2147483647" in problem

    @pytest.mark.parametrize("digits", ["2147483648", "9" * 20, "9" * 5000])
    def test_variables_beyond_the_largest_position(self, digits: str) -> None:
        """Python reads no integer of more than 4300 digits; a message doesn't show them all."""
        with pytest.raises(SettingsError) as refusal:
            read(VLLM_LMINF_N_GLOBAL=digits, VLLM_LMINF_N_LOCAL="0")
        assert len(refusal.value.problems) == 2
        assert len(str(refusal.value)) < 2000

    def test_largest_values(self) -> None:
        most = 2**31 - 1
        section = {"n_global": most, "n_local": most, "distance_limit": most}
        assert read(section).pattern(None) == LambdaPattern(most, most, most)

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


RECALLING = {
    "middle_top_k": 5,
    "middle_rows": "all",
    "middle_index": 8,
    "middle_from_layer": 3,
    "middle_distance": 100,
    "middle_unit": 64,
    "archive_gib": 0.5,
}


class TestMiddle:
    """What is recalled, if anything is."""

    TRAINED = Trained(8192, 8192)

    def test_off_by_default(self) -> None:
        resolved = LambdaConfig.resolve(read(), self.TRAINED)
        assert resolved.middle is None
        assert resolved.middle_distance == 4096

    def test_defaults(self) -> None:
        settings = read({"middle_top_k": 5})
        assert settings.archive_gib == 4
        resolved = LambdaConfig.resolve(settings, self.TRAINED)
        assert resolved.middle == Middle(5, distance=4096, rows=64, from_layer=5, block_size=1)
        assert resolved.middle_index == 8

    def test_sources(self) -> None:
        variables = {f"VLLM_LMINF_{name.upper()}": str(value) for name, value in RECALLING.items()}
        assert read(**variables) == read(RECALLING)
        resolved = LambdaConfig.resolve(read(RECALLING), self.TRAINED)
        assert resolved.middle == Middle(5, 100, ALL_ROWS, from_layer=3, block_size=64)
        assert resolved.archive_gib == 0.5

    @pytest.mark.parametrize(("text", "number"), [("2", 2), ("0.25", 0.25), ("1e3", 1000.0)])
    def test_size_of_the_archive_as_a_variable(self, text: str, number: float) -> None:
        assert read(VLLM_LMINF_ARCHIVE_GIB=text).archive_gib == number

    def test_round_trip(self) -> None:
        """As plain JSON; and completed again, for the same model or for another one."""
        for section in (RECALLING, {"middle_top_k": 5}, {"middle_rows": 7}, {}):
            resolved = LambdaConfig.resolve(read(section), self.TRAINED)
            added = resolved.added_to({})
            assert json.loads(json.dumps(added)) == added
            again = Settings.read(added, {"VLLM_LMINF_MIDDLE_ROWS": "9"})
            assert LambdaConfig.resolve(again, self.TRAINED) == resolved
            assert again.idle == ()
        followed = Settings.read(LambdaConfig.resolve(read(), self.TRAINED).added_to({}), {})
        assert LambdaConfig.resolve(followed, Trained(100, 100)).middle_distance == 50

    def test_distance_without_a_trained_length(self) -> None:
        unknown = Trained(None, None)
        settings = read({"n_local": 64, "middle_top_k": 5})
        with pytest.raises(SettingsError, match="set middle_distance"):
            LambdaConfig.resolve(settings, unknown)
        with pytest.raises(SettingsError) as refusal:
            LambdaConfig.resolve(read({"middle_top_k": 5}), unknown)
        assert len(refusal.value.problems) == 2
        assert LambdaConfig.resolve(read({"n_local": 64}), unknown).middle is None
        at_zero = read({"n_local": 64, "middle_top_k": 5, "middle_distance": 0})
        resolved = LambdaConfig.resolve(at_zero, unknown)
        assert resolved.middle is not None
        assert resolved.middle.distance == 0
        again = Settings.read(resolved.added_to({}), {})
        assert LambdaConfig.resolve(again, unknown) == resolved

    def test_settings_without_effect_are_named(self) -> None:
        assert read(RECALLING).idle == ()
        assert read({}).idle == ()
        given = read({"middle_unit": 32}, VLLM_LMINF_ARCHIVE_GIB="1")
        assert given.idle == ("middle_unit", "archive_gib")
        assert read({**RECALLING, "middle_top_k": 0}).idle == ()

    @pytest.mark.parametrize(
        ("name", "values"),
        [
            ("middle_top_k", [-1, 1025, 2**31, 1.0, True, "5", None]),
            ("middle_rows", [0, -1, 2**31, 1.0, True, "ALL", "token", None]),
            ("middle_index", [0, 7, 16, 8.0, "8", None, [8]]),
            ("middle_from_layer", [0, 2**31, 5.0, True, None]),
            ("middle_distance", [-1, 2**31, 10**5000, 4096.0, "half", None]),
            ("middle_unit", [0, 1, 8, 24, 1040, 16.0, True, "block", "all", None]),
            ("archive_gib", [0, -1, 0.0, float("nan"), float("inf"), 2**20 + 1, 10**5000, True,
                             "4", None]),
        ],
    )  # fmt: skip
    def test_refusals(self, name: str, values: list[object]) -> None:
        for value in values:
            with pytest.raises(SettingsError) as refusal:
                read({name: value})
            (problem,) = refusal.value.problems
            assert problem.startswith(f'"{name}" in lminf is ')
            assert ": it must be " in problem

    @pytest.mark.parametrize("text", ["nan", "inf", "0", "-1", "many", "", "9" * 5000])
    def test_refused_sizes_of_the_archive(self, text: str) -> None:
        with pytest.raises(SettingsError, match=r"VLLM_LMINF_ARCHIVE_GIB is .*a number of GiB"):
            read(VLLM_LMINF_ARCHIVE_GIB=text)

    @pytest.mark.parametrize(
        "section",
        [
            {"middle_top_k": 1024, "middle_unit": 1024},
            {"middle_rows": 2**31 - 1, "middle_unit": 16},
            {"middle_unit": "token", "archive_gib": 2**20},
        ],
        ids=str,
    )
    def test_largest_values(self, section: dict[str, object]) -> None:
        resolved = LambdaConfig.resolve(read({"middle_top_k": 1} | section), self.TRAINED)
        assert all(getattr(resolved, name) == value for name, value in section.items())
        assert resolved.middle is not None
