# SPDX-License-Identifier: MIT
"""The child of a fork goes on with bitmaps of its own; what another thread was changing is torn."""

from __future__ import annotations

import os

import pytest
from support import beside_malloc, run_python

pytestmark = [
    pytest.mark.core,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork"),
]


def test_children_of_children_go_on_with_copies() -> None:
    """As forkservers have it: one process makes ready, and each child goes on from there."""
    code = """
import os, traceback
from array import array
from pybitmap import HBitmap
from pybitmap._core import check
hb = HBitmap(1 << 20, granularity=3)
hb.set(0, 100)
words = hb.words
def child(depth, mark):
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    try:
        before = hb.count()
        hb.set(mark, 8)
        hb.set_many(array("Q", [1 << 19]), array("Q", [8]))
        assert hb.count() == before + 16, hb.count()
        hb.reset(1 << 19)
        if depth:
            assert child(depth - 1, mark + 64) == 0
        assert hb.count() == before + 8 and mark in hb
        with hb.taking() as taken:
            assert taken.count() == before + 8 and not hb.count()
            with hb.pin():
                hb.set(5)
        assert hb.count() == before + 8 and words[0]
        check(hb._hb)
        assert (hb | hb.copy()) == hb and hb.drain().count() == before + 8 and not hb
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)
for mark in range(1024, 2048, 128):
    assert child(2, mark) == 0
print(hb.count())
"""
    assert run_python(code).strip() == "104"


@beside_malloc
@pytest.mark.parametrize("pure", [False, True], ids=["as it is", "by cffi"])
def test_what_another_thread_was_changing_is_refused_and_nobody_waits(pure: bool) -> None:
    code = """
import os, sys, threading, time, traceback
from pybitmap import HBitmap, StateError
from pybitmap._core import check
torn, asked = HBitmap(1 << 23), HBitmap(1 << 22)
asked.set(0, 1 << 22)
iterator = iter(torn)
running = True
def change():
    while running:
        torn.set(0, 1 << 23); torn.reset(0, 1 << 23)
def ask():
    while running:
        assert asked.count() and not asked.isdisjoint(asked) and asked.serialize()
threads = [threading.Thread(target=target) for target in (change, ask)]
for thread in threads:
    thread.start()

CALLS = [
    lambda: torn.set(1), lambda: torn.set(start=1, count=2), lambda: torn.get(1),
    lambda: torn.get(item=1), lambda: 1 in torn, lambda: torn.add(1), lambda: torn.discard(1),
    lambda: list(torn), lambda: list(torn.areas()), lambda: next(iterator), lambda: torn.count(),
    lambda: torn.reset(0), lambda: torn.size, lambda: torn.copy(), lambda: torn | asked,
    lambda: asked.merge(torn), lambda: torn == asked, lambda: torn.drain(), lambda: torn.clear(),
    lambda: torn.serialize(), lambda: torn.words, lambda: torn.taking(), lambda: torn.sha256(),
    lambda: torn.truncate(5), lambda: torn.pin().__enter__(),
    lambda: torn.flip(0), lambda: torn.rank(5), lambda: torn.select(0), lambda: torn.prev_dirty(),
    lambda: torn.items_array(), lambda: torn.merge_bits(b"\\1"), lambda: torn.update(range(5)),
    lambda: torn.to_mask(),
    lambda: torn.copy_areas(bytearray(5), b"12345"), lambda: torn.intersection_count(torn),
    lambda: asked.union_count(torn), lambda: torn & torn,
]

def child():
    assert asked.count() == 1 << 22
    asked.reset(0, 64); check(asked._hb)
    with asked.taking() as taken:
        assert taken.count() == (1 << 22) - 64
    own = HBitmap(100); own.add(5)
    try:
        torn.count()
    except StateError as error:
        assert "another thread" in str(error) and "torn" in repr(torn)
    else:
        torn.clear(); torn.set(5); check(torn._hb)
        assert list(torn) == [5] and 5 in torn
        return 0
    assert list(own) == [5] and 5 in own and own.drain().count() == 1
    assert torn._repr_html_() == "<pre>&lt;HBitmap, torn by a fork&gt;</pre>"
    for number, call in enumerate(CALLS):
        try:
            call()
        except StateError:
            continue
        return 10 + number
    return 3

found = []
end = time.monotonic() + 60
while len(found) < 15 or 3 not in found and time.monotonic() < end:
    time.sleep(0.001)
    pid = os.fork()
    if pid == 0:
        import signal
        signal.alarm(30)
        code = 1
        try:
            code = child()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    found.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
running = False
for thread in threads:
    thread.join()
print(sorted(set(found) - {0}))
"""
    environment = {"PYBITMAP_PURE_CFFI": "1"} if pure else {}
    assert run_python(code, **environment).strip() == "[3]"
