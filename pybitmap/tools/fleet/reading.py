# SPDX-License-Identifier: MIT
"""One target read: what a worker does, in whatever process or machine.

What is wrong with a target becomes a row with the reason. Bits are read in pieces; what is kept
of a bitmap is its extents, 16 bytes each, so a worker takes the memory that the largest disk's
extents need.

Visitors. Writer: a target that a program has open for writing is locked, and is told so; with
``force_share`` it is read as it is on the disk, which may be old. Kill: nothing is written here.
Fork, drop: what is opened is closed when the function returns or raises. Twin: two may read the
same target.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Callable

import numpy as np

from ...errors import BitmapError, CorruptError, LockedError, UnsupportedError
from ...store import Store, probe
from ...store.base import LIVE, Reading
from .rows import Chain, Disk, Extents, Packed, Result, State, Target, failed, packed, text_of

#: A backup directory has it.
MANIFEST = "manifest.json"

_Found = tuple[Disk, "Packed | None"]


#: What reads a target. It may raise, or answer what cannot be: see :func:`answered`.
Reader = Callable[[Target], Result]


def answered(reader: Reader, target: Target) -> Result:
    """What a reader says of a target; its errors are rows with the reason."""
    now = time.time()
    try:
        return _checked(reader(target))
    except (Exception, SystemExit) as error:  # whatever it is, and not the end of all others
        return failed(target, _state_of(error), _words(error), now)


def _checked(result: Result) -> Result:
    """What a reader answers has to go into tables with that of all others.

    :raises TypeError, ValueError: if it cannot
    """
    if not isinstance(result, Result):
        raise TypeError(f"its reader answered {type(result).__name__}, and no Result")
    if len(result.disks) != len(result.contents):
        raise ValueError(f"{len(result.disks)} disks have {len(result.contents)} contents")
    for disk, content in zip(result.disks, result.contents):
        if disk.state is State.READY and content is None:
            raise ValueError(f"disk '{disk.disk}' is ready, and has no extents")
    json.dumps(result.header(), ensure_ascii=False).encode()
    return result


def keyed(reader: Reader, target: Target) -> tuple[str, Result]:
    """The same, and which target it is of: what a worker hands back. It needs no DuckDB."""
    return target.key, answered(reader, target)


def read(target: Target) -> Result:
    """A qcow2 image, a local store or a backup directory.

    :raises BitmapError, OSError, MemoryError: if it cannot be read as a whole; what is wrong with
        one disk, or one bitmap, is a row
    """
    now = time.time()
    if os.path.isfile(os.path.join(target.path, MANIFEST)):
        return Result([], [], _chains(target))
    try:
        found = probe(target.path)
    except UnsupportedError as error:  # an image that can have none
        return failed(target, State.NONE, str(error), now)
    if found is None:
        raise CorruptError("neither a qcow2 image, nor a local store, nor a backup directory")
    store = found(target.path, lock=not target.force_share)  # type: ignore[call-arg]
    rows = list(_read_store(target, store, now))
    if not rows:
        return failed(target, State.NONE, "the store has no disks", now)
    return Result([disk for disk, _ in rows], [content for _, content in rows])


def _state_of(error: BaseException) -> State:
    if isinstance(error, LockedError):
        return State.LOCKED
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return State.VANISHED
    if isinstance(error, CorruptError):
        return State.BROKEN
    return State.UNREADABLE


def _words(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return f"there is not enough memory to read it ({error})"
    if isinstance(error, BitmapError):
        return str(error)
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return f"{type(error).__name__}: {error}"


def _read_store(target: Target, store: Store, now: float) -> Iterator[_Found]:
    for node in store.entries():
        name = None if node.name is None else text_of(node.name)
        disk = Disk(
            host=text_of(target.host),
            disk=target.text if name is None else f"{target.text}//{name}",
            target=target.text,
            state=State.NONE,
            read_at=now,
            node=name,
            size=node.size,
        )
        try:
            found = list(_read_node(target, store, node.name, disk))
        except (BitmapError, OSError, MemoryError) as error:  # of this disk alone
            found = [(_without(disk, error), None)]
        if not found:
            asked = " or ".join(f"'{text_of(each)}'" for each in target.bitmaps)
            reason = f"it has no bitmap{f' {asked}' if asked else ''}"
            found = [(replace(disk, reason=reason), None)]
        yield from found


def _read_node(target: Target, store: Store, node: str | None, disk: Disk) -> Iterator[_Found]:
    label = target.path if node is None else node
    with closing(store.open(label, None, read_only=True)) as volume:
        for reading in volume.read():
            bitmap = reading.bitmap
            if target.bitmaps and bitmap.name not in target.bitmaps:
                continue
            if not target.bitmaps and bitmap.reason is None and _is_all_dirty(bitmap.name):
                continue
            known = replace(
                disk,
                bitmap=text_of(bitmap.name),
                granularity=bitmap.granularity,
                recording=bitmap.enabled,
            )
            if bitmap.reason is not None:
                state = State.IN_USE if bitmap.reason == LIVE else State.INCONSISTENT
                yield replace(known, state=state, reason=text_of(bitmap.reason)), None
                continue
            try:
                extents = _extents(reading)
            except (BitmapError, OSError, MemoryError) as error:  # of this bitmap alone
                yield _without(known, error), None
                continue
            nbytes = int(extents[:, 1].sum())
            known = replace(known, state=State.READY, dirty_bytes=nbytes, extents=len(extents))
            yield known, packed(extents, volume.size, bitmap.granularity)


def _is_all_dirty(name: str) -> bool:
    """Is it of the bitmaps that a backup has for something else than what was written?"""
    if not name.endswith("-uncut"):
        return False
    from ..backup.plan import tells_cuts  # which others do without

    return tells_cuts(name)


def _without(disk: Disk, error: Exception) -> Disk:
    return replace(disk, state=_state_of(error), reason=text_of(_words(error)))


def _extents(reading: Reading) -> Extents:
    """Those that touch, as of two pieces, are one."""
    parts: list[Extents] = []
    for start, bits in reading.pieces():
        part = np.asarray(bits.areas_array()).astype(np.uint64).reshape(-1, 2)
        if not len(part):
            continue
        part[:, 0] += np.uint64(start)
        if parts and int(parts[-1][-1].sum()) == int(part[0, 0]):
            before = parts[-1]
            before[-1, 1] += part[0, 1]
            part = part[1:]
        if len(part):
            parts.append(part)
    return np.concatenate(parts) if parts else np.empty((0, 2), np.uint64)


def _chains(target: Target) -> list[Chain]:
    """Of each disk of a backup directory, its newest copy; if only some bitmaps are asked for, of
    those that rest on one of them: of others it will not be known if they are there."""
    from ..backup.manifest import Repository  # which other targets do without

    with Repository.open(Path(target.path)) as repository:
        manifest = repository.manifest
        chains = []
        for name in manifest.disks:
            point, copy = manifest.copy(name)
            if target.bitmaps and copy.bitmap not in target.bitmaps:
                continue
            chains.append(
                Chain(
                    host=text_of(target.host),
                    repository=target.text,
                    disk=text_of(copy.disk),
                    size=copy.size,
                    bitmap=None if copy.bitmap is None else text_of(copy.bitmap),
                    epoch=point.id,
                    began=point.begun.timestamp(),
                    length=len(manifest.chain(copy)),
                )
            )
        return chains
