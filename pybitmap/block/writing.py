# SPDX-License-Identifier: MIT
"""A write that bitmaps do not miss, whatever happens beside it: ``with node.writing(...)``.

Neither order of data and mark is safe alone. A mark, then the data: a freeze in between takes the
mark, the copy takes the old data, and nobody comes again. The data, then a mark: a kill in between.
So there are two marks, and in between the range is *open* (``csrc/tracker.h``)::

    a write          a freeze, and a copy of what was marked     the data is
    -----------------------------------------------------------------------------------
    mark
                     T: takes the mark; marks the open range     marked for the next time
                     copies the old data
    write the data
    mark
"""

from __future__ import annotations

from types import TracebackType
from typing import Callable, Optional

from .. import _core
from .._guard import Guard
from ..hbitmap import HBitmap
from .bitmap import DirtyBitmap, bitmap_of
from .coordinator import Coordinator
from .device import Cell, Device
from .state import Successor

#: Called before a write goes over what a frozen bitmap has: the bitmap, offset, nbytes.
Before = Optional[Callable[[DirtyBitmap, int, int], object]]


class Writing(Guard):
    """See :meth:`pybitmap.BlockNode.writing`.

    :param refused: words an error of C
    """

    def __init__(
        self,
        coordinator: Coordinator,
        device: Device,
        offset: int,
        nbytes: int,
        before: Before,
        refused: Callable[[int, str], Exception],
    ) -> None:
        self._lock = None
        self._coordinator = coordinator
        self._device = device
        self._offset, self._nbytes = offset, nbytes
        self._before = before
        self._again = False
        self._refused = refused
        # Where C puts the open write: there also if an interruption comes right then.
        self._write = _core.new("HBWrite **")
        # Left without __exit__, by a generator that was dropped or an interruption right before it.
        self._owner = _core.own(self._write, "hbtracker_drop_write", (self._write, device.owner))

    def _entered(self, nested: bool) -> None:
        self._again = bool(self._write[0])
        if self._again:
            raise RuntimeError("a write is begun once")
        self._check(self._coordinator.patiently(self._device, self._begin))
        if self._before is not None:
            for cell, state in self._coordinator.at_instant(self._device):
                if state.successor is not None:
                    self._preserve(cell, state.content, state.successor)

    def _begin(self) -> int:
        return _core.hbtracker_try_begin_write(
            self._device.tracker, self._offset, self._nbytes, self._write
        )

    def _preserve(self, cell: Cell, content: HBitmap, successor: Successor) -> None:
        """Let what the frozen bitmap has of the range be seen to, once."""
        assert self._before is not None
        group = 1 << content.granularity
        start = self._offset & -group
        end = min(-(-(self._offset + self._nbytes) // group) * group, content.size)
        preserved = successor.preserved
        with preserved.lock:
            if preserved.ended:
                return
            if preserved.groups is None:
                preserved.groups = HBitmap(content.size, content.granularity)
            for offset, nbytes in _without(content, preserved.groups, start, end):
                self._before(bitmap_of(cell, self._coordinator), offset, nbytes)
                preserved.groups.set(offset, nbytes)

    def _leaving(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        code = self._coordinator.patiently(self._device, self._close)
        if kind is None:
            self._check(code)

    def _interrupted(self) -> None:
        if self._again:  # it is not this block's to end
            self._again = False
            return
        self._coordinator.patiently(self._device, self._close)

    def _close(self) -> int:
        return _core.hbtracker_try_end_write(self._device.tracker, self._write)

    def _check(self, code: int) -> None:
        if code:
            raise self._refused(code, f"range [{self._offset}, {self._offset + self._nbytes})")


def _without(content: HBitmap, groups: HBitmap, start: int, end: int) -> list[tuple[int, int]]:
    """The areas of ``content`` in a range, less what is in ``groups``."""
    found = []
    for offset, nbytes in content.areas(start, end=end):
        stop = offset + nbytes
        while offset < stop:
            dirty, length = groups.status(offset, stop - offset)
            if not dirty:
                found.append((offset, length))
            offset += length
    return found
