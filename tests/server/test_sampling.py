"""Long prompts, of many chunks, with everything that a request may say of its answer: each is
served or refused, and the server lives."""

from typing import Any

import openai
import pytest

from tests.server.conftest import Server

pytestmark = pytest.mark.server

PROMPT = [(37 * k + 5) % 500 for k in range(700)]  # eleven chunks
JSON = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}

OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "greedy": {"temperature": 0},
    "nearly greedy": {"temperature": 1e-9},
    "logprobs": {"logprobs": 5},
    "prompt_logprobs": {"prompt_logprobs": 3},
    "echo": {"echo": True, "logprobs": 2},
    "filters": {"top_k": 5, "top_p": 0.5, "min_p": 0.1},
    "logit_bias": {"logit_bias": {"5": 50.0}},
    "penalties": {"presence_penalty": 1, "frequency_penalty": 1, "repetition_penalty": 1.5},
    "stop": {"stop": ["a", "b"], "include_stop_str_in_output": True},
    "stop_token_ids": {"stop_token_ids": [1, 2], "min_tokens": 4},
    "several": {"n": 3},
    "beams": {"use_beam_search": True, "n": 2},
    "bad_words": {"bad_words": ["aa", "bb"]},
    "allowed_token_ids": {"allowed_token_ids": [3, 4, 5]},
    "json": {"structured_outputs": {"json": JSON}},
    "cache_salt": {"cache_salt": "x"},
    "truncated": {"truncate_prompt_tokens": 200},
    "two prompts": {"prompt": [PROMPT, PROMPT[:50]]},
}


@pytest.fixture(scope="module")
def client(tiny_server: Server) -> openai.OpenAI:
    return tiny_server.client()


def ask(client: openai.OpenAI, **fields: Any) -> list[str]:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "ignore_eos": True} | fields
    answer = client.post("/completions", body=body, cast_to=object)
    return [choice["text"] for choice in answer["choices"]]


@pytest.mark.parametrize("seed", [None, 7, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("option", OPTIONS)
def test_option(client: openai.OpenAI, option: str, seed: int | None) -> None:
    fields = OPTIONS[option] | ({} if seed is None else {"seed": seed})
    answer = ask(client, **fields)
    if seed is not None:
        assert ask(client, **fields) == answer


def test_nobody_else_notices(client: openai.OpenAI, tiny_server: Server) -> None:
    """A stream that runs while seeded long prompts come in goes on undisturbed, and they get what
    they get alone."""
    alone = [ask(client, seed=seed) for seed in range(4)]
    good = {"model": "tiny", "prompt": "hello", "max_tokens": 40, "temperature": 0}
    undisturbed = client.completions.create(**good).choices[0].text
    pieces, answers = [], []
    for number, part in enumerate(client.completions.create(stream=True, **good)):
        pieces.append(part.choices[0].text)
        if number < len(alone):
            answers.append(ask(client, seed=number))
    assert "".join(pieces) == undisturbed
    assert answers == alone
    tiny_server.wait_until_idle()
    assert tiny_server.is_healthy()
