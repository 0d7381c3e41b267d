# SPDX-License-Identifier: MIT
"""A store that was tampered with: a clear error, or a store; in bounded memory and time.

Before it is opened, while it is open, and by whom: files that lead elsewhere, files and folders
that others may change, files that are deleted, renamed and replaced, locks of others.
"""

from __future__ import annotations

import fcntl
import grp
import os
import pwd
import shutil
import signal
import sqlite3
import stat
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from local import GROUP, Part, words_files
from support import run_python

from pybitmap import BitmapError, BlockGraph, LockedError, StoreError
from pybitmap.store import LocalStore, Record

#: Small, and yet rows fill several pages of the catalog.
SIZE = 64 * GROUP


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "store"
    part = Part(LocalStore(path), size=SIZE)
    for i in range(10):
        part.add(f"bitmap {i} " + "x" * 100 * i, frozen=i == 3)
    part.close()
    part = Part(LocalStore(path), "used", size=SIZE)
    part.add("in use")
    part.drop()
    return path


def use(path: Path) -> None:
    """Whatever is read is used; whatever cannot be is an error of ours, and nothing else."""
    for node in ("disk", "used"):
        for read_only in (True, False):
            store = LocalStore(path)
            try:
                for entry in store.entries():
                    assert all(each.granularity > 0 for each in entry.bitmaps)
                part = Part(store, node, None, read_only=read_only)
            except BitmapError as error:
                assert str(error)  # noqa: PT017
                continue
            try:
                for record in part.records.values():
                    if record.content is not None:
                        record.content.set(0, min(1, record.content.size))
                        assert record.content.count() >= 0
                if not read_only:
                    part.close()
            except BitmapError:
                part.drop()
            finally:
                part.drop()


def copies(original: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(shutil.copytree(original, Path(folder) / "store"))


CHANGES = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=8)


# SQLite's complaint of a name in the schema that is no UTF-8, which is none either.
@example(changes=[(3922, 128)], start=100)
# SQLite takes it for a file that may only be read.
@example(changes=[(18, 3)], start=0)
@given(changes=CHANGES, start=st.sampled_from([0, 100, 4096]))
def test_bytes_of_the_catalog_that_change(
    original: Path, changes: list[tuple[int, int]], start: int
) -> None:
    for path in copies(original):
        catalog = path / "catalog.sqlite"
        data = bytearray(catalog.read_bytes())
        for offset, value in changes:
            data[(start + offset % (4096 if start else 100)) % len(data)] = value
        catalog.write_bytes(data)
        use(path)


@given(st.binary(max_size=600), st.integers(0, 1024))
def test_any_journal(original: Path, journal: bytes, offset: int) -> None:
    for path in copies(original):
        file = path / "catalog.sqlite-journal"
        data = bytearray(file.read_bytes())
        data[offset : offset + len(journal)] = journal
        magic = bytes.fromhex("d9d505f920a163d7")
        file.write_bytes(magic + data[8:])
        use(path)


@given(st.integers(0, 1 << 16))
def test_a_catalog_that_is_cut_short(original: Path, length: int) -> None:
    for path in copies(original):
        catalog = path / "catalog.sqlite"
        data = catalog.read_bytes()
        catalog.write_bytes(data[: length % len(data)])
        use(path)


@given(st.data())
def test_words_of_any_length_and_content(original: Path, data: st.DataObject) -> None:
    for path in copies(original):
        for file in path.glob("*.words"):
            file.write_bytes(data.draw(st.binary(max_size=20) | st.just(b"\xff" * 8)))
        use(path)


def test_many_bitmaps_are_listed_and_loaded(tmp_path: Path) -> None:
    """One transaction adds them; listing them reads no bits."""
    part = Part(LocalStore(tmp_path / "store"), size=SIZE)
    for i in range(300):
        name = f"{i:04}" + "x" * 1019
        part.records[name] = Record(name, GROUP, True, part.volume.make(GROUP))
    part.close()
    [node] = LocalStore(tmp_path / "store").entries()
    assert [each.name[:4] for each in node.bitmaps] == [f"{i:04}" for i in range(300)]
    part = Part(LocalStore(tmp_path / "store"), size=None)
    assert len(part.loaded) == 300
    part.close()


# ---- what is deleted, renamed or replaced while it is open -------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


WHAT = ["folder", "lock", "catalog.sqlite", "catalog.sqlite-journal", "words"]


def _file(path: Path, what: str) -> Path:
    if what == "folder":
        return path
    return path / (words_files(path)[0] if what == "words" else what)


def _deleted(file: Path) -> None:
    if file.is_dir():
        shutil.rmtree(file)
    else:
        file.unlink()


def _renamed(file: Path) -> None:
    file.rename(file.with_suffix(".away"))


def _replaced(file: Path) -> None:
    _renamed(file)
    away = file.with_suffix(".away")
    if away.is_dir():
        shutil.copytree(away, file)
    else:
        shutil.copy(away, file)


def _linked(file: Path) -> None:
    """Away, and a link in its place: that leads out of the store, or may at any time."""
    _renamed(file)
    file.symlink_to(file.with_suffix(".away"))


def content(path: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in path.iterdir()}


ACTIONS: dict[str, Callable[[BlockGraph], object]] = {
    "flush": BlockGraph.flush,
    "close": BlockGraph.close,
    "add": lambda graph: graph.nodes["n"].add_bitmap("new", GROUP, persistent=True),
    "clear": lambda graph: graph.nodes["n"].bitmaps["b"].clear(),
    "disable": lambda graph: graph.nodes["n"].bitmaps["b"].disable(),
}


def discard(graph: BlockGraph) -> None:
    """As a killed process leaves it."""
    for node in graph.nodes.values():
        node.close(discard=True)


def check_nothing_is_missed(path: Path, marked: set[int]) -> None:
    """Whoever opens the store is refused, or finds a bitmap inconsistent, or all marks."""
    graph = BlockGraph()
    try:
        node = graph.add_node("n", store=LocalStore(path))
    except (BitmapError, OSError) as error:
        assert str(error)  # noqa: PT017
        return
    with graph:
        bitmap = node.bitmaps["b"]
        if not bitmap.inconsistent:
            assert {offset for offset in marked if bitmap.get(offset)} == marked


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("how", [_deleted, _renamed, _replaced, _linked])
@pytest.mark.parametrize("what", WHAT)
def test_what_is_no_longer_there_is_not_stored_to(
    path: Path, what: str, how: Callable[[Path], None], action: str
) -> None:
    graph = BlockGraph()
    node = graph.add_node("n", SIZE, LocalStore(path))
    node.add_bitmap("b", GROUP, persistent=True)
    node.mark_dirty(0, 1)
    graph.flush()
    file = _file(path, what)
    how(file)
    if what == "folder" and how is _linked:
        discard(graph)  # a store may be behind a link
        return
    before = content(path) if path.is_dir() else None
    node.mark_dirty(GROUP, 1)
    for _ in range(2):
        with pytest.raises(StoreError, match=f"{file.name}' was (deleted|replaced)"):
            ACTIONS[action](graph)
    node.mark_dirty(2 * GROUP, 1)  # it records still
    discard(graph)
    if what == "folder":
        assert (content(path) if path.is_dir() else None) == before
    marked = {0, GROUP, 2 * GROUP}
    check_nothing_is_missed(path, marked)
    if how is _renamed:
        file.with_suffix(".away").replace(file)
        with BlockGraph() as graph:
            node = graph.add_node("n", store=LocalStore(path))
            assert not node.bitmaps["b"].inconsistent
        check_nothing_is_missed(path, marked)


@pytest.mark.parametrize("what", WHAT)
def test_what_is_put_back_is_stored_to(path: Path, what: str) -> None:
    with BlockGraph() as graph:
        node = graph.add_node("n", SIZE, LocalStore(path))
        node.add_bitmap("b", GROUP, persistent=True)
        file = _file(path, what)
        _renamed(file)
        node.mark_dirty(GROUP, 1)
        with pytest.raises(StoreError, match="put it back"):
            graph.flush()
        file.with_suffix(".away").rename(file)
        graph.flush()
        node.mark_dirty(0, 1)
    [stored] = LocalStore(path).entries()
    assert not stored.bitmaps[0].in_use
    check_nothing_is_missed(path, {0, GROUP})


def test_a_catalog_that_is_replaced_while_it_is_written_is_noticed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look before and the end of the transaction."""
    graph = BlockGraph()
    node = graph.add_node("n", SIZE, LocalStore(path))
    node.add_bitmap("b", GROUP, persistent=True)
    put = LocalStore._rows

    def put_late(*args: object) -> object:
        with suppress(FileNotFoundError):
            (path / "catalog.sqlite").unlink()
        return put(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(LocalStore, "_rows", put_late)
    node.mark_dirty(0, 1)
    with pytest.raises(StoreError, match=r"catalog\.sqlite' was deleted"):
        graph.close()
    monkeypatch.undo()
    discard(graph)
    check_nothing_is_missed(path, {0})


def test_files_of_a_copy_in_the_place_of_the_store_stay(path: Path) -> None:
    """What an old bitmap still maps goes when that goes; not from a copy that has it, too."""
    graph = BlockGraph()
    node = graph.add_node("n", SIZE, LocalStore(path))
    bitmap = node.add_bitmap("b", GROUP, persistent=True)
    old = bitmap._cell.state.content
    shutil.copytree(path, path.with_suffix(".copy"))
    bitmap.clear()
    assert len(words_files(path)) == 2
    path.rename(path.with_suffix(".away"))
    path.with_suffix(".copy").rename(path)
    before = content(path)
    del old
    discard(graph)
    assert content(path) == before


def test_a_child_of_a_fork_keeps_what_it_has_read_of_a_replaced_file(path: Path) -> None:
    code = f"""
import os
from pathlib import Path
from pybitmap import BlockGraph
from pybitmap.store import LocalStore
graph = BlockGraph()
node = graph.add_node("n", {SIZE}, LocalStore({str(path)!r}))
words = node.add_bitmap("b", {GROUP}, persistent=True)._cell.state.content.words
node.mark_dirty(0, 1)
[file] = Path({str(path)!r}).glob("*.words")
file.rename(file.with_suffix(".away"))
file.write_bytes(bytes([255]) * 16)
pid = os.fork()
if not pid:
    print(words[0], flush=True)
    os._exit(0)
os.waitpid(pid, 0)
node.close(discard=True)
"""
    assert run_python(code).split() == ["1"]


# ---- what leads elsewhere, and what others may write to ----------------------------------------

NAMES = ["lock", "catalog.sqlite", "catalog.sqlite-journal"]
UNUSUAL = ["catalog.sqlite-wal", "catalog.sqlite-shm"]


@contextmanager
def soon() -> Iterator[None]:
    """What hangs is an error."""

    def late(number: int, frame: FrameType | None) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _fifo(file: Path) -> None:
    file.unlink(missing_ok=True)
    os.mkfifo(file)


def _directory(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.mkdir()


def _link_out(file: Path) -> None:
    away = file.parent.with_suffix(".away")
    away.write_bytes(file.read_bytes() if file.exists() else b"precious")
    file.unlink(missing_ok=True)
    file.symlink_to(away)


def _dangling(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.symlink_to(file.parent.with_suffix(".away"))


def _hard_link(file: Path) -> None:
    file.touch()
    os.link(file, file.parent.with_suffix(".away"))


def _open_to_all(file: Path) -> None:
    file.touch()
    file.chmod(0o666)


def _of_somebody_else(file: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    file.touch()
    os.chown(file, 4711, 4711)


BAD: dict[Callable[[Path], None], str] = {
    _fifo: "is no regular file",
    _directory: "is no regular file",
    _link_out: "is no regular file, but a symbolic link",
    _dangling: "is no regular file, but a symbolic link",
    _hard_link: "has 2 names",
    _open_to_all: "may be written to by anybody",
    _of_somebody_else: "belongs to user 4711",
}


def closed_store(path: Path) -> None:
    with BlockGraph() as graph:
        node = graph.add_node("n", SIZE, LocalStore(path))
        node.add_bitmap("b", GROUP, persistent=True)
        node.mark_dirty(0, 1)


def away(path: Path) -> bytes | None:
    """What lies behind a link."""
    file = path.with_suffix(".away")
    return file.read_bytes() if file.exists() else None


def tamper(path: Path, name: str, how: Callable[[Path], None]) -> bytes | None:
    closed_store(path)
    how(_file(path, name))
    return away(path)


@pytest.mark.parametrize("how", BAD)
@pytest.mark.parametrize("name", [*NAMES, *UNUSUAL])
def test_files_that_cannot_be_trusted_are_refused(
    path: Path, name: str, how: Callable[[Path], None]
) -> None:
    before = tamper(path, name, how)
    uses: list[Callable[[LocalStore], object]] = [
        lambda store: store.open("n", None, read_only=False).load(),
        lambda store: store.open("n", None, read_only=True).load(),
        LocalStore.entries,
    ]
    for use in uses[:1] if how is _hard_link else uses:  # reading a backup by hard links is fine
        with soon(), pytest.raises(StoreError, match=f"{name}' {BAD[how]}"):
            use(LocalStore(path))
        assert away(path) == before


@pytest.mark.parametrize("how", BAD)
def test_words_that_cannot_be_trusted_are_an_inconsistent_bitmap(
    path: Path, how: Callable[[Path], None]
) -> None:
    before = tamper(path, "words", how)
    for read_only in (True, False) if how is not _hard_link else (False,):
        graph = BlockGraph()
        with soon():
            node = graph.add_node("n", store=LocalStore(path), read_only=read_only)
        assert BAD[how] in (node.bitmaps["b"].reason or "")
        if not read_only:
            node.mark_dirty(GROUP, 1)
        graph.close()
        assert away(path) == before


@pytest.mark.parametrize("how", [_link_out, _dangling, _hard_link])
@pytest.mark.parametrize("name", NAMES)
def test_a_store_is_not_made_through_a_link(
    path: Path, name: str, how: Callable[[Path], None]
) -> None:
    path.mkdir()
    how(path / name)
    before = away(path)
    with pytest.raises(StoreError, match=BAD[how]):
        LocalStore(path).open("n", SIZE, read_only=False)
    assert away(path) == before


def test_a_backup_by_hard_links_can_be_read(path: Path) -> None:
    closed_store(path)
    copy = path.with_suffix(".copy")
    shutil.copytree(path, copy, copy_function=os.link)
    before = content(path)
    with BlockGraph() as graph:
        bitmap = graph.add_node("n", store=LocalStore(copy), read_only=True).bitmaps["b"]
        assert list(bitmap.areas()) == [(0, GROUP)]
    assert content(path) == before


def test_the_folder_may_be_behind_a_link(path: Path) -> None:
    path.with_suffix(".real").mkdir()
    path.symlink_to(path.with_suffix(".real"))
    closed_store(path)
    check_nothing_is_missed(path, {0})


DAEMON = 1  # a user, and a group of that name


@pytest.mark.parametrize(
    ("mode", "gid", "others"),
    [
        (0o700, 0, None),
        (0o755, 0, None),
        (0o775, 0, None),  # the owner's own group, as where the umask is 002
        (0o2775, 54321, None),  # which nobody is known to be in, as in containers
        (0o1777, 0, None),
        (0o1775, DAEMON, None),
        (0o777, 0, "anybody"),
        (0o707, 0, "anybody"),
        (0o775, DAEMON, "group daemon"),
    ],
)
def test_a_folder_that_others_may_write_to_is_refused(
    path: Path, mode: int, gid: int, others: str | None
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give folders to other groups")
    closed_store(path)
    os.chown(path, 0, gid)
    path.chmod(mode)
    for read_only in (True, False):
        store = LocalStore(path)
        if others is None:
            with closing(store.open("n", None, read_only=read_only)) as volume:
                assert [each.reason for each in volume.load()] == [None]
        else:
            with pytest.raises(StoreError, match=f"{others} may write to '.*chmod go-w"):
                store.open("n", None, read_only=read_only)


def test_the_owners_group_is_refused_if_it_has_other_members(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed_store(path)
    path.chmod(0o770)
    owner = pwd.getpwuid(path.stat().st_uid).pw_name
    members = [owner]
    group = grp.struct_group((owner, "x", path.stat().st_gid, members))
    monkeypatch.setattr(grp, "getgrgid", lambda gid: group)
    assert LocalStore(path).entries()
    members.append("mallory")
    with pytest.raises(StoreError, match=f"group {owner} may write to"):
        LocalStore(path).entries()


def test_the_store_of_another_user_is_read_by_root_and_not_written_to(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    closed_store(path)
    for each in (path, *path.iterdir()):
        os.chown(each, DAEMON, DAEMON)
    path.chmod(0o775)  # its own group's
    before = content(path)
    assert LocalStore(path).entries()[0].bitmaps[0].reason is None
    with pytest.raises(StoreError, match="belongs to user daemon: only its owner can write"):
        LocalStore(path).open("n", None, read_only=False)
    assert content(path) == before


def test_a_new_store_is_its_owners_only(path: Path) -> None:
    before = os.umask(0)
    try:
        closed_store(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert not any(each.stat().st_mode & 0o077 for each in path.iterdir())


# ---- locks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("read_only", [True, False])
def test_a_lock_file_that_is_missing_is_made(path: Path, read_only: bool) -> None:
    closed_store(path)
    (path / "lock").unlink()
    with closing(LocalStore(path).open("n", None, read_only=read_only)):
        assert (path / "lock").exists()
        with pytest.raises(LockedError):
            LocalStore(path).open("n", None, read_only=False)


def test_where_there_is_no_store_no_lock_is_made(path: Path) -> None:
    path.mkdir()
    with pytest.raises(StoreError, match="No such file"):
        LocalStore(path).entries()
    assert content(path) == {}


def test_a_lock_file_that_is_removed_before_it_is_locked_is_made_anew(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a twin would lock another."""
    closed_store(path)
    lock = LocalStore._flock
    removed: list[int] = []

    def lock_late(self: LocalStore, kind: int) -> None:
        if len(removed) < 2:
            (path / "lock").unlink()
            removed.append(1)
        lock(self, kind)

    monkeypatch.setattr(LocalStore, "_flock", lock_late)
    with closing(LocalStore(path).open("n", None, read_only=False)):
        file = os.open(path / "lock", os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        os.close(file)
    assert len(removed) == 2


def test_a_lock_file_that_is_removed_again_and_again_is_an_error(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed_store(path)
    lock = LocalStore._flock

    def lock_late(self: LocalStore, kind: int) -> None:
        (path / "lock").unlink()
        lock(self, kind)

    monkeypatch.setattr(LocalStore, "_flock", lock_late)
    with soon(), pytest.raises(StoreError, match="again and again"):
        LocalStore(path).open("n", None, read_only=False)


def test_of_twins_that_make_the_lock_file_one_has_the_store(path: Path) -> None:
    closed_store(path)

    def use(_: int) -> bool:
        try:
            with closing(LocalStore(path).open("n", None, read_only=False)) as volume:
                volume.load()
                inside.append(1)
                assert len(inside) == 1
                inside.pop()
        except LockedError:
            return False
        return True

    inside: list[int] = []
    with ThreadPoolExecutor(4) as threads:
        for _ in range(5):
            with suppress(FileNotFoundError):
                (path / "lock").unlink()
            assert any(list(threads.map(use, range(4))))


@pytest.mark.parametrize("what", ["lock", "catalog.sqlite"])
def test_locks_of_others_are_an_error_at_once(path: Path, what: str) -> None:
    closed_store(path)
    with open(path / what, "rb") as file, closing(sqlite3.connect(path / "catalog.sqlite")) as sql:
        if what == "lock":
            fcntl.flock(file, fcntl.LOCK_EX)
        else:
            sql.execute("BEGIN EXCLUSIVE")
        for read_only in (True, False):
            with soon(), pytest.raises(LockedError):
                LocalStore(path).open("n", None, read_only=read_only)


def test_a_reader_of_the_catalog_does_not_hang_the_end(path: Path) -> None:
    """A store without bitmaps has a reader's lock on it only, until something is stored."""
    with BlockGraph() as graph:
        graph.add_node("m", SIZE, LocalStore(path))
        graph.flush()
    graph = BlockGraph()
    node = graph.add_node("n", SIZE, LocalStore(path))
    with closing(sqlite3.connect(path / "catalog.sqlite")) as sql:
        sql.execute("BEGIN")
        with suppress(sqlite3.OperationalError):
            sql.execute("SELECT * FROM node").fetchall()
        with soon():
            try:
                node.add_bitmap("b", GROUP, persistent=True)
            except LockedError:
                assert "b" not in node.bitmaps
    with soon():
        graph.close()
