# SPDX-License-Identifier: MIT
"""What is known of a disk, and how it travels: targets, rows, and the extents of a bitmap.

A :class:`Target` is a place that is to be read; what was found there is a :class:`Result`, a row
for each bitmap, with its extents. Results come from other processes and other machines, and rest in
files until all are there, so they are made of plain values only.

Extents travel as what is smaller: pairs of numbers, or the words of the bitmap. 2^24 groups (1 TiB
at 64 KiB) take 2 MiB as words, and 8 bytes an extent as pairs, which is less as long as they have
fewer than 2^18 extents.

Offsets, lengths, sizes and granularities are in bytes. Times are seconds since 1970, UTC.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from pickle import PickleBuffer
from typing import Any

import numpy as np
import numpy.typing as npt

from ...hbitmap import HBitmap
from ...sizes import granularity_bits

#: Extents: a row ``(offset, length)`` each, in order, none touching another.
Extents = npt.NDArray[np.uint64]

#: The epoch of a bitmap that no backup point is known to have begun.
NO_EPOCH = "0"


class State(str, Enum):
    """What became of a bitmap, or of a disk or target that has none to show.

    >>> known = {State.READY, State.INCONSISTENT, State.IN_USE, State.NONE}
    >>> known == {state for state in State if state.was_read}
    True
    >>> [each.value for each in (State.LOCKED, State.VANISHED, State.BROKEN)]
    ['locked', 'vanished', 'broken']
    >>> State.UNREADABLE.value, State.DIED.value
    ('unreadable', 'died')
    """

    #: Its extents are known.
    READY = "ready"
    #: It cannot be used: what it had was lost.
    INCONSISTENT = "inconsistent"
    #: Another program has its bits.
    IN_USE = "in use"
    #: The disk has no bitmap (of those that were asked for).
    NONE = "no bitmap"
    #: Another program has the target open.
    LOCKED = "locked"
    #: Nothing is there.
    VANISHED = "vanished"
    #: The target is damaged, or none.
    BROKEN = "broken"
    #: It cannot be read: rights, errors of the disk, formats that have no bitmaps.
    UNREADABLE = "unreadable"
    #: The process that read it died, each time.
    DIED = "died"

    @property
    def was_read(self) -> bool:
        """Is it known what bitmaps the disk has?"""
        return self in (State.READY, State.INCONSISTENT, State.IN_USE, State.NONE)


def text_of(name: str) -> str:
    """A name as tables have it: any bytes, as valid Unicode, another for each name.

    Backslashes are doubled; bytes that are no UTF-8 are ``\\xff``, lone surrogates ``\\ud800``.
    """
    name = name.replace("\\", "\\\\")
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return name.encode("utf-8", "backslashreplace").decode("utf-8")


@dataclass(frozen=True)
class Target:
    """A qcow2 image, a local store or a backup directory that is to be read.

    :param path: absolute, as ``os.fsdecode`` has it
    :param host: where its disks are; a label, nothing is asked of a host
    :param bitmaps: names of those that count; none: all
    :param force_share: read it without a lock, as ``pybitmap info -U``

    >>> target = Target("/disks/vm1.bitmaps", "h1")
    >>> target.path, target.host, target.bitmaps, target.force_share
    ('/disks/vm1.bitmaps', 'h1', (), False)
    >>> target.text, len(target.key)
    ('/disks/vm1.bitmaps', 40)
    """

    path: str
    host: str
    bitmaps: tuple[str, ...] = ()
    force_share: bool = False

    @property
    def key(self) -> str:
        """Of its result: another for each target."""
        what = json.dumps([text_of(self.path), text_of(self.host), self.bitmaps, self.force_share])
        return hashlib.sha256(what.encode()).hexdigest()[:40]

    @property
    def text(self) -> str:
        """Its path as tables have it."""
        return text_of(self.path)


@dataclass(frozen=True)
class Disk:
    """One bitmap of a disk; or a disk without, or a target that could not be read.

    :param disk: which it is on its host: the path of an image, ``STORE//NODE``, or the path of what
        could not be read. Made by ``text_of``, as all names here
    :param node: in a local store
    :param recording: does the bitmap record when a program opens it?
    :param dirty_bytes: of its extents, never beyond the end of the disk
    :param reason: why its state is not READY, a sentence
    :param read_at: when

    >>> from pybitmap.tools.fleet.reading import read
    >>> [disk] = read(Target(os.path.abspath("vm1.bitmaps"), "h1")).disks
    >>> disk.host, disk.node, disk.bitmap, disk.size, disk.granularity, disk.recording
    ('h1', 'vm1', 'daily', 1073741824, 65536, True)
    >>> disk.state is State.READY, disk.reason, disk.dirty_bytes, disk.extents
    (True, None, 65536, 1)
    >>> disk.disk == f"{disk.target}//vm1", disk.read_at > 0
    (True, True)
    """

    host: str
    disk: str
    target: str
    state: State
    read_at: float
    node: str | None = None
    bitmap: str | None = None
    size: int | None = None
    granularity: int | None = None
    recording: bool | None = None
    dirty_bytes: int | None = None
    extents: int | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Chain:
    """What a backup directory has of a disk: its newest copy, and what that rests on.

    :param disk: as the manifest names it
    :param bitmap: that records since then
    :param epoch: id of the backup point that began it
    :param began: when that was
    :param length: files that a restore reads; 1: a full copy

    >>> chain = Chain("h1", "/backups", "vda", 1 << 30, None, 32 * "0", 1.75e9, length=3)
    >>> chain.host, chain.repository, chain.disk, chain.size, chain.length
    ('h1', '/backups', 'vda', 1073741824, 3)
    >>> chain.bitmap, len(chain.epoch), chain.began
    (None, 32, 1750000000.0)
    """

    host: str
    repository: str
    disk: str
    size: int
    bitmap: str | None
    epoch: str
    began: float
    length: int


@dataclass(frozen=True)
class Packed:
    """The extents of a bitmap, as small as they go without being compressed.

    :param size: of the disk
    :param granularity: of the bitmap
    :param words: is it the bitmap's words? Else it is pairs (first group, groups)
    :param data: little-endian
    """

    size: int
    granularity: int
    words: bool
    data: bytes = field(repr=False)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # From protocol 5 on, out of band where the transport does that.
        data = PickleBuffer(self.data) if protocol >= 5 else self.data
        return _unpickled, (self.size, self.granularity, self.words, data)

    def unpacked(self) -> Extents:
        """
        :raises ValueError: if it is no such thing
        """
        if self.words:
            bits = granularity_bits(self.granularity)
            return areas_of(HBitmap.from_bytes(self.data, self.size, bits))
        pairs = np.frombuffer(self.data, _kind(self.size, self.granularity)).reshape(-1, 2)
        extents = pairs.astype(np.uint64) * np.uint64(self.granularity)
        if len(extents):
            last = extents[-1]
            last[1] = min(int(last[1]), self.size - int(last[0]))
        return extents


def _unpickled(size: int, granularity: int, words: bool, data: Any) -> Packed:
    return Packed(size, granularity, words, bytes(data))


def packed(extents: Extents, size: int, granularity: int) -> Packed:
    """
    :param extents: of whole groups, but for the end of the disk
    """
    kind = _kind(size, granularity)
    groups = -(-size // granularity)
    words_nbytes = 8 * max(1, -(-groups // 64))
    if len(extents) * 2 * kind.itemsize <= words_nbytes:
        group = np.uint64(granularity)
        ends = (extents[:, 0] + extents[:, 1] + (group - np.uint64(1))) // group
        pairs = np.empty(extents.shape, kind)
        pairs[:, 0] = extents[:, 0] // group
        pairs[:, 1] = ends - extents[:, 0] // group
        return Packed(size, granularity, False, pairs.tobytes())
    hb = HBitmap(size, granularity_bits(granularity))
    hb.set_many(extents[:, 0], extents[:, 1])
    return Packed(size, granularity, True, hb.serialize())


def _kind(size: int, granularity: int) -> np.dtype[Any]:
    return np.dtype("<u4" if size // granularity < 1 << 31 else "<u8")


def areas_of(hb: HBitmap) -> Extents:
    return np.asarray(hb.areas_array()).astype(np.uint64).reshape(-1, 2)


@dataclass(frozen=True)
class Result:
    """What was found at a target.

    :param contents: of each of ``disks``: its extents, where it is READY

    >>> from pybitmap.tools.fleet.reading import read
    >>> result = read(Target(os.path.abspath("vm1.bitmaps"), "h1"))
    >>> len(result.disks), result.contents[0].unpacked().tolist(), result.chains
    (1, [[983040, 65536]], ())
    """

    disks: Sequence[Disk]
    contents: Sequence[Packed | None]
    chains: Sequence[Chain] = ()

    def header(self) -> dict[str, Any]:
        """All but what is in the contents, for JSON; ``parsed`` undoes it.

        >>> Result([], []).header()
        {'disks': [], 'chains': [], 'contents': []}
        """
        return {
            "disks": [asdict(each) for each in self.disks],
            "chains": [asdict(each) for each in self.chains],
            "contents": [
                None if each is None else [each.size, each.granularity, each.words, len(each.data)]
                for each in self.contents
            ],
        }


def parsed(header: Any) -> tuple[list[Disk], list[Chain], list[Any]]:
    """
    :raises TypeError, ValueError, KeyError: if it is none
    """
    disks = [Disk(**{**each, "state": State(each["state"])}) for each in header["disks"]]
    return disks, [Chain(**each) for each in header["chains"]], header["contents"]


def failed(target: Target, state: State, reason: str, read_at: float) -> Result:
    """The one row of a target that could not be read."""
    row = Disk(
        host=text_of(target.host),
        disk=target.text,
        target=target.text,
        state=state,
        read_at=read_at,
        reason=text_of(reason),
    )
    return Result([row], [None])


def absolute(path: str | os.PathLike[str]) -> str:
    """Of a target: without a `//`, so that ``STORE//NODE`` is no path."""
    found = os.path.abspath(os.fsdecode(path))
    return "/" + found.lstrip("/")
