# SPDX-License-Identifier: MIT
"""Live migration of a KVM machine whose memory lies in several slots, by ``live_copy``.

A log is one slot's, so all logs are collected into one bitmap, in which each slot has its place,
one behind the other. ``live_copy`` takes from that; it is told where memory is by the marks that
are there at first. The machine is the toy of tests/support/guest.py, run from a checkout; yours has
its own.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
from guest import PAGE, Machine

from pybitmap import HBitmap
from pybitmap.livecopy import live_copy
from pybitmap.trackers import KvmDirtyLog

LOW, HIGH = 48 << 20, 16 << 20
ABOVE = 1 << 30  # the guest's address of the second slot


def run(machine: Machine, stopping: threading.Event) -> None:
    """What the guest is at: in both slots, in a part that becomes smaller."""
    rng = random.Random(1)
    npages, value = HIGH // PAGE, 0
    while not stopping.is_set():
        value += 1
        pages = [rng.randrange(npages) * PAGE for _ in range(200)]
        machine.write([at + ABOVE * (at // PAGE % 2) for at in pages], value)
        npages = max(64, npages * 9 // 10)


def main() -> None:
    with ExitStack() as stack:
        machine = stack.enter_context(Machine(LOW))
        memories = {0: (0, machine.memory), LOW: (1, machine.add_slot(1, ABOVE, HIGH))}
        size = LOW + HIGH
        target = bytearray(size)
        trackers = [
            stack.enter_context(KvmDirtyLog(machine.fd, slot, len(memory), first, size=size))
            for first, (slot, memory) in memories.items()
        ]
        dirty = HBitmap(size, trackers[0].granularity)
        for first, (_, memory) in memories.items():
            dirty.set(first, len(memory))  # instead of full=True: where memory is

        def collect() -> None:
            for tracker in trackers:
                tracker.collect(dirty)

        def copy(offset: int, nbytes: int) -> None:
            for first, (_, memory) in memories.items():  # a piece may go from one into the next
                start, stop = max(offset, first), min(offset + nbytes, first + len(memory))
                if start < stop:
                    target[start:stop] = memory[start - first : stop - first]

        stopping = threading.Event()
        guest = threading.Thread(target=run, args=(machine, stopping))

        @contextmanager
        def paused() -> Iterator[None]:
            stopping.set()  # a real one lets its processors run on if the migration fails
            guest.join()
            collect()  # what it wrote since the last round: part of the last one
            yield

        guest.start()
        stack.callback(guest.join)
        stack.callback(stopping.set)
        done = live_copy(dirty, copy, paused=paused(), full=False, flush=collect)
        print(f"{done.rounds[0] >> 20} MiB first, {len(done.rounds)} rounds")
        for first, (slot, memory) in memories.items():
            assert target[first : first + len(memory)] == memory[:], f"slot {slot} differs"
    print("the copy is the guest's memory, byte for byte")


if __name__ == "__main__":
    main()
