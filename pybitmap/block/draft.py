# SPDX-License-Identifier: MIT
"""What a change makes of bitmaps, before it is so.

A :class:`Draft` has a :class:`Plan` for each bitmap that it touches, and the work that is to be
done on contents. Bitmaps show its flags at once, to later actions and to queries: what is refused
is refused then, in QEMU's words and order.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Union

from ..errors import (
    ExistsError,
    InvalidError,
    MismatchError,
    ReadonlyError,
    StateError,
    UnsupportedError,
)
from ..hbitmap import HBitmap
from ..store.base import MAX_NAME
from .device import Cell, Device, Stage
from .state import CHANGE, REMOVAL, REPAIR, USE, State, forbid, new_serial, recorders

MIN_GRANULARITY = 512
DEFAULT_GRANULARITY = 65536


def check_granularity(granularity: int) -> None:
    """
    :raises InvalidError: for what is no granularity of a named bitmap, in bytes
    """
    if granularity < MIN_GRANULARITY or granularity & (granularity - 1):
        raise InvalidError("Granularity must be power of 2 and at least 512")


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
    cleared: bool = False
    keeps: bool = True
    read: bool = False
    #: Has the writes since T.
    recorder: HBitmap | None = None

    @property
    def after(self) -> State:
        """As it is then, and is stored."""
        return self.prepared.but(content=self.content, recorder=None, removed=self.removed)

    @property
    def settled(self) -> State:
        """As its users see it then."""
        return self.after.but(removed=True) if self.closes else self.after

    def show(self, stage: Stage) -> None:
        """To whoever asks, as far as the change has come."""
        recorder = self.recorder if recorders(self.before) else None
        prepared = self.prepared.but(recorder=recorder)
        self.cell.change(stage, self.before, prepared, self.settled)


class Draft:
    """What is to be different; bitmaps show it at once, but for their contents.

    :param graph: all devices by name, live
    :param whole: is nothing to be done if one of several stores fails, rather than all but that?
    :param closes: are all nodes closed with it?
    """

    def __init__(
        self, graph: Mapping[str, Device], *, whole: bool = False, closes: bool = False
    ) -> None:
        self.graph = graph
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

    def owns(self, device: Device) -> bool:
        """Is it of this graph?"""
        return self.graph.get(device.name) is device

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
        device.check_open()
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
        if persistent and device.read_only:  # as in QEMU, before anything about its store
            raise UnsupportedError(
                f"Cannot add a persistent bitmap to read-only or inactive node '{device.name}'"
            )
        if persistent:
            _check_storable(device, name, granularity)
        if name in device.cells:
            raise ExistsError(f"Bitmap already exists: {name}")
        if name_nbytes > MAX_NAME:
            raise InvalidError(f"Bitmap name too long: {name}")
        content = device.make(granularity, stored=persistent)
        prepared = State(content, new_serial(), enabled=not disabled, persistent=persistent)
        before = prepared.but(removed=True)
        cell = Cell(device, name, before)
        self._add(Plan(cell, before, prepared, content))
        device.cells[name] = cell
        return cell

    def remove(self, cell: Cell) -> None:
        """
        :raises StateError: if a flag forbids it
        """
        forbid(cell.name, cell.state, REMOVAL)
        if cell.state.readonly:
            raise ReadonlyError(
                f"Cannot remove persistent bitmap '{cell.name}': no write access to node "
                f"'{cell.device.name}'"
            )
        plan = self.plan(cell)
        plan.removed = True
        self.alter(cell, cell.state.but(busy=True, skip_store=True))

    def enable(self, cell: Cell, enabled: bool) -> None:
        """
        :raises StateError: if a flag forbids it
        """
        forbid(cell.name, cell.state, USE)
        self.alter(cell, cell.state.but(enabled=enabled))

    def repair(self, cell: Cell) -> None:
        """
        :raises StateError: if a flag forbids it, or it is not inconsistent
        :raises UnsupportedError: if its store cannot hold it, for example for its name
        :raises StoreError, MemoryError: if there is no space for its bits
        """
        forbid(cell.name, cell.state, REPAIR)
        state, device = cell.state, cell.device
        if state.reason is None:
            raise StateError(f"Bitmap '{cell.name}' is not inconsistent")
        if state.persistent and device.stored is not None:  # before memory is taken for it
            others = [name for name in _StoredNames(device) if name != cell.name]
            device.stored.check_new(cell.name, state.granularity, others)
        content = device.make(state.granularity, stored=state.persistent)
        content.set(0, device.size)
        enabled = state.enabled_if_repaired
        repaired = state.but(content=content, reason=None, enabled=enabled)
        self.alter(cell, repaired, content)

    def clear(self, cell: Cell) -> None:
        """
        :raises StateError: if a flag forbids it
        """
        forbid(cell.name, cell.state, CHANGE)
        plan = self.plan(cell)
        plan.worked_on, plan.cleared, plan.keeps = True, True, False
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
            if self.owns(source.device):
                self.plan(source).read = True
        self.work.append(Merge(target, tuple(found)))


def _check_storable(device: Device, name: str, granularity: int) -> None:
    if device.volume is None:
        raise UnsupportedError(
            f"Can't store persistent bitmaps to {device.name}: Operation not supported"
        )
    if name in device.cells:
        return  # which is complained of before what the store has against it
    device.volume.check_new(name, granularity, _StoredNames(device))


class _StoredNames(Collection[str]):
    """The names that a device's store has to hold; most stores do not ask for them."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def __iter__(self) -> Iterator[str]:
        for cell in self._device.present():
            if cell.state.persistent and not cell.state.skip_store:
                yield cell.name

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return any(name == each for each in self)
