# SPDX-License-Identifier: MIT
"""Images that are read without a lock while others write: an answer, or "try again"."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from images import FINE, MIB, Opened, Unsynced, check, create, qemu_img
from peers import peer

from pybitmap import BlockGraph, LockedError, StoreError, UnsupportedError, offline
from pybitmap.store import Qcow2Store
from pybitmap.store.qcow2 import locks
from pybitmap.store.qcow2.file import File

State = dict[str, Any]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = create(tmp_path / "image", 16 * MIB, cluster_size=512)
    with Opened(path) as image:
        image.add("a").set(0, MIB - 512)
        image.add("b", 4096).set(0, MIB)
    return path


class Beside:
    """Opens files, and has something done before the n-th read of them (the first is 1)."""

    def __init__(self, n: int, act: Callable[[], object]) -> None:
        self.n, self.act, self.calls = n, act, 0

    def __call__(self, path: str, *, read_only: bool, lock: bool) -> File:
        beside = self

        class Watched(File):
            def _pread(self, nbytes: int, offset: int) -> bytes:
                beside.calls += 1
                if beside.calls == beside.n:
                    beside.act()
                return super()._pread(nbytes, offset)

        return Watched(path, read_only=read_only, lock=lock)


def unlocked(path: Path) -> Qcow2Store:
    return Qcow2Store(path, lock=False)


def load(store: Qcow2Store) -> State:
    volume = store.open("n", None, read_only=True)
    try:
        return {
            each.name: None if each.content is None else list(each.content.areas())
            for each in volume.load()
        }
    finally:
        volume.close()


def pieces(store: Qcow2Store) -> State:
    """As load."""
    volume = store.open("n", None, read_only=True)
    try:
        return {
            each.bitmap.name: None
            if each.bitmap.reason is not None
            else list(offline._joined(each.pieces()))
            for each in volume.read()
        }
    finally:
        volume.close()


def entries(store: Qcow2Store) -> State:
    [node] = store.entries()
    return {each.name: (each.granularity, each.enabled, each.reason) for each in node.bitmaps}


def whole(store: Qcow2Store) -> State:
    store.check()
    return {}


def rewrite(path: Path) -> None:
    """Often enough that clusters are used again, and every time with other bits in other places."""
    for step in range(3):
        with Opened(path) as image:
            image.remove("b")
            image.bitmaps["a"].set((2 + 3 * step) * MIB, MIB + 512 * step)
            image.add("b", 8192 << step).set(step * MIB, MIB)
            image.add(f"new {step}").set(0, 9 * MIB - 512)
            image.flush()
            image.bitmaps["b"].reset_all()
            image.remove(f"new {step}")


def qemu_rewrites(path: Path) -> None:
    for name in ("x", "y"):
        qemu_img("bitmap", "--add", path, name)
        qemu_img("bitmap", "--merge", "a", path, name)
    qemu_img("bitmap", "--remove", path, "a")
    qemu_img("bitmap", "--add", path, "z")


LOOKS: dict[str, Callable[[Qcow2Store], State]] = {
    "load": load,
    "read": pieces,
    "list": entries,
    "check": whole,
}


def answered(store: Qcow2Store, look: Callable[[Qcow2Store], State]) -> State | None:
    """None: "try again"."""
    try:
        return look(store)
    except StoreError as error:
        if str(error) != f"{store.path} changed while it was read: try again":
            raise
    return None


def answers(
    path: Path, look: Callable[[Qcow2Store], State], act: Callable[[Path], object]
) -> Iterator[tuple[int, State | None, State, State]]:
    """What is read if that happens before the n-th read, for all n; None: "try again". Also what it
    is before and afterwards."""
    image = path.read_bytes()
    n = 0
    while True:
        n += 1
        path.write_bytes(image)
        before = look(Qcow2Store(path))
        store = unlocked(path)
        beside = Beside(n, lambda: act(path))
        store.open_file = beside
        answer = answered(store, look)
        if beside.calls < n:
            return
        yield n, answer, before, look(Qcow2Store(path))
        assert look(unlocked(path)) == look(Qcow2Store(path)), "the next try"


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_whatever_comes_between_two_reads_is_an_answer_or_to_be_tried_again(
    path: Path, look: Callable[[Qcow2Store], State]
) -> None:
    refused = []
    for n, answer, before, after in answers(path, look, rewrite):
        if answer is None:
            refused.append(n)
        else:
            assert answer in (before, after), n
    assert refused
    assert check(path) == FINE


def test_without_a_second_look_the_answer_is_a_mixture(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So what the test above watches is not there by itself."""
    monkeypatch.setattr(File, "check_unchanged", lambda self: None)
    try:
        found = list(answers(path, load, rewrite))
    except StoreError:  # damage, where there is none
        return
    assert any(answer not in (before, after) for _, answer, before, after in found)


def test_beside_qemu_it_is_the_same(path: Path) -> None:
    found = list(answers(path, load, qemu_rewrites))
    assert any(answer is None for _, answer, *_ in found)
    for n, answer, before, after in found:
        assert answer in (None, before, after), n


def test_real_damage_is_told_as_such(path: Path) -> None:
    with Opened(path, read_only=True) as image:
        directory = image.volume._image.directory
    assert directory is not None
    data = bytearray(path.read_bytes())
    data[directory.offset + 18 : directory.offset + 20] = b"\xff\xff"
    path.write_bytes(data)
    with pytest.raises(StoreError, match="too short for its entries"):
        entries(unlocked(path))


@contextmanager
def writing(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that rewrites the directory as fast as it can."""
    tool = peer("qemu-img", "qemu-utils")
    step = 'for c in "--add -g 512" "--merge a" "--remove"; do "$0" bitmap $c "$1" x; done'
    loop = f"while :; do {step}; done"
    process = subprocess.Popen(
        ["sh", "-c", loop, tool, path], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_beside_a_loop_of_changes_every_answer_is_one(path: Path) -> None:
    before = load(Qcow2Store(path))
    turns, there = 0, False
    with writing(path) as process:
        while turns < 10:
            state = answered(unlocked(path), load)
            if state is None:
                continue
            if there is not ("x" in state):
                turns, there = turns + 1, not there
            assert state.pop("x", None) in (None, [], before["a"])
            for name, areas in state.items():
                assert areas in (None, before[name])
            assert process.poll() is None


@contextmanager
def guest(path: Path) -> Iterator[Callable[[str], None]]:
    """A machine whose guest does what it is told."""
    process = subprocess.Popen(
        [peer("qemu-io", "qemu-utils"), path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    told, said = process.stdin, process.stdout

    def act(command: str) -> None:
        told.write(f"{command}\n")
        told.flush()
        while "ops; " not in said.readline():
            assert process.poll() is None

    try:
        act("read 0 512")  # it is open then
        yield act
    finally:
        process.communicate("quit\n", timeout=60)


@pytest.mark.parametrize("lazy_refcounts", ["off", "on"])
def test_a_guest_that_writes_disturbs_nobody(tmp_path: Path, lazy_refcounts: str) -> None:
    path = create(tmp_path / "image", 64 * MIB, cluster_size=512, lazy_refcounts=lazy_refcounts)
    with Opened(path) as image:
        image.add("a").set(0, MIB)
    with guest(path) as act:
        for look in LOOKS.values():
            expected = look(unlocked(path))
            for n in count(1):
                store = unlocked(path)
                beside = Beside(n, lambda: act(f"write {n % 64}M {n}k"))  # noqa: B023
                store.open_file = beside
                assert look(store) == expected
                if beside.calls < n:
                    break
    assert load(unlocked(path))["a"] is not None
    assert check(path) == FINE


def test_a_reader_without_a_lock_goes_its_own_way(path: Path) -> None:
    """Twice in one process, and dropped: nobody is kept off, and nothing is left."""
    with BlockGraph() as graph, BlockGraph() as reader:
        disk = graph.add_node("disk", store=Qcow2Store(path))
        disk.bitmaps["a"].set(4 * MIB, MIB)
        store = unlocked(path)
        node = reader.add_node("disk", store=store, read_only=True)
        assert node.bitmaps["a"].inconsistent
        with pytest.raises(StoreError, match="open for node"):
            BlockGraph().add_node("disk", store=store, read_only=True)
    assert load(unlocked(path))["a"] == [(0, MIB - 512), (4 * MIB, MIB)]


def test_other_systems_do_without_locks_if_told_so(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "sys", SimpleNamespace(platform="darwin"))
    for read_only in (True, False):
        with pytest.raises(UnsupportedError, match=r"on Linux only; --no-lock .*lock=False"):
            Qcow2Store(path).open("n", None, read_only=read_only)
    before = load(unlocked(path))
    with BlockGraph() as graph:
        disk = graph.add_node("disk", store=unlocked(path))
        disk.bitmaps["b"].clear()
        with pytest.raises(LockedError, match="already"):
            unlocked(path).open("n", None, read_only=False)
    assert load(unlocked(path)) == {**before, "b": []}


def test_a_writer_without_need_of_a_lock_has_one(path: Path) -> None:
    store = unlocked(path)
    store.open_file = Unsynced
    volume = store.open("n", None, read_only=False)
    with pytest.raises(StoreError, match="already"):
        Qcow2Store(path).open("n", None, read_only=True)
    volume.close()
