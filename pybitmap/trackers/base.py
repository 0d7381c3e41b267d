# SPDX-License-Identifier: MIT
"""Tracker: what all trackers have in common.

The invariant: whatever takes a write from where it is recorded (the kernel's page tables, KVM's
log) marks it in the tracker's own bitmap, the *log*, in the same call of C. All that goes on from
there is :meth:`HBitmap.drain` and :meth:`HBitmap.taking`, so a write is in one collect, whatever
runs beside it and whatever interrupts it. A collect therefore costs a fetch and a drain, of which
the second is small.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from threading import RLock
from types import TracebackType
from typing import TYPE_CHECKING
from weakref import WeakSet

from .._core import NotCopied
from .._fork import Process, in_child
from .._guard import Guard
from ..errors import ClosedError, MismatchError, StateError
from ..hbitmap import HBitmap, Taken

if TYPE_CHECKING:
    from typing_extensions import Self

_trackers: WeakSet[Tracker] = WeakSet()


class Tracker(NotCopied, ABC):
    """What was written to, since it was last asked.

    Offsets are bytes from the start of what is tracked, which has :attr:`size` of them.

    Writer: a write that returned before a collect began is in that collect or in an earlier one;
    one beside it is in that one or in the next; each is in one. Interrupted (Ctrl-C, an exception
    at any line): what was not given yet is in the next collect. Twin: several threads may collect,
    each gets a part; so may a signal handler. Fork and kill: each tracker says. Dropped without
    :meth:`close`: it is closed, with a ResourceWarning.

    >>> import mmap
    >>> from pybitmap.trackers import MemoryTracker
    >>> ram = mmap.mmap(-1, 1 << 20)
    >>> with MemoryTracker(ram) as tracker:
    ...     tracker.size, 1 << tracker.granularity == mmap.PAGESIZE, tracker.closed
    (1048576, True, False)
    >>> tracker.closed
    True
    """

    #: Does the child of a fork go on with a copy of its own? Else it is refused there.
    _forks = False

    _closed = True  # until __init__ has come to its end, and for __del__

    def __init__(self, what: str, size: int, granularity: int) -> None:
        """
        :param what: is tracked, in words, for messages: "memory at 0x7f...", "slot 3"
        :param size: in bytes
        :param granularity: log2 of the bytes that a bit of what is fetched stands for
        """
        self._what = what
        self._log = HBitmap(size, granularity)
        self._lock = RLock()
        self._process = Process()
        self._closed = False
        _trackers.add(self)

    @abstractmethod
    def _fetch(self) -> None:
        """Take what was written from where it is recorded, and then mark it in ``_log``, in one
        call of C, or in several each of which does both. (The mark last: another thread may drain
        the log meanwhile, without the lock.) Called by one thread at a time; the same thread may
        come again between two calls. What was fetched before an error stays marked.
        """

    @abstractmethod
    def _release(self) -> None:
        """Give back what was taken from the system. May be called again; does not raise."""

    @property
    def size(self) -> int:
        """Of what is tracked, in bytes."""
        return self._log.size

    @property
    def granularity(self) -> int:
        """log2 of the bytes that a bit stands for, as :attr:`HBitmap.granularity`."""
        return self._log.granularity

    @property
    def closed(self) -> bool:
        return self._closed

    def collect(self, into: HBitmap | None = None) -> HBitmap:
        """Take what was written since the last time; returns the bitmap that has it.

        An interruption that comes right when this returns loses a new bitmap, as it would the
        result of any function; ``into`` a bitmap that you keep loses nothing, and what may have to
        be put back is for :meth:`taking`.

        :param into: takes it to what it has; of :attr:`size`, and of any granularity. None: a new
            bitmap of the tracker's
        :raises MismatchError: if ``into`` has another size
        :raises ClosedError: if the tracker is closed
        :raises StateError: in the child of a fork, if the tracker is the parent's
        :raises StoreError: if the system does not give it; it is in a later collect

        >>> import mmap
        >>> from pybitmap.trackers import MemoryTracker
        >>> ram = mmap.mmap(-1, 1 << 20)
        >>> with MemoryTracker(ram) as tracker:
        ...     ram[100_000] = 1
        ...     100_000 in tracker.collect(), tracker.collect().empty()
        (True, True)
        """
        if into is not None:
            if not isinstance(into, HBitmap):
                raise TypeError(f"into must be an HBitmap, not {type(into).__name__}")
            if into.size != self.size:
                raise MismatchError(
                    f"into has {into.size} items, but {self._what} {self.size} bytes: "
                    "a bitmap to collect into has one for each"
                )
        self._fetch_held()
        if into is None or into.granularity == self.granularity:
            return self._log.drain(into=into)
        with self._log.taking() as taken:
            into.merge(taken)
            taken.done()
        return into

    def taking(self) -> Taken:
        """``with tracker.taking() as written``: the same, dropped only if that is said.

        Left without ``written.done()``, by whichever way, all of it is in the next collect; see
        :meth:`HBitmap.taking`. Raises as :meth:`collect`.

        >>> import mmap
        >>> from pybitmap.trackers import MemoryTracker
        >>> ram = mmap.mmap(-1, 1 << 20)
        >>> with MemoryTracker(ram) as tracker:
        ...     ram[100_000] = 1
        ...     with tracker.taking() as written:   # no done(): it is put back
        ...         100_000 in written
        ...     100_000 in tracker.collect()
        True
        True
        """
        self._fetch_held()
        return self._log.taking()

    def _fetch_held(self) -> None:
        with _Held(self._lock):
            self._check()
            self._fetch()

    def _check(self) -> None:
        """
        :raises ClosedError, StateError: if it cannot be used
        """
        if self._closed:
            raise ClosedError(f"the tracker of {self._what} is closed")
        if not (self._forks or self._process.is_this()):
            raise StateError(
                f"the tracker of {self._what} is the parent's, of whose writes it tells: "
                "make one in this process"
            )

    def close(self) -> None:
        """Track no longer; may be called twice. What was not collected is forgotten.

        >>> import mmap
        >>> from pybitmap.trackers import MemoryTracker
        >>> ram = mmap.mmap(-1, 1 << 20)
        >>> tracker = MemoryTracker(ram)
        >>> tracker.close()
        >>> ram.close()                             # it is lent out no longer
        """
        with _Held(self._lock):
            self._release()
            self._closed = True

    def __enter__(self) -> Self:
        self._check()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._what}{', closed' if self._closed else ''}>"

    def __del__(self) -> None:
        if not self._closed:
            self.close()
            warnings.warn(
                f"a tracker of {self._what} was dropped without close(); what is written there is "
                "tracked no longer",
                ResourceWarning,
                source=self,
                stacklevel=2,
            )


class _Held(Guard):
    def __init__(self, lock: RLock) -> None:
        self._lock = lock


@in_child
def _after_fork() -> None:
    """In the child: the thread that had a lock may be gone."""
    for tracker in _trackers:
        tracker._lock = RLock()
