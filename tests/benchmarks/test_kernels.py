"""`benchmarks.kernels`: its data, who takes part, that nothing wrong is timed, and its refusals."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import kernels
from benchmarks.contenders import (
    FLASH_WINDOW,
    FLEX_WINDOW,
    LMINF_FLASH,
    LMINF_HYBRID,
    LMINF_XFORMERS,
    OTHERS_OWN,
    TORCH_FULL,
    VLLM_FULL,
    VLLM_WINDOW,
    AbsentError,
    Contender,
    CpuContenders,
    Lminf,
    lminf,
)
from benchmarks.kernels import Case, Measured, cpu_cases, gpu_cases, measure_case
from benchmarks.sequences import N_GLOBALS, Batch, Sequences, Setting, Shape
from benchmarks.timing import WrongResultError
from vllm_lminf.kernels import oracle
from vllm_lminf.pattern import LambdaPattern

SHAPE, WINDOW = Shape(4, 2, 32), 64
SETTING = Setting(torch.device("cpu"), torch.float32, WINDOW, block_size=16)
ROOT = Path(__file__).parents[2]


def counted(runs: dict[str, Any]) -> list[dict[str, Any]]:
    """Times nothing: a record for each that would be."""
    return [{"contender": name, "round": 0, "seconds": 1.0} for name in runs]


def full(batch: Batch) -> Contender:
    """A contender that computes full attention, as the oracle does it."""
    length = batch.sequences.length
    pattern = LambdaPattern(0, length, length)
    return Contender(pattern, lambda: from_oracle(batch, pattern).float())


def from_oracle(batch: Batch, pattern: LambdaPattern) -> torch.Tensor:
    """What the oracle says, given every key; float64 [rows, num_heads, head_size]."""
    sequences, outputs = batch.sequences, []
    starts, everywhere = batch.query_start_loc_cpu.tolist(), torch.arange(batch.sequences.length)
    for request, begin, end in zip(batch.requests, starts[:-1], starts[1:], strict=True):
        key, value = sequences.key_and_value(request, everywhere)
        outputs.append(
            oracle.lambda_attention(
                sequences.raw(batch.query[begin:end], batch.positions[begin:end]),
                sequences.raw(key, everywhere),
                value.double(),
                pattern,
                scale=sequences.scale,
                rotary=sequences.rotary,
                query_start=int(batch.positions[begin]),
            )
        )
    return torch.cat(outputs)


class TestBatch:
    @pytest.mark.parametrize("query_lens", [{0: 1, 1: 1}, {1: 20}, {0: 1, 2: 20}], ids=str)
    def test_figures(self, query_lens: dict[int, int]) -> None:
        """Bytes and operations, counted pair by pair."""
        batch = Batch(Sequences(SETTING, SHAPE, 3, 200), query_lens)
        for pattern in (LambdaPattern(10, 64, 64), LambdaPattern(0, 200, 200)):
            pairs = [
                (request, i, j)
                for request, queries in query_lens.items()
                for i in range(200 - queries, 200)
                for j in range(200)
                if pattern.visible(i, j)
            ]
            seen = {(request, j) for request, _, j in pairs}
            assert batch.kv_bytes(pattern) == len(seen) * 2 * 2 * 32 * 4
            assert batch.flops(pattern) == len(pairs) * 4 * 4 * 32

    def test_freed_blocks_hold_nothing(self) -> None:
        """Blocks between the prefix and the window aren't there; every other is there once."""
        sequences = Sequences(SETTING, SHAPE, 3, 1000, is_complete=False)
        table = sequences.block_table
        assert table.shape == (3, 63)
        assert (table[:, 7:58] == 0).all()
        used = torch.cat((table[:, :7], table[:, 58:]), dim=1).flatten().tolist()
        assert sorted(used) == list(range(1, len(used) + 1))
        assert sequences.num_blocks == len(used) + 1
        written: list[int] = []
        sequences.fill(lambda key, value, slots: written.extend(slots.tolist()))
        assert len(set(written)) == len(written) == 3 * (7 * 16 + 1000 - 58 * 16)
        assert min(written) >= 16

    @pytest.mark.parametrize("pattern", [LambdaPattern(10, 64, 64), LambdaPattern(0, 300, 300)])
    def test_the_check_is_the_oracle(self, pattern: LambdaPattern) -> None:
        """Given every key, the oracle passes as what it computed, and as nothing else."""
        batch = Batch(Sequences(SETTING, SHAPE, 2, 300), {0: 1, 1: 20})
        output = from_oracle(batch, pattern)
        assert batch.error(output, pattern) < 1e-12
        shorter = LambdaPattern(pattern.n_global, pattern.n_local - 1, pattern.n_local - 1)
        assert batch.error(output, shorter) > 0.005
        assert batch.error(output.fill_(torch.nan), pattern) == float("inf")


class TestCases:
    """Who takes part in a case, who doesn't, and who stops the run."""

    @pytest.fixture
    def sequences(self) -> Sequences:
        return Sequences(SETTING, SHAPE, 2, 200)

    @pytest.fixture
    def measure(self, sequences: Sequences) -> Callable[..., Measured]:
        def run(**makers: Any) -> Measured:
            measured = Measured()
            case = Case("decode", SHAPE, 200, decodes=2)
            measure_case(case, sequences, makers.items(), measured, counted)
            return measured

        return run

    def test_a_right_one_is_timed(self, measure: Callable[..., Measured]) -> None:
        measured = measure(**{TORCH_FULL: full})
        keys = {"kind": "decode", "heads": "4/2/32", "batch": "2 × 1", "length": 200}
        assert measured.seconds == [{**keys, "contender": TORCH_FULL, "round": 0, "seconds": 1.0}]
        (work,) = measured.work
        assert work["error"] < 1e-6

    def test_a_wrong_one_stops_the_run(self, measure: Callable[..., Measured]) -> None:
        """One that sees a token more than it says."""

        def one_more(batch: Batch) -> Contender:
            return Contender(LambdaPattern(0, 199, 199), full(batch).run)

        match = r"decode, 4/2/32, 2 × 1, 200: vLLM, full attention is off by 0\."
        with pytest.raises(WrongResultError, match=match):
            measure(**{VLLM_FULL: one_more})

    def test_absence(self, measure: Callable[..., Measured]) -> None:
        """What others' libraries don't serve is told; what LMINF's don't, stops the run."""

        def absent(batch: Batch) -> Contender:
            raise AbsentError("it isn't installed")

        def fails(batch: Batch) -> Contender:
            def run() -> torch.Tensor:
                raise RuntimeError("no such thing\nand more")

            return Contender(LambdaPattern(0, 64, 64), run)

        measured = measure(**{FLASH_WINDOW: absent, FLEX_WINDOW: fails, TORCH_FULL: full})
        assert [record["contender"] for record in measured.seconds] == [TORCH_FULL]
        assert [(record["contender"], record["reason"]) for record in measured.absent] == [
            (FLASH_WINDOW, "it isn't installed"),
            (FLEX_WINDOW, "it fails: no such thing"),
        ]
        with pytest.raises(RuntimeError, match="no such thing"):
            measure(**{lminf(0): fails})


@pytest.mark.engine
class TestCpuContenders:
    def test_all_take_part_in_all(self) -> None:
        """Each is compared with the oracle, and nothing is absent."""
        setting = replace(SETTING, window=200, block_size=128)
        cases = [case for case in cpu_cases(700, 130, small=True) if case.shape.num_heads == 4]
        measured = kernels.measure_cases(setting, cases, CpuContenders, counted)
        everyone = {VLLM_WINDOW, VLLM_FULL, *map(lminf, N_GLOBALS)}
        assert not measured.absent
        assert measured.isa
        for case in cases:
            of_case = [r for r in measured.work if case.keys.items() <= r.items()]
            assert {record["contender"] for record in of_case} == everyone
            assert max(record["error"] for record in of_case) < 4e-6
            timed = {r["contender"] for r in measured.seconds if case.keys.items() <= r.items()}
            assert timed == everyone | (set(kernels.PARTS) if case.kind == "mixed" else set())

    def test_a_wrong_kernel_is_not_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """One whose window is a token short."""
        right = Lminf.contender

        def one_short(self: Lminf, batch: Batch, n_global: int) -> Contender:
            other = copy.copy(self)
            other._sequences = copy.copy(self._sequences)
            other._sequences.setting = replace(SETTING, window=199, block_size=128)
            run = right(other, batch, n_global=n_global).run
            return Contender(LambdaPattern(n_global, 200, 200), run)

        monkeypatch.setattr(Lminf, "contender", one_short)
        setting = replace(SETTING, window=200, block_size=128)
        case = Case("decode", Shape(4, 2, 64), 700, decodes=3)
        with pytest.raises(WrongResultError, match="LMINF, n_global 0 is off by 0"):
            kernels.measure_cases(setting, [case], CpuContenders, counted)

    def test_rotation(self) -> None:
        records = kernels.measure_rotation(Shape(4, 2, 64), 8, torch.float32, counted)
        assert [record["contender"] for record in records] == ["vLLM", "LMINF"]
        assert all(record["error"] < 1e-6 for record in records)


class TestPlan:
    def test_of_a_gpu(self) -> None:
        cases = gpu_cases(8192, small=False)
        assert {case.shape for case in cases} == {Shape(32, 8, 128)}
        of_kind = {kind: [c for c in cases if c.kind == kind] for kind in ("decode", "prefill")}
        assert [c.decodes for c in of_kind["decode"]] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
        assert [(c.chunk, c.length) for c in of_kind["prefill"]] == [
            *((2048, 10240), (4096, 12288), (8192, 16384)),
        ]
        contexts = [case.length for case in cases if case.kind == "context"]
        assert contexts == [8192, 32768, 131072, 1048576]

    def test_of_a_cpu(self) -> None:
        cases = cpu_cases(32768, 2048, small=False)
        assert [str(case.shape) for case in cases[::4]] == ["9/3/64", "32/8/128"]
        batches = [case.keys["batch"] for case in cases[:4]]
        assert batches == ["1 × 1", "8 × 1", "1 × 2048", "8 × 1, 1 × 2048"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--length 4000", "--length 4000: it must be 4196 or more"),
        ("--rounds 0 --threads -1", "--threads -1: it must be 1 or more"),
        ("--window 0", "--window 0: it must be 1 or more"),
        ("--device cuda --length 4000", "--length 4000: it must be 4196 or more"),
        ("--device cuda --threads 2", "--threads 2: --device cuda has none"),
    ],
)
def test_refusals(
    options: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out" / "results.json"
    with pytest.raises(SystemExit, match="2"):
        kernels.parse([*options.split(), "--output", str(output)])
    assert reason in capsys.readouterr().err
    assert not output.parent.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit, match="2"):
        kernels.parse(["--device", "cuda"])
    printed = capsys.readouterr().err
    assert "--device cuda: PyTorch" in printed
    assert "finds no CUDA device here; --device cpu" in printed


def run(*options: str | Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels", *map(str, options)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )


def test_help() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert "--device" in done.stdout


@pytest.mark.engine
def test_small_on_a_cpu(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    output = tmp_path / "results.json"
    done = run("--small", "--threads", "1", "--output", output)
    assert done.returncode == 0, done.stderr[-3000:]
    data = json.loads(output.read_text(encoding="utf-8"))
    assert {(r["heads"], r["kind"]) for r in data["seconds"]} == {
        (heads, kind) for heads in ("4/2/64", "3/1/32") for kind in ("decode", "prefill", "mixed")
    }
    assert all(record["seconds"] > 0 for record in (*data["seconds"], *data["rotations"]))
    assert "3/1/32" in done.stdout
    assert f"Written: {output}, {output.with_suffix('.png')}" in done.stdout


def test_interpreted(tmp_path: Path) -> None:
    """All that is there for GPUs, in a process whose Triton interprets the kernels."""
    cases = (
        "Case('decode', S, 140, 1), Case('prefill', S, 140, chunk=5), Case('context', S, 10**6, 1)"
    )
    code = (
        "import json, torch\n"
        "from benchmarks import kernels\n"
        "from benchmarks.kernels import Case, Setting, Shape\n"
        "S = Shape(4, 2, 32)\n"
        "setting = Setting(torch.device('cpu'), torch.float32, 16, 16)\n"
        "def once(runs):\n"
        "    how = dict(rounds=1, turn_seconds=0.0, clock=kernels.host_clock)\n"
        "    return kernels.time_in_turns(runs, **how)\n"
        "with torch.inference_mode():\n"
        f"    found = kernels.measure_cases(setting, [{cases}], kernels.GpuContenders, once)\n"
        "    found.achieved = kernels.measure_device(setting, 4096, once)\n"
        "print(json.dumps(vars(found)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    own = set(map(lminf, N_GLOBALS))
    for kind in ("decode", "prefill", "context"):
        timed = {r["contender"] for r in found["seconds"] if r["kind"] == kind}
        absent = {r["contender"] for r in found["absent"] if r["kind"] == kind}
        assert own <= timed
        not_paged = {FLEX_WINDOW, TORCH_FULL}
        assert timed & not_paged == (not_paged if kind != "context" else set())
        assert timed | absent == own | not_paged & timed | {
            *(LMINF_XFORMERS, LMINF_FLASH, LMINF_HYBRID, FLASH_WINDOW),
        }
        assert timed - own <= set(OTHERS_OWN)
    assert max(record["error"] for record in found["work"]) < 4e-6
    assert {record["length"] for record in found["seconds"]} == {140, 10**6}
    assert all(record["rate"] > 0 for record in found["achieved"])
    reasons = {r["contender"]: r["reason"] for r in found["absent"]}
    if not torch.cuda.is_available():
        assert "xformers runs on CUDA devices, not on 'cpu'" in reasons[LMINF_XFORMERS]
