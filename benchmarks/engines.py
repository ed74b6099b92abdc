"""Times a model under LMINF and under full attention: two real vLLM engines in one process, in turns.

Prompts are prefilled cold, a chunk of one engine and then a chunk of the other; decodes find their
prompts in the prefix cache. Before anything is timed the two must agree on a prompt inside the
window, where they compute the same.
"""

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from benchmarks.common import by_round, check, medians, spreads, table, write_results

FULL, LMINF = "full", "LMINF"
AGREEMENT = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 0.3}
"""How far the engines' log-probabilities may be apart, root mean square: a few roundings of a
logit, which is 0.06 each for one of 16 in bfloat16."""
CHECKED_TOKENS = 512
POOL_SHARE = 1.25
"""The pool in longest prompts: what was prefilled stays in the prefix cache until it is decoded."""
POOL_BYTES = 4 << 30


class SteppedEngine:
    """A vLLM engine in this process that runs one request at a time, step by step."""

    def __init__(self, name: str, args: argparse.Namespace, longest: int) -> None:
        from vllm import LLM
        from vllm.platforms import current_platform

        max_model_len = longest + args.decode_tokens + 1
        options: dict[str, Any] = {}
        if name == LMINF:
            settings = {"n_local": args.n_local, "n_global": args.n_global}
            options = {"attention_backend": LMINF, "additional_config": {"lminf": settings}}
        elif max_model_len > args.trained_length:
            # vLLM sizes its RoPE table by this, and would read past the table's end.
            options = {"hf_overrides": {"max_position_embeddings": max_model_len}}
        self.llm = LLM(
            model=str(args.model),
            dtype=args.dtype,
            max_model_len=max_model_len,
            max_num_batched_tokens=args.chunk,
            max_num_seqs=1,
            kv_cache_memory_bytes=int(POOL_SHARE * (longest + args.chunk)) * args.token_bytes,
            enable_prefix_caching=True,
            enforce_eager=current_platform.is_cpu(),
            async_scheduling=False,  # one step, one chunk
            skip_tokenizer_init=True,
            seed=0,
            **options,
        )
        core: Any = self.llm.llm_engine.engine_core
        self._scheduler = core.engine_core.scheduler
        self._pool = self._scheduler.kv_cache_manager.block_pool
        self._names = map(str, itertools.count())
        config = self._scheduler.kv_cache_config
        self.block_bytes = sum(t.size for t in config.kv_cache_tensors) // config.num_blocks

    def begin(self, token_ids: list[int], max_tokens: int, **options: Any) -> None:
        """Queues a greedy request for exactly ``max_tokens`` tokens."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, **options
        )
        self.llm.llm_engine.add_request(next(self._names), {"prompt_token_ids": token_ids}, params)

    @property
    def is_running(self) -> bool:
        return self.llm.llm_engine.has_unfinished_requests()

    def step(self) -> tuple[float, list[Any]]:
        """Runs one step: its seconds, and what came out."""
        begin = time.perf_counter()
        outputs: list[Any] = self.llm.llm_engine.step()
        return time.perf_counter() - begin, outputs

    def finish(self) -> Any:
        """Steps until the request ends; what came out last."""
        outputs: list[Any] = []
        while self.is_running:
            _, outputs = self.step()
        return outputs[0]

    def held_bytes(self) -> int:
        """Bytes of the blocks that the running request holds; one block is vLLM's null block."""
        held = self._pool.num_gpu_blocks - 1 - self._pool.get_num_free_blocks()
        return held * self.block_bytes

    def forget(self) -> None:
        """Empties the prefix cache."""
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its prefix cache")


def check_agreement(engines: dict[str, SteppedEngine], args: argparse.Namespace) -> float:
    """How far the engines' log-probabilities of a prompt inside the window are apart, root mean
    square.

    Raises:
        WrongResultError: further than rounding explains.
    """
    length = min(CHECKED_TOKENS, args.n_local, args.chunk, *args.lengths)
    given: list[list[float]] = []
    for engine in engines.values():
        engine.begin(args.tokens[:length], max_tokens=1, prompt_logprobs=0)
        output = engine.finish()
        pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        given.append([choices[token].logprob for token, choices in pairs])
    squares = [(a - b) ** 2 for a, b in zip(*given, strict=True)]
    distance = (sum(squares) / len(squares)) ** 0.5
    check(f"the engines' log-probabilities of {length} tokens", distance, AGREEMENT[args.dtype])
    return distance


def prefill(engines: dict[str, SteppedEngine], length: int, args: argparse.Namespace) -> Any:
    """Prefills a cold prompt on each engine, chunk by chunk in turns.

    Yields a record for every engine and chunk: its end in tokens, its seconds, the bytes held.
    """
    for engine in engines.values():
        engine.forget()
        engine.begin(args.tokens[:length], max_tokens=1)
    ends = dict.fromkeys(engines, 0)
    while unfinished := [name for name in engines if engines[name].is_running]:
        for name in unfinished:
            seconds, _ = engines[name].step()
            ends[name] = min(ends[name] + args.chunk, length)
            yield {
                "contender": name,
                "length": length,
                "end": ends[name],
                "seconds": seconds,
                "held_bytes": engines[name].held_bytes(),
            }


def decode(engine: SteppedEngine, length: int, args: argparse.Namespace) -> dict[str, Any]:
    """Generates after a prompt: median seconds of a token, without the prompt's own step."""
    engine.begin(args.tokens[:length], max_tokens=args.decode_tokens + 1)
    seconds, held = [], 0
    while engine.is_running:
        took, outputs = engine.step()
        held = max(held, engine.held_bytes())
        seconds += [took] if outputs else []
    if len(seconds) != args.decode_tokens + 1:
        raise RuntimeError(f"{len(seconds)} steps gave a token, not {args.decode_tokens + 1}")
    return {"length": length, "seconds": statistics.median(seconds[1:]), "held_bytes": held}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Starts both engines, compares them, then times them."""
    lengths = {FULL: args.lengths, LMINF: sorted({*args.lengths, *args.lminf_lengths})}
    engines = {name: SteppedEngine(name, args, lengths[name][-1]) for name in (FULL, LMINF)}
    agreement = check_agreement(engines, args)
    prefills: list[dict[str, Any]] = []
    decodes: list[dict[str, Any]] = []
    steps = args.rounds * sum(-(-n // args.chunk) for of in lengths.values() for n in of)
    bar = tqdm(total=steps + args.decode_rounds * sum(map(len, lengths.values())), unit="steps")
    for number in range(args.rounds):
        # Longest last: it leaves what is decoded from in the prefix cache.
        for length in lengths[LMINF]:
            longest = {name: length for name in engines if length in lengths[name]}
            if length == lengths[LMINF][-1]:
                longest[FULL] = lengths[FULL][-1]
            for record in _together(engines, longest, args):
                prefills.append({"round": number, **record})
                bar.update()
    for number in range(args.decode_rounds):
        for length in lengths[LMINF]:
            for name in engines:
                if length in lengths[name]:
                    record = decode(engines[name], length, args)
                    decodes.append({"round": number, "contender": name, **record})
                    bar.update()
    bar.close()
    return {"prefill": prefills, "decode": decodes, "agreement": agreement}


def _together(
    engines: dict[str, SteppedEngine], lengths: dict[str, int], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """`prefill` of prompts that may differ in length: turns as long as both have chunks."""
    runs = [prefill({name: engines[name]}, length, args) for name, length in lengths.items()]
    for turn in itertools.zip_longest(*runs):
        yield from filter(None, turn)


def tables(data: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Titles and Markdown tables of a results file."""
    chunks, decodes = pd.DataFrame(data["prefill"]), pd.DataFrame(data["decode"])
    whole = chunks.groupby(["length", "contender", "round"], as_index=False)["seconds"].sum()
    columns: dict[str, pd.Series] = {}
    for kind, records, unit, per in (
        ("prefill", whole, "tok/s", None),
        ("decode", decodes, "ms/tok", 1e3),
    ):
        frame = by_round(records, ("length",))
        for name in (FULL, LMINF):
            values = frame[name]
            if per is None:
                values = values.index.get_level_values("length").astype(float) / values
            columns[f"{kind} {name} {unit}"] = medians(values, per or 1.0)
        columns[f"{kind}: full / LMINF"] = spreads(frame[FULL] / frame[LMINF])
    held = pd.concat((chunks, decodes)).groupby(["length", "contender"])["held_bytes"].max()
    held = held.unstack("contender").astype(float)
    for name in (FULL, LMINF):
        fit = (POOL_BYTES / held[name]).map(lambda x: "" if x != x else str(int(x)))
        columns[f"KV held {name} MB"] = held[name].map(lambda b: "" if b != b else f"{b / 1e6:.1f}")
        columns[f"requests in 4 GiB, {name}"] = fit
    for cells in columns.values():
        cells.index = cells.index.astype(int).rename("length")
    yield "Engines", table(columns, ("tokens",))


def notes(data: dict[str, Any]) -> list[str]:
    """What a reader of the table must know, and how flat LMINF is."""
    setting = data["setting"]
    decodes = by_round(pd.DataFrame(data["decode"]), ("length",))[LMINF].unstack("length")
    first, last = decodes.columns[0], decodes.columns[-1]
    flat = (decodes[last] / decodes[first]).median()
    return [
        f"{setting['model']} in {setting['dtype']}, n_local {setting['n_local']}, one request at a "
        f"time, chunks of {setting['chunk']}; medians of {setting['rounds']} rounds (prefill) and "
        f"{setting['decode_rounds']} (decode) in which both took turns, with quartiles. KV held is "
        "the most at once.",
        f"LMINF's decode at {last} tokens takes {flat:.3f} times that at {first}.",
        "Beyond the trained length full attention has a longer RoPE table here, for the sake of "
        "its times; what it answers there is no use.",
    ]


def draw(data: dict[str, Any], path: Path) -> None:
    """Prefill, decode and memory against length, as a PNG."""
    from matplotlib.figure import Figure

    chunks, decodes = pd.DataFrame(data["prefill"]), pd.DataFrame(data["decode"])
    whole = chunks.groupby(["length", "contender", "round"], as_index=False)["seconds"].sum()
    whole = whole.assign(value=whole["length"] / whole["seconds"])
    panels = {
        "Prefill, tokens per second": whole,
        "Decode, ms per token": decodes.assign(value=1e3 * decodes["seconds"]),
        "KV cache held, MB": chunks.assign(value=chunks["held_bytes"] / 1e6),
    }
    figure = Figure(figsize=(13, 4), dpi=150, layout="constrained")
    for axes, (title, frame) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        how = "max" if title.startswith("KV") else "median"
        for name, color in ((FULL, "#d1495b"), (LMINF, "#1f6fb2")):
            values = frame[frame["contender"] == name].groupby("length")["value"].agg(how)
            axes.plot(values.index, values, color=color, marker="o", label=name)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set(title=title, xlabel="tokens")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e5e5")
        axes.legend()
    figure.savefig(path)
    print(f"written: {path}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; refuses what can be seen to be wrong before anything starts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--output", type=Path, default=Path("build/bench/engines.json"))
    parser.add_argument("--dtype", default="bfloat16", choices=tuple(AGREEMENT))
    parser.add_argument("--lengths", type=_lengths, default=[1024, 4096, 8192, 32768])
    parser.add_argument("--lminf-lengths", type=_lengths, default=[131072])
    for name, default, what in (
        ("n-local", 2048, "tokens in the window"),
        ("n-global", 10, "first tokens that stay visible"),
        ("chunk", 2048, "tokens prefilled in one step"),
        ("rounds", 3, "how often everything is prefilled"),
        ("decode-rounds", 16, "how often everything is decoded"),
        ("decode-tokens", 16, "tokens timed in each decode"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} ({default})")
    args = parser.parse_args(argv)
    problems = [
        f"--{name.replace('_', '-')} {value}: it must be 1 or more"
        for name, value in vars(args).items()
        if isinstance(value, int) and value < (name != "n_global")
    ]
    if not (args.model / "config.json").is_file():
        problems.append(f"--model {args.model}: no checkpoint there (it has no config.json)")
    if problems:
        parser.error("; ".join(problems))
    return args


def _lengths(text: str) -> list[int]:
    return sorted({int(part) for part in text.split(",") if part})


def main(argv: list[str] | None = None) -> None:
    """Measures, prints, and writes the results file and its picture."""
    args = parse(argv)
    # The engines run in this process: on few cores vLLM's scheduler would take one from the model.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.pop("VLLM_ATTENTION_BACKEND", None)  # it would select LMINF for both
    import torch
    from vllm.engine.arg_utils import EngineArgs

    from vllm_lminf import compat
    from vllm_lminf.cli.model_facts import kv_bytes_per_token

    model = EngineArgs(model=str(args.model), dtype=args.dtype).create_model_config()
    args.trained_length = compat.trained_length(model) or max(args.lengths)
    args.token_bytes = kv_bytes_per_token(model)
    generator = torch.Generator().manual_seed(0)
    longest = max(*args.lengths, *args.lminf_lengths)
    args.tokens = torch.randint(model.get_vocab_size(), (longest,), generator=generator).tolist()
    setting = {
        "model": args.model.name,
        **{
            name: getattr(args, name)
            for name in ("dtype", "n_local", "n_global", "chunk", "rounds", "decode_rounds")
        },
    }
    data = {"setting": setting, **measure(args)}
    for title, text in tables(data):
        print(f"\n{title}\n\n{text}")
    print("", *notes(data), sep="\n")
    write_results(args.output, **data)
    draw(data, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
