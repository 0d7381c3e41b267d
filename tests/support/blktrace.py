# SPDX-License-Identifier: MIT
"""What blktrace records of block devices, in its binary format, for blkparse to print.

Source: include/uapi/linux/blktrace_api.h of Linux (struct blk_io_trace, version 7).
"""

from __future__ import annotations

import struct

READ, WRITE, FLUSH, SYNC, QUEUE = 1, 2, 4, 8, 16
ISSUE, COMPLETE, FS, NOTIFY = 64, 128, 256, 1024
META, DISCARD, FUA = 4096, 8192, 32768
QUEUED, BACK_MERGED, GOT, ISSUED, COMPLETED, INSERTED, SPLIT, REMAPPED = 1, 2, 4, 7, 8, 12, 13, 15


def event(
    number: int,
    action: int,
    kind: int,
    sector: int = 0,
    nbytes: int = 0,
    device: tuple[int, int] = (8, 0),
    data: bytes = b"",
) -> bytes:
    """:param number: of the event, which also tells its time"""
    return (
        struct.pack(
            "=IIQQIIIIIHH",
            0x65617407,
            number,
            1000 * number,
            sector,
            nbytes,
            kind << 16 | action,
            697,
            device[0] << 20 | device[1],
            0,
            0,
            len(data),
        )
        + data
    )


def everything() -> bytes:
    """Requests of every kind on two devices, from being queued to being completed; one is under way
    when the trace begins, one when it ends."""
    events: list[bytes] = []

    def add(action: int, kind: int, *where: int, **more: object) -> None:
        events.append(event(len(events) + 1, action, kind, *where, **more))  # type: ignore[arg-type]

    def request(kind: int, sector: int, nbytes: int) -> None:
        add(QUEUED, kind | QUEUE, sector, nbytes)
        add(GOT, kind, sector, nbytes)
        add(INSERTED, kind | QUEUE, sector, nbytes)
        add(ISSUED, kind | ISSUE | FS, sector, nbytes)
        add(COMPLETED, kind | COMPLETE | FS, sector, nbytes)

    add(0, NOTIFY, data=b"dd".ljust(16, b"\0"), device=(0, 0))
    add(COMPLETED, WRITE | COMPLETE, 40000, 4096)
    request(WRITE | SYNC, 2048, 4096)
    request(WRITE, 4096, 65536)
    request(READ, 0, 4096)
    request(DISCARD | WRITE, 8192, 1 << 20)
    request(FLUSH | WRITE, 0, 0)
    request(WRITE | FUA | SYNC, 20000, 512)
    request(WRITE | META, 20010, 512)
    request(WRITE | FLUSH | SYNC, 20020, 512)
    add(BACK_MERGED, WRITE, 4224, 4096)
    add(SPLIT, WRITE, 60000, 1024, data=struct.pack(">Q", 60002))
    add(REMAPPED, WRITE, 30000, 1024, data=struct.pack(">IIQ", 8 << 20 | 1, 0, 100))
    add(2, NOTIFY, data=b"a note W 100 + 8\0")
    add(QUEUED, WRITE | QUEUE, 50000, 512)
    add(QUEUED, WRITE | QUEUE, 50000, 1024, device=(8, 16))
    return b"".join(events)


#: What is written, or discarded, in bytes: offset and length.
ON_8_0 = [
    (40000 * 512, 4096),
    (2048 * 512, 4096),
    (4096 * 512, 65536),
    (8192 * 512, 1 << 20),
    (20000 * 512, 512),
    (20010 * 512, 512),
    (20020 * 512, 512),
    (50000 * 512, 512),
]
ON_8_16 = [(50000 * 512, 1024)]
