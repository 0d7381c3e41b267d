# SPDX-License-Identifier: MIT
"""The one way in which named bitmaps change, for writers that run on meanwhile.

A :class:`~.draft.Draft` has what is to be different: new states, and work on contents (clear,
merge). A :class:`Commit` makes all of it so at one instant T, or nothing. Each write is before T or
after it, on whatever nodes: the work is done on what is before T, in the order of the draft; what
comes after T is marked in what records then. If it fails, each write is where it would be without
it.

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

**Where writes wait** (another size, closing), they do so from T until what records then is
published.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace

from ..errors import StoreError
from ..hbitmap import HBitmap
from ..store.base import Purpose, Switches, Volume, Wanted
from .device import Cell, Device, Publication, Stage, unique
from .draft import Clear, Draft, Merge, Plan
from .state import Preserved, State, recorders


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

    @property
    def published(self) -> bool:
        """Does what is then record?"""
        return self.final is not None and not self.final.waiting

    def run(self) -> StoreError | MemoryError | None:
        """All but the end, which is :meth:`finish`, also if this raises.

        :returns: what a store has still to be told although others were, and why; None: nothing
        :raises StoreError, MemoryError: nothing has changed
        """
        self.begin()
        failed = self.switch()
        if failed is not None and self.draft.whole:
            raise failed
        if failed is not None:
            # What a store still names is marked as well.
            self.final = self.both or self.final
            with suppress(MemoryError):
                self.final = self.publication(lambda plan: recorders(plan.after))
        self.decided = True
        return failed

    def finish(self) -> None:
        """Bring to its end what was begun, forwards or back; may be called again."""
        if self.decided:
            self.draft.stage.now = Stage.AFTER
            self.go_on()
        else:
            self.go_back()
            self.draft.stage.now = Stage.BEFORE
            for device in self.telling:
                if device.stored is not None:
                    device.stored.pending = True  # a switch may have come through
        self.draft.settle()

    # ---- steps ------------------------------------------------------------------------------

    def begin(self) -> None:
        """All that has to come before the stores are told what the bitmaps are then."""
        self.find_telling()
        self.final = self.publication(lambda plan: recorders(plan.after), told=True)
        if any(device.stored is not None and device.stored.keeps_marks for device in self.telling):
            self.both = self.of_either()

    def of_either(self) -> Publication:
        return self.publication(lambda plan: [*recorders(plan.before), *recorders(plan.after)])

    def switch(self) -> StoreError | MemoryError | None:
        return Switches(self.wanted(lambda plan: plan.after), self.purpose, self.losing()).switch()

    def go_on(self) -> None:
        assert self.final is not None
        self.final.publish()

    def go_back(self) -> None:
        """Nothing has been published; but a store may name what would have been."""
        if self.take_back() and self.both is not None:
            self.both.publish()

    def take_back(self) -> bool:
        """Tell what may have been stored that it is not so.

        :returns: may it be stored all the same?
        """
        before = self.wanted_alone(lambda plan: plan.before)
        wanted = {volume: each for volume, each in before.items() if not volume.holds(each)}
        wanted = self.with_pending(wanted, lambda plan: plan.before)
        with suppress(StoreError, MemoryError):
            Switches(wanted, Purpose.COMMIT).switch()
        return any(len(volume.outcomes) > 1 for volume in wanted)

    # ---- what they share --------------------------------------------------------------------

    def publication(
        self,
        choose: Callable[[Plan], Iterable[HBitmap]],
        size: int | None = None,
        *,
        told: bool = False,
    ) -> Publication:
        """Of what is chosen, and of what records without being part of the change.

        :param told: is it for when the stores have been told?
        """
        lists = {}
        for device in self.draft.devices:
            found: list[HBitmap] = []
            for cell in list(device.cells.values()):
                plan = self.draft.plans.get(cell)
                found += recorders(cell.state) if plan is None else choose(plan)
            if not told or device not in self.telling:
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
        return self.with_pending(self.wanted_alone(choose), choose)

    def wanted_alone(self, choose: Callable[[Plan], State]) -> dict[Volume, Wanted]:
        """The same, of no volumes but those that the change is going to tell."""
        state = self.state_of(choose)
        return {d.stored: d.wanted(state) for d in self.telling if d.stored is not None}

    def with_pending(
        self, wanted: dict[Volume, Wanted], choose: Callable[[Plan], State]
    ) -> dict[Volume, Wanted]:
        """And what these stores could not be told before: it belongs together."""
        pending = pending_beside(wanted, self.draft.graph.values(), self.state_of(choose))
        return {**wanted, **pending}

    def losing(self) -> dict[Volume, set[str]]:
        """Stored bitmaps that lose content."""
        found: dict[Volume, set[str]] = {}
        for plan in self.plans:
            volume = plan.cell.device.stored
            if plan.cleared and volume is not None:
                found.setdefault(volume, set()).add(plan.cell.name)
        return found

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
            joins = not recorders(plan.before) and not plan.before.removed and recorders(plan.after)
            if joins and not plan.worked_on:
                # Its content must not have a mark before it is decided that it records.
                plan.worked_on = True
                self.draft.work.append(Merge(plan.cell, ()))
            if plan.before.removed and plan.worked_on:
                # It is shown clean, not with what has been worked in so far.
                clean = HBitmap(plan.content.size, plan.content.granularity)
                plan.prepared = plan.prepared.but(content=clean)
            self._make(plan)
        self.find_telling()
        self._tell_recorders()
        self.diverted = self.publication(self._diverted)
        self.both = self.publication(lambda plan: [*self._diverted(plan), *recorders(plan.after)])
        self.back = self.publication(
            lambda plan: [*recorders(plan.before), *self._diverted(plan), *recorders(plan.after)]
        )
        self.final = self.publication(lambda plan: recorders(plan.after), told=True)
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
            return plan.before.but(recorder=plan.recorder)

        wanted: dict[Volume, Wanted] = {}
        for device in self.draft.devices:
            volume = device.stored
            if volume is not None and volume.keeps_marks:
                then = device.wanted(self.state_of(diverted))
                if not then.same(device.wanted(self.state_of(lambda plan: plan.before))):
                    wanted[volume] = then
        wanted = self.with_pending(wanted, diverted)
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
        if self.started:
            assert self.back is not None
            self.back.publish()
            for plan in self.plans:
                if plan.recorder is not None and recorders(plan.before):
                    plan.before.content.merge(plan.recorder)
        self.take_back()


class Thawed(Commit):
    """The successors' marks are taken back, whatever the store says."""

    def begin(self) -> None:
        super().begin()
        self.both = self.both or self.of_either()
        self.both.publish()
        self.decided = True
        self._merge()  # before a store no longer names the successors

    def go_on(self) -> None:
        self._merge()
        super().go_on()

    def _merge(self) -> None:
        for plan in self.plans:
            if plan.before.successor is not None:
                plan.before.content.merge(plan.before.successor.content)


class Held(Commit):
    """Writes wait from T until all is done."""

    def begin(self) -> None:
        self.back = self.publication(lambda plan: recorders(plan.before))
        for device in self.draft.devices:
            device.hold()

    def go_back(self) -> None:
        try:
            self.take_back()
        finally:
            if self.back is not None:
                self.back.publish()


class Resized(Held):
    """A node gets another size.

    What it loses and gets back reads as zeroes then, while the last backup has what was there: it
    is dirty in all that records. (What it never had is clean, and so it would be in a backup.)
    """

    def __init__(self, draft: Draft, device: Device, size: int) -> None:
        super().__init__(draft)
        self.telling = [] if device.stored is None else [device]
        self.device = device
        self.size = size
        self.largest = max(device.largest, size) if draft.plans else size

    def begin(self) -> None:
        super().begin()
        for plan in self.plans:
            state = plan.before
            plan.content = self._resized(state, state.content)
            if state.successor is not None:
                content = self._resized(state, state.successor.content)
                successor = replace(state.successor, content=content, preserved=Preserved())
                plan.prepared = state.but(successor=successor)
            back = min(self.device.size, self.size), min(self.device.largest, self.size)
            for bits in recorders(plan.after):
                bits.set(back[0], back[1] - back[0])
            plan.show(self.draft.stage)
        self.final = self.publication(lambda plan: recorders(plan.after), self.size, told=True)

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
        self.device.largest = self.largest
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
        self.final = Publication(dict.fromkeys(self.draft.devices, ()), 0, closed=True)
        for plan in self.plans:
            if plan.worked_on and not plan.before.removed:
                granularity, stored = plan.prepared.granularity, plan.prepared.persistent
                plan.content = plan.cell.device.make(granularity, stored=stored)
        self.work()
        for plan in self.plans:
            plan.show(self.draft.stage)

    def switch(self) -> StoreError | MemoryError | None:
        known = self.wanted_alone(lambda plan: plan.before)
        told = self.with_pending(known, lambda plan: plan.before)
        if len(told) > len(known):
            # Of others, which stay open: first of all, as they are, and all that belongs to it.
            failed = Switches(told, Purpose.COMMIT).switch()
            if failed is not None:
                raise failed
        return super().switch()

    def go_on(self) -> None:
        for device in self.draft.devices:
            device.closed = True
        super().go_on()
        for device in self.draft.devices:
            if device.volume is not None:
                device.volume.close()


def pending_beside(
    wanted: Mapping[Volume, Wanted],
    devices: Iterable[Device],
    state_of: Callable[[Cell], State],
) -> dict[Volume, Wanted]:
    """What the stores of these volumes could not be told before of others.

    A transaction of several nodes in a store that failed is told as a whole, or a bitmap that moved
    between them could be in none.
    """
    stores = {volume.store for volume in wanted}
    found = {}
    for device in devices:
        volume = device.stored
        if volume is None or device.closed or volume in wanted:
            continue
        if volume.pending and volume.store in stores:
            found[volume] = device.wanted(state_of)
    return found


def way(draft: Draft) -> Commit:
    """The one that a draft has to go."""
    if draft.work:
        return Diverted(draft)
    plain = Commit(draft)
    if any(recorders(plan.before) and not recorders(plan.after) for plan in plain.plans):
        plain.find_telling()
        if len({device.volume.store for device in plain.telling if device.volume is not None}) > 1:
            return Diverted(draft)
    return plain
