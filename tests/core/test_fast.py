# SPDX-License-Identifier: MIT
"""The fast entry of single marks, cleans and questions: what it does itself, and what it hands on.

Whatever the arguments, the answer or the error is the one of the way by cffi. All of this holds
without the entry as well (``make test-pure``), but for the tests of who did the work.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import gc
import inspect
import operator
import os
import pickle
import sys
import threading
from typing import Any, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import collect, run_python

from pybitmap import BlockGraph, BlockNode, HBitmap, _core, _entry
from pybitmap.block.node import CffiNodeBase
from pybitmap.hbitmap import CffiBase

pytestmark = pytest.mark.core

HAS_GIL = getattr(sys, "_is_gil_enabled", lambda: True)()
CPYTHON = sys.implementation.name == "cpython"
PURE = os.environ.get("PYBITMAP_PURE_CFFI") == "1"

needs_fast = pytest.mark.skipif(_entry._fast is None, reason="there is no _fast here")

SIZE = 1000


class Index:
    """An integer that is no int, as NumPy's are."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value

    def __repr__(self) -> str:
        return f"Index({self.value})"


class Derived(int):
    pass


class Recording(HBitmap):
    """Knows which calls came to cffi."""

    __slots__ = ("calls",)

    def __init__(self, size: int, granularity: int = 0) -> None:
        super().__init__(size, granularity)
        self.calls: list[Any] = []

    def _cffi_set(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append((args, kwargs))
        CffiBase.set(self, *args, **kwargs)

    def _cffi_add(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append((args, kwargs))
        CffiBase.set(self, *args, **kwargs)

    def _cffi_discard(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append((args, kwargs))
        CffiBase.discard(self, *args, **kwargs)

    def _cffi_remove(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append((args, kwargs))
        CffiBase.remove(self, *args, **kwargs)

    def _cffi_get(self, *args: Any, **kwargs: Any) -> bool:
        self.calls.append((args, kwargs))
        return CffiBase.get(self, *args, **kwargs)

    def _cffi_contains(self, *args: Any) -> bool:
        self.calls.append(args)
        return CffiBase.__contains__(self, *args)


@pytest.mark.skipif(not CPYTHON or not HAS_GIL or PURE, reason="not to be here")
@pytest.mark.skipif(sys.version_info < (3, 10), reason="there only if built there")
def test_the_fast_entry_was_built() -> None:
    """It is optional, so nothing else would tell that it is missing."""
    assert _entry._fast is not None


@pytest.mark.skipif(not CPYTHON, reason="cffi's calls are fast there")
@pytest.mark.parametrize(("value", "expected"), [("1", "True"), ("0", "False")])
def test_the_environment_switches_it_off(value: str, expected: str) -> None:
    if expected == "False" and _entry._fast is None and not PURE:
        pytest.skip("there is no _fast here")
    code = (
        f"import os; os.environ['PYBITMAP_PURE_CFFI'] = {value!r};"
        "from pybitmap import HBitmap, BlockNode;"
        "from pybitmap.block.node import CffiNodeBase; from pybitmap.hbitmap import CffiBase;"
        "print(issubclass(HBitmap, CffiBase), issubclass(BlockNode, CffiNodeBase))"
    )
    assert run_python(code).split() == [expected, expected]


# ---- who does the work ----------------------------------------------------------------------


@needs_fast
def test_plain_calls_do_not_come_to_cffi() -> None:
    hb = Recording(1 << 40)
    hb.set(5)
    hb.set(10, 20)
    hb.set(2**40 - 1, 1)
    hb.set(7, 0)
    hb.set(100, 65536)
    hb.add(2**39)
    hb.add(2**38)
    hb.remove(2**38)
    hb.discard(2**38)
    hb.discard(2**62)
    assert hb.get(5)
    assert not hb.get(2**63 - 1)
    assert 5 in hb
    assert 2**62 not in hb
    assert hb.calls == []
    assert list(hb.areas()) == [(5, 1), (10, 20), (100, 65536), (2**39, 1), (2**40 - 1, 1)]


@needs_fast
@pytest.mark.parametrize(
    "args",
    [
        *[(True,), (Index(5),), (Derived(5),), (5, True), (5, Index(2)), (5, Derived(2))],
        *[(-1,), (5, -1), (2**63,), (2**64,), (5, 2**64), (2**2000,), (-(2**2000),)],
        *[(SIZE,), (5, SIZE), (5.0,), (None,), ("5",), (), (5, 1, 1)],
    ],
)
def test_everything_else_comes_to_cffi_as_it_is(args: tuple[Any, ...]) -> None:
    hb = Recording(SIZE)
    try:
        hb.set(*args)
    except (ValueError, TypeError):
        assert hb.empty()
    assert hb.calls == [(args, {})]


@needs_fast
@pytest.mark.parametrize("args", [(True,), (Index(5),), (-1,), (SIZE,), (5.0,), (), (5, 1)])
def test_everything_else_that_is_added_comes_to_cffi(args: tuple[Any, ...]) -> None:
    hb = Recording(SIZE)
    with contextlib.suppress(ValueError, TypeError):
        hb.add(*args)
    assert hb.calls == [(args, {})]


@needs_fast
def test_keywords_come_to_cffi() -> None:
    hb = Recording(SIZE)
    hb.set(start=1, count=2)
    hb.set(5, count=2)
    assert hb.get(item=6)
    assert hb.calls == [
        ((), {"start": 1, "count": 2}),
        ((5,), {"count": 2}),
        ((), {"item": 6}),
    ]
    assert list(hb.areas()) == [(1, 2), (5, 2)]


@needs_fast
@pytest.mark.parametrize("granularity", [0, 12])
def test_a_mark_that_takes_long_comes_to_cffi_which_releases_the_gil(granularity: int) -> None:
    few, many = 65536 << granularity, 65537 << granularity
    hb = Recording(4 * many, granularity)
    hb.set(0, few)
    assert hb.calls == []
    hb.set(2 * many, many)
    assert hb.calls == [((2 * many, many), {})]
    assert list(hb.areas()) == [(0, few), (2 * many, many)]


class RecordingNode(BlockNode):
    calls: list[Any]

    def _cffi_mark_dirty(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append((args, kwargs))
        CffiNodeBase.mark_dirty(self, *args, **kwargs)


def recording_node(size: int) -> RecordingNode:
    graph = BlockGraph()
    node = RecordingNode(graph._coordinator, graph.add_node("n", size)._device)
    node.calls = []
    return node


@needs_fast
def test_plain_writes_do_not_come_to_cffi_and_others_do() -> None:
    node = recording_node(1 << 30)
    bitmap = node.add_bitmap("b", 512)
    node.mark_dirty(0, 1)
    node.mark_dirty(0, 0)
    node.mark_dirty(1 << 20, 1 << 20)
    assert node.calls == []
    node.mark_dirty(offset=1024, length=1)
    node.mark_dirty(Index(2048), True)  # type: ignore[arg-type]
    node.mark_dirty(4 << 20, (1 << 20) + 1)
    with pytest.raises(ValueError, match="not inside"):
        node.mark_dirty(1 << 30, 1)
    assert [args for args, _ in node.calls] == [
        (),
        (node.calls[1][0][0], True),
        (4 << 20, (1 << 20) + 1),
        (1 << 30, 1),
    ]
    areas = [(0, 512), (1024, 512), (2048, 512), (1 << 20, 1 << 20), (4 << 20, (1 << 20) + 512)]
    assert list(bitmap.areas()) == areas


# ---- the same answers and errors ------------------------------------------------------------


def outcome(call: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[str, str]:
    try:
        return "", repr(call(*args, **kwargs))
    except Exception as error:
        return type(error).__name__, str(error)


near = st.sampled_from([0, SIZE, 63, 64, 2**16, 2**31, 2**32, 2**63, 2**64])
integers = st.builds(lambda value, more: value + more, near, st.integers(-3, 3))
numbers = integers | integers.map(lambda value: -value) | st.integers(0, SIZE)
anything = (
    numbers
    | numbers.map(Index)
    | numbers.map(Derived)
    | st.booleans()
    | st.sampled_from([None, 1.0, "1", b"1", (), [1], 5j, object()])
)


@given(st.lists(anything, max_size=3), st.sampled_from([0, 3]))
def test_set_answers_as_by_cffi(args: list[Any], granularity: int) -> None:
    hb, other = HBitmap(SIZE, granularity), HBitmap(SIZE, granularity)
    error, text = outcome(hb.set, *args)
    error_there, text_there = outcome(CffiBase.set, other, *args)
    assert (error, text) == (error_there, text_there)
    assert hb == other


@given(anything, st.sampled_from([0, 3]))
def test_add_answers_as_by_cffi(item: Any, granularity: int) -> None:
    hb, other = HBitmap(SIZE, granularity), HBitmap(SIZE, granularity)
    assert outcome(hb.add, item) == outcome(CffiBase.add, other, item)
    assert hb == other


@given(anything, st.sampled_from(["discard", "remove"]))
def test_discard_and_remove_answer_as_by_cffi(item: Any, method: str) -> None:
    hb, other = HBitmap(SIZE, 3), HBitmap(SIZE, 3)
    for each in (hb, other):
        each.set(0, SIZE // 2)
    by_cffi = getattr(CffiBase, method)
    for _ in range(2):
        answer = outcome(getattr(hb, method), item)
        assert answer == outcome(by_cffi, other, item)
        assert hb == other


@needs_fast
def test_what_is_cleaned_beside_somebody_who_has_the_lock_comes_to_cffi() -> None:
    """Whose clear of all takes a while; without the GIL, so that this goes on meanwhile."""
    hb = Recording(1 << 28)
    done = threading.Event()

    def clear() -> None:
        while not done.is_set():
            hb.set(start=0, count=hb.size)
            hb.reset(0, hb.size)

    other = threading.Thread(target=clear)
    other.start()
    try:
        while not any(kwargs == {} and len(args) == 1 for args, kwargs in hb.calls):
            hb.add(5)
            hb.discard(5)
    finally:
        done.set()
        other.join()
    hb.add(5)
    hb.remove(5)
    assert 5 not in hb
    _core.check(hb._hb)


@given(anything)
def test_get_and_in_answer_as_by_cffi(item: Any) -> None:
    hb = HBitmap(SIZE)
    hb.set(3, 500)
    assert outcome(hb.get, item) == outcome(CffiBase.get, hb, item)
    assert (item in hb) is CffiBase.__contains__(hb, item)


@given(st.lists(anything, max_size=3))
def test_mark_dirty_answers_as_by_cffi(args: list[Any]) -> None:
    nodes = [BlockGraph().add_node("n", SIZE) for _ in range(2)]
    contents = [node.add_bitmap("b", 512) for node in nodes]
    assert outcome(nodes[0].mark_dirty, *args) == outcome(CffiNodeBase.mark_dirty, nodes[1], *args)
    assert contents[0].sha256() == contents[1].sha256()


@pytest.mark.parametrize("kwargs", [{"begin": 1}, {"start": 1, "number": 2}, {"count": 1}])
def test_wrong_keywords_are_a_type_error(kwargs: dict[str, int]) -> None:
    hb = HBitmap(SIZE)
    with pytest.raises(TypeError, match="argument"):
        hb.set(**kwargs)
    assert hb.empty()


@pytest.mark.parametrize(
    ("mine", "cffi_s"),
    [
        (HBitmap.set, CffiBase.set),
        (HBitmap.add, CffiBase.add),
        (HBitmap.discard, CffiBase.discard),
        (HBitmap.remove, CffiBase.remove),
        (HBitmap.get, CffiBase.get),
        (BlockNode.mark_dirty, CffiNodeBase.mark_dirty),
    ],
)
def test_signature_and_documentation_are_the_same(
    mine: Callable[..., Any], cffi_s: Callable[..., Any]
) -> None:
    assert list(inspect.signature(mine).parameters) == list(inspect.signature(cffi_s).parameters)
    assert inspect.getdoc(mine) == inspect.getdoc(cffi_s)


def test_an_index_that_raises_is_not_swallowed() -> None:
    class Bad:
        def __index__(self) -> int:
            raise ZeroDivisionError

    hb = HBitmap(SIZE)
    with pytest.raises(ZeroDivisionError):
        hb.set(Bad())  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        hb.add(Bad())  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        hb.__contains__(Bad())


# ---- objects that are not what they seem ----------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        *[lambda hb: hb.set(1), lambda hb: hb.add(1), lambda hb: hb.get(1)],
        *[lambda hb: hb.discard(1), lambda hb: hb.remove(1)],
        *[lambda hb: 1 in hb, lambda hb: hb.size],
    ],
)
def test_a_bitmap_that_was_never_initialised_is_an_error(call: Callable[[HBitmap], Any]) -> None:
    with pytest.raises(AttributeError, match="_hb"):
        call(HBitmap.__new__(HBitmap))


def test_a_node_that_was_never_initialised_is_an_error() -> None:
    with pytest.raises(AttributeError, match="_tracker"):
        BlockNode.__new__(BlockNode).mark_dirty(0, 1)


def test_a_bitmap_whose_initialisation_failed_is_an_error() -> None:
    kept: list[HBitmap] = []

    class Keeps(HBitmap):
        def __init__(self, size: int) -> None:
            kept.append(self)
            super().__init__(size)

    with pytest.raises(ValueError, match="-1"):
        Keeps(-1)
    with pytest.raises(AttributeError, match="_hb"):
        kept[0].set(1)
    kept[0].__init__(SIZE)  # type: ignore[misc]
    kept[0].set(1)
    assert list(kept[0]) == [1]


def test_a_second_initialisation_is_refused_and_changes_nothing() -> None:
    hb = HBitmap(SIZE)
    hb.set(1)
    with pytest.raises(TypeError, match="initialised once"):
        hb.__init__(5)  # type: ignore[misc]
    other, owner = _core.hbitmap_alloc(5, 0)
    with pytest.raises(TypeError, match="initialised once"):
        hb._attach(_core.address(other), owner)
    hb.set(SIZE - 1)
    assert list(hb) == [1, SIZE - 1]


@needs_fast
@pytest.mark.parametrize("address", ["1", None, 1.0, 2**70])
def test_what_is_no_address_is_not_attached(address: Any) -> None:
    hb = HBitmap.__new__(HBitmap)
    with pytest.raises((TypeError, OverflowError)):
        hb._attach(address, None)
    with pytest.raises(AttributeError):
        hb.set(1)


def test_a_subclass_may_override_them() -> None:
    class Doubling(HBitmap):
        def set(self, start: int, count: int = 1) -> None:
            super().set(start, 2 * count)

        def get(self, item: int) -> bool:
            return not super().get(item)

        def __contains__(self, item: object) -> bool:
            return item == "all" or super().__contains__(item)

    hb = Doubling(SIZE)
    hb.set(0, 3)
    hb.add(100)
    hb[200:202] = True
    assert list(hb.areas()) == [(0, 6), (100, 2), (200, 4)]
    assert not hb.get(0)
    items: Any = ["all", 6.0]
    assert items[0] in hb
    assert 5 in hb
    assert 6 not in hb
    assert items[1] not in hb


def test_an_override_s_error_comes_through_in() -> None:
    class Broken(HBitmap):
        def _cffi_contains(self, item: object) -> bool:
            raise ZeroDivisionError

    hb = Broken(SIZE)
    if _entry._fast is not None:
        with pytest.raises(ZeroDivisionError):
            operator.contains(hb, "a")
    assert 5 not in hb


def test_copies_and_pickles_are_marked_apart_from_the_original() -> None:
    hb = HBitmap(SIZE)
    hb.set(1)
    for other in (copy.copy(hb), copy.deepcopy(hb), pickle.loads(pickle.dumps(hb)), hb | hb):
        other.set(5)
        assert 5 in other
        assert 5 not in hb
        assert list(other) == [1, 5]


def test_a_bound_method_keeps_the_bitmap() -> None:
    get, set_ = (lambda hb: (hb.get, hb.set))(HBitmap(SIZE))
    collect()
    set_(5)
    assert get(5)


@pytest.mark.skipif(not CPYTHON, reason="counts no references")
def test_no_reference_is_kept() -> None:
    class Cycle(HBitmap):
        myself: Cycle

    args = [10**6, 2 * 10**6, Index(5), "x"]
    values: list[Any] = [HBitmap, Cycle, *args]

    def work() -> None:
        for hb in (HBitmap(SIZE), Cycle(SIZE)):
            for arg in args:
                outcome(hb.set, arg)
                outcome(hb.set, 0, count=arg)
                outcome(hb.set, start=arg)
                outcome(hb.get, arg)
                arg in hb  # noqa: B015
            if isinstance(hb, Cycle):
                hb.myself = hb

    work()
    collect()
    before = [sys.getrefcount(value) for value in values]
    for _ in range(20):
        work()
    collect()
    assert [sys.getrefcount(value) for value in values] == before
    assert not any(type(each) is Cycle for each in gc.get_objects())


def test_an_iterator_that_has_ended_stays_so() -> None:
    hb = HBitmap(SIZE)
    hb.set(5)
    items = iter(hb)
    assert list(items) == [5]
    hb.set(500)
    hb.reset(5)
    assert list(items) == []


def test_an_iterator_goes_on_after_a_clear_of_what_it_has_fetched() -> None:
    hb = HBitmap(SIZE)
    hb.set(0, 10)
    items = iter(hb)
    assert next(items) == 0
    hb.reset(0, 8)
    hb.set(100)
    assert list(items) == [8, 9, 100]


def test_an_iterator_of_a_bitmap_that_was_never_initialised_is_an_error() -> None:
    with pytest.raises(AttributeError, match="_hb"):
        next(iter(HBitmap.__new__(HBitmap)))


@given(integers | integers.map(Derived) | integers.map(Index) | st.booleans())
def test_iter_answers_as_by_cffi(first: Any) -> None:
    """index() of Python 3.9 leaves what is derived from int as it is."""
    hb = HBitmap(SIZE)
    hb.set(0, 2)
    hb.set(60, 500)

    def by_cffi(first: Any) -> list[int]:
        return list(CffiBase._items(hb, hb._search_range(first, None)[0]))

    assert outcome(lambda first: list(hb.iter(first)), first) == outcome(by_cffi, first)


def test_iterators_are_made_by_bitmaps_only() -> None:
    with pytest.raises(TypeError):
        type(iter(HBitmap(SIZE)))()


# ---- threads --------------------------------------------------------------------------------

WAITING = """
import threading
from pybitmap import BlockGraph

node = BlockGraph().add_node("n", 1 << 20)
bitmap = node.add_bitmap("b", 512)
node.mark_dirty(0, 1)  # the threads' own slots come later

node._device.hold()  # as truncate does
started = threading.Barrier(4)

def write(offset):
    started.wait()
    node.mark_dirty(offset, 512)
    node.mark_dirty(offset=offset + 512, length=512)

threads = [threading.Thread(target=write, args=(4096 * n,)) for n in range(1, 4)]
for thread in threads:
    thread.start()
started.wait()
# This goes on only because none of them waits with the GIL in its hands.
for thread in threads:
    thread.join(0.05)
    assert thread.is_alive()
assert bitmap.count() == 512
node._coordinator._publish_exactly([node._device])
for thread in threads:
    thread.join()
print(list(bitmap.areas()))
"""


def test_a_write_that_waits_lets_others_run() -> None:
    areas = [(0, 512), (4096, 1024), (8192, 1024), (12288, 1024)]
    assert run_python(WAITING).strip() == repr(areas)


def test_a_refused_code_is_worded_by_cffi_s_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that failed is made again, and that one's answer counts."""
    monkeypatch.setattr("pybitmap.hbitmap.hbitmap_set", lambda hb, start, count: -errno.ENOMEM)
    with pytest.raises(Exception, match="ENOMEM"):
        HBitmap(SIZE).set(SIZE)


SUBINTERPRETER = """
import _testcapi
from pybitmap import HBitmap

code = '''
from pybitmap import HBitmap, BlockGraph
hb = HBitmap(1000)
hb.set(5, 10)
assert 7 in hb and not hb.get(15)
try:
    hb.set(1000)
except ValueError as error:
    assert "1000" in str(error)
BlockGraph().add_node("n", 1000).mark_dirty(0, 1)
cycle = [hb]
cycle.append(cycle)
'''
hb = HBitmap(1000)
for _ in range(3):
    assert _testcapi.run_in_subinterp(code) == 0
    hb.set(5)
    assert 5 in hb
print("alive")
"""


@pytest.mark.skipif(not CPYTHON, reason="has no sub-interpreters")
@pytest.mark.skipif(sys.version_info >= (3, 12), reason="cffi is for the main interpreter there")
def test_sub_interpreters_come_and_go() -> None:
    pytest.importorskip("_testcapi")
    assert run_python(SUBINTERPRETER).strip() == "alive"
