# SPDX-License-Identifier: MIT
"""Every public name has an example in its docstring, and every example gives what it shows.

A class and a method or function have an example of their own; of a property or a field it is enough
that its class's example mentions it. ``WITHOUT`` lists the exceptions, each with its reason.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, NamedTuple

import pytest
from images import qemu_img
from peers import package, peer
from points import History
from tracked import need_tracker

import pybitmap
from pybitmap import BlockGraph, BlockNode, HBitmap, LocalStore
from pybitmap.block.node import CffiNodeBase
from pybitmap.hbitmap import CffiBase
from pybitmap.qmp import Server
from pybitmap.tools.monitor import Monitor

PUBLIC = [
    "pybitmap",
    "pybitmap.store",
    "pybitmap.qmp",
    "pybitmap.trackers",
    "pybitmap.native",
    "pybitmap.livecopy",
    "pybitmap.arrays",
    "pybitmap.extent",
    "pybitmap.interchange",
    "pybitmap.tools.monitor",
    "pybitmap.tools.live",
    "pybitmap.tools.backup",
    *(["pybitmap.tools.fleet"] if all(map(find_spec, ("duckdb", "numpy"))) else []),
    "pybitmap.integrations.libnbd",
    "pybitmap.integrations.nbdkit",
    "pybitmap.integrations.raw_disk",
    "pybitmap.integrations.served",
    "pybitmap.compat",
    "pybitmap.compat.bits",
    "pybitmap.compat.roaring",
]

_PROTOCOL = "nodes call it and stores implement it; tests/support/memory_store.py is a whole store"
_KVM = "wants a machine of KVM's, which takes a page: docs/howto/kvm-migration.md"

#: What has no example, and why. A class stands for all that it has, ``Class.name`` for one.
WITHOUT = {
    "pybitmap.store.Change": _PROTOCOL,
    "pybitmap.store.Purpose": _PROTOCOL,
    "pybitmap.store.Record": _PROTOCOL,
    "pybitmap.store.Volume": _PROTOCOL,
    "pybitmap.store.Wanted": _PROTOCOL,
    "pybitmap.store.Store.open": _PROTOCOL,
    "pybitmap.store.Store.prepare": _PROTOCOL,
    "pybitmap.LocalStore.open": _PROTOCOL,
    "pybitmap.LocalStore.prepare": _PROTOCOL,
    "pybitmap.Qcow2Store.open": _PROTOCOL,
    "pybitmap.Qcow2Store.prepare": _PROTOCOL,
    "pybitmap.Qcow2Store.closed": "for its volume",
    "pybitmap.trackers.KvmDirtyLog": _KVM,
    "pybitmap.trackers.KvmDirtyRing": _KVM,
    "pybitmap.integrations.libnbd.Handle": "what is used of nbd.NBD: dirty_bitmap has one",
    "pybitmap.integrations.nbdkit.main": "becomes nbdkit: docs/howto/nbdkit.md",
    "pybitmap.tools.backup.Backup": "what backup() gives, which has an example",
    "pybitmap.tools.backup.JobError": "wants a disk that cannot be read, or a target that is full",
    "pybitmap.compat.roaring.AbstractBitMap": "only for isinstance, as pyroaring's",
    "pybitmap.compat.roaring.AbstractBitMap64": "only for isinstance, as pyroaring's",
}


@contextmanager
def a_monitor(folder: Path) -> Iterator[dict[str, Any]]:
    """Of our own server, which answers as QEMU does."""
    package("qemu.qmp")
    with BlockGraph() as graph:
        disk = graph.add_node("disk0", size=1 << 30, store=LocalStore("disks.bitmaps"))
        disk.add_bitmap("daily", persistent=True)
        disk.mark_dirty(1_000_000, 512)
        with Server(graph, "vm0.qmp"), Monitor("vm0.qmp") as monitor:
            yield {"monitor": monitor}


@contextmanager
def backups(folder: Path) -> Iterator[dict[str, Any]]:
    """Two points of a disk, and another disk."""
    peer("qemu-img", "qemu-utils")
    peer("qemu-io", "qemu-utils")
    begun = folder.parent / "begun"
    if not begun.exists():
        begun.mkdir()
        history = History(begun / "backups")
        history.point(1 << 20, ["write -P 1 0 128k"])
        history.point(1 << 20, ["write -P 2 64k 64k"])
        qemu_img("create", "-q", "-f", "qcow2", begun / "disk.qcow2", "4M")
    shutil.copytree(begun, folder, dirs_exist_ok=True)
    yield {}


@contextmanager
def a_fleet(folder: Path) -> Iterator[dict[str, Any]]:
    """A store, and a scan of it."""
    from pybitmap.tools import fleet

    with BlockGraph() as graph:
        disk = graph.add_node("vm1", size=1 << 30, store=LocalStore("vm1.bitmaps"))
        disk.add_bitmap("daily", persistent=True)
        disk.mark_dirty(1_000_000, 512)
    with ThreadPoolExecutor(1) as executor:
        fleet.scan(fleet.find(["vm1.bitmaps"], host="h1"), "tonight", executor=executor)
    yield {}


#: What examples of a module begin with, as its docstring, or that of its class, says.
GIVEN: dict[str, Callable[[Path], AbstractContextManager[dict[str, Any]]]] = {
    "pybitmap.tools.monitor": a_monitor,
    "pybitmap.tools.live": a_monitor,
    "pybitmap.tools.backup": backups,
    "pybitmap.tools.fleet": a_fleet,
}


def _daemon() -> None:
    package("qemu.qmp")
    peer("qemu-storage-daemon", "qemu-system-common")


#: What examples of a module want that not all machines have.
WANTED: dict[str, Callable[[], object]] = {
    "pybitmap.store.qcow2.store": lambda: peer("qemu-img", "qemu-utils"),
    "pybitmap.tools.backup.run": _daemon,
    "pybitmap.trackers.base": need_tracker,
    "pybitmap.trackers.memory": need_tracker,
    "pybitmap.trackers.snapshot": need_tracker,
    "pybitmap.trackers.unicorn": lambda: package("unicorn"),
}


class Public(NamedTuple):
    """A public thing: its name from the module that offers it on, and where its examples are."""

    name: str
    thing: Any
    #: Of the class that it is in, and of that class's bases.
    mentioned: str = ""
    trivial: bool = False

    @property
    def doc(self) -> str:
        return "" if self.thing is None else inspect.getdoc(self.thing) or ""


def offered(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """What it says that it offers; if it says nothing, what it defines."""
    names = getattr(module, "__all__", None)
    if names is None:
        names = [
            name
            for name, thing in vars(module).items()
            if not name.startswith("_")
            and getattr(thing, "__module__", None) == module.__name__
            and (inspect.isclass(thing) or inspect.isfunction(thing))
        ]
    for name in names:
        yield name, getattr(module, name)


def example(doc: str) -> str:
    return "\n".join(each.source for each in doctest.DocTestParser().get_examples(doc))


def members(name: str, cls: type) -> Iterator[Public]:
    """Those that are public and that this package defines."""
    mentioned = "\n".join(example(each.__doc__ or "") for each in cls.__mro__)
    for member in dir(cls):
        owner = next((each for each in cls.__mro__ if member in vars(each)), object)
        if member.startswith("_") or not owner.__module__.startswith("pybitmap"):
            continue
        raw = vars(owner)[member]
        if isinstance(raw, property):
            yield Public(f"{name}.{member}", raw, mentioned, trivial=True)
        elif member in getattr(cls, "__dataclass_fields__", ()):  # its default, which may be a call
            yield Public(f"{name}.{member}", None, mentioned, trivial=True)
        elif callable(raw) or isinstance(raw, (classmethod, staticmethod)):
            yield Public(f"{name}.{member}", getattr(cls, member), mentioned)
        else:  # a value, whose docstring is that of its own class
            yield Public(f"{name}.{member}", None, mentioned, trivial=True)
    fields = {each: None for base in cls.__mro__ for each in vars(base).get("__annotations__", ())}
    for field in fields:
        if not field.startswith("_") and not hasattr(cls, field):
            yield Public(f"{name}.{field}", None, mentioned, trivial=True)


def walk() -> list[Public]:
    found: list[Public] = []
    seen: set[int] = set()
    for module in PUBLIC:
        loaded = importlib.import_module(module)
        for name, thing in offered(loaded):
            if id(thing) in seen:
                continue
            seen.add(id(thing))
            if not callable(thing):  # a value, of which the module's example has to tell
                mentioned = example(loaded.__doc__ or "")
                found.append(Public(f"{module}.{name}", None, mentioned, trivial=True))
                continue
            found.append(Public(f"{module}.{name}", thing))
            if inspect.isclass(thing):
                found.extend(members(f"{module}.{name}", thing))
    return found


ALL = walk()


def shown(public: Public) -> bool:
    if example(public.doc):
        return True
    name = public.name.rpartition(".")[2]
    return public.trivial and re.search(rf"\b{name}\b", public.mentioned) is not None


def excepted(public: Public) -> str | None:
    """What it is excepted by."""
    names = (public.name, public.name.rpartition(".")[0])
    return next((name for name in names if name in WITHOUT), None)


def test_the_walk_comes_by_what_there_is() -> None:
    names = {public.name for public in ALL}
    assert len(names) > 300
    assert {
        "pybitmap.HBitmap.set",
        "pybitmap.BlockNode.mark_dirty",
        "pybitmap.DirtyBitmap.reason",
        "pybitmap.store.StoredNode.size",
        "pybitmap.compat.bits.ones",
    } <= names


def test_whatever_is_public_has_an_example() -> None:
    missing = [each.name for each in ALL if not shown(each) and not excepted(each)]
    assert missing == []


def test_no_exception_is_left_over() -> None:
    used = {excepted(each) for each in ALL if not shown(each)}
    assert set(WITHOUT) - used == set()


def test_a_docstring_without_an_example_is_found() -> None:
    class Thing:
        """
        >>> Thing.mentioned
        """

        mentioned = other = 1

        def method(self) -> None:
            """Does something."""

    Thing.__module__ = "pybitmap.something"
    found = {each.name: shown(each) for each in members("Thing", Thing)}
    assert found == {"Thing.mentioned": True, "Thing.other": False, "Thing.method": False}


MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(pybitmap.__path__, "pybitmap.")
    if not module.name.endswith(("__main__", "._fast", ".nbdkit_plugin"))
)


def given(module: str, folder: Path) -> AbstractContextManager[dict[str, Any]]:
    """Names that examples of a module have, and what is in their folder."""
    for each in (module, module.rpartition(".")[0]):
        if each in GIVEN:
            return GIVEN[each](folder)
    return nullcontext({})


def examples_of(module: ModuleType) -> list[doctest.DocTest]:
    return [test for test in doctest.DocTestFinder().find(module) if test.examples]


@pytest.mark.parametrize("name", ["pybitmap", *MODULES])
def test_the_examples_give_what_they_show(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if error.name not in ("click", "rich", "duckdb", "numpy"):
            raise
        pytest.skip(f"{error.name} is not installed")
    if name in WANTED:
        WANTED[name]()
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for number, test in enumerate(examples_of(module)):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        with given(name, folder) as names:
            test.globs.update(names)
            runner.run(test)
    assert runner.failures == 0


@pytest.mark.parametrize(("cls", "python"), [(HBitmap, CffiBase), (BlockNode, CffiNodeBase)])
def test_what_stands_in_front_in_c_says_the_same(cls: type, python: type) -> None:
    for name, method in vars(python).items():
        if not name.startswith("_"):
            assert inspect.getdoc(getattr(cls, name)) == inspect.getdoc(method), name


def test_all_examples_are_run() -> None:
    run = {
        example(test.docstring or "")
        for name in ["pybitmap", *MODULES]
        if not name.startswith("pybitmap.cli")
        for test in examples_of(importlib.import_module(name))
    }
    unrun = [each.name for each in ALL if example(each.doc) and example(each.doc) not in run]
    assert unrun == []
