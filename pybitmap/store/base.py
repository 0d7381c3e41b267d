# SPDX-License-Identifier: MIT
"""The store protocol: where the persistent bitmaps of nodes live.

A :class:`Store` holds the bitmaps of one node or of several, each node's part is a
:class:`Volume`. A node opens its volume, loads what is stored, lets the volume make the memory of
persistent bitmaps, and says from time to time what is to be stored: always the whole list of its
persistent bitmaps (:class:`Wanted`), never a difference. The store finds out what that changes.

A change has two phases. ``prepare`` does all that can fail for lack of space or memory, and leaves
what is stored as it is. ``switch`` is one durable step: whoever opens the store after a crash finds
all of the old or all of the new. :class:`Switches` leads several stores through it in the order
that keeps a bitmap which moves between them in both rather than in none.

Writes run on beside every step. Hence the invariant that kills and failures rest on, for stores in
whose memory marks survive a kill (:attr:`Volume.keeps_marks`):

    What is stored names nothing as recording (:attr:`Record.recording`) that a write is not marked
    in, at any moment. While it is not known which of two lists is stored, a write is marked in what
    either names.

So whoever tells a store takes a bitmap out of what is recorded after the switch that no longer
names it, and puts one in before the switch that names it; but for a bitmap that the change adds or
enables: that joins right after the switch, and whoever is killed in between has begun nothing yet.
What may be stored is :attr:`Volume.outcomes`. A bitmap of which the content is being changed has a
successor there: the old content is constant then, and both together are what it was without the
change and what was written since.

Offsets and sizes are in bytes, granularities as well. Every method is called with the lock of one
graph held; a store that nodes of several graphs share has a lock of its own.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from typing import Callable, NamedTuple, Optional

from ..errors import StoreError
from ..hbitmap import HBitmap

#: Bytes of UTF-8 that the name of a bitmap can have: QEMU's limit.
MAX_NAME = 1023

#: Told how far a long work is: what it is, bytes done, bytes in all.
Progress = Callable[[str, int, Optional[int]], object]


#: The reason of a bitmap that nobody can use here as long as another program has it open.
LIVE = "a program that has it open keeps its bits, and those on the disk are old: ask that program"


class Purpose(Enum):
    """Why a volume is stored."""

    #: What there is has changed: bitmaps, flags, sizes. Their content is stored only where a killed
    #: process would lose it otherwise *and* could have kept it (a mapped file).
    COMMIT = "commit"
    #: As COMMIT, and what was marked before the call survives a crash of the system, or is then
    #: known to be inconsistent. The volume stays in use.
    FLUSH = "flush"
    #: As FLUSH, and the volume is no longer in use: what is stored is whole and valid.
    CLOSE = "close"


@dataclass(frozen=True, eq=False)
class Record:
    """A persistent bitmap as it is to be stored.

    :param name: unique in its volume
    :param granularity: bytes that a bit stands for
    :param enabled: will it record when it is loaded again?
    :param content: the bits, made by :meth:`Volume.make`; more may be marked at any time. None:
        what is stored under that name stays as it is, or, if nothing is, there is nothing; the
        other fields say nothing then
    :param successor: made the same way, if the bitmap is frozen: loading gives the union of both
    """

    name: str
    granularity: int
    enabled: bool
    content: HBitmap | None
    successor: HBitmap | None = None

    @property
    def recording(self) -> HBitmap | None:
        """What has to have every write, if this is what is stored."""
        if not self.enabled:
            return None
        return self.content if self.successor is None else self.successor

    def same(self, other: Record) -> bool:
        """Equal, and the same bitmaps (not: bitmaps with equal bits)."""
        return (
            (self.name, self.granularity, self.enabled)
            == (other.name, other.granularity, other.enabled)
            and self.content is other.content
            and self.successor is other.successor
        )


@dataclass(frozen=True, eq=False)
class Wanted:
    """What a volume is to hold: the size of its node, and its bitmaps, the oldest first."""

    size: int
    records: Sequence[Record]

    @property
    def names(self) -> frozenset[str]:
        return frozenset(record.name for record in self.records)

    def same(self, other: Wanted) -> bool:
        """Equal, and the same bitmaps."""
        return (
            self.size == other.size
            and len(self.records) == len(other.records)
            and all(map(Record.same, self.records, other.records))
        )


@dataclass(frozen=True)
class StoredBitmap:
    """A bitmap that is stored, as :meth:`Store.entries` lists it or :meth:`Volume.load` has it.

    :param granularity: bytes that a bit stands for
    :param enabled: does it record when it is loaded for writing? Also said of an inconsistent one,
        which does not
    :param content: the bits, if it was loaded: made as by :meth:`Volume.make`, with a successor's
        merged; None of an inconsistent one
    :param reason: why it is inconsistent, a sentence for its user; None if it is not; or LIVE
    :param in_use: it was not closed in an orderly way, or is open now
    :param count: dirty bytes in whole groups, for whoever has counted them

    >>> from pybitmap import BlockGraph, LocalStore
    >>> with BlockGraph() as graph:
    ...     disk = graph.add_node("disk", 1 << 20, LocalStore("disks.bitmaps"))
    ...     daily = disk.add_bitmap("daily", persistent=True)
    >>> [daily] = LocalStore("disks.bitmaps").entries()[0].bitmaps
    >>> daily.name, daily.granularity, daily.enabled, daily.reason, daily.inconsistent
    ('daily', 65536, True, None, False)
    >>> daily.in_use, daily.live, daily.content, daily.count
    (False, False, None, None)
    """

    name: str
    granularity: int
    enabled: bool
    content: HBitmap | None = field(default=None, compare=False, repr=False)
    reason: str | None = None
    in_use: bool = False
    count: int | None = None

    @property
    def inconsistent(self) -> bool:
        return self.reason is not None and not self.live

    @property
    def live(self) -> bool:
        """Has another program it open, and its bits? Seen only by who reads without a lock."""
        return self.reason == LIVE


@dataclass(frozen=True)
class StoredNode:
    """A node that is stored.

    :param name: None in a store that holds one node, whatever it is called
    :param size: in bytes
    :param bitmaps: in the order in which they are stored

    >>> from pybitmap import BlockGraph, LocalStore
    >>> with BlockGraph() as graph:
    ...     disk = graph.add_node("disk", 1 << 20, LocalStore("disks.bitmaps"))
    ...     daily = disk.add_bitmap("daily", persistent=True)
    >>> [node] = LocalStore("disks.bitmaps").entries()
    >>> node.name, node.size, [bitmap.name for bitmap in node.bitmaps]
    ('disk', 1048576, ['daily'])
    """

    name: str | None
    size: int
    bitmaps: Sequence[StoredBitmap]


class Piece(NamedTuple):
    """Of the bits of a stored bitmap: what they say of ``bits.size`` bytes from ``start`` on.

    :param bits: whole groups, but for the end of the node; of whatever granularity says the same

    >>> from pybitmap import HBitmap
    >>> piece = Piece(start=1 << 20, bits=HBitmap(1 << 20, group_size=4096))
    >>> piece.start, piece.bits.size
    (1048576, 1048576)
    """

    start: int
    bits: HBitmap


@dataclass(frozen=True)
class Reading:
    """A bitmap that is stored, and a way to read it, again and again, without all of it in memory.

    :param bitmap: without content
    :param pieces: in order; what none of them covers is clean. None at all of an inconsistent one.
        A store that can gives pieces of a few MiB at most, whatever is in them, and what is left
        amid them is not open afterwards. Raises StoreError where the bits cannot be read

    >>> from pybitmap import BlockGraph, LocalStore
    >>> with BlockGraph() as graph:
    ...     disk = graph.add_node("disk", 1 << 20, LocalStore("disks.bitmaps"))
    ...     daily = disk.add_bitmap("daily", persistent=True)
    ...     disk.mark_dirty(0, 1)
    >>> volume = LocalStore("disks.bitmaps").open("disk", None, read_only=True)
    >>> [reading] = volume.read()
    >>> reading.bitmap.name, sum(piece.bits.count() for piece in reading.pieces())
    ('daily', 65536)
    >>> volume.close()
    """

    bitmap: StoredBitmap
    pieces: Callable[[], Iterator[Piece]]


class Volume(ABC):
    """What a store holds for one node, opened; made by :meth:`Store.open`."""

    #: For queries, as QMP has them.
    driver: str = "pybitmap"
    filename: str = ""
    #: Of new bitmaps, in bytes, where the node is not told; None: the node's own default.
    default_granularity: int | None = None
    #: Can it change its size? ``Wanted.size`` then says to which.
    resizable: bool = False
    #: Do marks in what :meth:`make` gave survive a kill of the process, as in a mapped file? If
    #: not, what is stored is inconsistent then, and says so.
    keeps_marks: bool = False

    def __init__(self, store: Store, node: str, size: int, *, read_only: bool) -> None:
        self.store = store
        self.node = node
        #: Of the node, in bytes.
        self.size = size
        #: The largest size that it has been, since it has had bitmaps, as far as is known.
        self.largest = size
        self.read_only = read_only
        #: See :attr:`Store.at_rest`.
        self.at_rest = store.at_rest and not read_only
        #: What is stored: one of these. Kept by the node when it loads, and then by
        #: :class:`Switches`.
        self.outcomes: list[Wanted] = []
        #: Is what is stored not (or maybe not) what was last wanted? Kept by :class:`Switches`.
        self.pending = False
        #: Is, or may, it be stored as no longer in use? Kept by :class:`Switches`.
        self.may_be_closed = False

    def holds(self, wanted: Wanted) -> bool:
        """Is that, and surely, what is stored, and in use?"""
        if self.may_be_closed or len(self.outcomes) != 1:
            return False
        return self.outcomes[0].same(wanted)

    @property
    def names(self) -> frozenset[str]:
        """Of what is, or may be, stored."""
        return frozenset().union(*(each.names for each in self.outcomes))

    @abstractmethod
    def load(self) -> list[StoredBitmap]:
        """What is stored, the oldest first; called once.

        Unless read-only or at rest, the volume is *in use* afterwards: whoever opens it after a
        crash either finds bits that are exact or an inconsistent bitmap.

        :raises StoreError: nothing has changed
        """

    def read(self) -> list[Reading]:
        """What is stored, the oldest first, for who only looks: in place of :meth:`load`, if the
        volume is open for reading only. Called once.

        This loads all of it; stores that can read parts do better.

        :raises StoreError: if it cannot be read
        """

        def pieces(content: HBitmap | None) -> Iterator[Piece]:
            if content is not None:
                yield Piece(0, content)

        return [
            Reading(replace(each, content=None), partial(pieces, each.content))
            for each in self.load()
        ]

    @abstractmethod
    def check_new(self, name: str, granularity: int, names: Collection[str]) -> None:
        """May a bitmap of that name be stored, beside those of ``names``?

        :raises UnsupportedError: in QEMU's words if not
        """

    @abstractmethod
    def make(self, granularity: int, size: int | None = None) -> HBitmap:
        """Memory for a persistent bitmap, clean; of ``size`` bytes, None: the node's.

        Marks in it cost what they cost in any bitmap. Nothing is stored until a record names it,
        and what no record names any more goes by itself.

        :raises StoreError: if there is no space
        :raises MemoryError: if there is no memory
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the volume, as it is: what is in use stays so. May be called twice."""


class Change(ABC):
    """What was prepared in one store: ends with :meth:`switch` or with :meth:`abort`."""

    #: After a switch that failed: may it have come through all the same?
    unknown: bool = True

    @abstractmethod
    def switch(self) -> None:
        """Make it so, durably, in one step.

        :raises StoreError: what is stored is as before, or if :attr:`unknown` one of the two; the
            next prepare copes with either
        """

    @abstractmethod
    def abort(self) -> None:
        """Give back what was prepared; never raises."""


class Store(ABC):
    """A place for bitmaps; given to :meth:`pybitmap.BlockGraph.add_node`.

    It is open as long as one of its volumes is: what a store needs (files, locks) is taken with the
    first and released with the last.

    >>> from pybitmap import LocalStore
    >>> store = LocalStore("disks.bitmaps")
    >>> store.path.name, store.lock, store.at_rest, store.progress
    ('disks.bitmaps', True, False, None)
    """

    #: Where it is, for people; empty if at no path.
    path: str | os.PathLike[str] = ""
    #: Does it keep others off, and heed theirs? False: see the stores.
    lock: bool = True
    #: Who wants to know how far a long store or load is.
    progress: Progress | None = None
    #: Of volumes opened from now on: is nothing written to their disks while they are open, as
    #: where bitmaps of a machine that is off are changed? What is stored need not be in use then,
    #: and goes from the old to the new with the one switch that closes it. A store may ignore it.
    at_rest: bool = False

    @classmethod
    def probe(cls, path: str | os.PathLike[str]) -> bool:
        """Is there such a store at a path?

        Found out by looks, without a lock: it may be damaged all the same, or in use. Nothing is
        written, nor open when this returns.

        :raises UnsupportedError: if it can have no bitmaps, as a qcow2 image of version 2
        :raises OSError: if it cannot be looked at, for example because nothing is there

        >>> from pybitmap import BlockGraph, LocalStore
        >>> with BlockGraph() as graph:
        ...     disk = graph.add_node("disk", 1 << 20, LocalStore("disks.bitmaps"))
        >>> LocalStore.probe("disks.bitmaps"), LocalStore.probe(".")
        (True, False)
        """
        return False

    def making(self, *, at_once: bool = False) -> AbstractContextManager[object]:
        """A block in which a store may be made where there is none: if it is left by an exception,
        whatever that is, before anything is stored, nothing is there afterwards, as before.

        A kill leaves at most a store that has nothing in it, which is one to be made as well. What
        another process has stored there meanwhile stays. All nodes are to be closed by then.

        :param at_once: what is made where nothing is appears with the end of the block, with all
            that is stored by then: a kill leaves that or nothing there (beside it at most a hidden
            folder, which the next making takes). For blocks that do one thing, since what is marked
            meanwhile goes with a kill
        :raises LockedError: (at the end) if another process has made one there meanwhile; nothing
            is stored
        :raises StoreError: (at the end) if it cannot be stored

        >>> import os
        >>> from pybitmap import BlockGraph, LocalStore
        >>> store = LocalStore("new.bitmaps")
        >>> try:
        ...     with store.making(), BlockGraph() as graph:
        ...         disk = graph.add_node("disk", 1 << 20, store)
        ...         disk.close(discard=True)
        ...         raise ValueError("a bitmap that cannot be")
        ... except ValueError:
        ...     print(os.path.exists("new.bitmaps"))
        False
        """
        return nullcontext()

    @abstractmethod
    def open(self, node: str, size: int | None, *, read_only: bool) -> Volume:
        """The volume of a node.

        :param size: of the node in bytes; None: as the store knows it
        :raises MismatchError: (a ValueError) if the store knows another size, and not only from a
            node of which it has no bitmaps
        :raises InvalidError: (a ValueError) if there is no size, nor does the store know one
        :raises LockedError: if another process has the store open
        :raises CorruptError: if it is damaged
        :raises StoreError: if it cannot be read
        """

    @abstractmethod
    def entries(self) -> list[StoredNode]:
        """What is stored, without reading bits; nothing is written.

        :raises LockedError: if another process has the store open for writing
        :raises CorruptError: if it is damaged
        :raises StoreError: if it cannot be read

        >>> from pybitmap import BlockGraph, LocalStore
        >>> with BlockGraph() as graph:
        ...     disk = graph.add_node("disk", 1 << 20, LocalStore("disks.bitmaps"))
        ...     daily = disk.add_bitmap("daily", persistent=True)
        >>> for node in LocalStore("disks.bitmaps").entries():
        ...     print(node.name, [bitmap.name for bitmap in node.bitmaps])
        disk ['daily']
        """

    def check(self) -> None:
        """Is what belongs to no single bitmap in order? Nothing is written.

        :raises CorruptError: what is wrong
        :raises LockedError: if another process has the store open for writing
        :raises StoreError: if it cannot be read

        >>> from pybitmap import BlockGraph, LocalStore
        >>> with BlockGraph() as graph:
        ...     disk = graph.add_node("disk", 1 << 20, LocalStore("disks.bitmaps"))
        >>> LocalStore("disks.bitmaps").check()     # no error: in order
        """
        self.entries()

    @abstractmethod
    def prepare(self, wanted: Mapping[Volume, Wanted], purpose: Purpose) -> Change:
        """Prepare to store; volumes that are not named stay as they are.

        :raises StoreError: nothing has changed; also if what is open is no longer what is there, as
            it was deleted or replaced
        """


@dataclass
class Switches:
    """A change of several volumes, in whichever stores: prepared when made, then switched once.

    Atomic within a store, ordered across stores: those that gain bitmaps come before those that
    lose some, or content. A store that gains and loses bitmaps, beside others, is switched twice.
    (There is no order for two stores that lose content to one another.)

    :param losing: bitmaps that lose content, by name: cleared ones
    """

    wanted: Mapping[Volume, Wanted]
    purpose: Purpose
    losing: Mapping[Volume, Collection[str]] = field(default_factory=dict)
    _steps: list[tuple[Change, Mapping[Volume, Wanted]]] = field(default_factory=list, init=False)
    _late: list[tuple[Store, Mapping[Volume, Wanted]]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        """
        :raises StoreError: nothing has changed
        """
        stores: dict[Store, dict[Volume, Wanted]] = {}
        for volume, wanted in self.wanted.items():
            stores.setdefault(volume.store, {})[volume] = wanted
        gaining: list[tuple[Store, dict[Volume, Wanted]]] = []
        losing: list[tuple[Store, dict[Volume, Wanted]]] = []
        for store, part in stores.items():
            gains = any(w.names - v.names for v, w in part.items())
            loses = any(v.names - w.names for v, w in part.items())
            if loses and gains and len(stores) > 1:
                gaining.append((store, {v: _with_lost(v, w) for v, w in part.items()}))
                self._late.append((store, part))
            elif loses or any(self.losing.get(volume) for volume in part):
                losing.insert(0 if gains else len(losing), (store, part))
            else:
                gaining.append((store, part))
        try:
            for store, part in [*gaining, *losing]:
                self._steps.append((store.prepare(part, self.purpose), part))
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Give back what was prepared and not switched."""
        while self._steps:
            self._steps.pop()[0].abort()

    def switch(self) -> StoreError | MemoryError | None:
        """Switch the stores, one after the other.

        :returns: None, or why a store could not be switched although others were: that one and
            all behind it stay as they are, since they may lose what it was to gain
        :raises StoreError: of the first store; none has been switched then
        """
        first = True
        for volume in self.wanted:  # an interruption may come at any point
            volume.pending = True
        try:
            while self._steps:
                change, part = self._steps.pop(0)
                self._switch(change, part)
                first = False
            for store, part in self._late:
                self._switch(store.prepare(part, self.purpose), part)
        except (StoreError, MemoryError) as error:
            self.abort()
            if first:
                raise
            return error
        return None

    def _switch(self, change: Change, part: Mapping[Volume, Wanted]) -> None:
        """Switch one store, and note what is stored then."""
        before = {volume: (volume.outcomes, volume.may_be_closed) for volume in part}
        closes = self.purpose is Purpose.CLOSE
        for volume, wanted in part.items():
            others = [each for each in volume.outcomes if not each.same(wanted)]
            volume.outcomes = [*others, wanted]
            volume.may_be_closed |= closes
        try:
            change.switch()
        except BaseException:
            if not change.unknown:
                for volume, known in before.items():
                    volume.outcomes, volume.may_be_closed = known
            raise
        for volume, wanted in part.items():
            volume.outcomes, volume.may_be_closed = [wanted], closes
            volume.pending = wanted is not self.wanted[volume]


def _with_lost(volume: Volume, wanted: Wanted) -> Wanted:
    """The same, without losing a bitmap."""
    there = {record.name: record for each in volume.outcomes for record in each.records}
    lost = [there[name] for name in sorted(volume.names - wanted.names)]
    return Wanted(wanted.size, [*lost, *wanted.records])
