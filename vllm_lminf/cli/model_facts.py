"""What must be known of the model, and of a text, before an engine starts; read in a child process.

vLLM is asked, so that the trained length is the one that LMINF itself goes by, and in a process of
its own, so that its log does not mix with the command's output.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_lminf.cli.child import serve_job

if TYPE_CHECKING:
    from vllm.config import ModelConfig


@dataclass(frozen=True)
class FactsJob:
    """Which model and which UTF-8 text file, if any, to look at."""

    model: str
    text: str | None
    dtype: str


@dataclass(frozen=True)
class ModelFacts:
    """``trained_length`` in tokens, None if the model's config names none; ``kv_bytes_per_token``
    for all layers together; ``token_ids`` of the whole text, empty without one.
    """

    trained_length: int | None
    kv_bytes_per_token: int
    token_ids: list[int]


def kv_bytes_per_token(config: ModelConfig) -> int:
    """Return the bytes of keys and values that one token takes in all layers."""
    import torch

    layers = config.model_arch_config.total_num_hidden_layers
    itemsize = torch.empty((), dtype=config.dtype).element_size()
    return 2 * layers * config.get_total_num_kv_heads() * config.get_head_size() * itemsize


def read_facts(job: FactsJob) -> ModelFacts:
    """Read the model's config and tokenise the text, special tokens included as vLLM does."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.tokenizers import get_tokenizer

    from vllm_lminf.plugin import trained_length

    config = EngineArgs(model=job.model, dtype=job.dtype).create_model_config()
    token_ids: list[int] = []
    if job.text is not None:
        text = Path(job.text).read_text(encoding="utf-8")
        token_ids = list(get_tokenizer(job.model).encode(text))
    return ModelFacts(
        trained_length=trained_length.of(config).length,
        kv_bytes_per_token=kv_bytes_per_token(config),
        token_ids=token_ids,
    )


def main() -> None:
    """Read a ``FactsJob`` from stdin and answer with ``ModelFacts``."""
    with serve_job() as (data, answers):
        answers.send("result", result=asdict(read_facts(FactsJob(**data))))


if __name__ == "__main__":
    main()
