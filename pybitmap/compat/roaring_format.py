# SPDX-License-Identifier: MIT
"""The portable format of Roaring bitmaps, written from an HBitmap and read into one.

Source: the Roaring bitmap format specification (github.com/RoaringBitmap/RoaringFormatSpec), with
its extension to 64 bits. All numbers are little-endian. The items of a piece of 65536 form a
container, of whichever of three kinds is the smallest::

    array   the low 16 bits of each item, at most 4096       2 bytes for each
    bitset  a bit for each                                   8192 bytes
    run     how many, then first and length - 1 of each      2 + 4 bytes for each

    cookie, number | key, cardinality - 1 of each | offset of each | containers

A writer that goes on beside it is no matter: what is written here is made of a copy. Of what is
read, each container is checked before it is believed; the bitmap that it goes to is the caller's
own, and is dropped if that fails.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from ..errors import InvalidError, RangeError
from ..hbitmap import HBitmap

PIECE = 1 << 16  # items of a container
ARRAY, BITSET, RUN = "array", "bitset", "run"

_COOKIE, _COOKIE_RUNS = 12346, 12347
_MOST_IN_ARRAY = 4096
_BITSET_BYTES = 8192
_OFFSETS_FROM = 4  # containers, where there are runs


@dataclass(frozen=True)
class Container:
    """The items of one piece that are in the bitmap, at least one.

    :ivar key: the number of the piece: its items begin at ``key << 16``
    """

    key: int
    kind: str
    cardinality: int
    data: bytes


def containers(hb: HBitmap) -> Iterator[Container]:
    """Those of a bitmap of granularity 0 that is constant meanwhile, in order."""
    item = hb.next_dirty(0)
    while item is not None:
        start = item - item % PIECE
        yield _container(hb, start)
        item = hb.next_dirty(start + PIECE)


def _container(hb: HBitmap, start: int) -> Container:
    key, end = start // PIECE, start + PIECE
    cardinality = hb.count(start, PIECE)
    runs = list(hb.areas(start, end=end))
    plain = min(2 * cardinality, _BITSET_BYTES)
    if 2 + 4 * len(runs) < plain:
        numbers = [len(runs)]
        for first, count in runs:
            numbers += first - start, count - 1
        return Container(key, RUN, cardinality, struct.pack(f"<{len(numbers)}H", *numbers))
    if cardinality <= _MOST_IN_ARRAY:
        items = [item - start for item in hb.items_array(start, end=end)]
        return Container(key, ARRAY, cardinality, struct.pack(f"<{cardinality}H", *items))
    bits = hb.serialize(start, min(PIECE, hb.size - start))
    return Container(key, BITSET, cardinality, bits.ljust(_BITSET_BYTES, b"\0"))


def dump32(hb: HBitmap) -> bytes:
    """The serialisation of a bitmap of at most ``2**32`` items."""
    return _dump(list(containers(hb.copy())))


def dump64(hb: HBitmap) -> bytes:
    """The same of 64-bit ones: how many 32-bit ones, and each after its upper half."""
    halves: dict[int, list[Container]] = {}
    for each in containers(hb.copy()):
        halves.setdefault(each.key >> 16, []).append(each)
    parts = [struct.pack("<Q", len(halves))]
    for upper, those in halves.items():
        parts += struct.pack("<I", upper), _dump(those)
    return b"".join(parts)


def _dump(those: list[Container]) -> bytes:
    n = len(those)
    runs = sum(1 << i for i, each in enumerate(those) if each.kind == RUN)
    if runs:
        head = struct.pack("<I", _COOKIE_RUNS | n - 1 << 16) + runs.to_bytes(-(-n // 8), "little")
    else:
        head = struct.pack("<II", _COOKIE, n)
    parts = [head]
    parts += (struct.pack("<HH", each.key & 0xFFFF, each.cardinality - 1) for each in those)
    if not runs or n >= _OFFSETS_FROM:
        offset = len(head) + 8 * n
        for each in those:
            parts.append(struct.pack("<I", offset))
            offset += len(each.data)
    parts += (each.data for each in those)
    return b"".join(parts)


def load32(data: memoryview, into: HBitmap) -> None:
    """Mark what ``data`` has.

    :raises InvalidError: if it is not in that format
    :raises RangeError: if an item is beyond the end of the bitmap
    """
    reader = _Reader(data)
    _load(reader, into, 0)
    reader.end()


def load64(data: memoryview, into: HBitmap) -> None:
    """The same of 64-bit ones."""
    reader = _Reader(data)
    (n,) = reader.numbers("Q", 1)
    last = -1
    for _ in range(n):
        (upper,) = reader.numbers("I", 1)
        if upper <= last:
            _refuse("its upper halves are not in order")
        last = upper
        _load(reader, into, upper << 32)
    reader.end()


class _Reader:
    """What is left of the data."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 0

    def take(self, nbytes: int) -> memoryview:
        part = self._data[self._at : self._at + nbytes]
        if len(part) < nbytes:
            _refuse(f"it ends after {len(self._data)} bytes")
        self._at += nbytes
        return part

    def numbers(self, kind: str, count: int) -> tuple[int, ...]:
        return struct.unpack(f"<{count}{kind}", self.take(count * struct.calcsize(f"<{kind}")))

    def end(self) -> None:
        if self._at < len(self._data):
            _refuse(f"{len(self._data) - self._at} bytes stand behind its end")


def _load(reader: _Reader, into: HBitmap, base: int) -> None:
    (cookie,) = reader.numbers("I", 1)
    runs = 0
    if cookie == _COOKIE:
        (n,) = reader.numbers("I", 1)
    elif cookie & 0xFFFF == _COOKIE_RUNS:
        n = (cookie >> 16) + 1
        runs = int.from_bytes(reader.take(-(-n // 8)), "little")
    else:
        _refuse(f"it begins with {cookie}, which is no cookie of the format")
    if n > PIECE:
        _refuse(f"it has {n} containers, more than there can be")
    head = reader.numbers("H", 2 * n)
    if cookie == _COOKIE or n >= _OFFSETS_FROM:
        reader.take(4 * n)  # they follow one another all the same
    last = -1
    for i in range(n):
        key, cardinality = head[2 * i], head[2 * i + 1] + 1
        if key <= last:
            _refuse("its containers are not in order")
        last = key
        start = base + key * PIECE
        if start >= into.size:
            raise RangeError(f"item {start} is beyond what a bitmap of {into.size} items has")
        if runs >> i & 1:
            _load_runs(reader, into, start)
        elif cardinality <= _MOST_IN_ARRAY:
            items = array("Q", reader.numbers("H", cardinality))
            into.update(array("Q", [start + item for item in items]))
        else:
            into.merge_bits(reader.take(_BITSET_BYTES), start=start)
        if into.count(start, PIECE) != cardinality:
            _refuse(f"container {i} has not the {cardinality} items that it says")


def _load_runs(reader: _Reader, into: HBitmap, start: int) -> None:
    (n,) = reader.numbers("H", 1)
    numbers = reader.numbers("H", 2 * n)
    starts = array("Q", [start + first for first in numbers[::2]])
    counts = array("Q", [length + 1 for length in numbers[1::2]])
    if any(at + count > start + PIECE for at, count in zip(starts, counts)):
        _refuse("a run goes beyond its container")
    into.set_many(starts, counts)


def _refuse(why: str) -> NoReturn:
    raise InvalidError(f"Could not deserialize bitmap: {why}")
