"""Which settings of the middle to take: what a real model finds again with each, and what it costs
in log-loss.

One engine reads each prompt once; the prefix cache keeps what no row that looks has touched. Then,
for each setting, it computes the last rows of the prompt and the answer. Retrieval: a number of
five digits stands in the middle, in the sentences of the passkey task or in prose, and is asked
for. Log-loss: the last tokens of a text, all of which look.

    python -m benchmarks.middle_defaults --model build/models/SmolLM2-135M-Instruct

writes docs/middle_defaults/results.json, and its tables into docs/middle_defaults.md.
"""

import argparse
import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from benchmarks import studies, texts
from vllm_lminf.cli.passkey.task import (
    ANSWER_TOKENS,
    NEEDLE,
    QUESTION,
    Cell,
    PromptBuilder,
    cells_of,
    even_depths,
    is_found,
)
from vllm_lminf.cli.retrieval.results import Share
from vllm_lminf.middle import Middle

PAGE = Path(__file__).parents[1] / "docs" / "middle_defaults.md"
MOST_ROWS = 256
CENTRE = {"top_k": 16, "rows": 64, "distance": 4096, "from_layer": 5, "block_size": 1}
VARIED: dict[str, tuple[int, ...]] = {
    "rows": (1, 16, 64, MOST_ROWS),
    "top_k": (4, 8, 16, 32, 64),
    "distance": (512, 1024, 2048, 4096, 6144),
    "from_layer": (1, 5, 10, 15, 20, 25),
}
BLOCKS = ((16, 4), (16, 16), (64, 2), (64, 8), (128, 2), (128, 4))
"""Sizes of a block, and how many of them."""

NOTHING = Middle(0, distance=0, rows=1)
FIRST = Middle(1, distance=0, rows=1)
"""With which the rows are computed that look under no setting: all layers keep their pages."""

Record = dict[str, Any]


def settings() -> list[Middle]:
    """One setting varied at a time, the others as in the centre; then blocks in place of tokens."""
    varied = [CENTRE | {name: value} for name, values in VARIED.items() for value in values]
    blocks = [CENTRE | {"block_size": size, "top_k": k} for size, k in BLOCKS]
    return [NOTHING, *dict.fromkeys(Middle(**each) for each in (*varied, *blocks))]


class StudiedEngine:
    """An engine in this process whose settings of the middle change between prompts.

    Blocks whose rows looked are told apart by the setting, so that no setting finds what another
    computed. Rows that don't look are the same for all, with pages in every layer.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher

        section = {
            "n_global": args.n_global,
            "n_local": args.n_local,
            "middle_top_k": 1,
            "middle_from_layer": 1,
            "archive_gib": 3,
        }
        self._llm: Any = LLM(
            str(args.model),
            attention_backend="LMINF",
            additional_config={"lminf": section},
            max_model_len=max(*args.lengths, *args.places) + args.scored + 1,
            max_num_seqs=1,
            max_num_batched_tokens=2048,
            kv_cache_memory_bytes=1 << 31,
            enforce_eager=True,
            async_scheduling=False,
        )
        self.tokenizer = self._llm.get_tokenizer()
        self._core = self._llm.llm_engine.engine_core.engine_core
        runner = self._llm.llm_engine.model_executor.driver_worker.worker.model_runner
        layers = runner.compilation_config.static_forward_context
        self._impls = [layers[name].impl for name in layers if f"{name}.archive" in layers]
        self._archives = [impl.archive for impl in self._impls]
        self._builder = runner.attn_groups[-1][0].get_metadata_builder()
        pool = self._core.scheduler.kv_cache_manager.block_pool
        self._hasher = get_request_block_hasher(pool.hash_block_size, _sha256)
        self._block_size = pool.hash_block_size

    def set(self, middle: Middle, number: int) -> None:
        """Has all that comes recall so; settings are told apart by their numbers."""
        for layer, (impl, archive) in enumerate(zip(self._impls, self._archives, strict=True), 1):
            impl.archive = archive if layer >= middle.from_layer else None
            impl.layer_config = replace(impl.layer_config, middle=middle)
            impl._kernels.clear()
            impl._kv_cache = _none
        self._builder._middle = middle
        block_size, hasher = self._block_size, self._hasher

        def hash_blocks(request: Any) -> list[Any]:
            known = len(request.block_hashes)
            unmarked = max(0, middle.first_row(request.num_prompt_tokens) // block_size - known)
            hashes = hasher(request)
            mark = f"{number} {middle.first_row(request.num_prompt_tokens)}".encode()
            return hashes[:unmarked] + [
                type(each)(hashlib.sha256(mark + each).digest()) for each in hashes[unmarked:]
            ]

        self._core.request_block_hasher = hash_blocks

    def ask(self, token_ids: list[int], num_tokens: int, scored: int = 0) -> tuple[str, float]:
        """What is generated greedily behind a prompt, and the mean log-loss of its last tokens."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0,
            max_tokens=num_tokens,
            prompt_logprobs=0 if scored else None,
            detokenize=not scored,  # what was found in the prefix cache has no token to name
            skip_reading_prefix_cache=False,
        )
        prompt = {"prompt_token_ids": token_ids}
        (output,) = self._llm.generate([prompt], params, use_tqdm=False)
        loss = 0.0
        if scored:
            tail = zip(token_ids[-scored:], output.prompt_logprobs[-scored:], strict=True)
            loss = -sum(at[token].logprob for token, at in tail) / scored
        return output.outputs[0].text, loss


def _sha256(value: Any) -> bytes:
    from vllm.utils.hashing import sha256

    hashed: bytes = sha256(value)
    return hashed


def _none() -> None:
    """No cache is bound: the kernel is made anew."""


def prompts(engine: StudiedEngine, args: argparse.Namespace) -> Iterator[tuple[Any, ...]]:
    """The task, the key and the tokens of every prompt whose key is outside the window."""
    builder = PromptBuilder(engine.tokenizer)
    prose = engine.tokenizer.encode(texts.load("alice"))
    for cell in cells_of(args.lengths, even_depths(args.depths), args.keys, seed=0):
        if cell.depth * cell.length < cell.length - args.n_local - MOST_ROWS:
            yield "passkey", cell, builder.prompt(cell)
            yield "prose", cell, _in_prose(engine.tokenizer, prose, cell)


def _in_prose(tokenizer: Any, prose: list[int], cell: Cell) -> list[int]:
    """The passkey task, with a novel for its filler."""
    needle = tokenizer.encode("\n\n" + NEEDLE.format(key=cell.key) + "\n\n")
    question = tokenizer.encode("\n\n" + QUESTION)
    room = cell.length - ANSWER_TOKENS - len(needle) - len(question)
    place = round(cell.depth * room)
    return [*prose[:place], *needle, *prose[place:room], *question]


def retrieval(engine: StudiedEngine, args: argparse.Namespace) -> Iterator[Record]:
    """For every prompt and setting, whether the key was found."""
    for task, cell, token_ids in tqdm(list(prompts(engine, args)), desc="prompts"):
        engine.set(FIRST, -1)
        engine.ask(token_ids[:-MOST_ROWS], 1)
        for number, middle in enumerate(settings()):
            engine.set(middle, number)
            said, _ = engine.ask(token_ids, ANSWER_TOKENS)
            found = is_found(said, cell.key)
            yield {
                "setting": number,
                "task": task,
                "length": cell.length,
                "depth": cell.depth,
                "found": found,
                "said": said,
            }


def log_losses(engine: StudiedEngine, args: argparse.Namespace) -> Iterator[Record]:
    """For every text, place and setting, the mean log-loss of the tokens behind that place."""
    for name in texts.TEXTS:
        token_ids = engine.tokenizer.encode(texts.load(name))
        for place in tqdm(args.places, desc=name):
            engine.set(FIRST, -1)
            engine.ask(token_ids[:place], 1)
            for number, middle in enumerate(settings()):
                engine.set(replace(middle, rows=args.scored), number)
                scored = token_ids[: place + args.scored]
                _, loss = engine.ask(scored, 1, args.scored)
                yield {"setting": number, "text": name, "place": place, "loss": loss}


def measure(args: argparse.Namespace) -> Record:
    engine = StudiedEngine(args)
    shown = [
        {name: getattr(each, name) for name in CENTRE} if each.top_k else {"top_k": 0}
        for each in settings()
    ]
    return {
        "command": "python -m benchmarks.middle_defaults --model MODEL",
        "model": args.model.name,
        "arguments": {name: value for name, value in vars(args).items() if name != "model"},
        "settings": shown,
        "losses": list(log_losses(engine, args)),
        "answers": list(retrieval(engine, args)),
    }


def tables(data: Record) -> Iterator[tuple[str, str]]:
    """What was found and lost with each setting."""
    frame = pd.DataFrame(data["settings"])
    answers, losses = pd.DataFrame(data["answers"]), pd.DataFrame(data["losses"])
    columns = {}
    for task, of_task in answers.groupby("task"):
        found = of_task.groupby("setting")["found"].agg(["sum", "count"])
        columns[f"{task}: found"] = pd.Series(
            [
                f"{int(n)}/{int(of)} ({low:.2f}-{high:.2f})"
                for n, of in found.itertuples(index=False)
                for low, high in [Share(int(n), int(of)).interval]
            ]
        )
    for name, of_text in losses.groupby("text"):
        by_place = of_text.pivot_table(index="place", columns="setting", values="loss")
        change = by_place.sub(by_place[0], axis="index")
        error = change.std() / len(change) ** 0.5
        columns[f"{name}: log-loss"] = pd.Series(
            [f"{mean:+.4f} ± {e:.4f}" for mean, e in zip(change.mean(), error, strict=True)]
        )
    keys = {"block_size": "unit", "top_k": "top k", "rows": "rows", "distance": "distance"}
    keys["from_layer"] = "from layer"
    text = frame.map(lambda x: "" if pd.isna(x) else str(int(x)))
    text["block_size"] = text["block_size"].replace("1", "token")
    yield "Found again, and the change of log-loss", studies.table(text, keys, columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192])
    parser.add_argument("--depths", type=int, default=4)
    parser.add_argument("--keys", type=int, default=2)
    parser.add_argument("--n-global", type=int, default=10)
    parser.add_argument("--n-local", type=int, default=2048)
    parser.add_argument("--places", type=int, nargs="+", default=[4000, 8000, 12000])
    parser.add_argument("--scored", type=int, default=256)
    studies.publish(PAGE, measure(parser.parse_args()), tables)


if __name__ == "__main__":
    main()
