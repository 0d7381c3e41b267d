# SPDX-License-Identifier: MIT
"""Qcow2Store: what it stores and when, what it lists, what it refuses, and whom it keeps off."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from images import (
    FINE,
    MIB,
    Opened,
    Unsynced,
    asked,
    check,
    create,
    entries,
    listed,
    loaded,
    qemu,
    qemu_img,
)
from namespaces import run_as_first
from peers import peer

from pybitmap import (
    CorruptError,
    LockedError,
    MismatchError,
    StoreError,
    UnsupportedError,
)
from pybitmap.store import Purpose, Qcow2Store, Record, StoredBitmap
from pybitmap.store.qcow2.bitmaps import EXTRA_COMPATIBLE
from pybitmap.store.qcow2.image import Image
from pybitmap.store.qcow2.refcounts import Refcounts


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return create(tmp_path / "image", 3 * MIB)


def patch(path: Path, offset: int, data: bytes | bytearray) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def extension(path: Path) -> int:
    """Where the data of the bitmaps extension are."""
    return path.read_bytes().index(bytes.fromhex("23852875 00000018"), 0, 65536) + 8


def directory(path: Path) -> int:
    return int(struct.unpack_from(">Q", path.read_bytes(), extension(path) + 16)[0])


# ---- what is stored ---------------------------------------------------------


def test_bitmaps_come_back_as_they_were(path: Path) -> None:
    with Opened(path) as image:
        image.add("a", 512).set(0, 1000)
        image.add("disabled", 65536, enabled=False).set(MIB, 1)
        image.add("ü" * 511 + "x", 4096)
    with Opened(path) as image:
        # The newest is first, as with QEMU.
        assert list(image.loaded) == ["ü" * 511 + "x", "disabled", "a"]
        assert [each.enabled for each in image.loaded.values()] == [True, False, True]
        assert [each.granularity for each in image.loaded.values()] == [4096, 65536, 512]
        assert list(image.bitmaps["a"].areas()) == [(0, 1024)]
        assert list(image.bitmaps["disabled"].areas()) == [(MIB, 65536)]
        assert image.volume.filename == str(path)
        assert image.volume.driver == "qcow2"
        assert image.volume.default_granularity == 65536


@pytest.mark.parametrize(("cluster_size", "granularity"), [(512, 4096), (MIB, 65536), (8192, 8192)])
def test_the_default_granularity_is_the_cluster_size_within_limits(
    tmp_path: Path, cluster_size: int, granularity: int
) -> None:
    path = create(tmp_path / "image", cluster_size=cluster_size)
    with Opened(path) as image:
        assert image.volume.default_granularity == granularity


def test_while_it_is_open_everything_is_in_use(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    with Opened(path) as image:
        image.add("a").set(0, 5000)
    image = Opened(path)
    copy.write_bytes(path.read_bytes())
    assert loaded(copy) == asked(copy) == {"a": "inconsistent"}
    image.add("b")
    image.commit()
    copy.write_bytes(path.read_bytes())
    assert loaded(copy) == asked(copy) == {"a": "inconsistent", "b": "inconsistent"}
    image.flush()
    copy.write_bytes(path.read_bytes())
    assert loaded(copy) == {"a": "inconsistent", "b": "inconsistent"}
    assert check(copy) == FINE
    image.close()
    assert set(loaded(path)) == {"a", "b"}
    assert "inconsistent" not in loaded(path).values()


def test_inconsistent_bitmaps_stay_until_they_are_removed(path: Path) -> None:
    with Opened(path) as image:
        image.add("a").set(0, 5000)
        image.add("b").set(0, 5000)
    Opened(path).volume.close()  # as a process that dies
    for _ in range(2):
        with Opened(path) as image:
            each = image.loaded["a"]
            assert each.content is None
            assert each.enabled
            assert each.reason is not None
            assert "in use" in each.reason
            with suppress(KeyError):
                image.bitmaps["c"].set(0, 1)
            if "c" not in image.loaded:
                image.add("c")
    with Opened(path) as image:
        image.remove("a")
    assert [name for name, *_ in listed(path)] == ["b", "c"]
    assert check(path) == FINE


def test_a_successor_is_stored_with_its_bitmap(path: Path) -> None:
    with Opened(path) as image:
        content = image.add("a")
        content.set(0, 512)
        successor = image.volume.make(512)
        successor.set(4096, 512)
        image.records = [replace(image.records[0], successor=successor)]
    with Opened(path) as image:
        assert list(image.bitmaps["a"].areas()) == [(0, 512), (4096, 512)]


def test_a_commit_writes_when_bitmaps_come_and_go_only(path: Path) -> None:
    with Opened(path) as image:
        image.add("a")
        image.commit()
        before = path.read_bytes()
        image.bitmaps["a"].set(0, MIB)
        image.commit()
        other = image.volume.make(512)  # as a transaction that clears
        image.records = [replace(image.records[0], content=other, enabled=False)]
        image.commit()
        assert path.read_bytes() == before


def test_a_flush_writes_the_clusters_that_changed(tmp_path: Path) -> None:
    path = create(tmp_path / "image", 64 * MIB, cluster_size=512)
    written: list[int] = []

    class Counting(Unsynced):
        def _pwritev(self, pieces: list[memoryview], offset: int) -> int:  # type: ignore[override]
            written.append(sum(map(len, pieces)))
            return super()._pwritev(pieces, offset)

    with Opened(path, open_file=Counting) as image:
        content = image.add("a")
        for start in range(0, content.size, 4096):
            content.set(start, 512)
        image.flush()
        assert sum(written) > content.size // 512 // 8
        written.clear()
        image.flush()
        assert not written
        content.set(0, 4096)
        image.flush()
        # A cluster of data, the table of 32 clusters, a directory, refcounts, the header.
        table = content.size // 512 // 8 // 512 * 8
        assert sum(written) < 512 + table + 16 * 512


def test_a_name_that_comes_again_is_another_bitmap(path: Path) -> None:
    with Opened(path) as image:
        image.add("a", 512).set(0, MIB)
        image.flush()
        image.remove("a")
        image.add("a", 4096).set(0, 1)
        image.commit()
    assert listed(path) == [("a", 4096, ["auto"])]
    with Opened(path) as image:
        assert list(image.bitmaps["a"].areas()) == [(0, 4096)]
    assert check(path) == FINE


def test_without_a_stored_one_a_record_without_content_is_nothing(path: Path) -> None:
    with Opened(path) as image:
        image.add("a")
        image.records.append(Record("ghost", 0, False, None))
    assert list(loaded(path)) == ["a"]


def test_adding_and_removing_uses_clusters_again(path: Path) -> None:
    sizes = []
    for _ in range(4):
        with Opened(path) as image:
            image.add("a").set(1, 100_000)
        with Opened(path) as image:
            image.records.clear()
        sizes.append(path.stat().st_size)
    assert sizes[1:] == sizes[:1] * 3
    assert check(path) == FINE


def test_a_long_store_and_load_tell_how_far_they_are(tmp_path: Path) -> None:
    path = create(tmp_path / "image", 1 << 36)
    told: list[tuple[str, int, int | None]] = []
    image = Opened(path)
    image.store.progress = lambda *each: told.append(each)
    content = image.add("a")
    content.set(1 << 30, 1 << 30)
    image.close()
    assert len(told) >= 2
    assert told == [("store a", done, 1 << 24) for _, done, _ in told]
    assert sorted(told, key=lambda each: each[1]) == told
    assert told[-1][1] == 1 << 24


def test_many_bitmaps(path: Path) -> None:
    with Opened(path) as image:
        for i in range(300):
            image.add(f"bitmap {i:0200}", 65536).set(i * 512, 1)
    with Opened(path) as image:
        image.records = image.records[::2]
        assert len(image.records) == 150
        image.commit()
    assert len(listed(path)) == 150
    assert check(path) == FINE
    assert asked(path) == loaded(path)


# ---- listing ----------------------------------------------------------------


def test_entries_lists_without_reading_bits(path: Path) -> None:
    with Opened(path) as image:
        image.add("a", 512).set(0, 600)
        image.add("b", 65536, enabled=False)
    assert entries(path) == [
        StoredBitmap("b", 65536, False, in_use=False, reason=None),
        StoredBitmap("a", 512, True, in_use=False, reason=None),
    ]
    Opened(path).volume.close()
    b, a = entries(path)
    assert a.in_use
    assert b.in_use
    assert a.reason is not None


def test_entries_of_an_image_without_bitmaps(path: Path) -> None:
    assert entries(path) == []


# ---- entries that are not as usual ------------------------------------------


def with_extra(path: Path, flags: int) -> bytes:
    """Give the only bitmap extra data; returns them."""
    with Opened(path) as image:
        image.add("a").set(0, 5000)
    start, extra = directory(path), b"extra data!"
    entry = bytearray(path.read_bytes()[start : start + 25])
    struct.pack_into(">I", entry, 20, len(extra))
    struct.pack_into(">I", entry, 12, struct.unpack_from(">I", entry, 12)[0] | flags)
    entry[24:] = extra + b"a"
    patch(path, start, entry.ljust(40, b"\0"))
    patch(path, extension(path) + 8, struct.pack(">Q", 40))
    return extra


def test_extra_data_that_may_be_ignored_is_kept(path: Path) -> None:
    """QEMU refuses the image."""
    extra = with_extra(path, EXTRA_COMPATIBLE)
    with Opened(path) as image:
        assert list(image.bitmaps["a"].areas()) == [(0, 5120)]
        image.bitmaps["a"].set(8192, 1)
        image.add("b")
    with Opened(path) as image:
        assert list(image.bitmaps["a"].areas()) == [(0, 5120), (8192, 512)]
    start = directory(path)
    entry = path.read_bytes()[start : start + 40]
    assert entry[24:36] == extra + b"a"
    assert struct.unpack_from(">I", entry, 12)[0] & EXTRA_COMPATIBLE


def test_extra_data_that_must_be_known_make_the_one_bitmap_unusable(path: Path) -> None:
    """QEMU refuses the image."""
    extra = with_extra(path, 0)
    for _ in range(2):
        with Opened(path) as image:
            each = image.loaded["a"]
            assert each.content is None
            assert each.reason is not None
            assert "extra data" in each.reason
            if "b" not in image.loaded:
                image.add("b").set(0, 1)
    assert loaded(path)["b"] == (512, loaded(path)["b"][1])
    assert extra + b"a" in path.read_bytes()[directory(path) :][:40]
    with Opened(path) as image:
        image.remove("a")
    assert check(path) == FINE
    assert list(asked(path)) == ["b"]


def test_a_program_without_bitmaps_makes_them_inconsistent(path: Path) -> None:
    """QEMU drops them; here they are shown, with the reason, and can be removed."""
    with Opened(path) as image:
        image.add("a").set(0, 5000)
    patch(path, 88, bytes(8))
    (entry,) = entries(path)
    assert entry.reason is not None
    assert "does not know bitmaps" in entry.reason
    assert asked(path) == {}
    with Opened(path) as image:
        assert image.loaded["a"].content is None
        image.add("b")
    assert asked(path) == loaded(path)
    assert loaded(path)["a"] == "inconsistent"
    assert check(path, "-r", "leaks") == FINE  # nothing of it was believed, so it leaks
    with Opened(path) as image:
        image.remove("a")
    assert check(path) == FINE
    assert list(asked(path)) == ["b"]


def test_a_directory_that_a_program_without_bitmaps_has_reused_is_dropped(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Opened(path) as image:
        image.add("a").set(0, 5000)
    patch(path, directory(path), b"guest data" * 20)
    patch(path, 88, bytes(8))
    with Opened(path) as image:
        assert not image.loaded
        image.add("b")
    assert "lost" in caplog.text
    assert list(asked(path)) == ["b"]


def test_unknown_autoclear_features_are_cleared_before_the_first_write(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB, data_file=tmp_path / "data", data_file_raw="on")
    first: list[int] = []

    class Watching(Unsynced):
        def _pwritev(self, pieces: list[memoryview], offset: int) -> int:  # type: ignore[override]
            if not first:
                assert offset == 0
                first.append(int.from_bytes(pieces[0][88:96], "big"))
            return super()._pwritev(pieces, offset)

    patch(path, 88, struct.pack(">Q", 2 | 1 << 40))
    with Opened(path, read_only=True):
        pass
    with Opened(path, open_file=Watching) as image:
        image.add("a")
    assert first == [2]
    assert path.read_bytes()[88:96] == struct.pack(">Q", 3)


# ---- refusals ---------------------------------------------------------------


def test_version_2_has_no_bitmaps_and_gets_none(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB, compat="0.10")
    with Opened(path, read_only=True) as image:
        assert not image.loaded
    before = path.read_bytes()
    with Opened(path) as image:
        assert not image.loaded
        image.commit()
        with pytest.raises(UnsupportedError) as caught:
            image.volume.check_new("b", 512, [])
    assert isinstance(caught.value, StoreError)
    assert str(caught.value) == (
        "Can't make bitmap 'b' persistent in 'n': Cannot store dirty bitmaps in qcow2 v2 files"
    )
    with pytest.raises(
        UnsupportedError, match=r"image: .* version 2, which has no bitmaps; .*amend"
    ):
        Qcow2Store.probe(path)
    assert path.read_bytes() == before


def test_an_image_is_known_by_its_first_bytes(path: Path, tmp_path: Path) -> None:
    assert Qcow2Store.probe(path)
    with Opened(path):
        assert Qcow2Store.probe(str(path))
    (tmp_path / "short").write_bytes(b"QFI")
    (tmp_path / "empty").touch()
    (tmp_path / "raw").write_bytes(bytes(512))
    os.mkfifo(tmp_path / "fifo")
    for other in ("short", "empty", "raw", "fifo", "."):
        assert not Qcow2Store.probe(tmp_path / other)
    with pytest.raises(FileNotFoundError):
        Qcow2Store.probe(tmp_path / "missing")
    patch(path, 20, b"\0\0\0\x16")  # which opening it refuses
    assert Qcow2Store.probe(path)


@pytest.mark.parametrize(
    ("offset", "data", "error", "text", "reading"),
    [
        (0, b"QFI\0", CorruptError, "not a qcow2 image", True),
        (4, b"\0\0\0\4", UnsupportedError, "version 4", True),
        (20, b"\0\0\0\x16", UnsupportedError, "2\\*\\*22", True),
        (20, b"\0\0\0\x08", UnsupportedError, "2\\*\\*8", True),
        (24, b"\xff" * 8, CorruptError, "bytes", True),
        (32, b"\0\0\0\2", CorruptError, "encrypted by LUKS", True),
        (32, b"\0\0\0\3", UnsupportedError, "encrypted by method 3", True),
        (72, b"\0\0\0\0\0\0\0\1", StoreError, "qemu-img check -r all", False),
        (72, b"\0\0\0\0\0\0\0\2", CorruptError, "marked as corrupt", True),
        (72, b"\0\0\0\0\0\0\0\x20", UnsupportedError, "incompatible feature bit 5", True),
        (88, b"\0\0\0\0\0\0\0\1", CorruptError, "no such extension", True),
        (96, b"\0\0\0\7", CorruptError, "refcounts", True),
        (100, b"\0\0\0\x65", CorruptError, "header", True),
        (100, b"\xff\0\0\0", CorruptError, "header", True),
    ],
)
def test_what_we_must_not_touch_is_refused_by_name(
    path: Path, offset: int, data: bytes, error: type[Exception], text: str, reading: bool
) -> None:
    patch(path, offset, data)
    before = path.read_bytes()
    for read_only in (False, True):
        if reading or not read_only:
            with pytest.raises(error, match=text) as caught:
                Opened(path, read_only=read_only)
            assert str(path) in str(caught.value)
        else:
            Opened(path, read_only=read_only).volume.close()
    assert path.read_bytes() == before


def test_an_unknown_feature_is_called_as_the_image_calls_it(path: Path) -> None:
    data = path.read_bytes()
    table = data.index(bytes.fromhex("6803f857")) + 8
    patch(path, table, bytes([0, 60]) + b"time travel".ljust(46, b"\0"))
    patch(path, 72, (1 << 60).to_bytes(8, "big"))
    with pytest.raises(UnsupportedError, match="'time travel'"):
        Opened(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(StoreError, match="missing") as caught:
        Opened(tmp_path / "missing")
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(StoreError):
        Opened(tmp_path)
    with pytest.raises(StoreError, match="neither a file"):
        Opened(tmp_path / "fifo")
    with pytest.raises(CorruptError, match="not a qcow2 image"):
        Opened(tmp_path / "empty")


def test_the_size_of_a_node_is_the_disks(path: Path) -> None:
    store = Qcow2Store(path)
    with pytest.raises(MismatchError, match="3145728"):
        store.open("n", 512, read_only=False)
    volume = store.open("n", 3 * MIB, read_only=False)
    volume.close()
    volume.close()
    with Opened(path) as image:
        image.add("a")
        wanted = {volume: replace(each, size=MIB) for volume, each in image.wanted().items()}
        with pytest.raises(UnsupportedError, match="resize") as caught:
            image.store.prepare(wanted, Purpose.COMMIT)
        assert caught.value.errno == errno.ENOTSUP


def test_reading_writes_nothing(path: Path) -> None:
    with Opened(path) as image:
        image.add("a")
    before = path.read_bytes()
    path.chmod(0o400)
    with Opened(path, read_only=True) as image:
        image.change(Purpose.CLOSE)
        image.remove("a")
        with pytest.raises(StoreError) as caught:
            image.commit()
        assert caught.value.errno == errno.EROFS
    assert path.read_bytes() == before


def test_no_room_in_the_header_is_an_error_and_nothing_changes(tmp_path: Path) -> None:
    path = create(tmp_path / "image", MIB, cluster_size=512)
    filler = struct.pack(">II", 0x12345678, 376) + bytes(376)
    patch(path, 112, filler + bytes(8))
    before = path.read_bytes()
    with Opened(path) as image:
        image.add("a")
        with pytest.raises(StoreError, match="no room") as caught:
            image.commit()
        assert caught.value.errno == errno.ENOSPC
        image.records.clear()
    assert path.read_bytes()[:512] == before[:512]
    assert check(path) == FINE


# ---- limits, in QEMU's words ------------------------------------------------


def refusal(path: Path, name: str, granularity: int, names: list[str]) -> str | None:
    with Opened(path, read_only=True) as image:
        try:
            image.volume.check_new(name, granularity, names)
        except UnsupportedError as error:
            said = str(error)
        else:
            return None
    start, _, why = said.partition(": ")
    assert start == f"Can't make bitmap '{name}' persistent in 'n'"
    return why


def test_limits_of_granularity_and_name(path: Path) -> None:
    assert refusal(path, "a", 1 << 31, []) is None
    assert refusal(path, "a", 512, []) is None
    text = "Granularity exceeds maximum (2147483648 bytes)"
    assert refusal(path, "a", 1 << 32, []) == text
    assert refusal(path, "a", 256, []) == "Granularity is under minimum (512 bytes)"
    assert refusal(path, "x" * 1023, 512, []) is None
    text = "Name length exceeds maximum (1023 characters)"
    assert refusal(path, "x" * 1024, 512, []) == text


def test_limits_of_the_directory(path: Path) -> None:
    names = [str(i) for i in range(65535)]
    assert refusal(path, "a", 512, names[:-1]) is None
    text = "Maximum number of persistent bitmaps is already reached"
    assert refusal(path, "a", 512, names) == text
    # Entries of 1048 bytes, in a directory of 65535 * 1024.
    long = [f"{i:01023}" for i in range(65535 * 1024 // 1048)]
    assert refusal(path, "x" * 1023, 512, long[:-1]) is None
    text = "Not enough space in the bitmap directory"
    assert refusal(path, "x" * 1023, 512, long) == text


def test_the_largest_bitmap_is_qemus(tmp_path: Path) -> None:
    most = 512 * MIB * 8 * 512  # the bits of 512 MiB, of 512 bytes each
    text = "Too much space will be occupied by the bitmap. Use larger granularity"
    for size, fits in [(most, True), (most + 512, False)]:
        path = create(tmp_path / f"{size}", size)
        assert refusal(path, "b", 512, []) == (None if fits else text)
        done = subprocess.run(
            [peer("qemu-img", "qemu-utils"), "bitmap", "--add", "-g", "512", path, "b"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode == 0) == fits
        assert (text in done.stderr) == (not fits)


# ---- locks ------------------------------------------------------------------


def locks_on(path: Path) -> Iterator[int]:
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if fields[1] == "OFDLCK" and fields[5].endswith(f":{path.stat().st_ino}"):
            yield from range(int(fields[6]), int(fields[7]) + 1)


@pytest.mark.parametrize("read_only", [True, False])
def test_our_locks_are_qemus(path: Path, read_only: bool) -> None:
    with qemu(path, read_only=read_only):
        theirs = sorted(locks_on(path))
    with Opened(path, read_only=read_only):
        assert sorted(locks_on(path)) == theirs
    assert not list(locks_on(path))


def test_an_image_that_qemu_writes_is_refused(path: Path) -> None:
    with qemu(path, read_only=False):
        for read_only in (True, False):
            with pytest.raises(LockedError, match=str(path)):
                Opened(path, read_only=read_only)
        with pytest.raises(LockedError, match=str(path)):
            entries(path)
    Opened(path).volume.close()


def test_an_image_that_qemu_reads_can_be_read(path: Path) -> None:
    with qemu(path, read_only=True):
        Opened(path, read_only=True).volume.close()
        with pytest.raises(LockedError, match=str(path)):
            Opened(path)


def test_qemu_refuses_an_image_that_we_have_open(path: Path) -> None:
    def qemu_reads() -> bool:
        done = subprocess.run(
            [peer("qemu-img", "qemu-utils"), "info", path], capture_output=True, check=False
        )
        assert (b"lock" in done.stderr) == bool(done.returncode)
        return not done.returncode

    def qemu_writes() -> bool:
        command = [peer("qemu-img", "qemu-utils"), "bitmap", "--add", str(path), "b"]
        return not subprocess.run(command, capture_output=True, check=False).returncode

    with Opened(path):
        assert not qemu_reads()
        assert not qemu_writes()
    with Opened(path, read_only=True):
        assert qemu_reads()
        assert not qemu_writes()
    assert qemu_writes()


def test_two_stores_keep_off_each_other(path: Path) -> None:
    with Opened(path) as image:
        for read_only in (True, False):
            with pytest.raises(LockedError, match=str(path)):
                Opened(path, read_only=read_only)
        with pytest.raises(LockedError, match="node 'n'"):
            image.store.open("m", None, read_only=True)
    readers = [Opened(path, read_only=True) for _ in range(2)]
    with pytest.raises(LockedError, match=str(path)):
        Opened(path)
    for reader in readers:
        reader.volume.close()
    Opened(path).volume.close()


# ---- refcounts --------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16, 32, 64])
def test_refcounts_against_a_list(tmp_path: Path, width: int) -> None:
    path = create(tmp_path / "image", MIB, cluster_size=512, refcount_bits=width)
    image = Image(Unsynced(str(path), read_only=False), read_only=False)
    refcounts = Refcounts(image)
    known = {cluster for cluster in range(6000) if refcounts.get(cluster)}
    model: set[int] = set()
    taken: list[tuple[int, int]] = []
    for step, count in enumerate([1, 7, 64, 3000, 5, 1, 129, 2000, 31]):
        if step % 3 == 2:
            runs = [(refcounts.allocate_one_run(count), count)]
        else:
            runs = refcounts.allocate(count)
        got = {cluster for first, n in runs for cluster in range(first, first + n)}
        assert len(got) == sum(n for _, n in runs) == count
        assert not got & model
        assert step or not got & known
        model |= got
        taken += runs
        if step % 2:
            freed = taken.pop(step // 2)
            refcounts.free([freed])
            model -= set(range(freed[0], sum(freed)))
        refcounts.commit()
    assert all(refcounts.get(cluster) == 1 for cluster in model)
    image.file.close()
    image = Image(Unsynced(str(path), read_only=False), read_only=False)
    again = Refcounts(image)
    # Beside those in the model there are the refcounts' own.
    known = {cluster for cluster in range(9000) if again.get(cluster)}
    assert model <= known
    assert again.get(10**9) == 0
    image.file.close()
    qemu_img("check", "-q", "-r", "leaks", path)
    assert check(path) == FINE


def test_larger_refcounts_stay(tmp_path: Path) -> None:
    path = create(tmp_path / "image", 8 * MIB, cluster_size=512)
    subprocess.run(
        [peer("qemu-io", "qemu-utils"), "-c", "write 0 2M", path], check=True, capture_output=True
    )
    for i in range(3):
        qemu_img("snapshot", "-c", str(i), path)
    with Opened(path) as image:
        image.add("a").set(0, MIB)
    assert check(path) == FINE


def test_python_starts_without_the_stores() -> None:
    code = "import sys, pybitmap.store; print('pybitmap.store.qcow2' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_child_that_has_its_parent_s_number_leaves_its_image_alone(tmp_path: Path) -> None:
    """The first of a PID namespace, as its parent is: it reads nothing, and does not unlock."""
    path = create(tmp_path / "image", MIB)
    code = f"""
from pybitmap import LockedError
from pybitmap.store.qcow2.file import File
file = File({str(path)!r}, read_only=False)

def child():
    try:
        return file.read(0, 4)
    finally:
        file.close()

print(same(child))
try:
    File({str(path)!r}, read_only=False)
except LockedError:
    print("locked")
"""
    refusal, locked = run_as_first(code).splitlines()
    assert refusal.startswith("StoreError")
    assert "cannot be used on both sides of a fork" in refusal
    assert locked == "locked"
