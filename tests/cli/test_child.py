"""Both ends of the pipe to a child process, with real processes."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_lminf.cli.child import LOG_TAIL_LINES, Event, ask_child, excerpt, run_child
from vllm_lminf.errors import CliError

CHILD = """
import os, subprocess, sys
from vllm_lminf.cli.child import serve_job

with serve_job() as (job, answers):
    print("a line of log")
    answers.send("progress", tokens=1)
    {body}
"""


def run(tmp_path: Path, body: str, events: list[Event] | None = None) -> Any:
    (tmp_path / "some_child.py").write_text(CHILD.format(body=body), encoding="utf-8")
    return run_child(
        "some_child",
        {"x": 20},
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path.cwd()}"},
        log_path=tmp_path / "child.log",
        on_event=(events if events is not None else []).append,
    )


def test_events_then_the_result(tmp_path: Path) -> None:
    events: list[Event] = []
    assert run(tmp_path, "answers.send('result', result=job['x'] + 1)", events) == 21
    assert events == [{"event": "progress", "tokens": 1}]
    assert "a line of log" in (tmp_path / "child.log").read_text(encoding="utf-8")


def test_an_exception_is_reported_with_the_log(tmp_path: Path) -> None:
    with pytest.raises(CliError) as caught:
        run(tmp_path, "raise ValueError('the pool is too small')")
    message = str(caught.value)
    assert message.startswith("the pool is too small\n")
    assert str(tmp_path / "child.log") in message
    assert "Traceback" in message


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise ValueError('no such option')", r"no such option"),
        ("os._exit(3)", r"it ended with status 3\n    a line of log"),
    ],
)
def test_a_log_that_is_not_kept(tmp_path: Path, body: str, said: str) -> None:
    """What a child tells is enough; where it tells nothing, its log does."""
    (tmp_path / "some_child.py").write_text(
        CHILD.format(body=f"sys.stdout.flush(); {body}"), encoding="utf-8"
    )
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path.cwd()}"}
    with pytest.raises(CliError, match=rf"^{said}$"):
        ask_child("some_child", {}, env)


def test_the_first_error_of_a_long_log_is_shown(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    lines = ["started", "ValueError: no room", *(f"line {n}" for n in range(50))]
    log.write_text("\n".join(lines), encoding="utf-8")
    shown = excerpt(log).splitlines()
    assert shown[0].strip() == "ValueError: no room"
    assert shown[-1].strip() == "line 49"
    assert len(shown) == LOG_TAIL_LINES + 2


def test_a_killed_child_is_reported(tmp_path: Path) -> None:
    with pytest.raises(CliError, match="it ended with status -9"):
        run(tmp_path, "os.kill(os.getpid(), 9)")


def test_a_child_that_ends_silently_is_reported(tmp_path: Path) -> None:
    with pytest.raises(CliError, match="it ended with status 7"):
        run(tmp_path, "os._exit(7)")


def test_processes_left_behind_are_ended(tmp_path: Path) -> None:
    body = (
        "left = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "    answers.send('progress', tokens=left.pid)\n"
        "    raise RuntimeError('stop')"
    )
    events: list[Event] = []
    with pytest.raises(CliError):
        run(tmp_path, body, events)
    assert eventually(lambda: not runs(events[-1]["tokens"]))


def runs(pid: int) -> bool:
    """Whether a process is there and not merely waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").split()[2] != "Z"
    except OSError:
        return False


def eventually(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()
