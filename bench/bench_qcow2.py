# SPDX-License-Identifier: MIT
"""Storing and loading a large bitmap in a qcow2 image, beside writing and reading the same bytes.

``make bench-stores``. Ratios within a group of one run: disks and their caches differ too much for
anything else.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, Callable

import pytest

from pybitmap import HBitmap
from pybitmap.store import Purpose, Qcow2Store, Record, Volume, Wanted

GRANULARITY = 512
GROUPS = 1 << 30
NBYTES = GROUPS // 8
STEP = 8 << 20

Benchmark = Any  # pytest-benchmark has no types


@pytest.fixture
def image(tmp_path: Path) -> Path:
    program = shutil.which("qemu-img")
    if program is None:
        pytest.skip("qemu-img is not installed (Debian package qemu-utils)")
    path = tmp_path / "image"
    command = [program, "create", "-q", "-f", "qcow2", path, str(GROUPS * GRANULARITY)]
    subprocess.run([str(each) for each in command], check=True)
    return path


def random_bytes() -> bytes:
    return os.urandom(1 << 20) * (NBYTES >> 20)


def store(store: Qcow2Store, volume: Volume, content: HBitmap, purpose: Purpose) -> None:
    wanted = Wanted(volume.size, [Record("b", GRANULARITY, True, content)])
    store.prepare({volume: wanted}, purpose).switch()


@pytest.mark.benchmark(group="store 2**30 groups at random: 128 MiB, synced")
@pytest.mark.parametrize("what", ["write and sync", "all of it", "1 MiB that changed"])
def test_store(benchmark: Benchmark, image: Path, tmp_path: Path, what: str) -> None:
    """What does a flush cost beside writing the same bytes to a new file?"""
    data = random_bytes()
    qcow2 = Qcow2Store(image)
    volume = qcow2.open("n", None, read_only=False)
    volume.load()
    content = volume.make(GRANULARITY)
    content.deserialize(data)

    def write() -> None:
        with (tmp_path / "plain").open("wb") as file:
            for start in range(0, NBYTES, STEP):
                file.write(data[start : start + STEP])
            file.flush()
            os.fsync(file.fileno())

    def before() -> None:
        (tmp_path / "plain").unlink(missing_ok=True)
        if what == "all of it":
            qcow2.prepare({volume: Wanted(volume.size, [])}, Purpose.COMMIT).switch()
        elif what != "write and sync":
            store(qcow2, volume, content, Purpose.FLUSH)
            content.drain(0, (1 << 23) * GRANULARITY)

    def flush() -> None:
        store(qcow2, volume, content, Purpose.FLUSH)

    run: Callable[[], None] = write if what == "write and sync" else flush
    benchmark.pedantic(run, setup=before, rounds=3)
    volume.close()


@pytest.mark.benchmark(group="load 2**30 groups at random: 128 MiB, from the page cache")
@pytest.mark.parametrize("what", ["read into memory", "load"])
def test_load(benchmark: Benchmark, image: Path, tmp_path: Path, what: str) -> None:
    """What does opening cost beside reading the same bytes?"""
    data = random_bytes()
    qcow2 = Qcow2Store(image)
    volume = qcow2.open("n", None, read_only=False)
    volume.load()
    content = volume.make(GRANULARITY)
    content.deserialize(data)
    store(qcow2, volume, content, Purpose.CLOSE)
    volume.close()
    (tmp_path / "plain").write_bytes(data)

    def read() -> None:
        with (tmp_path / "plain").open("rb") as file:
            assert len([file.read(STEP) for _ in range(0, NBYTES, STEP)]) == NBYTES // STEP

    def load() -> None:
        volume = qcow2.open("n", None, read_only=True)
        assert volume.load()
        volume.close()

    benchmark.pedantic(load if what == "load" else read, rounds=5)
