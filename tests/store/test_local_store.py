# SPDX-License-Identifier: MIT
"""LocalStore: what is stored is loaded again, whatever happened between; who may open it when."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import sqlite3
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from local import GROUP, SIZE, Part, opened, switch, words_files
from namespaces import run_as_first
from support import collect, run_python

from pybitmap import (
    BitmapError,
    BlockGraph,
    CorruptError,
    HBitmap,
    InvalidError,
    LockedError,
    MismatchError,
    StoreError,
    UnsupportedError,
)
from pybitmap.store import LocalStore, Purpose, Record, Wanted, local
from pybitmap.store.base import Switches
from pybitmap.store.catalog import Catalog

pytestmark = pytest.mark.core


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def other_boot(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and the system has been started anew."""
    return lambda: monkeypatch.setattr(local, "_boot", lambda: "another-boot")


# ---- what is stored is loaded ---------------------------------------------------------------


def test_a_closed_store_gives_back_everything(path: Path) -> None:
    part = Part(LocalStore(path))
    part.add("a").set(0, 5 * GROUP)
    part.add("b", 512, enabled=False).set(SIZE - 1)
    part.close()
    with opened(path) as part:
        assert list(part.loaded) == ["a", "b"]
        assert [each.granularity for each in part.loaded.values()] == [GROUP, 512]
        assert [each.enabled for each in part.loaded.values()] == [True, False]
        assert list(part["a"].areas()) == [(0, 5 * GROUP)]
        assert list(part["b"].areas()) == [(SIZE - 512, 512)]


def test_what_was_not_closed_is_exact(path: Path) -> None:
    with opened(path, size=SIZE) as part:
        part.add("a").set(GROUP, GROUP)
    with opened(path) as part:
        part["a"].set(8 * GROUP)
    with opened(path) as part:
        assert list(part["a"]) == [GROUP, 8 * GROUP]


@pytest.mark.parametrize("size", [0, 1, GROUP, 63 * GROUP, 64 * GROUP, 64 * GROUP + 1])
@pytest.mark.parametrize("read_only", [False, True])
def test_every_size(path: Path, size: int, read_only: bool) -> None:
    part = Part(LocalStore(path), size=size)
    part.add("a").set(0, size)
    expected = list(part["a"].areas())
    part.close()
    with opened(path, read_only=read_only) as part:
        assert part.volume.size == size
        assert list(part["a"].areas()) == expected


@pytest.mark.parametrize("bits", [9, 57, 58, 62])
@pytest.mark.parametrize("read_only", [False, True])
def test_every_granularity(path: Path, bits: int, read_only: bool) -> None:
    size = min(2**63 - 1, 100 << bits)
    part = Part(LocalStore(path), size=size)
    part.add("a", 1 << bits).set(size - 1)
    part.close()
    with opened(path, read_only=read_only) as part:
        assert part["a"].next_dirty(0) == (size - 1) >> bits << bits


def test_names_may_be_any_text(path: Path) -> None:
    names = ["x" * 1023, "ä/../\n'\"", "\0", "a\0b", "a", "A"]
    part = Part(LocalStore(path), "nöde\0'")
    for name in names:
        part.add(name)
    part.close()
    with opened(path, "nöde\0'") as part:
        assert list(part.loaded) == names


def test_the_oldest_stands_first_after_removals(path: Path) -> None:
    part = Part(LocalStore(path))
    for name in "cabd":
        part.add(name)
    part.remove("c")
    part.add("c")
    part.records = {name: part.records[name] for name in "bcad"}
    part.close()
    with opened(path) as part:
        assert list(part.loaded) == list("bcad")


def test_a_successor_is_merged_on_loading(path: Path) -> None:
    with opened(path, size=SIZE) as part:
        part.add("a", frozen=True).set(0)
        successor = part.records["a"].successor
        assert successor is not None
        successor.set(GROUP)
        del successor
        assert len(words_files(path)) == 2
    with opened(path) as part:
        assert list(part["a"]) == [0, GROUP]
        collect()
        assert len(words_files(path)) == 1
        part["a"].reset(GROUP)
    with opened(path) as part:
        assert list(part["a"]) == [0]


def test_a_successor_that_was_closed_is_merged_too(path: Path) -> None:
    part = Part(LocalStore(path))
    part.add("a", frozen=True)
    successor = part.records["a"].successor
    assert successor is not None
    successor.set(GROUP)
    del successor
    part.close()
    with opened(path, read_only=True) as part:
        assert list(part["a"]) == [GROUP]
    assert len(words_files(path)) == 2
    with opened(path) as part:
        assert list(part["a"]) == [GROUP]


def test_a_size_that_changes_comes_with_new_contents(path: Path) -> None:
    part = Part(LocalStore(path))
    part.add("a").set(0)
    bigger = part.volume.make(GROUP, 2 * SIZE)
    bigger.set(2 * SIZE - 1)
    change = Switches(
        {part.volume: Wanted(2 * SIZE, [Record("a", GROUP, True, bigger)])}, Purpose.COMMIT
    )
    assert change.switch() is None
    assert part.volume.size == 2 * SIZE
    del change, bigger
    part.drop()
    collect()
    assert len(words_files(path)) == 1
    with opened(path) as part:
        assert part.volume.size == 2 * SIZE
        assert list(part["a"].areas()) == [(2 * SIZE - GROUP, GROUP)]


def test_without_content_a_record_leaves_what_is_stored(path: Path) -> None:
    part = Part(LocalStore(path))
    part.add("a").set(0)
    part.close()
    part = Part(LocalStore(path))
    part.records["a"] = Record("a", 0, False, None)
    part.records["b"] = Record("b", 0, False, None)
    part.close()
    with opened(path) as part:
        assert list(part.loaded) == ["a"]
        assert list(part["a"]) == [0]


def test_a_flush_leaves_it_in_use(path: Path, other_boot: Callable[[], None]) -> None:
    part = Part(LocalStore(path))
    part.add("a")
    part.store(Purpose.FLUSH)
    part.drop()
    other_boot()
    with opened(path) as part:
        assert part.loaded["a"].content is None


# ---- several nodes --------------------------------------------------------------------------


def test_nodes_share_a_store(path: Path) -> None:
    store = LocalStore(path)
    one, two = Part(store, "one"), Part(store, "two", 2 * SIZE)
    one.add("a").set(0)
    two.add("a").set(GROUP)
    one.close()
    two.add("b")
    two.close()
    with opened(path, "one") as part:
        assert list(part["a"]) == [0]
    with opened(path, "two") as part:
        assert part.volume.size == 2 * SIZE
        assert list(part["a"]) == [GROUP]
        assert list(part.loaded) == ["a", "b"]


def test_a_bitmap_moves_between_nodes_in_one_step(path: Path) -> None:
    store = LocalStore(path)
    one, two = Part(store, "one"), Part(store, "two")
    one.add("a").set(0)
    content = two.volume.make(GROUP)
    content.merge(one["a"])
    two.records["a"] = Record("a", GROUP, True, content)
    del one.records["a"]
    switch(one, two)
    assert [len(each.bitmaps) for each in store.entries()] == [0, 1]
    one.drop()
    two.drop()
    with opened(path, "two") as part:
        assert list(part["a"]) == [0]


def test_a_node_is_open_once(path: Path) -> None:
    store = LocalStore(path)
    with opened(path, size=SIZE):
        pass
    part = Part(store)
    with pytest.raises(LockedError, match=r"node 'disk' of store .* is open already"):
        store.open("disk", None, read_only=True)
    part.drop()


# ---- sizes ----------------------------------------------------------------------------------


def test_the_store_knows_the_size(path: Path) -> None:
    part = Part(LocalStore(path))
    part.add("a")
    part.close()
    with opened(path, size=None) as part:
        assert part.volume.size == SIZE
    with pytest.raises(MismatchError, match=f"'disk' has 1 bytes, but {SIZE} in store"):
        LocalStore(path).open("disk", 1, read_only=False)
    with pytest.raises(InvalidError, match="does not know the size of node 'other'"):
        LocalStore(path).open("other", None, read_only=False)
    LocalStore(path).open("disk", None, read_only=False).close()  # nothing is left open


def test_a_node_without_bitmaps_may_have_another_size(path: Path) -> None:
    Part(LocalStore(path)).close()
    with opened(path, size=2 * SIZE) as part:
        assert part.volume.size == 2 * SIZE
    assert LocalStore(path).entries()[0].size == SIZE
    with opened(path, size=2 * SIZE) as part:
        part.add("a").set(2 * SIZE - 1)
    assert LocalStore(path).entries()[0].size == 2 * SIZE
    with opened(path) as part:
        assert list(part["a"]) == [2 * SIZE - GROUP]


def test_a_node_that_was_never_stored_is_forgotten(path: Path) -> None:
    Part(LocalStore(path)).drop()
    assert LocalStore(path).entries() == []


# ---- files ----------------------------------------------------------------------------------


def test_files_have_their_space(path: Path) -> None:
    with opened(path, size=SIZE) as part:
        part.add("a")
        [name] = words_files(path)
        status = (path / name).stat()
        assert status.st_size == SIZE // GROUP // 8 + 8
        assert status.st_blocks * 512 >= status.st_size
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_a_copy_with_holes_has_its_space_again(path: Path) -> None:
    part = Part(LocalStore(path))
    part.add("a").set(0)
    part.close()
    [name] = words_files(path)
    words = (path / name).read_bytes()
    (path / name).unlink()
    with open(path / name, "wb") as file:
        file.write(words[:4096])
        file.seek(len(words) - 8)
        file.write(words[-8:])
    with opened(path) as part:
        assert list(part["a"]) == [0]
        assert (path / name).stat().st_blocks * 512 >= len(words)


def test_what_no_record_names_goes_with_its_bitmap(path: Path) -> None:
    with opened(path, size=SIZE) as part:
        content = part.volume.make(GROUP)
        words = content.words
        assert len(words_files(path)) == 1
        del content
        collect()
        assert len(words_files(path)) == 1  # still looked at
        assert words[0] == 0
        del words
        collect()
        assert words_files(path) == []


def test_what_no_record_names_goes_when_the_store_closes(path: Path) -> None:
    with opened(path, size=SIZE) as part:
        content = part.volume.make(GROUP)
    assert words_files(path) == []
    content.set(0)
    assert list(content) == [0]


def test_what_is_no_longer_named_goes_with_its_bitmap(path: Path) -> None:
    with opened(path, size=SIZE) as part:
        content = part.add("a")
        part.remove("a")
        content.set(0, 3 * GROUP)
        assert content.count() == 3 * GROUP
        assert len(words_files(path)) == 1
        del content
        collect()
        assert words_files(path) == []


def test_what_is_no_longer_named_can_be_named_again(path: Path) -> None:
    with opened(path, size=SIZE) as part:
        part.add("a").set(0)
        record = part.records["a"]
        part.remove("a")
        part.put(record)
        del record
    with opened(path) as part:
        assert list(part["a"]) == [0]


def test_files_that_no_row_names_go_when_the_store_is_opened(path: Path) -> None:
    with opened(path, size=SIZE) as part:
        part.add("a")
    (path / ("0" * 16 + ".words")).write_bytes(b"left over")
    (path / "something else").write_bytes(b"stays")
    LocalStore(path).entries()
    assert len(words_files(path)) == 2
    with opened(path):
        assert len(words_files(path)) == 1
    assert (path / "something else").exists()


def test_views_outlive_bitmap_and_store(path: Path) -> None:
    with opened(path, size=SIZE) as part:
        part.add("a").set(0, 64 * GROUP)
        words = part["a"].words
    shutil.rmtree(path)
    gc.collect()
    assert words[0] == 2**64 - 1
    assert sum(words[1:]) == 0


def test_a_cycle_with_a_mapped_bitmap_is_collected(path: Path) -> None:
    with opened(path, size=SIZE) as part:
        cycle: list[object] = [part.volume.make(GROUP)]
        cycle.append(cycle)
        del cycle
        collect()
        assert words_files(path) == []


def test_a_mapped_bitmap_cannot_be_resized(path: Path) -> None:
    with opened(path, size=SIZE) as part:
        content = part.add("a")
        with pytest.raises(BufferError):
            content.truncate(2 * SIZE)
        copy = content.copy()
        copy.truncate(2 * SIZE)


# ---- what is inconsistent -------------------------------------------------------------------


def test_what_was_in_use_when_the_system_went_down_is_inconsistent(
    path: Path, other_boot: Callable[[], None]
) -> None:
    part = Part(LocalStore(path))
    part.add("closed").set(0)
    part.close()
    store = LocalStore(path)
    part = Part(store, "other")
    part.add("open").set(0)
    part.drop()
    other_boot()
    with opened(path) as part:
        assert list(part["closed"]) == [0]
    for _ in range(2):
        with opened(path, "other") as part:
            each = part.loaded["open"]
            assert (each.content, each.granularity, each.enabled) == (None, GROUP, True)
            assert each.reason is not None
            assert "in use when the system went down" in each.reason
            part.store(Purpose.CLOSE)
    assert len(words_files(path)) == 2
    with opened(path, "other") as part:
        part.remove("open")
    assert len(words_files(path)) == 1


def test_an_inconsistent_bitmap_can_be_replaced(path: Path, other_boot: Callable[[], None]) -> None:
    with opened(path, size=SIZE) as part:
        part.add("a")
    other_boot()
    with opened(path) as part:
        part.add("a").set(0, SIZE)
    with opened(path) as part:
        assert part["a"].count() == SIZE
    assert len(words_files(path)) == 1


def _cut(file: Path) -> None:
    os.truncate(file, 4096)


def _lengthen(file: Path) -> None:
    with open(file, "ab") as data:
        data.write(b"\0")


def _link(file: Path) -> None:
    file.rename(file.with_suffix(".moved"))
    file.symlink_to(file.with_suffix(".moved"))


def _fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (os.unlink, "its bits cannot be read: [0-9a-f]*.words: No such file"),
        (_cut, "its bits are cut short: [0-9a-f]*.words has 4096 of 32776 bytes"),
        (_lengthen, "its bits do not fit: [0-9a-f]*.words has 32777 bytes, not 32776"),
        (_link, "is no regular file"),
        (_fifo, "is no regular file"),
        (_directory, "is no regular file"),
    ],
)
@pytest.mark.parametrize("closed", [True, False])
def test_a_damaged_file_is_one_inconsistent_bitmap(
    path: Path, damage: Callable[[Path], None], reason: str, closed: bool
) -> None:
    part = Part(LocalStore(path))
    part.add("a")
    [name] = words_files(path)
    part.add("b").set(GROUP)
    (part.close if closed else part.drop)()
    damage(path / name)
    for read_only in (True, False):
        with opened(path, read_only=read_only) as part:
            each = part.loaded["a"]
            assert each.content is None
            with pytest.raises(BitmapError, match=reason):
                raise BitmapError(each.reason)
            assert list(part["b"]) == [GROUP]
    assert LocalStore(path).entries()[0].bitmaps[0].reason == each.reason


def test_a_copy_of_a_store_in_use_is_inconsistent(path: Path, tmp_path: Path) -> None:
    with opened(path, size=SIZE) as part:
        part.add("a")
        shutil.copytree(path, tmp_path / "copy")
    with opened(tmp_path / "copy") as part:
        reason = part.loaded["a"].reason
        assert reason == "it was in use when its files were copied or replaced"


def test_a_copy_of_a_closed_store_is_as_good(path: Path, tmp_path: Path) -> None:
    part = Part(LocalStore(path))
    part.add("a").set(0)
    part.close()
    shutil.copytree(path, tmp_path / "copy")
    with opened(tmp_path / "copy") as part:
        assert list(part["a"]) == [0]


# ---- what cannot be opened ------------------------------------------------------------------


def test_a_reader_that_cannot_become_a_writer_leaves_no_connection_open(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(Python 3.13 warns of those that are dropped.)"""
    part = Part(LocalStore(path))
    part.add("a").set(0, GROUP)
    part.close()
    made: list[Catalog] = []
    making = Catalog.__init__

    def init(self: Catalog, *args: object, **kwargs: object) -> None:
        made.append(self)
        making(self, *args, **kwargs)  # type: ignore[arg-type]

    def fails(*_: object) -> None:
        raise OSError(errno.EIO, "it does not work")

    monkeypatch.setattr(Catalog, "__init__", init)
    with BlockGraph() as graph:
        store = LocalStore(path)
        graph.add_node("reader", SIZE, store, read_only=True)
        with monkeypatch.context() as failing:
            failing.setattr(local, "_Files", fails)
            with pytest.raises(StoreError, match="cannot open store"):
                graph.add_node("writer", SIZE, store)
        assert len(made) > 1
        for catalog in made:
            with pytest.raises(sqlite3.ProgrammingError, match="closed"):
                catalog._sql.execute("SELECT 1")
        graph.add_node("writer", SIZE, store)


def test_the_parent_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"cannot open store .*No such file") as caught:
        LocalStore(tmp_path / "no" / "store").open("disk", SIZE, read_only=False)
    assert caught.value.errno == errno.ENOENT
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_could_not_be_made_has_nothing(path: Path) -> None:
    """As a full disk leaves it."""
    path.mkdir()
    (path / "lock").touch()
    (path / "catalog.sqlite").touch()
    assert LocalStore(path).entries() == []
    with pytest.raises(InvalidError, match="does not know the size of node 'disk'"):
        LocalStore(path).open("disk", None, read_only=True)
    assert (path / "catalog.sqlite").stat().st_size == 0
    with opened(path, size=SIZE) as part:
        part.add("a")


@pytest.mark.parametrize("there", [True, False], ids=["brought along", "new"])
def test_a_big_endian_machine_is_told_and_nothing_is_touched(
    path: Path, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its words would be other bits."""
    if there:
        with opened(path, size=SIZE) as part:
            part.add("a").set(0)
    before = {each.name: each.read_bytes() for each in path.glob("*")}
    monkeypatch.setattr(sys, "byteorder", "big")
    with pytest.raises(UnsupportedError, match="big-endian; keep bitmaps in a qcow2"):
        LocalStore(path).entries()
    for read_only in [True, False]:
        with pytest.raises(UnsupportedError, match="this machine is big-endian"):
            LocalStore(path).open("disk", SIZE, read_only=read_only)
    assert {each.name: each.read_bytes() for each in path.glob("*")} == before
    assert path.exists() == there


def test_a_size_that_nobody_knows_makes_no_store(path: Path) -> None:
    with pytest.raises(InvalidError, match="size of node 'disk': no store is there"):
        LocalStore(path).open("disk", None, read_only=False)
    assert not path.exists()


def test_reading_makes_no_store(path: Path) -> None:
    with pytest.raises(StoreError):
        LocalStore(path).open("disk", SIZE, read_only=True)
    with pytest.raises(StoreError):
        LocalStore(path).entries()
    assert not path.exists()


def test_a_file_is_no_store(path: Path) -> None:
    path.write_text("a file")
    for read_only in (False, True):
        with pytest.raises(StoreError, match="Not a directory"):
            LocalStore(path).open("disk", SIZE, read_only=read_only)
    assert path.read_text() == "a file"


def test_a_directory_of_other_things_is_no_store(path: Path) -> None:
    path.mkdir()
    (path / "letter.txt").write_text("dear")
    with pytest.raises(CorruptError, match=r"is no store: it has no catalog, but 'letter\.txt'"):
        LocalStore(path).open("disk", SIZE, read_only=False)
    assert os.listdir(path) == ["letter.txt"]


def test_a_creation_that_was_cut_short_is_taken_up(path: Path) -> None:
    path.mkdir()
    Part(LocalStore(path)).close()
    (path / "catalog.sqlite-journal").unlink()
    (path / "catalog.sqlite").write_bytes(b"")
    Part(LocalStore(path)).close()


def test_a_store_is_made_where_nothing_is(path: Path) -> None:
    assert LocalStore.vacant(path)
    path.mkdir()
    for left in ("lock", "catalog.sqlite", "catalog.sqlite-journal"):
        assert LocalStore.vacant(path)
        (path / left).touch()
    assert LocalStore.vacant(path)
    (path / "letter.txt").touch()
    assert not LocalStore.vacant(path)
    assert not LocalStore.vacant(path / "letter.txt")
    (path / "letter.txt").unlink()
    Part(LocalStore(path)).drop()
    assert not LocalStore.vacant(path)


@pytest.mark.parametrize(
    ("code", "kind", "number"),
    [
        (5, LockedError, None),  # SQLITE_BUSY
        (6 | 1 << 8, LockedError, None),  # SQLITE_LOCKED_SHAREDCACHE
        (8 | 3 << 8, StoreError, errno.EROFS),  # SQLITE_READONLY_ROLLBACK
        (10 | 4 << 8, StoreError, errno.EIO),  # SQLITE_IOERR_FSYNC
        (11 | 1 << 8, CorruptError, None),  # SQLITE_CORRUPT_VTAB
        (13, StoreError, errno.ENOSPC),  # SQLITE_FULL
        (26, CorruptError, None),  # SQLITE_NOTADB
        (14, StoreError, None),  # SQLITE_CANTOPEN
    ],
)
def test_errors_of_sqlite_are_told_apart_by_their_codes(
    path: Path, code: int, kind: type[StoreError], number: int | None
) -> None:
    class Broken:
        def execute(self, statement: str, values: object) -> None:
            error = sqlite3.OperationalError("whatever it says, locked or malformed")
            error.sqlite_errorcode = code  # type: ignore[attr-defined, unused-ignore]
            raise error

    Part(LocalStore(path)).drop()
    catalog = Catalog(path, writing=False)
    catalog.close()
    catalog._sql = Broken()  # type: ignore[assignment]
    with pytest.raises(StoreError, match=r"catalog .*: whatever it says") as caught:
        catalog.nodes()
    assert type(caught.value) is kind
    assert caught.value.errno == number


@pytest.mark.parametrize(
    ("text", "kind", "number"),
    [
        ("database is locked", LockedError, None),
        ("database table is locked: bitmap", LockedError, None),
        ("attempt to write a readonly database", StoreError, errno.EROFS),
        ("disk I/O error", StoreError, errno.EIO),
        ("database disk image is malformed", CorruptError, None),
        ("database or disk is full", StoreError, errno.ENOSPC),
        ("file is not a database", CorruptError, None),
        ("Could not decode to UTF-8 column 'words' with text", CorruptError, None),
        ("unable to open database file", StoreError, None),
    ],
)
def test_errors_of_sqlite_without_a_code_are_told_apart_by_their_texts(
    path: Path, text: str, kind: type[StoreError], number: int | None
) -> None:
    class Broken:
        def execute(self, statement: str, values: object) -> None:
            raise sqlite3.OperationalError(text)

    Part(LocalStore(path)).drop()
    catalog = Catalog(path, writing=False)
    catalog.close()
    catalog._sql = Broken()  # type: ignore[assignment]
    with pytest.raises(StoreError) as caught:
        catalog.nodes()
    assert type(caught.value) is kind
    assert caught.value.errno == number


def _sql(*statements: str) -> Callable[[Path], None]:
    def damage(catalog: Path) -> None:
        sql = sqlite3.connect(catalog)
        with sql:
            for statement in statements:
                sql.execute(statement)
        sql.close()

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"no database" * 1000), "file is not a database"),
        (lambda path: path.write_bytes(b""), "is no store: it has no catalog"),
        (lambda path: os.truncate(path, 8192), "malformed"),
        (_sql("PRAGMA user_version = 2"), "has version 2; this pybitmap reads 3"),
        (_sql("PRAGMA application_id = 2"), "a database of something else"),
        (_sql("DROP TABLE node"), "the tables are not those of version 3"),
        (
            _sql("CREATE TRIGGER t AFTER UPDATE ON node BEGIN DELETE FROM bitmap; END"),
            "the tables are not those of version 3",
        ),
        (_sql("ALTER TABLE bitmap ADD COLUMN more TEXT"), "the tables are not those of version 3"),
        (_sql("UPDATE bitmap SET granularity = 3"), "granularity 3"),
        (_sql("UPDATE bitmap SET granularity = 0"), "granularity 0"),
        (_sql("UPDATE bitmap SET granularity = -512"), "granularity -512"),
        (_sql("UPDATE bitmap SET granularity = x'00'"), "granularity b'.x00'"),
        (_sql("UPDATE bitmap SET size = -1"), "size -1 is not in 0"),
        (_sql("UPDATE bitmap SET size = 1e300"), r"size 1e\+300"),
        (
            _sql("UPDATE bitmap SET size = 9223372036854775807, granularity = 512"),
            "makes more than .* groups",
        ),
        (_sql("UPDATE bitmap SET words = '../../etc/passwd'"), "file name '../../etc/passwd'"),
        (_sql("UPDATE bitmap SET words = x'ff00'"), r"words b'\\xff\\x00'"),
        (_sql("UPDATE bitmap SET words = cast(x'ff00' AS TEXT)"), "decode"),
        (_sql("UPDATE bitmap SET name = x'ff00'"), r"name b'\\xff\\x00'"),
        (
            _sql("UPDATE bitmap SET successor = words, successor_generation = 1"),
            "two bitmaps share a file",
        ),
        (_sql("UPDATE node SET size = -1"), "node 'disk', size -1"),
        (_sql("UPDATE node SET largest = size - 1"), "node 'disk', largest"),
        (_sql("UPDATE node SET largest = 'x'"), "node 'disk', largest 'x'"),
        (_sql("UPDATE node SET name = 3, size = 'x'"), "node '3', size 'x'"),
        (_sql("UPDATE bitmap SET node = 'nobody'"), "bitmaps of no node"),
    ],
)
def test_a_damaged_catalog_is_refused_and_not_touched(
    path: Path, damage: Callable[[Path], None], message: str
) -> None:
    part = Part(LocalStore(path))
    part.add("a")
    part.close()
    damage(path / "catalog.sqlite")
    before = {each.name: each.read_bytes() for each in path.iterdir()}
    for read_only in (False, True):
        if "no catalog" in message and read_only:
            continue
        with pytest.raises(CorruptError, match=message):
            LocalStore(path).open("disk", None, read_only=read_only)
    assert {each.name: each.read_bytes() for each in path.iterdir()} == before


# ---- who may open it ------------------------------------------------------------------------

_OPEN = """
from pybitmap import StoreError
from pybitmap.store import LocalStore
try:
    LocalStore({path!r}).open("disk", None, read_only={read_only}).load()
    print("opened")
except StoreError as error:
    print(type(error).__name__, error)
"""


def _other_process(path: Path, *, read_only: bool) -> str:
    return run_python(_OPEN.format(path=str(path), read_only=read_only)).strip()


@pytest.mark.parametrize("read_only", [False, True])
def test_a_second_process_is_refused(path: Path, read_only: bool) -> None:
    with opened(path, size=SIZE) as part:
        part.add("a")
        answer = _other_process(path, read_only=read_only)
        assert answer.startswith(f"LockedError store '{path}' is in use by another process")
        assert f"(process {os.getpid()})" in answer
    assert _other_process(path, read_only=read_only) == "opened"


def test_readers_share(path: Path) -> None:
    part = Part(LocalStore(path))
    part.add("a")
    part.close()
    with opened(path, read_only=True), opened(path, read_only=True):
        assert _other_process(path, read_only=True) == "opened"
        assert _other_process(path, read_only=False).startswith("LockedError")


def test_a_second_object_is_refused(path: Path) -> None:
    why = "is in use in this process already, .* give one object to all of its nodes"
    with opened(path, size=SIZE), pytest.raises(LockedError, match=why):
        LocalStore(path).open("other", SIZE, read_only=False)


def test_a_reader_becomes_a_writer_if_there_is_no_other(path: Path) -> None:
    for node in ("one", "two"):
        part = Part(LocalStore(path), node)
        part.add("a")
        part.close()
    store = LocalStore(path)
    reader = Part(store, "one", read_only=True)
    with opened(path, "two", read_only=True), pytest.raises(LockedError):
        Part(store, "two")
    writer = Part(store, "two")
    writer.add("b")
    writer.close()
    reader.drop()
    with opened(path, "two") as part:
        assert list(part.loaded) == ["a", "b"]


def test_the_lock_file_is_not_needed_to_refuse(path: Path) -> None:
    with opened(path, size=SIZE) as part:
        part.add("a")
        (path / "lock").unlink()
        assert _other_process(path, read_only=False).startswith("LockedError")


def test_reading_writes_nothing(path: Path) -> None:
    with opened(path, size=SIZE) as part:
        part.add("a", frozen=True).set(0)

    def state() -> dict[str, tuple[bytes, int]]:
        return {e.name: (e.read_bytes(), e.stat().st_mtime_ns) for e in path.iterdir()}

    before = state()
    with opened(path, read_only=True) as part:
        assert list(part["a"]) == [0]
        part["a"].set(GROUP)
        with pytest.raises(BitmapError, match="read-only"):
            part.store()
    LocalStore(path).entries()
    assert state() == before


def test_a_fork_cannot_use_it(path: Path) -> None:
    code = f"""
import os
from pybitmap import StoreError
from pybitmap.store import LocalStore
store = LocalStore({str(path)!r})
volume = store.open("disk", 1 << 30, read_only=False)
content = volume.make(65536)
child = os.fork()
if child == 0:
    del content
    try:
        volume.make(65536)
    except StoreError as error:
        print(error, flush=True)
    volume.close()
    os._exit(0)
os.waitpid(child, 0)
print(len([each for each in os.listdir({str(path)!r}) if each.endswith(".words")]))
"""
    refusal, nfiles = run_python(code).splitlines()
    assert "cannot be used on both sides of a fork" in refusal
    assert nfiles == "1"


def test_a_child_that_has_its_parent_s_number_leaves_its_store_alone(path: Path) -> None:
    """The first of a PID namespace, as its parent is: it neither unlinks nor unlocks anything."""
    code = f"""
from pybitmap import LockedError
from pybitmap.store import LocalStore
store = LocalStore({str(path)!r})
volume = store.open("disk", 1 << 30, read_only=False)
contents = [volume.make(65536)]

def child():
    contents.clear()
    try:
        return volume.make(65536)
    finally:
        volume.close()

print(same(child))
print(len([each for each in os.listdir({str(path)!r}) if each.endswith(".words")]))
try:
    LocalStore({str(path)!r}).open("disk", 1 << 30, read_only=False)
except LockedError:
    print("locked")
"""
    refusal, nfiles, locked = run_as_first(code).splitlines()
    assert refusal.startswith("StoreError")
    assert "cannot be used on both sides of a fork" in refusal
    assert (nfiles, locked) == ("1", "locked")


# ---- what it tells --------------------------------------------------------------------------


def test_entries_name_nodes_and_bitmaps(path: Path) -> None:
    store = LocalStore(path)
    part = Part(store)
    part.add("a")
    part.add("b", 512, enabled=False)
    [node] = store.entries()
    assert (node.name, node.size) == ("disk", SIZE)
    assert [(e.name, e.granularity, e.enabled, e.in_use) for e in node.bitmaps] == [
        ("a", GROUP, True, True),
        ("b", 512, False, True),
    ]
    part.close()
    assert [each.in_use for each in store.entries()[0].bitmaps] == [False, False]


def test_loading_and_storing_tell_how_far_they_are(path: Path) -> None:
    told: list[tuple[str, int, int | None]] = []
    store = LocalStore(path)
    store.progress = lambda what, done, total: told.append((what, done, total))
    part = Part(store)
    part.add("a", frozen=True)
    part.close()
    Part(store).drop()
    nbytes = SIZE // GROUP // 8
    assert told == [
        (what, done * nbytes, 2 * nbytes) for what in ("storing", "loading") for done in (1, 2)
    ]


def test_mapped_memory_is_a_bitmap_like_any(path: Path) -> None:
    with opened(path, size=SIZE) as part:
        mapped = part.add("a")
        plain = HBitmap(SIZE, 16)
        for hb in (mapped, plain):
            hb.set(5 * GROUP, 1000 * GROUP)
            hb.reset(64 * GROUP, 64 * GROUP)
        assert mapped == plain
        assert mapped.sha256() == plain.sha256()
        assert mapped | plain == plain
        assert plain.drain(into=plain.copy()) == mapped


def test_a_transaction_that_an_interruption_left_in_its_midst_is_taken_back(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "s")
    with BlockGraph() as graph:
        node = graph.add_node("n", SIZE, store)
        bitmap = node.add_bitmap("b", GROUP, persistent=True)
        for change in (bitmap.disable, bitmap.clear, bitmap.enable, node.flush):
            catalog = store._catalog
            assert catalog is not None
            catalog._execute("BEGIN IMMEDIATE")
            catalog._execute("UPDATE bitmap SET name = 'lost'")
            change()
        catalog = store._catalog
        assert catalog is not None
        catalog._execute("BEGIN IMMEDIATE")
    with BlockGraph() as graph:
        bitmap = graph.add_node("n", None, LocalStore(tmp_path / "s")).bitmaps["b"]
        assert (bitmap.enabled, bitmap.reason) == (True, None)
