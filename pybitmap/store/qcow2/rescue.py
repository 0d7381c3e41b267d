# SPDX-License-Identifier: MIT
"""rescue(): images that cannot be opened because of their bitmaps, opened again.

QEMU refuses an image whose bitmaps extension or bitmap directory is damaged, whatever for: the
machine does not boot, and no tool can as much as remove the bitmaps. What is looked for here, and
what becomes of it:

* a bitmap is whole if its entry and its table are in order, and what it names lies in the file,
  has refcounts, and is nobody else's: not the disk's, not the header's tables', not another
  bitmap's. It is kept as it is;
* of another one that has a name, the name is kept, inconsistent, without data;
* what has no name is lost; where nothing is left, the image has no bitmaps.

Nothing is freed, since nobody knows whose it is. The order of the writes, each synced before the
next::

    backup | tables without data, directory, in clusters that were free; refcounts | header

The last is one sector as a rule (:meth:`Image.replacement`), so whenever a kill comes, the image is
as it was, or rescued. If neither refcounts nor what is free can be trusted, nothing is allocated:
either the directory can stay as it is, or the bitmaps are lost.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import stat
from array import array
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import chain
from itertools import count as numbers
from typing import Callable

from ... import _core
from ..._fork import Process
from ...errors import CorruptError, ExistsError, InvalidError, StoreError
from ...hbitmap import HBitmap
from ..base import MAX_NAME, Progress
from ..opened import opened
from . import bitmaps
from .bitmaps import AUTO, EXTRA_COMPATIBLE, IN_USE, ZEROES, Entry
from .file import File
from .image import OFFSET_MASK, SECTOR, Claims, Directory, Image, pack_table
from .refcounts import Refcounts, Run
from .store import FOREIGN

#: Of an entry whose type is known and whose granularity can be: where to look for one.
_TYPE_AND_GRANULARITY = re.compile(rb"\x01[\x09-\x1f]")
_TYPE_OFFSET, _EXTRA_OFFSET = 16, 20

_NOT_SURE = "it is not sure that it belongs to the bitmap directory"


class Outcome(Enum):
    """What becomes of a bitmap."""

    KEPT = "kept"
    INCONSISTENT = "inconsistent"
    LOST = "lost"


@dataclass(frozen=True)
class Fate:
    """Of a bitmap.

    :param name: as it is shown; a broken one with escapes
    :param reason: why it is not kept, or what of it is not; None: it is as it was
    """

    name: str
    outcome: Outcome
    reason: str | None = None


@dataclass(frozen=True)
class Report:
    """What :func:`rescue` found, and did.

    :param faults: of the extension and the directory, sentences
    :param bitmaps: in the order of the directory
    :param refcounts: why the image's refcounts cannot be trusted; None if they can
    :param backup: the file that has what was replaced; None if nothing was written
    :param backup_nbytes: how much of it is the beginning of the image; the directory is behind it
    """

    path: str
    faults: list[str]
    bitmaps: list[Fate]
    refcounts: str | None = None
    backup: str | None = None
    backup_nbytes: int = 0

    @property
    def damaged(self) -> bool:
        """Was, or is, there anything to be done?"""
        return bool(self.faults) or any(each.reason is not None for each in self.bitmaps)

    @property
    def left(self) -> bool:
        """Does the image have bitmaps afterwards?"""
        return any(each.outcome is not Outcome.LOST for each in self.bitmaps)

    @property
    def inconsistent(self) -> bool:
        """Are there bitmaps that were made inconsistent?"""
        return any(each.outcome is Outcome.INCONSISTENT for each in self.bitmaps)

    @property
    def put_back(self) -> str | None:
        """The command of a shell that undoes it, as long as nobody else has written to the image;
        None if nothing was written."""
        if self.backup is None:
            return None
        source, target = shlex.quote(self.backup), shlex.quote(self.path)
        count = self.backup_nbytes // SECTOR
        return f"dd if={source} of={target} bs={SECTOR} count={count} conv=notrunc,fsync"


def rescue(
    path: str | os.PathLike[str],
    *,
    dry_run: bool = False,
    backup: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    lock: bool = True,
    open_file: Callable[..., File] = File,
) -> Report:
    """Let an image be opened that QEMU refuses because of its bitmaps ("Bitmaps extension").

    Whole bitmaps are kept, others become inconsistent, or are lost (:class:`Outcome`). An image of
    which nothing is damaged is not changed. The disk's data is never written to, and no cluster
    is freed: ``qemu-img check -r leaks`` does that.

    Killed, interrupted or without space at any moment, the image is as it was or rescued; what
    was allocated may leak, and a backup may remain. (Where an extension that stays has its data
    over the end of a sector, or others stand behind one that goes, the change is two sectors, and
    the backup the way out if the system crashes between them.) Nobody else may have the image open,
    so no writer comes beside it, and of two rescues one is refused. The child of a fork, in
    ``progress``, is refused, too.

    :param path: of the image, a file or a block device
    :param dry_run: look, and write nothing
    :param backup: the file to which what is replaced is copied first, synced; it must not be there.
        None: ``PATH.before-rescue``, with a number if that is there.
    :param progress: is told how far it has read; may raise, which stops it and changes nothing
    :param lock: False: go on where the file system has no locks; see :class:`Qcow2Store`
    :param open_file: for tests
    :raises LockedError: if another program has it open
    :raises ExistsError: if the file for the backup is there
    :raises InvalidError: if there is none, and the image is a block device
    :raises CorruptError: if what is damaged is not the bitmaps, or it is no qcow2 image
    :raises UnsupportedError: for an image with what is not known here
    :raises StoreError: if it cannot be read or written, and why
    """
    path, process = os.fspath(path), Process()
    with closing(open_file(path, read_only=dry_run, lock=lock)) as file:
        faults: list[str] = []
        image = Image(file, read_only=dry_run, faults=faults)
        if image.version == 2:
            return Report(path, [], [])
        try:
            plan = _Plan(image, faults, progress)
        except CorruptError as error:
            # That of the bitmaps is no error here.
            raise CorruptError(f"{error} (rescue mends bitmaps only)") from error
        if dry_run or not plan.report.damaged:
            return plan.report
        if not process.is_this():
            raise StoreError(f"{path} is being rescued by the parent of this process", errno.EBADF)
        head = file.read_padded(0, image.header_nbytes)
        saved = _save(path, backup, head + plan.found.data)
        try:
            plan.write()
        except BaseException:
            with suppress(OSError):
                os.unlink(saved)
            raise
        try:
            image.replace(plan.directory)
        except StoreError as error:
            raise StoreError(
                f"{error}; what was there before is in {saved}", error.errno
            ) from error
        return replace(plan.report, backup=saved, backup_nbytes=len(head))


# ---- the directory --------------------------------------------------------------------------


class _Found:
    """What can be read of the bitmap directory ("Bitmap directory").

    :param faults: takes what is wrong with it
    """

    def __init__(self, image: Image, faults: list[str]) -> None:
        self._image, self._faults = image, faults
        #: Each entry, and why it cannot be told that it is one of the image's bitmaps.
        self.entries: list[tuple[Entry, str | None]] = []
        #: The directory as it stands in the file.
        self.data = b""
        #: Do the entries lie one behind the other, from its beginning on?
        self.contiguous = True
        directory = image.directory
        if directory is None:
            return
        bad = image.bad_area(directory.offset, 1)
        if bad:
            faults.append(f"the bitmap directory {bad}")
            return
        self._read(directory)

    @property
    def clusters(self) -> range:
        """Those of the directory, as far as it was found."""
        directory = self._image.directory
        if directory is None:
            return range(0)
        first = directory.offset >> self._image.cluster_bits
        return range(first, first + self._image.clusters(len(self.data)))

    def drop(self, fault: str) -> None:
        """None of it can be believed."""
        self._faults.append(fault)
        self.entries, self.data = [], b""

    def _read(self, directory: Directory) -> None:
        image = self._image
        end = image.clusters(image.file_nbytes) << image.cluster_bits
        room = min(end - directory.offset, bitmaps.MAX_DIRECTORY)
        count: int | None = directory.nbitmaps
        size: int | None = directory.nbytes
        if not 1 <= directory.nbitmaps <= bitmaps.MAX_BITMAPS:
            self._faults.append(f"there are said to be {directory.nbitmaps} bitmaps")
            count = None
        if not 0 < directory.nbytes <= room or directory.nbytes % 8:
            self._faults.append(f"the bitmap directory is said to have {directory.nbytes} bytes")
            size = None
        data = image.file.read_padded(directory.offset, room)
        whole = None if size is None else self._in_a_row(data[:size])
        if whole is None:
            nbytes = self._look(data, size, count)
        else:
            assert size is not None
            nbytes = self._compare(data, size, count, whole)
        self.data = data[:nbytes]

    def _in_a_row(self, data: bytes) -> list[Entry] | None:
        """Entries that take all of the directory; None if they do not."""
        entries = []
        offset = 0
        while offset < len(data):
            entry = bitmaps.unpack_entry(data, offset)
            if entry is None or not any(entry.pack()):
                return None
            entries.append(entry)
            offset += _nbytes(entry)
        return entries

    def _compare(self, data: bytes, size: int, count: int | None, entries: list[Entry]) -> int:
        """With the number of bitmaps: those that only one of the two has are doubtful."""
        if count is None:
            count = len(entries)
        self.entries = [(entry, None) for entry in entries[:count]]
        self.entries += [(entry, _NOT_SURE) for entry in entries[count:]]
        if count == len(entries):
            return size
        self._faults.append(f"there are said to be {count} bitmaps, but there are {len(entries)}")
        while len(self.entries) < count:
            entry = bitmaps.unpack_entry(data, size)
            if entry is None or not self._is_plausible(entry):
                break
            self.entries.append((entry, _NOT_SURE))
            size += _nbytes(entry)
        return size

    def _look(self, data: bytes, size: int | None, count: int | None) -> int:
        """Entries here and there: how large one was that is broken, is not known.

        If one size is known, they have to end with it, else it is the number that says when to
        stop. If none is, or they do not, what comes behind a gap is doubtful.
        """
        if size is not None:
            data = data[:size]
        offset = gaps = end = 0
        behind = len(self.entries)
        while offset < len(data):
            if size is None and count is not None and len(self.entries) + gaps >= count:
                break
            entry = bitmaps.unpack_entry(data, offset)
            if entry is not None and self._has_its_size(data, offset, entry, size):
                doubt = _NOT_SURE if size is None and count is None else None
                self.entries.append((entry, doubt))
                offset = end = offset + _nbytes(entry)
                continue
            if size is None and count is None:
                break
            entry = self._without_extra(data, offset, size)
            if entry is not None:
                self.contiguous = False
                self.entries.append((entry, "its entry in the bitmap directory is damaged"))
                offset = end = offset + _nbytes(entry)
                continue
            if not gaps:
                behind = len(self.entries)
            gaps += 1
            offset = self._next(data, offset)
        if gaps:
            self.contiguous = False
            self._faults.append("a part of the bitmap directory cannot be read")
            if end != size:
                doubtful = [(entry, _NOT_SURE) for entry, _ in self.entries[behind:]]
                self.entries[behind:] = doubtful
        return end if size is None else size

    def _has_its_size(self, data: bytes, offset: int, entry: Entry, size: int | None) -> bool:
        """Is it one, or does one begin, or the directory end, where it ends?"""
        if self._is_plausible(entry):
            return True
        end = offset + _nbytes(entry)
        if size is not None and end == size:
            return True
        behind = bitmaps.unpack_entry(data, end)
        return behind is not None and self._is_plausible(behind)

    def _without_extra(self, data: bytes, offset: int, size: int | None) -> Entry | None:
        """The entry, if it only claims extra data that it cannot have; None if not."""
        fixed = data[offset : offset + _EXTRA_OFFSET] + bytes(4)
        rest = data[offset + len(fixed) : offset + bitmaps.entry_nbytes(MAX_NAME)]
        entry = bitmaps.unpack_entry(fixed + rest, 0)
        if entry is None or not self._is_plausible(entry):
            return None
        end = offset + _nbytes(entry)
        behind = bitmaps.unpack_entry(data, end)
        follows = behind is not None and self._is_plausible(behind)
        return entry if follows or end == size else None

    def _next(self, data: bytes, offset: int) -> int:
        """Where the next entry is, behind an offset; the end of the data if there is none."""
        for match in _TYPE_AND_GRANULARITY.finditer(data, offset + _TYPE_OFFSET + 8):
            start = match.start() - _TYPE_OFFSET
            if start % 8 == 0:
                entry = bitmaps.unpack_entry(data, start)
                if entry is not None and self._is_plausible(entry):
                    return start
        return len(data)

    def _is_plausible(self, entry: Entry) -> bool:
        """Does it look like an entry, and not like something else?"""
        return (
            entry.table_size > 0
            and entry.table_offset > 0
            and not entry.table_offset & (self._image.cluster_size - 1)
            and not entry.extra
            and _why_no_name(entry) is None
            and not entry.flags & ~(IN_USE | AUTO)
            and entry.kind == bitmaps.DIRTY_TRACKING
            and bitmaps.MIN_GRANULARITY_BITS
            <= entry.granularity_bits
            <= bitmaps.MAX_GRANULARITY_BITS
        )


def _nbytes(entry: Entry) -> int:
    """Of an entry in the directory."""
    return bitmaps.entry_nbytes(len(entry.raw_name), len(entry.extra))


def _why_no_name(entry: Entry) -> str | None:
    """What QEMU has against a name."""
    if not 1 <= len(entry.raw_name) <= MAX_NAME:
        return f"its name has {len(entry.raw_name)} bytes"
    return "its name has a NUL" if b"\0" in entry.raw_name else None


# ---- the plan -------------------------------------------------------------------------------


class _Plan:
    """What is to become of the bitmaps of an image; nothing is written before :meth:`write`.

    :param faults: of the bitmaps extension
    :raises CorruptError: if what is damaged is not the bitmaps
    """

    #: What the image is to have; None: no bitmaps.
    directory: Directory | None = None

    def __init__(self, image: Image, faults: list[str], progress: Progress | None) -> None:
        self._image, self._progress = image, progress
        claims = Claims(image.file)
        image.claim_tables(claims)
        self._refcounts = Refcounts(image)
        doubt = self._why_no_refcounts(claims)
        self._used = HBitmap(image.clusters(image.file_nbytes))
        for cluster in claims:
            self._used.add(cluster)
        doubt = self._look_at_disk() or doubt
        #: What is to be written, at offsets, and where that is.
        self._writes: list[tuple[int, bytes]] = []
        self._allocated: list[Run] = []
        if not image.has_bitmaps and not faults:
            # Programs drop these bitmaps, if there are any, and do not refuse the image.
            if doubt:
                raise CorruptError(doubt)
            self.report = Report(image.file.path, [], [])
            return
        self.found = _Found(image, faults)
        if self.found.entries and any(each in self._used for each in self.found.clusters):
            self.found.drop("the bitmap directory lies in clusters of something else")
        self._decide(faults, doubt)

    def _why_no_refcounts(self, claims: Claims) -> str | None:
        """What is wrong with the refcounts; None if nothing is. Claims their blocks."""
        try:
            self._refcounts.check(claims)
        except CorruptError as error:
            return str(error)
        return self._doubt("it was not closed in an orderly way") if self._image.is_dirty else None

    def _doubt(self, what: str) -> str:
        return f"{self._image.file.path}: {what}: run qemu-img check -r all"

    def _look_at_disk(self) -> str | None:
        """Note what the disk and its snapshots use: L2 tables, and clusters of data.

        :returns: what cannot be, if the refcounts are right; None if nothing
        """
        image, bits = self._image, self._image.cluster_bits
        end = image.clusters(image.file_nbytes)
        tables = {
            entry & OFFSET_MASK
            for l1 in (image.l1_table(), *image.snapshot_l1_tables())
            for entry in l1
        }
        doubt = None
        for done, offset in enumerate(sorted(tables - {0})):
            if offset & (image.cluster_size - 1) or offset >> bits >= end:
                doubt = self._doubt(f"an L2 table is said to be at {offset:#x}")
                continue
            found = {offset >> bits, *image.l2_clusters(offset)}
            self._used.update(cluster for cluster in found if cluster < end)
            if self._progress is not None:
                self._progress("look at the disk", done, len(tables))
        if self._used.next_dirty(self._refcounts.end()) is not None:
            doubt = self._doubt("the disk has clusters that are said to be free")
        return doubt

    def _decide(self, faults: list[str], doubt: str | None) -> None:
        """
        :param doubt: why refcounts cannot be trusted; None if they can
        """
        image, found = self._image, self.found
        verdicts = self._judge()
        if not faults and all(each.is_as_it_was for each in verdicts):
            # QEMU opens it, and can mend what remains.
            clusters = chain(found.clusters, *(each.clusters for each in verdicts))
            if doubt is None and self._why_free(clusters):
                doubt = self._doubt("the bitmaps have clusters that are said to be free")
            if doubt is not None:
                raise CorruptError(doubt)
        elif doubt is None:
            if self._why_free(found.clusters):
                found.drop("the bitmap directory lies in clusters that are said to be free")
                verdicts = []
            for each in verdicts:
                each.reason = each.reason or self._why_free(each.clusters)
        doubt = self._arrange(verdicts, doubt)
        self.report = Report(
            image.file.path, faults, [each.fate() for each in verdicts], refcounts=doubt
        )

    # ---- judging ----------------------------------------------------------------------------

    def _judge(self) -> list[_Verdict]:
        """Which bitmaps are whole, but for refcounts."""
        names: dict[str, _Verdict] = {}
        whose: dict[int, _Verdict] = {}
        claims = Claims(self._image.file)
        verdicts = []
        for entry, doubt in self.found.entries:
            verdict = _Verdict(entry)
            verdicts.append(verdict)
            verdict.lost = self._why_lost(entry, len(names))
            other = names.setdefault(entry.name, verdict)
            if verdict.lost is None and other is not verdict:
                verdict.lost = other.reason = "another bitmap has its name"
            if verdict.lost is not None:
                continue
            verdict.reason = verdict.reason or doubt or self._look_at(verdict, claims)
            for cluster in verdict.clusters:
                other = whose.setdefault(cluster, verdict)
                if other is not verdict:
                    verdict.reason = f"it shares cluster {cluster} with '{other.entry.name}'"
                    other.reason = f"it shares cluster {cluster} with '{entry.name}'"
        return verdicts

    def _why_lost(self, entry: Entry, count: int) -> str | None:
        """Why not even its name can be kept; None if it can."""
        if not self._image.has_bitmaps:
            return FOREIGN
        if count >= bitmaps.MAX_BITMAPS:
            return "there are too many bitmaps"
        if self._granularity_bits(entry) is None:
            return f"there is no bitmap of a disk of {self._image.size} bytes"
        return _why_no_name(entry)

    def _look_at(self, verdict: _Verdict, claims: Claims) -> str | None:
        """Why it is not whole; None if it is, and then its clusters are noted."""
        image, entry = self._image, verdict.entry
        # A name that is not UTF-8 is no damage: QEMU works with it.
        reason = bitmaps.why_unusable(image, replace(entry, raw_name=b"-"))
        if reason:
            return reason
        if entry.extra and not entry.flags & EXTRA_COMPATIBLE:
            return bitmaps.EXTRA
        claims.claim("a table", range(0), 8 * entry.table_size)
        try:
            table = bitmaps.read_table(image, entry)
        except CorruptError as error:
            return str(error)
        clusters = [*bitmaps.table_clusters(image, entry), *bitmaps.data_clusters(image, table)]
        directory = self.found.clusters
        if len(set(clusters)) != len(clusters):
            return "it has a cluster twice"
        for cluster in clusters:
            if cluster in self._used or cluster in directory:
                return f"it has cluster {cluster}, which is something else, too"
        verdict.clusters = clusters
        return None

    def _why_free(self, clusters: Iterable[int]) -> str | None:
        """Which of them was, or will be, given to somebody else; None if none."""
        for cluster in clusters:
            if not self._refcounts.get(cluster):
                return f"its cluster {cluster} is said to be free"
        return None

    def _granularity_bits(self, entry: Entry) -> int | None:
        """That of the entry, or else one that the disk can have; None: there is none."""
        image = self._image
        default: int = min(max(image.cluster_bits, 12), 16)
        choices: list[int] = [entry.granularity_bits]
        choices += range(default, bitmaps.MAX_GRANULARITY_BITS + 1)
        for bits in choices:
            like = Entry(b"-", 0, 0, 0, bits)
            if bitmaps.why_unknown(image, like) is None:
                return bits
        return None

    # ---- arranging --------------------------------------------------------------------------

    def _arrange(self, verdicts: list[_Verdict], doubt: str | None) -> str | None:
        """Find room for what is kept, where it has to be elsewhere.

        :returns: why refcounts cannot be trusted, as was known or as comes out
        """
        image, found = self._image, self.found
        left = [each for each in verdicts if each.lost is None]
        same = [each.kept for each in left] == [entry for entry, _ in found.entries]
        if not left:
            return doubt
        if same and found.contiguous and not any(each.reason for each in left):
            assert image.directory is not None
            offset = image.directory.offset
            self.directory = Directory(len(left), sum(_nbytes(each.kept) for each in left), offset)
            return doubt
        if doubt is None:
            entries = [self._without_data(each.kept) if each.reason else each.kept for each in left]
            data = bitmaps.pack_directory(entries)
            self.directory = Directory(len(entries), len(data), self._place(data))
            if any(
                cluster in self._used
                for first, nclusters in self._allocated
                for cluster in range(first, first + nclusters)
            ):
                doubt = self._doubt("the disk has clusters that are said to be free")
        if doubt is not None:
            self.directory = None
            self._writes, self._allocated = [], []
            for each in left:
                each.lost = f"nothing can be written for it, since refcounts are wrong ({doubt})"
        return doubt

    def _without_data(self, entry: Entry) -> Entry:
        """There was a bitmap, whatever it was."""
        bits = self._granularity_bits(entry)
        assert bits is not None
        nbytes = bitmaps.data_nbytes(self._image.size, bits)
        table = array("Q", [ZEROES]) * self._image.clusters(nbytes)
        offset = self._place(pack_table(table))
        flags = IN_USE | entry.flags & AUTO
        return Entry(entry.raw_name, offset, len(table), flags, bits)

    def _place(self, data: bytes) -> int:
        """Where it is to be written."""
        nclusters = self._image.clusters(len(data))
        first = self._refcounts.allocate_one_run(nclusters)
        self._allocated.append((first, nclusters))
        offset = first << self._image.cluster_bits
        self._writes.append((offset, data))
        return offset

    def write(self) -> None:
        """All but the header. Durable when it returns; nobody reads it yet.

        :raises StoreError: the image is as it was
        """
        self._image.begin_writing()
        if not self._writes:
            return
        try:
            for offset, data in self._writes:
                self._image.file.write(offset, data)
            self._refcounts.commit()
        except BaseException:
            with suppress(StoreError):
                self._refcounts.free(self._allocated)
                self._refcounts.release()
            raise


@dataclass
class _Verdict:
    """What is to become of a bitmap.

    :param entry: as it was
    :param reason: why it is not whole
    :param lost: why not even its name can be kept
    :param clusters: of its table and its data, if it is whole
    """

    entry: Entry
    reason: str | None = None
    lost: str | None = None
    clusters: list[int] = field(default_factory=list)

    @property
    def kept(self) -> Entry:
        """What QEMU knows of the entry: no extra data."""
        return replace(self.entry, extra=b"", flags=self.entry.flags & ~EXTRA_COMPATIBLE)

    @property
    def is_as_it_was(self) -> bool:
        return self.lost is None and self.reason is None and self.kept == self.entry

    def fate(self) -> Fate:
        if self.lost is not None:
            return Fate(self.entry.name, Outcome.LOST, self.lost)
        if self.reason is not None:
            return Fate(self.entry.name, Outcome.INCONSISTENT, self.reason)
        note = None if self.kept == self.entry else "it has lost its extra data"
        return Fate(self.entry.name, Outcome.KEPT, note)


# ---- the backup -----------------------------------------------------------------------------


def _save(path: str, backup: str | os.PathLike[str] | None, data: bytes) -> str:
    """Write a new file, durably; its path."""
    if backup is not None:
        targets: Iterator[str] = iter([os.fspath(backup)])
    elif stat.S_ISBLK(os.stat(path).st_mode):
        raise InvalidError(f"{path} is a block device: say where the backup is to be")
    else:
        first = f"{path}.before-rescue"
        targets = chain([first], (f"{first}.{number}" for number in numbers(1)))
    for target in targets:
        try:
            file = opened(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            continue
        except OSError as error:
            raise StoreError(f"{target}: {error.strerror}", error.errno) from error
        try:
            with closing(file):
                _fill(file.fileno(), data)
            folder = os.path.dirname(os.path.abspath(target))
            code = _core.hbfile_sync_directory(os.fsencode(folder))
            if code:
                raise OSError(-code, os.strerror(-code))
        except BaseException as error:
            with suppress(OSError):
                os.unlink(target)
            if isinstance(error, OSError):
                why = f"{target} cannot be written: {error.strerror}"
                raise StoreError(why, error.errno) from error
            raise
        return target
    raise ExistsError(f"{backup} is there already, and a backup goes over nothing: name another")


def _fill(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]
    os.fsync(fd)
