# SPDX-License-Identifier: MIT
"""Counting and listing what is stored, piece by piece: the same as when all of it is loaded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from images import asked, create
from stores import PLACES, MemoryPlace, Place
from support import silent

from pybitmap import (
    BlockGraph,
    HBitmap,
    InconsistentError,
    LockedError,
    NotFoundError,
    RangeError,
    StoreError,
    offline,
)
from pybitmap.extent import Extent
from pybitmap.sizes import granularity_bits
from pybitmap.store import LocalStore, Qcow2Store, Store
from pybitmap.store import local as local_store
from pybitmap.store.qcow2 import store as qcow2_store
from pybitmap.store.qcow2.file import File

#: A piece is 512 bytes of bits here: 4096 groups, of which an image has a cluster.
PIECE = 512
STEP = 8 * PIECE * 512  # of the disk, at granularity 512
SIZE = 5 * STEP + 512 * 100
GRANULARITIES = (512, 4096, 1 << 20)
MIB = 1 << 20

Ranges = list[tuple[int, int]]


@pytest.fixture(params=PLACES, ids=lambda kind: kind.__name__)
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(local_store, "_PIECE", PIECE)
    monkeypatch.setattr(qcow2_store, "_PIECE", PIECE)
    made: Place = request.param(tmp_path)
    if request.param.__name__ == "Qcow2Place":
        create(tmp_path / "image0.qcow2", SIZE, cluster_size=512)
    return made


def fill(store: Store, ranges: Ranges) -> dict[str, HBitmap]:
    """Bitmaps of all granularities with these bits, and what they are to say, by name."""
    expected = {}
    with BlockGraph() as graph:
        node = graph.add_node("n", SIZE, store)
        for name in list(node.bitmaps):
            node.remove_bitmap(name)
        for granularity in GRANULARITIES:
            name = f"b{granularity}"
            node.add_bitmap(name, granularity, persistent=True)
            expected[name] = HBitmap(SIZE, granularity_bits(granularity))
            for start, nbytes in ranges:
                node.bitmaps[name].set(start, nbytes)
                expected[name].set(start, nbytes)
    return expected


def node_of(store: Store) -> str | None:
    return None if isinstance(store, Qcow2Store) else "n"


def listed(store: Store, name: str) -> Ranges:
    with offline.areas(store, (node_of(store), name), silent) as found:
        return list(found)


def check(place: Place, expected: dict[str, HBitmap]) -> None:
    [node] = offline.counted(place.store(), silent)
    assert {each.name: each.count for each in node.bitmaps} == {
        name: bits.count() for name, bits in expected.items()
    }
    for name, bits in expected.items():
        assert listed(place.store(), name) == list(bits.areas())


edges = st.integers(0, 5).map(lambda i: i * STEP) | st.just(SIZE) | st.integers(0, SIZE)
ranges = st.lists(
    st.tuples(edges, edges).map(lambda pair: (min(pair), max(pair) - min(pair))), max_size=6
)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example([])
@example([(0, SIZE)])
@example([(0, STEP), (2 * STEP, STEP), (3 * STEP, 1)])
@example([(STEP - 512, 1024), (SIZE - 1, 1)])
@given(ranges)
def test_what_is_read_in_pieces_is_what_was_stored(place: Place, marked: Ranges) -> None:
    check(place, fill(place.store(), marked))


def test_qemu_counts_the_same(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", SIZE, cluster_size=512)
    fill(Qcow2Store(path), [(0, STEP + 1), (SIZE - 1, 1), (3 * STEP, 2 * STEP)])
    [node] = offline.counted(Qcow2Store(path), silent)
    counts = {name: count for name, (count, _) in asked(path).items()}
    assert {each.name: each.count for each in node.bitmaps} == counts


def test_what_a_killed_program_had_frozen_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_store, "_PIECE", PIECE)
    graph = BlockGraph()
    node = graph.add_node("n", SIZE, LocalStore(tmp_path / "s"))
    bitmap = node.add_bitmap("b", 512, persistent=True)
    node.mark_dirty(0, 1)
    with bitmap.freeze():
        node.mark_dirty(512, STEP)
        node.mark_dirty(SIZE - 1, 1)
        node.close(discard=True)
    expected = HBitmap(SIZE, 9)
    expected.set(0, 512 + STEP)
    expected.set(SIZE - 1, 1)
    assert listed(LocalStore(tmp_path / "s"), "b") == list(expected.areas())
    [stored] = offline.counted(LocalStore(tmp_path / "s"), silent)
    assert [each.count for each in stored.bitmaps] == [expected.count()]


def test_what_cannot_be_used_or_found_is_refused(place: Place) -> None:
    fill(place.store(), [])
    store = place.store()
    with pytest.raises(NotFoundError, match="Dirty bitmap 'none' not found"):
        listed(store, "none")
    if place.exact_after_kill:
        return
    graph = BlockGraph()
    graph.add_node("n", store=place.store()).close(discard=True)
    store = place.store()
    [node] = offline.counted(store, silent)
    assert {each.count for each in node.bitmaps} == {None}
    with pytest.raises(InconsistentError, match="Bitmap 'b512' is inconsistent and cannot be used"):
        listed(store, "b512")


# ---- visitors --------------------------------------------------------------------------------


def test_what_cannot_be_read_is_told_before_the_first_area(tmp_path: Path) -> None:
    """Who copies what is listed would take the part that came for all."""

    class Failing(File):
        def read_padded(self, offset: int, nbytes: int) -> bytes:
            if offset == bad:
                raise StoreError("the disk is gone")
            return super().read_padded(offset, nbytes)

    bad = 0
    path = create(tmp_path / "disk.qcow2", SIZE, cluster_size=512)
    fill(Qcow2Store(path), [(STEP, 1), (3 * STEP, 1)])
    with open(path, "rb") as file:
        for bad in range(512, path.stat().st_size, 512):
            file.seek(bad)
            if file.read(512) == b"\1".ljust(512, b"\0"):
                store = Qcow2Store(path)
                store.open_file = Failing
                with pytest.raises(StoreError, match="the disk is gone"):
                    offline.areas(store, (None, "b512"), silent).__enter__()
                break
        else:
            pytest.fail("there is no such cluster")


def real(place: Place) -> Place:
    if isinstance(place, MemoryPlace):
        pytest.skip("it is in the memory of this process, and has no locks")
    return place


def test_who_lists_keeps_writers_out_until_the_block_ends(place: Place) -> None:
    fill(real(place).store(), [(0, 1), (STEP, 1)])
    store = place.store()
    with offline.areas(store, (node_of(store), "b512"), silent) as found:
        assert next(found) == (0, 512)
        with pytest.raises(LockedError):
            fill(place.store(), [])
        other = place.store()
        assert listed(other, "b512")[0] == (0, 512)
    check(place, fill(place.store(), [(0, SIZE)]))


@pytest.mark.parametrize("how", ["break", "interrupt", "progress"])
def test_a_list_that_is_left_leaves_nothing_open(place: Place, how: str) -> None:
    fill(real(place).store(), [(0, 1), (STEP, 1), (3 * STEP, 1)])
    store = place.store()

    def stop(what: str, done: int, total: int | None) -> None:
        if how == "progress":
            raise KeyboardInterrupt

    def run() -> None:
        with offline.areas(store, (node_of(store), "b512"), stop) as found:
            for _ in found:
                if how == "interrupt":
                    raise KeyboardInterrupt
                break

    if how == "break":
        run()
    else:
        with pytest.raises(KeyboardInterrupt):
            run()
    check(place, fill(place.store(), [(0, SIZE)]))


def test_in_the_child_of_a_fork_a_list_ends_with_an_error(place: Place) -> None:
    fill(real(place).store(), [(i * STEP, 1) for i in range(5)])
    store = place.store()
    with offline.areas(store, (node_of(store), "b512"), silent) as found:
        next(found)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                list(found)
            except StoreError:
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert len(list(found)) == 4


# ---- marking extents ------------------------------------------------------------------------


def test_extents_are_marked_all_or_none(place: Place) -> None:
    fill(place.store(), [(0, 512)])
    name = (node_of(place.store()), "b4096")
    extents = [Extent(8192, 1), Extent(4096, 4096, False), Extent(SIZE - 1, 1)]
    offline.mark(place.store(), name, iter(extents), silent)
    last = (SIZE - 1) // 4096 * 4096
    expected = [(0, 4096), (8192, 4096), (last, SIZE - last)]
    assert listed(place.store(), "b4096") == expected
    with pytest.raises(RangeError, match=r"extent 1: .*beyond the size"):
        offline.mark(place.store(), name, [(12288, 1), (SIZE - 1, 2)], silent)
    with pytest.raises(NotFoundError):
        offline.mark(place.store(), (name[0], "none"), [(0, 1)], silent)
    assert listed(place.store(), "b4096") == expected
