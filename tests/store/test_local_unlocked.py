# SPDX-License-Identifier: MIT
"""Local stores that are read without a lock while another has them: an answer, or "try again"."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from preload import memory_folder

from pybitmap import BlockGraph, LockedError, StoreError, offline
from pybitmap.store import LocalStore, local
from pybitmap.store.catalog import Catalog

SIZE = 1 << 24
GROUP = 4096

State = dict[str, Any]
Act = Callable[[], object]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with memory_folder(tmp_path) as folder:
        yield folder


def make(path: Path) -> None:
    with BlockGraph() as graph:
        node = graph.add_node("disk", SIZE, LocalStore(path))
        for name in ("daily", "gone", "all"):
            node.add_bitmap(name, GROUP, persistent=True)
        node.mark_dirty(0, 10 * GROUP)


def change(graph: BlockGraph) -> None:
    """Bits, rows and files: a mark, then a rotation, one that goes and one that comes."""
    node = graph.nodes["disk"]
    node.mark_dirty(1 << 20, GROUP)
    with graph.transaction() as tx:
        tx.merge("disk", "all", ["daily"])
        tx.clear("disk", "daily")
        tx.remove("disk", "gone")
        tx.add("disk", "new", GROUP, persistent=True)
    node.mark_dirty(2 << 20, GROUP)
    with node.bitmaps["new"].freeze() as frozen:
        frozen.done()


@contextmanager
def by_a_program_that_comes_and_goes(path: Path) -> Iterator[Act]:
    def act() -> None:
        with BlockGraph() as graph:
            graph.add_node("disk", store=LocalStore(path))
            change(graph)

    yield act


@contextmanager
def by_a_program_that_has_it_open(path: Path) -> Iterator[Act]:
    with BlockGraph() as graph:
        graph.add_node("disk", store=LocalStore(path))
        yield lambda: change(graph)


@contextmanager
def by_a_program_that_closes_it(path: Path) -> Iterator[Act]:
    graph = BlockGraph()
    graph.add_node("disk", store=LocalStore(path))

    def act() -> None:
        change(graph)
        graph.close()

    with graph:
        yield act


def load(store: LocalStore) -> State:
    volume = store.open("disk", None, read_only=True)
    try:
        return {
            each.name: each.reason if each.content is None else list(each.content.areas())
            for each in volume.load()
        }
    finally:
        volume.close()


def pieces(store: LocalStore) -> State:
    """As load."""
    volume = store.open("disk", None, read_only=True)
    try:
        return {
            each.bitmap.name: each.bitmap.reason or list(offline._joined(each.pieces()))
            for each in volume.read()
        }
    finally:
        volume.close()


def entries(store: LocalStore) -> State:
    [node] = store.entries()
    return {each.name: (each.granularity, each.enabled, each.reason) for each in node.bitmaps}


def unlocked(path: Path) -> LocalStore:
    return LocalStore(path, lock=False)


def answered(path: Path, look: Callable[[LocalStore], State]) -> State | None:
    """None: "try again"."""
    try:
        return look(unlocked(path))
    except StoreError as error:
        words = f"catalog '{path / 'catalog.sqlite'}' changed while it was read: try again"
        if (error.errno, str(error)) != (errno.EAGAIN, words):
            raise
    return None


@contextmanager
def before_step(n: int, act: Act) -> Iterator[list[int]]:
    """Have something done before the n-th step of a reader (the first is 1); gives how many there
    were. A step is whatever it asks of the file system."""
    steps, acting = [0], [False]

    def stepping(call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **options: Any) -> Any:
            if not acting[0]:
                steps[0] += 1
                if steps[0] == n:
                    acting[0] = True
                    act()
                    acting[0] = False
            return call(*args, **options)

        return step

    with pytest.MonkeyPatch.context() as patch:
        for holder, name in (
            (Catalog, "_bytes"),
            (local, "opened"),
            (local, "_generation"),
            (local, "_identity"),
            (local, "_read"),
        ):
            patch.setattr(holder, name, stepping(getattr(holder, name)))
        yield steps


def answers(
    folder: Path,
    look: Callable[[LocalStore], State],
    writer: Callable[[Path], Any],
) -> Iterator[tuple[int, State | None, State, State]]:
    """What is read if a change comes before the n-th step, for all n, and what it was before and is
    afterwards."""
    path, base = folder / "store", folder / "base"
    make(base)
    n = 0
    while True:
        n += 1
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(base, path)
        with writer(path) as act:
            before = look(unlocked(path))
            with before_step(n, act) as steps:
                answer = answered(path, look)
            if steps[0] < n:
                return
            yield n, answer, before, look(unlocked(path))


WRITERS = [
    by_a_program_that_comes_and_goes,
    by_a_program_that_has_it_open,
    by_a_program_that_closes_it,
]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("look", [load, pieces, entries])
def test_whatever_comes_between_two_steps_is_an_answer_or_to_be_tried_again(
    folder: Path, look: Callable[[LocalStore], State], writer: Callable[[Path], Any]
) -> None:
    refused = 0
    for n, answer, before, after in answers(folder, look, writer):
        assert before != after
        assert answer in (None, before, after), n
        refused += answer is None
    assert refused


def test_without_a_second_look_the_answer_is_a_mixture(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So what the test above watches is not there by itself."""
    monkeypatch.setattr(Catalog, "check_unchanged", lambda self: None)
    try:
        found = list(answers(folder, load, by_a_program_that_comes_and_goes))
    except StoreError:  # a file that is not there
        return
    assert any(answer not in (before, after) for _, answer, before, after in found)


def test_what_was_marked_before_is_read(tmp_path: Path) -> None:
    path = tmp_path / "store"
    make(path)
    with BlockGraph() as graph:
        disk = graph.add_node("disk", store=LocalStore(path))
        daily = disk.bitmaps["daily"]
        disk.mark_dirty(5 << 20, 1)
        assert load(unlocked(path))["daily"] == list(daily.areas())
        with daily.freeze():
            disk.mark_dirty(6 << 20, 1)
            assert load(unlocked(path))["daily"] == [
                (0, 10 * GROUP),
                (5 << 20, GROUP),
                (6 << 20, GROUP),
            ]
        before = {each.name: each.read_bytes() for each in path.iterdir()}
        entries(unlocked(path))
        load(unlocked(path))
        assert {each.name: each.read_bytes() for each in path.iterdir()} == before


def test_a_reader_without_a_lock_keeps_nobody_off(tmp_path: Path) -> None:
    path = tmp_path / "store"
    make(path)
    with ExitStack() as stack:
        reader = stack.enter_context(BlockGraph())
        reader.add_node("disk", store=unlocked(path), read_only=True)
        with BlockGraph() as graph:
            graph.add_node("disk", store=LocalStore(path)).mark_dirty(1 << 20, 1)
            # But a writer needs it, whether it says that it could do without or not.
            with pytest.raises(LockedError):
                BlockGraph().add_node("other", SIZE, unlocked(path))
        assert reader.nodes["disk"].bitmaps["daily"].count() == 10 * GROUP  # as it was


def test_a_transaction_under_way_is_not_seen(tmp_path: Path) -> None:
    """Half of it is in the catalog already; it is taken back in a copy, and the writer goes on."""
    path = tmp_path / "store"
    make(path)
    before = entries(unlocked(path))
    on_disk = (path / "catalog.sqlite").read_bytes()
    catalog = Catalog(path, writing=True)

    def under_way() -> None:
        catalog._execute("PRAGMA cache_size = 1")
        catalog._execute("PRAGMA cache_spill = 1")
        for i in range(1000):
            catalog._execute("INSERT INTO node VALUES (?, 512, 512)", [f"node {i}"])
        assert (path / "catalog.sqlite").read_bytes() != on_disk
        assert entries(unlocked(path)) == before

    catalog.transaction(under_way)
    assert len(unlocked(path).entries()) == 1001
    catalog.close()


def test_no_copy_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, temporary = tmp_path / "store", tmp_path / "temporary"
    make(path)
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    entries(unlocked(path))
    with BlockGraph() as graph:
        graph.add_node("disk", store=unlocked(path), read_only=True)
        assert not list(temporary.iterdir())  # nor would a kill leave one
        assert graph.nodes["disk"].bitmaps["daily"].count() == 10 * GROUP
    turns = iter(range(100))
    monkeypatch.setattr(Catalog, "_bytes", lambda self: (bytes([next(turns)]), b""))
    with pytest.raises(StoreError, match="try again"):
        entries(unlocked(path))
    assert not list(temporary.iterdir())
