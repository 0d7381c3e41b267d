# SPDX-License-Identifier: MIT
"""pybitmap rescue: QEMU opens the image again, what was whole is kept, nothing else is touched.

QEMU judges: `qemu-img info`, `check`, `bitmap`, `qemu-io`, and qemu-storage-daemon for what is in
the bitmaps.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shlex
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Callable

import pytest
from commands import Run
from damage import BROKEN, OF_BITMAPS, OTHERS, Damage, Layout, undamaged
from hypothesis import given
from hypothesis import strategies as st
from images import (
    FINE,
    LEAKS,
    MIB,
    UTILS,
    Opened,
    Unsynced,
    asked,
    check,
    create,
    loaded,
    qemu,
    qemu_img,
    qemu_io,
)
from peers import peer
from qcow2_crash import Recorder, crashes
from qcow2_faults import Disk

from pybitmap import BitmapError, CorruptError, StoreError, _core
from pybitmap.errors import ExistsError, InvalidError, LockedError, UnsupportedError
from pybitmap.store.qcow2 import rescue as rescue_module
from pybitmap.store.qcow2.file import File
from pybitmap.store.qcow2.image import Image
from pybitmap.store.qcow2.rescue import Outcome, Report, rescue

SECTOR = 512


def rescued(path: Path, **options: Any) -> Report:
    """Without real syncs, which would be most of the time."""
    return rescue(path, **{"open_file": Unsynced, **options})


def mends(path: Path) -> None:
    """What QEMU leaks behind the end of a file it sees when the file is longer."""
    assert check(path) in (FINE, LEAKS)
    for _ in range(3):
        if check(path, "-r", "leaks") == check(path) == FINE:
            return
    raise AssertionError("it leaks")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return undamaged(tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory, original: bytes) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("truth") / "image"
    path.write_bytes(original)
    return asked(path)


# ---- every damage -----------------------------------------------------------


def entry(at: Layout, *, flags: int, name: bytes, extra: bytes) -> None:
    """Let that of b have extra data."""
    at.put(at.b + 12, "IBBHI", flags, 1, 9, len(name), len(extra))
    at.data[at.b + 24 : at.b + 32] = (extra + name).ljust(8, b"\0")


def guest_cluster(at: Layout) -> int:
    """The offset of a cluster with data of the disk."""
    l2 = at.u64(at.l1) & 2**56 - 512
    return at.u64(l2) & 2**56 - 512


def free_cluster(at: Layout) -> int:
    """The offset of a cluster in the file that is free, as far as refcounts say."""
    at.data += bytes(-len(at.data) % 512 + 512)
    cluster = len(at.data) // 512 - 1
    block = at.u64(at.refcount_table + cluster // 256 * 8)
    assert not struct.unpack_from(">H", at.data, block + cluster % 256 * 2)[0]
    return cluster * 512


def overwrite(at: Layout, offset: int, nbytes: int, value: int) -> None:
    at.data[offset : offset + nbytes] = bytes([value]) * nbytes


def relocate(at: Layout, place: int) -> None:
    at.data[place : place + 96] = at.data[at.directory : at.directory + 96]
    at.put(at.extension + 16, "Q", place)


def cut(at: Layout) -> None:
    """The file ends in the middle of b's entry."""
    end = len(at.data)
    assert at.directory == -(-end // 512) * 512 - 512, "the directory is the last cluster"
    del at.data[at.b + 16 :]


def all_of(*damages: Damage) -> Damage:
    def damage(at: Layout) -> None:
        for each in damages:
            each(at)

    return damage


#: More of it, beside :mod:`damage`.
MORE: dict[str, Damage] = {
    "the extension overwritten with zeroes": lambda at: overwrite(at, at.extension - 8, 32, 0),
    "the extension overwritten with ones": lambda at: overwrite(at, at.extension - 8, 32, 0xFF),
    "what the extension says overwritten with zeroes": lambda at: overwrite(
        at, at.extension, 24, 0
    ),
    "what the extension says overwritten with ones": lambda at: overwrite(
        at, at.extension, 24, 0xFF
    ),
    "an extension of another name": lambda at: at.put(at.extension - 8, "I", 0x12345678),
    "an extension of no bytes": lambda at: at.put(at.extension - 4, "I", 0),
    "an extension of 32 bytes": lambda at: at.put(at.extension - 4, "I", 32),
    "an extension too short that is not to be believed": all_of(
        lambda at: at.put(at.extension - 4, "I", 16), lambda at: at.put(88, "Q", 0)
    ),
    "a directory of zeroes": lambda at: overwrite(at, at.directory, 96, 0),
    "a directory of ones": lambda at: overwrite(at, at.directory, 96, 0xFF),
    "a first entry of zeroes": lambda at: overwrite(at, at.a, 32, 0),
    "a middle entry of zeroes": lambda at: overwrite(at, at.b, 32, 0),
    "a last entry of ones": lambda at: overwrite(at, at.c, 32, 0xFF),
    "no size and a middle entry of zeroes": all_of(
        lambda at: overwrite(at, at.b, 32, 0), lambda at: at.put(at.extension + 8, "Q", 0)
    ),
    "neither size nor number": lambda at: at.put(at.extension, "IIQ", 0, 0, 0),
    "a smaller size": lambda at: at.put(at.extension + 8, "Q", 64),
    "a directory in the disk's data": lambda at: relocate(at, guest_cluster(at)),
    "a directory in a free cluster, and another fault": all_of(
        lambda at: relocate(at, free_cluster(at)), lambda at: at.put(at.extension + 4, "I", 1)
    ),
    "a file that ends in the directory": cut,
    "extra data that may be ignored": lambda at: entry(at, flags=6, name=b"b", extra=b"x"),
    "extra data that may not": lambda at: entry(at, flags=2, name=b"b", extra=b"x"),
    "a flag of extra data, and none": lambda at: at.put(at.b + 12, "I", 6),
    "a table in the disk's data": lambda at: at.put(at.b, "Q", guest_cluster(at)),
    "data in the disk's data": lambda at: at.put(at.table(at.b), "Q", guest_cluster(at)),
    "a table in free clusters, and another fault": all_of(
        lambda at: at.put(at.b, "Q", free_cluster(at)), lambda at: at.put(at.extension + 4, "I", 1)
    ),
    "in use, and of another type": lambda at: at.put(at.b + 12, "IB", 3, 7),
    "in use, and data beyond the file": all_of(
        lambda at: at.put(at.b + 12, "I", 3), lambda at: at.put(at.table(at.b), "Q", 2**40)
    ),
    "a NUL in every name": all_of(
        lambda at: at.put(at.a + 24, "B", 0),
        lambda at: at.put(at.b + 24, "B", 0),
        lambda at: at.put(at.c + 24, "B", 0),
    ),
}

#: What becomes of a, b and c: kept, inconsistent, or no more there. As a rule b is inconsistent.
NOTHING_LEFT = [
    "a directory beyond the file",
    "a directory near 2**64",
    "a directory that is not aligned",
    "a directory in the header",
    "a directory in the L1 table",
    "the extension overwritten with zeroes",
    "the extension overwritten with ones",
    "what the extension says overwritten with zeroes",
    "what the extension says overwritten with ones",
    "an extension too short that is not to be believed",
    "a directory of zeroes",
    "a directory of ones",
    "a directory in the disk's data",
    "a directory in a free cluster, and another fault",
    "a NUL in every name",
]
ALL_KEPT = [
    "no bitmaps",
    "65536 bitmaps",
    "2**32 - 1 bitmaps",
    "more bitmaps than entries",
    "reserved bits in the extension",
    "a directory of 0 bytes",
    "a directory of 2**64 - 1 bytes",
    "a directory of 64 MiB",
    "a directory that is cut",
    "an extension too short",
    "an extension of 2**32 - 1 bytes",
    "an extension of no bytes",
    "an extension of 32 bytes",
    "an extension of another name",
    "the extension twice",
    "extra data that may be ignored",
    "a flag of extra data, and none",
]
EXPECTED = {
    **dict.fromkeys(NOTHING_LEFT, "---"),
    **dict.fromkeys(ALL_KEPT, "kkk"),
    "fewer bitmaps than entries": "kki",
    "a smaller size": "kki",
    "a name of 65535 bytes": "kk-",
    "two of one name": "i-k",
    "one table for two": "iik",
    "one cluster for two": "iik",
    **{name: "ikk" for name in OF_BITMAPS if name.startswith(("data in", "a table in"))},
    "neither size nor number": "iii",
    "a first entry of zeroes": "-kk",
    "a middle entry of zeroes": "k-k",
    "a last entry of ones": "kk-",
    "no size and a middle entry of zeroes": "k-i",
    "a file that ends in the directory": "k--",
    "a name with a NUL": "k-k",
    "a name of nothing": "k-k",
}
#: QEMU opens these, and so do we.
FINE_AS_IT_IS = ["in use"]

DAMAGE: dict[str, Damage] = {
    **OF_BITMAPS,
    **{name: damage for name, (damage, _) in BROKEN.items() if name not in FINE_AS_IT_IS},
    **MORE,
}


def untouched(before: bytes, after: bytes, layout: Layout) -> None:
    """Only the header, refcounts and what was free may be another."""
    blocks = {layout.u64(layout.refcount_table + 8 * i) for i in range(64)} - {0}
    for offset in range(0, len(before), 512):
        piece = before[offset : offset + 512]
        if after.startswith(piece, offset):
            continue
        cluster = offset // 512
        block = layout.u64(layout.refcount_table + cluster // 256 * 8)
        is_free = not block or before[block + cluster % 256 * 2 :][:2] == b"\0\0"
        assert offset == 0 or offset in blocks or is_free, f"cluster {cluster} is another"


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_damaged_is_mended(
    tmp_path: Path, original: bytes, truth: dict[str, Any], name: str
) -> None:
    path, layout = tmp_path / "image", Layout(original)
    DAMAGE[name](layout)
    damaged = bytes(layout.data)
    path.write_bytes(damaged)

    foreseen = rescued(path, dry_run=True)
    assert path.read_bytes() == damaged
    assert list(tmp_path.iterdir()) == [path]
    report = rescued(path)
    assert report.damaged
    assert (report.faults, report.bitmaps) == (foreseen.faults, foreseen.bitmaps)
    assert report.refcounts is None
    after = path.read_bytes()
    untouched(damaged, after, layout)

    outcomes = {"k": Outcome.KEPT, "i": Outcome.INCONSISTENT}
    letters = EXPECTED.get(name, "kik")
    expected = {
        each: truth[each] if letter == "k" else "inconsistent"
        for each, letter in zip("abc", letters)
        if letter != "-"
    }
    assert asked(path) == expected == loaded(path)
    left = [each for each in report.bitmaps if each.outcome is not Outcome.LOST]
    assert [(each.name, each.outcome) for each in left] == [
        (each, outcomes[letter]) for each, letter in zip("abc", letters) if letter != "-"
    ]
    assert report.left == bool(left)
    assert all(each.reason or each.outcome is Outcome.KEPT for each in report.bitmaps)

    # It is the same the second time, and can be undone.
    again = rescued(path)
    assert not again.damaged
    assert again.backup is None
    assert path.read_bytes() == after
    assert report.put_back is not None
    subprocess.run(shlex.split(report.put_back), check=True, capture_output=True)
    assert path.read_bytes()[:512] == damaged[:512]
    path.write_bytes(after)

    mends(path)
    qemu_io(path, "read -P 0xcd 1k 99k", "read -P 0xcd 1M 1", "read -P 0 2M 512")
    for each in expected:
        qemu_img("bitmap", "--remove", path, each)
    qemu_img("bitmap", "--add", path, "new")
    with Opened(path) as image:
        image.add("ours")
    assert asked(path).keys() == {"new", "ours"}
    assert check(path) == FINE


@pytest.mark.parametrize("name", [None, *FINE_AS_IT_IS])
def test_what_can_be_opened_is_not_changed(
    tmp_path: Path, original: bytes, name: str | None, run: Run
) -> None:
    path, layout = tmp_path / "image", Layout(original)
    if name is not None:
        BROKEN[name][0](layout)
    path.write_bytes(layout.data)
    report = rescued(path)
    assert not report.damaged
    assert report.put_back is None
    result = run("rescue", path)
    assert result.code == 0
    assert "needs no rescue" in result.out
    assert path.read_bytes() == layout.data
    assert list(tmp_path.iterdir()) == [path]


def test_an_image_without_bitmaps_and_one_of_version_2_are_not_changed(
    tmp_path: Path, run: Run
) -> None:
    path = create(tmp_path / "image", MIB)
    before = path.read_bytes()
    assert not rescued(path).damaged
    assert path.read_bytes() == before
    path = create(tmp_path / "old", MIB, compat="0.10")
    before = path.read_bytes()
    assert not rescued(path).damaged
    assert path.read_bytes() == before
    result = run("rescue", path)
    assert result.code == 1
    assert "version 2" in result.err


def test_what_programs_drop_is_left_to_them(tmp_path: Path, original: bytes) -> None:
    """Without the autoclear bit nothing is refused because of the bitmaps."""
    for damage in (None, *(OF_BITMAPS[name] for name in ("no bitmaps", "a directory of 0 bytes"))):
        path, layout = tmp_path / "image", Layout(original)
        layout.put(88, "Q", 0)
        if damage is not None:
            damage(layout)
        path.write_bytes(layout.data)
        assert not rescued(path).damaged
        assert path.read_bytes() == layout.data
        assert asked(path) == {}


# ---- not of the bitmaps -----------------------------------------------------


MARKED_CORRUPT: Damage = lambda at: at.put(72, "Q", 2)  # noqa: E731
REFUSED: dict[str, Damage] = {
    **OTHERS,
    "marked as corrupt": MARKED_CORRUPT,
    "not closed": lambda at: at.put(72, "Q", 1),
    "an unknown feature": lambda at: at.put(72, "Q", 1 << 40),
    "encrypted in an unknown way": lambda at: at.put(32, "I", 3),
    "no magic": lambda at: at.put(0, "I", 0),
    "a header of 8 bytes": lambda at: at.put(100, "I", 8),
    "bitmaps in a free cluster": lambda at: at.put(at.u64(at.refcount_table), "256H", *[0] * 256),
}


@pytest.mark.parametrize("damage", REFUSED.values(), ids=REFUSED)
def test_what_is_not_of_the_bitmaps_is_refused(
    tmp_path: Path, original: bytes, damage: Damage, run: Run
) -> None:
    path, layout = tmp_path / "image", Layout(original)
    damage(layout)
    path.write_bytes(layout.data)
    with pytest.raises((CorruptError, UnsupportedError), match=str(path)):
        rescued(path)
    for options in ([], ["--dry-run"]):
        result = run("rescue", path, *options)
        assert result.code == 1
        assert str(path) in result.err
    assert path.read_bytes() == layout.data
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["an L1 table near 2**64", "2**32 - 1 snapshots", "marked"])
def test_it_is_refused_beside_damage_of_the_bitmaps_too(
    tmp_path: Path, original: bytes, name: str
) -> None:
    path, layout = tmp_path / "image", Layout(original)
    OF_BITMAPS["no bitmaps"](layout)
    OTHERS.get(name, MARKED_CORRUPT)(layout)
    path.write_bytes(layout.data)
    with pytest.raises(CorruptError):
        rescued(path)
    assert path.read_bytes() == layout.data


@pytest.mark.parametrize("refcounts", ["no refcounts", "refcounts of zero", "not closed"])
@pytest.mark.parametrize("name", ["no bitmaps", "one table for two", "a directory beyond the file"])
def test_wrong_refcounts_give_nothing_away(
    tmp_path: Path, original: bytes, truth: dict[str, Any], refcounts: str, name: str
) -> None:
    """QEMU cannot mend them while it does not open the image."""
    path, layout = tmp_path / "image", Layout(original)
    OF_BITMAPS[name](layout)
    REFUSED[refcounts](layout)
    path.write_bytes(layout.data)
    report = rescued(path)
    assert report.refcounts is not None
    assert "qemu-img check -r all" in report.refcounts
    after = path.read_bytes()
    assert after[512:] == layout.data[512:], "only the header is another"
    assert check(path, "-r", "all") == FINE
    # The directory can stay where it is, or it cannot.
    assert asked(path) == (truth if name == "no bitmaps" else {})
    qemu_io(path, "read -P 0xcd 0 100k")
    mends(path)


def test_a_free_cluster_that_the_disk_uses_is_not_written_to(
    tmp_path: Path, original: bytes
) -> None:
    """Only the L2 tables say that it is in use."""
    path, layout = tmp_path / "image", Layout(original)
    OF_BITMAPS["one table for two"](layout)
    block = layout.u64(layout.refcount_table)
    for cluster in range(256):
        (refcount,) = struct.unpack_from(">H", layout.data, block + 2 * cluster)
        layout.put(block + 2 * cluster, "H", max(refcount, 1))
    layout.put(block + guest_cluster(layout) // 512 * 2, "H", 0)
    path.write_bytes(layout.data)
    report = rescued(path)
    assert report.refcounts is not None
    assert not report.left
    assert path.read_bytes()[512:] == layout.data[512:]
    assert check(path, "-r", "all") == FINE
    qemu_io(path, "read -P 0xcd 0 100k")


def test_no_refcount_block_goes_over_what_the_disk_uses(tmp_path: Path) -> None:
    """A block is missing, and with it what says that the clusters behind the last one are used."""
    path = create(tmp_path / "image", 8 * MIB, cluster_size=4096, refcount_bits=64)
    with Opened(path) as image:
        image.add("b").set(0, 1)
    # The L2 tables first, so that there are only data, and a refcount block, at the end.
    qemu_io(path, *(f"write {offset}M 4k" for offset in (0, 2, 4, 6)), "write 0 8M")
    data = bytearray(path.read_bytes())
    (table,) = struct.unpack_from(">Q", data, 48)
    struct.pack_into(">Q", data, table + 8 * 4, 0)
    # Only a directory is written: a flag of extra data, and none.
    (directory,) = struct.unpack_from(">Q", data, extension(data) + 16)
    struct.pack_into(">I", data, directory + 12, 6)
    path.write_bytes(data)
    report = rescued(path)
    assert report.refcounts is not None
    assert not report.left
    assert path.read_bytes()[512:] == data[512:]
    assert check(path, "-r", "all") == FINE
    qemu_io(path, "read -P 0xcd 0 8M")


# ---- the header -------------------------------------------------------------


def header_of(path: Path) -> list[bytes]:
    """Its extensions, but for that of the bitmaps, and the name of the backing file."""
    data = path.read_bytes()
    name, nbytes, length = (
        *struct.unpack_from(">QI", data, 8),
        *struct.unpack_from(">I", data, 100),
    )
    found = [data[name : name + nbytes]]
    while kind := int.from_bytes(data[length : length + 4], "big"):
        end = length + 8 + -(-int.from_bytes(data[length + 4 : length + 8], "big") // 8) * 8
        if kind != 0x23852875:
            found.append(data[length:end])
        length = end
    return found


#: Where the bitmaps extension stands: the first, or behind others, over the end of a sector or not.
HEADERS: dict[str, dict[str, object]] = {
    "default": {},
    "small": {"cluster_size": 512, "refcount_bits": 64},
    "backing": {"backing_file": "base", "backing_fmt": "qcow2"},
    "backing without format": {"backing_file": "base", "backing_fmt": "raw"},
    "data file": {"data_file": "data"},
    "data file of another name": {"data_file": "a data file of another name"},
    "extended l2": {"extended_l2": "on", "cluster_size": 16384},
    "large": {"cluster_size": 2 * MIB},
}


def extension(data: bytes | bytearray) -> int:
    """Where the data of the bitmaps extension is."""
    return data.index(bytes.fromhex("23852875 00000018")) + 8


@pytest.fixture(params=["qemu's", "ours"])
def made_by(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("kept", [True, False])
def test_one_sector_of_the_header_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kept: bool, made_by: str
) -> None:
    monkeypatch.chdir(tmp_path)
    backing = str(HEADERS[name].get("backing_fmt", "qcow2"))
    qemu_img("create", "-q", "-f", backing, "base", "8M")
    path = create(tmp_path / "image", "8M", **HEADERS[name])
    try:
        qemu_img("bitmap", "--add", path, "b")
    except AssertionError:
        assert name == "small", "no room for it"
        pytest.skip("QEMU's order has no room in a header of 512 bytes")
    qemu_io(path, "write 1M 1M", "write -z 3M 1M")
    compressed = "data" not in name and name != "large"
    if compressed:
        qemu_io(path, "write -c -P 2 4M 128k")
    if made_by == "ours":
        with Opened(path) as image:
            image.bitmaps["b"].set(5 * MIB, 1)
    truth, others = asked(path), header_of(path)
    data = bytearray(path.read_bytes())
    # The reserved field; or the directory is nowhere.
    struct.pack_into(">II", data, extension(data), 1, 1)
    if not kept:
        struct.pack_into(">Q", data, extension(data) + 16, 1 << 40)
    path.write_bytes(data)

    recorder = Recorder()
    report = rescue(path, open_file=recorder)
    writes = [
        (offset, piece)
        for epoch in recorder.take()
        for offset, piece in epoch
        if offset < min(4096, 1 << int.from_bytes(data[20:24], "big"))
    ]
    # Two are one after the other, with a sync between: first the autoclear bit, then the extension.
    assert all(len(piece) == SECTOR for _, piece in writes)
    assert [offset for offset, _ in writes] in ([[0], [512]] if kept else [[0], [0, 512]])
    assert report.left == kept
    assert asked(path) == loaded(path) == (truth if kept else {})
    assert header_of(path) == others
    mends(path)
    qemu_io(path, "read -P 0xcd 1M 1M", "read -P 0 3M 1M")
    if compressed:
        qemu_io(path, "read -P 2 4M 128k")


@pytest.mark.parametrize("behind", [b"", bytes.fromhex("12345678 00000005") + b"other" + bytes(3)])
@pytest.mark.parametrize("kept", [True, False])
def test_an_extension_may_stand_anywhere(tmp_path: Path, behind: bytes, kept: bool) -> None:
    """Also over the end of a sector, and with others, that nobody knows, on both sides."""
    path = create(tmp_path / "image", MIB, cluster_size=4096)
    qemu_img("bitmap", "--add", path, "b")
    truth, data = asked(path), bytearray(path.read_bytes())
    place = extension(data)
    mine = struct.pack(">IIIIQQ", 0x23852875, 24, 1, 1, *struct.unpack_from(">QQ", data, place + 8))
    if not kept:
        mine = mine[:24] + (1 << 40).to_bytes(8, "big")
    for start in range(472, 528, 8):
        nbytes = start - 112 - 8
        before = struct.pack(">II", 0x87654321, nbytes) + bytes(range(1, 9)) * (nbytes // 8)
        chain = before + mine + behind + bytes(8)
        data[112:4096] = chain.ljust(4096 - 112, b"\0")
        path.write_bytes(data)
        others = header_of(path)
        assert len(others) == (3 if behind else 2)
        recorder = Recorder()
        assert rescue(path, open_file=recorder).left == kept
        writes = [each for epoch in recorder.take() for each in epoch if each[0] < 4096]
        # More than one sector at once only where others have to move up.
        if kept or not behind:
            assert all(len(piece) == SECTOR for _, piece in writes)
        assert header_of(path) == others
        assert asked(path) == loaded(path) == (truth if kept else {})


def test_clusters_of_snapshots_and_compressed_ones_are_the_disks(tmp_path: Path) -> None:
    """A bitmap that has one of them is inconsistent, wherever in the compressed data it is."""
    path = create(tmp_path / "image", 8 * MIB, cluster_size=4096)
    qemu_io(path, "write -P 1 0 4k")
    qemu_img("snapshot", "-c", "s", path)
    qemu_io(path, "write -P 2 0 4k")
    rng = random.Random(1)
    source = tmp_path / "source"
    source.write_bytes(rng.randbytes(2500) + bytes(1596) + rng.randbytes(2500) + bytes(1596))
    qemu_io(path, f"write -c -s {source} 1M 4k", f"write -c -s {source} 1536k 4k")
    with Opened(path) as image:
        image.add("b", 512).set(0, 512)
    data = bytearray(path.read_bytes())
    (table,) = struct.unpack_from(
        ">Q", data, struct.unpack_from(">Q", data, extension(data) + 16)[0]
    )
    snapshots = struct.unpack_from(">Q", data, 64)[0]
    l1 = struct.unpack_from(">Q", data, snapshots)[0]
    l2 = struct.unpack_from(">Q", data, l1)[0] & 2**56 - 512
    active = struct.unpack_from(">Q", data, struct.unpack_from(">Q", data, 40)[0])[0] & 2**56 - 512
    compressed = [struct.unpack_from(">Q", data, active + 8 * i)[0] for i in (256, 384)]
    assert all(each >> 62 == 1 for each in compressed)
    shift = 62 - 4
    places = {
        "a snapshot's L2 table": l2,
        "a snapshot's data": struct.unpack_from(">Q", data, l2)[0] & 2**56 - 512,
        "the first compressed": compressed[0] & (1 << shift) - 1,
        # It goes over the end of a cluster.
        "the last compressed": (compressed[1] & (1 << shift) - 1) + 2500,
    }
    for place in places.values():
        struct.pack_into(">Q", data, table, place & -4096)
        path.write_bytes(data)
        (fate,) = rescued(path).bitmaps
        assert fate.outcome is Outcome.INCONSISTENT
        mends(path)


def test_a_bitmap_without_data_can_be_repaired(tmp_path: Path, original: bytes, run: Run) -> None:
    """Whatever its granularity was, it gets one that the disk can have."""
    for name in ("granularity 8", "granularity 255", "of type 2"):
        path, layout = tmp_path / "image", Layout(original)
        BROKEN[name][0](layout)
        path.write_bytes(layout.data)
        assert run("rescue", path).code == 0
        assert run("repair", path, "--all").out == "b\n"
        assert asked(path)["b"][0] == 3 * MIB
        assert check(path, "-r", "leaks") == FINE


# ---- the backup -------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path: Path, original: bytes) -> Path:
    """An image of which b is lost its data, and with it clusters have to be written."""
    path, layout = tmp_path / "image", Layout(original)
    BROKEN["of type 2"][0](layout)
    path.write_bytes(layout.data)
    return path


def test_the_backup_has_the_header_and_the_directory(damaged: Path, original: bytes) -> None:
    before, at = damaged.read_bytes(), Layout(original)
    report = rescued(damaged)
    assert report.backup == f"{damaged}.before-rescue"
    saved = Path(report.backup).read_bytes()
    assert saved[: report.backup_nbytes] == before[: report.backup_nbytes]
    assert report.backup_nbytes >= 512
    assert saved[report.backup_nbytes :] == before[at.directory : at.directory + 96]


def test_a_backup_goes_over_nothing(damaged: Path, run: Run) -> None:
    before = damaged.read_bytes()
    there = damaged.with_name("there")
    there.write_text("precious")
    for name in (there, damaged, damaged.parent, "/dev/full"):
        with pytest.raises(ExistsError, match="is there already"):
            rescued(damaged, backup=name)
        result = run("rescue", damaged, "--backup", name)
        assert result.code == 1
        assert "is there already" in result.err
    assert there.read_text() == "precious"
    assert damaged.read_bytes() == before
    # The default takes the next name.
    for number in ("", ".1", ".2"):
        damaged.write_bytes(before)
        assert rescued(damaged).backup == f"{damaged}.before-rescue{number}"
    damaged.write_bytes(before)
    assert rescued(damaged, backup=damaged.with_name("new")).backup == str(damaged.with_name("new"))


def test_a_backup_is_not_left_beside_a_device(
    damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/dev is gone with the next boot."""
    before = damaged.read_bytes()
    monkeypatch.setattr("stat.S_ISBLK", lambda mode: True)
    with pytest.raises(InvalidError, match="say where the backup is to be"):
        rescued(damaged)
    assert damaged.read_bytes() == before
    assert rescued(damaged, backup=damaged.with_name("new")).left


def test_the_backup_is_durable_before_the_image_is_written(
    damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, sync_directory = os.fsync, _core.hbfile_sync_directory

    def synced(fd: int) -> None:
        done.append("file")
        fsync(fd)

    def directory_synced(path: bytes) -> int:
        done.append("directory")
        return sync_directory(path)

    class Watched(Unsynced):
        def _pwritev(self, pieces: Sequence[memoryview], offset: int) -> int:
            assert done == ["file", "directory"]
            return super()._pwritev(pieces, offset)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(_core, "hbfile_sync_directory", directory_synced)
    assert rescue(damaged, open_file=Watched).damaged
    assert done == ["file", "directory"]


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_without_a_backup_nothing_is_changed(
    damaged: Path, monkeypatch: pytest.MonkeyPatch, call: str, run: Run
) -> None:
    before = damaged.read_bytes()

    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, "as the test wants it")

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        with pytest.raises(
            StoreError, match="before-rescue cannot be written: as the test"
        ) as refused:
            rescued(damaged)
    assert refused.value.errno == errno.ENOSPC
    with pytest.raises(StoreError, match="No such file"):
        rescued(damaged, backup=damaged.parent / "no" / "x")
    result = run("rescue", damaged, "--backup", damaged.parent / "no" / "x")
    assert result.code == 1
    assert damaged.read_bytes() == before
    assert list(damaged.parent.iterdir()) == [damaged]


# ---- crashes, faults, interruptions -----------------------------------------

CRASHES = {
    **{name: DAMAGE[name] for name in ("no bitmaps", "of type 2", "a directory beyond the file")},
    "an extension too short, nothing left": all_of(
        DAMAGE["an extension too short"], DAMAGE["a directory beyond the file"]
    ),
}


def state(path: Path) -> dict[str, Any] | None:
    """What bitmaps there are; None: it is refused."""
    try:
        return loaded(path)
    except CorruptError:
        return None


def header(data: bytes) -> bytes:
    """The cluster that it is in."""
    return data[: 1 << int.from_bytes(data[20:24], "big")]


def is_as_it_was_or_rescued(path: Path, before: bytes, expected: dict[str, Any]) -> None:
    if header(path.read_bytes()) == header(before):
        assert rescued(path, backup=os.devnull, dry_run=True).damaged
    else:
        assert loaded(path) == expected
    # Whoever comes next can finish it, or has nothing to do.
    rescued(path)
    assert loaded(path) == expected


@pytest.mark.parametrize("damage", CRASHES.values(), ids=CRASHES)
def test_a_crash_leaves_it_as_it_was_or_rescued(
    tmp_path: Path, original: bytes, damage: Damage
) -> None:
    path, crashed, layout = tmp_path / "image", tmp_path / "crashed", Layout(original)
    damage(layout)
    before = bytes(layout.data)
    path.write_bytes(before)
    recorder = Recorder()
    rescue(path, open_file=recorder)
    expected = loaded(path)
    epochs = recorder.take()
    assert all(offset or len(data) == SECTOR for epoch in epochs for offset, data in epoch)
    states = sorted(crashes(before, epochs, random.Random(1)))
    assert len(states) > 1
    for data in states:
        crashed.write_bytes(data)
        is_as_it_was_or_rescued(crashed, before, expected)
    for data in random.Random(2).sample(states, min(len(states), 4)):
        crashed.write_bytes(data)
        rescued(crashed)
        assert asked(crashed) == expected
        mends(crashed)


def behind(tmp_path: Path, kept: bool) -> Path:
    """A damaged image of which the extension is not in the first sector, as QEMU places it."""
    create(tmp_path / "base", "1M")
    path = create(tmp_path / "behind", "1M", backing_file=tmp_path / "base", backing_fmt="qcow2")
    qemu_img("bitmap", "--add", path, "b")
    data = bytearray(path.read_bytes())
    assert extension(data) > SECTOR
    struct.pack_into(">II", data, extension(data), 1, 1)
    if not kept:
        struct.pack_into(">Q", data, extension(data) + 16, 1 << 40)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("kept", [True, False])
def test_a_crash_of_an_image_of_qemus(tmp_path: Path, kept: bool) -> None:
    path, crashed = behind(tmp_path, kept), tmp_path / "crashed"
    data = path.read_bytes()
    recorder = Recorder()
    rescue(path, open_file=recorder)
    for left in crashes(data, recorder.take(), random.Random(1)):
        crashed.write_bytes(left)
        if header(left) != header(data):
            assert list(asked(crashed)) == (["b"] if kept else [])
        rescued(crashed)
        assert list(asked(crashed)) == list(loaded(crashed)) == (["b"] if kept else [])
        mends(crashed)


FAULTS: dict[str, Callable[[], Disk]] = {
    "error": lambda: Disk(),
    "short": lambda: Disk(short=True),
    "no more space": lambda: Disk(errno.ENOSPC, lasting=True),
    "dropped for lack of space": lambda: Disk(errno.ENOSPC, drops=True),
}


def caught(call: Callable[[], object]) -> StoreError | None:
    try:
        call()
    except StoreError as error:
        return error
    return None


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("place", ["first", "behind"])
def test_a_fault_of_the_disk_is_said_and_leaves_one_of_the_two(
    damaged: Path, fault: Callable[[], Disk], place: str
) -> None:
    if place == "behind":
        damaged = behind(damaged.parent, True)
    before = damaged.read_bytes()
    rescued(damaged)
    expected = loaded(damaged)
    backup = damaged.with_name("backup")
    for n in range(1, 1000):
        backup.unlink(missing_ok=True)
        damaged.write_bytes(before)
        disk = fault()
        disk.fail_at = n
        error = caught(lambda: rescue(damaged, open_file=disk, backup=backup))  # noqa: B023
        if error is None:
            assert not disk.failed or disk.short
        else:
            assert "as the test wants it" in str(error)
            assert error.errno == disk.code
            # It remains if the image may have been changed, and then the error names it.
            assert backup.exists() == (str(backup) in str(error))
            # And what was there is put back, if the disk takes it.
            assert disk.lasting or header(damaged.read_bytes()) == header(before)
        if not disk.failed:
            break
        is_as_it_was_or_rescued(damaged, before, expected)
    else:
        raise AssertionError("it never ends")
    assert n > (1 if place == "behind" else 2)


def test_a_kill_at_every_call_leaves_it_as_it_was_or_rescued(damaged: Path) -> None:
    before = damaged.read_bytes()
    rescued(damaged)
    expected = loaded(damaged)
    for n in range(1, 1000):
        damaged.write_bytes(before)
        calls = 0

        class Killed(File):
            def _call(self) -> None:
                nonlocal calls
                calls += 1
                if calls == n:  # noqa: B023
                    os.kill(os.getpid(), signal.SIGKILL)

            def _pwritev(self, pieces: Sequence[memoryview], offset: int) -> int:
                self._call()
                return super()._pwritev(pieces, offset)

            def _fdatasync(self) -> None:
                self._call()

        child = os.fork()
        if not child:
            try:
                rescue(damaged, open_file=Killed)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        is_as_it_was_or_rescued(damaged, before, expected)
        if not os.WIFSIGNALED(status):
            break
    assert 3 < n < 1000


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_at_any_line_leaves_it_as_it_was_or_rescued(damaged: Path) -> None:
    before = damaged.read_bytes()
    rescued(damaged)
    expected = loaded(damaged)
    folder = str(Path(rescue_module.__file__).parent)
    lines = stop = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        if not frame.f_code.co_filename.startswith(folder):
            return None
        if event == "line":
            lines += 1
            if lines == stop:
                raise KeyboardInterrupt
        return trace

    backup = damaged.with_name("backup")
    rounds = 0
    ran = False
    while not ran:
        damaged.write_bytes(before)
        backup.unlink(missing_ok=True)
        lines, stop = 0, stop + 61  # not every line of a loop
        sys.settrace(trace)
        try:
            rescued(damaged, backup=backup)
            ran = True
        except KeyboardInterrupt:
            rounds += 1
        finally:
            sys.settrace(None)
        is_as_it_was_or_rescued(damaged, before, expected)  # nobody has it locked
    assert rounds > 20


@pytest.fixture
def heard() -> Iterator[None]:
    """Ctrl-C, also where a shell has started the tests in the background, which ignore it then."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
def test_ctrl_c_counts_before_or_afterwards(
    damaged: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    before = damaged.read_bytes()
    replace = Image.replace

    def reading(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(rescue_module._Plan, "_why_no_refcounts", reading)
        with pytest.raises(KeyboardInterrupt):
            run("rescue", damaged)
    assert damaged.read_bytes() == before

    def writing(self: Any, directory: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        replace(self, directory)

    monkeypatch.setattr(Image, "replace", writing)
    with pytest.raises(KeyboardInterrupt):
        run("rescue", damaged)
    assert loaded(damaged)["b"] == "inconsistent"


# ---- others beside it -------------------------------------------------------


def test_an_image_in_use_is_refused(damaged: Path, original: bytes, run: Run) -> None:
    """QEMU does not open a damaged one, but it may have been damaged while it was open."""
    before = damaged.read_bytes()
    for read_only in (True, False):
        damaged.write_bytes(original)
        with qemu(damaged, read_only=read_only):
            damaged.write_bytes(before)
            with pytest.raises(LockedError):
                rescued(damaged)
            result = run("rescue", damaged)
            assert result.code == 1
            assert str(damaged) in result.err
            assert damaged.read_bytes() == before
            if not read_only:
                damaged.write_bytes(original)  # which it closes
    damaged.write_bytes(before)
    with Opened(damaged, read_only=True), pytest.raises(LockedError):
        rescued(damaged)
    with Opened(damaged, read_only=True):
        assert rescued(damaged, dry_run=True).damaged
    assert damaged.read_bytes() == before
    assert list(damaged.parent.iterdir()) == [damaged]


def test_of_two_rescues_one_is_refused(damaged: Path) -> None:
    """Also where the second comes from within the first."""
    refused = []

    def second(*_: object) -> None:
        try:
            rescued(damaged)
        except LockedError as error:
            refused.append(error)
        done = subprocess.run(
            [sys.executable, "-m", "pybitmap", "rescue", str(damaged)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert "another program" in done.stderr

    calls = iter([second])
    assert rescued(damaged, progress=lambda *_: next(calls, lambda *_: None)()).left
    assert len(refused) == 1
    assert not rescued(damaged).damaged


def test_a_progress_that_raises_changes_nothing(damaged: Path) -> None:
    before = damaged.read_bytes()

    def stop(*_: object) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        rescued(damaged, progress=stop)
    assert damaged.read_bytes() == before
    assert list(damaged.parent.iterdir()) == [damaged]
    assert rescued(damaged).left


def test_the_child_of_a_fork_is_refused(damaged: Path) -> None:
    codes: list[int] = []

    def fork(*_: object) -> None:
        if codes:
            return
        child = os.fork()
        codes.append(child)
        if child:
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    try:
        report = rescued(damaged, progress=fork)
    except BitmapError:
        if codes == [0]:
            os._exit(7)
        raise
    finally:
        if codes == [0]:
            os._exit(8)
    assert codes[1] == 7
    assert report.left
    assert loaded(damaged)["b"] == "inconsistent"
    assert len(list(damaged.parent.iterdir())) == 2, "one backup"


# ---- the command ------------------------------------------------------------


def test_what_the_command_says(damaged: Path, run: Run) -> None:
    before = damaged.read_bytes()
    result = run("rescue", damaged, "--dry-run")
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines() == [
        "Bitmap 'a' would be kept.",
        "Bitmap 'b' would be inconsistent: it is of type 2, which is not known.",
        "Bitmap 'c' would be kept.",
        "Nothing was written.",
    ]
    assert damaged.read_bytes() == before
    result = run("rescue", damaged, "--backup", damaged.with_name("saved"))
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines() == [
        "Bitmap 'a' is kept.",
        "Bitmap 'b' is inconsistent: it is of type 2, which is not known.",
        "Bitmap 'c' is kept.",
        f"What was there before is in {damaged.with_name('saved')}.",
        "To put it back, before anything else writes to the image: "
        f"dd if={damaged.with_name('saved')} of={damaged} bs=512 count=1 conv=notrunc,fsync",
        f"Mark everything dirty in what is inconsistent: pybitmap repair {damaged} --all",
        f"Free what belongs to nothing: qemu-img check -r leaks {damaged}",
    ]


def test_what_the_command_says_in_json(damaged: Path, run: Run) -> None:
    saved = damaged.with_name("saved")
    bitmaps = [
        {"name": "a", "outcome": "kept", "reason": None},
        {
            "name": "b",
            "outcome": "inconsistent",
            "reason": "it is of type 2, which is not known",
        },
        {"name": "c", "outcome": "kept", "reason": None},
    ]
    report: dict[str, Any] = {
        "target": str(damaged),
        "format": "qcow2",
        "damaged": True,
        "dry_run": True,
        "faults": [],
        "bitmaps": bitmaps,
        "refcounts": None,
        "backup": None,
        "put_back": None,
    }
    before = damaged.read_bytes()
    result = run("rescue", damaged, "--dry-run", "--json", "-q")
    assert (result.code, json.loads(result.out), result.err) == (0, report, "")
    assert damaged.read_bytes() == before
    result = run("rescue", damaged, "--backup", saved, "--json")
    put_back = f"dd if={saved} of={damaged} bs=512 count=1 conv=notrunc,fsync"
    report.update(dry_run=False, backup=str(saved), put_back=put_back)
    assert (result.code, json.loads(result.out), result.err) == (0, report, "")
    result = run("rescue", damaged.with_name("none"), "--json")
    assert (result.code, result.out) == (1, "")


def test_what_the_command_says_if_nothing_is_left(
    tmp_path: Path, original: bytes, run: Run
) -> None:
    path, layout = tmp_path / "image", Layout(original)
    DAMAGE["a directory of zeroes"](layout)
    path.write_bytes(layout.data)
    assert run("rescue", path, "--dry-run").out.splitlines() == [
        f"{path}: a part of the bitmap directory cannot be read.",
        "The image would have no bitmaps.",
        "Nothing was written.",
    ]
    assert "The image has no bitmaps.\n" in run("rescue", path).out


def test_what_is_no_image_is_refused(tmp_path: Path, run: Run) -> None:
    (tmp_path / "text").write_text("no image")
    assert run("add", tmp_path / "store", "n/b", "--size", "1M").code == 0
    for name in ("text", "store", "missing", "."):
        result = run("rescue", tmp_path / name)
        assert result.code == 1
        assert str(tmp_path / name) in result.err


@pytest.mark.parametrize("name", OF_BITMAPS)
def test_whoever_refuses_the_image_names_the_command(
    tmp_path: Path, original: bytes, name: str, run: Run
) -> None:
    path, layout = tmp_path / "image", Layout(original)
    OF_BITMAPS[name](layout)
    path.write_bytes(layout.data)
    with pytest.raises(StoreError) as refused:
        Opened(path)
    assert "run pybitmap rescue" in str(refused.value) or "no cluster of the file" in str(
        refused.value
    )
    result = run("check", path)
    assert result.code == 1
    assert "run pybitmap rescue" in result.out or "no cluster of the file" in result.out


# ---- any bytes --------------------------------------------------------------


#: Bytes of the extension, the directory and the tables, by number, and what they become.
CHANGES = st.lists(
    st.tuples(st.integers(0, 32 + 96 + 3 * 16 - 1), st.sampled_from([0, 1, 2, 3, 127, 128, 255])),
    min_size=1,
    max_size=8,
)


class Whole:
    """An image before it is damaged, and what is in its bitmaps; short in what failures print."""

    def __init__(self, data: bytes, truth: dict[str, Any]) -> None:
        self.data, self.truth = data, truth


@pytest.fixture(scope="module")
def whole(original: bytes, truth: dict[str, Any]) -> Whole:
    return Whole(original, truth)


@given(numbered=CHANGES)
def test_any_bytes_of_the_bitmaps_changed(
    tmp_path_factory: pytest.TempPathFactory,
    whole: Whole,
    numbered: list[tuple[int, int]],
) -> None:
    at = Layout(whole.data)
    tables = {name: at.table(each) for name, each in zip("abc", (at.a, at.b, at.c))}
    places = [
        *range(at.extension - 8, at.extension + 24),
        *range(at.directory, at.directory + 96),
        *(place for table in tables.values() for place in range(table, table + 16)),
    ]
    changes = [(places[number], value) for number, value in numbered]
    for place, value in changes:
        at.data[place] = value
    path = tmp_path_factory.mktemp("any") / "image"
    path.write_bytes(at.data)
    report = rescued(path)
    after = path.read_bytes()
    untouched(bytes(at.data), after, at)
    # Its output may be no UTF-8: names are what they are.
    subprocess.run([peer("qemu-img", UTILS), "info", path], check=True, capture_output=True)
    found = loaded(path)
    fates = {each.name: each.outcome for each in report.bitmaps if each.outcome is not Outcome.LOST}
    if report.damaged:
        assert check(path) in (FINE, LEAKS)
        assert {name: value == "inconsistent" for name, value in found.items()} == {
            name: outcome is Outcome.INCONSISTENT or found[name] == "inconsistent"
            for name, outcome in fates.items()
        }
    # What nobody touched is kept as it was, or it is said why not.
    changed = {place for place, _ in changes}
    for name, start in zip("abc", (at.a, at.b, at.c)):
        own = {*range(start, start + 32), *range(tables[name], tables[name] + 16)}
        if changed.isdisjoint(own) and found.get(name) != whole.truth[name]:
            assert name not in found or found[name] == "inconsistent"
            assert report.faults or name in [each.name for each in report.bitmaps if each.reason]
