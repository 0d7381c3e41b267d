# SPDX-License-Identifier: MIT
"""Taking what is dirty: dropped only if that is said, and in none of two bitmaps never."""

from __future__ import annotations

import sys
import threading
from contextlib import suppress

import pytest
from support import collect

from pybitmap import HBitmap
from pybitmap.hbitmap import Taken

pytestmark = pytest.mark.core


def dirty(*items: int) -> HBitmap:
    hb = HBitmap(1000)
    hb.update(items)
    return hb


def test_what_is_done_is_gone_and_what_came_meanwhile_stays() -> None:
    hb = dirty(1, 2)
    with hb.taking() as taken:
        assert (list(taken), list(hb)) == ([1, 2], [])
        hb.add(3)
        taken.done()
    assert list(hb) == [3]
    taken.close()
    assert list(hb) == [3]


def test_whoever_leaves_without_done_has_all_put_back() -> None:
    hb = dirty(1, 2)
    for error in (None, ZeroDivisionError, KeyboardInterrupt):
        with suppress(ZeroDivisionError, KeyboardInterrupt), hb.taking():
            hb.add(3)
            if error is not None:
                raise error
        assert list(hb) == [1, 2, 3]


def test_what_is_dropped_is_put_back_with_a_warning() -> None:
    hb = dirty(1)
    taken = hb.taking()
    with pytest.warns(ResourceWarning, match="is put back"):  # noqa: PT031
        del taken
        collect()
    assert list(hb) == [1]


def test_a_finalizer_that_is_interrupted_puts_back_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(self: Taken) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Taken, "__del__", interrupted)
    monkeypatch.setattr(sys, "unraisablehook", lambda what: None)
    hb = dirty(1)
    taken = hb.taking()
    hb.add(2)
    del taken
    collect()
    assert list(hb) == [1, 2]


@pytest.mark.parametrize(("size", "left"), [(2, [1]), (2000, [1, 999])])
def test_a_bitmap_may_be_truncated_meanwhile(size: int, left: list[int]) -> None:
    hb = dirty(1, 999)
    with hb.taking():
        hb.truncate(size)
    assert list(hb) == left


def test_one_within_the_other_takes_what_came_meanwhile() -> None:
    hb = dirty(1)
    with hb.taking() as outer:
        hb.add(2)
        with hb.taking() as inner:
            assert list(inner) == [2]
        outer.done()
    assert list(hb) == [2]


def test_each_mark_of_another_thread_is_taken_once() -> None:
    hb = HBitmap(20_000)

    def write() -> None:
        for item in range(20_000):
            hb.set(item)

    thread = threading.Thread(target=write)
    thread.start()
    found: list[int] = []
    rounds = 0
    while thread.is_alive():
        rounds += 1
        with hb.taking() as taken:
            if rounds % 3:
                found += taken
                taken.done()
    thread.join()
    found += hb
    assert sorted(found) == list(range(20_000))
