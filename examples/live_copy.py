# SPDX-License-Identifier: MIT
"""A disk and the RAM of a running program are copied while it goes on writing to both.

The program is played by a thread. A disk is a file, whose writes pass by our code, so each says
that it is one (``node.writing``). RAM is written to by whatever has its address; what was written
to, the kernel says (``MemoryTracker``: Linux 6.7).

    python examples/live_copy.py
"""

import mmap
import os
import random
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Callable

from pybitmap import BlockGraph, UnsupportedError
from pybitmap.livecopy import Progress, live_copy
from pybitmap.trackers import MemoryTracker

MIB = 1 << 20
PAGE = mmap.PAGESIZE


class Program:
    """Writes all the time, most of it within a small part, as programs do. ``with program.lock``
    it is paused."""

    def __init__(self, disk: Path) -> None:
        self.lock = threading.Lock()
        self.ram = mmap.mmap(-1, 16 * MIB)
        self.disk = os.open(disk, os.O_RDWR | os.O_CREAT)
        os.truncate(self.disk, 64 * MIB)
        self.node = BlockGraph().add_node("disk", size=64 * MIB)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        rng = random.Random(1)
        while not self._ended.wait(0.0005):
            with self.lock:
                share = 1 if rng.random() < 0.05 else 0.02
                self.ram[rng.randrange(int(len(self.ram) * share))] = rng.randrange(256)
                offset = rng.randrange(int(self.node.size * share) // 512) * 512
                with self.node.writing(offset, 512):  # marked before and after
                    os.pwrite(self.disk, rng.randbytes(512), offset)

    def end(self) -> None:
        self._ended.set()
        self._thread.join()
        os.close(self.disk)


@contextmanager
def paused(program: Program, same: Callable[[], bool]) -> Iterator[None]:
    """Nobody writes; and before they do again, the copy has to be the same."""
    with program.lock:
        yield
        print("  the copy is", "the same" if same() else "DIFFERENT")


def show(progress: Progress) -> None:
    if progress.copied == progress.total:
        note = ", the last: writers are paused" if progress.paused else ""
        print(f"  round {progress.round}: {progress.total:9} bytes{note}")


def copy_disk(program: Program, target: Path) -> None:
    moved = program.node.add_bitmap("moved", granularity=4096)  # first, so that it has all writes
    fd = os.open(target, os.O_RDWR | os.O_CREAT)

    def copy(offset: int, nbytes: int) -> None:
        os.pwrite(fd, os.pread(program.disk, nbytes, offset), offset)

    def same() -> bool:
        size = program.node.size
        return os.pread(fd, size, 0) == os.pread(program.disk, size, 0)

    try:
        live_copy(
            moved,
            copy,
            paused=paused(program, same),
            until=64 << 10,
            flush=lambda: (os.fsync(program.disk), os.fsync(fd)),
            bandwidth=200 * MIB,
            progress=show,
        )
    finally:
        os.close(fd)
        program.node.remove_bitmap("moved")


def copy_ram(program: Program, target: bytearray) -> None:
    def copy(offset: int, nbytes: int) -> None:
        target[offset : offset + nbytes] = program.ram[offset : offset + nbytes]

    with MemoryTracker(program.ram) as tracker:
        live_copy(
            tracker,
            copy,
            paused=paused(program, lambda: program.ram[:] == target),
            until=64 << 10,
            progress=show,
        )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        program = Program(Path(folder, "disk.img"))
        try:
            print("disk")
            copy_disk(program, Path(folder, "copy.img"))
            print("RAM")
            copy_ram(program, bytearray(len(program.ram)))
        except UnsupportedError as error:
            sys.exit(f"RAM cannot be tracked here: {error}")
        finally:
            program.end()


if __name__ == "__main__":
    main()
