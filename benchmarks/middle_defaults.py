"""Which settings of the middle to take: what a real model finds again with each, and what it costs
in log-loss.

A model reads a prompt under a Λ. Rows that don't look are computed once; then, for each setting,
the last rows of the prompt and the answer. Retrieval: a number of five digits stands in the middle,
in the sentences of the passkey task or in prose, and is asked for. Log-loss: the last tokens of a
text, all of which look.

    python -m benchmarks.middle_defaults --model build/models/SmolLM2-135M-Instruct

writes docs/middle_defaults/results.json, and its tables into docs/middle_defaults.md.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from benchmarks import studies, texts
from benchmarks.middle_model import StudiedLlama
from vllm_lminf.cli.passkey.results import Share
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
from vllm_lminf.middle import Middle
from vllm_lminf.pattern import LambdaPattern

PAGE = Path(__file__).parents[1] / "docs" / "middle_defaults.md"
MOST_ROWS = 128
CENTRE = {"top_k": 16, "rows": 64, "distance": 4096, "from_layer": 5, "block_size": 1}
VARIED: dict[str, tuple[int, ...]] = {
    "rows": (1, 16, 64, MOST_ROWS),
    "top_k": (4, 16, 64),
    "distance": (1024, 2048, 4096),
    "from_layer": (1, 5, 10),
}
BLOCKS = ((16, 16), (64, 4), (128, 2))
"""Sizes of a block, and how many of them."""

NOTHING = Middle(0, distance=0, rows=1)

Record = dict[str, Any]


def settings() -> list[Middle]:
    """One setting varied at a time, the others as in the centre; then blocks in place of tokens."""
    varied = [CENTRE | {name: value} for name, values in VARIED.items() for value in values]
    blocks = [CENTRE | {"block_size": size, "top_k": k} for size, k in BLOCKS]
    return [NOTHING, *dict.fromkeys(Middle(**each) for each in (*varied, *blocks))]


def prompts(model: StudiedLlama, args: argparse.Namespace) -> Iterator[tuple[str, str, list[int]]]:
    """The task, the key and the tokens of every prompt whose key is outside the window."""
    builder = PromptBuilder(model.tokenizer)
    prose = model.tokenizer.encode(texts.load("alice"))
    cells = list(cells_of(args.lengths, even_depths(args.depths), args.keys, seed=0))
    for cell in cells:
        if cell.depth * cell.length < cell.length - args.n_local - MOST_ROWS:
            yield "passkey", cell.key, builder.prompt(cell)
            yield "prose", cell.key, _in_prose(model.tokenizer, prose, cell)


def _in_prose(tokenizer: Any, prose: list[int], cell: Cell) -> list[int]:
    """The passkey task, with a novel for its filler."""
    needle = tokenizer.encode("\n\n" + NEEDLE.format(key=cell.key) + "\n\n")
    question = tokenizer.encode("\n\n" + QUESTION)
    room = cell.length - ANSWER_TOKENS - len(needle) - len(question)
    place = round(cell.depth * room)
    return [*prose[:place], *needle, *prose[place:room], *question]


def answer(model: StudiedLlama, token_ids: list[int], middle: Middle) -> str:
    """What comes behind a prompt of which all but the last `MOST_ROWS` tokens are in the cache."""
    first_row = middle.first_row(len(token_ids))
    model.go_back(len(token_ids) - MOST_ROWS)
    logits = model.run(token_ids[-MOST_ROWS:], middle, first_row)
    said: list[int] = []
    for _ in range(ANSWER_TOKENS):
        said.append(int(logits[-1].argmax()))
        logits = model.run(said[-1:], middle, first_row)
    text: str = model.tokenizer.decode(said)
    return text


def retrieval(model: StudiedLlama, args: argparse.Namespace) -> Iterator[Record]:
    """For every prompt and setting, whether the key was found."""
    for task, key, token_ids in tqdm(list(prompts(model, args)), desc="prompts"):
        model.start()
        model.run(token_ids[:-MOST_ROWS])
        for number, middle in enumerate(settings()):
            found = is_found(answer(model, token_ids, middle), key)
            yield {"setting": number, "task": task, "length": len(token_ids), "found": found}


def log_losses(model: StudiedLlama, args: argparse.Namespace) -> Iterator[Record]:
    """For every text, place and setting, the mean log-loss of the tokens behind that place."""
    for name in texts.TEXTS:
        token_ids = model.tokenizer.encode(texts.load(name))
        for place in tqdm(args.places, desc=name):
            scored = token_ids[place : place + args.scored]
            model.start()
            model.run(token_ids[:place])
            for number, middle in enumerate(settings()):
                model.go_back(place)
                logits = model.run(scored, middle, place, num_logits=len(scored))
                losses = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(scored[1:]))
                yield {
                    "setting": number,
                    "text": name,
                    "place": place,
                    "loss": losses.item(),
                }


def measure(args: argparse.Namespace) -> Record:
    pattern = LambdaPattern(args.n_global, args.n_local, args.n_local)
    model = StudiedLlama(args.model, pattern, torch.bfloat16)
    shown = [
        {name: getattr(each, name) for name in CENTRE} if each.top_k else {"top_k": 0}
        for each in settings()
    ]
    return {
        "command": "python -m benchmarks.middle_defaults --model MODEL",
        "model": args.model.name,
        "arguments": {name: value for name, value in vars(args).items() if name != "model"},
        "settings": shown,
        "losses": list(log_losses(model, args)),
        "answers": list(retrieval(model, args)),
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
    parser.add_argument("--places", type=int, nargs="+", default=[5000, 7500, 12000])
    parser.add_argument("--scored", type=int, default=256)
    studies.publish(PAGE, measure(parser.parse_args()), tables)


if __name__ == "__main__":
    main()
