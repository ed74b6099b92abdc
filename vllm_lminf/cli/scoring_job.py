"""What one scoring engine is asked to do, and what it answers: plain data that fits in JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

EngineName = Literal["full", "lminf", "server"]
SERVER: EngineName = "server"
ENGINE_NAMES: tuple[EngineName, ...] = tuple(n for n in get_args(EngineName) if n != SERVER)

NLL_WINDOW = 1024
"""The NLL at a length is the mean over at most this many tokens before it."""

NLL_BUCKET = 256
"""Tokens per point of the NLL curve over the whole text."""


@dataclass(frozen=True)
class ScoringJob:
    """One engine's work: score ``token_ids`` once, then decode after each of ``lengths``.

    ``kv_cache_bytes`` is the size of the KV cache; ``hf_overrides`` changes the model's config
    (empty for LMINF); ``lminf`` holds the LMINF settings that the user gave, and no others.
    ``compile`` None leaves it to the platform: no compilation on a CPU, where it takes minutes.
    ``url`` is where a server's ``/completions`` is, which scores in an engine's place, and
    ``served_model`` its name for the model.
    """

    engine: EngineName
    model: str
    dtype: str
    token_ids: list[int]
    lengths: list[int]
    chunk: int
    decode_tokens: int
    kv_cache_bytes: int
    compile: bool | None = None
    hf_overrides: dict[str, Any] = field(default_factory=dict)
    lminf: dict[str, int] = field(default_factory=dict)
    url: str | None = None
    served_model: str | None = None


@dataclass(frozen=True)
class PrefillStep:
    """The state after one prefill chunk: ``tokens`` done, ``seconds`` since the first began."""

    tokens: int
    seconds: float
    kv_blocks: int


@dataclass(frozen=True)
class DecodeRun:
    """Greedy decoding after the first ``length`` tokens of the text.

    ``step_ms`` are the milliseconds from one token to the next; ``kv_blocks`` the blocks that the
    request held near its end; ``cached_tokens`` how much of the prompt the prefix cache supplied.
    """

    length: int
    step_ms: list[float]
    kv_blocks: int
    cached_tokens: int


@dataclass(frozen=True)
class LengthFigures:
    """One engine's row of the table.

    ``nll`` is in nats per token, ``kv_blocks`` the most that the request held at once while it
    reached this length and decoded there. A server tells the first alone.
    """

    length: int
    nll: float
    prefill_tokens_per_s: float | None = None
    decode_ms_per_token: float | None = None
    kv_blocks: int | None = None


@dataclass(frozen=True)
class ScoringResult:
    """All that one engine measured.

    ``nll_curve`` holds a mean per ``NLL_BUCKET`` tokens, ``torch_threads`` is the worker's. Of a
    server there are the NLL and the time alone.
    """

    engine: EngineName
    figures: list[LengthFigures]
    nll_curve: list[float]
    total_seconds: float
    prefill_steps: list[PrefillStep] = field(default_factory=list)
    decode_runs: list[DecodeRun] = field(default_factory=list)
    block_size: int | None = None
    pool_blocks: int | None = None
    eager: bool | None = None
    start_seconds: float | None = None
    scoring_seconds: float | None = None
    torch_threads: int | None = None
    device: str | None = None

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ScoringResult:
        """Rebuild a result from what ``dataclasses.asdict`` made of it."""
        return cls(
            **{
                **data,
                "figures": [LengthFigures(**item) for item in data["figures"]],
                "prefill_steps": [PrefillStep(**item) for item in data["prefill_steps"]],
                "decode_runs": [DecodeRun(**item) for item in data["decode_runs"]],
            }
        )


def nll_at(nll: Sequence[float], length: int) -> float:
    """Return the mean NLL of the last ``min(NLL_WINDOW, length / 2)`` of ``length`` tokens.

    ``nll[k]`` is the NLL of token ``k + 1``: nothing predicts the first token.
    """
    window = min(NLL_WINDOW, length // 2)
    values = nll[length - 1 - window : length - 1]
    return sum(values) / len(values)


def nll_curve(nll: Sequence[float]) -> list[float]:
    """Return the mean NLL of every whole run of ``NLL_BUCKET`` tokens."""
    whole = len(nll) // NLL_BUCKET * NLL_BUCKET
    return [sum(nll[i : i + NLL_BUCKET]) / NLL_BUCKET for i in range(0, whole, NLL_BUCKET)]


def seconds_to_reach(steps: Sequence[PrefillStep], length: int) -> float:
    """Return the seconds it took to prefill ``length`` tokens.

    Inside a chunk the time is taken as proportional to the tokens.
    """
    tokens, seconds = 0, 0.0
    for step in steps:
        if step.tokens >= length:
            share = (length - tokens) / (step.tokens - tokens)
            return seconds + share * (step.seconds - seconds)
        tokens, seconds = step.tokens, step.seconds
    raise ValueError(f"{length} tokens were asked about, {tokens} were prefilled")
