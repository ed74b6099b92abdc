"""The settings: where each comes from, what it defaults to, what is refused and why. No vLLM here.

A setting is taken from ``--additional-config '{"lminf": {...}}'`` first, then from its environment
variable, then from its default. What looks like a setting and stands where nothing reads it is
refused: the engine would run without it, and nobody would know.

They are read once, in the process where the user typed them (`vllm_lminf.plugin.checks`), and
resolved to a `LambdaConfig`. All else, in whatever process, reads that.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from difflib import SequenceMatcher, get_close_matches
from typing import Any, Self

from vllm_lminf.errors import SettingsError
from vllm_lminf.kernels import registry
from vllm_lminf.middle import ALL_ROWS, INDEX_BITS, Middle
from vllm_lminf.pattern import MAX_POSITION, LambdaPattern, shown

BACKEND_NAME = "LMINF"
BACKEND_VARIABLE = "VLLM_ATTENTION_BACKEND"
SECTION = "lminf"
VARIABLE_PREFIX = "VLLM_LMINF_"

DEFAULT_N_GLOBAL = 10

KERNELS = (registry.AUTOMATIC, *registry.NAMES)
"""For GPUs: ``triton``, ``xformers``, ``flash`` (FlashAttention, from the package that vLLM ships)
and ``hybrid`` (``flash`` for prefill and ``triton`` for decoding). ``cpu``: compiled, for CPUs.
``reference``: plain PyTorch, anywhere. ``auto``: the best that can run, see
`vllm_lminf.kernels.registry`."""

ALL = "all"
"""As middle_rows: every query looks into the middle."""

TOKEN = "token"
"""As middle_unit: what is recalled are single tokens."""

MAX_TOP_K = 1024
"""A query recalls so many units at the most: that is as much as a window of its own."""

MAX_UNIT = 1024
UNIT_MULTIPLE = 16

MAX_ARCHIVE_GIB = 2**20
"""A pebibyte, more than any machine has."""

_WHOLE = {
    "n_global": (0, MAX_POSITION),
    "n_local": (1, MAX_POSITION),
    "distance_limit": (1, MAX_POSITION),
    "middle_top_k": (0, MAX_TOP_K),
    "middle_rows": (1, MAX_POSITION),
    "middle_from_layer": (1, MAX_POSITION),
    "middle_distance": (0, MAX_POSITION),
    "middle_unit": (UNIT_MULTIPLE, MAX_UNIT),
}
"""The least and the largest value of the settings that are, or can be, whole numbers."""

ALLOWED = {
    "n_global": f"a whole number of tokens, 0 to {MAX_POSITION}",
    "n_local": f"a whole number of tokens, 1 to {MAX_POSITION}",
    "distance_limit": f"a whole number of tokens, n_local to {MAX_POSITION}",
    "kernel": "one of " + ", ".join(KERNELS),
    "middle_top_k": f"a whole number, 0 (nothing is recalled) to {MAX_TOP_K}",
    "middle_rows": f'a whole number of queries, 1 to {MAX_POSITION}, or "{ALL}"',
    "middle_index": "one of " + ", ".join(map(str, INDEX_BITS)),
    "middle_from_layer": "the number of a layer, counted from 1",
    "middle_distance": f"a whole number of tokens, 0 to {MAX_POSITION}",
    "middle_unit": f'"{TOKEN}", or a multiple of {UNIT_MULTIPLE} tokens, up to {MAX_UNIT}',
    "archive_gib": f"a number of GiB above 0, up to {MAX_ARCHIVE_GIB}",
}
_NAMES = tuple(ALLOWED)
_DEFAULTS = {
    "n_local": "default: the trained length",
    "distance_limit": "default: n_local",
    "middle_distance": "default: half the trained length",
}
_OF_THE_MIDDLE = frozenset(_NAMES[_NAMES.index("middle_top_k") + 1 :])
VARIABLES = {name: VARIABLE_PREFIX + name.upper() for name in _NAMES}
_PLACE = f'--additional-config \'{{"{SECTION}": {{"n_global": 10, "n_local": 4096}}}}\''


_HOW = f"  Set them with {_PLACE} or with {', '.join(VARIABLES.values())}:\n" + "\n".join(
    f"    {name}: {what}" for name, what in ALLOWED.items()
)


def canonical(name: str) -> str:
    """A name as people mean it: without case, blanks, hyphens and underscores."""
    return re.sub(r"[\s_-]+", "", name).upper()


def is_backend_name(name: str) -> bool:
    """Whether this is what LMINF is called, however it is spelt."""
    return canonical(name) == BACKEND_NAME


def is_near_miss(name: str) -> bool:
    """Whether somebody who wrote this as a backend's name may have meant LMINF. Not asked of names
    that vLLM knows."""
    plain = canonical(name)
    if BACKEND_NAME in plain or "INFINIT" in plain:
        return plain != BACKEND_NAME
    return 0.65 <= SequenceMatcher(None, BACKEND_NAME, plain).ratio() < 1


def question_of_variables(environ: Mapping[str, str], known: Iterable[str] = ()) -> str | None:
    """What to ask where a variable looks as if it should select LMINF, and doesn't; or None.

    Args:
        environ: the process's environment.
        known: names of vLLM's own backends, which it is for vLLM to judge.
    """
    value = environ.get(BACKEND_VARIABLE, "")
    if value.upper() not in known and is_near_miss(value):
        return f"{BACKEND_VARIABLE} is {shown(value)}: was {BACKEND_NAME} meant?"
    for name in sorted(environ):
        looks_like_it = re.fullmatch("VLLM.*(ATT|BACKEND).*|ATT(ENTIO)?NBACKENDS?", canonical(name))
        if looks_like_it and name != BACKEND_VARIABLE and is_backend_name(environ[name]):
            return f"{name} is {environ[name]!r} and isn't read: was {BACKEND_VARIABLE} meant?"
    return None


def origins(additional_config: object, environ: Mapping[str, str]) -> dict[str, str]:
    """Where the value of each setting comes from, by their names."""
    section = _section(additional_config, [])
    found = {
        name: "--additional-config" if name in section else variable
        for name, variable in VARIABLES.items()
        if name in section or variable in environ
    }
    return {name: found.get(name, _DEFAULTS.get(name, "default")) for name in _NAMES}


def given_settings(additional_config: object, environ: Mapping[str, str]) -> list[str]:
    """Where settings of this plugin are given, right or wrong."""
    places = [name for name in sorted(environ) if _is_own_variable(name)]
    if isinstance(additional_config, Mapping) and SECTION in additional_config:
        places.append(f'"{SECTION}" in --additional-config')
    return places


@dataclass(frozen=True)
class Settings:
    """What the user asked for; None where a default follows from the model.

    Attributes:
        idle: settings that were given and change nothing, since middle_top_k was not.
    """

    n_global: int = DEFAULT_N_GLOBAL
    n_local: int | None = None
    distance_limit: int | None = None
    kernel: str = registry.AUTOMATIC
    middle_top_k: int = 0
    middle_rows: int | str = 64
    middle_index: int = 8
    middle_from_layer: int = 5
    middle_distance: int | None = None
    middle_unit: int | str = TOKEN
    archive_gib: int | float = 4
    idle: tuple[str, ...] = ()

    @classmethod
    def read(
        cls,
        additional_config: object,
        environ: Mapping[str, str],
        elsewhere: Mapping[str, object] | None = None,
    ) -> "Settings":
        """Reads the settings, before anything is known of the model.

        Args:
            additional_config: vLLM's additional_config; its entry "lminf" is read.
            environ: the process's environment.
            elsewhere: other options that hold objects, by name: settings don't belong there.

        Raises:
            SettingsError: a key or variable is unknown or out of place, or a value is not allowed.
        """
        problems: list[str] = []
        section = _section(additional_config, problems)
        resolved = LambdaConfig._from(section)  # of a configuration that is completed again
        if resolved is not None:
            section = resolved._deviations()
        values: dict[str, Any] = {}
        for name, variable in VARIABLES.items():
            if name in section:
                value = _check(f'"{name}" in {SECTION}', name, section[name], problems)
            elif variable in environ and resolved is None:
                value = _check(variable, name, parse_value(name, environ[variable]), problems)
            else:
                continue
            if value is not None:
                values[name] = value
        problems += [
            f'"{key}" in {SECTION} is not a setting{_hint(str(key))}; there are: '
            f"{', '.join(_NAMES)}"
            for key in section
            if key not in _NAMES
        ]
        problems += _unread_variables(environ)
        for option, tree in (elsewhere or {}).items():
            problems += _misplaced(tree, option)
        idle = sorted(_OF_THE_MIDDLE & values.keys(), key=_NAMES.index)
        if resolved is not None or "middle_top_k" in values:
            idle = []
        settings = cls(**values, idle=tuple(idle))
        if settings.n_local is not None:
            try:
                settings.pattern(trained_length=None)
            except SettingsError as error:
                problems += error.problems
        if problems:
            raise SettingsError(problems, _HOW)
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
                ],
                _HOW,
            )
        limit = self.distance_limit if self.distance_limit is not None else n_local
        try:
            return LambdaPattern(self.n_global, n_local, limit)
        except ValueError as error:
            raise SettingsError([str(error)], _HOW) from error

    def scored_at(self, trained_length: int | None) -> int | None:
        """The distance at which the middle is scored; None if nothing is recalled, and neither the
        settings nor the model's configuration tell one.

        Args:
            trained_length: as in `pattern`.

        Raises:
            SettingsError: something is recalled, and nothing tells the distance.
        """
        if self.middle_distance is not None:
            return self.middle_distance
        if trained_length is not None:
            return trained_length // 2
        if self.middle_top_k > 0:
            raise SettingsError(
                [
                    "middle_distance is not set, and the model's configuration names no trained "
                    "length that it could default to half of: set middle_distance"
                ],
                _HOW,
            )
        return None


@dataclass(frozen=True)
class Trained:
    """What a model was trained on; see `vllm_lminf.plugin.trained_length`.

    Attributes:
        length: tokens of context; None if its configuration doesn't tell.
        longest: the same, with LongRoPE's long factors; otherwise equal to length.
        window: tokens of the sliding windows that options took from layers which were trained with
            them; None if there are none. Neither length nor longest is above it.
        remarks: what of it isn't plainly the checkpoint's word, a sentence each.
    """

    length: int | None
    longest: int | None
    window: int | None = None
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class LambdaConfig:
    """What an engine runs with: every setting, resolved.

    It lies in the engine's configuration as the plain dictionary ``additional_config["lminf"]``, so
    that vLLM takes it to all processes of the engine, and keys its cache of compiled models by it:
    what is compiled depends on distance_limit, by LongRoPE's magnitude.

    Attributes:
        n_global, n_local, distance_limit: the Λ.
        kernel: one of `KERNELS`.
        middle_top_k, middle_rows, middle_from_layer, middle_distance, middle_unit: what is recalled
            from the middle, see `middle`; with a middle_top_k of 0 they have no effect. The
            distance is None if that is so and nothing tells one.
        middle_index: bits of an element of the archive's index.
        archive_gib: host memory that the archives of all workers of the engine take together.
        trained: what the model was trained on.
    """

    n_global: int
    n_local: int
    distance_limit: int
    kernel: str
    middle_top_k: int
    middle_rows: int | str
    middle_index: int
    middle_from_layer: int
    middle_distance: int | None
    middle_unit: int | str
    archive_gib: int | float
    trained: Trained

    @classmethod
    def resolve(cls, settings: Settings, trained: Trained) -> Self:
        """What the settings come to for a model.

        Raises:
            SettingsError: they make no Λ with what it was trained on, or there is no distance at
                which to score the middle.
        """
        problems = []
        try:
            pattern = settings.pattern(trained.length)
        except SettingsError as error:
            problems += error.problems
        try:
            distance = settings.scored_at(trained.length)
        except SettingsError as error:
            problems += error.problems
        if problems:
            raise SettingsError(problems, _HOW)
        given = {name: getattr(settings, name) for name in _NAMES}
        follows = {
            "n_local": pattern.n_local,
            "distance_limit": pattern.distance_limit,
            "middle_distance": distance,
        }
        return cls(**(given | follows), trained=trained)

    @classmethod
    def of(cls, engine: Any) -> Self:
        """Reads it from an engine's configuration, vLLM's VllmConfig.

        Raises:
            RuntimeError: the configuration wasn't completed.
        """
        given = engine.additional_config
        resolved = cls._from(given.get(SECTION)) if isinstance(given, Mapping) else None
        if resolved is None:
            raise RuntimeError(
                f"{BACKEND_NAME}'s settings aren't resolved in this engine's configuration: "
                f'additional_config["{SECTION}"] is completed by EngineArgs.create_engine_config'
            )
        return resolved

    @property
    def pattern(self) -> LambdaPattern:
        """The Λ."""
        return LambdaPattern(self.n_global, self.n_local, self.distance_limit)

    @property
    def middle(self) -> Middle | None:
        """What the layers recall that do; None where nothing is recalled."""
        if self.middle_top_k == 0 or self.middle_distance is None:
            return None
        return Middle(
            top_k=self.middle_top_k,
            distance=self.middle_distance,
            rows=ALL_ROWS if isinstance(self.middle_rows, str) else self.middle_rows,
            from_layer=self.middle_from_layer,
            block_size=1 if isinstance(self.middle_unit, str) else self.middle_unit,
        )

    def added_to(self, additional_config: object) -> dict[str, Any]:
        """A copy of vLLM's additional_config that holds this.

        Raises:
            SettingsError: it is none that can hold an entry.
        """
        if not isinstance(additional_config, Mapping):
            problem = f"additional_config is {shown(additional_config)}: it must be an object"
            raise SettingsError([f"{problem}, as in {_PLACE}"], _HOW)
        section = asdict(self)
        section["trained"]["remarks"] = list(self.trained.remarks)
        return {**additional_config, SECTION: section}

    @classmethod
    def _from(cls, section: object) -> Self | None:
        """What `added_to` wrote; None where it is anything else."""
        if not isinstance(section, Mapping) or section.keys() != {f.name for f in fields(cls)}:
            return None
        trained = section["trained"]
        if not isinstance(trained, Mapping) or trained.keys() != {f.name for f in fields(Trained)}:
            return None
        own = {**trained, "remarks": tuple(trained["remarks"])}
        return cls(**{**section, "trained": Trained(**own)})

    def _deviations(self) -> dict[str, Any]:
        """The settings that differ from the defaults for this model. The others are left to default
        anew, since the configuration that is completed again may be of another model."""
        half = None if self.trained.length is None else self.trained.length // 2
        follows = {
            "n_local": self.trained.length,
            "distance_limit": self.n_local,
            "middle_distance": half,
        }
        defaults = asdict(Settings()) | follows
        own = {name: getattr(self, name) for name in _NAMES}
        return {name: value for name, value in own.items() if value != defaults[name]}


def _section(additional_config: object, problems: list[str]) -> Mapping[str, Any]:
    if isinstance(additional_config, (str, bytes, int, float, list, tuple)):
        problems.append(
            f"additional_config is {shown(additional_config)}: it must be an object, as in {_PLACE}"
        )
    if not isinstance(additional_config, Mapping):
        return {}
    others = {key: value for key, value in additional_config.items() if key != SECTION}
    problems += _misplaced(others, "--additional-config")
    section = additional_config.get(SECTION, {})
    if not isinstance(section, Mapping):
        problems.append(
            f'"{SECTION}" in additional_config is {shown(section)}: it must be an object of '
            "settings"
        )
        return {}
    return section


def _misplaced(tree: object, where: str, is_top: bool = True) -> Iterator[str]:
    """What is named like our section, at any depth, or at the top like a setting of ours, in an
    object that has no place for it. Below the top, names are those of whoever reads them."""
    if not isinstance(tree, Mapping):
        return
    names = {canonical(name): name for name in _NAMES}
    for key, value in tree.items():
        plain, here = canonical(str(key)), f'"{key}" in {where}'
        if plain in (BACKEND_NAME, f"VLLM{BACKEND_NAME}"):
            yield f'{here} is not read: settings belong in "{SECTION}", as in {_PLACE}'
        elif is_top and plain in names and (names[plain] != "kernel" or value in KERNELS):
            yield f'{here} is not read: "{names[plain]}" belongs in "{SECTION}", as in {_PLACE}'
        else:
            yield from _misplaced(value, here, is_top=False)


def _unread_variables(environ: Mapping[str, str]) -> Iterator[str]:
    """Problems with variables that look like ours, or like nobody else's."""
    names = ", ".join(sorted(VARIABLES.values()))
    ours_alone = {canonical(name) for name in _NAMES if name != "kernel"}
    for variable in sorted(environ):
        if variable in VARIABLES.values():
            continue
        plain = canonical(variable)
        rest = plain.removeprefix("VLLM").removeprefix(BACKEND_NAME)
        meant = _nearest_setting(rest)
        hint = "" if meant is None else f" (is {VARIABLES[meant]} meant?)"
        is_named_after_us = plain.removeprefix("VLLM").startswith(BACKEND_NAME)
        if _is_own_variable(variable) or (is_named_after_us and meant is not None):
            yield f"{variable} is not a variable of this plugin{hint}; there are: {names}"
        elif plain.startswith("VLLM") and rest in ours_alone:
            yield f"{variable} is not read by anything{hint}; there are: {names}"


def _is_own_variable(name: str) -> bool:
    """Whether a variable is of this plugin's, by its prefix. In a cluster that has a service called
    vllm-lminf, Kubernetes sets some with that prefix in every container."""
    address = r"(.+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)"
    rest = name.removeprefix(VARIABLE_PREFIX)
    return name.startswith(VARIABLE_PREFIX) and re.fullmatch(address, rest) is None


def _nearest_setting(name: str) -> str | None:
    plain = {canonical(setting): setting for setting in _NAMES}
    found = get_close_matches(canonical(name), plain, n=1, cutoff=0.7)
    return plain[found[0]] if found else None


def _hint(name: str) -> str:
    meant = _nearest_setting(name)
    return "" if meant is None else f' (is "{meant}" meant?)'


def parse_value(name: str, text: str) -> int | float | str:
    """An environment variable's value; left as text where it is no number of the setting's kind."""
    text = text.strip()
    for kind in (int, float) if name == "archive_gib" else (int,):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _check(source: str, name: str, value: Any, problems: list[str]) -> int | float | str | None:
    if not _is_allowed(name, value):
        problems.append(f"{source} is {shown(value)}: it must be {ALLOWED[name]}")
        return None
    return value


def _is_allowed(name: str, value: Any) -> bool:
    """Whether a setting can have this value, which may be of any type."""
    if isinstance(value, str):
        words = {"kernel": KERNELS, "middle_rows": (ALL,), "middle_unit": (TOKEN,)}
        return value in words.get(name, ())
    if name == "archive_gib":
        return type(value) in (int, float) and 0 < value <= MAX_ARCHIVE_GIB
    if type(value) is not int:
        return False
    if name == "middle_index":
        return value in INDEX_BITS
    if name not in _WHOLE:
        return False
    least, most = _WHOLE[name]
    return least <= value <= most and (name != "middle_unit" or value % UNIT_MULTIPLE == 0)
