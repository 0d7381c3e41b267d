# SPDX-License-Identifier: MIT
"""What is left of an image when the system crashes in the middle of a change."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Callable

import pytest
from images import FINE, LEAKS, Opened, asked, check, create, entries, loaded, qemu_io
from qcow2_crash import Recorder, crashes
from support import silent

from pybitmap import offline
from pybitmap.store import Purpose, Qcow2Store
from pybitmap.store.qcow2.bitmaps import IN_USE


def add_first(image: Opened) -> None:
    image.add("new").set(0, 70000)
    image.commit()


def add_another(image: Opened) -> None:
    image.add("another", 4096)
    image.commit()


def remove_one(image: Opened) -> None:
    image.remove("a")
    image.commit()


def remove_all(image: Opened) -> None:
    image.records.clear()
    image.commit()


def flush(image: Opened) -> None:
    image.bitmaps["a"].set(100_000, 200_000)
    image.flush()


def store(image: Opened) -> None:
    image.bitmaps["a"].set(100_000, 200_000)
    image.bitmaps["b"].reset_all()
    image.change(Purpose.CLOSE)


def store_much(image: Opened) -> None:
    content = image.add("large")
    for start in range(0, content.size, 512 * 8 * 512):
        content.set(start, 512)
    image.change(Purpose.CLOSE)


OPERATIONS = [add_first, add_another, remove_one, remove_all, flush, store]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda each: each.__name__)
@pytest.mark.parametrize(
    "options",
    [{"cluster_size": 512, "refcount_bits": 64}, {"cluster_size": 65536}],
    ids=["small", "default"],
)
def test_a_crash_leaves_the_old_the_new_or_inconsistent(
    tmp_path: Path, operation: Callable[[Opened], None], options: dict[str, int]
) -> None:
    path = create(tmp_path / "image", 3 << 20, **options)
    if operation is not add_first:
        with Opened(path) as image:
            image.add("a").set(5000, 90_000)
            image.add("b").set(0, image.volume.size)
    crash(tmp_path, path, operation)


@pytest.mark.parametrize(("data", "moves"), [("1k", False), ("1600k", True)])
def test_a_crash_while_the_refcounts_grow(tmp_path: Path, data: str, moves: bool) -> None:
    # 64 refcounts in a block, 64 blocks in the table: for 2 MiB, and they are nearly full or not.
    path = create(tmp_path / "image", 1 << 30, cluster_size=512, refcount_bits=64)
    qemu_io(path, f"write 0 {data}")
    before = path.read_bytes()[48:60]
    crash(tmp_path, path, store_much)
    assert (path.read_bytes()[48:60] != before) == moves


OFFLINE: dict[str, Callable[[Qcow2Store], None]] = {
    "add": lambda store: offline.add(store, (None, "new"), silent, granularity=512),
    "remove": lambda store: offline.remove(store, [(None, "a"), (None, "broken")], silent),
    "remove all": lambda store: offline.remove(
        store, [(None, name) for name in ("a", "b", "broken")], silent
    ),
    "clear": lambda store: offline.clear(store, [(None, "a"), (None, "b")], silent),
    "disable": lambda store: offline.enable(store, [(None, "a"), (None, "b")], False, silent),
    "merge": lambda store: offline.merge(store, (None, "a"), [(None, "b")], silent),
    "take": lambda store: offline.take(store, (None, "a"), "new", silent),
    "put back": lambda store: offline.put_back(store, (None, "b"), (None, "a"), silent),
    "repair": lambda store: offline.repair(store, [(None, "broken")], silent),
}


def all_of(path: Path) -> tuple[object, object]:
    return list(entries(path)), loaded(path)


@pytest.mark.parametrize(
    ("name", "foreign"),
    [*((name, False) for name in OFFLINE), *((name, True) for name in ("add", "remove", "repair"))],
)
def test_a_crash_while_no_program_has_it_open_leaves_the_old_or_the_new(
    tmp_path: Path, name: str, foreign: bool
) -> None:
    """No bitmap is in use, or inconsistent, that was not so before."""
    path = create(tmp_path / "image", 3 << 20, cluster_size=512, refcount_bits=64)
    with Opened(path) as image:
        image.add("a").set(5000, 90_000)
        image.add("b").set(0, image.volume.size)
        image.add("broken").set(0, 1)
    data = bytearray(path.read_bytes())
    if foreign:  # "autoclear_features": by a program that knows no bitmaps
        data[88:96] = bytes(8)
    else:
        [directory] = struct.unpack_from(">Q", data, data.index(b"\x23\x85\x28\x75") + 24)
        data[directory + 15] |= IN_USE  # the newest is first
    path.write_bytes(data)
    before, old = bytes(data), all_of(path)
    recorder = Recorder()
    store = Qcow2Store(path)
    store.open_file = recorder
    OFFLINE[name](store)
    new, rng, crashed = all_of(path), random.Random(0), tmp_path / "crashed"
    assert new != old
    states = list(crashes(before, recorder.take(), rng))
    asking_qemu = set(rng.sample(range(len(states)), min(len(states), 3)))
    for i, state in enumerate(states):
        crashed.write_bytes(state)
        assert all_of(crashed) in (old, new)
        if i in asking_qemu and not foreign:
            assert asked(crashed) == loaded(crashed)
            assert check(crashed) in (FINE, LEAKS)


def crash(tmp_path: Path, path: Path, operation: Callable[[Opened], None]) -> None:
    """Open, change, and look at everything that a crash can leave."""
    old, before = loaded(path), path.read_bytes()
    recorder = Recorder()
    image = Opened(path, open_file=recorder)
    opening = recorder.take()
    during = path.read_bytes()
    crashed = tmp_path / "crashed"
    crashed.write_bytes(during)
    opened = loaded(crashed)
    operation(image)
    image.volume.close()
    new = loaded(path)
    assert check(path) == FINE

    rng = random.Random(operation.__name__)
    states = [(each, old, opened) for each in crashes(before, opening, rng)]
    states += [(each, opened, new) for each in crashes(during, recorder.take(), rng)]
    asking_qemu = set(rng.sample(range(len(states)), min(len(states), 10)))
    for i, (data, earlier, later) in enumerate(states):
        crashed.write_bytes(data)
        found = loaded(crashed)
        assert found.keys() in (earlier.keys(), later.keys())
        for name, value in found.items():
            assert value in (earlier.get(name), later.get(name), "inconsistent")
        if i in asking_qemu:
            assert asked(crashed) == found
            assert check(crashed) in (FINE, LEAKS)
            # QEMU sees leaks beyond the end of the file only when the file is longer, which it may
            # be after the first time.
            assert check(crashed, "-r", "leaks") == FINE
            assert check(crashed) in (FINE, LEAKS)
            assert check(crashed, "-r", "leaks") == FINE
            assert check(crashed) == FINE
            assert loaded(crashed) == found
        # Whoever opens it next can work with it.
        with Opened(crashed, open_file=Recorder()) as again:
            again.add("later").set(0, 1 << 20)
        assert "later" in loaded(crashed)
        if i in asking_qemu:
            assert check(crashed) in (FINE, LEAKS)
