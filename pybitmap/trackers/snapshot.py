# SPDX-License-Identifier: MIT
"""Snapshot: memory as it was at one time, and the way back there for what is dirty since."""

from __future__ import annotations

import mmap
from types import TracebackType
from typing import TYPE_CHECKING

from .. import _core
from ..errors import ClosedError, MismatchError
from ..hbitmap import HBitmap
from .memory import MemoryTracker

if TYPE_CHECKING:
    from typing_extensions import Self

    from .._typing import Writable


class Snapshot(_core.NotCopied):
    """A copy of a buffer, of which :meth:`restore` brings back what is dirty, and only that.

    Pages that are zero take no memory in the copy. (The original is read, so a hole of shared
    memory or of a file is filled there, as by any reader.)

    Memory that cannot be read ends the process (SIGBUS), as it would any reader: the mapping of a
    file that was truncated, behind the end that it has now; here, in a restore, update or rewind.

    A :class:`MemoryTracker` of the same memory also reports what is restored, since that is
    written, too. So a loop that wants to know no more than that all is as before uses
    :meth:`rewind`. Make the tracker first, or what is written between the two is lost:

    >>> import mmap
    >>> from pybitmap.trackers import MemoryTracker, Snapshot
    >>> ram = mmap.mmap(-1, 1 << 20)
    >>> with MemoryTracker(ram) as tracker, Snapshot(ram) as snapshot:
    ...     for case in (b"one", b"two"):
    ...         ram[5000:5003] = case
    ...         snapshot.rewind(tracker)
    ...     ram[5000:5003]
    4096
    4096
    b'\\x00\\x00\\x00'
    >>> snapshot.size, snapshot.closed
    (1048576, True)

    Writer: all of these are for memory at rest, as ``HBitmap.copy_areas`` is: what is written
    meanwhile is in the copy, or overwritten, in part. Kill: the memory and the copy are this
    process's. Fork: the child has a snapshot of its own; memory that is shared, it restores for its
    parent, too. Drop: the copy goes with the snapshot and its last view, and the buffer, which
    stays lent out until then or until :meth:`close`, is given back; each copying is one call of C,
    so an interruption comes before it or after. Twin: several threads may restore at once what does
    not overlap.
    """

    def __init__(self, buffer: Writable) -> None:
        """Copies all of it now.

        :param buffer: writable and contiguous
        :raises TypeError: if it is no buffer, or read-only
        :raises InvalidError: if it is not contiguous
        :raises MemoryError: if there is no memory for the copy
        """
        memory = _core.raw_array("memory that is to be kept", buffer, writable=True)
        self._address, self._size = _core.address(memory), len(memory)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        try:
            pages = mmap.mmap(-1, max(self._size, 1), flags=flags)
        except OSError:
            raise MemoryError(f"no memory for a copy of {self._size} bytes") from None
        copy = _core.raw_array("the copy", pages, writable=True)
        _core.hbmem_copy_sparse(copy, memory, self._size)
        self._data = memoryview(pages).toreadonly()[: self._size]
        # Whoever has these two has the buffers; so a close beside a call takes nothing from it.
        self._arrays: tuple[_core.CData, _core.CData] | None = (memory, copy)

    @classmethod
    def at(cls, address: int, nbytes: int, keep: object = None) -> Self:
        """The same of memory that is no buffer; see :meth:`MemoryTracker.at`.

        Reading memory that is not there ends the process, now or in a restore.

        >>> import ctypes
        >>> ram = mmap.mmap(-1, 8192)
        >>> address = ctypes.addressof(ctypes.c_char.from_buffer(ram))
        >>> with Snapshot.at(address, len(ram), keep=ram) as snapshot:
        ...     snapshot.size, snapshot.closed
        (8192, False)
        """
        return cls(_core.memory_at(address, nbytes, keep))

    @property
    def size(self) -> int:
        """In bytes."""
        return self._size

    @property
    def data(self) -> memoryview:
        """What was copied, read-only, and as :meth:`update` changes it; a view outlives the
        snapshot.

        >>> with Snapshot(bytearray(b"abc")) as snapshot:
        ...     bytes(snapshot.data)
        b'abc'
        """
        self._open()
        return self._data[:]

    @property
    def closed(self) -> bool:
        return self._arrays is None

    def restore(self, dirty: HBitmap) -> int:
        """Make the memory what it was, where it is dirty; returns how many bytes were copied.

        A MemoryTracker of this memory reports what was restored, in its next collect.

        :param dirty: whose items are the bytes of the memory, of whatever granularity
        :raises MismatchError: if ``dirty`` is not as large as this
        :raises ClosedError: if the snapshot is closed

        >>> ram, dirty = bytearray(b"old" * 100), HBitmap(300)
        >>> with Snapshot(ram) as snapshot:
        ...     ram[30:33] = b"new"
        ...     dirty.set(30, 3)
        ...     snapshot.restore(dirty)
        3
        >>> bytes(ram[30:33])
        b'old'
        """
        memory, copy = self._open()
        return self._copied(dirty, memory, copy)

    def update(self, dirty: HBitmap) -> int:
        """Take over what is in the memory now, where it is dirty; returns how many bytes were
        copied.

        :raises MismatchError, ClosedError: as :meth:`restore`

        >>> ram, dirty = bytearray(b"old" * 100), HBitmap(300)
        >>> with Snapshot(ram) as snapshot:
        ...     ram[30:33] = b"new"
        ...     dirty.set(30, 3)
        ...     snapshot.update(dirty), bytes(snapshot.data[30:33])
        (3, b'new')
        """
        memory, copy = self._open()
        return self._copied(dirty, copy, memory)

    def rewind(self, tracker: MemoryTracker) -> int:
        """Restore what the tracker would report, and let it forget that; returns how many bytes
        were copied.

        Afterwards the tracker's next collect has what differs from the snapshot, and not what is
        like it. So other uses of its collects (increments that are kept) need a restore instead.
        ``restore(tracker.collect())`` in a loop would restore whatever was written in any round,
        again in each.

        :param tracker: of the same memory
        :raises MismatchError: if the tracker is of other memory
        :raises ClosedError: if the snapshot, or the tracker, is closed
        :raises StateError, StoreError: as :meth:`Tracker.collect`

        Writer: pages that others write to meanwhile are reported by the next collect, if they
        differ from the snapshot. Interrupted: what would be reported is in the next collect.

        >>> ram = mmap.mmap(-1, 1 << 20)
        >>> with MemoryTracker(ram) as tracker, Snapshot(ram) as snapshot:
        ...     ram[5000:5003] = b"new"
        ...     snapshot.rewind(tracker) == mmap.PAGESIZE, ram[5000], tracker.collect().empty()
        (True, 0, True)
        """
        memory, copy = self._open()
        if not isinstance(tracker, MemoryTracker):
            raise TypeError(f"tracker must be a MemoryTracker, not {type(tracker).__name__}")
        if (tracker.address, tracker.size) != (self._address, self._size):
            raise MismatchError(
                f"the tracker is of {tracker.size} bytes at {tracker.address:#x}, the snapshot of "
                f"{self._size} at {self._address:#x}"
            )
        return tracker._rewind(copy, lambda dirty: self._copied(dirty, memory, copy))

    def close(self) -> None:
        """Let the buffer go, and the copy with its last view; may be called twice.

        (A call that is under way in another thread lets it go when it ends, PyPy when it collects.)

        >>> snapshot = Snapshot(bytearray(100))
        >>> snapshot.close()
        >>> snapshot.closed
        True
        """
        self._arrays = None
        self._data = memoryview(b"")

    def _open(self) -> tuple[_core.CData, _core.CData]:
        """The memory and the copy."""
        arrays = self._arrays
        if arrays is None:
            raise ClosedError("the snapshot is closed")
        return arrays

    def _copied(self, dirty: HBitmap, dst: _core.CData, src: _core.CData) -> int:
        if not isinstance(dirty, HBitmap):
            raise TypeError(f"dirty must be an HBitmap, not {type(dirty).__name__}")
        copied = -1
        if dirty.size == self._size:
            copied = _core.hbitmap_copy_areas(dirty._hb, dst, src, self._size)
        if copied < 0:
            raise MismatchError(
                f"dirty has {dirty.size} items, but the snapshot {self._size} bytes: "
                "a bitmap of it has one for each"
            )
        return copied

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = ", closed" if self.closed else ""
        return f"<Snapshot of {self._size} bytes at {self._address:#x}{state}>"
