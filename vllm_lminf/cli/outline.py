"""A model as vLLM builds it, without its weights: what is to be known of its layers before anything
is loaded. In a process that runs no engine: modules that vLLM keeps for later models are made here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_lminf.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import nn
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

LARGE = 1 << 20
"""Numbers in a tensor that is made without memory."""

AMPLE = 1 << 60
"""Bytes of memory in which any request fits: for plans, by which nothing is allocated."""


def parse_engine_arguments(model: str, words: Sequence[str]) -> EngineArgs:
    """The arguments of a server's engine.

    Args:
        model: folder or name of the checkpoint.
        words: options of ``vllm serve``, as far as they are for the engine.

    Raises:
        ValueError: vLLM doesn't know an option, or what it is given.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> Any:
            raise ValueError(
                f"{message} (options that this command doesn't have are taken for those of "
                "`vllm serve` that say how its engine runs)"
            )

    parser = AsyncEngineArgs.add_cli_args(Parser(add_help=False))
    given = parser.parse_args(list(words))
    given.model = model
    arguments: EngineArgs = AsyncEngineArgs.from_cli_args(given)
    return arguments


def configure(arguments: EngineArgs) -> VllmConfig:
    """The configuration of a server's engine, LMINF's checks included where it is selected."""
    from vllm.usage.usage_lib import UsageContext

    config: VllmConfig = arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)
    return config


def build(config: VllmConfig) -> nn.Module:
    """The model of an engine, without memory for what is large; vLLM then finds its attention
    layers in the configuration, whose block size is settled.

    Raises:
        UnsupportedError: LMINF doesn't serve it, or vLLM can't build it here.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.platforms import current_platform
    from vllm.utils.torch_utils import set_default_torch_dtype

    with ExitStack() as stack:
        stack.enter_context(set_current_vllm_config(config))
        _join_a_world_of_one()
        stack.enter_context(set_default_torch_dtype(config.model_config.dtype))
        stack.enter_context(_without_weights())
        try:
            model: nn.Module = initialize_model(config)
        except UnsupportedError:
            raise
        except Exception as error:  # of whatever kind: the model's code is anybody's
            reason = f"vLLM can't build this model here: {type(error).__name__}: {error}"
            raise UnsupportedError([reason]) from error
    current_platform.update_block_size_for_backend(config)
    return model


def _join_a_world_of_one() -> None:
    """vLLM's layers ask how many processes share them."""
    from vllm.distributed import (
        ensure_model_parallel_initialized,
        init_distributed_environment,
        model_parallel_is_initialized,
    )

    if not model_parallel_is_initialized():
        folder = tempfile.mkdtemp(prefix="vllm-lminf-")
        store = Path(folder) / "store"
        init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        store.unlink(missing_ok=True)
        Path(folder).rmdir()


def _without_weights() -> AbstractContextManager[Any]:
    """While it lasts, large tensors are made on torch's device "meta", and all others, which a
    model may look into while it is built, on the CPU."""
    import torch
    from torch.overrides import TorchFunctionMode

    makers = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)

    class WithoutWeights(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            if func in makers:
                outline = func(*args, **{**kwargs, "device": "meta"})
                if outline.numel() >= LARGE:
                    return outline
                kwargs = {"device": "cpu", **kwargs}
            return func(*args, **kwargs)

    return WithoutWeights()
