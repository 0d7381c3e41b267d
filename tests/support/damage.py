# SPDX-License-Identifier: MIT
"""A qcow2 image, where everything is in it, and what can be damaged."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Callable

from images import FINE, MIB, Opened, check, create, qemu_img, qemu_io

SIZE = 3 * MIB


class Layout:
    """An image of clusters of 512 bytes with data, a snapshot, and three bitmaps, to be damaged."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)
        self.extension = self.data.index(bytes.fromhex("23852875 00000018")) + 8
        self.directory = self.u64(self.extension + 16)
        self.l1 = self.u64(40)
        self.refcount_table = self.u64(48)
        self.snapshots = self.u64(64)
        #: Entries are a, b, c, of 32 bytes each.
        self.a, self.b, self.c = (self.directory + 32 * i for i in range(3))

    def u64(self, offset: int) -> int:
        return int(struct.unpack_from(">Q", self.data, offset)[0])

    def put(self, offset: int, form: str, *values: int) -> None:
        struct.pack_into(">" + form, self.data, offset, *values)

    def table(self, entry: int) -> int:
        return self.u64(entry)


Damage = Callable[[Layout], None]


def undamaged(folder: Path) -> bytes:
    """Such an image, as it is in its file."""
    path = create(folder / "image", SIZE, cluster_size=512)
    qemu_io(path, "write 0 100k", "write 1M 1")
    qemu_img("snapshot", "-c", "s", path)
    qemu_io(path, "write 0 10k")
    with Opened(path) as image:
        for name, start in [("c", 2 * MIB), ("b", 100_000), ("a", 5000)]:  # the newest is first
            image.add(name).set(start, 90_000)
    assert check(path) == FINE
    return path.read_bytes()


#: What makes an image unusable, at least for writing, and is damage of its bitmaps.
OF_BITMAPS: dict[str, Damage] = {
    "no bitmaps": lambda at: at.put(at.extension, "I", 0),
    "65536 bitmaps": lambda at: at.put(at.extension, "I", 65536),
    "2**32 - 1 bitmaps": lambda at: at.put(at.extension, "I", 2**32 - 1),
    "more bitmaps than entries": lambda at: at.put(at.extension, "I", 4),
    "fewer bitmaps than entries": lambda at: at.put(at.extension, "I", 2),
    "reserved bits in the extension": lambda at: at.put(at.extension + 4, "I", 1),
    "a directory of 0 bytes": lambda at: at.put(at.extension + 8, "Q", 0),
    "a directory of 2**64 - 1 bytes": lambda at: at.put(at.extension + 8, "Q", 2**64 - 1),
    "a directory of 64 MiB": lambda at: at.put(at.extension + 8, "Q", 65535 * 1024),
    "a directory that is cut": lambda at: at.put(at.extension + 8, "Q", 90),
    "a directory beyond the file": lambda at: at.put(at.extension + 16, "Q", 2**40),
    "a directory near 2**64": lambda at: at.put(at.extension + 16, "Q", 2**64 - 512),
    "a directory that is not aligned": lambda at: at.put(at.extension + 16, "Q", at.a + 8),
    "a directory in the header": lambda at: at.put(at.extension + 16, "Q", 0),
    "a directory in the L1 table": lambda at: at.put(at.extension + 16, "Q", at.l1),
    "an extension too short": lambda at: at.put(at.extension - 4, "I", 16),
    "an extension of 2**32 - 1 bytes": lambda at: at.put(at.extension - 4, "I", 2**32 - 1),
    "the extension twice": lambda at: at.put(at.extension + 24, "II", 0x23852875, 24),
    "a name of 65535 bytes": lambda at: at.put(at.c + 18, "H", 65535),
    "extra data of 2**32 - 1 bytes": lambda at: at.put(at.b + 20, "I", 2**32 - 1),
    "two of one name": lambda at: at.put(at.b + 24, "B", ord("a")),
    "one table for two": lambda at: at.put(at.b, "Q", at.table(at.a)),
    "one cluster for two": lambda at: at.put(at.table(at.b), "Q", at.u64(at.table(at.a))),
    "one cluster twice": lambda at: at.put(at.table(at.b) + 8, "Q", at.u64(at.table(at.b))),
    "a table in the directory": lambda at: at.put(at.a, "Q", at.directory),
    "a table in its own data": lambda at: at.put(at.table(at.a), "Q", at.table(at.a)),
    "data in the refcount table": lambda at: at.put(at.table(at.a), "Q", at.refcount_table),
    "data in a refcount block": lambda at: at.put(at.table(at.a), "Q", at.u64(at.refcount_table)),
    "data in the L1 table": lambda at: at.put(at.table(at.a), "Q", at.l1),
    "data in an L2 table": lambda at: at.put(at.table(at.a), "Q", at.u64(at.l1) & 2**56 - 512),
    "data in the snapshot table": lambda at: at.put(at.table(at.a), "Q", at.snapshots),
    "data in a snapshot's L1 table": lambda at: at.put(at.table(at.a), "Q", at.u64(at.snapshots)),
}

#: The same, and the bitmaps are in order.
OTHERS: dict[str, Damage] = {
    "a refcount table beyond the file": lambda at: at.put(48, "Q", 2**40),
    "a refcount table of 2**32 - 1 clusters": lambda at: at.put(56, "I", 2**32 - 1),
    "a refcount table of nothing": lambda at: at.put(56, "I", 0),
    "a refcount block beyond the file": lambda at: at.put(at.refcount_table + 8, "Q", 2**40),
    "a refcount block not aligned": lambda at: at.put(at.refcount_table, "Q", 513),
    "a refcount block twice": lambda at: at.put(
        at.refcount_table + 8, "Q", at.u64(at.refcount_table)
    ),
    "no refcounts": lambda at: at.put(at.refcount_table, "Q", 0),
    "refcounts of zero": lambda at: at.put(at.u64(at.refcount_table), "QQQQ", 0, 0, 0, 0),
    "an L1 table of 2**32 - 1 entries": lambda at: at.put(36, "I", 2**32 - 1),
    "an L1 table near 2**64": lambda at: at.put(40, "Q", 2**64 - 512),
    "an L2 table beyond the file": lambda at: at.put(at.l1, "Q", 2**63 | 2**40),
    "2**32 - 1 snapshots": lambda at: at.put(60, "I", 2**32 - 1),
    "a snapshot table beyond the file": lambda at: at.put(64, "Q", 2**50),
    "a snapshot with 2**32 - 1 bytes": lambda at: at.put(at.snapshots + 36, "I", 2**32 - 1),
    "a snapshot with an L1 table near 2**64": lambda at: at.put(at.snapshots, "Q", 2**64 - 512),
}

#: What makes bitmap b unusable, and leaves a and c alone; with a word of the reason.
BROKEN: dict[str, tuple[Damage, str]] = {
    "of type 0": (lambda at: at.put(at.b + 16, "B", 0), "type"),
    "of type 2": (lambda at: at.put(at.b + 16, "B", 2), "type"),
    "an unknown flag": (lambda at: at.put(at.b + 12, "I", 2 | 8), "flags"),
    "granularity 8": (lambda at: at.put(at.b + 17, "B", 8), "granularity"),
    "granularity 32": (lambda at: at.put(at.b + 17, "B", 32), "granularity"),
    "granularity 255": (lambda at: at.put(at.b + 17, "B", 255), "granularity"),
    "a table of another size": (lambda at: at.put(at.b + 8, "I", 1), "table"),
    "a table of nothing": (lambda at: at.put(at.b + 8, "I", 0), "table"),
    "a table of 2**32 - 1": (lambda at: at.put(at.b + 8, "I", 2**32 - 1), "table"),
    "a large table, in use": (lambda at: at.put(at.b + 8, "II", 2**32 - 1, 3), "table"),
    "a table beyond the file": (lambda at: at.put(at.b, "Q", 2**40), "beyond the end"),
    "a table near 2**64": (lambda at: at.put(at.b, "Q", 2**64 - 512), "beyond the end"),
    "a table not aligned": (lambda at: at.put(at.b, "Q", at.table(at.b) + 8), "aligned"),
    "a table in the header": (lambda at: at.put(at.b, "Q", 0), "header"),
    "data beyond the file": (lambda at: at.put(at.table(at.b), "Q", 2**40), "entry 0"),
    "data not aligned": (lambda at: at.put(at.table(at.b) + 8, "Q", 2), "entry 1"),
    "data with a reserved bit": (
        lambda at: at.put(at.table(at.b), "Q", at.u64(at.table(at.b)) | 1),
        "entry 0",
    ),
    "data with a high bit": (lambda at: at.put(at.table(at.b), "Q", 1 << 56), "entry 0"),
    "a name with a NUL": (lambda at: at.put(at.b + 24, "B", 0), "NUL"),
    "a name of nothing": (lambda at: at.put(at.b + 18, "HI", 0, 1), "name"),
    "in use": (lambda at: at.put(at.b + 12, "I", 3), "in use"),
}
