# SPDX-License-Identifier: MIT
"""What the tests of LocalStore share: a volume with its bitmaps, as a node has them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pybitmap import HBitmap
from pybitmap.store import LocalStore, Purpose, Record, Volume, Wanted
from pybitmap.store.base import Switches

GROUP = 65536
SIZE = 4096 * 64 * GROUP  # of a node: 4096 words, 8 pages of them


class Part:
    """A volume and what it is to hold; every change is switched at once, as COMMIT."""

    def __init__(
        self,
        store: LocalStore,
        node: str = "disk",
        size: int | None = SIZE,
        *,
        read_only: bool = False,
    ) -> None:
        self.volume: Volume = store.open(node, size, read_only=read_only)
        try:
            self.loaded = {each.name: each for each in self.volume.load()}
        except BaseException:
            self.volume.close()
            raise
        self.records: dict[str, Record] = {
            name: Record(name, each.granularity, each.enabled, each.content)
            for name, each in self.loaded.items()
        }

    def __getitem__(self, name: str) -> HBitmap:
        content = self.records[name].content
        assert content is not None
        return content

    def wanted(self) -> Wanted:
        return Wanted(self.volume.size, list(self.records.values()))

    def store(self, purpose: Purpose = Purpose.COMMIT) -> None:
        switch(self, purpose=purpose)

    def add(
        self, name: str, granularity: int = GROUP, *, enabled: bool = True, frozen: bool = False
    ) -> HBitmap:
        content = self.volume.make(granularity)
        successor = self.volume.make(granularity) if frozen else None
        self.put(Record(name, granularity, enabled, content, successor))
        return content

    def put(self, record: Record) -> None:
        before = dict(self.records)
        self.records[record.name] = record
        try:
            self.store()
        except BaseException:
            self.records = before
            raise

    def remove(self, name: str) -> None:
        record = self.records.pop(name)
        try:
            self.store()
        except BaseException:
            self.records[name] = record
            raise

    def close(self) -> None:
        """In an orderly way."""
        self.store(Purpose.CLOSE)
        self.drop()

    def drop(self) -> None:
        """As it is, which is what a killed process leaves; nothing is mapped any more."""
        self.records.clear()
        self.loaded.clear()
        self.volume.close()


def switch(*parts: Part, purpose: Purpose = Purpose.COMMIT) -> None:
    """One change of several volumes."""
    late = Switches({part.volume: part.wanted() for part in parts}, purpose).switch()
    if late is not None:
        raise late


@contextmanager
def opened(
    path: Path, node: str = "disk", size: int | None = None, *, read_only: bool = False
) -> Iterator[Part]:
    """Opened, and let go of as it is."""
    part = Part(LocalStore(path), node, size, read_only=read_only)
    try:
        yield part
    finally:
        part.drop()


def words_files(path: Path) -> list[str]:
    return sorted(each.name for each in path.iterdir() if each.suffix == ".words")
