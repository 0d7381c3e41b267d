# SPDX-License-Identifier: MIT
"""What a node is made of: its tracker, its volume, the states of its bitmaps.

A :class:`Device` is what the commit works on, a :class:`~pybitmap.BlockNode` what its users see of
it; likewise a :class:`Cell` is behind every :class:`~pybitmap.DirtyBitmap`. A :class:`Publication`
is the step from one list of recording bitmaps to the next, on as many devices as there are, at one
instant (``csrc/tracker.h``).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import is_
from weakref import ReferenceType, WeakSet

from .. import _core
from .._fork import in_child
from ..errors import ClosedError, NotFoundError
from ..hbitmap import HBitmap, pointers
from ..sizes import granularity_bits
from ..store.base import Volume, Wanted
from .state import State, record, recorders


class Stage:
    """How far a change is, for all bitmaps that it is of: one assignment moves them all.

    BEFORE, it is as if there were none; PREPARED, flags are as they will be, contents as they were;
    AFTER, it is done.
    """

    __slots__ = ("now",)

    BEFORE, PREPARED, AFTER = range(3)

    def __init__(self, now: int = BEFORE) -> None:
        self.now = now


_SETTLED = Stage()


class Cell:
    """A bitmap of a device: its name, and its state in each stage of a change.

    :param state: of a bitmap that a change adds: as it is not there
    """

    __slots__ = ("_states", "device", "handle", "name")

    def __init__(self, device: Device, name: str, state: State) -> None:
        self.device = device
        self.name = name
        #: What users have of it, see bitmap_of() in bitmap.py. Weak: memory, and the space of a
        #: store, goes with the last reference, and a cycle would keep it.
        self.handle: ReferenceType[object] | None = None
        # One object, so that whoever looks sees all of it.
        self._states: tuple[Stage, tuple[State, State, State]] = (_SETTLED, (state,) * 3)

    @property
    def state(self) -> State:
        """As it is for whoever asks."""
        stage, states = self._states
        return states[stage.now]

    @property
    def settled(self) -> State | None:
        """As it is, if no change is under way that may make it another."""
        stage, states = self._states
        return states[0] if stage is _SETTLED else None

    def change(self, stage: Stage, before: State, prepared: State, after: State) -> None:
        self._states = stage, (before, prepared, after)

    def settle(self, state: State) -> None:
        """There is no change any more."""
        self._states = _SETTLED, (state,) * 3


class Device:
    """One node.

    :param volume: None: its bitmaps are not stored
    """

    #: None until it is whole, since __del__ looks at it.
    volume: Volume | None = None

    def __init__(self, name: str, size: int, volume: Volume | None, *, read_only: bool) -> None:
        self.name = name
        self.size = size
        #: What it has been, at most, since it has had bitmaps.
        self.largest = size if volume is None else volume.largest
        self.read_only = read_only
        self.closed = False
        #: Does it belong to the parent of this process? Then nothing is published any more.
        self.forked = False
        #: By name, in the order of adding; also those that an open change adds or removes.
        self.cells: dict[str, Cell] = {}
        self.tracker, self.owner = _core.hbtracker_alloc()
        #: What is published, None: not known; and what may be, kept alive for the tracker.
        self.listed: list[HBitmap] | None = None
        self.kept: list[HBitmap] = []
        self.volume = volume

    def __del__(self) -> None:
        """Nothing is stored, and files close themselves; what is in use stays so."""
        volume = self.volume
        if volume is not None and not self.closed and not self.forked:
            left = "" if self.read_only else ", and its bitmaps are still in use there"
            what = f"node '{self.name}' of {volume.filename or volume.store!r}"
            # Without a source: who records warnings would keep it, and the store open.
            warnings.warn(
                f"{what} was dropped without close(){left}", ResourceWarning, stacklevel=2
            )

    def hold(self) -> None:
        """Writes wait from now on, and none is under way, until something is published."""
        if self.forked:
            return
        self.listed = None
        _core.hbtracker_publish(self.tracker, _core.NULL)

    @property
    def stored(self) -> Volume | None:
        """The volume, if it is written to."""
        return None if self.read_only else self.volume

    def check_open(self) -> None:
        """
        :raises ClosedError: if it is closed
        """
        if self.closed:
            raise ClosedError(f"node '{self.name}' is closed")

    def find(self, name: str) -> Cell:
        """
        :raises NotFoundError: (a KeyError) if there is none of that name
        """
        cell = self.cells.get(name)
        if cell is None or cell.state.removed:
            raise NotFoundError(f"Dirty bitmap '{name}' not found")
        return cell

    def present(self) -> list[Cell]:
        """The cells of bitmaps that are there, in the order of adding."""
        return [cell for cell in list(self.cells.values()) if not cell.state.removed]

    def make(self, granularity: int, *, stored: bool, size: int | None = None) -> HBitmap:
        """Memory for bits, where the bitmap is stored if it is.

        :raises StoreError, MemoryError: if there is no space for it
        """
        if stored and self.stored is not None:
            return self.stored.make(granularity, size)
        return HBitmap(self.size if size is None else size, granularity_bits(granularity))

    def wanted(self, state_of: Callable[[Cell], State], size: int | None = None) -> Wanted:
        """What the volume is to hold when bitmaps are in these states."""
        states = [(cell.name, state_of(cell)) for cell in list(self.cells.values())]
        states.sort(key=lambda each: each[1].serial)
        records = (record(name, state) for name, state in states)
        return Wanted(
            self.size if size is None else size, [each for each in records if each is not None]
        )

    def owed(self) -> list[HBitmap]:
        """What the store may name as recording, and would trust after a kill."""
        volume = self.stored
        if volume is None or not volume.keeps_marks:
            return []
        found = (record.recording for each in volume.outcomes for record in each.records)
        return [each for each in found if each is not None]

    def recording(self) -> list[HBitmap]:
        """What its bitmaps record in, as things are."""
        return [each for cell in list(self.cells.values()) for each in recorders(cell.state)]


def unique(bitmaps: Iterable[HBitmap]) -> list[HBitmap]:
    """Each of them once."""
    return list({id(each): each for each in bitmaps}.values())


def same(bitmaps: Sequence[HBitmap], others: Sequence[HBitmap] | None) -> bool:
    """The same bitmaps, in the same order (not: bitmaps with equal bits)."""
    return others is not None and len(bitmaps) == len(others) and all(map(is_, bitmaps, others))


class Publication:
    """What devices are to record, made ready: publishing it cannot fail.

    :param lists: by device
    :param size: of the devices, None: as they are
    :param closed: writes are refused
    :raises MemoryError: nothing has changed
    """

    def __init__(
        self,
        lists: Mapping[Device, Sequence[HBitmap]],
        size: int | None = None,
        *,
        closed: bool = False,
    ) -> None:
        self._lists = lists
        self._trackers = _core.new("HBTracker *[]", [device.tracker for device in lists])
        # The last one is NULL. What is not published is freed.
        self._sets = _core.new("HBTrackerSet *[]", len(lists) + 1)
        self._owner = _core.own(self._sets, "hbtracker_sets_free", self._sets)
        for i, (device, bitmaps) in enumerate(lists.items()):
            cells = list(device.cells.values())
            readonly = closed or device.read_only or any(cell.state.readonly for cell in cells)
            self._sets[i] = _core.hbtracker_set_alloc(
                device.size if size is None else size, pointers(bitmaps), readonly
            )

    @property
    def waiting(self) -> bool:
        """Was it not published?"""
        return bool(self._sets[0])

    def publish(self) -> None:
        """Make it so at one instant; when this returns, nothing else is marked any more.

        The second time, nothing.
        """
        try:
            _publishing.add(self)  # first: a fork from here on publishes it in the child
            if not self.waiting or any(device.forked for device in self._lists):
                return
            for device, bitmaps in self._lists.items():
                device.kept, device.listed = [*device.kept, *bitmaps], None
            _core.hbtracker_publish_all(self._trackers, self._sets, len(self._lists))
        finally:
            _publishing.discard(self)
        for device, bitmaps in self._lists.items():
            device.listed = device.kept = list(bitmaps)


#: What is being published right now, by any thread. Weak: where Ctrl-C comes just before
#: discard(), one that is published already stays until it is dropped, and does nothing.
_publishing: WeakSet[Publication] = WeakSet()


@in_child
def _after_fork() -> None:
    """In the child: what another thread was publishing is published."""
    for publication in list(_publishing):
        publication.publish()
