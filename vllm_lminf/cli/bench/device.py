"""The child process of ``bench kernel --device cuda``: LMINF's kernels beside others', on the same
data.

Every contender of a case is first compared with the oracle; what is off stops the run before
anything of that case is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version

import torch

from vllm_lminf.cli.bench.device_contenders import AbsentError, Contender, Stage, makers
from vllm_lminf.cli.bench.device_data import Batch, Layer
from vllm_lminf.cli.bench.device_job import (
    COPY,
    OTHERS_OWN,
    PRODUCT,
    READ,
    DeviceCase,
    DeviceCaseResult,
    DeviceJob,
    DeviceResult,
)
from vllm_lminf.cli.bench.kernel_job import N_GLOBALS
from vllm_lminf.cli.bench.turns import seconds_of_a_call, time_in_turns
from vllm_lminf.cli.child import Answers, serve_job

LIBRARIES = ("torch", "triton", "xformers", "vllm", "flash-attn")
TOLERANCES = {torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""How far a kernel's output may be from the oracle's, relative and in norm: about three times what
rounding makes of it. One of 4096 keys that is left out moves the output by 0.016."""

_FLUSH_BYTES = 2**28
"""More than any device keeps near its processors: what a call left there is gone after reading so
much. Reading leaves nothing to be written back while the next call is timed."""
_SLEEP_CYCLES = 2_000_000
"""About a millisecond, in which the host hands over all of a call's launches."""


class CheckError(RuntimeError):
    """A kernel computes something else than it should."""


class Clock:
    """Seconds of a call, as the device counts them, with nothing left over from the call before."""

    def __init__(self, device: torch.device) -> None:
        self._flushed = None
        if device.type == "cuda":
            self._flushed = torch.zeros(_FLUSH_BYTES // 4, dtype=torch.int32, device=device)

    def __call__(self, run: Callable[[], object], repeats: int) -> float:
        """The mean of so many calls."""
        if self._flushed is None:
            return seconds_of_a_call(run, repeats)
        pairs = []
        for _ in range(repeats):
            begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flushed.max()
            torch.cuda._sleep(_SLEEP_CYCLES)
            begin_event.record()
            run()
            end_event.record()
            pairs.append((begin_event, end_event))
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in pairs) / repeats / 1000


def checked_contenders(
    batch: Batch, stage: Stage
) -> tuple[dict[str, Contender], dict[str, float], dict[str, str]]:
    """The contenders of a batch, how far they are from the oracle, and who is absent and why.

    Raises:
        CheckError: one computes something else than it should.
    """
    contenders: dict[str, Contender] = {}
    errors: dict[str, float] = {}
    absent: dict[str, str] = {}
    tolerance = TOLERANCES[stage.layer.dtype]
    for name, make in makers(batch):
        try:
            contender = make(batch, stage)
            output = _first_run(name, contender).reshape(batch.query.shape)
        except AbsentError as error:
            absent[name] = str(error)
            continue
        errors[name] = batch.error(output, contender.pattern)
        if not errors[name] <= tolerance:
            raise CheckError(
                f"{batch.case}: {name} is off by {errors[name]:.2g} (relative, in norm), and no "
                f"more than {tolerance:.2g} can be rounding: nothing of it is timed"
            )
        contenders[name] = contender
    return contenders, errors, absent


def _first_run(name: str, contender: Contender) -> torch.Tensor:
    """A contender's output. What others' libraries don't serve is told, and stops nothing."""
    try:
        return contender.run()
    except (RuntimeError, NotImplementedError) as error:
        if name not in OTHERS_OWN:
            raise
        raise AbsentError(f"it fails: {str(error).splitlines()[0]}") from error


def measure_case(
    case: DeviceCase, stage: Stage, job: DeviceJob, clock: Clock, on_step: Callable[[], None]
) -> DeviceCaseResult:
    """Check every contender of a case, then time them in turns."""
    batch = Batch(case, stage.layer, job.window, max(N_GLOBALS))
    contenders, errors, absent = checked_contenders(batch, stage)
    on_step()
    runs = {name: contender.run for name, contender in contenders.items()}
    return DeviceCaseResult(
        case=case,
        errors=errors,
        seconds=time_in_turns(runs, job.rounds, job.turn_seconds, on_step, clock),
        kv_bytes={name: batch.kv_bytes(c.pattern) for name, c in contenders.items()},
        flops={name: batch.flops(c.pattern) for name, c in contenders.items()},
        absent=absent,
    )


def measure_device(
    layer: Layer, job: DeviceJob, clock: Clock, on_step: Callable[[], None]
) -> dict[str, list[float]]:
    """What the device achieves at reading, copying, and multiplying matrices."""
    source = torch.ones(job.probe_bytes // 4, dtype=torch.float32, device=layer.device)
    target = torch.empty_like(source)
    side = int((job.probe_bytes // 16) ** 0.5)
    matrix = layer.draw(side, 1)[:, 0, :1].expand(-1, side).contiguous()
    runs: dict[str, Callable[[], object]] = {
        READ: source.sum,
        COPY: lambda: target.copy_(source),
        PRODUCT: lambda: matrix @ matrix,
    }
    work = {READ: job.probe_bytes, COPY: 2 * job.probe_bytes, PRODUCT: 2 * side**3}
    on_step()
    seconds = time_in_turns(runs, job.rounds, job.turn_seconds, on_step, clock)
    return {name: [work[name] / s for s in seconds[name]] for name in runs}


@torch.inference_mode()
def measure(job: DeviceJob, answers: Answers) -> DeviceResult:
    """Measure every case.

    Raises:
        RuntimeError: the device isn't there.
    """
    if job.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device cuda: PyTorch finds no CUDA device here")
    done = 0

    def on_step() -> None:
        nonlocal done
        done += 1
        answers.send("progress", done=done)

    answers.send("phase", text="what the device achieves")
    layer = Layer(job)
    clock = Clock(layer.device)
    achieved = measure_device(layer, job, clock, on_step)
    stage, cases = Stage(layer, job.window), []
    for case in job.cases:
        answers.send("phase", text=f"{case.kind}, {case.requests} × {case.queries}, {case.length}")
        cases.append(measure_case(case, stage, job, clock, on_step))
    name = torch.cuda.get_device_name() if job.device == "cuda" else "cpu"
    return DeviceResult(cases, achieved, name, _libraries())


def _libraries() -> dict[str, str]:
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    """Read a ``DeviceJob`` from stdin and answer with a ``DeviceResult``."""
    with serve_job() as (data, answers):
        answers.send("phase", text="starting")
        result = measure(DeviceJob.from_json(data), answers)
        answers.send("result", result=asdict(result))


if __name__ == "__main__":
    main()
