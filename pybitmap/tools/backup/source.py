# SPDX-License-Identifier: MIT
"""What can be backed up: a source as it is named, and what a backup asks of those that it opens."""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import InvalidError, StateError
from ...store.files import reported
from ..monitor import Action, Monitor
from .jobs import Task
from .manifest import Repository
from .plan import Disk, Found, Names, Plan, was_cut


@dataclass(frozen=True)
class Source:
    """A disk, by where it is.

    :param place: the device or node of a machine that runs; or the path of a qcow2 image, or of a
        raw disk that is off
    :param disk: its name in backups; empty: `place`, of a path the last part
    :param store: of a raw disk that is off: the local store that has its bitmaps
    :param node: of the disk, in the store; None: the only one

    >>> Source("/disks/vm1.raw", store="disks.bitmaps", node="vm1").name
    'vm1.raw'
    >>> source = Source("virtio0", disk="root")
    >>> source.place, source.disk, source.store, source.node, source.name
    ('virtio0', 'root', None, None, 'root')
    """

    place: str
    disk: str = ""
    store: str | None = None
    node: str | None = None

    @property
    def name(self) -> str:
        """In backups."""
        return self.disk or os.path.basename(os.path.normpath(self.place)) or self.place


def check_names(sources: Sequence[Source]) -> None:
    """
    :raises InvalidError: if there are none, or two have the same name
    """
    if not sources:
        raise InvalidError("nothing is to be backed up: name a disk")
    names = [each.name for each in sources]
    for name in names:
        if names.count(name) > 1:
            raise InvalidError(f"two disks are called '{name}': call one OTHER=PLACE")


def is_device(place: str | os.PathLike[str]) -> bool:
    """Is a disk that is off a block device, and no file?

    :raises InvalidError: if it is neither
    :raises StoreError: if it cannot be looked at
    """
    with reported(f"cannot look at '{place}'"):
        mode = os.stat(place).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        raise InvalidError(f"'{place}' is neither a file nor a block device")
    return stat.S_ISBLK(mode)


def refuse_cut(plan: Plan, uncut: Found | None) -> None:
    """Of an increment, when sizes cannot change any more: was the disk cut since it was planned?

    :param uncut: the bitmap that tells
    :raises StateError: if it was, or nobody knows
    """
    assert plan.parent is not None
    if uncut is None:
        raise StateError(
            f"disk '{plan.disk.name}' lost a bitmap while the backup began, or was replaced: "
            "nothing was done, try again"
        )
    if was_cut(uncut, plan.parent[1].size, plan.disk.size):
        raise StateError(
            f"disk '{plan.disk.name}' was resized while the backup began: nothing was done, try "
            "again"
        )


class Disks(ABC):
    """Some disks, all of one machine or of none; made for one backup."""

    #: Of QEMU, which copies; there from :meth:`prepare` on.
    monitor: Monitor

    @abstractmethod
    def recover(self, folder: Path) -> list[str]:
        """Ends what writes to copies in a backup directory, which is open for writing here; which
        jobs these were.

        :raises MonitorError: if they do not end
        """

    @abstractmethod
    def look(self) -> list[Disk]:
        """What they are now.

        :raises NotFoundError: if there is none of such a name
        :raises BitmapError: if one cannot be looked at
        """

    @abstractmethod
    def doubt(self, plan: Plan, repository: Repository) -> str | None:
        """Why an increment would be wrong, if only a look at the disk tells. None: it is not.

        :raises StoreError: if that cannot be read
        """

    @abstractmethod
    def prepare(self, plans: Sequence[Plan], names: Names, granularity: int) -> None:
        """All that is done before QEMU has the targets.

        :raises BitmapError: if that cannot be; what is left over is for :meth:`forget`
        """

    @abstractmethod
    def source(self, plan: Plan) -> tuple[str, str | None]:
        """QEMU's node of a disk, and its bitmap for an increment."""

    @abstractmethod
    def mark(self, plan: Plan, path: Path, granularity: int) -> Sequence[str]:
        """Gives a new target the bitmaps that are merged at the instant; their names."""

    @abstractmethod
    def complete(self, task: Task) -> None:
        """Gives the old bitmap what it lacks, see :attr:`Plan.shrunk`; the target is open.

        :raises CommandError: if QEMU refuses it
        """

    @abstractmethod
    def actions(self, task: Task, names: Names, granularity: int) -> list[Action]:
        """Of the transaction, before the jobs."""

    @abstractmethod
    def check(self, plans: Sequence[Plan]) -> None:
        """After the instant: was no disk cut, or replaced, in between?

        :raises StateError: if one was
        """

    @abstractmethod
    def done(self) -> None:
        """QEMU has closed all copies, and is not needed any more."""

    @property
    @abstractmethod
    def names(self) -> Sequence[str]:
        """Of the disks, once they were looked at."""

    @abstractmethod
    def bitmaps(self, disk: str) -> list[str]:
        """Those on a disk, by name.

        :raises BitmapError: if they cannot be looked at
        """

    @abstractmethod
    def forget(self, disk: str, names: Sequence[str]) -> None:
        """Remove bitmaps of a disk.

        :raises BitmapError: if that cannot be, as while another program has the disk open
        """

    @abstractmethod
    def close(self) -> None:
        """May be called twice."""
