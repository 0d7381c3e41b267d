# SPDX-License-Identifier: MIT
"""Qcow2Store: the persistent bitmaps of a qcow2 image.

Nothing that is in use is written over. What changes goes to clusters that were free: the clusters
of data that changed, a table if one of its entries changed, a directory. Then one write of the
image's first sector switches to the new directory (:meth:`Image.switch`), and the clusters that
only the old one named are freed. So each change costs two syncs, and a crash leaves the old, or the
new, and at worst leaked clusters, which ``qemu-img check -r leaks`` finds.

While the image is open for writing all bitmaps in it are marked as in use: the bits on disk are
old. A crash then leaves inconsistent bitmaps, as with QEMU.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Callable

from ...errors import (
    CorruptError,
    LockedError,
    MismatchError,
    StoreError,
    UnsupportedError,
)
from ...hbitmap import HBitmap
from ...sizes import granularity_bits
from .. import memory
from ..base import (
    LIVE,
    MAX_NAME,
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
from ..unlocked import steady
from . import bitmaps
from .bitmaps import AUTO, EXTRA_COMPATIBLE, IN_USE, ONES, ZEROES, Entry
from .file import File
from .image import Claims, Directory, Image, pack_table, version_of
from .refcounts import Refcounts, Run

#: Bytes of a bitmap that are read or written at a time; and that are read in one piece.
_BATCH = 8 << 20
_PIECE = 1 << 20

FOREIGN = "a program that does not know bitmaps has written to the image"

_log = logging.getLogger("pybitmap")


class Qcow2Store(Store):
    """The bitmaps in a qcow2 image (version 3, which ``qemu-img create`` makes by default).

    For one node at a time; opened for writing, no other program may have the image open.

    Without locks: for reading none is taken and nobody's is heeded, so a running machine may go on
    with the image. What is read may be stale; if it changed meanwhile, and so may be torn, that is
    an error ("try again"). Bitmaps of which that machine has the bits are
    :attr:`StoredBitmap.live`. For writing, ``lock=False`` goes on where the file system has no
    locks: then nothing keeps a machine or another process from writing to the image as well, which
    destroys it. Locks that can be had are taken and heeded all the same.

    :param path: of the image, a file or a block device
    :param lock: False: do without locks, see above

    >>> import subprocess
    >>> from pybitmap import BlockGraph
    >>> create = ["qemu-img", "create", "-q", "-f", "qcow2", "disk.qcow2", "1G"]
    >>> subprocess.run(create, check=True).returncode
    0
    >>> with BlockGraph() as graph:
    ...     disk = graph.add_node("disk", store=Qcow2Store("disk.qcow2"))
    ...     daily = disk.add_bitmap("daily", persistent=True)
    ...     disk.mark_dirty(0, 1)
    >>> [node] = Qcow2Store("disk.qcow2").entries()
    >>> node.size, [bitmap.name for bitmap in node.bitmaps]
    (1073741824, ['daily'])
    """

    def __init__(self, path: str | os.PathLike[str], *, lock: bool = True) -> None:
        self.path: str = os.fspath(path)
        self.lock = lock
        #: Opens the file; for tests.
        self.open_file: Callable[..., File] = File
        self._volume: Qcow2Volume | None = None

    def __repr__(self) -> str:
        return f"Qcow2Store({self.path!r})"

    @classmethod
    def probe(cls, path: str | os.PathLike[str]) -> bool:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            return False
        with open(path, "rb", buffering=0) as file:
            version = version_of(file.read(8))
        if version == 2:
            raise UnsupportedError(
                f"{os.fspath(path)}: a qcow2 image of version 2, which has no bitmaps; version 3 "
                "is made of it by qemu-img amend -o compat=1.1"
            )
        return version is not None

    def open(self, node: str, size: int | None, *, read_only: bool) -> Qcow2Volume:
        """
        :raises LockedError: if another program, or another node, has the image open
        :raises UnsupportedError: if its file system has no locks
        :raises CorruptError: if it is damaged
        :raises UnsupportedError: if it has features, or an encryption, that are not known
        :raises StoreError: if it cannot be used, and why: for writing also refcounts that are out
            of date
        """
        if self._volume is not None:
            raise LockedError(f"{self.path} is open for node '{self._volume.node}'", errno.EAGAIN)
        file = self._open_file(read_only=read_only)
        try:
            with steady(file.check_unchanged):
                image = Image(file, read_only=read_only)
            if size is not None and size != image.size:
                raise MismatchError(
                    f"{self.path} has a disk of {image.size} bytes, the node has {size}"
                )
            self._volume = Qcow2Volume(self, node, image, read_only=read_only)
        except BaseException:
            file.close()
            raise
        return self._volume

    def entries(self) -> list[StoredNode]:
        if self._volume is not None:
            return [self._volume.listed()]
        with closing(self._open_file(read_only=True)) as file, steady(file.check_unchanged):
            image = Image(file, read_only=True)
            return [_listed(image, _read_entries(image, Claims(file)))]

    def check(self) -> None:
        """What opening for writing checks, apart from single bitmaps; not while it is open.

        Without locks no refcounts: a running machine writes them late.

        >>> import subprocess
        >>> create = ["qemu-img", "create", "-q", "-f", "qcow2", "disk.qcow2", "1G"]
        >>> subprocess.run(create, check=True).returncode
        0
        >>> Qcow2Store("disk.qcow2").check()        # no error: in order
        """
        with closing(self._open_file(read_only=True)) as file, steady(file.check_unchanged):
            image = Image(file, read_only=True)
            claims = Claims(file)
            image.claim_tables(claims)
            _read_entries(image, claims)
            if self.lock:
                Refcounts(image).check(claims)

    def _open_file(self, *, read_only: bool) -> File:
        return self.open_file(self.path, read_only=read_only, lock=self.lock)

    def prepare(self, wanted: Mapping[Volume, Wanted], purpose: Purpose) -> Change:
        if not wanted:
            return _Nothing()
        ((volume, wish),) = wanted.items()
        if volume is not self._volume:
            raise StoreError(f"{self.path} is not open for node '{volume.node}'", errno.EBADF)
        return self._volume.prepare(wish, purpose)

    def closed(self) -> None:
        """For its volume."""
        self._volume = None


class Qcow2Volume(Volume):
    """An open image; made by :meth:`Qcow2Store.open`."""

    driver = "qcow2"

    def __init__(self, store: Qcow2Store, node: str, image: Image, *, read_only: bool) -> None:
        super().__init__(store, node, image.size, read_only=read_only)
        self.filename = store.path
        self.default_granularity = min(max(image.cluster_size, 4096), 65536)
        self._qcow2 = store
        self._image, self._file = image, image.file
        #: What is on disk, in its order; after a switch that failed, as before it.
        self._entries: list[Entry] = []
        #: Of these, the names of those that were there when it was opened, in the order on disk.
        self._loaded: list[str] = []
        #: Set by :meth:`load`, for writing.
        self._refcounts: Refcounts | None = None
        #: Clusters of directories that may be the one on disk, since a switch failed.
        self._uncertain: list[Run] = []

    # ---- loading ----------------------------------------------------------------------------

    def load(self) -> list[StoredBitmap]:
        """
        :raises CorruptError: if the image is damaged; a bitmap that alone is, is inconsistent
        :raises StoreError: if it cannot be read, or, for writing, has no space to say that its
            bitmaps are in use
        """
        image = self._image
        claims = Claims(self._file)
        if image.version == 2:
            return []
        with steady(self._file.check_unchanged):
            if not self.read_only:
                image.claim_tables(claims)
            entries = _read_entries(image, claims)
            if not self.read_only:
                for entry in entries:
                    if _needs_table(image, entry):  # what we write, too, is as large as the file
                        nbytes = bitmaps.data_nbytes(image.size, entry.granularity_bits)
                        claims.claim("a table", range(0), 8 * image.clusters(nbytes))
                refcounts = Refcounts(image)
                refcounts.check(claims)
            self._check_memory(entries)
            loaded = [
                replace(_stored(entry), content=None if entry.reason else self._read(entry))
                for entry in entries
            ]
        self._entries = entries
        self._loaded = [entry.name for entry in entries]
        if not self.read_only:
            self._refcounts = refcounts
            if not self.at_rest:
                self._switch_to_in_use()
        return loaded

    def read(self) -> list[Reading]:
        """See :meth:`Volume.read`; of clusters of ones and of zeroes there are no bits in memory.

        :raises CorruptError: if the image is damaged; a bitmap that alone is, is inconsistent
        """
        if self._image.version == 2:
            return []
        with steady(self._file.check_unchanged):
            self._entries = _read_entries(self._image, Claims(self._file))
        return [Reading(_stored(each), partial(self._pieces, each)) for each in self._entries]

    def _check_memory(self, entries: list[Entry]) -> None:
        """An image can ask for any amount of memory: what reads as ones takes no space in it."""
        nclusters = sum(
            len(entry.table) - entry.table.count(ZEROES)
            for entry in entries
            if entry.table is not None and entry.reason is None
        )
        nbytes = nclusters << self._image.cluster_bits
        limit = memory.limit()
        if nbytes > limit:
            raise StoreError(
                f"{self.filename}: its bitmaps take {nbytes} bytes of memory, this process may "
                f"have {limit}",
                errno.ENOMEM,
            )

    def _read(self, entry: Entry) -> HBitmap:
        """The bits of a bitmap; what is beyond the end of the disk is dropped."""
        content = self.make(entry.granularity)
        for start, nbytes, words in self._stretches(entry, _BATCH):
            if words is None:
                content.set(start, nbytes)
            else:
                content.deserialize(words, start)
        return content

    def _pieces(self, entry: Entry) -> Iterator[Piece]:
        """The same, for :class:`Reading`."""
        if entry.reason is not None:
            return
        with steady(self._file.check_unchanged):
            for start, nbytes, words in self._stretches(entry, _PIECE):
                if words is None:
                    bits = HBitmap(nbytes, 63)  # a single group
                    bits.set(0, nbytes)
                else:
                    bits = HBitmap(nbytes, entry.granularity_bits)
                    bits.deserialize(words)
                yield Piece(start, bits)

    def _stretches(self, entry: Entry, batch: int) -> Iterator[tuple[int, int, bytes | None]]:
        """What is not zeroes: start and length on the disk, and the words; None: all ones."""
        assert entry.table is not None
        cluster_size = self._image.cluster_size
        # Bytes of the disk that a byte of the bitmap stands for.
        scale = 8 * entry.granularity
        nbytes = bitmaps.data_nbytes(self.size, entry.granularity_bits)
        for index, nclusters, value in _runs(entry.table, cluster_size, batch):
            start = index * cluster_size
            end = min(start + nclusters * cluster_size, nbytes)
            first, length = start * scale, min(end * scale, self.size) - start * scale
            if value == ONES:
                yield first, length, None
            elif value != ZEROES:
                # Whole words, of which the file always has the bytes: clusters have 512 at least.
                words = -(-(end - start) // 8) * 8
                yield first, length, self._file.read_padded(value, words)
            self._tell(f"load {entry.name}", end, nbytes)

    def _tell(self, what: str, done: int, total: int) -> None:
        if self.store.progress is not None:
            self.store.progress(what, done, total)

    def _switch_to_in_use(self) -> None:
        """Nobody takes what is on disk for current any more."""
        image = self._image
        image.begin_writing()
        if image.directory is None and not self._entries:
            return
        change = _Qcow2Change(self, self._refs)
        try:
            change.finish([_opened(self._sound(change, entry)) for entry in self._entries])
        except BaseException:
            change.abort()
            raise
        change.switch()

    def _sound(self, change: _Qcow2Change, entry: Entry) -> Entry:
        """The entry with a table that is its own."""
        return change.placeholder(entry) if _needs_table(self._image, entry) else entry

    # ---- storing ----------------------------------------------------------------------------

    @property
    def _refs(self) -> Refcounts:
        if self._refcounts is None:
            raise StoreError(f"{self.filename} is open for reading only", errno.EROFS)
        return self._refcounts

    def prepare(self, wanted: Wanted, purpose: Purpose) -> Change:
        """See :meth:`Store.prepare`."""
        if self.read_only and wanted.names == {entry.name for entry in self._entries}:
            return _Nothing()
        if self._image.version == 2 and not wanted.records:
            return _Nothing()
        sizes = {record.content.size for record in wanted.records if record.content is not None}
        if wanted.size != self.size or sizes - {self.size}:
            raise UnsupportedError(
                f"{self.filename} has a disk of {self.size} bytes and cannot store bitmaps for "
                f"{wanted.size}: see qemu-img resize"
            )
        if wanted.records or self._entries:
            self._file.check_not_deleted()
        if self.at_rest:
            purpose = Purpose.CLOSE  # nothing of it goes in use
        change = _Qcow2Change(self, self._refs)
        try:
            before = {entry.name: entry for entry in self._entries}
            entries = []
            for record in self._in_order(wanted.records):
                entry = self._entry(change, record, before.get(record.name), purpose)
                if entry is not None:
                    entries.append(entry)
            if self.at_rest:
                if entries == self._entries and not self._uncertain:
                    change.abort()
                    return _Nothing()
                self._image.begin_writing()
                entries = [self._sound(change, entry) for entry in entries]
            change.finish(entries)
        except BaseException:
            change.abort()
            raise
        return change

    def _in_order(self, records: Sequence[Record]) -> list[Record]:
        """As QEMU places them: what was loaded stays where it is, the newest of the others next."""
        by_name = {record.name: record for record in records}
        loaded = [by_name.pop(name) for name in self._loaded if name in by_name]
        return [*loaded, *reversed(by_name.values())]

    def _entry(
        self, change: _Qcow2Change, record: Record, old: Entry | None, purpose: Purpose
    ) -> Entry | None:
        """What is to be stored for a record."""
        if record.content is None:
            return old
        bits = granularity_bits(record.granularity)
        if old is not None and (
            old.table is None
            or old.granularity_bits != bits
            or old.reason not in (None, bitmaps.NOT_CLOSED)
        ):
            old = None
        if old is not None and purpose is Purpose.COMMIT:
            return old
        entry = old or Entry(bitmaps.raw_name(record.name), 0, 0, 0, bits)
        reason = bitmaps.why_unknown(self._image, entry)
        if reason:  # as of one that is repaired
            raise UnsupportedError(
                f"{self.filename}: Bitmap '{record.name}' cannot be stored: {reason}"
            )
        flags = AUTO if record.enabled else 0
        if purpose is not Purpose.CLOSE:
            flags |= IN_USE
        entry = replace(entry, flags=flags | entry.flags & EXTRA_COMPATIBLE, reason=None)
        if purpose is Purpose.COMMIT:
            return change.placeholder(entry)
        return change.store(entry, record)

    def listed(self) -> StoredNode:
        """For :meth:`Store.entries`."""
        return _listed(self._image, self._entries)

    def check_new(self, name: str, granularity: int, names: Collection[str]) -> None:
        def refuse(why: str) -> UnsupportedError:
            return UnsupportedError(
                f"Can't make bitmap '{name}' persistent in '{self.node}': {why}"
            )

        if self._image.version == 2:
            raise refuse("Cannot store dirty bitmaps in qcow2 v2 files")
        bits = granularity_bits(granularity)
        if bits > bitmaps.MAX_GRANULARITY_BITS:
            most = 1 << bitmaps.MAX_GRANULARITY_BITS
            raise refuse(f"Granularity exceeds maximum ({most} bytes)")
        if bits < bitmaps.MIN_GRANULARITY_BITS:
            least = 1 << bitmaps.MIN_GRANULARITY_BITS
            raise refuse(f"Granularity is under minimum ({least} bytes)")
        nclusters = self._image.clusters(bitmaps.data_nbytes(self.size, bits))
        if nclusters << self._image.cluster_bits > bitmaps.MAX_DATA:
            raise refuse("Too much space will be occupied by the bitmap. Use larger granularity")
        if not nclusters:
            raise refuse("The disk is empty")
        raw_name = bitmaps.raw_name(name)
        if b"\0" in raw_name:
            raise refuse("There is a NUL in its name")
        if len(raw_name) > MAX_NAME:
            raise refuse(f"Name length exceeds maximum ({MAX_NAME} characters)")
        if len(names) >= bitmaps.MAX_BITMAPS:
            raise refuse("Maximum number of persistent bitmaps is already reached")
        extra = {entry.name: len(entry.extra) for entry in self._entries if entry.extra}
        nbytes = sum(
            bitmaps.entry_nbytes(len(bitmaps.raw_name(each)), extra.get(each, 0))
            for each in (*names, name)
        )
        if nbytes > bitmaps.MAX_DIRECTORY:
            raise refuse("Not enough space in the bitmap directory")

    def make(self, granularity: int, size: int | None = None) -> HBitmap:
        size = self.size if size is None else size
        return HBitmap(size, granularity_bits(granularity))

    def close(self) -> None:
        if self._qcow2._volume is self:
            self._qcow2.closed()
        self._file.close()


def _opened(entry: Entry) -> Entry:
    """The entry while the image is open for writing.

    What is not understood stays as it is, but a bitmap that should record and will not is marked,
    since others may be able to use it.
    """
    if entry.kind == bitmaps.DIRTY_TRACKING and (entry.enabled or entry.reason is None):
        return replace(entry, flags=entry.flags | IN_USE)
    return entry


def _needs_table(image: Image, entry: Entry) -> bool:
    """Has it none that is believed, while nothing else is wrong with it?

    Before others are written to, it gets one: whatever the old one names may be somebody else's, if
    not today then once the file has grown, and the image would be damaged for us and for QEMU.
    """
    return entry.table is None and bitmaps.why_unknown(image, entry) is None


def _stored(entry: Entry) -> StoredBitmap:
    return StoredBitmap(
        entry.name, entry.granularity, entry.enabled, reason=entry.reason, in_use=entry.in_use
    )


def _listed(image: Image, entries: list[Entry]) -> StoredNode:
    return StoredNode(None, image.size, [_stored(each) for each in entries])


def _read_entries(image: Image, claims: Claims) -> list[Entry]:
    if image.has_bitmaps or image.directory is None:
        entries = bitmaps.read_entries(image, claims)
        if not image.file.locked and image.file.is_written():
            entries = [
                replace(entry, reason=LIVE) if entry.reason == bitmaps.NOT_CLOSED else entry
                for entry in entries
            ]
        return entries
    # "the bitmaps extension data must be considered inconsistent": QEMU drops the bitmaps. Here
    # those are shown as inconsistent whose entry can still be read; nothing else of what they have
    # on disk is believed.
    try:
        entries = bitmaps.read_directory(image)
    except CorruptError as error:
        _log.warning("%s: all its bitmaps are lost, since %s (%s)", image.file.path, FOREIGN, error)
        return []
    return [
        replace(entry, reason=FOREIGN)
        for entry in entries
        if bitmaps.why_unknown(image, entry) is None
    ]


def _runs(table: array[int], cluster_size: int, batch: int) -> Iterator[tuple[int, int, int]]:
    """Entries that belong together: (index, how many, the first one); ``batch`` bytes at most."""
    most = max(1, batch // cluster_size)
    index = 0
    while index < len(table):
        value = table[index]
        step = cluster_size if value > ONES else 0
        end = index + 1
        while (
            end < len(table) and end - index < most and table[end] == value + (end - index) * step
        ):
            end += 1
        yield index, end - index, value
        index = end


class _Nothing(Change):
    """There is nothing to change."""

    def switch(self) -> None:
        pass

    def abort(self) -> None:
        pass


class _Qcow2Change(Change):
    """New clusters, written and not named by anything yet."""

    def __init__(self, volume: Qcow2Volume, refcounts: Refcounts) -> None:
        self._volume, self._refcounts = volume, refcounts
        self._image, self._file = volume._image, volume._file
        self._allocated: list[Run] = []
        self._entries: list[Entry] | None = None
        self._directory: Directory | None = None

    # ---- preparing --------------------------------------------------------------------------

    def _one_run(self, data: bytes) -> int:
        """Write something that has to lie in a row; its offset."""
        nclusters = self._image.clusters(len(data))
        first = self._refcounts.allocate_one_run(nclusters)
        self._allocated.append((first, nclusters))
        self._file.write(first << self._image.cluster_bits, data)
        return first << self._image.cluster_bits

    def _with_table(self, entry: Entry, table: array[int]) -> Entry:
        offset = self._one_run(pack_table(table))
        return replace(entry, table_offset=offset, table_size=len(table), table=table)

    def placeholder(self, entry: Entry) -> Entry:
        """The entry without data, in use: there was a bitmap, whatever happens."""
        nbytes = bitmaps.data_nbytes(self._image.size, entry.granularity_bits)
        entry = replace(entry, flags=entry.flags | IN_USE)
        return self._with_table(entry, array("Q", [ZEROES]) * self._image.clusters(nbytes))

    def store(self, entry: Entry, record: Record) -> Entry:
        """The entry with the bits of a record: what is on disk already stays there."""
        content = record.content
        assert content is not None
        if record.successor is not None:
            content = content | record.successor
        cluster_size = self._image.cluster_size
        scale = 8 * record.granularity
        nbytes = bitmaps.data_nbytes(self._image.size, entry.granularity_bits)
        nclusters = self._image.clusters(nbytes)
        old = entry.table
        if old is None or len(old) != nclusters:
            old = None
        table = array("Q", [ZEROES]) * nclusters
        batch = max(1, _BATCH // cluster_size)
        for index in range(0, nclusters, batch):
            end = min(index + batch, nclusters)
            start_item = index * cluster_size * scale
            items = min(end * cluster_size * scale, content.size) - start_item
            if content.next_dirty(start_item, items) is not None:
                data = content.serialize(start_item, items)
                known = old[index:end] if old is not None else None
                table[index:end] = self._store_clusters(data, end - index, known)
            volume = self._volume
            volume._tell(f"store {record.name}", min(end * cluster_size, nbytes), nbytes)
        if old is not None and table == old:
            return entry
        return self._with_table(entry, table)

    def _store_clusters(self, data: bytes, nclusters: int, old: array[int] | None) -> array[int]:
        """Write clusters of a bitmap where they are not there already; their table entries."""
        cluster_size, bits = self._image.cluster_size, self._image.cluster_bits
        zeroes, ones = bytes(cluster_size), b"\xff" * cluster_size
        data = data.ljust(nclusters << bits, b"\0")
        table = array("Q", [ZEROES]) * nclusters
        changed = []
        for index, there in self._on_disk(old, nclusters):
            start = index << bits
            if data.startswith(zeroes, start):
                continue
            if data.startswith(ones, start):
                table[index] = ONES
            elif there is not None and data.startswith(there, start):
                assert old is not None
                table[index] = old[index]
            else:
                changed.append(index)
        runs = self._refcounts.allocate(len(changed))
        self._allocated += runs
        i = 0
        view = memoryview(data)
        for first, count in runs:
            indices = changed[i : i + count]
            i += count
            for number, index in enumerate(indices, first):
                table[index] = number << bits
            self._file.write(first << bits, *_joined(view, indices, bits))
        return table

    def _on_disk(
        self, old: array[int] | None, nclusters: int
    ) -> Iterator[tuple[int, bytes | None]]:
        """The clusters of a batch, and what is on disk, where something is."""
        if old is None:
            for index in range(nclusters):
                yield index, None
            return
        cluster_size = self._image.cluster_size
        for index, count, value in _runs(old, cluster_size, _BATCH):
            if value <= ONES:
                for i in range(index, index + count):
                    yield i, None
            else:
                there = self._file.read_padded(value, count * cluster_size)
                for i in range(count):
                    yield index + i, there[i * cluster_size : (i + 1) * cluster_size]

    def finish(self, entries: list[Entry]) -> None:
        """Write the directory; afterwards only the switch is missing."""
        volume = self._volume
        directory = bitmaps.pack_directory(entries)
        same = directory == bitmaps.pack_directory(volume._entries) and self._image.has_bitmaps
        if not volume._uncertain and (same or not (entries or self._image.directory)):
            return
        if len(entries) > bitmaps.MAX_BITMAPS or len(directory) > bitmaps.MAX_DIRECTORY:
            raise StoreError(f"{volume.filename}: too many bitmaps", errno.EFBIG)
        if entries:
            offset = self._one_run(directory)
            self._directory = Directory(len(entries), len(directory), offset)
        self._image.make_room()
        self._refcounts.commit()
        self._entries = entries

    def abort(self) -> None:
        allocated, self._allocated = self._allocated, []
        if allocated:
            try:
                self._refcounts.free(allocated)
            except StoreError:
                return  # they leak
            self._refcounts.release()

    # ---- switching --------------------------------------------------------------------------

    def switch(self) -> None:
        if self._entries is None:
            return
        volume, image = self._volume, self._image
        # Before the switch, after which nothing may fail.
        freed = [(cluster, 1) for cluster in self._unnamed(volume._entries, self._entries)]
        freed += volume._uncertain
        if image.directory is not None and image.has_bitmaps:
            offset, nbytes = image.directory.offset, image.directory.nbytes
            freed.append((offset >> image.cluster_bits, image.clusters(nbytes)))
        try:
            image.switch(self._directory)
            self._file.check_not_deleted()
        except BaseException:
            # Whichever is on disk, its clusters stay, and the next change writes a new directory.
            volume._uncertain += self._allocated
            self._allocated = []
            raise
        volume._entries, volume._uncertain, self._allocated = self._entries, [], []
        names = {entry.name for entry in self._entries}
        volume._loaded = [name for name in volume._loaded if name in names]
        try:
            self._refcounts.free(freed)
        except StoreError:
            return  # they leak
        self._refcounts.release()

    def _unnamed(self, before: list[Entry], after: list[Entry]) -> Iterator[int]:
        """The clusters of bitmaps that only the entries of before name."""
        image = self._image
        tables = {entry.table_offset: entry for entry in after}
        by_name = {entry.raw_name: entry for entry in after}
        for entry in before:
            if entry.table is None or entry.table_offset in tables:
                continue
            yield from bitmaps.table_clusters(image, entry)
            heir = by_name.get(entry.raw_name)
            table = heir.table if heir is not None and heir.table is not None else array("Q")
            kept = set(bitmaps.data_clusters(image, table))
            for cluster in bitmaps.data_clusters(image, entry.table):
                if cluster not in kept:
                    yield cluster


def _joined(view: memoryview, indices: list[int], bits: int) -> Iterator[memoryview]:
    """The clusters of these indices, those in a row as one piece."""
    i = 0
    while i < len(indices):
        end = i + 1
        while end < len(indices) and indices[end] == indices[i] + end - i:
            end += 1
        yield view[indices[i] << bits : (indices[end - 1] + 1) << bits]
        i = end
