# SPDX-License-Identifier: MIT
"""A store that was tampered with: a clear error, or a store; in bounded memory and time."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from local import GROUP, Part

from pybitmap import BitmapError
from pybitmap.store import LocalStore, Record

#: Small, and yet rows fill several pages of the catalog.
SIZE = 64 * GROUP


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "store"
    part = Part(LocalStore(path), size=SIZE)
    for i in range(10):
        part.add(f"bitmap {i} " + "x" * 100 * i, frozen=i == 3)
    part.close()
    part = Part(LocalStore(path), "used", size=SIZE)
    part.add("in use")
    part.drop()
    return path


def use(path: Path) -> None:
    """Whatever is read is used; whatever cannot be is an error of ours, and nothing else."""
    for node in ("disk", "used"):
        for read_only in (True, False):
            store = LocalStore(path)
            try:
                for entry in store.entries():
                    assert all(each.granularity > 0 for each in entry.bitmaps)
                part = Part(store, node, None, read_only=read_only)
            except BitmapError as error:
                assert str(error)  # noqa: PT017
                continue
            try:
                for record in part.records.values():
                    if record.content is not None:
                        record.content.set(0, min(1, record.content.size))
                        assert record.content.count() >= 0
                if not read_only:
                    part.close()
            except BitmapError:
                part.drop()
            finally:
                part.drop()


def copies(original: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(shutil.copytree(original, Path(folder) / "store"))


CHANGES = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=8)


# SQLite's complaint of a name in the schema that is no UTF-8, which is none either.
@example(changes=[(3922, 128)], start=100)
@given(changes=CHANGES, start=st.sampled_from([0, 100, 4096]))
def test_bytes_of_the_catalog_that_change(
    original: Path, changes: list[tuple[int, int]], start: int
) -> None:
    for path in copies(original):
        catalog = path / "catalog.sqlite"
        data = bytearray(catalog.read_bytes())
        for offset, value in changes:
            data[(start + offset % (4096 if start else 100)) % len(data)] = value
        catalog.write_bytes(data)
        use(path)


@given(st.binary(max_size=600), st.integers(0, 1024))
def test_any_journal(original: Path, journal: bytes, offset: int) -> None:
    for path in copies(original):
        file = path / "catalog.sqlite-journal"
        data = bytearray(file.read_bytes())
        data[offset : offset + len(journal)] = journal
        magic = bytes.fromhex("d9d505f920a163d7")
        file.write_bytes(magic + data[8:])
        use(path)


@given(st.integers(0, 1 << 16))
def test_a_catalog_that_is_cut_short(original: Path, length: int) -> None:
    for path in copies(original):
        catalog = path / "catalog.sqlite"
        data = catalog.read_bytes()
        catalog.write_bytes(data[: length % len(data)])
        use(path)


@given(st.data())
def test_words_of_any_length_and_content(original: Path, data: st.DataObject) -> None:
    for path in copies(original):
        for file in path.glob("*.words"):
            file.write_bytes(data.draw(st.binary(max_size=20) | st.just(b"\xff" * 8)))
        use(path)


def test_many_bitmaps_are_listed_and_loaded(tmp_path: Path) -> None:
    """One transaction adds them; listing them reads no bits."""
    part = Part(LocalStore(tmp_path / "store"), size=SIZE)
    for i in range(300):
        name = f"{i:04}" + "x" * 1019
        part.records[name] = Record(name, GROUP, True, part.volume.make(GROUP))
    part.close()
    [node] = LocalStore(tmp_path / "store").entries()
    assert [each.name[:4] for each in node.bitmaps] == [f"{i:04}" for i in range(300)]
    part = Part(LocalStore(tmp_path / "store"), size=None)
    assert len(part.loaded) == 300
    part.close()
