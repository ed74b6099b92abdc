"""Times LMINF's kernels beside others' on the same data: decode, prefill, and both in one batch.

Every contender of a case is compared with the oracle before anything of it is timed. On CPUs they
stand beside vLLM's own kernel at the same window and with full attention. With --device cuda, which
takes PyTorch and Triton alone, beside FlashAttention, FlexAttention and PyTorch's attention, as far
as they are there, and beside what the device achieves at reading, copying and multiplying.
TRITON_INTERPRET=1 runs the kernels for GPUs on the host, for their correctness alone.
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

from benchmarks import report
from benchmarks.contenders import (
    OTHERS_OWN,
    SHOWN,
    VLLM_WINDOW,
    AbsentError,
    Contender,
    CpuContenders,
    GpuContenders,
    Make,
    lminf,
)
from benchmarks.sequences import (
    N_GLOBALS,
    SHOWN_N_GLOBAL,
    Batch,
    Sequences,
    Setting,
    Shape,
    relative_error,
)
from benchmarks.timing import Clock, DeviceClock, Run, check, host_clock, time_in_turns
from vllm_lminf.cli.machine import machine
from vllm_lminf.rope import rotate

KEYS = ("kind", "heads", "batch", "length")
HEADINGS = ("kind", "heads", "requests × tokens", "length")
PARTS = ("decodes alone", "prefill alone")
"""What a mixed batch is compared with: LMINF on its parts."""

READ, COPY, PRODUCT = "read", "copy", "matrix product"
"""What the device is seen to achieve a second: bytes read, bytes read and written, operations."""

ROTATED_TOKENS = (1, 8, 64, 2048)
ROTATED_LAYERS = 30
"""Layers of a step whose rotation is timed: what follows from the positions alone is computed once
for all of them, as it is when a model runs."""
ROTATED_POSITIONS = 131072
ROTATION_TOLERANCES = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


@dataclass(frozen=True)
class Case:
    """A batch of requests of one length.

    Attributes:
        kind: decode, prefill, mixed, or "context": a decode that is to cost the same at any length.
        shape: of the layer.
        length: tokens of every request.
        decodes: requests with one query each.
        chunk: queries of one more request; 0 where there is none.
    """

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
    def keys(self) -> dict[str, Any]:
        """What a row of a table is told by."""
        decodes, chunk = f"{self.decodes} × 1", f"1 × {self.chunk}"
        batch = ", ".join([decodes] * (self.decodes > 0) + [chunk] * (self.chunk > 0))
        return dict(zip(KEYS, (self.kind, str(self.shape), batch, self.length), strict=True))


def cpu_cases(length: int, chunk: int, small: bool) -> list[Case]:
    """The shapes of a small and of a middle-sized model, in every kind of batch."""
    shapes = [Shape(4, 2, 64), Shape(3, 1, 32)] if small else [Shape(9, 3, 64), Shape(32, 8, 128)]
    many = 3 if small else 8
    return [
        Case(kind, shape, length, decodes, queries)
        for shape in shapes
        for kind, decodes, queries in (
            ("decode", 1, 0),
            ("decode", many, 0),
            ("prefill", 0, chunk),
            ("mixed", many, chunk),
        )
    ]


def gpu_cases(length: int, small: bool) -> list[Case]:
    """A layer of a model of 8 billion parameters: decode steps, chunks, and long contexts."""
    shape = Shape(4, 2, 32) if small else Shape(32, 8, 128)
    batches = [1, 3] if small else [1, 2, 4, 8, 16, 32, 64, 128, 256]
    chunks = [20] if small else [2048, 4096, 8192]
    contexts = [1, 256] if small else [1, 4, 16, 128]
    return [
        *(Case("decode", shape, length, decodes=n) for n in batches),
        *(Case("prefill", shape, length + n, chunk=n) for n in chunks),
        *(Case("context", shape, n * length, decodes=2 if small else 32) for n in contexts),
    ]


@dataclass
class Measured:
    """All that was measured, as records.

    Attributes:
        seconds: of one call: a case's keys, contender, round, seconds.
        work: a case's keys, contender, kv_bytes that must be read, flops, and the error, which is
            the distance from the oracle.
        absent: a case's keys, contender, and the reason why it took no part.
        rotations: seconds of one layer: heads, tokens, contender, round, seconds.
        achieved: what the device achieves a second: contender, round, rate.
        isa: the variant that vLLM's kernel for CPUs ran.
    """

    seconds: list[dict[str, Any]] = field(default_factory=list)
    work: list[dict[str, Any]] = field(default_factory=list)
    absent: list[dict[str, Any]] = field(default_factory=list)
    rotations: list[dict[str, Any]] = field(default_factory=list)
    achieved: list[dict[str, Any]] = field(default_factory=list)
    isa: str | None = None


Timing = Callable[[dict[str, Run]], list[dict[str, Any]]]
"""`time_in_turns` with all but the contenders given."""


def measure_cases(
    setting: Setting,
    cases: list[Case],
    contenders: type[CpuContenders] | type[GpuContenders],
    timing: Timing,
) -> Measured:
    """Checks and times every case; those of one shape and length share their requests.

    Raises:
        WrongResultError: a contender computes something else than it should.
    """
    measured = Measured()

    def shared(case: Case) -> tuple[Shape, int, bool]:
        return case.shape, case.length, case.kind != "context"

    for (shape, length, is_complete), grouped in itertools.groupby(cases, shared):
        of_group = list(grouped)
        count = max(len(case.query_lens) for case in of_group)
        sequences = Sequences(setting, shape, count, length, is_complete)
        taking_part = contenders(sequences)
        if isinstance(taking_part, CpuContenders):
            measured.isa = taking_part.isa
        for case in of_group:
            measure_case(case, sequences, taking_part.makers(), measured, timing)
        del taking_part, sequences  # before the next ones need the memory
    return measured


def measure_case(
    case: Case,
    sequences: Sequences,
    makers: Iterable[tuple[str, Make]],
    measured: Measured,
    timing: Timing,
) -> None:
    """Checks every contender of a case, then times them in turns."""
    tolerance, batch, by_name = sequences.setting.tolerance, Batch(sequences, case.query_lens), {}
    runs: dict[str, Run] = {}
    outputs: dict[str, torch.Tensor] = {}
    for name, make in makers:
        by_name[name] = make
        try:
            contender = make(batch)
            output = _first_run(name, contender).reshape(batch.query.shape)
        except AbsentError as absent:
            measured.absent.append({**case.keys, "contender": name, "reason": str(absent)})
            continue
        error = batch.error(output, contender.pattern)
        check(f"{', '.join(map(str, case.keys.values()))}: {name}", error, tolerance)
        runs[name], outputs[name] = contender.run, output
        work = {"kv_bytes": batch.kv_bytes(contender.pattern)}
        work |= {"flops": batch.flops(contender.pattern)}
        measured.work.append({**case.keys, "contender": name, "error": error, **work})
    if VLLM_WINDOW in outputs:
        apart = relative_error(outputs[lminf(0)], outputs[VLLM_WINDOW])
        check(f"{case.keys}: {lminf(0)} beside {VLLM_WINDOW}", apart, 2 * tolerance)
    if case.kind == "mixed":
        decodes, prefill = case.query_lens, {}
        prefill[case.decodes] = decodes.pop(case.decodes)
        for name, part in zip(PARTS, (decodes, prefill), strict=True):
            runs[name] = by_name[SHOWN](Batch(sequences, part)).run
    measured.seconds += [{**case.keys, **record} for record in timing(runs)]


def _first_run(name: str, contender: Contender) -> torch.Tensor:
    """A contender's output. What others' libraries don't serve is told, and stops nothing."""
    try:
        return contender.run()
    except (RuntimeError, NotImplementedError) as error:
        if name not in OTHERS_OWN:
            raise
        raise AbsentError(f"it fails: {str(error).splitlines()[0]}") from error


def measure_rotation(
    shape: Shape, tokens: int, dtype: torch.dtype, timing: Timing
) -> list[dict[str, Any]]:
    """Compares LMINF's rotary module with float64, then times it beside vLLM's, a step's layers."""
    from vllm.config import CompilationConfig, CompilationMode, VllmConfig, set_current_vllm_config
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.layers.rotary_embedding import get_rope

    from vllm_lminf.plugin.rotary import ExactRotaryEmbedding, read_spec

    config = VllmConfig(
        compilation_config=CompilationConfig(mode=CompilationMode.NONE, custom_ops=["all"])
    )
    with set_current_vllm_config(config):
        own = get_rope(
            shape.head_size,
            ROTATED_POSITIONS,
            is_neox_style=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            dtype=dtype,
        )
        spec = read_spec(own, "the benchmark's", ROTATED_POSITIONS)
        exact = ExactRotaryEmbedding(spec, shape.head_size, torch.device("cpu"), compiled=True)
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(0, ROTATED_POSITIONS, (tokens,), generator=generator)
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
    error = relative_error(turned, expected)
    check(f"the rotation of {tokens} tokens, heads {shape}", error, ROTATION_TOLERANCES[dtype])
    case = {"heads": str(shape), "tokens": tokens, "error": error}
    runs = {"vLLM": step(own, ROTATED_LAYERS), "LMINF": step(exact, ROTATED_LAYERS)}
    return [
        {**case, **record, "seconds": record["seconds"] / ROTATED_LAYERS} for record in timing(runs)
    ]


def measure_device(setting: Setting, probe_bytes: int, timing: Timing) -> list[dict[str, Any]]:
    """What the device achieves at reading and copying so many bytes, and at multiplying matrices
    in the run's dtype."""
    source = torch.ones(probe_bytes // 4, dtype=torch.float32, device=setting.device)
    target = torch.empty_like(source)
    side = int((probe_bytes // 16) ** 0.5)
    matrix = torch.randn(side, side, device=setting.device).to(setting.dtype)
    runs: dict[str, Run] = {
        READ: source.sum,
        COPY: lambda: target.copy_(source),
        PRODUCT: lambda: matrix @ matrix,
    }
    work = {READ: probe_bytes, COPY: 2 * probe_bytes, PRODUCT: 2 * side**3}
    return [
        {**record, "rate": work[record["contender"]] / record["seconds"]} for record in timing(runs)
    ]


def limits(data: dict[str, Any]) -> dict[str, float]:
    """What the device achieved a second, by unit, in 10⁹; empty where that wasn't measured."""
    if not data["achieved"]:
        return {}
    achieved = pd.DataFrame(data["achieved"]).groupby("contender")["rate"].median() / 1e9
    return {"GB/s": max(achieved[READ], achieved[COPY]), "GFLOP/s": achieved[PRODUCT]}


def ratios(data: dict[str, Any]) -> dict[str, pd.Series]:
    """Times of LMINF over those of others in the same round; below 1 LMINF is faster.

    The numbers of global tokens are compared with vLLM's kernel, or with none on a GPU.
    """
    frame = report.by_round(data["seconds"], KEYS)
    base = VLLM_WINDOW if VLLM_WINDOW in frame else lminf(0)
    own = [lminf(n) for n in N_GLOBALS if lminf(n) != base]
    rest = [name for name in frame.columns if name not in (*map(lminf, N_GLOBALS), base, *PARTS)]
    found = {f"{name} / {base}": frame[name] / frame[base] for name in own}
    found |= {f"{SHOWN} / {name}": frame[SHOWN] / frame[name] for name in rest}
    if set(PARTS) <= set(frame.columns):
        parts = frame[PARTS[0]] + frame[PARTS[1]]
        found["mixed / sum of its parts"] = frame[SHOWN] / parts
    return found


def tables(data: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Titles and Markdown tables of a results file."""
    compared = {name: report.spreads(values) for name, values in ratios(data).items()}
    yield "Ratios of times", report.table(compared, HEADINGS)

    frame = report.by_round(data["seconds"], KEYS)
    seconds, columns = frame[SHOWN], {"LMINF ms": report.medians(frame[SHOWN], 1e3)}
    work = pd.DataFrame(data["work"])
    work = work[work["contender"] == SHOWN].set_index(list(KEYS))
    achieved = limits(data)
    for unit, what in (("GB/s", "kv_bytes"), ("GFLOP/s", "flops")):
        amounts = work[what].reindex(seconds.index.droplevel("round")).to_numpy()
        rates = 1e-9 * amounts / seconds
        columns[f"LMINF {unit}"] = report.medians(rates)
        if achieved:
            columns[f"% of the device's {unit}"] = report.medians(rates, 100 / achieved[unit])
    others = [name for name in frame.columns if name not in map(lminf, N_GLOBALS)]
    columns |= {f"{name}, ms": report.medians(frame[name], 1e3) for name in others}
    yield "Times", report.table(columns, HEADINGS)

    contexts = seconds[seconds.index.get_level_values("kind") == "context"].unstack("length")
    if len(contexts):
        flat = contexts.div(contexts.iloc[:, 0], axis=0).stack().reorder_levels([*KEYS, "round"])
        flat = {"/ the shortest": report.spreads(flat.sort_index(), 3)}
        yield "Decode as the context grows", report.table(flat, HEADINGS)
    if data["rotations"]:
        turned = report.by_round(data["rotations"], ("heads", "tokens"))
        columns = {f"{name} µs": report.medians(turned[name], 1e6) for name in ("vLLM", "LMINF")}
        columns["LMINF / vLLM"] = report.spreads(turned["LMINF"] / turned["vLLM"])
        yield "Rotation of queries and keys, a layer", report.table(columns, ("heads", "tokens"))


def notes(data: dict[str, Any]) -> list[str]:
    """What a reader of the tables must know."""
    setting, achieved = data["setting"], limits(data)
    lines = [
        f"{report.surroundings(data)}; window {setting['window']}, {setting['dtype']}, blocks of "
        f"{setting['block_size']}. LMINF is with n_global {SHOWN_N_GLOBAL} where none is named. "
        f"Heads: query heads/key heads/head size. Medians of {setting['rounds']} rounds in which "
        "all took turns, with quartiles; below 1 LMINF is faster. Every kernel was compared with "
        "the oracle first."
    ]
    if data["isa"]:
        lines.append(f"vLLM's kernel ran its variant {data['isa']!r}.")
    if achieved:
        lines.append(
            f"Achieved in this run: {achieved['GB/s']:.3g} GB/s, the better of reading and "
            f"copying, and {achieved['GFLOP/s']:.3g} GFLOP/s in a product of matrices in "
            f"{setting['dtype']}. Times are the device's, its L2 cache flushed before every call."
        )
    absent = pd.DataFrame(data["absent"])
    if len(absent):
        counts = absent.groupby(["contender", "reason"]).size()
        lines += [f"Absent from {n} cases: {who}: {why}." for (who, why), n in counts.items()]
    return lines


def draw(data: dict[str, Any], path: Path) -> None:
    """The ratios of every case as bars, with their quartiles, as a PNG."""
    middle, reach = {}, {}
    for name, values in ratios(data).items():
        low, middle[name], high = (report.of_cases(values).quantile(q) for q in (0.25, 0.5, 0.75))
        reach[name] = [middle[name] - low, high - middle[name]]
    bars = pd.DataFrame(middle)
    bars.index = ["\n".join(map(str, case)) for case in bars.index]
    figure, (axes,) = report.new_figure(1, width=max(9.0, 1.2 * len(bars)))
    bars.plot.bar(ax=axes, yerr=reach, rot=0, width=0.8, fontsize=7)
    axes.axhline(1, color="#666666", linestyle="--", linewidth=1)
    report.finish(axes, f"Ratios of times, window {data['setting']['window']} (lower is better)")
    axes.legend(fontsize=7)
    figure.savefig(path)


DEFAULTS: dict[tuple[str, bool], dict[str, Any]] = {
    ("cpu", False): {"window": 2048, "length": 32768, "chunk": 2048, "rounds": 15},
    ("cpu", True): {"window": 200, "length": 700, "chunk": 130, "rounds": 2},
    ("cuda", False): {"window": 4096, "length": 8192, "rounds": 15},
    ("cuda", True): {"window": 61, "length": 200, "block_size": 16, "rounds": 2},
}
"""By device, and whether it is --small."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line with its defaults; refused where it makes no benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", type=Path, help="default: build/bench/kernels-DEVICE.json")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    for name, what in (
        ("window", "tokens that a query sees, its own included (2048; cuda: 4096)"),
        ("length", "tokens of a request (32768; cuda: 8192)"),
        ("chunk", "queries of a chunk, on a CPU (2048)"),
        ("rounds", "turns of every contender (15)"),
        ("block-size", "tokens of a block of the cache (128)"),
        ("threads", "of the kernels, on a CPU (all cores)"),
    ):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=what)
    parser.add_argument("--small", action="store_true", help="tiny shapes: a test, no benchmark")
    args = parser.parse_args(argv)
    given = {name: value for name, value in vars(args).items() if value is not None}
    problems = [
        f"--{name.replace('_', '-')} {value}: it must be 1 or more"
        for name, value in given.items()
        if type(value) is int and value < 1
    ]
    if args.device == "cuda":
        unused = [name for name in ("chunk", "threads") if name in given]
        problems += [f"--{name} {given[name]}: --device cuda has none" for name in unused]
    general = {"output": Path(f"build/bench/kernels-{args.device}.json"), "block_size": 128}
    general |= {"chunk": 0, "threads": len(os.sched_getaffinity(0))}
    args = argparse.Namespace(**{**general, **DEFAULTS[args.device, args.small], **given})
    least = args.window + max(N_GLOBALS) + args.chunk
    if args.length < least:
        problems.append(
            f"--length {args.length}: it must be {least} or more, so that the window "
            f"({args.window}) of every query lies behind {max(N_GLOBALS)} global tokens"
            + (f", in a chunk of {args.chunk} too" if args.chunk else "")
        )
    if args.device == "cuda" and not torch.cuda.is_available() and not _is_interpreted():
        problems.append(
            f"--device cuda: PyTorch {torch.__version__} finds no CUDA device here; --device cpu "
            "times the kernels for CPUs"
        )
    if problems := problems or report.problems(args.output):
        parser.error("; ".join(problems))
    return args


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    """Measures, prints, and writes the results file and its picture."""
    args = parse(argv)
    is_cpu = args.device == "cpu"
    device = torch.device("cpu" if is_cpu or _is_interpreted() else "cuda")
    if is_cpu:
        torch.set_num_threads(args.threads)
        cases = cpu_cases(args.length, args.chunk, args.small)
    else:
        cases = gpu_cases(args.length, args.small)
    setting = Setting(device, getattr(torch, args.dtype), args.window, args.block_size)
    shapes = dict.fromkeys(case.shape for case in cases)
    rotations = [*itertools.product(shapes, ROTATED_TOKENS[: 2 if args.small else None])]
    steps = len(cases) + (len(rotations) if is_cpu else 1)
    with tqdm(total=steps * args.rounds, unit="rounds") as bar:
        clock: Clock = DeviceClock(device) if device.type == "cuda" else host_clock
        turn_seconds = 0.0 if args.small else 0.02 if is_cpu else 0.01

        def timing(runs: dict[str, Run]) -> list[dict[str, Any]]:
            how = {"rounds": args.rounds, "turn_seconds": turn_seconds}
            return time_in_turns(runs, **how, clock=clock, on_round=bar.update)

        measured = measure_cases(setting, cases, CpuContenders if is_cpu else GpuContenders, timing)
        if is_cpu:
            for shape, tokens in rotations:
                measured.rotations += measure_rotation(shape, tokens, setting.dtype, timing)
        else:
            measured.achieved = measure_device(setting, 2**12 if args.small else 2**30, timing)
    names = ("window", "dtype", "block_size", "rounds")
    where = f"{torch.get_num_threads()} threads of {machine()['cpu']}"
    data = {
        "program": "kernels",
        "where": where if device.type == "cpu" else torch.cuda.get_device_name(),
        "setting": {name: getattr(args, name) for name in names},
        **asdict(measured),
    }
    report.publish(args.output, data, tables, notes, draw)


if __name__ == "__main__":
    main()
