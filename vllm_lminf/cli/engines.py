"""What the commands of ``vllm-lminf eval`` share: options, refusals, how engines are started."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vllm_lminf.cli.child import run_child
from vllm_lminf.cli.model_facts import FactsJob, ModelFacts
from vllm_lminf.errors import CliError, SettingsError
from vllm_lminf.plugin.config import BACKEND_NAME, BACKEND_VARIABLE, SECTION, Settings

if TYPE_CHECKING:
    from vllm import LLM

DTYPES = ("auto", "bfloat16", "float16", "float32")
RECORDED_VARIABLES = ("VLLM_CPU_", "VLLM_LMINF_", "OMP_")
"""Environment variables that change the figures, by how their names start."""

PLUGIN = "lminf"
"""This plugin's name among vLLM's."""

EXTRA_BLOCK_TOKENS = 512
"""Room for a request's last block, which is never whole, in tokens of KV cache."""

Name = TypeVar("Name", bound=str)


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every engine is started with."""
    parser.add_argument(
        "--dtype", default="bfloat16", choices=DTYPES, help="of the model (default: %(default)s)"
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="let vLLM compile the model (default: not on a CPU, where it takes minutes)",
    )


def parse_names(option: str, text: str, known: Sequence[Name]) -> list[Name]:
    """Return the names in ``full,lminf``, each once, in the order given."""
    by_name: dict[str, Name] = {name: name for name in known}
    try:
        return [by_name[name] for name in dict.fromkeys(text.split(","))]
    except KeyError as error:
        raise CliError(
            f"{option} {text}: {error.args[0]!r} is not one of {', '.join(known)}"
        ) from None


def problems_of_paths(model: Path) -> Iterator[str]:
    """Why nothing could be measured with this checkpoint, or drawn."""
    if not (model / "config.json").is_file():
        yield f"--model {model}: no checkpoint there (it has no config.json)"
    if find_spec("matplotlib") is None:
        yield "matplotlib is not installed: pip install 'matplotlib>=3.9,<4'"


def model_of(text: str) -> str:
    """Return a checkpoint's folder, or the name that vLLM finds it by.

    Raises:
        CliError: it is a path, and there is no checkpoint.
    """
    path = Path(text)
    if path.name == "config.json" and path.is_file():
        return str(path.parent.resolve())
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CliError(f"{text}: no checkpoint there (it has no config.json)")
        return str(path.resolve())
    if path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1:
        raise CliError(f"{text}: no such folder")
    return text


def make_folder(output: Path) -> None:
    """Make the folder for what is written."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CliError(f"--output {output}: {error.strerror}") from error


def read_settings(settings: Mapping[str, Any]) -> Settings:
    """Return LMINF's settings, those of environment variables included; refuse what LMINF would
    refuse, before the other engine has run for minutes.
    """
    try:
        return Settings.read({SECTION: settings}, os.environ)
    except SettingsError as error:
        raise CliError(str(error)) from error


def check_settings(settings: Mapping[str, Any], trained_length: int | None) -> None:
    """Refuse settings that LMINF would refuse for a model of this trained length."""
    try:
        read_settings(settings).pattern(trained_length)
    except SettingsError as error:
        raise CliError(str(error)) from error


def reason_for_exclusion(environ: Mapping[str, str]) -> tuple[str, str] | None:
    """Return why vLLM would load other plugins without this one, and what to do; None if it
    wouldn't.
    """
    only = environ.get("VLLM_PLUGINS")
    if only is None or PLUGIN in only.split(","):
        return None
    return (
        f"VLLM_PLUGINS is {only!r}, which shuts this plugin out",
        f"add {PLUGIN} to it, or unset it",
    )


def api_url(given: str) -> str:
    """Return a server's address up to and with ``/v1``, whether that was given or not."""
    return f"{given.rstrip('/').removesuffix('/v1')}/v1"


def recorded_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that change the figures."""
    return {name: value for name, value in environ.items() if name.startswith(RECORDED_VARIABLES)}


def engine_environment(environ: Mapping[str, str], *, lminf: bool) -> dict[str, str]:
    """Return the environment that selects LMINF or doesn't, and lets the job size the KV cache.

    The engine runs inside the child itself. As processes of their own, vLLM's scheduler would take
    a core from the model, or fight with it for one: on two cores that halves either engine's speed.
    """
    dropped = {BACKEND_VARIABLE, "VLLM_ALLOW_LONG_MAX_MODEL_LEN", "VLLM_CPU_KVCACHE_SPACE"}
    env = {name: value for name, value in environ.items() if name not in dropped}
    env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if lminf:
        env[BACKEND_VARIABLE] = BACKEND_NAME
    return env


def read_facts(
    model: Path, dtype: str, environ: Mapping[str, str], output: Path, text: Path | None = None
) -> ModelFacts:
    """Ask a child process about the model, and the text if there is one."""
    job = FactsJob(model=str(model), text=None if text is None else str(text), dtype=dtype)
    data = run_child(
        "vllm_lminf.cli.model_facts",
        asdict(job),
        env=engine_environment(environ, lminf=False),
        log_path=output / "model.log",
        on_event=lambda event: None,
    )
    return ModelFacts(**data)


def longer_rope(end: int, trained_length: int | None) -> dict[str, int]:
    """Return the overrides of the model's config with which vLLM's own attention reaches ``end``.

    Past the trained length it needs a longer RoPE table, which vLLM sizes by
    ``max_position_embeddings``; without it, it reads past the table's end. LMINF needs no such
    help.
    """
    return {"max_position_embeddings": end} if end > (trained_length or math.inf) else {}


def start_engine(
    *,
    compile: bool | None,
    hf_overrides: Mapping[str, Any],
    lminf: Mapping[str, Any] | None,
    **options: Any,
) -> LLM:
    """Start vLLM in this process; raise when the attention that was asked for is not what runs.

    Args:
        compile: None leaves it to the platform, see `add_engine_arguments`.
        hf_overrides: changes of the model's config.
        lminf: LMINF's settings; None for vLLM's own attention. The environment must agree.
        options: of vLLM's LLM.
    """
    from vllm import LLM
    from vllm.platforms import current_platform

    if hf_overrides:
        options["hf_overrides"] = hf_overrides
    if lminf:
        options["additional_config"] = {SECTION: lminf}
    llm = LLM(
        enable_prefix_caching=True,
        enforce_eager=current_platform.is_cpu() if compile is None else not compile,
        seed=0,
        **options,
    )
    backend = llm.llm_engine.vllm_config.attention_config.backend
    if lminf is not None and getattr(backend, "name", None) != BACKEND_NAME:
        raise RuntimeError(
            f"vLLM runs without {BACKEND_NAME}: it did not load the plugin (is vllm-lminf "
            "installed in this environment, and is VLLM_PLUGINS unset?)"
        )
    return llm
