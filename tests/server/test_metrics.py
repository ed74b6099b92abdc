"""The plugin's numbers as an operator scrapes them: /metrics of a live server, in two processes."""

import re

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


def test_numbers_follow_a_long_request(tiny_server: Server) -> None:
    """While 300 tokens of an answer to 1000 stream by, and after."""
    before = tiny_server.wait_until_idle()
    prompt, answer = 1000, 300
    stream = tiny_server.client().completions.create(
        model="tiny",
        prompt=[7] * prompt,
        max_tokens=answer,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    seen = TINY_PATTERN.n_global + TINY_PATTERN.n_local - 1
    outside = []
    for received, _ in enumerate(stream, start=1):
        if received % 50 == 0:
            values = tiny_server.metrics()
            if not values["vllm:num_requests_running"]:
                break  # the engine is ahead of this client
            assert values[PINNED] == TINY_PATTERN.num_pinned_blocks(BLOCK_SIZE)
            outside.append(values[OUTSIDE])
    assert outside == sorted(outside)
    assert outside[0] >= prompt - seen
    assert outside[-1] < prompt + answer - seen
    after = tiny_server.wait_until_idle()
    # The last query is at the last but one position: the answer's last token is never computed.
    behind_last_window = TINY_PATTERN.freed_blocks(prompt + answer - 2, BLOCK_SIZE)
    assert after[FREED] - before[FREED] == len(behind_last_window)


def test_stock_numbers_are_there(tiny_server: Server) -> None:
    values = tiny_server.metrics()
    for name in ("kv_cache_usage_perc", "num_requests_running", "prompt_tokens_total"):
        assert f"vllm:{name}" in values
    assert "KV fetch" not in tiny_server.log
