"""How much memory a process may have on this host: the machine's, or its container's limit."""

import os
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")


def host_memory(root: Path = _ROOT) -> int:
    """Bytes of the machine's memory, or of the smallest limit that a control group sets this
    process; what others hold of them now isn't looked at.

    Args:
        root: where /proc and /sys are.
    """
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *_limits(root)])


def _limits(root: Path) -> Iterator[int]:
    """Those of the process's control groups and of all that are around them, of either version.
    Within a container its own group is often the root of what it sees."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            tops, name = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"], "memory.max"
        elif "memory" in controllers.split(","):
            tops, name = [root / "sys/fs/cgroup/memory"], "memory.limit_in_bytes"
        else:
            continue
        group = Path(path.lstrip("/"))
        for folder in (top / each for top in tops for each in (group, *group.parents)):
            limit = _read(folder / name)
            if limit is not None:
                yield limit


def _read(file: Path) -> int | None:
    """A limit; None where there is none."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
