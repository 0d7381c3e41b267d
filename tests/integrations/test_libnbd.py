# SPDX-License-Identifier: MIT
"""Dirty bitmaps over NBD: QEMU's as we have them, and the example that copies by them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Callable

import pytest
from images import create, qemu_img, qemu_io
from nbd_server import ROOT, SYSTEM_PYTHON, greets, need_libnbd, need_same_python
from peers import peer

from pybitmap import BlockGraph, CorruptError, InvalidError, NotFoundError
from pybitmap.integrations.libnbd import dirty_bitmap
from pybitmap.integrations.nbdkit import python_paths
from pybitmap.store import Qcow2Store

EXAMPLE = ROOT / "examples" / "nbd_incremental_copy.py"
SIZE = 5 << 30  # more than NBD's lengths have at once
GRANULARITY = 4096

ASK = """
import json, sys, nbd
from pybitmap.integrations.libnbd import context, dirty_bitmap
handle = nbd.NBD()
handle.add_meta_context(context("copying"))
handle.connect_uri(sys.argv[1])
print(json.dumps(list(dirty_bitmap(handle, "copying", int(sys.argv[2])).areas())))
"""


def run_python(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """By the Python that has libnbd."""
    return subprocess.run(
        [SYSTEM_PYTHON, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(python_paths())},
    )


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """With a bitmap that has what QEMU wrote, taken as "copying"."""
    need_libnbd()
    need_same_python()
    path = create(tmp_path / "disk.qcow2", SIZE)
    with BlockGraph() as graph:
        node = graph.add_node("disk", store=Qcow2Store(path))
        node.add_bitmap("copying", GRANULARITY, persistent=True)
    qemu_io(path, "write -P 1 0 1", "write -P 2 3G 3M", "write -P 3 4095M 2M", "write -z 1G 64k")
    qemu_io(path, f"write -P 4 {SIZE - 512} 512")
    with BlockGraph() as graph:
        graph.add_node("disk", store=Qcow2Store(path)).bitmaps["copying"].disable()
    return path


@contextmanager
def exported(image: Path, *options: str) -> Iterator[str]:
    socket = image.parent / "nbd.sock"
    command = [peer("qemu-nbd", "qemu-utils"), "-r", "-t", "-f", "qcow2", "-k", str(socket)]
    process = subprocess.Popen([*command, *options, str(image)])
    try:
        assert greets(process, socket)
        yield f"nbd+unix:///?socket={socket}"
    finally:
        process.terminate()
        process.wait(timeout=60)


def test_what_is_dirty_over_nbd_is_what_is_dirty_in_the_image(image: Path) -> None:
    with BlockGraph() as graph:
        node = graph.add_node("disk", store=Qcow2Store(image), read_only=True)
        expected = [list(area) for area in node.bitmaps["copying"].areas()]
    assert len(expected) == 5
    with exported(image, "-B", "copying") as uri:
        done = run_python("-c", ASK, uri, str(GRANULARITY))
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == expected


def test_the_example_makes_a_copy_that_equals_the_disk(tmp_path: Path, image: Path) -> None:
    copy = tmp_path / "copy.raw"
    copy.touch()  # of the disk before anything was written; it grows with it
    with exported(image, "-B", "copying") as uri:
        for _ in range(2):  # nothing was taken away by the first
            done = run_python(EXAMPLE, uri, "copying", copy, str(GRANULARITY))
            assert done.returncode == 0, done.stderr
            assert "bytes copied, and synced" in done.stdout
    qemu_img("compare", "-f", "raw", "-F", "qcow2", copy, image)
    assert copy.stat().st_blocks * 512 < 16 << 20  # no more than what is dirty


def test_a_bitmap_that_is_not_exported_is_named(tmp_path: Path, image: Path) -> None:
    (tmp_path / "copy").touch()
    with exported(image) as uri:
        done = run_python(EXAMPLE, uri, "copying", tmp_path / "copy")
    assert done.returncode == 1
    assert "the export has no bitmap 'copying': serve it (qemu-nbd -B 'copying')" in done.stderr


# ---- servers that answer as they like -----------------------------------------------------------


class Answers:
    """A handle whose server gives these lengths and flags, a list for each question."""

    def __init__(self, size: int, *answers: list[int]) -> None:
        self.size = size
        self.answers = list(answers)
        self.asked: list[tuple[int, int]] = []

    def can_meta_context(self, metacontext: str) -> bool:
        return metacontext == "qemu:dirty-bitmap:b"

    def get_size(self) -> int:
        return self.size

    def block_status(self, count: int, offset: int, extent: Callable[..., int]) -> None:
        self.asked.append((offset, count))
        extent("base:allocation", offset, [self.size, 1], None)
        extent("qemu:dirty-bitmap:b", offset, self.answers.pop(0), None)


def test_it_goes_on_where_an_answer_ends_and_ends_where_the_disk_does() -> None:
    handle = Answers(10_000, [512, 0, 512, 1], [4096, 0], [1 << 20, 1])
    assert list(dirty_bitmap(handle, "b", 512).areas()) == [(512, 512), (5120, 10_000 - 5120)]
    assert handle.asked == [(0, 10_000), (1024, 8976), (5120, 4880)]


def test_no_question_is_longer_than_the_protocol_has() -> None:
    handle = Answers(5 << 30, *[[1 << 31, 0]] * 3)
    assert not dirty_bitmap(handle, "b")
    assert [count for _, count in handle.asked] == [1 << 31, 1 << 31, 1 << 30]


@pytest.mark.parametrize("answer", [[], [0, 1], [0, 0, 0, 1]])
def test_an_answer_that_says_nothing_is_an_error(answer: list[int]) -> None:
    with pytest.raises(CorruptError, match="does not say what of bitmap 'b' is at 512"):
        dirty_bitmap(Answers(1024, [512, 0], answer), "b")


def test_an_empty_disk_has_nothing() -> None:
    assert len(dirty_bitmap(Answers(0), "b")) == 0


def test_what_is_not_offered_and_what_is_no_granularity_is_refused() -> None:
    with pytest.raises(NotFoundError, match=r"add_meta_context\('qemu:dirty-bitmap:other'\)"):
        dirty_bitmap(Answers(512), "other")
    with pytest.raises(InvalidError, match="not a power of 2"):
        dirty_bitmap(Answers(512), "b", 3000)
