"""The child process of ``vllm-lminf doctor``: what vLLM and the plugin come to here, and what they
would do with a model.

Everything is asked of the code that serving runs: the plugin's own checks, its choice of kernels,
vLLM's configuration, and the model's layers as an outline without weights.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from vllm_lminf.cli import outline
from vllm_lminf.cli.child import serve_job
from vllm_lminf.cli.encoding import describe
from vllm_lminf.errors import BuildError, SettingsError, UnsupportedError
from vllm_lminf.plugin.config import (
    ALLOWED,
    BACKEND_NAME,
    BACKEND_VARIABLE,
    LambdaConfig,
    Settings,
    is_backend_name,
    origins,
    question_of_variables,
)

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec

    from vllm_lminf.kernels.base import LayerConfig


@dataclass(frozen=True)
class InspectionJob:
    """What to look at.

    Attributes:
        model: folder or name of a checkpoint; None for the environment alone.
        engine: options of vLLM's engine.
        options: settings whose variables were set by options of the command, by their names.
    """

    model: str | None = None
    engine: list[str] = field(default_factory=list)
    options: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """One setting: its value, None where it follows from a model, and where it comes from."""

    name: str
    value: Any
    origin: str


@dataclass(frozen=True)
class ModelFindings:
    """A model.

    Attributes:
        architecture: what vLLM runs it as.
        encoding: where its attention takes positions from; None where its layers weren't built.
        trained_length: in tokens; None if its configuration doesn't tell.
        windows: of each size of sliding windows of its own, in how many layers; None where its
            layers weren't built.
        num_layers: with attention; None likewise.
        remarks: what is to be known of its trained length.
    """

    architecture: str
    trained_length: int | None
    encoding: str | None = None
    windows: dict[str, int] | None = None
    num_layers: int | None = None
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Findings:
    """What was found.

    Attributes:
        vllm: its version.
        known: the versions that the plugin knows.
        platform: vLLM's.
        is_loaded: whether vLLM has loaded the plugin.
        selected_by: what selects LMINF here; None if nothing does.
        kernel: the setting.
        takes: the kernel that it comes to; None if there is none.
        against: of every other kernel, why it isn't taken.
        compiler, cache, cache_remarks: of the kernels for CPUs; see
            `vllm_lminf.kernels.cpu.build.where`.
        settings: all.
        model: what was asked about.
        problems: why serving would fail.
    """

    vllm: str
    known: str
    platform: str
    is_loaded: bool
    selected_by: str | None
    kernel: str
    takes: str | None
    against: dict[str, list[str]]
    compiler: str | None
    cache: str | None
    cache_remarks: list[str]
    settings: list[Setting]
    model: ModelFindings | None
    problems: list[str]

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Findings:
        """Rebuild them from what ``dataclasses.asdict`` made of them."""
        model = None if data["model"] is None else ModelFindings(**data["model"])
        settings = [Setting(**each) for each in data["settings"]]
        return cls(**{**data, "settings": settings, "model": model})


def inspect(job: InspectionJob) -> Findings:
    """Look at the environment, and at a model if there is one."""
    from vllm.platforms import current_platform
    from vllm.version import __version__ as vllm_version

    from vllm_lminf.plugin import hosts

    problems = hosts.unsupported_environment()
    is_loaded = _load_plugins(problems)
    settings = Settings()
    additional: Any = None
    try:
        settings = Settings.read(None, os.environ)
    except SettingsError as error:
        problems += error.problems
    config: VllmConfig | None = None
    model: ModelFindings | None = None
    layer: LayerConfig | None = None
    if job.model is not None and not problems:
        looked = _Look(job.model, job.engine, problems)
        config, model, layer, additional = (
            looked.config,
            looked.model,
            looked.layer,
            looked.additional_config,
        )
        settings = looked.settings or settings
    compiler, cache, cache_remarks = _compiler(current_platform.device_type)
    takes: str | None = None
    against: dict[str, list[str]] = {}
    if is_loaded:
        takes, against = _kernels(settings.kernel, layer or _any_layer())
        if takes is None and layer is None:
            problems += [f"kernel {name!r}: {r}" for name, rs in against.items() for r in rs]
    came_from = origins(additional, os.environ)
    came_from |= {
        name: option
        for name, option in job.options.items()
        if came_from[name] != "--additional-config"
    }
    values = asdict(settings) if config is None else asdict(LambdaConfig.of(config))
    return Findings(
        vllm=vllm_version,
        known=f"{hosts.OLDEST_VLLM} up to, not including, {hosts.FIRST_UNKNOWN_VLLM}",
        platform=current_platform.device_type,
        is_loaded=is_loaded,
        selected_by=_selected_by(),
        kernel=settings.kernel,
        takes=takes,
        against=against,
        compiler=compiler,
        cache=cache,
        cache_remarks=cache_remarks,
        settings=[Setting(name, values[name], came_from[name]) for name in ALLOWED],
        model=model,
        problems=list(dict.fromkeys(problems)),
    )


def _load_plugins(problems: list[str]) -> bool:
    """Load vLLM's plugins as an engine does; whether this one is among them. Adds why not."""
    import vllm.plugins
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    try:
        vllm.plugins.load_general_plugins()
    except RuntimeError as error:
        problems.append(str(error))
        return False
    known = AttentionBackendEnum.__members__
    is_loaded = BACKEND_NAME in known
    if (question := question_of_variables(os.environ, known)) is not None:
        problems.append(question)
    return is_loaded


def _selected_by() -> str | None:
    return BACKEND_VARIABLE if is_backend_name(os.environ.get(BACKEND_VARIABLE, "")) else None


def _compiler(device_type: str) -> tuple[str | None, str | None, list[str]]:
    if device_type != "cpu":
        return None, None, []
    from vllm_lminf.kernels.cpu import build

    try:
        compiler, folder, remarks = build.where()
    except BuildError as error:
        return None, None, [str(error)]
    return compiler, None if folder is None else str(folder), remarks


def _any_layer() -> LayerConfig:
    """One as most models have them, for the platform's device."""
    import torch
    from vllm.platforms import current_platform

    from vllm_lminf.kernels.base import Heads, LayerConfig, ScoreRules
    from vllm_lminf.pattern import LambdaPattern
    from vllm_lminf.plugin.layer_config import ANY_BLOCK_SIZE, flash_attention

    capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
    return LayerConfig(
        heads=Heads(32, 8, 128, torch.bfloat16),
        pattern=LambdaPattern(10, 4096, 4096),
        rules=ScoreRules(128**-0.5),
        cache_dtype=torch.bfloat16,
        block_size=ANY_BLOCK_SIZE,
        device=torch.device(current_platform.device_type),
        capability=None if capability is None else (capability.major, capability.minor),
        flash_attention=flash_attention(),
    )


def _kernels(asked: str, layer: LayerConfig) -> tuple[str | None, dict[str, list[str]]]:
    """The kernel that a setting comes to, compiled if need be; and why it is no other."""
    from vllm_lminf.kernels import registry

    choice = registry.choose(asked, layer, load=True)
    against = dict(choice.against)
    for name in registry.NAMES:
        if name != choice.kernel and name not in against:
            reasons = registry.choose(name, layer, load=True).reasons
            why = f"it would run, and {choice.kernel or 'none'} is taken"
            against[name] = [r.partition(": ")[2] for r in reasons] or [why]
    return choice.kernel, against


class _Look:
    """At a model, as serving would begin with it. Whatever stands against it goes to ``problems``;
    what was found before is kept."""

    def __init__(self, model: str, words: Sequence[str], problems: list[str]) -> None:
        self.config: VllmConfig | None = None
        self.model: ModelFindings | None = None
        self.layer: LayerConfig | None = None
        self.settings: Settings | None = None
        self.additional_config: Any = None
        try:
            self._look(model, words)
        except UnsupportedError as error:
            problems += error.reasons
        except SettingsError as error:
            problems += error.problems
        except Exception as error:  # vLLM's own refusals are of any kind
            problems.append(f"vLLM refuses it: {str(error).strip() or type(error).__name__}")

    def _look(self, model: str, words: Sequence[str]) -> None:
        arguments = outline.parse_engine_arguments(model, words)
        self.additional_config = arguments.additional_config
        self.settings = Settings.read(self.additional_config, os.environ)
        as_trained = copy.copy(arguments)
        as_trained.max_model_len = None
        self.model = _of_configuration(as_trained.create_model_config())
        if arguments.attention_backend is None and _selected_by() is None:
            arguments.attention_backend = BACKEND_NAME
        config = outline.configure(arguments)
        self.config = config
        built = outline.build(config)
        layers = list(_layers(config))
        self._note_layers(config, layers, built)
        self._refuse_layers(config, layers)

    def _note_layers(self, config: VllmConfig, layers: list[Any], built: Any) -> None:
        """What the layers are like; raises where no position reaches them."""
        import torch

        from vllm_lminf.plugin import loaded_model, rotary

        if not layers:
            raise UnsupportedError(["the model has no attention layers"])
        rotations = [module for _, _, _, module in loaded_model.rotary_modules(built)]
        of_vllm = next(filter(rotary.is_rotary, rotations), None)
        windows: dict[str, int] = {}
        for layer in layers:
            if layer.sliding_window is not None:
                size = str(layer.sliding_window)
                windows[size] = windows.get(size, 0) + 1
        has_alibi = layers[0].impl.rules.alibi_slopes is not None
        is_known = bool(rotations) or has_alibi
        if self.model is not None:
            self.model = replace(
                self.model,
                num_layers=len(layers),
                windows=windows,
                encoding=describe(
                    config.model_config.hf_text_config,
                    layers,
                    getattr(of_vllm, "rotary_dim", None),
                    getattr(of_vllm, "is_neox_style", True),
                )
                if is_known
                else "no relative encoding",
            )
        if not is_known:
            raise UnsupportedError(
                [
                    "no relative encoding: the model has no rotary module and no ALiBi, as where "
                    "positions are learned"
                ]
            )
        limit = LambdaConfig.of(config).distance_limit
        unserved = loaded_model.make_rotations_exact(built, torch.device("cpu"), limit, False)
        if unserved and len(unserved) == len(set(rotations)):
            raise UnsupportedError([r for error in unserved.values() for r in error.reasons])

    def _refuse_layers(self, config: VllmConfig, layers: list[Any]) -> None:
        """Raises with every reason against a layer's cache, all kernels, or the archive."""
        from vllm_lminf.kernels import registry
        from vllm_lminf.kernels.base import Heads
        from vllm_lminf.plugin import archive, versions
        from vllm_lminf.plugin.backend import kept_by_its_pattern
        from vllm_lminf.plugin.layer_config import layer_config_of

        resolved = LambdaConfig.of(config)
        reasons: dict[str, None] = {}
        specs: dict[str, KVCacheSpec] = {}
        for layer in layers:
            impl = layer.impl
            try:
                spec = layer.get_kv_cache_spec(config)
                specs[layer.layer_name] = kept_by_its_pattern(config, spec)
            except UnsupportedError as error:
                reasons |= dict.fromkeys(error.reasons)
            middle = resolved.middle if impl.pattern == impl.model_pattern else None
            described = replace(
                layer_config_of(config, impl.pattern, middle, resolved.middle_index),
                heads=Heads(
                    impl.num_heads, impl.num_kv_heads, impl.head_size, config.model_config.dtype
                ),
                rules=impl.rules,
            )
            self.layer = self.layer or described
            choice = registry.choose(resolved.kernel, described)
            if choice.kernel is None:
                reasons |= dict.fromkeys(choice.reasons)
        if reasons:
            raise UnsupportedError(list(reasons))
        archive.plan(config, versions.plan_pools(config, [specs], [outline.AMPLE]))


def _of_configuration(model: ModelConfig) -> ModelFindings:
    from vllm_lminf.plugin import trained_length

    trained = trained_length.of(model)
    return ModelFindings(model.architecture, trained.length, remarks=list(trained.remarks))


def _layers(config: VllmConfig) -> Iterator[Any]:
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention

    yield from get_layers_from_vllm_config(config, Attention).values()


def main() -> None:
    """Read an ``InspectionJob`` from stdin and answer with ``Findings``."""
    with serve_job() as (data, answers):
        answers.send("result", result=asdict(inspect(InspectionJob(**data))))


if __name__ == "__main__":
    main()
