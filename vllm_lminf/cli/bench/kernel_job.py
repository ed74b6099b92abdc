"""What ``bench kernel`` is asked to time, and what it answers: plain data that fits in JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

N_GLOBALS = (0, 10, 100)
SHOWN_N_GLOBAL = 10
"""The one whose time is shown; of the others the ratio is."""

VLLM_WINDOW = "vLLM, same window"
VLLM_FULL = "vLLM, full attention"
PARTS = ("LMINF, decodes alone", "LMINF, prefill alone")
"""The contenders that a mixed batch is compared with."""

VLLM_ROTARY = "vLLM"
LMINF_ROTARY = "LMINF"


def lminf(n_global: int) -> str:
    """The name of LMINF with so many global tokens."""
    return f"LMINF, n_global {n_global}"


class Heads(NamedTuple):
    """The heads of an attention layer."""

    num_heads: int
    num_kv_heads: int
    head_size: int

    def __str__(self) -> str:
        return "/".join(map(str, self))


@dataclass(frozen=True)
class Case:
    """A batch: ``decodes`` requests with one query each, and, where ``prefill`` is not 0, one more
    with a chunk of so many queries. All are as long as the job says."""

    heads: Heads
    decodes: int = 0
    prefill: int = 0

    @property
    def is_mixed(self) -> bool:
        return self.decodes > 0 and self.prefill > 0

    @property
    def batch(self) -> str:
        """Requests × tokens of the step."""
        decodes = f"{self.decodes} × 1" if self.decodes else ""
        prefill = f"1 × {self.prefill}" if self.prefill else ""
        return ", ".join(filter(None, (decodes, prefill)))


@dataclass(frozen=True)
class KernelJob:
    """The cases, and what they have in common.

    Attributes:
        cases: the batches, those of the same heads next to each other.
        rotated_tokens: numbers of tokens whose rotation is timed, for the heads of every case.
        window: tokens that a query sees, its own included.
        length: tokens of every request.
        rounds: how often every contender has its turn.
        turn_seconds: a turn repeats its call until about this much time has passed.
        threads: what the kernels may compute with.
        dtype: of queries, cache and output.
    """

    cases: list[Case]
    rotated_tokens: list[int]
    window: int
    length: int
    rounds: int
    turn_seconds: float
    threads: int
    dtype: str

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> KernelJob:
        """Rebuild a job from what ``dataclasses.asdict`` made of it."""
        return cls(**{**data, "cases": [_case(item) for item in data["cases"]]})

    @property
    def shapes(self) -> list[Heads]:
        """The heads of the cases, each once."""
        return list(dict.fromkeys(case.heads for case in self.cases))

    @property
    def num_steps(self) -> int:
        """How much there is to do: a step is one check, or one round of one row."""
        rows = len(self.cases) + len(self.shapes) * len(self.rotated_tokens)
        return rows * (1 + self.rounds)


def full_job(
    *, window: int, length: int, rounds: int, threads: int, dtype: str, chunk: int
) -> KernelJob:
    """The shapes of a small and of a middle-sized model, in decode, prefill and both at once."""
    return KernelJob(
        cases=_cases([Heads(9, 3, 64), Heads(32, 8, 128)], decodes=8, chunk=chunk),
        rotated_tokens=[1, 8, 64, 2048],
        window=window,
        length=length,
        rounds=rounds,
        turn_seconds=0.02,
        threads=threads,
        dtype=dtype,
    )


def small_job(
    *, window: int, length: int, rounds: int, threads: int, dtype: str, chunk: int
) -> KernelJob:
    """Shapes so small that only the checks mean something."""
    return KernelJob(
        cases=_cases([Heads(4, 2, 64), Heads(3, 1, 32)], decodes=3, chunk=chunk),
        rotated_tokens=[1, 8],
        window=window,
        length=length,
        rounds=rounds,
        turn_seconds=0.0,
        threads=threads,
        dtype=dtype,
    )


def _cases(shapes: list[Heads], *, decodes: int, chunk: int) -> list[Case]:
    return [
        case
        for heads in shapes
        for case in (
            Case(heads, decodes=1),
            Case(heads, decodes=decodes),
            Case(heads, prefill=chunk),
            Case(heads, decodes=decodes, prefill=chunk),
        )
    ]


@dataclass(frozen=True)
class CaseResult:
    """What was measured of one batch, by contender.

    Attributes:
        case: the batch.
        errors: distance from the oracle, relative and in norm, over sampled queries.
        agreement: the same between LMINF without global tokens and vLLM at the same window, over
            all queries.
        seconds: of one call, in every round.
        kv_bytes: keys and values that must be read.
        flops: of the products of queries and keys, and of weights and values.
    """

    case: Case
    errors: dict[str, float]
    agreement: float
    seconds: dict[str, list[float]]
    kv_bytes: dict[str, int]
    flops: dict[str, int]


@dataclass(frozen=True)
class RotationResult:
    """What was measured of the rotation of so many tokens.

    ``errors`` are against a float64 rotation, relative and in norm; ``seconds`` are of one layer
    out of a step of ``NUM_ROTATED_LAYERS``, in every round.
    """

    heads: Heads
    tokens: int
    errors: dict[str, float]
    seconds: dict[str, list[float]]


NUM_ROTATED_LAYERS = 30
"""Layers in a step that is timed: what follows from the positions alone is computed once for all,
as it is when a model runs."""


@dataclass(frozen=True)
class KernelResult:
    """All that was measured, and with what.

    ``instructions`` is the variant that vLLM's kernel ran, ``threads`` what torch computed with.
    """

    cases: list[CaseResult]
    rotations: list[RotationResult]
    instructions: str
    threads: int

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> KernelResult:
        """Rebuild a result from what ``dataclasses.asdict`` made of it."""
        return cls(
            **{
                **data,
                "cases": [CaseResult(**{**c, "case": _case(c["case"])}) for c in data["cases"]],
                "rotations": [
                    RotationResult(**{**r, "heads": Heads(*r["heads"])}) for r in data["rotations"]
                ],
            }
        )


def _case(data: dict[str, Any]) -> Case:
    return Case(**{**data, "heads": Heads(*data["heads"])})
