# SPDX-License-Identifier: MIT
"""The catalog of a :class:`LocalStore`: which nodes there are, and which bitmaps, in SQLite.

Changes are transactions that survive a crash of the system once they have returned. What is read is
checked first, since anybody may have written it: the format and the tables when the catalog is
opened, values when they are read. Errors of SQLite become StoreErrors. One connection, used under
the lock of its store.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import sqlite3
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, fields
from io import FileIO
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import get_ident
from typing import Any, Callable, TypeVar
from weakref import WeakSet

from .. import _core
from .._fork import in_child
from ..errors import BitmapError, CorruptError, InvalidError, LockedError, StoreError
from ..sizes import granularity_bits
from .opened import become_null, opened
from .private import check_file, opened_private, place
from .unlocked import changed, lacking, no_locks

_Answer = TypeVar("_Answer")

CATALOG, JOURNAL = "catalog.sqlite", "catalog.sqlite-journal"
#: What else SQLite would use that is beside a catalog: of another journal mode, which is not ours.
_FOREIGN = ("catalog.sqlite-wal", "catalog.sqlite-shm")

#: In the catalog's header: that it is one, and which.
APPLICATION_ID, VERSION = 0x70626D70, 3

SCHEMA = (
    # Sizes and granularities in bytes.
    "CREATE TABLE bitmap (node TEXT NOT NULL, name TEXT NOT NULL, position INTEGER NOT NULL,"
    " size INTEGER NOT NULL, granularity INTEGER NOT NULL, enabled INTEGER NOT NULL,"
    # Names of files. What is in the successor counts as in the bitmap itself.
    " words TEXT NOT NULL, successor TEXT,"
    # Of these files: see "Generations" in local.py.
    " generation INTEGER NOT NULL, successor_generation INTEGER,"
    # NULL: not in use. Else since which boot, and which files these are: a copy has others.
    " in_use TEXT, PRIMARY KEY (node, name)) WITHOUT ROWID",
    # The largest size that it has been since it has had bitmaps.
    "CREATE TABLE node (name TEXT NOT NULL PRIMARY KEY, size INTEGER NOT NULL,"
    " largest INTEGER NOT NULL) WITHOUT ROWID",
)

#: Result codes of SQLite, for which Python has names from 3.11 on.
_BUSY, _LOCKED, _READONLY, _IOERR, _CORRUPT, _FULL, _NOTADB = 5, 6, 8, 10, 11, 13, 26

_ERRNO = {_FULL: errno.ENOSPC, _IOERR: errno.EIO, _READONLY: errno.EROFS}

#: The texts of those codes, which are all that Python keeps of them before 3.11; and those of
#: Python's own errors.
_TEXTS = {
    "locked": _BUSY,
    "malformed": _CORRUPT,
    "not a database": _NOTADB,
    "decode": _CORRUPT,
    "disk is full": _FULL,
    "disk I/O error": _IOERR,
    "readonly database": _READONLY,
}

#: Is it the name of a file of words?
is_words = re.compile(r"[0-9a-f]{16}\.words").fullmatch


@dataclass(frozen=True)
class Row:
    """A row of the table of bitmaps."""

    node: str
    name: str
    position: int
    size: int
    granularity: int
    enabled: int
    words: str
    successor: str | None
    generation: int
    successor_generation: int | None
    in_use: str | None

    @property
    def nbytes(self) -> int:
        """Of each of its files."""
        return 8 * _core.nwords_of(self.size, granularity_bits(self.granularity))

    @property
    def files(self) -> dict[str, int]:
        """Its files, and their generations."""
        files = {self.words: self.generation}
        if self.successor is not None:
            assert self.successor_generation is not None
            files[self.successor] = self.successor_generation
        return files

    def check(self) -> str | None:
        """What is wrong with values that somebody else may have written, or None."""
        for field in fields(self):
            value = getattr(self, field.name)
            kind = int if "int" in field.type else str
            if not (isinstance(value, kind) or (value is None and "None" in field.type)):
                return f"{field.name} {value!r}"
        group = self.granularity
        if group < 1 or group & (group - 1):
            return f"granularity {group}"
        try:
            _core.check_size(self.size, granularity_bits(group))
        except InvalidError as error:
            return str(error)
        for name in filter(None, [self.words, self.successor]):
            if not is_words(name):
                return f"file name {name!r}"
        if (self.successor is None) is not (self.successor_generation is None):
            return f"successor {self.successor!r} of generation {self.successor_generation!r}"
        for generation in filter(None, [self.generation, self.successor_generation]):
            if not 0 <= generation < 1 << 62:
                return f"generation {generation}"
        return None


#: Threads that are in SQLite, and may hold its locks; is this the child of a fork that came right
#: then, which has these locks for good?
_threads_inside: set[int] = set()
_unusable = False


def _inside(call: Callable[[], _Answer]) -> _Answer:
    """Call, and be seen to be in SQLite meanwhile."""
    thread = get_ident()
    try:
        _threads_inside.add(thread)
        return call()
    finally:
        _threads_inside.discard(thread)


#: Of a connection in the child of a fork: SQLite counts its locks by process, and takes those of
#: connections that came along for its own. The store's lock does without.
_vfs = ""
_WITHOUT_LOCKS = "&vfs=unix-none"


#: Whose connections the child of a fork has; and what it has of these.
_open: WeakSet[Catalog] = WeakSet()
_kept: list[sqlite3.Connection] = []


def open_file(directory: Path, *, writing: bool) -> FileIO:
    """The file of a catalog; for writing, an empty one is made if there is none.

    It is to be kept while the store is open: what is at its path can then be told from it, and it
    says why it cannot be opened, which SQLite would not. It is to be closed after the catalog,
    since closing it takes SQLite's locks away.

    :raises StoreError: if it, or what SQLite has beside it, is not to be trusted
    :raises OSError: as open(2)
    """
    for name in (JOURNAL, *_FOREIGN):
        check_file(directory / name, writing=writing)
    flags = os.O_RDWR | os.O_CREAT if writing else os.O_RDONLY
    return opened_private(directory / CATALOG, flags)


class Catalog:
    """The SQLite database of a store, of which the file is there: see :func:`open_file`.

    The rollback journal, since readers then need no file that they would have to write, and one
    that stays (PERSIST), since its space is there already when the disk is full. synchronous=FULL
    syncs the journal before the database is written, the database before the journal is made
    invalid, and then the journal: a transaction that has returned survives a crash of the system.
    SQLite's own lock (locking_mode=EXCLUSIVE) is there should somebody remove the lock file.

    Without locks SQLite has none either. A reader then works on a copy, since the catalog may be
    changed meanwhile: :meth:`check_unchanged`.

    In the child of a fork it is not used any more, nor closed: see :func:`_after_fork`.
    """

    def __init__(self, directory: Path, *, writing: bool, lock: bool = True) -> None:
        self._path = directory / CATALOG
        #: What a copy was made of, if that may change: the catalog and its journal.
        self._seen: tuple[bytes, bytes] | None = None
        self._journal: tuple[int, int] | None = None
        self._copy: TemporaryDirectory[str] | None = None
        self._forked = False
        if _unusable:
            raise StoreError(
                "SQLite cannot be used in this process: another thread of its parent was in SQLite "
                "when this was forked; fork while no other thread changes a store, or spawn"
            )
        try:
            with self._errors():
                self._sql = _inside(lambda: self._connect(writing, lock))
            _open.add(self)
            self._prepare(writing)
        finally:
            if self._copy is not None:  # SQLite has it open, and needs no name
                self._copy.cleanup()

    def _prepare(self, writing: bool) -> None:
        try:
            with self._errors():
                if writing:
                    self._execute("PRAGMA locking_mode = EXCLUSIVE")
                    self._execute("PRAGMA journal_mode = PERSIST")
                    self._execute("PRAGMA synchronous = FULL")
                    self._execute("PRAGMA fullfsync = ON")
                if not self._is_empty():
                    self._check()
                    return
                if not writing:
                    # Its creation failed, as on a full disk: there is nothing.
                    _inside(self._sql.close)
                    self._sql = _inside(
                        lambda: sqlite3.connect(
                            ":memory:", isolation_level=None, check_same_thread=False
                        )
                    )
                self._create()
        except BaseException:
            self.close()
            raise

    def _connect(self, writing: bool, lock: bool) -> sqlite3.Connection:
        path = self._path
        journal = path.with_name(JOURNAL)
        vfs = _vfs if lock else _WITHOUT_LOCKS
        if not writing and (_first_byte(journal) or not lock):
            # A killed process left a transaction half done, or one may be under way. Taking it back
            # means writing, so that happens to a copy.
            self._copy = TemporaryDirectory()
            path = Path(self._copy.name) / CATALOG
            catalog, journalled = self._bytes()
            path.write_bytes(catalog)
            path.with_name(JOURNAL).write_bytes(journalled)
            if not lock:
                self._seen = catalog, journalled
                self.check_unchanged()
            mode = "rw"
        else:
            mode, flags = ("rw", os.O_RDWR) if writing else ("ro", os.O_RDONLY)
            with suppress(FileNotFoundError), opened(path, flags) as file:
                self._check_locks(file, vfs)
        return sqlite3.connect(
            f"{path.as_uri()}?mode={mode}{vfs}",
            uri=True,
            timeout=0,
            isolation_level=None,
            check_same_thread=False,
        )

    def _bytes(self) -> tuple[bytes, bytes]:
        """Of the catalog, and of its journal."""
        journal = b""
        catalog = self._path.read_bytes()
        with suppress(FileNotFoundError):
            journal = self._path.with_name(JOURNAL).read_bytes()
        return catalog, journal

    def check_unchanged(self) -> None:
        """What was read without a lock is there still.

        (In exclusive mode SQLite does not count its changes in the file, so all of it is compared.)

        :raises StoreError: if not
        """
        if self._seen is not None:
            with self._errors():
                if self._bytes() != self._seen:
                    raise changed(f"catalog '{self._path}'")

    def _check_locks(self, file: FileIO, vfs: str) -> None:
        """SQLite does not say that it lacks them. None is held afterwards."""
        if vfs != _WITHOUT_LOCKS:
            try:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                fcntl.lockf(file, fcntl.LOCK_UN)
            except OSError as error:  # that it is somebody else's, SQLite says
                if lacking(error):
                    raise no_locks(f"catalog '{self._path}'", error) from error

    def _execute(self, statement: str, values: Iterable[object] = ()) -> list[tuple[Any, ...]]:
        if self._forked:
            raise StoreError(f"catalog '{self._path}' was opened before a fork, by the parent")
        with self._errors():
            return _inside(lambda: self._sql.execute(statement, tuple(values)).fetchall())

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._translated(error) from error
        except UnicodeDecodeError as error:  # its own message names what is no UTF-8
            raise CorruptError(f"catalog '{self._path}': malformed text") from error
        except StoreError:
            raise
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise StoreError(f"catalog '{self._path}': {reason}", error.errno) from error

    def _translated(self, error: sqlite3.Error) -> Exception:
        message = f"catalog '{self._path}': {error}"
        code = _code(error)
        if code in (_BUSY, _LOCKED):
            return LockedError(message)
        if code in (_CORRUPT, _NOTADB):
            return CorruptError(message)
        return StoreError(message, _ERRNO.get(code))

    def _is_empty(self) -> bool:
        return not self._execute("SELECT 1 FROM sqlite_master LIMIT 1")

    def _create(self) -> None:
        def create() -> None:
            for statement in SCHEMA:
                self._execute(statement)
            self._execute(f"PRAGMA application_id = {APPLICATION_ID}")
            self._execute(f"PRAGMA user_version = {VERSION}")

        self.transaction(create)

    def _check(self) -> None:
        [(application,)] = self._execute("PRAGMA application_id")
        [(version,)] = self._execute("PRAGMA user_version")
        if application != APPLICATION_ID:
            raise CorruptError(f"catalog '{self._path}': a database of something else")
        if version != VERSION:
            raise CorruptError(
                f"catalog '{self._path}' has version {version}; this pybitmap reads {VERSION}"
            )
        found = self._execute("SELECT sql FROM sqlite_master WHERE sql NOT NULL ORDER BY name")
        if [sql for (sql,) in found] != list(SCHEMA):
            raise CorruptError(
                f"catalog '{self._path}': the tables are not those of version {VERSION}"
            )
        [(answer,)] = self._execute("PRAGMA quick_check(1)")
        if answer != "ok":
            raise CorruptError(f"catalog '{self._path}': {answer}")
        names: list[str] = []
        nbitmaps = 0
        for node, size, largest in self._execute("SELECT * FROM node ORDER BY name"):
            if not isinstance(node, str) or not isinstance(size, int) or size < 0:
                raise CorruptError(f"catalog '{self._path}': node {node!r}, size {size!r}")
            if not isinstance(largest, int) or largest < size:
                raise CorruptError(f"catalog '{self._path}': node {node!r}, largest {largest!r}")
            for row in self.rows(node):
                nbitmaps += 1
                names += filter(None, [row.words, row.successor])
        if self._execute("SELECT count(*) FROM bitmap") != [(nbitmaps,)]:
            raise CorruptError(f"catalog '{self._path}': bitmaps of no node")
        if len(set(names)) != len(names):
            raise CorruptError(f"catalog '{self._path}': two bitmaps share a file")

    def transaction(self, change: Callable[[], None]) -> None:
        """All that is changed in there, or nothing.

        No context manager, which an interruption can keep from ending; and if one comes right
        before the end here, :attr:`in_transaction` says so.
        """
        self._execute("BEGIN IMMEDIATE")
        try:
            change()
            self._execute("COMMIT")
        except BaseException:
            with suppress(BitmapError):
                self._execute("ROLLBACK")
            raise

    def moved_journal(self) -> Path | None:
        """The path of the journal, if what is there is no longer what SQLite has open.

        SQLite keeps it open from the first transaction on; a kill in the next one would find none.

        :raises StoreError: if the journal is not to be trusted
        """
        path = self._path.with_name(JOURNAL)
        if self._journal is None:
            check_file(path, writing=True)
            self._journal = place(path)
            return None
        return path if place(path) != self._journal else None

    @property
    def in_transaction(self) -> bool:
        """Was one begun, and has not ended?"""
        return self._sql.in_transaction

    def close(self) -> None:
        if self._forked:
            return
        with suppress(sqlite3.Error):
            _inside(self._sql.close)

    def __del__(self) -> None:
        """As when it is closed. SQLite's locks would stay as long as somebody has the connection,
        and who records warnings has it: from Python 3.13 on, that of its own end names it."""
        with suppress(AttributeError, sqlite3.Error):  # the first: there is none
            if not self._forked:
                self._sql.close()

    # ---- rows -------------------------------------------------------------------------------

    def nodes(self) -> list[tuple[str, int]]:
        found = self._execute("SELECT name, size FROM node ORDER BY name")
        return [(name, size) for name, size in found]

    def node_size(self, name: str) -> int | None:
        return self._sizes(name)[0]

    def largest(self, name: str) -> int:
        """What a node has been; 0: nothing, or there is no such node."""
        return self._sizes(name)[1]

    def _sizes(self, name: str) -> tuple[int | None, int]:
        found = self._execute("SELECT size, largest FROM node WHERE name = ?", [name])
        return found[0] if found else (None, 0)

    def rows(self, node: str) -> list[Row]:
        """The bitmaps of a node, the oldest first."""
        rows = []
        statement = "SELECT * FROM bitmap WHERE node = ? ORDER BY position"
        for values in self._execute(statement, [node]):
            row = Row(*values)
            wrong = row.check()
            if wrong:
                raise CorruptError(f"catalog '{self._path}': bitmap {row.name!r}: {wrong}")
            rows.append(row)
        return rows

    def files(self) -> set[str]:
        """The names in all rows."""
        found = self._execute("SELECT words, successor FROM bitmap")
        return {name for names in found for name in names if name is not None}

    def put_all(self, node: str, size: int | None, rows: Collection[Row]) -> None:
        """Make these the rows of a node; size None: and there is no such node."""
        before = {row.name: row for row in self.rows(node)}
        if size is None:
            self._execute("DELETE FROM node WHERE name = ?", [node])
        else:
            known = self._sizes(node)
            largest = max(size, known[1]) if rows else size
            if (size, largest) != known:
                self._execute("INSERT OR REPLACE INTO node VALUES (?, ?, ?)", [node, size, largest])
        for name in before.keys() - {row.name for row in rows}:
            self._execute("DELETE FROM bitmap WHERE node = ? AND name = ?", [node, name])
        for row in rows:
            if row != before.get(row.name):
                self.put(row)

    def put(self, row: Row) -> None:
        marks = ", ".join("?" * len(fields(row)))
        self._execute(f"INSERT OR REPLACE INTO bitmap VALUES ({marks})", astuple(row))


def _code(error: sqlite3.Error) -> int:
    """The result code of SQLite, without what extends it; 0: not known."""
    code: int | None = getattr(error, "sqlite_errorcode", None)
    if code is not None:
        return code & 0xFF
    return next((code for text, code in _TEXTS.items() if text in str(error)), 0)


def _first_byte(path: Path) -> int:
    """0 if there is none."""
    with suppress(FileNotFoundError), opened_private(path, os.O_RDONLY) as file:
        return sum(file.read(1))
    return 0


@in_child
def _after_fork() -> None:
    """In the child: keep the connections that came along from doing anything, now or ever.

    To close one that was in a transaction would take that back, in the files that are the parent's;
    and it would wait for a lost thread that was in SQLite. So they stay, also when Python ends,
    with files that are /dev/null.
    """
    global _unusable, _vfs
    _unusable |= bool(_threads_inside - {get_ident()})
    _threads_inside.clear()
    left = list(_open)
    if not left:
        return
    for each in left:
        each._forked = True
        _kept.append(each._sql)
        if sys.implementation.name == "cpython":  # which empties its modules at the end
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(each._sql))
    _vfs = _WITHOUT_LOCKS
    become_null(path for each in left for path in (each._path, each._path.with_name(JOURNAL)))
