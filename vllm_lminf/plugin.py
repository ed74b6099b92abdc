"""The entry point that vLLM calls in each of its processes, and more than once."""

import os


def register() -> None:
    """Makes LMINF known to vLLM. Changes nothing for an engine that doesn't select it.

    Raises:
        RuntimeError: LMINF is selected by its variable, and this vLLM can't host it.
    """
    from vllm.logger import init_logger

    from vllm_lminf import compat
    from vllm_lminf.config import BACKEND_NAME, BACKEND_VARIABLE

    if reasons := compat.unsupported_environment():
        message = f"{BACKEND_NAME} is not available: {'; '.join(reasons)}"
        if os.environ.get(BACKEND_VARIABLE, "").upper() == BACKEND_NAME:
            raise RuntimeError(message)
        init_logger("vllm.lminf").debug(message)
        return
    from vllm_lminf.startup import prepare

    compat.install(prepare)
