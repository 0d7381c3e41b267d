# SPDX-License-Identifier: MIT
"""The one way in which named bitmaps change, for writers that run on meanwhile.

A :class:`Draft` collects what is to be different: new states, and work on contents (clear, merge).
A :class:`Commit` makes all of it so at one instant T, or nothing. Each write is before T or after
it, on whatever nodes: the work is done on what is before T, in the order of the draft; what comes
after T is marked in what records then. If it fails, each write is where it would be without it.

=========  ==========================================================  ==========================
action     as soon as it is drafted                                    committed
=========  ==========================================================  ==========================
add        the bitmap is there, for later actions and queries          it records, from T on
remove     the bitmap keeps its name, is busy, and is not stored       it goes
clear      --                                                          nothing from before T
merge      --                                                          what the sources had at T
enable,    the flag, for later actions and queries                     it records, or does not,
disable                                                                from T on
=========  ==========================================================  ==========================

**Without work on contents** the new states are made ready, the stores are switched, and T is the
publication of what records then, which cannot fail.

**With work on contents** every bitmap that the draft touches and that records, before or after,
gets a *recorder*, which has the writes from T on, so that contents are constant while they are
worked on::

    step                               writes are marked in     what is stored names as recording
    -----------------------------------------------------------------------------------------------
    1 make recorders, contents, sets   old content              old content
    2 switch: recorders as successors  old content              old content + recorder (empty)
    3 T                                recorder                 old content + recorder
    4 compute the new contents         recorder                 old content + recorder
    5 publish both, merge recorders    recorder, new content    old content + recorder
      into the new contents
    6 switch: the new contents         recorder, new content    new content
    7 publish what is then recorded    new content              new content

Until 6 the way back is open: publish the old contents, merge the recorders into them. Where nothing
from before T remains (cleared, and nothing merged afterwards) the recorder is the new content. In
step 2 there is nothing to do where marks do not survive a kill (see store/base.py). The same way is
taken, without work, if several stores are switched and a bitmap stops recording: a store that could
not be switched goes on to name what no longer is the bitmap's.

**Where writes wait** (:meth:`Coordinator.resize`, :meth:`Coordinator.close`), they do so from T
until what records then is published.

A change that was cut short, by an exception in the midst of taking it back for example, is brought
to its end by whoever takes the lock next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from threading import RLock
from types import TracebackType
from typing import Union

from ..errors import (
    AbortedError,
    ClosedError,
    ExistsError,
    InvalidError,
    MismatchError,
    NotFoundError,
    StateError,
    StoreError,
    UnsupportedError,
)
from ..hbitmap import HBitmap
from ..store.base import Purpose, Store, Switches, Volume, Wanted
from . import state as states
from .device import Cell, Device, Publication, Stage, same, unique
from .state import CHANGE, REMOVAL, USE, Preserved, State, forbid, new_serial, recorders

#: Bytes of UTF-8.
MAX_NAME = 1023
MIN_GRANULARITY = 512
DEFAULT_GRANULARITY = 65536

_OPEN_ALREADY = "this thread has a transaction open already"


def check_granularity(granularity: int) -> None:
    """
    :raises InvalidError: for what is no granularity of a named bitmap, in bytes
    """
    if granularity < MIN_GRANULARITY or granularity & (granularity - 1):
        raise InvalidError("Granularity must be power of 2 and at least 512")


# ---- what is to be different ----------------------------------------------------------------


@dataclass(frozen=True)
class Clear:
    """Work on contents: everything is clean."""

    target: Cell


@dataclass(frozen=True)
class Merge:
    """Work on contents: what is dirty in the sources is marked, at the target's granularity."""

    target: Cell
    sources: tuple[Cell, ...]


Work = Union[Clear, Merge]


@dataclass(eq=False)
class Plan:
    """What a change makes of one bitmap.

    :param before: its state without the change; not there, if the change adds it
    :param prepared: flags as they will be, content as it is
    :param removed: is it gone afterwards?
    :param content: afterwards
    """

    cell: Cell
    before: State
    prepared: State
    content: HBitmap
    removed: bool = False
    #: Does it end with its node?
    closes: bool = False
    #: Is there work on its content? Is something from before T left in it? Is it a source of work?
    worked_on: bool = False
    keeps: bool = True
    read: bool = False
    #: Has the writes since T.
    recorder: HBitmap | None = None

    @property
    def after(self) -> State:
        """As it is then, and is stored."""
        return replace(self.prepared, content=self.content, recorder=None, removed=self.removed)

    @property
    def settled(self) -> State:
        """As its users see it then."""
        return replace(self.after, removed=True) if self.closes else self.after

    def show(self, stage: Stage) -> None:
        """To whoever asks, as far as the change has come."""
        prepared = replace(self.prepared, recorder=self.recorder)
        self.cell.change(stage, self.before, prepared, self.settled)


class Draft:
    """What is to be different; bitmaps show it at once, but for their contents.

    :param whole: is nothing to be done if one of several stores fails, rather than all but that?
    :param closes: are all nodes closed with it?
    """

    def __init__(
        self, coordinator: Coordinator, *, whole: bool = False, closes: bool = False
    ) -> None:
        self.coordinator = coordinator
        self.whole = whole
        self.closes = closes
        self.stage = Stage(Stage.PREPARED)
        self.plans: dict[Cell, Plan] = {}
        self.devices: dict[Device, None] = {}
        self.work: list[Work] = []
        self.dropped = self.ended = False

    def plan(self, cell: Cell) -> Plan:
        """That of a bitmap which is there."""
        plan = self.plans.get(cell)
        if plan is None:
            plan = Plan(cell, cell.state, cell.state, cell.state.content)
            self._add(plan)
        return plan

    def _add(self, plan: Plan) -> None:
        self.devices[plan.cell.device] = None
        self.plans[plan.cell] = plan
        plan.show(self.stage)

    def alter(self, cell: Cell, prepared: State, content: HBitmap | None = None) -> None:
        """
        :param content: afterwards; None: as it is
        """
        plan = self.plan(cell)
        plan.prepared = prepared
        if content is not None:
            plan.content = content
        plan.show(self.stage)

    def drop(self) -> None:
        """Everything is as it was, before anything was committed; may be called twice."""
        self.dropped = True
        self.stage.now = Stage.BEFORE
        self.settle()

    def settle(self) -> None:
        """Bitmaps are as they show, and there is no draft any more."""
        for plan in self.plans.values():
            cell = plan.cell
            cell.settle(plan.settled if self.stage.now == Stage.AFTER else plan.before)
            if cell.state.removed and cell.device.cells.get(cell.name) is cell:
                del cell.device.cells[cell.name]
        self.plans = {}
        self.ended = True

    # ---- actions ----------------------------------------------------------------------------

    def add(
        self,
        device: Device,
        name: str,
        granularity: int | None = None,
        *,
        persistent: bool = False,
        disabled: bool = False,
    ) -> Cell:
        """
        :raises InvalidError: for a name or a granularity that cannot be
        :raises ExistsError: if the name is taken
        :raises UnsupportedError: if it cannot be stored, but is to be persistent
        :raises StoreError, MemoryError: if there is no space for it
        """
        device_check_open(device)
        if not name:
            raise InvalidError("Bitmap name cannot be empty")
        try:
            name_nbytes = len(name.encode())
        except UnicodeEncodeError:
            raise InvalidError(f"Bitmap name is no valid Unicode: {name!r}") from None
        if granularity is None:
            stored = None if device.volume is None else device.volume.default_granularity
            granularity = DEFAULT_GRANULARITY if stored is None else stored
        check_granularity(granularity)
        if persistent:
            _check_storable(device, name, granularity)
        if name in device.cells:
            raise ExistsError(f"Bitmap already exists: {name}")
        if name_nbytes > MAX_NAME:
            raise InvalidError(f"Bitmap name too long: {name}")
        content = device.make(granularity, stored=persistent)
        prepared = State(content, new_serial(), enabled=not disabled, persistent=persistent)
        before = replace(prepared, removed=True)
        cell = Cell(device, name, before)
        self._add(Plan(cell, before, prepared, content))
        device.cells[name] = cell
        return cell

    def remove(self, cell: Cell) -> None:
        """
        :raises StateError: if a flag forbids it
        """
        forbid(cell.name, cell.state, REMOVAL)
        plan = self.plan(cell)
        plan.removed = True
        self.alter(cell, replace(cell.state, busy=True, skip_store=True))

    def enable(self, cell: Cell, enabled: bool) -> None:
        """
        :raises StateError: if a flag forbids it
        """
        forbid(cell.name, cell.state, USE)
        self.alter(cell, replace(cell.state, enabled=enabled))

    def repair(self, cell: Cell) -> None:
        """
        :raises StateError: if a flag forbids it, or it is not inconsistent
        :raises StoreError, MemoryError: if there is no space for its bits
        """
        forbid(cell.name, cell.state, REMOVAL)
        state, device = cell.state, cell.device
        if state.reason is None:
            raise StateError(f"Bitmap '{cell.name}' is not inconsistent")
        content = device.make(state.granularity, stored=state.persistent)
        content.set(0, device.size)
        enabled = state.enabled_if_repaired
        repaired = replace(state, content=content, reason=None, enabled=enabled)
        self.alter(cell, repaired, content)

    def clear(self, cell: Cell) -> None:
        """
        :raises StateError: if a flag forbids it
        """
        forbid(cell.name, cell.state, CHANGE)
        plan = self.plan(cell)
        plan.worked_on, plan.keeps = True, False
        self.work.append(Clear(cell))

    def merge(self, target: Cell, sources: Iterable[Cell]) -> None:
        """
        :param sources: of the same size; those of another graph are taken as they are when the
            contents are worked on
        :raises StateError: if a flag forbids it
        :raises MismatchError: if a source is of another size
        """
        found = []
        for source in sources:
            forbid(target.name, target.state, CHANGE)  # before the source's flags, as in QEMU
            forbid(source.name, source.state, USE)
            if source.device.size != target.device.size:
                raise MismatchError(
                    f"Bitmaps are of different sizes (destination size is {target.device.size}, "
                    f"source size is {source.device.size}) and can't be merged"
                )
            found.append(source)
        forbid(target.name, target.state, CHANGE)
        plan = self.plan(target)
        plan.worked_on = plan.keeps = True
        for source in found:
            if self.coordinator.owns(source.device):
                self.plan(source).read = True
        self.work.append(Merge(target, tuple(found)))


def device_check_open(device: Device) -> None:
    """
    :raises ClosedError: if it is closed
    """
    if device.closed:
        raise ClosedError(f"node '{device.name}' is closed")


def _check_storable(device: Device, name: str, granularity: int) -> None:
    if device.volume is None:
        raise UnsupportedError(
            f"Can't store persistent bitmaps to {device.name}: Operation not supported"
        )
    if name in device.cells:
        return  # which is complained of before what the store has against it
    if device.read_only:
        raise UnsupportedError(
            f"Can't make bitmap '{name}' persistent in '{device.name}': the node is read-only"
        )
    present = [(cell.name, cell.state) for cell in device.present()]
    names = [each for each, state in present if state.persistent and not state.skip_store]
    device.volume.check_new(name, granularity, names)


# ---- making it so ---------------------------------------------------------------------------


class Commit:
    """One change on its way; what differs between the ways is in the subclasses."""

    purpose = Purpose.COMMIT

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        #: The devices whose store is going to know what is recorded then; set by :meth:`begin`.
        self.telling: list[Device] = []
        #: Is there no way back any more?
        self.decided = False
        #: What records afterwards; what it is in either case; what did before, and more.
        self.final: Publication | None = None
        self.both: Publication | None = None
        self.back: Publication | None = None

    @property
    def plans(self) -> list[Plan]:
        return list(self.draft.plans.values())

    def run(self) -> StoreError | MemoryError | None:
        """
        :returns: what a store has still to be told although others were, and why; None: nothing
        :raises StoreError, MemoryError: nothing has changed
        """
        self.draft.coordinator.unfinished = self
        try:
            self.begin()
            failed = self.switch()
            if failed is not None and self.draft.whole:
                raise failed
            self.decided = True
        except BaseException:
            self.finish()
            raise
        self.finish()
        return failed

    def finish(self) -> None:
        """Bring to its end what was begun, forwards or back; may be called again."""
        if self.decided:
            self.draft.stage.now = Stage.AFTER
            self.go_on()
        else:
            self.go_back()
            self.draft.stage.now = Stage.BEFORE
        devices = list(self.draft.devices)
        self.draft.settle()
        self.draft.coordinator.publish_exactly(devices)
        self.draft.coordinator.unfinished = None

    # ---- steps ------------------------------------------------------------------------------

    def begin(self) -> None:
        """All that has to come before the stores are told what the bitmaps are then."""
        self.find_telling()
        self.final = self.publication(lambda plan: recorders(plan.after))
        self.both = self.publication(lambda plan: [*recorders(plan.before), *recorders(plan.after)])

    def switch(self) -> StoreError | MemoryError | None:
        wanted = self.wanted(lambda plan: plan.after)
        return Switches(wanted, self.purpose).switch()

    def go_on(self) -> None:
        assert self.final is not None
        self.final.publish()

    def go_back(self) -> None:
        """Nothing has been published; but a store may name what would have been."""
        volumes = (device.stored for device in self.telling)
        unsure = any(v is not None and v.keeps_marks and len(v.outcomes) > 1 for v in volumes)
        if unsure and self.both is not None:
            self.both.publish()

    # ---- what they share --------------------------------------------------------------------

    def publication(
        self,
        choose: Callable[[Plan], Iterable[HBitmap]],
        size: int | None = None,
    ) -> Publication:
        """Of what is chosen, and of what records without being part of the change."""
        lists = {}
        for device in self.draft.devices:
            found: list[HBitmap] = []
            for cell in list(device.cells.values()):
                plan = self.draft.plans.get(cell)
                found += recorders(cell.state) if plan is None else choose(plan)
            if device not in self.telling:
                found += device.owed()
            lists[device] = unique(found)
        return Publication(lists, size)

    def find_telling(self) -> None:
        self.telling = [device for device in self.draft.devices if self.differs(device)]

    def state_of(self, choose: Callable[[Plan], State]) -> Callable[[Cell], State]:
        def state(cell: Cell) -> State:
            plan = self.draft.plans.get(cell)
            return cell.state if plan is None else choose(plan)

        return state

    def differs(self, device: Device) -> bool:
        """Is the store of a device to hold something else than now?"""
        if device.stored is None:
            return False
        before = device.wanted(self.state_of(lambda plan: plan.before))
        return not device.wanted(self.state_of(lambda plan: plan.after)).same(before)

    def wanted(self, choose: Callable[[Plan], State]) -> dict[Volume, Wanted]:
        """What the stores are to hold when bitmaps are as chosen."""
        wanted = {}
        for device in self.telling:
            if device.stored is not None:
                wanted[device.stored] = device.wanted(self.state_of(choose))
        # And what a store could not be told before.
        stores = {volume.store for volume in wanted}
        for device in self.draft.coordinator.devices.values():
            volume = device.stored
            if volume is None or device.closed or volume in wanted:
                continue
            if volume.pending and volume.store in stores:
                wanted[volume] = device.wanted(self.state_of(choose))
        return wanted

    def work(self) -> None:
        """The new contents, from what is constant now."""
        #: None: empty.
        done: dict[Cell, HBitmap | None] = {}

        def now(cell: Cell) -> HBitmap | None:
            plan = self.draft.plans.get(cell)
            if plan is None:  # of another graph
                return cell.state.bits
            return done.get(cell, plan.before.content)

        buffers: dict[Cell, HBitmap] = {}
        for each in self.draft.work:
            target = each.target
            if isinstance(each, Clear):
                done[target] = None
                continue
            old, sources = now(target), [now(source) for source in each.sources]
            if target not in buffers:
                buffers[target] = self._buffer(self.draft.plans[target])
            buffer = done[target] = buffers[target]
            if old is None:
                buffer.reset_all()
            for bits in [old, *sources]:
                if bits is not None and bits is not buffer:
                    buffer.merge(bits)
        for target, bits in done.items():
            content = self.draft.plans[target].content
            if bits is None and buffers.get(target) is content:
                content.reset_all()

    def _buffer(self, plan: Plan) -> HBitmap:
        """To work in: the content of afterwards, unless that is marked in already."""
        if plan.content is plan.recorder:
            return HBitmap(plan.content.size, plan.content.granularity)
        return plan.content


class Diverted(Commit):
    """Contents are worked on while recorders have the writes: see the head of the module."""

    #: Have recorders the writes?
    started = False

    def begin(self) -> None:
        for plan in self.plans:
            self._make(plan)
        self._tell_recorders()
        self.find_telling()
        self.diverted = self.publication(self._diverted)
        self.both = self.publication(lambda plan: [*self._diverted(plan), *recorders(plan.after)])
        self.back = self.publication(
            lambda plan: [*recorders(plan.before), *self._diverted(plan), *recorders(plan.after)]
        )
        self.final = self.publication(lambda plan: recorders(plan.after))
        for plan in self.plans:
            plan.show(self.draft.stage)
        self.started = True
        self.diverted.publish()  # T
        self.work()
        self.both.publish()
        for plan in self.plans:
            if plan.recorder is not None and recorders(plan.after):
                plan.content.merge(plan.recorder)

    def _make(self, plan: Plan) -> None:
        """The memory for it; what a store names, or will name, lies in the store."""
        device, granularity = plan.cell.device, plan.prepared.granularity
        before, after = recorders(plan.before), recorders(plan.after)
        added, persistent = plan.before.removed, plan.prepared.persistent
        # Does nothing from before T remain, in a bitmap that records afterwards?
        fresh = plan.worked_on and not plan.keeps and not added and bool(after)
        if (before or after) and (not added or plan.worked_on or plan.read):
            named = bool(before) or fresh
            plan.recorder = device.make(granularity, stored=persistent and named)
        if fresh:
            assert plan.recorder is not None
            plan.content = plan.recorder
        elif plan.worked_on and not added:
            plan.content = device.make(granularity, stored=persistent)

    def _diverted(self, plan: Plan) -> list[HBitmap]:
        if plan.recorder is not None:
            return [plan.recorder]
        return recorders(plan.after) if plan.before.removed else recorders(plan.before)

    def _tell_recorders(self) -> None:
        """The stores name recorders beside the contents, where these record."""

        def diverted(plan: Plan) -> State:
            if plan.recorder is None or not recorders(plan.before):
                return plan.before
            return replace(plan.before, recorder=plan.recorder)

        wanted = {}
        for device in self.draft.devices:
            volume = device.stored
            if volume is not None and volume.keeps_marks:
                then = device.wanted(self.state_of(diverted))
                if not then.same(device.wanted(self.state_of(lambda plan: plan.before))):
                    wanted[volume] = then
        failed = Switches(wanted, Purpose.COMMIT).switch()
        for volume in wanted:
            volume.pending = True
        if failed is not None:
            raise failed

    def differs(self, device: Device) -> bool:
        volume = device.stored
        named = volume is not None and volume.keeps_marks
        return super().differs(device) or any(
            named and plan.recorder is not None and plan.prepared.persistent
            for plan in self.plans
            if plan.cell.device is device
        )

    def go_back(self) -> None:
        if not self.started:
            return
        assert self.back is not None
        self.back.publish()
        for plan in self.plans:
            if plan.recorder is not None and recorders(plan.before):
                plan.before.content.merge(plan.recorder)


class Thawed(Commit):
    """The successors' marks are taken back, whatever the store says."""

    def begin(self) -> None:
        super().begin()
        assert self.both is not None
        self.both.publish()
        self.decided = True

    def go_on(self) -> None:
        for plan in self.plans:
            if plan.before.successor is not None:
                plan.before.content.merge(plan.before.successor.content)
        super().go_on()


class Held(Commit):
    """Writes wait from T until all is done."""

    def begin(self) -> None:
        self.back = self.publication(lambda plan: recorders(plan.before))
        for device in self.draft.devices:
            device.hold()

    def go_back(self) -> None:
        if self.back is not None:
            self.back.publish()


class Resized(Held):
    """A node gets another size."""

    def __init__(self, draft: Draft, device: Device, size: int) -> None:
        super().__init__(draft)
        self.device = device
        self.size = size

    def begin(self) -> None:
        super().begin()
        for plan in self.plans:
            state = plan.before
            plan.content = self._resized(state, state.content)
            if state.successor is not None:
                content = self._resized(state, state.successor.content)
                successor = replace(state.successor, content=content, preserved=Preserved())
                plan.prepared = replace(state, successor=successor)
            plan.show(self.draft.stage)
        self.final = self.publication(lambda plan: recorders(plan.after), self.size)

    def _resized(self, state: State, content: HBitmap) -> HBitmap:
        """A copy of another size, in new memory of the same kind."""
        copy = content.copy()
        copy.truncate(self.size)
        if not state.persistent:
            return copy
        resized = self.device.make(state.granularity, stored=True, size=self.size)
        resized.merge(copy)
        return resized

    def switch(self) -> StoreError | MemoryError | None:
        volume = self.device.stored
        if volume is None:
            return None
        wanted = self.device.wanted(self.state_of(lambda plan: plan.after), self.size)
        return Switches({volume: wanted}, self.purpose).switch()

    def go_on(self) -> None:
        self.device.size = self.size
        if self.device.volume is not None:
            self.device.volume.size = self.size
        super().go_on()


class Closed(Held):
    """Nodes are closed, with what has been drafted.

    :param stores: are the stores told?
    """

    purpose = Purpose.CLOSE

    def __init__(self, draft: Draft, devices: Iterable[Device], *, stores: bool) -> None:
        super().__init__(draft)
        draft.whole = True
        self.telling = [device for device in devices if stores and device.stored is not None]
        for device in devices:
            draft.devices[device] = None
            for cell in device.present():
                draft.plan(cell).closes = True

    def begin(self) -> None:
        super().begin()
        self.final = self.publication(lambda plan: [], 0)
        for plan in self.plans:
            if plan.worked_on and not plan.before.removed:
                granularity, stored = plan.prepared.granularity, plan.prepared.persistent
                plan.content = plan.cell.device.make(granularity, stored=stored)
        self.work()
        for plan in self.plans:
            plan.show(self.draft.stage)

    def go_on(self) -> None:
        for device in self.draft.devices:
            device.closed = True
        super().go_on()

    def go_back(self) -> None:
        wanted = {}
        for device in self.telling:
            if device.stored is not None and device.stored.pending:
                # It may be stored as closed, but what goes on has to be in use.
                wanted[device.stored] = device.wanted(self.state_of(lambda plan: plan.before))
        try:
            with suppress(StoreError, MemoryError):
                Switches(wanted, Purpose.COMMIT).switch()
        finally:
            super().go_back()


# ---- who may ----------------------------------------------------------------------------------


class Coordinator:
    """The devices of one graph, the lock of their bitmaps, and the change that is under way."""

    def __init__(self) -> None:
        self.lock = RLock()
        self.depth = 0
        self.devices: dict[str, Device] = {}
        #: Of the transaction that is open.
        self.draft: Draft | None = None
        #: What has not come to its end, if no thread is in the midst of it.
        self.unfinished: Commit | None = None
        #: Frozen bitmaps that nobody has any more, for the next call to thaw: finalizers add them.
        self.abandoned: deque[Cell] = deque()
        #: Devices that mark in more than what their bitmaps show.
        self.owing: dict[Device, None] = {}

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
        return Drafting(self, Draft(self, whole=whole, closes=closes))

    def owns(self, device: Device) -> bool:
        return self.devices.get(device.name) is device

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
        failed = self._way(draft).run()
        if failed is not None:
            raise StoreError(
                f"the transaction is done, but not stored everywhere: {failed}; "
                f"flush() or close() of the node tries it again",
                getattr(failed, "errno", None),
            ) from failed

    def _way(self, draft: Draft) -> Commit:
        if draft.work:
            return Diverted(draft)
        plain = Commit(draft)
        plain.find_telling()
        stores = {d.volume.store for d in plain.telling if d.volume is not None}
        stop = any(recorders(plan.before) and not recorders(plan.after) for plan in plain.plans)
        return Diverted(draft) if stop and len(stores) > 1 else plain

    def flush(self, device: Device) -> None:
        """What is marked before the call is stored; what a transaction has drafted is passed over.

        :raises StoreError: what was stored before is still stored
        :raises StateError: if the thread is in the midst of a change
        """
        self.check_idle()
        volume = device.stored
        if volume is not None:
            Switches({volume: device.wanted(self._undrafted)}, Purpose.FLUSH).switch()
            self.publish_exactly([device])

    def _undrafted(self, cell: Cell) -> State:
        plan = None if self.draft is None else self.draft.plans.get(cell)
        if plan is None:
            return cell.state
        return replace(plan.before, skip_store=plan.prepared.skip_store)

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
                if not self.owns(cell.device):
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
            draft = Draft(self)
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
        draft = Draft(self)
        for cell in cells:
            if cell.state.successor is not None and not cell.state.removed:
                draft.alter(cell, states.thaw(cell.state))
        if draft.plans:
            failed = Thawed(draft).run()
            if failed is not None:
                raise failed

    def resize(self, device: Device, size: int) -> None:
        """
        :raises StoreError, MemoryError: nothing has changed
        """
        draft = Draft(self)
        draft.devices[device] = None
        for cell in device.present():
            draft.plan(cell)
        Resized(draft, device, size).run()

    def close(
        self, devices: Iterable[Device], draft: Draft | None = None, *, discard: bool
    ) -> None:
        """
        :param draft: done in the same step
        :raises StoreError, MemoryError: they are open as before
        """
        devices = [device for device in devices if not device.closed]
        Closed(draft or Draft(self), devices, stores=not discard).run()
        for device in devices:
            if device.volume is not None:
                device.volume.close()

    def check_idle(self) -> None:
        """
        :raises StateError: if the thread is in the midst of a change
        """
        if self.unfinished is not None:
            raise StateError("this thread is in the midst of a change of the bitmaps")

    def tidy(self) -> None:
        """Bring to its end what was left; by whoever takes the lock."""
        if self.unfinished is not None:
            self.unfinished.finish()
        if self.abandoned:
            cells = list(self.abandoned)
            with suppress(StoreError, MemoryError):
                self.thaw(cells)
            for _ in cells:
                self.abandoned.popleft()

    def publish_exactly(self, devices: Iterable[Device]) -> None:
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


class Hold:
    """The lock of a coordinator, as a context manager.

    No generator: an exception where one begins would keep the lock for as long as its traceback.
    """

    def __init__(self, coordinator: Coordinator) -> None:
        self.coordinator = coordinator

    def __enter__(self) -> None:
        self._enter()

    def _enter(self) -> None:
        coordinator = self.coordinator
        coordinator.lock.acquire()
        try:
            if coordinator.depth == 0:
                coordinator.tidy()
            self.check()
            coordinator.depth += 1
        except BaseException:
            coordinator.lock.release()
            raise

    def check(self) -> None:
        """
        :raises StateError: not now
        """

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.coordinator.depth -= 1
        self.coordinator.lock.release()


class Alone(Hold):
    """See :meth:`Coordinator.alone`."""

    def check(self) -> None:
        if self.coordinator.draft is not None:
            raise StateError(_OPEN_ALREADY)
        self.coordinator.check_idle()


class Drafting(Alone):
    """See :meth:`Coordinator.drafting`."""

    def __init__(self, coordinator: Coordinator, draft: Draft) -> None:
        super().__init__(coordinator)
        self.draft = draft

    def __enter__(self) -> Draft:  # type: ignore[override]
        self._enter()
        self.coordinator.draft = self.draft
        return self.draft

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        coordinator, draft = self.coordinator, self.draft
        coordinator.draft = None
        try:
            if kind is not None:
                draft.drop()
            elif draft.dropped:
                raise AbortedError(ABORTED)
            else:
                coordinator.commit(draft)
        except BaseException:
            if coordinator.unfinished is None:
                draft.drop()
            raise
        finally:
            super().__exit__(kind, error, traceback)


ABORTED = "the transaction was aborted by an action that failed"
