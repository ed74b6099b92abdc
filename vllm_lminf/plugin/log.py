"""LMINF's lines in vLLM's log: each once an engine, from one process of each machine.

vLLM's own ``info_once`` and ``warning_once`` say a line once a process, and a process may start one
engine after another.
"""

import logging
import weakref
from typing import Any

from vllm.config import CompilationConfig, VllmConfig
from vllm.distributed.parallel_state import is_local_first_rank
from vllm.logger import init_logger

logger = init_logger("vllm.lminf")


class _Said:
    """What was told of the engine that is being built. Its models, a draft model among them, have
    one compilation configuration in common."""

    def __init__(self) -> None:
        self._sentences: set[str] = set()
        self._engine: weakref.ref[CompilationConfig] | None = None

    def is_new(self, engine: VllmConfig, sentence: str) -> bool:
        if self._engine is None or self._engine() is not engine.compilation_config:
            self._engine = weakref.ref(engine.compilation_config)
            self._sentences.clear()
        before = len(self._sentences)
        self._sentences.add(sentence)
        return len(self._sentences) > before


_said = _Said()


def info(engine: VllmConfig, text: str, *arguments: Any) -> None:
    """Tells the user something about an engine, unless that was told already."""
    _tell(logging.INFO, engine, text % arguments)


def warning(engine: VllmConfig, text: str, *arguments: Any) -> None:
    """The same, as a warning."""
    _tell(logging.WARNING, engine, text % arguments)


def _tell(level: int, engine: VllmConfig, sentence: str) -> None:
    if is_local_first_rank() and _said.is_new(engine, sentence):
        logger.log(level, "%s", sentence, stacklevel=3)  # the line names who told it
