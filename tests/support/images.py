# SPDX-License-Identifier: MIT
"""qcow2 images for tests: made by qemu-img, changed by us, and what QEMU says of them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable

import pytest
from peers import peer

from pybitmap import HBitmap
from pybitmap.store import (
    Purpose,
    Qcow2Store,
    Record,
    StoredBitmap,
    Volume,
    Wanted,
)
from pybitmap.store.qcow2.bitmaps import ONES
from pybitmap.store.qcow2.file import File

UTILS = "qemu-utils"
MIB = 1 << 20

#: Seconds. A machine that is busy is no failure; what hangs ends all the same.
PATIENCE = 600

#: What `qemu-img check` returns.
FINE, LEAKS = 0, 3


def qemu_img(*arguments: str | Path) -> str:
    """What it prints; it has to succeed."""
    done = _run(peer("qemu-img", UTILS), *arguments)
    assert done.returncode == 0, (arguments, done.stdout, done.stderr)
    return done.stdout


def check(path: Path, *options: str) -> int:
    """The code that `qemu-img check` returns."""
    return _run(peer("qemu-img", UTILS), "check", "-q", *options, path).returncode


def qemu_io(path: Path | str, *commands: str, options: Sequence[str] = ()) -> None:
    each = [part for command in commands for part in ("-c", command)]
    done = _run(peer("qemu-io", UTILS), *options, *each, path)
    assert done.returncode == 0, (commands, done.stdout, done.stderr)
    assert "rror" not in done.stdout + done.stderr, (commands, done.stdout, done.stderr)


def _run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(each) for each in arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )


def create(path: Path, size: int | str = MIB, **options: object) -> Path:
    """An image as qemu-img makes it, with ``-o option=value``."""
    each = ",".join(f"{name}={value}" for name, value in options.items())
    more = ("-o", each) if each else ()
    qemu_img("create", "-q", "-f", "qcow2", *more, path, str(size))
    return path


SECRET = ("--object", "secret,id=s,data=secret")


def create_encrypted(path: Path, method: str, size: int | str = MIB) -> Path:
    """The same, encrypted: "luks", or "aes" as images once were."""
    options = f"encrypt.format={method},encrypt.key-secret=s"
    if method == "luks":  # little work, with a hash that takes long enough to be measured
        options += ",encrypt.iter-time=10,encrypt.hash-alg=sha512,encrypt.cipher-alg=aes-128"
    for left in (2, 1, 0):
        try:
            qemu_img("create", "-q", "-f", "qcow2", *SECRET, "-o", options, path, str(size))
            break
        except AssertionError as error:
            if "is not supported" in str(error) or "not found" in str(error):
                pytest.skip(f"this qemu-img makes no images encrypted by {method}")
            if not left or "CPU usage" not in str(error):
                raise
    return path


def decrypted(path: Path) -> list[str]:
    """Arguments for QEMU's tools: such an image, and the way to read it."""
    return [*SECRET, "--image-opts", f"driver=qcow2,file.filename={path},encrypt.key-secret=s"]


def listed(path: Path) -> list[tuple[str, int, list[str]]]:
    """The bitmaps that `qemu-img info` lists: name, granularity, flags."""
    info = json.loads(qemu_img("info", "--output=json", path))
    bitmaps = info["format-specific"]["data"].get("bitmaps", [])
    return [(each["name"], each["granularity"], each["flags"]) for each in bitmaps]


def asked(path: Path, *, read_only: bool = True) -> dict[str, Any]:
    """What qemu-storage-daemon says of the bitmaps of an image: (count, SHA-256), or a word."""
    with qemu(path, read_only=read_only) as execute:
        nodes = execute("query-named-block-nodes", flat=True)
        (node,) = [each for each in nodes if each["node-name"] == "n"]
        answer: dict[str, Any] = {}
        for bitmap in node.get("dirty-bitmaps", []):
            name = bitmap["name"]
            if bitmap.get("inconsistent"):
                answer[name] = "inconsistent"
                continue
            sha256 = execute("x-debug-block-dirty-bitmap-sha256", node="n", name=name)
            answer[name] = (bitmap["count"], sha256["sha256"])
        return answer


@contextmanager
def qemu(path: Path, *, read_only: bool) -> Iterator[Callable[..., Any]]:
    """A qemu-storage-daemon that has the image open as node `n`; gives its commands."""
    options = f"driver=qcow2,node-name=n,read-only={'on' if read_only else 'off'}"
    process = subprocess.Popen(
        [
            peer("qemu-storage-daemon", "qemu-system-common"),
            *("--chardev", "stdio,id=m", "--monitor", "m"),
            *("--blockdev", f"{options},file.driver=file,file.filename={path}"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def execute(command: str, **arguments: Any) -> Any:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        process.stdin.flush()
        while True:
            line = process.stdout.readline()
            assert line, process.stderr.read() if process.stderr else ""
            reply = json.loads(line)
            assert "error" not in reply, reply
            if "return" in reply:
                return reply["return"]

    try:
        execute("qmp_capabilities")
        yield execute
        execute("quit")
        process.wait(30)
    finally:
        process.kill()
        process.communicate()


class Unsynced(File):
    """Real syncs would be most of the tests' time."""

    def _fdatasync(self) -> None:
        pass


class Opened:
    """An image that we have open, driven as a node would: ``add``, ``commit``, ``close``, ...

    `bitmaps` has the content of those that can be used, `records` what is stored next.
    """

    def __init__(
        self,
        path: Path,
        *,
        read_only: bool = False,
        open_file: Callable[..., File] = Unsynced,
    ) -> None:
        self.store = Qcow2Store(path)
        self.store.open_file = open_file
        self.volume = self.store.open("n", None, read_only=read_only)
        try:
            self.loaded: Mapping[str, StoredBitmap] = {
                each.name: each for each in self.volume.load()
            }
        except BaseException:
            self.volume.close()
            raise
        self.records = [
            Record(each.name, each.granularity, each.enabled, each.content)
            for each in self.loaded.values()
        ]

    @property
    def bitmaps(self) -> dict[str, HBitmap]:
        return {each.name: each.content for each in self.records if each.content is not None}

    def clusters(self, name: str) -> int:
        """How many clusters of the image hold bits of a bitmap."""
        (table,) = [each.table for each in self.volume._entries if each.name == name]
        assert table is not None
        return sum(offset > ONES for offset in table)

    def add(self, name: str, granularity: int = 512, *, enabled: bool = True) -> HBitmap:
        content = self.volume.make(granularity)
        self.records.append(Record(name, granularity, enabled, content))
        return content

    def remove(self, name: str) -> None:
        self.records = [each for each in self.records if each.name != name]

    def wanted(self) -> dict[Volume, Wanted]:
        return {self.volume: Wanted(self.volume.size, list(self.records))}

    def change(self, purpose: Purpose) -> None:
        self.store.prepare(self.wanted(), purpose).switch()

    def commit(self) -> None:
        self.change(Purpose.COMMIT)

    def flush(self) -> None:
        self.change(Purpose.FLUSH)

    def close(self) -> None:
        """Store, and let go."""
        self.change(Purpose.CLOSE)
        self.volume.close()

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Store and let go; after an exception, as a process that dies."""
        if kind is None and not self.volume.read_only:
            self.change(Purpose.CLOSE)
        self.volume.close()


def entries(path: Path) -> Sequence[StoredBitmap]:
    """What we list, without reading bits."""
    (node,) = Qcow2Store(path).entries()
    return node.bitmaps


def known(image: Opened) -> dict[str, Any]:
    """What is to be stored next, in the same words."""
    return {name: (each.count(), each.sha256()) for name, each in image.bitmaps.items()}


def loaded(path: Path) -> dict[str, Any]:
    """What we say of the bitmaps of an image, in the words of :func:`asked`."""
    with Opened(path, read_only=True) as image:
        return {
            each.name: "inconsistent"
            if each.content is None
            else (each.content.count(), each.content.sha256())
            for each in image.loaded.values()
        }
