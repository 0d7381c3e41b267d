# SPDX-License-Identifier: MIT
"""A fleet that is made up: disks whose bitmaps are as dense as those of real programs' traces.

A target's path says all: ``/made/KIND/SEED``, so any process reads the same (:func:`made`), and an
oracle that shares no code with the package, :func:`groups_of`, knows which groups are dirty.

sparse   single groups all over the disk, as a database's
bursty   runs of groups here and there, as of files that are copied
clean    nothing
full     everything, as after a repair
broken   its bitmap is inconsistent
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pybitmap.tools.fleet.rows import Disk, Result, State, Target, packed

GROUP = 64 << 10
SIZE = 1 << 40

#: Of each kind, how many of a hundred disks.
SHARES = {"sparse": 55, "bursty": 30, "clean": 10, "full": 1, "broken": 4}

WHY = "it was in use by a machine that did not close it"

Groups = npt.NDArray[np.int64]


def targets(count: int, hosts: int = 20, scale: int = 1) -> list[Target]:
    """So many disks, evenly on hosts, the same each time.

    :param scale: how many times as much is dirty
    """
    choose = random.Random(count)
    kinds = choose.choices(list(SHARES), list(SHARES.values()), k=count)
    return [
        Target(f"/made/{kind}/{scale}/{number}", f"host{number % hosts:02}")
        for number, kind in enumerate(kinds)
    ]


def groups_of(target: Target) -> Groups:
    """The dirty groups, in order; of a full disk none, lest 2^24 numbers are made of each."""
    _, _, kind, scale, number = target.path.split("/")
    random_of = np.random.default_rng(int(number))
    ngroups = SIZE // GROUP
    if kind == "sparse":
        groups = random_of.integers(0, ngroups, int(scale) * int(random_of.integers(1, 200)))
        return np.unique(groups)
    if kind == "bursty":
        nruns = int(scale) * int(random_of.integers(1, 40))
        firsts = random_of.integers(0, ngroups - 100, nruns)
        lengths = random_of.integers(1, 100, nruns)
        return np.unique(np.concatenate([np.arange(f, f + n) for f, n in zip(firsts, lengths)]))
    return np.empty(0, np.int64)


def made(target: Target) -> Result:
    """A reader of such targets."""
    kind = target.path.split("/")[2]
    disk: dict[str, Any] = {
        "host": target.host,
        "disk": target.path,
        "target": target.path,
        "read_at": 1e9,
        "bitmap": "daily",
        "size": SIZE,
        "granularity": GROUP,
        "recording": True,
    }
    if kind == "broken":
        return Result([Disk(**disk, state=State.INCONSISTENT, reason=WHY)], [None])
    if kind == "full":
        extents = np.array([[0, SIZE]], np.uint64)
    else:
        extents = np.array(runs(groups_of(target)), np.uint64).reshape(-1, 2) * np.uint64(GROUP)
    nbytes = int(extents[:, 1].sum())
    row = Disk(**disk, state=State.READY, dirty_bytes=nbytes, extents=len(extents))
    return Result([row], [packed(extents, SIZE, GROUP)])


def runs(groups: Groups) -> npt.NDArray[np.int64]:
    """(first, count) of each run."""
    if not len(groups):
        return np.empty((0, 2), np.int64)
    breaks = np.flatnonzero(np.diff(groups) != 1) + 1
    firsts = np.concatenate([[0], breaks])
    lasts = np.concatenate([breaks, [len(groups)]])
    return np.stack([groups[firsts], lasts - firsts], axis=1)


def rows_in(folder: Path, query: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
    """What DuckDB itself says of the tables in a folder: ``disks``, ``extents``, ``chains``.

    By their paths alone, as a user would ask it.
    """
    import duckdb

    tables = folder / "current"
    with duckdb.connect() as db:
        for name in ("disks", "chains"):
            db.execute(f"CREATE VIEW {name} AS FROM read_parquet('{tables / name}.parquet')")
        if any((tables / "extents").iterdir()):
            files = tables / "extents" / "*" / "*" / "*.parquet"
            db.execute(
                f"CREATE VIEW extents AS FROM read_parquet('{files}', hive_partitioning = false)"
            )
        return db.execute(query, values).fetchall()


def extents_in(folder: Path, disk: str) -> list[tuple[int, int]]:
    """Of all its bitmaps, in order."""
    query = 'SELECT "offset", length FROM extents WHERE disk = ? ORDER BY "offset"'
    return [(offset, length) for offset, length in rows_in(folder, query, [disk])]
