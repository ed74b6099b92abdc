"""The settings: where each comes from, what it defaults to, what is refused and why. No vLLM here.

A setting is taken from ``--additional-config '{"lminf": {...}}'`` first, then from its environment
variable, then from its default.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_lminf.pattern import LambdaPattern

BACKEND_NAME = "LMINF"
BACKEND_VARIABLE = "VLLM_ATTENTION_BACKEND"
SECTION = "lminf"
VARIABLE_PREFIX = "VLLM_LMINF_"

DEFAULT_N_GLOBAL = 10

KERNELS = ("auto", "triton", "hybrid", "xformers", "flash", "cpu", "reference")
"""For GPUs: ``triton``, ``xformers``, ``flash`` (FlashAttention, from the package that vLLM ships)
and ``hybrid`` (``flash`` for prefill and ``triton`` for decoding). ``cpu``: compiled, for CPUs.
``reference``: plain PyTorch, anywhere. ``auto``: the best that can run, see
`vllm_lminf.kernels.choice`."""

_NAMES = ("n_global", "n_local", "distance_limit", "kernel")
_ALLOWED = {
    "n_global": "a whole number of tokens, 0 or more",
    "n_local": "a whole number of tokens, 1 or more",
    "distance_limit": "a whole number of tokens, n_local or more",
    "kernel": "one of " + ", ".join(KERNELS),
}
_MINIMUM = {"n_global": 0, "n_local": 1, "distance_limit": 1}


class SettingsError(ValueError):
    """Settings that can't be honoured; the message lists every problem and what is allowed."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        lines = "\n".join(f"  - {problem}" for problem in problems)
        allowed = "\n".join(f"    {name}: {what}" for name, what in _ALLOWED.items())
        super().__init__(
            f"{BACKEND_NAME} can't start with these settings:\n{lines}\n"
            f'  Set them with --additional-config \'{{"{SECTION}": {{"n_global": 10, '
            f'"n_local": 4096}}}}\' or with {VARIABLE_PREFIX}N_GLOBAL, {VARIABLE_PREFIX}N_LOCAL, '
            f"{VARIABLE_PREFIX}DISTANCE_LIMIT, {VARIABLE_PREFIX}KERNEL:\n{allowed}"
        )


@dataclass(frozen=True)
class Settings:
    """What the user asked for; None where a default follows from the model."""

    n_global: int = DEFAULT_N_GLOBAL
    n_local: int | None = None
    distance_limit: int | None = None
    kernel: str = "auto"

    @classmethod
    def read(cls, additional_config: object, environ: Mapping[str, str]) -> "Settings":
        """Reads the settings, before anything is known of the model.

        Args:
            additional_config: vLLM's additional_config; its entry "lminf" is read.
            environ: the process's environment.

        Raises:
            SettingsError: a key or variable is unknown, or a value is not allowed.
        """
        problems: list[str] = []
        section = _section(additional_config, problems)
        values: dict[str, Any] = {}
        for name in _NAMES:
            variable = VARIABLE_PREFIX + name.upper()
            if name in section:
                value = _check(f'"{name}" in {SECTION}', name, section[name], problems)
            elif variable in environ:
                value = _check(variable, name, _parse(environ[variable]), problems)
            else:
                continue
            if value is not None:
                values[name] = value
        problems += [
            f'"{key}" in {SECTION} is not a setting; there are: {", ".join(_NAMES)}'
            for key in section
            if key not in _NAMES
        ]
        known = {VARIABLE_PREFIX + name.upper() for name in _NAMES}
        for variable in sorted(environ):
            if variable.startswith(VARIABLE_PREFIX) and variable not in known:
                names = ", ".join(sorted(known))
                problems.append(f"{variable} is not a variable of this plugin; there are: {names}")
        settings = cls(**values)
        if settings.n_local is not None:
            try:
                settings.pattern(trained_length=None)
            except SettingsError as error:
                problems += error.problems
        if problems:
            raise SettingsError(problems)
        return settings

    def pattern(self, trained_length: int | None) -> LambdaPattern:
        """The Λ for a model.

        Args:
            trained_length: tokens of context that the checkpoint was trained for; None if its
                configuration doesn't tell.

        Raises:
            SettingsError: the settings make no Λ with this model's trained length.
        """
        n_local = self.n_local if self.n_local is not None else trained_length
        if n_local is None:
            raise SettingsError(
                [
                    "n_local is not set, and the model's configuration names no trained length "
                    "that it could default to: set n_local"
                ]
            )
        limit = self.distance_limit if self.distance_limit is not None else n_local
        try:
            return LambdaPattern(self.n_global, n_local, limit)
        except ValueError as error:
            raise SettingsError([str(error)]) from error


def _section(additional_config: object, problems: list[str]) -> Mapping[str, Any]:
    if not isinstance(additional_config, Mapping):
        return {}
    section = additional_config.get(SECTION, {})
    if not isinstance(section, Mapping):
        problems.append(
            f'"{SECTION}" in additional_config is {section!r}: it must be an object of settings'
        )
        return {}
    return section


def _parse(text: str) -> int | str:
    """An environment variable's value; left as text where it is no whole number."""
    try:
        return int(text)
    except ValueError:
        return text


def _check(source: str, name: str, value: object, problems: list[str]) -> int | str | None:
    if name == "kernel":
        allowed = value in KERNELS
    else:
        allowed = type(value) is int and value >= _MINIMUM[name]
    if not allowed:
        problems.append(f"{source} is {value!r}: it must be {_ALLOWED[name]}")
        return None
    return value  # type: ignore[return-value]
