# SPDX-License-Identifier: MIT
"""A union: what is dirty in any epoch of a disk, of one night or of several.

An HBitmap merges, disk by disk: marking the extents of a disk costs less than sending them to
another process would (``bench/bench_fleet.py`` measures both), so this runs where it is called. A
host's extents go through DuckDB, which keeps what does not fit on the disk; in memory are those of
some disks at a time.

Visitors. Writer, kill, fork, drop, twin: as of a scan (scanning.py); there are no results to go on
with, a union that was killed is to be made anew. What is read is not deleted meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from ..._core import MAX_GROUPS
from ..._fork import Process
from ...errors import InvalidError
from ...hbitmap import HBitmap
from ...sizes import granularity_bits
from ...store.base import Progress
from .folder import Folder, reading
from .rows import NO_EPOCH, Disk, Extents, State, areas_of, text_of
from .tables import (
    Writer,
    check_name,
    connected,
    extents_of,
    lay_open,
    let_go,
    literal,
    translated,
)

#: The bitmap that a union is called.
UNION = "union"

#: Extents of several disks that are fetched at once.
_BATCH = 1 << 20


#: A target that could not be read counts for each of its disks that another night knows.
_ROWS = """
    WITH bad AS (
        SELECT host, disk, target, disk = target AND node IS NULL AS whole,
            {'state': state, 'reason': reason, 'bitmap': bitmap, 'epoch': epoch} AS bad
        FROM disks WHERE state <> 'ready'
    ), known AS (
        SELECT host, disk, arg_max(target, read_at) AS target, any_value(node) AS node,
            max(read_at) AS read_at,
            arg_max(size, read_at) FILTER (size IS NOT NULL) AS size,
            min(granularity) FILTER (state = 'ready') AS granularity,
            bool_or(recording) AS recording
        FROM disks GROUP BY host, disk
    )
    SELECT k.host, k.disk, k.target, k.node, k.read_at, k.size, k.granularity, k.recording,
        coalesce(
            (SELECT min(bad) FROM bad b WHERE (b.host, b.disk) = (k.host, k.disk)),
            (SELECT min(bad) FROM bad b WHERE whole AND (b.host, b.target) = (k.host, k.target))
        )
    FROM known k
    -- a target that has disks, on another night, is no disk
    WHERE NOT (k.disk = k.target AND k.size IS NULL AND EXISTS (
        SELECT 1 FROM known o WHERE (o.host, o.target) = (k.host, k.target) AND o.disk <> k.disk))
    ORDER BY k.host, k.disk
"""

#: A disk that has none of the bitmaps that are asked for, where others of its are known.
_LACKING = """
    SELECT host, disk, arg_max(target, read_at) AS target, any_value(node) AS node,
        max(read_at) AS read_at, arg_max(size, read_at) AS size, '0' AS epoch,
        'no bitmap' AS state, 'it has no bitmap of the name that was asked for' AS reason
    FROM {source} GROUP BY host, disk HAVING NOT bool_or(bitmap IS NULL OR bitmap IN ({names}))
"""


def union(
    sources: Sequence[str | os.PathLike[str]],
    into: str | os.PathLike[str],
    *,
    epochs: Collection[str] = (),
    bitmaps: Collection[str] = (),
    progress: Progress | None = None,
) -> int:
    """Merge the bitmaps of each disk, in all of some folders, into one of another folder.

    :param sources: folders of scans or unions
    :param into: the folder for the tables, which replace those there; not one of the sources
    :param epochs: only of these; none: of all
    :param bitmaps: only these names, as they are on the disks; none: all
    :param progress: as for a scan; it may raise to stop
    :returns: how many disks there are
    :raises NotFoundError: if a source has no tables
    :raises InvalidError: if there are no sources, or a source is to be replaced
    :raises StoreError, LockedError: as for a scan

    The new bitmap has the finest granularity of those merged (a coarser one, if a disk that has
    grown is too large for it), and the size that was read last; what lies behind that is left out.
    If one of them cannot be used, or a disk that a source knows has no bitmap of those names there,
    neither can the union: its row has the state of that, and the reason. With epochs, disks that
    have none of them are left out.

    A kill, Ctrl-C or an error at any moment: the old tables of ``into`` count, and what was begun
    goes with the next writer. A second writer there is refused; readers, and scans of the sources,
    go on beside it.

    >>> union(["tonight"], "week")
    1
    """
    if not sources:
        raise InvalidError("a union needs one folder of a scan at least")
    with ExitStack() as stack:
        folder = stack.enter_context(Folder(into))
        check_name(folder.path)
        tell = folder.told(progress)
        for each in sources:
            if os.path.realpath(each) == os.path.realpath(folder.path):
                raise InvalidError(f"'{os.fspath(each)}' cannot be merged into itself")
        tables = [stack.enter_context(reading(each)) for each in sources]
        new = stack.enter_context(folder.replacing())
        writer = stack.enter_context(Writer(new))
        merging = stack.enter_context(_Merging(tables, new, epochs, bitmaps))
        rows = merging.rows()
        for row in rows:
            writer.add(row)
        done = 0

        def contents(host: str, members: Sequence[int]) -> Iterator[tuple[int, Extents]]:
            nonlocal done
            for member, extents in merging.extents(host, {each: rows[each] for each in members}):
                yield member, extents
                done += 1
                tell("merging disks", done, len(rows))

        for partition in writer.partitions():
            writer.write(partition, contents(partition.host, partition.members))
        writer.finish()
        return len(rows)


class _Merging:
    """The tables of all sources, in a database of their own."""

    def __init__(
        self,
        tables: Sequence[Path],
        spill: Path,
        epochs: Collection[str],
        bitmaps: Collection[str],
    ) -> None:
        self._process = Process()
        self._db = connected(spill.with_name(spill.name + ".merge"))
        self._tables = tables
        for number, each in enumerate(tables):
            lay_open(self._db, each, f"_{number}")
        self._wanted = "true"
        if epochs:
            self._wanted += f" AND (bitmap IS NULL OR epoch IN ({_list(epochs)}))"
        names = ""
        if bitmaps:
            names = _list(map(text_of, bitmaps))
            self._wanted += f" AND (bitmap IS NULL OR bitmap IN ({names}))"
        parts = []
        for number in range(len(tables)):
            parts.append(f"FROM disks_{number} WHERE {self._wanted}")
            if bitmaps:
                parts.append(_LACKING.format(source=f"disks_{number}", names=names))
        with translated("cannot read tables"):
            self._db.execute(f"CREATE VIEW disks AS {' UNION ALL BY NAME '.join(parts)}")

    def __enter__(self) -> _Merging:
        return self

    def __exit__(self, *exception: object) -> None:
        let_go(self._db, self._process)

    def rows(self) -> list[Disk]:
        """Of each disk its union, without what is dirty."""
        with translated("cannot read tables"):
            found = self._db.execute(_ROWS).fetchall()
        return [
            Disk(
                host=host,
                disk=disk,
                target=target,
                state=State.READY if bad is None else State(bad["state"]),
                read_at=read_at,
                node=node,
                bitmap=UNION if bad is None else None,
                size=size,
                granularity=_possible(size, granularity),
                recording=recording,
                reason=None if bad is None else _why(bad),
            )
            for host, disk, target, node, read_at, size, granularity, recording, bad in found
        ]

    def extents(self, host: str, rows: Mapping[int, Disk]) -> Iterator[tuple[int, Extents]]:
        """What is dirty in the unions of a host's disks, as (number, extents), in order."""
        members = {
            "disk": np.array([row.disk for row in rows.values()], object),
            "number": np.array(list(rows), np.uint32),
        }
        with translated("cannot merge"):
            self._db.register("members", members)
            self._db.execute(
                'CREATE OR REPLACE TABLE part AS SELECT number, "offset", length FROM '
                f"({extents_of(self._tables, host)}) JOIN members USING (disk) "
                f"WHERE {self._wanted} ORDER BY number"
            )
            self._db.unregister("members")
            counts = self._db.execute(
                "SELECT number, count(*) FROM part GROUP BY number ORDER BY number"
            ).fetchall()
        for first, last in _batches(counts):
            with translated("cannot merge"):
                part = self._db.execute(
                    'SELECT number, "offset", length FROM part WHERE number BETWEEN ? AND ?',
                    [first, last],
                ).fetchnumpy()
            order = np.argsort(part["number"], kind="stable")
            numbers = part["number"][order]
            starts, counts_of = np.unique(numbers, return_index=True)
            for number, begin, end in zip(starts, counts_of, [*counts_of[1:], len(numbers)]):
                which = order[begin:end]
                row = rows[int(number)]
                yield int(number), _merged(row, part["offset"][which], part["length"][which])


def _possible(size: int | None, granularity: int | None) -> int | None:
    """The granularity with which there is a bitmap of that size."""
    while size and granularity and size > MAX_GROUPS * granularity:
        granularity *= 2
    return granularity


def _merged(row: Disk, offsets: Any, lengths: Any) -> Extents:
    assert row.size is not None
    assert row.granularity is not None
    hb = HBitmap(row.size, granularity_bits(row.granularity))
    inside = offsets < row.size
    offsets = offsets[inside]
    hb.set_many(offsets, np.minimum(lengths[inside], row.size - offsets))
    return areas_of(hb)


def _batches(counts: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """First and last of as many as are fetched at once."""
    first, last, nrows = None, 0, 0
    for number, count in counts:
        if first is not None and nrows + count > _BATCH:
            yield first, last
            first, nrows = None, 0
        first = number if first is None else first
        last, nrows = number, nrows + count
    if first is not None:
        yield first, last


def _list(names: Iterable[str]) -> str:
    return ", ".join(map(literal, names))


def _why(bad: dict[str, Any]) -> str:
    what = [] if bad["bitmap"] is None else [f"bitmap '{bad['bitmap']}'"]
    what += [] if bad["epoch"] == NO_EPOCH else [f"epoch {bad['epoch']}"]
    begin = f"{', '.join(what)}: " if what else ""
    return f"{begin}{bad['reason'] or bad['state']}"
