# SPDX-License-Identifier: MIT
"""A disk as it was at a point, written to a file or a block device: ``pybitmap restore``.

``qemu-img convert`` reads the chain of copies and writes a file beside the target, sparse. What
that holds is then read back, and its root compared with the one that was listed when the copy was
made: a copy that is damaged in whatever way is an error, and no disk that is wrong. Only then does
the file get its name, by one rename, synced before. A block device is written in place, since there
is no other; so it is wrong until the restore has ended, and after an error.

Visitors. Writer: the copies are not written to, and a prune leaves them while they are read. Kill:
the target is as it was, or the restored disk; a folder ``.pybitmap-*`` may be left beside it, to be
deleted. Fork: a child begins anew. Drop (Ctrl-C): the same, and the folder goes. Twin: two restores
to one target do not mix; one of them is told that the target is there, or with `force`, the last
one wins.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from ...errors import CorruptError, ExistsError, InvalidError, LockedError, StoreError
from ...store.base import Progress
from ...store.files import reported, sync_directory, sync_file
from ...store.opened import opened
from ...store.qcow2 import locks
from .copies import chain_of, check_chain
from .hashing import content_hashes
from .manifest import Copy, Point, Repository
from .qemu import run

FORMATS = ("raw", "qcow2")


@dataclass(frozen=True)
class Restored:
    """What was written.

    >>> done = restore("backups", to="vda.qcow2", format="qcow2")
    >>> done.copy.disk, done.point.copies == (done.copy,), str(done.path), done.format
    ('vda', True, 'vda.qcow2', 'qcow2')
    """

    point: Point
    copy: Copy
    path: Path
    format: str


def restore(
    path: str | os.PathLike[str],
    disk: str | None = None,
    *,
    to: str | os.PathLike[str],
    at: str | None = None,
    format: str = "raw",
    force: bool = False,
    progress: Progress | None = None,
) -> Restored:
    """Write what a disk held.

    :param disk: its name; None: the only one that there is
    :param to: a file that is not there, or with `force`, one that is replaced; or, with `force`, a
        block device, of which the beginning is written to, and only in format "raw"
    :param at: a point's id, or the first digits of it; None: the newest that has the disk
    :param format: "raw" or "qcow2"
    :raises NotFoundError: if there is no such directory, point or disk
    :raises ExistsError: if the target is there
    :raises InvalidError: if it cannot be one
    :raises LockedError: if another program has it open
    :raises CorruptError: if a copy is damaged, or the manifest is none; the target is as it was,
        unless it is a device
    :raises StoreError: if it cannot be read or written; the same holds

    >>> done = restore("backups", "vda", to="vda.raw")
    >>> os.path.getsize("vda.raw")
    1048576
    """
    if format not in FORMATS:
        raise InvalidError(f"format {format!r} is none of {', '.join(FORMATS)}")
    repository = Repository.open(path)
    manifest = repository.manifest
    if disk is None:
        if len(manifest.disks) != 1:
            there = ", ".join(map(repr, manifest.disks)) or "none"
            raise InvalidError(f"say which disk is to be restored; disks in '{path}': {there}")
        [disk] = manifest.disks
    point, copy = manifest.copy(disk, at)
    work = _Work(repository, manifest.chain(copy), format, progress)
    target = _target(Path(to), repository, force)
    if target.is_device:
        if format != "raw":
            raise InvalidError(f"'{to}' is a block device, which takes format raw only")
        work.to_device(target.path)
    else:
        work.to_file(target.path, replacing=force)
    return Restored(point, copy, Path(to), format)


@dataclass(frozen=True)
class _Target:
    path: Path  #: where no link leads elsewhere
    is_device: bool


def _target(to: Path, repository: Repository, force: bool) -> _Target:
    if os.path.lexists(to) and not force:
        raise ExistsError(f"'{to}' is there already: --force (force=True) replaces what it holds")
    with reported(f"cannot look at '{to}'"):
        path = Path(os.path.realpath(to))
    if path.parent == Path(os.path.realpath(repository.path)):
        raise InvalidError(f"'{to}' lies in the backup directory itself: choose another place")
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return _Target(path, False)
    except OSError as error:
        raise StoreError(f"cannot look at '{to}': {error.strerror}", error.errno) from error
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        raise InvalidError(f"'{to}' is neither a file nor a block device")
    with reported(f"cannot look at '{to}'"):
        _check_unused(path)
    return _Target(path, stat.S_ISBLK(mode))


def _check_unused(path: Path) -> None:
    """
    :raises LockedError: if a program of QEMU's, or one of ours, writes to it
    """
    with opened(path, os.O_RDONLY | os.O_NONBLOCK) as file:
        written = locks.is_written(file.fileno())
    if written:
        raise LockedError(
            f"'{path}' is open in another program, which would not know what it has then"
        )


class _Work:
    """A chain that is written somewhere."""

    def __init__(
        self,
        repository: Repository,
        copies: list[Copy],
        format: str,
        progress: Progress | None,
    ) -> None:
        self._repository, self._copies = repository, copies
        self._format, self._progress = format, progress

    def to_file(self, path: Path, *, replacing: bool) -> None:
        with reported(f"cannot write '{path}'"):
            # Deletes itself also if this is interrupted before, or while, it is told to.
            beside = tempfile.TemporaryDirectory(prefix=".pybitmap-", dir=path.parent)
            try:
                folder = Path(beside.name)
                made = folder / "disk"
                file = {"driver": "file", "filename": "disk"}
                self._convert(made, [])
                self._check({"driver": self._format, "file": file}, folder)
                with opened(made, os.O_RDONLY) as written:
                    sync_file(written.fileno())
                _put(made, path, replacing=replacing)
                sync_directory(path.parent)
            finally:
                with suppress(OSError):
                    beside.cleanup()

    def to_device(self, path: Path) -> None:
        with reported(f"cannot write '{path}'"), _held(path) as device:
            size = self._copies[0].size
            room = os.lseek(device.fileno(), 0, os.SEEK_END)
            if room < size:
                raise InvalidError(f"'{path}' has {room} bytes, and the disk {size}")
            # Not by the page cache: zeroes by fallocate(2) fail with EBUSY where it has what was
            # just written, since the device is held here and not there.
            self._convert(path, ["-n", "-t", "none"])
            os.fsync(device.fileno())
            file = {"driver": "host_device", "filename": os.fspath(path)}
            self._check({"driver": "raw", "size": size, "file": file}, path.parent)

    def _convert(self, target: Path, options: list[str]) -> None:
        with self._repository.reading(self._copies):
            check_chain(self._repository, self._copies)
            image = chain_of(self._repository, self._copies)
            arguments = ["qemu-img", "convert", "-p", *options, "-O", self._format, image]
            what = f"restoring {self._copies[0].disk}"
            folder = self._repository.path
            run(*arguments, target, folder=folder, progress=self._progress, what=what)

    def _check(self, node: dict[str, object], folder: Path) -> None:
        what = f"reading what was restored of {self._copies[0].disk}"
        image = "json:" + json.dumps(node)
        found = content_hashes(image, folder, self._progress, what)
        if found.root != self._copies[0].root:
            raise CorruptError(
                f"what '{self._copies[0].file}' and the files below it hold is not what was copied:"
                " pybitmap verify tells which of them is damaged"
            )


def _put(made: Path, path: Path, *, replacing: bool) -> None:
    """Lets a file have its name, at once."""
    if replacing:
        with suppress(OSError):  # there may be none
            status = os.stat(path)
            os.chmod(made, stat.S_IMODE(status.st_mode))
            os.chown(made, status.st_uid, status.st_gid)
    else:
        try:
            os.link(made, path)
            return
        except FileExistsError:
            raise ExistsError(f"'{path}' is there now: it has come meanwhile") from None
        except OSError as error:  # a file system without links
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
        if os.path.lexists(path):
            raise ExistsError(f"'{path}' is there now: it has come meanwhile")
    os.rename(made, path)


@contextmanager
def _held(path: Path) -> Iterator[FileIO]:
    """A block device of which nothing is mounted, nor will be."""
    try:
        file = opened(path, os.O_RDWR | os.O_EXCL)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        raise LockedError(
            f"'{path}' is in use: something on it is mounted, or it is part of another device",
            error.errno,
        ) from error
    with file:
        yield file
