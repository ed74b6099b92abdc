"""Times LMINF's kernels beside others' on the same data: decode, prefill, and both in one batch.

Every contender of a case is compared with the oracle first. On CPUs: vLLM's own kernel at the same
window and with full attention, and the rotation. On a CUDA device, with PyTorch and Triton alone:
FlashAttention, FlexAttention, PyTorch's attention where they are there, and what the device
achieves at reading, copying and multiplying. `interpreter` runs the kernels for GPUs on the host,
for their correctness alone.
"""

import argparse
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from benchmarks.common import (
    Clock,
    by_round,
    check,
    host_clock,
    medians,
    spreads,
    table,
    time_in_turns,
    write_results,
)
from benchmarks.contenders import (
    OTHERS_OWN,
    VLLM_FULL,
    VLLM_WINDOW,
    AbsentError,
    Contender,
    CpuContenders,
    GpuContenders,
    Make,
    lminf,
)
from benchmarks.sequences import Batch, Sequences, Setting, Shape, relative_error
from vllm_lminf.rope import rotate

KEYS = ("kind", "heads", "batch", "length")
READ, COPY, PRODUCT = "read", "copy", "matrix product"
PARTS = ("decodes alone", "prefill alone")
ROTATED_TOKENS = (1, 8, 64, 2048)
ROTATED_LAYERS = 30
"""Layers of a step whose rotation is timed: what follows from the positions alone is computed once
for all of them, as it is when a model runs."""
ROTATION_TOLERANCES = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}

_FLUSH_BYTES = 2**28  # more than any device keeps near its processors
_SLEEP_CYCLES = 2_000_000  # about a millisecond, in which the host hands over all launches


@dataclass(frozen=True)
class Case:
    """A batch over requests of one length: so many decodes, and a chunk of so many queries of one
    more request; "context" is a decode that is to cost the same at every length."""

    kind: str
    shape: Shape
    length: int
    decodes: int = 0
    chunk: int = 0

    @property
    def query_lens(self) -> dict[int, int]:
        """Queries by the request's number; the chunk is of the last request."""
        lens = dict.fromkeys(range(self.decodes), 1)
        return lens | ({self.decodes: self.chunk} if self.chunk else {})

    @property
    def batch(self) -> str:
        """Requests × tokens of the step."""
        decodes = f"{self.decodes} × 1" if self.decodes else ""
        return ", ".join(filter(None, (decodes, f"1 × {self.chunk}" if self.chunk else "")))

    @property
    def keys(self) -> dict[str, Any]:
        values = (self.kind, str(self.shape), self.batch, self.length)
        return dict(zip(KEYS, values, strict=True))


@dataclass
class Measured:
    """All that was measured; records are rows of tables, see `benchmarks.common`.

    Attributes:
        seconds: of one call: case, contender, round.
        work: kv_bytes and flops of a case and contender, and its error beside the oracle.
        absent: contenders that took no part in a case, and why.
        rotations: seconds of one layer: heads, tokens, contender, round.
        achieved: what the device achieves a second: contender, round, rate.
    """

    seconds: list[dict[str, Any]] = field(default_factory=list)
    work: list[dict[str, Any]] = field(default_factory=list)
    absent: list[dict[str, Any]] = field(default_factory=list)
    rotations: list[dict[str, Any]] = field(default_factory=list)
    achieved: list[dict[str, Any]] = field(default_factory=list)


class DeviceClock:
    """Seconds of a call as the device counts them, with nothing in its caches from the call before.

    Its caches are emptied by reading: `triton.testing.do_bench` writes, and the lines that it
    leaves behind are written back while the call is timed.
    """

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.zeros(_FLUSH_BYTES // 4, dtype=torch.float32, device=device)

    def __call__(self, run: Callable[[], object], repeats: int) -> float:
        """The mean of so many calls."""
        pairs = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.max()
            torch.cuda._sleep(_SLEEP_CYCLES)
            begin.record()
            run()
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in pairs) / repeats / 1000


def cases(args: argparse.Namespace) -> list[Case]:
    """What is timed on this device."""
    if args.device == "cpu":
        shapes, decodes = [Shape(9, 3, 64), Shape(32, 8, 128)], 8
        if args.small:
            shapes, decodes = [Shape(4, 2, 64), Shape(3, 1, 32)], 3
        return [
            Case(kind, shape, args.length, decodes=count, chunk=chunk)
            for shape in shapes
            for kind, count, chunk in (
                ("decode", 1, 0),
                ("decode", decodes, 0),
                ("prefill", 0, args.chunk),
                ("mixed", decodes, args.chunk),
            )
        ]
    shape, batches, chunks, contexts, count = (
        (Shape(4, 2, 32), [1, 3], [20], [1, 256], 2)
        if args.small
        else (
            Shape(32, 8, 128),
            [1, 2, 4, 8, 16, 32, 64, 128, 256],
            [2048, 4096, 8192],
            [1, 4, 16, 128],
            32,
        )
    )
    return [
        *(Case("decode", shape, args.length, decodes=n) for n in batches),
        *(Case("prefill", shape, args.length + n, chunk=n) for n in chunks),
        *(Case("context", shape, n * args.length, decodes=count) for n in contexts),
    ]


def measure(
    setting: Setting, plan: list[Case], rounds: int, turn_seconds: float, clock: Clock, small: bool
) -> Measured:
    """Checks and times every case.

    Raises:
        WrongResultError: a contender computes something else than it should.
    """
    is_cpu = clock is host_clock and "TRITON_INTERPRET" not in os.environ
    measured, bar = Measured(), tqdm(total=len(plan) * (rounds + 1), unit="turns")
    timing: dict[str, Any] = {
        "rounds": rounds,
        "turn_seconds": turn_seconds,
        "clock": clock,
        "on_round": bar.update,
    }

    def group(case: Case) -> tuple[Shape, int, bool]:
        return case.shape, case.length, case.kind == "context"

    for (shape, length, is_context), grouped in itertools.groupby(plan, group):
        of_group = list(grouped)
        bar.set_description(f"{shape} over {length}")
        count = max(len(case.query_lens) for case in of_group)
        sequences = Sequences(setting, shape, count, length, 1 if is_context else None)
        field_of = CpuContenders(sequences) if is_cpu else GpuContenders(sequences)
        for case in of_group:
            _measure_case(case, sequences, list(field_of.makers()), measured, timing)
            bar.update()
        del field_of, sequences
    bar.close()
    if is_cpu:
        for shape in dict.fromkeys(case.shape for case in plan):
            for tokens in ROTATED_TOKENS[: 2 if small else None]:
                measured.rotations += measure_rotation(shape, tokens, setting.dtype, timing)
    else:
        measured.achieved = measure_device(setting.device, timing, 2**12 if small else 2**30)
    return measured


def _measure_case(
    case: Case,
    sequences: Sequences,
    makers: Iterable[tuple[str, Make]],
    measured: Measured,
    timing: dict[str, Any],
) -> None:
    setting, batch = sequences.setting, Batch(sequences, case.query_lens)
    runs, outputs = {}, {}
    for name, make in makers:
        try:
            contender = make(batch)
            output = _first_run(name, contender).reshape(batch.query.shape)
        except AbsentError as error:
            measured.absent.append({**case.keys, "contender": name, "reason": str(error)})
            continue
        error_found = batch.error(output, contender.pattern)
        check(f"{case.keys}: {name} beside the oracle", error_found, setting.tolerance)
        runs[name], outputs[name] = contender.run, output
        measured.work.append(
            {
                **case.keys,
                "contender": name,
                "kv_bytes": batch.kv_bytes(contender.pattern),
                "flops": batch.flops(contender.pattern),
                "error": error_found,
            }
        )
    if VLLM_WINDOW in outputs:
        apart = relative_error(outputs[lminf(0)], outputs[VLLM_WINDOW])
        check(f"{case.keys}: {lminf(0)} beside vLLM", apart, 2 * setting.tolerance)
    if case.kind == "mixed":
        lens = case.query_lens
        shown = dict(makers)[lminf(setting.n_globals[1])]
        last = {case.decodes: lens.pop(case.decodes)}
        for name, part in zip(PARTS, (lens, last), strict=True):
            runs[name] = shown(Batch(sequences, part)).run
    measured.seconds += [{**case.keys, **record} for record in time_in_turns(runs, **timing)]


def _first_run(name: str, contender: Contender) -> torch.Tensor:
    """A contender's output. What others' libraries don't serve is told, and stops nothing."""
    try:
        return contender.run()
    except (RuntimeError, NotImplementedError) as error:
        if name not in OTHERS_OWN:
            raise
        raise AbsentError(f"it fails: {str(error).splitlines()[0]}") from error


def measure_rotation(
    shape: Shape, tokens: int, dtype: torch.dtype, timing: dict[str, Any]
) -> list[dict[str, Any]]:
    """Checks both rotary modules against float64, then times them over the layers of a step."""
    from vllm.config import CompilationConfig, CompilationMode, VllmConfig, set_current_vllm_config
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.layers.rotary_embedding import get_rope

    from vllm_lminf.attention.rotary import ExactRotaryEmbedding, read_spec

    positions_end = 131072
    config = VllmConfig(
        compilation_config=CompilationConfig(mode=CompilationMode.NONE, custom_ops=["all"])
    )
    with set_current_vllm_config(config):
        own = get_rope(
            shape.head_size,
            positions_end,
            is_neox_style=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            dtype=dtype,
        )
        spec = read_spec(own, "the benchmark's", positions_end)
        exact = ExactRotaryEmbedding(spec, shape.head_size, torch.device("cpu"), compiled=True)
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(0, positions_end, (tokens,), generator=generator)
    sizes = [n * shape.head_size for n in (shape.num_heads, *[shape.num_kv_heads] * 2)]
    drawn = torch.randn(tokens, sum(sizes), generator=generator).to(dtype)
    angles = positions.to(torch.float64)[:, None] * spec.inv_freq
    query_and_key = drawn[:, : sizes[0] + sizes[1]].view(tokens, -1, shape.head_size)
    expected = rotate(query_and_key.to(torch.float64), angles.cos(), angles.sin(), True)

    def step(module: torch.nn.Module, layers: int) -> Callable[[], Any]:
        query, key, _ = drawn.clone().split(sizes, dim=-1)

        def run() -> Any:
            with set_forward_context(None, config):
                for _ in range(layers):
                    turned = module(positions, query, key)
            return turned

        return run

    turned = torch.cat(step(exact, 1)(), dim=-1).view(expected.shape)
    name = f"the rotation of {tokens} tokens, heads {shape}"
    check(name, relative_error(turned, expected), ROTATION_TOLERANCES[dtype])
    runs = {"vLLM": step(own, ROTATED_LAYERS), "LMINF": step(exact, ROTATED_LAYERS)}
    case = {"heads": str(shape), "tokens": tokens}
    return [
        {**case, **record, "seconds": record["seconds"] / ROTATED_LAYERS}
        for record in time_in_turns(runs, **timing)
    ]


def measure_device(
    device: torch.device, timing: dict[str, Any], probe_bytes: int
) -> list[dict[str, Any]]:
    """What the device achieves at reading and copying (bytes a second), and at multiplying matrices
    in bfloat16 (operations a second)."""
    source = torch.ones(probe_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    side = int((probe_bytes // 16) ** 0.5)
    matrix = torch.randn(side, side, device=device).to(torch.bfloat16)
    runs: dict[str, Callable[[], object]] = {
        READ: source.sum,
        COPY: lambda: target.copy_(source),
        PRODUCT: lambda: matrix @ matrix,
    }
    work = {READ: probe_bytes, COPY: 2 * probe_bytes, PRODUCT: 2 * side**3}
    return [
        {**record, "rate": work[record["contender"]] / record["seconds"]}
        for record in time_in_turns(runs, **timing)
    ]


def tables(data: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Titles and Markdown tables of a results file."""
    frame = by_round(pd.DataFrame(data["seconds"]), KEYS)
    names = ("kind", "heads", "requests × tokens", "length")
    n_globals = data["setting"]["n_globals"]
    shown = lminf(n_globals[1])
    others = [name for name in frame.columns if name not in (*map(lminf, n_globals), *PARTS)]
    base = VLLM_WINDOW if VLLM_WINDOW in frame else None

    work = pd.DataFrame(data["work"])
    work = work[work["contender"] == shown].set_index(list(KEYS))
    seconds = frame[shown]
    rate = {
        unit: (seconds.rdiv(1) * work[what].reindex(seconds.index.droplevel("round")).to_numpy())
        for what, unit in (("kv_bytes", "GB/s"), ("flops", "GFLOP/s"))
    }
    columns = {"LMINF ms": medians(seconds, 1e3)}
    columns |= {f"LMINF {unit}": medians(values, 1e-9) for unit, values in rate.items()}
    if data["achieved"]:
        achieved = pd.DataFrame(data["achieved"]).groupby("contender")["rate"].median()
        limits = {"GB/s": max(achieved[READ], achieved[COPY]), "GFLOP/s": achieved[PRODUCT]}
        columns |= {
            f"% of the device's {unit}": medians(values, 100 / limits[unit])
            for unit, values in rate.items()
        }
    columns |= {f"{name}, ms": medians(frame[name], 1e3) for name in others}
    yield "Times", table(columns, names)

    ratios = {f"LMINF / {name}": spreads(frame[shown] / frame[name]) for name in others}
    if base is not None:
        ratios = {
            f"n_global {n} / {base}": spreads(frame[lminf(n)] / frame[base]) for n in n_globals
        } | {f"{VLLM_FULL} / LMINF": spreads(frame[VLLM_FULL] / frame[shown])}
    else:
        ratios |= {
            f"n_global {n} / n_global 0": spreads(frame[lminf(n)] / frame[lminf(0)], 3)
            for n in n_globals
            if n > 0
        }
    if set(PARTS) <= set(frame.columns):
        parts = frame[PARTS[0]] + frame[PARTS[1]]
        ratios["mixed / sum of its parts"] = spreads(seconds / parts)
    yield "Ratios in each round", table(ratios, names)

    contexts = seconds[seconds.index.get_level_values("kind") == "context"]
    if len(contexts):
        lengths = contexts.index.get_level_values("length")
        shortest = contexts[lengths == lengths.min()].droplevel(list(KEYS))
        flat = contexts / shortest.reindex(contexts.index.get_level_values("round")).to_numpy()
        yield "Decode as the context grows", table({"/ the shortest": spreads(flat, 3)}, names)
    if data["rotations"]:
        turned = by_round(pd.DataFrame(data["rotations"]), ("heads", "tokens"))
        columns = {f"{name} µs": medians(turned[name], 1e6) for name in ("vLLM", "LMINF")}
        columns["LMINF / vLLM"] = spreads(turned["LMINF"] / turned["vLLM"])
        yield "Rotation of queries and keys, a layer", table(columns, ("heads", "tokens"))


def notes(data: dict[str, Any]) -> list[str]:
    """What a reader of the tables must know."""
    setting, where = data["setting"], data["where"]
    lines = [
        f"{where}; window {setting['window']}, {setting['dtype']}, blocks of "
        f"{setting['block_size']}. LMINF: n_global {setting['n_globals'][1]} where none is named. "
        f"Heads: query heads/key heads/head size. Medians of {setting['rounds']} rounds in which "
        "all took turns, with quartiles; every kernel was compared with the oracle first."
    ]
    absent = pd.DataFrame(data["absent"])
    if len(absent):
        counts = absent.groupby(["contender", "reason"]).size()
        lines += [f"Absent from {n} cases: {who}: {why}" for (who, why), n in counts.items()]
    return lines


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, with defaults filled in and refused where it makes no benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda", "interpreter"))
    parser.add_argument("--output", type=Path, default=Path("build/bench/kernels.json"))
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"))
    sizes = {"window": "tokens that a query sees", "length": "tokens of a request"}
    sizes |= {"chunk": "queries of a chunk, on CPUs", "rounds": "turns of every contender"}
    sizes |= {"block-size": "tokens of a block", "threads": "of kernels for CPUs"}
    for name, what in sizes.items():
        parser.add_argument(f"--{name}", type=int, help=f"{what} (default: by device)")
    parser.add_argument("--small", action="store_true", help="tiny shapes: a test, no benchmark")
    args = parser.parse_args(argv)
    cores = len(os.sched_getaffinity(0))
    cpu = {"window": 2048, "length": 32768, "chunk": 2048, "rounds": 15, "threads": cores}
    gpu = {"window": 4096, "length": 8192, "chunk": 1, "rounds": 15, "threads": cores}
    defaults: dict[str, Any] = {"block_size": 128, **(cpu if args.device == "cpu" else gpu)}
    defaults["dtype"] = "float32" if args.device == "interpreter" else "bfloat16"
    if args.small:
        defaults |= {"window": 200, "length": 700, "chunk": 130, "rounds": 2}
    if args.small and args.device != "cpu":
        defaults |= {"window": 61, "length": 200, "block_size": 16}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    problems = [
        f"--{name.replace('_', '-')} {value}: it must be 1 or more"
        for name, value in vars(args).items()
        if isinstance(value, int) and not isinstance(value, bool) and value < 1
    ]
    least = args.window + max(Setting.n_globals) + args.chunk
    if args.length < least:
        problems.append(
            f"--length {args.length}: it must be {least} or more, so that every query of a chunk "
            f"({args.chunk}) has a whole window ({args.window}) behind {max(Setting.n_globals)} "
            "global tokens"
        )
    if args.device == "cuda" and not torch.cuda.is_available():
        problems.append(f"--device cuda: PyTorch {torch.__version__} finds no CUDA device here")
    if problems:
        parser.error("; ".join(problems))
    return args


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    """Measures, prints, and writes the results file."""
    args = parse(argv)
    device = torch.device("cuda" if args.device == "cuda" else "cpu")
    if args.device == "interpreter":
        os.environ["TRITON_INTERPRET"] = "1"  # read when the first kernel is defined
    torch.set_num_threads(args.threads)
    setting = Setting(device, getattr(torch, args.dtype), args.window, args.block_size)
    clock: Clock = DeviceClock(device) if args.device == "cuda" else host_clock
    turn = 0.0 if args.small else {"cpu": 0.02}.get(args.device, 0.01)
    measured = measure(setting, cases(args), args.rounds, turn, clock, args.small)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{args.threads} threads"
    described = {
        "window": args.window,
        "dtype": args.dtype,
        "block_size": args.block_size,
        "rounds": args.rounds,
        "n_globals": setting.n_globals,
    }
    data = {"setting": described, "where": where, **asdict(measured)}
    for title, text in tables(data):
        print(f"\n{title}\n\n{text}")
    print("", *notes(data), sep="\n")
    write_results(args.output, **data)


if __name__ == "__main__":
    main()
