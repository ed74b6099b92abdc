"""Prefill by AMX against the oracle, and without it on a CPU that has it; what happens where the
system refuses it."""

import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from tests.kernels.batches import Batch, Case, make_batch
from tests.kernels.cases import assert_close
from tests.kernels.cpu.test_kernel import (
    SERVED,
    WINDOWS_OF_STEPS,
    Stretch,
    exact_and_tolerance,
    layer_of,
)
from vllm_lminf.kernels.base import ScoreRules
from vllm_lminf.kernels.cpu import kernel
from vllm_lminf.pattern import LambdaPattern

BFLOAT16 = torch.bfloat16
CASES = [
    # Blocks of an odd number of groups, one head to five, heads of one tile and of eight.
    *(
        Case("chunked", ((300, 100), (0, 9), (5, 40)), block_size=size, pattern=(20, 150, 180))
        for size in (16, 48, 112)
    ),
    *(
        Case("chunked", ((200, 90), (0, 60)), heads=(heads, 1), pattern=(10, 100, 100))
        for heads in (1, 3, 5)
    ),
    *(
        Case("chunked", ((200, 90),), head_size=size, block_size=80, pattern=(33, 100, 120))
        for size in (32, 96, 128, 160, 256)
    ),
    # Windows and prefixes that end anywhere in what is multiplied at once.
    *(
        Case("chunked", ((400, 70), (0, 300)), block_size=64, pattern=(n_global, n_local, n_local))
        for n_global, n_local in (
            *((1, 1), (15, 15), (16, 31), (17, 32), (31, 33), (32, 127)),
            *((33, 128), (100, 129), (129, 160), (0, 255), (10, 257)),
        )
    ),
    # Limits beyond the window: global keys at their own distance, and at the limit.
    Case("chunked", ((300, 200),), pattern=(130, 140, 300), block_size=32),
]
"""Of requests whose keys aren't split."""


@pytest.fixture
def has_amx() -> None:
    if not kernel.has_amx(BFLOAT16):
        pytest.skip("this CPU has no AMX, or the system refuses it")


@pytest.fixture
def without_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "has_amx", lambda dtype: False)


def output_of(batch: Batch) -> torch.Tensor:
    return batch.run_cpu(BFLOAT16, batch.inverse_rotations(), ScoreRules(batch.scale))


def of_bfloat16(head_size: int) -> kernel.CpuKernel:
    return kernel.CpuKernel(layer_of(4, 2, head_size, BFLOAT16))


@pytest.mark.usefixtures("has_amx")
class TestWithAmx:
    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
    def test_the_oracle(self, case: Case) -> None:
        """Blocks hold NaN wherever nobody wrote."""
        batch = make_batch(case)
        exact, tolerance = exact_and_tolerance(batch, BFLOAT16)
        assert_close(output_of(batch), exact, tolerance)

    @pytest.mark.parametrize("n_local", [*range(60, 68), 127, 128, 129])
    def test_every_chunk_is_the_same_to_the_bit(self, n_local: int) -> None:
        """One query or many: keys of fewer than two parts aren't split."""
        stretch, pattern = Stretch(300, (5, 1), 32), LambdaPattern(20, n_local, n_local + 9)
        expected = stretch.run(pattern, BFLOAT16, ScoreRules(0.2), rotates=True)
        for starts in [(0, 1, 9, 18, 50, 149, 291, 299), (0, 128, 161)]:
            output = stretch.run(pattern, BFLOAT16, ScoreRules(0.2), True, starts)
            assert torch.equal(output, expected)

    def test_who_takes_it(self) -> None:
        assert of_bfloat16(64).variant == "prefill by AMX"
        assert of_bfloat16(80).variant == "", "AMX sums up 32 products at a time"
        assert kernel.CpuKernel(layer_of(4, 2, 64, torch.float16)).variant == ""
        assert kernel.CpuKernel(layer_of(4, 2, 64, torch.float32)).variant == ""

    def test_it_makes_a_difference(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where keys aren't split: they are summed up in another order. Elsewhere it makes none."""
        decode = Case("decode", ((1500, 1),), pattern=(10, 1024, 1024))
        many, few = make_batch(CASES[0]), make_batch(decode)
        outputs = output_of(many), output_of(few)
        monkeypatch.setattr(kernel, "has_amx", lambda dtype: False)
        assert not torch.equal(output_of(many), outputs[0])
        assert torch.equal(output_of(few), outputs[1])

    def test_in_another_thread(self) -> None:
        """The one that asked the system isn't the one that computes."""
        batch, outputs = make_batch(CASES[0]), []
        thread = threading.Thread(target=lambda: outputs.append(output_of(batch)))
        thread.start()
        thread.join()
        assert torch.equal(outputs[0], output_of(batch))


@pytest.mark.usefixtures("has_amx", "without_amx")
@pytest.mark.parametrize("case", [*SERVED, *WINDOWS_OF_STEPS, *CASES], ids=lambda case: case.id)
def test_without_it(case: Case) -> None:
    """As on a CPU that has dot products of bfloat16, but no AMX."""
    batch = make_batch(case)
    exact, tolerance = exact_and_tolerance(batch, BFLOAT16)
    assert_close(output_of(batch), exact, tolerance)


class TestRefused:
    @pytest.fixture(autouse=True)
    def asked_anew(self) -> None:
        kernel.has_amx.cache_clear()

    @pytest.mark.parametrize(("answer", "warnings"), [(1, 0), (0, 0), (-95, 1)])
    def test_what_is_said(
        self,
        answer: int,
        warnings: int,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """Once, where the CPU has AMX and the system doesn't let it be used."""
        library = SimpleNamespace(lminf_ask_for_amx=lambda: answer)
        monkeypatch.setattr(kernel, "load", lambda dtype: library)
        monkeypatch.setattr(kernel.logger, "propagate", True)
        for _ in range(2):
            assert kernel.has_amx(BFLOAT16) == (answer == 1)
        assert len(caplog.messages) == warnings
        assert all("Operation not supported" in message for message in caplog.messages)
        kernel.has_amx.cache_clear()

    @pytest.mark.usefixtures("has_amx")
    def test_by_the_system(self) -> None:
        """A filter of system calls, as containers have them."""
        done = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stderr.count("prefill runs without AMX, and slower") == 1
        assert "Operation not permitted" in done.stderr


REFUSED = """
import ctypes, logging, struct
logging.basicConfig(format="%(message)s")
logging.getLogger("vllm.lminf").propagate = True

def word(code, yes, no, value):
    return struct.pack("HBBI", code, yes, no, value)

LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
ARCH_PRCTL, ASK_FOR_PERMISSION, ALLOWED, NOT_PERMITTED = 158, 0x1023, 0x7FFF0000, 0x50001
words = [
    word(LOAD, 0, 0, 0), word(EQUAL, 0, 3, ARCH_PRCTL),
    word(LOAD, 0, 0, 16), word(EQUAL, 0, 1, ASK_FOR_PERMISSION),
    word(RETURN, 0, 0, NOT_PERMITTED), word(RETURN, 0, 0, ALLOWED),
]
code = ctypes.create_string_buffer(b"".join(words))
program = struct.pack("HxxxxxxQ", len(words), ctypes.addressof(code))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, program, 0, 0) == 0, ctypes.get_errno()

from tests.kernels.batches import make_batch
from tests.kernels.cases import assert_close
from tests.kernels.cpu import test_amx
for _ in range(2):
    assert test_amx.of_bfloat16(64).variant == ""
batch = make_batch(test_amx.CASES[0])
exact, tolerance = test_amx.exact_and_tolerance(batch, test_amx.BFLOAT16)
assert_close(test_amx.output_of(batch), exact, tolerance)
"""
