"""A live server that recalls the middle: its numbers, and its answers under load."""

import re
from collections.abc import Iterator

import pytest

from tests.engine.oracle_model import save_tiny_llama
from tests.server.byte_tokenizer import save_byte_tokenizer
from tests.server.conftest import (
    BLOCK_SIZE,
    POOL_BLOCKS,
    TINY_MAX_LEN,
    TINY_VOCABULARY,
    Server,
    serve,
)
from tests.server.test_metrics import open_stream
from tests.server.test_soak import soak
from vllm_lminf.pattern import cdiv

pytestmark = pytest.mark.server

HELD = "vllm:lminf_archive_blocks_held"
SIZE = "vllm:lminf_archive_blocks"

PAGES = cdiv(TINY_MAX_LEN, BLOCK_SIZE)
# One key head of 32: keys and values, codes, scales and radii, the centre.
PAGE_BYTES = BLOCK_SIZE * (2 * 32 * 4 + 32 + 8) + 32 * 4
SETTINGS = {
    "n_global": 20,
    "n_local": 64,
    "distance_limit": 80,
    "middle_top_k": 3,
    "middle_rows": 20,
    "middle_from_layer": 1,
    "middle_unit": 16,
    "archive_gib": (PAGES + 1) * PAGE_BYTES / (1 << 30),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A random model whose pool holds 752 tokens, and whose archive the longest request alone;
    started by `vllm-lminf serve`."""
    folder = tmp_path_factory.mktemp("recalling_server")
    model = save_tiny_llama(folder / "model", 2, 1, 32, num_layers=1)
    save_byte_tokenizer(model, TINY_VOCABULARY)
    with serve(
        str(model),
        folder / "server.log",
        *("--served-model-name", "tiny", "--dtype", "float32"),
        *("--max-model-len", str(TINY_MAX_LEN), "--max-num-seqs", "8"),
        *("--block-size", str(BLOCK_SIZE), "--num-gpu-blocks-override", str(POOL_BLOCKS)),
        *("--max-num-batched-tokens", "64", "--kv-cache-memory-bytes", "64M"),
        *(f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()),
        own_command=True,
    ) as running:
        yield running


def test_settings_are_labels(server: Server) -> None:
    (line,) = re.findall(r"^vllm:lminf_config_info\{.*\} 1\.0$", server.page_of_metrics(), re.M)
    for name in ("middle_top_k", "middle_rows", "middle_from_layer", "middle_unit"):
        assert f'{name}="{SETTINGS[name]}"' in line
    assert 'middle_distance="32"' in line


def test_pages_held_follow_a_request(server: Server) -> None:
    """Until it ends, one for every block of its sequence. A server that has answered nothing yet
    knows no numbers."""
    assert sum(1 for _ in open_stream(server, 6, prompt=5, answer=5)) > 0
    before = server.wait_until_idle()
    assert (before[HELD], before[SIZE]) == (0, PAGES)
    held = []
    with open_stream(server, 7, prompt=1000, answer=2000) as stream:
        for received, _ in enumerate(stream):
            if received % 50 == 0:
                held.append(server.metrics()[HELD])
                assert held[-1] <= cdiv(3000, BLOCK_SIZE)
            if received > 300:
                break
    assert held == sorted(held)
    assert held[-1] > 1000 // BLOCK_SIZE
    assert server.wait_until_idle()[HELD] == 0


def test_every_answer_is_the_one_given_alone(server: Server) -> None:
    """Eight requests at a time have more tokens than the archive."""
    soak(server, 120)
    assert server.metrics()[HELD] == 0
