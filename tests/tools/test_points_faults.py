# SPDX-License-Identifier: MIT
"""A kill, or an error of the disk, at every call that changes a backup directory."""

from __future__ import annotations

from pathlib import Path

import preload
import pytest
from images import UTILS
from peers import peer


@pytest.mark.parametrize(
    ("work", "mode"),
    [
        ("prune", "kill"),
        ("prune", "io"),
        ("append", "kill"),
        ("append", "full-from-then-on"),
        ("restore", "kill"),
        ("restore", "io"),
    ],
)
def test_every_listed_point_is_restored_whatever_failed(
    tmp_path: Path, work: str, mode: str
) -> None:
    peer("qemu-img", UTILS)
    library = preload.build(tmp_path)
    with preload.memory_folder(tmp_path) as folder:
        print(preload.run(library, "backup_faults.py", folder, work, mode))
