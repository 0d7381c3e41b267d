# SPDX-License-Identifier: MIT
"""QEMU and we agree on images, whoever made them."""

from __future__ import annotations

import gzip
import json
import random
import struct
import subprocess
from functools import cache
from pathlib import Path
from typing import Callable

import pytest
from images import (
    FINE,
    MIB,
    UTILS,
    Opened,
    asked,
    check,
    create,
    create_encrypted,
    decrypted,
    known,
    listed,
    loaded,
    qemu_img,
    qemu_io,
)
from peers import peer

from pybitmap import CorruptError, HBitmap

TRACES = Path(__file__).parents[2] / "examples" / "traces"

CLUSTER_SIZES = [1 << bits for bits in range(9, 22)]
WIDTHS = [1, 2, 4, 8, 16, 32, 64]


def scatter(content: HBitmap, seed: int) -> None:
    """Something, and whole clusters of ones and of zeroes."""
    rng = random.Random(seed)
    for _ in range(5):
        start = rng.randrange(content.size)
        length = rng.randrange(1 << rng.randrange(1, content.size.bit_length()))
        content.set(start, min(length, content.size - start))


# ---- every shape of image ---------------------------------------------------


@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES)
def test_images_that_we_change_are_qemus(tmp_path: Path, cluster_size: int) -> None:
    for width in WIDTHS:
        path = create(
            tmp_path / f"image{width}", "100M", cluster_size=cluster_size, refcount_bits=width
        )
        with Opened(path) as image:
            for granularity in (512, 4096, 1 << 31):
                scatter(image.add(f"g{granularity}", granularity), cluster_size + width)
            image.add("disabled", enabled=False).set(0, image.volume.size)
            image.flush()
            expected = known(image)
        assert check(path) == FINE
        # Again, with clusters that have become free.
        with Opened(path) as image:
            assert known(image) == expected
            image.remove("g4096")
            image.commit()
            scatter(image.bitmaps["g512"], width)
            image.add("late")
            expected = known(image)
        assert check(path) == FINE
        assert listed(path) == [
            ("disabled", 512, []),
            ("g2147483648", 1 << 31, ["auto"]),
            ("g512", 512, ["auto"]),
            ("late", 512, ["auto"]),
        ]
        if width in (1, 16, 64):
            assert asked(path) == expected
        # And back to what it was.
        with Opened(path) as image:
            image.records.clear()
        assert check(path) == FINE
        assert listed(path) == []


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 * MIB])
def test_images_of_qemu_load_and_survive_us(tmp_path: Path, cluster_size: int) -> None:
    for width in (1, 16, 64):
        path = create(
            tmp_path / f"image{width}", "40M", cluster_size=cluster_size, refcount_bits=width
        )
        qemu_img("bitmap", "--add", "-g", "512", path, "fine")
        qemu_img("bitmap", "--add", "-g", "1M", path, "coarse")
        qemu_img("bitmap", "--add", "--disable", path, "disabled")
        qemu_io(path, "write 512 1M", "write 20M 12345", "discard 30M 64k")
        said = asked(path)
        assert loaded(path) == said
        order = listed(path)
        with Opened(path) as image:
            assert known(image) == said
        assert check(path) == FINE
        assert listed(path) == order
        assert asked(path) == said
        # QEMU goes on with it, and we after it.
        qemu_io(path, "write 5M 3M", "read -P 0 35M 1M", "read -P 0xcd 512 1M")
        qemu_img("bitmap", "--remove", path, "coarse")
        assert check(path) == FINE
        assert loaded(path) == asked(path) != said


def variants() -> dict[str, dict[str, object]]:
    return {
        "data file": {"data_file": "data"},
        "raw data file": {"data_file": "data", "data_file_raw": "on"},
        "extended l2": {"extended_l2": "on", "cluster_size": 16384},
        "lazy refcounts": {"lazy_refcounts": "on"},
        "backing": {"backing_file": "base", "backing_fmt": "qcow2"},
        "small backing": {"backing_file": "base", "backing_fmt": "qcow2", "cluster_size": 512},
        "zstd": {"compression_type": "zstd"},
    }


@pytest.mark.parametrize("name", variants())
def test_the_rest_of_an_image_stays_as_it_is(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = variants()[name]
    create(Path("base"), "8M")
    qemu_io("base", "write -P 7 1M 64k")
    path = create(tmp_path / "image", "8M", **options)
    qemu_io(path, "write -P 1 0 300k", "write -z 2M 64k")
    compressed = "data" not in name
    if compressed:
        qemu_io(path, "write -c -P 2 4M 128k")
        qemu_img("snapshot", "-c", "then", path)
        qemu_io(path, "write -P 3 0 100k")
    before = json.loads(qemu_img("info", "--output=json", path))
    data = qemu_img("map", "--output=json", path)
    with Opened(path) as image:
        scatter(image.add("a"), 1)
        image.commit()
    assert check(path) == FINE
    after = json.loads(qemu_img("info", "--output=json", path))
    expected = loaded(path)
    assert asked(path) == expected
    del after["format-specific"]["data"]["bitmaps"]
    for info in (before, after):
        info.pop("actual-size")
        info.pop("children", None)
    assert after == before
    if compressed:  # in a data file holes come later
        assert qemu_img("map", "--output=json", path) == data
    qemu_io(path, "read -P 3 0 100k" if compressed else "read -P 1 0 100k", "read -P 0 2M 64k")
    if compressed:
        qemu_io(path, "read -P 2 4M 128k")
    if "backing" in name:
        qemu_io(path, "read -P 7 1M 64k")


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], bytes]:
    """Images of 8 MiB, by method; a key takes seconds to make."""
    folder = tmp_path_factory.mktemp("encrypted")
    return cache(lambda method: create_encrypted(folder / method, method, "8M").read_bytes())


@pytest.mark.parametrize("method", ["luks", "aes"])
def test_of_an_encrypted_image_the_bitmaps_are_not(
    tmp_path: Path, encrypted: Callable[[str], bytes], method: str
) -> None:
    path = tmp_path / "image"
    path.write_bytes(encrypted(method))
    opened = decrypted(path)
    *_, disk = opened
    qemu_io(disk, "write -P 1 0 300k", options=opened[:-1])
    for name in ("theirs", "gone"):
        qemu_img("bitmap", "--add", *opened, name)
    qemu_io(disk, "write -P 2 4M 300k", options=opened[:-1])
    with Opened(path, read_only=True) as image:
        assert list(image.bitmaps["theirs"].areas()) == [(4 * MIB, 320 << 10)]
        header = image.volume._image._encryption
    assert (header is not None) == (method == "luks")
    offset, nbytes = header or (0, 0)
    before = path.read_bytes()[offset : offset + nbytes]
    data = qemu_img("map", "--output=json", *opened)
    with Opened(path) as image:
        scatter(image.add("ours"), 1)
        image.remove("gone")
        image.commit()
        expected = known(image)
    assert qemu_img("check", *opened).startswith("No errors")
    assert path.read_bytes()[offset : offset + nbytes] == before
    assert qemu_img("map", "--output=json", *opened) == data
    qemu_io(disk, "read -P 1 0 300k", "read -P 2 4M 300k", options=opened[:-1])
    # What is in ours goes into a bitmap of QEMU's, and comes back as it was.
    qemu_img("bitmap", "--add", "-g", "512", *opened, "copy")
    qemu_img("bitmap", "--merge", "ours", *opened, "copy")
    assert loaded(path) == {**expected, "copy": expected["ours"]}
    assert qemu_img("check", *opened).startswith("No errors")


def test_the_header_of_an_encryption_is_nobody_elses(
    tmp_path: Path, encrypted: Callable[[str], bytes]
) -> None:
    path = tmp_path / "image"
    path.write_bytes(encrypted("luks"))
    with Opened(path) as image:
        image.add("a").set(0, 1)
    with Opened(path, read_only=True) as image:
        (entry,) = image.volume._entries
    pointer = path.read_bytes().index(bytes.fromhex("0537be77 00000010")) + 8
    data = bytearray(path.read_bytes())
    data[pointer : pointer + 16] = struct.pack(">QQ", entry.table_offset, 4096)
    path.write_bytes(data)
    with pytest.raises(CorruptError, match="bitmap 'a' and the encryption's header overlap"):
        Opened(path)
    for damage, words in (
        (bytes(4) + b"\0\0\0\x10", "does not say where its header is"),
        (bytes.fromhex("0537be77 00000008"), "pointer to the encryption's header is damaged"),
    ):
        data[pointer - 8 : pointer] = damage
        path.write_bytes(data)
        with pytest.raises(CorruptError, match=words):
            loaded(path)
    assert path.read_bytes() == data


@pytest.mark.parametrize("missing", ["base", "data"])
def test_what_an_image_refers_to_need_not_be_there(
    tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = {
        "base": {"backing_file": "base", "backing_fmt": "qcow2"},
        "data": {"data_file": "data"},
    }
    create(Path("base"), "8M")
    path = create(tmp_path / "image", "8M", **options[missing])
    qemu_io(path, "write -P 1 0 300k")
    away = Path(missing).rename("away")
    with Opened(path) as image:
        scatter(image.add("a"), 1)
    away.rename(missing)
    assert check(path) == FINE
    assert asked(path) == loaded(path)
    qemu_io(path, "read -P 1 0 300k")


def test_header_extensions_are_kept_byte_for_byte(tmp_path: Path) -> None:
    create(tmp_path / "base", "8M")
    path = create(tmp_path / "image", "8M", backing_file=tmp_path / "base", backing_fmt="qcow2")
    data = bytearray(path.read_bytes())
    # Behind the two of QEMU: one that nobody knows, with bytes that are not zero as padding.
    end = 0
    offset = int.from_bytes(data[100:104], "big")
    while int.from_bytes(data[offset : offset + 4], "big"):
        offset += 8 + -(-int.from_bytes(data[offset + 4 : offset + 8], "big") // 8) * 8
    name = bytes(data[int.from_bytes(data[8:16], "big") :][: int.from_bytes(data[16:20], "big")])
    unknown = bytes.fromhex("12345678 0000000d") + b"thirteen bytesXX" + bytes(8)
    extensions = bytes(data[112:offset]) + unknown
    end = 112 + len(extensions)
    data[offset : offset + len(unknown)] = unknown
    data[8:16] = end.to_bytes(8, "big")
    data[end : end + len(name)] = name
    path.write_bytes(data)
    assert check(path) == FINE
    with Opened(path) as image:
        image.add("a")
    with Opened(path) as image:
        image.remove("a")
    after = path.read_bytes()
    length = int.from_bytes(after[100:104], "big")
    assert after[length : length + len(extensions)] == extensions
    assert qemu_img("info", path).count(str(tmp_path / "base")) == 1
    assert check(path) == FINE


# ---- bits -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "fio-a", "guest-files"])
def test_the_images_of_the_traces_load_with_qemus_sha256(tmp_path: Path, name: str) -> None:
    path = tmp_path / "image"
    path.write_bytes(gzip.decompress((TRACES / f"{name}.qcow2.gz").read_bytes()))
    truth = json.loads((TRACES / f"{name}.json").read_text())
    expected = {
        f"g{each['granularity']}": (each["count"], each["sha256"]) for each in truth["bitmaps"]
    }
    found = loaded(path)
    assert found
    assert all(value == expected[name] for name, value in found.items())


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "qemu's"])
def test_a_client_reads_the_extents_over_nbd(tmp_path: Path, ours: bool) -> None:
    path = create(tmp_path / "image", 5 * MIB + 512)
    if ours:
        with Opened(path) as image:
            content = image.add("b", 4096, enabled=False)
            scatter(content, 3)
            content.set(content.size - 1, 1)
    else:
        qemu_img("bitmap", "--add", "-g", "4096", path, "b")
        qemu_io(path, "write 4k 8k", "write 1M 1", "write 5M 512")
        qemu_img("bitmap", "--disable", path, "b")
    nbdinfo, qemu_nbd = peer("nbdinfo", "libnbd-bin"), peer("qemu-nbd", UTILS)
    server = f"{qemu_nbd} -r -f qcow2 --bitmap b --socket {tmp_path}/socket {path}"
    process = subprocess.Popen(server.split())
    try:
        done = subprocess.run(
            [
                nbdinfo,
                "--json",
                "--map=qemu:dirty-bitmap:b",
                f"nbd+unix://?socket={tmp_path}/socket",
            ]
            if wait_for(tmp_path / "socket", process)
            else ["false"],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
    finally:
        process.kill()
        process.wait()
    extents = json.loads(done.stdout)
    dirty = [(each["offset"], each["length"]) for each in extents if each["type"]]
    with Opened(path, read_only=True) as image:
        assert list(image.bitmaps["b"].areas()) == merged(dirty)


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> bool:
    while not path.exists():
        if process.poll() is not None:
            return False
    return True


def merged(extents: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """A client may be given a run in pieces."""
    runs: list[tuple[int, int]] = []
    for offset, nbytes in extents:
        if runs and sum(runs[-1]) == offset:
            offset, nbytes = runs[-1][0], runs.pop()[1] + nbytes
        runs.append((offset, nbytes))
    return runs


@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_ones_and_zeroes_take_no_space(tmp_path: Path, cluster_size: int) -> None:
    nbits = cluster_size * 8
    # A last cluster that is full, one bit less, and one more.
    for groups in (2 * nbits - 1, 2 * nbits, 2 * nbits + 1):
        path = create(tmp_path / f"image{groups}", groups * 512, cluster_size=cluster_size)
        with Opened(path) as image:
            content = image.add("b")
            content.set(0, content.size)
            image.add("empty")
        expected = loaded(path)
        assert expected["b"] == (groups * 512, content.sha256())
        assert asked(path) == expected
        assert check(path) == FINE
        with Opened(path, read_only=True) as image:
            assert image.clusters("empty") == 0
            assert image.clusters("b") == (0 if groups == 2 * nbits else 1)


def test_bits_beyond_the_end_are_dropped(tmp_path: Path) -> None:
    """QEMU takes ones beyond the end for dirty once the disk has grown."""
    path = create(tmp_path / "image", MIB)
    with Opened(path) as image:
        image.add("b", 65536).set(0, MIB)
    # The cluster of 16 bits becomes one of all ones.
    with Opened(path, read_only=True) as image:
        (entry,) = image.volume._entries
        table = entry.table_offset
    data = bytearray(path.read_bytes())
    data[table : table + 8] = (1).to_bytes(8, "big")
    path.write_bytes(data)
    with Opened(path, read_only=True) as image:
        content = image.bitmaps["b"]
        assert content.count() == MIB
        content.truncate(2 * MIB)
        assert content.count() == MIB
    with Opened(path) as image:
        image.bitmaps["b"].reset_all()
        image.bitmaps["b"].set(0, MIB)
    assert asked(path) == loaded(path)
    qemu_img("resize", path, "2M")
    assert asked(path)["b"][0] == MIB
