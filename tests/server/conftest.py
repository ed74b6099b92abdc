"""A live OpenAI-compatible server, started as a user would: stock `vllm serve` and one variable."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

START_LIMIT_S = 600


@dataclass
class Server:
    """A running server."""

    base_url: str
    log_path: Path

    @property
    def log(self) -> str:
        return self.log_path.read_text()


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


@pytest.fixture(scope="module")
def server(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`VLLM_ATTENTION_BACKEND=LMINF vllm serve MODEL --max-model-len 1000000`, on a free port."""
    log = tmp_path_factory.mktemp("server") / "server.log"
    url = f"http://127.0.0.1:{(port := free_port())}"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    command = [
        str(Path(sys.executable).with_name("vllm")),
        *("serve", model_path, "--served-model-name", "smollm2"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--max-model-len", "1000000", "--enforce-eager"),
        *("--kv-cache-memory-bytes", "1G"),
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment | {"VLLM_ATTENTION_BACKEND": "LMINF"},
        )
    try:
        wait_until_healthy(process, url, log)
        yield Server(f"{url}/v1", log)
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
