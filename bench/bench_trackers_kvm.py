# SPDX-License-Identifier: MIT
"""What it costs to collect what a guest of KVM's wrote; nothing where there is no KVM.

The guest writes before each run, and each way has a machine of its own.
"""

from __future__ import annotations

import fcntl
import os
import platform
import random
import struct
import sys
from pathlib import Path
from typing import Callable

from measure import Goal, Shape, Work, benchmark, missing

from pybitmap import HBitmap
from pybitmap.trackers import KvmDirtyLog, KvmDirtyRing

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
from guest import CAP_MANUAL, MANUAL, PAGE, TABLE, Machine, Memory

GET_LOG, CLEAR_LOG = 0x4010AE42, 0xC018AEC0


def pages_of(shape: Shape) -> list[int]:
    assert shape.density is not None
    rng = random.Random(1)
    return [page * PAGE for page in range(shape.groups) if rng.random() < shape.density][:TABLE]


def bare(machine: Machine, npages: int) -> Callable[[object], None]:
    """The ioctls, and one pass over the words: they are copied."""
    machine.enable(CAP_MANUAL, MANUAL)
    log = Memory(max(PAGE, npages // 8))
    words = bytearray(len(log))
    get = struct.pack("<IIQ", 0, 0, log.address())
    clear = struct.pack("<IIQQ", 0, npages, 0, log.address())

    def run(_: object) -> None:
        fcntl.ioctl(machine.fd, GET_LOG, get)
        fcntl.ioctl(machine.fd, CLEAR_LOG, clear)
        words[:] = log

    return run


def collecting(shape: Shape) -> Work:
    """What does a collect cost, beside the ioctls and one pass over the words of the log?"""
    pages, nbytes = pages_of(shape), shape.groups * PAGE
    ring_of = Machine(nbytes, ring=1 << 16)
    machines = [Machine(nbytes) for _ in range(4)]
    manual, reused = (KvmDirtyLog(machine.fd, 0, nbytes) for machine in machines[1:3])
    plain = KvmDirtyLog(machines[3].fd, 0, nbytes, manual=False)
    ring = KvmDirtyRing(ring_of.fd, [ring_of.processors[0].fd], {0: (0, nbytes)})
    into = HBitmap(nbytes, manual.granularity)
    ways: dict[str, Callable[..., object]] = {
        "the ioctls, and a pass": bare(machines[0], shape.groups),
        "KvmDirtyLog.collect()": lambda _: manual.collect(),
        "KvmDirtyLog.collect(into)": lambda _: reused.collect(into),
        "the same, manual=False": lambda _: plain.collect(),
        "KvmDirtyRing.collect()": lambda _: ring.collect(),
    }

    def writing(machine: Machine) -> Callable[[], object]:
        def write() -> None:
            into.clear()
            machine.write(pages, 1)

        return write

    before = dict(zip(ways, map(writing, [*machines, ring_of])))
    # Where nothing was written a new bitmap takes longer than the pass.
    goals = [
        Goal(way, "the ioctls, and a pass", 1.5)
        for way in (["KvmDirtyLog.collect()"] if pages else []) + ["KvmDirtyLog.collect(into)"]
    ]
    return Work("collect", 1, ways, goals, before)


if not os.access("/dev/kvm", os.R_OK | os.W_OK):
    missing["KVM"] = "/dev/kvm cannot be opened"
elif platform.machine() != "x86_64":
    missing["KVM"] = "the guest is x86 code"
else:
    for groups, density in ((1 << 15, 0.0), (1 << 15, 0.5), (1 << 18, 0.001)):
        benchmark("collect from KVM", groups, (density,))(collecting)
