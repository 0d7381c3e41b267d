# SPDX-License-Identifier: MIT
"""Stores that were copied while they were in use, and disks that do not take what they took.

What must be noticed: every way of copying that makes new files, on every file system at hand, and a
catalog of one time beside bits of another, whatever they were copied with. What is written over the
files in place, both of one time, cannot be; the README says so.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path

import pytest
from filesystems import KINDS, filesystem, make_filesystem, mounted
from local import words_files
from peers import peer

from pybitmap import BlockGraph, StoreError
from pybitmap.store import LocalStore

G = 65536
SIZE = 8192 * 64 * G

#: How the store `s` is saved while it is in use, and put back after a kill.
WAYS = {
    "cp -r": ("cp -r s bak", "rm -rf s; cp -r bak s"),
    "cp -a": ("cp -a s bak", "rm -rf s; cp -a bak s"),
    "reflink": ("cp -a --reflink=auto s bak", "rm -rf s; cp -a --reflink=auto bak s"),
    "rename": ("cp -a s bak", "mv s killed; mv bak s"),
    "files renamed": ("cp -a s bak", "for f in bak/*; do mv -f $f s/; done"),
    "tar": ("tar cf bak.tar s", "rm -rf s; tar xf bak.tar"),
    "rsync": ("rsync -a s/ bak/", "rsync -aI --delete bak/ s/"),
    "hard links": ("cp -a s bak", "rm -rf s; cp -al bak s; rm -rf bak"),
}

#: Makes a store with two bitmaps, one of them frozen; and another store's worth of marks when told.
WRITER = f"""
import sys
from pybitmap import BlockGraph
from pybitmap.store import LocalStore
graph = BlockGraph()
node = graph.add_node("d", {SIZE}, store=LocalStore("s"))
a = node.add_bitmap("a", {G}, persistent=True)
b = node.add_bitmap("b", {G}, persistent=True)
node.mark_dirty(0, {G})
graph.flush()
frozen = b.freeze()
print("ready", flush=True)
sys.stdin.readline()
node.mark_dirty(64 * {G}, 4096 * 64 * {G})
print("marked", flush=True)
sys.stdin.readline()
"""
MARKED = [(0, G), (64 * G, 4096 * 64 * G)]


@contextmanager
def killed_writer(folder: Path) -> Iterator[None]:
    """What is done meanwhile comes before its marks; then it is killed."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        yield
        writer.stdin.write("\n")
        writer.stdin.flush()
        assert writer.stdout.readline() == "marked\n"
        writer.send_signal(signal.SIGKILL)
        writer.wait()


def shell(command: str, folder: Path) -> None:
    subprocess.run(["sh", "-ec", command], cwd=folder, check=True)


def reasons(path: Path, *, read_only: bool) -> list[str | None]:
    with BlockGraph() as graph:
        node = graph.add_node("d", SIZE, store=LocalStore(path), read_only=read_only)
        return [bitmap.reason for bitmap in node.bitmaps.values()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_that_is_put_back_after_a_kill_is_inconsistent(kind: str, tmp_path: Path) -> None:
    peer("rsync", "rsync")
    with filesystem(kind, tmp_path) as top:
        for way, (save, put_back) in WAYS.items():
            folder = top / way.replace(" ", "")
            folder.mkdir()
            with killed_writer(folder):
                shell(save, folder)
            shell(put_back, folder)
            for read_only in (True, False):
                found = reasons(folder / "s", read_only=read_only)
                assert found == ["it was in use when its files were copied or replaced"] * 2, way


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_killed_process_marked_is_exact(kind: str, tmp_path: Path) -> None:
    """The store itself, wherever it lies, also renamed with its directory."""
    with filesystem(kind, tmp_path) as top:
        with killed_writer(top):
            pass
        os.rename(top / "s", top / "t")
        for read_only in (True, False):
            with BlockGraph() as graph:
                store = LocalStore(top / "t")
                node = graph.add_node("d", SIZE, store=store, read_only=read_only)
                for bitmap in node.bitmaps.values():
                    assert list(bitmap.areas()) == MARKED, bitmap.reason


def versions(path: Path, folder: Path) -> dict[str, Path]:
    """Copies of a store at different times; its bits change from each to the next."""
    copies = {}

    def copy(name: str) -> None:
        copies[name] = folder / name
        shutil.copytree(path, copies[name])

    for number in range(2):
        with BlockGraph() as graph:
            node = graph.add_node("d", SIZE, store=LocalStore(path))
            if not number:
                node.add_bitmap("a", G, persistent=True)
            node.mark_dirty(2 * number * G, 1)
            copy(f"in use {number}")
            node.mark_dirty((2 * number + 1) * G, 1)
        copy(f"closed {number}")
    with BlockGraph() as graph:
        graph.add_node("d", store=LocalStore(path))
    copy("closed, unchanged")
    return copies


def test_bits_of_one_time_do_not_go_with_a_catalog_of_another(tmp_path: Path) -> None:
    copies = versions(tmp_path / "s", tmp_path)
    [name] = words_files(tmp_path / "s")
    for catalog, words in product(copies, copies):
        torn = tmp_path / "torn"
        shutil.rmtree(torn, ignore_errors=True)
        shutil.copytree(copies[catalog], torn)
        shutil.copyfile(copies[words] / name, torn / name)  # in place
        good = catalog == words and catalog.startswith("closed")
        for read_only in (True, False):
            [reason] = reasons(torn, read_only=read_only)
            assert (reason is None) is good, f"{catalog}, bits of {words}: {reason}"


def test_old_bits_in_place_of_those_in_use_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with BlockGraph() as graph:
        graph.add_node("d", SIZE, store=LocalStore(path)).add_bitmap("a", G, persistent=True)
        [name] = words_files(path)
        old = (path / name).read_bytes()
    graph = BlockGraph()
    graph.add_node("d", store=LocalStore(path)).mark_dirty(0, G)
    with open(path / name, "r+b") as file:
        file.write(old)
    graph.nodes["d"].close(discard=True)
    for read_only in (True, False):
        found = reasons(path, read_only=read_only)
        assert found == ["it was in use when its files were copied or replaced"]


# ---- disks that do not take what they took --------------------------------------------------


@contextmanager
def thin_disk(folder: Path) -> Iterator[tuple[Path, Path]]:
    """A file system on a file for which there is no space; and what fills up the rest."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root of a Linux machine can mount")
    with mounted(folder / "thin", "-t", "tmpfs", "-o", "size=24m", "tmpfs") as thin:
        image = thin / "image"
        image.touch()
        os.truncate(image, 64 << 20)
        # A journal that cannot be written would make it read-only.
        make_filesystem("ext4", image, "-O", "^has_journal")
        with mounted(folder / "disk", "-o", "loop", str(image)) as disk:
            yield disk, thin / "filling"


def fill(file: Path) -> None:
    os.sync()
    with open(file, "wb", buffering=0) as data, suppress(OSError):
        while True:
            data.write(bytes(4096))


LOST = "its bits could not be written to the disk"


@pytest.mark.parametrize("written", [False, True], ids=["not yet", "in the background"])
def test_what_a_killed_process_could_not_write_is_inconsistent(
    tmp_path: Path, written: bool
) -> None:
    with thin_disk(tmp_path) as (disk, filling):
        with killed_writer(disk):
            fill(filling)
        if written:
            os.sync()  # tells nobody
            filling.unlink()
        before: set[str] = set()
        for read_only in (True, False, False):
            with BlockGraph() as graph:
                store = LocalStore(disk / "s")
                node = graph.add_node("d", SIZE, store=store, read_only=read_only)
                lost = {each.name for each in node.bitmaps.values() if each.inconsistent}
                for bitmap in node.bitmaps.values():
                    if bitmap.inconsistent:
                        assert (bitmap.reason or "").startswith(LOST)
                    else:  # there was space for its pages
                        assert list(bitmap.areas()) == MARKED
            assert lost
            assert lost >= before
            before = lost


def test_what_could_not_be_written_is_not_valid_at_the_second_close(tmp_path: Path) -> None:
    with thin_disk(tmp_path) as (disk, filling):
        graph = BlockGraph()
        node = graph.add_node("d", SIZE, store=LocalStore(disk / "s"))
        node.add_bitmap("a", G, persistent=True)
        node.add_bitmap("off", G, persistent=True, disabled=True)
        graph.flush()
        fill(filling)
        node.mark_dirty(64 * G, 4096 * 64 * G)
        with pytest.raises(StoreError):
            graph.close()
        filling.unlink()
        graph.close()
        for read_only in (True, False, False):
            lost, off = reasons(disk / "s", read_only=read_only)
            assert lost is not None
            assert lost.startswith(LOST)
            assert off is None
        with BlockGraph() as graph:
            node = graph.add_node("d", store=LocalStore(disk / "s"))
            node.remove_bitmap("a")
            node.add_bitmap("a", G, persistent=True)
            node.mark_dirty(0, 1)
        assert reasons(disk / "s", read_only=False) == [None, None]
