"""The examples without an engine: what they say while they wait, and of what is wrong."""

import importlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
MODELS = {"object": "list", "data": [{"id": "tiny", "object": "model"}]}


@pytest.fixture
def example(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(request.param)


chat_client = pytest.mark.parametrize("example", ["chat_client"], indirect=True)


class StandIn(BaseHTTPRequestHandler):
    """Answers as its class was told to."""

    models: tuple[int, Any] = (200, MODELS)
    status = 200
    events: tuple[Any, ...] = ()

    def do_GET(self) -> None:
        status, body = self.models
        self.send_response(status)
        is_page = isinstance(body, str)
        self.send_header("Content-Type", "text/html" if is_page else "application/json")
        self.end_headers()
        self.wfile.write((body if is_page else json.dumps(body)).encode())

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(self.status)
        self.send_header("Content-Type", "text/event-stream")
        if self.events and self.events[-1] == "hang up":
            self.send_header("Content-Length", "1000000")
        self.end_headers()
        for event in self.events:
            if event != "hang up":
                text = event if isinstance(event, str) else json.dumps(event)
                self.wfile.write(f"data: {text}\n\n".encode())

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def server() -> Iterator[type[StandIn]]:
    """Serves `address`; how it answers is to be set on the class that is given."""

    class Told(StandIn):
        address = ""

    running = ThreadingHTTPServer(("127.0.0.1", 0), Told)
    Told.address = f"http://127.0.0.1:{running.server_port}/v1"
    thread = threading.Thread(target=running.serve_forever, args=(0.01,))
    thread.start()
    yield Told
    running.shutdown()
    thread.join()
    running.server_close()


def chunk(text: str | None, finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return {"id": "x", "object": "chat.completion.chunk", "model": "tiny", "choices": [choice]}


USAGE = {
    **chunk(None),
    "choices": [],
    "usage": {"prompt_tokens": 12_345, "completion_tokens": 2, "total_tokens": 12_347},
}
WHOLE = (chunk(""), chunk("It is"), chunk(" Paris.", "stop"), USAGE, "[DONE]")


@chat_client
def test_answer_and_what_is_said_before_it(
    example: ModuleType, server: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    server.events = WHOLE
    example.main(["--base-url", server.address, "--characters", "3000", "--question", "Where?"])
    out, err = capsys.readouterr()
    answer, figures = out.splitlines()
    assert answer == "It is Paris."
    assert figures.startswith("[tiny] 12345 prompt tokens, 2 completion tokens, first token after")
    assert err.startswith("[tiny] reads a prompt of 3,006 characters; the answer begins when")


@chat_client
def test_a_prompt_has_all_the_time_it_takes(example: ModuleType) -> None:
    assert example.TIMEOUT.read is None


@chat_client
@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"status": 404, "events": ({"error": {"message": "no"}},)}, "refused (404)"),
        ({"status": 400, "events": ("too long",)}, "refused (400)"),
        ({"events": (chunk("It"), {"error": {"message": "EngineCore died", "code": 500}})}, "died"),
        ({"events": (chunk("It"), "hang up")}, "or no longer"),
        ({"events": (chunk("It"), "[DONE]")}, "before its end"),
        ({"events": ("{half",)}, "no OpenAI-compatible server"),
        ({"models": (200, {"data": []})}, "lists no models"),
        ({"models": (200, "<html>hello</html>")}, "lists no models"),
        ({"models": (404, "<html>no</html>")}, "refused (404)"),
        ({"models": (200, [1])}, "OpenAI-compatible server"),
    ],
)
def test_what_a_server_does_wrong(
    example: ModuleType, server: Any, told: dict[str, Any], words: str
) -> None:
    for name, value in told.items():
        setattr(server, name, value)
    with pytest.raises(SystemExit) as stop:
        example.main(["--base-url", server.address])
    assert words in str(stop.value.code)


@chat_client
def test_no_server(example: ModuleType) -> None:
    with pytest.raises(SystemExit) as stop:
        example.main(["--base-url", "http://127.0.0.1:9/v1"])
    assert "no server answers at http://127.0.0.1:9/v1" in str(stop.value.code)


@chat_client
def test_interrupted(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(example, "first_model", interrupt)
    with pytest.raises(SystemExit, match="130"):
        example.main([])
    assert "interrupted" in capsys.readouterr().err


@chat_client
@pytest.mark.parametrize(
    "address", ["localhost:8000/v1", "", "ftp://a/v1", "http://", "http://[", "http://a:x/v1"]
)
def test_what_is_no_address(
    example: ModuleType, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        example.main(["--base-url", address])
    assert "is no address like http://localhost:8000/v1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("example", "option"),
    [("chat_client", "--file"), ("offline_batch", "--text")],
    indirect=["example"],
)
@pytest.mark.parametrize("case", ["missing", "folder", "latin-1", "empty", "zero byte"])
def test_files_that_are_no_text(
    example: ModuleType, option: str, case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / case
    match case:
        case "folder":
            path.mkdir()
        case "latin-1":
            path.write_bytes("café".encode("latin-1"))
        case "empty":
            path.touch()
    given = "a\0b" if case == "zero byte" else str(path)
    reason = {
        "missing": "No such file or directory",
        "folder": "Is a directory",
        "latin-1": "not UTF-8 text (byte 3)",
        "empty": ": empty",
        "zero byte": "null byte",
    }
    with pytest.raises(SystemExit, match="2"):
        example.main([option, given])
    assert reason[case] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("example", "arguments", "words"),
    [
        ("chat_client", ["--characters", "0"], "it must be 1 or more"),
        ("chat_client", ["--max-tokens", "many"], "not a whole number"),
        ("offline_batch", ["--lengths", "64,,1000"], "not a whole number"),
        ("offline_batch", ["--lengths", "64,-1"], "it must be 1 or more"),
        ("offline_batch", ["--kv-cache-gib", "nan"], "not a number of GiB"),
        ("offline_batch", ["--kv-cache-gib", "-1"], "it must be more than 0"),
        ("offline_batch", ["--model", "/nowhere"], "it has no config.json"),
    ],
    indirect=["example"],
)
def test_options(
    example: ModuleType, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        example.main(arguments)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("example", ["prepare_model"], indirect=True)
def test_a_checkpoint_that_can_not_be_written(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert example.main(["--output", str(tmp_path / "file" / "model")]) == 1
    assert "file" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["chat_client", "offline_batch", "prepare_model"])
def test_runs_as_a_script_from_anywhere(name: str, tmp_path: Path) -> None:
    """As far as --help: what it imports at its top is found, wherever it is started."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
