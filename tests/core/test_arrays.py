# SPDX-License-Identifier: MIT
"""Areas, items and masks in one piece, without NumPy: what they are, whose their memory is."""

from __future__ import annotations

import copy
import ctypes
import os
import pickle
import sys
import threading
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

import pytest
from peers import package
from support import collect, run_python

from pybitmap import HBitmap, InvalidError, RangeError
from pybitmap._cffi import ffi
from pybitmap.arrays import Numbers

pytestmark = pytest.mark.core

PYPY = sys.implementation.name == "pypy"
peers = pytest.mark.skipif(PYPY, reason="bitarray and pyarrow are CPython's")
capsules = pytest.mark.skipif(sys.implementation.name != "cpython", reason="capsules are CPython's")


def bitmap() -> HBitmap:
    hb = HBitmap(1000)
    hb.set_many([10, 50, 90], [20, 1, 2])
    return hb


AREAS = [(10, 20), (50, 1), (90, 2)]
ITEMS = [*range(10, 30), 50, 90, 91]


# ---- areas and items ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "rows"), [(bitmap().areas_array(), AREAS), (bitmap().items_array(), ITEMS)]
)
def test_rows_are_reached_as_those_of_a_sequence(numbers: Numbers[Any], rows: list[Any]) -> None:
    assert list(numbers) == rows
    assert len(numbers) == len(rows)
    assert [numbers[i] for i in range(-len(rows), len(rows))] == rows + rows
    for bad in (len(rows), -len(rows) - 1, 2**70):
        with pytest.raises(IndexError, match="no row"):
            numbers[bad]
    for key in (slice(1, 3), slice(None, None, -1), slice(0, 0), slice(9, 5), slice(-2, None, 2)):
        some = numbers[key]
        assert type(some) is type(numbers)
        assert list(some) == rows[key]
    assert rows[0] in numbers
    assert type(numbers)(numbers.data.cast("B").cast("Q"), len(rows)) == numbers
    assert numbers != numbers[1:]


def test_they_are_no_sequences_by_name_which_tables_would_go_through_row_by_row() -> None:
    assert not isinstance(bitmap().areas_array(), Sequence)
    assert not isinstance(bitmap().items_array(), Sequence)


def test_columns_are_views_that_go_back_into_a_bitmap() -> None:
    areas, other = bitmap().areas_array(), HBitmap(1000)
    assert areas.offset.tolist() == [10, 50, 90]
    assert areas.length.tolist() == [20, 1, 2]
    other.set_many(areas.offset, areas.length)
    assert other == bitmap()
    empty = HBitmap(10).areas_array()
    assert (empty.offset.tolist(), empty.length.tolist(), list(empty)) == ([], [], [])


@pytest.mark.parametrize("numbers", [bitmap().areas_array(), HBitmap(5).items_array()])
def test_numbers_are_copied_and_pickled(numbers: Numbers[Any]) -> None:
    for same in (copy.copy(numbers), copy.deepcopy(numbers), pickle.loads(pickle.dumps(numbers))):
        assert type(same) is type(numbers)
        assert same == numbers
        assert same.shape == numbers.shape


def test_numbers_of_a_machine_of_the_other_byte_order_are_turned_round() -> None:
    make, (kind, length, order, data) = bitmap().areas_array().__reduce__()
    turned = array("Q", data)
    turned.byteswap()
    other = {"little": "big", "big": "little"}[order]
    assert make(kind, length, other, turned.tobytes()) == bitmap().areas_array()


def test_their_text_is_short() -> None:
    assert repr(bitmap().items_array()) == "<Items [10, 11, 12, ...] of 23>"
    assert repr(HBitmap(5).areas_array()) == "<Areas [] of 0>"


def test_bytes_are_those_of_the_numbers() -> None:
    assert bytes(bitmap().areas_array()) == array("Q", [10, 20, 50, 1, 90, 2]).tobytes()
    assert bytes(HBitmap(5).areas_array()) == b""
    assert bitmap().areas_array().nbytes == 48


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python classes are buffers from 3.12 on")
def test_they_are_buffers() -> None:
    assert memoryview(bitmap().areas_array()).shape == (3, 2)  # type: ignore[arg-type,unused-ignore]


def test_data_can_be_changed_and_is_kept_by_its_views() -> None:
    areas = bitmap().areas_array()
    data, column = areas.data, areas.length
    data[1, 1] = 7
    del areas
    collect()
    assert column.tolist() == [20, 7, 2]
    assert data.cast("B").cast("Q")[2:4].tolist() == [50, 7]


# ---- masks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ngroups", [0, 1, 7, 8, 9, 63, 64, 65, 4095, 4096, 4097])
@pytest.mark.parametrize("granularity", [0, 5])
def test_a_mask_there_and_back_is_the_same(ngroups: int, granularity: int) -> None:
    for size in {ngroups << granularity, max(0, (ngroups << granularity) - granularity)}:
        mask = [group % 3 == 0 or group % 64 > 60 for group in range(ngroups)]
        hb = HBitmap.from_mask(mask, size=size, granularity=granularity)
        assert (hb.size, hb.granularity) == (size, granularity)
        assert list(hb) == [group << granularity for group in range(ngroups) if mask[group]]
        assert hb.to_mask().tolist() == mask
        assert HBitmap.from_mask(hb.to_mask(), size=size, granularity=granularity) == hb


@pytest.mark.parametrize("granularity", [57, 58, 62, 63])
def test_a_mask_of_the_largest_bitmaps(granularity: int) -> None:
    hb = HBitmap(2**63 - 1, granularity)
    hb.add(2**63 - 2)
    mask = hb.to_mask()
    assert mask.tolist() == [False] * (2 ** (63 - granularity) - 1) + [True]
    assert HBitmap.from_mask(mask, size=hb.size, granularity=granularity) == hb
    assert HBitmap.from_mask(mask, granularity=granularity) == hb


def test_a_mask_of_a_range_has_the_groups_that_touch_it() -> None:
    hb = HBitmap(1000, granularity=2)
    hb.set(100, 300)
    whole = hb.to_mask().tolist()
    for start, end in [(0, 1), (3, 5), (99, 103), (257, 263), (390, None), (996, 10**30)]:
        last = 250 if end is None or end > 1000 else -(-end // 4)
        assert hb.to_mask(start, end=end).tolist() == whole[start // 4 : last]
    for start, end in [(5000, None), (8, 3), (7, 5), (5, 5), (0, 0), (1000, None), (998, 997)]:
        assert hb.to_mask(start, end=end).tolist() == []
    assert HBitmap(998, granularity=2).to_mask(999).tolist() == []  # of the group that is cut
    for bad in ({"start": -1}, {"end": -1}):
        with pytest.raises(RangeError, match="negative"):
            hb.to_mask(**bad)


MASKS: list[Any] = [
    [False, True, True, False],
    (0, 1, 1, 0),
    iter([0, True, 1, 0]),
    b"\0\1\1\0",
    bytearray(b"\0\1\1\0"),
    memoryview(b"\0\1\1\0").cast("?"),
    memoryview(b"\0\2\1\3\1\2\0")[::2],
    array("b", [0, 1, 1, 0]),
]


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: type(mask).__name__)
def test_masks_are_lists_and_buffers_of_bools_and_bytes(mask: Any) -> None:
    hb = HBitmap.from_mask(mask, group_size=8)
    assert list(hb) == [8, 16]
    assert hb.size == 32


@pytest.mark.parametrize(
    ("mask", "error", "text"),
    [
        (bytes(70) + b"\2", InvalidError, r"mask\[70\] is 2, .*merge_bits"),
        (b"\x09", InvalidError, "merge_bits"),
        (array("b", [-1]), InvalidError, r"mask\[0\] is 255"),
        (array("Q", [1, 0]), TypeError, r"format 'Q'.*update\(\)"),
        (array("d", [1, 0]), TypeError, "format 'd'"),
        (memoryview(bytes(4)).cast("B", [2, 2]), InvalidError, "one dimension"),
        ([0, 2], TypeError, r"mask\[1\] is 2, no bool"),
        ([None], TypeError, "None"),
        ("01", TypeError, "'0', no bool"),
        (None, TypeError, "mask must be bools, not NoneType"),
        (5, TypeError, "not int"),
    ],
)
def test_what_is_no_mask_is_refused(mask: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        HBitmap.from_mask(mask)


def test_a_size_that_does_not_fit_the_mask_is_refused() -> None:
    for size in (-1, 0, 8, 17):
        with pytest.raises(InvalidError):
            HBitmap.from_mask([True, True], size=size, granularity=3)
    assert list(HBitmap.from_mask([True, True], size=9, granularity=3).areas()) == [(0, 9)]
    with pytest.raises(InvalidError, match="give one of them"):
        HBitmap.from_mask([True], granularity=1, group_size=2)
    with pytest.raises(InvalidError, match="group_size=4096"):
        HBitmap.from_mask([True], granularity=4096)


def test_a_mask_is_given_back_also_by_an_error() -> None:
    for content in (b"\0\1", b"\0\5"):
        mask, errors = bytearray(content), []
        for size in (None, 10**6):
            try:
                HBitmap.from_mask(mask, size=size)
            except InvalidError as error:
                errors.append(error)  # whose traceback keeps frames
        mask.append(1)  # which is refused while somebody has it
        assert errors


def test_a_mask_makes_what_it_is_asked_of_and_is_a_copy() -> None:
    class Pages(HBitmap):
        pass

    hb = Pages.from_mask([True, False])
    assert type(hb) is Pages
    mask = hb.to_mask()
    mask[1] = True
    hb.clear()
    assert (mask.tolist(), list(hb)) == ([True, True], [])


def test_masks_beside_marks_and_truncates_have_what_was_marked_before() -> None:
    hb, sizes, running = HBitmap(1 << 16), (1 << 16, 1 << 15), True
    hb.set(0, 100)

    def change() -> None:
        n = 0
        while running:
            hb.set(200 + n % 10_000)
            hb.truncate(sizes[n % 2])
            n += 1

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(1000):
            mask = hb.to_mask()
            assert len(mask) in sizes
            assert mask[:200].tolist() == [True] * 100 + [False] * 100
            assert set(hb.to_mask(40_000).tolist()) <= {False}
            assert len(hb.to_mask(10, end=20)) == 10
    finally:
        running = False
        thread.join()


def test_a_mask_that_changes_while_it_is_read_is_read_within_its_bounds() -> None:
    mask, running = bytearray(4096), True
    told = set()

    def change() -> None:
        while running:
            for value in (7, 0):
                mask[-1] = value

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(2000):
            try:
                assert HBitmap.from_mask(mask).empty()
            except InvalidError as error:
                told.add(str(error)[:14])
    finally:
        running = False
        thread.join()
    assert told <= {"mask[4095] is "}


# ---- Arrow's streams ------------------------------------------------------------------------


def stream_in(capsule: object) -> Any:
    """The struct in a capsule, which keeps it."""
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return ffi.cast("struct hbarrow_stream *", get(capsule, b"arrow_array_stream"))


@contextmanager
def batch_of(numbers: Numbers[Any]) -> Iterator[Any]:
    """Its batch, moved out of a capsule that is gone by then."""
    capsule = numbers.__arrow_c_stream__()
    stream, batch = stream_in(capsule), ffi.new("struct hbarrow_array *")
    assert stream.get_next(stream, batch) == 0
    del capsule
    yield batch
    if batch.release:
        batch.release(batch)


def values(column: Any) -> list[int]:
    return list(ffi.cast("uint64_t *", column.buffers[1])[0 : column.length])


@capsules
@pytest.mark.parametrize("empty", [False, True])
def test_a_stream_has_its_columns_by_name_in_one_batch(empty: bool) -> None:
    hb = HBitmap(1000) if empty else bitmap()
    for numbers in (hb.areas_array(), hb.items_array()):
        capsule = numbers.__arrow_c_stream__()
        stream = stream_in(capsule)
        schema, batch = ffi.new("struct hbarrow_schema *"), ffi.new("struct hbarrow_array *")
        for _ in range(2):  # as often as one likes
            assert stream.get_schema(stream, schema) == 0
            fields = schema.children[0 : schema.n_children]
            assert ffi.string(schema.format) == b"+s"
            assert [ffi.string(field.format) for field in fields] == [b"L"] * len(numbers.names)
            assert [ffi.string(field.name).decode() for field in fields] == numbers.names
            schema.release(schema)
            assert not schema.release
        assert stream.get_next(stream, batch) == 0
        columns = [values(column) for column in batch.children[0 : batch.n_children]]
        rows = [list(numbers)] if len(columns) == 1 else list(map(list, zip(*numbers))) or [[], []]
        assert columns == rows
        batch.release(batch)
        assert stream.get_next(stream, batch) == 0
        assert not batch.release  # the end
        assert not stream.get_last_error(stream)


@capsules
def test_rows_that_there_are_not_are_no_table() -> None:
    """Who makes one by hand, or changes a pickle, is not to read beyond the numbers."""
    made = type(bitmap().areas_array())(memoryview(array("Q", [1, 2])), 1000)
    with pytest.raises(InvalidError, match="2 numbers are no 1000 rows of 2"):
        made.__arrow_c_stream__()


@capsules
def test_a_table_is_a_copy_that_outlives_all_else() -> None:
    hb = bitmap()
    areas = hb.areas_array()
    with batch_of(areas) as batch:
        areas.data[0, 0] = 5
        del areas, hb
        collect()
        assert values(batch.children[0]) == [10, 50, 90]


@capsules
def test_columns_are_released_in_any_order_in_any_thread() -> None:
    with batch_of(bitmap().areas_array()) as batch:
        # Moved away, which is a copy and a mark in the one that was copied.
        column = ffi.new("struct hbarrow_array *", batch.children[1][0])
        batch.children[1].release = ffi.NULL
        threads = [
            threading.Thread(target=lambda part=part: part.release(part))
            for part in (batch, column)
        ]
        threads[0].start()
        threads[0].join()
        assert not batch.release
        assert values(column) == [20, 1, 2]
        threads[1].start()
        threads[1].join()
        assert not column.release


@capsules
def test_a_stream_that_nobody_takes_or_that_was_moved_goes_with_its_capsule() -> None:
    for read in range(3):
        capsule = bitmap().areas_array().__arrow_c_stream__()
        stream = stream_in(capsule)
        moved: Any = None
        if read:
            moved = ffi.new("struct hbarrow_stream *", stream[0])
            stream.release = ffi.NULL
        if read == 2:
            batch = ffi.new("struct hbarrow_array *")
            moved.get_next(moved, batch)
            batch.release(batch)
        del capsule
        collect()
        if moved:
            moved.release(moved)
            assert not moved.release


@capsules
def test_the_child_of_a_fork_has_its_own() -> None:
    with batch_of(bitmap().areas_array()) as batch:
        waiting = bitmap().items_array().__arrow_c_stream__()
        child = os.fork()
        if not child:
            good = values(batch.children[0]) == [10, 50, 90]
            batch.release(batch)
            del waiting
            os._exit(0 if good else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert values(batch.children[1]) == [20, 1, 2]


@capsules
def test_streams_are_still_there_when_the_interpreter_ends() -> None:
    code = """
import builtins
from pybitmap import HBitmap
hb = HBitmap(1000); hb.set(5, 3)
builtins.kept = [hb.areas_array().__arrow_c_stream__() for _ in range(3)]
cycle = [hb.items_array().__arrow_c_stream__()]; cycle.append(cycle)
"""
    assert run_python(code) == ""
    assert run_python(code, PYBITMAP_PURE_CFFI="1") == ""


@capsules
def test_a_table_without_memory_is_an_error_and_leaves_nothing() -> None:
    code = """
import resource
from pybitmap import HBitmap
from pybitmap.arrays import Items
hb = HBitmap(1 << 22); hb.set(0, 1 << 22)
items = hb.items_array()
limit = resource.getrlimit(resource.RLIMIT_AS)
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20), limit[1]))
try:
    items.__arrow_c_stream__()
except MemoryError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, limit)
print(len(items[:5].__arrow_c_stream__().__class__.__name__) > 0, items[-1])
"""
    if not sys.platform.startswith("linux") or "libasan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("the limit is Linux's, and AddressSanitizer maps more than it")
    assert run_python(code) == f"no memory for a table of {1 << 22} rows\nTrue {(1 << 22) - 1}\n"


@capsules
def test_an_interruption_at_any_line_leaves_nothing_that_harms() -> None:
    """Of a capsule that is made, whatever line is the last."""
    areas = bitmap().areas_array()
    lines = 0
    while True:
        left = lines

        def trace(frame: Any, event: str, arg: Any) -> Any:
            nonlocal left
            if event == "line" and "pybitmap" in frame.f_code.co_filename:
                left -= 1
                if left < 0:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            capsule = areas.__arrow_c_stream__()
        except KeyboardInterrupt:
            lines += 1
            collect()
            continue
        finally:
            sys.settrace(None)
        break
    assert lines > 5
    stream = stream_in(capsule)
    assert stream.release


@pytest.mark.parametrize("endian", ["little", "big"])
@pytest.mark.parametrize("nbits", [0, 1, 2, 8, 64, 65, 1000])
@pytest.mark.parametrize("step", [1, 8, 2000])
def test_an_array_of_packed_bits_is_a_mask_of_its_bits(endian: Any, nbits: int, step: int) -> None:
    """Its buffer is of bytes, which are 0 and 1 as well where few bits are set."""
    from pybitmap.compat.bits import bitarray as ours

    kinds = [ours]
    with suppress(ImportError):
        kinds.append(import_module("bitarray").bitarray)
    for kind in kinds:
        bits = kind([i % step == 0 for i in range(nbits)], endian=endian)
        hb = HBitmap.from_mask(bits)
        assert (hb.size, list(hb)) == (nbits, list(range(0, nbits, step)))


@pytest.mark.parametrize(
    "mask", [b"\1", bytearray(b"\0"), memoryview(b"\1"), memoryview(b"\1").cast("c")]
)
def test_a_mask_of_one_byte_is_its_flag(mask: Any) -> None:
    """An array of one packed bit has a byte as well."""
    assert list(HBitmap.from_mask(mask)) == [0] * (bytes(mask) == b"\1")


@peers
@pytest.mark.parametrize("endian", ["little", "big"])
def test_what_lies_beside_a_packed_bit_is_not_looked_at(endian: Any) -> None:
    for padding in range(256):
        bits = package("bitarray").bitarray(endian=endian)
        bits.frombytes(bytes([padding]))
        del bits[1:]
        assert HBitmap.from_mask(bits) == set(bits.search(1))


@peers
@pytest.mark.parametrize("nbits", [1, 8, 9, 64])
def test_packed_bits_are_no_numbers(nbits: int) -> None:
    """Their bytes would be taken for what is dirty."""
    bits, hb = package("bitarray").bitarray("1" * nbits), HBitmap(300)
    for starts, counts in [(bits, 1), ([0] * nbits, bits)]:
        with pytest.raises(TypeError, match=r"from_mask\("):
            hb.set_many(starts, counts)
    assert hb.empty()


def test_arrays_of_one_byte_are_numbers() -> None:
    """Whatever their elements are, which pyarrow's are not equal to."""
    for one in (array("B", [1]), array("b", [1])):
        assert HBitmap(10).union(one) == {1}
        hb = HBitmap(10)
        hb.set_many(one)
        assert hb == {1}
    if not PYPY:
        hb = HBitmap(10)
        hb.set_many(package("pyarrow").array([1], "uint8"))
        assert hb == {1}


@pytest.mark.parametrize("mask", [{0, 1}, frozenset(), {0: True}, HBitmap(1)])
def test_what_has_no_order_is_no_mask(mask: Any) -> None:
    """Numbers of dirty pages, which may be 0 and 1, are none."""
    with pytest.raises(TypeError, match=r"in order, not .* for update\(\)"):
        HBitmap.from_mask(mask)
