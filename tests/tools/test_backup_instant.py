# SPDX-License-Identifier: MIT
"""All disks of a point are as they were at one instant, beside a program that writes to them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from backing_up import copied, fulls, new_image, settled
from machines import Machine, content
from peers import lacking, package, peer

from pybitmap.tools.backup import backup
from pybitmap.tools.monitor import DisconnectedError

package("qemu.qmp")
COUNTER = Path(__file__).parent.parent / "support" / "nbd_counter.py"


def with_libnbd() -> str:
    """A Python that has it."""
    python = shutil.which("python3", path="/usr/bin") or peer("python3", "python3")
    found = subprocess.run([python, "-c", "import nbd"], capture_output=True)
    if found.returncode:
        peer("a Python with libnbd", "python3-libnbd")
    return python


@contextmanager
def counting(machine: Machine, *disks: str) -> Iterator[None]:
    uris = [f"nbd+unix:///{disk}?socket={machine.nbd}" for disk in disks]
    process = subprocess.Popen(
        [with_libnbd(), COUNTER, *uris], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "counting\n", process.communicate()
        yield
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("threads", [False, True], ids=["one thread", "a thread for each disk"])
def test_what_one_disk_has_the_other_has_too(memory_path: Path, threads: bool) -> None:
    for number in range(8):
        folder = memory_path / str(number)
        folder.mkdir()
        disks = {name: new_image(folder, name) for name in "ab"}
        with Machine(disks, nbd=not threads) as machine:
            if threads:
                serve_by_threads(machine)
            try:
                compare_with_a_counter(machine, folder / "to")
                return
            except DisconnectedError:
                # QEMU 7.2's server does, now and then, in transactions beside such threads.
                if not (threads and machine.has_aborted()):
                    raise
    lacking("disks with a thread for each, of an NBD server: this QEMU aborts")


def serve_by_threads(machine: Machine) -> None:
    address = {"type": "unix", "data": {"path": str(machine.nbd)}}
    machine.must("nbd-server-start", addr=address)
    for name in machine.disks:
        machine.must("object-add", qom_type="iothread", id=f"thread-{name}")
        machine.must(
            "block-export-add",
            type="nbd",
            id=f"x-{name}",
            node_name=name,
            name=name,
            writable=True,
            iothread=f"thread-{name}",
        )


def compare_with_a_counter(machine: Machine, to: Path) -> None:
    with counting(machine, "a", "b"):
        points = [backup(["b", "a"], to, qmp=machine.qmp) for _ in range(4)]
    numbers = []
    for done in points:
        first, second = (
            int.from_bytes(copied(to, done, disk)[:8], "little") for disk in ("a", "b")
        )
        assert second <= first <= second + 1
        numbers.append(first)
    assert sorted(set(numbers)) == numbers
    assert not any(map(fulls, points[1:]))
    done = backup(["a", "b"], to, qmp=machine.qmp)
    settled(machine, done, "a", "b")
    machine.stop()
    for disk, path in machine.disks.items():
        assert copied(to, done, disk) == content(path)
