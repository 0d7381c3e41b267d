# SPDX-License-Identifier: MIT
"""Writes to an SQLite database until its input ends: ``database_writer.py DATABASE``.

Each transaction adds rows n and -n, so they sum up to 0, in pages here and there; n is printed once
it is committed. The journal keeps its file, since that is a disk of its own.

Not until it is killed: QEMU's FUSE exports may wait for ever for a request that was taken back.
"""

from __future__ import annotations

import itertools
import select
import sqlite3
import sys


def main() -> None:
    database = sqlite3.connect(sys.argv[1], isolation_level=None)
    for setting in ("journal_mode = persist", "synchronous = full", "cache_size = 10"):
        database.execute(f"PRAGMA {setting}")
    [(begin,)] = database.execute("SELECT coalesce(max(number), 0) + 1 FROM entry")
    for number in itertools.count(begin):
        database.execute("BEGIN")
        rows = [(number, number % 50, bytes(3000)), (-number, 99 - number % 50, bytes(3000))]
        database.executemany("INSERT OR REPLACE INTO entry VALUES (?, ?, ?)", rows)
        database.execute("UPDATE total SET number = number + 1")
        database.execute("COMMIT")
        print(number, flush=True)
        if select.select([sys.stdin], [], [], 0)[0]:
            break


if __name__ == "__main__":
    main()
