# SPDX-License-Identifier: MIT
"""Memory of others: flat bitmaps that are merged in, bytes that are copied, words lain over."""

from __future__ import annotations

import mmap
import os
import pickle
import sys
from array import array
from pathlib import Path
from typing import Any, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model import Model, assert_same
from support import collect, run_python

from pybitmap import HBitmap, InvalidError, RangeError

pytestmark = pytest.mark.core

holds_buffers = pytest.mark.skipif(
    sys.implementation.name == "pypy", reason="PyPy's buffers may go while they are lent"
)
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
big_endian = pytest.mark.skipif(sys.byteorder == "big", reason="words are little-endian here")


# ---- flat bitmaps -----------------------------------------------------------------------------


def test_bits_are_counted_from_the_lowest_of_each_byte() -> None:
    """As in the little-endian words of KVM, vhost and DRBD."""
    hb = HBitmap(100)
    hb.merge_bits((1 << 70 | 1 << 9 | 1).to_bytes(16, "little"))
    assert list(hb) == [0, 9, 70]


def test_or_from_the_highest() -> None:
    """As XenServer has it."""
    hb = HBitmap(100)
    hb.merge_bits(bytes([0b10000001, 0b01000000]), msb_first=True)
    assert list(hb) == [0, 7, 9]


@pytest.mark.parametrize("msb_first", [False, True])
@pytest.mark.parametrize("where", [0, 1, 7, 8, 63, 64, 65, 4000, 4095, 4096, 4097, 8191])
@pytest.mark.parametrize("start", [0, 8, 16, 17, 24, 8 * 64, 8 * 4095, 8 * 4095 + 1, 8 * 4096])
def test_a_single_bit_is_found_wherever_it_is(start: int, where: int, msb_first: bool) -> None:
    """Also one that touches two groups, the second of them under another summary word."""
    size = 8 * 3 * 4096 + 5
    hb, model = HBitmap(size, 3), Model(size, 3)
    bits = bytearray(1024)
    bits[where // 8] |= (0x80 >> where % 8) if msb_first else (1 << where % 8)
    hb.merge_bits(bits, start, msb_first=msb_first)
    model.set(start + 8 * where, 8)
    assert_same(hb, model)


@given(
    st.binary(max_size=40),
    st.integers(0, 70),
    st.integers(0, 5),
    st.integers(0, 8),
    st.booleans(),
)
def test_any_granularity_from_any_item(
    bits: bytes, start: int, own: int, granularity: int, msb_first: bool
) -> None:
    size = start + (8 * len(bits) << granularity)
    hb, model = HBitmap(size, own), Model(size, own)
    for each in (hb, model):
        each.merge_bits(bits, start, granularity, msb_first)
    assert_same(hb, model)


def test_what_is_dirty_already_stays() -> None:
    hb = HBitmap(64)
    hb.update([1, 2])
    hb.merge_bits(b"\x03")
    assert list(hb) == [0, 1, 2]


@pytest.mark.parametrize(
    "bits",
    [
        bytearray(b"\1" + bytes(7)),
        array("Q", [1 if sys.byteorder == "little" else 1 << 56]),
        memoryview(b"\1" + bytes(7)).cast("B", [2, 4]),
        memoryview(b"\1").cast("?"),
    ],
)
def test_buffers_of_any_format_are_taken_byte_by_byte(bits: Any) -> None:
    hb = HBitmap(64)
    hb.merge_bits(bits)
    assert list(hb) == [0]


@pytest.mark.parametrize("offset", range(9))
def test_the_buffer_may_begin_anywhere(offset: int) -> None:
    hb = HBitmap(8192)
    hb.merge_bits(memoryview(bytes(offset) + b"\x80" * 1000)[offset:])
    assert list(hb) == list(range(7, 8000, 8))


@pytest.mark.parametrize("granularity", [0, 3, 10, 62, 63])
def test_the_last_bit_may_be_cut_by_the_end(granularity: int) -> None:
    size = min((1 << granularity) + 1, 2**63 - 1)
    for own in (granularity, 60):
        hb = HBitmap(size, own)
        hb.merge_bits(b"\3" if granularity < 63 else b"\1", granularity=granularity)
        assert list(hb.areas()) == [(0, size)]


@pytest.mark.parametrize("bits", [b"\0\x08", b"\1\0\0\0\0\0\0\0\0\0\0\x80", bytes(600) + b"\1"])
@pytest.mark.parametrize("granularity", [None, 1])
def test_a_bit_beyond_the_end_is_refused_and_nothing_is_marked(
    bits: bytes, granularity: int | None
) -> None:
    hb = HBitmap(11)
    with pytest.raises(RangeError, match="beyond the end of the bitmap of 11 items"):
        hb.merge_bits(bits, granularity=granularity)
    assert hb.empty()


@pytest.mark.parametrize("start", [11, 12, 2**63, 2**64 - 1, 2**64, -1])
def test_a_start_beyond_the_end_is_refused(start: int) -> None:
    hb = HBitmap(11)
    with pytest.raises(RangeError):
        hb.merge_bits(b"\1", start)
    assert hb.empty()


def test_zeros_may_go_beyond_the_end() -> None:
    hb = HBitmap(11)
    hb.merge_bits(b"\1" + bytes(5000))
    hb.merge_bits(bytes(100), 5000)
    hb.merge_bits(b"", 10**9)
    assert list(hb) == [0]


@pytest.mark.parametrize("granularity", [-1, 64, 2**31, 2**70])
def test_a_granularity_that_there_is_not_is_refused(granularity: int) -> None:
    with pytest.raises(InvalidError, match=r"not in 0\.\.63"):
        HBitmap(11).merge_bits(b"\1", granularity=granularity)


@pytest.mark.parametrize("bits", [None, 5, "a", [1]])
def test_bits_are_a_buffer(bits: Any) -> None:
    with pytest.raises(TypeError, match="bits must be a buffer"):
        HBitmap(11).merge_bits(bits)


def test_bits_are_contiguous() -> None:
    with pytest.raises(InvalidError, match="contiguous"):
        HBitmap(11).merge_bits(memoryview(b"\1\1\1")[::2])


def test_the_buffer_is_given_back_also_by_an_error() -> None:
    bits = bytearray(b"\xff\xff")
    hb = HBitmap(11)
    with pytest.raises(RangeError) as caught:
        hb.merge_bits(bits)
    bits.append(1)  # though the traceback is alive
    assert caught.value


def test_the_remembered_count_is_no_longer_true() -> None:
    hb = HBitmap(1000)
    assert hb.count() == 0
    hb.merge_bits(b"\xff")
    assert hb.count() == 8
    hb.merge_bits(b"\xff" * 5, granularity=1)
    assert hb.count() == 80


# ---- dirty bytes ------------------------------------------------------------------------------


@given(st.sets(st.integers(0, 299)), st.integers(0, 5), st.integers(0, 20))
def test_just_the_dirty_bytes_are_copied(elements: set[int], granularity: int, more: int) -> None:
    hb = HBitmap(300, granularity)
    hb.update(elements)
    src, dst = bytes(range(1, 151)) * 2 + b"x" * more, bytearray(300 + more)
    assert hb.copy_areas(dst, src) == hb.count(0)
    assert bytes(dst) == bytes(src[i] if i in hb else 0 for i in range(300)) + bytes(more)


def test_more_areas_than_are_asked_for_at_a_time() -> None:
    hb = HBitmap(10_000)
    hb.update(range(0, 10_000, 2))
    dst = bytearray(10_000)
    assert hb.copy_areas(dst, b"x" * 10_000) == 5000
    assert bytes(dst) == b"x\0" * 5000


def test_an_empty_bitmap_copies_nothing() -> None:
    assert HBitmap(0).copy_areas(bytearray(), b"") == 0
    assert HBitmap(5).copy_areas(bytearray(5), b"abcde") == 0


@pytest.mark.parametrize(
    ("dst", "src", "which"),
    [(bytearray(9), b"x" * 10, "dst has 9"), (bytearray(10), b"x" * 9, "src has 9")],
)
def test_a_buffer_that_is_too_short_is_refused(dst: Any, src: Any, which: str) -> None:
    hb = HBitmap(10)
    hb.set(0, 10)
    with pytest.raises(InvalidError, match=f"{which} bytes, the bitmap 10 items"):
        hb.copy_areas(dst, src)
    assert not any(dst)


def test_a_target_that_is_read_only_is_refused() -> None:
    with pytest.raises(TypeError, match="dst must be writable"):
        HBitmap(3).copy_areas(b"abc", b"def")


@pytest.mark.parametrize(("dst", "src"), [(None, b"abc"), (bytearray(3), "abc")])
def test_both_are_buffers(dst: Any, src: Any) -> None:
    with pytest.raises(TypeError, match="must be a buffer"):
        HBitmap(3).copy_areas(dst, src)


@pytest.mark.parametrize(("to", "from_"), [(0, 0), (0, 9), (9, 0), (3, 0)])
def test_buffers_that_overlap_are_refused(to: int, from_: int) -> None:
    memory = bytearray(range(30))
    hb = HBitmap(10)
    hb.set(0, 10)
    view = memoryview(memory)
    with pytest.raises(InvalidError, match="overlap"):
        hb.copy_areas(view[to:], view[from_:])
    assert memory == bytearray(range(30))
    assert hb.copy_areas(view[:10], view[10:]) == 10


def test_both_buffers_are_given_back_also_by_an_error() -> None:
    dst, src = bytearray(9), bytearray(10)
    with pytest.raises(InvalidError) as caught:
        HBitmap(10).copy_areas(dst, src)
    dst.append(1)
    src.append(1)
    assert caught.value


# ---- words of others --------------------------------------------------------------------------


@big_endian
def test_marks_are_in_the_buffer_and_its_bits_in_the_bitmap() -> None:
    leaf = bytearray(16)
    leaf[1] = 2
    hb = HBitmap.over(leaf, 100)
    assert list(hb) == [9]
    hb.set(64, 3)
    hb.remove(9)
    assert leaf == bytes(8) + b"\7" + bytes(7)


def test_bits_beyond_the_end_are_cleared() -> None:
    leaf = array("Q", [2**64 - 1])
    assert len(HBitmap.over(leaf, 10)) == 10
    assert leaf[0] == 0x3FF


@pytest.mark.parametrize(
    ("size", "granularity", "nbytes"),
    [(0, 0, 8), (1, 0, 8), (64, 0, 8), (65, 0, 16), (65 << 5, 5, 16), (2**63 - 1, 63, 8)],
)
def test_the_buffer_has_a_word_at_least_and_all_that_is_needed(
    size: int, granularity: int, nbytes: int
) -> None:
    HBitmap.over(bytearray(nbytes), size, granularity)
    HBitmap.over(bytearray(nbytes + 7), size, granularity)
    with pytest.raises(InvalidError, match="words of memory are too few"):
        HBitmap.over(bytearray(nbytes - 1), size, granularity)


def test_a_buffer_that_is_not_aligned_is_refused() -> None:
    memory = bytearray(24)
    errors = []
    for offset in range(8):
        try:
            HBitmap.over(memoryview(memory)[offset : offset + 8], 64)
        except InvalidError as error:
            errors.append(str(error))
    assert len([error for error in errors if "no multiple of 8" in error]) == 7


def test_what_would_be_written_to_a_copy_is_refused_or_is_none() -> None:
    """PyPy lends copies of slices of views that were cast."""
    memory, src = array("Q", [0] * 3), b"x" * 8
    part = memoryview(memory).cast("B")[8:16]
    hb = HBitmap(8)
    hb.set(0, 8)
    try:
        HBitmap.over(part, 64).set(0, 64)
        assert memory[1] == 2**64 - 1
        assert hb.copy_areas(part, src) == 8
        assert memory.tobytes()[8:16] == src
    except InvalidError as error:
        text = str(error)
    else:
        return
    assert sys.implementation.name == "pypy"
    assert "copied whenever it is lent" in text


@pytest.mark.parametrize("buffer", [bytes(8), memoryview(bytes(8))])
def test_a_buffer_that_is_read_only_is_refused(buffer: Any) -> None:
    with pytest.raises(TypeError, match="writable"):
        HBitmap.over(buffer, 64)


@pytest.mark.parametrize("buffer", [None, 5, "abcdefgh", [0] * 8])
def test_what_is_no_buffer_is_refused(buffer: Any) -> None:
    with pytest.raises(TypeError, match="must be a buffer"):
        HBitmap.over(buffer, 64)


def test_a_buffer_with_gaps_is_refused() -> None:
    with pytest.raises(InvalidError, match="contiguous"):
        HBitmap.over(memoryview(array("Q", [0] * 4))[::2], 64)


@pytest.mark.parametrize(("size", "granularity"), [(-1, 0), (2**63, 0), (1, 64), (1, -1)])
def test_shapes_that_there_are_not_are_refused(size: int, granularity: int) -> None:
    leaf = bytearray(8)
    with pytest.raises(InvalidError):
        HBitmap.over(leaf, size, granularity)
    leaf.append(0)


@holds_buffers
def test_the_buffer_is_held_until_bitmap_and_views_are_gone() -> None:
    leaf = bytearray(8)
    hb = HBitmap.over(leaf, 64)
    words = hb.words
    with pytest.raises(BufferError):
        leaf.append(1)
    del hb
    collect()
    with pytest.raises(BufferError):
        leaf.append(1)
    assert words[0] == 0
    del words
    collect()
    leaf.append(1)


def test_a_bitmap_that_was_refused_does_not_hold_the_buffer() -> None:
    leaf = bytearray(8)
    with pytest.raises(InvalidError) as too_small:
        HBitmap.over(leaf, 65)
    leaf.append(1)  # though the traceback is alive
    # A view that somebody uses cannot be released.
    with memoryview(leaf)[1:] as cut, pytest.raises(InvalidError) as not_aligned:
        HBitmap.over(cut, 64)
    with memoryview(leaf).toreadonly() as fixed, pytest.raises(TypeError) as read_only:
        HBitmap.over(fixed, 64)
    for caught in (too_small, not_aligned, read_only):
        assert caught.value.__traceback__


def test_it_cannot_be_truncated() -> None:
    hb = HBitmap.over(bytearray(64), 64)
    for size in (63, 65):
        with pytest.raises(BufferError):
            hb.truncate(size)
    assert hb.size == 64


@pytest.mark.parametrize(
    "make",
    [
        lambda hb: hb.copy(),
        lambda hb: hb | [],
        lambda hb: hb & hb,
        lambda hb: pickle.loads(pickle.dumps(hb)),
    ],
)
def test_what_is_made_of_it_has_memory_of_its_own(make: Callable[[HBitmap], HBitmap]) -> None:
    leaf = bytearray(8)
    hb = HBitmap.over(leaf, 64)
    hb.add(3)
    made = make(hb)
    made.add(9)
    made.truncate(100)
    assert list(hb) == [3]


def test_marks_in_a_mapped_file_are_there_for_the_next_who_opens_it(tmp_path: Path) -> None:
    path = tmp_path / "leaf"
    path.write_bytes(bytes(1 << 13))
    for expected in ([], [5, 60_000]):
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as leaf:
            hb = HBitmap.over(leaf, 1 << 16)
            assert list(hb) == expected
            hb.update([5, 60_000])
            del hb
            collect()


@holds_buffers
def test_a_map_cannot_be_closed_under_a_bitmap() -> None:
    leaf = mmap.mmap(-1, mmap.PAGESIZE)
    hb = HBitmap.over(leaf, 100)
    with pytest.raises(BufferError):
        leaf.close()
    del hb
    collect()
    leaf.close()


@needs_fork
def test_marks_survive_a_kill_in_a_mapped_file(tmp_path: Path) -> None:
    path = tmp_path / "leaf"
    path.write_bytes(bytes(1 << 13))
    code = f"""
import mmap, os, signal
from pybitmap import HBitmap
file = open({str(path)!r}, "r+b")
hb = HBitmap.over(mmap.mmap(file.fileno(), 0), 1 << 16)
hb.update(range(0, 1 << 16, 3))
hb.merge_bits(b"\\x02")
hb.flip(6)
os.kill(os.getpid(), signal.SIGKILL)
"""
    with pytest.raises(AssertionError, match="exit status -9"):
        run_python(code)
    expected = HBitmap(1 << 16)
    expected.update(range(0, 1 << 16, 3))
    expected.add(1)
    expected.remove(6)
    leaf = bytearray(path.read_bytes())
    assert HBitmap.over(leaf, 1 << 16) == expected


@needs_fork
@pytest.mark.parametrize("shared", [False, True])
def test_the_child_of_a_fork_has_a_copy_unless_the_memory_is_shared(shared: bool) -> None:
    leaf: Any = mmap.mmap(-1, mmap.PAGESIZE) if shared else bytearray(mmap.PAGESIZE)
    hb = HBitmap.over(leaf, 100)
    pid = os.fork()
    if pid == 0:
        hb.add(5)
        os._exit(0 if 5 in hb else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert bool(any(leaf[:16])) is shared


def test_a_subclass_is_laid_over_memory_without_its_init() -> None:
    class Named(HBitmap):
        def __init__(self, name: str) -> None:
            raise AssertionError("not for this")

    assert type(Named.over(bytearray(8), 64)) is Named
