# SPDX-License-Identifier: MIT
"""What a crash of the system can leave of an image that is being changed.

The model: a disk writes sectors of 512 bytes as a whole. What was written before a sync is there
after a crash; of what was written since, any sectors may be there and others not. The one exception
is the first rewriting of the header, which makes room for the bitmaps extension: it may be more
than one sector, and is taken as a whole here (docs/design.md).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from pybitmap.store.qcow2.file import File

SECTOR = 512

#: Writes (offset, data) that are not synced, up to a sync.
Epoch = list[tuple[int, bytes]]


class Recorder:
    """Opens files whose writes it keeps; nothing is really synced."""

    def __init__(self) -> None:
        self.epochs: list[Epoch] = [[]]

    def take(self) -> list[Epoch]:
        epochs, self.epochs[:] = self.epochs[:], [[]]
        return epochs

    def __call__(self, path: str, *, read_only: bool, lock: bool) -> File:
        epochs = self.epochs

        class Recorded(File):
            def _pwritev(self, pieces: Sequence[memoryview], offset: int) -> int:
                epochs[-1].append((offset, b"".join(pieces)))
                return super()._pwritev(pieces, offset)

            def _fdatasync(self) -> None:
                epochs.append([])

        return Recorded(path, read_only=read_only, lock=lock)


def apply(image: bytearray, writes: Epoch) -> bytearray:
    for offset, data in writes:
        if len(image) < offset + len(data):
            image.extend(bytes(offset + len(data) - len(image)))
        image[offset : offset + len(data)] = data
    return image


def sectors(writes: Epoch) -> list[Epoch]:
    """What is written as a whole or not at all: sectors, each with all that came to it."""
    units: list[Epoch] = []
    for offset, data in writes:
        if offset == 0 and len(data) > SECTOR:
            units.append([(offset, data)])
            continue
        assert offset % SECTOR == 0 or len(data) % SECTOR, "the rest of a sector is not known"
        for start in range(-(offset % SECTOR), len(data), SECTOR):
            piece = data[max(start, 0) : start + SECTOR]
            units.append([(offset + max(start, 0), piece)])
    return units


def crashes(before: bytes, epochs: list[Epoch], rng: random.Random) -> Iterator[bytes]:
    """What may be on disk: every prefix of the writes, and subsets of what was not synced."""
    seen: set[bytes] = set()
    synced = bytearray(before)
    for epoch in epochs:
        for end in range(len(epoch) + 1):
            seen.add(bytes(apply(synced[:], epoch[:end])))
        units = sectors(epoch)
        for _ in range(min(2 ** len(units), 24)):
            share = rng.random()
            kept = [unit[0] for unit in units if rng.random() < share]
            seen.add(bytes(apply(synced[:], kept)))
        apply(synced, epoch)
    yield from seen
