"""Requests that can't be served: the error that OpenAI's clients know, and nothing held after."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.server.conftest import TINY_MAX_LEN, TINY_VOCABULARY, Server

pytestmark = pytest.mark.server

# What makes a request for four tokens bad, and what the error's message says of it.
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no-prompt": ({"prompt": None}, "prompt"),
    "empty-text": ({"prompt": ""}, "non-empty"),
    "no-prompts": ({"prompt": []}, "at least one prompt"),
    "empty-tokens": ({"prompt": [[]]}, "empty"),
    "one-empty-of-two": ({"prompt": ["good", ""]}, "empty"),
    "too-long": ({"prompt": [5] * (TINY_MAX_LEN + 1)}, "maximum context length is 20000"),
    "no-room-to-answer": ({"prompt": [5] * TINY_MAX_LEN}, "max_tokens must be at least 1"),
    "one-too-long-of-two": ({"prompt": [[5], [5] * (TINY_MAX_LEN + 1)]}, "maximum context length"),
    "2-megabytes-of-a": ({"prompt": "a" * 2_000_000}, "2000000 characters"),
    "unknown-token": ({"prompt": [TINY_VOCABULARY]}, "out of vocabulary"),
    "negative-token": ({"prompt": [-1]}, "greater than or equal to 0"),
    "huge-token": ({"prompt": [10**30]}, "out of vocabulary"),
    "number-for-prompt": ({"prompt": 5}, "body.prompt"),
    "object-for-prompt": ({"prompt": {"a": 1}}, "body.prompt"),
    "fraction-for-token": ({"prompt": [1.5]}, "body.prompt"),
    "tokens-three-deep": ({"prompt": [[[1]]]}, "body.prompt"),
    "text-among-tokens": ({"prompt": [1, "a"]}, "body.prompt"),
    "max_tokens-above-max_model_len": ({"max_tokens": TINY_MAX_LEN + 1}, "max_model_len=20000"),
    "max_tokens-of-30-digits": ({"max_tokens": 10**30}, "max_model_len=20000"),
    "max_tokens-none": ({"max_tokens": 0}, "max_tokens must be at least 1"),
    "max_tokens-negative": ({"max_tokens": -1}, "max_tokens must be at least 1"),
    "max_tokens-text": ({"max_tokens": "many"}, "body.max_tokens"),
    "min_tokens-above-max_tokens": ({"min_tokens": 5}, "min_tokens"),
    "temperature-negative": ({"temperature": -1}, "temperature must be non-negative"),
    "temperature-text": ({"temperature": "hot"}, "body.temperature"),
    "top_p-above-one": ({"top_p": 2}, "top_p"),
    "top_k-negative": ({"top_k": -5}, "top_k"),
    "n-negative": ({"n": -1}, "n must be at least 1"),
    "n-absurd": ({"n": 10**9}, "n must be at most"),
    "logprobs-absurd": ({"logprobs": 10**6}, "logprobs"),
    "bias-on-unknown-token": ({"logit_bias": {"9999": 1}}, "out-of-vocab"),
    "penalty-negative": ({"repetition_penalty": -1}, "repetition_penalty"),
    "stop-number": ({"stop": 5}, "body.stop"),
    "stream-text": ({"stream": "maybe"}, "body.stream"),
}

BODIES = {
    "cut-off": b'{"model": "tiny", "prompt": ',
    "no-json": b"hello",
    "nothing": b"",
    "a-list": b"[1, 2]",
    "2-megabytes-of-zeros": b"\0" * 2_000_000,
}


@pytest.fixture(scope="module")
def client(tiny_server: Server) -> openai.OpenAI:
    return tiny_server.client()


@pytest.fixture(autouse=True)
def nothing_is_held(tiny_server: Server) -> Iterator[None]:
    """After each test every block is free, and the server serves."""
    before = tiny_server.wait_until_idle()
    yield
    after = tiny_server.wait_until_idle()
    assert after["vllm:num_preemptions_total"] == before["vllm:num_preemptions_total"]
    assert tiny_server.is_healthy()


@pytest.mark.parametrize("case", BAD)
def test_bad_request(client: openai.OpenAI, case: str) -> None:
    fields, message = BAD[case]
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 4} | fields
    with pytest.raises(openai.BadRequestError) as error:
        client.post("/completions", body=body, cast_to=object)
    assert message in error.value.message
    assert isinstance(error.value.body, dict)
    assert set(error.value.body) == {"message", "type", "param", "code"}
    assert error.value.body["code"] == 400


@pytest.mark.parametrize("case", BODIES)
def test_body_that_is_no_request(tiny_server: Server, case: str) -> None:
    request = urllib.request.Request(
        f"{tiny_server.base_url}/completions",
        data=BODIES[case],
        headers={"Content-Type": "application/json"},
    )
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=60)
    assert error.value.code == 400
    body = json.load(error.value)
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}


def test_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="`other` does not exist"):
        client.completions.create(model="other", prompt="hello", max_tokens=4)


def test_good_request_beside_bad_ones(client: openai.OpenAI) -> None:
    """A stream that runs while bad requests come in goes on undisturbed."""
    good = {"model": "tiny", "prompt": "hello", "max_tokens": 40, "temperature": 0}
    alone = client.completions.create(**good).choices[0].text
    pieces = []
    bad = iter(BAD.values())
    for chunk in client.completions.create(stream=True, **good):
        pieces.append(chunk.choices[0].text)
        if (following := next(bad, None)) is not None:
            body = {"model": "tiny", "prompt": "hello", "max_tokens": 4} | following[0]
            with pytest.raises(openai.BadRequestError):
                client.post("/completions", body=body, cast_to=object)
    assert "".join(pieces) == alone
