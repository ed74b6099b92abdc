"""The child process of ``bench engine``: LMINF and full attention as two real engines, in turns.

Both are alive in this one process and stepped by hand. Prompts are prefilled cold, a chunk of one
engine and then a chunk of the other. Decodes find their prompts in the prefix cache; lengths and
engines take turns. Before anything is timed the two must agree on a prompt inside the window, where
they compute the same.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_lminf.cli.bench.engine_job import EngineJob, EngineResult, EngineRuns, PrefillRun
from vllm_lminf.cli.child import Answers, serve_job
from vllm_lminf.cli.model_facts import kv_bytes_per_token
from vllm_lminf.cli.scoring import prompt_nll
from vllm_lminf.cli.scoring_job import ENGINE_NAMES, DecodeRun, EngineName, PrefillStep
from vllm_lminf.plugin.config import BACKEND_NAME, SECTION

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams
    from vllm.config import ModelConfig

CHECKED_TOKENS = 512
TOLERANCES = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 0.3}
"""How far the engines' log-probabilities may be apart, root mean square: a few roundings of a
logit, which is 0.06 each for one of 16 in bfloat16."""

WARM_UP_DECODE_TOKENS = 4
POOL_SHARE = 1.25
"""The pool in longest prompts: everything prefilled stays in the prefix cache until it is decoded,
and what decodes take evicts none of it."""


class SteppedEngine:
    """A vLLM engine in this process that runs one request at a time, step by step."""

    def __init__(self, llm: LLM, start_seconds: float) -> None:
        self.llm = llm
        self.start_seconds = start_seconds
        core: Any = llm.llm_engine.engine_core
        self._scheduler = core.engine_core.scheduler
        self._pool = self._scheduler.kv_cache_manager.block_pool
        self._names = map(str, itertools.count())

    def begin(self, token_ids: list[int], max_tokens: int, **options: Any) -> None:
        """Queue a greedy request for exactly ``max_tokens`` tokens."""
        params = _greedy(max_tokens, **options)
        self.llm.llm_engine.add_request(next(self._names), {"prompt_token_ids": token_ids}, params)

    @property
    def is_running(self) -> bool:
        return self.llm.llm_engine.has_unfinished_requests()

    def step(self) -> tuple[float, list[RequestOutput]]:
        """Run one step; return its seconds and what came out."""
        begin = time.perf_counter()
        outputs: list[Any] = self.llm.llm_engine.step()
        return time.perf_counter() - begin, outputs

    def finish(self) -> RequestOutput:
        """Step until the request ends; return what came out last."""
        outputs: list[RequestOutput] = []
        while self.is_running:
            _, outputs = self.step()
        return outputs[0]

    def computed_tokens(self) -> int | None:
        """Tokens of the running request whose keys are in the cache; None if none is running."""
        running = self._scheduler.running
        return running[0].num_computed_tokens if running else None

    def held_blocks(self) -> int:
        """Blocks that the running request holds; those of the prefix cache alone are free."""
        free: int = self._pool.get_num_free_blocks()
        return self._pool.num_gpu_blocks - 1 - free  # one is vLLM's null block

    def forget(self) -> None:
        """Empty the prefix cache."""
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its prefix cache")

    def runs(self, prefill: list[PrefillRun], decode: list[DecodeRun]) -> EngineRuns:
        """What this engine did, with what it is."""
        config = self._scheduler.kv_cache_config
        return EngineRuns(
            prefill=prefill,
            decode=decode,
            block_size=self._scheduler.block_size,
            block_bytes=sum(t.size for t in config.kv_cache_tensors) // config.num_blocks,
            pool_blocks=config.num_blocks,
            start_seconds=self.start_seconds,
        )


def _greedy(max_tokens: int, **options: Any) -> SamplingParams:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, **options
    )


def start_engine(name: EngineName, job: EngineJob, model: ModelConfig) -> SteppedEngine:
    """Start one of the engines.

    Full attention past the trained length needs a longer RoPE table, which vLLM sizes by
    ``max_position_embeddings``; without it, it reads past the table's end.
    """
    from vllm import LLM
    from vllm.platforms import current_platform

    from vllm_lminf.plugin import versions

    longest = job.lengths_of(name)[-1]
    max_model_len = longest + job.decode_tokens + 1
    options: dict[str, Any] = {}
    if name == "lminf":
        options = {"attention_backend": BACKEND_NAME, "additional_config": {SECTION: job.lminf}}
    elif max_model_len > (versions.trained_length(model) or max_model_len):
        options = {"hf_overrides": {"max_position_embeddings": max_model_len}}
    begin = time.perf_counter()
    llm = LLM(
        model=job.model,
        dtype=job.dtype,
        max_model_len=max_model_len,
        max_num_batched_tokens=job.chunk,
        max_num_seqs=1,
        kv_cache_memory_bytes=int(POOL_SHARE * (longest + job.chunk)) * kv_bytes_per_token(model),
        enable_prefix_caching=True,
        enforce_eager=current_platform.is_cpu(),
        async_scheduling=False,  # one step, one chunk
        skip_tokenizer_init=True,
        seed=0,
        **options,
    )
    return SteppedEngine(llm, time.perf_counter() - begin)


def read_tokens(job: EngineJob, model: ModelConfig) -> list[int]:
    """The prompt of every run: the text's first tokens, or random ones."""
    import torch

    if job.text is None:
        generator = torch.Generator().manual_seed(0)
        drawn: list[int] = torch.randint(
            model.get_vocab_size(), (job.longest,), generator=generator
        ).tolist()
        return drawn
    from vllm.tokenizers import get_tokenizer

    tokens = list(get_tokenizer(job.model).encode(Path(job.text).read_text(encoding="utf-8")))
    if len(tokens) < job.longest:
        raise ValueError(
            f"the text has {len(tokens)} tokens, {job.longest} are needed: give a longer text, "
            "smaller lengths, or leave out --text for random tokens"
        )
    return tokens[: job.longest]


def check_agreement(
    engines: Mapping[EngineName, SteppedEngine], job: EngineJob, tokens: list[int]
) -> float:
    """Compare the engines on a prompt inside the window; return how far they are apart.

    Raises:
        RuntimeError: further than rounding explains.
    """
    length = min(CHECKED_TOKENS, job.lminf["n_local"], job.lengths[0], job.chunk)
    nll = {}
    for name, engine in engines.items():
        engine.begin(tokens[:length], max_tokens=1, prompt_logprobs=0)
        nll[name] = prompt_nll(engine.finish())
    squares = [(a - b) ** 2 for a, b in zip(nll["full"], nll["lminf"], strict=True)]
    distance = float((sum(squares) / len(squares)) ** 0.5)
    tolerance = TOLERANCES[job.dtype]
    if not distance <= tolerance:
        raise RuntimeError(
            f"the two engines' log-probabilities of {length} tokens, all inside the window, are "
            f"{distance:.2g} apart (root mean square), and no more than {tolerance:.2g} can be "
            "rounding: nothing is timed"
        )
    return distance


def warm_up(engine: SteppedEngine, job: EngineJob, tokens: list[int]) -> None:
    """Run every kind of step once."""
    engine.begin(tokens[: job.chunk][::-1], max_tokens=WARM_UP_DECODE_TOKENS)
    engine.finish()


def prefill_in_turns(
    engines: Mapping[EngineName, SteppedEngine],
    prompts: Mapping[EngineName, list[int]],
    chunk: int,
    on_step: Callable[[], None],
) -> dict[EngineName, PrefillRun]:
    """Prefill a cold prompt on each engine, chunk by chunk in turns."""
    runs = {name: PrefillRun(len(prompt), []) for name, prompt in prompts.items()}
    for name, prompt in prompts.items():
        engines[name].forget()
        engines[name].begin(prompt, max_tokens=1)
    while unfinished := [name for name in prompts if engines[name].is_running]:
        for name in unfinished:
            run, engine = runs[name], engines[name]
            before = run.steps[-1] if run.steps else PrefillStep(0, 0.0, 0)
            seconds, _ = engine.step()
            tokens = min(before.tokens + chunk, run.tokens)
            computed = engine.computed_tokens() or run.tokens
            if computed != tokens:
                raise RuntimeError(f"{computed} tokens are prefilled where {tokens} were expected")
            run.steps.append(PrefillStep(tokens, before.seconds + seconds, engine.held_blocks()))
            on_step()
    return runs


def decode(engine: SteppedEngine, prompt: list[int], num_tokens: int) -> DecodeRun:
    """Generate after a prompt; its own step, which yields the first token, is not timed."""
    engine.begin(prompt, max_tokens=num_tokens + 1)
    step_ms: list[float] = []
    blocks, cached = 0, None
    while engine.is_running:
        seconds, outputs = engine.step()
        blocks = max(blocks, engine.held_blocks())
        if not outputs:
            continue
        if cached is None:
            cached = outputs[0].num_cached_tokens or 0
        else:
            step_ms.append(1000 * seconds)
    if len(step_ms) != num_tokens:
        raise RuntimeError(f"{len(step_ms)} steps gave a token where {num_tokens} were expected")
    return DecodeRun(len(prompt), step_ms, blocks, cached or 0)


def measure(job: EngineJob, answers: Answers) -> EngineResult:
    """Start both engines, compare them, then time them."""
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    from vllm_lminf.plugin import versions

    done = 0

    def on_step() -> None:
        nonlocal done
        done += 1
        answers.send("progress", done=done)

    answers.send("phase", text="starting")
    model = EngineArgs(model=job.model, dtype=job.dtype).create_model_config()
    tokens = read_tokens(job, model)
    engines = {name: start_engine(name, job, model) for name in ENGINE_NAMES}
    answers.send("phase", text="comparing the engines")
    agreement = check_agreement(engines, job, tokens)
    for engine in engines.values():
        warm_up(engine, job, tokens)

    prefill: dict[EngineName, list[PrefillRun]] = {name: [] for name in ENGINE_NAMES}
    lengths = sorted({n for name in ENGINE_NAMES for n in job.prompts_of(name)[:-1]})
    for number in range(job.rounds):
        answers.send("phase", text=f"prefill, round {number + 1} of {job.rounds}")
        turns = [
            {name: tokens[:n] for name in ENGINE_NAMES if n in job.prompts_of(name)[:-1]}
            for n in lengths
        ]
        # The longest prompts come last: they leave what is decoded from in the prefix cache.
        turns.append({name: tokens[: job.prompts_of(name)[-1]] for name in ENGINE_NAMES})
        for prompts in turns:
            for name, cold in prefill_in_turns(engines, prompts, job.chunk, on_step).items():
                prefill[name].append(cold)

    decodes: dict[EngineName, list[DecodeRun]] = {name: [] for name in ENGINE_NAMES}
    for number in range(job.decode_rounds):
        answers.send("phase", text=f"decode, round {number + 1} of {job.decode_rounds}")
        for length in job.lengths_of("lminf"):
            for name in ENGINE_NAMES:
                if length in job.lengths_of(name):
                    run = decode(engines[name], tokens[:length], job.decode_tokens)
                    decodes[name].append(run)
                    on_step()
    return EngineResult(
        runs={name: engines[name].runs(prefill[name], decodes[name]) for name in ENGINE_NAMES},
        agreement=agreement,
        trained_length=versions.trained_length(model),
        threads=torch.get_num_threads(),
        device=current_platform.get_device_name(),
    )


def main() -> None:
    """Read an ``EngineJob`` from stdin and answer with an ``EngineResult``."""
    with serve_job() as (data, answers):
        result = measure(EngineJob(**data), answers)
        answers.send("result", result=asdict(result))


if __name__ == "__main__":
    main()
