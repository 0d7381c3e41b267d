# SPDX-License-Identifier: MIT
"""Several Python threads on one bitmap.

cffi releases the GIL around each call, so the threads really are in the C code at one time. What
must hold: no mark is ever lost and none is given twice, and when all calls have returned the
bitmap is sound and its count exact. The C tests do this harder, under ThreadSanitizer.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from array import array
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Callable

import pytest
from support import collect

from pybitmap import HBitmap, _core

pytestmark = pytest.mark.core

NTHREADS = 4
SIZE = 5000


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def run(*workers: Callable[[], object]) -> None:
    """All at once, each in a thread of its own; raises what one of them raised."""
    barrier = threading.Barrier(len(workers))

    def start(worker: Callable[[], object]) -> object:
        barrier.wait()
        return worker()

    with ThreadPoolExecutor(len(workers)) as pool:
        for future in [pool.submit(start, worker) for worker in workers]:
            future.result()


def is_sound(hb: HBitmap) -> None:
    _core.check(hb._hb)
    assert hb.count() == len(list(hb)) << hb.granularity
    assert hb.empty() is (next(iter(hb), None) is None)
    _core.check(hb._hb)


class Markers:
    """Threads that mark each item of a bitmap just once, neighbours by different threads."""

    def __init__(self, hb: HBitmap) -> None:
        self.hb = hb
        self.left = NTHREADS
        self.lock = threading.Lock()

    def mark(self, thread: int) -> None:
        group = 1 << self.hb.granularity
        for item in range(thread * group, self.hb.size, NTHREADS * group):
            self.hb.set(item)
        with self.lock:
            self.left -= 1

    def workers(self) -> list[Callable[[], object]]:
        return [lambda n=n: self.mark(n) for n in range(NTHREADS)]  # type: ignore[misc]

    @property
    def busy(self) -> bool:
        return self.left > 0


def all_once(hb: HBitmap, given: Counter[int]) -> None:
    """Each item is in exactly one of what was given and what remains."""
    given.update(hb)
    assert given == Counter(range(0, hb.size, 1 << hb.granularity))
    is_sound(hb)


@pytest.mark.parametrize("granularity", [0, 5])
def test_each_mark_is_in_exactly_one_drain_or_in_the_remainder(granularity: int) -> None:
    hb = HBitmap(SIZE << granularity, granularity)
    markers, drained = Markers(hb), [Counter[int](), Counter[int]()]

    def drain(into: Counter[int]) -> None:
        while markers.busy:
            part = hb.drain()
            is_sound(part)
            into.update(part)

    run(*markers.workers(), lambda: drain(drained[0]), lambda: drain(drained[1]))
    all_once(hb, drained[0] + drained[1])


def test_each_mark_is_in_exactly_one_drain_of_a_range_or_in_the_remainder() -> None:
    hb = HBitmap(SIZE)
    markers, drained = Markers(hb), [Counter[int](), Counter[int]()]

    def drain(into: Counter[int], width: int) -> None:
        while markers.busy:
            for start in range(0, SIZE, width):
                into.update(hb.drain(start, min(width, SIZE - start)))

    run(*markers.workers(), lambda: drain(drained[0], 500), lambda: drain(drained[1], 333))
    all_once(hb, drained[0] + drained[1])


def test_several_drains_into_one_bitmap_lose_nothing() -> None:
    hb, into = HBitmap(SIZE), HBitmap(SIZE)
    markers = Markers(hb)

    def drain() -> None:
        while markers.busy:
            hb.drain(into=into)

    run(*markers.workers(), drain, drain)
    is_sound(into)
    all_once(hb, Counter(into))


def test_a_mark_that_has_returned_is_in_the_next_drain() -> None:
    """Others mark and clean bits of the same words meanwhile."""
    hb = HBitmap(64 * 64)
    done = threading.Event()

    def disturb(bit: int) -> None:
        while not done.is_set():
            for item in range(bit, hb.size, 64):
                hb.set(item)
                hb.reset(item)

    def check() -> None:
        try:
            for item in range(0, hb.size, 5):
                if item % 64 not in (1, 2):
                    hb.set(item)
                    assert item in hb.drain()
        finally:
            done.set()

    run(check, lambda: disturb(1), lambda: disturb(2))
    hb.clear()
    is_sound(hb)


def test_a_mark_of_what_another_thread_is_marking_is_in_the_next_drain() -> None:
    """Two threads mark the same item at once; the one that returns must find it in its drain,
    or the other one, which drains as well, has it already."""
    hb = HBitmap(64 * 64 * 2)
    items = range(0, hb.size, 67)
    meet = threading.Barrier(2)
    drained: list[list[HBitmap]] = [[], []]

    def mark(thread: int) -> None:
        for item in items:
            meet.wait()
            hb.set(item)
            drained[thread].append(hb.drain())

    run(lambda: mark(0), lambda: mark(1))
    assert hb.empty()
    for item, first, second in zip(items, *drained):
        assert item in first or item in second


def test_pop_by_several_threads_gives_each_once() -> None:
    hb = HBitmap(SIZE)
    hb.set(0, SIZE)
    popped: list[list[int]] = [[] for _ in range(NTHREADS)]

    def pop(into: list[int]) -> None:
        while True:
            try:
                into.append(hb.pop())
            except KeyError:
                return

    run(*[lambda into=into: pop(into) for into in popped])
    all_once(hb, Counter(item for part in popped for item in part))
    assert hb.empty()


def test_pop_beside_marks_gives_each_once() -> None:
    hb = HBitmap(SIZE)
    markers, popped = Markers(hb), [Counter[int](), Counter[int]()]

    def pop(into: Counter[int]) -> None:
        while markers.busy:
            with contextlib.suppress(KeyError):
                into[hb.pop()] += 1

    run(*markers.workers(), lambda: pop(popped[0]), lambda: pop(popped[1]))
    all_once(hb, popped[0] + popped[1])


def test_remove_by_several_threads_succeeds_once() -> None:
    hb = HBitmap(SIZE)
    hb.set(0, SIZE)
    removed: list[list[int]] = [[] for _ in range(NTHREADS)]

    def remove(into: list[int]) -> None:
        for item in range(SIZE):
            try:
                hb.remove(item)
            except KeyError:
                continue
            into.append(item)

    run(*[lambda into=into: remove(into) for into in removed])
    all_once(hb, Counter(item for part in removed for item in part))


def test_iterators_beside_marks_give_all_that_was_there_before() -> None:
    hb = HBitmap(SIZE)
    before = set(range(0, SIZE, 7))
    for item in before:
        hb.add(item)
    markers = Markers(hb)

    def iterate() -> None:
        while markers.busy:
            items = list(hb)
            assert items == sorted(set(items))
            assert before <= set(items)
            areas = list(hb.areas())
            assert all(a + n <= b for (a, n), (b, _) in zip(areas, areas[1:]))
            assert before <= {item for a, n in areas for item in range(a, a + n)}

    run(*markers.workers(), iterate, iterate)
    assert list(hb.areas()) == [(0, SIZE)]
    is_sound(hb)


def test_iterators_beside_clears_stay_increasing_and_inside() -> None:
    hb = HBitmap(SIZE)
    hb.set(0, SIZE)

    def clear(n: int) -> None:
        for item in range(n, SIZE, 2):
            hb.reset(item)

    def iterate() -> None:
        while not hb.empty():
            last = -1
            for item in hb:
                assert last < item < SIZE
                last = item

    run(lambda: clear(0), lambda: clear(1), iterate)
    is_sound(hb)


def test_merges_beside_marks_lose_nothing() -> None:
    hb, other, coarse = HBitmap(SIZE), HBitmap(SIZE), HBitmap(SIZE, 3)
    other.set(0, 100)
    coarse.set(4000, 80)
    markers = Markers(hb)

    def merge() -> None:
        while markers.busy:
            hb.merge(other)
            hb.merge(coarse)

    run(*markers.workers(), merge)
    assert len(hb) == SIZE
    is_sound(hb)


def test_an_intersection_beside_marks_outside_of_it_takes_only_what_it_saw() -> None:
    hb, keep = HBitmap(SIZE), HBitmap(SIZE)
    keep.set(0, SIZE)
    markers = Markers(hb)

    def intersect() -> None:
        while markers.busy:
            hb.intersection_update(keep)

    run(*markers.workers(), intersect)
    assert len(hb) == SIZE
    is_sound(hb)


def test_operations_in_both_directions_do_not_block_each_other() -> None:
    a, b = HBitmap(SIZE), HBitmap(SIZE)
    a.set(0, 100)
    b.set(50, 100)

    def forth_and_back(x: HBitmap, y: HBitmap) -> None:
        for _ in range(300):
            x |= y
            x & y
            x == y  # noqa: B015
            x <= y  # noqa: B015
            x.isdisjoint(y)
            x.drain(0, 10, into=y)
            y.set(0, 10)

    run(lambda: forth_and_back(a, b), lambda: forth_and_back(b, a))
    is_sound(a)
    is_sound(b)


def test_counts_beside_marks_never_exceed_what_was_marked() -> None:
    hb = HBitmap(SIZE)
    markers = Markers(hb)

    def count() -> None:
        last = 0
        while markers.busy:
            now = hb.count()
            assert last <= now <= SIZE
            assert hb.count(0, SIZE) >= now
            last = now

    run(*markers.workers(), count, count)
    assert hb.count() == SIZE
    is_sound(hb)


def test_marks_in_bulk_beside_resets_leave_a_sound_bitmap() -> None:
    hb = HBitmap(SIZE)
    starts, counts = array("Q", range(0, SIZE, 50)), array("Q", [20]) * (SIZE // 50)

    def mark() -> None:
        for _ in range(200):
            hb.set_many(starts, counts)

    def clear() -> None:
        for _ in range(200):
            hb.reset_all()
            hb.reset(1000, 3000)

    run(mark, mark, clear, clear)
    is_sound(hb)
    hb.set_many(starts, counts)
    assert list(hb.areas()) == [(start, 20) for start in starts]


def test_truncate_beside_other_calls_leaves_a_sound_bitmap() -> None:
    hb = HBitmap(SIZE)
    done = threading.Event()

    def mark(n: int) -> None:
        item = n
        while not done.is_set():
            try:
                hb.set(item % (2 * SIZE), 1)
            except ValueError:
                assert hb.size <= 2 * SIZE
            item += 7

    def look() -> None:
        while not done.is_set():
            assert all(item < 2 * SIZE for item in hb)
            with contextlib.suppress(ValueError):  # the size has changed since it was asked
                assert len(hb.serialize()) % 8 == 0
            hb.next_zero(0)

    def truncate() -> None:
        try:
            for n in range(300):
                hb.truncate([SIZE // 2, 2 * SIZE, 63, 64, 65, SIZE][n % 6])
        finally:
            done.set()

    run(lambda: mark(0), lambda: mark(3), look, truncate)
    is_sound(hb)


def test_words_taken_and_given_back_by_several_threads_leave_no_pin() -> None:
    hb = HBitmap(SIZE)

    def look() -> None:
        for _ in range(300):
            assert len(hb.words) == -(-SIZE // 64)
            with hb.pin():
                hb.sha256()

    run(look, look, look)
    collect()
    hb.truncate(5)
    assert hb.size == 5


def test_flips_beside_marks_of_others_lose_none() -> None:
    """Each thread has bits of its own in every word; who marks finds its own marks, all of them."""
    hb = HBitmap(64 * 200)
    done = threading.Event()

    def flip() -> None:
        try:
            for _ in range(101):
                for word in range(0, hb.size, 64):
                    hb.flip(word + 32, 31)
        finally:
            done.set()

    def mark(bit: int) -> None:
        while True:
            last = done.is_set()
            for item in range(bit, hb.size, 64):
                hb.add(item)
                assert item in hb
            if last:
                return

    run(flip, lambda: mark(31), lambda: mark(63))
    is_sound(hb)
    assert list(hb.areas()) == [(start, 33) for start in range(31, hb.size, 64)]


def test_a_flip_of_all_beside_marks_keeps_what_was_clean() -> None:
    hb = HBitmap(SIZE)
    markers = Markers(hb)

    def flip() -> None:
        while markers.busy:
            hb.flip(0, SIZE)
            hb.flip(0, SIZE)

    run(*markers.workers(), flip)
    is_sound(hb)


@pytest.mark.parametrize(("granularity", "start"), [(0, 0), (0, 13), (2, 5)])
def test_foreign_bits_merged_beside_marks_and_drains_are_each_in_one(
    granularity: int, start: int
) -> None:
    hb = HBitmap(64 * 1024)
    bits = b"\x41" * 64
    merged = HBitmap(hb.size)
    merged.merge_bits(bits, start, granularity)
    rounds, drained = 200, HBitmap(hb.size)

    def merge() -> None:
        for _ in range(rounds):
            hb.merge_bits(bits, start, granularity)

    def drain() -> None:
        for _ in range(rounds):
            part = hb.drain()
            is_sound(part)
            drained.update(part)

    run(merge, merge, drain)
    is_sound(hb)
    assert hb | drained == merged
    hb.clear()
    hb.merge_bits(bits, start, granularity)
    assert hb == merged


def test_order_and_counts_beside_marks_stay_within_what_was_marked() -> None:
    hb, other = HBitmap(SIZE), HBitmap(SIZE)
    before = list(range(0, SIZE, 7))
    hb.update(before)
    other.set(0, SIZE)
    markers = Markers(hb)

    def ask() -> None:
        last = 0
        while markers.busy:
            assert hb.rank(SIZE // 2) >= SIZE // 14
            assert hb.select(len(before) - 1) <= before[-1]
            now = hb.intersection_count(other)
            assert last <= now <= hb.rank(SIZE)
            assert hb.difference_count(hb) == hb.symmetric_difference_count(hb) == 0
            assert hb.difference_count(other) == 0
            assert other.union_count(hb) == SIZE
            items = hb.items_array().tolist()
            assert items == sorted(set(items))
            assert set(before) <= set(items)
            assert (hb.prev_dirty() or 0) >= before[-1]
            last = now

    run(*markers.workers(), ask, ask)
    assert len(hb) == SIZE
    is_sound(hb)


def test_areas_copied_beside_marks_have_what_was_dirty_before() -> None:
    hb = HBitmap(SIZE)
    hb.set(0, 100)
    markers = Markers(hb)
    src = b"x" * SIZE

    def copy() -> None:
        while markers.busy:
            dst = bytearray(SIZE)
            assert hb.copy_areas(dst, src) == dst.count(b"x")
            assert dst[:100] == b"x" * 100

    run(*markers.workers(), copy)
    assert hb.copy_areas(bytearray(SIZE), src) == SIZE


def test_counts_in_both_directions_do_not_block_each_other() -> None:
    a, b = HBitmap(SIZE), HBitmap(SIZE)
    a.set(0, 100)
    b.set(50, 100)

    def ask(x: HBitmap, y: HBitmap) -> None:
        for _ in range(300):
            assert x.intersection_count(y) == 50
            assert x.union_count(y) == 150
            assert x.difference_count(y) == 50

    run(lambda: ask(a, b), lambda: ask(b, a))


def test_what_is_laid_over_a_buffer_is_marked_by_several_threads() -> None:
    leaf = bytearray(8 * (SIZE // 64 + 1))
    hb = HBitmap.over(leaf, SIZE)
    run(*Markers(hb).workers())
    assert len(hb) == SIZE
    is_sound(hb)
