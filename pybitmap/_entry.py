# SPDX-License-Identifier: MIT
"""The calls that are made by the million, and which way they go.

By way of cffi a call takes any arguments, words every error and releases the GIL; on CPython that
costs several times what a mark takes. Where the extension module ``_fast`` was built, its classes
stand in front: they do the plain case at once and hand everything else to the methods here.
``PYBITMAP_PURE_CFFI=1`` leaves it aside, as PyPy does, where cffi calls are cheap.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import suppress
from operator import index
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from . import _core
from ._core import (
    CData,
    hbitmap_count_range,
    hbitmap_get,
    hbitmap_granularity,
    hbitmap_iter_fill,
    hbitmap_iter_init,
    hbitmap_set,
    hbitmap_take,
    hbtracker_try_mark,
)

_Item = TypeVar("_Item")

#: How many items or areas an iterator fetches at a time: the first time, and at most.
FIRST_BATCH, LAST_BATCH = 16, 1024


class PythonHinted(Iterator[_Item]):
    """What ``iterator`` gives, with a ``__length_hint__``, which generators lack.

    ``hint()`` says how many that were in all. Both go when the iterator has come to its end.
    ``_fast`` has the same in C.
    """

    __slots__ = ("_given", "_hint", "_iterator")

    def __init__(self, iterator: Iterator[_Item], hint: Callable[[], int]) -> None:
        self._iterator: Iterator[_Item] = iterator
        self._hint: Callable[[], int] | None = hint
        self._given = 0

    def __next__(self) -> _Item:
        try:
            item = next(self._iterator)
        except StopIteration:
            self._iterator, self._hint = iter(()), None
            raise
        self._given += 1
        return item

    def __length_hint__(self) -> int:
        hint = self._hint
        return 0 if hint is None else max(0, hint() - self._given)


class _CffiEntry:
    """Keeps the C object."""

    __slots__ = ("_owner",)

    def _attach(self, address: int, owner: _core.Owner) -> None:
        """From now on the methods are about what lies at ``address`` as long as ``owner`` lives."""
        if hasattr(self, "_owner"):
            raise TypeError("it is initialised once")
        self._owner = owner


class CffiBase(_CffiEntry):
    """What HBitmap is called for most."""

    __slots__ = ("_clears",)

    _hb: CData

    def _attach(self, address: int, owner: _core.Owner) -> None:
        super()._attach(address, owner)
        self._clears = 0

    def set(self, start: int, count: int = 1) -> None:
        """Mark every group that the ``count`` items from ``start`` on touch; 0 marks nothing.

        :raises RangeError: (a ValueError) if the range is not inside the bitmap
        """
        if type(start) is not int or type(count) is not int:
            start, count = index(start), index(count)
        try:
            code = hbitmap_set(self._hb, start, count)
        except OverflowError:
            raise _core.out_of_range(self._hb, start, count) from None
        if code:
            raise _core.failed(code, self._hb, start, count)

    def add(self, item: int) -> None:
        """Mark the group of ``item``.

        :raises RangeError: if it is not inside the bitmap
        """
        self.set(item)

    def discard(self, item: object) -> None:
        """Clean the group of ``item``; whatever is no item of a dirty group is ignored."""
        self._take(item)

    def remove(self, item: object) -> None:
        """Clean the group of ``item``.

        :raises KeyError: if it is no item of a dirty group
        """
        if not self._take(item):
            raise KeyError(item)

    def _take(self, item: object) -> bool:
        try:
            taken = hbitmap_take(self._hb, index(cast(int, item)))
        except (TypeError, OverflowError):
            return False
        self._clears += 1
        return taken == 1

    def get(self, item: int) -> bool:
        """Is the group of ``item`` dirty? Beyond the end of the bitmap: False.

        :raises RangeError: if ``item`` is negative
        """
        item = index(item)
        try:
            return hbitmap_get(self._hb, item)
        except OverflowError:
            if item < 0:
                raise _core.out_of_range(self._hb, item, 1) from None
            return False

    def __contains__(self, item: object) -> bool:
        """Is it an item of a dirty group? Never an error."""
        try:
            return hbitmap_get(self._hb, item if type(item) is int else index(cast(int, item)))
        except (TypeError, ValueError, OverflowError):
            return False

    def _items(self, first: int) -> Iterator[int]:
        """For iter(): ``first`` is what C takes."""
        return hinted(self._batches(first), lambda: self._groups_from(first))

    def _groups_from(self, first: int) -> int:
        """How many iter(first) would give; a hint: other threads may mark and clear."""
        granularity = hbitmap_granularity(self._hb)
        start = first >> granularity << granularity
        # The last group may be cut.
        return -(-hbitmap_count_range(self._hb, start, _core.MAX_SIZE) >> granularity)

    def _batches(self, first: int) -> Iterator[int]:
        hbi = _core.new("HBitmapIter *")
        hbitmap_iter_init(hbi, self._hb, first)
        batch = FIRST_BATCH
        items = _core.new("uint64_t[]", LAST_BATCH)
        while True:
            clears = self._clears
            nitems = hbitmap_iter_fill(hbi, items, batch)
            full = nitems == batch
            batch = min(2 * batch, LAST_BATCH)
            for item in _core.unpack(items, nitems):
                if self._clears != clears:
                    # The rest of the batch may not be dirty any more. Small steps from here
                    # on: whoever clears what they get will do so again.
                    hbitmap_iter_init(hbi, self._hb, item)
                    full, batch = True, 1
                    break
                yield item
            if not full:
                return


class CffiNodeBase(_CffiEntry):
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


def hinted(iterator: Iterator[_Item], hint: Callable[[], int]) -> Iterator[_Item]:
    """See :class:`PythonHinted`."""
    return Hinted(iterator, hint)


_fast = _core.fast
if _fast is not None:
    _fast.bind(_core.addresses)


def filled_bytes(nbytes: int, fill: Callable[[CData], int]) -> tuple[int, bytes]:
    """What ``fill`` returned, and the ``uint8_t[nbytes]`` that it was given."""
    if _fast is None:
        return _core.filled_bytes(nbytes, fill)
    data: bytes = _fast.unset_bytes(nbytes)  # not set to zero first, as bytes(nbytes) is
    with _core.bytes_of(data) as c_data:
        return fill(c_data), data


def bound(function: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """What calls ``function(*args)``, whatever it is called with itself.

    Where ``_fast`` is, in C: nothing of Python's comes before the function or behind it.
    """
    if _fast is not None:
        return cast("Callable[..., Any]", _fast.bound(function, args))
    return lambda *_: function(*args)


def leave_aside() -> None:
    """From now on, calls of bitmaps go by cffi, all of them."""
    if _fast is not None:
        _fast.leave_aside()


class PythonGuard:
    """A context manager that leaves nothing half done, whatever a signal handler raises.

    With ``_lock``, if it is not None, held from before ``_entered(nested)``, of which ``with`` gets
    the answer, until after ``_leaving``; ``nested``: this thread had it before. Where one of the
    two raises, ``_interrupted`` is called as well, before the lock goes: it brings to its end what
    was left. ``_fast`` has the same in C. Here, an interruption before the first line of
    ``__exit__`` keeps the lock.
    """

    _lock: Any

    def _entered(self, nested: bool) -> Any:
        return self

    def _leaving(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass

    def _interrupted(self) -> None:
        pass

    def __enter__(self) -> Any:
        lock = self._lock
        if lock is None:
            return self._begun(False)
        nested = lock._is_owned()
        try:
            lock.acquire()
            return self._begun(nested)
        except BaseException:
            if lock._is_owned() and not nested:
                lock.release()
            raise

    def _begun(self, nested: bool) -> Any:
        try:
            return self._entered(nested)
        except BaseException:
            with suppress(BaseException):
                self._interrupted()
            if nested:
                self._lock.release()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._leaving(kind, error, traceback)
        except BaseException:
            with suppress(BaseException):
                self._interrupted()
            raise
        finally:
            if self._lock is not None:
                self._lock.release()


if TYPE_CHECKING or _fast is None:
    Base = CffiBase
    NodeBase = CffiNodeBase
    Guard = PythonGuard
    Hinted = PythonHinted
else:
    Hinted = _fast.Hinted

    class Base(_fast.Base):
        """:class:`CffiBase`, with ``_fast`` in front."""

        __slots__ = ()
        _cffi_set = CffiBase.set
        _cffi_add = CffiBase.add
        _cffi_discard = CffiBase.discard
        _cffi_remove = CffiBase.remove
        _take = CffiBase._take
        _cffi_get = CffiBase.get
        _cffi_contains = CffiBase.__contains__
        _cffi_items = CffiBase._items
        _batches = CffiBase._batches
        _groups_from = CffiBase._groups_from

        def __init_subclass__(cls, **kwargs: object) -> None:
            super().__init_subclass__(**kwargs)
            if cls.set is not Base.set and cls.add is Base.add:
                cls.add = CffiBase.add  # which calls the one that the subclass has

    class NodeBase(_fast.NodeBase):
        """:class:`CffiNodeBase`, with ``_fast`` in front."""

        __slots__ = ()
        _cffi_mark_dirty = CffiNodeBase.mark_dirty

    class Guard(_fast.Guard):
        """:class:`PythonGuard`, with ``__enter__`` and ``__exit__`` in C."""

        _entered = PythonGuard._entered
        _leaving = PythonGuard._leaving
        _interrupted = PythonGuard._interrupted
