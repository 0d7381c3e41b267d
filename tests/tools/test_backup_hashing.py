# SPDX-License-Identifier: MIT
"""The tree over what a disk holds, and the files of leaves from which it is made."""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from images import MIB, qemu_img, qemu_io
from points import KIB, History, root_by_the_book

from pybitmap.errors import CorruptError, NotFoundError, StoreError
from pybitmap.tools.backup.copies import image_of
from pybitmap.tools.backup.hashing import (
    GROUP,
    LEAF,
    Extent,
    _Leaves,
    _planned,
    _state,
    content_hashes,
    listed_root,
    root_of,
    sha256_of,
    write_leaves,
)
from pybitmap.tools.backup.manifest import LEAVES, Repository
from pybitmap.tools.backup.qemu import Content

ZERO_LEAF = hashlib.sha256(b"\0" + bytes(LEAF)).digest()
ZERO_GROUP = ZERO_LEAF * 16


# ---- without QEMU ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size",
    [0, 1, 512, LEAF - 1, LEAF, LEAF + 1, GROUP - 512, GROUP, GROUP + 512, 16 * GROUP, 17 * GROUP],
)
def test_the_tree_is_as_the_book_says(size: int) -> None:
    data = bytearray(size)
    for start in range(0, size, 3 * GROUP):
        data[start : start + 1000] = os.urandom(min(1000, size - start))
    groups = []
    for number in range(0, -(-size // GROUP)):
        piece = data[number * GROUP : (number + 1) * GROUP].ljust(GROUP, b"\0")
        hashes = b"".join(
            hashlib.sha256(b"\0" + piece[start : start + LEAF]).digest()
            for start in range(0, GROUP, LEAF)
        )
        groups.append((number, hashes))
    assert root_of(size, groups) == root_by_the_book(bytes(data))
    assert root_of(size, (each for each in groups if each[1] != ZERO_GROUP)) == root_of(
        size, groups
    )


def test_a_huge_disk_of_zeroes_has_a_root_at_once() -> None:
    assert len({root_of(size, ()) for size in (0, 1, 1 << 40, (1 << 63) - 512)}) == 4


@dataclass
class Layer:
    """What a copy changed: of each group something, or nothing but zeroes."""

    ngroups: int
    groups: dict[int, int | None]

    def write(self, path: Path, size: int) -> None:
        with open(path, "wb") as file:
            file.write(b"pybitmap leaves\n" + struct.pack("<IIQ", 1, LEAF, size))
            for number, value in sorted(self.groups.items()):
                if value is None:
                    file.write(struct.pack("<QQ", number, 1))
                else:
                    file.write(struct.pack("<QQ", number, 0) + bytes([value]) * 512)


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    ngroups = draw(st.integers(1, 12))
    values = st.none() | st.integers(0, 255)
    return Layer(ngroups, draw(st.dictionaries(st.integers(0, ngroups - 1), values, max_size=6)))


@given(st.lists(layers(), min_size=1, max_size=5))
def test_files_of_leaves_lie_over_each_other_as_disks_do(chain: list[Layer]) -> None:
    """The oldest first; what is cut off does not come back."""
    state: dict[int, int] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        files = []
        for number, layer in enumerate(chain):
            state = {group: value for group, value in state.items() if group < layer.ngroups}
            for group, value in layer.groups.items():
                state.pop(group, None)
                if value is not None:
                    state[group] = value
            path = folder / f"{number}.leaves"
            layer.write(path, layer.ngroups * GROUP)
            files.append(_Leaves(path))
            stack.callback(files[-1].close)
        found = list(_state(files[::-1], chain[-1].ngroups * GROUP))
    assert found == [(group, bytes([value]) * 512) for group, value in sorted(state.items())]


class Counted(list[Extent]):
    """How often an extent was looked at."""

    looks = 0

    def __getitem__(self, index: Any) -> Any:
        self.looks += 1
        return super().__getitem__(index)

    def __iter__(self) -> Iterator[Extent]:
        for each in super().__iter__():
            self.looks += 1
            yield each


def test_each_extent_is_looked_at_a_few_times_however_many_there_are() -> None:
    extents = Counted(
        Extent(number * GROUP + 512, number * GROUP + 1024, False) for number in range(1000)
    )
    assert [number for number, _, _ in _planned(extents)] == list(range(1000))
    assert extents.looks < 10 * 1000


# ---- with QEMU ------------------------------------------------------------------------------


@pytest.fixture
def history(memory_path: Path) -> History:
    """Three points: the disk shrinks to the middle of a leaf, and grows again."""
    history = History(memory_path / "backups")
    history.point(2 * MIB, ["write -P 1 0 2M"])
    history.point(MIB + 512, ["write -P 2 100k 1k", "write -z 256k 128k"])
    history.point(3 * MIB, ["write -P 3 2M 64k", "discard 640k 64k"])
    return history


def test_a_tree_follows_increments(history: History) -> None:
    repository = Repository.open(history.path)
    for point in repository.manifest.points:
        data = history.contents[point.id]
        [copy] = point.copies
        copies = repository.manifest.chain(copy)
        assert copy.size == len(data)
        assert copy.root == root_by_the_book(data)
        assert listed_root(repository, copies) == copy.root
        image = image_of(copy.file)
        found = content_hashes(image, history.path, flat=True)
        assert found == (copy.root, hashlib.sha256(data).hexdigest())
        assert copy.sha256 == hashlib.sha256(repository.path_of(copy).read_bytes()).hexdigest()
        assert copy.nbytes == repository.path_of(copy).stat().st_size


def test_only_what_an_increment_has_is_read(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a disk of 64 MiB that is full, three leaves: a cluster in each of two, and one over the
    border of two groups; a discarded range of any size is not read."""
    asked: list[tuple[int, int]] = []
    read = Content.read

    def heard(content: Content, places: Iterable[tuple[int, int]]) -> Iterator[bytes]:
        places = list(places)
        asked.extend(places)
        return read(content, iter(places))

    history = History(memory_path / "backups")
    history.point(64 * MIB, ["write -P 1 0 64M"])
    monkeypatch.setattr(Content, "read", heard)
    history.point(
        64 * MIB,
        ["write -P 2 5M 512", "write -P 3 7164k 8k", f"write -z -u {20 * MIB} {30 * MIB}"],
        options="cluster_size=4k",
    )
    assert sum(nbytes for _, nbytes in asked) == 3 * LEAF
    [copy] = Repository.open(history.path).manifest.points[1].copies
    assert copy.root == root_by_the_book(history.contents[list(history.contents)[1]])
    assert (history.path / (copy.file + LEAVES)).stat().st_size < 2000


@pytest.mark.parametrize(
    "options",
    [
        "",
        "cluster_size=512",
        "cluster_size=2M",
        "extended_l2=on,cluster_size=128k",
        "compression_type=zstd",
    ],
)
def test_images_of_all_kinds_are_read(memory_path: Path, options: str) -> None:
    path = memory_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", *(["-o", options] if options else []), path, "3M")
    compressed = "" if "extended" in options else "-c "
    qemu_io(path, f"write {compressed}-P 7 0 2M", "write -P 8 2300k 1k")
    data = b"\7" * (2 * MIB) + bytes(252 * KIB) + b"\10" * KIB
    assert write_leaves(path, []) == root_by_the_book(data.ljust(3 * MIB, b"\0"))


def test_a_damaged_file_of_leaves_is_an_error_or_another_root(history: History) -> None:
    repository = Repository.open(history.path)
    [copy] = repository.manifest.points[1].copies
    copies = repository.manifest.chain(copy)
    path = repository.leaves_of(copy)
    whole = path.read_bytes()
    places = [*range(0, 100, 7), *range(100, len(whole), 97), len(whole) - 1]
    damaged = [whole[:place] for place in places]
    damaged += [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in places]
    damaged += [whole + b"\0", whole + whole[32:], whole + b"\xff" * 16]
    for data in damaged:
        path.write_bytes(data)
        with suppress(CorruptError):
            assert listed_root(repository, copies) != copy.root
    path.unlink()
    with pytest.raises(CorruptError, match="is missing"):
        listed_root(repository, copies)


def test_what_is_no_copy_of_that_kind_is_refused(history: History) -> None:
    with Repository.open(history.path, writing=True) as repository:
        first, _, last = repository.manifest.points
        path = repository.new_file("vda", last.id)

        def attempt(parent: str | None) -> None:
            history.copy(repository, path, parent)

        for backing in (first.copies[0].file, "./" + last.copies[0].file, "/etc/passwd"):
            qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", "qcow2", path, "3M")
            with pytest.raises(CorruptError, match="the backing file of"):
                attempt(last.id)
            with pytest.raises(CorruptError, match=r"is '.*', not 'None'"):
                attempt(None)
        with pytest.raises(NotFoundError):
            attempt("0" * 32)
        path.write_bytes(b"raw")
        with pytest.raises(CorruptError, match="not a qcow2 image"):
            attempt(None)
        path.unlink()
        with pytest.raises(CorruptError, match="is missing"):
            attempt(None)
        other = history.path.with_name("data")
        qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={other}", path, "3M")
        with pytest.raises(CorruptError, match="in another file"):
            attempt(None)
        assert not path.with_name(path.name + LEAVES).exists()


def test_nothing_is_read_over_a_copy_whose_header_names_another_file(history: History) -> None:
    """A new one over the second point, whose own backing file is no longer the first point's."""
    with Repository.open(history.path, writing=True) as repository:
        _, second, _ = repository.manifest.points
        [copy] = second.copies
        path = repository.new_file("vda", second.id)
        qemu_img("create", "-q", "-f", "qcow2", "-b", copy.file, "-F", "qcow2", path)
        secret = history.path.with_name("secret")
        secret.write_bytes(b"s" * MIB)
        where = repository.path_of(copy)
        qemu_img("rebase", "-u", "-f", "qcow2", "-b", secret, "-F", "raw", where)
        with pytest.raises(CorruptError, match="the backing file of"):
            history.copy(repository, path, second.id)
        assert not path.with_name(path.name + LEAVES).exists()


def test_a_copy_that_cannot_be_read_leaves_no_leaves(memory_path: Path) -> None:
    path = memory_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "3M")
    qemu_io(path, "write -P 1 0 3M")
    os.truncate(path, 1 << 19)  # what is mapped behind the end cannot be read, or is zero
    try:
        root = write_leaves(path, [])
    except StoreError:
        assert not path.with_name(path.name + LEAVES).exists()
    else:
        assert root != root_by_the_book(b"\1" * (3 * MIB))
        path.with_name(path.name + LEAVES).unlink()
    path.write_bytes(b"nothing")
    with pytest.raises(StoreError, match="qemu-img"):
        write_leaves(path, [])
    assert not path.with_name(path.name + LEAVES).exists()


def test_an_exit_of_the_server_is_an_error_with_its_words(memory_path: Path) -> None:
    with pytest.raises(StoreError, match=r"qemu-nbd: .*No such file"):
        Content(image_of("nothing.qcow2"), folder=memory_path)
    path = memory_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "3M")
    with Content(image_of(path.name), folder=memory_path) as content:
        assert content._process is not None
        content._process.kill()
        with pytest.raises(StoreError, match="killed by signal 9"):
            list(content.read([(0, 512)] * 3))


def test_a_missing_program_is_told(memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(StoreError, match="qemu-nbd is not installed"):
        Content(image_of("a.qcow2"), folder=memory_path)
    with pytest.raises(StoreError, match="qemu-img is not installed"):
        write_leaves(memory_path / "a.qcow2", [])


def test_a_setpriv_that_knows_no_deaths_is_not_used(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of busybox."""
    folder = memory_path / "bin"
    folder.mkdir()
    (folder / "setpriv").write_text("#!/bin/sh\necho unrecognized option >&2; exit 1\n")
    (folder / "setpriv").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    qemu_img("create", "-q", "-f", "qcow2", memory_path / "a.qcow2", "3M")
    assert write_leaves(memory_path / "a.qcow2", []) == root_by_the_book(bytes(3 * MIB))


def test_the_hash_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"x" * 10_000_000)
    assert sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    told: list[int] = []
    sha256_of(path, lambda what, done, total: told.append(done))
    assert told[-1] == 10_000_000
    with pytest.raises(CorruptError, match="is missing"):
        sha256_of(tmp_path / "y")
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(CorruptError, match="symbolic link"):
        sha256_of(tmp_path / "link")
