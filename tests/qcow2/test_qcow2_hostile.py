# SPDX-License-Identifier: MIT
"""Damaged images: a clear error or one inconsistent bitmap, little memory, and nothing written."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Callable, TypeVar

import pytest
from damage import BROKEN, OF_BITMAPS, OTHERS, SIZE, Damage, Layout, undamaged
from hypothesis import given, settings
from hypothesis import strategies as st
from images import FINE, MIB, Opened, asked, check, create, entries, loaded, qemu_io
from support import silent

from pybitmap import BitmapError, BlockGraph, CorruptError, StoreError, UnsupportedError, offline
from pybitmap.store import Purpose, Qcow2Store, Record
from pybitmap.store.qcow2.bitmaps import IN_USE, MAX_BITMAPS

tracemalloc = pytest.importorskip("tracemalloc", reason="PyPy does not count memory")

T = TypeVar("T")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return undamaged(tmp_path_factory.mktemp("original"))


#: What makes an image unusable, at least for writing.
DAMAGE = {**OF_BITMAPS, **OTHERS}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_image_is_an_error_and_stays_as_it_is(
    tmp_path: Path, original: bytes, damage: Damage
) -> None:
    path, layout = tmp_path / "image", Layout(original)
    damage(layout)
    path.write_bytes(layout.data)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptError) as caught:
            Opened(path)
        for look in (entries, loaded):
            try:
                look(path)  # reading may be possible
            except CorruptError as error:
                caught.value.__cause__ = error
        assert tracemalloc.get_traced_memory()[1] < 16 * MIB
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert path.read_bytes() == layout.data


@pytest.mark.parametrize(("damage", "word"), BROKEN.values(), ids=BROKEN)
def test_a_broken_bitmap_does_not_harm_the_others(
    tmp_path: Path, original: bytes, damage: Damage, word: str
) -> None:
    path, layout = tmp_path / "image", Layout(original)
    path.write_bytes(original)
    sound = loaded(path)
    damage(layout)
    path.write_bytes(layout.data)
    _, broken, _ = entries(path)
    assert broken.reason is not None
    assert word in broken.reason
    before = bytes(layout.data[layout.b : layout.b + 32])
    del sound["b"]
    assert loaded(path) == {**sound, broken.name: "inconsistent"}
    # It stays as it is through changes of the others, but that it says that it has missed some, and
    # that a table which nobody can believe is replaced.
    with Opened(path) as image:
        image.bitmaps["a"].set(0, 1)
        image.remove("c")
        image.flush()
    after = Layout(path.read_bytes())
    kept = bytes(after.data[after.b : after.b + 32])
    flags, kind = before[15], before[16]
    flags = flags | IN_USE if kind == 1 else flags
    assert kept[12:] == before[12:15] + bytes([flags]) + before[16:]
    if word in ("table", "beyond the end", "aligned", "header", "entry 0", "entry 1"):
        assert check(path, "-r", "leaks") == FINE
        assert asked(path)["b"] == "inconsistent"
    else:
        assert kept[:12] == before[:12]
    with Opened(path) as image:
        assert image.loaded[broken.name].inconsistent
        image.remove(broken.name)
    assert check(path, "-r", "leaks") == FINE
    assert list(asked(path)) == ["a"]
    assert asked(path) == loaded(path)


@pytest.mark.parametrize("nbytes", [4, 8, 71, 72, 103])
def test_a_file_that_ends_amid_its_header_is_told(
    tmp_path: Path, original: bytes, nbytes: int
) -> None:
    path = tmp_path / "image"
    path.write_bytes(original[:nbytes])
    with pytest.raises(CorruptError, match="the file ends amid its header"):
        entries(path)


@pytest.mark.parametrize("beyond", [0, 1, 5, 50])
@pytest.mark.parametrize("enabled", [0, 2])
@pytest.mark.parametrize("damage", ["table", "short table", "data"])
def test_what_names_clusters_that_others_get_damages_nothing(
    tmp_path: Path, original: bytes, damage: str, enabled: int, beyond: int
) -> None:
    path, layout = tmp_path / "image", Layout(original)
    free = (-(-len(original) // 512) + beyond) * 512  # the file will grow so far
    if damage == "data":
        layout.put(layout.table(layout.b), "Q", free)
    else:
        layout.put(layout.b, "Q", free)
    if damage == "short table":
        layout.put(layout.b + 8, "I", 1)
    layout.put(layout.b + 12, "I", enabled)
    path.write_bytes(layout.data)
    offline.add(Qcow2Store(path), (None, "of no program"), silent, granularity=512)
    for name in ("x", "y"):
        with Opened(path) as image:
            image.add(name, 512).set(0, SIZE)
            image.bitmaps[name].reset(512 * 7, 512 * 9)
    offline.remove(Qcow2Store(path), [(None, "y")], silent)
    with Opened(path, read_only=True) as image:
        assert image.loaded["b"].inconsistent
        assert image.bitmaps["x"].count() == SIZE - 512 * 9
    assert check(path, "-r", "leaks") == FINE
    assert asked(path)["b"] == "inconsistent"


@pytest.mark.parametrize(("damage", "word"), BROKEN.values(), ids=BROKEN)
def test_a_broken_bitmap_is_repaired_or_it_is_said_why_not(
    tmp_path: Path, original: bytes, damage: Callable[[Layout], None], word: str
) -> None:
    path, layout = tmp_path / "image", Layout(original)
    damage(layout)
    path.write_bytes(layout.data)
    _, broken, _ = entries(path)
    before = loaded(path)
    if word in ("name", "NUL"):
        with pytest.raises(
            UnsupportedError, match=r"' cannot be stored: its name has|in its name$"
        ):
            offline.repair(Qcow2Store(path), [(None, broken.name)], silent)
        assert loaded(path) == before
        return
    offline.repair(Qcow2Store(path), [(None, broken.name)], silent)
    [found] = [each for each in entries(path) if each.name == broken.name]
    assert (found.reason, found.in_use) == (None, False)
    with Opened(path, read_only=True) as image:
        assert image.bitmaps[broken.name].count() >= image.volume.size
    assert check(path, "-r", "leaks") == FINE


@pytest.mark.parametrize("size", [1 << 42, 1 << 50, 1 << 53])
def test_what_a_disk_is_too_large_for_is_not_repaired(
    tmp_path: Path, original: bytes, size: int
) -> None:
    path, layout = tmp_path / "image", Layout(original)
    layout.put(24, "Q", size)
    path.write_bytes(layout.data)
    for each in entries(path):
        assert each.inconsistent
        with pytest.raises(BitmapError, match=r"Too much space|larger granularity"):
            offline.repair(Qcow2Store(path), [(None, each.name)], silent)
    assert all(each.inconsistent for each in entries(path))


@pytest.mark.parametrize("raw", [b"\xff", b"\xe9", b"\x80", b"\xc3"])
def test_a_name_that_is_no_utf_8_is_one(tmp_path: Path, original: bytes, raw: bytes) -> None:
    """As QEMU takes any bytes; here it is spelt as names of files are."""
    path, layout = tmp_path / "image", Layout(original)
    layout.put(layout.b + 24, "B", raw[0])
    path.write_bytes(layout.data)
    name = os.fsdecode(raw)
    with Opened(path) as image:
        image.bitmaps[name].reset(0, 1 << 16)
        image.add("new" + name).set(0, 1)
    assert check(path) == FINE
    after = path.read_bytes()
    assert Layout(after).data.count(b"new" + raw) >= 1
    offline.clear(Qcow2Store(path), [(None, name)], silent)
    with Opened(path, read_only=True) as image:
        assert image.bitmaps[name].count() == 0
        assert image.bitmaps["new" + name].count() > 0
    offline.remove(Qcow2Store(path), [(None, name), (None, "new" + name)], silent)
    assert {each.name for each in entries(path)} == {"a", "c"}


def test_65535_bitmaps(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB, cluster_size=512)
    image = Opened(path)
    # All share one content, which a node would not do.
    content = image.add("0", 1 << 20)
    image.records = [Record(f"{i}", 1 << 20, True, content) for i in range(MAX_BITMAPS)]
    image.close()
    assert len(entries(path)) == MAX_BITMAPS
    with Opened(path) as image:
        assert len(image.loaded) == MAX_BITMAPS
        assert all(each.content is not None for each in image.loaded.values())
        image.records = image.records[:10]
        image.commit()
    assert check(path) == FINE
    assert len(loaded(path)) == 10


def test_names_of_1023_bytes(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB, cluster_size=512)
    names = [chr(ord("a") + i) * 1023 for i in range(20)]
    with Opened(path) as image:
        for name in names:
            image.add(name)
    # The newest is first in the image, and QEMU lists the last one first.
    assert list(asked(path)) == names
    assert list(loaded(path)) == names[::-1]
    layout = Layout(path.read_bytes())
    layout.put(layout.directory + 18, "H", 1024)
    path.write_bytes(layout.data)
    assert "1024 bytes" in str(entries(path)[0].reason)


def test_ones_cannot_ask_for_more_memory_than_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = create(tmp_path / "image", 1 << 40)
    with Opened(path) as image:
        for i in range(4):
            image.add(f"{i}", 65536).set(0, 1 << 40)
    monkeypatch.setattr("pybitmap.store.memory.limit", lambda: 4 << 20)
    with pytest.raises(StoreError, match="bytes of memory, this process may have 4194304"):
        Opened(path)


def test_large_tables_are_refused_together(tmp_path: Path) -> None:
    """A file may be large and empty."""
    path = create(tmp_path / "image", 1 << 34, cluster_size=512)
    with Opened(path) as image:
        image.add("x", 65536)
    layout = Layout(path.read_bytes())
    nentries = 1 << 20  # the largest
    place = 1 << 30
    directory = b"".join(
        struct.pack(">QIIBBHI", place + 8 * nentries * i, nentries, 3, 1, 16, 2, 0) + b"%02d" % i
        for i in range(64)
    )
    directory = b"".join(directory[i : i + 26].ljust(32, b"\0") for i in range(0, 64 * 26, 26))
    end = -(-len(layout.data) // 512) * 512
    layout.put(layout.extension, "IIQQ", 64, 0, len(directory), end)
    path.write_bytes(layout.data.ljust(end, b"\0") + directory)
    with path.open("r+b") as file:
        file.truncate(1 << 31)
    with pytest.raises(StoreError, match="tables of the bitmaps"):
        entries(path)


def test_what_a_foreign_program_left_is_not_believed(tmp_path: Path, original: bytes) -> None:
    path, layout = tmp_path / "image", Layout(original)
    layout.put(88, "Q", 0)
    layout.put(layout.a + 17, "B", 0)  # a table for it could not be made
    layout.put(layout.b, "Q", layout.l1)
    layout.put(layout.b + 8, "I", 2**32 - 1)
    path.write_bytes(layout.data)
    assert [each.name for each in entries(path)] == ["b", "c"]
    with Opened(path) as image:
        assert list(image.loaded) == ["b", "c"]
        image.records.clear()
    assert check(path, "-r", "leaks") == FINE
    qemu_io(path, "read -P 0xcd 0 100k")


# ---- any bytes --------------------------------------------------------------


def refused(path: Path, look: Callable[[Path], T]) -> tuple[T | None, Path | None]:
    """What it gives, or the path if there is an error that names it."""
    try:
        return look(path), None
    except StoreError as error:
        return None, path if str(path) in str(error) else None


@settings(max_examples=settings.default.max_examples * 4)  # type: ignore[union-attr, unused-ignore]
@given(data=st.data())
def test_any_bytes_changed(
    tmp_path_factory: pytest.TempPathFactory, original: bytes, data: st.DataObject
) -> None:
    layout = Layout(original)
    places = [
        *range(0, 176),
        *range(layout.extension - 8, layout.extension + 32),
        *range(layout.directory, layout.directory + 96),
        *range(layout.table(layout.a), layout.table(layout.a) + 16),
        *range(layout.refcount_table, layout.refcount_table + 16),
        *range(layout.snapshots, layout.snapshots + 64),
        *range(layout.l1, layout.l1 + 32),
    ]
    changes = data.draw(
        st.lists(
            st.tuples(st.sampled_from(places), st.sampled_from([0, 1, 2, 3, 127, 128, 254, 255])),
            min_size=1,
            max_size=6,
        )
    )
    for place, value in changes:
        layout.data[place] = value
    path = tmp_path_factory.mktemp("any") / "image"
    path.write_bytes(layout.data)
    for look in (entries, loaded):
        assert refused(path, look)[1] in (None, path)
        assert path.read_bytes() == layout.data
    image, named = refused(path, Opened)
    if image is None:
        assert named == path
        assert path.read_bytes() == layout.data
        return
    # It can be used then.
    try:
        image.volume.check_new("new", 65536, image.volume.names)
        content = image.add("new", 65536)
        content.set(0, min(1, image.volume.size))
        image.commit()
        image.change(Purpose.CLOSE)
    except UnsupportedError:  # of another version now, or with a disk too large for that bitmap
        return
    finally:
        image.volume.close()
    assert loaded(path)["new"] == (content.count(), content.sha256())


# ---- what is deleted, renamed or replaced while it is open -------------------------------------


def _delete(path: Path) -> None:
    path.unlink()


def _replace(path: Path) -> None:
    copy = path.with_suffix(".copy")
    copy.write_bytes(path.read_bytes())
    copy.rename(path)


@pytest.mark.parametrize("action", ["flush", "close"])
@pytest.mark.parametrize("how", [_delete, _replace])
def test_an_image_that_is_gone_is_not_stored_to(
    tmp_path: Path, how: Callable[[Path], None], action: str
) -> None:
    path = create(tmp_path / "image", SIZE)
    graph = BlockGraph()
    node = graph.add_node("n", None, Qcow2Store(path))
    node.add_bitmap("b", persistent=True)
    node.mark_dirty(0, 1)
    how(path)
    for _ in range(2):
        with pytest.raises(StoreError, match="was deleted, or replaced by another file"):
            getattr(graph, action)()
    node.mark_dirty(0, 1)
    node.close(discard=True)
    if path.exists():
        with BlockGraph() as graph:
            assert graph.add_node("n", None, Qcow2Store(path)).bitmaps["b"].inconsistent


def test_an_image_without_bitmaps_may_go(tmp_path: Path) -> None:
    path = create(tmp_path / "image", SIZE)
    with BlockGraph() as graph:
        graph.add_node("n", None, Qcow2Store(path)).add_bitmap("b")
        path.unlink()


def test_an_image_that_is_renamed_is_stored_to(tmp_path: Path) -> None:
    """As by QEMU: it is the same image."""
    path = create(tmp_path / "image", SIZE)
    with BlockGraph() as graph:
        node = graph.add_node("n", None, Qcow2Store(path))
        node.add_bitmap("b", persistent=True)
        node.mark_dirty(0, 1)
        path.rename(tmp_path / "renamed")
    assert check(tmp_path / "renamed") == FINE
    with BlockGraph() as graph:
        bitmap = graph.add_node("n", None, Qcow2Store(tmp_path / "renamed")).bitmaps["b"]
        assert list(bitmap.areas()) == [(0, 65536)]


def test_an_image_that_had_no_name_is_stored_to(tmp_path: Path) -> None:
    """As one that is handed over as a descriptor."""
    path = create(tmp_path / "image", SIZE)
    with open(path, "r+b") as file:
        path.unlink()
        for count in (0, 65536):
            with BlockGraph() as graph:
                node = graph.add_node("n", None, Qcow2Store(f"/proc/self/fd/{file.fileno()}"))
                if not count:
                    node.add_bitmap("b", persistent=True)
                assert node.bitmaps["b"].count() == count
                node.mark_dirty(0, 1)
