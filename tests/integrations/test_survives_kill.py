# SPDX-License-Identifier: MIT
"""The example of a disk that survives kill -9, run as it says."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from pybitmap import BlockGraph, LocalStore

EXAMPLE = Path(__file__).parents[2] / "examples" / "survives_kill.py"


def run(folder: Path) -> None:
    command = [sys.executable, str(EXAMPLE), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "the copy equals the disk" in done.stdout
    assert "killed; 0 bytes" not in done.stdout


def test_the_next_process_finds_all_that_was_written(tmp_path: Path) -> None:
    for _ in range(2):  # the second time it goes on with what is there
        run(tmp_path)


def lose_the_store(folder: Path) -> None:
    """With a mark of what was written, and is not in the copy."""
    with open(folder / "disk.raw", "r+b") as file:
        file.write(bytes(16 << 20))
    shutil.rmtree(folder / "disk.bitmaps")


def test_a_store_that_was_lost_is_made_up_for_by_a_copy_of_all(tmp_path: Path) -> None:
    run(tmp_path)
    lose_the_store(tmp_path)
    run(tmp_path)


def test_so_is_a_copy_that_was_lost(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "copy.raw").unlink()
    run(tmp_path)


def test_a_kill_right_after_the_bitmap_was_made_loses_nothing(tmp_path: Path) -> None:
    run(tmp_path)
    lose_the_store(tmp_path)
    with BlockGraph() as graph:  # as far as the process came
        disk = graph.add_node("disk", 16 << 20, LocalStore(tmp_path / "disk.bitmaps"))
        disk.add_bitmap("daily", granularity=4096, persistent=True, disabled=True)
    run(tmp_path)
