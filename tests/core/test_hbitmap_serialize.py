# SPDX-License-Identifier: MIT
"""What goes in and out as bytes: serialize, deserialize, SHA-256, words, pickle, copies.

With NumPy: test_hbitmap_numpy.py.
"""

from __future__ import annotations

import copy
import hashlib
import pickle
import struct
import sys
from array import array
from typing import Any, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model import Model, assert_same
from support import collect

from pybitmap import HBitmap, InvalidError, RangeError, _core

pytestmark = pytest.mark.core

MAX_SIZE = 2**63 - 1


def pair(size: int, granularity: int = 0, *marks: tuple[int, int]) -> tuple[HBitmap, Model]:
    hb, model = HBitmap(size, granularity), Model(size, granularity)
    for start, count in marks:
        hb.set(start, count)
        model.set(start, count)
    return hb, model


def on_the_other_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on this one is taken for one of the other byte order, so what is the same on every
    machine comes out with each word of 64 bits swapped."""
    other = "big" if sys.byteorder == "little" else "little"
    monkeypatch.setattr(sys, "byteorder", other)


# ---- serialize ------------------------------------------------------------------------------


def test_the_bits_are_little_endian_words() -> None:
    hb = HBitmap(128)
    for item in (0, 9, 63, 64):
        hb.add(item)
    assert hb.serialize() == bytes([1, 2, 0, 0, 0, 0, 0, 0x80, 1, 0, 0, 0, 0, 0, 0, 0])


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [(0, 0), (1, 8), (63, 8), (64, 8), (65, 16), (4095, 512), (4096, 512), (4097, 520)],
)
def test_serialized_data_are_whole_words(size: int, nbytes: int) -> None:
    assert len(HBitmap(size).serialize()) == nbytes
    assert len(HBitmap(size << 20, 20).serialize()) == nbytes


@pytest.mark.parametrize("granularity", range(58))
def test_a_round_trip_over_every_serializable_granularity(granularity: int) -> None:
    group = 1 << granularity
    size = min(130 * group, MAX_SIZE) - group // 3
    hb, model = pair(size, granularity, (0, 1), (size - 1, 1))
    data = hb.serialize()
    assert data == model.serialize()
    assert HBitmap.from_bytes(data, size, granularity) == hb
    other = HBitmap(size, granularity)
    other.set(0, size)
    other.deserialize(data)
    assert_same(other, model)


@pytest.mark.parametrize("granularity", range(58, 64))
def test_granularities_from_58_on_are_not_serializable(granularity: int) -> None:
    hb, model = pair(MAX_SIZE, granularity, (0, 1))
    with pytest.raises(InvalidError, match=f"granularity {granularity}"):
        hb.serialize()
    with pytest.raises(InvalidError, match=f"granularity {granularity}"):
        hb.deserialize(b"\1" + bytes(7))
    with pytest.raises(InvalidError, match=f"granularity {granularity}"):
        HBitmap.from_bytes(b"\1" + bytes(7), MAX_SIZE, granularity)
    assert_same(hb, model)


@pytest.mark.parametrize(
    ("start", "count", "first", "end"),
    [(0, 128, 0, 1), (0, 256, 0, 2), (256, 256, 2, 4), (768, 232, 6, 8), (896, 104, 7, 8)],
)
def test_a_chunk_is_a_part_of_the_whole(start: int, count: int, first: int, end: int) -> None:
    hb, _ = pair(1000, 1, (0, 5), (130, 7), (300, 1), (900, 100))
    assert hb.serialize(start, count) == hb.serialize()[8 * first : 8 * end]


def test_the_last_chunk_may_end_anywhere_in_the_last_group() -> None:
    hb, _ = pair(1001, 3, (0, 5), (900, 100))
    whole = hb.serialize()
    for count in (1001, 1002, 1008):
        assert hb.serialize(0, count) == whole
    for count in (1000, 1009, 1007 + 512):
        with pytest.raises(InvalidError):
            hb.serialize(0, count)


@pytest.mark.parametrize(("start", "count"), [(1, 127), (64, 64), (0, 127), (0, 129), (128, 64)])
def test_chunks_that_are_not_aligned_are_refused(start: int, count: int) -> None:
    hb = HBitmap(1000, 1)
    with pytest.raises(InvalidError, match=rf"\[{start}, {start + count}\).*128 items"):
        hb.serialize(start, count)


@pytest.mark.parametrize(
    ("start", "count"),
    [
        *[(0, 1128), (1000, 128), (1024, 1), (-1, 1), (-128, 128), (128, -1)],
        *[(2**63, 128), (2**64, 1), (0, 2**64), (128, 2**64 - 128), (0, 2**100), (-(2**100), 5)],
    ],
)
def test_chunks_outside_are_refused(start: int, count: int) -> None:
    hb = HBitmap(1000, 1)
    with pytest.raises(RangeError, match=rf"\[{start}, {start + count}\).*1000 items"):
        hb.serialize(start, count)


def test_a_chunk_of_nothing_is_empty() -> None:
    hb = HBitmap(1000)
    assert hb.serialize(64, 0) == b""
    assert hb.serialize(1000) == b""


# ---- deserialize ----------------------------------------------------------------------------


def test_deserialize_replaces_the_bits_of_its_chunk_only() -> None:
    hb, model = pair(300, 0, (0, 300))
    hb.deserialize(b"\1" + bytes(15), 64)
    model.deserialize(b"\1" + bytes(15), 64)
    assert_same(hb, model)
    assert list(hb.areas()) == [(0, 65), (192, 108)]


@pytest.mark.parametrize("size", [1, 63, 65, 100, 127])
def test_bits_beyond_the_end_are_dropped(size: int) -> None:
    hb = HBitmap(size)
    hb.deserialize(b"\xff" * len(hb.serialize()))
    assert_same(hb, pair(size, 0, (0, size))[1])
    hb.truncate(200)
    assert list(hb.areas()) == [(0, size)]


@pytest.mark.parametrize("nbytes", [0, 8, 16, 24])
def test_deserialize_takes_whole_words_up_to_the_end(nbytes: int) -> None:
    hb, model = pair(150, 0, (0, 150))
    hb.deserialize(bytes(nbytes))
    model.deserialize(bytes(nbytes))
    assert_same(hb, model)


@pytest.mark.parametrize("nbytes", [1, 7, 9, 23, 25, 32, 2**16])
def test_truncated_and_oversized_data_are_refused(nbytes: int) -> None:
    hb, model = pair(150, 0, (20, 100))
    with pytest.raises(InvalidError, match=f"{nbytes} bytes.*150 items"):
        hb.deserialize(b"\xff" * nbytes)
    assert_same(hb, model)


def test_what_is_too_long_from_its_start_on_is_refused() -> None:
    hb, model = pair(150, 0, (20, 100))
    with pytest.raises(InvalidError, match="16 bytes"):
        hb.deserialize(b"\xff" * 16, 128)
    assert_same(hb, model)


@pytest.mark.parametrize("start", [1, 63, 100, 149])
def test_a_start_that_is_not_aligned_is_refused(start: int) -> None:
    hb, model = pair(150, 0, (20, 100))
    with pytest.raises(InvalidError, match=str(start)):
        hb.deserialize(b"\xff" * 8, start)
    assert_same(hb, model)


@pytest.mark.parametrize("start", [-1, -64, 151, 192, 2**63, 2**64, -(2**64)])
def test_a_start_outside_is_refused(start: int) -> None:
    hb, model = pair(150, 0, (20, 100))
    with pytest.raises(RangeError, match=rf"{start}.*150 items"):
        hb.deserialize(b"\xff" * 8, start)
    assert_same(hb, model)


WRONG_DATA: list[Any] = [
    *["12345678", 8, None, [0] * 8, object()],
    *[array("Q", [1]), array("H", [1] * 4), array("d", [1.0])],
]


@pytest.mark.parametrize("data", WRONG_DATA, ids=lambda data: repr(data).split(" at ")[0][:20])
def test_data_that_are_no_bytes_are_refused(data: Any) -> None:
    hb, model = pair(64, 0, (20, 10))
    with pytest.raises(TypeError, match="data must be"):
        hb.deserialize(data)
    with pytest.raises(TypeError, match="data must be"):
        HBitmap.from_bytes(data, 64)
    assert_same(hb, model)


def test_data_with_gaps_are_refused() -> None:
    hb, model = pair(64, 0, (20, 10))
    with pytest.raises(InvalidError, match="contiguous"):
        hb.deserialize(memoryview(b"\xff" * 16)[::2])
    assert_same(hb, model)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda data: array("B", data)])
def test_any_buffer_of_bytes_will_do(kind: Callable[[bytes], Any]) -> None:
    hb = HBitmap(64)
    hb.deserialize(kind(b"\x05" + bytes(7)))
    assert list(hb) == [0, 2]


@pytest.mark.parametrize("nbytes", [0, 7, 8, 15, 17, 24])
def test_from_bytes_takes_exactly_as_much_as_there_is(nbytes: int) -> None:
    with pytest.raises(InvalidError, match=f"{nbytes} bytes.*100 items.*16"):
        HBitmap.from_bytes(bytes(nbytes), 100)


def test_from_bytes_of_an_empty_bitmap() -> None:
    assert HBitmap.from_bytes(b"", 0, 5) == HBitmap(0, 5)
    with pytest.raises(InvalidError):
        HBitmap.from_bytes(bytes(8), 0)


@given(st.binary(max_size=60), st.integers(0, 300), st.integers(-10, 310))
def test_any_bytes_are_taken_or_refused_as_the_model_does(
    data: bytes, size: int, start: int
) -> None:
    hb, model = pair(size, 0, (0, size // 2))
    try:
        model.deserialize(data, start)
    except ValueError:
        with pytest.raises(InvalidError):
            hb.deserialize(data, start)
    else:
        hb.deserialize(data, start)
    assert_same(hb, model)


# ---- sha256 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 4095, 4096, 4097])
def test_sha256_is_that_of_the_leaf_words_at_least_one(size: int) -> None:
    hb, model = pair(size, 0, (size // 3, size // 2))
    assert hb.sha256() == hashlib.sha256(model.leaf()).hexdigest()
    assert len(model.leaf()) >= 8


@pytest.mark.parametrize("granularity", [0, 57, 58, 63])
def test_sha256_needs_no_serializable_granularity(granularity: int) -> None:
    hb = HBitmap(1 << min(granularity, 62), granularity)
    hb.add(0)
    assert hb.sha256() == hashlib.sha256(b"\1" + bytes(7)).hexdigest()


def test_sha256_is_the_same_on_every_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of little-endian words."""
    hb, model = pair(4097 * 64, 0, (100, 200), (4000 * 64, 1))
    swapped = array("Q", model.leaf())
    swapped.byteswap()
    assert hb.sha256() == hashlib.sha256(model.leaf()).hexdigest()
    on_the_other_machine(monkeypatch)
    monkeypatch.setattr("pybitmap.hbitmap._DIGEST_STEP", 4096)  # several, the last one shorter
    assert hb.sha256() == hashlib.sha256(swapped.tobytes()).hexdigest()


def test_sha256_leaves_no_pin() -> None:
    hb = HBitmap(100)
    hb.sha256()
    hb.truncate(200)
    assert hb.size == 200


# ---- words ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "nwords"), [(0, 1), (1, 1), (64, 1), (65, 2), (4097, 65)])
def test_words_are_the_leaf(size: int, nwords: int) -> None:
    hb, model = pair(size, 0, (size // 3, size // 2))
    words = hb.words
    assert (words.format, words.shape, words.itemsize) == ("Q", (nwords,), 8)
    assert words.tobytes() == model.words()


def test_words_are_read_only() -> None:
    words = HBitmap(100).words
    assert words.readonly
    with pytest.raises(TypeError):
        words[0] = 1


def test_words_are_live() -> None:
    hb = HBitmap(100)
    words = hb.words
    assert words[1] == 0
    hb.add(70)
    assert words[1] == 1 << 6
    hb.clear()
    assert words[1] == 0


def test_words_of_a_deleted_bitmap_stay() -> None:
    hb = HBitmap(2**24)
    hb.add(2**24 - 1)
    words = hb.words
    del hb
    collect()
    fill = [HBitmap(2**24) | [n] for n in range(10)]
    assert words[-1] == 1 << 63
    assert len(fill) == 10


# ---- copies ---------------------------------------------------------------------------------

SHAPES: list[tuple[int, int, list[tuple[int, int]]]] = [
    (0, 0, []),
    (0, 63, []),
    (1, 0, [(0, 1)]),
    (1000, 0, []),
    (1000, 0, [(0, 1000)]),
    (100000, 3, [(5, 1), (70000, 300), (99999, 1)]),
    (100000, 0, [(start, 1) for start in range(0, 100000, 7)]),
    (2**40, 0, [(12345, 1), (2**40 - 1, 1)]),
    (MAX_SIZE, 58, [(0, 1), (MAX_SIZE - 1, 1)]),
    (MAX_SIZE, 63, [(5, 1)]),
    (2**62, 61, [(0, 2**62)]),
    (2**62 - 5, 60, [(2**61, 2**60)]),
]
IDS = [f"{size}-{granularity}-{len(marks)}" for size, granularity, marks in SHAPES]
COPIES: list[Any] = [HBitmap.copy, copy.copy, copy.deepcopy]


def marked(size: int, granularity: int, marks: list[tuple[int, int]]) -> HBitmap:
    hb = HBitmap(size, granularity)
    for start, count in marks:
        hb.set(start, count)
    return hb


@pytest.mark.parametrize(("size", "granularity", "marks"), SHAPES, ids=IDS)
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_equal_and_its_own(
    how: Callable[[HBitmap], HBitmap], size: int, granularity: int, marks: list[tuple[int, int]]
) -> None:
    hb = marked(size, granularity, marks)
    twin = how(hb)
    assert type(twin) is HBitmap
    assert twin == hb
    assert list(twin) == list(hb)
    twin.clear()
    assert list(hb.areas()) == list(marked(size, granularity, marks).areas())
    assert twin.empty()


def test_a_copy_is_not_pinned_by_the_original_s_words() -> None:
    hb = HBitmap(100)
    words = hb.words
    twin = copy.copy(hb)
    twin.truncate(5)
    assert (hb.size, twin.size, len(words)) == (100, 5, 2)


def test_deepcopy_keeps_identity_within_a_structure() -> None:
    hb = HBitmap(100)
    first, second = copy.deepcopy([hb, hb])
    assert first is second


# ---- pickle ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "granularity", "marks"), SHAPES, ids=IDS)
@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_pickle_keeps_all(
    protocol: int, size: int, granularity: int, marks: list[tuple[int, int]]
) -> None:
    hb = marked(size, granularity, marks)
    twin = pickle.loads(pickle.dumps(hb, protocol))
    assert type(twin) is HBitmap
    assert twin == hb
    assert (twin.size, twin.granularity) == (size, granularity)


def out_of_band(hb: HBitmap) -> tuple[bytes, list[pickle.PickleBuffer]]:
    buffers: list[pickle.PickleBuffer] = []
    return pickle.dumps(hb, 5, buffer_callback=buffers.append), buffers


@pytest.mark.parametrize(("size", "granularity", "marks"), SHAPES, ids=IDS)
def test_pickle_out_of_band_keeps_all(
    size: int, granularity: int, marks: list[tuple[int, int]]
) -> None:
    hb = marked(size, granularity, marks)
    data, buffers = out_of_band(hb)
    assert pickle.loads(data, buffers=buffers) == hb
    as_received: list[Any] = [bytes(buffer) for buffer in buffers]
    assert pickle.loads(data, buffers=as_received) == hb
    as_received = [bytearray(buffer) for buffer in buffers]
    assert pickle.loads(data, buffers=as_received) == hb


def test_a_dense_bitmap_goes_out_of_band_as_words() -> None:
    hb = marked(2**20, 0, [(start, 1) for start in range(0, 2**20, 64)])
    data, buffers = out_of_band(hb)
    assert len(data) < 500
    assert [bytes(buffer) for buffer in buffers] == [hb.serialize()]


def test_a_sparse_bitmap_is_pickled_as_areas() -> None:
    hb = marked(2**40, 0, [(5, 10), (2**39, 3)])
    assert len(pickle.dumps(hb, 5)) < 500
    assert len(pickle.dumps(hb, 2)) < 500


@pytest.mark.parametrize(
    ("nwords", "dirty", "dense"), [(64, 8, False), (64, 9, True), (1, 0, False), (1, 1, True)]
)
@pytest.mark.parametrize("cut", [0, 1, 63])
def test_words_are_pickled_if_more_than_an_eighth_are_not_zero(
    nwords: int, dirty: int, dense: bool, cut: int
) -> None:
    hb = HBitmap(64 * nwords - cut)
    for word in range(dirty):
        hb.set(64 * word, 1)
    _, buffers = out_of_band(hb)
    sizes = [memoryview(buffer).nbytes for buffer in buffers]
    assert sizes == ([8 * nwords] if dense else [16 * dirty])


def test_a_pickle_of_areas_is_the_same_on_every_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of words, for which `serialize` sees to it: little-endian."""
    hb = marked(2**20, 0, [(5, 10), (2**19, 3)])
    _, (areas,) = out_of_band(hb)
    assert bytes(areas) == struct.pack("<4Q", 5, 10, 2**19, 3)
    on_the_other_machine(monkeypatch)
    data, buffers = out_of_band(hb)
    assert bytes(buffers[0]) == struct.pack(">4Q", 5, 10, 2**19, 3)
    assert pickle.loads(data, buffers=buffers) == hb


def test_a_pickled_bitmap_is_its_own() -> None:
    hb = marked(1000, 0, [(0, 1000)])
    data, buffers = out_of_band(hb)
    hb.clear()
    twin = pickle.loads(data, buffers=buffers)
    assert len(twin) == 1000
    twin.reset(5)
    assert len(pickle.loads(data, buffers=buffers)) == 1000


def test_pickling_leaves_no_pin() -> None:
    hb = marked(1000, 0, [(0, 1000)])
    pickle.dumps(hb, 5)
    copy.copy(hb)
    hb.serialize()
    hb.truncate(5)
    assert hb.size == 5


def test_a_structure_keeps_identity_in_a_pickle() -> None:
    hb = HBitmap(100)
    first, second = pickle.loads(pickle.dumps([hb, hb]))
    assert first is second


def test_a_truncate_while_serialize_runs_finds_room_for_the_chunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The chunk does not fit the old size, and does fit the new one."""
    hb = HBitmap(200)
    hb.set(0, 200)
    real = _core.hbitmap_serialize_part

    def truncate_first(*args: Any) -> Any:
        hb.truncate(100)
        return real(*args)

    monkeypatch.setattr(_core, "hbitmap_serialize_part", truncate_first)
    assert hb.serialize(0, 100) == b"\xff" * 12 + b"\x0f\0\0\0"
