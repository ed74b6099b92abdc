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

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

ROOT = Path(__file__).resolve().parent.parent


def lengths(text: str) -> list[int]:
    """Read ``64,1000`` as a list of token counts."""
    values = [int(item) for item in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError("a prompt has at least 1 token")
    return values


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", type=Path, default=ROOT / "build/models/SmolLM2-135M-Instruct", help="a folder"
    )
    parser.add_argument("--text", type=Path, default=ROOT / "examples/data/alice.txt")
    parser.add_argument(
        "--lengths",
        type=lengths,
        default=[64, 1000, 6000, 12000],
        help="tokens of each prompt, with commas between (default: 64,1000,6000,12000)",
    )
    parser.add_argument("--max-tokens", type=int, default=32, help="of each completion")
    parser.add_argument(
        "--kv-cache-gib", type=float, default=1.0, help="memory for all requests together"
    )
    return parser.parse_args(argv)


def generate(llm: LLM, text: str, sizes: Sequence[int], max_tokens: int) -> list[RequestOutput]:
    """Continue the first ``sizes`` tokens of ``text``, all in one batch."""
    from vllm import SamplingParams

    token_ids = llm.get_tokenizer().encode(text)
    if max(sizes) > len(token_ids):
        raise SystemExit(f"the text has {len(token_ids)} tokens, {max(sizes)} were asked for")
    prompts = [{"prompt_token_ids": token_ids[:size]} for size in sizes]
    return llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=max_tokens))


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
    # vLLM reads the plugin's variable when it is imported and engines start: set it first.
    os.environ.setdefault("VLLM_ATTENTION_BACKEND", "LMINF")
    from vllm import LLM

    llm = LLM(
        model=str(args.model),
        max_model_len=1_000_000,
        kv_cache_memory_bytes=int(args.kv_cache_gib * 2**30),  # however long the prompts
        enforce_eager=True,  # starts in seconds on a CPU; leave it out on a GPU
    )
    outputs = generate(llm, args.text.read_text(encoding="utf-8"), args.lengths, args.max_tokens)
    print_table(outputs, llm.llm_engine.model_config.hf_text_config.max_position_embeddings)


if __name__ == "__main__":
    main()
