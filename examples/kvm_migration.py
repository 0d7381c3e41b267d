# SPDX-License-Identifier: MIT
"""Live migration of a KVM machine's memory, to a bytearray.

The machine runs on while its memory is copied. Round after round copies what was written meanwhile,
until little is left; then it is stopped for the last round, and the copy has its memory byte for
byte. The machine is the toy of tests/support/guest.py, run from a checkout; yours has its own.
"""

from __future__ import annotations

import random
import sys
import threading
from pathlib import Path
from time import monotonic

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
from guest import PAGE, Machine

from pybitmap import HBitmap
from pybitmap.trackers import KvmDirtyLog

SIZE = 256 << 20
HOT = 64  # pages that the guest writes to again and again
FEW = 128  # so many may be left when it is stopped


def run(machine: Machine, stopping: threading.Event) -> None:
    """What the guest is at: at first all over its memory, then in a part that becomes smaller."""
    rng = random.Random(1)
    npages, value = SIZE // PAGE, 0
    while not stopping.is_set():
        value += 1
        machine.write([rng.randrange(npages) * PAGE for _ in range(200)], value)
        npages = max(HOT, npages * 9 // 10)


def main() -> None:
    machine = Machine(SIZE)
    copy = bytearray(SIZE)
    stopping = threading.Event()
    guest = threading.Thread(target=run, args=(machine, stopping))
    with machine, KvmDirtyLog(machine.fd, 0, SIZE) as tracker:
        dirty = HBitmap(tracker.size, tracker.granularity)
        dirty.set(0, dirty.size)  # the first round copies everything
        guest.start()
        try:
            rounds = converge(machine, tracker, dirty, copy)
        finally:
            stopping.set()
            guest.join()
        begin = monotonic()
        tracker.collect(dirty)  # what it wrote since; what was left is in there already
        copied = dirty.copy_areas(copy, machine.memory)
        report(rounds + 1, copied, begin, "is stopped")
        assert copy == machine.memory[:], "the copy is not what the guest has"
    print("the copy is the guest's memory, byte for byte")


def converge(machine: Machine, tracker: KvmDirtyLog, dirty: HBitmap, copy: bytearray) -> int:
    """Copies in rounds until few pages are left, which are in ``dirty`` then; how many rounds."""
    print("round      copied     ms, the guest")
    for number in range(1, 31):
        begin = monotonic()
        # Collected, then copied: what is written while it is copied is in the next round.
        copied = dirty.copy_areas(copy, machine.memory)
        report(number, copied, begin, "runs")
        dirty.clear()
        tracker.collect(dirty)
        if len(dirty) <= FEW:
            break
    return number


def report(number: int, copied: int, begin: float, guest: str) -> None:
    print(f"{number:5} {copied >> 10:7} KiB {1000 * (monotonic() - begin):6.1f}, {guest}")


if __name__ == "__main__":
    main()
