"""`vllm-lminf serve`, with a stand-in for the command `vllm`: what it is given, and that it takes
the process's place. tests/server/test_middle.py starts a real server by it.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_lminf.cli import metadata_shim, serve
from vllm_lminf.cli.main import main
from vllm_lminf.errors import CliError

STAND_IN = """#!{python}
import json, os, signal, sys
lminf = {{k: v for k, v in os.environ.items() if k.startswith(("VLLM_LMINF_", "VLLM_ATT"))}}
print(json.dumps([sys.argv[1:], lminf, os.getpid()]), flush=True)
if "--wait" in sys.argv:
    signal.pause()
sys.exit(7)
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """Runs ``vllm-lminf serve`` with the stand-in as the only ``vllm``."""
    vllm = tmp_path / "vllm"
    vllm.write_text(STAND_IN.format(python=sys.executable), encoding="utf-8")
    vllm.chmod(0o755)
    code = (
        "import sys\n"
        "from vllm_lminf.cli import serve\n"
        "from vllm_lminf.cli.main import main\n"
        f"serve.find_vllm = lambda: {str(vllm)!r}\n"
        "sys.exit(main(['serve', *sys.argv[1:]]))\n"
    )
    return [sys.executable, "-c", code]


@pytest.fixture
def environ() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "PYTEST"))}


def test_everything_is_passed_on(command: list[str], environ: dict[str, str]) -> None:
    """Settings become variables; what isn't one of ours keeps its order, and its words."""
    words = ["some/model", "--n-local", "4096", "--port", "80", "--middle-top-k=4"]
    words += ["--max-model-len", "1m", "--middle-rows", "all", "--kern", "x", "-tp", "2"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, env=environ)
    argv, variables, _ = json.loads(done.stdout)
    expected = "serve some/model --port 80 --max-model-len 1m --kern x -tp 2"
    assert argv == expected.split()
    assert variables == {
        "VLLM_ATTENTION_BACKEND": "LMINF",
        "VLLM_LMINF_N_LOCAL": "4096",
        "VLLM_LMINF_MIDDLE_TOP_K": "4",
        "VLLM_LMINF_MIDDLE_ROWS": "all",
    }
    assert done.returncode == 7
    shown = done.stderr.strip()
    assert shown.startswith("VLLM_ATTENTION_BACKEND=LMINF VLLM_LMINF_N_LOCAL=4096 ")
    assert shown.endswith(f"vllm {expected}")


def test_it_takes_the_place_of_the_process(command: list[str], environ: dict[str, str]) -> None:
    with subprocess.Popen(
        [*command, "some/model", "--wait"], stdout=subprocess.PIPE, text=True, env=environ
    ) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())[2] == process.pid
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == -signal.SIGTERM


def test_print_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_ATTENTION_BACKEND", raising=False)
    assert main(["serve", "my model", "--kernel", "cpu", "--print-command"]) == 0
    shown = "VLLM_ATTENTION_BACKEND=LMINF VLLM_LMINF_KERNEL=cpu vllm serve 'my model'\n"
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize(
    ("words", "variables", "reason"),
    [
        ([], {}, "which model?"),
        (["m", "--n-local", "0"], {}, '"n_local" in lminf is 0'),
        (["m"], {"VLLM_ATTENTION_BACKEND": "FLASH_ATTN"}, "'FLASH_ATTN': unset it"),
        (["m"], {"VLLM_PLUGINS": "other"}, "add lminf to it"),
        (
            ["m", "--n-local", "4", "--additional-config", '{"lminf": {"n_local": 8}}'],
            {},
            "n_local is given twice: by --n-local and in --additional-config",
        ),
    ],
)
def test_refusals(
    words: list[str],
    variables: dict[str, str],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("VLLM_ATTENTION_BACKEND", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "execve", lambda *args: pytest.fail("it ran"))
    assert main(["serve", *words]) == 1
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("plugins", ["lminf", "other,lminf"])
def test_a_list_of_plugins_with_this_one(plugins: str) -> None:
    serve.check({}, ["m"], {"VLLM_PLUGINS": plugins, "VLLM_ATTENTION_BACKEND": "lminf"})


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--additional-config", '{"lminf": {"kernel": "cpu"}}'], {"kernel": "cpu"}),
        (['--additional_config={"lminf": {"kernel": "cpu"}}'], {"kernel": "cpu"}),
        (["--additional-config.lminf.n_local", "4"], {"n_local": "4"}),
        (["--additional-config.lminf.n_local=4"], {"n_local": "4"}),
        (["--additional-config", "no object"], {}),
        (["--additional-config"], {}),
        (["--additional-config", '{"other": 1}'], {}),
        (["--port", "80"], {}),
    ],
)
def test_settings_among_options_of_vllm(words: list[str], found: dict[str, Any]) -> None:
    assert serve.section_of(words) == found


def test_no_vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CliError, match="there is no command `vllm` here"):
        serve.find_vllm()
    (tmp_path / "vllm").write_text("")
    (tmp_path / "vllm").chmod(0o755)
    monkeypatch.setattr(metadata_shim, "is_missing", lambda: True)
    with pytest.raises(CliError, match="doctor --fix"):
        serve.find_vllm()
