# SPDX-License-Identifier: MIT
"""Runs the benchmarks in Python: ``make bench``, or ``make bench BENCH_OPTS='--only set'``.

Every table is one question. Ratios are to the first way of the table. A missed goal says so.
"""

from __future__ import annotations

import argparse

import bench_bulk  # noqa: F401
import bench_calls  # noqa: F401
import bench_trackers  # noqa: F401
import bench_trackers_kvm  # noqa: F401
import bench_trackers_unicorn  # noqa: F401
from measure import add_thread, measure, print_rows


def read_groups(text: str) -> int:
    return 1 << int(text[2:]) if text.startswith("2^") else int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--groups",
        type=read_groups,
        metavar="2^24",
        help="of whole bitmaps; with this, only those are measured",
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--only", action="append", metavar="TEXT", help="names that contain this; may be repeated"
    )
    parser.add_argument(
        "--thread", action="store_true", help="in a process with another thread, as many have one"
    )
    parser.add_argument("--json", action="store_true", help="one line for each way")
    args = parser.parse_args()
    if args.thread:
        add_thread()
    only = args.only or [""]
    rows = measure(args.groups or 1 << 24, args.rounds, only, args.groups is not None)
    if not print_rows(rows, args.json):
        parser.error(f"no benchmark has a name with {' or '.join(map(repr, only))} in it")


if __name__ == "__main__":
    main()
