"""A child process that takes one JSON job and answers with JSON lines: both ends of the pipe.

vLLM writes to stdout and stderr from several processes, so the answers travel on a pipe of their
own and both streams go to a log file. A child whose parent is gone ends when it next answers.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from vllm_lminf.errors import CliError

Event = dict[str, Any]

LOG_TAIL_LINES = 15
ERROR_LINE = re.compile(r"\b\w+(Error|Exception): \S")

EXIT_SECONDS = 60
"""How long a child that has answered may take to end by itself."""

STOP_SECONDS = 10
"""How long a process may take to end once it is told to."""


def run_child(
    module: str,
    job: Mapping[str, Any],
    *,
    env: Mapping[str, str],
    log_path: Path,
    on_event: Callable[[Event], None],
    keeps_log: bool = True,
) -> Any:
    """Run ``python -m module`` on ``job`` and return the ``result`` that it sends.

    Every other event goes to ``on_event`` as it arrives. A child that fails raises ``CliError``
    with its reason, the path of its log and the log's last lines; where the log isn't kept, with
    the reason alone, or with these lines if it gave none.
    """
    read_fd, write_fd = os.pipe()
    with log_path.open("wb") as log, os.fdopen(read_fd, encoding="utf-8") as answers:
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", module, "--answer-fd", str(write_fd)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(env),
                pass_fds=[write_fd],
                start_new_session=True,  # so that the engine's own processes can be ended with it
            )
        finally:
            os.close(write_fd)
        try:
            _send(process, job)
            outcome = _receive(answers, on_event)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=EXIT_SECONDS)
        finally:
            _stop(process)
    if outcome["event"] == "result":
        return outcome["result"]
    reason = outcome.get("message") or f"it ended with status {process.returncode}"
    if keeps_log:
        raise CliError(f"{reason}\nlog: {log_path}\n{excerpt(log_path)}")
    raise CliError(reason if "message" in outcome else f"{reason}\n{excerpt(log_path)}")


def ask_child(module: str, job: Mapping[str, Any], env: Mapping[str, str]) -> Any:
    """The same for a child that answers soon, and whose log nobody needs."""
    with tempfile.TemporaryDirectory(prefix="vllm-lminf-") as folder:
        return run_child(
            module,
            job,
            env=env,
            log_path=Path(folder) / "log",
            on_event=lambda event: None,
            keeps_log=False,
        )


def excerpt(log_path: Path) -> str:
    """Return the first error of a log, where one is to be seen, and the log's last lines.

    The first matters where an engine's process fails: the last lines then only tell that it did.
    """
    lines = log_path.read_text(encoding="utf-8", errors="replace").splitlines()
    tail = lines[-LOG_TAIL_LINES:]
    error = next((line for line in lines if ERROR_LINE.search(line)), None)
    shown = tail if error is None or error in tail else [error, "...", *tail]
    return "\n".join(f"    {line}" for line in shown)


def _send(process: subprocess.Popen[bytes], job: Mapping[str, Any]) -> None:
    if process.stdin is None:
        raise RuntimeError("the child was started without a pipe on stdin")
    with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
        stdin.write(json.dumps(job).encode())


def _receive(answers: TextIO, on_event: Callable[[Event], None]) -> Event:
    """Pass events on until the result, an error, or the end of the pipe."""
    for line in answers:
        event: Event = json.loads(line)
        if event["event"] in ("result", "error"):
            return event
        on_event(event)
    return {"event": "end"}


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the child and the processes of its session, politely first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=STOP_SECONDS)
            return


class Answers:
    """The child's end of the pipe."""

    def __init__(self, fd: int) -> None:
        os.set_inheritable(fd, False)
        self._stream = os.fdopen(fd, "w", encoding="utf-8", buffering=1)

    def send(self, event: str, **fields: Any) -> None:
        """Send one event as a line of JSON."""
        print(json.dumps({"event": event, **fields}), file=self._stream)


@contextlib.contextmanager
def serve_job() -> Iterator[tuple[Any, Answers]]:
    """Yield the job read from stdin and the way to answer; an exception becomes an error event."""
    answers = Answers(int(sys.argv[sys.argv.index("--answer-fd") + 1]))
    try:
        yield json.load(sys.stdin), answers
    except Exception as error:
        answers.send("error", message=str(error).strip() or type(error).__name__)
        raise
