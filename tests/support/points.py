# SPDX-License-Identifier: MIT
"""Backup directories for tests, made by QEMU's programs, and an oracle that knows each point."""

from __future__ import annotations

import hashlib
import random
import shutil
import struct
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from images import qemu_img, qemu_io

from pybitmap.tools.backup.hashing import new_copy
from pybitmap.tools.backup.manifest import Copy, Point, Repository

KIB = 1 << 10


def new_id() -> str:
    return uuid.uuid4().hex


def now() -> datetime:
    return datetime.now(timezone.utc)


Change = Callable[[], Sequence[str]]


@dataclass
class History:
    """Points of one disk, each as a chain of a guest's writes left it.

    The increments are what was written between two points, made by qemu-io in an image over the
    previous copy; what each point holds is kept beside, as QEMU reads it then.
    """

    path: Path
    disk: str = "vda"
    contents: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        Repository.create(self.path).close()

    def point(
        self, size: int, commands: Sequence[str] = (), *, full: bool = False, options: str = ""
    ) -> Point:
        """One more, by commands of qemu-io."""
        with Repository.open(self.path, writing=True) as repository:
            last = None if full else repository.manifest.last
            below = last.copy_of(self.disk) if last else None
            identifier = new_id()
            path = repository.new_file(self.disk, identifier)
            more = ["-b", below.file, "-F", "qcow2"] if below else []
            if options:
                more += ["-o", options]
            qemu_img("create", "-q", "-f", "qcow2", *more, path, str(size))
            if commands:
                qemu_io(path, *commands)
            copy = self.copy(repository, path, last.id if below and last else None)
            point = Point(identifier, now(), now(), (copy,))
            repository.append(point)
        self.contents[identifier] = content(path)
        return point

    def copy(self, repository: Repository, path: Path, parent: str | None) -> Copy:
        return new_copy(
            repository,
            path,
            disk=self.disk,
            parent=parent,
            bitmap="pybitmap-" + path.stem[-32:],
            granularity=65536,
            reason=None if parent else "it is the first",
        )

    def copy_to(self, path: Path) -> History:
        """The same directory once more, to be spoilt."""
        shutil.copytree(self.path, path)
        other = object.__new__(History)
        other.path, other.disk, other.contents = path, self.disk, self.contents
        return other


def content(path: Path, name: str = "") -> bytes:
    """What QEMU reads from a copy, by its header alone."""
    target = path.with_name(f"{path.name}{name}.raw")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", path, target)
    data = target.read_bytes()
    target.unlink()
    return data


def random_writes(rng: random.Random, size: int, count: int) -> list[str]:
    """Of qemu-io: writes, zeroes and discards, at places that are no leaf's borders."""
    commands = []
    for _ in range(count):
        start = rng.randrange(0, size // 512) * 512
        nbytes = min(rng.choice([512, 4096, 65536, 200 * KIB, KIB * KIB]), size - start)
        kind = rng.choice(
            ["write -P", "write -P", "write -P", "write -z", "write -z -u", "discard"]
        )
        pattern = f" {rng.randrange(1, 256)}" if kind.endswith("-P") else ""
        commands.append(f"{kind}{pattern} {start} {nbytes}")
    return commands


def root_by_the_book(data: bytes) -> str:
    """The root of the tree over a disk, made as the head of hashing.py says and no other way."""
    leaf, fan = 64 * KIB, 16

    def sha256(text: bytes) -> bytes:
        return hashlib.sha256(text).digest()

    height = 1
    while fan**height * leaf < len(data):
        height += 1
    level = [
        sha256(b"\x00" + data[start : start + leaf].ljust(leaf, b"\0"))
        for start in range(0, len(data), leaf)
    ]
    level += [sha256(b"\x00" + bytes(leaf))] * (fan**height - len(level))
    for number in range(1, height + 1):
        level = [
            sha256(bytes([1, number]) + b"".join(level[start : start + fan]))
            for start in range(0, len(level), fan)
        ]
    [top] = level
    return sha256(b"\x02" + struct.pack("<Q", len(data)) + top).hex()
