"""What ``bench engine`` is asked to run, and what it answers: plain data that fits in JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm_lminf.cli.scoring_job import ENGINE_NAMES, DecodeRun, EngineName, PrefillStep
from vllm_lminf.pattern import cdiv


@dataclass(frozen=True)
class EngineJob:
    """Two engines on one text, at growing lengths.

    Attributes:
        model: folder of the checkpoint.
        dtype: of the model.
        text: a UTF-8 text file; None for random tokens.
        lengths: tokens, ascending; both engines run them.
        lminf_lengths: tokens, ascending; LMINF runs them too.
        chunk: tokens prefilled in one step.
        rounds: how often everything is prefilled.
        decode_rounds: how often everything is decoded.
        decode_tokens: tokens that are timed in each decode.
        lminf: settings of LMINF; n_local is among them.
    """

    model: str
    dtype: str
    text: str | None
    lengths: list[int]
    lminf_lengths: list[int]
    chunk: int
    rounds: int
    decode_rounds: int
    decode_tokens: int
    lminf: dict[str, int] = field(default_factory=dict)

    def lengths_of(self, engine: EngineName) -> list[int]:
        """What an engine runs, ascending."""
        if engine == "full":
            return self.lengths
        return sorted({*self.lengths, *self.lminf_lengths})

    def prompts_of(self, engine: EngineName) -> list[int]:
        """Lengths of the prompts that give an engine's times to prefill, ascending.

        The steps of the longest prompt tell the time to prefill any whole number of chunks; a
        length that ends inside a chunk needs a prompt of its own.
        """
        *shorter, longest = self.lengths_of(engine)
        return [n for n in shorter if n % self.chunk] + [longest]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return self.lengths_of("lminf")[-1]

    @property
    def num_steps(self) -> int:
        """How much there is to do: a step is one chunk, or one decode."""
        return sum(
            self.rounds * sum(cdiv(n, self.chunk) for n in self.prompts_of(engine))
            + self.decode_rounds * len(self.lengths_of(engine))
            for engine in ENGINE_NAMES
        )


@dataclass(frozen=True)
class PrefillRun:
    """One cold prompt: the state after each of its chunks. Its seconds are the engine's own; those
    in which the other had its turn are not among them."""

    tokens: int
    steps: list[PrefillStep]


@dataclass(frozen=True)
class EngineRuns:
    """All that one engine did, round after round.

    ``block_bytes`` are of a block in all layers together; ``start_seconds`` is the time from the
    engine's arguments to an engine that is ready.
    """

    prefill: list[PrefillRun]
    decode: list[DecodeRun]
    block_size: int
    block_bytes: int
    pool_blocks: int
    start_seconds: float


@dataclass(frozen=True)
class EngineResult:
    """All that was measured.

    ``agreement`` is the distance (root mean square) between the log-probabilities that the two
    engines give the tokens of a prompt inside the window.
    """

    runs: dict[EngineName, EngineRuns]
    agreement: float
    trained_length: int | None
    threads: int
    device: str

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> EngineResult:
        """Rebuild a result from what ``dataclasses.asdict`` made of it."""
        return cls(**{**data, "runs": {name: _runs(item) for name, item in data["runs"].items()}})


def _runs(data: dict[str, Any]) -> EngineRuns:
    prefill = [
        PrefillRun(run["tokens"], [PrefillStep(**step) for step in run["steps"]])
        for run in data["prefill"]
    ]
    return EngineRuns(
        **{**data, "prefill": prefill, "decode": [DecodeRun(**run) for run in data["decode"]]}
    )
