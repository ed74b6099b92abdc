"""Live OpenAI-compatible servers, started as a user would: stock `vllm serve` and one variable."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.engine.oracle_model import save_tiny_llama
from tests.server.byte_tokenizer import save_byte_tokenizer
from vllm_lminf.pattern import LambdaPattern

START_LIMIT_S = 600
IDLE_LIMIT_S = 120


@dataclass
class Server:
    """A running server."""

    url: str
    log_path: Path

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.base_url, api_key="unused", timeout=600, max_retries=0)

    def is_healthy(self) -> bool:
        with urllib.request.urlopen(f"{self.url}/health", timeout=60) as answer:
            return answer.status == 200

    def page_of_metrics(self) -> str:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            return answer.read().decode()

    def metrics(self) -> dict[str, float]:
        """Values of /metrics by name, summed over labels."""
        values: dict[str, float] = {}
        for family in text_string_to_metric_families(self.page_of_metrics()):
            for sample in family.samples:
                values[sample.name] = values.get(sample.name, 0) + sample.value
        return values

    def wait_until_idle(self) -> dict[str, float]:
        """Waits for the last request to be over and gone: a client that hangs up is noticed a
        little later. Fails if a block is held then; returns the metrics."""
        deadline = time.monotonic() + IDLE_LIMIT_S
        while not _is_idle(values := self.metrics()):
            if time.monotonic() > deadline:
                pytest.fail(f"left over: {values}")
            time.sleep(0.1)
        values = self.metrics()  # again: a page's numbers are read while the server goes on
        assert _is_idle(values)
        assert values["vllm:lminf_kv_blocks_pinned"] == 0
        assert values["vllm:lminf_tokens_outside_window"] == 0
        return values


def _is_idle(values: dict[str, float]) -> bool:
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return not any(values[f"vllm:{name}"] for name in names)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"vllm serve ended with {process.returncode}:\n{log.read_text()[-4000:]}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(1)
    pytest.fail(f"no answer from vllm serve in {START_LIMIT_S} s:\n{log.read_text()[-4000:]}")


@contextlib.contextmanager
def serve(
    model: str, log: Path, *arguments: str, own_command: bool = False, **variables: str
) -> Iterator[Server]:
    """`VLLM_ATTENTION_BACKEND=LMINF vllm serve MODEL ..`, or `vllm-lminf serve MODEL ..`, on a free
    port."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    variables = ({} if own_command else {"VLLM_ATTENTION_BACKEND": "LMINF"}) | variables
    vllm = [str(Path(sys.executable).with_name("vllm"))]
    command = [
        *([sys.executable, "-m", "vllm_lminf"] if own_command else vllm),
        *("serve", model, "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"),
        *arguments,
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment | variables,
        )
    try:
        wait_until_healthy(process, url, log)
        yield Server(url, log)
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def server(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The trained model, up to a million tokens."""
    with serve(
        model_path,
        tmp_path_factory.mktemp("server") / "server.log",
        *("--served-model-name", "smollm2"),
        *("--max-model-len", "1000000", "--kv-cache-memory-bytes", "1G"),
    ) as running:
        yield running


BLOCK_SIZE = 16
POOL_BLOCKS = 48
TINY_PATTERN = LambdaPattern(n_global=20, n_local=64, distance_limit=80)
TINY_MAX_LEN = 20_000
TINY_VOCABULARY = 512


@pytest.fixture(scope="package")
def tiny_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A random model whose pool holds 752 tokens, for at most three long requests at a time."""
    folder = tmp_path_factory.mktemp("tiny_server")
    model = save_tiny_llama(folder / "model", 2, 1, 32, num_layers=1)
    save_byte_tokenizer(model, TINY_VOCABULARY)
    settings = {
        "n_global": TINY_PATTERN.n_global,
        "n_local": TINY_PATTERN.n_local,
        "distance_limit": TINY_PATTERN.distance_limit,
    }
    with serve(
        str(model),
        folder / "server.log",
        *("--served-model-name", "tiny", "--dtype", "float32"),
        *("--max-model-len", str(TINY_MAX_LEN), "--max-num-seqs", "8"),
        *("--block-size", str(BLOCK_SIZE), "--num-gpu-blocks-override", str(POOL_BLOCKS)),
        *("--max-num-batched-tokens", "64", "--kv-cache-memory-bytes", "64M"),
        *("--additional-config", json.dumps({"lminf": settings})),
    ) as running:
        yield running
