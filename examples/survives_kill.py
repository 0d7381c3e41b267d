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

from pybitmap import BlockGraph
from pybitmap.store import LocalStore

SIZE = 16 << 20


def write(folder: Path) -> None:
    """Write at random, until killed."""
    with BlockGraph() as graph, open(folder / "disk.raw", "r+b", buffering=0) as file:
        disk = graph.add_node("disk", SIZE, LocalStore(folder / "disk.bitmaps"))
        if "daily" not in disk.bitmaps:  # the first time
            disk.add_bitmap("daily", granularity=4096, persistent=True)
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
    with BlockGraph() as graph, open(folder / "disk.raw", "rb") as source:
        disk = graph.add_node("disk", store=LocalStore(folder / "disk.bitmaps"))
        daily = disk.find_bitmap("daily")
        if daily.inconsistent:  # the machine went down, not the process
            daily.repair()  # all of it is dirty then
        with daily.freeze() as frozen, open(folder / "copy.raw", "r+b") as target:
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
    for name in ("disk.raw", "copy.raw"):
        if not (folder / name).exists():  # else it goes on with those of the last time
            with open(folder / name, "wb") as file:
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
