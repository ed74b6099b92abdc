"""What is changed in vLLM while LMINF is installed, all of it, and what would make it needless.

Registries are used where they exist. What has none is wrapped, once however often it is asked
for; a wrapper does nothing unless LMINF is selected, and `uninstall` takes it off. "To file" is a
sentence for vLLM's issue tracker; where something is there already, it is named.

Wrapped functions:

- ``vllm.engine.arg_utils.EngineArgs.create_engine_config``: no hook sees the engine's arguments
  before its configuration is built, or may refuse them in the user's own process. While it runs,
  VLLM_ALLOW_LONG_MAX_MODEL_LEN is set, which vLLM may have remembered (`vllm.envs`' cache), and
  `create_speculative_config` of this one object lengthens the drafter.
  To file: let general plugins register a function that is given EngineArgs before, and VllmConfig
  after, the configuration is built; and ask the attention backend how long a sequence may be.
- ``vllm.platforms.cpu.CpuPlatform.get_attn_backend_cls``: is given the selected backend and ignores
  it. To file: let CpuPlatform honour a registered backend, as CUDA's platform does since
  vllm-project/vllm#24794, "[Attention] Refactor CUDA attention backend selection logic".
- ``vllm.v1.engine.core.get_kv_cache_configs``: its advice, a smaller max_model_len, doesn't matter
  here. To file: ask the KV cache specs for the advice that goes with "memory is too small".
  It also gets the archive's group, see `vllm_lminf.plugin.archive`. To file: let a layer bring a KV
  cache group with a pool of its own, as HiSparse's layers do.
- ``vllm.v1.engine.core.EngineCore.__init__``: the hashes of blocks whose rows looked into the
  middle must differ from those of others. To file: let a KV cache spec add to the hash of a
  request's block what its contents depend on besides the tokens.
- ``vllm.v1.engine.input_processor.InputProcessor.process_inputs``: a prompt whose length decides
  which rows look into the middle must not grow once its request runs. To file: let a backend say
  whether it serves streaming inputs, as `AsyncLLM._validate_resumable_request` asks of models.
- ``vllm.v1.worker.gpu_model_runner.GPUModelRunner._build_attention_metadata``, where queries recall
  the middle: which of them do follows from the prompt's length. To file: hand
  `CommonAttentionMetadata.rswa_prefix_lens`, the prompts' lengths, to every backend.
- ``vllm.v1.worker.gpu.model_runner.GPUModelRunner.prepare_inputs`` and
  ``vllm.v1.worker.gpu.input_batch.InputBatch.make_dummy``: the same for the newer runner, which has
  a place for the prompts' lengths, and fills it for models with R-SWA alone.
- ``vllm.v1.worker.gpu.warmup._warmup_kernels``, where queries recall the middle: it draws blocks of
  every group from the device's pool, and the archive has fewer. Its writes are sent to the null
  blocks. To file: draw the blocks of a host-resident group from its own number of blocks.
- ``vllm.v1.outputs.ModelRunnerOutput.__init__``, where a worker's kernels count searches of the
  middle: a step's output takes the counts to the engine, see `vllm_lminf.plugin.metrics`. To file:
  the same as there.
- ``vllm.v1.worker.gpu_model_runner.GPUModelRunner.sample_tokens``, on CPUs: sets a CPU's generator
  back by an offset, which it doesn't have, and dies. To file: a seeded request whose prompt takes
  more than one step ends the engine on CPUs ("CPU Generator does not use offset"); keep the
  generators of discarded rows out of sampling instead of rewinding them, which
  vllm-project/vllm#10097 began and #43028 had to mend for XPUs.
- ``vllm.v1.core.sched.scheduler.Scheduler.make_stats``,
  ``vllm.v1.core.sched.scheduler.Scheduler.update_from_output`` and
  ``vllm.v1.metrics.loggers.StatLoggerManager.__init__``: in `vllm_lminf.plugin.metrics`, which says
  why. Open: vllm-project/vllm#45864, "Add extensible engine core outputs for OOT backends".
- ``vllm.v1.attention.backends.registry._AttentionBackendEnumMeta.__getitem__``: in
  `vllm_lminf.plugin.hosts`, and only in a vLLM that can't host the plugin, where none of the others
  is wrapped. To file: let a plugin register why a backend isn't available.

Changed otherwise:

- `copyreg` is told how a backend's name is pickled, see `_reduce_backend`. To file: load plugins
  before a new process unpickles its VllmConfig.
- `torch` tells `vllm_lminf.plugin.loaded_model` which module is put into which, while a model is
  built. It is torch's public hook. To file: hand the model to process_weights_after_loading.
- What is read from private places, and how vLLM learns names of variables: see
  `vllm_lminf.plugin.versions`.
"""

import copyreg
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import vllm.envs
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import _cached_get_attn_backend

from vllm_lminf.errors import UnsupportedError
from vllm_lminf.pattern import MAX_POSITION
from vllm_lminf.plugin import speculation, wrapping
from vllm_lminf.plugin.config import BACKEND_NAME
from vllm_lminf.plugin.wrapping import wrap

_BACKEND_PATH = "vllm_lminf.plugin.backend.LambdaAttentionBackend"

Finish = Callable[[VllmConfig], None]


def install(prepare: Callable[[EngineArgs], Finish | None]) -> None:
    """Registers the backend and its KV cache, and wraps what has no registry. Safe to repeat.

    Args:
        prepare: called with the engine's arguments before a configuration is built from them.
            Returns None when LMINF isn't selected, and otherwise what to call with the finished
            configuration.

    Raises:
        RuntimeError: something that is wrapped, or carries numbers, isn't there in this vLLM.
    """
    from vllm_lminf.plugin import metrics

    backend_member()
    copyreg.pickle(AttentionBackendEnum, _reduce_backend)
    _register_kv_cache()
    _wrap_engine_args(prepare)
    _wrap_cpu_platform()
    _wrap_pool_planning()
    _wrap_block_hashes()
    _wrap_inputs()
    metrics.install()


def uninstall() -> None:
    """Takes the wrappers off. Names in vLLM's registries stay: it has no way to remove them."""
    wrapping.remove_all()
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

    from vllm_lminf.plugin.archive import ArchiveManager, ArchiveSpec
    from vllm_lminf.plugin.kv_cache import LambdaManager, LambdaSpec

    # The registry fills itself only while it is empty: vLLM's own entries must come first. This
    # public call makes it do so and checks nothing.
    KVCacheSpecRegistry.check_kv_cache_spec_registry({})
    KVCacheSpecRegistry.register(LambdaSpec, LambdaManager, uniform_type_base_spec=LambdaSpec)
    KVCacheSpecRegistry.register(ArchiveSpec, ArchiveManager, uniform_type_base_spec=ArchiveSpec)


def _wrap_engine_args(prepare: Callable[[EngineArgs], Finish | None]) -> None:
    """Honours VLLM_ATTENTION_BACKEND, admits a max_model_len beyond the trained length, and refuses
    what can't be honoured in the user's own process, before anything is loaded."""

    def create(
        original: Callable[..., VllmConfig], self: EngineArgs, *args: Any, **kwargs: Any
    ) -> VllmConfig:
        finish = prepare(self)
        if finish is None:
            return original(self, *args, **kwargs)
        with _variable("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1"), _long_drafts(self):
            config = original(self, *args, **kwargs)
        finish(config)
        return config

    wrap(EngineArgs, "create_engine_config", create)


def _wrap_cpu_platform() -> None:
    """Has the CPU's platform return the backend that was selected, if it is ours."""
    from vllm.platforms.cpu import CpuPlatform

    def choose(
        original: Callable[..., str],
        cls: type[CpuPlatform],
        selected_backend: AttentionBackendEnum | None,
        attn_selector_config: Any,
        num_heads: int | None = None,
    ) -> str:
        if selected_backend is not backend_member():
            return original(cls, selected_backend, attn_selector_config, num_heads)
        member = backend_member()
        reasons = member.get_class().validate_configuration(
            device_capability=None, **attn_selector_config._asdict()
        )
        if reasons:
            raise ValueError(
                f"{BACKEND_NAME} can't serve this model on the CPU: {'; '.join(reasons)}. "
                f"It was asked for {attn_selector_config}"
            )
        _wrap_cpu_sampling()
        path: str = member.get_path()
        return path

    wrap(CpuPlatform, "get_attn_backend_cls", choose)


def _wrap_pool_planning() -> None:
    """Adds, where the memory is too small for one request, what would help under a Λ. It is wrapped
    where the engine's process calls it."""
    from vllm.v1.engine import core

    from vllm_lminf.plugin import archive
    from vllm_lminf.plugin.kv_cache import advice

    def plan(
        original: Callable[..., Any],
        vllm_config: VllmConfig,
        kv_cache_specs: Any,
        available_memory: list[int],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        try:
            configs = original(vllm_config, kv_cache_specs, available_memory, *args, **kwargs)
        except ValueError as error:
            if not _is_selected(vllm_config) or "memory" not in str(error):
                raise
            raise ValueError(
                f"{error}\n{advice(vllm_config, kv_cache_specs, available_memory)}"
            ) from error
        if _is_selected(vllm_config):
            configs = archive.plan(vllm_config, configs)
        return configs

    wrap(core, "get_kv_cache_configs", plan)


def _wrap_block_hashes() -> None:
    """Tells blocks apart by which of their rows looked into the middle."""
    from vllm.v1.engine.core import EngineCore

    from vllm_lminf.plugin.archive import mark_rows_that_look
    from vllm_lminf.plugin.config import LambdaConfig

    def start(
        original: Callable[..., None],
        self: EngineCore,
        vllm_config: VllmConfig,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        original(self, vllm_config, *args, **kwargs)
        if self.request_block_hasher is None or not _is_selected(vllm_config):
            return
        resolved = LambdaConfig.of(vllm_config)
        if resolved.middle is not None:
            pool = self.scheduler.kv_cache_manager.block_pool
            self.request_block_hasher = mark_rows_that_look(
                self.request_block_hasher, resolved.middle, resolved.pattern, pool.hash_block_size
            )

    wrap(EngineCore, "__init__", start)


def _wrap_inputs() -> None:
    """Refuses a prompt that arrives in pieces, where it decides by its length which rows look into
    the middle: those of a piece would have looked that aren't the last of the whole, and wouldn't
    look again if the request were preempted."""
    from vllm.v1.engine.input_processor import InputProcessor

    from vllm_lminf.middle import ALL_ROWS
    from vllm_lminf.plugin.config import LambdaConfig

    def process(original: Callable[..., Any], self: InputProcessor, *args: Any, **kw: Any) -> Any:
        if kw.get("resumable") and _is_selected(self.vllm_config):
            resolved = LambdaConfig.of(self.vllm_config)
            if resolved.middle is not None and resolved.middle.rows != ALL_ROWS:
                raise UnsupportedError(
                    [
                        f"middle_rows {resolved.middle_rows}, and a prompt that arrives in pieces "
                        "(streaming inputs): which rows are its last isn't known; set middle_rows "
                        'to "all", or middle_top_k to 0'
                    ]
                )
        return original(self, *args, **kw)

    wrap(InputProcessor, "process_inputs", process)


def wrap_runner(engine: VllmConfig) -> None:
    """Has the archive's metadata builder know the prompts' lengths, in vLLM's runner of either
    kind. Called where a worker's model recalls: other processes never load the runner."""
    if engine.use_v2_model_runner:
        _wrap_newer_runner()
    else:
        _wrap_older_runner()


def _wrap_older_runner() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from vllm_lminf.plugin.archive_backend import prompt_lens

    def build(original: Callable[..., Any], self: GPUModelRunner, *args: Any, **kwargs: Any) -> Any:
        token = prompt_lens.set(self.input_batch.num_prompt_tokens_cpu_tensor)
        try:
            return original(self, *args, **kwargs)
        finally:
            prompt_lens.reset(token)

    wrap(GPUModelRunner, "_build_attention_metadata", build)


def _wrap_newer_runner() -> None:
    from vllm.v1.worker.gpu import warmup
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    def prepare(
        original: Callable[..., Any], self: GPUModelRunner, *args: Any, **kwargs: Any
    ) -> Any:
        batch = original(self, *args, **kwargs)
        if _is_selected(self.vllm_config):
            batch.prompt_lens = self.req_states.prompt_len.gpu[batch.idx_mapping]
        return batch

    def make_up(original: Callable[..., Any], cls: type, *args: Any, **kwargs: Any) -> Any:
        """Requests that aren't there look at nothing, or at the null page."""
        batch = original(cls, *args, **kwargs)
        batch.prompt_lens = torch.full_like(batch.seq_lens, MAX_POSITION)
        return batch

    def warm_up(
        original: Callable[..., Any], model_runner: GPUModelRunner, *args: Any, **kwargs: Any
    ) -> Any:
        tables = model_runner.block_tables
        before = tables.redirect_writes_to_null_block
        tables.redirect_writes_to_null_block |= _is_selected(model_runner.vllm_config)
        try:
            return original(model_runner, *args, **kwargs)
        finally:
            tables.redirect_writes_to_null_block = before

    wrap(GPUModelRunner, "prepare_inputs", prepare)
    wrap(InputBatch, "make_dummy", make_up)
    wrap(warmup, "_warmup_kernels", warm_up)


def wrap_outputs() -> None:
    """Has a step's output carry the counts of searches, as far as they are known. Called where a
    worker's kernels count them."""
    from vllm.v1.outputs import ModelRunnerOutput

    from vllm_lminf.plugin.metrics import COUNTS
    from vllm_lminf.plugin.search_counts import SearchCounts

    def make(
        original: Callable[..., None], self: ModelRunnerOutput, *args: Any, **kwargs: Any
    ) -> None:
        original(self, *args, **kwargs)
        if SearchCounts.latest_step is not None:
            setattr(self, COUNTS, SearchCounts.latest_step.read())

    wrap(ModelRunnerOutput, "__init__", make)


def _is_selected(config: VllmConfig) -> bool:
    return bool(config.attention_config.backend is backend_member())


def _wrap_cpu_sampling() -> None:
    """Keeps the generator of a seeded request out of draws that don't count.

    Of a prompt that isn't whole yet, every chunk draws a token, which is thrown away. vLLM then
    sets the request's generator back by an offset, which a CPU's generator doesn't have. Here such
    a request is given no generator for the step: what is thrown away comes from the common one, as
    it does for requests without a seed. That is right however vLLM sets generators back, so it
    isn't asked whether it does; only a torch whose CPU generators have offsets needs none of this.

    Called where a CPU worker asks for LMINF's backend: other processes never load the runner.
    """
    if _has_offset(torch.Generator("cpu")):
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def sample(
        original: Callable[..., Any], self: GPUModelRunner, *args: Any, **kwargs: Any
    ) -> Any:
        if not isinstance(self, CPUModelRunner) or not _is_selected(self.vllm_config):
            return original(self, *args, **kwargs)
        generators = self.input_batch.generators
        discarded = self.discard_request_mask.np[: self.input_batch.num_reqs].nonzero()[0]
        withheld = {i: generators.pop(i) for i in discarded.tolist() if i in generators}
        try:
            return original(self, *args, **kwargs)
        finally:
            generators.update(withheld)

    wrap(GPUModelRunner, "sample_tokens", sample)


def _has_offset(generator: torch.Generator) -> bool:
    try:
        generator.get_offset()
    except RuntimeError:
        return False
    return True


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
