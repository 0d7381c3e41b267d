# SPDX-License-Identifier: MIT
"""A backup: what is done, in which order, whatever the disks are.

::

    lock DIR                            a second one is refused
    end what a killed run left          jobs, files, bitmaps: whatever the manifest does not name
    look, plan                          increment or full copy, disk by disk
    prepare                             images: add NEW to each; a daemon has them open, read only
    new files                           over their parents
    hooks.before                        as a guest's file systems frozen
    ---- the instant ----               one transaction over all disks
    hooks.after
    copied, finished, closed            by QEMU
    hashed                              by us
    ==== manifest ====                  from here on the point is there
    remove OLD                          what is left over of that goes with the next run

The truth is the manifest: whatever else is left, of whoever was killed when, is known by not being
in it. A failure, and Ctrl-C, go the same way as a later run's begin: :func:`_put_back`.

A disk that cannot be copied is not in the point, and keeps its old bitmap; the others are.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from uuid import uuid4

from ..._fork import Process
from ...errors import BitmapError, ExistsError, InvalidError, StoreError
from ...sizes import is_granularity
from ...store.base import Progress
from ...store.files import reported
from ..monitor import TIMEOUT, CommandError, Monitor
from .copies import check_chain, image_of
from .hashing import extents, new_copy
from .images import Images
from .jobs import JobError, Task, begin, copied, finish, open_target
from .live import Live
from .manifest import MANIFEST, Copy, Point, Repository, check_regular, is_there
from .plan import (
    GRANULARITY,
    MODES,
    Disk,
    Names,
    Plan,
    full,
    kept,
    last_group,
    leftovers,
    plan,
    tag_of,
)
from .qemu import program, run
from .source import Disks, Source, check_names, is_device

#: What :attr:`Hooks.step` is told, in this order.
STEPS = (
    "locked",
    "recovered",
    "planned",
    "prepared",
    "targets",
    "before",
    "instant",
    "after",
    "copied",
    "finished",
    "closed",
    "hashed",
    "listed",
    "removed",
)


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Hooks:
    """What is called at moments of a backup, on the caller's thread.

    Whatever one of them raises fails the backup, which puts all back.

    :param before: right before the instant, as to freeze a guest's file systems
    :param after: right after it, if `before` was called at all: also where that, or the instant,
        has failed, or was interrupted
    :param step: is told of each of ``run.STEPS`` when it is done

    >>> hooks = Hooks(before=lambda: print("flush"), after=lambda: print("go on"), step=print)
    >>> hooks.before(); hooks.step("instant"); hooks.after()
    flush
    instant
    go on
    """

    before: Callable[[], object] = _nothing
    after: Callable[[], object] = _nothing
    step: Callable[[str], object] = field(default=lambda name: None)


@dataclass(frozen=True)
class Backup:
    """What was done.

    :param point: as it is listed
    :param failed: why, by name, of disks that are not in it
    :param notes: what was found or could not be tidied up, a line each; no failures
    """

    point: Point
    failed: dict[str, str]
    notes: tuple[str, ...] = ()


def backup(
    sources: Iterable[Source | str | os.PathLike[str]],
    to: str | os.PathLike[str],
    *,
    qmp: str | os.PathLike[str] | Monitor | None = None,
    mode: str = "auto",
    granularity: int = GRANULARITY,
    compress: bool = False,
    speed: int = 0,
    hooks: Hooks | None = None,
    progress: Progress | None = None,
    timeout: float = TIMEOUT,
) -> Backup:
    """Copy disks, all as they are at one instant, into a backup directory.

    Increments where that can be, over the newest copy of the disk there; else full copies, and why
    is told. Of a machine that runs (`qmp`), or of disks that nobody has open: all of one kind.

    Writer: a machine's writes go on; each is in this point's copies, or recorded for the next.
    Kill: the point is listed or it is not; what is left over is found, and goes, with the next
    backup of the same disks into the same directory. Fork: the child of one, as in a hook, leaves
    all to its parent, and must not return from the hook. Interruption: jobs are cancelled, and new
    files and bitmaps go, or it is done and listed. Twin: a second backup into the directory is
    refused; one of the same disks into another is not, but a machine has one client of its monitor
    at a time.

    :param sources: names of devices or nodes; or paths of qcow2 images, and of raw disks with
        stores
    :param to: a directory; made if it is not there
    :param qmp: the machine's monitor
    :param mode: "auto"; "full", also where an increment could be; "incremental": refuse all else
    :param granularity: bytes that a bit of new bitmaps stands for
    :param compress: let QEMU compress what it writes
    :param speed: bytes a second, of each disk; 0: as fast as it goes
    :param progress: of copying and hashing, disk by disk
    :param timeout: seconds for each of QEMU's answers
    :raises LockedError: if another backup into the directory is under way, or an image is open in
        another program
    :raises InvalidError: for what cannot be right; for "incremental", also why one has to be full
    :raises MonitorError: if QEMU refuses something, or is gone
    :raises JobError: if no disk could be copied
    :raises StoreError: if files or bitmaps cannot be read or written

    >>> done = backup(["disk.qcow2"], "nightly")
    >>> [(copy.disk, copy.reason) for copy in done.point.copies], done.failed, done.notes
    ([('disk.qcow2', 'there is no copy of it yet')], {}, ())
    """
    found = [each if isinstance(each, Source) else Source(os.fspath(each)) for each in sources]
    check_names(found)
    for each in found:
        _check_place(each, to, live=qmp is not None)
    if mode not in MODES:
        raise InvalidError(f"mode '{mode}' is none of {', '.join(MODES)}")
    if not (is_granularity(granularity) and 512 <= granularity <= 1 << 31):
        raise InvalidError(f"granularity {granularity} is not a power of 2 from 512 to 2 GiB")
    if speed < 0:
        raise InvalidError(f"a speed of {speed} bytes a second cannot be")
    hooks = Hooks() if hooks is None else hooks
    program("qemu-img")  # before anything is changed
    with ExitStack() as stack:
        monitor = None
        if isinstance(qmp, Monitor):
            monitor = qmp
        elif qmp is not None:
            with reported(f"cannot reach '{qmp}'"):
                monitor = stack.enter_context(Monitor(qmp, timeout=timeout))
        repository = stack.enter_context(_opened(to))
        disks: Disks = Images(found, timeout) if monitor is None else Live(monitor, found)
        stack.callback(disks.close)
        return _Run(repository, disks, mode, granularity, compress, speed, hooks, progress).run()


def _check_place(source: Source, to: str | os.PathLike[str], *, live: bool) -> None:
    """
    :raises InvalidError: if it is of another kind, or in the directory
    :raises StoreError: if that cannot be told
    """
    place = source.place
    if live:
        if source.store is not None or (os.sep in place and os.path.isfile(place)):
            raise InvalidError(
                f"'{place}' is no disk of a machine that runs: disks of a machine and such that "
                "are off have no instant in common; make two backups"
            )
        return
    is_device(place)  # or it is refused before a directory is made for it
    with reported(f"cannot look at '{place}' and '{to}'"):
        inside = os.path.dirname(os.path.realpath(place)) == os.path.realpath(to)
    if inside:
        raise InvalidError(
            f"'{place}' lies in the backup directory itself, where nothing is to be written into: "
            "pybitmap restore makes a disk of it"
        )


def _opened(path: str | os.PathLike[str]) -> Repository:
    """For writing; a new one if there is none."""
    if not is_there(Path(path, MANIFEST)):
        with suppress(ExistsError):  # somebody else has made it meanwhile
            return Repository.create(path)
    return Repository.open(path, writing=True)


@dataclass
class _Run:
    repository: Repository
    disks: Disks
    mode: str
    granularity: int
    compress: bool
    speed: int
    hooks: Hooks
    progress: Progress | None
    notes: list[str] = field(default_factory=list)
    process: Process = field(default_factory=Process)

    def run(self) -> Backup:
        step = self.hooks.step
        folder = self.repository.path
        tag = tag_of(self.repository.manifest, folder)
        step("locked")
        self.disks.recover(folder)
        self.repository.sweep()
        found = self.disks.look()
        for each in found:
            if not each.size:
                raise InvalidError(f"disk '{each.name}' has 0 bytes: leave it out")
        step("recovered")
        plans = [self._planned(each) for each in found]
        self._tidy(tag)
        step("planned")
        names = Names(tag, uuid4().hex)
        try:
            point, failed = self._copy(plans, names)
        except BaseException:
            self._put_back(tag)
            raise
        self._tidy(tag)
        if failed:
            self._sweep()
        step("removed")
        return Backup(point, failed, tuple(self.notes))

    def _planned(self, disk: Disk) -> Plan:
        made = plan(self.repository.manifest, disk, self.mode)
        if made.parent is None:
            return made
        doubt = self._broken(made.parent[1]) or self.disks.doubt(made, self.repository)
        return made if doubt is None else full(disk, doubt, self.mode)

    def _broken(self, parent: Copy) -> str | None:
        """Why nothing should lie over a copy. Its content is not looked at: verify does that."""
        folder = self.repository.path
        chain = self.repository.manifest.chain(parent)
        try:
            check_chain(self.repository, chain)
            for each in chain:
                check_regular(self.repository.leaves_of(each))
            head = self.repository.path_of(parent).name
            run("qemu-img", "info", "-f", "qcow2", "--backing-chain", head, folder=folder)
        except StoreError as error:
            return f"the copy that an increment would lie over is broken: {error}"
        return None

    # ---- the way to a point -----------------------------------------------------------------

    def _copy(self, plans: Sequence[Plan], names: Names) -> tuple[Point, dict[str, str]]:
        step = self.hooks.step
        self.disks.prepare(plans, names, self.granularity)
        step("prepared")
        monitor = self.disks.monitor
        tasks = [self._target(monitor, number, each, names) for number, each in enumerate(plans)]
        self._check_room(tasks)
        step("targets")
        try:
            for task in tasks:
                self.disks.complete(task)
            begun = self._instant(monitor, tasks, names)
        except CommandError:
            self.disks.check(plans)  # knows better words, if QEMU has refused what is another now
            raise
        self.disks.check(plans)
        failed: dict[str, str] = {}
        ends = copied(monitor, tasks, self.progress)
        step("copied")
        for task in tasks:
            error = ends[task.job] or finish(monitor, task)
            if error is not None:
                failed[task.plan.disk.name] = error
        step("finished")
        if failed:
            self.disks.recover(self.repository.path)
        self.disks.done()
        step("closed")
        for task in tasks:
            disk = task.plan.disk.name
            old = None if disk in failed else self._cleared(task)
            if old is not None:
                self.disks.forget(disk, [old])
                failed[disk] = f"somebody cleared bitmap '{old}': it is copied in full next time"
        ended = datetime.now(timezone.utc)
        copies = [
            self._described(each, names) for each in tasks if each.plan.disk.name not in failed
        ]
        if not copies:
            raise JobError(_sentence(failed) + ": nothing was changed")
        step("hashed")
        point = Point(names.point, begun, ended, tuple(copies))
        self.repository.append(point)
        step("listed")
        return point, failed

    def _target(self, monitor: Monitor, number: int, plan: Plan, names: Names) -> Task:
        """A new file for a disk's copy, open in QEMU."""
        path = self.repository.new_file(plan.disk.name, names.point)
        over = [] if plan.parent is None else ["-b", plan.parent[1].file, "-F", "qcow2"]
        run(
            *("qemu-img", "create", "-q", "-f", "qcow2", *over, path.name, str(plan.disk.size)),
            folder=self.repository.path,
        )
        marks = self.disks.mark(plan, path, self.granularity)
        source, bitmap = self.disks.source(plan)
        job = names.job(number, plan.disk.name)
        task = Task(plan, source, path, names.node(number), job, bitmap, marks)
        open_target(monitor, task)
        return task

    def _instant(self, monitor: Monitor, tasks: Sequence[Task], names: Names) -> datetime:
        step = self.hooks.step
        try:
            self.hooks.before()
            step("before")
            begun = datetime.now(timezone.utc)
            actions = [
                each for task in tasks for each in self.disks.actions(task, names, self.granularity)
            ]
            begin(monitor, tasks, actions, compress=self.compress, speed=self.speed)
            step("instant")
        finally:
            self.hooks.after()
        step("after")
        return begun

    def _cleared(self, task: Task) -> str | None:
        """The bitmap of an increment, if it does not tell all: the last group of the disk is dirty
        in each from the begin, and so is in what was copied by it."""
        plan = task.plan
        if plan.parent is None or plan.old is None:
            return None
        group = last_group(plan.parent[1].size, plan.old.granularity)
        if group >= plan.disk.size:
            return None  # cut off, with all that was there
        found = extents(image_of(task.path.name, alone=True), self.repository.path)
        if any(each.start <= group < each.end for each in found):
            return None
        return plan.old.name

    def _described(self, task: Task, names: Names) -> Copy:
        plan = task.plan
        return new_copy(
            self.repository,
            task.path,
            disk=plan.disk.name,
            parent=None if plan.parent is None else plan.parent[0],
            bitmap=names.bitmap(plan.disk.name, plan.disk.file),
            granularity=self.granularity,
            reason=plan.reason,
            progress=self.progress,
        )

    def _check_room(self, tasks: Sequence[Task]) -> None:
        """A job without room fails, and while it runs QEMU fails the guest's writes: rather not."""
        if self.compress:
            return  # nobody knows how much that will be
        need = 0
        for task in tasks:
            disk, old = task.plan.disk, task.plan.old
            most = disk.allocated if old is None else old.count
            if most is not None:
                need += min(most, disk.size)
        free = shutil.disk_usage(self.repository.path).free
        if need > free:
            raise StoreError(
                f"'{self.repository.path}' has room for {free} bytes, and {need} are to be copied: "
                "make room, or back up to another directory"
            )

    # ---- what is left over ------------------------------------------------------------------

    def _tidy(self, tag: str) -> None:
        """Removes bitmaps that the manifest does not need. What cannot go now goes another time."""
        manifest = self.repository.manifest
        for disk in self.disks.names:
            try:
                gone = leftovers(self.disks.bitmaps(disk), tag, kept(manifest, disk))
                if gone:
                    self.disks.forget(disk, gone)
            except BitmapError as error:
                self.notes.append(
                    f"disk '{disk}' keeps bitmaps of earlier points until its next backup: {error}"
                )

    def _sweep(self) -> None:
        """Of a disk that was left out."""
        try:
            self.repository.sweep()
        except StoreError as error:
            self.notes.append(f"files that no point names stay until the next backup: {error}")

    def _put_back(self, tag: str) -> None:
        """As before, as far as that can be: the next run does the rest."""
        if not self.process.is_this():
            return  # in the child of a fork: all that is there is its parent's
        for work in (
            lambda: self.disks.recover(self.repository.path),
            self.disks.done,
            self.repository.sweep,
            lambda: self._tidy(tag),
        ):
            with suppress(BitmapError, OSError):
                work()


def _sentence(failed: dict[str, str]) -> str:
    return "; ".join(f"disk '{disk}' was not copied: {why}" for disk, why in failed.items())
