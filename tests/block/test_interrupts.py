# SPDX-License-Identifier: MIT
"""An exception at any line of any change: it has happened or it has not, and nothing stays behind.

What a signal handler raises comes at any line of Python. Here a trace function raises at the n-th
line that is run in the package, for every n (of which a sample is taken; all of them with
PYBITMAP_ALL_LINES=1, ``make interrupts``). Then another thread's write must return and be recorded,
a next call must find the change done or not begun, nothing may be busy or locked, the graph must
close, and who opens the store next must find every mark.
"""

from __future__ import annotations

import linecache
import os
import random
import shutil
import sys
import threading
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from stores import PLACES, SIZE, Place
from support import collect

import pybitmap
from pybitmap import BlockGraph, BlockNode, Frozen
from pybitmap.store import Store

pytestmark = pytest.mark.skipif(
    sys.implementation.name != "cpython", reason="relies on counted references and on _fast"
)

G = 512
PACKAGE = os.path.dirname(pybitmap.__file__)
ALL = os.environ.get("PYBITMAP_ALL_LINES") == "1"
SAMPLE = 10  # of the lines of a change


class Interruption(BaseException):
    """As KeyboardInterrupt."""


@contextmanager
def interrupted(at: int) -> Iterator[list[Any]]:
    """Raises at that line, once; gives how many lines were run, and which that was. 0: none."""
    lines: list[Any] = [0, ""]

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        # A `with` is a line again when its block is left, and a `try` is one that no handler
        # covers; but no signal handler of Python's can run there.
        # Nor where a directory, which a FileIO refuses, has been synced and is closed.
        skipped = source(frame).startswith(("with ", "try:", "if fd >= 0", "os.close(fd)"))
        if event == "line" and not skipped:
            lines[0] += 1
            if lines[0] == at:
                lines[1] = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise Interruption
        return trace

    sys.settrace(trace)
    try:
        yield lines
    finally:
        sys.settrace(None)


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


def source(frame: FrameType) -> str:
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()


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
        scene = self.scene()
        with interrupted(0) as lines:
            CHANGES[name](scene)
        self.lines = lines[0]
        scene.graph.close()

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

    def interrupt(self, at: int) -> None:
        before_it = descriptors()
        scene = self.scene()
        caught = False
        with interrupted(at) as lines, finalizers() as swallowed:
            try:
                CHANGES[self.name](scene)
            except Interruption:
                caught = True
            except pybitmap.BitmapError:
                assert swallowed
        what = f"{self.name}, {lines[1]}, line {at}"
        assert caught or swallowed or at > lines[0], f"{what}: it was swallowed"
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
        assert descriptors() <= before_it, f"{what}: a descriptor is left"
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


KINDS = [None, *PLACES[1:]]


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__ if kind else "no store")
def test_an_exception_at_any_line_leaves_all_or_nothing(
    kind: type[Place] | None, name: str, tmp_path: Path
) -> None:
    trials = Trials(kind, tmp_path, name)
    every = range(1, trials.lines + 1)
    at = every if ALL or len(every) < SAMPLE else sorted(random.sample(every, SAMPLE))
    for line in at:
        trials.interrupt(line)
