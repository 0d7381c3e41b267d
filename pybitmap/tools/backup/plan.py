# SPDX-License-Identifier: MIT
"""What a backup decides, before anything is done: increment or full copy, disk by disk, and why.

No files, no QEMU: what was found goes in, a :class:`Plan` comes out.

**Two bitmaps a point.** On each disk of a point there are, until the next point is listed,

    pybitmap-TAG-COPY         records what is written from the instant of the point on
    pybitmap-TAG-COPY-uncut   records nothing, and is all dirty: what is cut off when the disk
                              shrinks is dirty in it no more, also when the disk grows again

COPY is of the point and of the disk's name: bitmaps of one point have another name on each disk, so
that disks which have changed places are not taken for each other.

QEMU, and a store, forget what was dirty behind the end of a disk that shrinks, and what it grows by
is clean. So a bitmap alone does not tell that the parent of an increment has old data there, which
would come back in silence. The second one does, whatever was written since::

    size 8, granularity 1     recording   uncut       content
    at the point              ........    ########    abcdefgh
    made smaller, to 5        .....       #####       abcde
    made larger again, to 8   ........    #####...    abcde000     fgh of the parent would come back
    write(7, 1)               .......#    #####...    abcde00w

The last group is dirty in the recording one from the begin: a disk that ends amid a cluster may,
when it grows, show what an earlier, larger one had left in the rest of it. And an increment without
it was made by a bitmap that somebody has cleared. When a disk has become smaller, its last group is
another, which the recording one gets before the next point: the disk may have been cut amid that,
and have grown to the end of it, which the second one does not tell.

The tag is the backup directory's: several of them may take from the same disk. The names are data
of the manifest; the tag of its newest bitmap is the directory's, and before there is one its path
makes one, so that what a killed first backup left is known again. And the time at which its lock
was made: disks that are mounted at one path by turns have a directory each.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ...errors import InvalidError
from .manifest import LOCK, Copy, Manifest

#: Before the names of bitmaps, jobs, nodes and exports of ours.
PREFIX = "pybitmap-"
UNCUT = "-uncut"
GRANULARITY = 65536  # bytes
#: Copies that lie over each other: QEMU opens the files of all of them, of which a process may have
#: 1024 as a rule, and takes the longer for each the more they are.
LONGEST = 500

MODES = ("auto", "full", "incremental")

_NAME = re.compile(r"pybitmap-([0-9a-f]{8})-([0-9a-f]{32})(-uncut)?", re.ASCII)


@dataclass(frozen=True)
class Found:
    """A bitmap that is on a disk."""

    name: str
    granularity: int  #: bytes
    recording: bool
    count: int | None = None  #: dirty bytes, in whole groups; None: not known
    reason: str | None = None  #: why it cannot be used


@dataclass(frozen=True)
class Disk:
    """A disk that is to be backed up, as it is now.

    :param name: in the manifest
    :param place: what people call it: a path, or a device of a machine
    :param size: in bytes
    :param bitmaps: on it, by name
    :param grows: what it shows where it has grown: zeroes (True), or nobody knows what
    :param cluster: bytes of its format's cluster; 0: it has none
    :param allocated: bytes that a full copy takes, about; None: not known
    :param file: of a raw disk, whose bitmaps are elsewhere: which file it is; empty: not known
    """

    name: str
    place: str
    size: int
    bitmaps: Mapping[str, Found]
    grows: bool = True
    cluster: int = 0
    allocated: int | None = None
    file: str = ""


@dataclass(frozen=True)
class Plan:
    """What is done with a disk.

    :param parent: point and copy that an increment lies over; None: a full copy
    :param old: the bitmap that says what the increment has
    :param reason: why it is a full copy; None: of an increment
    """

    disk: Disk
    parent: tuple[str, Copy] | None = None
    old: Found | None = None
    reason: str | None = None

    @property
    def full(self) -> bool:
        return self.parent is None

    @property
    def shrunk(self) -> bool:
        """Has the disk another last group than at the parent's point? Nobody knows if it was cut
        amid it."""
        if self.parent is None or self.old is None:
            return False
        before, now = self.parent[1].size, self.disk.size
        return last_group(now, self.old.granularity) < last_group(before, self.old.granularity)


class Names:
    """Names of what one backup makes."""

    def __init__(self, tag: str, point: str) -> None:
        self.tag, self.point = tag, point

    def bitmap(self, disk: str, file: str = "") -> str:
        """That records, on a disk: begins as the point's id does, and no other disk has it.

        :param file: see :attr:`Disk.file`
        """
        words = f"{self.point} {file} {disk}"
        own = hashlib.sha256(words.encode("utf-8", "surrogatepass")).hexdigest()
        return f"{PREFIX}{self.tag}-{self.point[:16]}{own[:16]}"

    def uncut(self, disk: str, file: str = "") -> str:
        """The other one."""
        return self.bitmap(disk, file) + UNCUT

    def node(self, number: int) -> str:
        """Of a target, in QEMU, which takes 31 characters at most; jobs are found by it."""
        return f"{PREFIX}{self.point[:16]}-{number:x}"

    def job(self, number: int, disk: str) -> str:
        """``pybitmap-POINT-DISK``; a disk's characters that a job cannot have are left out."""
        return f"{PREFIX}{self.point}-{number:x}.{re.sub('[^A-Za-z0-9._-]', '', disk)[:80]}"


def node_of(job: str) -> str | None:
    """The target's node of a job of ours, by its id."""
    found = re.match(r"pybitmap-([0-9a-f]{16})[0-9a-f]{16}-([0-9a-f]+)\.", job, re.ASCII)
    return f"{PREFIX}{found[1]}-{found[2]}" if found else None


def tag_of(manifest: Manifest, folder: Path) -> str:
    """Of a backup directory, in the names of its bitmaps."""
    for point in reversed(manifest.points):
        for copy in point.copies:
            found = _NAME.fullmatch(copy.bitmap or "")
            if found:
                return found[1]
    made = 0
    with suppress(OSError):
        made = os.lstat(folder / LOCK).st_mtime_ns
    return hashlib.sha256(b"%d %b" % (made, os.fsencode(os.path.realpath(folder)))).hexdigest()[:8]


def kept(manifest: Manifest, disk: str) -> Collection[str]:
    """The bitmaps on a disk that the manifest needs: of its newest copy."""
    last = _newest(manifest, disk)
    if last is None or last[1].bitmap is None:
        return ()
    return last[1].bitmap, last[1].bitmap + UNCUT


def leftovers(names: Collection[str], tag: str, keep: Collection[str]) -> list[str]:
    """Of bitmaps on a disk, those that backups into this directory have left."""
    found = []
    for name in names:
        match = _NAME.fullmatch(name)
        if match and match[1] == tag and name not in keep:
            found.append(name)
    return found


def tells_cuts(name: str) -> bool:
    """Is it the second bitmap of a point, which is no record of what was written?"""
    match = _NAME.fullmatch(name)
    return match is not None and match[3] is not None


def plan(manifest: Manifest, disk: Disk, mode: str) -> Plan:
    """What is to be done with a disk.

    :raises InvalidError: if an increment is asked for that cannot be, and why
    """
    last = _newest(manifest, disk.name)
    reason = _why_full(last, disk) if mode != "full" else "a full one was asked for"
    if reason is None and last is not None and len(manifest.chain(last[1])) >= LONGEST:
        reason = f"its chain has {LONGEST} copies: pybitmap prune makes it shorter"
    if reason is not None:
        return full(disk, reason, mode)
    assert last is not None
    assert last[1].bitmap is not None
    return Plan(disk, parent=last, old=disk.bitmaps[last[1].bitmap])


def full(disk: Disk, reason: str, mode: str) -> Plan:
    """
    :raises InvalidError: if an increment is asked for
    """
    if mode == "incremental":
        raise InvalidError(
            f"disk '{disk.name}' has to be copied in full: {reason}. "
            "Nothing was done; --auto or --full copies it so"
        )
    return Plan(disk, reason=reason)


def _newest(manifest: Manifest, disk: str) -> tuple[str, Copy] | None:
    for point in reversed(manifest.points):
        copy = point.copy_of(disk)
        if copy is not None:
            return point.id, copy
    return None


def _why_full(last: tuple[str, Copy] | None, disk: Disk) -> str | None:
    """One line; None: an increment can be made."""
    if last is None:
        return "there is no copy of it yet"
    point, copy = last
    if copy.bitmap is None:
        return f"point {point[:8]} has left no bitmap"
    old = disk.bitmaps.get(copy.bitmap)
    uncut = disk.bitmaps.get(copy.bitmap + UNCUT)
    if old is None:
        return (
            f"it has no bitmap '{copy.bitmap}' since point {point[:8]}: it was replaced, restored "
            "or snapshotted, or its machine was killed, or keeps none"
        )
    made = _NAME.fullmatch(copy.bitmap)
    if disk.file and made and Names(made[1], point).bitmap(disk.name, disk.file) != copy.bitmap:
        return f"its file is another than at point {point[:8]}: it was replaced, or restored"
    if old.reason is not None:
        return f"bitmap '{old.name}' is inconsistent: {old.reason}"
    if not old.recording:
        return f"bitmap '{old.name}' was disabled"
    if uncut is None:
        return f"bitmap '{copy.bitmap + UNCUT}' is missing, which tells if the disk was cut"
    if uncut.reason is not None:
        return f"bitmap '{uncut.name}' is inconsistent: {uncut.reason}"
    if uncut.recording:
        return f"bitmap '{uncut.name}' was enabled"
    if was_cut(uncut, copy.size, disk.size):
        return (
            f"the disk was smaller for a while since point {point[:8]}, and what was cut off is "
            "not known to be dirty"
        )
    if disk.size > copy.size:
        if not disk.grows:
            return "it has grown, and what it has there now is not known"
        if disk.cluster > old.granularity and copy.size % disk.cluster:
            return "it has grown from a size amid one of its clusters"
    return None


def last_group(size: int, granularity: int) -> int:
    """Where it begins, on a disk of that size; all in bytes."""
    return max(size - 1, 0) // granularity * granularity


def was_cut(uncut: Found, before: int, now: int) -> bool:
    """Was a disk smaller for a while than it was before, and is now? All in bytes."""
    size = min(before, now)
    return uncut.count != -(-size // uncut.granularity) * uncut.granularity
