# SPDX-License-Identifier: MIT
"""Where writes wait, they sleep, hear signals, and never wait for themselves."""

from __future__ import annotations

import sys
import threading
import time
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest
from stores import PLACES, SIZE, Place
from support import run_python

from pybitmap import BlockGraph, BlockNode, StateError

pytestmark = pytest.mark.core

G = 512
FOLDERS = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]


def one(node: BlockNode) -> None:
    node.mark_dirty(G, 1)


def one_by_cffi(node: BlockNode) -> None:
    node.mark_dirty(offset=G, length=1)


def many(node: BlockNode) -> None:
    node.mark_dirty_many(array("Q", [G]), array("Q", [1]))


def a_write(node: BlockNode) -> None:
    with node.writing(G, 1):
        pass


MARKS = [one, one_by_cffi, many, a_write]


def held(node: BlockNode) -> Callable[[], None]:
    """Writes wait until what this gives is called."""
    node._device.hold()
    return lambda: node._coordinator._publish_exactly([node._device])


@pytest.mark.parametrize("kind", PLACES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("mark", MARKS, ids=lambda mark: mark.__name__)
def test_a_callback_of_close_that_writes_gets_an_error(
    mark: Callable[[BlockNode], None], kind: type[Place], tmp_path: Path
) -> None:
    place = kind(tmp_path)
    store = place.store()
    graph = BlockGraph()
    node = graph.add_node("n", SIZE, store)
    node.add_bitmap("b", G, persistent=True)
    node.mark_dirty(0, 1)
    errors: list[str] = []

    def progress(*_: object) -> None:
        with pytest.raises(StateError, match="closed by this very thread") as caught:
            mark(node)
        errors.append(str(caught.value))

    store.progress = progress
    graph.close()
    assert errors or kind.__name__ == "MemoryPlace"
    with BlockGraph() as graph:
        assert list(graph.add_node("n", None, place.store()).bitmaps["b"].areas()) == [(0, G)]


@pytest.mark.parametrize("mark", MARKS, ids=lambda mark: mark.__name__)
def test_another_thread_waits_and_is_not_lost(mark: Callable[[BlockNode], None]) -> None:
    node = BlockGraph().add_node("n", SIZE)
    bitmap = node.add_bitmap("b", G)
    release = held(node)
    thread = threading.Thread(target=mark, args=(node,))
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    assert not bitmap.get(G)
    release()
    thread.join()
    assert bitmap.get(G)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("mark", MARKS, ids=lambda mark: mark.__name__)
def test_whoever_waits_sleeps(mark: Callable[[BlockNode], None]) -> None:
    node = BlockGraph().add_node("n", SIZE)
    node.add_bitmap("b", G)
    mark(node)
    release = held(node)
    thread = threading.Thread(target=mark, args=(node,))
    thread.start()
    states = []
    for _ in range(40):
        time.sleep(0.005)
        status = Path(f"/proc/self/task/{thread.native_id}/stat").read_text()
        states.append(status.rpartition(")")[2].split()[0])
    release()
    thread.join()
    assert states.count("S") > 10, states  # who spins is never found asleep


SIGNALS = """
import signal, sys, threading
sys.path[:0] = {path!r}
from pybitmap import BlockGraph
from test_waiting import held, {mark} as mark

node = BlockGraph().add_node("n", 1 << 20)
bitmap = node.add_bitmap("b", 512)
mark(node)
bitmap.clear()
came = []

def handle(*_):
    came.append(bitmap.count())
    if len(came) == 3:
        {end}

signal.signal(signal.SIGALRM, handle)
release = held(node)
signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
try:
    mark(node)
except KeyboardInterrupt:
    came.append("interrupted")
signal.setitimer(signal.ITIMER_REAL, 0)
print(came[:4], bitmap.count())
release()
"""


@pytest.mark.parametrize("mark", MARKS, ids=lambda mark: mark.__name__)
def test_a_signal_handler_runs_in_a_wait_and_the_wait_goes_on(
    mark: Callable[[BlockNode], None],
) -> None:
    folder = Path(__file__).parent
    code = SIGNALS.format(
        path=[str(folder), str(folder.parent)], mark=mark.__name__, end="release()"
    )
    assert run_python(code).strip() == "[0, 0, 0] 512"


@pytest.mark.parametrize("mark", MARKS, ids=lambda mark: mark.__name__)
def test_a_handler_that_raises_ends_the_wait(mark: Callable[[BlockNode], None]) -> None:
    code = SIGNALS.format(path=FOLDERS, mark=mark.__name__, end="raise KeyboardInterrupt")
    assert run_python(code).strip() == "[0, 0, 0, 'interrupted'] 0"


def test_a_truncation_beside_many_writers_loses_nothing() -> None:
    node = BlockGraph().add_node("n", SIZE)
    bitmap = node.add_bitmap("b", G)
    count = SIZE // G

    def write(first: int) -> None:
        for i in range(first, count, 4):
            MARKS[i // 4 % 3](node) if i == 1 else node.mark_dirty(i * G, 1)

    threads = [threading.Thread(target=write, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    size = SIZE
    while any(thread.is_alive() for thread in threads):
        size += G
        node.truncate(size)
    for thread in threads:
        thread.join()
    assert bitmap.count() == SIZE
