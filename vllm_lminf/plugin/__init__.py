"""The entry point that vLLM calls in each of its processes, and more than once."""

import logging
import os


def register() -> None:
    """Makes LMINF known to vLLM. Changes nothing for an engine that doesn't select it.

    Raises:
        RuntimeError: LMINF is selected by its variable, or may be meant, and this vLLM can't host
            it.
    """
    from vllm.logger import init_logger

    from vllm_lminf.plugin import config, hosts

    if reasons := hosts.unsupported_environment():
        message = f"{config.BACKEND_NAME} is not available: {'; '.join(reasons)}"
        asked = config.is_backend_name(os.environ.get(config.BACKEND_VARIABLE, ""))
        question = config.question_of_variables(os.environ)
        if asked or question is not None:
            raise RuntimeError(message if asked else f"{question} {message}")
        # Whoever asks for it by an option is told then. Where that can't be, it is told to all.
        told_later = hosts.explain_absence(message)
        level = logging.DEBUG if told_later else logging.WARNING
        init_logger("vllm.lminf").log(level, message)
        return
    from vllm_lminf.plugin import patches
    from vllm_lminf.plugin.checks import prepare

    patches.install(prepare)
