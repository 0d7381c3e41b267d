# SPDX-License-Identifier: MIT
"""DirtyBitmap: an HBitmap with a name, flags and a lifecycle, as QEMU's block layer has them.

A bitmap records a node's writes while it is enabled. What may be done with it depends on its flags:
:mod:`.state` has them.

To read a bitmap while writes go on, it is frozen: a *successor* without a name records in its
place. If what was read is done with, the successor takes over; else its marks go back to the
bitmap, so that both are there the next time::

    with bitmap.freeze() as frozen:
        for offset, nbytes in bitmap.areas():
            copy(offset, nbytes)
        frozen.done()                         # else everything is put back

Offsets, lengths, counts and granularities are in bytes. Everything may be called from several
threads; what changes flags takes the lock of the graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, SupportsIndex
from weakref import ref

from .._core import NotCopied
from .._guard import Guard
from ..errors import InvalidError, StateError, StoreError
from ..hbitmap import HBitmap
from .coordinator import Coordinator
from .device import Cell
from .state import CHANGE, State, forbid

if TYPE_CHECKING:
    from .._typing import Integers
    from ..arrays import Areas


class DirtyBitmap(NotCopied):
    """A named bitmap of a node; made by :meth:`pybitmap.BlockNode.add_bitmap`.

    Questions never wait. They are answered as of before a change that another thread is making,
    or as of after it; with every write that has returned, in either case. Once it was removed, or
    its node closed, it answers as it was then, records nothing, and whatever changes it is a
    NotFoundError.

    >>> from pybitmap import BlockGraph
    >>> node = BlockGraph().add_node("disk", size=1 << 20)
    >>> daily = node.add_bitmap("daily", granularity=4096)
    >>> daily.name, daily.size, daily.granularity
    ('daily', 1048576, 4096)
    >>> daily.enabled, daily.recording, daily.busy, daily.persistent, daily.skip_store
    (True, True, False, False, False)
    >>> daily.readonly, daily.inconsistent, daily.reason
    (False, False, None)
    """

    def __init__(self, cell: Cell, coordinator: Coordinator) -> None:
        self._cell = cell
        self._coordinator = coordinator

    # ---- what it is -------------------------------------------------------------------------

    @property
    def _state(self) -> State:
        return self._cell.state

    @property
    def name(self) -> str:
        return self._cell.name

    @property
    def size(self) -> int:
        """Of the node, in bytes."""
        return self._cell.device.size

    @property
    def granularity(self) -> int:
        """Bytes that a bit stands for."""
        return self._state.granularity

    @property
    def enabled(self) -> bool:
        """Does it record itself? (A frozen bitmap does not, see :attr:`recording`.)"""
        return self._state.enabled

    @property
    def recording(self) -> bool:
        """Will a write be recorded, by the bitmap or by its successor?"""
        return self._state.recording

    @property
    def busy(self) -> bool:
        """In use by another operation: frozen, or about to be removed by an open transaction."""
        return self._state.busy

    @property
    def persistent(self) -> bool:
        """Is it stored with its node? Not while :attr:`skip_store` says otherwise."""
        state = self._state
        return state.persistent and not state.skip_store

    @property
    def readonly(self) -> bool:
        return self._state.readonly

    @property
    def inconsistent(self) -> bool:
        """Was it not stored in an orderly way? :attr:`reason` says what happened."""
        return self._state.reason is not None

    @property
    def reason(self) -> str | None:
        """Why it is inconsistent, a sentence; None if it is not."""
        return self._state.reason

    @property
    def skip_store(self) -> bool:
        """Does the node pass over it when it stores its bitmaps?"""
        return self._state.skip_store

    def __repr__(self) -> str:
        flags = [
            flag
            for flag in ("recording", "busy", "persistent", "readonly", "inconsistent")
            if getattr(self, flag)
        ]
        return (
            f"<DirtyBitmap {self.name!r} granularity={self.granularity} count={self.count()}"
            f"{''.join(' ' + flag for flag in flags)}>"
        )

    def _repr_html_(self) -> str:
        """For notebooks, as :meth:`HBitmap._repr_html_`; of a frozen bitmap, what is frozen."""
        from ..picture import picture, shown

        return shown(self, lambda: picture(self._state.bits, self.name, "bytes"))

    # ---- what it holds ----------------------------------------------------------------------

    def count(self, start: int | None = None, count: int | None = None) -> int:
        """Dirty bytes, see :meth:`HBitmap.count`; of a frozen bitmap, without its successor's.

        >>> from pybitmap import BlockGraph
        >>> node = BlockGraph().add_node("disk", size=1 << 20)
        >>> daily = node.add_bitmap("daily", granularity=4096)
        >>> node.mark_dirty(5000, 1)
        >>> daily.count(), daily.count(0, 5000)
        (4096, 904)
        """
        return self._state.bits.count(start, count)

    def get(self, offset: int) -> bool:
        """Is the group of ``offset`` dirty? Beyond the end: False.

        >>> from pybitmap import BlockGraph
        >>> node = BlockGraph().add_node("disk", size=1 << 20)
        >>> daily = node.add_bitmap("daily", granularity=4096)
        >>> node.mark_dirty(5000, 1)
        >>> daily.get(4096), daily.get(0)
        (True, False)
        """
        state = self._state
        if state.recorder is not None and state.recorder.get(offset):
            return True
        return state.content.get(offset)

    def areas(self, start: int = 0, *, end: int | None = None) -> Iterator[tuple[int, int]]:
        """The dirty areas ``(offset, nbytes)``, see :meth:`HBitmap.areas`.

        >>> from pybitmap import BlockGraph
        >>> node = BlockGraph().add_node("disk", size=1 << 20)
        >>> daily = node.add_bitmap("daily", granularity=4096)
        >>> node.mark_dirty(5000, 1)
        >>> list(daily.areas())
        [(4096, 4096)]
        """
        return self._state.bits.areas(start, end=end)

    def areas_array(self, start: int = 0, *, end: int | None = None) -> Areas:
        """The same at once, for NumPy, pandas, Polars: see :meth:`HBitmap.areas_array`.

        >>> from pybitmap import BlockGraph
        >>> node = BlockGraph().add_node("disk", size=1 << 20)
        >>> daily = node.add_bitmap("daily", granularity=4096)
        >>> node.mark_dirty(5000, 1)
        >>> daily.areas_array().tolist()
        [[4096, 4096]]
        """
        return self._state.bits.areas_array(start, end=end)

    def sha256(self) -> str:
        """Of the bits, in hex, as :meth:`HBitmap.sha256` has it: that of QEMU's
        x-debug-block-dirty-bitmap-sha256.

        >>> from pybitmap import BlockGraph
        >>> daily = BlockGraph().add_node("disk", size=1 << 20).add_bitmap("daily")
        >>> len(daily.sha256())
        64
        """
        with self._coordinator.held():
            state = self._state
            if state.reason is None:
                return state.bits.sha256()
            # QEMU has empty bits for an inconsistent one, we have none.
            return HBitmap(self.size, state.content.granularity).sha256()

    def next_dirty(self, start: int, count: int | None = None) -> int | None:
        """The first dirty offset in a range, see :meth:`HBitmap.next_dirty`.

        >>> from pybitmap import BlockGraph
        >>> node = BlockGraph().add_node("disk", size=1 << 20)
        >>> daily = node.add_bitmap("daily", granularity=4096)
        >>> node.mark_dirty(5000, 1)
        >>> daily.next_dirty(0), daily.next_dirty(8192)
        (4096, None)
        """
        return self._state.bits.next_dirty(start, count)

    def next_zero(self, start: int, count: int | None = None) -> int | None:
        """The first clean offset in a range, see :meth:`HBitmap.next_zero`.

        >>> from pybitmap import BlockGraph
        >>> node = BlockGraph().add_node("disk", size=1 << 20)
        >>> daily = node.add_bitmap("daily", granularity=4096)
        >>> node.mark_dirty(5000, 1)
        >>> daily.next_zero(0), daily.next_zero(4096)
        (0, 8192)
        """
        return self._state.bits.next_zero(start, count)

    def next_dirty_area(
        self, start: int, *, end: int | None = None, max_count: int | None = None
    ) -> tuple[int, int] | None:
        """The first dirty area ``(offset, nbytes)``, see :meth:`HBitmap.next_dirty_area`.

        >>> from pybitmap import BlockGraph
        >>> node = BlockGraph().add_node("disk", size=1 << 20)
        >>> daily = node.add_bitmap("daily", granularity=4096)
        >>> node.mark_dirty(5000, 1)
        >>> daily.next_dirty_area(0), daily.next_dirty_area(0, max_count=512)
        ((4096, 4096), (4096, 512))
        """
        return self._state.bits.next_dirty_area(start, end=end, max_count=max_count)

    def status(self, start: int, count: int | None = None) -> tuple[bool, int]:
        """Is ``start`` dirty, and for how many bytes does that hold? See :meth:`HBitmap.status`.

        >>> from pybitmap import BlockGraph
        >>> node = BlockGraph().add_node("disk", size=1 << 20)
        >>> daily = node.add_bitmap("daily", granularity=4096)
        >>> node.mark_dirty(5000, 1)
        >>> daily.status(0), daily.status(4096)
        ((False, 4096), (True, 4096))
        """
        return self._state.bits.status(start, count)

    # ---- what may be done -------------------------------------------------------------------

    def enable(self) -> None:
        """Record writes from now on.

        :raises StateError: if it is busy or inconsistent, or inside a transaction

        >>> from pybitmap import BlockGraph
        >>> daily = BlockGraph().add_node("disk", size=1 << 20).add_bitmap("daily", disabled=True)
        >>> daily.enable()
        >>> daily.recording
        True
        """
        with self._coordinator.drafting() as draft:
            draft.enable(self._cell, True)

    def disable(self) -> None:
        """Record no write that comes after this returns.

        :raises StateError: if it is busy or inconsistent, or inside a transaction

        >>> from pybitmap import BlockGraph
        >>> daily = BlockGraph().add_node("disk", size=1 << 20).add_bitmap("daily")
        >>> daily.disable()
        >>> daily.recording
        False
        """
        with self._coordinator.drafting() as draft:
            draft.enable(self._cell, False)

    def clear(self) -> None:
        """Make everything clean: what was marked before the instant of the change, in one go.

        :raises StateError: if it is busy, readonly or inconsistent, or inside a transaction

        >>> from pybitmap import BlockGraph
        >>> daily = BlockGraph().add_node("disk", size=1 << 20).add_bitmap("daily")
        >>> daily.set(0, 1)
        >>> daily.clear()
        >>> daily.count()
        0
        """
        with self._coordinator.drafting() as draft:
            draft.clear(self._cell)

    def set(self, offset: int, nbytes: int) -> None:
        """Mark, whether enabled or not.

        :raises StateError: if it is busy, readonly or inconsistent
        :raises RangeError: if the range is not inside the node

        >>> from pybitmap import BlockGraph
        >>> daily = BlockGraph().add_node("disk", size=1 << 20).add_bitmap("daily", disabled=True)
        >>> daily.set(0, 1)
        >>> daily.count()
        65536
        """
        with self._coordinator.alone():
            self._changing().set(offset, nbytes)

    def set_many(self, offsets: Integers, lengths: Integers | SupportsIndex) -> None:
        """Mark many ranges, see :meth:`HBitmap.set_many`.

        :raises StateError: if it is busy, readonly or inconsistent

        >>> from pybitmap import BlockGraph
        >>> daily = BlockGraph().add_node("disk", size=1 << 20).add_bitmap("daily", 4096)
        >>> daily.set_many([0, 8192], 1)
        >>> list(daily.areas())
        [(0, 4096), (8192, 4096)]
        """
        with self._coordinator.alone():
            self._changing().set_many(offsets, lengths)

    def reset(self, offset: int, nbytes: int) -> None:
        """Clean whole groups, see :meth:`HBitmap.reset`.

        :raises StateError: if it is busy, readonly or inconsistent
        :raises InvalidError: if the range cuts a group, or is not inside the node

        >>> from pybitmap import BlockGraph
        >>> daily = BlockGraph().add_node("disk", size=1 << 20).add_bitmap("daily", 4096)
        >>> daily.set(0, 8192)
        >>> daily.reset(0, 4096)
        >>> list(daily.areas())
        [(4096, 4096)]
        """
        with self._coordinator.alone():
            self._changing().reset(offset, nbytes)

    def drain(self) -> HBitmap:
        """Take what is dirty: clean it, and answer what it was.

        A write that runs beside it is in what was taken, or still there. What was taken is nowhere
        else: a program that is killed before it has done its work has lost it.

        :raises StateError: if it is busy, readonly or inconsistent

        >>> from pybitmap import BlockGraph
        >>> daily = BlockGraph().add_node("disk", size=1 << 20).add_bitmap("daily", 4096)
        >>> daily.set(0, 1)
        >>> taken = daily.drain()
        >>> taken.count(), daily.count()
        (4096, 0)
        """
        with self._coordinator.alone():
            return self._changing().drain()

    def _changing(self) -> HBitmap:
        state = self._state
        forbid(self.name, state, CHANGE)
        return state.content

    def merge(self, *sources: DirtyBitmap) -> None:
        """Mark what is dirty in the sources, in all of them or, if one is refused, in none.

        They may be on any node of the same size, and of any granularity. Those of this graph are
        taken as of one instant.

        :raises StateError: if this is busy, readonly or inconsistent, or a source is busy or
            inconsistent
        :raises MismatchError: (a ValueError) if a source is of another size

        >>> from pybitmap import BlockGraph
        >>> disk = BlockGraph().add_node("disk", size=1 << 20)
        >>> monday, week = disk.add_bitmap("monday", 4096), disk.add_bitmap("week", disabled=True)
        >>> disk.mark_dirty(0, 1)
        >>> week.merge(monday)
        >>> week.count()
        65536
        """
        with self._coordinator.drafting() as draft:
            draft.merge(self._cell, (source._cell for source in sources))

    # ---- freezing ---------------------------------------------------------------------------

    def freeze(self) -> Frozen:
        """``with bitmap.freeze() as frozen``: :meth:`BlockGraph.freeze` of this one.

        >>> from pybitmap import BlockGraph
        >>> node = BlockGraph().add_node("disk", size=1 << 20)
        >>> daily = node.add_bitmap("daily", granularity=4096)
        >>> node.mark_dirty(0, 1)
        >>> with daily.freeze() as frozen:
        ...     copied = list(daily.areas())
        ...     frozen.done()
        >>> copied, daily.count()
        ([(0, 4096)], 0)

        :raises StateError: if it is busy, readonly or inconsistent, or inside a transaction
        :raises StoreError: if it is persistent and there is no space for a second one
        """
        return Frozen(self._coordinator, [self])

    # ---- repair -----------------------------------------------------------------------------

    def repair(self) -> None:
        """Make an inconsistent bitmap usable: all dirty, so too much is copied, nothing missed.

        It records from now on if it did when it was stored.

        :raises StateError: if it is not inconsistent, or busy, or readonly, or inside a transaction
        :raises StoreError: if that cannot be stored; nothing has changed

        >>> from pathlib import Path
        >>> from pybitmap import BlockGraph, LocalStore
        >>> with BlockGraph() as graph:
        ...     disk = graph.add_node("disk", 1 << 20, LocalStore("broken.bitmaps"))
        ...     daily = disk.add_bitmap("daily", persistent=True)
        >>> for words in Path("broken.bitmaps").glob("*.words"):
        ...     words.unlink()                      # somebody damages the store
        >>> with BlockGraph() as graph:
        ...     disk = graph.add_node("disk", store=LocalStore("broken.bitmaps"))
        ...     disk.bitmaps["daily"].inconsistent
        ...     disk.bitmaps["daily"].repair()
        ...     disk.bitmaps["daily"].count()
        True
        1048576
        """
        with self._coordinator.drafting() as draft:
            draft.repair(self._cell)


class Frozen(Guard, NotCopied, Collection[DirtyBitmap]):
    """Bitmaps that are constant and busy, since one instant; made by :meth:`BlockGraph.freeze`.

    ::

        with graph.freeze([disk.bitmaps["daily"], log.bitmaps["daily"]]) as frozen:
            for bitmap in frozen:
                for offset, nbytes in bitmap.areas():
                    copy(...)
            frozen.done()          # once the copy is durable

    Iterating gives those that are still frozen. Whatever has not been said to be done when the
    block ends, by whichever way, is put back: all its marks, and those made meanwhile.

    Writer: what is marked after the instant is not in what is read, and is kept in either case.
    Kill: whoever opens the store finds the marks of before and after the instant, or, once
    :meth:`done` has returned, those of after. Dropped without leaving the block or :meth:`close`:
    a ResourceWarning, and the next call on the graph puts all back. Fork: the child must not use
    it. Twin: a bitmap that is frozen is busy to everybody else.

    >>> from pybitmap import BlockGraph
    >>> graph = BlockGraph()
    >>> disk, log = graph.add_node("disk", size=1 << 20), graph.add_node("log", size=1 << 20)
    >>> bitmaps = [node.add_bitmap("daily", 4096) for node in (disk, log)]
    >>> disk.mark_dirty(0, 1)
    >>> with graph.freeze(bitmaps) as frozen:
    ...     log.mark_dirty(4096, 1)             # it is kept for the next time
    ...     [list(bitmap.areas()) for bitmap in frozen]
    ...     frozen.done()
    [[(0, 4096)], []]
    >>> [list(bitmap.areas()) for bitmap in bitmaps]
    [[], [(4096, 4096)]]
    """

    _cells: Sequence[Cell] = ()  # so far, if it comes no further

    def __init__(self, coordinator: Coordinator, bitmaps: Iterable[DirtyBitmap]) -> None:
        self._lock = None
        self._coordinator = coordinator
        # Known before anything is frozen, since __del__ puts back what has this holder.
        self._holder = object()
        self._cells = [bitmap._cell for bitmap in bitmaps]
        coordinator.freeze(self._cells, self._holder)

    def __iter__(self) -> Iterator[DirtyBitmap]:
        return iter([bitmap_of(cell, self._coordinator) for cell in self._left()])

    def __len__(self) -> int:
        return len(self._left())

    def __contains__(self, bitmap: object) -> bool:
        return any(bitmap is each for each in list(self))

    def __repr__(self) -> str:
        return f"<Frozen {[cell.name for cell in self._left()]}>"

    def _left(self) -> list[Cell]:
        return [cell for cell in self._cells if self._holds(cell)]

    def _holds(self, cell: Cell) -> bool:
        state = cell.state
        return (
            state.successor is not None
            and state.successor.holder is self._holder
            and not state.removed
        )

    def done(self, *bitmaps: DirtyBitmap) -> None:
        """What was read of these is dropped, and what was written meanwhile is what they hold.

        Call it once the copy is durable. The bitmaps of one store are done in one step.

        :param bitmaps: some of those that are frozen; none named: all that are left
        :raises InvalidError: if one of them is not among these; nothing has changed
        :raises StateError: if one that is named was done or put back before, for example because
            its node was closed; nothing has changed
        :raises StoreError: if a store refuses. The bitmaps of that store are put back, those of
            others are done

        >>> from pybitmap import BlockGraph
        >>> disk = BlockGraph().add_node("disk", size=1 << 20)
        >>> daily = disk.add_bitmap("daily", 4096)
        >>> disk.mark_dirty(0, 1)
        >>> with daily.freeze() as frozen:
        ...     frozen.done(daily)
        >>> daily.count()
        0
        """
        cells = [self._cell_of(bitmap) for bitmap in bitmaps] if bitmaps else self._left()
        self._end_preserving(cells)
        with self._coordinator.alone():
            self._coordinator.abdicate([cell for cell in dict.fromkeys(cells) if self._holds(cell)])

    def _end_preserving(self, cells: Iterable[Cell]) -> None:
        wait = not self._coordinator.mine
        for cell in cells:
            successor = cell.state.successor
            if successor is not None and successor.holder is self._holder:
                successor.preserved.end(wait=wait)

    def _cell_of(self, bitmap: DirtyBitmap) -> Cell:
        cell = bitmap._cell
        if cell not in self._cells:
            raise InvalidError(f"Bitmap '{bitmap.name}' is not among the frozen")
        if not self._holds(cell):
            raise StateError(f"Bitmap '{bitmap.name}' is not frozen any more")
        return cell

    def close(self, *bitmaps: DirtyBitmap) -> None:
        """Put back what is not done; may be called twice.

        :param bitmaps: of these; none named: of all that are left
        :raises InvalidError, StateError: as :meth:`done`
        :raises StoreError: that could not be stored. It is so all the same; until it can be,
            whoever loads the bitmaps gets the same

        >>> from pybitmap import BlockGraph
        >>> disk = BlockGraph().add_node("disk", size=1 << 20)
        >>> daily = disk.add_bitmap("daily", 4096)
        >>> disk.mark_dirty(0, 1)
        >>> frozen = daily.freeze()
        >>> frozen.close()                          # as at the end of a block
        >>> daily.busy, daily.count()
        (False, 4096)
        """
        cells = [self._cell_of(bitmap) for bitmap in bitmaps] if bitmaps else self._left()
        self._end_preserving(cells)
        with self._coordinator.alone():
            self._coordinator.thaw(cell for cell in dict.fromkeys(cells) if self._holds(cell))

    if TYPE_CHECKING:

        def __enter__(self) -> Frozen: ...

    def _leaving(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except StoreError:
            if kind is None:
                raise  # else what happened first is what its user has to know

    def _interrupted(self) -> None:
        self._coordinator.abandoned.extend(self._left())
        with self._coordinator.held():
            pass  # which puts them back

    def __del__(self) -> None:
        left = self._left()
        if left and not self._coordinator.forked:
            self._coordinator.abandoned.extend(left)
            names = ", ".join(f"'{cell.name}'" for cell in left)
            warnings.warn(
                f"frozen bitmaps were dropped without close(): {names}; all their marks are put "
                f"back by the next call",
                ResourceWarning,
                source=self,
                stacklevel=2,
            )


def bitmap_of(cell: Cell, coordinator: Coordinator) -> DirtyBitmap:
    """What users have of a cell: one object as long as somebody has it."""
    handle = None if cell.handle is None else cell.handle()
    if handle is None:
        handle = DirtyBitmap(cell, coordinator)
        cell.handle = ref(handle)
    assert isinstance(handle, DirtyBitmap)
    return handle
