"""Clients that hang up: while they wait, while the prompt is read, while the answer streams by."""

import time
from collections.abc import Callable

import openai
import pytest

from tests.server.conftest import IDLE_LIMIT_S, TINY_MAX_LEN, Server

pytestmark = pytest.mark.server

ENDLESS = TINY_MAX_LEN - 2000


def open_stream(client: openai.OpenAI, prompt: list[int]) -> openai.Stream:
    return client.completions.create(
        model="tiny",
        prompt=prompt,
        max_tokens=min(ENDLESS, TINY_MAX_LEN - len(prompt)),
        stream=True,
        extra_body={"ignore_eos": True},
    )


def wait_for(server: Server, what: Callable[[dict[str, float]], bool]) -> None:
    deadline = time.monotonic() + IDLE_LIMIT_S
    while not what(server.metrics()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_while_the_answer_streams_by(tiny_server: Server) -> None:
    before = tiny_server.wait_until_idle()["vllm:generation_tokens_total"]
    stream = open_stream(tiny_server.client(), [3] * 1000)
    for _ in range(5):
        next(stream)
    stream.close()
    after = tiny_server.wait_until_idle()["vllm:generation_tokens_total"]
    assert 5 <= after - before < ENDLESS


def test_while_the_prompt_is_read(tiny_server: Server) -> None:
    """A prompt of 300 chunks, 25 times the pool."""
    before = tiny_server.wait_until_idle()["vllm:generation_tokens_total"]
    stream = open_stream(tiny_server.client(), [4] * (TINY_MAX_LEN - 500))
    wait_for(tiny_server, lambda values: values["vllm:kv_cache_usage_perc"] > 0)
    stream.close()
    after = tiny_server.wait_until_idle()["vllm:generation_tokens_total"]
    assert after - before < 500


def test_while_it_waits(tiny_server: Server) -> None:
    """More requests than the server runs at a time; those that wait leave first."""
    before = tiny_server.wait_until_idle()["vllm:generation_tokens_total"]
    client = tiny_server.client()
    streams = [open_stream(client, [k] * 200) for k in range(12)]
    wait_for(tiny_server, lambda values: values["vllm:num_requests_waiting"] > 0)
    for stream in reversed(streams):
        stream.close()
    after = tiny_server.wait_until_idle()["vllm:generation_tokens_total"]
    assert after - before < ENDLESS
