"""Results as the programs measure them, for tests that measure none."""

from dataclasses import asdict
from typing import Any

from benchmarks.contenders import (
    LMINF_XFORMERS,
    SHOWN,
    TORCH_FULL,
    VLLM_FULL,
    VLLM_WINDOW,
    lminf,
)
from benchmarks.kernels import COPY, PARTS, PRODUCT, READ, Case, Measured, cpu_cases, gpu_cases
from benchmarks.sequences import N_GLOBALS

AROUND = {"where": "some device", "versions": {"torch": "2.0"}, "machine": {"cpu": "some CPU"}}


def records(case: dict[str, Any], seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """A record for every contender and round."""
    return [
        {**case, "contender": name, "round": number, "seconds": value}
        for name, values in seconds.items()
        for number, value in enumerate(values)
    ]


def kernels_data(measured: Measured) -> dict[str, Any]:
    setting = {"window": 200, "dtype": "float32", "block_size": 128, "rounds": 2}
    return {"program": "kernels", "setting": setting, **AROUND, **asdict(measured)}


def _add(measured: Measured, case: Case, seconds: dict[str, list[float]]) -> None:
    measured.seconds += records(case.keys, seconds)
    measured.work.append(
        {**case.keys, "contender": SHOWN, "kv_bytes": 1_500_000, "flops": 3_000_000, "error": 1e-7}
    )


def cpu_kernels() -> dict[str, Any]:
    """vLLM takes 1 and 2 ms; LMINF half of that without global tokens, and more with them."""
    measured = Measured(isa="vec")
    for case in cpu_cases(700, 130, small=True):
        seconds = {VLLM_WINDOW: [1e-3, 2e-3], VLLM_FULL: [6e-3, 12e-3]}
        seconds |= {lminf(n): [(5 + n / 10) * 1e-4, (10 + n / 5) * 1e-4] for n in N_GLOBALS}
        if case.kind == "mixed":
            seconds |= {PARTS[0]: [1e-4, 2e-4], PARTS[1]: [3e-4, 4e-4]}
        _add(measured, case, seconds)
    for heads in ("4/2/64", "3/1/32"):
        for tokens in (1, 8):
            case = {"heads": heads, "tokens": tokens}
            turned = {"vLLM": [1e-5, 1e-5], "LMINF": [5e-6, 2e-5]}
            measured.rotations += records(case, turned)
    return kernels_data(measured)


def gpu_kernels() -> dict[str, Any]:
    """LMINF takes 1 and 2 ms with 10 global tokens, and reads half of what the device achieves;
    the others take twice as long, and xformers is absent from all but the first batch."""
    measured = Measured()
    for number, case in enumerate(gpu_cases(200, small=True)):
        names = [*map(lminf, N_GLOBALS), *([LMINF_XFORMERS] if number == 0 else [])]
        names += [TORCH_FULL] if case.kind != "context" else []
        _add(measured, case, {name: [2e-3, 4e-3] for name in names} | {SHOWN: [1e-3, 2e-3]})
        if number > 0:
            reason = {"contender": LMINF_XFORMERS, "reason": "it isn't there"}
            measured.absent.append({**case.keys, **reason})
    measured.achieved = [
        {"contender": name, "round": number, "rate": rate}
        for name, rates in {READ: [2e9, 2e9], COPY: [1e9, 2e9], PRODUCT: [8e9, 8e9]}.items()
        for number, rate in enumerate(rates)
    ]
    return kernels_data(measured)


def engines_data(lengths: tuple[int, ...] = (100, 256, 512), longest: int = 1024) -> dict[str, Any]:
    """LMINF takes 1 s a chunk and 4 ms a token; full attention more of both with every chunk. In
    the second round everything takes twice as long."""
    prefill, decode, chunk = [], [], 128
    for slower, number in ((1, 0), (2, 1)):
        for name, own in (("full", lengths), ("LMINF", sorted({*lengths, longest}))):
            for length in own:
                case = {"contender": name, "round": number, "length": length}
                for index, begin in enumerate(range(0, length, chunk), 1):
                    blocks = index if name == "full" else min(index, 3)
                    seconds = slower * (index if name == "full" else 1.0)
                    end = min(begin + chunk, length)
                    held = {"held_bytes": blocks << 20}
                    prefill.append({**case, "end": end, "seconds": seconds, **held})
                seconds = slower * (length / 64e3 if name == "full" else 4e-3)
                blocks = 1 + length // 128 if name == "full" else 2
                decode.append({**case, "seconds": seconds, "held_bytes": blocks << 20})
    setting = {"model": "m", "dtype": "float32", "n_local": 128, "n_global": 10, "chunk": chunk}
    setting |= {"rounds": 2, "decode_rounds": 2, "trained_length": 256}
    measured = {"prefill": prefill, "decode": decode, "agreement": 1e-6}
    return {"program": "engines", "setting": setting, **AROUND, **measured}
