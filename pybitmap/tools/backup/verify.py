# SPDX-License-Identifier: MIT
"""Is a backup directory what its manifest says? ``pybitmap verify``.

Each file has its length, its header and its hash, ``qemu-img check`` has nothing against it, and
the hashes of its leaves make the root that is listed. On request all that a point holds is read, as
a restore would, and compared with that root, or with a disk.

Visitors. Writer: a backup beside it is not seen; a prune leaves what is being read. Kill, drop:
nothing is written, and programs that were started end. Fork: a child begins anew. Twin: any number
may read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from ...errors import CorruptError, InvalidError, StoreError
from ...store.base import Progress
from ...store.files import reported
from ...store.qcow2.file import File
from ...store.qcow2.image import Image, version_of
from .copies import chain_of, check_copy, image_of
from .hashing import content_hashes, listed_root, sha256_of
from .manifest import Copy, Manifest, Point, Repository
from .qemu import ProgramError, run
from .source import is_device

_LEAKS = (
    3  # what `qemu-img check` returns for clusters that nobody uses: nothing is wrong with data
)


@dataclass(frozen=True)
class Verified:
    """What was found of a copy.

    >>> [first, second] = verify("backups").copies
    >>> second.point.begun > first.point.begun, second.copy.disk, second.problems, second.sha256
    (True, 'vda', (), None)
    """

    point: Point
    copy: Copy
    problems: tuple[str, ...]  #: why it cannot be restored, or not as it was; none: it can
    sha256: str | None  #: of the disk's bytes, if all was read


@dataclass(frozen=True)
class Verification:
    """What was found in a directory.

    >>> found = verify("backups")
    >>> found.good, len(found.copies), found.leftovers, found.difference
    (True, 2, (), None)
    """

    copies: tuple[Verified, ...]  #: those that were looked at, in the manifest's order
    leftovers: tuple[Path, ...]  #: files that no point names
    difference: str | None  #: between the copy and the disk that it was compared with

    @property
    def good(self) -> bool:
        """Can all that was looked at be restored, and is it what it was compared with?"""
        return self.difference is None and not any(each.problems for each in self.copies)


def verify(
    path: str | os.PathLike[str],
    *,
    full: bool = False,
    disk: str | None = None,
    at: str | None = None,
    against: str | os.PathLike[str] | None = None,
    against_format: str | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Look at all copies, or at some.

    A problem of a copy is a result, and no exception; so are those of the copies that lie over it.

    :param full: also read all that the disks held at each point
    :param disk: only its copies, and what lies below them
    :param at: only those of this point: its id, or the first digits of it
    :param against: compare with this disk or image, which nobody may be writing to, the copy of its
        disk: the newest, or that of `at`. All of both is read
    :param against_format: "raw" or "qcow2"; None: as it begins, if that names no other file
    :raises NotFoundError: if there is no such directory, point or disk
    :raises InvalidError: if it is not clear what is to be compared
    :raises CorruptError, UnsupportedError: if the manifest is none
    :raises StoreError: if something cannot be read, or if what was to be read is pruned meanwhile

    >>> verify("backups", full=True).good
    True
    >>> with open(sorted(Path("backups").glob("*.qcow2"))[0], "ab") as file:
    ...     file.write(b"more")
    4
    >>> verify("backups").good
    False
    """
    repository = Repository.open(path)
    manifest = repository.manifest
    wanted = _wanted(manifest, disk, at)
    compared: Copy | None = None
    if against is not None:
        compared = _to_compare(manifest, disk, at)
    looks = _Looks(repository, manifest, progress)
    copies = tuple(looks.verified(point, copy, full=full) for point, copy in wanted)
    difference = None
    if against is not None and compared is not None and not looks.broken(compared):
        difference = _difference(
            repository, manifest.chain(compared), Path(against), against_format, progress
        )
    elif compared is not None:
        difference = f"the copy of disk {compared.disk!r} is broken"
    return Verification(copies, tuple(repository.leftovers()), difference)


def _wanted(manifest: Manifest, disk: str | None, at: str | None) -> list[tuple[Point, Copy]]:
    points: Sequence[Point] = manifest.points
    if at is not None:
        points = [manifest.point(at)]
    if disk is not None:
        manifest.copy(disk, at)  # is there any?
    return [
        (point, copy)
        for point in points
        for copy in point.copies
        if disk is None or copy.disk == disk
    ]


def _to_compare(manifest: Manifest, disk: str | None, at: str | None) -> Copy:
    if disk is None:
        point = manifest.last if at is None else manifest.point(at)
        disks = manifest.disks if point is None or at is None else [c.disk for c in point.copies]
        if len(disks) != 1:
            there = ", ".join(map(repr, disks)) or "none"
            raise InvalidError(f"say with which disk it is to be compared (disk): {there}")
        [disk] = disks
    return manifest.copy(disk, at)[1]


class _Looks:
    """At files, each once."""

    def __init__(
        self, repository: Repository, manifest: Manifest, progress: Progress | None
    ) -> None:
        self._repository, self._manifest, self._progress = repository, manifest, progress
        self._problems: dict[str, tuple[str, ...]] = {}  # by name of a file

    def verified(self, point: Point, copy: Copy, *, full: bool) -> Verified:
        problems = self._of_chain(copy)
        sha256 = None
        if full and not problems:
            copies = self._manifest.chain(copy)
            what = f"reading {copy.disk} at {point.id[:8]}"
            try:
                with self._repository.reading(copies):
                    hashes = content_hashes(
                        chain_of(self._repository, copies),
                        self._repository.path,
                        self._progress,
                        what,
                        flat=True,
                    )
                    sha256 = hashes.sha256
                    if hashes.root != copy.root:
                        problems = ("what it holds is not what was copied",)
            except ProgramError as error:
                problems = (str(error),)
        return Verified(point, copy, problems, sha256)

    def broken(self, copy: Copy) -> bool:
        return bool(self._of_chain(copy))

    def _of_chain(self, copy: Copy) -> tuple[str, ...]:
        copies = self._manifest.chain(copy)
        problems = list(self._of_file(copy))
        for below in copies[1:]:
            if self._of_file(below):
                problems.append(f"'{below.file}', over which it lies, is broken")
        if not problems:
            try:
                with self._repository.reading(copies):
                    if listed_root(self._repository, copies) != copy.root:
                        problems.append(f"the leaves of '{copy.file}' are not those of this point")
            except CorruptError as error:
                problems.append(str(error))
        return tuple(problems)

    def _of_file(self, copy: Copy) -> tuple[str, ...]:
        known = self._problems.get(copy.file)
        if known is None:
            try:
                with self._repository.reading([copy]):
                    self._check(copy)
                known = ()
            except (CorruptError, ProgramError) as error:
                known = (str(error),)
            self._problems[copy.file] = known
        return known

    def _check(self, copy: Copy) -> None:
        repository = self._repository
        check_copy(repository, copy, self._manifest.parent(copy))
        path = repository.path_of(copy)
        if sha256_of(path, self._progress) != copy.sha256:
            raise CorruptError(f"'{path}' has changed: its SHA-256 is another")
        image = image_of(path.name, alone=True)
        run("qemu-img", "check", "-q", image, folder=repository.path, good=(0, _LEAKS))


def _difference(
    repository: Repository,
    copies: Sequence[Copy],
    other: Path,
    known: str | None,
    progress: Progress | None,
) -> str | None:
    """How what a chain of copies holds differs from a disk.

    :param known: the format of the disk
    :raises StoreError: if it cannot be read
    """
    is_device(other)  # or neither, of which nobody knows when it could be read
    with reported(f"cannot look at '{other}'"):
        path = os.path.abspath(other)
    kind = known or _format_of(path)
    with repository.reading(copies):
        _, told = run(
            *("qemu-img", "info", "--output=json", "-f", kind, path), folder=repository.path
        )
        size = json.loads(told)["virtual-size"]
        if size != copies[0].size:
            return f"'{other}' has {size} bytes, and the copy {copies[0].size}"
        code, told = run(
            *(
                "qemu-img",
                "compare",
                "-p",
                "-f",
                kind,
                path,
                chain_of(repository, copies),
            ),
            folder=repository.path,
            good=(0, 1),
            progress=progress,
            what=f"comparing with {other}",
        )
    if code == 0:
        return None
    found = re.search(rb"offset ([0-9]+)", told)
    where = f" at byte {int(found[1])}" if found else ""
    return f"'{other}' and the copy differ{where}"


def _format_of(path: str) -> str:
    """As a disk begins: a raw one may begin in any way, so who knows it should say.

    :raises InvalidError: if it may be raw, and written so that QEMU would read other files
    """
    try:
        with open(path, "rb", buffering=0) as file:
            if version_of(file.read(8)) is None:
                return "raw"
    except OSError as error:
        raise StoreError(f"cannot read '{path}': {error.strerror}", error.errno) from error
    with closing(File(path, read_only=True, lock=False)) as file:
        image = Image(file, read_only=True)
        named = image.backing_name
        if named is None and image.has_data_file:
            named = b"a data file"
    if named is not None:
        raise InvalidError(
            f"'{path}' begins as a qcow2 image that names {named.decode('utf-8', 'replace')!r}, and"
            " may be a raw disk that somebody has written so: say which it is, by its format"
        )
    return "qcow2"
