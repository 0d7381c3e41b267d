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
from peers import package, peer

from pybitmap.tools.backup import backup

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
    to = memory_path / "to"
    disks = {name: new_image(memory_path, name) for name in "ab"}
    with Machine(disks, nbd=not threads) as machine:
        if threads:
            address = {"type": "unix", "data": {"path": str(machine.nbd)}}
            machine.must("nbd-server-start", addr=address)
            for name in disks:
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
    for disk, path in disks.items():
        assert copied(to, done, disk) == content(path)
