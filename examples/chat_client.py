"""Stream an answer about a long text from a running server, with the stock OpenAI client.

Nothing here knows of LMINF: the server does the work, and the prompt may be longer than the model
was trained for. The answer begins when the server has read the whole prompt, which on a CPU takes
a minute for the text that is sent by default; meanwhile the seconds are counted.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from openai import APIConnectionError, APIError, APIStatusError, OpenAI, Timeout
from openai.types.chat import ChatCompletionMessageParam
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from text_file import count, text_of

ROOT = Path(__file__).resolve().parent.parent

# A server is found within seconds or not at all; how long it reads a prompt, nobody can say.
TIMEOUT = Timeout(None, connect=10)


@dataclass
class Answer:
    """What came back: the text, its token counts, and the seconds until its first token."""

    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds_to_first: float | None = None
    is_whole: bool = False


class ClientError(Exception):
    """Something to tell the user, without a traceback."""


def url(text: str) -> str:
    """Return the address of a server."""
    try:
        parts = urlsplit(text)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_good = False
    if not is_good:
        raise argparse.ArgumentTypeError(f"{text!r} is no address like http://localhost:8000/v1")
    return text


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", type=url, default="http://localhost:8000/v1")
    parser.add_argument("--model", help="name that the server gives it (default: its first model)")
    parser.add_argument(
        "--file",
        type=text_of,
        dest="text",
        metavar="FILE",
        default=str(ROOT / "examples/data/alice.txt"),
        help="UTF-8 text for the prompt (default: %(default)s)",
    )
    parser.add_argument(
        "--characters",
        type=count,
        default=50_000,
        help="how much of the file (default: %(default)s)",
    )
    parser.add_argument("--question", default="What happens in this text? Answer in two sentences.")
    parser.add_argument("--max-tokens", type=count, default=64, help="of the answer")
    return parser.parse_args(argv)


def first_model(client: OpenAI) -> str:
    """Return the name of the first model that the server lists."""
    try:
        models = client.models.list().data
    except AttributeError:  # what came is no such list, and the client doesn't look
        models = []
    if not models:
        raise ClientError(
            f"{client.base_url} answers, but lists no models: is it the address of an "
            "OpenAI-compatible server, with /v1 at its end?"
        )
    name: str = models[0].id
    return name


def stream(
    client: OpenAI, model: str, messages: Sequence[ChatCompletionMessageParam], max_tokens: int
) -> Answer:
    """Print the answer as it arrives and return it with its counts."""
    answer = Answer()
    start = time.perf_counter()
    # To stderr, so that stdout holds the answer alone.
    waiting = Progress(
        SpinnerColumn(),
        TextColumn("waiting for the first token"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with waiting:
        waiting.add_task("")
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
                answer.is_whole |= choice.finish_reason is not None
                if piece := choice.delta.content:
                    if answer.seconds_to_first is None:
                        waiting.stop()
                        answer.seconds_to_first = time.perf_counter() - start
                    answer.text += piece
                    print(piece, end="", flush=True)
    print()
    return answer


def ask(args: argparse.Namespace) -> None:
    """Ask the question about the text and print the answer with its figures."""
    text = args.text[: args.characters]
    client = OpenAI(base_url=args.base_url, api_key="unused", timeout=TIMEOUT, max_retries=0)
    model = args.model or first_model(client)
    print(
        f"[{model}] reads a prompt of {len(text) + len(args.question):,} characters; the answer "
        "begins when it has read them all.",
        file=sys.stderr,
        flush=True,
    )
    answer = stream(
        client, model, [{"role": "user", "content": f"{text}\n\n{args.question}"}], args.max_tokens
    )
    if not answer.is_whole:
        raise ClientError("the server ended the answer before its end: see the server's log")
    first = f"{answer.seconds_to_first:.2f} s" if answer.seconds_to_first is not None else "never"
    print(
        f"[{model}] {answer.prompt_tokens} prompt tokens, "
        f"{answer.completion_tokens} completion tokens, first token after {first}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; whatever fails is one line on stderr."""
    args = parse_args(argv)
    try:
        ask(args)
    except ClientError as error:
        sys.exit(str(error))
    except APIConnectionError as error:
        sys.exit(
            f"no server answers at {args.base_url}, or no longer ({error.__cause__ or error}): "
            "start one with vllm serve, or see its log"
        )
    except APIStatusError as error:
        sys.exit(f"{args.base_url} refused ({error.status_code}): {error.message}")
    except APIError as error:
        sys.exit(f"the server ended the answer: {error.message}")
    except ValueError:
        sys.exit(f"what answers at {args.base_url} is no OpenAI-compatible server")
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
