"""Every difference between vLLM versions, and every place where vLLM offers no registry.

Registries are used where they exist. Six functions of vLLM are wrapped, because nothing else
serves; each wrapper below says why, is installed once however often it is asked for, does nothing
unless LMINF is selected, and is taken off again by `uninstall`.
"""

import copy
import copyreg
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import huggingface_hub
import torch
import vllm.envs
from vllm.config import ModelConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import _cached_get_attn_backend

from vllm_lminf.plugin import speculation
from vllm_lminf.plugin.config import BACKEND_NAME

_BACKEND_PATH = "vllm_lminf.plugin.backend.LambdaAttentionBackend"

Finish = Callable[[VllmConfig], None]
_originals: dict[tuple[Any, str], Any] = {}


def install(prepare: Callable[[EngineArgs], Finish | None]) -> None:
    """Registers the backend and its KV cache, and wraps what has no registry. Safe to repeat.

    Args:
        prepare: called with the engine's arguments before a configuration is built from them.
            Returns None when LMINF isn't selected, and otherwise what to call with the finished
            configuration.
    """
    backend_member()
    copyreg.pickle(AttentionBackendEnum, _reduce_backend)
    _register_kv_cache()
    _wrap_engine_args(prepare)
    _wrap_cpu_platform()
    _wrap_scheduler()
    _wrap_stat_loggers()
    _wrap_pool_planning()


def uninstall() -> None:
    """Takes the wrappers off. Names in vLLM's registries stay: it has no way to remove them."""
    while _originals:
        (owner, name), original = _originals.popitem()
        setattr(owner, name, original)
    _cached_get_attn_backend.cache_clear()  # it remembers what a wrapper told it
    copyreg.dispatch_table.pop(AttentionBackendEnum, None)


def backend_member() -> AttentionBackendEnum:
    """vLLM's name for this backend; registers it the first time."""
    if BACKEND_NAME not in AttentionBackendEnum.__members__:
        register_backend(BACKEND_NAME, _BACKEND_PATH)
    return AttentionBackendEnum[BACKEND_NAME]


def _reduce_backend(member: AttentionBackendEnum) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """How a backend's name is pickled.

    An engine's configuration is unpickled in a new process before that process loads its plugins,
    where a name registered at run time is not known yet. Ours therefore brings its registration.
    """
    if member is backend_member():
        return backend_member, ()
    return AttentionBackendEnum, (member.value,)


def _register_kv_cache() -> None:
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from vllm_lminf.plugin.kv_cache import LambdaManager, LambdaSpec

    # The registry fills itself only while it is empty: vLLM's own entries must come first. This
    # public call makes it do so and checks nothing.
    KVCacheSpecRegistry.check_kv_cache_spec_registry({})
    KVCacheSpecRegistry.register(LambdaSpec, LambdaManager, uniform_type_base_spec=LambdaSpec)


def _wrap_engine_args(prepare: Callable[[EngineArgs], Finish | None]) -> None:
    """`EngineArgs.create_engine_config`: no hook of vLLM sees the engine's arguments before its
    configuration is built. It is needed there to honour VLLM_ATTENTION_BACKEND, to admit a
    max_model_len beyond the trained length, and to refuse what can't be honoured in the user's own
    process, before anything is loaded."""

    def make(original: Callable[..., VllmConfig]) -> Callable[..., VllmConfig]:
        @functools.wraps(original)
        def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
            finish = prepare(self)
            if finish is None:
                return original(self, *args, **kwargs)
            with _variable("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1"), _long_drafts(self):
                config = original(self, *args, **kwargs)
            finish(config)
            return config

        return create_engine_config

    _wrap(EngineArgs, "create_engine_config", make)


def _wrap_cpu_platform() -> None:
    """`CpuPlatform.get_attn_backend_cls`: it is given the selected backend and ignores it."""
    from vllm.platforms.cpu import CpuPlatform

    def make(original: Any) -> Any:
        @functools.wraps(original.__func__)
        def get_attn_backend_cls(
            cls: type[CpuPlatform],
            selected_backend: AttentionBackendEnum | None,
            attn_selector_config: Any,
            num_heads: int | None = None,
        ) -> str:
            if selected_backend is not backend_member():
                path: str = original.__func__(
                    cls, selected_backend, attn_selector_config, num_heads
                )
                return path
            backend = backend_member().get_class()
            reasons = backend.validate_configuration(
                device_capability=None,
                **attn_selector_config._asdict(),
            )
            if reasons:
                raise ValueError(
                    f"{BACKEND_NAME} can't serve this model on the CPU: {'; '.join(reasons)}. "
                    f"It was asked for {attn_selector_config}"
                )
            _wrap_cpu_sampling()
            return backend_member().get_path()

        return classmethod(get_attn_backend_cls)

    _wrap(CpuPlatform, "get_attn_backend_cls", make)


def _wrap_scheduler() -> None:
    """`Scheduler.make_stats`: the statistics of a step are the one thing that travels from the
    engine's process to the API server's at every step, whatever the number of either; they have
    no place for a plugin's numbers, and the scheduler's class is the user's to choose.

    The numbers travel in a field that maps names to counts, under names that no reader of vLLM
    knows; `metrics.unload_stats` takes them out before vLLM's own loggers see them.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    from vllm_lminf.plugin.metrics import Meter

    meters: WeakKeyDictionary[Scheduler, Meter] = WeakKeyDictionary()

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def make_stats(self: Scheduler, *args: Any, **kwargs: Any) -> Any:
            stats = original(self, *args, **kwargs)
            if stats is not None:
                if self not in meters:
                    managers = self.kv_cache_manager.coordinator.single_type_managers
                    meters[self] = Meter(managers)
                stats.num_kv_fetch_reqs_by_stage.update(meters[self].read(self.requests))
            return stats

        return make_stats

    _wrap(Scheduler, "make_stats", make)


def _wrap_stat_loggers() -> None:
    """`StatLoggerManager.__init__`: a class in the entry point group vllm.stat_logger_plugins is
    loaded into every server of the environment, LMINF selected or not, and turns the statistics
    on that --disable-log-stats turned off; offline engines never load it."""
    from vllm.v1.metrics.loggers import StatLoggerManager

    from vllm_lminf.plugin.metrics import LambdaStatLogger

    def make(original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def init(
            self: StatLoggerManager, vllm_config: VllmConfig, *args: Any, **kwargs: Any
        ) -> None:
            original(self, vllm_config, *args, **kwargs)
            if vllm_config.attention_config.backend is backend_member():
                self.stat_loggers.insert(0, LambdaStatLogger(vllm_config, self.engine_indexes))

        return init

    _wrap(StatLoggerManager, "__init__", make)


def _wrap_pool_planning() -> None:
    """`get_kv_cache_configs`, as the engine's process calls it: where the memory is too small for
    one request, it advises a smaller max_model_len, which doesn't matter here."""
    from vllm.v1.engine import core

    from vllm_lminf.plugin.kv_cache import advice

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def get_kv_cache_configs(
            vllm_config: VllmConfig,
            kv_cache_specs: Any,
            available_memory: list[int],
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            try:
                return original(vllm_config, kv_cache_specs, available_memory, *args, **kwargs)
            except ValueError as error:
                selected = vllm_config.attention_config.backend is backend_member()
                if not selected or "memory" not in str(error):
                    raise
                raise ValueError(
                    f"{error}\n{advice(vllm_config, kv_cache_specs, available_memory)}"
                ) from error

        return get_kv_cache_configs

    _wrap(core, "get_kv_cache_configs", make)


def _wrap_cpu_sampling() -> None:
    """`GPUModelRunner.sample_tokens`, on CPUs: of a prompt that isn't whole yet, every chunk draws
    a token, which is thrown away; the generator of a seeded request is then set back by an offset,
    which a CPU's generator doesn't have, and the engine dies of it.

    Such a request is given no generator for the step instead: what is thrown away comes from the
    common one, as it does for requests without a seed, and the request's own draws only what
    counts. A vLLM that sets no offset needs none of this, and nothing is wrapped in it.

    Called where a CPU worker asks for LMINF's backend: other processes never load the runner.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    if "set_offset" not in GPUModelRunner._bookkeeping_sync.__code__.co_names:
        return

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def sample_tokens(self: GPUModelRunner, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(self, CPUModelRunner) or (
                self.vllm_config.attention_config.backend is not backend_member()
            ):
                return original(self, *args, **kwargs)
            generators = self.input_batch.generators
            discarded = self.discard_request_mask.np[: self.input_batch.num_reqs].nonzero()[0]
            withheld = {i: generators.pop(i) for i in discarded.tolist() if i in generators}
            try:
                return original(self, *args, **kwargs)
            finally:
                generators.update(withheld)

        return sample_tokens

    _wrap(GPUModelRunner, "sample_tokens", make)


def _wrap(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    if (owner, name) not in _originals:
        original = owner.__dict__[name]
        _originals[owner, name] = original
        setattr(owner, name, make(original))


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Sets an environment variable of vLLM's for a while.

    An engine that has started in this process made vLLM remember all its variables. It is made to
    look again, as it does between engines of its own tests; the next engine makes it remember anew.
    """
    before = os.environ.get(name)
    os.environ[name] = value
    vllm.envs.disable_envs_cache()
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _long_drafts(arguments: EngineArgs) -> Iterator[None]:
    """Lengthens the drafter of an engine whose configuration is built meanwhile: from 0.33 on, a
    configuration that is whole has been cut down to the drafter's length already."""
    create = arguments.create_speculative_config

    def create_and_lengthen(*args: Any, **kwargs: Any) -> Any:
        drafter = create(*args, **kwargs)
        speculation.lengthen(drafter)
        return drafter

    arguments.create_speculative_config = create_and_lengthen
    try:
        yield
    finally:
        del arguments.create_speculative_config


def declare_variables(names: list[str]) -> None:
    """Makes environment variables known to vLLM, which warns of any other that starts as its own
    do, and refuses to start over them where it is asked to be strict."""
    for name in names:
        vllm.envs.environment_variables.setdefault(name, lambda name=name: os.environ.get(name))


def leave_adapters_out(model: torch.nn.Module, num_tokens: int) -> None:
    """Tells a model's LoRA layers, if it has any, that the tokens of its next run use no adapter.

    vLLM's runners do so before every run; a model that is run without them must not find what was
    left by none.
    """
    manager = getattr(model, "lora_manager", None)
    if manager is not None:
        from vllm.lora.layers import LoRAMapping

        none = (0,) * num_tokens
        manager.set_adapter_mapping(LoRAMapping(none, none, is_prefill=True))


def register_warm_up(engine: VllmConfig, warm_up: Callable[[VllmConfig], None]) -> None:
    """Has vLLM call ``warm_up(engine)`` once caches are there, before it captures graphs and says
    that it is ready. Called while a model is being loaded; once for an engine, however often.

    It is vLLM's registry of what compiles at run time, which wants for each kernel the keys that it
    is compiled by. Ours are known to the kernels; to vLLM an engine is one key. With
    --enforce-eager vLLM warms up nothing.
    """
    from vllm.model_executor.warmup.jit_warmup import VllmJitKernel

    class WarmUp(VllmJitKernel[int]):
        def __hash__(self) -> int:
            return hash((WarmUp.__qualname__, id(engine)))

        def __eq__(self, other: object) -> bool:
            return hash(self) == hash(other)

        def get_warmup_keys(self) -> list[int]:
            return [0]

        def compile(self, compile_key: int) -> None:
            warm_up(engine)

    WarmUp().register_warmup()


def reasons_against_flash_attention() -> list[str]:
    """Why the FlashAttention that vLLM ships can't be had here; empty where it can."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return ["vLLM ships it for NVIDIA's devices alone"]
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func  # noqa: F401
    except ImportError as error:
        return [f"it isn't part of this vLLM ({error})"]
    return []


def flash_attention(head_size: int) -> Callable[..., Any]:
    """FlashAttention as vLLM ships it, in the version that vLLM takes for such heads here."""
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    version = get_flash_attn_version(head_size=head_size)
    return functools.partial(flash_attn_varlen_func, fa_version=version)


def trained_length(model_config: ModelConfig) -> int | None:
    """Tokens of context that the checkpoint was trained for, as this configuration has it; None if
    it is silent. `vllm_lminf.plugin.trained_length` looks behind it.

    It is the max_model_len that vLLM derives where the user gives none, without looking at the
    tokenizer, whose limit is no property of the weights. Dynamic NTK is the exception: it changes
    the rotation past the trained length, which vLLM counts in and LMINF never does.
    """
    return trained_lengths(model_config)[0]


def trained_lengths(model_config: ModelConfig) -> tuple[int | None, int | None]:
    """The same, and the longest that the rotation was made for, which differs for LongRoPE alone:
    its long factors serve beyond the original length."""
    from vllm.config.model import _get_and_verify_max_len
    from vllm.transformers_utils.config import iter_rope_parameters

    length, _ = model_config.model_arch_config.derived_max_model_len_and_key
    if length == float("inf"):
        return None, None
    rope = getattr(model_config.hf_text_config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "dynamic":
        trained = int(rope.get("max_trained_positions", length))
        return trained, trained
    derived = _get_and_verify_max_len(
        hf_config=model_config.hf_text_config,
        model_arch_config=model_config.model_arch_config,
        tokenizer_config=None,
        max_model_len=None,
        disable_sliding_window=False,
        sliding_window=None,
    )
    kinds = {each["rope_type"] for each in iter_rope_parameters(model_config.hf_text_config)}
    return derived, max(derived, int(length)) if "longrope" in kinds else derived


def as_the_checkpoint_says(model_config: ModelConfig) -> ModelConfig:
    """The same model, its configuration read again, without what options change of it. Good for
    questions about lengths, windows and rotation."""
    from vllm.transformers_utils.config import get_config, get_hf_text_config

    own = copy.copy(model_config)
    own.hf_config = get_config(
        model_config.hf_config_path or model_config.model,
        model_config.trust_remote_code,
        model_config._hf_config_revision or model_config.revision,
        model_config.code_revision,
        model_config.config_format,
        token=model_config.hf_token,
    )
    own.hf_text_config = get_hf_text_config(own.hf_config)
    own.model_arch_config = own.get_model_arch_config()
    return own


def raw_config(model_config: ModelConfig) -> dict[str, Any] | None:
    """What stands in the checkpoint's config.json; None where it has none."""
    from transformers import PretrainedConfig

    try:
        said, _ = PretrainedConfig.get_config_dict(
            model_config.hf_config_path or model_config.model,
            revision=model_config._hf_config_revision or model_config.revision,
            token=model_config.hf_token,
            local_files_only=huggingface_hub.constants.HF_HUB_OFFLINE,
        )
    except OSError:
        return None
    return dict(said)


def rotation(model_config: ModelConfig) -> list[dict[str, Any]]:
    """The parameters of the model's RoPE, for comparison."""
    from vllm.transformers_utils.config import iter_rope_parameters

    return list(iter_rope_parameters(model_config.hf_text_config))
