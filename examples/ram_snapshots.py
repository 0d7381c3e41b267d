# SPDX-License-Identifier: MIT
"""Snapshots of the RAM of an emulator that knows nothing of bitmaps: a base, then increments.

    python examples/ram_snapshots.py [FOLDER]

The emulator's RAM is an mmap, and that is all that is used of it. It pauses while what was written
since the last snapshot is copied in memory; the file is written while it runs on. An increment is
forgotten only when it is durable: if a disk is full, what it would have had is in the next one.
docs/howto/ram-snapshots.md explains it.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import sys
import tempfile
import threading
import time
from array import array
from pathlib import Path

from pybitmap import HBitmap
from pybitmap.trackers import MemoryTracker, Snapshot

RAM = 64 << 20
ZEROS = bytes(mmap.PAGESIZE)


class Machine:
    """Thirty lines of somebody else's emulator: it writes to its RAM, all over, on its thread."""

    def __init__(self, seed: int) -> None:
        self.ram = mmap.mmap(-1, RAM, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.steps = 0
        self._state = seed
        self._running = threading.Event()
        self._pause = threading.Lock()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while self._running.is_set():
            with self._pause:
                for _ in range(50):
                    self._state = (self._state * 6364136223846793005 + 1442695040888963407) % 2**64
                    where = (self._state >> 33) % (RAM // 64) * 8  # an eighth of the RAM is used
                    self.ram[where : where + 8] = self._state.to_bytes(8, "little")
                    self.steps += 1

    def start(self) -> None:
        self._running.set()
        self._thread.start()

    def stop(self) -> None:
        self._running.clear()
        self._thread.join()

    def paused(self) -> threading.Lock:
        """``with machine.paused()``: it takes no step."""
        return self._pause


class Recorder:
    """Writes RAM to a folder, snapshot by snapshot."""

    def __init__(self, folder: Path, machine: Machine) -> None:
        self.folder = folder
        self.machine = machine
        self.number = 0
        # The tracker first: what is written between the two is then in the first increment.
        self.tracker = MemoryTracker(machine.ram)
        with machine.paused():
            self.memory = Snapshot(machine.ram)
        used = HBitmap(RAM, self.tracker.granularity)
        for page in range(0, RAM, mmap.PAGESIZE):
            if self.memory.data[page : page + mmap.PAGESIZE] != ZEROS:
                used.set(page)
        self._write(0, used)

    def increment(self) -> tuple[int, str]:
        """Number and SHA-256 of a new snapshot."""
        with self.machine.paused():
            written = self.tracker.taking()
            self.memory.update(written)
            digest = hashlib.sha256(self.machine.ram).hexdigest()  # for this example to compare
        with written:  # from here on the machine runs
            self._write(self.number + 1, written)
            self.number += 1
            written.done()
        return self.number, digest

    def _write(self, number: int, areas: HBitmap) -> None:
        """A file of the areas, then their bytes; it is there as a whole or not at all."""
        data = self.memory.data
        name = self.folder / f"{number:04}"
        with open(f"{name}.part", "wb") as file:
            table = array("Q", (each for area in areas.areas() for each in area))
            file.write(array("Q", [len(table) // 2]).tobytes() + table.tobytes())
            for start, count in zip(table[::2], table[1::2]):
                file.write(data[start : start + count])
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{name}.part", name)
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        self.memory.close()
        self.tracker.close()


def restored(folder: Path, number: int) -> mmap.mmap:
    """The RAM of a snapshot: the base, and the increments up to that one."""
    ram = mmap.mmap(-1, RAM, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for each in range(number + 1):
        with open(folder / f"{each:04}", "rb") as file, memoryview(ram) as view:
            table = array("Q")
            table.fromfile(file, 1)
            table.fromfile(file, 2 * table.pop())
            for start, count in zip(table[::2], table[1::2]):
                if file.readinto(view[start : start + count]) != count:
                    raise ValueError(f"{file.name} is cut off")
    return ram


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
        if not folder.is_dir():
            sys.exit(f"{folder}: there is no such folder")
        machine = Machine(seed=1)
        machine.ram[:13] = b"the boot code"
        recorder = Recorder(folder, machine)
        machine.start()
        hashes = {}
        try:
            for steps in (1_000, 3_000, 10_000):
                while machine.steps < steps:
                    time.sleep(0.001)
                number, digest = recorder.increment()
                hashes[number] = digest
                size = (folder / f"{number:04}").stat().st_size
                print(f"increment {number}: {size >> 10} KiB of {RAM >> 10}")
        finally:
            machine.stop()
            recorder.close()
        for number, digest in hashes.items():
            with restored(folder, number) as ram:
                same = hashlib.sha256(ram).hexdigest() == digest
            print(f"snapshot {number} restored: {'equal' if same else 'DIFFERENT'}")
            if not same:
                sys.exit(1)


if __name__ == "__main__":
    main()
