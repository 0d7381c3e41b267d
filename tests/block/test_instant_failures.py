# SPDX-License-Identifier: MIT
"""Single cases of what instant_steps.py looks for: writes and kills in the midst of a change.

The stores are in memory and name live bitmaps, so what a kill would leave is looked at where it
would come: see kept_store.py.
"""

# ruff: noqa: PT012 (what raises is the end of a transaction)

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from instant import UNIT, World, size
from kept_store import KeptStore, Shelf
from memory_store import Medium, MemoryStore

import pybitmap
from pybitmap import AbortedError, BlockGraph, BlockNode, StoreError

SIZE = (1 << 16) * UNIT
LATER = "done, but not stored everywhere"


class Setting:
    """Nodes in stores of their own or in one, and what happens at the steps of these.

    :param nodes: each with the number of its store
    """

    def __init__(self, **nodes: int) -> None:
        self.stores = [KeptStore(Shelf()) for _ in set(nodes.values())]
        self.graph = BlockGraph()
        for name, number in nodes.items():
            self.graph.add_node(name, SIZE, self.stores[number])
        self.written = 0

    def __getitem__(self, name: str) -> BlockNode:
        return self.graph.nodes[name]

    def add(self, node: str, *names: str, disabled: bool = False) -> None:
        for name in names:
            self[node].add_bitmap(name, UNIT, persistent=True, disabled=disabled)

    def write(self, *nodes: str) -> int:
        """A unit of its own, on these nodes; which."""
        unit, self.written = self.written, self.written + 1
        for node in nodes:
            self[node].mark_dirty(unit * UNIT, UNIT)
        return unit

    def left(self) -> World:
        """What a kill would leave now."""
        return {key: bits for store in self.stores for key, bits in store.left().items()}

    def units_left(self, node: str, name: str) -> int:
        """-1: it is not there."""
        bits = self.left().get((node, name))
        return -1 if bits is None else bits.content

    def at(self, run: Callable[[], object], *, store: int = 0, step: str = "prepare") -> None:
        """Whenever a store is at a step."""

        def fault(now: str) -> None:
            if now == step:
                run()

        self.stores[store].fault = fault

    def fail(self, step: str, after: int, *, store: int = 0, known: bool = False) -> None:
        """From the call after so many on."""
        self.stores[store].unsure = not known
        self.stores[store].fail(step, after)

    def mend(self) -> None:
        for store in self.stores:
            store.mend()


def rotate(setting: Setting) -> None:
    with setting.graph.transaction() as tx:
        tx.merge("a", "weekly", ["daily"])
        tx.clear("a", "daily")


def move(setting: Setting, name: str, old: str, new: str) -> None:
    with setting.graph.transaction() as tx:
        tx.add(new, name, UNIT, persistent=True)
        tx.merge(new, name, [(old, name)])
        tx.remove(old, name)


@pytest.mark.parametrize("step", ["switch", "switched"])
def test_what_was_written_beside_a_frozen_bitmap_survives_a_kill_at_its_end(step: str) -> None:
    setting = Setting(a=0)
    setting.add("a", "daily")
    units = 1 << setting.write("a")
    with setting["a"].bitmaps["daily"].freeze():
        units |= 1 << setting.write("a")
        left: list[int] = []
        setting.at(lambda: left.append(setting.units_left("a", "daily")), step=step)
    assert left == [units]


def test_a_write_is_in_what_an_unknown_switch_may_have_left_beside_the_next_change() -> None:
    setting = Setting(a=0)
    setting.add("a", "daily")
    setting.add("a", "weekly", "other", disabled=True)
    setting["a"].add_bitmap("scratch", UNIT)
    setting.fail("switched", 1)  # the second of two: the store has the new state, nobody knows
    with pytest.raises(StoreError):
        rotate(setting)
    setting.mend()
    wrong: list[int] = []

    def look() -> None:
        unit = setting.write("a")
        if not setting.units_left("a", "daily") >> unit & 1:
            wrong.append(unit)

    look()
    setting.at(look)
    with setting.graph.transaction() as tx:  # of other bitmaps
        tx.clear("a", "scratch")
        tx.enable("a", "other")
    assert not wrong, "a kill loses an acknowledged write"


def test_a_write_is_in_what_a_later_store_still_has_from_when_it_failed() -> None:
    """Between any two lines."""
    setting = Setting(a=0, c=1)
    setting.add("a", "daily")
    setting.add("c", "guest")
    setting.fail("switch", 1, store=1, known=True)
    wrong: list[str] = []
    files = tuple(f"{pybitmap.__path__[0]}/block/{name}" for name in ("co", "d"))

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        return line if frame.f_code.co_filename.startswith(files) else None

    def line(frame: FrameType, event: str, arg: object) -> Any:
        unit = setting.write("c")
        guest = setting.left()["c", "guest"]
        if guest.enabled and not guest.content >> unit & 1:
            wrong.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return line

    with pytest.raises(StoreError, match=LATER):
        try:
            with setting.graph.transaction() as tx:
                tx.disable("a", "daily")
                tx.disable("c", "guest")
                sys.settrace(trace)
        finally:
            sys.settrace(None)
    assert not wrong, "a kill loses an acknowledged write"


def test_a_write_is_in_what_a_later_store_still_has_beside_the_next_change() -> None:
    setting = Setting(a=0, c=1)
    setting.add("a", "daily")
    setting.add("c", "guest")
    setting.add("c", "other", disabled=True)
    setting["c"].add_bitmap("scratch", UNIT)
    setting.fail("switch", 1, store=1)
    with pytest.raises(StoreError, match=LATER), setting.graph.transaction() as tx:
        tx.disable("a", "daily")
        tx.disable("c", "guest")
    setting.mend()
    wrong: list[int] = []

    def look() -> None:
        unit = setting.write("c")
        guest = setting.left()["c", "guest"]
        if guest.enabled and not guest.content >> unit & 1:
            wrong.append(unit)

    look()
    setting.at(look, store=1)
    with setting.graph.transaction() as tx:
        tx.clear("c", "scratch")
        tx.enable("c", "other")
    assert not wrong, "a kill loses an acknowledged write"


@pytest.mark.parametrize("then", ["flush", "close", "clear", "enable", "a failure"])
def test_a_store_is_told_a_transaction_as_a_whole_after_it_failed(then: str) -> None:
    """A bitmap moves within a store that failed: it is in the one node or in the other."""
    setting = Setting(a=0, c=1, e=1)
    setting.add("a", "daily")
    setting.add("c", "guest", "other")
    setting.add("c", "weekly", disabled=True)
    units = 1 << setting.write("a", "c", "e")
    setting.fail("switch", 1, store=1, known=True)
    with pytest.raises(StoreError, match=LATER), setting.graph.transaction() as tx:
        tx.disable("a", "daily")
        tx.add("e", "guest", UNIT, persistent=True)
        tx.merge("e", "guest", [("c", "guest")])
        tx.remove("c", "guest")
    setting.mend()
    lost: list[World] = []

    def look() -> None:
        found = max(setting.units_left("c", "guest"), 0) | max(setting.units_left("e", "guest"), 0)
        if units & ~found:
            lost.append(setting.left())

    def fail_once(step: str) -> None:
        if step == "switch" and not failed:
            failed.append(step)
            raise StoreError("no space", errno.ENOSPC)
        if step == "switched":
            look()

    look()
    setting.at(look, store=1, step="switched")
    failed: list[str] = []
    if then == "a failure":
        setting.stores[1].fault = fail_once
        with pytest.raises(StoreError, match="no space"):
            setting["c"].bitmaps["other"].clear()
    elif then in ("flush", "close"):
        getattr(setting.graph, then)()
    else:
        name = "other" if then == "clear" else "weekly"
        getattr(setting["c"].bitmaps[name], then)()
    look()
    assert not lost, "a kill loses an acknowledged write"


def test_a_store_has_an_unknown_transaction_as_a_whole_beside_the_next_change() -> None:
    setting = Setting(c=0, e=0)
    setting.add("c", "guest")
    setting.add("e", "other")
    units = 1 << setting.write("c", "e")
    setting.fail("switched", 1)
    with pytest.raises(StoreError):
        move(setting, "guest", "c", "e")
    setting.mend()
    assert list(setting["c"].bitmaps) == ["guest"]  # in memory it is as before
    lost: list[World] = []

    def look() -> None:
        found = max(setting.units_left("c", "guest"), 0) | max(setting.units_left("e", "guest"), 0)
        if units & ~found:
            lost.append(setting.left())

    look()
    setting.at(look, step="switched")
    setting["e"].bitmaps["other"].clear()
    assert not lost, "a kill loses an acknowledged write"


def test_a_bitmap_whose_enabling_may_be_stored_has_what_is_written() -> None:
    """It stays disabled; too much is marked, until its store has been told."""
    setting = Setting(a=0)
    setting.add("a", "weekly", disabled=True)
    setting.fail("switched", 0)
    with pytest.raises(StoreError):
        setting["a"].bitmaps["weekly"].enable()
    setting.mend()
    unit = setting.write("a")
    weekly = setting["a"].bitmaps["weekly"]
    assert not weekly.recording
    assert setting.units_left("a", "weekly") >> unit & 1
    weekly.clear()
    setting.write("a")
    assert not weekly.count()


@pytest.mark.parametrize("outcome", ["kill", "failure"])
def test_an_enabled_bitmap_has_no_write_before_it_is_stored_as_such(outcome: str) -> None:
    """Beside work on another: at the second switch writes are after the instant."""
    setting = Setting(a=0)
    setting.add("a", "daily")
    setting.add("a", "weekly", disabled=True)
    found: list[tuple[bool, int]] = []

    def look() -> None:
        setting.write("a")
        weekly = setting.left()["a", "weekly"]
        found.append((weekly.enabled, size(weekly.content)))
        if len(found) == 2 and outcome == "failure":
            raise StoreError("no space", errno.ENOSPC)

    setting.at(look, step="switch")
    setting.stores[0].unsure = False

    def change() -> None:
        with setting.graph.transaction() as tx:
            tx.enable("a", "weekly")
            tx.clear("a", "daily")

    if outcome == "kill":
        change()
        assert found == [(False, 0), (False, 0)]
    else:
        with pytest.raises(StoreError, match="no space"):
            change()
        assert not setting["a"].bitmaps["weekly"].count()


def test_an_added_bitmap_is_shown_as_of_one_instant() -> None:
    """Clean, as it was drafted, or with all that was merged into it; never with some of it."""
    setting = Setting(a=0)
    setting.add("a", "daily")
    setting.write("a")
    shown: list[int] = []

    def look() -> None:
        if "weekly" in setting["a"].bitmaps:
            shown.append(setting["a"].bitmaps["weekly"].count())
            # What is not done is not to be seen: here a step fails, and it never is.
            raise StoreError("no space", errno.ENOSPC)

    with pytest.raises(StoreError), setting.graph.transaction() as tx:
        tx.add("a", "weekly", UNIT, persistent=True, disabled=True)
        tx.merge("a", "weekly", ["daily"])
        steps = iter([lambda: None, look])
        setting.at(lambda: next(steps, lambda: None)())
    assert shown == [0]


def test_closing_a_node_leaves_another_in_use_that_its_store_was_not_told_of() -> None:
    """What is stored as not in use is trusted after a crash, so it must not be written to."""
    first, store = MemoryStore(Medium()), MemoryStore(Medium())
    graph = BlockGraph()
    graph.add_node("a", SIZE, first).add_bitmap("daily", UNIT, persistent=True)
    for name in "ce":
        graph.add_node(name, SIZE, store).add_bitmap("daily", UNIT, persistent=True)
    store.fail("switch")
    with pytest.raises(StoreError, match=LATER), graph.transaction() as tx:
        tx.disable("a", "daily")
        tx.add("c", "weekly", UNIT, persistent=True)
        tx.add("e", "weekly", UNIT, persistent=True)
    store.mend()
    graph.nodes["c"].close()
    graph.nodes["e"].mark_dirty(0, 1)
    (entry,) = (each for each in store.entries() if each.name == "e")
    assert all(bitmap.in_use for bitmap in entry.bitmaps)


def test_a_flush_stores_what_a_bitmap_has_whose_removal_is_drafted() -> None:
    """An earlier change of it failed, but the store may have that."""
    setting = Setting(a=0)
    setting.add("a", "daily")
    units = 1 << setting.write("a")
    setting.fail("switched", 1)
    with pytest.raises(StoreError):
        setting["a"].bitmaps["daily"].clear()
    setting.mend()
    with pytest.raises(AbortedError), setting.graph.transaction() as tx:
        tx.remove("a", "daily")
        setting.graph.flush()
        tx.abort()
    assert setting["a"].bitmaps["daily"].count()
    assert setting.units_left("a", "daily") == units


def test_what_moves_to_another_store_is_in_one_of_both_although_a_change_failed_before() -> None:
    setting = Setting(a=0, c=1)
    setting.add("c", "guest")
    units = 1 << setting.write("c")
    setting["c"].bitmaps["guest"].disable()
    setting.fail("switched", 0, store=1)
    with pytest.raises(StoreError):
        setting["c"].bitmaps["guest"].clear()
    setting.mend()
    lost: list[World] = []

    def look() -> None:
        found = max(setting.units_left("a", "guest"), 0) | max(setting.units_left("c", "guest"), 0)
        if units & ~found:
            lost.append(setting.left())

    setting.at(look, store=1, step="switched")
    with setting.graph.transaction() as tx:
        tx.add("c", "other", UNIT, persistent=True)
        tx.add("a", "guest", UNIT, persistent=True)
        tx.merge("a", "guest", [("c", "guest")])
        tx.remove("c", "guest")
    assert not lost, "a kill loses an acknowledged write"


@pytest.mark.parametrize("touched_first", [False, True])
def test_what_goes_to_another_store_and_is_cleared_is_in_one_of_both(touched_first: bool) -> None:
    setting = Setting(a=0, c=1)
    setting.add("a", "weekly", disabled=True)
    setting.add("c", "daily", "other")
    units = 1 << setting.write("c")
    lost: list[World] = []

    def look() -> None:
        if units & ~(setting.units_left("a", "weekly") | setting.units_left("c", "daily")):
            lost.append(setting.left())

    for store in (0, 1):
        setting.at(look, store=store, step="switched")
    with setting.graph.transaction() as tx:
        if touched_first:
            tx.disable("c", "other")
        tx.merge("a", "weekly", [("c", "daily")])
        tx.clear("c", "daily")
    assert not lost, "a kill loses an acknowledged write"


def test_an_enabled_bitmap_is_shown_as_of_before_or_of_after() -> None:
    """Not as of before, with writes that it did not record then."""
    setting = Setting(a=0)
    setting.add("a", "daily")
    setting["a"].bitmaps["daily"].disable()
    shown: list[int] = []

    def look() -> None:
        setting.write("a")
        shown.append(setting["a"].bitmaps["daily"].count())

    setting["a"].bitmaps["daily"].set(100 * UNIT, UNIT)
    setting.at(look)
    with setting.graph.transaction() as tx:
        tx.clear("a", "daily")
        tx.enable("a", "daily")
    written = [UNIT * n for n in range(1, len(shown) + 1)]
    assert all(count in (UNIT, each) for count, each in zip(shown, written)), shown


@pytest.mark.parametrize("action", ["disable", "remove"])
def test_what_a_later_store_still_has_is_not_what_has_stopped_recording(action: str) -> None:
    setting = Setting(a=0, c=1)
    setting.add("a", "daily")
    setting.add("c", "guest")
    guest = setting["c"].bitmaps["guest"]
    setting.fail("switch", 1, store=1, known=True)
    with pytest.raises(StoreError, match=LATER), setting.graph.transaction() as tx:
        tx.disable("a", "daily")
        getattr(tx, action)("c", "guest")
    setting.mend()
    units = 1 << setting.write("c")
    if action == "disable":
        assert not guest.count()
    assert setting.units_left("c", "guest") == units, "it is stored as recording"


@pytest.mark.parametrize(("old", "new"), [("a", "c"), ("c", "a")])
def test_a_bitmap_that_moves_to_another_store_is_in_one_of_both(old: str, new: str) -> None:
    setting = Setting(a=0, c=1)
    setting.add("a", "one")
    setting.add("c", "one")
    setting.add(old, "guest")
    units = 1 << setting.write(old)
    lost: list[World] = []

    def look() -> None:
        found = max(setting.units_left("a", "guest"), 0) | max(setting.units_left("c", "guest"), 0)
        if units & ~found:
            lost.append(setting.left())

    for store in (0, 1):
        setting.at(look, store=store, step="switched")
    move(setting, "guest", old, new)
    assert not lost, "a kill loses an acknowledged write"


@pytest.mark.parametrize("failing", [False, True])
def test_each_store_has_all_of_a_rotation_within_it_or_nothing(failing: bool) -> None:
    """Nothing goes from one store to the other."""
    setting = Setting(a=0, c=1)
    for node in "ac":
        setting.add(node, "daily")
        setting.add(node, "weekly", disabled=True)
    units = 1 << setting.write("a", "c")
    twice: list[World] = []

    def look() -> None:
        for node in "ac":
            daily, weekly = (setting.units_left(node, name) for name in ("daily", "weekly"))
            if (daily & units != 0) == (weekly & units != 0):
                twice.append(setting.left())

    def rotate() -> None:
        with setting.graph.transaction() as tx:
            for node in "ac":
                tx.merge(node, "weekly", ["daily"])
                tx.clear(node, "daily")

    if failing:
        setting.fail("switch", 1, store=1, known=True)
        with pytest.raises(StoreError, match=LATER):
            rotate()
        look()
    else:
        for store in (0, 1):
            setting.at(look, store=store, step="switched")
        rotate()
    assert not twice, "a kill leaves half a transaction in a store"
