# SPDX-License-Identifier: MIT
"""The folder of a fleet: results while a scan runs, tables when it is done.

::

    DIR/lock                one process at a time changes what is here (flock)
    DIR/results/KEY         what was found at one target, complete, of a scan that is not done
    DIR/current             a link to the tables that count
    DIR/tables-ID/          disks.parquet, chains.parquet, extents/host=H/epoch=E/extents.parquet
    DIR/new-ID/             tables that are being written

Each result and each set of tables appears by one rename. So a kill leaves old tables or new ones,
and whole results, of which the next scan takes those that are young enough; leftovers go with it.
A result has its length and a checksum, since after a crash of the system a file may lack its end.

Whatever has another name than these is somebody else's: a folder with such things in it is refused,
and nothing is deleted but by these names.

Readers take no lock of the folder. They hold a shared one (flock) on ``disks.parquet``, and
whoever would delete these leaves that to the next one if he cannot have an exclusive one.

Visitors. Fork: the child of a process that changes a folder is refused, and keeps no lock. Drop:
locks go with their objects. Twin: a second one who wants to change something is refused, and told
who is at it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path
from uuid import uuid4

from ..._fork import Process
from ...errors import InvalidError, LockedError, NotFoundError, StoreError, UnsupportedError
from ...store.base import Progress
from ...store.files import lock_holders, reported, sync_directory, sync_file
from ...store.opened import opened
from ...store.unlocked import lacking
from .rows import Packed, Result, parsed

DISKS, CHAINS, EXTENTS = "disks.parquet", "chains.parquet", "extents"

_LOCK, _RESULTS, _CURRENT = "lock", "results", "current"
_TABLES, _NEW = "tables-", "new-"
_OURS = re.compile(
    f"{_LOCK}|{_RESULTS}|{_CURRENT}|{_TABLES}[0-9a-f]{{12}}"
    rf"|{_NEW}[0-9a-f]{{12}}(\.link|\.spill|\.merge)?",
    re.ASCII,
)
_RESULT = re.compile(r"[0-9a-f]{40}(\.new)?", re.ASCII)
_MAGIC = b"pybitmap fleet result 1\n"


class StoredResult:
    """A result in its file: the rows at once, extents when they are asked for."""

    def __init__(self, path: Path) -> None:
        """
        :raises ValueError: if it is none, or not whole
        :raises OSError: if it cannot be read
        """
        self.path = path
        with open(path, "rb") as file:
            if file.readline(100) != _MAGIC:
                raise ValueError("it is no result")
            nbytes, checksum = map(int, file.readline(100).split())
            header = file.read(nbytes)
            self._begin = file.tell()
            end = os.fstat(file.fileno()).st_size
        if zlib.crc32(header) != checksum:
            raise ValueError("it is damaged")
        try:
            self.disks, self.chains, contents = parsed(json.loads(header))
            self._contents: list[tuple[int, int, bool, int, int] | None] = [
                None if each is None else tuple(each) for each in contents
            ]
        except (KeyError, TypeError) as error:
            raise ValueError(f"it is damaged: {error}") from None
        if end != self._begin + sum(each[3] for each in self._contents if each):
            raise ValueError("it lacks its end")

    def content(self, index: int) -> Packed | None:
        """Of that row of ``disks``.

        :raises ValueError: if it is damaged
        """
        known = self._contents[index]
        if known is None:
            return None
        size, granularity, words, nbytes, checksum = known
        before = sum(each[3] for each in self._contents[:index] if each)
        with open(self.path, "rb") as file:
            file.seek(self._begin + before)
            data = file.read(nbytes)
        if len(data) != nbytes or zlib.crc32(data) != checksum:
            raise ValueError("its extents are damaged")
        return Packed(size, granularity, bool(words), data)


class Folder:
    """A fleet's folder, of which this process is the only one to change anything.

    ``with`` unlocks it. It is made if it is not there.

    :raises InvalidError: if something else is in it
    :raises LockedError: if another process changes it, or this one in another place
    :raises StoreError: if it cannot be made or locked
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(os.path.abspath(path))
        self._process = Process()
        with reported(f"cannot use '{self.path}'"):
            self.path.mkdir(exist_ok=True)
            other = min(_others(self.path), default=None)
            if other is not None:
                raise InvalidError(
                    f"'{self.path}' is no fleet's folder: '{other}' is in it. "
                    "Choose an empty one, or one that is to be made"
                )
            self._lock = _locked(self.path)
        try:
            with reported(f"cannot use '{self.path}'"):
                self._results.mkdir(exist_ok=True)
        except BaseException:
            self._lock.close()
            raise

    @property
    def _results(self) -> Path:
        return self.path / _RESULTS

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process.is_this():
            with suppress(OSError, ValueError):
                fcntl.flock(self._lock, fcntl.LOCK_UN)
        self._lock.close()

    def check(self) -> None:
        """
        :raises StoreError: in the child of a fork
        """
        if not self._process.is_this():
            raise StoreError(
                f"'{self.path}' is being changed by process {self._process.pid}: "
                "it cannot be on both sides of a fork"
            )

    def told(self, progress: Progress | None) -> Progress:
        """A caller's progress, which may come back in the child of a fork: that ends there."""

        def tell(what: str, done: int, total: int | None) -> None:
            if progress is not None:
                progress(what, done, total)
            self.check()

        return tell

    # ---- results --------------------------------------------------------------------------------

    def stored(self, key: str) -> StoredResult | None:
        """The result of a target, if there is one that is whole.

        :raises StoreError: if it cannot be read
        """
        path = self._results / key
        with reported(f"cannot read '{path}'"):
            try:
                return StoredResult(path)
            except (FileNotFoundError, ValueError):
                return None

    def store(self, key: str, result: Result) -> None:
        """At once, or not at all.

        :raises StoreError: if it cannot be written
        """
        self.check()
        header = result.header()
        for content, known in zip(result.contents, header["contents"]):
            if content is not None:
                known.append(zlib.crc32(content.data))
        text = json.dumps(header).encode()
        new = self._results / f"{key}.new"
        with reported(f"cannot write in '{self._results}'"):
            with open(new, "wb") as file:
                file.write(_MAGIC + b"%d %d\n" % (len(text), zlib.crc32(text)) + text)
                for content in result.contents:
                    if content is not None:
                        file.write(content.data)
            os.replace(new, self._results / key)

    def forget(self) -> None:
        """All results: the next scan begins anew."""
        self.check()
        with reported(f"cannot clear up '{self._results}'"):
            for name in os.listdir(self._results):
                if _RESULT.fullmatch(name):
                    (self._results / name).unlink()

    # ---- tables ---------------------------------------------------------------------------------

    @contextmanager
    def replacing(self) -> Iterator[Path]:
        """A new folder for tables, which count from the end of this block on; left by an exception
        or a kill, the old ones still do.

        :raises StoreError: if that fails
        """
        self.check()
        self._sweep()
        name = uuid4().hex[:12]
        new = self.path / (_NEW + name)
        link = self.path / (_NEW + name + ".link")
        with reported(f"cannot write in '{self.path}'"):
            try:
                new.mkdir()
                yield new
                self.check()
                _sync(new)
                os.rename(new, self.path / (_TABLES + name))
                os.symlink(_TABLES + name, link)
                os.replace(link, self.path / _CURRENT)
                sync_directory(self.path)
            except BaseException:
                if self._process.is_this():
                    shutil.rmtree(new, ignore_errors=True)
                raise
        self._sweep()

    def _sweep(self) -> None:
        """Delete tables that do not count, and that nobody reads."""
        try:
            current = os.readlink(self.path / _CURRENT)
        except FileNotFoundError:
            current = None
        except OSError:  # it is not known which count
            return
        for name in filter(_OURS.fullmatch, os.listdir(self.path)):
            path = self.path / name
            if name.startswith(_NEW):
                with suppress(OSError):
                    path.unlink() if path.is_symlink() else shutil.rmtree(path)
            elif name.startswith(_TABLES) and name != current:
                with suppress(OSError), ExitStack() as stack:
                    with suppress(FileNotFoundError):
                        lock = stack.enter_context(opened(path / DISKS, os.O_RDONLY))
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path)


@contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The tables that count now, which nobody deletes in this block.

    :raises NotFoundError: if there are none
    :raises StoreError: if they cannot be read
    """
    folder, lock = _current(Path(os.path.abspath(path)))
    with lock:
        yield folder


def _current(path: Path) -> tuple[Path, FileIO]:
    """The tables, and what keeps them."""
    with reported(f"cannot read '{path}'"):
        while True:
            try:
                folder = path / os.path.basename(os.readlink(path / _CURRENT))
            except FileNotFoundError:
                raise NotFoundError(
                    f"'{path}' has no tables: pybitmap fleet scan ... --to DIR makes them"
                ) from None
            with suppress(FileNotFoundError, BlockingIOError), ExitStack() as stack:
                lock = stack.enter_context(opened(folder / DISKS, os.O_RDONLY))
                try:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except OSError as error:
                    if not lacking(error):
                        raise  # or it is being deleted
                os.stat(folder / DISKS)  # there still, now that it is locked
                stack.pop_all()
                return folder, lock
            if os.path.basename(os.readlink(path / _CURRENT)) == folder.name:
                raise StoreError(f"'{path}' is damaged: its tables '{folder.name}' are missing")


def _others(path: Path) -> Iterator[str]:
    """What is in a folder and was not made here."""
    for name in os.listdir(path):
        if not _OURS.fullmatch(name) or (name == _CURRENT and not (path / name).is_symlink()):
            yield name
        elif name == _RESULTS:
            for each in os.listdir(path / name):
                if not _RESULT.fullmatch(each):
                    yield os.path.join(name, each)


def _locked(folder: Path) -> FileIO:
    file = opened(folder / _LOCK, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holders = lock_holders(os.fstat(file.fileno()).st_ino)
        file.close()
        if os.getpid() in holders:
            raise LockedError(f"'{folder}' is being changed in this process already") from None
        by = f" (process {', '.join(map(str, sorted(holders)))})" if holders else ""
        raise LockedError(
            f"'{folder}' is being changed by another process{by}: wait until that has ended"
        ) from None
    except OSError as error:
        file.close()
        if lacking(error):
            raise UnsupportedError(
                f"'{folder}': its file system has no locks ({error.strerror}), so nothing would "
                "keep two scans from each other: put it on another",
                error.errno,
            ) from error
        raise
    except BaseException:
        file.close()
        raise
    return file


def _sync(folder: Path) -> None:
    for where, _, files in os.walk(folder):
        for name in files:
            with opened(os.path.join(where, name), os.O_RDONLY) as file:
                sync_file(file.fileno())
        sync_directory(Path(where))
