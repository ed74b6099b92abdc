"""`bench kernel --device cuda`: what it refuses, counts and prints; its kernels are interpreted."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_lminf.cli.bench import device, device_contenders, running
from vllm_lminf.cli.bench.device_contenders import AbsentError, Contender, Stage
from vllm_lminf.cli.bench.device_data import Batch, Layer
from vllm_lminf.cli.bench.device_job import (
    CONTENDERS,
    COPY,
    FLEX,
    FULL,
    PRODUCT,
    READ,
    SHOWN,
    WINDOWED,
    XFORMERS,
    DeviceCase,
    DeviceCaseResult,
    DeviceJob,
    DeviceResult,
    small_device_job,
    triton,
)
from vllm_lminf.cli.bench.device_report import (
    bandwidth_share,
    device_notes,
    device_tables,
    flatness,
    throughput_share,
)
from vllm_lminf.cli.child import run_child
from vllm_lminf.cli.main import main
from vllm_lminf.pattern import LambdaPattern


def on_cpu(**changes: Any) -> DeviceJob:
    job = small_device_job(window=64, length=200, rounds=2, dtype="float32")
    return dataclasses.replace(job, device="cpu", **changes)


def made_up(job: DeviceJob) -> DeviceResult:
    """LMINF takes 1 and 2 ms with 10 global tokens, and reads half of what the device achieves;
    the others take twice as long, and xformers is absent from all but the first batch."""
    cases = []
    for number, case in enumerate(job.cases):
        names = [name for name in CONTENDERS if number == 0 or name != XFORMERS]
        seconds = {name: [2e-3, 4e-3] for name in names} | {SHOWN: [1e-3, 2e-3]}
        absent = {} if number == 0 else {XFORMERS: "it isn't there"}
        cases.append(
            DeviceCaseResult(
                case,
                dict.fromkeys(names, 1e-7),
                seconds,
                dict.fromkeys(names, 1_500_000),
                dict.fromkeys(names, 3_000_000),
                absent,
            )
        )
    achieved = {READ: [2e9, 2e9], COPY: [1e9, 3e9], PRODUCT: [8e9, 8e9]}
    return DeviceResult(cases, achieved, "Some Device", {"torch": "2.0"})


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Has a device, and answers the child process; returns what that was asked."""
    asked: list[dict[str, Any]] = []

    def answer(module: str, job: dict[str, Any], **_: object) -> Any:
        asked.append({"module": module, **job})
        return json.loads(json.dumps(asdict(made_up(DeviceJob.from_json(job)))))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(running, "run_child", answer)
    return asked


def bench(output: Path, *options: str) -> int:
    return main(["bench", "kernel", "--device", "cuda", "--output", str(output), *options])


def test_everything_is_written(
    tmp_path: Path, recorded: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert bench(tmp_path) == 0
    (asked,) = recorded
    assert asked["module"] == "vllm_lminf.cli.bench.device"
    assert (asked["window"], asked["heads"], asked["dtype"]) == (4096, (32, 8, 128), "bfloat16")
    del asked["module"]
    job = DeviceJob.from_json(asked)
    assert [c.requests for c in job.of_kind("decode")] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert [c.queries for c in job.of_kind("prefill")] == [2048, 4096, 8192]
    assert [c.length for c in job.of_kind("context")] == [8192, 32768, 131072, 1048576]
    data = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert data["result"]["device"] == "Some Device"
    assert DeviceResult.from_json(data["result"]) == made_up(job)
    assert (tmp_path / "bench-kernel.png").read_bytes().startswith(b"\x89PNG")
    printed = " ".join(capsys.readouterr().out.split())
    for words in ("Some Device", "256 × 1", "1 × 8192", "0.50 (0.50–0.50)", "50%", "1048576"):
        assert words in printed
    assert "Absent from 15 batches: LMINF through xformers, n_global 10: it isn't" in printed
    assert "…" not in printed  # nothing is cut off in 80 columns


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--length", "4000"], "--length 4000: it must be 4196 or more"),
        (["--rounds", "0"], "--rounds 0: it must be 1 or more"),
        (["--threads", "2"], "--threads 2: there are none with --device cuda"),
    ],
)
def test_refusals(
    tmp_path: Path,
    recorded: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    reason: str,
) -> None:
    assert bench(tmp_path / "out", *options) == 1
    assert reason in capsys.readouterr().err
    assert not recorded


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(tmp_path / "out") == 1
    printed = capsys.readouterr().err
    assert "--device cuda: PyTorch" in printed
    assert "finds no CUDA device here; --device cpu" in printed
    assert not (tmp_path / "out").exists()


def test_shares() -> None:
    """Medians: 1.5 MB and 3 million operations in 1.5 ms; 2 GB/s and 8 GFLOP/s are achieved."""
    job = on_cpu()
    result = made_up(job)
    assert result.bandwidth == pytest.approx(2e9)
    for case in result.cases:
        assert bandwidth_share(case, result) == pytest.approx(0.5)
        assert throughput_share(case, result) == pytest.approx(0.25)
    assert [(length, spread.median) for length, spread in flatness(result)] == [
        (200, 1.0),
        (51200, 1.0),
    ]
    names = {name for table in device_tables(job, result) for name in table.head}
    assert {"through\nxformers", "full", "n_global 100 /\nn_global 0"} <= names


def test_tables_of_who_is_there() -> None:
    """A contender that is absent from all batches has no column, and is named in the notes."""
    job = on_cpu()
    result = made_up(job)
    for case in result.cases:
        for name in (XFORMERS, *case.absent):
            case.seconds.pop(name, None)
    tables = device_tables(job, result)
    assert not any("through\nxformers" in table.head for table in tables)
    assert any("it isn't there" in note for note in device_notes(job, result))


@pytest.fixture(scope="module")
def stage() -> Stage:
    return Stage(Layer(on_cpu()), 64)


class TestBatch:
    @pytest.mark.parametrize(
        "case",
        [
            DeviceCase("decode", 2, 1, 200),
            DeviceCase("prefill", 1, 20, 220),
            DeviceCase("context", 2, 1, 1000),
        ],
        ids=str,
    )
    def test_figures(self, case: DeviceCase, stage: Stage) -> None:
        """Bytes and operations, counted pair by pair."""
        batch = Batch(case, stage.layer, 64, 100)
        for pattern in (LambdaPattern(10, 64, 64), LambdaPattern(0, case.length, case.length)):
            queries = range(case.length - case.queries, case.length)
            pairs = [(i, j) for i in queries for j in range(case.length) if pattern.visible(i, j)]
            seen = {j for _, j in pairs}
            assert batch.kv_bytes(pattern) == case.requests * len(seen) * 2 * 2 * 32 * 4
            assert batch.flops(pattern) == case.requests * len(pairs) * 4 * 4 * 32

    def test_freed_blocks_hold_nothing(self, stage: Stage) -> None:
        """Blocks between the prefix and the window aren't there; every other is there once."""
        batch = Batch(DeviceCase("context", 3, 1, 1000), stage.layer, 64, 100)
        table = batch.told.block_table
        assert table.shape == (3, 63)
        assert (table[:, 7:58] == 0).all()
        used = torch.cat((table[:, :7], table[:, 58:]), dim=1).flatten().tolist()
        assert sorted(used) == list(range(1, len(used) + 1))
        assert batch.cache.key.shape[0] == len(used) + 1
        assert batch.cache.key[0].isnan().all()
        assert not batch.is_complete

    def test_the_check_is_an_oracle(self, stage: Stage) -> None:
        """Full attention passes as such, and as nothing else."""
        batch = Batch(DeviceCase("decode", 2, 1, 200), stage.layer, 64, 100)
        output = device_contenders._full(batch, stage).run().reshape(batch.query.shape)
        assert batch.error(output, LambdaPattern(0, 200, 200)) < 1e-6
        assert batch.error(output, LambdaPattern(0, 199, 199)) > 0.01
        assert batch.error(output.fill_(torch.nan), LambdaPattern(0, 200, 200)) == float("inf")

    def test_what_lies_between_does_not_matter(self, stage: Stage) -> None:
        """The check leaves it out; with all of it, the oracle says the same."""
        from vllm_lminf.kernels import oracle

        layer, pattern = stage.layer, LambdaPattern(10, 64, 64)
        batch = Batch(DeviceCase("prefill", 1, 20, 300), layer, 64, 100)
        positions = torch.arange(300)
        key, value = layer.key_and_value(0, positions)
        whole = oracle.lambda_attention(
            layer.raw(batch.query, positions[280:]),
            layer.raw(key, positions),
            value.double(),
            pattern,
            scale=layer.scale,
            rotary=layer.rotary,
            query_start=280,
        )
        assert batch.error(whole, pattern) < 1e-12


class TestContenders:
    """Who takes part, who doesn't, and who stops the run."""

    @pytest.fixture
    def batch(self, stage: Stage) -> Batch:
        return Batch(DeviceCase("prefill", 1, 20, 220), stage.layer, 64, 100)

    @pytest.fixture
    def only(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        def take(**made: Any) -> None:
            def makers(_: Batch) -> Iterator[tuple[str, Any]]:
                yield from made.items()

            monkeypatch.setattr(device, "makers", makers)

        return take

    @pytest.mark.parametrize("name", [FLEX, FULL])
    def test_others(self, name: str, batch: Batch, stage: Stage, only: Any) -> None:
        make = dict(device_contenders.makers(batch))[name]
        only(**{name: make})
        contenders, errors, absent = device.checked_contenders(batch, stage)
        assert list(contenders) == list(errors) == [name]
        assert not absent

    def test_names(self, batch: Batch, stage: Stage) -> None:
        assert [name for name, _ in device_contenders.makers(batch)] == list(CONTENDERS)
        long = Batch(DeviceCase("context", 1, 1, 1000), stage.layer, 64, 100)
        names = [name for name, _ in device_contenders.makers(long)]
        assert names == [name for name in CONTENDERS if name not in (FLEX, FULL)]

    def test_a_wrong_kernel_stops_the_run(self, batch: Batch, stage: Stage, only: Any) -> None:
        """One whose window is a token longer than it says."""
        right = device_contenders._flex(batch, stage)
        wrong = Contender(LambdaPattern(0, 63, 63), right.run)
        only(**{FLEX: lambda *_: wrong})
        with pytest.raises(device.CheckError, match="FlexAttention, same window is off by 0"):
            device.checked_contenders(batch, stage)

    def test_absence(self, batch: Batch, stage: Stage, only: Any) -> None:
        def absent(*_: object) -> Contender:
            raise AbsentError("it isn't installed")

        def fails(*_: object) -> Contender:
            def run() -> torch.Tensor:
                raise RuntimeError("no such thing\nand more")

            return Contender(LambdaPattern(0, 64, 64), run)

        only(**{WINDOWED: absent, FULL: fails})
        contenders, _, reasons = device.checked_contenders(batch, stage)
        assert not contenders
        assert reasons == {WINDOWED: "it isn't installed", FULL: "it fails: no such thing"}
        only(**{triton(0): fails})
        with pytest.raises(RuntimeError, match="no such thing"):
            device.checked_contenders(batch, stage)

    def test_own_kernels_are_asked(self, batch: Batch, stage: Stage) -> None:
        """Here, on a CPU, xformers gives its reasons."""
        with pytest.raises(AbsentError, match="xformers runs on CUDA devices, not on 'cpu'"):
            device_contenders._xformers(batch, stage)


def test_for_real(tmp_path: Path) -> None:
    """The whole of it, in a child whose Triton interprets the kernels."""
    cases = [
        DeviceCase("decode", 1, 1, 140),
        DeviceCase("prefill", 1, 5, 130),
        DeviceCase("context", 1, 1, 140),
        DeviceCase("context", 1, 1, 10**6),
    ]
    job = on_cpu(cases=cases, window=16, rounds=1)
    events: list[Any] = []
    data = run_child(
        "vllm_lminf.cli.bench.device",
        asdict(job),
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        log_path=tmp_path / "log",
        on_event=events.append,
    )
    result = DeviceResult.from_json(data)
    assert [case.case for case in result.cases] == cases
    assert [e["done"] for e in events if e["event"] == "progress"] == list(
        range(1, job.num_steps + 1)
    )
    for case in result.cases:
        assert {triton(0), triton(10), triton(100)} <= case.seconds.keys()
        assert (FLEX in case.seconds) == (FULL in case.seconds) == (case.case.kind != "context")
        assert max(case.errors.values()) < 4e-6
        assert all(len(s) == 1 and s[0] > 0 for s in case.seconds.values())
        assert case.seconds.keys() | case.absent.keys() <= set(CONTENDERS)
    assert all(len(table.rows) > 0 for table in device_tables(job, result))
