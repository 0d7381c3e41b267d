# SPDX-License-Identifier: MIT
"""QEMU's part of a backup: targets, jobs at one instant, their end; and what is left of killed
ones.

The same for a machine that runs and for a daemon that has the disks open, read only::

    we                                QEMU                         on the disk, if all ends here
    --------------------------------  ---------------------------  -----------------------------
    new file, with bitmaps "all" and                               a file that nobody names
      "end" in it (marks)
    blockdev-add                      has the file open            the same, a node
    merge end into OLD, if the        OLD has more than it had     the same; no harm
      disk is smaller
    transaction                       ---- the instant ----
      add NEW, merge end              NEW records                  NEW: nobody names it either
      add NEW-uncut, merge all
      remove all, end of the file
      blockdev-backup                 running -> pending           and a job, which waits for ever
    job-finalize                      concluded, without error
    job-dismiss
    blockdev-del                      the file is closed           file and NEW, as above
    hash, fsync, manifest             .                            the point is there, OLD left over
    remove OLD                        .                            done

So whatever is left over is known by the manifest, and :func:`recover`, which a later run begins
with, needs nothing else. It is also how a run ends that failed.

Jobs never end by themselves (``auto-finalize``, ``auto-dismiss``): whether one was right would not
be known. Their bitmap mode is ``never``: others take from OLD what was copied, and a failure later
on would lose it. They are not grouped: QEMU would cancel the good ones with the bad.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from ...block.graph import BlockGraph
from ...errors import StoreError
from ...store import Qcow2Store
from ...store.base import Progress
from ..monitor import Action, CommandError, Monitor, UnansweredError, action
from .plan import PREFIX, Found, Plan, last_group, node_of

#: Bitmaps of a new target, which go at the instant: what QEMU merges from them has no other way in.
ALL, END, OLD = "all", "end", "old"

_TARGET = re.compile(f"{PREFIX}[0-9a-f]{{16}}-[0-9a-f]+", re.ASCII)
_LOOK = 0.5  # seconds between two looks at jobs, where no event comes


@dataclass(frozen=True)
class Task:
    """One disk's copy.

    :param source: QEMU's node of the disk
    :param path: of the copy
    :param node: of that, in QEMU
    :param bitmap: on the source, what an increment is made of; None: everything
    :param marks: bitmaps that the copy was given, which go at the instant
    """

    plan: Plan
    source: str
    path: Path
    node: str
    job: str
    bitmap: str | None
    marks: Sequence[str]

    @property
    def what(self) -> str:
        return f"copying {self.plan.disk.name}"


class JobError(StoreError):
    """A disk was not copied; the words are QEMU's."""


# ---- the way there --------------------------------------------------------------------------


def add_marks(graph: BlockGraph, plan: Plan, granularity: int) -> dict[str, tuple[str, str]]:
    """Two bitmaps to be merged, of a node in memory, with that: ALL is dirty, END in the last
    group, of the old bitmap's too."""
    size = plan.disk.size
    coarser = granularity if plan.old is None else max(granularity, plan.old.granularity)
    node = graph.add_node("\0marks", size)
    for name, start in ((ALL, 0), (END, last_group(size, coarser))):
        bitmap = node.add_bitmap(name, granularity)
        node.mark_dirty(start, size - start)
        bitmap.disable()
    return {name: (node.name, name) for name in (ALL, END)}


def give(
    graph: BlockGraph, path: Path, granularity: int, sources: Mapping[str, tuple[str, str]]
) -> None:
    """Gives a new target bitmaps, which QEMU will merge from it.

    :param sources: by name, node and bitmap of the graph that they are merged from
    :raises StoreError: if they cannot be stored
    """
    store = Qcow2Store(path)
    store.at_rest = True  # so one switch does
    target = graph.add_node("\0target", store=store)
    with graph.transaction() as tx:
        for name, source in sources.items():
            tx.add(target.name, name, granularity, persistent=True, disabled=True)
            tx.merge(target.name, name, [source])
    graph.remove_node(target.name)


def open_target(monitor: Monitor, task: Task) -> None:
    """
    :raises MonitorError: if QEMU cannot
    """
    file = {"driver": "file", "filename": str(task.path)}
    # A job writes whole clusters, zeroes too: so QEMU need not open all that lies below.
    node = {"driver": "qcow2", "node-name": task.node, "file": file, "backing": None}
    monitor.execute("blockdev-add", node)


def merging(task: Task, target: str, mark: str) -> Action:
    """The action that merges a bitmap of a task's target into one of its source."""
    return action(
        "block-dirty-bitmap-merge",
        node=task.source,
        target=target,
        bitmaps=[{"node": task.node, "name": mark}],
    )


def begin(
    monitor: Monitor,
    tasks: Sequence[Task],
    before: Iterable[Action],
    *,
    compress: bool,
    speed: int,
) -> None:
    """The instant: these actions, and then the jobs, in one transaction.

    :param speed: bytes a second, of each job; 0: as fast as it goes
    :raises MonitorError: nothing has begun
    """
    actions = list(before)
    for task in tasks:
        for name in task.marks:
            actions.append(action("block-dirty-bitmap-remove", node=task.node, name=name))
    for task in tasks:
        how: dict[str, Any] = {"sync": "full"}
        if task.bitmap is not None:
            how = {"sync": "bitmap", "bitmap": task.bitmap, "bitmap-mode": "never"}
        if compress:
            how["compress"] = True
        if speed:
            how["speed"] = speed
        actions.append(
            action(
                "blockdev-backup",
                how,
                job_id=task.job,
                device=task.source,
                target=task.node,
                auto_finalize=False,
                auto_dismiss=False,
            )
        )
    monitor.transaction(actions)


# ---- while they run, and their end ----------------------------------------------------------


def jobs_of(monitor: Monitor) -> dict[str, dict[str, Any]]:
    """All there are, by id."""
    return {each["id"]: each for each in monitor.execute("query-jobs")}


def copied(
    monitor: Monitor, tasks: Sequence[Task], progress: Progress | None
) -> dict[str, str | None]:
    """Waits until every job has copied all, or has failed; then why, by id. None: it is pending.

    :raises MonitorError: if QEMU is gone
    """
    while True:
        jobs = jobs_of(monitor)
        ends: dict[str, str | None] = {}
        for task in tasks:
            job = jobs.get(task.job)
            if job is None:
                ends[task.job] = "its job is gone: another client of the monitor has ended it"
            elif job["status"] == "concluded":
                ends[task.job] = job.get("error", "its job was finalized by somebody else")
            elif job["status"] == "pending":
                ends[task.job] = None
            if job is not None and progress is not None and job["total-progress"]:
                progress(task.what, job["current-progress"], job["total-progress"])
        if len(ends) == len(tasks):
            return ends
        _wait(monitor, {task.job for task in tasks})


def _wait(monitor: Monitor, jobs: set[str]) -> None:
    """Until something has happened to one of them, or it is time to look at their progress."""
    with suppress(UnansweredError):
        monitor.wait(
            lambda event: event["event"] == "JOB_STATUS_CHANGE" and event["data"]["id"] in jobs,
            _LOOK,
        )


def finish(monitor: Monitor, task: Task) -> str | None:
    """Of a pending job: ends it; why it has failed then, or None. Its file is closed afterwards.

    :raises MonitorError: if QEMU is gone, or does not end it
    """
    with suppress(CommandError):  # another client has ended it meanwhile
        monitor.execute("job-finalize", id=task.job)
    error = _concluded(monitor, task.job)
    with suppress(CommandError):
        monitor.execute("job-dismiss", id=task.job)
    if error is None:
        monitor.execute("blockdev-del", node_name=task.node)
    return error


def _concluded(monitor: Monitor, job: str) -> str | None:
    """Waits until it is; the error it has ended with."""
    end = monotonic() + monitor.timeout
    while True:
        found = jobs_of(monitor).get(job)
        if found is None:
            return "its job is gone: another client of the monitor has ended it"
        if found["status"] == "concluded":
            error: str | None = found.get("error")
            return error
        if monotonic() > end:
            raise UnansweredError(f"{monitor.path}: job '{job}' does not end", "query-jobs")
        _wait(monitor, {job})


# ---- what is left over ----------------------------------------------------------------------


def nodes_of(monitor: Monitor) -> dict[str, dict[str, Any]]:
    """QEMU's block nodes, by name."""
    found = monitor.execute("query-named-block-nodes", flat=True)
    return {each["node-name"]: each for each in found}


def bitmaps_of(node: Mapping[str, Any]) -> dict[str, Found]:
    """Those that a node has and that have a name."""
    found = {}
    for each in node.get("dirty-bitmaps", ()):
        if "name" in each:
            broken = "it was not stored in an orderly way" if each.get("inconsistent") else None
            found[each["name"]] = Found(
                each["name"], each["granularity"], each["recording"], each["count"], broken
            )
    return found


def recover(monitor: Monitor, folder: Path) -> list[str]:
    """Ends the jobs that write to copies in a backup directory, and closes these; which ones.

    Of a directory that is open for writing here: whoever began them is dead, or it is us, leaving.
    Those of copies that are nowhere any more go, too: their directory was moved, or deleted.

    :raises MonitorError: if they do not end
    """
    ended = []
    ours = {name for name, node in nodes_of(monitor).items() if _ends(node, folder)}
    if not ours:
        return []
    for job in list(jobs_of(monitor)):
        if node_of(job) not in ours:
            continue
        with suppress(CommandError):  # it has ended meanwhile
            monitor.execute("job-cancel", id=job)
        _concluded(monitor, job)
        with suppress(CommandError):
            monitor.execute("job-dismiss", id=job)
        ended.append(job)
    for node in sorted(ours):
        monitor.execute("blockdev-del", node_name=node)
    return ended


def _ends(node: Mapping[str, Any], folder: Path) -> bool:
    if not _TARGET.fullmatch(node["node-name"]):
        return False
    name = str(node["file"])
    if name.startswith("json:"):
        with suppress(ValueError, KeyError, TypeError):
            name = json.loads(name[len("json:") :])["file"]["filename"]
    if os.path.realpath(os.path.dirname(name)) == os.path.realpath(folder):
        return True
    if not os.path.isabs(name):
        return False
    try:
        os.stat(name)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):  # it is somebody's whose directories we may not look into
        pass
    return False
