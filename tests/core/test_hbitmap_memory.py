# SPDX-License-Identifier: MIT
"""Memory of bitmaps: when there is none, and who keeps whose alive.

What cannot be allocated is a MemoryError and leaves the bitmap as it was: tried with a limit on
the address space in a process of its own, and by making the binding fail. What could crash the
interpreter has a process of its own, too.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import pickle
import sys
import weakref
from array import array
from typing import Any, Callable

import pytest
from model import Model, assert_same
from support import collect, run_python

from pybitmap import HBitmap, _core
from pybitmap._cffi import ffi, lib

pytestmark = pytest.mark.core

LEAF_BITS = 2**31  # 256 MiB of leaf, mapped and not touched


# ---- there is no memory ---------------------------------------------------------------------

LIMITED = """
import copy, pickle, resource
from pybitmap import HBitmap, _core
from pybitmap._cffi import ffi, lib

def bitmap():
    hb = HBitmap({size})
    hb.set(5, 1000)
    hb.set({size} - 1)
    return hb

hb, other = bitmap(), bitmap()
with open("/proc/self/statm") as statm:
    used = int(statm.read().split()[0]) * resource.getpagesize()
_, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), hard))
try:
    {statement}
except MemoryError:
    print("MemoryError")
_core.check(hb._hb)
assert hb == other
assert list(hb.areas()) == [(5, 1000), ({size} - 1, 1)]
hb.add({size} // 2)
hb.reset(5, 1000)
hb.truncate(100)
assert hb.empty() and hb.size == 100
print("intact")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS is not enforced")
@pytest.mark.parametrize(
    "statement",
    [
        "HBitmap(2**41)",
        "hb.copy()",
        "copy.deepcopy(hb)",
        "hb | other",
        "hb & other",
        "hb - other",
        "hb ^ other",
        "hb | [7]",
        "hb &= [7]",
        "hb -= [7]",
        "hb ^= [7]",
        "[7] - hb",
        "hb.union(other)",
        "hb.drain()",
        "hb.truncate(2**36)",
        "hb.serialize()",
        "pickle.loads(pickle.dumps(hb))",
    ],
)
def test_no_address_space_is_a_memory_error(statement: str) -> None:
    code = LIMITED.format(size=LEAF_BITS, statement=statement)
    assert run_python(code).split() == ["MemoryError", "intact"]


class FailingLib:
    """The C library without memory for bitmaps, from the ``after``-th on."""

    def __init__(self, lib: Any, after: int) -> None:
        self._lib = lib
        self._left = after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lib, name)

    def hbitmap_alloc(self, size: int, granularity: int) -> Any:
        self._left -= 1
        if self._left < 0:
            return ffi.NULL
        return self._lib.hbitmap_alloc(size, granularity)

    def _made_of(self, name: str, a: Any, b: Any) -> Any:
        self._left -= 1
        if self._left < 0:
            ffi.errno = errno.ENOMEM
            return ffi.NULL
        return getattr(self._lib, name)(a, b)

    def hbitmap_union(self, a: Any, b: Any) -> Any:
        return self._made_of("hbitmap_union", a, b)

    def hbitmap_intersection(self, a: Any, b: Any) -> Any:
        return self._made_of("hbitmap_intersection", a, b)

    def hbitmap_difference(self, a: Any, b: Any) -> Any:
        return self._made_of("hbitmap_difference", a, b)

    def hbitmap_symmetric_difference(self, a: Any, b: Any) -> Any:
        return self._made_of("hbitmap_symmetric_difference", a, b)


def bitmap_and_model() -> tuple[HBitmap, Model]:
    hb, model = HBitmap(1000, 2), Model(1000, 2)
    for x in (hb, model):
        x.set(10, 300)
        x.set(999)
    return hb, model


ALLOCATING: list[Callable[[HBitmap], object]] = [
    lambda hb: HBitmap(5),
    lambda hb: hb.copy(),
    lambda hb: copy.copy(hb),
    lambda hb: copy.deepcopy(hb),
    lambda hb: hb | hb,
    lambda hb: hb & hb,
    lambda hb: hb - hb,
    lambda hb: hb ^ hb,
    lambda hb: hb | [500],
    lambda hb: hb & [500],
    lambda hb: hb - [500],
    lambda hb: hb ^ [500],
    lambda hb: [500] - hb,
    lambda hb: hb.union([500]),
    lambda hb: hb.intersection([500]),
    lambda hb: hb.difference([500]),
    lambda hb: hb.symmetric_difference([500]),
    lambda hb: hb.intersection_update([500]),
    lambda hb: hb.difference_update([500]),
    lambda hb: hb.symmetric_difference_update([500]),
    lambda hb: hb.drain(),
    lambda hb: hb.intersection_count([500]),
    lambda hb: HBitmap.from_bytes(hb.serialize(), 1000, 2),
    lambda hb: pickle.loads(pickle.dumps(hb)),
]


@pytest.mark.parametrize("n", range(len(ALLOCATING)))
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_failed_allocation_changes_nothing(
    n: int, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hb, model = bitmap_and_model()
    with monkeypatch.context() as patch:
        patch.setattr(_core, "lib", FailingLib(lib, after))
        if after == 0:
            with pytest.raises(MemoryError, match=r"5 items|1000 items"):
                ALLOCATING[n](hb)
        else:
            try:
                ALLOCATING[n](hb)
            except MemoryError:
                pass
            else:
                return  # it has all that it needs, and has done what it does
    assert_same(hb, model)


def test_a_union_may_get_the_memory_of_one_that_was_freed() -> None:
    """Which holds whatever that one had: none of it shows."""
    groups = 1 << 22
    a, b = HBitmap(groups), HBitmap(groups)
    for item in range(0, groups, 1 << 14):  # something on each page, but no word is full
        a.add(item)
        b.add(item + 5)
    for _ in range(3):
        full = a | b
        assert list(full) == sorted([*a, *b])
        full.set(0, groups)
        del full
        assert list(a.copy()) == list(a)


def test_a_truncate_without_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    hb, model = bitmap_and_model()
    with monkeypatch.context() as patch:
        patch.setattr(_core, "hbitmap_truncate", lambda hb, size: -errno.ENOMEM)
        with pytest.raises(MemoryError, match="5000 items"):
            hb.truncate(5000)
    assert_same(hb, model)
    hb.truncate(5000)
    model.truncate(5000)
    assert_same(hb, model)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/self/statm is Linux's")
@pytest.mark.parametrize("size", [2**35 + 5, 2**36 - 1, 2**37], ids=["less", "a bit less", "more"])
def test_a_truncate_takes_memory_only_for_what_was_marked(size: int) -> None:
    """Of 2^36 groups the first summary alone has 128 MiB."""
    code = f"""
import resource
from pybitmap import HBitmap

def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()

hb = HBitmap(2**36)
hb.set(5, 1000)
hb.set(2**35)
before = resident()
hb.truncate({size})
print(resident() - before)
assert list(hb.areas()) == [(5, 1000), (2**35, 1)]
assert list(hb) == [*range(5, 1005), 2**35]
hb.add({size} - 1)
assert hb.count() == 1002 and hb.next_dirty(2**35 + 1) == {size} - 1
"""
    assert int(run_python(code)) < 16 << 20


def no_memory(*args: Any) -> Any:
    raise MemoryError


BUFFERING: list[Callable[[HBitmap], object]] = [
    lambda hb: hb.words,
    lambda hb: hb.sha256(),
    lambda hb: hb.serialize(),
    lambda hb: hb.areas_array(),
    lambda hb: hb.items_array(),
    lambda hb: hb.to_mask(),
    lambda hb: list(hb.areas()),
    lambda hb: list(hb),
    lambda hb: hb.status(0),
    lambda hb: hb.next_dirty_area(0),
    lambda hb: pickle.dumps(hb),
]


@pytest.mark.parametrize("n", range(len(BUFFERING)))
@pytest.mark.parametrize("name", ["new", "new_unset", "buffer"])
def test_a_buffer_without_memory_changes_nothing_and_pins_nothing(
    n: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hb, model = bitmap_and_model()
    with monkeypatch.context() as patch:
        patch.setattr(_core, name, no_memory)
        with contextlib.suppress(MemoryError):  # not all of them need all three
            BUFFERING[n](hb)
    collect()
    assert_same(hb, model)
    hb.truncate(5)
    assert hb.size == 5


# ---- pins and views -------------------------------------------------------------------------


def refuses_truncate(hb: HBitmap) -> bool:
    size = hb.size
    try:
        hb.truncate(size + 1)
    except BufferError:
        assert hb.size == size
        return True
    assert hb.size == size + 1
    hb.truncate(size)
    return False


def test_truncate_is_refused_while_words_exist() -> None:
    hb, model = bitmap_and_model()
    words = hb.words
    with pytest.raises(BufferError, match="pinned or exported"):
        hb.truncate(5)
    assert_same(hb, model)
    del words
    collect()
    assert not refuses_truncate(hb)


def test_truncate_is_refused_while_one_of_several_views_exists() -> None:
    hb = HBitmap(100)
    first, second = hb.words, hb.words
    del first
    collect()
    assert refuses_truncate(hb)
    del second
    collect()
    assert not refuses_truncate(hb)


def test_a_part_of_the_words_pins_as_well() -> None:
    hb = HBitmap(1000)
    part = hb.words[3:5]
    collect()
    assert refuses_truncate(hb)
    del part
    collect()
    assert not refuses_truncate(hb)


def test_released_words_pin_no_more() -> None:
    hb = HBitmap(1000)
    words = hb.words
    words.release()
    del words
    collect()
    assert not refuses_truncate(hb)


def test_truncate_to_what_it_is_already_is_no_resize() -> None:
    hb = HBitmap(1000)
    words = hb.words
    hb.truncate(1000)
    assert len(words) == 16


def test_truncate_is_refused_while_pinned() -> None:
    hb = HBitmap(1000)
    with hb.pin():
        assert refuses_truncate(hb)
        with hb.pin():
            assert refuses_truncate(hb)
        assert refuses_truncate(hb)
    assert not refuses_truncate(hb)


def test_a_pin_ends_with_an_exception() -> None:
    hb = HBitmap(1000)
    with pytest.raises(KeyError), hb.pin():
        raise KeyError
    assert not refuses_truncate(hb)


def test_a_pin_gives_the_address_for_native_code() -> None:
    hb = HBitmap(1000)
    with hb.pin() as address:
        native = ffi.cast("HBitmap *", address)
        assert _core.hbitmap_set(native, 5, 10) == 0
        assert _core.hbitmap_size(native) == 1000
    assert list(hb.areas()) == [(5, 10)]


def test_a_pin_keeps_the_bitmap_alive() -> None:
    with HBitmap(1000).pin() as address:
        collect()
        assert _core.hbitmap_set(ffi.cast("HBitmap *", address), 5, 10) == 0


def test_everything_but_truncate_goes_on_while_pinned() -> None:
    hb, model = bitmap_and_model()
    with hb.pin():
        for x in (hb, model):
            x.reset(12, 8)
            x.set(500, 5)
            x.drain(100, 100)
            x.deserialize(bytes(8), 256)
        assert_same(hb, model)


def test_iterators_do_not_pin() -> None:
    hb = HBitmap(1000)
    hb.set(0, 1000)
    items, areas = iter(hb), hb.areas()
    next(items)
    next(areas)
    assert not refuses_truncate(hb)
    assert next(items) == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda hb: hb.areas_array(),
        lambda hb: hb.serialize(),
        lambda hb: hb.sha256(),
        lambda hb: hb.copy(),
        lambda hb: hb.drain(),
        lambda hb: pickle.dumps(hb),
        lambda hb: hb.__reduce_ex__(5),
        lambda hb: hb.set_many(array("Q", [1]), array("Q", [1])),
        lambda hb: hb.deserialize(bytes(8)),
    ],
)
def test_nothing_else_pins(call: Callable[[HBitmap], object]) -> None:
    hb, _ = bitmap_and_model()
    result = call(hb)
    assert not refuses_truncate(hb)
    del result


# ---- lifetimes ------------------------------------------------------------------------------


def test_a_bitmap_can_be_weakly_referenced() -> None:
    hb = HBitmap(100)
    reference = weakref.ref(hb)
    assert reference() is hb
    del hb
    collect()
    assert reference() is None


def test_a_finalizer_runs_with_the_last_reference() -> None:
    gone: list[str] = []
    hb = HBitmap(100)
    weakref.finalize(hb, gone.append, "gone")
    del hb
    collect()
    assert gone == ["gone"]


def test_buffers_that_were_taken_are_given_back() -> None:
    hb = HBitmap(128)
    starts, counts, data = array("Q", [1, 2]), array("Q", [1, 1]), bytearray(16)
    hb.set_many(starts, counts)
    hb.deserialize(data)
    collect()
    starts.append(3)  # a BufferError if somebody still held them
    counts.append(3)
    data.append(3)


def test_buffers_that_were_refused_are_given_back() -> None:
    hb = HBitmap(128)
    starts, counts, data = array("Q", [1, 200]), array("Q", [1, 1]), bytearray(15)
    with pytest.raises(ValueError, match="200"):
        hb.set_many(starts, counts)
    with pytest.raises(ValueError, match="15"):
        hb.deserialize(data)
    collect()
    starts.append(3)
    counts.append(3)
    data.append(3)


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="counts no references")
def test_buffers_that_were_refused_are_given_back_before_the_exception_goes() -> None:
    hb = HBitmap(128)
    starts, counts, data = array("Q", [1, 200]), array("Q", [1, 1]), bytearray(15)
    with pytest.raises(ValueError, match="200") as first:
        hb.set_many(starts, counts)
    with pytest.raises(ValueError, match="15") as second:
        hb.deserialize(data)
    starts.append(3)
    counts.append(3)
    data.append(3)
    assert first.value is not second.value


CYCLES = """
import gc
import pickle
from array import array
from pybitmap import HBitmap

class Node:
    pass

def cycle(node_first):
    # The collector visits the older one first.
    node = Node() if node_first else None
    hb = HBitmap(100000)
    node = node or Node()
    hb.add(5)
    node.node = node
    node.hb = hb
    {statement}

for n in range(200):
    cycle(n % 2)
gc.collect()
print("alive")
"""

REFUSED = """
    try:
        {statement}
    except ValueError as caught:
        error = caught  # which holds the frames that it came through, this one too
"""


@pytest.mark.parametrize(
    "statement",
    [
        "node.words = hb.words",
        "node.words = [hb.words, hb.words[1:5]]; node.more = hb.words",
        "node.items = iter(hb); next(node.items)",
        "node.areas = hb.areas(); next(node.areas)",
        "node.array = hb.areas_array()",
        "node.numbers = [hb.items_array().data, hb.areas_array().length]",
        "node.mask = hb.to_mask()",
        REFUSED.format(statement="HBitmap.from_mask(bytearray(b'5'))"),
        "node.pin = hb.pin()",
        "node.buffers = []; pickle.dumps(hb, 5, buffer_callback=node.buffers.append)",
        "hb.set(0, 100000)\n    node.buffers = []; "
        "pickle.dumps(hb, 5, buffer_callback=node.buffers.append)",
        "node.reduced = hb.__reduce_ex__(5)",
        REFUSED.format(statement="hb.set(100000)"),
        REFUSED.format(statement="hb.deserialize(b'1')"),
        REFUSED.format(statement="hb.deserialize(memoryview(b'1'))"),
        REFUSED.format(statement="HBitmap.from_bytes(b'1', 100)"),
        REFUSED.format(statement="hb.set_many(array('Q', [10**6]), array('Q', [1]))"),
        REFUSED.format(statement="hb.set_many(array('Q', [1]), array('Q'))"),
        REFUSED.format(
            statement="hb.set_many(memoryview(array('Q', [10**6])), memoryview(array('Q', [1])))"
        ),
        REFUSED.format(statement="hb.update([10**6])"),
    ],
    ids=lambda statement: statement.split("try:")[-1].split("except")[0].strip(),
)
def test_a_reference_cycle_is_collected_without_a_crash(statement: str) -> None:
    assert run_python(CYCLES.format(statement=statement)).strip() == "alive"


FREED = """
import gc
from pybitmap import HBitmap, _core
from pybitmap._cffi import ffi, lib

seen = []

class Lib:
    def __getattr__(self, name):
        return getattr(lib, name)

    @staticmethod
    def hbitmap_drop_pin(pin):
        pin = ffi.cast("HBitmap **", pin)
        seen.append(lib.hbitmap_granularity(pin[0]) if pin[0] else 5)
        lib.hbitmap_drop_pin(pin)

_core.fast = None  # which calls C by itself
_core.lib = Lib()
_core.hbitmap_drop_pin = Lib.hbitmap_drop_pin

class Node:
    def __init__(self, hb):
        self.hb, self.node = hb, self
        {statement}

gc.disable()
for _ in range(100):
    Node(HBitmap(1000, 5))
    gc.collect()
print(sorted(set(seen) - {{5}}))
"""


@pytest.mark.parametrize(
    "statement",
    ["self.words = hb.words", "self.pin = hb.pin()"],
)
def test_nothing_unpins_what_is_freed(statement: str) -> None:
    """In a cycle the bitmap's finalizer may come before that of its pins."""
    assert run_python(FREED.format(statement=statement)).strip() == "[]"


FINALIZER = """
import gc
from pybitmap import HBitmap

class Device:
    def __init__(self, hb):
        self.hb, self.device = hb, self

    def __del__(self):
        self.hb.add(5)
        found.append((list(self.hb), self.hb.granularity, self.hb.count()))

found = []
gc.disable()
for _ in range(100):
    Device(HBitmap(1000, 3))
    gc.collect()
gc.collect()
print(found == [([0], 3, 8)] * 100)
"""


def test_a_finalizer_may_use_a_bitmap_that_goes_with_it() -> None:
    assert run_python(FINALIZER).strip() == "True"
