# SPDX-License-Identifier: MIT
"""The only module that touches the compiled code.

It names the C functions, gives them types, and turns their return codes into exceptions. The
contract of each function stands in ``csrc/hbitmap.h``. The names are the functions themselves
and not wrappers: a mark costs one call.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
from array import array
from collections.abc import Iterable, Mapping, Set, Sized
from contextlib import suppress
from functools import partial
from importlib import import_module
from io import BytesIO
from itertools import repeat
from numbers import Integral
from operator import index, is_
from typing import TYPE_CHECKING, Any, Callable, NoReturn, SupportsIndex, cast

try:
    from ._cffi import ffi, lib
except ModuleNotFoundError as error:
    if error.name != f"{__package__}._cffi":
        raise
    raise ImportError(
        f"the folder {os.path.dirname(__file__)} has pybitmap's sources and no compiled module. "
        "Python looks there first if it is started beside it: start it in another folder, where "
        "the installed pybitmap is found, or compile the module here: pip install -e ."
    ) from None
from .errors import BitmapError, InvalidError, MismatchError, RangeError

if TYPE_CHECKING:
    from ._typing import Integers, Mask, Readable, Writable

#: A C object or pointer; cffi has no types for them.
CData = Any

MAX_SIZE = 2**63 - 1
MAX_GROUPS: int = 2**lib.HBITMAP_LOG_MAX_SIZE

hbitmap_torn: Callable[[CData], bool] = lib.hbitmap_torn
hbitmap_truncate: Callable[[CData, int], int] = lib.hbitmap_truncate
hbitmap_pin_into: Callable[[CData, CData], None] = lib.hbitmap_pin_into
hbitmap_drop_pin: Callable[[CData], None] = lib.hbitmap_drop_pin
hbitmap_set: Callable[[CData, int, int], int] = lib.hbitmap_set
hbitmap_set_many: Callable[[CData, CData, CData, int], int] = lib.hbitmap_set_many
hbitmap_merge_bits: Callable[[CData, CData, int, int, int, bool], int] = lib.hbitmap_merge_bits
hbitmap_reset: Callable[[CData, int, int], int] = lib.hbitmap_reset
hbitmap_flip: Callable[[CData, int, int], int] = lib.hbitmap_flip
hbitmap_reset_all: Callable[[CData], None] = lib.hbitmap_reset_all
hbitmap_take: Callable[[CData, int], int] = lib.hbitmap_take
hbitmap_size: Callable[[CData], int] = lib.hbitmap_size
hbitmap_granularity: Callable[[CData], int] = lib.hbitmap_granularity
hbitmap_get: Callable[[CData, int], bool] = lib.hbitmap_get
hbitmap_empty: Callable[[CData], bool] = lib.hbitmap_empty
hbitmap_count: Callable[[CData], int] = lib.hbitmap_count
hbitmap_count_range: Callable[[CData, int, int], int] = lib.hbitmap_count_range
hbitmap_rank: Callable[[CData, int], int] = lib.hbitmap_rank
hbitmap_select: Callable[[CData, int], int] = lib.hbitmap_select
hbitmap_nonzero_words: Callable[[CData], int] = lib.hbitmap_nonzero_words
hbitmap_words: Callable[[CData, CData], CData] = lib.hbitmap_words
hbitmap_equal: Callable[[CData, CData], int] = lib.hbitmap_equal
hbitmap_is_subset: Callable[[CData, CData], int] = lib.hbitmap_is_subset
hbitmap_is_disjoint: Callable[[CData, CData], int] = lib.hbitmap_is_disjoint
hbitmap_intersection_count: Callable[[CData, CData], int] = lib.hbitmap_intersection_count
hbitmap_union_count: Callable[[CData, CData], int] = lib.hbitmap_union_count
hbitmap_difference_count: Callable[[CData, CData], int] = lib.hbitmap_difference_count
hbitmap_symmetric_difference_count: Callable[[CData, CData], int] = (
    lib.hbitmap_symmetric_difference_count
)
hbitmap_iter_init: Callable[[CData, CData, int], None] = lib.hbitmap_iter_init
hbitmap_iter_fill: Callable[[CData, CData, int], int] = lib.hbitmap_iter_fill
hbitmap_next_dirty: Callable[[CData, int, int], int] = lib.hbitmap_next_dirty
hbitmap_next_zero: Callable[[CData, int, int], int] = lib.hbitmap_next_zero
hbitmap_prev_dirty: Callable[[CData, int, int], int] = lib.hbitmap_prev_dirty
hbitmap_next_dirty_area: Callable[[CData, int, int, int, CData, CData], bool] = (
    lib.hbitmap_next_dirty_area
)
hbitmap_status: Callable[[CData, int, int, CData], bool] = lib.hbitmap_status
hbitmap_count_areas: Callable[[CData, int, int], int] = lib.hbitmap_count_areas
hbitmap_areas: Callable[[CData, int, int, CData, int, CData], int] = lib.hbitmap_areas
hbitmap_copy_areas: Callable[[CData, CData, CData, int], int] = lib.hbitmap_copy_areas
hbitmap_merge: Callable[[CData, CData, CData], int] = lib.hbitmap_merge
hbitmap_put_back: Callable[[CData], None] = lib.hbitmap_put_back
hbitmap_and: Callable[[CData, CData, CData], int] = lib.hbitmap_and
hbitmap_andnot: Callable[[CData, CData, CData], int] = lib.hbitmap_andnot
hbitmap_xor: Callable[[CData, CData, CData], int] = lib.hbitmap_xor
hbitmap_drain: Callable[[CData, int, int, CData], int] = lib.hbitmap_drain
hbitmap_drain_fresh: Callable[[CData, int, int, CData], int] = lib.hbitmap_drain_fresh
hbitmap_is_serializable: Callable[[CData], bool] = lib.hbitmap_is_serializable
hbitmap_serialization_align: Callable[[CData], int] = lib.hbitmap_serialization_align
hbitmap_serialization_size: Callable[[CData, int, int], int] = lib.hbitmap_serialization_size
hbitmap_serialize_part: Callable[[CData, CData, int, int], int] = lib.hbitmap_serialize_part
hbitmap_deserialize_part: Callable[[CData, CData, int, int, bool], int] = (
    lib.hbitmap_deserialize_part
)
hbtracker_publish: Callable[[CData, CData], int] = lib.hbtracker_publish
hbtracker_publish_all: Callable[[CData, CData, int], int] = lib.hbtracker_publish_all
hbtracker_set_free: Callable[[CData], None] = lib.hbtracker_set_free
# Of marks only those that do not wait: a signal handler of Python's can run in between.
hbtracker_try_mark: Callable[[CData, int, int], int] = lib.hbtracker_try_mark
hbtracker_try_mark_many: Callable[[CData, CData, CData, int, CData], int] = (
    lib.hbtracker_try_mark_many
)
hbtracker_try_begin_write: Callable[[CData, int, int, CData], int] = lib.hbtracker_try_begin_write
hbtracker_try_end_write: Callable[[CData, CData], int] = lib.hbtracker_try_end_write
hbtracker_wait: Callable[[CData, int], bool] = lib.hbtracker_wait


hbfile_sync_directory: Callable[[bytes], int] = lib.hbfile_sync_directory
hbfile_detach: Callable[[CData, int, bytes], int] = lib.hbfile_detach
hbfile_identity: Callable[[bytes, CData], int] = lib.hbfile_identity
hbkvm_open_log: Callable[[CData, int, int, CData, int], int] = lib.hbkvm_open_log
hbkvm_fetch_log: Callable[[CData, CData, int], int] = lib.hbkvm_fetch_log
hbkvm_open_rings: Callable[[CData, int, CData, int, CData, int, CData], int] = lib.hbkvm_open_rings
hbkvm_fetch_rings: Callable[[CData, CData, CData], int] = lib.hbkvm_fetch_rings
hbkvm_machine: Callable[[CData], int] = lib.hbkvm_machine
hbkvm_same: Callable[[int, int], bool] = lib.hbkvm_same
hbkvm_close: Callable[[CData], None] = lib.hbkvm_close
HBKVM_MANUAL: int = lib.HBKVM_MANUAL
HBKVM_INITIALLY_SET: int = lib.HBKVM_INITIALLY_SET

hbmem_open: Callable[[CData, int, int], int] = lib.hbmem_open
hbmem_collect: Callable[[CData, CData, CData], int] = lib.hbmem_collect
hbmem_look: Callable[[CData, CData], int] = lib.hbmem_look
hbmem_close: Callable[[CData], None] = lib.hbmem_close
hbmem_copy_sparse: Callable[[CData, CData, int], None] = lib.hbmem_copy_sparse

hbprocess_number: Callable[[], int] = lib.hbprocess_number

hbmask_pack: Callable[[CData, CData, int], int] = lib.hbmask_pack
hbmask_unpack: Callable[[CData, CData, int], None] = lib.hbmask_unpack

#: What hbmem_open fails at, and what the kernel may be lacking.
HBMEM_SYSTEM: int = lib.HBMEM_SYSTEM
HBMEM_PAGEMAP: int = lib.HBMEM_PAGEMAP
HBMEM_SCAN: int = lib.HBMEM_SCAN
HBMEM_FAULTFD: int = lib.HBMEM_FAULTFD
HBMEM_FEATURES: int = lib.HBMEM_FEATURES
HBMEM_MAPPED: int = lib.HBMEM_MAPPED
HBMEM_WP_UNPOPULATED: int = lib.HBMEM_WP_UNPOPULATED
HBMEM_WP_ASYNC: int = lib.HBMEM_WP_ASYNC

hbunicorn_alloc: Callable[[CData], CData] = lib.hbunicorn_alloc
hbunicorn_hook: Callable[[CData, CData, int, int, int], int] = lib.hbunicorn_hook
hbunicorn_unhook: Callable[[CData], None] = lib.hbunicorn_unhook
hbunicorn_listen: Callable[[CData, bool], int] = lib.hbunicorn_listen
hbunicorn_forked: Callable[[CData], None] = lib.hbunicorn_forked
hbunicorn_translates: Callable[[CData, bool], None] = lib.hbunicorn_translates
hbunicorn_region_alloc: Callable[[CData, int, int, int, CData, CData], CData] = (
    lib.hbunicorn_region_alloc
)
hbunicorn_region_add: Callable[[CData], None] = lib.hbunicorn_region_add
hbunicorn_region_remove: Callable[[CData], None] = lib.hbunicorn_region_remove
hbunicorn_region_failures: Callable[[CData, CData, CData], int] = lib.hbunicorn_region_failures
hbunicorn_written: Callable[[CData, int, int], bool] = lib.hbunicorn_written
hbunicorn_run_begins: Callable[[CData, CData], None] = lib.hbunicorn_run_begins
hbunicorn_run_ends: Callable[[CData, CData], bool] = lib.hbunicorn_run_ends
hbunicorn_unfinished: Callable[[CData], bool] = lib.hbunicorn_unfinished
hbunicorn_mark_all: Callable[[CData], bool] = lib.hbunicorn_mark_all
hbunicorn_deaf: Callable[[CData], int] = lib.hbunicorn_deaf
hbunicorn_hears: Callable[[CData, int], None] = lib.hbunicorn_hears

#: A C pointer to nothing.
NULL: CData = ffi.NULL

#: A C pointer to what lies at an address: ``at("HBitmap *", 0x7f...)``.
at: Callable[[str, int], CData] = ffi.cast

#: C memory, freed with the object: ``new("uint64_t[]", 16)``. Zeroed.
new: Callable[..., CData] = ffi.new
#: The same, not zeroed: for what is written whole at once.
new_unset: Callable[..., CData] = ffi.new_allocator(should_clear_after_alloc=False)

#: From here on an array is in huge pages, where the system has them: its pages are taken in a
#: small part of the time.
HUGE_ARRAY = 4 << 20


def new_words(nwords: int) -> CData:
    """A ``uint64_t[nwords]``, for the caller to set."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or 8 * nwords < HUGE_ARRAY:
        return new_unset("uint64_t[]", nwords)
    memory = mmap.mmap(-1, 8 * nwords, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(advice)
    return ffi.from_buffer("uint64_t[]", memory)


#: Gives the buffer back that an array lies over, before the array goes. May be called twice.
release: Callable[[CData], None] = ffi.release

#: ``move(to, from, nbytes)``
move: Callable[[CData, CData, int], None] = ffi.memmove
#: The first ``n`` values of C memory as a list.
unpack: Callable[[CData, int], list[int]] = ffi.unpack
#: C memory as a buffer of bytes.
buffer: Callable[[CData, int], Any] = ffi.buffer

#: Formats of the struct module for numbers of this machine ("" and "@": native).
_PREFIXES = ("", "@", "=", "<" if sys.byteorder == "little" else ">")
_INTEGER_CODES = "bBhHiIlLqQnNO"  # O: of Python's objects, which may be integers
_BYTES = ("?", "B", "b", "c")
_INT64_FORMATS = {prefix + code for prefix in _PREFIXES for code in "QLql"}


try:
    from __pypy__ import add_memory_pressure  # type: ignore[import-not-found,unused-ignore]
except ImportError:

    def add_memory_pressure(nbytes: int) -> None:
        """Tells PyPy's collector what hangs on an object."""


class _LetGo:
    """Calls a C function on an address when nothing refers to this any more."""

    __slots__ = ("_address", "_function", "_keep")

    def __init__(
        self, address: int, function: Callable[[CData], None], keep: object = None
    ) -> None:
        self._address = address
        self._function = function
        self._keep = keep  # until the function has returned

    def __del__(self, cast: Callable[[str, int], CData] = ffi.cast) -> None:
        self._function(cast("void *", self._address))


class _Owner:
    """What :func:`own` answers where there is no ``_fast``.

    Why not ffi.gc: the collector calls the finalizers of a cycle in any order, so one of them might
    use a bitmap that is freed already. Hence a finalizer that frees nothing: it leaves that to an
    object which is too new for this round of the collector, and so goes with the last reference. An
    interruption of it leaks the memory.
    """

    __slots__ = ("_address", "_free", "_heir", "_keep")

    def __init__(self, address: int, free: Callable[[CData], None], keep: object) -> None:
        self._address = address
        self._free = free
        self._keep = keep

    def __del__(self, heir: Callable[..., _LetGo] = _LetGo) -> None:
        self._heir = heir(self._address, self._free, self._keep)


#: Keeps C memory until nothing refers to it any more.
Owner = Any


def own(pointer: CData, free: str, keep: object = None) -> Owner:
    """C memory that is freed when nothing refers to the answer any more.

    :param free: the name of the C function that does it
    :param keep: goes after the memory is freed
    """
    if fast is None:
        return _Owner(address(pointer), getattr(lib, free), keep)
    function = addresses.get(free) or address(ffi.addressof(lib, free))
    return fast.Owner(address(pointer), function, keep)


def _load_fast() -> Any:
    """The module ``_fast``; None where there is none, or it is to be left aside."""
    if os.environ.get("PYBITMAP_PURE_CFFI") == "1":
        return None
    with suppress(ImportError):
        return import_module(f"{__package__}._fast")
    return None


fast = _load_fast()


class NotCopied:
    """What stands for something there is one of."""

    __slots__ = ()

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__!r} objects are neither copied nor pickled")


class Memory:
    """A writable buffer, a mapped file for example, for the leaf words of one bitmap at a time.

    It stays exported until neither this object nor a bitmap on it nor a view of that is left.

    :raises TypeError: if it is no writable buffer
    :raises InvalidError: if it is not contiguous, or does not begin at a multiple of 8 bytes
    """

    __slots__ = ("__weakref__", "words")

    def __init__(self, data: Writable) -> None:
        self.words = raw_array("the memory of a bitmap", data, "uint64_t[]", writable=True)
        at = address(self.words)
        if at % 8 and len(self.words):
            self.release()
            raise InvalidError(f"the memory of a bitmap begins at {at:#x}, no multiple of 8 bytes")

    def release(self) -> None:
        """Give the buffer back; for who has no bitmap on it."""
        ffi.release(self.words)


#: A new ``HBitmap *``, and its owner.
Made = tuple[CData, Owner]


def hbitmap_alloc(size: int, granularity: int) -> Made:
    """A new ``HBitmap *``, valid as long as its owner exists.

    :raises InvalidError: for sizes and granularities that hbitmap_alloc refuses
    """
    size, granularity = index(size), index(granularity)
    check_size(size, granularity)
    hb = lib.hbitmap_alloc(size, granularity)
    if not hb:
        raise no_memory(size, granularity)
    return _own(hb, size, granularity)


def hbitmap_of(operation: str, a: CData, b: CData) -> Made:
    """A new one of the shape of ``a``: their union, intersection, ...

    :param operation: the name of the C function, without ``hbitmap_``
    :raises MismatchError: if they do not fit each other
    """
    hb = getattr(lib, f"hbitmap_{operation}")(a, b)
    code = ffi.errno
    size, granularity = hbitmap_size(a), hbitmap_granularity(a)
    if hb:
        return _own(hb, size, granularity)
    raise mismatch(a, b) if code == errno.EINVAL else no_memory(size, granularity)


def _own(hb: CData, size: int, granularity: int) -> Made:
    # As if it were marked all over, within reason.
    add_memory_pressure(min((size >> granularity) // 8, 1 << 26))
    return hb, own(hb, "hbitmap_free")


def hbitmap_alloc_on(size: int, granularity: int, memory: Memory) -> Made:
    """The same over leaf words in ``memory``: set bits are adopted, and it cannot be truncated.

    :raises InvalidError: also if the memory has too few words
    """
    size, granularity = index(size), index(granularity)
    check_size(size, granularity)
    nwords = len(memory.words)
    needed = nwords_of(size, granularity)
    if nwords < needed:
        raise InvalidError(f"{nwords} words of memory are too few: the bitmap has {needed}")
    hb = lib.hbitmap_alloc_on(size, granularity, memory.words, nwords)
    if not hb:
        raise no_memory(size, granularity)
    return hb, own(hb, "hbitmap_free", memory)


def nwords_of(size: int, granularity: int) -> int:
    """Leaf words of a bitmap."""
    return max(1, -(-size >> (granularity + 6)))


def hbtracker_alloc() -> tuple[CData, Owner]:
    """A new ``HBTracker *``, valid as long as its owner exists."""
    tracker = lib.hbtracker_alloc()
    if not tracker:
        raise MemoryError("no memory for a tracker")
    return tracker, own(tracker, "hbtracker_free")


def hbtracker_set_alloc(size: int, bitmaps: list[CData], readonly: bool) -> CData:
    """A new ``HBTrackerSet *``; publishing it gives it away."""
    tracker_set = lib.hbtracker_set_alloc(size, bitmaps, len(bitmaps), readonly)
    if not tracker_set:
        raise MemoryError(f"no memory for a set of {len(bitmaps)} bitmaps")
    return tracker_set


def check_size(size: int, granularity: int) -> None:
    """Refuses granularities that there are not, and sizes that no bitmap of one can have."""
    check_granularity(granularity)
    if not 0 <= size <= MAX_SIZE:
        raise InvalidError(f"size {size} is not in 0..{MAX_SIZE} items")
    if size > MAX_GROUPS << granularity:
        raise InvalidError(
            f"size {size} makes more than {MAX_GROUPS} groups of {1 << granularity} items; "
            f"use a larger granularity"
        )


def check_granularity(granularity: int) -> None:
    """
    :raises InvalidError: if there is no such log2
    """
    if not 0 <= granularity <= 63:
        hint = ""
        if granularity > 0 and not granularity & (granularity - 1):
            hint = (
                f"; {granularity.bit_length() - 1} for {granularity}, or group_size={granularity}"
            )
        raise InvalidError(
            f"granularity {granularity} is not in 0..63: it is the log2 of the items that a bit "
            f"stands for{hint}"
        )


def granularity_of(granularity: int | None, group_size: int | None) -> int:
    """The one of the two that is given, as the first; 0 if none is.

    :raises InvalidError: if both are, or ``group_size`` is no power of 2
    """
    if group_size is None:
        return 0 if granularity is None else index(granularity)
    if granularity is not None:
        raise InvalidError("granularity is the log2 of group_size: give one of them")
    group_size = index(group_size)
    if group_size < 1 or group_size & (group_size - 1):
        raise InvalidError(f"group_size {group_size} is not a power of 2")
    return group_size.bit_length() - 1


def no_memory(size: int, granularity: int) -> MemoryError:
    return MemoryError(f"no memory for a bitmap of {size} items, granularity {granularity}")


def failed(code: int, hb: CData, start: int, count: int) -> BitmapError:
    """The exception for a call on the range ``[start, start + count)`` that returned ``code``."""
    size = hbitmap_size(hb)
    if code == -errno.ERANGE:
        return out_of_range(hb, start, count)
    if code == -errno.EINVAL:
        group = 1 << hbitmap_granularity(hb)
        return InvalidError(
            f"range [{start}, {start + count}) does not consist of whole groups of {group} items "
            f"(only at the end of the bitmap, {size}, may a group be cut)"
        )
    return BitmapError(f"range [{start}, {start + count}): {errno.errorcode.get(-code, code)}")


def out_of_range(hb: CData, start: int, count: int) -> RangeError:
    return RangeError(
        f"range [{start}, {start + count}) is not inside the bitmap of {hbitmap_size(hb)} items"
    )


def mismatch(a: CData, b: CData) -> MismatchError:
    """The exception for two bitmaps that a call found not to fit each other."""
    if hbitmap_size(a) != hbitmap_size(b):
        return MismatchError(
            f"the bitmaps' sizes differ: {hbitmap_size(a)} and {hbitmap_size(b)} items"
        )
    return MismatchError(
        f"the bitmaps' granularities differ: {hbitmap_granularity(a)} and {hbitmap_granularity(b)}"
    )


def address(pointer: CData) -> int:
    return int(ffi.cast("uintptr_t", pointer))


#: Where the table of the functions lies, ``csrc/pybitmap_table.h``.
table: int = address(lib.hbitmap_api())

#: And each of them (not cffi's functions around them).
addresses: dict[str, int] = {
    name: ffi.cast("uintptr_t *", table)[2 + i]
    for i, name in enumerate(ffi.string(lib.hbitmap_api_names()).decode().split())
}


def pin(hb: CData, memory: Memory | None) -> tuple[CData, Owner]:
    """Pins the bitmap: an ``HBitmap **`` for :func:`hbitmap_drop_pin`, which the owner calls at
    the latest.

    :param memory: what the bitmap lies over, which stays as long
    """
    pinned = new("HBitmap **")
    owner = own(pinned, "hbitmap_drop_pin", (pinned, memory))
    hbitmap_pin_into(hb, pinned)  # last: an interruption behind it finds it owned
    return pinned, owner


def words(hb: CData) -> memoryview:
    """The leaf words, live, as a read-only view of bytes. For a while: does not pin the bitmap."""
    nwords = new("size_t *")
    pointer = hbitmap_words(hb, nwords)
    return memoryview(buffer(pointer, 8 * nwords[0])).toreadonly()


def pinned_words(hb: CData, memory: Memory | None) -> memoryview:
    """The leaf words, live, as a read-only view of bytes that pins the bitmap while it exists."""
    _, owner = pin(hb, memory)
    nwords = new("size_t *")
    # The view holds the pointer, the pointer its destructor, and that the pin; a destructor that
    # does nothing else (it compares, in vain).
    pointer = ffi.gc(hbitmap_words(hb, nwords), partial(is_, owner))
    return memoryview(buffer(pointer, 8 * nwords[0])).toreadonly()


def memory_at(at: int, nbytes: int, keep: object) -> memoryview:
    """Memory that Python did not make, as a writable view of bytes; ``keep`` lives as long.

    :raises InvalidError: if no memory can be there
    """
    at, nbytes = index(at), index(nbytes)
    if at < 0 or not 0 <= nbytes <= sys.maxsize or at + nbytes > 2 * sys.maxsize + 2:
        raise InvalidError(f"there is no memory of {nbytes} bytes at {at:#x}")
    # As above: the view holds the pointer, and that what it is about.
    pointer = ffi.gc(ffi.cast("uint8_t *", at), partial(is_, keep))
    return memoryview(buffer(pointer, nbytes))


def integers(name: str, data: Integers) -> CData:
    """Many whole numbers as ``uint64_t[]``, which is a context manager.

    Those of a buffer of 64-bit integers as they lie there, if they lie as C wants them; of signed
    ones, those below 0 come out as 2**63 and more. All others as a copy.

    :raises TypeError: if these are no integers; bytes are none, since they may be anything packed
    :raises InvalidError: if they have not one dimension
    :raises RangeError: if one does not fit 64 bits
    """
    numbers: Any = data
    view = view_of(data)
    if view is not None:
        if view.ndim != 1:
            hint = (
                ": of areas the columns are meant, set_many(areas.offset, areas.length) or, of an "
                "array of NumPy's, set_many(array[:, 0], array[:, 1])"
                if view.ndim == 2
                else ""
            )
            raise InvalidError(f"{name} must have one dimension, not {view.ndim}{hint}")
        if view.format in _INT64_FORMATS and view.itemsize == 8:
            return _aligned(view)
        if _packed(data, view):
            raise TypeError(f"{name} must be integers, not packed bits: see HBitmap.from_mask()")
        plain = isinstance(data, (bytes, bytearray, memoryview)) and view.itemsize == 1
        if plain or view.format[-1:] not in _INTEGER_CODES:
            raise TypeError(
                f"{name} must be integers: a list, an array('Q'), a NumPy array of them, for "
                f"example; not a buffer of format {view.format!r}"
            )
        with suppress(NotImplementedError):  # of the other byte order
            numbers = view.tolist()
    try:
        numbers = [index(number) for number in numbers]
    except TypeError:
        raise TypeError(
            f"{name} must be integers: a list, an array('Q'), a NumPy array of them, for example; "
            f"not {type(data).__name__}"
        ) from None
    try:
        return ffi.from_buffer("uint64_t[]", array("Q", numbers))
    except OverflowError:
        raise _not_64_bits(name, numbers) from None  # type: ignore[misc]


def view_of(data: object) -> memoryview | None:
    """Of a buffer, or of the array that something is, as those of pandas, Polars and pyarrow.

    :raises TypeError: for elements of NumPy's masked arrays that are missing: a buffer has them all
    """
    if isinstance(data, Lent):
        return data.data
    if not isinstance(data, memoryview) and hasattr(type(data), "__array__"):
        if hasattr(type(data), "compressed") and data.mask.any():  # type: ignore[attr-defined]
            raise TypeError("some elements are masked: give array.compressed(), or array.filled()")
        data = data.__array__()  # type: ignore[attr-defined]
    try:
        return memoryview(data)  # type: ignore[arg-type]
    except (TypeError, ValueError, BufferError):  # NumPy's dates raise ValueError
        return None


def _not_64_bits(name: str, numbers: Iterable[int]) -> RangeError | None:
    for i, number in enumerate(numbers):
        if not 0 <= number < 1 << 64:
            return RangeError(f"{name}[{i}] is {number}, which is not inside the bitmap")
    return None


def _aligned(view: memoryview) -> CData:
    """64-bit integers as ``uint64_t[]``, as they lie there if they lie as C wants them."""
    if view.c_contiguous:
        pointer = ffi.from_buffer("uint64_t[]", view)
        if not address(pointer) % 8:
            return pointer
    return ffi.from_buffer("uint64_t[]", array("Q", view.tobytes()))


def integers_in(data: object) -> CData | list[int] | None:
    """What a one-dimensional buffer of integers gives if one iterates over it, or None.

    Those of 64 bits as ``uint64_t[]``, without a copy if possible; negative ones are beyond 2**63.
    Those of 16 and 32 as a list. Of single bytes none: they may be packed bits.

    :raises TypeError: for bools, which would be taken for 0 and 1
    """
    view = view_of(data)
    if view is None or view.ndim != 1:
        return None
    if view.format == "?":
        raise TypeError(
            "these are bools, a mask, and no elements: make a bitmap of it, HBitmap.from_mask(mask)"
        )
    if view.format in _INT64_FORMATS and view.itemsize == 8:
        return _aligned(view)
    return view.tolist() if view.format in ("I", "i", "H", "h") else None


def bools(name: str, data: Mask) -> CData:
    """Many bools as ``uint8_t[]``, which is a context manager: those of a buffer of bools or bytes
    as they lie there, if they follow each other, all others as a copy.

    :raises TypeError: if these are no bools
    :raises InvalidError: if they have not one dimension
    """
    view = view_of(data)
    if view is not None:
        if view.ndim != 1:
            raise InvalidError(f"{name} must have one dimension, not {view.ndim}")
        if _packed(data, view):
            view = None
    if view is not None:
        if view.format in _BYTES:
            return ffi.from_buffer("uint8_t[]", view if view.c_contiguous else view.tobytes())
        if view.format != "O":
            raise TypeError(
                f"{name} must be bools, or bytes 0 and 1; not a buffer of format {view.format!r}: "
                "what is dirty by its numbers is for update()"
            )
    if isinstance(data, (Set, Mapping)):
        raise TypeError(
            f"{name} must be bools in order, not {type(data).__name__}: what is dirty by its "
            "numbers is for update()"
        )
    try:
        values = list(cast("Iterable[Any]", data))
    except TypeError:
        raise TypeError(f"{name} must be bools, not {type(data).__name__}") from None
    for i, value in enumerate(values):
        try:
            good = value in (False, True)
        except (TypeError, ValueError):  # as of pandas' NA, and of arrays
            good = False
        if not good:
            raise TypeError(f"{name}[{i}] is {value!r}, no bool")
    return ffi.from_buffer("uint8_t[]", bytes(map(bool, values)))


def _packed(data: object, view: memoryview) -> bool:
    """Are these bytes of packed bits, as bitarray's, whose elements are bools?"""
    if not isinstance(data, Sized):
        return False
    if len(data) != 1 or len(view) != 1 or view.format not in _BYTES:
        return len(data) != len(view)
    # A single bit has a byte, in which others lie beside it.
    [bit] = cast("Iterable[Any]", data)
    return bit in (0, 1) and bit != view[0]


def with_ranges(
    call: Callable[[CData, CData, int], None],
    names: tuple[str, str],
    starts: Integers,
    lengths: Integers | SupportsIndex,
) -> None:
    """Calls with two arrays of uint64, and their number of elements; ``lengths`` may be one number
    for all.

    The buffers are given back before an exception leaves: its traceback may keep the frame.

    :raises TypeError, InvalidError, RangeError: see :func:`integers`; or if the numbers of elements
        differ
    """
    with integers(names[0], starts) as c_starts:
        nstarts = len(c_starts)
        if isinstance(lengths, Integral):
            lengths = repeat(int(lengths), nstarts)
        with integers(names[1], cast("Integers", lengths)) as c_lengths:
            if nstarts != len(c_lengths):
                raise InvalidError(f"{nstarts} {names[0]} and {len(c_lengths)} {names[1]}")
            try:
                call(c_starts, c_lengths, nstarts)
            except RangeError:
                for name, c_numbers, data in zip(names, (c_starts, c_lengths), (starts, lengths)):
                    _refuse_negative(name, c_numbers, data)
                raise


def _refuse_negative(name: str, c_numbers: CData, data: object) -> None:
    """Words the error where signed numbers were taken as they lie there."""
    view = view_of(data)
    if view is not None and view.format[-1:] in "lq":
        error = _not_64_bits(name, ffi.cast("int64_t *", c_numbers)[0 : len(c_numbers)])
        if error is not None:
            raise error


def byte_array(name: str, data: Readable) -> tuple[CData, int]:
    """A buffer of bytes as ``uint8_t[]`` without a copy, and its length.

    :raises TypeError: if it is not a buffer of single bytes
    :raises InvalidError: if it is not contiguous
    """
    try:
        view = memoryview(cast(Any, data))
    except TypeError:
        raise TypeError(f"{name} must be bytes-like, not {type(data).__name__}") from None
    if view.itemsize != 1:
        raise TypeError(f"{name} must be a buffer of bytes, not of format {view.format!r}")
    return raw_array(name, view), view.nbytes


def raw_array(
    name: str, data: Readable, kind: str = "uint8_t[]", *, writable: bool = False
) -> CData:
    """The bytes of a buffer of any format as a C array of that kind, without a copy.

    :raises TypeError: if it is no buffer, or is to be writable and is not
    :raises InvalidError: if it is not contiguous, or to be writable and what is lent is a copy
    """
    try:
        view = memoryview(cast(Any, data))
    except TypeError:
        raise TypeError(f"{name} must be a buffer, not {type(data).__name__}") from None
    if writable and view.readonly:
        view.release()  # a traceback may keep it
        raise TypeError(f"{name} must be writable")
    if not view.c_contiguous:
        view.release()
        raise InvalidError(f"{name} must be contiguous")
    pointer = ffi.from_buffer(kind, view)
    if writable and address(pointer) != address(ffi.from_buffer(kind, view)):
        ffi.release(pointer)
        view.release()
        # PyPy does so for slices of views that were cast.
        raise InvalidError(f"{name} is copied whenever it is lent; slice it before it is cast")
    return pointer


def bytes_of(data: bytes) -> CData:
    """The ``uint8_t[]`` in ``data``, a context manager; to be changed by who made ``data`` only."""
    return ffi.from_buffer("uint8_t[]", data)


def filled_bytes(nbytes: int, fill: Callable[[CData], int]) -> tuple[int, bytes]:
    """What ``fill`` returned, and the ``uint8_t[nbytes]`` that it was given."""
    if sys.implementation.name == "cpython":
        stream = BytesIO(bytes(nbytes))  # gives its buffer away without a copy
        with stream.getbuffer() as view, ffi.from_buffer("uint8_t[]", view) as data:
            code = fill(data)
        return code, stream.getvalue()
    data = new_unset("uint8_t[]", nbytes)
    return fill(data), bytes(buffer(data, nbytes))


def check(hb: CData) -> None:
    """Validates every invariant of a bitmap; an AssertionError says what is broken."""
    reason = new("const char **")
    if lib.hbitmap_check(hb, reason):
        raise AssertionError(ffi.string(reason[0]).decode())


class Lent:
    """Numbers of ours that every Python lends, though only that from 3.12 on as a buffer."""

    __slots__ = ()

    @property
    def data(self) -> memoryview:
        """The numbers."""
        raise NotImplementedError


def arrow_stream(values: memoryview, nrows: int, ncolumns: int) -> object:
    """A capsule with a stream of Arrow's, as its PyCapsule interface has it: see ``csrc/arrow.h``.
    Of CPython's.

    :param values: uint64, row by row, which are copied
    :raises MemoryError: if there is no memory for that
    :raises InvalidError: if there are fewer values
    """
    if len(values) < nrows * ncolumns:
        raise InvalidError(f"{len(values)} numbers are no {nrows} rows of {ncolumns}")
    # The capsule is made before there is anything in it: what an interruption leaves is empty.
    import ctypes

    pointer = ctypes.c_void_p
    prototype = ctypes.PYFUNCTYPE(ctypes.py_object, pointer, pointer, pointer)
    new_capsule = prototype(("PyCapsule_New", ctypes.pythonapi))
    stream = lib.hbarrow_alloc()
    if not stream:
        raise MemoryError("no memory for a table")
    name, destructor = lib.hbarrow_capsule_name(), lib.hbarrow_capsule_destructor()
    capsule: object = new_capsule(address(stream), address(name), destructor)
    with ffi.from_buffer("uint64_t[]", values) as c_values:
        if lib.hbarrow_fill(stream, c_values, nrows, ncolumns):
            raise MemoryError(f"no memory for a table of {nrows} rows")
    return capsule


class CffiEntry:
    """Keeps the C object."""

    __slots__ = ("_owner",)

    def _attach(self, address: int, owner: Owner) -> None:
        """From now on the methods are about what lies at ``address`` as long as ``owner`` lives."""
        if hasattr(self, "_owner"):
            raise TypeError("it is initialised once")
        self._owner = owner
