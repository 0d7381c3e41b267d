# SPDX-License-Identifier: MIT
"""Where does a running machine write? Each second, the parts of a disk that it has written to.

    python examples/live_writes.py vm0.qmp disk0 [ROUNDS]

vm0.qmp is a monitor (QMP) that no other client has, disk0 a node or a device. A bitmap is added for
the while, and taken each second: no write is missed between two rounds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

from pybitmap import BitmapError
from pybitmap.tools import live
from pybitmap.tools.monitor import Monitor

PARTS = 64  # of the disk, each a character
GRANULARITY = 65536
NAME = "live-writes"


def rounds(monitor: Monitor, disk: str) -> Iterator[str]:
    node = live.find_node(monitor, disk)
    assert node.name is not None
    part = max(1, -(-node.size // PARTS))
    bitmap = (node.name, NAME)
    live.add(monitor, bitmap, granularity=GRANULARITY, persistent=False)
    try:
        while True:
            time.sleep(1)
            nbytes, picture = 0, ["."] * -(-node.size // part)
            with live.Taken(monitor, bitmap) as taken:
                for offset, length in taken:
                    nbytes += length
                    for at in range(offset // part, (offset + length - 1) // part + 1):
                        picture[at] = "#"
                taken.done()
            yield f"{nbytes:12} {''.join(picture)}"
    finally:
        live.remove(monitor, [bitmap])


def main() -> None:
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    path, disk = sys.argv[1:3]
    left = int(sys.argv[3]) if len(sys.argv) > 3 else None
    with Monitor(path) as monitor:
        for line in rounds(monitor, disk):
            print(line, flush=True)
            if left is not None:
                left -= 1
                if not left:
                    break


if __name__ == "__main__":
    try:
        main()
    except (BitmapError, OSError) as error:  # no such monitor, or disk
        sys.exit(str(error))
