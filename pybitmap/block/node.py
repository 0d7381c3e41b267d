# SPDX-License-Identifier: MIT
"""BlockNode: a device with named bitmaps, and the path of every write.

``node.mark_dirty(offset, length)`` is the write path: one C call marks every bitmap of the node
that records, takes no lock, and may run in any number of threads beside everything else here.
Whatever changes what records (adding, removing, enabling, freezing, ...) publishes the new set of
bitmaps and waits until no write can still see the old one, before it returns: ``csrc/tracker.h``.

Offsets, lengths and sizes are in bytes. One re-entrant lock per graph keeps management in order;
writes never take it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from operator import index
from typing import TYPE_CHECKING, SupportsIndex

from .. import _core
from .._core import CData, NotCopied, hbtracker_try_mark
from .._entry import in_front
from ..errors import ClosedError, RangeError, ReadonlyError, UnsupportedError
from ..hbitmap import HBitmap
from ..native import Pin
from ..sizes import granularity_bits
from ..store.base import StoredBitmap, Volume
from .bitmap import DirtyBitmap, bitmap_of
from .coordinator import Coordinator
from .device import Cell, Device
from .state import Forbidding, State, forbid, new_serial
from .writing import Before, Writing

if TYPE_CHECKING:
    from .._typing import Integers


class CffiNodeBase(_core.CffiEntry):
    """What BlockNode is called for most."""

    __slots__ = ()

    _tracker: CData

    def mark_dirty(self, offset: int, length: int) -> None:
        """A write: mark it in every bitmap that records.

        :raises RangeError: if it is not inside the node
        :raises ReadonlyError: if the node is read-only, or a bitmap of it must not change
        :raises ClosedError: if the node is closed
        :raises StateError: where it would have to wait for the thread that calls it, which is
            truncating or closing the node, and has come here by a callback or a signal handler

        >>> from pybitmap import BlockGraph
        >>> node = BlockGraph().add_node("disk", size=1 << 20)
        >>> daily = node.add_bitmap("daily", granularity=4096)
        >>> node.mark_dirty(5000, 512)
        >>> list(daily.areas())
        [(4096, 4096)]
        """
        if type(offset) is not int or type(length) is not int:
            offset, length = index(offset), index(length)
        try:
            code = hbtracker_try_mark(self._tracker, offset, length)
            if code == -errno.EAGAIN:
                code = self._patiently(lambda: hbtracker_try_mark(self._tracker, offset, length))
        except OverflowError:
            code = -errno.ERANGE
        if code:
            raise self._refused(code, f"range [{offset}, {offset + length})")

    def _patiently(self, call: Callable[[], int]) -> int:
        """Call until the answer is another than that it would have to wait.

        :raises StateError: if this thread waits for itself
        """
        raise NotImplementedError

    def _refused(self, code: int, what: str) -> Exception:
        """What the code of a call means."""
        raise NotImplementedError


if TYPE_CHECKING:
    NodeBase = CffiNodeBase
else:
    NodeBase = in_front("NodeBase", CffiNodeBase, handed=["mark_dirty"])


class BlockNode(NotCopied, NodeBase):
    """A device of ``size`` bytes with named dirty bitmaps; made by :meth:`BlockGraph.add_node`.

    >>> from pybitmap import BlockGraph
    >>> node = BlockGraph().add_node("disk", size=1 << 20)
    >>> daily = node.add_bitmap("daily")
    >>> node.name, node.size, node.read_only, node.volume, list(node.bitmaps)
    ('disk', 1048576, False, None, ['daily'])
    """

    def __init__(self, coordinator: Coordinator, device: Device) -> None:
        self._coordinator = coordinator
        self._device = device
        self._tracker = device.tracker
        self._attach(_core.address(device.tracker), device.owner)
        self._bitmaps = _Bitmaps(coordinator, device)

    @property
    def name(self) -> str:
        return self._device.name

    @property
    def size(self) -> int:
        """In bytes."""
        return self._device.size

    @property
    def read_only(self) -> bool:
        return self._device.read_only

    @property
    def volume(self) -> Volume | None:
        """What a store has for it; None: its bitmaps are not stored."""
        return self._device.volume

    @property
    def bitmaps(self) -> Mapping[str, DirtyBitmap]:
        """By name, in the order of adding; live."""
        return self._bitmaps

    def __repr__(self) -> str:
        return f"<BlockNode {self.name!r} size={self.size} bitmaps={list(self._bitmaps)}>"

    # ---- writes -----------------------------------------------------------------------------

    def mark_dirty_many(self, offsets: Integers, lengths: Integers | SupportsIndex) -> None:
        """Many writes; offsets and lengths are given as to :meth:`HBitmap.set_many`.

        Their order is that of the buffers: beside a transaction, those before its instant come
        first.

        :raises RangeError: if one of them is not inside the node; none is marked then
        :raises ReadonlyError: if the node is read-only, or a bitmap of it must not change
        :raises TypeError, InvalidError: as :meth:`HBitmap.set_many`
        :raises ClosedError: if the node is closed

        >>> from pybitmap import BlockGraph
        >>> node = BlockGraph().add_node("disk", size=1 << 20)
        >>> daily = node.add_bitmap("daily", granularity=4096)
        >>> node.mark_dirty_many([5000, 100_000], [512, 1])
        >>> list(daily.areas())
        [(4096, 4096), (98304, 4096)]
        """
        _core.with_ranges(self._mark_ranges, ("offsets", "lengths"), offsets, lengths)

    def _mark_ranges(self, offsets: CData, lengths: CData, nwrites: int) -> None:
        marked = 0
        done = _core.new("size_t *")

        def mark() -> int:
            nonlocal marked
            marked += done[0]
            return _core.hbtracker_try_mark_many(
                self._tracker, offsets + marked, lengths + marked, nwrites - marked, done
            )

        code = self._patiently(mark)
        if code:
            raise self._refused(code, f"one of {nwrites} writes")

    def _patiently(self, call: Callable[[], int]) -> int:
        return self._coordinator.patiently(self._device, call)

    def writing(self, offset: int, nbytes: int, before: Before = None) -> Writing:
        """``with node.writing(offset, nbytes):`` write the data inside.

        The range is marked, the block runs, the range is marked again; and whatever bitmap begins
        to record meanwhile, by a freeze or a transaction, has it marked before that change returns.
        So a copy of what was dirty has the data, or the next one will. A mark alone, before the
        data or after it, can be lost between the two.

        Writer: any number of writes may be open, of the same range too. Kill: what was written is
        marked. Dropped, or left by an exception: the second mark is made all the same. Fork: a
        graph with a store refuses writes in the child; without, a write that another thread had
        open stays so there, and each change of the bitmaps marks its range again. Begin and end may
        wait for a change of the bitmaps, never for a copy.

        :param before: for a consistent copy of a disk that is being written to: called as
            ``before(bitmap, offset, nbytes)``, in this thread and before the block, for each dirty
            range of each frozen bitmap that the write is about to go over, in whole groups, once
            for as long as the bitmap is frozen: copy it then. Another write to the same groups
            waits for that, and so does ``done()``. If it raises, the block does not run, and the
            next write calls it again
        :raises RangeError, ReadonlyError, ClosedError: as :meth:`mark_dirty`; the block does not
            run. After the block: ClosedError if the node was closed meanwhile, with the range
            marked in what was stored

        >>> from pybitmap import BlockGraph
        >>> node = BlockGraph().add_node("disk", size=1 << 20)
        >>> daily = node.add_bitmap("daily", granularity=4096)
        >>> disk = bytearray(1 << 20)
        >>> with node.writing(5000, 3):
        ...     disk[5000:5003] = b"new"
        >>> list(daily.areas())
        [(4096, 4096)]
        """
        offset, nbytes = index(offset), index(nbytes)
        if offset < 0 or nbytes < 0 or offset + nbytes > _core.MAX_SIZE:
            raise self._refused(-errno.ERANGE, f"range [{offset}, {offset + nbytes})")
        return Writing(self._coordinator, self._device, offset, nbytes, before, self._refused)

    def _refused(self, code: int, what: str) -> Exception:
        device = self._device
        if self._coordinator.forked:
            return self._coordinator.refused()
        if device.closed:
            return ClosedError(f"node '{device.name}' is closed")
        if code == -errno.ERANGE:
            return RangeError(f"{what} is not inside node '{device.name}' of {device.size} bytes")
        if code == -errno.EROFS:
            for cell in device.present():
                if cell.state.readonly:
                    return ReadonlyError(f"Bitmap '{cell.name}' is readonly and cannot be modified")
            return ReadonlyError(f"node '{device.name}' is read-only")
        return MemoryError("no memory for this thread to mark writes")

    def pin(self) -> Pin:
        """The ``HBTracker *`` for native hooks that mark writes: ``pin.address``.

        Valid until the pin is closed, whatever becomes of the node: after :meth:`truncate` and
        :meth:`close` the functions of ``csrc/tracker.h`` say so by what they return (see its head,
        "A NODE OF PYTHON'S"). Nothing is refused meanwhile. A node that nobody else has any more
        stays open, and its store locked, as long as a pin of it is.

        Writer: native marks are writes as :meth:`mark_dirty` has them, before or after the instant
        of each change; they wait while the node is truncated or closed, so a hook that holds the
        GIL calls ``hbtracker_try_mark``. Fork: in the child of a graph with a store, -ERANGE.
        Dropped, twin: see :class:`pybitmap.native.Pin`.

        :raises ClosedError: if the node is closed
        :raises StateError: in the child of a fork, if the graph has a store

        >>> from pybitmap import BlockGraph
        >>> node = BlockGraph().add_node("disk", size=1 << 20)
        >>> with node.pin() as address:
        ...     address > 0
        True
        """
        if self._coordinator.forked:
            raise self._coordinator.refused()
        self._device.check_open()
        return Pin(f"node '{self.name}'", _core.address(self._tracker), self._device)

    # ---- bitmaps ----------------------------------------------------------------------------

    def add_bitmap(
        self,
        name: str,
        granularity: int | None = None,
        *,
        persistent: bool = False,
        disabled: bool = False,
    ) -> DirtyBitmap:
        """A new bitmap, clean; it has every write that begins after this returns.

        :param name: 1..1023 bytes of UTF-8, unique in the node
        :param granularity: bytes that a bit stands for: a power of 2, at least 512; None: 65536
        :param disabled: it records nothing until it is enabled
        :raises InvalidError: for another name or granularity
        :raises ExistsError: if the node has a bitmap of that name
        :raises UnsupportedError: if it cannot be stored, but is to be persistent
        :raises StoreError: if there is no space to store it
        :raises StateError: inside a transaction, which has an ``add`` of its own

        >>> from pybitmap import BlockGraph
        >>> node = BlockGraph().add_node("disk", size=1 << 20)
        >>> node.add_bitmap("daily", granularity=4096)
        <DirtyBitmap 'daily' granularity=4096 count=0 recording>
        """
        granularity = None if granularity is None else index(granularity)
        with self._coordinator.drafting() as draft:
            cell = draft.add(
                self._device, name, granularity, persistent=persistent, disabled=disabled
            )
        return bitmap_of(cell, self._coordinator)

    def find_bitmap(self, name: str) -> DirtyBitmap:
        """
        :raises NotFoundError: (a KeyError) if there is none of that name

        >>> from pybitmap import BlockGraph
        >>> node = BlockGraph().add_node("disk", size=1 << 20)
        >>> node.add_bitmap("daily") is node.find_bitmap("daily")
        True
        """
        with self._coordinator.held():
            self._device.check_open()
            return bitmap_of(self._device.find(name), self._coordinator)

    def remove_bitmap(self, name: str) -> None:
        """Forget a bitmap.

        :raises NotFoundError: (a KeyError) if there is none of that name
        :raises StateError: if it is busy or readonly

        >>> from pybitmap import BlockGraph
        >>> node = BlockGraph().add_node("disk", size=1 << 20)
        >>> daily = node.add_bitmap("daily")
        >>> node.remove_bitmap("daily")
        >>> list(node.bitmaps)
        []
        """
        with self._coordinator.drafting() as draft:
            self._device.check_open()
            draft.remove(self._device.find(name))

    def newest_first(self) -> list[DirtyBitmap]:
        """The bitmaps as QMP's queries list them. A successor that has taken over is a new bitmap
        there, so :attr:`bitmaps` may have another order.

        >>> from pybitmap import BlockGraph
        >>> node = BlockGraph().add_node("disk", size=1 << 20)
        >>> bitmaps = [node.add_bitmap(name) for name in ("monday", "tuesday")]
        >>> [bitmap.name for bitmap in node.newest_first()]
        ['tuesday', 'monday']
        """
        cells = sorted(self._device.present(), key=lambda cell: -cell.state.serial)
        return [bitmap_of(cell, self._coordinator) for cell in cells]

    # ---- life -------------------------------------------------------------------------------

    def truncate(self, size: int) -> None:
        """Change the size, of the node and of all its bitmaps; writes wait meanwhile.

        A range that was cut off and comes back is dirty in every bitmap that records (in its
        successor, if it is frozen): it has lost what a backup may still have of it. Also across
        closing, where the store remembers, as LocalStore does. A range that is new is clean.

        >>> from pybitmap import BlockGraph
        >>> node = BlockGraph().add_node("disk", size=1 << 20)
        >>> daily = node.add_bitmap("daily", granularity=4096)
        >>> for size in (1 << 19, 1 << 21):
        ...     node.truncate(size)
        >>> list(daily.areas()) == [(1 << 19, 1 << 19)]
        True

        :raises InvalidError: for a size that a bitmap of the node cannot have
        :raises UnsupportedError: if the node's size is that of an image
        :raises InconsistentError, ReadonlyError: if a bitmap of the node is such
        :raises StateError: inside a transaction
        :raises StoreError, MemoryError: nothing has changed
        """
        size = index(size)
        device = self._device
        with self._coordinator.alone():
            device.check_open()
            if device.volume is not None and not device.volume.resizable:
                raise UnsupportedError(
                    f"node '{device.name}' has the size of its image, which is not resized here"
                )
            for cell in device.present():
                forbid(cell.name, cell.state, Forbidding.READONLY | Forbidding.INCONSISTENT)
                _core.check_size(size, cell.state.content.granularity)
            _core.check_size(size, 63)
            self._coordinator.resize(device, size)

    def flush(self) -> None:
        """Store the persistent bitmaps with all that was marked before the call.

        They stay in use: what is marked afterwards is stored by the next flush, or by close. After
        a crash that comes before, they are exact or inconsistent, as the store has it.

        :raises StoreError: what was stored before is still stored

        >>> from pybitmap import BlockGraph, LocalStore
        >>> with BlockGraph() as graph:
        ...     node = graph.add_node("disk", 1 << 20, LocalStore("disks.bitmaps"))
        ...     daily = node.add_bitmap("daily", persistent=True)
        ...     node.mark_dirty(0, 1)
        ...     node.flush()                        # what was marked is on the disk
        """
        with self._coordinator.held():
            self._device.check_open()
            self._coordinator.flush(self._device)

    def close(self, *, discard: bool = False) -> None:
        """Store the persistent bitmaps, forget all, and refuse writes; may be called twice.

        :param discard: do not store, for example where that fails: whoever opens the store next
            finds the bitmaps as after a crash
        :raises StoreError: the node is open as before, so closing can be tried again
        :raises StateError: inside a transaction

        >>> from pybitmap import BlockGraph, LocalStore
        >>> graph = BlockGraph()
        >>> node = graph.add_node("disk", 1 << 20, LocalStore("disks.bitmaps"))
        >>> daily = node.add_bitmap("daily", persistent=True)
        >>> node.mark_dirty(0, 1)
        >>> node.close()                            # stored; another program may open it
        >>> [bitmap.name for bitmap in LocalStore("disks.bitmaps").entries()[0].bitmaps]
        ['daily']
        """
        with self._coordinator.alone():
            self._coordinator.close([self._device], discard=discard)


class _Bitmaps(Mapping[str, DirtyBitmap]):
    """The bitmaps of a device that are there."""

    def __init__(self, coordinator: Coordinator, device: Device) -> None:
        self._coordinator = coordinator
        self._device = device

    def __getitem__(self, name: str) -> DirtyBitmap:
        cell = self._device.cells.get(name)
        if cell is None or cell.state.removed:
            raise KeyError(name)
        return bitmap_of(cell, self._coordinator)

    def __iter__(self) -> Iterator[str]:
        return iter([cell.name for cell in self._device.present()])

    def __len__(self) -> int:
        return len(self._device.present())

    def __repr__(self) -> str:
        return repr(dict(self))


def load(device: Device) -> None:
    """The bitmaps that are stored for a device, and that they record.

    :raises StoreError: if they cannot be read
    """
    volume = device.volume
    if volume is not None:
        for stored in volume.load():
            state = _loaded(stored, readonly=device.read_only)
            device.cells[stored.name] = Cell(device, stored.name, state)
        volume.outcomes = [device.wanted(lambda cell: cell.state)]


def _loaded(stored: StoredBitmap, *, readonly: bool) -> State:
    # An inconsistent one has no content: with 65,535 of them that matters.
    content = stored.content
    if content is None:
        content = HBitmap(0, granularity_bits(stored.granularity))
    return State(
        content,
        new_serial(),
        enabled=stored.enabled and not stored.inconsistent,
        persistent=True,
        readonly=readonly,
        reason=stored.reason,
        enabled_if_repaired=stored.enabled,
    )
