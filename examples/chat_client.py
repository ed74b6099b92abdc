"""Stream an answer about a long text from a running server, with the stock OpenAI client.

Nothing here knows of LMINF: the server does the work, and the prompt may be longer than the model
was trained for.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from openai import APIConnectionError, APIStatusError, OpenAI
from openai.types.chat import ChatCompletionMessageParam

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Answer:
    """What came back: the text, its token counts, and the seconds until its first token."""

    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds_to_first: float | None = None


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://localhost:8000/v1")
    parser.add_argument("--model", help="name that the server gives it (default: its first model)")
    parser.add_argument(
        "--file", type=Path, default=ROOT / "examples/data/alice.txt", help="text for the prompt"
    )
    parser.add_argument(
        "--characters", type=int, default=50_000, help="how much of the file (default: %(default)s)"
    )
    parser.add_argument("--question", default="What happens in this text? Answer in two sentences.")
    parser.add_argument("--max-tokens", type=int, default=64, help="of the answer")
    return parser.parse_args(argv)


def stream(
    client: OpenAI, model: str, messages: Sequence[ChatCompletionMessageParam], max_tokens: int
) -> Answer:
    """Print the answer as it arrives and return it with its counts."""
    answer = Answer()
    start = time.perf_counter()
    chunks = client.chat.completions.create(
        model=model,
        messages=messages,
        max_tokens=max_tokens,
        temperature=0.0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in chunks:
        if chunk.usage is not None:
            answer.prompt_tokens = chunk.usage.prompt_tokens
            answer.completion_tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            if piece := choice.delta.content:
                if answer.seconds_to_first is None:
                    answer.seconds_to_first = time.perf_counter() - start
                answer.text += piece
                print(piece, end="", flush=True)
    print()
    return answer


def main(argv: Sequence[str] | None = None) -> None:
    """Ask the question about the text and print the answer with its figures."""
    args = parse_args(argv)
    text = args.file.read_text(encoding="utf-8")[: args.characters]
    client = OpenAI(base_url=args.base_url, api_key="unused", timeout=600)
    try:
        model = args.model or client.models.list().data[0].id
        answer = stream(
            client,
            model,
            [{"role": "user", "content": f"{text}\n\n{args.question}"}],
            args.max_tokens,
        )
    except APIConnectionError:
        sys.exit(f"no server answers at {args.base_url}: start one with vllm serve")
    except APIStatusError as error:
        sys.exit(f"the server refused: {error.message}")
    first = f"{answer.seconds_to_first:.2f} s" if answer.seconds_to_first is not None else "never"
    print(
        f"[{model}] {answer.prompt_tokens} prompt tokens, "
        f"{answer.completion_tokens} completion tokens, first token after {first}"
    )


if __name__ == "__main__":
    main()
