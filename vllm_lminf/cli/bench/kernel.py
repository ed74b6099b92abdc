"""The child process of ``bench kernel``: LMINF's kernels beside vLLM's own, on the same data.

Every contender of a case is first compared with the oracle, and LMINF without global tokens with
vLLM at the same window; what is off stops the run before anything of that case is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import vllm._custom_ops as ops
from vllm.config import CompilationConfig, CompilationMode, VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from vllm_lminf.cli.bench.kernel_job import (
    LMINF_ROTARY,
    N_GLOBALS,
    NUM_ROTATED_LAYERS,
    PARTS,
    SHOWN_N_GLOBAL,
    VLLM_FULL,
    VLLM_ROTARY,
    VLLM_WINDOW,
    Case,
    CaseResult,
    Heads,
    KernelJob,
    KernelResult,
    RotationResult,
    lminf,
)
from vllm_lminf.cli.bench.turns import time_in_turns
from vllm_lminf.cli.child import Answers, serve_job
from vllm_lminf.kernels import base as kernels
from vllm_lminf.kernels import oracle
from vllm_lminf.kernels.cpu.kernel import CpuKernel
from vllm_lminf.pattern import LambdaPattern, cdiv
from vllm_lminf.plugin.rotary import ExactRotaryEmbedding, read_spec
from vllm_lminf.rope import RotarySpec, RotationTables, rotate

BLOCK_SIZE = 128
ROPE_THETA = 10000.0
ROTATED_POSITIONS = 131072
ORACLE_SAMPLES = 8

TOLERANCES = {torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""How far a kernel's output may be from the oracle's, relative and in norm: about three times what
rounding makes of it. One of 2048 keys that is left out moves the output by 0.02."""

ROTATION_TOLERANCES = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


class CheckError(RuntimeError):
    """A kernel computes something else than it should."""


def relative_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    """The distance from what is expected, in units of its norm; NaN and infinity are infinite."""
    output, expected = output.to(torch.float64), expected.to(torch.float64)
    error = float((output - expected).norm() / expected.norm())
    return error if output.isfinite().all() else float("inf")


class Sequences:
    """Requests of one shape in two paged caches, LMINF's and vLLM's, under one block table.

    Keys and queries are drawn as rotated ones; `raw` turns them back, for the oracle.
    """

    def __init__(self, heads: Heads, count: int, job: KernelJob) -> None:
        self.heads, self.length = heads, job.length
        self.dtype = getattr(torch, job.dtype)
        self.rotary = RotarySpec(
            ROPE_THETA
            ** -(torch.arange(0, heads.head_size, 2, dtype=torch.float64) / heads.head_size),
            is_neox_style=True,
        )
        self.tables = RotationTables(self.rotary.inv_freq)
        self.scale = heads.head_size**-0.5
        self.isa: str = _get_attn_isa(self.dtype, BLOCK_SIZE, heads.head_size, "auto")
        self.generator = torch.Generator().manual_seed(0)
        blocks = cdiv(job.length, BLOCK_SIZE)
        order = 1 + torch.randperm(count * blocks, generator=self.generator)
        self.block_table = order.view(count, blocks).to(torch.int32)
        shape = (1 + count * blocks, heads.num_kv_heads, BLOCK_SIZE, 2 * heads.head_size)
        self.lminf_cache = torch.zeros(shape, dtype=self.dtype)
        self.vllm_cache = torch.zeros(shape, dtype=self.dtype)
        self._key = self.draw(job.length, heads.num_kv_heads)
        self._value = self.draw(job.length, heads.num_kv_heads)
        for row in range(count):
            self._write(row)

    def lminf_kernel(self, pattern: LambdaPattern) -> CpuKernel:
        """LMINF's kernel under a Λ."""
        return CpuKernel(
            kernels.LayerConfig(
                heads=kernels.Heads(*self.heads, self.dtype),
                pattern=pattern,
                rules=kernels.ScoreRules(self.scale),
                cache_dtype=self.dtype,
                block_size=BLOCK_SIZE,
                device=torch.device("cpu"),
                rotation=kernels.Rotation(self.tables, is_neox_style=True),
            )
        )

    def draw(self, tokens: int, num_heads: int) -> torch.Tensor:
        """Random heads of so many tokens."""
        shape = (tokens, num_heads, self.heads.head_size)
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def key_and_value(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What a request has in its cache; different for every request."""
        return self._key.roll(-101 * row, 0), self._value.roll(-101 * row, 0)

    def raw(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotated heads [tokens, num_heads, head_size] turned back to position 0; float64."""
        angles = positions.to(torch.float64)[:, None] * self.rotary.inv_freq
        return rotate(x.to(torch.float64), angles.cos(), -angles.sin(), is_neox_style=True)

    def split_vllm_cache(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and the values of vLLM's cache, as its kernel takes them."""
        blocks, num_kv_heads, _, double = self.vllm_cache.shape
        joined = self.vllm_cache.view(blocks, num_kv_heads, 2 * BLOCK_SIZE, double // 2)
        key, value = joined.chunk(2, dim=2)
        return key, value

    def _write(self, row: int) -> None:
        key, value = self.key_and_value(row)
        positions = torch.arange(self.length)
        blocks = self.block_table[row, positions // BLOCK_SIZE].to(torch.int64)
        slots = blocks * BLOCK_SIZE + positions % BLOCK_SIZE
        cache = kernels.PagedCache.of(self.lminf_cache, self.dtype)
        self.lminf_kernel(LambdaPattern(0, 1, 1)).write_cache(key, value, cache, slots)
        ops.cpu_attn_reshape_and_cache(
            *(key, value, *self.split_vllm_cache(), slots, self.isa),
            k_scale=1.0,
            v_scale=1.0,
            kv_cache_dtype="auto",
        )


class Batch:
    """One step of some requests: decodes of the first ones, a chunk of the last one."""

    def __init__(self, case: Case, sequences: Sequences) -> None:
        self.sequences = sequences
        count = len(sequences.block_table)
        self.rows = [*range(case.decodes), *([count - 1] if case.prefill else [])]
        query_lens = torch.tensor([1] * case.decodes + [case.prefill] * bool(case.prefill))
        self.query_start_loc = torch.zeros(len(self.rows) + 1, dtype=torch.int32)
        self.query_start_loc[1:] = query_lens.cumsum(0)
        self.seq_lens = torch.full((len(self.rows),), sequences.length, dtype=torch.int32)
        self.block_table = sequences.block_table[self.rows].contiguous()
        self.positions = torch.cat(
            [torch.arange(sequences.length - n, sequences.length) for n in query_lens.tolist()]
        )
        self.requests = torch.arange(len(self.rows)).repeat_interleave(query_lens).tolist()
        self.query = sequences.draw(len(self.positions), sequences.heads.num_heads)

    def kv_bytes(self, pattern: LambdaPattern) -> int:
        """Bytes of the keys and values that some query of the batch sees."""
        tokens = 0
        for first in self.positions[self.query_start_loc[:-1].to(torch.int64)].tolist():
            start = pattern.window_start(first)
            tokens += self.sequences.length - start + min(pattern.n_global, start)
        heads = self.sequences.heads
        return 2 * tokens * heads.num_kv_heads * heads.head_size * self.query.element_size()

    def flops(self, pattern: LambdaPattern) -> int:
        """Operations on the visible pairs: two products, a multiplication and an addition each."""
        in_window = (self.positions + 1).clamp(max=pattern.n_local)
        behind = (self.positions + 1 - in_window).clamp(max=pattern.n_global)
        heads = self.sequences.heads
        return 4 * int((in_window + behind).sum()) * heads.num_heads * heads.head_size


@dataclass
class Contender:
    """A kernel on a batch: what it computes, in the oracle's terms, how to run it, its output."""

    pattern: LambdaPattern
    run: Callable[[], object]
    output: torch.Tensor


def lminf_contender(batch: Batch, pattern: LambdaPattern) -> Contender:
    """LMINF's kernel, given what a step computes once for all layers."""
    sequences, output = batch.sequences, torch.empty_like(batch.query)
    kernel = sequences.lminf_kernel(pattern)
    cache = kernels.PagedCache.of(sequences.lminf_cache, sequences.dtype)
    longest = int(batch.query_start_loc.diff().max())
    told = kernels.DeviceBatch(batch.query_start_loc, batch.seq_lens, batch.block_table, longest)

    def run() -> None:
        kernel.attend(batch.query, cache, told, output)

    run()
    return Contender(pattern, run, output)


def vllm_contender(batch: Batch, window: int | None) -> Contender:
    """vLLM's kernel, given what a step computes once for all layers; None is full attention."""
    sequences, output = batch.sequences, torch.empty_like(batch.query)
    heads, span = sequences.heads, sequences.length if window is None else window
    sliding_window = -1 if window is None else window
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(batch.rows),
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_size,
        seq_lens=batch.seq_lens,
        dtype=sequences.dtype,
        query_start_loc=batch.query_start_loc,
        causal=True,
        sliding_window_size=sliding_window,
        isa=sequences.isa,
        enable_kv_split=True,
        dynamic_causal=None,
        kv_cache_dtype="auto",
    )
    key_cache, value_cache = sequences.split_vllm_cache()

    def run() -> None:
        ops.cpu_attention_with_kv_cache(
            query=batch.query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=output,
            query_start_loc=batch.query_start_loc,
            seq_lens=batch.seq_lens,
            scale=sequences.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=sliding_window,
            block_table=batch.block_table,
            softcap=0,
            scheduler_metadata=metadata,
            s_aux=None,
            dynamic_causal=None,
            k_scale=1.0,
            v_scale=1.0,
            kv_cache_dtype="auto",
        )

    return Contender(LambdaPattern(0, span, span), run, output)


def oracle_error(contender: Contender, batch: Batch) -> float:
    """How far a contender's output is from the oracle's, on queries and heads spread over both."""
    sequences, heads = batch.sequences, batch.sequences.heads
    group = heads.num_heads // heads.num_kv_heads
    last, found, expected = len(batch.positions) - 1, [], []
    for sample in range(ORACLE_SAMPLES):
        row = round(sample * last / (ORACLE_SAMPLES - 1))
        kv_head = sample % heads.num_kv_heads
        of_group = slice(kv_head * group, (kv_head + 1) * group)
        position = int(batch.positions[row])
        key, value = (
            x[: position + 1, kv_head : kv_head + 1]
            for x in sequences.key_and_value(batch.rows[batch.requests[row]])
        )
        query = batch.query[row : row + 1, of_group]
        expected.append(
            oracle.lambda_attention(
                sequences.raw(query, batch.positions[row : row + 1]),
                sequences.raw(key, torch.arange(position + 1)),
                value.to(torch.float64),
                contender.pattern,
                scale=sequences.scale,
                rotary=sequences.rotary,
                query_start=position,
            )
        )
        found.append(contender.output[row : row + 1, of_group])
    return relative_error(torch.cat(found), torch.cat(expected))


def check(name: str, error: float, tolerance: float) -> None:
    """Refuse an error that is larger than rounding explains.

    Raises:
        CheckError: it is.
    """
    if not error <= tolerance:
        raise CheckError(
            f"{name} is off by {error:.2g} (relative, in norm), and no more than {tolerance:.2g} "
            "can be rounding: nothing of it is timed"
        )


def measure_case(
    case: Case, sequences: Sequences, job: KernelJob, on_step: Callable[[], None]
) -> CaseResult:
    """Check every contender of a case, then time them in turns."""
    batch = Batch(case, sequences)
    contenders = {VLLM_WINDOW: vllm_contender(batch, job.window)}
    for n_global in N_GLOBALS:
        pattern = LambdaPattern(n_global, job.window, job.window)
        contenders[lminf(n_global)] = lminf_contender(batch, pattern)
    if not case.is_mixed:
        contenders[VLLM_FULL] = vllm_contender(batch, None)

    errors, tolerance = {}, TOLERANCES[sequences.dtype]
    for name, contender in contenders.items():
        contender.output.fill_(torch.nan)
        contender.run()
        errors[name] = oracle_error(contender, batch)
        check(f"{case.heads}, {case.batch}: {name}", errors[name], tolerance)
    agreement = relative_error(contenders[lminf(0)].output, contenders[VLLM_WINDOW].output)
    check(f"{case.heads}, {case.batch}: {lminf(0)} beside vLLM", agreement, 2 * tolerance)
    on_step()

    runs = {name: contender.run for name, contender in contenders.items()}
    if case.is_mixed:
        pattern = contenders[lminf(SHOWN_N_GLOBAL)].pattern
        alone = Case(case.heads, decodes=case.decodes), Case(case.heads, prefill=case.prefill)
        for name, part in zip(PARTS, alone, strict=True):
            runs[name] = lminf_contender(Batch(part, sequences), pattern).run
    return CaseResult(
        case=case,
        errors=errors,
        agreement=agreement,
        seconds=time_in_turns(runs, job.rounds, job.turn_seconds, on_step),
        kv_bytes={name: batch.kv_bytes(c.pattern) for name, c in contenders.items()},
        flops={name: batch.flops(c.pattern) for name, c in contenders.items()},
    )


def measure_rotation(
    heads: Heads, tokens: int, job: KernelJob, on_step: Callable[[], None]
) -> RotationResult:
    """Check both rotary modules against float64, then time them over the layers of a step."""
    dtype = getattr(torch, job.dtype)
    config = VllmConfig(
        compilation_config=CompilationConfig(mode=CompilationMode.NONE, custom_ops=["all"])
    )
    with set_current_vllm_config(config):
        own = get_rope(
            heads.head_size,
            ROTATED_POSITIONS,
            is_neox_style=True,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            dtype=dtype,
        )
        spec = read_spec(own, "the benchmark's", job.window)
        exact = ExactRotaryEmbedding(spec, heads.head_size, torch.device("cpu"), compiled=True)
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(0, ROTATED_POSITIONS, (tokens,), generator=generator)
    sizes = [n * heads.head_size for n in (heads.num_heads, *[heads.num_kv_heads] * 2)]
    drawn = torch.randn(tokens, sum(sizes), generator=generator).to(dtype)

    angles = positions.to(torch.float64)[:, None] * spec.inv_freq
    query_and_key = drawn[:, : sizes[0] + sizes[1]].view(tokens, -1, heads.head_size)
    expected = rotate(query_and_key.to(torch.float64), angles.cos(), angles.sin(), True)
    errors, runs = {}, {}
    for name, module in {VLLM_ROTARY: own, LMINF_ROTARY: exact}.items():
        query, key, _ = drawn.clone().split(sizes, dim=-1)

        def step(
            layers: int = NUM_ROTATED_LAYERS,
            module: torch.nn.Module = module,
            query: torch.Tensor = query,
            key: torch.Tensor = key,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            with set_forward_context(None, config):
                for _ in range(layers):
                    turned: tuple[torch.Tensor, torch.Tensor] = module(positions, query, key)
            return turned

        turned = torch.cat(step(1), dim=-1).view(expected.shape)
        errors[name] = relative_error(turned, expected)
        runs[name] = step
    name = f"{heads}, the rotation of {tokens} tokens"
    check(f"{name}: {LMINF_ROTARY}", errors[LMINF_ROTARY], ROTATION_TOLERANCES[dtype])
    on_step()
    seconds = time_in_turns(runs, job.rounds, job.turn_seconds, on_step)
    per_layer = {k: [s / NUM_ROTATED_LAYERS for s in v] for k, v in seconds.items()}
    return RotationResult(heads, tokens, errors, per_layer)


@torch.inference_mode()
def measure(job: KernelJob, answers: Answers) -> KernelResult:
    """Measure every case, and every rotation."""
    if not current_platform.is_cpu():
        raise RuntimeError(
            "bench kernel times the kernels for CPUs, and vLLM is installed for "
            f"{current_platform.device_type} here"
        )
    current_platform.import_kernels()
    torch.set_num_threads(job.threads)
    done = 0

    def on_step() -> None:
        nonlocal done
        done += 1
        answers.send("progress", done=done)

    cases, rotations, isa = [], [], ""
    for heads in job.shapes:
        of_shape = [case for case in job.cases if case.heads == heads]
        answers.send("phase", text=f"filling the caches of {heads}")
        count = max(case.decodes + bool(case.prefill) for case in of_shape)
        sequences = Sequences(heads, count, job)
        isa = sequences.isa
        for case in of_shape:
            answers.send("phase", text=f"{heads}, {case.batch}")
            cases.append(measure_case(case, sequences, job, on_step))
        del sequences
        answers.send("phase", text=f"{heads}, rotation")
        rotations += [measure_rotation(heads, n, job, on_step) for n in job.rotated_tokens]
    return KernelResult(cases, rotations, isa, torch.get_num_threads())


def main() -> None:
    """Read a ``KernelJob`` from stdin and answer with a ``KernelResult``."""
    with serve_job() as (data, answers):
        answers.send("phase", text="starting")
        result = measure(KernelJob.from_json(data), answers)
        answers.send("result", result=asdict(result))


if __name__ == "__main__":
    main()
