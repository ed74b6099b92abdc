"""The plugin's numbers as an operator scrapes them: /metrics of a live server, in two processes."""

import re

import openai
import pytest

from tests.server.conftest import BLOCK_SIZE, TINY_PATTERN, Server

pytestmark = pytest.mark.server

PINNED = "vllm:lminf_kv_blocks_pinned"
FREED = "vllm:lminf_kv_blocks_freed_total"
OUTSIDE = "vllm:lminf_tokens_outside_window"


def test_settings_and_help(tiny_server: Server) -> None:
    page = tiny_server.page_of_metrics()
    labels = {"model_name": "tiny", "engine": "0"}
    labels |= {"n_global": "20", "n_local": "64", "distance_limit": "80"}
    given = ",".join(f'{name}="{value}"' for name, value in sorted(labels.items()))
    assert f"vllm:lminf_config_info{{{given}}} 1.0" in page
    for name, kind in ((PINNED, "gauge"), (FREED, "counter"), (OUTSIDE, "gauge")):
        assert re.search(rf"^# HELP {name} \S.* .*LM-Infinite", page, re.MULTILINE)
        assert f"# TYPE {name} {kind}\n" in page


def open_stream(server: Server, token: int, prompt: int, answer: int) -> openai.Stream:
    """A prompt of one token over and over, of which nothing is in the prefix cache yet."""
    return server.client().completions.create(
        model="tiny",
        prompt=[token] * prompt,
        max_tokens=answer,
        stream=True,
        extra_body={"ignore_eos": True},
    )


def test_gauges_follow_a_long_request(tiny_server: Server) -> None:
    """While its answer streams by; they are never ahead of the tokens that the server counts."""
    prompt = 1000
    seen = TINY_PATTERN.n_global + TINY_PATTERN.n_local - 1
    before = tiny_server.wait_until_idle()["vllm:generation_tokens_total"]
    outside = [0.0]
    with open_stream(tiny_server, 7, prompt, answer=15_000) as stream:
        for received, _ in enumerate(stream):
            if received % 20:
                continue
            values = tiny_server.metrics()
            assert values["vllm:num_requests_running"] == 1
            assert values[PINNED] == TINY_PATTERN.num_pinned_blocks(BLOCK_SIZE)
            outside.append(values[OUTSIDE])
            # From a second page: numbers on one page are read one after the other.
            generated = tiny_server.metrics()["vllm:generation_tokens_total"] - before
            assert outside[-2] <= outside[-1] <= prompt + generated - seen
            if outside[-1] > prompt + 50 - seen:
                break
        else:
            pytest.fail(f"at the end {outside[-1]} tokens were outside")
    tiny_server.wait_until_idle()


def test_every_freed_block_is_counted_once(tiny_server: Server) -> None:
    before = tiny_server.wait_until_idle()
    prompt, answer = 1000, 300
    assert sum(1 for _ in open_stream(tiny_server, 8, prompt, answer)) > 0
    after = tiny_server.wait_until_idle()
    # The last query is at the last but one position: the answer's last token is never computed.
    (behind_last_window,) = TINY_PATTERN.freed_blocks(prompt + answer - 2, BLOCK_SIZE)
    assert after[FREED] - before[FREED] == len(behind_last_window)


def test_stock_numbers_are_there(tiny_server: Server) -> None:
    values = tiny_server.metrics()
    for name in ("kv_cache_usage_perc", "num_requests_running", "prompt_tokens_total"):
        assert f"vllm:{name}" in values
    assert "KV fetch" not in tiny_server.log
