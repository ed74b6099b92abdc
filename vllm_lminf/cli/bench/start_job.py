"""What ``bench start`` is asked to run, and what it answers: plain data that fits in JSON."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal, get_args

Kind = Literal["vLLM alone", "LMINF", "LMINF, first start"]
KINDS: list[Kind] = list(get_args(Kind))


@dataclass(frozen=True)
class StartJob:
    """One start. ``begin`` is the clock when the process was asked for; all processes of a machine
    share that clock."""

    model: str
    dtype: str
    begin: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class StartResult:
    """Seconds of every start, kind by kind, round after round."""

    seconds: dict[Kind, list[float]]
