# SPDX-License-Identifier: MIT
"""Who may change bitmaps, and when: the lock of a graph, and the change that is under way.

A change that was cut short, by an exception in the midst of taking it back for example, is brought
to its end by whoever takes the lock next; so are frozen bitmaps that nobody has any more.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from threading import RLock
from types import TracebackType
from typing import Any
from weakref import WeakSet

from .. import _core
from .._fork import in_child
from .._guard import Guard
from ..errors import AbortedError, InvalidError, NotFoundError, StateError, StoreError
from ..store.base import Purpose, Store, Switches
from . import state as states
from .commit import Closed, Commit, Resized, Thawed, pending_beside, way
from .device import Cell, Device, Publication, same, unique
from .draft import Draft
from .state import CHANGE, USE, State, forbid

ABORTED = "the transaction was aborted by an action that failed"
#: Milliseconds that a write sleeps at most before it looks whether a signal has come, which may
#: have woken another thread.
_PATIENCE = 100

_OPEN_ALREADY = "this thread has a transaction open already"


class Coordinator:
    """The devices of one graph, the lock of their bitmaps, and the change that is under way."""

    def __init__(self) -> None:
        self.lock = RLock()
        #: Is this the child of a fork, to which nothing here belongs?
        self.forked = False
        #: Or one in which nobody is left to end what another thread was at?
        self.orphaned = False
        _coordinators.add(self)
        self.devices: dict[str, Device] = {}
        #: Of the transaction that is open.
        self.draft: Draft | None = None
        #: What has not come to its end, if no thread is in the midst of it.
        self.unfinished: Commit | None = None
        #: Frozen bitmaps that nobody has any more, for the next call to thaw: finalizers add them.
        self.abandoned: deque[Cell] = deque()
        #: Devices that mark in more than what their bitmaps show.
        self.owing: dict[Device, None] = {}

    @property
    def mine(self) -> bool:
        """Has this thread the lock?"""
        return bool(self.lock._is_owned())  # type: ignore[attr-defined]

    def held(self) -> Hold:
        """``with``: the lock, for questions."""
        return Hold(self)

    def alone(self) -> Alone:
        """``with``: the lock, for a change.

        :raises StateError: if the thread has a transaction open, or is in the midst of a change
        """
        return Alone(self)

    def drafting(self, *, whole: bool = False, closes: bool = False) -> Drafting:
        """``with`` ... ``as draft``: a change that is committed when the block ends, or dropped.

        :param whole, closes: see :class:`Draft`
        :raises StateError: as :meth:`alone`
        """
        return Drafting(self, Draft(self.devices, whole=whole, closes=closes))

    def find(self, name: str) -> Device:
        """
        :raises NotFoundError: (a KeyError) if there is none of that name
        """
        try:
            return self.devices[name]
        except KeyError:
            raise NotFoundError(f"Node '{name}' not found") from None

    def commit(self, draft: Draft) -> None:
        """Make it so.

        :raises StoreError, MemoryError: nothing has changed; or, and then the error says so, all
            has, and a store has still to be told
        """
        if draft.closes:
            self.close(self.devices.values(), draft, discard=False)
            return
        failed = self._run(way(draft))
        if failed is not None:
            raise StoreError(
                f"the transaction is done, but not stored everywhere: {failed}; "
                f"flush() or close() of the node tries it again",
                getattr(failed, "errno", None),
            ) from failed

    def _run(self, commit: Commit) -> StoreError | MemoryError | None:
        """
        :returns: what a store has still to be told although others were, and why; None: nothing
        """
        self.unfinished = commit
        self.draft = None
        try:
            failed = commit.run()
        except BaseException:
            self._finish(commit)
            raise
        self._finish(commit)
        return failed

    def _finish(self, commit: Commit) -> None:
        devices = list(commit.draft.devices)
        commit.finish()
        self._publish_exactly(devices)
        self.unfinished = None

    def flush(self, device: Device) -> None:
        """What is marked before the call is stored; what a transaction has drafted is passed over.

        :raises StoreError: what was stored before is still stored
        :raises StateError: if the thread is in the midst of a change
        """
        self.check_idle()
        volume = device.stored
        if volume is not None:
            wanted = {volume: device.wanted(self._undrafted)}
            wanted.update(pending_beside(wanted, self.devices.values(), self._undrafted))
            Switches(wanted, Purpose.FLUSH).switch()
            self._publish_exactly([device])

    def _undrafted(self, cell: Cell) -> State:
        plan = None if self.draft is None else self.draft.plans.get(cell)
        if plan is None:
            return cell.state
        return plan.before.but(skip_store=plan.prepared.skip_store)

    def at_instant(self, device: Device) -> list[tuple[Cell, State]]:
        """Its bitmaps, as they are since the instant of the last change that had one.

        What a change shows before that is too early for whoever has to act on it; so this waits
        for one of another thread.
        """
        found = [(cell, cell.settled) for cell in list(device.cells.values())]
        settled = [(cell, state) for cell, state in found if state is not None]
        if len(settled) == len(found):
            return settled
        with self.held():
            return [(cell, self._since_instant(cell)) for cell in list(device.cells.values())]

    def _since_instant(self, cell: Cell) -> State:
        """For this very thread, which may be in the midst of a change."""
        commit = self.unfinished
        plan = None if commit is None else commit.draft.plans.get(cell)
        if commit is None or plan is None:
            return self._undrafted(cell)
        return plan.after if commit.published else plan.before

    def freeze(self, cells: Iterable[Cell], holder: object) -> None:
        """All of them at one instant, or none.

        :param holder: whose it is to end this
        :raises InvalidError: if one is named twice, or is of another graph
        :raises StateError: if a flag forbids it
        :raises StoreError, MemoryError: if there is no space for a second content
        """
        with self.drafting(whole=True) as draft:
            for cell in cells:
                if cell in draft.plans:
                    raise InvalidError(f"Bitmap '{cell.name}' is to be frozen twice")
                if not draft.owns(cell.device):
                    raise InvalidError(f"Bitmap '{cell.name}' is of another graph")
                forbid(cell.name, cell.state, USE)  # a backup of QEMU's says so first
                forbid(cell.name, cell.state, CHANGE)
                state = cell.state
                content = cell.device.make(state.granularity, stored=state.persistent)
                draft.alter(cell, states.freeze(state, content, holder))

    def abdicate(self, cells: Iterable[Cell]) -> None:
        """Of frozen bitmaps: the successors take over, store by store.

        :raises StoreError, MemoryError: of the first store that refused; its bitmaps are thawed
        """
        parts: dict[Store | None, list[Cell]] = {}
        for cell in cells:
            volume = cell.device.stored if cell.state.persistent else None
            parts.setdefault(None if volume is None else volume.store, []).append(cell)
        errors = []
        for part in parts.values():
            draft = self.draft = Draft(self.devices)
            for cell in part:
                after = states.abdicate(cell.state)
                draft.alter(cell, after, after.content)
            try:
                self.commit(draft)
            except (StoreError, MemoryError) as error:
                errors.append(error)
                with suppress(StoreError, MemoryError):
                    self.thaw(part)
        if errors:
            raise errors[0]

    def thaw(self, cells: Iterable[Cell]) -> None:
        """Of frozen bitmaps: the successors' marks are taken back.

        :raises StoreError: that could not be stored; it is so all the same
        """
        draft = self.draft = Draft(self.devices)
        for cell in cells:
            if cell.state.successor is not None and not cell.state.removed:
                draft.alter(cell, states.thaw(cell.state))
        failed = self._run(Thawed(draft))
        if failed is not None:
            raise failed

    def resize(self, device: Device, size: int) -> None:
        """
        :raises StoreError, MemoryError: nothing has changed
        """
        draft = self.draft = Draft(self.devices)
        draft.devices[device] = None
        for cell in device.present():
            draft.plan(cell)
        self._run(Resized(draft, device, size))

    def close(
        self, devices: Iterable[Device], draft: Draft | None = None, *, discard: bool
    ) -> None:
        """
        :param draft: done in the same step
        :raises StoreError, MemoryError: they are open as before
        """
        devices = [device for device in devices if not device.closed]
        self.draft = draft or Draft(self.devices)
        self._run(Closed(self.draft, devices, stores=not discard))

    def after_fork(self) -> None:
        """In the child: with stores, everything is refused from now on; writes are, too.

        Without, it goes on; what another thread was at, whoever comes next brings to its end.
        """
        if not self.mine:
            self._renew_lock()
            self.orphaned = True
        for device in self.devices.values():
            for cell in list(device.cells.values()):
                if cell.state.successor is not None:
                    cell.state.successor.preserved.after_fork()
        stores = [device for device in self.devices.values() if device.volume is not None]
        self.forked = bool(stores)
        if self.forked:
            devices = [device for device in self.devices.values() if not device.closed]
            Publication(dict.fromkeys(devices, ()), 0, closed=True).publish()
            for device in self.devices.values():
                device.forked = True  # also if this thread comes back into a change

    def _renew_lock(self) -> None:
        """Another thread may have held it. It stays the same object if it can: there may be blocks
        that are about to take it."""
        renew = getattr(self.lock, "_at_fork_reinit", None)
        if self.lock.acquire(blocking=False):
            self.lock.release()
        elif renew is not None:
            renew()
        else:
            self.lock = RLock()

    def refused(self) -> StateError:
        return StateError(
            "this graph was made before a fork, and its stores belong to the parent process: "
            "the child has to open stores of its own (and a program that becomes a daemon opens "
            "them after that)"
        )

    def check_idle(self) -> None:
        """
        :raises StateError: if the thread is in the midst of a change
        """
        if self.unfinished is not None:
            raise StateError("this thread is in the midst of a change of the bitmaps")

    def patiently(self, device: Device, call: Callable[[], int]) -> int:
        """Call until the answer is not -EAGAIN: writes wait while a node is truncated or closed.

        Signal handlers run meanwhile.

        :raises StateError: if this thread is the one that is at it
        """
        while (code := call()) == -errno.EAGAIN:
            if self.mine:
                raise StateError(
                    f"node '{device.name}' is being truncated or closed by this very thread: "
                    f"the write is not marked"
                )
            if self.forked:
                raise self.refused()
            if self.orphaned:
                with self.held():
                    self.orphaned = False
            _core.hbtracker_wait(device.tracker, _PATIENCE)
        return code

    def tidy(self) -> None:
        """Bring to its end what was left, by an interruption or a finalizer."""
        if self.unfinished is not None:
            if self.draft is self.unfinished.draft:
                self.draft = None
            self._finish(self.unfinished)
        if self.draft is not None:
            self.draft.drop()
            self.draft = None
        if self.abandoned:
            cells = list(self.abandoned)
            with suppress(StoreError, MemoryError):
                self.thaw(cells)
            for _ in cells:
                self.abandoned.popleft()

    def _publish_exactly(self, devices: Iterable[Device]) -> None:
        """Let what records on the devices record, and nothing else.

        Without memory for that, writes go on being marked in more than that.
        """
        if self.draft is not None:
            return  # what it shows is not what records
        for device in dict.fromkeys([*devices, *self.owing]):
            own, owed = device.recording(), device.owed()
            everything = unique([*own, *owed])
            self.owing.pop(device, None)
            if len(everything) > len(unique(own)):
                self.owing[device] = None
            if device.closed or same(everything, device.listed):
                continue
            with suppress(MemoryError):
                Publication({device: everything}).publish()


_coordinators: WeakSet[Coordinator] = WeakSet()


@in_child
def _after_fork() -> None:
    for coordinator in list(_coordinators):
        coordinator.after_fork()


class Hold(Guard):
    """The lock of a coordinator, as a context manager."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._lock = coordinator.lock
        self._coordinator = coordinator

    def _entered(self, nested: bool) -> Any:
        if self._coordinator.forked:
            raise self._coordinator.refused()
        if not nested:
            self._coordinator.tidy()


class Alone(Hold):
    """See :meth:`Coordinator.alone`."""

    #: May there be something to bring to its end?
    _inside = False

    def _entered(self, nested: bool) -> Any:
        super()._entered(nested)
        if self._coordinator.draft is not None:
            raise StateError(_OPEN_ALREADY)
        self._coordinator.check_idle()
        self._inside = True

    def _leaving(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._coordinator.tidy()

    def _interrupted(self) -> None:
        if self._inside:
            self._coordinator.tidy()


class Drafting(Alone):
    """See :meth:`Coordinator.drafting`."""

    def __init__(self, coordinator: Coordinator, draft: Draft) -> None:
        super().__init__(coordinator)
        self._draft = draft

    def _entered(self, nested: bool) -> Any:
        super()._entered(nested)
        self._coordinator.draft = self._draft
        return self._draft

    def _leaving(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        forked = self._coordinator.forked
        if kind is not None or self._draft.dropped or forked:
            self._draft.drop()
            self._coordinator.draft = None
            if kind is None:
                raise self._coordinator.refused() if forked else AbortedError(ABORTED)
        else:
            self._coordinator.commit(self._draft)

    def _interrupted(self) -> None:
        super()._interrupted()
        if self._inside and not self._draft.ended:
            self._draft.drop()
