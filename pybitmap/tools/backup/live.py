# SPDX-License-Identifier: MIT
"""Disks of a machine that runs, by its own monitor.

::

    query-block, query-named-block-nodes     which node a disk is, and its bitmaps
    transaction                              add NEW, NEW-uncut; merge marks; blockdev-backup
    block-dirty-bitmap-remove                leftovers; OLD, once the point is listed

A qcow2 image keeps the bitmaps, also when the machine is started again. Other disks have them in
the machine's memory: after its restart they are copied in full. Nodes may have names that QEMU gave
them (``#block123``). Sizes cannot change while jobs run: QEMU refuses that.

A machine that was migrated away, or has not arrived yet, has its disks open, but another one writes
to them: it is refused. While jobs run, QEMU lets no machine go.

Visitors. Writer: the guest; each of its writes is in the copies, or recorded for the next, as the
transaction has it. Kill: jobs and bitmaps stay with QEMU until the next run. Twin: another client
of the monitor is kept out by QEMU as long as this one is there.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...block.graph import BlockGraph
from ...errors import InvalidError, NotFoundError, StateError
from ..monitor import Action, Monitor, action
from .jobs import ALL, END, Task, add_marks, bitmaps_of, give, merging, nodes_of, recover
from .manifest import Repository
from .plan import UNCUT, Disk, Found, Names, Plan
from .source import Disks, Source, refuse_cut

_OF_JOBS = "copy-before-write"  # driver of the node that a backup's job puts over its source
_AWAY = ("inmigrate", "finish-migrate", "postmigrate")  # states in which disks are another's


class Live(Disks):
    """See the head of this file.

    :param monitor: of the machine; whoever made it closes it
    """

    def __init__(self, monitor: Monitor, sources: Sequence[Source]) -> None:
        self.monitor = monitor
        self._sources = sources
        self._nodes: dict[str, str] = {}  # of disks
        self._persistent: dict[str, bool] = {}
        self._read_only: set[str] = set()

    def look(self) -> list[Disk]:
        self._check_here()
        nodes = nodes_of(self.monitor)
        devices = self.monitor.execute("query-block")
        disks = []
        for source in self._sources:
            node = nodes[_find(source.place, devices, nodes)]
            disks.append(_disk(source, node))
            self._nodes[source.name] = node["node-name"]
            self._persistent[source.name] = _keeps_bitmaps(node)
            if node["ro"]:
                self._read_only.add(source.name)
        twice = [
            each for each in self._nodes if list(self._nodes.values()).count(self._nodes[each]) > 1
        ]
        if twice:
            raise InvalidError(f"{' and '.join(map(repr, twice))} are the same disk")
        return disks

    def _check_here(self) -> None:
        """
        :raises StateError: if another machine has the disks, by a migration
        """
        if not self.monitor.has_command("query-status"):
            return  # a storage daemon, which stays where it is
        state = self.monitor.execute("query-status")["status"]
        if state in _AWAY:
            raise StateError(
                f"{self.monitor.path}: the machine is in state '{state}', in which its disks are "
                "those of another, by a migration: they are backed up by the monitor of that one"
            )

    def doubt(self, plan: Plan, repository: Repository) -> str | None:
        """QEMU has marked whatever came to the disk."""
        if plan.shrunk and plan.disk.name in self._read_only:
            return "it was made smaller, and is read only, as its bitmaps are"
        return None

    def recover(self, folder: Path) -> list[str]:
        return recover(self.monitor, folder)

    def prepare(self, plans: Sequence[Plan], names: Names, granularity: int) -> None:
        pass  # bitmaps are added with the transaction

    def source(self, plan: Plan) -> tuple[str, str | None]:
        return self._nodes[plan.disk.name], None if plan.old is None else plan.old.name

    def mark(self, plan: Plan, path: Path, granularity: int) -> Sequence[str]:
        with BlockGraph() as graph:
            marks = add_marks(graph, plan, granularity)
            give(graph, path, granularity, marks)
        return tuple(marks)

    def complete(self, task: Task) -> None:
        """By a command of its own: a transaction that fails takes back what a bitmap was given, and
        with that what a disk with a thread of its own has marked meanwhile."""
        if task.plan.shrunk and task.bitmap is not None:
            self.monitor.transaction([merging(task, task.bitmap, END)])

    def actions(self, task: Task, names: Names, granularity: int) -> list[Action]:
        disk = task.plan.disk.name
        persistent = self._persistent[disk]
        bitmap, uncut = names.bitmap(disk), names.uncut(disk)
        made: list[Action] = []
        for name, disabled, marks in ((bitmap, False, END), (uncut, True, ALL)):
            made.append(
                action(
                    "block-dirty-bitmap-add",
                    node=task.source,
                    name=name,
                    granularity=granularity,
                    persistent=persistent,
                    disabled=disabled,
                )
            )
            made.append(merging(task, name, marks))
        return made

    def check(self, plans: Sequence[Plan]) -> None:
        """Jobs are there now, so sizes stay, no snapshot comes between a disk and its node, and the
        machine does not go."""
        self._check_here()
        nodes = nodes_of(self.monitor)
        devices = self.monitor.execute("query-block")
        for source in self._sources:
            now = _find(source.place, devices, nodes)
            if now != self._nodes[source.name] and nodes[now]["drv"] != _OF_JOBS:
                raise StateError(
                    f"disk '{source.name}' became another node while the backup began, as by a "
                    "snapshot: nothing was done, try again"
                )
        for plan in plans:
            if plan.old is not None:
                refuse_cut(plan, self._bitmaps(plan.disk.name).get(plan.old.name + UNCUT))

    def done(self) -> None:
        """The machine goes on."""

    def close(self) -> None:
        """Likewise."""

    @property
    def names(self) -> Sequence[str]:
        return list(self._nodes)

    def bitmaps(self, disk: str) -> list[str]:
        return list(self._bitmaps(disk))

    def _bitmaps(self, disk: str) -> dict[str, Found]:
        name = self._nodes[disk]
        node = nodes_of(self.monitor).get(name)
        if node is None:
            raise NotFoundError(
                f"the machine has no node '{name}' any more, which disk '{disk}' was"
            )
        return bitmaps_of(node)

    def forget(self, disk: str, names: Sequence[str]) -> None:
        for name in names:
            self.monitor.execute("block-dirty-bitmap-remove", node=self._nodes[disk], name=name)


def _find(place: str, devices: Sequence[Mapping[str, Any]], nodes: Mapping[str, Any]) -> str:
    """The node of a disk, by the name of its device, or its own."""
    found = []
    for each in devices:
        qdev = str(each.get("qdev", ""))
        if place and place in (each["device"], qdev, _id_of(qdev)):
            if "inserted" not in each:
                raise NotFoundError(f"device '{place}' has no medium")
            found.append(each["inserted"]["node-name"])
    if not found and place in nodes:
        found.append(place)
    if len(set(found)) > 1:
        raise InvalidError(f"'{place}' is several disks: {', '.join(sorted(found))}; name a node")
    if not found:
        there = sorted({_called(each) for each in devices if "inserted" in each} - {""})
        raise NotFoundError(
            f"the machine has no disk '{place}'; disks there: {', '.join(there) or 'none'}"
        )
    return str(found[0])


def _id_of(qdev: str) -> str:
    """What the user called a device, of /machine/peripheral/ID/virtio-backend."""
    parts = qdev.split("/")
    return parts[3] if parts[:3] == ["", "machine", "peripheral"] and len(parts) > 3 else qdev


def _called(device: Mapping[str, Any]) -> str:
    return str(
        device["device"] or _id_of(str(device.get("qdev", ""))) or device["inserted"]["node-name"]
    )


def _disk(source: Source, node: Mapping[str, Any]) -> Disk:
    image = node["image"]
    return Disk(
        name=source.name,
        place=source.place,
        size=image["virtual-size"],
        bitmaps=bitmaps_of(node),
        grows=_grows_by_zeroes(node),
        cluster=image.get("cluster-size", 0) if node["drv"] == "qcow2" else 0,
        allocated=image.get("actual-size"),
    )


def _keeps_bitmaps(node: Mapping[str, Any]) -> bool:
    """In its image; a disk that is read only needs none that outlives its machine."""
    return node["drv"] == "qcow2" and not node["ro"] and _qcow2(node).get("compat") != "0.10"


def _grows_by_zeroes(node: Mapping[str, Any]) -> bool:
    if node["drv"] == "qcow2":
        return not _qcow2(node).get("data-file-raw")
    return node["drv"] == "raw" and _is_file(str(node["file"]))


def _qcow2(node: Mapping[str, Any]) -> Mapping[str, Any]:
    """What QEMU tells of an image of that format."""
    found: Mapping[str, Any] = node["image"].get("format-specific", {}).get("data", {})
    return found


def _is_file(name: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(name).st_mode)
    except (OSError, ValueError):
        return False
