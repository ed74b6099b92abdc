"""Times a model under LMINF and under full attention: vLLM engines in one process, in turns; with
--middle-top-k also under LMINF that recalls the middle.

Prompts are prefilled cold, a chunk of one engine and then a chunk of the other; decodes find their
prompts in the prefix cache. Before anything is timed the engines must agree on a prompt inside the
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

from benchmarks import report
from benchmarks.timing import check
from vllm_lminf.cli.lengths import parse_lengths
from vllm_lminf.cli.machine import machine
from vllm_lminf.errors import CliError

FULL, LMINF, RECALLING = "full", "LMINF", "LMINF, middle"
AGREEMENT = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 0.3}
"""How far the engines' log-probabilities may be apart, root mean square: a few roundings of a
logit, which is 0.06 each for one of 16 in bfloat16."""
CHECKED_TOKENS = 512
WARM_UP_TOKENS = 4
POOL_SHARE = 1.25
"""The pool in longest prompts: what was prefilled stays in the prefix cache until it is decoded."""
POOL_BYTES = 4 << 30
"""The pool for which it is told how many requests fit."""


class SteppedEngine:
    """A vLLM engine in this process that runs one request at a time, step by step."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        from vllm import LLM
        from vllm.platforms import current_platform

        longest = args.lengths_of[name][-1]
        max_model_len = longest + args.decode_tokens + 1
        options: dict[str, Any] = {}
        if name != FULL:
            settings = {"n_local": args.n_local, "n_global": args.n_global}
            if name == RECALLING:
                settings |= {"middle_top_k": args.middle_top_k, "archive_gib": args.archive_gib}
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
        self._block_bytes = sum(t.size for t in config.kv_cache_tensors) // config.num_blocks

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
        """Steps until the request ends; returns what came out last."""
        outputs: list[Any] = []
        while self.is_running:
            _, outputs = self.step()
        return outputs[0]

    def computed_tokens(self) -> int | None:
        """Tokens of the running request that are in the cache; None if none is running."""
        running = self._scheduler.running
        return running[0].num_computed_tokens if running else None

    def held_bytes(self) -> int:
        """Bytes of the blocks that the running request holds; one block is vLLM's null block."""
        held: int = self._pool.num_gpu_blocks - 1 - self._pool.get_num_free_blocks()
        return held * self._block_bytes

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
    first, *others = given
    squares = [[(a - b) ** 2 for a, b in zip(first, other, strict=True)] for other in others]
    distance = max((sum(each) / len(each)) ** 0.5 for each in squares)
    check(f"one engine beside the other ({length} tokens)", distance, AGREEMENT[args.dtype])
    return distance


def prefill(
    name: str, engine: SteppedEngine, length: int, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Prefills a cold prompt, a chunk at a time; yields a record of each, `end` its last token."""
    engine.forget()
    engine.begin(args.tokens[:length], max_tokens=1)
    end = 0
    while engine.is_running:
        seconds, _ = engine.step()
        end = min(end + args.chunk, length)
        if (computed := engine.computed_tokens() or length) != end:
            raise RuntimeError(f"{computed} tokens are prefilled where {end} were expected")
        held = engine.held_bytes()
        case = {"contender": name, "length": length, "end": end}
        yield {**case, "seconds": seconds, "held_bytes": held}


def prefill_in_turns(
    engines: dict[str, SteppedEngine], lengths: dict[str, int], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """`prefill` of a prompt on each engine, chunk by chunk in turns."""
    runs = [prefill(name, engines[name], length, args) for name, length in lengths.items()]
    for turn in itertools.zip_longest(*runs):
        yield from filter(None, turn)


def decode(
    name: str, engine: SteppedEngine, length: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Generates after a prompt: median seconds of a token, without the prompt's own step."""
    engine.begin(args.tokens[:length], max_tokens=args.decode_tokens + 1)
    seconds, held, cached = [], 0, None
    while engine.is_running:
        took, outputs = engine.step()
        held = max(held, engine.held_bytes())
        if outputs and cached is None:
            cached = outputs[0].num_cached_tokens
        elif outputs:
            seconds.append(took)
    if len(seconds) != args.decode_tokens:
        raise RuntimeError(f"{len(seconds)} steps gave a token, not {args.decode_tokens}")
    case = {"contender": name, "length": length, "cached_tokens": cached}
    return {**case, "seconds": statistics.median(seconds), "held_bytes": held}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Starts the engines, compares them, runs every kind of step once, then times them."""
    engines = {name: SteppedEngine(name, args) for name in args.lengths_of}
    agreement = check_agreement(engines, args)
    for engine in engines.values():
        engine.begin(args.tokens[: args.chunk][::-1], max_tokens=WARM_UP_TOKENS)
        engine.finish()
    chunks = sum(
        -(-length // args.chunk) for lengths in args.lengths_of.values() for length in lengths
    )
    bar = tqdm(total=args.rounds * chunks, desc="prefill", unit="chunks")
    prefills: list[dict[str, Any]] = []
    for number in range(args.rounds):
        # The longest prompts come last, together: what is decoded from stays in the prefix cache.
        turns = [
            {name: n for name, lengths in args.lengths_of.items() if n in lengths[:-1]}
            for n in args.lengths_of[LMINF]
        ]
        turns.append({name: lengths[-1] for name, lengths in args.lengths_of.items()})
        for turn in turns:
            for record in prefill_in_turns(engines, turn, args):
                prefills.append({"round": number, **record})
                bar.update()
    bar.close()
    turns_of_decode = [
        (number, name, length)
        for number in range(args.decode_rounds)
        for length in args.lengths_of[LMINF]
        for name in engines
        if length in args.lengths_of[name]
    ]
    decodes = [
        {"round": number, **decode(name, engines[name], length, args)}
        for number, name, length in tqdm(turns_of_decode, desc="decode", unit="runs")
    ]
    return {"prefill": prefills, "decode": decodes, "agreement": agreement}


def whole_prompts(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of each prompt together, as records."""
    chunks = pd.DataFrame(data["prefill"])
    keys = ["length", "contender", "round"]
    summed = chunks.groupby(keys, as_index=False)[["seconds"]].sum()
    return summed.to_dict("records")


def speeds(data: dict[str, Any]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Prefill in tokens a second, and decode in milliseconds a token: a column an engine, a row a
    length and round."""
    prefills = report.by_round(whole_prompts(data), ("length",))
    tokens = prefills.index.get_level_values("length").astype(int)
    decodes = report.by_round(data["decode"], ("length",))
    return prefills.rdiv(tokens, axis=0), 1e3 * decodes


def held(data: dict[str, Any]) -> pd.DataFrame:
    """The most bytes that a request held at once: a column an engine, a row a length."""
    both = pd.DataFrame([*data["prefill"], *data["decode"]])
    return both.groupby(["length", "contender"])["held_bytes"].max().unstack()


def tables(data: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Titles and Markdown tables of a results file."""
    prefills, decodes = speeds(data)
    columns: dict[str, pd.Series] = {}
    for kind, unit, frame in (("prefill", "tok/s", prefills), ("decode", "ms/tok", decodes)):
        columns |= {f"{kind} {n} {unit}": report.medians(frame[n]) for n in (FULL, LMINF)}
        numerator, denominator = (LMINF, FULL) if kind == "prefill" else (FULL, LMINF)
        faster = report.spreads(frame[numerator] / frame[denominator])
        columns[f"{kind}: LMINF is faster by"] = faster
    most = held(data)
    for name in (FULL, LMINF):
        columns[f"KV held {name} MB"] = report.texts(most[name] / 1e6, report.significant)
        columns[f"requests in 4 GiB, {name}"] = report.texts(
            POOL_BYTES // most[name], "{:.0f}".format
        )
    yield "Engines", report.table(columns, ("tokens",))


def notes(data: dict[str, Any]) -> list[str]:
    """What a reader of the table must know."""
    setting = data["setting"]
    lines = [
        f"{report.surroundings(data)}; {setting['model']} in {setting['dtype']}, n_local "
        f"{setting['n_local']}, n_global {setting['n_global']}, one request at a time, chunks of "
        f"{setting['chunk']}; medians of {setting['rounds']} (prefill) and "
        f"{setting['decode_rounds']} (decode) rounds in which both engines took turns, with "
        "quartiles of the ratios in each round. KV held is the most at once, and a pool takes "
        f"requests by it. The engines' log-probabilities of a short prompt differ by "
        f"{data['agreement']:.2g}, root mean square.",
        *flatness(data),
        *recalling(data),
    ]
    if setting["trained_length"] < max(n for n in held(data)[FULL].dropna().index):
        lines.append(
            f"Full attention beyond the trained length of {setting['trained_length']} tokens has a "
            "longer RoPE table here, for the sake of its times; what it answers there is no use."
        )
    return lines


def flatness(data: dict[str, Any]) -> list[str]:
    """How LMINF at its longest length compares with shorter ones, in words.

    Decode is compared from twice the window on, prefill from four times: below, the window isn't
    full, or has been for a small part of the prompt.
    """
    prefills, decodes = (frame[LMINF].unstack("length") for frame in speeds(data))
    n_local, lengths, lines = data["setting"]["n_local"], list(prefills.columns), []
    longest = lengths[-1]
    if base := next((n for n in lengths[:-1] if n >= 2 * n_local), None):
        ratio = report.spread(decodes[longest] / decodes[base], 3)
        lines.append(f"LMINF's decode at {longest} tokens takes {ratio} times that at {base}.")
    if base := next((n for n in lengths[:-1] if n >= 4 * n_local), None):
        ratio = report.spread(prefills[longest] / prefills[base], 3)
        lines.append(
            f"LMINF's prefill of {longest} tokens runs at {ratio} times the tokens/s of {base}; "
            f"the first {n_local} of either see half a window."
        )
        chunks = pd.DataFrame(data["prefill"]).query("contender == @LMINF and length == @longest")
        begin = chunks["end"] - data["setting"]["chunk"]
        early = chunks[(begin >= n_local) & (chunks["end"] <= base)]
        # The last one may be shorter.
        late = chunks[(begin >= longest * 3 // 4) & (chunks["end"] < longest)]
        late, early = (part.groupby("round")["seconds"].median() for part in (late, early))
        if len(late) and len(early):
            lines.append(
                f"A chunk in its last quarter takes {report.spread(late / early, 3)} times one "
                f"behind the first {n_local} and before {base}."
            )
    return lines


def recalling(data: dict[str, Any]) -> list[str]:
    """What recalling the middle costs, in words; nothing where it wasn't measured."""
    decodes = speeds(data)[1]
    if RECALLING not in decodes:
        return []
    lines = []
    for length, of_length in decodes.groupby("length", observed=True):
        slower = report.spread(of_length[RECALLING] / of_length[LMINF], 3)
        line = f"With middle_top_k {data['setting']['middle_top_k']}, a token after {length} takes "
        line += f"{slower} times what it takes without"
        faster = (of_length[FULL] / of_length[RECALLING]).dropna()
        lines.append(
            f"{line}; full attention takes {report.spread(faster, 3)} times that."
            if len(faster)
            else f"{line}."
        )
    return lines


def draw(data: dict[str, Any], path: Path) -> None:
    """Prefill, decode and memory against length, as a PNG."""
    prefills, decodes = (frame.groupby("length", observed=True).median() for frame in speeds(data))
    panels = {
        "Prefill, tokens per second": prefills,
        "Decode, ms per token": decodes,
        "KV cache held, MB": held(data) / 1e6,
    }
    figure, every = report.new_figure(len(panels), width=13)
    for axes, (title, frame) in zip(every, panels.items(), strict=True):
        for name, color in ((FULL, "#b5541c"), (LMINF, "#1f6fb4")):
            values = frame[name].dropna()
            axes.plot(values.index.astype(int), values, color=color, marker="o", label=name)
        axes.legend()
        axes.set_xscale("log", base=2)
        report.finish(axes, title, "tokens")
    figure.savefig(path)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; refuses what can be seen to be wrong before anything starts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--output", type=Path, default=Path("build/bench/engines.json"))
    parser.add_argument("--dtype", default="bfloat16", choices=tuple(AGREEMENT))
    for name, lengths, what in (
        ("lengths", "1024,4096,8192,16384,32768", "tokens, with commas between, for both engines"),
        ("lminf-lengths", "131072", "more of them, for LMINF alone; '' for none"),
    ):
        parser.add_argument(f"--{name}", default=lengths, help=f"{what} ({lengths})")
    for name, default, what in (
        ("n-local", 2048, "tokens in the window"),
        ("n-global", 10, "first tokens that stay visible"),
        ("chunk", 2048, "tokens prefilled in one step"),
        ("rounds", 3, "how often everything is prefilled"),
        ("decode-rounds", 16, "how often everything is decoded"),
        ("decode-tokens", 16, "tokens timed in each decode"),
        ("middle-top-k", 0, "also LMINF with this setting; 0 for without"),
        ("archive-gib", 4, "its setting of that name"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{what} ({default})"
        )
    args = parser.parse_args(argv)
    may_be_none = ("n_global", "middle_top_k")
    problems = [
        f"--{name.replace('_', '-')} {value}: it must be {least} or more"
        for name, value in vars(args).items()
        if isinstance(value, int) and value < (least := 0 if name in may_be_none else 1)
    ]
    if not (args.model / "config.json").is_file():
        problems.append(f"--model {args.model}: no checkpoint there (it has no config.json)")
    try:
        args.lengths = parse_lengths(args.lengths)
        more = parse_lengths(args.lminf_lengths) if args.lminf_lengths else []
        args.lengths_of = {FULL: args.lengths, LMINF: sorted({*args.lengths, *more})}
        if args.middle_top_k > 0:
            args.lengths_of[RECALLING] = args.lengths_of[LMINF]
    except CliError as error:
        problems.append(str(error))
    if problems := problems or report.problems(args.output):
        parser.error("; ".join(problems))
    return args


def main(argv: list[str] | None = None) -> None:
    """Measures, prints, and writes the results file and its picture."""
    args = parse(argv)
    # The engines run in this process: on few cores vLLM's scheduler would take one from the model.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.pop("VLLM_ATTENTION_BACKEND", None)  # it would select LMINF for both
    # Its warnings are of the tokenizer that is left out, and of threads: a screenful an engine.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    from vllm_lminf.cli.model_facts import kv_bytes_per_token

    model = EngineArgs(model=str(args.model), dtype=args.dtype).create_model_config()
    args.trained_length = model.max_model_len
    args.token_bytes = kv_bytes_per_token(model)
    generator, longest = torch.Generator().manual_seed(0), args.lengths_of[LMINF][-1]
    args.tokens = torch.randint(model.get_vocab_size(), (longest,), generator=generator).tolist()
    names = (
        *("dtype", "n_local", "n_global", "chunk", "rounds", "decode_rounds", "trained_length"),
        "middle_top_k",
    )
    where = current_platform.get_device_name()
    if current_platform.is_cpu():
        where = f"{torch.get_num_threads()} threads of {machine()['cpu']}"
    data = {
        "program": "engines",
        "where": where,
        "setting": {"model": args.model.name, **{name: getattr(args, name) for name in names}},
        **measure(args),
    }
    report.publish(args.output, data, tables, notes, draw)


if __name__ == "__main__":
    main()
