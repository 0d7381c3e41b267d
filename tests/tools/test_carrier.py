# SPDX-License-Identifier: MIT
"""Empty images for bitmaps: what QEMU and our own store find in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from images import check, qemu_img

from pybitmap.errors import InvalidError
from pybitmap.store import Qcow2Store
from pybitmap.tools.carrier import write_carrier

#: Both sides of what one entry, one cluster of entries, and the smaller clusters can have.
SIZES = [0, 512, (1 << 29) - 512, 1 << 29, (1 << 29) + 512, 1 << 42, (1 << 42) + 512]
SIZES += [1 << 51, (1 << 51) + 512, 1 << 61]


@pytest.mark.parametrize("size", SIZES)
def test_qemu_finds_an_image_without_faults(tmp_path: Path, size: int) -> None:
    path = tmp_path / "image"
    write_carrier(path, size)
    info = json.loads(qemu_img("info", "--output=json", path))
    assert (info["format"], info["virtual-size"]) == ("qcow2", size)
    assert check(path) == 0
    assert path.stat().st_blocks * 512 < 64 << 20


def test_our_store_finds_one(tmp_path: Path) -> None:
    write_carrier(tmp_path / "image", 1 << 40)
    [node] = Qcow2Store(tmp_path / "image").entries()
    assert (node.size, node.bitmaps) == (1 << 40, [])


def test_it_is_never_written_over_another_file(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        write_carrier(path, 512)
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize("size", [-512, 1, 511, (1 << 61) + 512])
def test_sizes_that_no_image_has_are_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(InvalidError, match="cannot have a size"):
        write_carrier(tmp_path / "image", size)
    assert not (tmp_path / "image").exists()
