# SPDX-License-Identifier: MIT
"""What several tests of the Python side need besides the model."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pybitmap import BlockNode, DirtyBitmap, Transaction
from pybitmap.block.graph import _Transacting
from pybitmap.qmp import bitmap_info


def collect() -> None:
    """Everything unreachable is gone afterwards, on PyPy too: what one finalizer lets go goes
    with the next collection."""
    for _ in range(3 if sys.implementation.name == "cpython" else 8):
        gc.collect()


#: A plain program whose threads call malloc hangs in one of 400 forks there, in the child's malloc.
beside_malloc = pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""),
    reason="AddressSanitizer's malloc may stay locked in the child of a fork beside threads",
)


def silent(what: str, done: int, total: int | None) -> None:
    """A progress that nobody wants to see."""


def run_python(code: str, **environment: str) -> str:
    """What the code prints in an interpreter of its own, which may crash."""
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,  # where no pybitmap is but the installed one
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr}"
    return done.stdout


@contextmanager
def writers(node: BlockNode) -> Iterator[set[int]]:
    """Two threads write single bytes all over the node, at multiples of 512, until the block ends.

    Then the set that it gives has the offsets of all writes.
    """
    mine: list[set[int]] = [set(), set()]
    written: set[int] = set()
    running = threading.Event()
    running.set()

    def write(offsets: set[int], seed: int) -> None:
        rng = random.Random(seed)
        while running.is_set():
            offset = rng.randrange(node.size // 512) * 512
            node.mark_dirty(offset, 1)
            offsets.add(offset)

    threads = [threading.Thread(target=write, args=(each, i)) for i, each in enumerate(mine)]
    for thread in threads:
        thread.start()
    try:
        yield written
    finally:
        running.clear()
        for thread in threads:
            thread.join()
        written.update(*mine)


def set_flag(bitmap: DirtyBitmap, flag: str, value: bool) -> None:
    """Also those that only a store sets."""
    cell = bitmap._cell
    if flag == "inconsistent":
        cell.settle(replace(cell.state, reason="a test wants it so" if value else None))
    else:
        cell.settle(replace(cell.state, **{flag: value}))  # type: ignore[arg-type]


def publish(node: BlockNode) -> None:
    """What records after :func:`set_flag`."""
    device = node._device
    device.listed = None
    node._coordinator._publish_exactly([device])


def transaction(node: BlockNode) -> AbstractContextManager[Transaction]:
    """On the graph of a node."""
    return _Transacting(node._coordinator)


def query(node: BlockNode) -> list[dict[str, Any]]:
    """What QMP's queries say of its bitmaps."""
    return [bitmap_info(bitmap) for bitmap in node.newest_first()]
