# SPDX-License-Identifier: MIT
"""The tables of a fleet: written as Parquet, and laid open to SQL, both by DuckDB.

Three tables. Names are text as :func:`.rows.text_of` makes it, sizes are in bytes.

``disks``
    a row for each bitmap of a disk, or for a disk or target without: the fields of
    :class:`.rows.Disk`, then ``epoch`` (the backup point that began the bitmap, else '0') and
    ``chain_length`` (files that a restore of the disk's newest copy reads; NULL: no copy is known)
``extents``
    a row for each dirty extent: ``disk, host, bitmap, epoch, offset, length``; of a bitmap they are
    in order, and do not touch. A file for each host and epoch, ``extents/host=H/epoch=E/``, in
    which offsets are delta-encoded, names are dictionaries, and all is compressed by zstd
``chains``
    the fields of :class:`.rows.Chain`

Extents go through DuckDB's memory of :data:`MEMORY`, and from there to its own files on the disk,
so what a writer takes does not grow with the fleet.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import duckdb
import numpy as np

from ..._fork import Process
from ...errors import CorruptError, InvalidError, StoreError
from .folder import CHAINS, DISKS, EXTENTS
from .rows import NO_EPOCH, Chain, Disk, Extents, State

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

#: Of DuckDB, in bytes: what does not fit goes to files beside the tables.
MEMORY = 256 << 20

#: What DuckDB says when a signal has come.
_INTERRUPTED = "Query interrupted"

#: Rows of extents that are handed to DuckDB at once.
_BATCH = 1 << 18
#: Rows of disks, likewise.
_ROWS = 1 << 9

_FORMAT = "FORMAT parquet, PARQUET_VERSION v2, COMPRESSION zstd"

_DISK = {
    "host": "VARCHAR",
    "disk": "VARCHAR",
    "target": "VARCHAR",
    "state": "VARCHAR",
    "read_at": "DOUBLE",
    "node": "VARCHAR",
    "bitmap": "VARCHAR",
    "size": "BIGINT",
    "granularity": "BIGINT",
    "recording": "BOOLEAN",
    "dirty_bytes": "BIGINT",
    "extents": "BIGINT",
    "reason": "VARCHAR",
}
_CHAIN = {
    "host": "VARCHAR",
    "repository": "VARCHAR",
    "disk": "VARCHAR",
    "size": "BIGINT",
    "bitmap": "VARCHAR",
    "epoch": "VARCHAR",
    "began": "DOUBLE",
    "length": "BIGINT",
}


def connected(spill: Path) -> DuckDBPyConnection:
    """A database in memory, which loads nothing from a network.

    :param spill: a folder for what does not fit; made when it is needed
    """
    config: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": f"{MEMORY >> 20}MiB",
        "autoinstall_known_extensions": "false",
        "autoload_known_extensions": "false",
        "python_enable_replacements": "false",
        "temp_directory": str(spill),
    }
    return duckdb.connect(":memory:", config=config)


def let_go(db: DuckDBPyConnection, process: Process) -> None:
    """Close it; but not in the child of a fork, which has not its threads, and would crash.

    :param process: that made it
    """
    if process.is_this():
        db.close()
    elif hasattr(ctypes, "pythonapi"):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(db))  # never to be collected


def literal(text: str) -> str:
    """Of SQL."""
    return "'" + text.replace("'", "''") + "'"


@contextmanager
def translated(what: str) -> Iterator[None]:
    """DuckDB's errors become ours.

    What the handler of a signal raises within a query, as that of Ctrl-C does, is lost there: a
    KeyboardInterrupt stands for it.
    """
    try:
        yield
    except duckdb.InterruptException:
        raise KeyboardInterrupt from None
    except RuntimeError as error:
        if str(error) == _INTERRUPTED:
            raise KeyboardInterrupt from None
        raise
    except duckdb.OutOfMemoryException as error:
        raise MemoryError(f"{what}: {error}") from error
    except duckdb.Error as error:
        raise StoreError(f"{what}: {error}") from error


#: The names by which a backup may know a disk.
_NAMES = """
    SELECT host, disk, unnest(
        CASE WHEN node IS NULL
            THEN [disk, parse_filename(target), parse_filename(target, true)]
            ELSE [disk, node] END
    ) AS name
    FROM disks
"""

_EPOCHS = f"""
    UPDATE disks SET epoch = found.epoch, chain_length = found.length
    FROM (
        SELECT number,
            arg_max(c.epoch, (n.name IS NOT NULL, c.began)) AS epoch,
            arg_max(c.length, (n.name IS NOT NULL, c.length)) AS length
        FROM disks d
            JOIN chains c ON d.bitmap = c.bitmap
            LEFT JOIN (SELECT DISTINCT * FROM ({_NAMES})) n
                ON (n.host, n.disk, n.name) = (d.host, d.disk, c.disk)
        GROUP BY number
    ) AS found
    WHERE disks.number = found.number
"""

_MISSING = f"""
    WITH missing AS (
        SELECT * FROM chains c WHERE NOT EXISTS (SELECT 1 FROM disks d WHERE d.bitmap = c.bitmap)
    ), named AS (
        SELECT DISTINCT m.repository, m.disk AS wanted, d.disk = m.disk AS exactly,
            {{'host': d.host, 'disk': d.disk, 'target': d.target, 'node': d.node,
              'size': coalesce(d.size, m.size)}} AS place,
            d.state IN ({", ".join(f"'{each.value}'" for each in State if each.was_read)}) AS known
        FROM missing m
            JOIN ({_NAMES}) n ON n.name = m.disk
            JOIN disks d ON (d.host, d.disk) = (n.host, n.disk)
    ), places AS (
        SELECT repository, wanted, any_value(place) AS place, bool_and(known) AS known,
            count(DISTINCT (place.host, place.disk)) AS count
        FROM (FROM named QUALIFY exactly = max(exactly) OVER (PARTITION BY repository, wanted))
        GROUP BY ALL
    )
    SELECT m.*, CASE WHEN p.count = 1 THEN p.place END
    FROM missing m LEFT JOIN places p ON (p.repository, p.wanted) = (m.repository, m.disk)
    WHERE p.known OR p.count IS NULL
    ORDER BY m.repository, m.disk
"""


# ---- writing --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Partition:
    """The bitmaps of a host that an epoch began.

    :param members: their numbers, those of :meth:`Writer.add`
    """

    host: str
    epoch: str
    members: Sequence[int]


class Writer:
    """Tables in a new folder: all rows of disks, then extents, a partition after the other.

    ``with`` closes the database; the tables are whole after :meth:`finish`.
    """

    def __init__(self, folder: Path) -> None:
        """
        :raises InvalidError: if the folder has a name that SQL could not have
        """
        check_name(folder)
        self._folder = folder
        self._process = Process()
        self._spill = folder.with_name(folder.name + ".spill")
        with translated(f"cannot write in '{folder}'"):
            self._db = connected(self._spill)
            columns = ", ".join(f"{name} {kind}" for name, kind in _DISK.items())
            self._db.execute(
                f"CREATE TABLE disks (number UINTEGER, {columns},"
                f" epoch VARCHAR DEFAULT '{NO_EPOCH}', chain_length BIGINT)"
            )
            columns = ", ".join(f"{name} {kind}" for name, kind in _CHAIN.items())
            self._db.execute(f"CREATE TABLE chains ({columns})")
        self._rows: list[dict[str, Any]] = []
        self._count = 0

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        let_go(self._db, self._process)

    def add(self, disk: Disk, epoch: str = NO_EPOCH, chain_length: int | None = None) -> int:
        """A row; its number. What is dirty is counted when its extents are written."""
        row = {**asdict(disk), "number": self._count, "state": disk.state.value}
        self._rows.append({**row, "epoch": epoch, "chain_length": chain_length})
        self._count += 1
        if len(self._rows) == _ROWS:
            self._flush()
        return self._count - 1

    def _flush(self) -> None:
        kinds = {"number": "UINTEGER", **_DISK, "epoch": "VARCHAR", "chain_length": "BIGINT"}
        self._insert("disks", kinds, self._rows)
        self._rows = []

    def add_chains(self, chains: Iterable[Chain]) -> None:
        self._insert("chains", _CHAIN, [asdict(each) for each in chains])

    def _insert(self, table: str, kinds: dict[str, str], rows: list[dict[str, Any]]) -> None:
        if rows:
            with translated("cannot write tables"):
                # As JSON: one value, whatever is in it.
                self._db.execute(
                    f"INSERT INTO {table} SELECT unnest(from_json(?::JSON, ?), recursive := true)",
                    [json.dumps(rows), json.dumps([kinds])],
                )

    def know_epochs(self) -> list[State]:
        """Give the rows the epochs and lengths of the chains that their bitmaps belong to, and each
        chain a row whose bitmap is on no disk that could be read.

        A bitmap that a point began has a name of its own, which no other point has; of several
        disks of one point, a disk's chain is the one of its path, node or file name, else the
        longest. By these names the disk of a bitmap that is missing is found, if it is one only. Of
        one that could not be read, nothing is known to be missing.

        :returns: the states of these rows
        """
        self._flush()
        with translated("cannot write tables"):
            self._db.execute(_EPOCHS)
            rows = self._db.execute(_MISSING).fetchall()
        for host, repository, name, size, bitmap, epoch, began, length, found in rows:
            here = {"host": host, "disk": f"{repository}//{name}", "target": repository}
            place = {**here, "node": None, "size": size, **(found or {})}
            what = "no bitmap" if bitmap is None else f"the bitmap '{bitmap}', which is not there"
            reason = f"its last backup began {what}"
            row = Disk(**place, bitmap=bitmap, state=State.NONE, read_at=began, reason=reason)
            self.add(row, epoch, length)
        return [State.NONE] * len(rows)

    def partitions(self) -> Iterator[Partition]:
        """Of what is READY, in order of host and epoch."""
        self._flush()
        with translated("cannot write tables"):
            keys = self._db.execute(
                "SELECT DISTINCT host, epoch FROM disks WHERE state = 'ready' ORDER BY ALL"
            ).fetchall()
            for host, epoch in keys:
                members = self._db.execute(
                    "SELECT number FROM disks WHERE (host, epoch, state) = (?, ?, 'ready')"
                    " ORDER BY disk, bitmap, number",
                    [host, epoch],
                ).fetchnumpy()["number"]
                yield Partition(host, epoch, members.tolist())

    def write(self, partition: Partition, extents: Iterable[tuple[int, Extents]]) -> None:
        """A partition's file: its extents, as ``(number, extents)``, in order of the members.

        :raises StoreError: if it cannot be written
        """
        with translated("cannot write tables"):
            self._db.execute(
                'CREATE OR REPLACE TABLE part (number UINTEGER, "offset" BIGINT, length BIGINT)'
            )
            for batch in _batches(extents):
                self._db.register("batch", batch)
                self._db.execute("INSERT INTO part SELECT * FROM batch")
                self._db.unregister("batch")
            self._db.execute(
                "UPDATE disks SET dirty_bytes = found.nbytes, extents = found.count FROM ("
                "SELECT number, sum(length)::BIGINT AS nbytes, count(*) AS count FROM part "
                "GROUP BY number) AS found WHERE disks.number = found.number"
            )
            where = _of_host(self._folder, partition.host) / f"epoch={_quoted(partition.epoch)}"
            where.mkdir(parents=True)
            self._copy(
                'SELECT disk, host, bitmap, epoch, "offset", length FROM part JOIN disks '
                "USING (number)",
                where / f"{EXTENTS}.parquet",
            )
            self._db.execute("DROP TABLE part")

    def finish(self) -> None:
        self._flush()
        with translated("cannot write tables"):
            self._db.execute(
                "UPDATE disks SET dirty_bytes = 0, extents = 0 WHERE state = 'ready' "
                "AND dirty_bytes IS NULL"
            )
            self._copy(
                "SELECT * EXCLUDE (number) FROM disks ORDER BY host, disk, bitmap, number",
                self._folder / DISKS,
            )
            self._copy("SELECT * FROM chains ORDER BY ALL", self._folder / CHAINS)
        (self._folder / EXTENTS).mkdir(exist_ok=True)

    def _copy(self, query: str, path: Path) -> None:
        self._db.execute(f"COPY ({query}) TO {literal(str(path))} ({_FORMAT})")


def _batches(extents: Iterable[tuple[int, Extents]]) -> Iterator[dict[str, Any]]:
    """For DuckDB, of some rows each; a disk of many extents is cut."""
    numbers: list[int] = []
    parts: list[Extents] = []
    nrows = 0
    for number, each in extents:
        for first in range(0, len(each), _BATCH):
            part = each[first : first + _BATCH]
            numbers.append(number)
            parts.append(part)
            nrows += len(part)
            if nrows >= _BATCH:
                yield _batch(numbers, parts)
                numbers, parts, nrows = [], [], 0
    if nrows:
        yield _batch(numbers, parts)


def _batch(numbers: list[int], parts: list[Extents]) -> dict[str, Any]:
    rows = np.concatenate(parts).astype(np.int64)
    counts = [len(part) for part in parts]
    return {
        "number": np.repeat(np.array(numbers, np.uint32), counts),
        "offset": np.ascontiguousarray(rows[:, 0]),
        "length": np.ascontiguousarray(rows[:, 1]),
    }


def _of_host(folder: Path, host: str) -> Path:
    """The folder of its extents: as Hive has it, and readers with it."""
    return folder / EXTENTS / f"host={_quoted(host)}"


def _quoted(name: str) -> str:
    """For the name of a folder: any name, cut at 200 bytes. (The files say the whole of it.)"""
    text = quote(name, safe="")
    if len(text) <= 200:
        return text
    return f"{text[:120].rpartition('%')[0] or text[:120]}-{sha256(name.encode()).hexdigest()}"


# ---- reading --------------------------------------------------------------------------------


def check_name(folder: Path) -> None:
    """
    :raises InvalidError: if SQL would take it for something else
    """
    text = str(folder)
    if any(char in text for char in "*?[]{}\0") or text != text.encode("utf-8", "replace").decode():
        raise InvalidError(
            f"'{folder}': such a name is a pattern for DuckDB, or cannot be written; choose another"
        )


def lay_open(db: DuckDBPyConnection, folder: Path, suffix: str = "") -> None:
    """Views ``disks``, ``extents`` and ``chains`` of the tables in a folder, with that suffix.

    :raises CorruptError: if these are no such tables
    """
    check_name(folder)
    for name in (DISKS, CHAINS, EXTENTS):
        if not (folder / name).exists():
            raise CorruptError(f"'{folder}' are no tables of a fleet: '{name}' is missing")
    with translated(f"cannot read '{folder}'"):
        for name in (DISKS, CHAINS):
            view = name.partition(".")[0] + suffix
            db.execute(f"CREATE VIEW {view} AS {_reading([folder / name])}")
        files = [folder / EXTENTS] if any((folder / EXTENTS).iterdir()) else []
        source = _reading_extents(files, "/*/*/*.parquet")
        db.execute(f"CREATE VIEW extents{suffix} AS {source}")


def extents_of(folders: Iterable[Path], host: str) -> str:
    """A SELECT of the extents of a host in the tables of several folders."""
    found = [_of_host(folder, host) for folder in folders]
    return _reading_extents([each for each in found if each.exists()], "/*/*.parquet")


def _reading_extents(folders: Sequence[Path], pattern: str) -> str:
    if not folders:
        return (
            "SELECT ''::VARCHAR AS disk, ''::VARCHAR AS host, ''::VARCHAR AS bitmap,"
            " ''::VARCHAR AS epoch, 0::BIGINT AS \"offset\", 0::BIGINT AS length WHERE false"
        )
    return _reading(f"{each}{pattern}" for each in folders)


def _reading(files: Iterable[Path | str]) -> str:
    names = ", ".join(literal(str(each)) for each in files)
    # The files say all columns themselves, and exactly. Folders above may be called `size=5`.
    return f"SELECT * FROM read_parquet([{names}], hive_partitioning = false)"
