"""One batch of prompts of very different lengths, some far longer than the model was trained for.

Each prompt is the beginning of the same book; the model continues it. Without LMINF, vLLM refuses
the prompts past the trained length.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from text_file import count, text_of

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

ROOT = Path(__file__).resolve().parent.parent


def lengths(text: str) -> list[int]:
    """Read ``64,1000`` as a list of token counts."""
    return [count(item) for item in text.split(",")]


def checkpoint(text: str) -> str:
    """Return the folder of a checkpoint."""
    if not (Path(text) / "config.json").is_file():
        raise argparse.ArgumentTypeError(
            f"{text}: no checkpoint there (it has no config.json); for the one of the examples: "
            "python examples/prepare_model.py"
        )
    return text


def gib(text: str) -> int:
    """Read a number of GiB as bytes."""
    try:
        size = int(float(text) * 2**30)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text}: not a number of GiB") from None
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text}: it must be more than 0")
    return size


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model",
        type=checkpoint,
        default=str(ROOT / "build/models/SmolLM2-135M-Instruct"),
        help="folder of the checkpoint (default: %(default)s)",
    )
    parser.add_argument(
        "--text",
        type=text_of,
        metavar="FILE",
        default=str(ROOT / "examples/data/alice.txt"),
        help="UTF-8 text that the prompts are the beginnings of (default: %(default)s)",
    )
    parser.add_argument(
        "--lengths",
        type=lengths,
        default=[64, 1000, 6000, 12000],
        help="tokens of each prompt, with commas between (default: 64,1000,6000,12000)",
    )
    parser.add_argument("--max-tokens", type=count, default=32, help="of each completion")
    parser.add_argument(
        "--kv-cache-gib",
        type=gib,
        dest="kv_cache_bytes",
        metavar="GIB",
        default="1",
        help="memory for all requests together (default: %(default)s)",
    )
    return parser.parse_args(argv)


def beginnings(model: str, text: str, sizes: Sequence[int]) -> list[list[int]]:
    """Return the first ``sizes`` tokens of ``text``."""
    from transformers import AutoTokenizer

    token_ids: list[int] = AutoTokenizer.from_pretrained(model).encode(text)
    if max(sizes) > len(token_ids):
        raise SystemExit(f"the text has {len(token_ids)} tokens, {max(sizes)} were asked for")
    return [token_ids[:size] for size in sizes]


def generate(llm: LLM, prompts: Sequence[list[int]], max_tokens: int) -> list[RequestOutput]:
    """Continue all prompts in one batch."""
    from vllm import SamplingParams

    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(inputs, SamplingParams(temperature=0.0, max_tokens=max_tokens))


def print_table(outputs: Sequence[RequestOutput], trained_length: int) -> None:
    """Show every prompt's length and what the model made of it."""
    table = Table("prompt tokens", "completion", show_lines=True)
    for output in outputs:
        tokens = len(output.prompt_token_ids or [])
        mark = "\n(beyond trained)" if tokens > trained_length else ""
        table.add_row(f"{tokens}{mark}", " ".join(output.outputs[0].text.split()))
    console = Console()
    console.print(table)
    console.print(f"The model was trained for {trained_length} tokens.")


def main(argv: Sequence[str] | None = None) -> None:
    """Generate for all prompts at once and print the table."""
    args = parse_args(argv)
    prompts = beginnings(args.model, args.text, args.lengths)  # an engine takes longer to start
    # vLLM reads the plugin's variable when it is imported and engines start: set it first.
    os.environ.setdefault("VLLM_ATTENTION_BACKEND", "LMINF")
    from vllm import LLM

    llm = LLM(
        model=args.model,
        max_model_len=1_000_000,
        kv_cache_memory_bytes=args.kv_cache_bytes,  # however long the prompts
        enforce_eager=True,  # starts in seconds on a CPU; leave it out on a GPU
    )
    outputs = generate(llm, prompts, args.max_tokens)
    print_table(outputs, llm.llm_engine.model_config.hf_text_config.max_position_embeddings)


if __name__ == "__main__":
    main()
