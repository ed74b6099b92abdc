"""Systems that are asked: a made-up server, and real engines of a model that was never trained."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.engine.oracle_model import save_tiny_llama
from tests.server.byte_tokenizer import save_byte_tokenizer
from vllm_lminf.cli.main import main
from vllm_lminf.cli.openai_server import Server

pytest.importorskip("matplotlib")

TRAINED = 512

DIGITS = {ord(digit) - ord("!"): digit for digit in "0123456789"}
"""By their tokens: those of printing characters are numbered from "!" on."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token for every byte, trained on 512 of them, as far as its configuration goes."""
    folder = save_tiny_llama(tmp_path_factory.mktemp("model"), 4, 2, 32, TRAINED)
    save_byte_tokenizer(folder, 512)
    return folder


class Replies(BaseHTTPRequestHandler):
    """Repeats the digits of prompts below 700 tokens, as a server would; serves two models to
    those who have no key of their own.
    """

    asked: list[dict[str, Any]]

    def do_GET(self) -> None:
        names = ["one"] if "Authorization" in self.headers else ["one", "two"]
        self.reply(200, {"data": [{"id": name} for name in names]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        digits = "".join(DIGITS.get(token, "") for token in body["prompt"])
        if body["model"] != "one":
            self.reply(404, {"error": "no such model"})
            return
        text = f" a{digits[:5]}" if len(body["prompt"]) < 700 else " the grass"
        self.reply(200, {"choices": [{"text": text}]})

    def reply(self, status: int, data: dict[str, Any]) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(data).encode())

    def log_message(self, *words: Any) -> None:
        """Says nothing."""


@pytest.fixture
def server() -> Iterator[str]:
    Replies.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Replies) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_address[1]}"
        listening.shutdown()
        thread.join()


def evaluate(model: Path, output: Path, *more: str) -> tuple[int, list[dict[str, Any]]]:
    """The exit status, and the rows of passkey.json."""
    status = main(
        [
            *("eval", "passkey", "--model", str(model), "--output", str(output)),
            *("--lengths", "400", "800", "--depths", "2", "--keys", "2", *more),
        ]
    )
    data = json.loads((output / "passkey.json").read_text(encoding="utf-8"))
    return status, data["lengths"]


def test_a_server_is_asked(
    tmp_path: Path, model: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the command and its child process. A byte is a token, and a digit its own."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    status, rows = evaluate(model, tmp_path, "--url", server)
    assert status == 0
    assert [(row["length"], row["found"], row["asked"]) for row in rows] == [
        (400, 4, 4),
        (800, 0, 4),
    ]
    assert sorted(len(body["prompt"]) for body in Replies.asked) == [390] * 4 + [790] * 4
    assert {(body["model"], body["temperature"]) for body in Replies.asked} == {("one", 0)}


def test_a_server_of_several_models_is_not_guessed_at(server: str) -> None:
    with pytest.raises(RuntimeError, match="serves one, two: name one with --served-model"):
        Server(f"{server}/v1", None)


def test_what_a_server_refuses_is_told(server: str) -> None:
    with pytest.raises(RuntimeError, match=r"answers 404: .*no such model"):
        Server(f"{server}/v1", "three").complete([1, 2], 10)


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(RuntimeError, match="is --url right"):
        Server("http://127.0.0.1:9/v1", None)


@pytest.mark.engine
def test_engines_are_asked(tmp_path: Path, model: Path) -> None:
    """One length inside the trained one, one beyond; no key is found, by whatever attention."""
    systems = ("lminf", "window")
    status, rows = evaluate(model, tmp_path, "--systems", ",".join(systems), "--n-local", "128")
    logs = [(tmp_path / f"{system}.log").read_text(encoding="utf-8") for system in systems]
    assert status == 0
    assert [(row["system"], row["length"], row["asked"]) for row in rows] == [
        (system, length, 4) for system in systems for length in (400, 800)
    ]
    assert not any(row["found"] for row in rows)
    assert ["LMINF is active" in log for log in logs] == [True, False]
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").open(encoding="utf-8")]
    assert all(line["answer"] for line in answers if "answer" in line)


def test_a_length_without_room_is_refused_before_anything_is_asked(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "passkey", "--model", str(model), "--output", str(tmp_path)]
    assert main([*words, "--lengths", "64", "--url", "http://127.0.0.1:9"]) == 1
    assert "no whole sentences fill 64 tokens" in capsys.readouterr().err
