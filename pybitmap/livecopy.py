# SPDX-License-Identifier: MIT
"""live_copy: copying what is being written to, in rounds, until little is left.

Each round takes what is dirty, copies it, and says that it is done; what is written meanwhile is
dirty for the next. The rounds shrink as long as copying is faster than writing. When little is
left, writers are paused for one round, the last::

    writers   ----- write ------ write ---- write --|  paused   |---
    rounds    | all of it      | dirty    | dirty   | the rest  |
    copy is                                                     equal

That is how virtual machines migrate, and how a disk is copied under a running program.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from operator import index
from typing import Callable, NamedTuple, Protocol, Union

from .block.bitmap import DirtyBitmap, Frozen
from .errors import InvalidError, StateError
from .hbitmap import HBitmap
from .trackers.base import Tracker

__all__ = ["LiveCopy", "Progress", "live_copy"]

#: What says what is dirty.
Dirty = Union[DirtyBitmap, HBitmap, Tracker]


class Progress(NamedTuple):
    """How far a copy has come; lengths in bytes.

    >>> now = Progress(round=2, copied=4096, total=8192, copied_in_all=1052672, paused=False)
    >>> now.copied / now.total
    0.5
    """

    round: int  #: that is being copied, from 1 on
    copied: int  #: of this round
    total: int  #: of this round
    copied_in_all: int  #: of all rounds so far
    paused: bool  #: is this the last round?


class LiveCopy(NamedTuple):
    """What a copy came to.

    >>> LiveCopy(rounds=[1048576, 4096, 0], complete=True, paused_for=0.25).nbytes
    1052672
    """

    rounds: list[int]  #: bytes that each round copied
    complete: bool  #: was the last round copied while writers were paused?
    paused_for: float  #: seconds

    @property
    def nbytes(self) -> int:
        """That were copied in all."""
        return sum(self.rounds)


def live_copy(
    dirty: Dirty,
    copy: Callable[[int, int], object],
    *,
    paused: AbstractContextManager[object] | None = None,
    until: int = 1 << 20,
    max_rounds: int = 30,
    full: bool = True,
    flush: Callable[[], object] | None = None,
    bandwidth: float | None = None,
    piece: int = 1 << 20,
    progress: Callable[[Progress], object] | None = None,
) -> LiveCopy:
    """Copy what writers go on writing to; at the end the copy equals it.

    :param dirty: says what was written: a bitmap of a node (it is frozen for each round; it is
        there before this is called, and writers write by :meth:`BlockNode.writing`), a tracker,
        or a plain bitmap that writers mark after they have written
    :param copy: called as ``copy(offset, nbytes)`` for each piece, in order of offsets
    :param paused: ``with paused:`` nobody writes; entered for the last round, for example a lock
        that writers take. None: there is no such round, and what is left stays dirty
    :param until: that is soon: when at most so many bytes are dirty, or after ``max_rounds``
    :param full: copy all of it first, from 0 to the end of ``dirty``, not only what is dirty. Where
        there is nothing in between, or another tracker's: mark what is to be copied, and False
    :param flush: called at the end of each round; what was copied is durable when it returns, in
        the copy and where it came from: ``lambda: (os.fsync(source), os.fsync(target))``
    :param bandwidth: bytes per second at most, on average over a round; the last one, which
        writers wait for, is not slowed down. None: unlimited
    :param piece: bytes that ``copy`` gets at most
    :param progress: called with a :class:`Progress` before each round and after each piece
    :returns: what was copied, and for how long writers were paused
    :raises InvalidError: for numbers that cannot be right; nothing was copied
    :raises StateError: if the bitmap does not record, or is busy

    Whatever else raises, or interrupts, goes on to the caller: the round that it came in is dirty
    again, so another call copies what is missing (with ``full=False``, if the first round had come
    to its end). Writer: waits for ``paused`` only. Kill: the bitmap of a node with a store has the
    round that was under way; a tracker dies with its process, so begin anew. Fork: as ``dirty`` has
    it. Twin: two copies from one ``dirty`` get a part each; use a bitmap for each.

    >>> from pybitmap import BlockGraph
    >>> import threading
    >>> node, lock = BlockGraph().add_node("disk", size=1 << 20), threading.Lock()
    >>> daily = node.add_bitmap("daily", granularity=4096)
    >>> disk, target = bytearray(1 << 20), bytearray(1 << 20)
    >>> def copy(offset: int, nbytes: int) -> None:
    ...     target[offset : offset + nbytes] = disk[offset : offset + nbytes]
    ...     if not disk[5000]:                  # somebody writes meanwhile
    ...         with lock, node.writing(5000, 3):
    ...             disk[5000:5003] = b"new"
    >>> live_copy(daily, copy, paused=lock, until=0).rounds
    [1048576, 4096, 0]
    >>> target == disk
    True
    """
    until, max_rounds, piece = index(until), index(max_rounds), index(piece)
    if until < 0:
        raise InvalidError(f"until is a number of bytes, not {until}")
    if max_rounds < 1 or piece < 1:
        raise InvalidError(f"max_rounds and piece are 1 at least, not {max_rounds} and {piece}")
    if bandwidth is not None and not bandwidth >= 1:
        raise InvalidError(f"bandwidth is 1 byte per second at least, not {bandwidth}")
    if not isinstance(dirty, (DirtyBitmap, HBitmap, Tracker)):
        raise TypeError(
            f"dirty must be a DirtyBitmap, a Tracker or an HBitmap, not {type(dirty).__name__}"
        )

    rounds: list[int] = []

    def one_round(*, least: int = 0, whole: bool = False, last: bool = False) -> bool:
        """Copy what is dirty, if that is so much at least. Was it?"""
        with _taken(dirty) as taken:
            total = dirty.size if whole else taken.count(0)
            if total < least:
                return False
            areas = iter([(0, total)]) if whole else taken.areas()
            before, copied, began = sum(rounds), 0, time.monotonic()
            for nbytes in itertools.chain([0], _copied(areas, piece, copy)):
                copied += nbytes
                if bandwidth is not None and not last:
                    time.sleep(max(0, began + copied / bandwidth - time.monotonic()))
                if progress is not None:
                    progress(Progress(len(rounds) + 1, copied, total, before + copied, last))
            if flush is not None:
                flush()
            taken.done()
        rounds.append(copied)
        return True

    if full:
        one_round(whole=True)
    while len(rounds) < max_rounds and one_round(least=until + 1):
        pass
    if paused is None:
        return LiveCopy(rounds, False, 0.0)
    paused_for = None
    with paused:
        began = time.monotonic()
        one_round(last=True)
        paused_for = time.monotonic() - began
    # A `paused` may swallow the exception that ended the round.
    return LiveCopy(rounds, paused_for is not None, paused_for or 0.0)


class _Taken(Protocol):
    """What is dirty, and is no more once it is done."""

    def count(self, start: int | None = None, count: int | None = None) -> int: ...

    def areas(self) -> Iterator[tuple[int, int]]: ...

    def done(self) -> None: ...


class _FrozenBitmap:
    def __init__(self, bitmap: DirtyBitmap, frozen: Frozen) -> None:
        self.count, self.areas, self.done = bitmap.count, bitmap.areas, frozen.done


@contextmanager
def _taken(dirty: Dirty) -> Iterator[_Taken]:
    if isinstance(dirty, DirtyBitmap):
        if not dirty.recording:
            raise StateError(
                f"Bitmap '{dirty.name}' records no writes, so a copy would miss them: enable it "
                "first, and copy all of the disk"
            )
        with dirty.freeze() as frozen:
            yield _FrozenBitmap(dirty, frozen)
    else:
        with dirty.taking() as taken:
            yield taken


def _copied(
    areas: Iterator[tuple[int, int]], piece: int, copy: Callable[[int, int], object]
) -> Iterator[int]:
    """Copy them piece by piece; gives the length of each, once it is copied."""
    for start, length in areas:
        for offset in range(start, start + length, piece):
            nbytes = min(piece, start + length - offset)
            copy(offset, nbytes)
            yield nbytes
