# SPDX-License-Identifier: MIT
"""What all trackers promise, by one whose kernel is a bitmap: each write is in one collect."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress

import pytest
from lines import at_every_line
from support import collect

from pybitmap import ClosedError, HBitmap, MismatchError, StateError, _entry
from pybitmap.trackers import Tracker

pytestmark = pytest.mark.core

SIZE = 1000 * 4096 + 5
TRACKERS = "trackers"  # lines of these; what they call has tests of its own


def dropped(test: Callable[..., None]) -> Callable[..., None]:
    """An interruption may come between the making of what was taken and the block that closes it,
    and in the finalizer, too.
    """
    for what in (
        "what was taken from a bitmap was dropped",
        ":pytest.PytestUnraisableExceptionWarning",
    ):
        test = pytest.mark.filterwarnings(f"ignore:{what}")(test)
    return test


class Tracking(Tracker):
    """`kernel` has what was written; a fetch takes it in two calls."""

    def __init__(self) -> None:
        self.kernel = HBitmap(SIZE, 12)
        self.released = 0
        super().__init__("a bitmap", SIZE, 12)

    def write(self, page: int) -> None:
        self.kernel.set(page * 4096)

    def _fetch(self) -> None:
        half = 500 * 4096
        self.kernel.drain(0, half, into=self._log)
        self.kernel.drain(half, into=self._log)

    def _release(self) -> None:
        self.released += 1


def pages(hb: HBitmap) -> list[int]:
    return [start // 4096 for start in hb]


def test_each_write_is_in_one_collect() -> None:
    with Tracking() as tracker:
        assert (tracker.size, tracker.granularity) == (SIZE, 12)
        tracker.write(3)
        tracker.write(1000)
        first = tracker.collect()
        assert type(first) is HBitmap
        assert (first.size, first.granularity) == (SIZE, 12)
        tracker.write(4)
        assert (pages(first), pages(tracker.collect()), pages(tracker.collect())) == (
            [3, 1000],
            [4],
            [],
        )


@pytest.mark.parametrize("granularity", [9, 12, 16, 40])
def test_it_is_collected_into_a_bitmap_of_any_granularity(granularity: int) -> None:
    into = HBitmap(SIZE, granularity)
    into.set(SIZE - 1)
    with Tracking() as tracker:
        tracker.write(3)
        assert tracker.collect(into) is into
        assert not tracker.collect()
    expected = HBitmap(SIZE, granularity)
    expected.set(3 * 4096, 4096)
    expected.set(SIZE - 1)
    assert into == expected


def test_what_cannot_be_collected_into_is_refused_and_loses_nothing() -> None:
    with Tracking() as tracker:
        tracker.write(3)
        with pytest.raises(MismatchError, match=f"into has 7 items, but a bitmap {SIZE} bytes"):
            tracker.collect(HBitmap(7))
        with pytest.raises(TypeError, match="not set"):
            tracker.collect(set())  # type: ignore[arg-type]
        assert pages(tracker.collect()) == [3]


def test_what_is_taken_comes_back_unless_it_is_done() -> None:
    with Tracking() as tracker:
        tracker.write(3)
        with suppress(ZeroDivisionError), tracker.taking() as written:
            assert pages(written) == [3]
            tracker.write(4)
            raise ZeroDivisionError
        with tracker.taking() as written:
            assert pages(written) == [3, 4]
            written.done()
        assert not tracker.collect()


@dropped
@pytest.mark.parametrize("granularity", [12, 16])
def test_an_interruption_at_any_line_of_a_collect_loses_nothing(granularity: int) -> None:
    tracker, into = Tracking(), HBitmap(SIZE, granularity)

    def attempt() -> None:
        tracker.write(3)
        tracker.write(700)
        tracker.collect(into)

    for where in at_every_line(attempt, within=TRACKERS):
        tracker.collect(into)
        assert into.get(3 * 4096), where
        assert into.get(700 * 4096), where
        into.clear()
    tracker.close()


@dropped
def test_an_interruption_at_any_line_of_taking_loses_nothing() -> None:
    tracker = Tracking()

    def attempt() -> None:
        tracker.write(3)
        with tracker.taking():
            pass

    for where in at_every_line(attempt, within=TRACKERS):
        assert pages(tracker.collect()) == [3], where
    tracker.close()


@pytest.mark.skipif(_entry._fast is None, reason="there is no _fast here, which guards locks")
def test_a_lock_that_was_interrupted_is_free() -> None:
    tracker = Tracking()
    for where in at_every_line(tracker.collect, within=TRACKERS):
        other = threading.Thread(target=tracker.collect, daemon=True)
        other.start()
        other.join(60)
        assert not other.is_alive(), where
    tracker.close()


def test_threads_that_collect_get_each_write_once() -> None:
    tracker = Tracking()
    found: list[list[int]] = [[], []]
    running = True

    def collecting(mine: list[int]) -> None:
        while running:
            mine += pages(tracker.collect())

    threads = [threading.Thread(target=collecting, args=(mine,)) for mine in found]
    for thread in threads:
        thread.start()
    for page in range(1000):
        tracker.write(page)
    running = False
    for thread in threads:
        thread.join()
    assert sorted(found[0] + found[1] + pages(tracker.collect())) == list(range(1000))
    tracker.close()


def test_a_thread_that_comes_again_amid_its_own_fetch_is_served() -> None:
    class Reentered(Tracking):
        inner: HBitmap | None = None

        def _fetch(self) -> None:
            super()._fetch()
            if self.inner is None:
                self.inner = HBitmap(SIZE, 12)
                self.collect(self.inner)

    with Reentered() as tracker:
        tracker.write(3)
        outer = tracker.collect()
        assert tracker.inner is not None
        assert pages(outer) + pages(tracker.inner) == [3]


def test_a_tracker_that_is_closed_says_so() -> None:
    tracker = Tracking()
    tracker.close()
    tracker.close()
    for call in (tracker.collect, tracker.taking, tracker.__enter__):
        with pytest.raises(ClosedError, match="the tracker of a bitmap is closed"):
            call()
    assert tracker.closed
    assert "closed" in repr(tracker)


def test_a_tracker_that_is_dropped_is_closed_with_a_warning() -> None:
    released: list[int] = []

    class Noting(Tracking):
        def _release(self) -> None:
            released.append(1)

    tracker = Noting()
    with pytest.warns(ResourceWarning, match="tracker of a bitmap was dropped"):  # noqa: PT031
        del tracker
        collect()
    assert released == [1]


def test_one_whose_making_failed_is_dropped_in_silence() -> None:
    class Failing(Tracking):
        def __init__(self) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Failing()
    collect()


def test_the_child_of_a_fork_is_refused_and_its_parent_goes_on() -> None:
    with Tracking() as tracker:
        tracker.write(3)
        child = os.fork()
        if not child:
            code = 1
            try:
                tracker.collect()
            except StateError as error:
                code = 0 if "is the parent's" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        assert pages(tracker.collect()) == [3]


def test_the_child_of_a_fork_beside_a_collect_does_not_wait_for_it() -> None:
    class Forking(Tracking):
        _forks = True

    tracker = Forking()
    tracker.write(3)
    inside, go_on = threading.Event(), threading.Event()

    def holding() -> None:
        with tracker._lock:
            inside.set()
            go_on.wait(60)

    thread = threading.Thread(target=holding)
    thread.start()
    inside.wait(60)
    child = os.fork()
    if not child:
        os._exit(0 if pages(tracker.collect()) == [3] else 1)
    go_on.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0
    tracker.close()


def test_a_copy_is_refused() -> None:
    import copy
    import pickle

    with Tracking() as tracker:
        for call in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError):
                call(tracker)
