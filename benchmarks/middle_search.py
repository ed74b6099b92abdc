"""How cheaply the best keys of the middle can be found: indexes of quantised keys, and bounds of
blocks, on what a real model's layers ask for.

A model reads a text under a Λ; the queries of its last tokens are turned to one distance and look
for their best keys of the middle, in every layer from some on. Counted is what each way of
searching would have to look at.

    python -m benchmarks.middle_search --model build/models/SmolLM2-135M-Instruct

writes docs/middle_search/results.json, and its tables into docs/middle_search.md.
"""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from benchmarks import report, studies, texts
from benchmarks.middle_model import Seen, StudiedLlama, turn
from vllm_lminf.kernels.key_index import BITS, IndexFormat, KeyIndex
from vllm_lminf.pattern import LambdaPattern, cdiv
from vllm_lminf.rope import RotationTables

PAGE = Path(__file__).parents[1] / "docs" / "middle_search.md"
CANDIDATES = (32, 64, 128, 256)
VISITED = (256, 1024)
BLOCK_SIZES = (16, 32, 64, 128)
FIRST_KEYS = 128
INDEX, OF_FIRST, UNCENTRED, PLAIN = (
    "index",
    f"index, centre of the first {FIRST_KEYS} keys",
    "index, not centred",
    "plain rounding, bound by its step",
)

Record = dict[str, Any]


def of_layers(
    model: StudiedLlama, token_ids: list[int], args: argparse.Namespace
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each layer that recalls and each key head: the queries of its group, turned to the
    distance, [group * num_queries, head_size], and the middle keys that all of them have,
    [num_keys, head_size]."""
    model.start()
    model.run(token_ids[: -args.queries])
    for seen in model.watch(token_ids[-args.queries :]):
        if seen.layer >= args.from_layer:
            yield from _of_key_heads(seen, model.pattern, model.tables, args.distance)


def _of_key_heads(
    seen: Seen, pattern: LambdaPattern, tables: RotationTables, distance: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    num_queries, num_kv_heads = len(seen.query), seen.key.shape[1]
    hidden = pattern.middle(len(seen.key) - num_queries)
    positions = torch.full((num_queries,), distance)
    query = turn(seen.query.transpose(0, 1), positions, tables)
    for head, group in enumerate(query.unflatten(0, (num_kv_heads, -1))):
        yield group.flatten(0, 1), seen.key[hidden.start : hidden.stop, head]


def plain_rounding(
    query: torch.Tensor, key: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Centred keys rounded to whole multiples of one step a key, without a rotation; see
    `KeyIndex.scan` for what is returned. The bound is that of every element's rounding."""
    centre = key.mean(dim=0)
    step = (key - centre).abs().amax(dim=-1, keepdim=True) / (2 ** (bits - 1) - 1)
    rounded = ((key - centre) / step).round() * step + centre
    return query @ rounded.T, query.abs().sum(dim=-1, keepdim=True) * step.T / 2


def searched(
    estimate: torch.Tensor, bound: torch.Tensor, exact: torch.Tensor, top_k: int
) -> Record:
    """What a search by these estimates and bounds comes to; all are [rows, num_keys].

    Returns:
        Of every row: how many keys may reach the k-th best exact product, [rows]: so many
        candidates in the order of their bounds make the result certain; whether it is certain
        after so many in the order of their estimates, [rows]; and the ranks of the exact best ones
        in both orders, [rows, top_k].
    """
    best = exact.topk(top_k, dim=-1)
    highest = estimate + bound

    def ranks(by: torch.Tensor) -> torch.Tensor:
        return (by[:, None] > by.gather(-1, best.indices)[..., None]).sum(dim=-1)

    found = {
        "needed": (highest >= best.values[:, -1:]).sum(dim=-1),
        "rank": ranks(estimate),
        "rank by bound": ranks(highest),
    }
    for m in CANDIDATES:
        candidates = estimate.topk(m, dim=-1).indices
        others = highest.scatter(-1, candidates, -torch.inf).amax(dim=-1)
        known = exact.gather(-1, candidates).topk(top_k, dim=-1).values[:, -1]
        found[f"certified {m}"] = others < known
    return found


def index_ways(
    query: torch.Tensor, key: torch.Tensor
) -> Iterator[tuple[str, int, torch.Tensor, torch.Tensor]]:
    """Each way to search an index, its bits, its estimates and its bounds."""
    centres = {
        INDEX: key.mean(dim=0),
        OF_FIRST: key[:FIRST_KEYS].mean(dim=0),
        UNCENTRED: torch.zeros_like(key[0]),
    }
    for name, centre in centres.items():
        for bits in BITS if name == INDEX else (2, 4, 8):
            index = KeyIndex.of(key[:, None], bits, centre[None])
            estimate, bound = index.scan(query[:, None])
            yield name, bits, estimate[0], bound[0]
    for bits in (2, 3, 4, 8):
        yield PLAIN, bits, *plain_rounding(query, key, bits)


def block_ways(
    query: torch.Tensor, key: torch.Tensor, size: int
) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Each way to rank blocks: by what, [rows, num_blocks], and whether that is an upper bound of
    the products of a block's keys."""
    blocks = key[: len(key) // size * size].unflatten(0, (-1, size))
    low, high, mean = blocks.amin(dim=1), blocks.amax(dim=1), blocks.mean(dim=1)
    corners = query.clamp(min=0) @ high.T + query.clamp(max=0) @ low.T
    radius = (blocks - mean[:, None]).norm(dim=-1).amax(dim=-1)
    ball = query @ mean.T + query.norm(dim=-1, keepdim=True) * radius
    yield "min and max", corners, True
    yield "centre and radius", ball, True
    yield "the lower of both", torch.minimum(corners, ball), True
    yield "mean key", query @ mean.T, False
    yield (
        "best exact score",
        (query @ key.T)[:, : blocks[..., 0].numel()].unflatten(-1, (-1, size)).amax(dim=-1),
        False,
    )


def blocks_searched(
    query: torch.Tensor, key: torch.Tensor, size: int, top_k: int
) -> Iterator[tuple[str, Record]]:
    """By way: of every row the share of the blocks whose bound reaches the k-th best product, and
    the share of the best keys that stand in the blocks that come first."""
    key = key[: len(key) // size * size]
    best = (query @ key.T).topk(top_k, dim=-1)
    for name, by, is_bound in block_ways(query, key, size):
        place = by.argsort(dim=-1, descending=True).argsort(dim=-1)
        places = place.gather(-1, best.indices // size)
        yield (
            name,
            {
                "visited": (by >= best.values[:, -1:]).float().mean(dim=-1) if is_bound else None,
                **{
                    f"found {tokens}": (places < cdiv(tokens, size)).float().mean(dim=-1)
                    for tokens in VISITED
                },
            },
        )


def joined(rows: Iterable[Record]) -> Record:
    """The rows of all layers and heads behind each other."""
    rows = list(rows)
    return {
        name: None if rows[0][name] is None else torch.cat([row[name] for row in rows])
        for name in rows[0]
    }


def summary(rows: Record, num_keys: int) -> Record:
    """Of the rows of `searched`: shares, and how many keys must be scored exactly."""
    needed = rows["needed"].double()
    return {
        "needed share": needed.mean().item() / num_keys,
        **{f"needed p{p}": needed.quantile(p / 100).item() for p in (50, 99)},
        "needed max": needed.max().item(),
        **{f"certified by bound {m}": (needed <= m).double().mean().item() for m in CANDIDATES},
        **{f"certified {m}": rows[f"certified {m}"].double().mean().item() for m in CANDIDATES},
        **{f"found {m}": (rows["rank"] < m).double().mean().item() for m in CANDIDATES},
        **{
            f"found by bound {m}": (rows["rank by bound"] < m).double().mean().item()
            for m in CANDIDATES
        },
    }


def measure(model: StudiedLlama, args: argparse.Namespace) -> Record:
    """Every record of every text."""
    indexes: list[Record] = []
    blocks: list[Record] = []
    num_keys = 0
    for text in args.texts:
        token_ids = model.tokenizer(texts.load(text)).input_ids[: args.tokens]
        found: dict[tuple[str, int], list[Record]] = {}
        visited: dict[tuple[str, int], list[Record]] = {}
        layers = model.num_layers - args.from_layer + 1
        total = layers * model.num_kv_heads
        for query, key in tqdm(of_layers(model, token_ids, args), text, total):
            num_keys = len(key)
            exact = (query.double() @ key.double().T).float()
            for name, bits, estimate, bound in index_ways(query, key):
                rows = searched(estimate, bound, exact, args.top_k)
                found.setdefault((name, bits), []).append(rows)
            for size in BLOCK_SIZES:
                for name, rows in blocks_searched(query, key, size, args.top_k):
                    visited.setdefault((name, size), []).append(rows)
        for (name, bits), each in found.items():
            rows = summary(joined(each), num_keys)
            indexes.append({"text": text, "way": name, "bits": bits, **rows})
        for (name, size), each in visited.items():
            means = {
                what: None if values is None else values.double().mean().item()
                for what, values in joined(each).items()
            }
            blocks.append({"text": text, "way": name, "block": size, **means})
    return {"middle keys": num_keys, "indexes": indexes, "blocks": blocks}


def tables(data: Record) -> Iterator[tuple[str, str]]:
    """Titles and Markdown tables."""
    frame = pd.DataFrame(data["indexes"])
    of_index = frame[frame["way"] == INDEX]
    share = "{:.4f}".format
    head_size = data["head size"]
    for by, word in (("found", "estimate"), ("found by bound", "bound")):
        columns = {f"m = {m}": of_index[f"{by} {m}"].map(share) for m in CANDIDATES}
        yield (
            f"Share of the true top {data['top_k']} among the m best by {word}",
            studies.table(of_index, {"text": "text", "bits": "bits"}, columns),
        )
    sizes = of_index["bits"].map(
        lambda bits: f"{IndexFormat(bits, head_size).key_bytes / (4 * head_size):.3f}"
    )
    yield (
        "Keys that have to be scored exactly, in the order of their bounds, until the result is "
        "certain",
        studies.table(
            of_index,
            {"text": "text", "bits": "bits"},
            {
                "size beside bfloat16 K and V": sizes,
                "mean": of_index["needed share"].map("{:.3%}".format),
                "median": of_index["needed p50"].map("{:.0f}".format),
                "99%": of_index["needed p99"].map("{:.0f}".format),
                "most": of_index["needed max"].map("{:.0f}".format),
            },
        ),
    )
    for by, word in (("certified", "estimate"), ("certified by bound", "bound")):
        columns = {f"m = {m}": of_index[f"{by} {m}"].map("{:.3f}".format) for m in CANDIDATES}
        yield (
            f"Share of results that are certain when the m best by {word} are scored exactly",
            studies.table(of_index, {"text": "text", "bits": "bits"}, columns),
        )
    wide = frame.pivot_table(
        index=["text", "way"], columns="bits", values="needed share", sort=False
    )
    wide = wide.reset_index()
    yield (
        "Share of the keys that have to be scored exactly, beside other ways",
        studies.table(
            wide,
            {"text": "text", "way": "way"},
            {f"{b} bits": report.texts(wide[b], "{:.3%}".format) for b in reversed(BITS)},
        ),
    )
    frame = pd.DataFrame(data["blocks"])
    yield (
        "Blocks: the share that must be visited before the result is certain, and the share of the "
        f"true top {data['top_k']} found when the blocks of so many tokens are visited",
        studies.table(
            frame,
            {"text": "text", "block": "block", "way": "by"},
            {
                "must be visited": report.texts(frame["visited"], "{:.1%}".format),
                **{f"{t} tokens": frame[f"found {t}"].map("{:.2f}".format) for t in VISITED},
            },
        ),
    )


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__)
    found.add_argument("--model", type=Path, required=True, help="a Llama's checkpoint")
    found.add_argument("--page", type=Path, default=PAGE, help="Markdown with the study's marks")
    found.add_argument("--texts", nargs="+", choices=texts.TEXTS, default=list(texts.TEXTS))
    found.add_argument("--tokens", type=int, default=8192)
    found.add_argument("--queries", type=int, default=16, help="last tokens that look")
    found.add_argument("--n-global", type=int, default=10)
    found.add_argument("--n-local", type=int, default=2048)
    found.add_argument("--distance", type=int, default=1024)
    found.add_argument("--from-layer", type=int, default=5)
    found.add_argument("--top-k", type=int, default=5)
    found.add_argument("--threads", type=int, default=2)
    return found


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.tokens - args.queries - args.n_local <= args.n_global + FIRST_KEYS:
        raise SystemExit("--tokens: too few for a middle behind n_local and n_global")
    torch.set_num_threads(args.threads)
    pattern = LambdaPattern(args.n_global, args.n_local, args.n_local)
    model = StudiedLlama(args.model, pattern)
    data = measure(model, args)
    settings = {name: value for name, value in vars(args).items() if name not in ("model", "page")}
    data |= {"model": args.model.name, "head size": model.head_size, **settings}
    studies.publish(args.page, data, tables)


if __name__ == "__main__":
    main()
