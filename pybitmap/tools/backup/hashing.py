# SPDX-License-Identifier: MIT
"""Hashes of copies: of a file, and of what the disk holds, as a tree that follows increments.

Workload: a disk of 64 GiB of which a thousand places have changed. The tree after an increment is
made from that of its parent and from what the increment has, so 64 MiB are read, and not 64 GiB.

**The tree.** A disk is cut into leaves of 64 KiB; the last is filled up with zeroes, and so are
leaves behind it, up to 16**h of them, the smallest h from 1 on with which all have room. H is
SHA-256, || puts one behind the other, numbers are little-endian::

    leaf                 H(0x00 || 64 KiB)
    node, level 1 .. h   H(0x01 || level: 1 byte || 16 hashes of the level below; 0 has the leaves)
    root                 H(0x02 || size of the disk: 8 bytes || the node of level h)

So neither a leaf nor another size can be taken for a node, and zeroes behind the end of a disk that
grows change nothing but the size.

**The file** ``FILE.leaves`` beside a copy has what the copy changes, in groups of 16 leaves, those
of a node of level 1::

    "pybitmap leaves" 0x0a || 1: 4 bytes || 65536: 4 bytes || size of the disk: 8 bytes
    group: 8 bytes || 0: 8 bytes || 16 hashes     a group of which something is not zero
    group: 8 bytes || count: 8 bytes              so many groups that are all zero

in order, without overlaps. A group that none of a chain's files has is zero, and so is a group of
the files below that lies behind the end of the disk of any file above: what a disk has lost by
shrinking does not come back when it grows. Groups that are zero are not stored in a full copy.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from heapq import merge
from io import BufferedReader
from itertools import groupby, tee
from pathlib import Path
from typing import NamedTuple

from ...errors import CorruptError, StoreError
from ...store.base import Progress
from .copies import check_chain, check_image, image_of
from .manifest import LEAVES, Copy, Repository, check_regular, open_regular, write_all
from .qemu import Content, run

LEAF = 1 << 16  #: bytes
FAN = 16  #: hashes below a node
GROUP = LEAF * FAN  #: bytes below a node of level 1

_HEAD = struct.Struct("<16sIIQ")
_MAGIC = b"pybitmap leaves\n"
_RECORD = struct.Struct("<QQ")
_HASH = 32  # bytes
_PIECE = 1 << 22  # bytes of a file, hashed at once


def sha256_of(path: Path, progress: Progress | None = None) -> str:
    """Of a file, in hexadecimal.

    :raises CorruptError: if it is missing, or no file
    :raises StoreError: if it cannot be read
    """
    total = check_regular(path).st_size
    digest = hashlib.sha256()
    done = 0
    try:
        with open_regular(path) as file:
            while True:
                piece = os.read(file.fileno(), _PIECE)
                if not piece:
                    return digest.hexdigest()
                digest.update(piece)
                done += len(piece)
                if progress is not None:
                    progress(f"hashing {path.name}", done, max(done, total))
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"cannot read '{path}': {error.strerror}", error.errno) from error


# ---- the tree -------------------------------------------------------------------------------


def _leaf(data: bytes) -> bytes:
    return hashlib.sha256(b"\0" + data).digest()


def _node(level: int, hashes: bytes) -> bytes:
    return hashlib.sha256(bytes([1, level]) + hashes).digest()


#: Hashes of nothing but zeroes: of a leaf, a node of level 1, ...; 16**12 leaves are 2**64 bytes.
_ZERO = [_leaf(bytes(LEAF))]
for _level in range(1, 13):
    _ZERO.append(_node(_level, _ZERO[-1] * FAN))
_ZERO_GROUP = _ZERO[0] * FAN
_ZEROES = bytes(GROUP)

#: Number of a group, and its 16 hashes; in order of number, those of zeroes may be left out.
Groups = Iterable[tuple[int, bytes]]


def root_of(size: int, groups: Groups) -> str:
    """The root of the tree over a disk of that size, in hexadecimal."""
    height, leaves = 1, FAN
    while leaves * LEAF < size:
        height, leaves = height + 1, leaves * FAN
    nodes: Iterator[tuple[int, bytes]] = ((number, _node(1, each)) for number, each in groups)
    for level in range(2, height + 1):
        nodes = _above(nodes, level)
    _, top = next(nodes, (0, _ZERO[height]))
    return hashlib.sha256(b"\2" + size.to_bytes(8, "little") + top).hexdigest()


def _above(nodes: Iterator[tuple[int, bytes]], level: int) -> Iterator[tuple[int, bytes]]:
    for number, below in groupby(nodes, lambda each: each[0] // FAN):
        hashes = [_ZERO[level - 1]] * FAN
        for index, digest in below:
            hashes[index % FAN] = digest
        yield number, _node(level, b"".join(hashes))


# ---- what a disk holds ----------------------------------------------------------------------


class Extent(NamedTuple):
    """A part of a disk, in bytes."""

    start: int
    end: int
    zero: bool  #: is it known to be?


def extents(image: str, folder: Path) -> list[Extent]:
    """What there is in a chain, in order; what is left out is zero, or below the last file.

    :raises StoreError: if QEMU cannot read it
    """
    _, told = run("qemu-img", "map", "--output=json", image, folder=folder)
    found = []
    for each in json.loads(told):
        if "present" not in each:
            raise StoreError("this qemu-img does not tell what is allocated: QEMU 6.1 does")
        if each["present"]:
            start = each["start"]
            found.append(Extent(start, start + each["length"], each["zero"] and not each["data"]))
    return found


#: A group, how many of them, and hashes of leaves by their index in it; no leaves: all are zero.
_Touched = tuple[int, int, dict[int, bytes]]


def _touched(
    content: Content,
    known: Sequence[Extent],
    progress: Progress | None = None,
    what: str = "",
    flat: _Flat | None = None,
) -> Iterator[_Touched]:
    """The groups that extents lie in, in order. Reads only leaves that extents touch.

    :param flat: is given what is read
    """
    total = sum(each.end - each.start for each in known if not each.zero)
    done = 0
    plan, ahead = tee(_planned(known))
    places = (place for group in ahead for _, *place in _to_read(*group, content.size))
    pieces = content.read((offset, nbytes) for offset, nbytes in places)
    for number, count, leaves in plan:
        for index, offset, nbytes in list(_to_read(number, count, leaves, content.size)):
            piece = next(pieces)
            if flat is not None:
                flat.add(offset, piece)
            for start in range(0, nbytes, LEAF):
                leaves[index] = _leaf(piece[start : start + LEAF].ljust(LEAF, b"\0"))
                index += 1
            done += nbytes
            if progress is not None:
                progress(what, min(done, total), total)
        yield number, count, leaves


def _planned(extents: Sequence[Extent]) -> Iterator[_Touched]:
    """The same, before anything is read: what has to be has no hash yet, b""."""
    at = 0  # the first extent that ends behind the group
    number = 0
    while at < len(extents):
        number = max(number, extents[at].start // GROUP)
        first, after = number * GROUP, (number + 1) * GROUP
        if extents[at].zero and extents[at].start <= first and after <= extents[at].end:
            count = extents[at].end // GROUP - number
            yield number, count, {}
            number += count
        else:
            leaves: dict[int, bytes] = {}
            for i in range(at, len(extents)):
                each = extents[i]
                if each.start >= after:
                    break
                start, end = max(each.start, first), min(each.end, after)
                for index in range((start - first) // LEAF, -(-(end - first) // LEAF)):
                    offset = first + index * LEAF
                    whole = each.start <= offset and offset + LEAF <= each.end
                    leaves[index] = _ZERO[0] if each.zero and whole else b""
            yield number, 1, leaves
            number += 1
        while at < len(extents) and extents[at].end <= number * GROUP:
            at += 1


def _to_read(
    number: int, count: int, leaves: dict[int, bytes], size: int
) -> Iterator[tuple[int, int, int]]:
    """Of a group: index of the first leaf, offset and bytes of what has no hash yet."""
    wanted = sorted(index for index, digest in leaves.items() if not digest)
    for _, together in groupby(enumerate(wanted), lambda each: each[1] - each[0]):
        indexes = [index for _, index in together]
        offset = number * GROUP + indexes[0] * LEAF
        yield indexes[0], offset, min(len(indexes) * LEAF, size - offset)


class _Flat:
    """The SHA-256 of all that a disk holds, of which zeroes are not told."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._at = 0

    def add(self, offset: int, data: bytes) -> None:
        """Further on."""
        while self._at < offset:
            nbytes = min(offset - self._at, len(_ZEROES))
            self._digest.update(_ZEROES[:nbytes])
            self._at += nbytes
        self._digest.update(data)
        self._at += len(data)

    def end(self, size: int) -> str:
        self.add(size, b"")
        return self._digest.hexdigest()


class Hashes(NamedTuple):
    """Of all that a disk holds."""

    root: str
    sha256: str | None  #: of its bytes, one after the other


def content_hashes(
    image: str,
    folder: Path,
    progress: Progress | None = None,
    what: str = "",
    *,
    flat: bool = False,
) -> Hashes:
    """By reading all that is not zero.

    :param image: as QEMU's programs are to open it there, see :func:`~.copies.image_of`
    :param flat: also the hash of its bytes, for which zeroes are hashed as well
    :raises StoreError: if QEMU cannot read it
    """
    known = extents(image, folder)
    whole = _Flat() if flat else None
    with Content(image, folder=folder) as content:
        groups = (
            (number, _hashes(_ZERO_GROUP, leaves))
            for number, _, leaves in _touched(content, known, progress, what, whole)
            if leaves
        )
        root = root_of(content.size, groups)
        return Hashes(root, None if whole is None else whole.end(content.size))


def _hashes(before: bytes, leaves: dict[int, bytes]) -> bytes:
    hashes = bytearray(before)
    for index, digest in leaves.items():
        hashes[index * _HASH : (index + 1) * _HASH] = digest
    return bytes(hashes)


# ---- files of leaves ------------------------------------------------------------------------


class _Leaves:
    """A file of leaves, to be read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = BufferedReader(open_regular(path), 1 << 16)
        head = self._file.read(_HEAD.size)
        if len(head) != _HEAD.size or _HEAD.unpack(head)[:3] != (_MAGIC, 1, LEAF):
            self.close()
            raise self._corrupt()
        self.size: int = _HEAD.unpack(head)[3]

    def close(self) -> None:
        self._file.close()

    def records(self, depth: int, end: int) -> Iterator[tuple[int, int, int, bytes]]:
        """Group, depth, count of zero ones or 0, and hashes; those before group `end`."""
        last = 0
        while True:
            head = self._file.read(_RECORD.size)
            if not head:
                return
            if len(head) != _RECORD.size:
                raise self._corrupt()
            number, count = _RECORD.unpack(head)
            hashes = b"" if count else self._file.read(len(_ZERO_GROUP))
            after = number + (count or 1)
            if number < last or len(hashes) % len(_ZERO_GROUP) or after > _ngroups(self.size):
                raise self._corrupt()
            if not count and not hashes:
                raise self._corrupt()
            last = after
            if number >= end:
                return
            yield number, depth, count, hashes

    def _corrupt(self) -> CorruptError:
        return CorruptError(f"'{self._path}' is no file of leaves, or damaged")


def _ngroups(size: int) -> int:
    return -(-size // GROUP)


def _state(files: Sequence[_Leaves], size: int) -> Iterator[tuple[int, bytes]]:
    """The groups of a disk that are not zero, by the files of its chain, the newest first.

    :param size: of the disk, if it is smaller than that of the newest
    """
    streams = []
    end = _ngroups(size)
    for depth, file in enumerate(files):
        end = min(end, _ngroups(file.size))
        streams.append(file.records(depth, end))
    zero: dict[int, int] = {}  # by depth: the end of the last groups that it says are zero
    last = -1
    for number, depth, count, hashes in merge(*streams):
        if count:
            zero[depth] = number + count
        elif number != last:
            last = number
            if not any(above < depth and number < end for above, end in zero.items()):
                yield number, hashes


def listed_root(repository: Repository, copies: Sequence[Copy]) -> str:
    """The root of the tree over the newest of a chain of copies, as the files of leaves have it.

    :raises CorruptError: if one of them is missing or damaged
    :raises StoreError: if one cannot be read
    """
    with ExitStack() as stack:
        files = _opened(stack, [repository.leaves_of(each) for each in copies])
        for file, copy in zip(files, copies):
            if file.size != copy.size:
                raise CorruptError(
                    f"'{copy.file}{LEAVES}' is of a disk of {file.size} bytes, not {copy.size}"
                )
        return root_of(copies[0].size, _state(files, copies[0].size))


def _opened(stack: ExitStack, paths: Sequence[Path]) -> list[_Leaves]:
    files = []
    for path in paths:
        check_regular(path)
        try:
            files.append(_Leaves(path))
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(f"cannot read '{path}': {error.strerror}", error.errno) from error
        stack.callback(files[-1].close)
    return files


def write_leaves(path: Path, parents: Sequence[Path], progress: Progress | None = None) -> str:
    """Makes the file of leaves of a copy, in place of one that is there; the root of the tree.

    Of the disk, the leaves are read that the copy itself has something of. Nothing is left of it if
    it fails; it is not synced.

    :param path: of the copy, of which the header has been checked, and those of the files below
    :param parents: of the copies below, the newest first, all in the same folder; they have theirs
    :raises CorruptError: if one of those is missing or damaged
    :raises StoreError: if the copy cannot be read, or the file not written
    """
    target = path.with_name(path.name + LEAVES)
    own = extents(image_of(path.name, alone=True), path.parent)
    with ExitStack() as stack:
        below = _opened(stack, [each.with_name(each.name + LEAVES) for each in parents])
        content = stack.enter_context(Content(image_of(path.name), folder=path.parent))
        size = content.size
        if below and size < below[0].size and size % GROUP:
            # In the last group, leaves may be cut short or gone.
            own = sorted([*own, Extent((size - 1) // LEAF * LEAF, size, False)])
        touched = _touched(content, own, progress, f"reading {path.name}")
        try:
            with _Writer(target) as file:
                file.write(_HEAD.pack(_MAGIC, 1, LEAF, size))
                groups = _updated(_state(below, size), touched, size, file, over=bool(below))
                root = root_of(size, groups)
        except BaseException as error:
            with suppress(OSError):
                os.unlink(target)
            if isinstance(error, OSError) and not isinstance(error, StoreError):
                raise StoreError(
                    f"cannot write '{target}': {error.strerror}", error.errno
                ) from error
            raise
    return root


def _updated(
    before: Iterator[tuple[int, bytes]],
    touched: Iterable[_Touched],
    size: int,
    file: _Writer,
    *,
    over: bool,
) -> Iterator[tuple[int, bytes]]:
    """The groups after a change; what is changed is written to the file.

    :param over: are there files below, in which something may be where all is zero now?
    """
    old = next(before, None)
    for number, count, leaves in touched:
        while old is not None and old[0] < number:
            yield old
            old = next(before, None)
        hashes = _ZERO_GROUP
        while old is not None and old[0] < number + count:
            if leaves:
                hashes = old[1]
            old = next(before, None)
        if leaves:
            hashes = _hashes(hashes, leaves)
            inside = -(-(size - number * GROUP) // LEAF) * _HASH
            hashes = hashes[:inside] + _ZERO_GROUP[inside:]
        if hashes != _ZERO_GROUP:
            file.write(_RECORD.pack(number, 0) + hashes)
            yield number, hashes
        elif over:
            file.write(_RECORD.pack(number, count))
    if old is not None:
        yield old
    yield from before


class _Writer:
    """A new file."""

    def __init__(self, path: Path) -> None:
        with suppress(FileNotFoundError):
            os.unlink(path)
        self._file = open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        self._left = bytearray()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with self._file:
            if kind is None:
                self._flush()

    def write(self, data: bytes) -> None:
        self._left += data
        if len(self._left) >= _PIECE:
            self._flush()

    def _flush(self) -> None:
        write_all(self._file.fileno(), self._left)
        self._left = bytearray()


# ---- a copy, described ----------------------------------------------------------------------


def new_copy(
    repository: Repository,
    path: Path,
    *,
    disk: str,
    parent: str | None,
    bitmap: str | None,
    granularity: int | None,
    reason: str | None,
    progress: Progress | None = None,
) -> Copy:
    """What the manifest is to say of a copy that has just been made, with the hashes of it.

    Reads the file, and of the disk what the file has; makes its file of leaves. Nothing is synced:
    :meth:`Repository.append` does that.

    :param path: of the file, as :meth:`Repository.new_file` gives it
    :param parent: the point of which the copy of the disk lies below; None: it is a full copy
    :param disk: see :class:`Copy`, as for `bitmap`, `granularity` and `reason`
    :raises CorruptError: if it is no copy of that kind: its backing file is another, for example
    :raises NotFoundError: if the parent is none
    :raises StoreError: if something cannot be read or written
    """
    manifest = repository.manifest
    below: list[Copy] = []
    if parent is not None:
        below = manifest.chain(manifest.copy(disk, parent)[1])
        check_chain(repository, below)
    size = check_image(path, below[0].file if below else None)
    root = write_leaves(path, [repository.path_of(each) for each in below], progress)
    sha256 = sha256_of(path, progress)
    nbytes = os.stat(path).st_size
    return Copy(
        disk=disk,
        file=path.name,
        parent=parent,
        size=size,
        bitmap=bitmap,
        granularity=granularity,
        reason=reason,
        sha256=sha256,
        root=root,
        nbytes=nbytes,
    )
