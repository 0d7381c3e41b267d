# SPDX-License-Identifier: MIT
"""Points that nobody wants any more, taken away: ``pybitmap prune``.

What lies over a copy that goes has to lie over another: the nearest one below that stays, or none.
A new file is made for it, in which ``qemu-img rebase`` (the safe way, which reads) puts what the
files in between had. ``convert -B``, ``commit`` and ``rebase -u`` are of no use: over a disk that
was smaller for a while they bring back what was gone. ::

    A <- M <- C <- D      M is to go: C lies over A then, and D over C, by its name, as before

    C-1 = copy of C; rebase C-1 to A; root of C-1 over A = root of C?
                            killed: A M C D, C-1 left over
    manifest: A, C (parent A, new: C-1), D
                            killed: C is C-1, over A; D is over C-1; by their headers, D is over C
                            over M over A. All of them hold what they held
    rename C-1 to C         C is C, over A; D is over C
    manifest: A, C (parent A), D
    delete M

The new file is compared by its root: what it has was read and hashed, the rest is A's, and together
that is the root which was listed when C was made. Whatever fails, or is damaged, until the first of
the two manifests is written, nothing has changed.

Visitors. Writer: who reads a copy keeps it: it goes with the next sweep. Kill: see above, at any
moment each listed point can be restored, by us and by ``qemu-img`` alone; the next backup or prune
brings it to its end. Fork: a child begins anew. Drop (Ctrl-C): as a kill, but new files go. Twin: a
second one, or a backup, is refused.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ...errors import CorruptError, InvalidError, LockedError, StoreError
from ...store.base import Progress
from .copies import check_chain, check_image
from .hashing import sha256_of, write_leaves
from .manifest import LEAVES, Copy, Manifest, Point, Repository, open_regular, write_all
from .qemu import run

_PIECE = 1 << 22  # bytes
_FICLONE = 0x40049409


@dataclass(frozen=True)
class Pruned:
    """What has gone.

    >>> gone = prune("backups", keep=1)
    >>> len(gone.points), [copy.disk for copy in gone.rebased], len(gone.deleted)
    (1, ['vda'], 2)
    """

    points: tuple[Point, ...]  #: as they were listed
    rebased: tuple[Copy, ...]  #: copies that lie over another now, as they are listed
    deleted: tuple[Path, ...]  #: files; what somebody reads goes with a later sweep


def prune(
    path: str | os.PathLike[str],
    *,
    keep: int | None = None,
    points: Collection[str] = (),
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Pruned:
    """Take points away, all of these or, if one cannot go, none.

    The newest point stays: its bitmaps are what the next backup begins with.

    :param keep: so many of the newest stay, at least one, and those that have the newest copy of a
        disk; all others go
    :param points: these go instead: their ids, or the first digits of them
    :param dry_run: only tell which points would go, and which copies would be rebased
    :raises NotFoundError: if there is no such directory, or point
    :raises InvalidError: if not one of `keep` and `points` is given, or the newest would go
    :raises LockedError: if a backup or another prune is at work, or somebody reads what was to be
        changed
    :raises CorruptError: if a copy is damaged of which something is to be kept; nothing has changed
    :raises StoreError: if it cannot be read or written; the same holds

    >>> len(prune("backups", keep=1, dry_run=True).points)
    1
    >>> [point] = prune("backups", keep=1).points
    """
    if (keep is None) == (not points):
        raise InvalidError("say either how many points are to be kept, or which are to go")
    if keep is not None and keep < 1:
        raise InvalidError(f"{keep} points cannot be kept: the newest stays")
    with Repository.open(path, writing=not dry_run) as repository:
        if not dry_run:
            if not repository.settle():
                raise LockedError(
                    f"'{path}' is being read, and an earlier prune waits for that: try again later"
                )
            repository.sweep()
        manifest = repository.manifest
        going = _going(manifest, keep, points)
        work = _Work(repository, manifest, {each.id for each in going}, progress)
        if dry_run:
            return Pruned(tuple(going), tuple(copy for copy, _ in work.to_rebase()), ())
        if not going:
            return Pruned((), (), ())
        return Pruned(tuple(going), *work.done())


def _going(manifest: Manifest, keep: int | None, points: Collection[str]) -> list[Point]:
    if keep is not None:
        newest = {manifest.copy(disk)[0].id for disk in manifest.disks}
        return [each for each in manifest.points[:-keep] if each.id not in newest]
    named = {manifest.point(each).id for each in points}
    last = manifest.last
    if last is not None and last.id in named:
        raise InvalidError(
            f"point {last.id} is the newest, with whose bitmaps the next backup begins: it stays"
        )
    return [each for each in manifest.points if each.id in named]


class _Work:
    """What is to be done, and done.

    :param going: ids of points
    """

    def __init__(
        self,
        repository: Repository,
        manifest: Manifest,
        going: set[str],
        progress: Progress | None,
    ) -> None:
        self._repository, self._manifest = repository, manifest
        self._going, self._progress = going, progress

    def to_rebase(self) -> Iterator[tuple[Copy, str | None]]:
        """Copies that stay, and lie over one that goes; and the point whose copy they are to lie
        over, or None."""
        for point in self._manifest.points:
            if point.id in self._going:
                continue
            for copy in point.copies:
                parent = self._staying(copy)
                if parent != copy.parent:
                    yield copy, parent

    def _staying(self, copy: Copy) -> str | None:
        """The nearest point below that stays."""
        while copy.parent in self._going:
            below = self._manifest.parent(copy)
            assert below is not None
            copy = below
        return copy.parent

    def done(self) -> tuple[tuple[Copy, ...], tuple[Path, ...]]:
        """The copies that were rebased, and the files that were deleted."""
        repository = self._repository
        made: list[Path] = []
        rebased: dict[Copy, Copy] = {}
        try:
            for copy, parent in self.to_rebase():
                rebased[copy] = self._rebased(copy, parent, made)
            repository.replace(
                replace(point, copies=tuple(rebased.get(each, each) for each in point.copies))
                for point in self._manifest.points
                if point.id not in self._going
            )
        except BaseException:
            self._drop(made)
            raise
        deleted = repository.sweep()
        return tuple(replace(each, new=None) for each in rebased.values()), tuple(deleted)

    def _drop(self, made: Sequence[Path]) -> None:
        """New files that are not listed."""
        listed = {copy.new for point in self._repository.manifest.points for copy in point.copies}
        for path in made:
            if path.name not in listed:
                for each in (path, path.with_name(path.name + LEAVES)):
                    with suppress(OSError):
                        os.unlink(each)

    def _rebased(self, copy: Copy, parent: str | None, made: list[Path]) -> Copy:
        """A copy as it is to be listed; its new file is made."""
        repository, manifest = self._repository, self._manifest
        chain = manifest.chain(copy)
        check_chain(repository, chain)
        below: list[Copy] = []
        if parent is not None:
            below = manifest.chain(manifest.copy(copy.disk, parent)[1])
        [identifier] = [point.id for point in manifest.points if copy in point.copies]
        path = repository.new_file(copy.disk, identifier)
        made.append(path)
        what = f"rebasing {copy.disk} at {identifier[:8]}"
        _copy(repository.path_of(copy), path, self._progress, what)
        onto = below[0].file if below else None
        base = ["-b", onto or "", *(["-F", "qcow2"] if onto else [])]
        run(
            *("qemu-img", "rebase", "-p", "-f", "qcow2"),
            *base,
            path.name,
            folder=repository.path,
            progress=self._progress,
            what=what,
        )
        check_image(path, onto)
        root = write_leaves(path, [repository.path_of(each) for each in below], self._progress)
        if root != copy.root:
            raise CorruptError(
                f"'{copy.file}' cannot lie over another file: what it and the files below it hold"
                " is not what was copied; pybitmap verify tells which of them is damaged"
            )
        return replace(
            copy,
            parent=parent,
            reason=copy.reason if onto else "what lay below was pruned",
            sha256=sha256_of(path, self._progress),
            nbytes=os.stat(path).st_size,
            new=path.name,
        )


def _copy(source: Path, target: Path, progress: Progress | None, what: str) -> None:
    """A file, to a new one; without data of its own where the file system can share it."""
    try:
        with (
            open_regular(source) as old,
            open_regular(target, os.O_RDWR | os.O_CREAT | os.O_EXCL) as new,
        ):
            if _shared(old.fileno(), new.fileno()):
                return
            total = os.fstat(old.fileno()).st_size
            done = 0
            while True:
                piece = os.read(old.fileno(), _PIECE)
                if not piece:
                    return
                write_all(new.fileno(), piece)
                done += len(piece)
                if progress is not None:
                    progress(what, done, total)
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"cannot copy '{source}': {error.strerror}", error.errno) from error


def _shared(source: int, target: int) -> bool:
    """Are its blocks shared now? (FICLONE of Linux: btrfs, XFS)"""
    if sys.platform != "linux":
        return False
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        return False
    return True
