# SPDX-License-Identifier: MIT
"""How much memory a process may have: an image of few bytes can ask for any amount."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_ROOT = Path("/")


def limit(root: Path = _ROOT) -> int:
    """In bytes: what the machine has, or less, if its control groups (version 1 or 2) or its
    resource limits say so.

    :param root: below which ``proc`` and ``sys`` are
    """
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *_resources(), *_groups(root)])


def _resources() -> Iterator[int]:
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            yield soft


def _groups(root: Path) -> Iterator[int]:
    """The limits of the process's group, and of those above it, where the system tells."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            # 0::/user.slice (version 2) or 4:memory:/user.slice
            _, controllers, group = line.split(":", 2)
            if controllers == "memory":
                mount, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
            elif not controllers:
                mount, name = root / "sys/fs/cgroup", "memory.max"
            else:
                continue
            path = mount / group.lstrip("/")
            for folder in (path, *path.parents):
                with suppress(OSError, ValueError):  # no such limit, or "max"
                    yield int((folder / name).read_text(encoding="ascii"))
                if folder == mount:
                    break
