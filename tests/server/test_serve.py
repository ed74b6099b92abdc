"""The OpenAI API of stock `vllm serve`, with LMINF selected by its variable."""

import re
from pathlib import Path

import chat_client
import openai
import pytest

from tests.server.conftest import Server

pytestmark = pytest.mark.server

TEXT = Path(__file__).parents[2] / "examples" / "data" / "alice.txt"
TRAINED_LENGTH = 8192


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.base_url, api_key="unused", timeout=600)


def test_log_says_what_is_active(server: Server) -> None:
    (line,) = [line for line in server.log.splitlines() if "LMINF is active" in line]
    assert "n_global 10, n_local 8192, distance_limit 8192" in line
    assert "trained length 8192, max_model_len 1000000" in line
    assert re.search(r"holds at most \d+ blocks of 128 tokens", line)
    assert "Unknown vLLM environment variable detected: VLLM_ATTENTION_BACKEND" not in server.log


def test_short_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=24,
        temperature=0,
    )
    assert "Paris" in (answer.choices[0].message.content or "")


def test_stream_from_a_prompt_beyond_the_trained_length(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    """The example itself, over the wire."""
    chat_client.main(
        [
            "--base-url",
            server.base_url,
            "--file",
            str(TEXT),
            "--characters",
            "36000",
            "--max-tokens",
            "24",
        ]
    )
    printed = capsys.readouterr().out
    match = re.search(r"(\d+) prompt tokens, (\d+) completion tokens", printed)
    assert match is not None
    assert int(match[1]) > TRAINED_LENGTH
    assert 1 <= int(match[2]) <= 24
    words = printed.split("[smollm2]")[0].split()
    assert len(words) >= 5
    assert all(word.isprintable() for word in words)


def test_prompt_above_max_model_len_is_refused_and_the_server_lives_on(
    client: openai.OpenAI,
) -> None:
    with pytest.raises(openai.BadRequestError, match="1000000"):
        client.completions.create(model="smollm2", prompt=[5] * 1_000_001, max_tokens=1)
    test_short_chat(client)
