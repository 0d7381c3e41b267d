# SPDX-License-Identifier: MIT
"""LocalStore: a directory that holds the bitmaps of one node or of several.

::

    DIR/lock                   flock: one process writes, or any number read
    DIR/catalog.sqlite         nodes and bitmaps, see catalog.py; beside it SQLite's journal
    DIR/<16 hex digits>.words  the leaf words of one bitmap, little-endian, mapped while it is open;
                               behind them 8 bytes, the generation

Workload: writes by the million go into a handful of bitmaps, which change their names, flags or
number a few times a day. So marks go straight to the mapped files and cost what they cost in
memory, while every change of what there is, is one SQLite transaction, synced before it counts.

Invariant: whenever bits of a file can change, the row that names it says *in use*, durably, with
the boot identifier of the running system. A process that is killed leaves its marks in the page
cache, so a row in use since this boot is exact once they are on the disk; one of an earlier boot is
inconsistent, as nobody knows which pages came there. A row that is not in use names files that were
synced before. What could not be written is lost for good: the kernel then drops it and reads what
was there before.

Generations: a number that a row and its file have, which grows when the row goes in use, and when
it is closed. So the row of one time does not go with the file of another, as in a copy that was
taken meanwhile. The row of a bitmap that is not in use has that of the file. Otherwise the file's
may be one less (killed before it was written, on loading) or one more (killed before the row was,
on closing), and what tells a copy is what the row says of the files themselves.

A file goes when no row names it and nothing maps it any more. Its space is reserved when it is
made: a full disk is an error there and never a fault in a mark.

Threads: one lock per store. Finalizers take none: they only unlink files that no row can name.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import hashlib
import mmap
import os
import secrets
import stat
import struct
import subprocess
import sys
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from functools import cache, partial
from io import FileIO
from pathlib import Path
from threading import RLock

from .. import _core
from .._fork import Process, in_child
from ..errors import (
    BitmapError,
    CorruptError,
    InvalidError,
    LockedError,
    MismatchError,
    ReadonlyError,
    StoreError,
    UnsupportedError,
)
from ..hbitmap import HBitmap
from ..sizes import granularity_bits
from .base import (
    Change,
    Piece,
    Purpose,
    Reading,
    Record,
    Store,
    StoredBitmap,
    StoredNode,
    Volume,
    Wanted,
)
from .catalog import CATALOG, JOURNAL, Catalog, Row, is_words, open_file
from .files import lock_holders, reported, sync_directory, sync_file
from .opened import is_open_here, opened
from .private import check_folder, opened_private, place, place_of, why_foreign
from .unlocked import NoLocksError, lacking, no_locks, steady

#: Behind the words of a file.
_GENERATION = struct.Struct("<Q")
#: Of a file that could not be written. (SQLite's integers end below it.)
_LOST = (1 << 64) - 1

_LOCK = "lock"
#: How often the lock file may be another before one gives up.
_TRIES = 20

_CHUNK = 1 << 22  # bytes read at once
_PIECE = 1 << 20  # the same, of who reads without loading: two of them are there at times


class LocalStore(Store):
    """The bitmaps of nodes in a directory, made if it is not there (its parent must be).

    One object may be given to several nodes, also of several graphs. While a node has it open for
    writing, every other process is refused (LockedError), and so is another LocalStore on the same
    directory in this one; readers share it with readers. The lock goes with the process that holds
    it, however that ends. Not to be used on both sides of a fork. No lock of others is waited for.

    What is open is what is at its path: when something of it was deleted, renamed or replaced,
    every change, flush and close is a StoreError that says what, and nothing is stored; put back,
    it goes on; given up (``close(discard=True)``), it is as after a kill. What leads elsewhere, or
    others can have put there, is refused: see private.py.

    A killed process loses no mark. What it had in use is synced when it is listed or read next, and
    marked in its file as lost if that fails, also by who only reads and may write to the file.
    After a crash of the system a bitmap that was in use is inconsistent. What a file system says it
    has reserved has to be true: copy-on-write ones (btrfs, ZFS, APFS) may run out of space
    nevertheless, and a write to the mapping is then a SIGBUS.

    Without locks: for reading none is taken and nobody's is heeded, so another process may go on
    with the store. What is read has every mark made before, and maybe some made meanwhile; if the
    catalog changed meanwhile, that is an error ("try again"). For writing, ``lock=False`` goes on
    where the file system has no locks: then nothing keeps another process from writing to the store
    as well, which destroys it. Locks that can be had are taken and heeded all the same; not
    SQLite's own, behind them.

    :param lock: False: do without locks, see above

    >>> from pybitmap import BlockGraph
    >>> with BlockGraph() as graph:
    ...     disk = graph.add_node("disk", 1 << 20, LocalStore("disks.bitmaps"))
    ...     daily = disk.add_bitmap("daily", persistent=True)
    ...     disk.mark_dirty(0, 1)
    >>> with BlockGraph() as graph:             # another program, another day
    ...     disk = graph.add_node("disk", store=LocalStore("disks.bitmaps"))
    ...     disk.bitmaps["daily"].count()
    65536
    """

    def __init__(self, path: str | os.PathLike[str], *, lock: bool = True) -> None:
        self.path: Path = Path(os.path.abspath(path))
        self.lock = lock
        self._lock = RLock()
        self._volumes: dict[str, LocalVolume] = {}
        self._process = Process()  # that opened it
        # Held while a volume is open.
        self._lock_file: FileIO | None = None
        self._catalog_file: FileIO | None = None
        self._folder: tuple[int, int] | None = None
        self._writing = False
        self._catalog: Catalog | None = None
        # Where its files are: at its path or, while it is made, aside. See making.
        self._at = self.path
        self._aside: Path | None = None
        self._held = False  # is the lock of what is made aside kept, until it has its name?
        self._files = _Files(self.path)

    def __repr__(self) -> str:
        return f"LocalStore({str(self.path)!r})"

    @classmethod
    def probe(cls, path: str | os.PathLike[str]) -> bool:
        return stat.S_ISDIR(os.stat(path).st_mode) and CATALOG in os.listdir(path)

    @classmethod
    def vacant(cls, path: str | os.PathLike[str]) -> bool:
        """May a store be made at a path? Where nothing is, or a directory that is empty but for
        what is left of an attempt to make one.

        :raises OSError: if it cannot be looked at

        >>> from pathlib import Path
        >>> Path("empty").mkdir()
        >>> LocalStore.vacant("not there"), LocalStore.vacant("empty"), LocalStore.vacant("/")
        (True, True, False)
        """
        try:
            if not stat.S_ISDIR(os.stat(path).st_mode):
                return False
        except FileNotFoundError:
            return True
        return not _has_catalog(path) and not _others(path)

    @contextmanager
    def making(self, *, at_once: bool = False) -> Iterator[None]:
        vacant, folder = self.vacant(self.path), os.path.lexists(self.path)
        if at_once and not folder and self.lock:
            name = hashlib.sha256(os.fsencode(self.path.name)).hexdigest()[:16]
            self._aside = self.path.with_name(f".{name}.new-bitmaps")
        try:
            yield
            with self._lock, reported(f"cannot make store '{self.path}'"):
                self._appear()
        except BaseException:
            if vacant:
                with suppress(BitmapError, OSError):
                    self._unmake()
                if self._at != self.path or not folder:
                    with suppress(OSError):  # somebody has put something there
                        os.rmdir(self._at)
            raise
        finally:
            self._at, self._aside, self._held = self.path, None, False
            with self._lock:
                self._release_if_unused()

    def _appear(self) -> None:
        """What was made aside is at its path from now on.

        :raises LockedError: if somebody else has made one there
        """
        if not self._held:
            return
        self._check_process()
        try:
            os.rename(self._at, self.path)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise self._made_meanwhile() from None
            raise
        self._at, self._held = self.path, False
        sync_directory(self.path.parent)

    def _made_meanwhile(self) -> LockedError:
        return LockedError(
            f"store '{self.path}' was made by another process just now, so nothing was stored: "
            "try again"
        )

    def _unmake(self) -> None:
        """Remove what a store has in its directory, if no node is stored.

        :raises BitmapError, OSError: if it is in use, or cannot be looked at or changed
        """
        with self._lock:
            if self._held:
                if self._process.is_this():
                    self._empty()
                    os.unlink(self._at / _LOCK)
                return
            if self._lock_file is not None or not os.path.lexists(self._at / _LOCK):
                return
            try:
                self._take_lock(writing=True)
                if not _has_catalog(self._at) or not self._has_nodes():
                    self._empty()
                    os.unlink(self._at / _LOCK)  # the last, held until then
            except NoLocksError:  # nor has anybody else any
                if os.listdir(self._at) == [_LOCK]:
                    os.unlink(self._at / _LOCK)
            finally:
                self._release_if_unused()

    def _empty(self) -> None:
        """Remove what a store has in its directory, but for the lock."""
        for name in (CATALOG, JOURNAL, *filter(is_words, os.listdir(self._at))):
            with suppress(FileNotFoundError):
                os.unlink(self._at / name)

    def _has_nodes(self) -> bool:
        with closing(Catalog(self._at, writing=False, lock=self.lock)) as catalog:
            return bool(catalog.nodes())

    def open(self, node: str, size: int | None, *, read_only: bool) -> LocalVolume:
        with self._lock:
            if node in self._volumes:
                raise LockedError(f"node '{node}' of store '{self.path}' is open already")
            try:
                node.encode()
            except UnicodeEncodeError:
                raise InvalidError(f"node name {node!r} is no valid Unicode") from None
            unknown = f"store '{self.path}' does not know the size of node '{node}'"
            if size is None and not read_only and not os.path.lexists(self._at / CATALOG):
                # Nor is one to be made for that.
                raise InvalidError(f"{unknown}: no store is there; a size makes one")
            self._acquire(writing=not read_only)
            try:
                known = self._sql().node_size(node)
                if size is None:
                    size = known
                if size is None:
                    raise InvalidError(unknown)
                if known is not None and size != known and self._sql().rows(node):
                    raise MismatchError(
                        f"node '{node}' has {size} bytes, but {known} in store '{self.path}'"
                    )
                _core.check_size(size, 63)
                volume = LocalVolume(self, node, size, read_only=read_only)
                if size == known:
                    volume.largest = self._sql().largest(node)
                self._volumes[node] = volume
                return volume
            finally:
                self._release_if_unused()

    def prepare(self, wanted: Mapping[Volume, Wanted], purpose: Purpose) -> Change:
        with self._lock:
            plan: dict[LocalVolume, Wanted] = {}
            files: dict[str, _Words] = {}
            for volume, each in wanted.items():
                assert isinstance(volume, LocalVolume)
                assert self._volumes.get(volume.node) is volume, f"{volume.node} is closed"
                if volume.read_only:
                    raise ReadonlyError(f"node '{volume.node}' is read-only")
                plan[volume] = each
                for record in each.records:
                    for content in (record.content, record.successor):
                        if content is not None:
                            words = self._words_of(content, each.size, record.granularity)
                            files[words.name] = words
            self._check_process()
            if all(volume.at_rest for volume in plan):
                purpose = Purpose.CLOSE  # nothing of it goes in use
            self._check_place(files.values())
            if purpose is not Purpose.COMMIT:
                self._sync(files.values(), last=purpose is Purpose.CLOSE)
            return _LocalChange(self, plan, purpose, files.values())

    def entries(self) -> list[StoredNode]:
        with self._lock:
            self._acquire(writing=False)
            try:
                catalog = self._sql()
                with steady(catalog.check_unchanged):
                    return [
                        StoredNode(
                            name, size, [self._stored(row, size) for row in catalog.rows(name)]
                        )
                        for name, size in catalog.nodes()
                    ]
            finally:
                self._release_if_unused()

    def _stored(self, row: Row, size: int) -> StoredBitmap:
        return StoredBitmap(
            row.name,
            row.granularity,
            bool(row.enabled),
            reason=self._broken(row, size),
            in_use=row.in_use is not None,
        )

    # ---- opening and closing ----------------------------------------------------------------

    def _acquire(self, *, writing: bool) -> None:
        """The lock and the catalog."""
        self._check_process()
        if sys.byteorder != "little":
            raise UnsupportedError(
                f"store '{self.path}': its files are little-endian words, mapped as they are, and "
                "this machine is big-endian; keep bitmaps in a qcow2 image here"
            )
        if self._lock_file is not None and (self._writing or not writing):
            return
        try:
            with reported(f"cannot open store '{self.path}'"):
                if writing and self._aside is not None and not os.path.lexists(self.path):
                    self._at = self._aside
                self._take_lock(writing)
                if self._at != self.path:
                    self._held = True
                    self._empty()  # what a kill has left
                for held in (self._catalog, self._catalog_file):  # of a reader
                    if held is not None:
                        held.close()
                self._writing, self._catalog = writing, None
                _boot()
                if writing:
                    self._check_directory()
                self._catalog_file = open_file(self._at, writing=writing)
                self._sql()
                if writing:
                    self._files = _Files(self._at, filter(is_words, os.listdir(self._at)))
                    self._sweep()
        except BaseException:
            self._give_back()
            raise

    def _give_back(self) -> None:
        """After a failed :meth:`_acquire`: the readers there are keep their lock."""
        self._writing = False
        if not self._volumes:
            self._release_if_unused()
            return
        catalog, self._catalog = self._catalog, None
        if catalog is not None:
            catalog.close()
        assert self._lock_file is not None
        with suppress(OSError):
            kind = fcntl.LOCK_SH if self.lock else fcntl.LOCK_UN
            fcntl.flock(self._lock_file, fcntl.LOCK_NB | kind)

    def _take_lock(self, writing: bool) -> None:
        """Of a file that is there still when it is locked: somebody may have removed it before, and
        a twin have locked another."""
        kind = fcntl.LOCK_EX if writing else fcntl.LOCK_SH
        if writing:
            with suppress(FileExistsError):
                os.mkdir(self._at, 0o700)
                sync_directory(self._at.parent)
        check_folder(self._at, writing=writing)
        if self._lock_file is not None:
            self._flock(kind)
            return
        if writing:
            self._check_directory(locked=False)  # before anything is made in one that is not ours
        for _ in range(_TRIES):
            self._process = Process()
            self._lock_file = self._open_lock(writing)
            self._flock(kind)
            if place(self._at / _LOCK) == place_of(self._lock_file.fileno()):
                self._folder = place(os.path.realpath(self._at))
                return
            self._lock_file.close()
            self._lock_file = None
        if self._at != self.path:
            raise self._made_meanwhile()
        raise StoreError(f"'{self._at / _LOCK}' is removed again and again", errno.EAGAIN)

    def _open_lock(self, writing: bool) -> FileIO:
        """Where there is a store, but no lock, it is made anew: it holds nothing."""
        path = self._at / _LOCK
        if not writing:
            try:
                return opened_private(path, os.O_RDONLY)
            except FileNotFoundError:
                if not _has_catalog(self._at):
                    raise
        return opened_private(path, os.O_RDWR | os.O_CREAT)

    def _flock(self, kind: int) -> None:
        assert self._lock_file is not None
        if not self.lock and kind == fcntl.LOCK_SH:
            return
        try:
            fcntl.flock(self._lock_file, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            pass
        except OSError as error:
            if not lacking(error):
                raise
            if self.lock:
                raise no_locks(f"store '{self.path}'", error) from error
            gc.collect()  # of a graph that nobody has any more
            if is_open_here(self._lock_file):  # which needs no locks to be known
                raise self._locked({os.getpid()}) from None
            return
        holders = lock_holders(os.fstat(self._lock_file.fileno()).st_ino)
        if os.getpid() in holders:
            gc.collect()  # of a graph that nobody has any more
        try:
            fcntl.flock(self._lock_file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._locked(holders) from None

    def _locked(self, holders: set[int]) -> LockedError:
        if os.getpid() in holders:
            return LockedError(
                f"store '{self.path}' is in use in this process already, by another LocalStore: "
                "give one object to all of its nodes"
            )
        by = " (process " + ", ".join(map(str, sorted(holders))) + ")" if holders else ""
        return LockedError(f"store '{self.path}' is in use by another process{by}")

    def _check_directory(self, *, locked: bool = True) -> None:
        """Without a catalog, a directory with anything else in it is not ours.

        :param locked: else another process may be making a store there, its bits first
        """
        others = set() if _has_catalog(self._at) else _others(self._at)
        if not locked:
            others = {name for name in others if not is_words(name)}
        if others:
            raise CorruptError(f"'{self._at}' is no store: it has no catalog, but '{min(others)}'")

    def _check_process(self) -> None:
        if self._lock_file is not None and not self._process.is_this():
            raise StoreError(
                f"store '{self.path}' was opened by process {self._process.pid}: "
                f"a store cannot be used on both sides of a fork"
            )

    def _sql(self) -> Catalog:
        """The catalog; opened again if its last transaction failed, or was left in its midst."""
        self._check_process()
        if self._catalog is not None and self._catalog.in_transaction:
            catalog, self._catalog = self._catalog, None
            catalog.close()
        if self._catalog is None:
            if self._volumes:
                self._check_place()
            self._catalog = Catalog(self._at, writing=self._writing, lock=self.lock)
        return self._catalog

    def _check_unchanged(self) -> None:
        """An error of what was read without a lock is one if it belongs together."""
        with self._lock:
            if self._catalog is not None:
                self._catalog.check_unchanged()

    def _check_place(self, files: Iterable[_Words] = ()) -> None:
        """What is open is what is at its path: nothing is written to what is not, or taken for
        stored that nobody will find.

        :raises StoreError: what was deleted, renamed or replaced
        """
        here: list[tuple[Path, tuple[int, int] | None]] = [
            (Path(os.path.realpath(self._at)), self._folder)
        ]
        for name, file in ((_LOCK, self._lock_file), (CATALOG, self._catalog_file)):
            assert file is not None
            here.append((self._at / name, place_of(file.fileno())))
        here += [(words.path, words.place) for words in files]
        with reported(f"cannot look at store '{self.path}'"):
            for path, wanted in here:
                found = place(path)
                if found != wanted:
                    raise self._moved(path, found is None)
            journal = self._catalog.moved_journal() if self._catalog and self._writing else None
            if journal is not None:
                raise self._moved(journal, place(journal) is None)

    def _moved(self, path: Path, missing: bool) -> StoreError:
        what = "deleted or renamed" if missing else "replaced by another"
        return StoreError(
            f"'{path}' was {what} while store '{self.path}' was open, so nothing is stored: put it "
            "back and try again, or give up (close with discard=True; all that was marked is in "
            "the files that were there)",
            errno.ESTALE,
        )

    def _close_volume(self, volume: LocalVolume) -> None:
        with self._lock:
            if self._volumes.get(volume.node) is volume:
                del self._volumes[volume.node]
            self._release_if_unused()

    def _release_if_unused(self) -> None:
        if self._volumes or self._lock_file is None:
            return
        if self._catalog is not None:
            self._catalog.close()
            self._catalog = None
        if self._catalog_file is not None:
            self._catalog_file.close()
            self._catalog_file = None
        if self._process.is_this():
            self._files.close()
        self._files = _Files(self._at)
        self._writing = False
        if self._held:
            return
        if self._process.is_this():  # else a child of a fork would keep it
            with suppress(OSError, ValueError):
                fcntl.flock(self._lock_file, fcntl.LOCK_UN)
        self._lock_file.close()
        self._lock_file = None

    # ---- files ------------------------------------------------------------------------------

    def _make(self, size: int, granularity: int) -> HBitmap:
        """A bitmap on a new file, which no row names yet."""
        with self._lock:
            self._check_process()
            bits = granularity_bits(granularity)
            _core.check_size(size, bits)
            name = secrets.token_hex(8) + ".words"
            path = self._at / name
            nbytes = 8 * _core.nwords_of(size, bits)
            self._files.names.add(name)
            try:
                what = f"no bitmap of {nbytes} bytes in store '{self.path}'"
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
                self._check_place()
                with reported(what), opened(path, flags) as file:
                    _reserve(file.fileno(), nbytes + _GENERATION.size)
                    words = _Words(file.fileno(), nbytes, path)
            except BaseException:
                self._files.unlink(name)
                raise
            self._files.map(words)
            return HBitmap._over(words, size, bits)

    def _words_of(self, content: HBitmap, size: int, granularity: int) -> _Words:
        words = content._memory
        assert isinstance(words, _Words), "made by make() or load()"
        assert self._files.mapped.get(words.name) is words, "of this store, since it was opened"
        assert (content.size, 1 << content.granularity) == (size, granularity)
        return words

    def _sync(self, files: Collection[_Words], *, last: bool) -> None:
        """What was marked in them before is on the disk; if nothing is marked any more, it is so
        for certain, and their names are there too."""
        todo = _Progress(self, "storing", sum(words.nbytes for words in files))
        with reported(f"cannot write to store '{self.path}'"):
            for words in files:
                if not words.lost and not words.rests:
                    words.sync(last=last)
                todo.more(words.nbytes)
            if last:
                sync_directory(self._at)

    def _sweep(self) -> None:
        """Unlink the files that no row names. What cannot be done now comes with the next."""
        with suppress(StoreError):
            self._files.sweep(self._sql().files())

    # ---- bitmaps ----------------------------------------------------------------------------

    def _load(self, volume: LocalVolume) -> list[StoredBitmap]:
        with self._lock:
            catalog = self._sql()
            rows = [(row, self._stored(row, volume.size)) for row in catalog.rows(volume.node)]
            total = sum(row.nbytes * len(row.files) for row, each in rows if not each.inconsistent)
            todo = _Progress(self, "loading", total)
            loaded, changed = [], []
            for row, stored in rows:
                content = None
                if not stored.inconsistent:
                    content = self._load_file(row.words, row, volume, todo)
                    if row.successor is not None:
                        content.merge(self._load_file(row.successor, row, volume, todo))
                    if not volume.read_only and not _rests(row, volume):
                        words = content._memory
                        assert isinstance(words, _Words)
                        after = replace(
                            row,
                            generation=words.generation,
                            successor=None,
                            successor_generation=None,
                        )
                        after = replace(after, in_use=self._in_use(after))
                        changed.append((after, words))
                loaded.append(replace(stored, content=content))
            if changed:

                def put(catalog: Catalog) -> None:
                    for row, _ in changed:
                        catalog.put(row)

                self._transaction(put)
                self._sweep()
                for row, words in changed:
                    with reported(f"cannot load bitmap '{row.name}' of node '{row.node}'"):
                        words.put_generation(words.generation)
            return loaded

    def _read_all(self, volume: LocalVolume) -> list[Reading]:
        with self._lock:
            rows = self._sql().rows(volume.node)
            stored = [(row, self._stored(row, volume.size)) for row in rows]
            total = sum(
                row.nbytes * len(row.files) for row, each in stored if not each.inconsistent
            )
            todo = _Progress(self, "loading", total)
            return [
                Reading(each, partial(self._pieces, None if each.inconsistent else row, todo))
                for row, each in stored
            ]

    def _pieces(self, row: Row | None, todo: _Progress) -> Iterator[Piece]:
        """For :class:`Reading`: a chunk at a time, that of the successor merged."""
        if row is None:
            return
        self._check_process()
        bits = granularity_bits(row.granularity)
        what = f"cannot load bitmap '{row.name}' of node '{row.node}'"
        with steady(self._check_unchanged), ExitStack() as stack:
            with reported(what):
                files = [
                    stack.enter_context(opened_private(self._at / name, os.O_RDONLY))
                    for name in row.files
                ]
            for at in range(0, row.nbytes, _PIECE):
                nbytes = min(_PIECE, row.nbytes - at)
                start, end = 8 * at << bits, min(8 * (at + nbytes) << bits, row.size)
                with reported(what):
                    parts = [
                        HBitmap._over(_read(file, nbytes, todo), end - start, bits)
                        for file in files
                    ]
                for part in parts[1:]:
                    parts[0].merge(part)
                yield Piece(start, parts[0])

    def _load_file(self, name: str, row: Row, volume: LocalVolume, todo: _Progress) -> HBitmap:
        bits = granularity_bits(row.granularity)
        flags = os.O_RDONLY if volume.read_only else os.O_RDWR
        what = f"cannot load bitmap '{row.name}' of node '{row.node}'"
        with reported(what), opened_private(self._at / name, flags) as file:
            if volume.read_only:
                memory = _read(file, row.nbytes, todo)
                return HBitmap._over(memory, row.size, bits)
            # Reserved again: a copy of the directory may have holes.
            _reserve(file.fileno(), row.nbytes + _GENERATION.size)
            generation, rests = _generation(file.fileno(), row.nbytes), _rests(row, volume)
            words = _Words(
                file.fileno(), row.nbytes, self._at / name, generation + (not rests), rests
            )
        self._files.map(words)
        content = HBitmap._over(words, row.size, bits)
        todo.more(row.nbytes)
        return content

    def _in_use(self, row: Row) -> str:
        """What says in a row that it is in use: since this boot, with these files."""
        return " ".join([_boot(), *(_identity(self._at / name) for name in row.files)])

    def _broken(self, row: Row, size: int) -> str | None:
        """Why a stored bitmap is inconsistent, or None."""
        if row.size != size:
            return f"it was stored for {row.size} bytes, the node has {size}"
        nbytes = row.nbytes + _GENERATION.size
        generations = []
        for name in row.files:
            try:
                status = os.lstat(self._at / name)
                foreign = why_foreign(self._at / name, status, writing=self._writing)
                if foreign:
                    return f"its bits cannot be read: {name} {foreign}"
                if status.st_size < nbytes:
                    return f"its bits are cut short: {name} has {status.st_size} of {nbytes} bytes"
                if status.st_size > nbytes:
                    return f"its bits do not fit: {name} has {status.st_size} bytes, not {nbytes}"
                with opened_private(self._at / name, os.O_RDONLY) as file:
                    generations.append(_generation(file.fileno(), row.nbytes))
            except OSError as error:
                return f"its bits cannot be read: {name}: {os.strerror(error.errno or 0)}"
        if _LOST in generations:
            return "its bits could not be written to the disk, so marks may be missing"
        wanted = row.files.values()
        if row.in_use is None:
            if generations != list(wanted):
                return "its files are of another time than the catalog, as in a copy of both in use"
            return None
        if row.in_use.split(" ")[0] != _boot():
            return "it was in use when the system went down, so marks may be missing"
        try:
            same = row.in_use == self._in_use(row)
        except OSError as error:  # it went just now
            return f"its bits cannot be read: {os.strerror(error.errno or 0)}"
        if not same or any(abs(found - each) > 1 for found, each in zip(generations, wanted)):
            return "it was in use when its files were copied or replaced"
        for name in row.files:
            # What the kernel could not write it says once. Then it drops it, sooner or later.
            try:
                with opened_private(self._at / name, os.O_RDONLY) as file:
                    sync_file(file.fileno())
            except OSError as error:
                _lose(self._at / name, row.nbytes)
                return f"its bits could not be written to the disk: {os.strerror(error.errno or 0)}"
        return None

    def _switch(
        self,
        plan: Mapping[LocalVolume, Wanted],
        purpose: Purpose,
        files: Collection[_Words],
        change: Change,
    ) -> None:
        with self._lock:
            before: dict[str, tuple[int | None, list[Row]]] = {}

            def put(catalog: Catalog) -> None:
                for volume, wanted in plan.items():
                    assert self._volumes.get(volume.node) is volume, f"{volume.node} is closed"
                    rows = catalog.rows(volume.node)
                    before[volume.node] = catalog.node_size(volume.node), rows
                    rows = self._rows(volume.node, wanted, rows, purpose)
                    catalog.put_all(volume.node, wanted.size, rows)

            def take_back(catalog: Catalog) -> None:
                for node, (size, rows) in before.items():
                    catalog.put_all(node, size, rows)

            try:
                self._transaction(put, files)
            except BaseException:
                # It may have come behind the commit. Whoever raises goes on with what was before.
                with suppress(StoreError):
                    self._transaction(take_back)
                    change.unknown = False
                raise
            for volume, wanted in plan.items():
                volume.size = wanted.size
            self._sweep()

    def _rows(
        self, node: str, wanted: Wanted, before: Iterable[Row], purpose: Purpose
    ) -> list[Row]:
        """What the rows of a node are to be."""
        old = {row.name: row for row in before}
        rows: list[Row] = []
        position = 0
        for record in wanted.records:
            row = old.get(record.name)
            if record.content is None and row is None:
                continue
            # As it is where it may be: otherwise, removing the first would change them all.
            position = max(position + 1, row.position if row else 0)
            if record.content is not None:
                row = self._row(node, position, wanted.size, record, purpose)
            assert row is not None
            rows.append(replace(row, position=position))
        return rows

    def _row(self, node: str, position: int, size: int, record: Record, purpose: Purpose) -> Row:
        assert record.content is not None
        contents = [record.content] + ([] if record.successor is None else [record.successor])
        files = [self._words_of(each, size, record.granularity) for each in contents]
        self._files.named.update(words.name for words in files)
        closes = purpose is Purpose.CLOSE and not any(words.lost for words in files)
        row = Row(
            node,
            record.name,
            position,
            size,
            record.granularity,
            int(record.enabled),
            files[0].name,
            files[1].name if len(files) == 2 else None,
            files[0].generation_when(closed=closes),
            files[1].generation_when(closed=closes) if len(files) == 2 else None,
            None,
        )
        return row if closes else replace(row, in_use=self._in_use(row))

    def _transaction(
        self, change: Callable[[Catalog], None], files: Collection[_Words] = ()
    ) -> None:
        """One change of the catalog, which is where it was opened, and so are the files, before and
        afterwards. If it fails, nobody knows for certain what is stored: the catalog is opened and
        read again when it is needed next."""
        catalog = self._sql()
        try:
            with reported(f"cannot write to store '{self.path}'"):
                self._check_place(files)
                catalog.transaction(lambda: change(catalog))
                self._check_place(files)
        except BaseException:
            self._catalog = None
            catalog.close()
            raise


class LocalVolume(Volume):
    """The bitmaps of one node in a :class:`LocalStore`."""

    resizable = True
    keeps_marks = True
    store: LocalStore

    def __init__(self, store: LocalStore, node: str, size: int, *, read_only: bool) -> None:
        super().__init__(store, node, size, read_only=read_only)
        self.filename = str(store.path)

    def load(self) -> list[StoredBitmap]:
        with steady(self.store._check_unchanged):
            return self.store._load(self)

    def read(self) -> list[Reading]:
        with steady(self.store._check_unchanged):
            return self.store._read_all(self)

    def check_new(self, name: str, granularity: int, names: Collection[str]) -> None:
        """Every bitmap can be stored."""

    def make(self, granularity: int, size: int | None = None) -> HBitmap:
        return self.store._make(self.size if size is None else size, granularity)

    def close(self) -> None:
        self.store._close_volume(self)


class _LocalChange(Change):
    """Nothing waits in the catalog: new files are there already, and go with their bitmaps."""

    def __init__(
        self,
        store: LocalStore,
        plan: Mapping[LocalVolume, Wanted],
        purpose: Purpose,
        files: Collection[_Words],
    ) -> None:
        self._store, self._plan, self._purpose, self._files = store, plan, purpose, files

    def switch(self) -> None:
        self._store._switch(self._plan, self._purpose, self._files, self)

    def abort(self) -> None:
        pass


def _has_catalog(path: str | os.PathLike[str]) -> bool:
    """One with something in it: without, it is left of an attempt to make one."""
    try:
        status = os.lstat(os.path.join(path, CATALOG))
    except FileNotFoundError:
        return False
    return status.st_size > 0 or not stat.S_ISREG(status.st_mode)


def _others(path: str | os.PathLike[str]) -> set[str]:
    """What is in a directory, but for what a store has there before its catalog is made."""
    return set(os.listdir(path)) - {_LOCK, CATALOG, JOURNAL}


# ---- files ----------------------------------------------------------------------------------


#: Those of stores of this process.
_mappings: weakref.WeakSet[_Words] = weakref.WeakSet()


@in_child
def _after_fork() -> None:
    """In the child: what its parent has mapped is not to be changed, whoever still can."""
    for words in list(_mappings):
        # Another file there has other words; without one, those in memory are copied.
        path = words.path if place(words.path) == words.place else ""
        _core.hbfile_detach(words.words, words.nbytes, os.fsencode(path))


class _Words(_core.Memory):
    """A mapped file of leaf words."""

    __slots__ = ("generation", "lost", "mapping", "name", "nbytes", "path", "place", "rests")

    def __init__(
        self, fd: int, nbytes: int, path: Path, generation: int = 0, rests: bool = False
    ) -> None:
        self.mapping = _mapped(fd, nbytes)
        super().__init__(self.mapping)
        self.nbytes = nbytes
        self.path = path
        self.name = path.name
        #: Which file it is, whatever comes to be at its path.
        self.place = place_of(fd)
        #: That of its row, while that is in use.
        self.generation = generation
        #: Is it as its row has it, which is not in use, and not to be marked in?
        self.rests = rests
        #: Could it not be written?
        self.lost = False
        _mappings.add(self)

    def sync(self, *, last: bool) -> None:
        """What was marked before the call is on the disk.

        Linux's fdatasync writes what was changed through mappings as well, being what its msync
        calls, and it lets other threads run.

        :param last: nothing is marked any more, and it goes out of use
        :raises OSError: what was marked may be gone, see :func:`_lose`
        """
        if last:
            self.put_generation(self.generation_when(closed=True))
        with self._opened() as file:
            try:
                if sys.platform != "linux":
                    self.mapping.flush()
                sync_file(file.fileno())
            except OSError:
                self.lost = True
                with suppress(OSError):
                    os.pwrite(file.fileno(), _GENERATION.pack(_LOST), self.nbytes)
                raise

    def generation_when(self, *, closed: bool) -> int:
        """That of its row, while that is in use or once it is not."""
        return self.generation + (closed and not self.rests)

    def put_generation(self, generation: int) -> None:
        """
        :raises OSError: nothing has changed
        """
        with self._opened() as file:
            os.pwrite(file.fileno(), _GENERATION.pack(generation), self.nbytes)

    def _opened(self) -> FileIO:
        """For writing.

        :raises OSError: also if it is no longer at its path
        """
        file = opened(self.path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        if place_of(file.fileno()) != self.place:
            file.close()
            raise StoreError(f"'{self.path}' was replaced by another file", errno.ESTALE)
        return file


def _rests(row: Row, volume: LocalVolume) -> bool:
    """Does the bitmap not go in use when its volume is opened?"""
    return volume.at_rest and row.in_use is None


def _generation(fd: int, nbytes: int) -> int:
    """
    :param nbytes: of the words
    """
    data = os.pread(fd, _GENERATION.size, nbytes)
    if len(data) != _GENERATION.size:
        raise OSError(errno.EIO, "the file has become shorter")
    generation: int
    [generation] = _GENERATION.unpack(data)
    return generation


def _lose(path: Path, nbytes: int) -> None:
    """Let nobody take the words of a file for whole, also who opens it after a kill.

    The kernel may have dropped what it could not write, and reports it once.
    """
    with suppress(OSError), opened_private(path, os.O_RDWR) as file:
        os.pwrite(file.fileno(), _GENERATION.pack(_LOST), nbytes)


def _identity(path: Path) -> str:
    """What a copy of a file does not have; but one that is written over it in place.

    :raises OSError: if it cannot be looked at
    """
    identity = _core.new("uint64_t[4]")
    code = _core.hbfile_identity(os.fsencode(path), identity)
    if code:
        raise OSError(-code, os.strerror(-code), str(path))
    return ".".join(map(str, identity))


def _mapped(fd: int, nbytes: int) -> mmap.mmap:
    """Where Python can, without a descriptor of its own, of which there may be few."""
    if sys.version_info >= (3, 13):
        return mmap.mmap(fd, nbytes, trackfd=False)
    return mmap.mmap(fd, nbytes)


class _Files:
    """The files of words of a store, from when it is opened for writing until it is closed."""

    def __init__(self, directory: Path, names: Iterable[str] = ()) -> None:
        self._directory = directory
        self._place = place(os.path.realpath(directory))
        self._process = Process()
        #: Which there are, as far as is known.
        self.names = set(names)
        #: Which of them rows may name.
        self.named = set(self.names)
        #: Which of them are mapped.
        self.mapped: weakref.WeakValueDictionary[str, _Words] = weakref.WeakValueDictionary()

    def map(self, words: _Words) -> None:
        """It is mapped, and unlinked when it is no longer, unless a row may name it."""
        self.mapped[words.name] = words
        weakref.finalize(words, self._unmapped, words.name)

    def _unmapped(self, name: str) -> None:
        """Called at any time, in any thread, and on the other side of a fork."""
        if name in self.names and name not in self.named:
            self.unlink(name)

    def sweep(self, named: set[str]) -> None:
        """The rows name these, and no others."""
        self.named = named
        for name in self.names - named:
            if name not in self.mapped:
                self.unlink(name)

    def unlink(self, name: str) -> None:
        if not self._process.is_this():
            return
        with suppress(OSError):
            # In another directory that came in its place, it is somebody else's.
            if place(os.path.realpath(self._directory)) == self._place:
                os.unlink(self._directory / name)
            self.names.discard(name)

    def close(self) -> None:
        """What no row can name goes, also if it is mapped."""
        for name in self.names - self.named:
            self.unlink(name)
        self.names.clear()


class _Progress:
    """Tells a store's user how far a work is."""

    def __init__(self, store: Store, what: str, total: int) -> None:
        self._store, self._what, self._done, self._total = store, what, 0, total

    def more(self, nbytes: int) -> None:
        self._done += nbytes
        if self._store.progress:
            self._store.progress(self._what, self._done, self._total)


def _read(file: FileIO, nbytes: int, todo: _Progress) -> _core.Memory:
    """What a file holds, in memory."""
    data = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            data.madvise(mmap.MADV_HUGEPAGE)
    with memoryview(data) as view:
        done = 0
        while done < nbytes:
            count = file.readinto(view[done : done + _CHUNK])
            if not count:
                raise OSError(errno.EIO, "the file has become shorter")
            done += count
            todo.more(count)
    return _core.Memory(data)


def _reserve(fd: int, nbytes: int) -> None:
    """The file has that length, and its space; what it holds stays.

    :raises OSError: ENOSPC, for example
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, nbytes)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    have = os.fstat(fd).st_size
    if have >= nbytes:
        return
    if sys.platform == "darwin":
        # F_PREALLOCATE (42): all of it, wherever it is, from the end of the file on.
        fcntl.fcntl(fd, 42, struct.pack("=Iiqqq", 4, 3, 0, nbytes - have, 0))
        os.ftruncate(fd, nbytes)
        return
    zeroes = bytes(min(_CHUNK, nbytes))
    while have < nbytes:
        have += os.pwrite(fd, zeroes[: nbytes - have], have)


@cache
def _boot_identifier() -> str:
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "kern.bootsessionuuid"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


#: Which run of the system this is; tests put another here.
_boot = _boot_identifier
