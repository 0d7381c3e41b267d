# SPDX-License-Identifier: MIT
"""What a process may have of the memory is what the strictest of its groups says."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from pybitmap.store import memory

MACHINE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def system(root: Path, groups: str, limits: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, limit in limits.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(limit + "\n")
    return root


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/\n", {}, MACHINE),
        ("0::/\n", {"memory.max": "4096"}, 4096),
        ("0::/\n", {"memory.max": "max"}, MACHINE),
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": "8192"}, 8192),
        ("0::/a/b\n", {"a/b/memory.max": "4096", "a/memory.max": "8192"}, 4096),
        ("0::/a:b\n", {"a:b/memory.max": "4096"}, 4096),
        ("0::/a\n", {"b/memory.max": "4096"}, MACHINE),
        ("4:memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": "4096"}, 4096),
        ("4:memory:/a\n", {"memory/memory.limit_in_bytes": "4096"}, 4096),
        ("5:cpu:/a\n", {"memory/a/memory.limit_in_bytes": "4096"}, MACHINE),
        ("0::/a/../../b\n", {"memory.max": "x"}, MACHINE),
    ],
)
def test_the_strictest_group_counts(
    tmp_path: Path, groups: str, limits: dict[str, str], expected: int
) -> None:
    assert memory.limit(system(tmp_path, groups, limits)) == expected


def test_where_nothing_is_told_it_is_the_machine(tmp_path: Path) -> None:
    assert memory.limit(tmp_path) == MACHINE
    assert 0 < memory.limit() <= MACHINE


@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_resource_limits_count(kind: str) -> None:
    code = (
        "import resource; from pybitmap.store import memory;"
        f"resource.setrlimit(resource.{kind}, ({1 << 32}, {1 << 32})); print(memory.limit())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == min(1 << 32, memory.limit())
    assert resource.getrlimit(getattr(resource, kind))[0] != 1 << 32
