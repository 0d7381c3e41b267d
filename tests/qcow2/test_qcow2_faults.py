# SPDX-License-Identifier: MIT
"""Errors of the disk at every call: an exception that says why, the old state, a retry works."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Callable

import pytest
from images import FINE, LEAKS, Opened, asked, check, create, known, loaded, qemu_io
from qcow2_faults import Disk

from pybitmap import BlockGraph, StoreError
from pybitmap.store import Purpose, Qcow2Store
from pybitmap.store.qcow2.image import Directory, Image


def caught(call: Callable[[], None]) -> StoreError | None:
    try:
        call()
    except StoreError as error:
        return error
    return None


def is_of(disk: Disk, error: StoreError) -> bool:
    """Does it say what the disk said?"""
    said = "as the test wants it" in str(error) and isinstance(error.__cause__, OSError)
    return error.errno == disk.code and said


def refcounts_are_right(path: Path) -> bool:
    """At worst clusters leak. (Ours finds what `qemu-img check` finds, but for the disk's data.)"""
    with Opened(path):
        return True


FAULTS: dict[str, Callable[[], Disk]] = {
    "error": lambda: Disk(),
    "short": lambda: Disk(short=True),
    "space": lambda: Disk(errno.ENOSPC),
    "short-space": lambda: Disk(errno.ENOSPC, short=True),
    "lasting error": lambda: Disk(lasting=True),
    "no more space": lambda: Disk(errno.ENOSPC, lasting=True),
    "dropped": lambda: Disk(drops=True),
    "dropped for lack of space": lambda: Disk(errno.ENOSPC, drops=True),
}
OPTIONS = {"cluster_size": 512, "refcount_bits": 64}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = create(tmp_path_factory.mktemp("original") / "image", 3 << 20, **OPTIONS)
    with Opened(path) as image:
        image.add("a").set(5000, 90_000)
        image.add("b").set(0, image.volume.size)
    return path.read_bytes()


def change(image: Opened) -> None:
    image.remove("b")
    image.bitmaps["a"].set(1 << 20, 1 << 19)
    image.add("c", 4096).set(70_000, 1)


def test_a_fault_while_opening_leaves_the_image_as_it_was(tmp_path: Path, original: bytes) -> None:
    path = tmp_path / "image"
    path.write_bytes(original)
    before = loaded(path)
    for fault in FAULTS.values():
        for n in range(1, 1000):
            disk = fault()
            path.write_bytes(original)
            disk.fail_at = n
            error = caught(lambda: Opened(path, open_file=disk).volume.close())  # noqa: B023
            assert error is None or is_of(disk, error)
            if not disk.failed:
                break
            # Either the old, or marked as in use already.
            found = loaded(path)
            assert found.keys() == before.keys()
            assert all(value in (before[name], "inconsistent") for name, value in found.items())
            if n % 7 == 0:
                assert check(path) in (FINE, LEAKS)
        else:
            raise AssertionError("it never ends")


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("purpose", Purpose)
def test_a_fault_while_storing_leaves_the_old_state_and_can_be_retried(
    tmp_path: Path, original: bytes, fault: Callable[[], Disk], purpose: Purpose
) -> None:
    path, crashed = tmp_path / "image", tmp_path / "crashed"
    for n in range(1, 1000):
        disk = fault()
        path.write_bytes(original)
        image = Opened(path, open_file=disk)
        change(image)
        disk.calls, disk.fail_at = 0, n
        error = caught(lambda: image.change(purpose))  # noqa: B023
        if error is not None:
            assert is_of(disk, error)
            # As if the process ended now: the old bitmaps are there, and in use. What a switch has
            # written stays if the disk takes nothing back.
            crashed.write_bytes(path.read_bytes())
            found = loaded(crashed)
            assert found.keys() in ({"a", "b"}, {"a", "c"})
            if disk.lasting and purpose is Purpose.CLOSE and "c" in found:
                assert found == known(image)
            else:
                assert set(found.values()) == {"inconsistent"}
            if disk.drops or n % 9 == 0:
                assert check(crashed) in (FINE, LEAKS)
        elif not disk.failed:
            image.volume.close()
            break
        disk.fail_at, disk.lasting = -1, False
        # Whichever was on disk then is so until the switch.
        before = known(image)
        image.records.reverse()
        image.add("d").set(0, 50_000)
        image.bitmaps["a"].reset(0, 1 << 19)
        again = image.store.prepare(image.wanted(), Purpose.CLOSE)
        crashed.write_bytes(path.read_bytes())
        found = loaded(crashed)
        assert found.keys() in ({"a", "b"}, {"a", "c"})
        assert all(each in (before.get(name), "inconsistent") for name, each in found.items())
        assert refcounts_are_right(crashed)
        again.switch()
        image.volume.close()
        assert loaded(path) == known(image)
        if disk.drops or n % 9 == 0:
            assert check(path) in (FINE, LEAKS)
            assert asked(path) == known(image)
    else:
        raise AssertionError("it never ends")
    assert n > (2 if disk.drops else 3)


def test_a_full_disk_at_close_leaves_the_old_bitmaps_in_use(
    tmp_path: Path, original: bytes
) -> None:
    path = tmp_path / "image"
    path.write_bytes(original)
    disk = Disk(errno.ENOSPC, lasting=True)
    image = Opened(path, open_file=disk)
    image.bitmaps["a"].set(0, 1 << 20)
    disk.calls, disk.fail_at = 0, 1
    for _ in range(3):
        with pytest.raises(StoreError, match="as the test wants it") as caught:
            image.change(Purpose.CLOSE)
        assert caught.value.errno == errno.ENOSPC
    copy = tmp_path / "copy"
    copy.write_bytes(path.read_bytes())
    assert loaded(copy) == {"a": "inconsistent", "b": "inconsistent"}
    assert asked(copy) == loaded(copy)
    disk.fail_at, disk.lasting = -1, False
    image.close()
    assert loaded(path) == known(image)
    assert check(path) == FINE


@pytest.mark.parametrize("lasting", [False, True])
def test_faults_while_the_refcount_table_grows(tmp_path: Path, lasting: bool) -> None:
    path = create(tmp_path / "image", 1 << 30, **OPTIONS)
    crashed = tmp_path / "crashed"
    qemu_io(path, "write 0 1600k")
    original = path.read_bytes()
    for n in range(1, 1000):
        path.write_bytes(original)
        disk = Disk(lasting=lasting)
        image = Opened(path, open_file=disk)
        content = image.add("large")
        for start in range(0, content.size, 512 * 8 * 512):
            content.set(start, 512)
        disk.calls, disk.fail_at = 0, n
        error = caught(image.flush)
        disk.fail_at, disk.lasting = -1, False
        if error is not None:
            assert is_of(disk, error)
            # Now it has to be larger.
            for i in range(6):
                image.add(f"{i}").merge(content)
            disk.no_syncs = True
            assert caught(image.flush) is not None
            disk.no_syncs = False
            crashed.write_bytes(path.read_bytes())
            assert refcounts_are_right(crashed)
        image.close()
        assert loaded(path)["large"] == (content.count(), content.sha256())
        if n % 5 == 0:
            assert check(path) in (FINE, LEAKS)
            assert path.read_bytes()[48:60] != original[48:60], "it did not grow"
        if error is None:
            break
    else:
        raise AssertionError("it never ends")


def test_no_free_cluster_is_given_away_twice_after_an_abort(tmp_path: Path) -> None:
    path = create(tmp_path / "image", 3 << 20, **OPTIONS)
    image = Opened(path)
    for _ in range(3):
        image.add("a").set(0, 70_000)
        wanted = image.wanted()
        image.store.prepare(wanted, Purpose.FLUSH).abort()
        image.records.clear()
        image.add("b").set(0, 90_000)
        image.flush()
        image.records.clear()
    image.close()
    assert loaded(path) == {}
    assert check(path) == FINE


@pytest.mark.parametrize("killed", [True, False])
def test_a_close_that_is_interrupted_behind_its_switch_leaves_nothing_valid(
    killed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes on after it must be in use in the image again: its bits there grow old."""
    path = tmp_path / "image.qcow2"
    create(path, 1 << 20)
    graph = BlockGraph()
    node = graph.add_node("n", store=Qcow2Store(path))
    node.add_bitmap("b", 65536, persistent=True)
    switch = Image.switch

    def interrupted(image: Image, directory: Directory | None) -> None:
        monkeypatch.undo()
        switch(image, directory)
        raise KeyboardInterrupt

    monkeypatch.setattr(Image, "switch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        node.close()
    node.mark_dirty(0, 1)
    if killed:
        node.close(discard=True)
    else:
        node.close()
        assert check(path) in (FINE, LEAKS)
    with BlockGraph() as graph:
        bitmap = graph.add_node("n", store=Qcow2Store(path)).bitmaps["b"]
        assert (bitmap.inconsistent, bitmap.count()) == ((True, 0) if killed else (False, 65536))
