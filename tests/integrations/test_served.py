# SPDX-License-Identifier: MIT
"""What nbdkit's plugin serves, without nbdkit: marks, failures on the way, and the end."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable

import pytest
from support import collect

from pybitmap import BitmapError, BlockGraph, InvalidError, StateError, StoreError
from pybitmap.errors import UnsupportedError
from pybitmap.integrations import raw_disk
from pybitmap.integrations.served import Parameters, ServedDisk, checked, parse_bitmap
from pybitmap.store import LocalStore

SIZE = 1 << 20
BLOCK = 4096

CHANGES: dict[str, Callable[[ServedDisk, int, int], None]] = {
    "write": lambda served, offset, nbytes: served.write(b"n" * nbytes, offset),
    "zero": lambda served, offset, nbytes: served.zero(offset, nbytes, may_trim=True),
    "trim": lambda served, offset, nbytes: served.trim(offset, nbytes),
}


@pytest.fixture
def parameters(tmp_path: Path) -> Parameters:
    (tmp_path / "disk.raw").write_bytes(b"o" * SIZE)
    return Parameters(
        disk=str(tmp_path / "disk.raw"),
        store=str(tmp_path / "store"),
        bitmaps={"daily": BLOCK},
    )


@pytest.fixture
def served(parameters: Parameters) -> Iterator[ServedDisk]:
    served = ServedDisk(parameters, report=print)
    yield served
    served.close()


def areas(served: ServedDisk) -> list[tuple[int, int]]:
    return list(served.node.bitmaps["daily"].areas())


def stored(parameters: Parameters) -> list[tuple[int, int]]:
    with BlockGraph() as graph:
        node = graph.add_node("disk", store=LocalStore(parameters.store))
        return list(node.bitmaps["daily"].areas())


def test_a_bitmap_that_is_new_is_told(parameters: Parameters) -> None:
    """It knows nothing of what the disk has; so is one whose store was lost."""
    reports: list[str] = []
    for _ in range(2):
        ServedDisk(parameters, reports.append).close()
    assert reports == ["bitmap 'daily' is new, and clean: the first copy is one of all the disk"]
    shutil.rmtree(parameters.store)
    ServedDisk(parameters, reports.append).close()
    assert len(reports) == 2


# ---- changes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_marked_before_it_is_made_and_after_what_freezes_meanwhile(
    served: ServedDisk, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    made = getattr(served.disk, change)
    seen: list[list[tuple[int, int]]] = []

    def beside(*args: Any, **options: Any) -> None:
        seen.append(areas(served))  # what a kill would leave
        with served.node.bitmaps["daily"].freeze() as frozen:
            frozen.done()  # a copy of the old data
        with suppress(UnsupportedError):  # as the file system has it
            made(*args, **options)

    monkeypatch.setattr(served.disk, change, beside)
    CHANGES[change](served, 5000, 5000)
    assert seen == [[(BLOCK, 2 * BLOCK)]]
    assert areas(served) == [(BLOCK, 2 * BLOCK)]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_fails_is_marked(
    served: ServedDisk, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    def full(*args: Any, **options: Any) -> None:
        with served.node.bitmaps["daily"].freeze() as frozen:
            frozen.done()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(served.disk, change, full)
    with pytest.raises(OSError, match="No space left"):
        CHANGES[change](served, 0, 1)
    assert areas(served) == [(0, BLOCK)]


def test_short_reads_and_writes_go_on(served: ServedDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:7], at))
    monkeypatch.setattr(os, "preadv", lambda fd, data, at: preadv(fd, [data[0][:5]], at))
    data = bytes(range(100))
    served.write(data, 33)
    found = bytearray(100)
    served.read(found, 33)
    assert found == data


def test_zeroes_that_only_writing_makes_are_left_to_who_asked(
    served: ServedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(fd: int, mode: int, offset: int, nbytes: int) -> int:
        ctypes.set_errno(errno.EOPNOTSUPP)
        return -1

    monkeypatch.setattr(raw_disk, "_fallocate", cannot)
    with pytest.raises(UnsupportedError, match="have to be written"):
        served.zero(0, 1, may_trim=True)
    served.trim(0, 1)  # need do nothing


def test_an_interrupted_call_is_made_again_and_a_failure_is_told(
    served: ServedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = [errno.EINTR, errno.EINTR, errno.EIO]

    def fails(fd: int, mode: int, offset: int, nbytes: int) -> int:
        ctypes.set_errno(codes.pop(0))
        return -1

    monkeypatch.setattr(raw_disk, "_fallocate", fails)
    with pytest.raises(OSError, match="Input/output") as caught:
        served.trim(0, 1)
    assert caught.value.errno == errno.EIO
    assert not codes


def test_where_nobody_knows_holes_all_is_data(
    served: ServedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    seek = os.lseek

    def lseek(fd: int, offset: int, what: int) -> int:
        if what == os.SEEK_END:
            return seek(fd, offset, what)
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "lseek", lseek)
    assert list(served.extents(10, 100)) == [(10, 100, False)]


# ---- the end ------------------------------------------------------------------------------------


def test_the_disk_is_synced_before_the_bitmaps_are_stored(
    served: ServedDisk, parameters: Parameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a crash right after an orderly end loses data that was copied and is clean."""
    order: list[str] = []

    def noted(name: str, call: Callable[[], None]) -> Callable[[], None]:
        def noting() -> None:
            order.append(name)
            call()

        return noting

    monkeypatch.setattr(served.disk, "sync", noted("disk", served.disk.sync))
    monkeypatch.setattr(served.graph, "close", noted("store", served.graph.close))
    served.close()
    served.close()
    assert order == ["disk", "store"]


def test_a_disk_that_does_not_take_its_data_is_told_and_the_bitmaps_are_stored(
    served: ServedDisk, parameters: Parameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sync() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    served.write(b"x", 0)
    monkeypatch.setattr(served.disk, "sync", sync)
    with pytest.raises(OSError, match="Input/output"):
        served.close()
    # What of it the disk has lost, nobody knows, and a copy may have it.
    assert stored(parameters) == [(0, SIZE)]


def test_a_sync_that_failed_once_leaves_all_dirty(
    served: ServedDisk, parameters: Parameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel says once that it has lost something, and the next sync succeeds."""
    with monkeypatch.context() as failing:
        failing.setattr(os, "fdatasync", lambda fd: os.close(-1))
        with pytest.raises(OSError, match="Bad file descriptor"):
            served.sync()
    served.close()
    assert stored(parameters) == [(0, SIZE)]


@pytest.mark.parametrize("other", ["deleted", "replaced"])
def test_a_disk_that_is_not_at_its_path_any_more_is_told(
    served: ServedDisk, parameters: Parameters, other: str
) -> None:
    os.remove(parameters.disk)
    if other == "replaced":
        with open(parameters.disk, "wb") as file:
            file.truncate(SIZE)
    with pytest.raises(OSError, match="was deleted, renamed or replaced"):
        served.sync()
    with pytest.raises(OSError, match="was deleted, renamed or replaced"):
        served.close()
    assert stored(parameters) == [(0, SIZE)]


def test_a_disk_that_was_cut_short_has_neither_holes_nor_zeroes_there(served: ServedDisk) -> None:
    os.truncate(served.disk.path, BLOCK)
    for call in (
        lambda: list(served.extents(0, 2 * BLOCK)),
        lambda: served.zero(BLOCK, BLOCK, may_trim=True),
        lambda: served.trim(BLOCK, BLOCK),
        served.sync,
    ):
        with pytest.raises(OSError, match="cut short"):
            call()
    assert list(served.extents(0, BLOCK))
    os.truncate(served.disk.path, SIZE)


@pytest.mark.parametrize("kind", ["a link to nothing", "writable by others"])
def test_a_store_that_cannot_be_made_is_found_before_a_fork(
    parameters: Parameters, kind: str
) -> None:
    if kind == "a link to nothing":
        os.symlink("nothing", parameters.store)
    else:
        os.mkdir(parameters.store)
        os.chmod(parameters.store, 0o777)
    with pytest.raises((OSError, BitmapError)):
        checked(parameters)


def test_several_errors_at_the_end_are_all_told(
    parameters: Parameters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[str] = []
    served = ServedDisk(parameters, reports.append)
    reports.clear()

    def sync() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(served.disk, "sync", sync)
    os.rename(parameters.store, tmp_path / "away")
    with pytest.raises(OSError, match="Input/output"):
        served.close()
    assert len(reports) == 1
    assert parameters.store in reports[0]


def test_what_fails_while_it_is_opened_leaves_nothing_open(parameters: Parameters) -> None:
    parameters.qmp = parameters.disk
    for _ in range(2):
        with pytest.raises(FileExistsError):
            ServedDisk(parameters, report=print)
    parameters.qmp = None
    ServedDisk(parameters, report=print).close()


def test_the_child_of_a_fork_is_refused(served: ServedDisk, parameters: Parameters) -> None:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            served.write(b"child", 0)
        except StateError:
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    served.write(b"x", 2 * BLOCK)
    assert areas(served) == [(2 * BLOCK, BLOCK)]
    assert Path(parameters.disk).read_bytes()[:1] == b"o"


def test_one_that_is_dropped_gives_its_disk_and_its_store_back(parameters: Parameters) -> None:
    kept = [ServedDisk(parameters, report=print)]
    kept[0].write(b"x", 0)

    def drop() -> None:
        kept.clear()
        collect()

    with pytest.warns(ResourceWarning):
        drop()
    again = ServedDisk(parameters, report=print)
    assert areas(again) == [(0, BLOCK)]
    again.close()


# ---- parameters ---------------------------------------------------------------------------------


def test_names_may_have_commas() -> None:
    assert parse_bitmap("a,b") == ("a,b", None)
    assert parse_bitmap("a,granularity=1,granularity=64K") == ("a,granularity=1", 65536)


@pytest.mark.parametrize("text", ["a,granularity=", "a,granularity=256", "a,granularity=1Z"])
def test_what_is_no_granularity_is_refused(text: str) -> None:
    with pytest.raises(InvalidError, match="granularity"):
        parse_bitmap(text)


def test_what_is_checked_before_a_fork_makes_no_store(parameters: Parameters) -> None:
    checked(parameters)
    assert not os.path.exists(parameters.store)


def test_parameters_as_words_are_the_same_in_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["disk=a=b", "store=s", "node=n", "bitmap=a,granularity=4K", "bitmap=b"]
    parameters = Parameters.of([*words, "bitmap=c,granularity=1,granularity=512", "qmp=q"])
    monkeypatch.chdir(tmp_path)
    assert Parameters.of(parameters.words()) == parameters
    parameters.read_only = True
    assert Parameters.of(parameters.words()) == parameters


def test_read_only_adds_no_bitmap(parameters: Parameters) -> None:
    ServedDisk(parameters, report=print).close()
    parameters.read_only = True
    parameters.bitmaps = {"weekly": None}
    for find in (checked, lambda parameters: ServedDisk(parameters, report=print)):
        with pytest.raises(InvalidError, match="there is no bitmap 'weekly'"):
            find(parameters)


def test_a_disabled_bitmap_is_reported(parameters: Parameters) -> None:
    served = ServedDisk(parameters, report=print)
    served.node.bitmaps["daily"].disable()
    served.close()
    reports: list[str] = []
    ServedDisk(parameters, reports.append).close()
    assert reports == ["bitmap 'daily' is disabled, and records nothing"]


def test_a_store_that_cannot_be_closed_is_given_up(parameters: Parameters, tmp_path: Path) -> None:
    served = ServedDisk(parameters, report=print)
    served.write(b"x", 0)
    os.rename(parameters.store, tmp_path / "away")
    with pytest.raises(StoreError):
        served.close()
    os.rename(tmp_path / "away", parameters.store)
    assert stored(parameters) == [(0, BLOCK)]
