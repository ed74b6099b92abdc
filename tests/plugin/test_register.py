"""The entry point, and every place of vLLM that the plugin stands on.

Where a new vLLM moves one of these places, `TestHooks` fails with its name.
"""

import dataclasses
import functools
import importlib
import inspect
import pickle
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.envs
import vllm.plugins
import vllm.version
from vllm.config import AttentionConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs, core
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from vllm_lminf import plugin
from vllm_lminf.plugin import hosts, metrics, patches, wrapping
from vllm_lminf.plugin.config import BACKEND_NAME
from vllm_lminf.plugin.metrics import BLOCKS_PINNED, CARRIER
from vllm_lminf.plugin.search_counts import SearchCounts

WRAPPED = [
    (EngineArgs, "create_engine_config"),
    (CpuPlatform, "get_attn_backend_cls"),
    (Scheduler, "make_stats"),
    (Scheduler, "update_from_output"),
    (StatLoggerManager, "__init__"),
    (core, "get_kv_cache_configs"),
]


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Each test starts with vLLM as it is without the plugin.

    vLLM loads plugins once in a process: it must have done so before, and what it loaded is there
    again for the tests that follow.
    """
    vllm.plugins.load_general_plugins()
    patches.uninstall()
    yield
    patches.uninstall()
    plugin.register()


def described() -> set[str]:
    """Every function of vLLM that the account of patches lists."""
    return set(re.findall(r"``(vllm\.[\w.]+)``", patches.__doc__ or ""))


def functions() -> list[Any]:
    return [owner.__dict__[name] for owner, name in WRAPPED]


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


class TestRegister:
    def test_is_the_entry_point(self) -> None:
        (entry,) = entry_points(group="vllm.general_plugins", name="lminf")
        assert entry.load() is plugin.register

    def test_wraps_and_uninstall_restores(self) -> None:
        originals = functions()
        plugin.register()
        assert all(now is not before for now, before in zip(functions(), originals, strict=True))
        patches.uninstall()
        assert all(now is before for now, before in zip(functions(), originals, strict=True))

    def test_twice_is_once(self) -> None:
        originals = functions()
        plugin.register()
        wrapped = functions()
        members = list(AttentionBackendEnum)
        plugin.register()
        assert all(now is before for now, before in zip(functions(), wrapped, strict=True))
        assert list(AttentionBackendEnum) == members
        patches.uninstall()
        assert all(now is before for now, before in zip(functions(), originals, strict=True))

    def test_uninstall_twice_is_harmless(self) -> None:
        plugin.register()
        patches.uninstall()
        originals = functions()
        patches.uninstall()
        assert all(now is before for now, before in zip(functions(), originals, strict=True))

    def test_no_runner_is_loaded_before_a_worker_needs_it(self) -> None:
        printed = run_python(
            "import sys\n"
            "from vllm_lminf import plugin\n"
            "plugin.register()\n"
            "print('runner' if 'vllm.v1.worker.gpu_model_runner' in sys.modules else 'none')"
        )
        assert printed.splitlines()[-1] == "none"

    def test_sampling_is_wrapped_where_a_cpu_worker_asks_for_the_backend(self) -> None:
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        original = GPUModelRunner.sample_tokens
        plugin.register()
        assert GPUModelRunner.sample_tokens is original
        config = AttentionSelectorConfig(64, torch.bfloat16, "auto", 16)
        CpuPlatform.get_attn_backend_cls(AttentionBackendEnum.CPU_ATTN, config)
        assert GPUModelRunner.sample_tokens is original
        for _ in range(2):
            CpuPlatform.get_attn_backend_cls(patches.backend_member(), config)
            assert GPUModelRunner.sample_tokens.__wrapped__ is original
        for newer in (False, True):
            patches.wrap_runner(SimpleNamespace(use_v2_model_runner=newer))
        patches.wrap_outputs()
        only_elsewhere = "vllm.v1.attention.backends.registry._AttentionBackendEnumMeta.__getitem__"
        assert set(wrapping.installed()) == described() - {only_elsewhere}
        patches.uninstall()
        assert GPUModelRunner.sample_tokens is original

    def test_sampling_is_left_alone_where_generators_have_offsets(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As a GPU's have; here none has, or the wrapper is no longer needed."""
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        assert not patches._has_offset(torch.Generator("cpu"))
        original = GPUModelRunner.sample_tokens
        plugin.register()
        config = AttentionSelectorConfig(64, torch.bfloat16, "auto", 16)
        monkeypatch.setattr(patches, "_has_offset", lambda generator: True)
        CpuPlatform.get_attn_backend_cls(patches.backend_member(), config)
        assert GPUModelRunner.sample_tokens is original

    @pytest.mark.parametrize(("owner", "name"), WRAPPED, ids=str)
    def test_a_function_that_is_gone_is_named(
        self, owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delattr(owner, name)
        with pytest.raises(RuntimeError, match=re.escape(f"{wrapping.path_of(owner, name)} isn't")):
            plugin.register()

    @pytest.mark.parametrize("what", ["gone", "of another kind"])
    def test_a_carrier_of_the_metrics_that_moved_is_named(
        self, what: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fields = [field for field in dataclasses.fields(SchedulerStats) if field.name != CARRIER]
        if what == "of another kind":
            fields += dataclasses.fields(
                dataclasses.make_dataclass("Other", [(CARRIER, int, dataclasses.field(default=0))])
            )
        monkeypatch.setattr(dataclasses, "fields", lambda _: fields)
        with pytest.raises(RuntimeError, match=rf"SchedulerStats\.{CARRIER} isn't the dict"):
            plugin.register()

    def test_wrappers_look_like_what_they_wrap(self) -> None:
        before = [inspect.signature(getattr(owner, name)) for owner, name in WRAPPED]
        plugin.register()
        assert [inspect.signature(getattr(owner, name)) for owner, name in WRAPPED] == before

    def test_backend_is_known_by_name(self) -> None:
        from vllm_lminf.plugin.backend import LambdaAttentionBackend

        plugin.register()
        member = AttentionBackendEnum[BACKEND_NAME]
        assert member is patches.backend_member()
        assert member.get_class() is LambdaAttentionBackend
        assert LambdaAttentionBackend.get_name() == BACKEND_NAME

    def test_every_backend_of_vllm_stays_what_it_was(self) -> None:
        before = {b.name: b.get_path() for b in AttentionBackendEnum if b.value}
        plugin.register()
        assert {b.name: b.get_path() for b in AttentionBackendEnum if b.value} == before


class TestVersions:
    """Where this vLLM can't host the plugin, it stays out of the way unless it was asked for."""

    @pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.33.0", "0.33.0rc2", "0.33.1.dev7"])
    def test_supported(self, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(vllm.version, "__version__", version)
        assert hosts.unsupported_environment() == []

    @pytest.mark.parametrize("version", ["0.31.4", "0.34.0", "0.34.0rc1", "1.0.0", "dev"])
    def test_unsupported(self, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(vllm.version, "__version__", version)
        (reason,) = hosts.unsupported_environment()
        assert version in reason

    def test_unsupported_platform(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(current_platform, "device_type", "tpu")
        (reason,) = hosts.unsupported_environment()
        assert "'tpu'" in reason

    def test_is_left_alone_unless_selected(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(vllm.version, "__version__", "0.99.0")
        monkeypatch.delenv("VLLM_ATTENTION_BACKEND", raising=False)
        originals = functions()
        plugin.register()
        assert all(now is before for now, before in zip(functions(), originals, strict=True))

    @pytest.mark.parametrize("name", ["LMINF", "lminf", "LM_INF", "lm-inf "])
    def test_selected_by_an_option_it_says_every_reason(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where vLLM alone would say that there is no such backend."""
        monkeypatch.setattr(vllm.version, "__version__", "0.99.0")
        monkeypatch.setattr(current_platform, "device_type", "tpu")
        monkeypatch.delenv("VLLM_ATTENTION_BACKEND", raising=False)
        plugin.register()
        plugin.register()
        reasons = r"LMINF is not available: .*0\.99\.0 is installed.*'tpu'"
        with pytest.raises(ValueError, match=reasons):
            AttentionConfig(backend=name)
        with pytest.raises(ValueError, match=reasons):
            AttentionBackendEnum[name]
        assert AttentionConfig(backend="CPU_ATTN").backend is AttentionBackendEnum.CPU_ATTN
        with pytest.raises(ValueError, match="Unknown attention backend: 'NONE'"):
            AttentionBackendEnum["NONE"]
        assert wrapping.installed() == [
            "vllm.v1.attention.backends.registry._AttentionBackendEnumMeta.__getitem__"
        ]
        assert set(wrapping.installed()) < described()
        patches.uninstall()
        assert AttentionBackendEnum[BACKEND_NAME] is patches.backend_member()

    def test_unknown_vllm_in_which_names_are_gone(self) -> None:
        """The plugin imports none of them before it knows the version; the reason is a warning."""
        printed = run_python(
            "import logging, sys, vllm.version, vllm.logger\n"
            "from vllm.platforms import current_platform\n"
            "current_platform.device_type\n"
            "vllm.version.__version__ = '0.99.0'\n"
            "gone = ('vllm.engine.arg_utils', 'vllm.v1.attention.backends.registry')\n"
            "sys.modules.update(dict.fromkeys(gone))\n"
            "logging.Logger.log = lambda self, level, text: print(level, text)\n"
            "from vllm_lminf.plugin import register\n"
            "register()"
        )
        assert "30 LMINF is not available: vLLM 0.99.0 is installed" in printed

    def test_a_near_miss_asks_and_says_every_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(vllm.version, "__version__", "0.99.0")
        monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "LMNIF")
        with pytest.raises(RuntimeError, match=r"was LMINF meant\? .*0\.99\.0 is installed"):
            plugin.register()

    @pytest.mark.parametrize("name", ["LMINF", "lminf", "LM_INF"])
    def test_selected_it_says_every_reason(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(vllm.version, "__version__", "0.99.0")
        monkeypatch.setattr(current_platform, "device_type", "tpu")
        monkeypatch.setenv("VLLM_ATTENTION_BACKEND", name)
        with pytest.raises(RuntimeError, match=r"0\.99\.0 is installed.*'tpu'"):
            plugin.register()


class TestImports:
    def test_package_and_kernels_do_not_import_vllm(self) -> None:
        """Nor does the module that holds the entry point: vLLM imports it while it loads itself."""
        import vllm_lminf.kernels

        kernels = [m.name for m in pkgutil.walk_packages(kernels_path(), "vllm_lminf.kernels.")]
        assert "vllm_lminf.kernels.reference" in kernels
        names = ["vllm_lminf", vllm_lminf.kernels.__name__, *kernels]
        rest = "errors", "nn", "pattern", "plugin", "plugin.config", "rope"
        names += [f"vllm_lminf.{name}" for name in rest]
        assert run_python(imported(names, "vllm")) == "[]\n"

    def test_pattern_and_settings_do_not_import_torch(self) -> None:
        names = [
            "vllm_lminf",
            "vllm_lminf.pattern",
            "vllm_lminf.plugin.config",
            "vllm_lminf.plugin",
        ]
        assert run_python(imported(names, "torch")) == "[]\n"

    def test_no_kernel_imports_the_oracle(self) -> None:
        names = ["vllm_lminf.kernels.reference"]
        assert run_python(imported(names, "vllm_lminf.kernels.oracle")) == "[]\n"

    def test_the_oracle_imports_no_kernel(self) -> None:
        names = ["vllm_lminf.kernels.oracle"]
        assert run_python(imported(names, "vllm_lminf.kernels.reference")) == "[]\n"


def kernels_path() -> list[str]:
    return list(importlib.import_module("vllm_lminf.kernels").__path__)


def imported(names: list[str], what: str) -> str:
    """Code that imports modules and prints which modules of a package that brought along."""
    return (
        f"import sys, importlib\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        f"print([m for m in sys.modules if m == {what!r} or m.startswith({what!r} + '.')])"
    )


def place(path: str) -> Any:
    """What a dotted path names: a module, or an attribute of one."""
    module, _, name = path.partition(":")
    return functools.reduce(getattr, name.split("."), importlib.import_module(module))


# Functions of vLLM that are called or wrapped, and the arguments they are given, in order.
FUNCTIONS = {
    "vllm.engine.arg_utils:EngineArgs.create_engine_config": "self",
    "vllm.engine.arg_utils:EngineArgs.create_speculative_config": "self",
    "vllm.platforms.cpu:CpuPlatform.get_attn_backend_cls": (
        "selected_backend attn_selector_config num_heads"
    ),
    "vllm.v1.core.sched.scheduler:Scheduler.make_stats": "self",
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output": (
        "self scheduler_output model_runner_output"
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._build_attention_metadata": "self",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.prepare_inputs": "self scheduler_output",
    "vllm.v1.worker.gpu.input_batch:InputBatch.make_dummy": "num_reqs num_tokens input_buffers",
    "vllm.v1.worker.gpu.warmup:_warmup_kernels": "model_runner",
    "vllm.utils.torch_utils:async_tensor_h2d": "data device dtype out",
    "vllm.utils.torch_utils:get_accelerator_view_from_cpu_tensor": "cpu_tensor",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens": "self grammar_output",
    "vllm.v1.metrics.loggers:StatLoggerManager.__init__": "self vllm_config engine_idxs",
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs": (
        "self request_id prompt params"
    ),
    "vllm.v1.engine.core:get_kv_cache_configs": "vllm_config kv_cache_specs available_memory",
    "vllm.transformers_utils.config:get_config": (
        "model trust_remote_code revision code_revision config_format"
    ),
    "vllm.transformers_utils.config:get_hf_text_config": "config",
    "vllm.transformers_utils.config:iter_rope_parameters": "config",
    "vllm.config:ModelConfig.get_model_arch_config": "self",
    "vllm.v1.attention.backends.registry:register_backend": "backend class_path",
    "vllm.v1.attention.backends.registry:AttentionBackendEnum.get_path": "self",
    "vllm.v1.attention.backends.registry:AttentionBackendEnum.get_class": "self",
    "vllm.config:ModelConfig.get_vocab_size": "self",
    "vllm.config:ModelConfig.get_hidden_size": "self",
    "vllm.distributed:get_pp_group": "",
    "vllm.forward_context:set_forward_context": "attn_metadata vllm_config num_tokens",
    "vllm.lora.layers:LoRAMapping": "index_mapping prompt_mapping is_prefill",
    "vllm.lora.model_manager:LoRAModelManager.set_adapter_mapping": "self mapping",
    "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry.register": (
        "kvcache_spec_cls manager_class uniform_type_base_spec"
    ),
    "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry.check_kv_cache_spec_registry": (
        "kv_cache_spec"
    ),
    "vllm.config.model:_get_and_verify_max_len": (
        "hf_config model_arch_config tokenizer_config max_model_len disable_sliding_window "
        "sliding_window"
    ),
    "vllm.config:get_current_vllm_config": "",
    "vllm.config:get_current_vllm_config_or_none": "",
    "vllm.config:get_layers_from_vllm_config": "vllm_config layer_type layer_names",
    "vllm.config:ModelConfig.get_num_attention_heads": "self parallel_config",
    "vllm.config:ModelConfig.get_num_kv_heads": "self parallel_config",
    "vllm.config:ModelConfig.get_head_size": "self",
    # No base class declares it: it is called as another backend's is.
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.do_kv_cache_update": (
        "self layer key value kv_cache slot_mapping"
    ),
    "vllm.v1.core.kv_cache_utils:resolve_block_hashes": (
        "block_hashes hash_block_size block_size supports_fine_grained_hash_lookup "
        "alignment_tokens"
    ),
    "vllm.v1.core.block_pool:BlockPool.get_cached_block": "self block_hash kv_cache_group_ids",
    "vllm.v1.core.block_pool:BlockPool.touch": "self blocks",
    "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager._remove_blocks_in_range": (
        "self request_id first_block last_block"
    ),
    "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager._get_num_evictable_blocks":
        "blocks",
}  # fmt: skip

# Classes of vLLM that are derived from. Whatever they call in ours must still look as ours does.
BASES = {
    "vllm_lminf.plugin.backend:LambdaAttentionBackend": (
        "vllm.v1.attention.backend:AttentionBackend",
        "get_name get_impl_cls get_builder_cls get_supported_kernel_block_sizes "
        "supported_kv_cache_layouts supports_kv_cache_dtype supports_combination "
        "supports_kv_connector customize_spec",
    ),
    "vllm_lminf.plugin.backend:LambdaAttentionImpl": (
        "vllm.v1.attention.backend:AttentionImpl",
        "process_weights_after_loading forward",
    ),
    "vllm_lminf.plugin.backend:LambdaMetadataBuilder": (
        "vllm.v1.attention.backend:AttentionMetadataBuilder",
        "__init__ build build_for_drafting get_cudagraph_support",
    ),
    "vllm_lminf.plugin.kv_cache:LambdaManager": (
        "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager",
        "get_num_skipped_tokens remove_skipped_blocks get_num_blocks_to_allocate "
        "add_local_computed_blocks pop_blocks_for_free find_longest_cache_hit",
    ),
    "vllm_lminf.plugin.kv_cache:LambdaSpec": (
        "vllm.v1.kv_cache_interface:SlidingWindowSpec",
        "max_admission_blocks_per_request is_uniform_with_collection",
    ),
    "vllm_lminf.plugin.metrics:LambdaStatLogger": (
        "vllm.v1.metrics.loggers:AggregateStatLoggerBase",
        "__init__ record log_engine_initialized",
    ),
}

# Fields that are read or set.
FIELDS = {
    "vllm.v1.metrics.stats:SchedulerStats": "num_kv_fetch_reqs_by_stage",
    "vllm.engine.arg_utils:EngineArgs": (
        "attention_backend attention_config additional_config hf_overrides "
        "model_loader_extra_config"
    ),
    "vllm.config:VllmConfig": (
        "model_config cache_config parallel_config speculative_config kv_transfer_config "
        "additional_config"
    ),
    "vllm.config.attention:AttentionConfig": "backend backend_per_kind",
    "vllm.config:ModelConfig": (
        "max_model_len runner dtype hf_overrides hf_config_path model revision code_revision "
        "config_format trust_remote_code hf_token disable_sliding_window"
    ),
    "vllm.config:CacheConfig": "cache_dtype block_size",
    "vllm.config:CompilationConfig": "static_forward_context",
    "vllm.forward_context:ForwardContext": "skip_compiled additional_kwargs",
    "vllm.config:ParallelConfig": (
        "decode_context_parallel_size prefill_context_parallel_size pipeline_parallel_size"
    ),
    "vllm.v1.kv_cache_interface:SlidingWindowSpec": (
        "block_size num_kv_heads head_size head_size_v dtype kv_quant_mode max_tp_shards "
        "page_size_padded sliding_window extra_retained_tokens"
    ),
    "vllm.v1.attention.backend:CommonAttentionMetadata": (
        "query_start_loc seq_lens num_reqs num_actual_tokens max_query_len block_table_tensor "
        "slot_mapping rswa_prefix_lens"
    ),
    "vllm.v1.worker.gpu.input_batch:InputBatch": "idx_mapping seq_lens prompt_lens",
    "vllm.v1.outputs:ModelRunnerOutput": "req_ids",
    "vllm.v1.core.kv_cache_utils:KVCacheBlock": "block_id ref_cnt is_null",
}  # fmt: skip

# Whatever else is looked up by name.
NAMES = [
    "vllm.config.cache:CacheDType",
    "vllm.config:ModelConfig.is_attention_free",
    "vllm.config:ModelConfig.is_encoder_decoder",
    "vllm.config:ModelConfig.is_hybrid",
    "vllm.config:ModelConfig.use_mla",
    "vllm.config:ModelConfig.uses_alibi",
    "vllm.config:ModelConfig.uses_mrope",
    "vllm.config:VllmConfig.max_in_flight_tokens",
    "vllm.config:VllmConfig.num_speculative_tokens",
    "vllm.config:VllmConfig.use_v2_model_runner",
    "vllm.config:ParallelConfig.use_ubatching",
    "vllm.config:ParallelConfig.local_world_size",
    "vllm.envs:environment_variables",
    "vllm.logger:init_logger",
    "vllm.model_executor.warmup.jit_warmup:VllmJitKernel.compile",
    "vllm.model_executor.warmup.jit_warmup:VllmJitKernel.get_warmup_keys",
    "vllm.model_executor.warmup.jit_warmup:VllmJitKernel.register_warmup",
    "vllm.platforms:current_platform.device_type",
    "vllm.platforms:current_platform.fp8_dtype",
    "vllm.platforms:current_platform.get_device_capability",
    "vllm.platforms:current_platform.is_cuda",
    "vllm.platforms:current_platform.is_cuda_alike",
    "vllm.v1.attention.backend:AttentionCGSupport.ALWAYS",
    "vllm.v1.attention.backend:AttentionCGSupport.NEVER",
    "vllm.v1.attention.backend:AttentionCGSupport.UNIFORM_BATCH",
    "vllm.v1.attention.backend:AttentionBackend.forward_includes_kv_cache_update",
    "vllm.v1.attention.backend:AttentionBackend.supported_dtypes",
    "vllm.v1.attention.backend:AttentionBackend.supported_kv_cache_dtypes",
    "vllm.v1.attention.backend:AttentionBackend.validate_configuration",
    "vllm.v1.attention.backend:AttentionType.DECODER",
    "vllm.v1.attention.backend:MultipleOf",
    "vllm.v1.attention.selector:_cached_get_attn_backend.cache_clear",
    "vllm.v1.kv_cache_interface:KVCacheLayout.LBHNC",
    "vllm.v1.worker.gpu.block_table:BlockTables.redirect_writes_to_null_block",
    "vllm.version:__version__",
]


class TestHooks:
    """Each place of vLLM that the plugin stands on, by name."""

    @pytest.mark.parametrize("path", FUNCTIONS)
    def test_function_takes_what_it_is_given(self, path: str) -> None:
        names = list(inspect.signature(place(path)).parameters)
        wanted = FUNCTIONS[path].split()
        assert names[: len(wanted)] == wanted

    @pytest.mark.parametrize("ours", BASES)
    def test_overridden_methods_are_called_as_before(self, ours: str) -> None:
        derived = place(ours)
        path, methods = BASES[ours]
        base = place(path)
        assert issubclass(derived, base)
        assert set(methods.split()) <= set(vars(derived)), "the table names one that isn't there"
        for method in methods.split():
            theirs = inspect.signature(getattr(base, method)).parameters
            assert list(inspect.signature(getattr(derived, method)).parameters) == list(theirs), (
                f"{path}.{method} takes other arguments now"
            )

    @pytest.mark.parametrize("path", FIELDS)
    def test_fields(self, path: str) -> None:
        fields = {field.name for field in dataclasses.fields(place(path))}
        assert set(FIELDS[path].split()) <= fields

    @pytest.mark.parametrize("path", NAMES)
    def test_name(self, path: str) -> None:
        place(path)

    def test_a_backend_is_registered_by_name(self) -> None:
        """`register_backend` makes a member of the enumeration from a string."""
        from vllm.v1.attention.backends.registry import register_backend

        assert "backend" in inspect.signature(register_backend).parameters
        member = patches.backend_member()
        assert AttentionBackendEnum[BACKEND_NAME] is member
        with pytest.raises(ValueError, match="already exists"):
            register_backend(BACKEND_NAME, "some.other.Class")

    def test_cpu_platform_ignores_the_selected_backend(self) -> None:
        """Why its method is wrapped. Should this fail, the wrapper is no longer needed."""
        config = AttentionSelectorConfig(64, torch.bfloat16, "auto", 16)
        path = CpuPlatform.get_attn_backend_cls(patches.backend_member(), config)
        assert path == AttentionBackendEnum.CPU_ATTN.get_path()

    def test_statistics_carry_names_and_counts_between_processes(self) -> None:
        """`unload` finds, behind vLLM's own encoding, what `make_stats` put in."""
        stats = SchedulerStats(num_kv_fetch_reqs_by_stage={"in_progress": 2, BLOCKS_PINNED: 3})
        sent = MsgpackEncoder().encode(EngineCoreOutputs(scheduler_stats=stats))
        received = MsgpackDecoder(EngineCoreOutputs).decode(sent).scheduler_stats
        assert metrics.unload(received) == {BLOCKS_PINNED: 3}
        assert received.num_kv_fetch_reqs_by_stage == {"in_progress": 2}
        assert metrics.unload(received) == {}

    def test_a_steps_output_takes_counts_along_between_processes(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What a worker adds to it is there in the engine's process."""
        from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

        counts = SimpleNamespace(read=lambda: [7, 1])
        patches.wrap_outputs()
        monkeypatch.setattr(SearchCounts, "latest_step", None)
        assert not hasattr(ModelRunnerOutput([], {}), metrics.COUNTS)
        monkeypatch.setattr(SearchCounts, "latest_step", counts)
        arrived = pickle.loads(pickle.dumps(ModelRunnerOutput(["a"], {"a": 0})))
        assert getattr(arrived, metrics.COUNTS) == [7, 1]
        assert arrived == ModelRunnerOutput(["a"], {"a": 0})
        assert not hasattr(EMPTY_MODEL_RUNNER_OUTPUT, metrics.COUNTS)

    def test_a_stat_logger_of_the_entry_point_group_overrides_disable_log_stats(self) -> None:
        """Why that group isn't used. Should this fail, it may serve."""
        from vllm.v1.engine.async_llm import AsyncLLM

        source = inspect.getsource(AsyncLLM.__init__)
        assert "custom_stat_loggers.extend(load_stat_logger_plugin_factories())" in source
        assert "self.log_stats = log_stats or has_custom_loggers" in source

    def test_selector_config_is_what_a_backend_validates(self) -> None:
        """The wrapper hands its fields to `validate_configuration` by name."""
        config = AttentionSelectorConfig(64, torch.bfloat16, "auto", 16)
        backend = patches.backend_member().get_class()
        assert backend.validate_configuration(device_capability=None, **config._asdict()) == []

    def test_both_model_runners_ask_the_backend_for_its_spec(self) -> None:
        from vllm.v1.worker import utils

        assert "customize_spec" in inspect.getsource(utils.customize_attention_spec)
        for runner in ("gpu_model_runner", "gpu.attn_utils"):
            module = importlib.import_module(f"vllm.v1.worker.{runner}")
            assert "customize_attention_spec" in inspect.getsource(module), runner

    def test_the_newer_runner_hands_prompts_lengths_on(self) -> None:
        """From a batch to the metadata of every backend, once the batch has them."""
        from vllm.v1.worker.gpu import attn_utils
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner
        from vllm.v1.worker.gpu.model_states.default import DefaultModelState
        from vllm.v1.worker.gpu.states import RequestState

        told = "rswa_prefix_lens=input_batch.prompt_lens"
        assert told in inspect.getsource(DefaultModelState.prepare_attn)
        told = "rswa_prefix_lens=rswa_prefix_lens"
        assert told in inspect.getsource(attn_utils.build_attn_metadata)
        known = "prompt_lens = self.req_states.prompt_len.gpu[idx_mapping]"
        assert known in inspect.getsource(GPUModelRunner.prepare_inputs)
        assert "self.prompt_len = UvaBackedTensor(" in inspect.getsource(RequestState.__init__)

    def test_the_newer_runners_warm_up_draws_from_one_pool(self) -> None:
        """Why its blocks are sent to the null block. Should this fail, that may be needless."""
        from vllm.v1.worker.gpu import warmup

        source = inspect.getsource(warmup._warmup_kernels)
        assert source.count("next_block_id := next_block_id + num_blocks") == 1
        assert "model_runner.kv_cache_config.num_blocks - 1" in source

    def test_a_model_with_adapters_knows_their_manager(self) -> None:
        from vllm.lora.model_manager import LoRAModelManager

        assert "self.model.lora_manager = self" in inspect.getsource(LoRAModelManager)

    def test_models_are_loaded_before_specs_are_asked_for_and_memory_is_measured(self) -> None:
        """When the rotation of layers is found."""
        from vllm.v1.engine.core import EngineCore

        source = inspect.getsource(EngineCore._initialize_kv_caches)
        assert source.index("get_kv_cache_specs()") < source.index("determine_available_memory()")

    def test_spec_registry_fills_itself_only_while_it_is_empty(self) -> None:
        """Why vLLM's own registration is called first; run where nothing is registered yet."""
        count = (
            "from vllm.v1 import kv_cache_spec_registry as r\n"
            "print(len(r._REGISTRY_KVCACHESPEC_LIST))\n"
            "r.KVCacheSpecRegistry.check_kv_cache_spec_registry({})\n"
            "print(len(r._REGISTRY_KVCACHESPEC_LIST))"
        )
        before, after = map(int, run_python(count).split())
        assert before == 0
        assert after > 3

    def test_long_context_variable_is_read_when_it_is_used(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for value, meaning in (("1", True), ("0", False)):
            monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", value)
            assert vllm.envs.VLLM_ALLOW_LONG_MAX_MODEL_LEN is meaning

    def test_variables_are_read_beside_an_engine_that_runs(self, model_path: str) -> None:
        """Which has made vLLM remember them: a max_model_len beyond the trained one was refused."""
        plugin.register()
        vllm.envs.enable_envs_cache()
        try:
            args = EngineArgs(model_path, attention_backend="LMINF", max_model_len=100_000)
            assert args.create_engine_config().model_config.max_model_len == 100_000
        finally:
            vllm.envs.disable_envs_cache()
