# SPDX-License-Identifier: MIT
"""A full disk is an error where a bitmap is made or changed, and never a fault in a mark."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import run_python


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip(f"mounting is not permitted: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_an_error_and_never_a_fault(small: Path) -> None:
    # What faults would kill the process.
    code = f"""
import errno, os
from pathlib import Path
from pybitmap import BlockGraph, StoreError
from pybitmap.store import LocalStore

SIZE = 1 << 30  # 256 KiB of words at 512 bytes
path = Path({str(small)!r}) / "store"

def refused(change):
    try:
        change()
    except StoreError as error:
        assert error.errno == errno.ENOSPC, error
    else:
        raise AssertionError("there was space")

graph = BlockGraph()
node = graph.add_node("n", SIZE, LocalStore(path))
node.add_bitmap("a", 512, persistent=True)
node.add_bitmap("b", 512, persistent=True, disabled=True)
node.mark_dirty(0, 1 << 20)
for name in "cde":
    try:
        node.add_bitmap(name, 512, persistent=True)
    except StoreError:
        break
refused(lambda: node.add_bitmap("x", 512, persistent=True))
# The very last byte.
with open(path.parent / "filler", "wb", buffering=0) as filler:
    try:
        while filler.write(bytes(4096)):
            pass
    except OSError:
        pass
for bitmap in node.bitmaps.values():
    bitmap.set(0, SIZE)
assert all(bitmap.count() == SIZE for bitmap in node.bitmaps.values())
names = list(node.bitmaps)
refused(node.bitmaps["a"].clear)
refused(node.bitmaps["a"].freeze)
refused(lambda: node.add_bitmap("y", 512, persistent=True))
refused(lambda: node.add_bitmap("z", 1 << 20, persistent=True))
assert list(node.bitmaps) == names
node.flush()
# What needs no more space goes on.
node.bitmaps["b"].enable()
node.remove_bitmap("b")
(path.parent / "filler").unlink()
node.bitmaps["a"].clear()
node.mark_dirty(5 << 20, 512)
graph.close()
with BlockGraph() as graph:
    node = graph.add_node("n", store=LocalStore(path))
    assert list(node.bitmaps["a"].areas()) == [(5 << 20, 512)]
    assert len(list(path.glob("*.words"))) == len(node.bitmaps)
"""
    run_python(code)
