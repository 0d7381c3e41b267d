# SPDX-License-Identifier: MIT
"""Disks that no machine has open: qcow2 images, and raw disks whose bitmaps are in a local store.

::

                       qcow2 image                        raw disk, local store
    look               entries, read only                 the same
    prepare            NEW, NEW-uncut: one switch         the same, in the store; then that is
                                                          opened to be read, and stays so: others
                                                          can read it, and nobody can write
    mark               .                                  OLD goes into the target
    a daemon           opens it read only                 opens the disk read only
    the instant        blockdev-backup with OLD           add OLD to the disk's node, merge it
                                                          from the target, blockdev-backup
    done               the daemon ends                    it ends, the store is closed
    OLD                removed: one switch                the same

A disk is nowhere in use while it is changed, and what is opened read only is as it was after any
kill. The daemon, a ``qemu-storage-daemon``, is killed with us. Its locks keep machines from an
image. Those of a raw disk nobody but QEMU heeds, so there it is the store's that count: whoever
serves the disk with its bitmaps has them.

A kill in between leaves NEW, in some images or all, beside OLD, which still records.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import IO

from ... import offline
from ..._fork import Process
from ...block.graph import BlockGraph
from ...errors import (
    InvalidError,
    LockedError,
    MismatchError,
    NotFoundError,
    StateError,
    StoreError,
    UnsupportedError,
)
from ...store import LocalStore, Qcow2Store, Store, probe
from ...store.base import StoredNode
from ...store.files import reported
from ...store.opened import opened
from ...store.qcow2 import locks
from ...store.qcow2.file import File
from ...store.qcow2.image import Image
from ..monitor import Action, DisconnectedError, Monitor, action
from .copies import chain_of
from .hashing import extents
from .jobs import ALL, END, OLD, Task, add_marks, bitmaps_of, give, merging, nodes_of
from .manifest import Copy, Repository
from .plan import PREFIX, UNCUT, Disk, Found, Names, Plan
from .qemu import Content, folder_of_socket, run, started
from .source import Disks, Source, is_device, refuse_cut

_DAEMON = "qemu-storage-daemon"
_FS_IOC_GETVERSION = 0x80087601  # of Linux
_SECTOR = 512  # bytes: what QEMU counts disks in


@dataclass
class _Image:
    """A disk that is off.

    :param label: QEMU's node
    :param node: in the store, as people name it; None: of an image
    :param driver: of QEMU, for the file itself
    """

    source: Source
    store: Store
    label: str
    node: str | None
    driver: str
    size: int = 0
    file: str = ""  # of a raw disk, see Disk
    held: BlockGraph | None = None  # of a raw disk: its store, open to be read

    @property
    def raw(self) -> bool:
        return isinstance(self.store, LocalStore)

    def name(self, bitmap: str) -> offline.Name:
        return self.node, bitmap


class Images(Disks):
    """See the head of this file.

    :param timeout: seconds for each of the daemon's answers
    """

    def __init__(self, sources: Sequence[Source], timeout: float) -> None:
        self._sources = sources
        self._timeout = timeout
        self._images: dict[str, _Image] = {}
        self._daemon: _Daemon | None = None

    def recover(self, folder: Path) -> list[str]:
        """Daemons of killed runs are dead; ours is not needed any more."""
        return []

    # ---- looking ----------------------------------------------------------------------------

    def look(self) -> list[Disk]:
        if shutil.which(_DAEMON) is None:  # before anything is changed
            raise UnsupportedError(
                f"{_DAEMON} is not installed (Debian: qemu-system-common; Fedora: qemu-img; macOS: "
                "brew install qemu), and copies disks that are off"
            )
        for number, source in enumerate(self._sources):
            with reported(f"cannot look at '{source.place}'"):
                self._images[source.name] = _found(source, f"{PREFIX}disk-{number:x}")
        with reported("cannot look at disks"):
            _check_apart([each.source for each in self._images.values()])
            return [_disk(each) for each in self._images.values()]

    @property
    def names(self) -> Sequence[str]:
        return list(self._images)

    def bitmaps(self, disk: str) -> list[str]:
        return [each.name for each in _listed(self._images[disk]).bitmaps]

    def doubt(self, plan: Plan, repository: Repository) -> str | None:
        """Of a raw disk: what is a hole now, and was data, has to be dirty. Whoever cuts it or
        makes holes in it may not know of the store. Images are changed by who knows bitmaps."""
        image = self._images[plan.disk.name]
        if not image.raw or plan.parent is None or plan.old is None:
            return None
        at = _unmarked_hole(image, plan.old.name, plan.parent[1], repository)
        if at is None:
            return None
        return f"there is a hole at {at} where there was data, which no bitmap tells"

    # ---- before the instant -----------------------------------------------------------------

    def prepare(self, plans: Sequence[Plan], names: Names, granularity: int) -> None:
        self._daemon = _Daemon(self._timeout)  # first: if that cannot be, nothing is touched
        self.monitor = self._daemon.monitor
        for plan in plans:
            image = self._images[plan.disk.name]
            with _explained(image):
                _add(image, plan, names, granularity)
        for plan in plans:
            image = self._images[plan.disk.name]
            if image.raw:
                with _explained(image):
                    image.held = _held(image)
        for plan in plans:
            image = self._images[plan.disk.name]
            file = {"driver": image.driver, "filename": os.path.abspath(image.source.place)}
            node = {"driver": "raw" if image.raw else "qcow2", "read-only": True, "file": file}
            self.monitor.execute("blockdev-add", node, node_name=image.label)

    def source(self, plan: Plan) -> tuple[str, str | None]:
        image = self._images[plan.disk.name]
        if plan.old is None:
            return image.label, None
        return image.label, OLD if image.raw else plan.old.name

    def mark(self, plan: Plan, path: Path, granularity: int) -> Sequence[str]:
        image = self._images[plan.disk.name]
        if image.held is None or image.node is None or plan.old is None:
            return ()
        give(image.held, path, plan.old.granularity, {OLD: (image.node, plan.old.name)})
        return (OLD,)

    def complete(self, task: Task) -> None:
        """It has it, together with the new ones."""

    def actions(self, task: Task, names: Names, granularity: int) -> list[Action]:
        old = task.plan.old
        if old is None or not task.marks:
            return []
        return [
            action(
                "block-dirty-bitmap-add",
                node=task.source,
                name=OLD,
                granularity=old.granularity,
                disabled=True,
            ),
            merging(task, OLD, OLD),
        ]

    def check(self, plans: Sequence[Plan]) -> None:
        """Locks are there now, so sizes stay; and what is open is what was looked at."""
        nodes = nodes_of(self.monitor)
        for plan in plans:
            if plan.old is None:
                continue
            name = plan.old.name + UNCUT
            image = self._images[plan.disk.name]
            if not image.raw:
                refuse_cut(plan, bitmaps_of(nodes[image.label]).get(name))
            else:
                _check_same(image)
                refuse_cut(plan, _of_held(image, name))

    # ---- afterwards -------------------------------------------------------------------------

    def done(self) -> None:
        daemon, self._daemon = self._daemon, None
        try:
            if daemon is not None:
                daemon.close()
        finally:
            for image in self._images.values():
                held, image.held = image.held, None
                if held is not None:
                    held.close()

    def forget(self, disk: str, names: Sequence[str]) -> None:
        image = self._images[disk]
        with _explained(image):
            offline.remove(image.store, [image.name(each) for each in names], _silent)

    def close(self) -> None:
        self.done()


def _silent(what: str, done: int, total: int | None) -> None:
    """A progress that nobody hears."""


class _explained:
    """Says of a disk that is locked what can be done."""

    def __init__(self, image: _Image) -> None:
        self._image = image

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if type(error) is LockedError:
            what = (
                "a program that serves it has its store; it can be backed up while that is off, or "
                "through QEMU (--qmp)"
                if self._image.raw
                else "a machine that has it open is backed up by its monitor (--qmp)"
            )
            raise LockedError(f"{error}; {what}", error.errno) from error


# ---- one disk -------------------------------------------------------------------------------


def _found(source: Source, label: str) -> _Image:
    """
    :raises InvalidError: if it is no disk that can be backed up so
    :raises StoreError: if it cannot be looked at
    """
    driver = "host_device" if is_device(source.place) else "file"
    if source.store is None:
        if probe(source.place) is not Qcow2Store:
            raise InvalidError(
                f"{source.place}: not a qcow2 image; a raw disk needs the local store with its "
                f"bitmaps: {source.place},store=DIR"
            )
        if source.node is not None:
            raise InvalidError(f"{source.place}: a qcow2 image has one node, without a name")
        return _Image(source, Qcow2Store(source.place), label, None, driver)
    # Not looked into: whoever writes to a raw disk can let it look like an image.
    if probe(source.store) is not LocalStore:
        raise InvalidError(f"{source.store}: not a local store, which would have {source.place}'s")
    return _Image(source, LocalStore(source.store), label, source.node, driver)


def _check_apart(sources: Sequence[Source]) -> None:
    """
    :raises InvalidError: if two of them are the same file
    """
    seen: dict[tuple[int, int], Source] = {}
    for each in sources:
        status = os.stat(each.place)
        other = seen.setdefault((status.st_dev, status.st_ino), each)
        if other is not each:
            raise InvalidError(f"'{other.name}' and '{each.name}' are the same disk: {each.place}")


def _listed(image: _Image) -> StoredNode:
    """What is stored of it; also finds its node in the store.

    :raises NotFoundError: if there is no such node
    :raises LockedError: if another program has it open
    """
    with _explained(image):
        nodes = image.store.entries()
    if not image.raw:
        return nodes[0]
    there = ", ".join(str(each.name) for each in nodes) or "none"
    if image.node is None:
        if len(nodes) != 1:
            raise InvalidError(f"{image.store.path}: name a node, node=NODE; nodes there: {there}")
        image.node = nodes[0].name
    for node in nodes:
        if node.name == image.node:
            return node
    raise NotFoundError(f"{image.store.path}: Node '{image.node}' not found; nodes there: {there}")


def _disk(image: _Image) -> Disk:
    node = _listed(image)
    if image.raw:
        size = _size_of(image.source.place)
        if size != node.size:
            looks = probe(image.source.place) is Qcow2Store  # as whoever writes to it wants
            raise MismatchError(
                f"{image.source.place} has {size} bytes, and node '{node.name}' of "
                f"{image.store.path} {node.size}: let its bitmaps follow with "
                f"pybitmap resize {image.store.path} {size}"
                + ("; or leave out the store, if it is a qcow2 image" if looks else "")
            )
    if node.size % _SECTOR:
        raise InvalidError(
            f"{image.source.place} has {node.size} bytes, which is no multiple of {_SECTOR}: QEMU "
            "would copy another size"
        )
    image.size = node.size
    image.file = _which(image.source.place) if image.raw else ""
    header = None if image.raw else _header(image)
    if header is not None and header.is_encrypted:
        raise UnsupportedError(
            f"{image.source.place} is encrypted, and nothing here has its secret: it is backed up "
            "while its machine runs, by the machine's monitor (--qmp)"
        )
    if image.raw:
        _check_unwritten(image)
    bitmaps = {}
    for each in node.bitmaps:
        if not each.name.startswith(PREFIX):
            continue
        count = None
        if each.name.endswith(UNCUT) and each.reason is None:
            count = _counted(image, each.name, each.granularity)
        bitmaps[each.name] = Found(each.name, each.granularity, each.enabled, count, each.reason)
    return Disk(
        name=image.source.name,
        place=image.source.place,
        size=node.size,
        bitmaps=bitmaps,
        grows=image.driver == "file" if header is None else not header.has_data_file,
        cluster=0 if header is None else header.cluster_size,
        file=image.file,
    )


def _check_unwritten(image: _Image) -> None:
    """Of a raw disk, whose store tells nothing of machines.

    :raises LockedError: if one has it open, which QEMU would tell only when the jobs begin
    """
    with opened(image.source.place, os.O_RDONLY) as file:
        if locks.is_written(file.fileno()):
            raise LockedError(
                f"{image.source.place} is written by a machine: it is backed up by the machine's "
                "monitor (--qmp)"
            )


def _which(path: str) -> str:
    """Which file it is, wherever it goes in its file system: its inode's number and, where there is
    one, generation, since numbers are used again. Empty for a device."""
    with opened(path, os.O_RDONLY) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            return ""
        generation = bytearray(8)
        if sys.platform == "linux":
            with suppress(OSError):  # a file system without
                fcntl.ioctl(file.fileno(), _FS_IOC_GETVERSION, generation)
        return f"{status.st_ino}.{generation.hex()}"


def _check_same(image: _Image) -> None:
    """
    :raises StateError: if a raw disk is another file than when it was looked at
    """
    with reported(f"cannot look at '{image.source.place}'"):
        now = _which(image.source.place)
    if now != image.file:
        raise StateError(
            f"'{image.source.place}' became another file while the backup began: nothing was done, "
            "try again"
        )


def _size_of(path: str) -> int:
    with open(path, "rb", buffering=0) as file:
        return file.seek(0, os.SEEK_END)


def _header(image: _Image) -> Image:
    with closing(File(image.source.place, read_only=True)) as file:
        return Image(file, read_only=True)


def _counted(image: _Image, bitmap: str, granularity: int) -> int:
    """Dirty bytes, in whole groups."""
    with offline.areas(image.store, image.name(bitmap), _silent) as areas:
        return sum(-(-length // granularity) * granularity for _, length in areas)


def _unmarked_hole(image: _Image, bitmap: str, parent: Copy, repository: Repository) -> int | None:
    """Where the disk has a hole, a copy of it something else than zeroes, and a bitmap nothing."""
    folder = repository.path
    below = chain_of(repository, repository.manifest.chain(parent))
    data = [(each.start, each.end) for each in extents(below, folder) if not each.zero]
    place = os.path.abspath(image.source.place)
    _, told = run("qemu-img", "map", "--output=json", "-f", "raw", place, folder=folder)
    holes = [
        (each["start"], each["start"] + each["length"])
        for each in json.loads(told)
        if each["zero"] and not each["data"]
    ]
    with offline.areas(image.store, image.name(bitmap), _silent) as areas:
        clean = list(_gaps(((start, start + length) for start, length in areas), image.size))
    suspects = [
        (offset, min(Content.MOST, end - offset))
        for start, end in _common(_common(data, holes), clean)
        for offset in range(start, end, Content.MOST)
    ]
    if suspects:
        with Content(below, folder=folder) as content:
            for (offset, nbytes), piece in zip(suspects, content.read(suspects)):
                if piece.count(0) != nbytes:
                    return offset
    return None


def _gaps(areas: Iterable[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    """What is between areas, ``(start, end)`` in order."""
    last = 0
    for start, end in areas:
        if start > last:
            yield last, start
        last = max(last, end)
    if last < size:
        yield last, size


def _common(
    some: Iterable[tuple[int, int]], others: Iterable[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """What is in both, each in order and without overlaps."""
    left, right = iter(some), iter(others)
    one, other = next(left, None), next(right, None)
    while one is not None and other is not None:
        start, end = max(one[0], other[0]), min(one[1], other[1])
        if start < end:
            yield start, end
        if one[1] < other[1]:
            one = next(left, None)
        else:
            other = next(right, None)


def _add(image: _Image, plan: Plan, names: Names, granularity: int) -> None:
    """The bitmaps of a new point, and what the old one lacks, in one switch; nothing is in use at
    any moment."""
    store = image.store
    with BlockGraph() as graph:
        label = image.node or image.label
        store.at_rest = True
        try:
            graph.add_node(label, store=store)
        finally:
            store.at_rest = False
        marks = add_marks(graph, plan, granularity)
        with graph.transaction(close=True) as tx:
            disk = image.source.name
            name, uncut = names.bitmap(disk, image.file), names.uncut(disk, image.file)
            tx.add(label, name, granularity, persistent=True)
            tx.merge(label, name, [marks[END]])
            tx.add(label, uncut, granularity, persistent=True, disabled=True)
            tx.merge(label, uncut, [marks[ALL]])
            if plan.shrunk and plan.old is not None:
                tx.merge(label, plan.old.name, [marks[END]])


def _of_held(image: _Image, name: str) -> Found | None:
    """A bitmap of a store that is held."""
    assert image.held is not None
    assert image.node is not None
    bitmap = image.held.find_node(image.node).bitmaps.get(name)
    if bitmap is None:
        return None
    count = -(-bitmap.count() // bitmap.granularity) * bitmap.granularity
    return Found(name, bitmap.granularity, bitmap.enabled, count, bitmap.reason)


def _held(image: _Image) -> BlockGraph:
    """A graph that has the store open, to be read: nobody marks in it meanwhile."""
    graph = BlockGraph()
    try:
        assert image.node is not None
        graph.add_node(image.node, store=image.store, read_only=True)
        return graph
    except BaseException:
        graph.close()
        raise


# ---- the daemon -----------------------------------------------------------------------------


class _Daemon:
    """A qemu-storage-daemon of our own: its monitor; gone with us, whatever kills us.

    Fork: a child leaves it to its parent.

    :raises StoreError: if it does not start
    """

    def __init__(self, timeout: float) -> None:
        self._stack = ExitStack()
        self._owner = Process()
        try:
            errors = self._stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
            # Not the backup directory: the path of a socket has at most 107 bytes.
            with folder_of_socket() as name:
                folder = Path(name)
                path = folder / "qmp"
                # wait=on: until we are there. Others are greeted twice, if they come too early.
                chardev = f"socket,id=qmp,path={str(path).replace(',', ',,')},server=on,wait=on"
                command = [_DAEMON, "--chardev", chardev, "--monitor", "chardev=qmp"]
                self._process = self._stack.enter_context(
                    started(command, errors=errors, folder=folder, stdin=subprocess.DEVNULL)
                )
                self.monitor = self._stack.enter_context(self._connected(path, timeout, errors))
        except BaseException:
            self._stack.close()
            raise

    def _connected(self, path: Path, timeout: float, errors: IO[bytes]) -> Monitor:
        end = monotonic() + timeout
        while True:
            if path.exists():
                with suppress(DisconnectedError):
                    return Monitor(path, timeout=timeout)
            if self._process.poll() is not None or monotonic() > end:
                errors.seek(0)
                said = errors.read(1 << 16).decode("utf-8", "replace").strip()
                raise StoreError(f"{_DAEMON} does not start: {said or 'no answer'}")
            sleep(0.005)

    def close(self) -> None:
        """It is gone, and had copies closed before; what it has open else is read only. May be
        called twice."""
        if self._owner.is_this():
            self._stack.close()
        else:
            _others.append(self._stack)  # if that were collected, its end would come


#: Of daemons of a parent.
_others: list[ExitStack] = []
