# SPDX-License-Identifier: MIT
"""Formats of extents: files that the real programs wrote, round trips, and hostile input."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from images import create, qemu_img, qemu_io
from peers import package, peer
from support import run_python

from pybitmap import HBitmap
from pybitmap.interchange import FORMATS, Extent, FormatError, Options, read_extents
from pybitmap.interchange.base import CHUNK, MAX_LINE
from pybitmap.interchange.conversion import write_as
from pybitmap.interchange.json_text import JsonText

FILES = Path(__file__).parent / "files"
MIB = 1 << 20
BLOCK = 65536
ARROW = ("arrow", "parquet")

#: What is dirty in the disk of the files, by what kind of map it is.
DATA = [(MIB, 131072), (5 * MIB, 4096)]
ALLOCATED = [(MIB, 131072), (5 * MIB, 65536)]
BITMAP = [*ALLOCATED, (7 * MIB, 65536)]
DISK = 10 * MIB

RBD = [
    (4096, 1437696),
    (8392704, 2027520),
    (12587008, 3272704),
    (16777216, 3473408),
    (20971520, 1507328),
    (25165824, 4063232),
    (41943040, 4128768),
    (46137344, 786432),
]
THIN = [(block * BLOCK, count * BLOCK) for block, count in [(20, 1), (36, 4), (100, 10), (200, 12)]]
ERA = [(b * BLOCK, n * BLOCK) for b, n in [(0, 5), (20, 3), (40, 3), (60, 3), (80, 3), (99, 1)]]

WRITTEN: list[tuple[str, str, list[tuple[int, int]], int, dict[str, Any]]] = [
    ("qemu-map.json", "qemu-map", ALLOCATED, DISK, {}),
    ("qemu-map-bitmap.json", "qemu-map-bitmap", BITMAP, DISK, {"guess": False}),
    ("nbdinfo.txt", "nbdinfo", DATA, DISK, {}),
    ("nbdinfo.json", "nbdinfo-json", DATA, DISK, {}),
    ("nbdinfo-dirty.txt", "nbdinfo", BITMAP, DISK, {}),
    ("nbdinfo-dirty.json", "nbdinfo-json", BITMAP, DISK, {}),
    ("nbdinfo-depth.txt", "nbdinfo", BITMAP, DISK, {}),
    ("imageio-dirty.json", "imageio", BITMAP, DISK, {}),
    ("imageio-zero.json", "imageio", DATA, DISK, {}),
    ("rbd-diff.txt", "rbd", RBD, 46923776, {}),
    ("rbd-diff.json", "rbd-json", RBD, 46923776, {}),
    ("rbd-zero.txt", "rbd", RBD, 46923776, {}),
    ("rbd-zero.json", "rbd-json", RBD, 46923776, {}),
    ("rbd-empty.json", "json", [], 0, {}),
    ("thin-delta.xml", "thin-delta", THIN, 212 * BLOCK, {}),
    ("thin-delta-verbose.xml", "thin-delta", THIN, 212 * BLOCK, {}),
    ("era-invalidate.xml", "era", ERA, 100 * BLOCK, {"block_size": BLOCK}),
    ("era-dump.xml", "era-dump", ERA, 100 * BLOCK, {"since": 3}),
    ("era-dump-logical.xml", "era-dump", [(0, 100 * BLOCK)], 100 * BLOCK, {"since": 1}),
    ("csi-lister.json", "csi", [(0, BLOCK), (MIB, BLOCK), (5 * MIB, BLOCK)], DISK, {}),
    ("csi-grpc.json", "csi", [(0, BLOCK), (MIB, 131072), (5 * MIB, 1000)], DISK, {}),
    ("vmware.json", "vmware", ALLOCATED, DISK, {}),
]


def read(data: bytes, fmt: str | None = None, **options: Any) -> HBitmap:
    extents = read_extents(io.BytesIO(data), fmt, name="file", **options)
    return HBitmap.from_extents(extents, options.get("size"))


def written(fmt: str, hb: HBitmap, start: int = 0, **options: Any) -> bytes:
    out = io.BytesIO()
    write_as(FORMATS[fmt], hb, out, Options(**options), start=start)
    return out.getvalue()


@pytest.fixture
def extras() -> Any:
    return package("pyarrow")


# ---- what programs have written -------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "fmt", "areas", "size", "options"), WRITTEN, ids=[each[0] for each in WRITTEN]
)
def test_what_a_program_wrote_is_read_and_recognised(
    file: str, fmt: str, areas: list[tuple[int, int]], size: int, options: dict[str, Any]
) -> None:
    options = dict(options)
    guess = options.pop("guess", True)
    data = (FILES / file).read_bytes()
    for name in [fmt, None] if guess else [fmt]:
        hb = read(data, name, **options)
        assert (list(hb.areas()), hb.size) == (areas, size)


def test_every_file_is_read() -> None:
    made_of = {"README.md", "thin-metadata.xml", "era-metadata.xml"}
    assert {path.name for path in FILES.iterdir()} - made_of == {each[0] for each in WRITTEN}


def test_every_format_has_a_file_or_another_test() -> None:
    elsewhere = {"csv", "bits", "roaring", "roaring64", *ARROW}
    assert {each[1] for each in WRITTEN} | elsewhere == set(FORMATS)


def test_a_map_of_a_dirty_bitmap_is_not_taken_for_one_of_data() -> None:
    data = (FILES / "qemu-map-bitmap.json").read_bytes()
    with pytest.raises(FormatError, match=r"file:2: .*--from qemu-map-bitmap .* --from qemu-map "):
        read(data)
    # By the wrong name, all is dirty.
    assert list(read(data, "qemu-map").areas()) == [(0, DISK)]


#: Written as the program writes it, byte for byte, from what it says is dirty.
SAME = [
    ("nbdinfo-dirty.txt", "nbdinfo", {}),
    ("nbdinfo-dirty.json", "nbdinfo-json", {}),
    ("qemu-map-bitmap.json", "qemu-map-bitmap", {}),
    ("rbd-diff.txt", "rbd", {}),
    ("rbd-diff.json", "rbd-json", {}),
    ("era-invalidate.xml", "era", {"block_size": BLOCK}),
]


@pytest.mark.parametrize(("file", "fmt", "options"), SAME, ids=[each[0] for each in SAME])
def test_it_is_written_as_the_program_writes_it(
    file: str, fmt: str, options: dict[str, Any]
) -> None:
    data = (FILES / file).read_bytes()
    text = written(fmt, read(data, fmt, **options), **options)
    if fmt == "rbd":  # whose columns are as wide as the widest
        assert text.split() == data.split()
    else:
        assert text == data


def test_qemu_and_nbdinfo_today(tmp_path: Path) -> None:
    """What those that are installed say of a disk, beside the bitmap that they tell of."""
    nbdinfo, qemu_nbd = peer("nbdinfo", "libnbd-bin"), peer("qemu-nbd", "qemu-utils")
    disk, socket = create(tmp_path / "disk", "8M"), tmp_path / "nbd.sock"
    qemu_img("bitmap", "--add", disk, "b")
    qemu_io(disk, "write 1M 100k", "write 3M 1", "write 8323072 64k")
    wanted = [(MIB, 131072), (3 * MIB, 65536), (8323072, 65536)]
    assert next(read(qemu_img("map", "--output=json", disk).encode()).areas())[0] == MIB
    server = subprocess.Popen(
        [qemu_nbd, "-r", "-t", "-f", "qcow2", "-B", "b", "-k", str(socket), str(disk)]
    )
    try:
        until = time.monotonic() + 60
        while not socket.exists() and time.monotonic() < until:
            time.sleep(0.01)
        uri = f"nbd+unix:///?socket={socket}"
        for fmt, option in [("nbdinfo", []), ("nbdinfo-json", ["--json"])]:
            command = [nbdinfo, "--map=qemu:dirty-bitmap:b", *option, uri]
            text = subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
            hb = read(text)
            assert (list(hb.areas()), hb.size) == (wanted, 8 * MIB)
            assert written(fmt, hb) == text
        options = f"driver=nbd,server.type=unix,server.path={socket}"
        options += ",x-dirty-bitmap=qemu:dirty-bitmap:b"
        text = qemu_img("map", "--output=json", "--image-opts", options).encode()
        assert list(read(text, "qemu-map-bitmap").areas()) == wanted
    finally:
        server.kill()
        server.wait()


HOLES = """case "$1" in
get_size) echo 256K ;;
can_extents) ;;
pread) head -c "$3" /dev/zero | tr '\\0' A ;;
extents) printf '%s\\n' '0 64K hole' '64K 64K zero' '128K 64K hole,zero' '192K 64K' ;;
*) exit 2 ;;
esac
"""


def test_holes_that_need_not_read_as_zeroes_are_dirty(tmp_path: Path) -> None:
    """As they are copied by ``qemu-img convert``: something may be in them."""
    for each, deb in (("nbdinfo", "libnbd-bin"), ("qemu-img", "qemu-utils")):
        peer(each, deb)
    disk = tmp_path / "disk"
    disk.write_text(HOLES)
    disk.chmod(0o700)
    run = """nbdinfo --map "$uri" >nbdinfo && nbdinfo --map --json "$uri" >nbdinfo-json &&
        qemu-img map --output=json "$uri" >qemu-map && qemu-img convert -f raw -O raw "$uri" copy"""
    command = [peer("nbdkit", "nbdkit"), "-U", "-", "sh", str(disk), "--run", run]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=60)
    copied = (tmp_path / "copy").read_bytes()
    groups = [at for at in range(0, len(copied), BLOCK) if any(copied[at : at + BLOCK])]
    assert groups == [0, 3 * BLOCK]
    for fmt in ("nbdinfo", "nbdinfo-json"):
        assert read((tmp_path / fmt).read_bytes()) == HBitmap.from_extents(
            [(at, BLOCK) for at in groups], len(copied)
        )
    hb = read((tmp_path / "qemu-map").read_bytes(), "qemu-map")
    assert list(hb.areas()) == [(0, 2 * BLOCK), (3 * BLOCK, BLOCK)]  # what is allocated has data


@pytest.mark.parametrize("size", [1000, 70_000, MIB + 1])
def test_disks_of_no_whole_sectors_are_told_of_in_sectors(size: int, tmp_path: Path) -> None:
    """QEMU rounds their size up; beyond the end there is nothing, dirty or not."""
    nbdinfo, qemu_nbd = peer("nbdinfo", "libnbd-bin"), peer("qemu-nbd", "qemu-utils")
    disk, socket = tmp_path / "disk", tmp_path / "socket"
    disk.write_bytes(b"x" * size)
    texts = {"qemu-map": qemu_img("map", "-f", "raw", "--output=json", disk).encode()}
    server = subprocess.Popen([qemu_nbd, "-r", "-t", "-f", "raw", "-k", str(socket), str(disk)])
    try:
        until = time.monotonic() + 60
        while not socket.exists() and time.monotonic() < until:
            time.sleep(0.01)
        for fmt, option in [("nbdinfo", []), ("nbdinfo-json", ["--json"])]:
            command = [nbdinfo, "--map", *option, f"nbd+unix:///?socket={socket}"]
            texts[fmt] = subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
    finally:
        server.kill()
        server.wait()
    for fmt, text in texts.items():
        hb = read(text, fmt, size=size)
        assert (hb.size, list(hb.areas())) == (size, [(0, size)])
        with pytest.raises(FormatError, match="beyond the size of the disk"):
            read(text, fmt, size=size - 512)


@pytest.mark.parametrize("dirty", [False, True])
def test_a_sector_that_the_end_of_the_disk_cuts_is_cut(dirty: bool) -> None:
    hb = HBitmap.from_extents([(0, 512), (512, 512, dirty)], 1024)
    for fmt in ("qemu-map", "qemu-map-bitmap", "nbdinfo", "nbdinfo-json"):
        text = written(fmt, hb)
        for size in (1023, 1000, 513):
            wanted = HBitmap.from_extents([(0, size if dirty else 512)], size)
            assert read(text, fmt, size=size) == wanted
        with pytest.raises(FormatError, match="beyond"):
            read(text, fmt, size=512)


def _tool(name: str, *arguments: str | Path) -> bytes:
    command = [peer(name, "thin-provisioning-tools"), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, timeout=60).stdout


def test_thin_delta_and_era_today(tmp_path: Path) -> None:
    for tool, source in [("thin_restore", "thin-metadata"), ("era_restore", "era-metadata")]:
        metadata = tmp_path / tool
        with metadata.open("wb") as file:
            file.truncate(8 * MIB)
        _tool(tool, "-i", FILES / f"{source}.xml", "-o", metadata)
    text = _tool("thin_delta", "--thin1", "1", "--thin2", "2", tmp_path / "thin_restore")
    assert list(read(text).areas()) == THIN
    era = tmp_path / "era_restore"
    assert list(read(_tool("era_dump", era), since=3).areas()) == ERA
    text = _tool("era_invalidate", "--written-since", "3", era)
    assert list(read(text, block_size=BLOCK).areas()) == ERA
    for since in (0, 2, 4, 5):
        text = _tool("era_invalidate", "--written-since", str(since), era)
        ours = read(_tool("era_dump", era), since=since)
        assert ours == read(text, block_size=BLOCK, size=100 * BLOCK)


def test_a_dump_that_may_have_the_first_of_several_eras_is_refused(tmp_path: Path) -> None:
    """As ``era_dump --logical`` tells of a block that was written again since."""
    eras = "".join(f'<era block="{block}" era="{block}"/>' for block in range(3))
    sets = "".join(
        f'<writeset era="{era}" nr_bits="3"><bit block="0" value="true"/>'
        f'<bit block="1" value="{str(era == 5).lower()}"/><bit block="2" value="false"/></writeset>'
        for era in (3, 5)
    )
    source, metadata = tmp_path / "xml", tmp_path / "metadata"
    source.write_text(
        '<superblock uuid="" block_size="128" nr_blocks="3" current_era="6">'
        f"{sets}<era_array>{eras}</era_array></superblock>"
    )
    with metadata.open("wb") as file:
        file.truncate(8 * MIB)
    _tool("era_restore", "-i", source, "-o", metadata)
    plain, logical = _tool("era_dump", metadata), _tool("era_dump", "--logical", metadata)
    for since in range(7):
        text = _tool("era_invalidate", "--written-since", str(since), metadata)
        wanted = read(text, block_size=BLOCK, size=3 * BLOCK)
        assert read(plain, since=since) == wanted
        if since < 3:  # nothing was written first before it, and again since
            assert read(logical, since=since) == wanted
            continue
        with pytest.raises(FormatError, match=r"block [02] .*era [23].* --logical"):
            read(logical, since=since)


def test_pyroaring_reads_what_is_written_and_writes_what_is_read() -> None:
    pyroaring = package("pyroaring")
    numbers = [*sorted(random.Random(1).sample(range(1 << 20), 5000)), *range(1 << 20, 1200000)]
    hb = HBitmap.from_extents((each, 1) for each in numbers)
    for fmt, kind in [("roaring", pyroaring.BitMap), ("roaring64", pyroaring.BitMap64)]:
        theirs = kind(numbers)
        assert list(kind.deserialize(written(fmt, hb, block_size=1))) == numbers
        assert read(theirs.serialize(), fmt, block_size=1) == hb
        theirs.run_optimize()
        assert read(theirs.serialize(), fmt, block_size=1) == hb


@pytest.mark.parametrize("fmt", ARROW)
def test_pyarrow_reads_and_writes_the_same(fmt: str, extras: Any, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    hb = HBitmap.from_extents([(0, 512), (1 << 40, 4096)], 1 << 41, group_size=512)
    path = tmp_path / "file"
    path.write_bytes(written(fmt, hb))
    table = pq.read_table(path) if fmt == "parquet" else pa.ipc.open_file(path).read_all()
    assert table.to_pydict() == {"offset": [0, 1 << 40], "length": [512, 4096]}
    columns = {"length": [4096, 1, 10], "more": ["a", "b", "c"], "offset": [512, 8192, 9000]}
    other = pa.table({**columns, "dirty": [True, False, True]})
    if fmt == "parquet":
        pq.write_table(other, path)
    else:
        with pa.ipc.new_stream(path, other.schema) as writer:
            writer.write_table(other)
    assert list(read(path.read_bytes()).areas()) == [(512, 4096), (9000, 10)]


def test_arrow_files_are_read_by_what_stands_at_their_end(extras: Any, tmp_path: Path) -> None:
    """As all read them: there may be no stream in them, or others than what is meant."""
    package("polars").DataFrame({"offset": [0, 4096], "length": [512, 5]}).write_ipc(tmp_path / "a")
    assert list(read((tmp_path / "a").read_bytes()).areas()) == [(0, 512), (4096, 5)]


def test_polars_and_pandas_read_what_is_written(extras: Any, tmp_path: Path) -> None:
    hb = HBitmap.from_extents([(0, 512), (4096, 4096)])
    (tmp_path / "p").write_bytes(written("parquet", hb))
    frame = package("polars").read_parquet(tmp_path / "p")
    assert frame.rows() == [(0, 512), (4096, 4096)]
    frame = package("pandas").read_parquet(tmp_path / "p")
    assert frame["length"].sum() == hb.count()


# ---- round trips ----------------------------------------------------------------------------

WRITABLE = [name for name, each in FORMATS.items() if each.write is not None]
BLOCKS = [name for name, each in FORMATS.items() if each.blocks]


@pytest.mark.parametrize("fmt", WRITABLE)
@settings(max_examples=settings().max_examples // 2)
@given(
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 50)), max_size=10),
    st.sampled_from(["lsb", "msb"]),
)
def test_what_is_written_is_read_as_it_was(
    fmt: str, extents: list[tuple[int, int]], order: str
) -> None:
    if fmt in ARROW:
        package("pyarrow")
    size = 2100 * 512
    hb = HBitmap.from_extents([(512 * s, 512 * n) for s, n in extents], size, group_size=512)
    options: dict[str, Any] = {"block_size": 512, "bit_order": order}
    data = written(fmt, hb, **options)
    found = read_extents(io.BytesIO(data), fmt, size=size, **options)
    assert HBitmap.from_extents(found, size, group_size=512) == hb


@pytest.mark.parametrize("fmt", ["json", "csv", "nbdinfo", "rbd", "imageio", "arrow"])
def test_offsets_may_be_anything(fmt: str) -> None:
    if fmt in ARROW:
        package("pyarrow")
    size = (1 << 63) - 1
    hb = HBitmap.from_extents([(0, 1), (size - 5, 5)], size, group_size=1 << 40)
    assert (
        HBitmap.from_extents(
            read_extents(io.BytesIO(written(fmt, hb)), fmt), size, group_size=1 << 40
        )
        == hb
    )


@pytest.mark.parametrize("fmt", BLOCKS)
@pytest.mark.parametrize("block_size", [1536, 4096])
def test_formats_of_blocks_round_outwards(fmt: str, block_size: int) -> None:
    """Two areas in one block are one block, and the disk may end within the last."""
    size = 10 * block_size + 600
    areas = [(1, 1), (100, 10), (3 * block_size - 1, 2), (size - 1, 1)]
    options: dict[str, Any] = {"block_size": block_size, "bit_order": "lsb"}
    data = written(fmt, HBitmap.from_extents(areas, size), **options)
    assert list(read(data, fmt, size=size, **options).areas()) == [
        (0, block_size),
        (2 * block_size, 2 * block_size),
        (10 * block_size, 600),
    ]


def test_bits_are_those_of_the_order_that_is_said() -> None:
    hb = HBitmap.from_extents([(0, 1), (9, 1)], 11)
    assert written("bits", hb, block_size=1, bit_order="lsb") == bytes([0b1, 0b10])
    assert written("bits", hb, block_size=1, bit_order="msb") == bytes([0b10000000, 0b01000000])


def test_pieces_of_bits_are_read_where_they_are() -> None:
    nbytes = (1 << 20) + 3
    data = bytearray(nbytes)
    data[(1 << 20) - 1] = 0b10000000
    data[1 << 20] = data[-1] = 1
    hb = read(bytes(data), "bits", block_size=1, bit_order="lsb")
    first = 8 * (1 << 20)
    assert (list(hb.areas()), hb.size) == ([(first - 1, 2), (first + 16, 1)], 8 * nbytes)


def test_csi_has_extents_of_fixed_length_with_a_block_size_only() -> None:
    hb = HBitmap.from_extents([(100, 1), (5000, 4000)], 16384)
    messages = json.loads(written("csi", hb, block_size=4096))
    assert [each["block_metadata_type"] for each in messages] == [1]
    assert [tuple(each.values()) for each in messages[0]["block_metadata"]] == [
        (0, 4096),
        (4096, 4096),
        (8192, 4096),
    ]
    messages = json.loads(written("csi", hb))
    assert [tuple(each.values()) for each in messages[0]["block_metadata"]] == [
        (100, 1),
        (5000, 4000),
    ]
    assert messages[0]["block_metadata_type"] == 2
    with pytest.raises(FormatError, match="do not fill"):
        written("csi", hb, block_size=5000)


def test_csi_has_no_more_than_a_few_extents_in_a_message_and_goes_on_at_an_offset() -> None:
    hb = HBitmap.from_extents([(8192 * i, 4096) for i in range(1000)], 8192000)
    whole = json.loads(written("csi", hb))
    assert [len(each["block_metadata"]) for each in whole] == [256, 256, 256, 232]
    assert read(written("csi", hb)) == hb
    tuples = [each for message in whole for each in message["block_metadata"]]
    for start in (0, 1, 4096, 8192 * 500 + 5):
        rest = json.loads(written("csi", hb, start=start, block_size=4096))
        found = [each for message in rest for each in message["block_metadata"]]
        assert found == [
            each for each in tuples if each["byte_offset"] + each["size_bytes"] > start
        ]


def test_lists_of_nothing() -> None:
    assert read(b"", "rbd").size == 0
    assert read(b"[ ]").size == 0
    assert read(b'[{"block_metadata_type": 2, "volume_capacity_bytes": 512}]').size == 512
    assert read(b"<blocks></blocks>", block_size=512).size == 0


def test_vmware_has_several_calls_in_a_list() -> None:
    calls = [
        {"startOffset": 0, "length": 100, "changedArea": [{"start": 10, "length": 5}]},
        {"changedArea": [{"start": 150, "length": 5}], "startOffset": 100, "length": 100},
        {"startOffset": 200, "length": 100},
    ]
    hb = read(json.dumps(calls).encode())
    assert (list(hb.areas()), hb.size) == ([(10, 5), (150, 5)], 300)


def test_what_no_call_of_vmware_is_about_is_refused() -> None:
    """Nobody has said that it is clean."""
    one, two = (
        {"startOffset": start, "length": MIB, "changedArea": [{"start": start, "length": 512}]}
        for start in (0, 2 * MIB)
    )
    with pytest.raises(FormatError, match="file:1: no call is about 1048576 to 2097152"):
        read(json.dumps([one, two]).encode())
    one["length"] = 2 * MIB
    wanted = [(0, 512), (2 * MIB, 512)]
    assert list(read(json.dumps([one, two]).encode()).areas()) == wanted
    assert list(read(json.dumps([two, one]).encode(), any_order=True).areas()) == wanted
    assert list(read(json.dumps(two).encode()).areas()) == wanted[1:]  # who goes on


@pytest.mark.parametrize("fmt", ["nbdinfo", "bits"])
def test_what_is_about_all_of_the_disk_may_not_end_before(fmt: str) -> None:
    """Of both nothing else tells that they are cut short."""
    options: dict[str, Any] = {"block_size": 512, "bit_order": "msb"}
    hb = HBitmap.from_extents([(0, 512), (70 * 512, 512)], 80 * 512 - 100)
    whole = written(fmt, hb, **options)
    pieces = whole.splitlines(keepends=True) if fmt == "nbdinfo" else [bytes([b]) for b in whole]
    for count in range(len(pieces)):
        cut = b"".join(pieces[:count])
        with pytest.raises(FormatError, match=r"40860 bytes: .*cut short|of 40860 bytes: did it"):
            read(cut, fmt, size=hb.size, **options)
        read(cut, fmt, **options)  # nobody knows
    assert read(whole, fmt, size=hb.size, **options) == hb


def test_long_lists_are_the_same_in_whatever_chunks_they_come() -> None:
    rng = random.Random(2)
    extents = [(i * 1000, rng.randrange(1, 999)) for i in range(30_000)]
    text = json.dumps([{"offset": s, "length": n, "x": "},]é"} for s, n in extents])
    data = text.encode()
    assert len(data) > 4 * CHUNK

    class Slow(io.BytesIO):
        def read(self, nbytes: int | None = -1) -> bytes:
            return super().read(rng.randrange(1, 5000))

    found = list(read_extents(Slow(data), "json"))
    assert [(start, length) for start, length, _ in found] == extents


@settings(max_examples=settings().max_examples // 2)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(10**15), 10**15) | st.text(max_size=5),
        lambda each: (
            st.lists(each, max_size=4) | st.dictionaries(st.text(max_size=3), each, max_size=3)
        ),
        max_leaves=10,
    ),
    st.integers(1, 7),
)
def test_json_in_pieces_is_what_json_says(value: Any, step: int) -> None:
    from pybitmap.interchange.base import Order, Source

    class Slow(io.BytesIO):
        def read(self, nbytes: int | None = -1) -> bytes:
            return super().read(step)

    for ascii_only in (True, False):
        data = json.dumps([value, value], ensure_ascii=ascii_only).encode(errors="surrogatepass")
        try:
            data.decode()
        except UnicodeDecodeError:
            continue
        text = JsonText(Source(Slow(data), "file"))
        assert list(text.elements(lambda each: each, Order(Options()))) == [value, value]
        text.end()


# ---- what is wrong is said ------------------------------------------------------------------

J = '[{{"offset": 0, "length": 1}},\n{}]'
THIN_XML = '<superblock data_block_size="128">\n<diff>\n{}\n</diff></superblock>'

HOSTILE: list[tuple[str, str, str]] = [
    ("json", J.format('{"offset": 99999999999999999999999, "length": 1}'), "file:2: .*23 digits"),
    ("json", J.format('{"offset": 9223372036854775807, "length": 1}'), r"file:2: .*2\^63 - 1"),
    ("json", J.format('{"offset": -5, "length": 1}'), "file:2: .*negative"),
    ("json", J.format('{"offset": 5, "length": -1}'), "file:2: .*negative"),
    ("json", J.format('{"offset": 5.0, "length": 1}'), "file:2: .*whole number"),
    ("json", J.format('{"offset": 1e3, "length": 1}'), "file:2: .*whole number"),
    ("json", J.format('{"offset": true, "length": 1}'), "file:2: .*whole number"),
    ("json", J.format('{"offset": "5", "length": 1}'), "file:2: .*whole number"),
    ("json", J.format('{"offset": NaN, "length": 1}'), "file:2: NaN"),
    ("json", J.format('{"offset": Infinity, "length": 1}'), "file:2: Infinity"),
    ("json", J.format('{"offset": 5}'), "file:2: .*without 'length'"),
    ("json", J.format('{"offset": 5, "length": 1, "offset": 6}'), "file:2: key 'offset' .*twice"),
    ("json", J.format('{"offset": 0, "length": 1}'), "file:2: .*--any-order"),
    ("json", J.format("[]"), "file:2: expected an object"),
    ("json", J.format("7"), "file:2: expected an object"),
    ("json", J.format('{"offset": 5, "length": 1},'), "file:2: "),
    ("json", J.format('{"offset": 5, "length": 1}')[:-1], "file:2: .*expected ','"),
    ("json", J.format('{"offset": 5, "len')[:-1], "file:2: it ends within a value"),
    ("json", J.format('{"offset": 5, "length": 1}') + " x", "file:2: .*behind the end"),
    ("json", J.format("[" * 100_000), "file:2: "),
    ("json", J.format('{"a": ' * 5000), "file:2: "),
    ("json", J.format('{"offset": 5, "length": 1, "x": "' + "y" * (2 * CHUNK)), "65536 characters"),
    ("json", '[{"offset": 5, \n', "file:2: it ends within a value"),
    ("json", '[{"offset": 5\n', "file:2: it ends within a value"),
    ("json", "{}", "expected '\\['"),
    ("json", "", "expected '\\[', found the end"),
    ("json", '[{"offset": 0, "length": 1, "dirty": 1}]', "true or false"),
    ("qemu-map", '[{"start": 0, "length": 1, "zero": true, "data": "no"}]', "true or false"),
    ("nbdinfo-json", '[{"offset": 0, "length": 1, "type": 0}]', "without 'description'"),
    ("nbdinfo-json", '[{"offset": 0, "length": 1, "description": "odd"}]', "'odd'.*not known"),
    ("rbd-json", '[{"offset": 0, "length": 1}]', "'exists'"),
    ("imageio", '[{"start": 0, "length": 1}]', "without 'zero'"),
    ("csv", "offset,length\n1,2\n-5,1\n", "file:3: .*'-5'"),
    ("csv", "offset,length\n1,2\n1e3,1\n", "file:3: .*'1e3'"),
    ("csv", "offset,length\n1,2\n5\n", "file:3: .*2 columns"),
    ("csv", "offset,length\n1,2\n2,5\n", "file:3: .*before the end"),
    ("csv", "offset,length\n1,2\n\u0663,1\n", "file:3: .*ASCII"),
    ("csv", f"offset,length\n1,2\n{'9' * 1000},1\n", "file:3: .*1000 digits"),
    ("csv", "offset,length\n1," + "2" * (MAX_LINE + 1), "file:2: a line of more than 65536"),
    ("csv", "offset,length\n1," + "2" * (2 * CHUNK), "file:2: a line of more than 65536"),
    ("csv", "a,b\n1,2\n", "file:1: expected the heading"),
    ("csv", "", "file:1: expected the heading"),
    ("csv", "offset,length,dirty\n1,2,perhaps\n", "file:2: .*perhaps"),
    ("nbdinfo", "0 100 0  data\n100 50 1\n", "file:2: expected OFFSET"),
    ("nbdinfo", "0 100 0  data\n50 50 1  dirty\n", "file:2: .*before the end"),
    ("rbd", "Offset Length Type\n0 5 data\n5 5 what\n", "file:3: expected OFFSET"),
    ("rbd", "0 5 data\n", "file:1: expected the heading"),
    ("csi", '[{"block_metadata": [{"byte_offset": 5}]}]', "no bytes"),
    ("csi", '[{"block_metadata": [{"size_bytes": "5x"}]}]', "'5x'"),
    ("csi", '[{"block_metadata_type": 7}]', "type is 7"),
    ("csi", '[{"volume_capacity_bytes": -7}]', "capacity"),
    ("csi", '[{"volume_capacity_bytes": 7}, {"volume_capacity_bytes": 8}]', "was 7 before"),
    ("csi", '[{"block_metadata_type": 1}, {"block_metadata_type": 2}]', "another"),
    (
        "csi",
        '[{"block_metadata": [{"size_bytes": 5}, {"byte_offset": 9, "size_bytes": 6}],'
        ' "block_metadata_type": "FIXED_LENGTH"}]',
        "several lengths",
    ),
    ("csi", '[{"block_metadata": [{"size_bytes": 5}], "volume_capacity_bytes": 4}]', "ends at 5"),
    ("csi", '[{"a": 1, "a": 2}]', "key 'a' comes twice"),
    ("csi", "{" + "".join(f'"{i}": 1, ' for i in range(100)), "more than 64 keys"),
    ("vmware", '{"changedArea": []}', "without startOffset"),
    (
        "vmware",
        '{"startOffset": 0, "length": 9, "changedArea": [{"start": 5, "length": 5}]}',
        "areas from 5 to 10, where 0 to 9",
    ),
    ("thin-delta", THIN_XML.format('<same begin="0"/>'), "file:3: .*without length"),
    ("thin-delta", THIN_XML.format('<same begin="-1" length="1"/>'), "file:3: .*'-1'"),
    ("thin-delta", THIN_XML.format(f'<same begin="{10**18}" length="1"/>'), r"file:3: .*2\^63"),
    ("thin-delta", THIN_XML.format("<odd/>"), "file:3: .*odd"),
    ("thin-delta", THIN_XML.format("odd"), "file:.*text"),
    (
        "thin-delta",
        THIN_XML.format('<same begin="5" length="5"/><left_only begin="9" length="1"/>'),
        "file:3: .*before the end",
    ),
    ("thin-delta", THIN_XML.format("")[:-5], "no XML"),
    ("thin-delta", '<superblock data_block_size="0"/>', "blocks of 0 sectors"),
    ("thin-delta", "<a><b><c><d><e><f><g><h/>", "not known"),
    ("thin-delta", '<superblock data_block_size="1' + "1" * (2 << 20), "does not end"),
    ("thin-delta", "", "no XML"),
    ("thin-delta", "<?xml version='1.0' encoding='odd'?><superblock/>", "no XML: .*encoding"),
    ("thin-delta", "<?xml version='1.0' encoding='gb2312'?><superblock/>", "no XML: .*encoding"),
    ("era", '<blocks>\n<range begin="5" end="4"/></blocks>', "file:2: a range from block 5 to 4"),
    (
        "era-dump",
        '<superblock block_size="1" nr_blocks="5">\n<writeset era="1" nr_bits="5"><bit '
        'block="5" value="true"/></writeset></superblock>',
        "file:2: block 5, where there are 5",
    ),
]


@pytest.mark.parametrize(
    ("fmt", "text", "words"), HOSTILE, ids=[f"{i}-{each[0]}" for i, each in enumerate(HOSTILE)]
)
def test_what_is_wrong_is_said_with_its_line(fmt: str, text: str, words: str) -> None:
    with pytest.raises(FormatError, match=words) as error:
        read(text.encode(), fmt, block_size=512, since=0)
    assert len(str(error.value)) < 300


BOMB = """<?xml version="1.0"?>
<!DOCTYPE superblock [<!ENTITY a "1"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>
<superblock data_block_size="&b;"/>"""
OUTSIDE = '<!DOCTYPE superblock SYSTEM "file:///etc/passwd"><superblock data_block_size="1"/>'


@pytest.mark.parametrize("text", [BOMB, OUTSIDE])
def test_document_types_and_entities_are_refused(text: str) -> None:
    with pytest.raises(FormatError, match="document type, or an entity"):
        read(text.encode(), "thin-delta")


@pytest.mark.parametrize(
    "fmt", ["json", "qemu-map", "csv", "nbdinfo", "rbd", "imageio", "rbd-json"]
)
def test_the_size_of_the_disk_is_heeded(fmt: str) -> None:
    data = written(fmt, HBitmap.from_extents([(0, 10), (90, 10)]))
    assert read(data, fmt, size=100).size == 100
    with pytest.raises(FormatError, match=r"file:[0-9]+: .*beyond the size of the disk, 99"):
        read(data, fmt, size=99)


@pytest.mark.parametrize("fmt", ["json", "csv", "nbdinfo"])
def test_any_order_is_taken_if_that_is_said(fmt: str) -> None:
    text = {
        "json": '[{"offset": 50, "length": 10}, {"offset": 0, "length": 55}]',
        "csv": "offset,length\n50,10\n0,55\n",
        "nbdinfo": "50 10 1  dirty\n0 55 1  dirty\n",
    }[fmt].encode()
    with pytest.raises(FormatError, match="--any-order"):
        read(text)
    assert list(read(text, any_order=True).areas()) == [(0, 60)]


@pytest.mark.parametrize(
    ("fmt", "options", "words"),
    [
        ("bits", {"bit_order": "lsb"}, "--block-size"),
        ("bits", {"block_size": 512}, "--bit-order"),
        ("bits", {"block_size": 512, "bit_order": "big"}, "neither lsb nor msb"),
        ("roaring", {}, "--block-size"),
        ("era", {}, "--block-size"),
        ("era-dump", {}, "--since"),
    ],
)
def test_what_has_to_be_said_is_asked_for(fmt: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(FormatError, match=words):
        read(b"<blocks/>", fmt, **options)


@pytest.mark.parametrize(
    "text", [b"", b"\0\0\0\0", b"hello\n", b"<a/>", b'{"a": 1}', b"[7]", b"  "]
)
def test_what_is_not_recognised_is_refused_with_the_formats_there_are(text: bytes) -> None:
    with pytest.raises(FormatError, match=r"cannot tell the format.*--from: json, .*parquet"):
        read(text)


def test_lines_of_json_are_refused_with_what_makes_a_list_of_them() -> None:
    """As Polars and DuckDB write them."""
    with pytest.raises(FormatError, match=r"list of objects.* jq -s \."):
        read(b'{"offset":0,"length":512}\n{"offset":4096,"length":512}\n')


def test_no_beginning_takes_long_to_tell_from_the_formats() -> None:
    """A search that tries each end of a name anew takes half a minute of the processor."""
    run_python(
        """
import io, resource
from pybitmap.interchange import FormatError, read_extents
resource.setrlimit(resource.RLIMIT_CPU, (10, 10))
for text in ("<" + "a" * 65536, "<a" * 32768, "<a " * 20000, "<superblock" + " " * 65536):
    try:
        list(read_extents(io.BytesIO(text.encode())))
    except FormatError as error:
        assert "cannot tell" in str(error), error
    else:
        raise AssertionError(text[:20])
"""
    )


def test_a_format_that_there_is_not_is_refused_with_the_nearest() -> None:
    with pytest.raises(FormatError, match="did you mean 'parquet'"):
        read(b"", "parket")


def test_bits_that_begin_beyond_the_disk_are_refused_with_the_byte() -> None:
    options = {"block_size": 512, "bit_order": "lsb", "size": 8 * 512 + 100}
    assert list(read(bytes([0, 1]), "bits", **options).areas()) == [(4096, 100)]
    with pytest.raises(FormatError, match=r"file, byte 1: .*beyond"):
        read(bytes([0, 2]), "bits", **options)


def test_a_roaring_bitmap_of_few_bytes_takes_no_more_memory_than_is_allowed() -> None:
    data = struct.pack("<QI", 1, 1 << 20) + written(
        "roaring", HBitmap.from_extents([(0, 1)]), block_size=1
    )
    with pytest.raises(FormatError, match=r"beyond .*: allow more, .*--memory-limit"):
        read(data, "roaring64", block_size=1)


@pytest.mark.parametrize("runs", [[(9000, 1)], [(7999, 2)], [(0, 9000)], [(70000, 1)]])
def test_numbers_beyond_what_memory_allows_are_refused_with_what_to_say(
    runs: list[tuple[int, int]],
) -> None:
    hb = HBitmap.from_extents(runs)
    for fmt in ("roaring", "roaring64"):
        data = written(fmt, hb, block_size=1)
        with pytest.raises(FormatError, match=r" 8000 items.*: allow more, .*--memory-limit"):
            read(data, fmt, block_size=1, memory_limit=1000)
        assert read(data, fmt, block_size=1, memory_limit=10000) == hb


@pytest.mark.parametrize("fmt", ["bits", "roaring", "roaring64"])
def test_blocks_are_refused_where_there_are_too_many_of_them(fmt: str) -> None:
    """Of a few bytes, blocks may be many where the groups of the bitmap are few."""
    hb = HBitmap.from_extents([(0, 1 << 27)], 1 << 62, group_size=1 << 27)
    with pytest.raises(FormatError, match=r"block, of which the disk has 9.*--block-size"):
        written(fmt, hb, block_size=512, bit_order="lsb")
    hb.truncate(1 << 30)
    with pytest.raises(FormatError, match=r"block, and .* 65536 bytes.*--block-size.*--memory"):
        written(fmt, hb, block_size=64, bit_order="lsb", memory_limit=1 << 16)
    few = written(fmt, hb, block_size=256, bit_order="lsb", memory_limit=1 << 16)
    assert next(read(few, fmt, block_size=256, bit_order="lsb").areas()) == (0, 1 << 27)


@pytest.mark.parametrize("cut", range(0, 24, 3))
def test_a_roaring_bitmap_that_is_cut_is_refused(cut: int) -> None:
    data = written("roaring", HBitmap.from_extents([(1, 2), (70000, 5)]), block_size=1)
    with pytest.raises(FormatError, match="file: "):
        read(data[:cut], "roaring", block_size=1)


@pytest.mark.parametrize("fmt", ARROW)
def test_columns_that_are_cut_or_damaged_are_refused_or_read(fmt: str, extras: Any) -> None:
    """Never another error, whatever byte is wrong."""
    data = written(fmt, HBitmap.from_extents([(0, 512), (4096, 4096)]))
    rng, refused = random.Random(3), 0
    for _ in range(150):
        damaged = bytearray(data)
        if rng.random() < 0.3:
            del damaged[rng.randrange(len(data)) :]
        else:
            damaged[rng.randrange(len(data))] = rng.randrange(256)
        try:
            for _ in read_extents(io.BytesIO(bytes(damaged)), fmt):
                pass
        except FormatError:
            refused += 1
    assert refused > 50


def test_an_arrow_stream_is_whole_or_refused(extras: Any) -> None:
    """Wherever it is cut: who writes one piece by piece may fail in between."""
    import pyarrow as pa

    out = io.BytesIO()
    table = pa.table({"offset": [0, 512, 4096], "length": [1, 2, 3]})
    with pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    whole = out.getvalue()
    assert read(whole) == HBitmap.from_extents([(0, 1), (512, 2), (4096, 3)])
    for end in range(8, len(whole)):
        with pytest.raises(FormatError):
            read(whole[:end])


@pytest.mark.parametrize("fmt", ARROW)
def test_columns_of_another_kind_are_refused(fmt: str, extras: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def refused(words: str, **columns: Any) -> None:
        out = io.BytesIO()
        table = pa.table(columns)
        if fmt == "parquet":
            pq.write_table(table, out)
        else:
            with pa.ipc.new_file(out, table.schema) as writer:
                writer.write_table(table)
        with pytest.raises(FormatError, match=words):
            read(out.getvalue())

    refused("no column 'length'; it has offset, n", offset=[1], n=[1])
    refused("'offset' is of type double", offset=[1.0], length=[1])
    refused("'length' is of type string", offset=[1], length=["1"])
    refused("'dirty' is of type int64", offset=[1], length=[1], dirty=[1])
    refused("row 1: a value is missing", offset=[1, None], length=[1, 1])
    refused("row 1: .*negative", offset=[1, 5], length=[1, -1])
    refused("row 1: .*before the end", offset=[1, 0], length=[1, 1])


@pytest.mark.parametrize("size", [b"9" * 20, b"9" * 19, b"-1", b"x", b"5"])
def test_a_size_that_cannot_be_is_no_error(extras: Any, size: bytes) -> None:
    import pyarrow as pa

    out = io.BytesIO()
    schema = pa.schema([("offset", pa.int64()), ("length", pa.int32())], {"pybitmap.size": size})
    with pa.ipc.new_stream(out, schema) as writer:
        writer.write_batch(pa.record_batch([[0], [10]], schema=schema))
    ends = [each.end for each in read_extents(io.BytesIO(out.getvalue()))]
    assert ends in ([10], [10, (1 << 63) - 1])


def test_without_pyarrow_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from pybitmap.errors import UnsupportedError

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UnsupportedError, match="pip install pyarrow"):
        read(b"ARROW1\0\0")


class Failing:
    """A stream that ends with an error."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, nbytes: int) -> bytes:
        if not self._data:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        data, self._data = self._data[:nbytes], self._data[nbytes:]
        return data


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("end", [0, 20, None])
def test_what_cannot_be_read_is_named(fmt: str, end: int | None) -> None:
    options: dict[str, Any] = {"block_size": 512, "bit_order": "lsb", "since": 0}
    if fmt in ARROW:
        package("pyarrow")
    hb = HBitmap.from_extents([(0, 512), (1 << 20, 512)], 1 << 21)
    if fmt == "era-dump":
        data = (FILES / "era-dump.xml").read_bytes()
    else:
        data = written(fmt, hb, **options)
    stream: Any = Failing(data[:end])
    with pytest.raises(OSError, match="Input/output") as caught:
        list(read_extents(stream, fmt, name="disk.list", **options))
    assert caught.value.filename == "disk.list"


@pytest.mark.parametrize("fmt", ARROW)
def test_a_full_folder_for_temporary_files_is_named(fmt: str, extras: Any, tmp_path: Path) -> None:
    data = written(fmt, HBitmap.from_extents((2 * i, 1) for i in range(10_000)))
    (tmp_path / "data").write_bytes(data)
    run_python(
        f"""
import resource
from pybitmap.interchange import read_bitmap
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    read_bitmap({str(tmp_path)!r} + "/data", {fmt!r})
except OSError as error:
    assert (error.strerror, error.filename) == ("File too large", {str(tmp_path)!r}), error
else:
    raise AssertionError
""",
        TMPDIR=str(tmp_path),
    )


def test_a_reader_that_is_left_early_has_given_what_is_right() -> None:
    text = b'[{"offset": 0, "length": 5}, {"offset": 9, "length": 5}, nonsense'
    extents: Iterator[Extent] = read_extents(io.BytesIO(text), "json")
    assert next(extents) == (0, 5, True)
    assert next(extents) == (9, 5, True)
    with pytest.raises(FormatError):
        next(extents)


@settings(max_examples=settings().max_examples // 2)
@given(st.binary(max_size=200), st.sampled_from([None, *FORMATS]))
def test_no_bytes_make_another_error(data: bytes, fmt: str | None) -> None:
    if fmt in ARROW:
        package("pyarrow")
    with suppress(FormatError):
        for _ in read_extents(
            io.BytesIO(data), fmt, block_size=512, bit_order="lsb", since=0, size=1 << 40
        ):
            pass
