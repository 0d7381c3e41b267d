# SPDX-License-Identifier: MIT
"""A fork: stores are the parent's, and a child neither stores nor unlocks nor marks anything."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest
from stores import SIZE, LocalPlace, Place, Qcow2Place
from support import beside_malloc, run_python

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
    except SystemExit:
        pass
    except BaseException as error:
        os.write(2, repr(error).encode())
        os._exit(1)
    os._exit(0)
assert not {waits} or os.waitpid(pid, 0)[1] == 0
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
    "and its own child are refused": f"os.waitpid(pid, 0) if (pid := os.fork()) else None{REFUSED}",
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


@pytest.mark.skipif(sys.implementation.name == "pypy", reason="PyPy does not bear a fork by C")
def test_a_child_that_python_does_not_know_of_takes_nothing_from_the_stores(store: str) -> None:
    """A fork by C: whatever it does but mark (see docs/promises.md), refused or in its own memory,
    its parent has what it had."""
    child = """
        for call in (bitmap.clear, node.flush, bitmap.freeze, lambda: node.truncate(4096),
                     lambda: node.add_bitmap("c", 4096, persistent=True),
                     lambda: node.remove_bitmap("b"), node.close, graph.close):
            try:
                call()
            except BitmapError:
                pass
"""
    before = "import ctypes; from pybitmap import BitmapError; os.fork = ctypes.PyDLL(None).fork"
    code = PROGRAM.format(store=store, before=before, child=child.strip(), waits=True)
    assert run_python(code).strip() == "ok"


KILLED = """
import os, signal, sys
from pybitmap import BlockGraph
from pybitmap.store import LocalStore, Qcow2Store
parent = os.fork()
if parent:
    assert os.waitpid(parent, 0)[1] == signal.SIGKILL
    # The child that was left may still be there, and holds nothing.
    with BlockGraph() as graph:
        bitmap = graph.add_node("n", None, {store}).bitmaps["b"]
        print(bitmap.reason is not None or sorted(bitmap.areas()))
    sys.exit()
out = os.open(os.devnull, os.O_WRONLY)
os.dup2(out, 1); os.dup2(out, 2)  # not to be waited for
graph = BlockGraph()
graph.__enter__()
node = graph.add_node("n", None, {store})
node.mark_dirty(0, 1)
ready, go = os.pipe()
begun, begin = os.pipe()
pid = os.fork()
if pid == 0:
    os.close(go)
    os.write(begin, b"x")
    signal.alarm(20)
    if not {first}:
        os.read(ready, 1)  # until the parent is killed
    {child}
    os._exit(0)
os.read(begun, 1)
if {first}:
    os.waitpid(pid, 0)
node.mark_dirty(8192, 1)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("first", [True, False], ids=["before the kill", "after it"])
@pytest.mark.parametrize("child", ["leaves the block", "exits", "drops all"])
def test_what_a_killed_parent_marked_is_not_lost_by_its_child(
    child: str, first: bool, store: str
) -> None:
    ends = CHILDREN[child].strip()
    code = KILLED.format(store=store, first=first, child=ends.replace("\n    ", "\n"))
    expected = "True" if "Qcow2" in store else "[(0, 4096), (8192, 4096)]"
    assert run_python(code).strip() == expected


def test_a_program_that_becomes_a_daemon_inside_the_block_is_told(store: str) -> None:
    code = f"""
import os, time
from pybitmap import BlockGraph, StateError
from pybitmap.store import LocalStore, Qcow2Store
reading, writing = os.pipe()
if os.fork() == 0:
    os.close(reading)
    try:
        with BlockGraph() as graph:
            node = graph.add_node("n", None, {store})
            node.mark_dirty(0, 1)
            parent = os.getpid()
            if os.fork():
                os._exit(0)  # as a program does that goes to the background
            os.setsid()
            while os.getppid() == parent:
                time.sleep(0.01)
            node.mark_dirty(4096, 1)
    except StateError as error:
        # Now it does as it was told: stores of its own.
        with BlockGraph() as graph:
            bitmap = graph.add_node("n", None, {store}).bitmaps["b"]
            found = bitmap.reason is not None or list(bitmap.areas())
        os.write(writing, f"{{found}} {{error}}".encode())
    os._exit(0)
os.close(writing); os.wait()
print(os.read(reading, 1000).decode())
"""
    told = run_python(code)
    assert told.startswith("True" if "Qcow2" in store else "[(0, 4096)]"), told
    assert "opens them after that" in told


def test_a_child_does_not_take_back_what_sqlite_had_begun(tmp_path: Path) -> None:
    code = f"""
import os, pathlib, sys
from pybitmap import BlockGraph
from pybitmap.store import LocalStore
path = pathlib.Path({str(tmp_path / "store")!r})
store = LocalStore(path)
graph = BlockGraph()
node = graph.add_node("n", 1 << 20, store)
node.add_bitmap("b", persistent=True)
def look():
    return [(each.name, each.read_bytes()) for each in sorted(path.iterdir())]
catalog = store._catalog
def change():
    catalog._execute("UPDATE bitmap SET name = 'c'")
    before = look()
    if os.fork() == 0:
        sys.exit()
    os.wait()
    print(before == look())
catalog.transaction(change)
"""
    assert run_python(code).strip() == "True"


def test_a_child_does_not_commit_the_transaction_that_was_open(store: str) -> None:
    code = PROGRAM.format(
        store=store,
        before="tx = graph.transaction(); tx.__enter__().clear('n', 'b')",
        child="""
        try:
            tx.__exit__(None, None, None)
        except StateError as error:
            assert "parent" in str(error)
        else:
            raise AssertionError("it was committed")
""".strip(),
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


@beside_malloc
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
for i in range(2000 if sys.implementation.name == "cpython" else 300):  # PyPy's take long
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


def test_a_write_in_a_child_does_not_wait_for_a_truncation_of_another_thread() -> None:
    code = """
import os, signal, threading
from pybitmap import BlockGraph
from pybitmap.block import commit
graph = BlockGraph(); node = graph.add_node("n", 1 << 20); bitmap = node.add_bitmap("b", 4096)
inside = threading.Event(); leave = threading.Event()
switch = commit.Resized.switch
def slowly(self):  # writes wait meanwhile
    inside.set(); leave.wait()
    return switch(self)
commit.Resized.switch = slowly
thread = threading.Thread(target=node.truncate, args=(1 << 21,)); thread.start(); inside.wait()
pid = os.fork()
if pid == 0:
    signal.alarm(20)
    node.mark_dirty(0, 1)
    node.mark_dirty(4096, 1)
    commit.Resized.switch = switch
    node.truncate(1 << 22)
    node.mark_dirty(1 << 21, 1)
    os._exit(0 if list(bitmap.areas()) == [(0, 8192), (1 << 21, 4096)] else 1)
assert os.waitpid(pid, 0)[1] == 0
leave.set(); thread.join()
node.mark_dirty(1 << 20, 1)
print(node.size, list(bitmap.areas()))
"""
    assert run_python(code).strip() == "2097152 [(1048576, 4096)]"


def test_a_handler_that_forks_in_a_change_of_its_own_thread_leaves_both_whole() -> None:
    code = """
import os, random, signal
from pybitmap import BlockGraph
graph = BlockGraph(); node = graph.add_node("n", 1 << 20); bitmap = node.add_bitmap("b", 4096)
children, child = [], False
def fork(*_):
    global child
    if len(children) < 20 and not child:
        pid = os.fork()
        if pid == 0:
            child = True  # for good: the handler may come again before this line
        elif not child:
            children.append(pid)
signal.signal(signal.SIGALRM, fork)
while not child and len(children) < 20:
    signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 3e-4))  # once
    node.mark_dirty(0, 1)
    with graph.transaction() as tx:
        tx.add("n", "c")
        tx.merge("n", "c", ["b"])
        tx.clear("n", "b")
    found = node.bitmaps["c"].count(), bitmap.count()
    node.remove_bitmap("c")
    assert found == (65536, 0), found
signal.setitimer(signal.ITIMER_REAL, 0)
with graph.locked():
    node.mark_dirty(0, 1)
assert bitmap.count() == 4096
if child:
    graph.close()
    os._exit(0)
print([os.waitpid(pid, 0)[1] for pid in children] == [0] * 20)
"""
    assert run_python(code).strip() == "True"


@pytest.mark.parametrize("held", [False, True])
def test_a_block_that_was_made_before_the_fork_is_the_childs_own(held: bool) -> None:
    """Also if another thread had the lock at the fork; and nobody else comes in meanwhile."""
    code = f"""
import os, signal, threading
from pybitmap import BlockGraph
graph = BlockGraph(); node = graph.add_node("n", 1 << 20); node.add_bitmap("b", 4096)
block, inside, leave = graph.transaction(), threading.Event(), threading.Event()
def hold():
    with graph.locked():
        inside.set(); leave.wait()
if {held}:
    threading.Thread(target=hold).start(); inside.wait()
pid = os.fork()
if pid == 0:
    signal.alarm(20)
    came = threading.Event()
    def add():
        node.add_bitmap("other", 4096); came.set()
    with block as tx:
        tx.add("n", "c")
        thread = threading.Thread(target=add); thread.start()
        assert not came.wait(0.1)
        tx.remove("n", "b")
    thread.join()
    assert sorted(node.bitmaps) == ["c", "other"]
    os._exit(0)
leave.set()
print(os.waitpid(pid, 0)[1])
"""
    assert run_python(code).strip() == "0"


BESIDE_CHANGES = """
import collections, os, signal, sys, threading
from pybitmap import BlockGraph
graph = BlockGraph(); node = graph.add_node("n", 1 << 43); b = node.add_bitmap("b", 65536)
other = graph.add_node("m", 1 << 20); other.add_bitmap("x", 512)
running = True
def change():
    while running:
        {change}
def write():
    while running:
        node.mark_dirty(0, 1 << 43)
threads = [threading.Thread(target=each) for each in (change, write)]
for thread in threads:
    thread.start()
ends = collections.Counter()
for _ in range(60):
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        for k in range(10):
            node.add_bitmap(f"c{{k}}", 1 << 20); node.mark_dirty(0, 1)
            assert node.bitmaps[f"c{{k}}"].count() == 1 << 20
            node.remove_bitmap(f"c{{k}}")
        other.mark_dirty(0, 1)
        assert other.bitmaps["x"].count() or not other.bitmaps["x"].enabled
        graph.close()
        os._exit(0)
    ends[os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])] += 1
running = False
for thread in threads:
    thread.join()
print(dict(ends))
"""

FREEZES = """
        with b.freeze() as frozen:
            frozen.done()
"""
TURNS = """
        with graph.transaction() as tx:
            tx.disable("n", "b"); tx.disable("m", "x")
        with graph.transaction() as tx:
            tx.enable("n", "b"); tx.enable("m", "x")
"""


@beside_malloc
@pytest.mark.parametrize("change", [FREEZES, TURNS], ids=["one node", "two nodes"])
def test_what_another_thread_was_publishing_is_published_in_the_child(change: str) -> None:
    assert run_python(BESIDE_CHANGES.format(change=change.strip())).strip() == "{0: 60}"


AMID = """
import os, signal, sys, time
from pybitmap import BlockGraph, BitmapError
from pybitmap.store import LocalStore, Qcow2Store
graph = BlockGraph()
node = graph.add_node("n", None, {store})
bitmap = node.bitmaps["b"]
node.mark_dirty(0, 1)
child = None
def fork(*_):
    global child
    child = os.fork() == 0
    if child:
        signal.alarm(20); time.sleep(0.2)
lines = 0
def trace(frame, event, arg):
    global lines
    if "pybitmap" not in frame.f_code.co_filename:
        return None
    if event == "line" and child is None:
        lines += 1
        if lines == {at}:
            fork()
    return trace
sys.settrace(trace)
error = None
try:
    {change}
except BitmapError as caught:
    error = caught
sys.settrace(None)
if child:
    try:
        node.mark_dirty(65536, 1)
    except BitmapError:
        os._exit(0)
    os._exit(1)
assert error is None, repr(error)
if child is None:
    print("end"); sys.exit()
assert os.wait()[1] == 0, "the child's mark was accepted"
closed = {change!r} == "graph.close()"
if not closed:
    node.mark_dirty(8192, 1)
    graph.close()
with BlockGraph() as graph:
    bitmap = graph.add_node("n", None, {store}).bitmaps["b"]
    assert bitmap.reason is None, bitmap.reason
    found = {{offset for offset, _ in bitmap.areas()}}
expected = {{0}} if closed else {{8192}} if "clear" in {change!r} else {{0, 8192}}
assert found == expected, found
print("ok")
"""


@pytest.mark.parametrize(
    "change", ["bitmap.clear()", "bitmap.disable(); bitmap.enable()", "graph.close()"]
)
def test_a_fork_amid_a_change_of_its_own_thread_leaves_the_parents_store_alone(
    change: str, store: str
) -> None:
    """As a progress callback does it, or a signal handler."""
    for _ in range(4):
        code = AMID.format(store=store, at=random.randrange(1, 700), change=change)
        assert run_python(code).strip() in ("ok", "end")


@beside_malloc
def test_a_child_that_cannot_use_sqlite_is_told(tmp_path: Path) -> None:
    code = f"""
import os, signal, sys, threading, time
from pybitmap import BlockGraph, StoreError
from pybitmap.store import LocalStore
graph = BlockGraph(); node = graph.add_node("n", 1 << 20, LocalStore({str(tmp_path / "p")!r}))
bitmap = node.add_bitmap("b", 4096, persistent=True)
running = True
def change():
    while running:
        bitmap.disable(); bitmap.enable()
thread = threading.Thread(target=change); thread.start()
sys.setswitchinterval(1e-5)
found = set()
end = time.monotonic() + 60
number = 0
while (number < 40 or 3 not in found) and time.monotonic() < end:
    number += 1
    pid = os.fork()
    if pid == 0:
        signal.alarm(10)
        code = 1
        try:
            with BlockGraph() as own:
                store = LocalStore({str(tmp_path)!r} + f"/{{os.getpid()}}")
                own.add_node("n", 1 << 20, store).add_bitmap("x", persistent=True)
            code = 0
        except StoreError as error:
            code = 3 if "another thread of its parent" in str(error) else 1
        finally:
            os._exit(code)
    found.add(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
running = False; thread.join(); graph.close()
print(sorted(found - {{0}}))
"""
    assert run_python(code).strip() == "[3]"


def test_a_write_of_a_child_does_not_wait_for_another_threads_before() -> None:
    code = """
import os, signal, threading
from pybitmap import BlockGraph
graph = BlockGraph(); node = graph.add_node("n", 1 << 20); bitmap = node.add_bitmap("b", 4096)
node.mark_dirty(0, 1); node.mark_dirty(65536, 1)
inside = threading.Event(); leave = threading.Event()
def before(*_):
    inside.set(); leave.wait()
frozen = bitmap.freeze()
def write():
    with node.writing(0, 1, before=before):
        pass
thread = threading.Thread(target=write); thread.start(); inside.wait()
pid = os.fork()
if pid == 0:
    signal.alarm(20)
    with node.writing(65536, 1, before=lambda *_: None):
        pass
    os._exit(0)
print(os.waitpid(pid, 0)[1])
leave.set(); thread.join(); frozen.close()
"""
    assert run_python(code).strip() == "0"


@beside_malloc
def test_a_torn_bitmap_is_refused_and_all_else_goes_on() -> None:
    code = """
import os, threading, time
from pybitmap import BlockGraph, StateError
graph = BlockGraph(); node = graph.add_node("n", 1 << 33); bad = node.add_bitmap("bad", 512)
other = graph.add_node("m", 1 << 20); other.add_bitmap("x", 4096)
running = True
def change():
    while running:
        bad.set(0, 1 << 33); bad.reset(0, 1 << 33)
thread = threading.Thread(target=change); thread.start(); time.sleep(0.1)
while True:  # until the fork meets the reset
    pid = os.fork()
    if pid == 0:
        try:
            bad.count()
        except StateError:
            break
        os._exit(1)
    status = os.waitpid(pid, 0)[1]
    if status != 256:
        break
if pid == 0:
    def freeze():
        with bad.freeze():
            pass
    def merge():
        with graph.transaction() as tx:
            tx.merge("n", "good", ["bad"])
    node.add_bitmap("good", 1 << 20)
    for call in (freeze, merge, bad.clear, bad.drain, bad.sha256, lambda: list(bad.areas())):
        try:
            call()
        except StateError:
            continue
        os._exit(2)
    node.mark_dirty(0, 1)
    other.add_bitmap("y", 4096); other.bitmaps["x"].clear(); other.mark_dirty(0, 1)
    assert other.bitmaps["y"].count() == 4096 and node.bitmaps["good"].count() == 1 << 20
    with graph.freeze([node.bitmaps["good"], other.bitmaps["y"]]) as frozen:
        frozen.done()
    graph.close()
    os._exit(0)
running = False; thread.join()
print(status)
"""
    assert run_python(code).strip() == "0"


def test_at_the_limit_of_descriptors_a_child_keeps_no_lock(tmp_path: Path) -> None:
    code = f"""
import os, resource, signal, time
from pybitmap import BlockGraph
from pybitmap.store import LocalStore
path = {str(tmp_path / "s")!r}
parent = os.fork()
if parent == 0:
    graph = BlockGraph(); node = graph.add_node("n", 1 << 20, LocalStore(path))
    node.add_bitmap("b", 4096, persistent=True)
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
    reading, writing = os.pipe()
    keep = []
    try:
        while True:
            keep.append(os.open("/dev/null", 0))
    except OSError:
        pass
    if os.fork() == 0:
        os.write(writing, b"x"); os.close(1); os.close(2); time.sleep(5); os._exit(0)
    os.read(reading, 1)
    os.kill(os.getpid(), signal.SIGKILL)
os.waitpid(parent, 0)
with BlockGraph() as graph:
    print(list(graph.add_node("n", None, LocalStore(path)).bitmaps))
"""
    assert run_python(code).strip() == "['b']"
