# SPDX-License-Identifier: MIT
"""What does a scan of many disks cost, and does it grow with what is dirty, and nothing else?

    python bench/bench_fleet.py [--disks 100,1000,10000] [--json]

Disks are made up (tests/support/fleets.py: 1 TiB at 64 KiB, sparse, bursty, clean, full, broken),
so that it is the path behind the reading of images that is measured: processes, results, tables.
Each line is a program of its own, for its peak of memory. Beside them: a union, the questions; how
large a bitmap is at rest and on the way, beside its words, Roaring and pickle; and what it costs to
merge one here, or to send it to another process.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Callable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))

import fleets

from pybitmap import HBitmap
from pybitmap.sizes import granularity_bits, rough_size
from pybitmap.tools import fleet
from pybitmap.tools.fleet import Target
from pybitmap.tools.fleet.rows import areas_of

UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes


def processor() -> tuple[float, float]:
    """Seconds of the processor: of this process, and of those that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    own, others = (usage.ru_utime + usage.ru_stime for usage in usages)
    return own, others


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def cpu_of(work: Callable[[], object]) -> float:
    """Seconds of this process's processors."""
    begin, _ = processor()
    work()
    return processor()[0] - begin


def one(count: int, processes: int, scale: int) -> dict[str, Any]:
    """A scan, in this process: seconds, also of the processor, and the peaks of memory, of this one
    and of its workers."""
    folder = Path(tempfile.mkdtemp(prefix="pybitmap-bench-"))
    try:
        targets = fleets.targets(count, scale=scale)
        parts: dict[str, float] = {}

        def progress(what: str, done: int, total: int | None) -> None:
            parts[what] = time.perf_counter()

        own, others = processor()
        begin = time.perf_counter()
        scan = partial(fleet.scan, reader=fleets.made, processes=processes, progress=progress)
        report = scan(targets, folder / "f")
        end = time.perf_counter()
        own_after, others_after = processor()
        tables = (folder / "f" / "current").resolve()
        found = {
            "disks": count,
            "processes": processes,
            "extents": report.extents,
            "seconds": end - begin,
            "cpu": own_after - own,
            "worker_cpu": others_after - others,
            "reading": parts["reading targets"] - begin,
            "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT,
            "worker_peak": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * UNIT,
            "nbytes": sum(path.stat().st_size for path in tables.rglob("*.parquet")),
        }
        found["union"] = cpu_of(lambda: fleet.union([folder / "f"], folder / "u"))
        for name in ("links", "order", "full", "hottest", "granularity"):
            found[name] = cpu_of(partial(fleet.plan, folder / "f", name))
        return found
    finally:
        shutil.rmtree(folder)


def sweep(counts: list[int], scale: int) -> Iterator[dict[str, Any]]:
    for count in counts:
        for processes in (1, 2):
            command = [sys.executable, __file__, "--one", f"{count},{processes},{scale}"]
            yield json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def bitmap_of(target: Target) -> HBitmap:
    bitmap = HBitmap(fleets.SIZE, granularity_bits(fleets.GROUP))
    [content] = fleets.made(target).contents
    if content is not None:
        extents = content.unpacked()
        bitmap.set_many(extents[:, 0], extents[:, 1])
    return bitmap


def sizes(kind: str, scale: int, rounds: int) -> dict[str, float]:
    """Medians over some bitmaps of a kind: bytes in each form, and microseconds."""
    import pyroaring

    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        for number in range(rounds):
            target = Target(f"/made/{kind}/{scale}/{number}", "h")
            bitmap = bitmap_of(target)
            [content] = fleets.made(target).contents
            assert content is not None
            if kind == "full":
                roaring = pyroaring.BitMap(range(fleets.SIZE // fleets.GROUP))
            else:
                roaring = pyroaring.BitMap(fleets.groups_of(target))
            roaring.run_optimize()
            folder = Path(name, str(number))
            with ThreadPoolExecutor(1) as threads:
                fleet.scan([target], folder, reader=fleets.made, executor=threads)
            files = (folder / "current" / "extents").rglob("*.parquet")
            other = bitmap.copy()
            sent = partial(_sent, content)
            values = {
                "extents": len(areas_of(bitmap)),
                "words": len(bitmap.serialize()),
                "pickle": len(pickle.dumps(bitmap, 5)),
                "roaring": len(roaring.serialize()),
                "packed": len(content.data),
                "parquet, alone": sum(path.stat().st_size for path in files),
                "merge_us": 1e6 * min(seconds(partial(other.merge, bitmap)) for _ in range(3)),
                "send_us": 1e6 * min(seconds(sent) for _ in range(3)),
            }
            for key, value in values.items():
                found.setdefault(key, []).append(value)
    return {key: statistics.median(values) for key, values in found.items()}


def _sent(content: object) -> None:
    """Through a pipe, as a pool of processes does it, and back to what it was."""
    from multiprocessing import Pipe
    from threading import Thread

    receiving, sending = Pipe(duplex=False)
    sender = Thread(target=sending.send, args=(content,))
    sender.start()
    receiving.recv().unpacked()
    sender.join()
    receiving.close()
    sending.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--disks", default="100,1000,10000")
    parser.add_argument("--scale", type=int, default=10, help="how much is dirty")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(*map(int, given.one.split(",")))))
        return
    lines = list(sweep([int(each) for each in given.disks.split(",")], given.scale))
    forms = {kind: sizes(kind, given.scale, given.rounds) for kind in ("sparse", "bursty", "full")}
    if given.json:
        print(json.dumps({"load": os.getloadavg(), "sweep": lines, "sizes": forms}, indent=1))
        return
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} processors")
    print(
        "disks processes extents | seconds, of the processor: here, workers, us/extent |"
        " peak here, worker | Parquet, bytes/extent"
    )
    for line in lines:
        cpu = line["cpu"] + line["worker_cpu"]
        print(
            f"{line['disks']} {line['processes']} {line['extents']} | {line['seconds']:.1f},"
            f" {line['cpu']:.1f} {line['worker_cpu']:.1f} {1e6 * cpu / line['extents']:.1f} |"
            f" {rough_size(line['peak'])} {rough_size(line['worker_peak'])} |"
            f" {rough_size(line['nbytes'])} {line['nbytes'] / line['extents']:.2f}"
        )
        asked = ("union", "links", "order", "full", "hottest", "granularity")
        print("   ", ", ".join(f"{name} {line[name]:.2f} s" for name in asked))
    for kind, values in forms.items():
        print(kind, ", ".join(f"{key} {value:.0f}" for key, value in values.items()))


if __name__ == "__main__":
    main()
