# SPDX-License-Identifier: MIT
"""Targets that have no locks, and such that others have locked: --no-lock, and -U."""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import preload
import pytest
from commands import Run, heed_signals
from images import FINE, check, create, qemu, qemu_img

pytest.importorskip("click", reason="the command line is an extra: pip install '.[cli]'")
pytest.importorskip("rich", reason="the command line is an extra: pip install '.[cli]'")

from pybitmap import BlockGraph
from pybitmap.store import LocalStore, Qcow2Store, Store

ERRORS = [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL]

READING = [["info"], ["check"], ["dump", "a"]]
CHANGING = [
    ["add", "c"],
    ["clear", "a"],
    ["disable", "a"],
    ["enable", "a"],
    ["repair", "--all"],
    ["merge", "a", "b"],
    ["remove", "c"],
    ["remove", "--stale"],
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return preload.build(tmp_path_factory.mktemp("library"), "nolocks")


def made(kind: str, folder: Path) -> tuple[Path, Store]:
    """A target with the bitmap a, which has a dirty group."""
    folder.mkdir(exist_ok=True)
    path = folder / "target"
    store: Store = LocalStore(path)
    if kind == "qcow2":
        create(path, "1M")
        store = Qcow2Store(path)
    with BlockGraph() as graph:
        node = graph.add_node("n", 1 << 20, store)
        node.add_bitmap("a", persistent=True)
        node.mark_dirty(0, 1)
    return path, store


def results(library: Path, *cases: tuple[int, int, list[Any]]) -> list[tuple[int, str, str]]:
    plain = [(flock, fcntl, list(map(str, words))) for flock, fcntl, words in cases]
    said = json.loads(preload.run(library, "unlocked.py", json.dumps(plain)))
    return [(code, out, err) for code, out, err in said]


def words(path: Path, command: list[str], *options: str) -> list[Any]:
    return [command[0], path, *command[1:], *options]


@pytest.mark.parametrize("kind", ["local", "qcow2"])
def test_without_locks_everything_is_refused_and_nothing_changes(
    library: Path, tmp_path: Path, kind: str
) -> None:
    path, store = made(kind, tmp_path)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    before = [each.read_bytes() for each in files]
    cases = [(error, error, words(path, ["info"])) for error in ERRORS]
    cases += [(error, error, words(path, ["add", "c"])) for error in ERRORS]
    cases += [
        (errno.ENOLCK, errno.ENOLCK, words(path, command)) for command in (*READING, *CHANGING)
    ]
    if kind == "local":  # where either is needed
        for flock, fcntl in ((errno.ENOLCK, 0), (0, errno.ENOLCK)):
            cases += [
                (flock, fcntl, words(path, command)) for command in (["info"], ["clear", "a"])
            ]
    for code, out, err in results(library, *cases):
        assert (code, out) == (2, "")
        assert str(path) in err
        assert "its file system has no locks (" in err
        assert "--no-lock (in Python lock=False) goes on all the same\n" in err
        assert len(err.splitlines()) == 1
    assert [each.read_bytes() for each in files] == before
    assert (sorted(path.iterdir()) if path.is_dir() else [path]) == files
    assert [each.name for node in store.entries() for each in node.bitmaps] == ["a"]


@pytest.mark.parametrize("kind", ["local", "qcow2"])
def test_without_locks_everything_can_be_done_all_the_same(
    library: Path, tmp_path: Path, kind: str
) -> None:
    path, store = made(kind, tmp_path)
    error = errno.ENOLCK
    cases = [(error, error, words(path, command, "--no-lock")) for command in READING]
    cases += [
        (0, 0, words(path, ["add", "b"])),
        *((error, error, words(path, command, "--no-lock")) for command in CHANGING[:4]),
        (error, error, words(path, ["merge", "b", "a"], "--no-lock")),
        (error, error, words(path, ["dump", "b", "--format", "csv"], "-U")),
        (error, error, words(path, ["remove", "c"], "--no-lock")),
    ]
    said = results(library, *cases)
    for (_, _, command), (code, _, err) in zip(cases, said):
        assert code == 0, (command, err)
        risk = "stale or torn" if command[0] in ("info", "check", "dump") else "destroys it"
        assert (risk in err) == (command[-1] in ("-U", "--no-lock"))
        assert len(err.splitlines()) <= 1
    assert "enabled" in said[0][1]
    assert said[1][1] == "a: good\n"
    assert json.loads(said[2][1]) == [{"offset": 0, "length": 65536}]
    assert said[-2][1] == "offset,length\n"  # after clear
    assert [(each.name, each.enabled) for node in store.entries() for each in node.bitmaps] == [
        ("a", True),
        ("b", True),
    ]
    if kind == "qcow2":
        assert check(path) == FINE


@pytest.mark.parametrize("kind", ["local", "qcow2"])
def test_what_is_broken_can_be_repaired_and_removed(
    library: Path, tmp_path: Path, kind: str
) -> None:
    path, store = made(kind, tmp_path)
    graph = BlockGraph()
    graph.add_node("n", store=store).close(discard=True)
    error = errno.ENOLCK
    if kind == "local":  # a killed process loses nothing there: as after a crash of the system
        with closing(sqlite3.connect(path / "catalog.sqlite")) as catalog, catalog:
            catalog.execute("UPDATE bitmap SET in_use = 'another-boot 1'")
    repaired, listed, again = results(
        library,
        (error, error, words(path, ["repair", "--all"], "--no-lock")),
        (error, error, words(path, ["info"], "--no-lock")),
        (error, error, words(path, ["remove", "--stale"], "--no-lock")),
    )
    assert (repaired[0], repaired[1]) == (0, "a\n")
    assert "inconsistent" not in listed[1]
    assert again[:2] == (0, "")


@pytest.mark.parametrize("kind", ["local", "qcow2"])
def test_where_there_are_locks_no_lock_takes_and_heeds_them(
    library: Path, tmp_path: Path, kind: str
) -> None:
    path, store = made(kind, tmp_path)
    with BlockGraph() as graph:
        graph.add_node("n", store=store)
        [(code, out, err)] = results(library, (0, 0, words(path, ["clear", "a"], "--no-lock")))
    assert (code, out) == (2, "")
    assert "another pro" in err.splitlines()[-1]


def serve(library: Path, folder: Path, node: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pybitmap", "serve", "--socket", folder / "s", "--node", node],
        env={**os.environ, "LD_PRELOAD": str(library), "NOLOCKS_ERRNO": str(errno.ENOLCK)},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_signals,
    )


@pytest.mark.parametrize(
    ("kind", "read_only"), [("local", ""), ("qcow2", ""), ("qcow2", ",read-only")]
)
def test_serve_does_without_locks_if_told_so(
    library: Path, tmp_path: Path, kind: str, read_only: str
) -> None:
    path, store = made(kind, tmp_path)
    key = "image" if kind == "qcow2" else "store"
    with serve(library, tmp_path, f"n,{key}={path}") as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "its file system has no locks" in err
    with serve(library, tmp_path, f"n,no-lock,{key}={path}{read_only}") as process:
        assert process.stderr is not None
        risk = "stale or torn" if read_only else "destroys it"
        assert risk in process.stderr.readline()
        assert process.stderr.readline() == f"pybitmap: listening on {tmp_path}/s: n\n"
        process.terminate()
        assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 0
    [node] = store.entries()
    assert [(each.name, each.reason, each.in_use) for each in node.bitmaps] == [("a", None, False)]


_TWICE = """
import ctypes, sys
from pathlib import Path
from pybitmap import BlockGraph, LockedError, UnsupportedError
from pybitmap.store import LocalStore, Qcow2Store

library, kind, path = sys.argv[1:]
make = LocalStore if kind == "local" else Qcow2Store
ctypes.CDLL(library).nolocks_fail(37, 37)
try:
    BlockGraph().add_node("n", store=make(path))
    raise AssertionError("without locks, and not told to do without")
except UnsupportedError as error:
    assert error.errno == 37, error.errno
graph = BlockGraph()
graph.add_node("n", store=make(path, lock=False))
try:
    BlockGraph().add_node("n", store=make(path, lock=False))
    raise AssertionError("twice in one process")
except LockedError as error:
    assert "already" in str(error), error
with BlockGraph() as reader:  # which is no harm
    reader.add_node("n", store=make(path, lock=False), read_only=True)
del graph
with BlockGraph() as graph:  # what nobody has any more
    graph.add_node("n", store=make(path, lock=False))
print("done")
"""


@pytest.mark.parametrize("kind", ["local", "qcow2"])
def test_a_process_knows_its_own_without_locks(library: Path, tmp_path: Path, kind: str) -> None:
    path, _ = made(kind, tmp_path)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _TWICE, str(library), kind, str(path)],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_all_nodes_of_a_store_do_without_locks_or_none(library: Path, tmp_path: Path) -> None:
    path, _ = made("local", tmp_path)
    nodes = ["--node", f"n,store={path},no-lock", "--node", f"m,store={path},size=1M"]
    [(code, out, err)] = results(library, (0, 0, ["serve", "--socket", tmp_path / "s", *nodes]))
    assert (code, out) == (2, "")
    assert err.endswith(f"pybitmap: {path}: give all of its nodes no-lock, or none\n")


# ---- what another program has open ----------------------------------------------------------


@contextmanager
def held(kind: str, path: Path, store: Store) -> Iterator[None]:
    """By a machine that runs, or by another process that marks."""
    if kind == "qcow2":
        with qemu(path, read_only=False):
            yield
    else:
        with BlockGraph() as graph:
            graph.add_node("n", store=store).mark_dirty(1 << 19, 1)
            yield


@pytest.mark.parametrize("kind", ["local", "qcow2"])
def test_the_refusal_to_read_what_is_open_names_the_way(
    run: Run, tmp_path: Path, kind: str
) -> None:
    path, store = made(kind, tmp_path)
    with held(kind, path, store):
        for command in READING:
            code, out, err = run(*words(path, command))
            assert (code, out) == (2, "")
            assert err.endswith("; -U reads it all the same, as it is on disk\n")
        for command in CHANGING:
            code, out, err = run(*words(path, command))
            assert (code, out) == (2, "")
            assert "-U" not in err
            assert str(path) in err


@pytest.mark.parametrize("option", ["-U", "--force-share", "--no-lock"])
@pytest.mark.parametrize("kind", ["local", "qcow2"])
def test_what_is_open_is_shown_and_said_to_be_maybe_old(
    run: Run, tmp_path: Path, kind: str, option: str
) -> None:
    path, store = made(kind, tmp_path)
    warning = f"pybitmap: {path}: read without a lock: "
    warning += "if a program has it open, this may be stale or torn\n"
    with held(kind, path, store):
        for more in ((), ("--count",)):
            code, out, err = run("info", path, option, *more)
            assert (code, err) == (0, warning)
            assert "enabled, in use\n" in out
            assert "inconsistent" not in out
            assert "repair" not in out
        code, out, err = run("info", path, option, "--json")
        [bitmap] = json.loads(out)["bitmaps"]
        assert (bitmap["in_use"], bitmap["inconsistent"]) == (True, False)
        checked, dumped = run("check", path, option), run("dump", path, "a", option)
        if kind == "qcow2":
            live = "a program that has it open keeps its bits"
            assert bitmap["count"] is None
            assert live in bitmap["reason"]
            assert checked.code == 0
            assert checked.out.startswith(f"a: in use: {live}")
            assert (dumped.code, dumped.out) == (2, "")
            assert f"{path}: Bitmap 'a' is in use: {live}" in dumped.err
        else:
            assert (bitmap["count"], bitmap["reason"]) == (2 * 65536, None)
            assert (checked.code, checked.out) == (0, "a: good\n")
            assert json.loads(dumped.out) == [
                {"offset": 0, "length": 65536},
                {"offset": 1 << 19, "length": 65536},
            ]
    found = run("dump", path, "a", option)
    assert (found.code, found.err) == (0, warning)
    assert {"offset": 0, "length": 65536} in json.loads(found.out)


def test_of_a_killed_machine_the_bitmaps_are_inconsistent(run: Run, tmp_path: Path) -> None:
    path, store = made("qcow2", tmp_path)
    graph = BlockGraph()
    graph.add_node("n", store=store).close(discard=True)
    code, out, _ = run("info", path, "-U")
    assert code == 0
    assert "inconsistent, enabled, in use" in out
    assert "repair" not in out  # nobody knows whether it is open
    assert run("check", path, "-U").code == 1


def test_a_machine_opens_what_is_read_without_a_lock(tmp_path: Path) -> None:
    path, _ = made("qcow2", tmp_path)
    with BlockGraph() as graph:
        graph.add_node("n", store=Qcow2Store(path, lock=False), read_only=True)
        with qemu(path, read_only=False) as execute:
            execute("block-dirty-bitmap-add", node="n", name="b", persistent=True)
        qemu_img("bitmap", "--remove", path, "a")


def test_what_a_machine_does_meanwhile_is_seen_when_it_is_on_disk(run: Run, tmp_path: Path) -> None:
    path, _ = made("qcow2", tmp_path)

    def names() -> list[tuple[str, bool]]:
        code, out, _ = run("info", path, "-U", "--json")
        assert code == 0
        info = json.loads(qemu_img("info", "-U", "--output=json", path))
        theirs = info["format-specific"]["data"].get("bitmaps", [])
        ours = [(each["name"], each["in_use"]) for each in json.loads(out)["bitmaps"]]
        assert ours == [(each["name"], "in-use" in each["flags"]) for each in theirs]
        return ours

    with qemu(path, read_only=False) as execute:
        execute("block-dirty-bitmap-add", node="n", name="b", persistent=True)
        assert names() == [("a", True)]
        execute("block-dirty-bitmap-remove", node="n", name="a")
        assert names() == []
        execute("blockdev-del", **{"node-name": "n"})
        assert names() == [("b", False)]
