# SPDX-License-Identifier: MIT
"""Options that cannot be are refused before anything is read or written."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from pybitmap import HBitmap
from pybitmap.errors import InvalidError
from pybitmap.interchange import FORMATS, Options, read_bitmap, read_extents, write_bitmap

WRONG: list[tuple[str, Any]] = [
    ("block_size", 0),  # all blocks would be of no bytes, and nothing dirty
    ("block_size", -512),
    ("block_size", 1 << 63),
    ("size", -1),
    ("size", 1 << 63),
    ("since", -1),
    ("memory_limit", -1),
    ("bit_order", "big"),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_what_cannot_be_is_refused_in_reading(tmp_path: Path, name: str, value: Any) -> None:
    path = tmp_path / "a.bits"
    path.write_bytes(b"\xff")
    options: dict[str, Any] = {"block_size": 512, "bit_order": "lsb", name: value}
    with pytest.raises(InvalidError, match=name):
        read_bitmap(path, "bits", **options)
    with pytest.raises(InvalidError, match=name):
        read_extents(io.BytesIO(b"\xff"), "bits", **options)


@pytest.mark.parametrize("fmt", [name for name, each in FORMATS.items() if each.write])
@pytest.mark.parametrize("block_size", [0, -512])
def test_nor_is_anything_written(tmp_path: Path, fmt: str, block_size: int) -> None:
    path = tmp_path / "there"
    path.write_bytes(b"as it was")
    with pytest.raises(InvalidError, match="block_size"):
        write_bitmap(HBitmap(10), path, fmt, block_size=block_size, bit_order="lsb")
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [b"as it was"]


@pytest.mark.parametrize("name", ["block_size", "size", "since", "memory_limit"])
@pytest.mark.parametrize("value", [1.5, "4096", [512]])
def test_numbers_are_whole(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name} .*whole number"):
        Options(**{name: value})


def test_whole_numbers_of_others_are_taken() -> None:
    class Number:
        def __index__(self) -> int:
            return 4096

    block_size: Any = Number()
    assert Options(block_size=block_size) == Options(block_size=4096)
