# SPDX-License-Identifier: MIT
"""Changes of bitmaps of all kinds, each tried again and again under what disturbs it.

Afterwards another thread's write must return and be recorded, a next call must find the change done
or not begun, nothing may be busy or locked, the graph must close, and who opens the store next must
find every mark.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from array import array
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lines import Lines
from stores import PLACES, SIZE, Place
from support import collect

import pybitmap
from pybitmap import BlockGraph, BlockNode, Frozen
from pybitmap.block.device import _publishing
from pybitmap.store import Store

G = 512
#: The places of what is tried; None: bitmaps that are not stored.
KINDS: list[type[Place] | None] = [None, *PLACES[1:]]


@dataclass
class Disturbance(Lines):
    """What comes in the midst of a change.

    :param kinds: what is raised
    :param told: must whoever made the change be told, if it came?
    :param end: ends it, where leaving the ``with`` may have been disturbed as well
    """

    kinds: tuple[type[BaseException], ...]
    told: bool = True
    end: Callable[[], object] | None = None


@contextmanager
def finalizers() -> Iterator[list[Any]]:
    """Gives what was raised in a finalizer, and so came nowhere."""
    raised: list[Any] = []
    before, sys.unraisablehook = sys.unraisablehook, lambda what: raised.append(what.exc_type)
    try:
        yield raised
        collect()
    finally:
        sys.unraisablehook = before


@dataclass
class Scene:
    """A graph of one node, or two, with bitmaps in all states."""

    place: Place | None
    graph: BlockGraph = field(default_factory=BlockGraph)
    frozen: Frozen | None = None

    def __post_init__(self) -> None:
        store = self.store(0)
        self.node = self.graph.add_node("n", None if store else SIZE, store)
        other = self.store(1)
        self.other = self.graph.add_node("m", None if other else SIZE, other)
        if self.place is None:
            make_bitmaps(self.node, persistent=False)
            make_bitmaps(self.other, persistent=False)
        for node in (self.node, self.other):
            node.mark_dirty(3 * G, 1)

    def store(self, medium: int) -> Store | None:
        return None if self.place is None else self.place.store(medium)


def make_bitmaps(node: BlockNode, *, persistent: bool) -> None:
    node.add_bitmap("a", G, persistent=persistent)
    node.add_bitmap("b", 4096, persistent=persistent)
    node.add_bitmap("off", G, persistent=persistent, disabled=True).set(0, 1)
    node.mark_dirty(5 * G, 1)


def rotate(scene: Scene) -> None:
    with scene.graph.transaction() as tx:
        tx.merge("n", "off", ["a"])
        tx.clear("n", "a")


def mixed(scene: Scene) -> None:
    with scene.graph.transaction() as tx:
        tx.add("m", "new", G, persistent=scene.place is not None)
        tx.merge("m", "new", [("n", "a"), "b"])
        tx.clear("n", "b")
        tx.enable("n", "off")
        tx.disable("m", "a")
        tx.remove("n", "a")


def aborted(scene: Scene) -> None:
    with suppress(ZeroDivisionError), scene.graph.transaction() as tx:
        tx.clear("n", "a")
        tx.remove("n", "b")
        raise ZeroDivisionError


def freeze(scene: Scene) -> None:
    with scene.graph.freeze([scene.node.bitmaps["a"], scene.other.bitmaps["b"]]) as frozen:
        list(scene.node.bitmaps["a"].areas())
        frozen.done()


def thaw(scene: Scene) -> None:
    with scene.graph.freeze([scene.node.bitmaps["a"], scene.other.bitmaps["b"]]):
        scene.node.mark_dirty(7 * G, 1)


def writing(scene: Scene) -> None:
    with scene.node.writing(11 * G, G, lambda *_: None):
        pass


def resize(scene: Scene) -> None:
    if scene.place is None or scene.place.shared:
        scene.node.truncate(2 * SIZE)


CHANGES: dict[str, Callable[[Scene], object]] = {
    "add": lambda s: s.node.add_bitmap("new", G, persistent=s.place is not None),
    "remove": lambda s: s.node.remove_bitmap("b"),
    "clear": lambda s: s.node.bitmaps["a"].clear(),
    "merge": lambda s: s.node.bitmaps["off"].merge(s.node.bitmaps["a"], s.other.bitmaps["b"]),
    "enable": lambda s: s.node.bitmaps["off"].enable(),
    "disable": lambda s: s.node.bitmaps["a"].disable(),
    "set": lambda s: s.node.bitmaps["a"].set(8 * G, 1),
    "rotate": rotate,
    "mixed": mixed,
    "aborted": aborted,
    "freeze": freeze,
    "thaw": thaw,
    "writing": writing,
    "marks": lambda s: s.node.mark_dirty_many(array("Q", [13 * G]), array("Q", [1])),
    "truncate": resize,
    "flush": lambda s: s.graph.flush(),
    "close node": lambda s: s.node.close(),
    "remove node": lambda s: s.graph.remove_node("n"),
    "close": lambda s: s.graph.close(),
}


def snapshot(graph: BlockGraph) -> Any:
    return {
        name: (
            node.size,
            {
                bitmap.name: (bitmap.enabled, bitmap.busy, bitmap.sha256())
                for bitmap in node.bitmaps.values()
            },
        )
        for name, node in graph.nodes.items()
    }


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0


def mark_in_a_thread(node: BlockNode, what: str, *, recorded: bool = True) -> None:
    """A write of another thread returns, and is recorded."""
    errors: list[BaseException] = []

    def mark() -> None:
        try:
            node.mark_dirty(17 * G, 1)
        except pybitmap.ClosedError as error:
            errors.append(error)

    thread = threading.Thread(target=mark, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive(), f"{what}: a write hangs"
    for bitmap in node.bitmaps.values() if recorded and not errors else ():
        assert bitmap.get(17 * G) or not bitmap.recording, f"{what}: {bitmap}"


def look_in_a_thread(graph: BlockGraph, what: str) -> None:
    """A call of another thread finds the lock free, and brings to its end what was left."""

    def look() -> None:
        with graph.locked():
            pass

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive(), f"{what}: the lock is held"


#: These are done as a whole or not at all; of the others, each node's part is.
WHOLE = {"rotate", "mixed", "aborted"}


class Trials:
    """One change, interrupted again and again, each time on a copy of the same stores."""

    def __init__(self, kind: type[Place] | None, folder: Path, name: str) -> None:
        self.kind, self.folder, self.name = kind, folder, name
        self.number = 0
        if kind is not None:
            place = kind(folder / "original")
            place.folder.mkdir()
            with BlockGraph() as graph:
                for medium, node_name in enumerate("nm"):
                    node = graph.add_node(node_name, SIZE, place.store(medium))
                    make_bitmaps(node, persistent=True)
        self.outcomes = [self.reference(done) for done in (False, True)]

    def scene(self) -> Scene:
        place = None
        if self.kind is not None:
            shutil.rmtree(self.folder / f"{self.number}", ignore_errors=True)
            self.number += 1
            folder = self.folder / f"{self.number}"
            shutil.copytree(self.folder / "original", folder)
            place = self.kind(folder)
        return Scene(place)

    def reference(self, done: bool) -> Any:
        scene = self.scene()
        if done:
            CHANGES[self.name](scene)
        for node in (scene.node, scene.other):
            mark_in_a_thread(node, "reference")
        found = snapshot(scene.graph)
        scene.graph.close()
        return found

    def is_right(self, found: Any) -> bool:
        if self.name in WHOLE:
            return found in self.outcomes
        return all(
            found.get(name, "gone") in [each.get(name, "gone") for each in self.outcomes]
            or found.get(name) == (SIZE, {})
            for name in "nm"
        )

    def attempt(self, scene: Scene) -> None:
        CHANGES[self.name](scene)

    def disturb(self, disturbed: AbstractContextManager[Disturbance]) -> None:
        """The change, under what disturbs it; then everything is looked at."""
        before_it = descriptors()
        scene = self.scene()
        caught = False
        with finalizers() as swallowed:
            try:
                with disturbed as disturbance:
                    self.attempt(scene)
                    collect()
            except disturbance.kinds:
                caught = True
                ended = False
                while not ended and disturbance.end is not None:
                    try:
                        disturbance.end()
                        ended = True
                    except disturbance.kinds:
                        pass
            except pybitmap.BitmapError:
                assert swallowed or not disturbance.told
        what = f"{self.name}, {disturbance.where}"
        if disturbance.told:
            assert caught or swallowed or not disturbance.came, f"{what}: it was swallowed"
        waiting = [each for each in _publishing if each.waiting]
        assert not waiting, f"{what}: a later fork would publish {waiting}"
        mark_in_a_thread(scene.node, what, recorded=False)
        look_in_a_thread(scene.graph, what)
        for node in (scene.node, scene.other):
            mark_in_a_thread(node, what)
        found = snapshot(scene.graph)
        assert self.is_right(found), f"{what}: {found} is none of {self.outcomes}"
        marks = {
            (node.name, bitmap.name): set(bitmap.areas())
            for node in (scene.node, scene.other)
            for bitmap in node.bitmaps.values()
        }
        place = scene.place
        scene.graph.close()
        scene.graph.close()
        scene.node.close()
        del scene, node
        collect()
        assert descriptors() <= before_it or not disturbance.told, f"{what}: a descriptor is left"
        if place is not None:
            with BlockGraph() as graph:
                for medium, name in enumerate("nm"):
                    self.look(graph.add_node(name, None, place.store(medium)), marks, what)

    def look(
        self, node: BlockNode, marks: dict[tuple[str, str], set[tuple[int, int]]], what: str
    ) -> None:
        """At what was stored."""
        for bitmap in node.bitmaps.values():
            assert bitmap.reason is None, f"{what}: {bitmap.name}: {bitmap.reason}"
            if (node.name, bitmap.name) in marks:
                assert set(bitmap.areas()) == marks[node.name, bitmap.name], what
        for node_name, name in marks:
            assert node_name != node.name or name in node.bitmaps, f"{what}: {name} is gone"
