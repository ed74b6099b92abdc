"""The machine's memory and the limits of containers, read from trees that are made up."""

import os
from pathlib import Path

import pytest

from vllm_lminf.plugin.host_memory import host_memory

PHYSICAL = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
GIB = 1 << 30


def tree(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": cgroup, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("0::/\n", {"sys/fs/cgroup/memory.max": f"{GIB}\n"}, GIB),
        ("0::/\n", {"sys/fs/cgroup/memory.max": "max\n"}, PHYSICAL),
        ("0::/\n", {}, PHYSICAL),
        (
            "0::/pod/box\n",
            {
                "sys/fs/cgroup/pod/box/memory.max": "max\n",
                "sys/fs/cgroup/pod/memory.max": f"{2 * GIB}\n",
            },
            2 * GIB,
        ),
        (
            "4:memory:/a/b\n3:cpu,cpuacct:/a\n0::/\n",
            {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{(1 << 63) - 4096}\n",
                "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": f"{GIB}\n",
                "sys/fs/cgroup/cpu/a/memory.limit_in_bytes": "5\n",
            },
            GIB,
        ),
        ("0::/gone\n", {"sys/fs/cgroup/unified/memory.max": f"{GIB}\n"}, GIB),
    ],
    ids=["container", "no limit", "no files", "around", "version 1", "both versions"],
)
def test_the_smallest_limit(
    tmp_path: Path, cgroup: str, files: dict[str, str], expected: int
) -> None:
    assert host_memory(tree(tmp_path, cgroup, files)) == expected


def test_a_system_without_control_groups(tmp_path: Path) -> None:
    assert host_memory(tmp_path) == PHYSICAL


def test_this_machine() -> None:
    assert 0 < host_memory() <= PHYSICAL
