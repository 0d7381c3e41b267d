# SPDX-License-Identifier: MIT
"""What native code gets of us: addresses of functions, and pins."""

from __future__ import annotations

import copy
import ctypes
import errno
import hashlib
import os
import re
import sys
import threading
from pathlib import Path

import pytest
from lines import at_every_line
from support import collect, run_python

import pybitmap
from pybitmap import BlockGraph, BlockNode, ClosedError, HBitmap, NotFoundError, native
from pybitmap.store import LocalStore

pytestmark = pytest.mark.core

CSRC = Path(pybitmap.get_include())


def refuses_truncate(hb: HBitmap) -> bool:
    try:
        hb.truncate(hb.size + 1)
    except BufferError:
        return True
    hb.truncate(hb.size - 1)
    return False


# ---- functions ------------------------------------------------------------------------------

SET = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64)


#: How many functions the table of version 1 has so far, and the digest of how they are declared.
#: What is compiled against it calls them by their place, so a new one goes to the end (and a new
#: pair stands here). One that goes, or is declared anew, makes another PYBITMAP_API_VERSION;
#: as long as nothing is released, a new pair is enough.
FIXED = (83, "9404ba8f7f54bb61")


def functions() -> dict[str, str]:
    """Those of the two headers: by name, how they are declared."""
    found = {}
    for header in ("hbitmap.h", "tracker.h"):
        text = (CSRC / header).read_text(encoding="utf-8")
        text = text.partition("cdef: begin")[2].partition("cdef: end")[0]
        text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
        for result, name, given in re.findall(r"([\w *]+)\b(hb\w+)\(([^)]*)\);", text):
            found[name] = re.sub(r"\s+", " ", f"{result}{name}({given})").strip()
    return found


def test_every_function_of_the_headers_has_an_address() -> None:
    assert set(native.addresses()) == set(functions())
    assert len(set(native.addresses().values())) == len(native.addresses())


def test_a_function_is_called_by_its_address() -> None:
    hb = HBitmap(1000)
    mark = SET(native.address("hbitmap_set"))
    with hb.pin() as address:
        assert mark(address, 5, 10) == 0
        assert mark(address, 995, 10) == -errno.ERANGE
    assert list(hb.areas()) == [(5, 10)]


def test_an_unknown_function_is_named() -> None:
    with pytest.raises(NotFoundError, match="no function 'hbitmap_mark'"):
        native.address("hbitmap_mark")


def test_the_addresses_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        native.addresses()["hbitmap_set"] = 0  # type: ignore[index]


def test_no_function_is_forgotten_in_the_table_the_macros_and_the_pxd() -> None:
    table = re.findall(r"F\((hb\w+)\)", (CSRC / "pybitmap_table.h").read_text(encoding="utf-8"))
    assert sorted(table) == sorted(functions())
    assert list(native.addresses()) == table
    api = (CSRC / "pybitmap_api.h").read_text(encoding="utf-8")
    assert re.findall(r"#define (hb\w+) \(pybitmap_core->(\w+)\)", api) == list(zip(table, table))
    pxd = Path(native.__file__).with_suffix(".pxd").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\b(hb\w+)\(", pxd)) == sorted(table)


def test_functions_are_only_appended_to_the_table() -> None:
    number, digest = FIXED
    names = list(native.addresses())
    fixed = "\n".join(functions()[name] for name in names[:number])
    assert hashlib.sha256(fixed.encode()).hexdigest()[:16] == digest
    assert len(names) == number


def test_the_table_says_what_it_is() -> None:
    header = (CSRC / "pybitmap_table.h").read_text(encoding="utf-8")
    magic, version, size = ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32
    at = native.table()
    assert f"{magic.from_address(at).value:#x}" in header
    assert f"#define PYBITMAP_API_VERSION {version.from_address(at + 8).value}\n" in header
    pointers = [
        ctypes.c_uint64.from_address(at + 16 + 8 * i).value for i in range(len(functions()))
    ]
    assert size.from_address(at + 12).value == 16 + 8 * len(pointers)
    assert pointers == list(native.addresses().values())


@pytest.mark.skipif(sys.implementation.name == "pypy", reason="PyPy has no ctypes.pythonapi")
def test_the_capsule_has_the_table() -> None:
    get = ctypes.pythonapi.PyCapsule_GetPointer
    prototype = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    pointer = prototype(ctypes.cast(get, ctypes.c_void_p).value or 0)
    assert pointer(native._C_API, b"pybitmap.native._C_API") == native.table()
    assert native._C_API is native._C_API


def test_there_is_no_other_attribute() -> None:
    with pytest.raises(AttributeError, match="_C_APIS"):
        native._C_APIS  # noqa: B018


def drop_a_pin_of(what: HBitmap | BlockNode) -> None:
    what.pin()
    collect()


# ---- pins of bitmaps ------------------------------------------------------------------------


def test_a_pin_lives_until_it_is_closed() -> None:
    hb = HBitmap(1000)
    pin = hb.pin()
    assert refuses_truncate(hb)
    assert not pin.closed
    with hb.pin() as address:
        assert pin.address == address
    assert refuses_truncate(hb)
    pin.close()
    assert not refuses_truncate(hb)


def test_a_pin_is_closed_once_and_has_no_address_then() -> None:
    hb = HBitmap(1000)
    pin, other = hb.pin(), hb.pin()
    for _ in range(2):
        pin.close()
        assert pin.closed
        with pytest.raises(ClosedError, match="the pin of a bitmap is closed"):
            pin.address  # noqa: B018
        with pytest.raises(ClosedError), pin:
            pass
        assert refuses_truncate(hb)  # that of the other
    assert "closed" in repr(pin)
    other.close()
    assert not refuses_truncate(hb)


def test_threads_that_close_one_pin_close_it_once() -> None:
    hb = HBitmap(1000)
    with hb.pin():
        for _ in range(100):
            pin = hb.pin()
            threads = [threading.Thread(target=pin.close) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert refuses_truncate(hb)
    assert not refuses_truncate(hb)


def test_a_pin_that_is_dropped_is_released_and_says_so() -> None:
    hb = HBitmap(1000)
    with pytest.warns(ResourceWarning, match="a pin of a bitmap was dropped without close"):
        drop_a_pin_of(hb)
    assert not refuses_truncate(hb)


def test_a_pin_is_not_copied() -> None:
    pin = HBitmap(1000).pin()
    with pytest.raises(TypeError, match="neither copied nor pickled"):
        copy.copy(pin)
    pin.close()


@pytest.mark.skipif(
    sys.implementation.name == "pypy", reason="PyPy releases with the next collections"
)
@pytest.mark.filterwarnings("ignore:a pin of a bitmap was dropped:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_pin_that_is_interrupted_at_any_line_pins_nothing() -> None:
    """Before the caller has it, and while it is closed."""
    hb = HBitmap(1000)

    def attempt() -> None:
        with hb.pin():
            pass

    for where in at_every_line(attempt):
        assert not refuses_truncate(hb), where


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_in_the_child_of_a_fork_a_pin_is_one_of_the_copy() -> None:
    code = """
import ctypes, os
from pybitmap import HBitmap, native
SET = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64)
mark = SET(native.address("hbitmap_set"))
hb = HBitmap(1000)
pin = hb.pin()
pid = os.fork()
if not pid:
    try:
        assert mark(pin.address, 5, 1) == 0 and list(hb) == [5]
        pin.close()
        hb.truncate(10)
        os._exit(0)
    finally:
        os._exit(1)
assert os.waitpid(pid, 0)[1] == 0
assert mark(pin.address, 7, 1) == 0
try:
    hb.truncate(10)
except BufferError:
    print(list(hb))
pin.close()
"""
    assert run_python(code).strip() == "[7]"


# ---- pins of nodes --------------------------------------------------------------------------

MARK = SET(native.address("hbtracker_mark"))
TRY_MARK = SET(native.address("hbtracker_try_mark"))


def test_a_native_hook_marks_a_node() -> None:
    node = BlockGraph().add_node("disk", size=1 << 20)
    bitmap = node.add_bitmap("daily", granularity=512)
    with node.pin() as address:
        assert MARK(address, 1000, 100) == 0
        assert TRY_MARK(address, 5000, 1) == 0
        later = node.add_bitmap("later", granularity=512)
        assert MARK(address, 0, 1) == 0
        assert MARK(address, (1 << 20) - 1, 2) == -errno.ERANGE
    assert list(bitmap.areas()) == [(0, 1536), (4608, 512)]
    assert list(later.areas()) == [(0, 512)]


def test_a_native_hook_that_holds_a_node_hears_of_truncate_and_close() -> None:
    node = BlockGraph().add_node("disk", size=1 << 20)
    node.add_bitmap("daily", granularity=512)
    pin = node.pin()
    node.truncate(1 << 21)
    assert MARK(pin.address, 1 << 20, 512) == 0
    node.truncate(4096)
    assert MARK(pin.address, 4096, 1) == -errno.ERANGE
    assert MARK(pin.address, 0, 1) == 0
    node.close()
    for call in (MARK, TRY_MARK):
        assert call(pin.address, 0, 1) == -errno.ERANGE
    with pytest.raises(ClosedError, match="node 'disk' is closed"):
        node.pin()
    pin.close()
    with pytest.raises(ClosedError, match="the pin of node 'disk' is closed"):
        pin.address  # noqa: B018


@pytest.mark.skipif(
    sys.implementation.name == "pypy", reason="SQLite keeps its locks until PyPy has collected it"
)
@pytest.mark.filterwarnings("ignore:unclosed (file|database):ResourceWarning")
def test_a_pin_keeps_the_node_that_nobody_else_has(tmp_path: Path) -> None:
    graph = BlockGraph()
    node = graph.add_node("disk", size=1 << 20, store=LocalStore(tmp_path / "store"))
    node.add_bitmap("daily", granularity=512, persistent=True)
    pin = node.pin()
    del node, graph
    collect()
    assert MARK(pin.address, 1000, 100) == 0
    pin.close()
    collect()
    with BlockGraph() as graph:
        node = graph.add_node("disk", store=LocalStore(tmp_path / "store"))
        assert list(node.bitmaps["daily"].areas()) == [(512, 1024)]


def test_a_pin_of_a_node_that_is_dropped_says_so() -> None:
    node = BlockGraph().add_node("disk", size=1 << 20)
    with pytest.warns(ResourceWarning, match="a pin of node 'disk' was dropped"):
        drop_a_pin_of(node)


def test_a_readonly_node_refuses_native_writes(tmp_path: Path) -> None:
    with BlockGraph() as graph:
        graph.add_node("disk", size=1 << 20, store=LocalStore(tmp_path / "store")).add_bitmap(
            "daily", persistent=True
        )
    with BlockGraph() as graph:
        node = graph.add_node("disk", store=LocalStore(tmp_path / "store"), read_only=True)
        with node.pin() as address:
            assert MARK(address, 0, 1) == -errno.EROFS


def test_native_writes_beside_changes_are_all_there() -> None:
    node = BlockGraph().add_node("disk", size=1 << 20)
    daily = node.add_bitmap("daily", granularity=512)
    with node.pin() as address:
        marked: list[int] = []
        stop = threading.Event()

        def write() -> None:
            offset = 0
            while not stop.is_set():
                offset = (offset + 512 * 7) % (1 << 20)
                assert MARK(address, offset, 1) == 0
                marked.append(offset)

        thread = threading.Thread(target=write)
        thread.start()
        found: set[int] = set()
        for n in range(100):
            with daily.freeze() as frozen:
                for offset, nbytes in daily.areas():
                    found.update(range(offset, offset + nbytes, 512))
                frozen.done()
            node.truncate((1 << 20) + 512 * (n % 2))
        stop.set()
        thread.join()
        for offset, nbytes in daily.areas():
            found.update(range(offset, offset + nbytes, 512))
    assert found - {1 << 20} == set(marked)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_in_the_child_of_a_fork_a_node_with_a_store_refuses_native_writes(tmp_path: Path) -> None:
    code = f"""
import ctypes, errno, os
from pybitmap import BlockGraph, StateError, native
from pybitmap.store import LocalStore
SET = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64)
mark = SET(native.address("hbtracker_mark"))
with BlockGraph() as graph:
    node = graph.add_node("disk", size=1 << 20, store=LocalStore({str(tmp_path / "store")!r}))
    node.add_bitmap("daily", granularity=512, persistent=True)
    with node.pin() as address:
        pid = os.fork()
        if not pid:
            try:
                assert mark(address, 5, 1) == -errno.ERANGE
                try:
                    node.pin()
                except StateError:
                    os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
        assert mark(address, 0, 1) == 0
    print(list(node.bitmaps["daily"].areas()))
"""
    assert run_python(code).strip() == "[(0, 512)]"
