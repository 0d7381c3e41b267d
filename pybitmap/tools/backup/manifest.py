# SPDX-License-Identifier: MIT
"""A backup directory, and its manifest: which points in time there are, and which files make them.

::

    DIR/manifest.json              the truth: points, oldest first, each with a copy of each disk
    DIR/lock                       flock: one process at a time changes what is here
    DIR/DISK-POINT[-N].qcow2       a copy: a full one, or an increment over that of an earlier
                                   point, which it names (without a folder) as its backing file
    DIR/DISK-POINT[-N].qcow2.leaves   hashes of what the copy holds, see hashing.py

Invariant: whatever is listed is on the disk. Files and their names are synced before the manifest
that names them takes the place of the old one, by one rename; they go after it. So a kill, or a
crash of the system, leaves the old manifest or the new one, and perhaps files that none names:
leftovers, which :meth:`Repository.sweep` deletes. What is not finished is not listed.

Readers take no lock of the directory, so a restore and a backup go on beside each other. They hold
a shared one (flock) on the ``.leaves`` of each copy that they read, and whoever would delete a copy
leaves it to a later sweep if he cannot have an exclusive one. (Not on the copies themselves: where
locks are those of a server, as on NFS, QEMU's would meet them.)

The manifest is believed in what it says, and in nothing that it could do: files are names of the
kind that is made here, never paths, and no link is followed; parents stand before their children,
so there are no cycles; a field that is not known is refused, since who wrote it may rely on it.

Visitors. Writer: the disks are not looked at here. Kill: see above. Fork: the child of a process
that has a directory open for changes is refused, and keeps no lock. Drop: the lock goes with the
object. Twin: a second one who wants to change something is refused, and told who is at it. One
thread at a time may use a Repository.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from io import FileIO
from pathlib import Path
from typing import Any, NoReturn

from ..._fork import Process
from ...errors import (
    CorruptError,
    ExistsError,
    InvalidError,
    LockedError,
    NotFoundError,
    StateError,
    StoreError,
    UnsupportedError,
)
from ...sizes import MAX_SIZE, is_granularity
from ...store.files import lock_holders, reported, sync_directory, sync_file
from ...store.opened import opened
from ...store.private import place, place_of
from ...store.unlocked import lacking

MANIFEST, LOCK = "manifest.json", "lock"
#: Behind the name of a copy: the file with the hashes of its leaves.
LEAVES = ".leaves"
#: Of the manifest's format.
VERSION = 1

_NEW = MANIFEST + ".new"
_MAX_MANIFEST = 256 << 20  # bytes
_MAX_NAME = 4096  # characters of a disk's or a bitmap's name, or of a reason

_ID = re.compile("[0-9a-f]{32}", re.ASCII)
_SHA256 = re.compile("[0-9a-f]{64}", re.ASCII)
_DIGEST = re.compile("-[0-9a-f]{16}$", re.ASCII)
_FILE = re.compile(r"[a-z0-9_][a-z0-9_-]{0,79}-[0-9a-f]{32}(-[1-9][0-9]{0,8})?\.qcow2", re.ASCII)


@dataclass(frozen=True)
class Copy:
    """A disk as it was at a point: one file, and those of its parents.

    Sizes are in bytes.

    >>> first, second = points("backups")
    >>> [copy] = second.copies
    >>> copy.disk, copy.size, copy.parent == first.id, copy.reason, copy.granularity
    ('vda', 1048576, True, None, 65536)
    >>> copy.file.startswith("vda-"), copy.file.endswith(f"{second.id}.qcow2"), copy.new
    (True, True, None)
    >>> len(copy.sha256), len(copy.root), copy.nbytes > 0, copy.bitmap.startswith("pybitmap-")
    (64, 64, True, True)
    """

    disk: str  #: its name, whatever was given: data, never a path
    file: str  #: name in the directory
    parent: str | None  #: id of the point whose copy of the disk lies below; None: a full copy
    size: int  #: of the disk
    bitmap: str | None  #: that records since then, on the disk; None: there is none
    granularity: int | None  #: of the bitmap
    reason: str | None  #: why it is full
    sha256: str  #: of the file
    root: str  #: of the tree over the disk's content at this point, see hashing.py
    nbytes: int  #: length of the file
    new: str | None = None  #: while it is there, it is the file, and about to be renamed to that


@dataclass(frozen=True)
class Point:
    """One instant, of all disks that have a copy in it.

    >>> point = points("backups")[-1]
    >>> len(point.id), point.begun <= point.ended, len(point.copies)
    (32, True, 1)
    """

    id: str  #: of a UUID, 32 hexadecimal digits
    begun: datetime  #: with a time zone
    ended: datetime  #: when its copies were whole
    copies: tuple[Copy, ...]  #: one of each disk

    def copy_of(self, disk: str) -> Copy | None:
        """That of a disk; None if there is none.

        >>> point = points("backups")[-1]
        >>> point.copy_of("vda").size, point.copy_of("vdb")
        (1048576, None)
        """
        return next((each for each in self.copies if each.disk == disk), None)


@dataclass(frozen=True)
class Manifest:
    """All points, in their order: the oldest first.

    Made only of what is right: a Manifest that is there has passed all checks.

    :raises CorruptError: if ids, disks or files are there twice, a name or a number cannot be, or a
        parent is not an earlier point with that disk

    >>> manifest = Manifest(points("backups"))
    >>> manifest.disks, manifest.last == manifest.points[-1], manifest.version
    (['vda'], True, 1)
    """

    points: tuple[Point, ...] = ()
    version: int = VERSION
    _by_id: Mapping[str, Point] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        by_id: dict[str, Point] = {}
        files: set[str] = set()
        for point in self.points:
            if point.id in by_id:
                raise CorruptError(f"point {point.id!r} is there twice")
            with _within(f"point {point.id[:200]!r}"):
                _check_point(point, by_id, files)
            by_id[point.id] = point
        object.__setattr__(self, "_by_id", by_id)

    @property
    def last(self) -> Point | None:
        """The newest."""
        return self.points[-1] if self.points else None

    def point(self, name: str) -> Point:
        """
        :param name: its id, or the first digits of it, four at least
        :raises NotFoundError: if there is none
        :raises InvalidError: if it may be several

        >>> manifest = Manifest(points("backups"))
        >>> last = manifest.points[-1]
        >>> manifest.point(last.id) == last
        True
        """
        name = name.lower()
        found = [each for each in self.points if each.id.startswith(name)]
        if len(found) == 1 and len(name) >= 4:
            return found[0]
        if not found or len(name) < 4:
            raise NotFoundError(f"there is no point '{name}': pybitmap list shows which there are")
        raise InvalidError(f"point '{name}' may be {len(found)} of them: give more of its digits")

    def copy(self, disk: str, at: str | None = None) -> tuple[Point, Copy]:
        """A disk's copy at a point, or its newest one.

        :raises NotFoundError: if there is none

        >>> manifest = Manifest(points("backups"))
        >>> point, copy = manifest.copy("vda")
        >>> point == manifest.last, copy.disk
        (True, 'vda')
        >>> manifest.copy("vdb")
        Traceback (most recent call last):
        pybitmap.errors.NotFoundError: there is no copy of disk 'vdb'; disks there: 'vda'
        """
        points = self.points if at is None else (self.point(at),)
        for point in reversed(points):
            copy = point.copy_of(disk)
            if copy is not None:
                return point, copy
        disks = self.disks if at is None else [each.disk for each in points[0].copies]
        there = ", ".join(map(repr, disks)) or "none"
        where = "" if at is None else f" at point {points[0].id}"
        raise NotFoundError(f"there is no copy of disk {disk!r}{where}; disks there: {there}")

    @property
    def disks(self) -> list[str]:
        """Of all points, in order of name."""
        return sorted({copy.disk for point in self.points for copy in point.copies})

    def parent(self, copy: Copy) -> Copy | None:
        """The copy that lies below; None for a full one.

        >>> manifest = Manifest(points("backups"))
        >>> first, second = (point.copies[0] for point in manifest.points)
        >>> manifest.parent(second) == first, manifest.parent(first)
        (True, None)
        """
        return self._by_id[copy.parent].copy_of(copy.disk) if copy.parent else None

    def chain(self, copy: Copy) -> list[Copy]:
        """The copy, its parent, and so on: the last is a full one.

        >>> manifest = Manifest(points("backups"))
        >>> [copy.parent is None for copy in manifest.chain(manifest.copy("vda")[1])]
        [False, True]
        """
        chain = [copy]
        below = self.parent(copy)
        while below is not None:
            chain.append(below)
            below = self.parent(below)
        return chain


@contextmanager
def _within(what: str) -> Iterator[None]:
    try:
        yield
    except CorruptError as error:
        raise CorruptError(f"{what}: {error}") from None


def _check_point(point: Point, earlier: Mapping[str, Point], files: set[str]) -> None:
    if not _ID.fullmatch(point.id):
        raise CorruptError("its id is not 32 hexadecimal digits")
    if point.begun.tzinfo is None or point.ended.tzinfo is None:
        raise CorruptError("its times have no time zone")
    if not point.copies:
        raise CorruptError("it has no copies")
    disks: set[str] = set()
    for copy in point.copies:
        if copy.disk in disks:
            raise CorruptError(f"disk {copy.disk[:200]!r} is there twice")
        with _within(f"disk {copy.disk[:200]!r}"):
            _check_copy(copy, earlier)
        for name in _files_of(copy):
            if name in files:
                raise CorruptError(f"file {name!r} is there twice")
            files.add(name)
        disks.add(copy.disk)


def _files_of(copy: Copy) -> list[str]:
    return [copy.file] if copy.new is None else [copy.file, copy.new]


def _check_copy(copy: Copy, earlier: Mapping[str, Point]) -> None:
    for text in (copy.disk, copy.bitmap, copy.reason):
        if text is not None and not 0 < len(text) <= _MAX_NAME:
            raise CorruptError(f"a name or a reason has {len(text)} characters")
    for name in _files_of(copy):
        if not _FILE.fullmatch(name):
            raise CorruptError(f"{name[:200]!r} is no name of a copy")
    if copy.parent is not None:
        below = earlier.get(copy.parent)
        if below is None:
            raise CorruptError(f"its parent {copy.parent[:200]!r} is no earlier point")
        if below.copy_of(copy.disk) is None:
            raise CorruptError(f"its parent {copy.parent!r} has no copy of the disk")
    for name in ("size", "nbytes"):
        if not 0 <= getattr(copy, name) <= MAX_SIZE:
            raise CorruptError(f"{name} is {getattr(copy, name)}")
    if copy.granularity is not None and not (
        is_granularity(copy.granularity) and copy.granularity <= MAX_SIZE
    ):
        raise CorruptError(f"granularity {copy.granularity} is not a power of 2")
    for name in ("sha256", "root"):
        if not _SHA256.fullmatch(getattr(copy, name)):
            raise CorruptError(f"{name} is not 64 hexadecimal digits")


# ---- JSON -----------------------------------------------------------------------------------


def parsed(data: bytes) -> Manifest:
    """
    :raises CorruptError: if it is no manifest, and why
    :raises UnsupportedError: if it is of a newer version
    """
    try:
        value = json.loads(data, object_pairs_hook=_object, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        if isinstance(error, CorruptError):
            raise
        raise CorruptError(f"it is no JSON: {error}") from None
    version = value.get("version") if isinstance(value, dict) else None
    if type(version) is int and version > VERSION:
        raise UnsupportedError(
            f"it is of version {version}, and {VERSION} is known here: use a newer pybitmap"
        )
    top = _Fields(value, "version", "points")
    if top.take("version", int) != VERSION:
        raise CorruptError("its version is none")
    return Manifest(tuple(map(_point, top.take("points", list))))


def _point(value: object) -> Point:
    fields = _Fields(value, "id", "begun", "ended", "copies")
    name = fields.take("id", str)
    with _within(f"point {name[:200]!r}"):
        return Point(
            id=name,
            begun=_time(fields.take("begun", str)),
            ended=_time(fields.take("ended", str)),
            copies=tuple(map(_copy, fields.take("copies", list))),
        )


def _copy(value: object) -> Copy:
    fields = _Fields(value, *Copy.__dataclass_fields__)
    return Copy(
        disk=fields.take("disk", str),
        file=fields.take("file", str),
        parent=fields.take("parent", str, type(None)),
        size=fields.take("size", int),
        bitmap=fields.take("bitmap", str, type(None)),
        granularity=fields.take("granularity", int, type(None)),
        reason=fields.take("reason", str, type(None)),
        sha256=fields.take("sha256", str),
        root=fields.take("root", str),
        nbytes=fields.take("nbytes", int),
        new=fields.take("new", str, type(None)),
    )


class _Fields:
    """An object of JSON: all of these fields, and no others."""

    def __init__(self, value: object, *names: str) -> None:
        if not isinstance(value, dict):
            raise CorruptError(f"{_some(value)} stands where an object should")
        self._value = value
        for name in value:
            if name not in names:
                raise CorruptError(f"field {name[:200]!r} is not known")
        for name in names:
            if name not in value:
                raise CorruptError(f"field {name!r} is missing")

    def take(self, name: str, *kinds: type) -> Any:
        value = self._value[name]
        if type(value) not in kinds:  # a bool is no int here
            raise CorruptError(f"field {name!r} is {_some(value)}")
        return value


def _some(value: object) -> str:
    return repr(value)[:200]


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise CorruptError("an object has a field twice")
    return found


def _no_number(text: str) -> NoReturn:
    raise CorruptError(f"{text} is no number")


def _time(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise CorruptError(f"{text[:200]!r} is no time") from None


def written(manifest: Manifest) -> bytes:
    """As :func:`parsed` reads it."""
    value = {
        "version": manifest.version,
        "points": [
            {
                "id": point.id,
                "begun": point.begun.isoformat(),
                "ended": point.ended.isoformat(),
                "copies": [asdict(copy) for copy in point.copies],
            }
            for point in manifest.points
        ],
    }
    return json.dumps(value, indent=1).encode() + b"\n"


# ---- the directory --------------------------------------------------------------------------


class Repository:
    """A backup directory, open: for reading, or as the one process that changes it.

    Use :meth:`open` and :meth:`create`; ``with`` closes it.

    >>> with Repository.open("backups") as repository:
    ...     repository.path.name, len(repository.manifest.points)
    ('backups', 2)
    """

    def __init__(self, path: str | os.PathLike[str], lock: FileIO | None) -> None:
        self.path = Path(os.path.abspath(path))
        self._lock = lock
        self._process = Process()
        self._folder = place(os.path.realpath(self.path))
        self._known: tuple[tuple[int, ...], Manifest] | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, writing: bool = False) -> Repository:
        """One that is there.

        :param writing: as the only one
        :raises NotFoundError: if there is no directory, or no manifest in it
        :raises CorruptError, UnsupportedError: if it is none, or of a newer version
        :raises LockedError: if another process has it open for writing, and wants to as well
        :raises StoreError: if it cannot be read

        >>> with Repository.open("backups", writing=True) as repository:
        ...     repository.manifest.disks
        ['vda']
        """
        folder = _absolute(path)
        if not is_there(folder):
            raise NotFoundError(f"'{path}' is no backup directory: nothing is there")
        _check_directory(folder)
        if not is_there(folder / MANIFEST):
            raise NotFoundError(f"'{path}' is no backup directory: it has no {MANIFEST}")
        found = cls(folder, _locked(folder) if writing else None)
        try:
            found.manifest  # noqa: B018
        except BaseException:
            found.close()
            raise
        return found

    @classmethod
    def create(cls, path: str | os.PathLike[str]) -> Repository:
        """Makes one without points, open for writing; its folder may be there, empty.

        A kill leaves a directory without a manifest, which the next call takes.

        :raises ExistsError: if there is one
        :raises InvalidError: if anything else is in the folder
        :raises LockedError: if another process is making it
        :raises StoreError: if it cannot be made

        >>> Repository.create("others").close()
        >>> points("others")
        ()
        """
        folder = _absolute(path)
        with _reported(f"cannot make '{path}'"), suppress(FileExistsError):
            os.mkdir(folder, 0o700)
            sync_directory(folder.parent)
        _check_directory(folder)
        with _reported(f"cannot make '{path}'"):
            others = set(os.listdir(folder)) - {LOCK, _NEW}
        if MANIFEST in others:
            raise ExistsError(f"'{path}' is a backup directory already")
        if others:
            raise InvalidError(
                f"'{path}' is no backup directory, and not empty: '{min(others)}' is in it"
            )
        made = cls(folder, _locked(folder))
        try:
            if os.path.lexists(folder / MANIFEST):
                raise ExistsError(f"'{path}' is a backup directory already")
            made._write(Manifest())
        except BaseException:
            made.close()
            raise
        return made

    def close(self) -> None:
        """Lets others write; may be called twice.

        >>> repository = Repository.open("backups", writing=True)
        >>> repository.close()
        >>> Repository.open("backups", writing=True).close()
        """
        if self._lock is not None:
            if self._process.is_this() and not self._lock.closed:
                with suppress(OSError):
                    fcntl.flock(self._lock, fcntl.LOCK_UN)  # else a child of a fork would keep it
            self._lock.close()

    def __enter__(self) -> Repository:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def manifest(self) -> Manifest:
        """What is listed now, read again if it is another file than before.

        :raises CorruptError, UnsupportedError, StoreError: as :meth:`open`
        """
        path = self.path / MANIFEST
        with _reported(f"cannot read '{path}'"), open_regular(path) as file:
            status = os.fstat(file.fileno())
            now = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            if self._known is not None and self._known[0] == now:
                return self._known[1]
            if status.st_size > _MAX_MANIFEST:
                raise CorruptError(f"'{path}' has {status.st_size} bytes: it is no manifest")
            data = file.read(_MAX_MANIFEST) or b""
        try:
            manifest = parsed(data)
        except CorruptError as error:
            raise CorruptError(f"'{path}' is no manifest: {error}") from None
        except UnsupportedError as error:
            raise UnsupportedError(f"'{path}': {error}") from None
        self._known = now, manifest
        return manifest

    def path_of(self, copy: Copy) -> Path:
        """Where its file is.

        >>> with Repository.open("backups") as repository:
        ...     repository.path_of(repository.manifest.copy("vda")[1]).is_file()
        True
        """
        return self._place(copy, "")

    def leaves_of(self, copy: Copy) -> Path:
        """Where the hashes of its leaves are.

        >>> with Repository.open("backups") as repository:
        ...     repository.leaves_of(repository.manifest.copy("vda")[1]).suffix
        '.leaves'
        """
        return self._place(copy, LEAVES)

    def _place(self, copy: Copy, end: str) -> Path:
        if copy.new is not None and os.path.lexists(self.path / (copy.new + end)):
            return self.path / (copy.new + end)
        return self.path / (copy.file + end)

    def new_file(self, disk: str, point: str) -> Path:
        """Where a copy of a disk can be made: nothing is there, nor beside it.

        The name is safe in any file system: lower case, short, without what has a meaning anywhere.
        Nothing is made.

        :raises InvalidError: if the disk has no name, or one that is too long, or the id is none

        >>> with Repository.open("backups", writing=True) as repository:
        ...     repository.new_file("vda", 32 * "0").name
        'vda-00000000000000000000000000000000.qcow2'
        """
        self._check_writing()
        if not 0 < len(disk) <= _MAX_NAME:
            raise InvalidError(f"a disk's name has 1 to {_MAX_NAME} characters, not {len(disk)}")
        if not _ID.fullmatch(point):
            raise InvalidError(f"{point!r} is no id of a point: 32 hexadecimal digits")
        stem = f"{_safe(disk)}-{point}"
        number = 0
        while True:
            name = f"{stem}{-number or ''}.qcow2"
            if not any(os.path.lexists(self.path / (name + end)) for end in ("", LEAVES)):
                return self.path / name
            number += 1

    def append(self, point: Point) -> None:
        """Lists a point, the newest from now on: its files are durable before, the point is when it
        returns.

        Interrupted, killed or failed, the point is listed or it is not; its files stay.

        :raises CorruptError: if it cannot stand there (see :class:`Manifest`), or a file is not as
            the copy says
        :raises StoreError: if it cannot be written

        >>> with Repository.open("backups", writing=True) as repository:
        ...     *others, last = repository.manifest.points
        ...     repository.replace(others)
        ...     repository.append(last)
        ...     len(repository.manifest.points)
        2
        """
        self.replace([*self.manifest.points, point])

    def replace(self, points: Iterable[Point]) -> None:
        """Lists these points instead, in this order; as :meth:`append`. No file is deleted: what is
        named no more is a leftover.

        >>> with Repository.open("backups", writing=True) as repository:
        ...     repository.replace(repository.manifest.points[:1])
        ...     len(repository.manifest.points), len(repository.leftovers())
        (1, 2)
        """
        self._check_writing()
        before = {copy for point in self.manifest.points for copy in point.copies}
        manifest = Manifest(tuple(points))
        copies = (copy for point in manifest.points for copy in point.copies)
        with _reported(f"cannot list what is in '{self.path}'"):
            for copy in copies:
                if copy not in before:
                    self._sync(copy)
            sync_directory(self.path)
        self._write(manifest)

    def settle(self) -> bool:
        """Brings to an end what :attr:`Copy.new` tells of: renames, and lists it so.

        At each moment in between, a copy is one file or the other, and whatever lies over it is
        right: both hold the same. So this may be left at any line, and done again.

        :return: is nothing left of that? Not while somebody reads the copy
        :raises StoreError: if it cannot be done

        >>> with Repository.open("backups", writing=True) as repository:
        ...     repository.settle()
        True
        """
        self._check_writing()
        points = self.manifest.points
        settled: set[Copy] = set()
        with _reported(f"cannot rename what is in '{self.path}'"):
            waiting = [copy for point in points for copy in point.copies if copy.new is not None]
            for copy in waiting:
                with _leaves_locked(self.path / copy.file, fcntl.LOCK_EX) as free:
                    if free:
                        for end in ("", LEAVES):
                            path = self._place(copy, end)
                            if path.name != copy.file + end:
                                os.rename(path, self.path / (copy.file + end))
                        settled.add(copy)
            if settled:
                sync_directory(self.path)
                self._write(Manifest(tuple(_settled(point, settled) for point in points)))
        return len(settled) == len(waiting)

    def _sync(self, copy: Copy) -> None:
        for path in (self.path_of(copy), self.leaves_of(copy)):
            check_regular(path)
            with open_regular(path) as file:
                sync_file(file.fileno())
        nbytes = check_regular(self.path_of(copy)).st_size
        if nbytes != copy.nbytes:
            raise CorruptError(f"'{copy.file}' has {nbytes} bytes, and not {copy.nbytes}")

    def _write(self, manifest: Manifest) -> None:
        self._check_writing()
        new = self.path / _NEW
        with _reported(f"cannot write '{self.path / MANIFEST}'"):
            try:
                with suppress(FileNotFoundError):
                    os.unlink(new)
                with open_regular(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as file:
                    write_all(file.fileno(), written(manifest))
                    sync_file(file.fileno())
                os.rename(new, self.path / MANIFEST)
            except BaseException:
                with suppress(OSError):
                    os.unlink(new)
                raise
            sync_directory(self.path)

    def leftovers(self) -> list[Path]:
        """Files of ours that no point names, in order of name; those of a copy that is being made,
        too.

        >>> with Repository.open("backups") as repository:
        ...     repository.leftovers()
        []
        """
        copies = [copy for point in self.manifest.points for copy in point.copies]
        named = {name for copy in copies for name in _files_of(copy)}
        return [self.path / each for each in sorted(os.listdir(self.path)) if _left(each, named)]

    def sweep(self) -> list[Path]:
        """Deletes them, and says which; not those that somebody reads. Before that, it
        :meth:`settles <settle>`; while something is left of that, nothing is deleted.

        :raises StoreError: if one cannot be deleted

        >>> with Repository.open("backups", writing=True) as repository:
        ...     repository.replace(repository.manifest.points[:1])
        ...     [path.suffix for path in repository.sweep()]
        ['.qcow2', '.leaves']
        """
        if not self.settle():
            return []
        gone = []
        with _reported(f"cannot clear up '{self.path}'"):
            for path in self.leftovers():
                copy = path if path.name.endswith(".qcow2") else path.with_name(path.stem)
                with _leaves_locked(copy, fcntl.LOCK_EX) as free:
                    if free:
                        with suppress(FileNotFoundError):
                            os.unlink(path)
                            gone.append(path)
        return gone

    @contextmanager
    def reading(self, copies: Sequence[Copy]) -> Iterator[None]:
        """In this block nobody deletes these copies: a sweep leaves them.

        :raises StoreError: if one is not there, or is being deleted

        >>> with Repository.open("backups") as repository:
        ...     chain = repository.manifest.chain(repository.manifest.copy("vda")[1])
        ...     with repository.reading(chain):
        ...         sum(repository.path_of(copy).stat().st_size > 0 for copy in chain)
        2
        """
        with ExitStack() as stack:
            for copy in copies:
                if not stack.enter_context(_leaves_locked(self.path / copy.file, fcntl.LOCK_SH)):
                    raise StoreError(
                        f"'{copy.file}' is being removed from '{self.path}': try again",
                        errno.EAGAIN,
                    )
            listed = {each for point in self.manifest.points for each in point.copies}
            if not listed.issuperset(copies):
                raise StoreError(
                    f"what '{self.path}' lists has changed meanwhile: try again", errno.EAGAIN
                )
            yield

    def _check_writing(self) -> None:
        if self._lock is None or self._lock.closed:
            raise StateError(f"'{self.path}' is not open for writing")
        if not self._process.is_this():
            raise StoreError(
                f"'{self.path}' was opened for writing by process {self._process.pid}: "
                "it cannot be used on both sides of a fork"
            )
        if place(os.path.realpath(self.path)) != self._folder or place(
            self.path / LOCK
        ) != place_of(self._lock.fileno()):
            raise StoreError(
                f"'{self.path}' was removed, or another put in its place, while it was open",
                errno.ESTALE,
            )


def points(path: str | os.PathLike[str]) -> tuple[Point, ...]:
    """What is listed in a backup directory, the oldest first; no lock is taken.

    :raises NotFoundError: if it is none
    :raises CorruptError, UnsupportedError, StoreError: as :meth:`Repository.open`

    >>> for point in points("backups"):
    ...     print(*(f"{copy.disk}: {copy.reason or 'an increment'}" for copy in point.copies))
    vda: it is the first
    vda: an increment
    """
    with Repository.open(path) as repository:
        return repository.manifest.points


def _settled(point: Point, settled: set[Copy]) -> Point:
    copies = (replace(copy, new=None) if copy in settled else copy for copy in point.copies)
    return replace(point, copies=tuple(copies))


def _safe(disk: str) -> str:
    """The begin of a file's name: another for each disk."""
    plain = re.sub("[^a-z0-9_]+", "-", disk.lower(), flags=re.ASCII).strip("-")[:40].strip("-")
    if plain == disk and not _DIGEST.search(disk):
        return plain
    digest = hashlib.sha256(disk.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{plain or 'disk'}-{digest}"


def _left(name: str, named: set[str]) -> bool:
    copy = name[: -len(LEAVES)] if name.endswith(LEAVES) else name
    return name == _NEW or (bool(_FILE.fullmatch(copy)) and copy not in named)


def _absolute(path: str | os.PathLike[str]) -> Path:
    """
    :raises StoreError: if it begins at a working directory that is there no more
    """
    with _reported(f"cannot look at '{path}'"):
        return Path(os.path.abspath(path))


def is_there(path: Path) -> bool:
    """Is there anything? A file that nobody lets us look for is not missing.

    :raises StoreError: if it cannot be looked at
    """
    with _reported(f"cannot look at '{path}'"):
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
    return True


def _check_directory(folder: Path) -> None:
    with _reported(f"cannot look at '{folder}'"):
        if not stat.S_ISDIR(os.stat(folder).st_mode):
            raise InvalidError(f"'{folder}' is no directory")


def open_regular(path: Path, flags: int = os.O_RDONLY) -> FileIO:
    """Opened, if it is a file and no link; nothing waits.

    :raises CorruptError: if it is anything else
    :raises OSError: as open(2); ELOOP for a symbolic link
    """
    file = opened(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise CorruptError(f"'{path}' is no regular file")
    return file


def write_all(fd: int, data: bytes | bytearray) -> None:
    """
    :raises OSError: as write(2)
    """
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def check_regular(path: Path) -> os.stat_result:
    """
    :raises CorruptError: if it is missing, a link, or anything else but a file
    :raises StoreError: if it cannot be looked at
    """
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        raise CorruptError(f"'{path}' is missing") from None
    except OSError as error:
        raise StoreError(f"cannot look at '{path}': {error.strerror}", error.errno) from error
    if not stat.S_ISREG(status.st_mode):
        what = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "no regular file"
        raise CorruptError(f"'{path}' is {what}")
    return status


def _locked(folder: Path) -> FileIO:
    """The lock of who changes what is in a folder.

    Of a file that is there still when it is locked: somebody may have removed it before.
    """
    path = folder / LOCK
    with _reported(f"cannot lock '{folder}'"):
        holders: set[int] = set()
        for attempt in range(2):
            if attempt:
                gc.collect()  # of a Repository that nobody has any more
            file = open_regular(path, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holders = lock_holders(os.fstat(file.fileno()).st_ino)
                file.close()
                continue
            except OSError as error:
                file.close()
                if not lacking(error):
                    raise
                raise UnsupportedError(
                    f"'{folder}': its file system has no locks ({error.strerror}), so nothing "
                    "would keep two backups from each other: put it on another",
                    error.errno,
                ) from error
            if place(path) == place_of(file.fileno()):
                return file
            file.close()
    raise _in_use(folder, holders)


def _in_use(folder: Path, holders: set[int]) -> LockedError:
    if os.getpid() in holders:
        return LockedError(f"'{folder}' is open for writing in this process already")
    by = " (process " + ", ".join(map(str, sorted(holders))) + ")" if holders else ""
    return LockedError(
        f"'{folder}' is being written to by another process{by}: wait until that has ended"
    )


@contextmanager
def _leaves_locked(copy: Path, kind: int) -> Iterator[bool]:
    """Is the lock of a copy's leaves ours in this block? Yes, where there are none of either, or
    what is there is no file.

    :raises OSError: if it cannot be opened
    """
    path = copy.with_name(copy.name + LEAVES)
    with ExitStack() as stack:
        got = True
        try:
            file = stack.enter_context(open_regular(path))
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except (FileNotFoundError, CorruptError):
            pass
        except BlockingIOError:
            got = False
        except OSError as error:
            if not lacking(error) and error.errno != errno.ELOOP:
                raise
        yield got


@contextmanager
def _reported(what: str) -> Iterator[None]:
    """As :func:`reported`; and a symbolic link is none of our files."""
    with reported(what):
        try:
            yield
        except OSError as error:
            if isinstance(error, StoreError) or error.errno != errno.ELOOP:
                raise
            raise CorruptError(f"{what}: '{error.filename}' is a symbolic link") from error
