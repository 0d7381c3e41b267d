# SPDX-License-Identifier: MIT
"""A copy of a raw disk is brought up to date by a list of what has changed, in whatever format.

The list is what another program says of the disk since the copy was made: `rbd diff`, thin_delta,
VMware's QueryChangedDiskAreas, CSI's SnapshotMetadata, nbdinfo of a dirty bitmap (not of what is
allocated, which lacks what has become zero), or a bitmap of ours that `pybitmap convert` has
written. Nobody may write to the disk meanwhile: take a snapshot. Both may be devices.

    python examples/apply_changes.py LIST DISK COPY [FORMAT]
"""

import mmap
import os
import sys

from pybitmap.interchange import FormatError, read_bitmap


def apply(changes: str, disk: str, copy: str, fmt: "str | None" = None) -> int:
    """Bytes that were copied. Killed on the way, it is to be run again, with the same list."""
    with open(disk, "rb") as source, open(copy, "r+b") as target:
        size = source.seek(0, os.SEEK_END)  # which a device has, too
        dirty = read_bitmap(changes, fmt, size=size)  # beyond the disk: FormatError
        if os.path.isfile(copy):
            target.truncate(size)
        elif target.seek(0, os.SEEK_END) < size:
            raise OSError(f"{copy} is smaller than {disk}")
        if not dirty:
            return 0
        changed = mmap.mmap(source.fileno(), size, access=mmap.ACCESS_READ)
        with changed, mmap.mmap(target.fileno(), size) as mapped:
            copied = dirty.copy_areas(mapped, changed)
            mapped.flush()
        os.fsync(target.fileno())
    return copied


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    try:
        print(f"{apply(*sys.argv[1:])} bytes copied")
    except (FormatError, OSError) as error:
        sys.exit(f"{sys.argv[0]}: {error}")
