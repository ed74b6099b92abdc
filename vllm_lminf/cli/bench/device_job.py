"""What ``bench kernel --device cuda`` is asked to time, and what it answers: plain data that fits
in JSON."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any, Literal

from vllm_lminf.cli.bench.kernel_job import N_GLOBALS, SHOWN_N_GLOBAL, Heads

Kind = Literal["decode", "prefill", "context"]

WINDOWED = "FlashAttention, same window"
FLEX = "FlexAttention, same window"
FULL = "PyTorch, full attention"

READ, COPY, PRODUCT = "read", "copy", "matrix product"
"""What the device is seen to achieve, a second: bytes read, bytes read and written, operations."""


def triton(n_global: int) -> str:
    """The name of LMINF's Triton kernel with so many global tokens."""
    return f"LMINF, n_global {n_global}"


XFORMERS = f"LMINF through xformers, n_global {SHOWN_N_GLOBAL}"
FLASH = f"LMINF through FlashAttention, n_global {SHOWN_N_GLOBAL}"
SHOWN = triton(SHOWN_N_GLOBAL)
CONTENDERS = (*map(triton, N_GLOBALS), XFORMERS, FLASH, WINDOWED, FLEX, FULL)
OTHERS_OWN = (WINDOWED, FLEX, FULL)
"""The contenders that are others' work alone."""
OTHER_PATHS = (XFORMERS, FLASH)
"""The contenders that compute LMINF's attention by others' kernels."""


@dataclass(frozen=True)
class DeviceCase:
    """A batch: so many requests with so many queries each.

    Attributes:
        kind: what it is for: a decode step, a chunk of a prompt, or a decode step over a context
            of another length, which is to cost the same.
        requests: how many.
        queries: of every request, its latest tokens.
        length: tokens of every request, these included.
    """

    kind: Kind
    requests: int
    queries: int
    length: int


@dataclass(frozen=True)
class DeviceJob:
    """The cases, and what they have in common.

    Attributes:
        cases: the batches.
        device: torch's name.
        heads: of every layer.
        window: tokens that a query sees, its own included.
        block_size: tokens of a block of the cache.
        dtype: of queries, cache and output.
        rounds: how often every contender has its turn.
        turn_seconds: a turn repeats its call until about this much time has passed.
        probe_bytes: of the tensor that is read and copied, to learn what the device achieves.
    """

    cases: list[DeviceCase]
    device: str
    heads: Heads
    window: int
    block_size: int
    dtype: str
    rounds: int
    turn_seconds: float
    probe_bytes: int

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> DeviceJob:
        """Rebuild a job from what ``dataclasses.asdict`` made of it."""
        cases = [DeviceCase(**case) for case in data["cases"]]
        return cls(**{**data, "cases": cases, "heads": Heads(*data["heads"])})

    def of_kind(self, kind: Kind) -> list[DeviceCase]:
        """The cases of a kind."""
        return [case for case in self.cases if case.kind == kind]

    @property
    def num_steps(self) -> int:
        """How much there is to do: a step is one check, or one round of one row."""
        return (len(self.cases) + 1) * (1 + self.rounds)


def full_device_job(*, window: int, length: int, rounds: int, dtype: str) -> DeviceJob:
    """A layer of a model of 8 billion parameters: decode steps, chunks, and long contexts."""
    return DeviceJob(
        cases=_cases(
            batches=[1, 2, 4, 8, 16, 32, 64, 128, 256],
            chunks=[2048, 4096, 8192],
            contexts=[length, 4 * length, 16 * length, 128 * length],
            context_requests=32,
            length=length,
        ),
        device="cuda",
        heads=Heads(32, 8, 128),
        window=window,
        block_size=16,
        dtype=dtype,
        rounds=rounds,
        turn_seconds=0.01,
        probe_bytes=2**30,
    )


def small_device_job(*, window: int, length: int, rounds: int, dtype: str) -> DeviceJob:
    """Shapes so small that only the checks mean something."""
    return DeviceJob(
        cases=_cases(
            batches=[1, 3],
            chunks=[20],
            contexts=[length, 256 * length],
            context_requests=2,
            length=length,
        ),
        device="cuda",
        heads=Heads(4, 2, 32),
        window=window,
        block_size=16,
        dtype=dtype,
        rounds=rounds,
        turn_seconds=0.0,
        probe_bytes=2**12,
    )


def _cases(
    *,
    batches: list[int],
    chunks: list[int],
    contexts: list[int],
    context_requests: int,
    length: int,
) -> list[DeviceCase]:
    return [
        *(DeviceCase("decode", count, 1, length) for count in batches),
        *(DeviceCase("prefill", 1, chunk, length + chunk) for chunk in chunks),
        *(DeviceCase("context", context_requests, 1, context) for context in contexts),
    ]


@dataclass(frozen=True)
class DeviceCaseResult:
    """What was measured of one batch, by contender.

    Attributes:
        case: the batch.
        errors: distance from the oracle, relative and in norm, over sampled queries.
        seconds: of one call, in every round.
        kv_bytes: keys and values that must be read.
        flops: of the products of queries and keys, and of weights and values.
        absent: contenders that didn't take part, with the reason.
    """

    case: DeviceCase
    errors: dict[str, float]
    seconds: dict[str, list[float]]
    kv_bytes: dict[str, int]
    flops: dict[str, int]
    absent: dict[str, str]


@dataclass(frozen=True)
class DeviceResult:
    """All that was measured, and with what.

    Attributes:
        cases: one for each of the job's.
        achieved: what the device achieves, a second, in every round; by `READ`, `COPY` and
            `PRODUCT`.
        device: its name, as its driver gives it.
        libraries: versions of what was used.
    """

    cases: list[DeviceCaseResult]
    achieved: dict[str, list[float]]
    device: str
    libraries: dict[str, str]

    @property
    def bandwidth(self) -> float:
        """Bytes a second that can be achieved: the better of reading and copying."""
        return max(statistics.median(self.achieved[name]) for name in (READ, COPY))

    @property
    def throughput(self) -> float:
        """Operations a second that can be achieved."""
        return statistics.median(self.achieved[PRODUCT])

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> DeviceResult:
        """Rebuild a result from what ``dataclasses.asdict`` made of it."""
        cases = [DeviceCaseResult(**{**c, "case": DeviceCase(**c["case"])}) for c in data["cases"]]
        return cls(**{**data, "cases": cases})
