# SPDX-License-Identifier: MIT
"""A fork: stores are the parent's, and a child neither stores nor unlocks nor marks anything."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from stores import SIZE, LocalPlace, Place, Qcow2Place
from support import run_python

from pybitmap import BlockGraph

pytestmark = [
    pytest.mark.core,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork"),
]

G = 4096

PROGRAM = """
import os, sys, threading
from pybitmap import BlockGraph, LockedError, StateError
from pybitmap.store import LocalStore, Qcow2Store

store = {store}
wait, go_on = os.pipe()
graph = BlockGraph()
node = graph.add_node("n", None, store)
bitmap = node.bitmaps["b"]
node.mark_dirty(0, 1)
{before}
pid = os.fork()
if pid == 0:
    try:
        {child}
    finally:
        os._exit(0)
os.waitpid(pid, 0) if {waits} else None
node.mark_dirty(4096, 1)
with bitmap.freeze() as frozen:
    assert list(bitmap.areas()) == [(0, 8192)], list(bitmap.areas())
graph.close()
with BlockGraph() as again:  # also while the child lives
    assert list(again.add_node("n", None, {store}).bitmaps["b"].areas()) == [(0, 8192)]
os.write(go_on, b"x")
if not {waits}:
    os.waitpid(pid, 0)
print("ok")
"""

#: What the parent does next.
MARK = "node.mark_dirty(4096, 1)\n"

REFUSED = """
        for call in (lambda: node.mark_dirty(65536, 1), lambda: node.mark_dirty(offset=0, length=1),
                     bitmap.clear, node.flush, graph.close, bitmap.freeze, node.close,
                     lambda: node.writing(0, 1).__enter__()):
            try:
                call()
            except StateError as error:
                assert "before a fork" in str(error), error
            else:
                os.write(2, b"it was not refused")
                os._exit(1)
"""

CHILDREN = {
    "is refused": REFUSED,
    "leaves the block": """
        try:
            with graph:
                pass
        except StateError:
            pass
""",
    "exits": "sys.exit()",
    "drops all": "del node, bitmap, store, graph; import gc; gc.collect()",
    "lives on": "os.read(wait, 1)",
}


@pytest.fixture(params=[LocalPlace, Qcow2Place], ids=lambda kind: kind.__name__)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """What opens it."""
    place: Place = request.param(tmp_path)
    with BlockGraph() as graph:
        graph.add_node("n", SIZE, place.store()).add_bitmap("b", G, persistent=True)
    name = "store0" if isinstance(place, LocalPlace) else "image0.qcow2"
    kind = "LocalStore" if isinstance(place, LocalPlace) else "Qcow2Store"
    return f"{kind}({str(tmp_path / name)!r})"


@pytest.mark.parametrize("child", CHILDREN)
def test_a_child_leaves_the_stores_of_its_parent_alone(child: str, store: str) -> None:
    waits = child != "lives on"
    code = PROGRAM.format(store=store, before="", child=CHILDREN[child].strip(), waits=waits)
    assert run_python(code).strip() == "ok"


def test_a_child_does_not_commit_the_transaction_that_was_open(store: str) -> None:
    code = PROGRAM.format(
        store=store,
        before="tx = graph.transaction(); tx.__enter__().clear('n', 'b')",
        child="tx.__exit__(None, None, None)",
        waits=True,
    ).replace(MARK, f"tx.__exit__(ValueError, None, None)\n{MARK}")
    assert run_python(code).strip() == "ok"


def test_a_child_does_not_hang_where_another_thread_was_in_a_change(store: str) -> None:
    code = PROGRAM.format(
        store=store,
        before="""
inside = threading.Event(); leave = threading.Event()
def hold():
    with graph.locked():
        inside.set(); leave.wait()
thread = threading.Thread(target=hold); thread.start(); inside.wait()
""",
        child=REFUSED.strip(),
        waits=True,
    ).replace(MARK, f"leave.set(); thread.join()\n{MARK}")
    assert run_python(code).strip() == "ok"


def test_without_stores_a_child_goes_on_by_itself() -> None:
    code = """
import os
from pybitmap import BlockGraph, HBitmap
graph = BlockGraph(); node = graph.add_node("n", 1 << 20); bitmap = node.add_bitmap("b", 4096)
hb = HBitmap(100); hb.add(1); node.mark_dirty(0, 1)
pid = os.fork()
if pid == 0:
    hb.add(2); node.mark_dirty(4096, 1); bitmap.clear(); node.mark_dirty(8192, 1)
    graph.close()
    os._exit(0 if list(hb) == [1, 2] and list(bitmap.areas()) == [(8192, 4096)] else 1)
assert os.waitpid(pid, 0)[1] == 0
print(list(hb), list(bitmap.areas()))
"""
    assert run_python(code).strip() == "[1] [(0, 4096)]"


def test_a_child_does_not_hang_where_other_threads_were_writing() -> None:
    code = """
import os, select, sys, threading
from pybitmap import BlockGraph
node = BlockGraph().add_node("n", 1 << 20); node.add_bitmap("b")
running = True
def write():
    while running:
        with node.writing(0, 1):
            pass
threads = [threading.Thread(target=write) for _ in range(2)]
for thread in threads:
    thread.start()
sys.setswitchinterval(1e-5)
hung = 0
for i in range(2000):
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        with node.writing(0, 1):
            pass
        node.add_bitmap("c")
        os.write(writing, b"x")
        os._exit(0)
    if not select.select([reading], [], [], 10)[0]:
        hung += 1
        os.kill(pid, 9)
    os.waitpid(pid, 0); os.close(reading); os.close(writing)
    if hung:
        break
running = False
print(hung)
"""
    assert run_python(code).strip() == "0"


def test_what_another_thread_wrote_at_the_fork_stays_open_in_the_child() -> None:
    code = """
import os, threading
from pybitmap import BlockGraph
node = BlockGraph().add_node("n", 1 << 20); bitmap = node.add_bitmap("b", 4096)
inside = threading.Event(); leave = threading.Event()
def write():
    with node.writing(8192, 1):
        inside.set(); leave.wait()
thread = threading.Thread(target=write); thread.start(); inside.wait()
with node.writing(0, 1):  # the thread that forks leaves its block in both
    pid = os.fork()
if pid == 0:
    bitmap.clear()
    os._exit(0 if list(bitmap.areas()) == [(8192, 4096)] else 1)
assert os.waitpid(pid, 0)[1] == 0
leave.set(); thread.join(); bitmap.clear()
print(list(bitmap.areas()))
"""
    assert run_python(code).strip() == "[]"


def test_a_child_is_not_locked_by_the_block_of_another_thread() -> None:
    code = """
import os, threading
from pybitmap import BlockGraph
graph = BlockGraph(); node = graph.add_node("n", 1 << 20)
inside = threading.Event(); leave = threading.Event()
def hold():
    with graph.locked():
        node.add_bitmap("b")  # the same thread may
        inside.set(); leave.wait()
thread = threading.Thread(target=hold); thread.start(); inside.wait()
pid = os.fork()
if pid == 0:
    with graph.locked():
        node.add_bitmap("c")
    os._exit(0 if list(node.bitmaps) == ["b", "c"] else 1)
assert os.waitpid(pid, 0)[1] == 0
leave.set(); thread.join()
with graph.locked():
    print(list(node.bitmaps))
"""
    assert run_python(code).strip() == "['b']"
