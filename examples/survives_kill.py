# SPDX-License-Identifier: MIT
"""A disk that survives kill -9: what was written is known to the next process.

python survives_kill.py FOLDER
    makes a disk and a copy of it there, lets a process write to the disk, kills it, and copies
    what the next process finds dirty. See docs/howto/survives-kill.md.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

from pybitmap import BlockGraph, BlockNode, DirtyBitmap
from pybitmap.store import LocalStore

SIZE = 16 << 20


def find_daily(disk: BlockNode) -> DirtyBitmap:
    """What is dirty since the last copy: all of it, where nobody knows."""
    if "daily" not in disk.bitmaps:  # the first time, or the store was lost
        disk.add_bitmap("daily", granularity=4096, persistent=True, disabled=True)
    daily = disk.bitmaps["daily"]
    if daily.inconsistent:  # the machine went down, not the process
        daily.repair()  # all of it is dirty then
    if not daily.enabled:  # it is new; killed before the end of this, the next process does it
        daily.set(0, disk.size)  # what was written before it, it does not know
        daily.enable()
    return daily


def write(folder: Path) -> None:
    """Write at random, until killed."""
    with BlockGraph() as graph, open(folder / "disk.raw", "r+b", buffering=0) as file:
        disk = graph.add_node("disk", SIZE, LocalStore(folder / "disk.bitmaps"))
        find_daily(disk)
        for written in range(1 << 30):
            data = os.urandom(random.randint(1, 20_000))
            offset = random.randrange(SIZE - len(data))
            with disk.writing(offset, len(data)):  # marked before, and after
                os.pwrite(file.fileno(), data, offset)
            if written == 100:
                print("100 writes", flush=True)


def copy(folder: Path) -> int:
    """Bring the copy up to date; returns how many bytes that took."""
    copied = 0
    path = folder / "copy.raw"
    with BlockGraph() as graph, open(folder / "disk.raw", "rb") as source:
        disk = graph.add_node("disk", SIZE, LocalStore(folder / "disk.bitmaps"))
        daily = find_daily(disk)
        if not path.exists():  # the first copy, or the last one was lost
            daily.set(0, SIZE)
            path.touch()
        with daily.freeze() as frozen, open(path, "r+b") as target:
            os.fsync(source.fileno())  # what is copied must not be lost by the disk
            for offset, nbytes in daily.areas():
                source.seek(offset)
                target.seek(offset)
                copied += target.write(source.read(nbytes))
            target.flush()
            os.fsync(target.fileno())
            frozen.done()
    return copied


def main(folder: Path) -> None:
    if not (folder / "disk.raw").exists():  # else it goes on with that of the last time
        with open(folder / "disk.raw", "wb") as file:
            file.truncate(SIZE)
    command = [sys.executable, __file__, str(folder), "write"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        if not writer.stdout.readline():
            sys.exit("the writer did not come to write")
        time.sleep(random.random() / 10)
        writer.kill()
    print(f"killed; {copy(folder)} bytes were dirty, and are copied")
    same = (folder / "disk.raw").read_bytes() == (folder / "copy.raw").read_bytes()
    print("the copy equals the disk" if same else "THE COPY DIFFERS")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    if not Path(sys.argv[1]).is_dir():
        sys.exit(f"{sys.argv[1]}: there is no such folder")
    (write if sys.argv[2:] == ["write"] else main)(Path(sys.argv[1]))
