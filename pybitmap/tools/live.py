# SPDX-License-Identifier: MIT
"""Bitmaps of a machine that runs: what offline.py does with those that nobody has open.

Each change is one transaction of QEMU's: all of it is done, or nothing. A bitmap is meant by the
name of its node and its own, ``("disk0", "daily")``; :func:`find_node` knows the other names that
people have for a node.

**Extents.** QEMU tells how much is dirty, not what. So in one transaction the bitmap is merged into
one of a carrier, an empty image of the same size (carrier.py), and this is closed: QEMU stores the
bitmap there, and Qcow2Store reads it, as it reads any. Our own server (qmp/) tells areas itself, of
a bitmap that it was merged into.

**Rotation.** To take is to merge, then to clear, and nothing may be written in between. QEMU drains
a disk before a transaction; that one with a thread of its own (iothread) stays still until the last
action, nobody says. So a second bitmap records from before the merge on, and is merged back behind
the clear. What is written then may be in both bitmaps, and is in one at least.

**What a kill leaves.** Carriers are nodes with files in a folder of this process (leftovers.py).
What :class:`Taken` has taken is a bitmap beside its source, stored as that is, until it is done. A
later run removes the one, and puts back the other, once their process has ended.

Examples have a ``monitor`` of a machine with a node ``disk0`` of 1 GiB, with a bitmap ``daily`` in
which 64 KiB are dirty.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from .._fork import Process
from .._guard import Guard
from ..errors import CorruptError, InvalidError, NotFoundError, StateError
from ..extent import rounded
from ..hbitmap import HBitmap
from ..offline import Name, areas, counted
from ..sizes import granularity_bits
from ..store import Qcow2Store
from ..store.base import Progress, StoredBitmap, StoredNode
from .carrier import write_carrier
from .leftovers import Folder, is_left, new_name
from .monitor import Action, CommandError, Monitor, MonitorError, action

__all__ = [
    "Extents",
    "Taken",
    "add",
    "clear",
    "device_names",
    "enable",
    "find_node",
    "merge",
    "nodes",
    "put_back",
    "remove",
    "take",
    "tidy",
]

#: Why a bitmap is inconsistent. QEMU does not tell more.
INCONSISTENT = "it was in use when QEMU opened the image, which was not closed in an orderly way"

_AREAS = "__org.pybitmap_areas"  # of our own server
_PAGE = 10_000  # areas that it tells at once
_CARRIER = "pybitmap-carrier-"  # nodes begin so
_INSIDE = "carried"  # the bitmap of a carrier
_CUT = ":"  # behind the name of what is to be put back: that of its source


@dataclass(frozen=True)
class LiveBitmap(StoredBitmap):
    """A bitmap of a machine.

    :param persistent: is it stored when the image is closed? Others end with the machine
    :param in_use: an operation of QEMU's works with it
    """

    persistent: bool = False


@dataclass(frozen=True)
class LiveNode(StoredNode):
    """A node of a machine."""

    bitmaps: Sequence[LiveBitmap]


# ---- questions ------------------------------------------------------------------------------


def nodes(monitor: Monitor) -> list[LiveNode]:
    """All nodes, those below others, too; without what this package has there for a while.

    :raises MonitorError: if QEMU does not tell

    >>> [(node.name, node.size, len(node.bitmaps)) for node in nodes(monitor)]
    [('disk0', 1073741824, 1)]
    """
    return [_node(each) for each in _infos(monitor) if not _is_carrier(each)]


def find_node(monitor: Monitor, name: str) -> LiveNode:
    """A node by its name, or by a device: the ``id`` of a ``-drive`` or ``-device``, or a path.

    :raises NotFoundError: if there is none; the error says which there are
    :raises MonitorError: if QEMU does not tell

    >>> [daily] = find_node(monitor, "disk0").bitmaps
    >>> daily.name, daily.granularity, daily.count, daily.enabled
    ('daily', 65536, 65536, True)
    """
    known = {str(each.name): each for each in nodes(monitor)}
    if name in known:
        return known[name]
    devices = _devices(monitor)
    if name in devices and devices[name] in known:
        return known[devices[name]]
    there = ", ".join(sorted({*known, *devices})) or "none"
    raise NotFoundError(f"{monitor.path}: Node '{name}' not found; nodes and devices: {there}")


def device_names(monitor: Monitor) -> list[str]:
    """Of those that have a medium.

    :raises MonitorError: if QEMU does not tell

    >>> device_names(monitor)                       # pybitmap serve has none
    []
    """
    return list(_devices(monitor))


def _devices(monitor: Monitor) -> dict[str, str]:
    """The node of each name that a device has."""
    found: dict[str, str] = {}
    with _believed(monitor, "query-block") as devices:
        for each in devices:
            if "inserted" in each:
                path = each.get("qdev", "")
                # A device may be /machine/peripheral/ID, or a part of that.
                words = path.split("/")
                by_id = words[3] if words[:3] == ["", "machine", "peripheral"] else ""
                for name in (each.get("device"), path, by_id):
                    if name:
                        found.setdefault(name, each["inserted"]["node-name"])
    return found


def _infos(monitor: Monitor) -> list[dict[str, Any]]:
    with _believed(monitor, "query-named-block-nodes", flat=True) as infos:
        for each in infos:
            _node(each)
    return infos


@contextmanager
def _believed(monitor: Monitor, query: str, **arguments: Any) -> Iterator[list[dict[str, Any]]]:
    """The answer to a query, which is to be looked at in the block.

    :raises MonitorError: if it does not have what QEMU's answers have
    """
    found = monitor.execute(query, **arguments)
    try:
        yield found
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = f"{type(error).__name__} {error}"
        raise MonitorError(f"{monitor.path}: {query} was not answered as by QEMU: {what}") from None


def _node(info: dict[str, Any]) -> LiveNode:
    # Without those of jobs, which have no names; the newest comes first.
    bitmaps = [_bitmap(each) for each in reversed(info.get("dirty-bitmaps", [])) if "name" in each]
    return LiveNode(str(info["node-name"]), int(info["image"]["virtual-size"]), bitmaps)


def _bitmap(info: dict[str, Any]) -> LiveBitmap:
    broken = info.get("inconsistent", False)
    return LiveBitmap(
        str(info["name"]),
        int(info["granularity"]),
        bool(info["recording"]),
        reason=INCONSISTENT if broken else None,
        in_use=bool(info["busy"]),
        count=None if broken else int(info["count"]),
        persistent=bool(info["persistent"]),
    )


def _find(monitor: Monitor, name: Name) -> tuple[LiveNode, LiveBitmap]:
    """
    :raises NotFoundError: if it is not there
    """
    for node in nodes(monitor):
        for bitmap in node.bitmaps:
            if (node.name, bitmap.name) == name:
                return node, bitmap
    raise NotFoundError(f"{monitor.path}: Dirty bitmap '{name[1]}' not found at '{name[0]}'")


# ---- changes --------------------------------------------------------------------------------


def add(
    monitor: Monitor,
    name: Name,
    *,
    granularity: int | None = None,
    disabled: bool = False,
    persistent: bool = True,
) -> None:
    """A new bitmap, clean.

    :param granularity: None: QEMU's choice
    :param persistent: is it to be stored in the image? Only qcow2 can
    :raises MonitorError: if QEMU refuses it; nothing has changed

    >>> add(monitor, ("disk0", "weekly"), granularity=1 << 20)
    >>> [bitmap.name for bitmap in find_node(monitor, "disk0").bitmaps]
    ['daily', 'weekly']
    """
    monitor.execute(
        "block-dirty-bitmap-add",
        node=name[0],
        name=name[1],
        granularity=granularity,
        disabled=disabled,
        persistent=persistent,
    )


def remove(monitor: Monitor, names: Collection[Name]) -> None:
    """All of them or, if one cannot be removed, none; inconsistent ones, too.

    :raises MonitorError: if QEMU refuses it; nothing has changed

    >>> remove(monitor, [("disk0", "daily")])
    >>> find_node(monitor, "disk0").bitmaps
    []
    """
    _each(monitor, "remove", names)


def clear(monitor: Monitor, names: Collection[Name]) -> None:
    """Make all of them clean, or none. What is written meanwhile is dirty, or it is not: to keep
    what one has not copied, see :func:`take`.

    :raises MonitorError: if QEMU refuses it; nothing has changed

    >>> clear(monitor, [("disk0", "daily")])
    >>> find_node(monitor, "disk0").bitmaps[0].count
    0
    """
    _each(monitor, "clear", names)


def enable(monitor: Monitor, names: Collection[Name], enabled: bool) -> None:
    """Let all of them record from now on, or no more; or change none.

    :raises MonitorError: if QEMU refuses it; nothing has changed

    >>> enable(monitor, [("disk0", "daily")], False)
    >>> find_node(monitor, "disk0").bitmaps[0].enabled
    False
    """
    if not enabled:
        _each(monitor, "disable", names)
        return
    # QEMU dies of one that is missing, and disables one that is busy, as it takes back what it has
    # refused. So each is read first, by which it is refused as well.
    beside = [(node, new_name()) for node, _ in names]
    monitor.transaction(
        [
            *[_act("add", each, disabled=True) for each in beside],
            *[_merge(each, [name]) for each, name in zip(beside, names)],
            *[_act("enable", name) for name in names],
            *[_act("remove", each) for each in beside],
        ]
    )


def merge(monitor: Monitor, name: Name, sources: Collection[Name]) -> None:
    """Mark what is dirty in the sources, in all of them or, if one is refused, in none.

    :raises NotFoundError: if there are no sources, and no such bitmap
    :raises MonitorError: if QEMU refuses it; nothing has changed

    >>> add(monitor, ("disk0", "weekly"), disabled=True)
    >>> merge(monitor, ("disk0", "weekly"), [("disk0", "daily")])
    >>> [bitmap.count for bitmap in find_node(monitor, "disk0").bitmaps]
    [65536, 65536]
    """
    if sources:
        monitor.transaction([_merge(name, sources)])
    else:  # of which QEMU dies
        _find(monitor, name)


def take(monitor: Monitor, name: Name, other: str) -> None:
    """Move what is dirty to a new bitmap of the same node, which does not record and is as
    persistent; the old one is clean then. What is written meanwhile is in one of them, or in both.

    :param other: what the new one is called; :func:`put_back` undoes it
    :raises NotFoundError: if there is no such bitmap; nothing has changed
    :raises MonitorError: if QEMU refuses it; nothing has changed

    >>> take(monitor, ("disk0", "daily"), "copying")
    >>> [(bitmap.name, bitmap.count) for bitmap in find_node(monitor, "disk0").bitmaps]
    [('daily', 0), ('copying', 65536)]
    """
    monitor.transaction(_rotation(name, other, _find(monitor, name)[1]))


def put_back(monitor: Monitor, name: Name, into: Name) -> None:
    """Mark in a bitmap what is dirty in another of its node, and remove that one.

    :raises InvalidError: if it is the same, or of another node
    :raises MonitorError: if QEMU refuses it; nothing has changed

    >>> take(monitor, ("disk0", "daily"), "copying")
    >>> put_back(monitor, ("disk0", "copying"), ("disk0", "daily"))
    >>> [(bitmap.name, bitmap.count) for bitmap in find_node(monitor, "disk0").bitmaps]
    [('daily', 65536)]
    """
    if name == into or name[0] != into[0]:
        raise InvalidError(f"'{name[1]}' cannot be put back into '{into[1]}': they are to be two")
    monitor.transaction([_merge(into, [name]), _act("remove", name)])


def _each(monitor: Monitor, what: str, names: Collection[Name]) -> None:
    monitor.transaction([_act(what, each) for each in names])


def _act(what: str, name: Name, **more: Any) -> Action:
    return action(f"block-dirty-bitmap-{what}", node=name[0], name=name[1], **more)


def _merge(target: Name, sources: Collection[Name]) -> Action:
    return action(
        "block-dirty-bitmap-merge",
        node=target[0],
        target=target[1],
        bitmaps=[
            source if node == target[0] else {"node": node, "name": source}
            for node, source in sources
        ],
    )


def _rotation(name: Name, other: str, bitmap: LiveBitmap) -> list[Action]:
    """What is dirty goes to a new bitmap."""
    node = name[0]
    new = _act(
        "add",
        (node, other),
        granularity=bitmap.granularity,
        persistent=bitmap.persistent,
        disabled=True,
    )
    move = [new, _merge((node, other), [name]), _act("clear", name)]
    if not bitmap.enabled:
        return move
    beside = (node, new_name())
    return [
        _act("add", beside, granularity=bitmap.granularity),
        *move,
        _merge(name, [beside]),
        _act("remove", beside),
    ]


# ---- extents --------------------------------------------------------------------------------


class Extents(Guard):
    """The dirty extents of a bitmap at one instant, ``(offset, length)`` in bytes and in order.

    Writer: what is written from the instant on is not there. Kill: see the module. Fork: its child
    cannot use it, and leaves all to its parent. Drop: nothing is left in QEMU once it is entered,
    but a folder. Interruption: nothing is left. Twin: others have their own.

    :param progress: of the reading; may raise to stop it
    :param granularity: as a bitmap of that granularity has them, if it is coarser
    :raises NotFoundError: if there is no such bitmap
    :raises MonitorError: if QEMU refuses it, as for one that is busy or inconsistent
    :raises StoreError: if what QEMU has stored cannot be read
    :raises OSError: if there can be no folder for temporary files

    >>> with Extents(monitor, ("disk0", "daily")) as extents:
    ...     list(extents)
    [(983040, 65536)]
    """

    _lock = None

    def __init__(
        self,
        monitor: Monitor,
        name: Name,
        progress: Progress | None = None,
        granularity: int = 1,
    ) -> None:
        self._monitor = monitor
        self._name = name
        self._progress: Progress = progress or (lambda what, done, total: None)
        self._granularity = granularity
        self._process = Process()
        self._stack = ExitStack()
        self._folder = Folder()
        self._carrier: str | None = None  # a node that may be there
        self._other: Name | None = None  # a bitmap that may be there

    def _entered(self, nested: bool) -> Iterator[tuple[int, int]]:
        tidy(self._monitor)
        node, bitmap = _find(self._monitor, self._name)
        if not node.size:  # QEMU stores no bitmap of nothing
            return iter(())
        if self._monitor.has_command(_AREAS):
            return self._told(node, bitmap)
        return self._carried(node, bitmap)

    def _told(self, node: LiveNode, bitmap: LiveBitmap) -> Iterator[tuple[int, int]]:
        """By our own server, of another bitmap that stays as it is meanwhile."""
        if self._other is None:
            self._other = (node.name, new_name())
        self._monitor.transaction(self._apart(bitmap))
        dirty = HBitmap(node.size, granularity_bits(bitmap.granularity))
        for offset, nbytes in _areas(self._monitor, self._other):
            dirty.set(offset, nbytes)
        self._read()
        return rounded(dirty.areas(), self._granularity, node.size)

    def _carried(self, node: LiveNode, bitmap: LiveBitmap) -> Iterator[tuple[int, int]]:
        """By a carrier."""
        monitor, folder = self._monitor, self._folder
        folder.make()
        path = folder.path / "carrier.qcow2"
        write_carrier(path, node.size)
        folder.give(path, monitor.user)
        self._carrier = carrier = _CARRIER + uuid4().hex[:12]
        monitor.execute(
            "blockdev-add",
            driver="qcow2",
            node_name=carrier,
            cache={"no-flush": True},
            file={"driver": "file", "filename": str(path)},
        )
        inside = (carrier, _INSIDE)
        new = _act("add", inside, granularity=bitmap.granularity, persistent=True, disabled=True)
        monitor.transaction([new, _merge(inside, [self._name]), *self._apart(bitmap)])
        [told] = [each for each in _infos(monitor) if each["node-name"] == carrier]
        self._unplug()
        store = Qcow2Store(path, lock=False)  # nobody else has it, wherever it is
        # QEMU says on its standard error alone if it could not store all, as on a full disk, and
        # may have stored a bitmap in which nothing is dirty.
        [stored] = counted(store, self._progress)
        if [each.count for each in stored.bitmaps] != [_bitmap(*told["dirty-bitmaps"]).count]:
            raise CorruptError(
                f"{path}: QEMU did not store all of bitmap '{self._name[1]}' there; its standard "
                "error may tell why. Is there room, or another place (TMPDIR)?"
            )
        found = areas(store, (None, _INSIDE), self._progress, self._granularity)
        return self._stack.enter_context(found)

    # ---- what Taken does otherwise ----------------------------------------------------------

    def _apart(self, bitmap: LiveBitmap) -> list[Action]:
        """What else is done in the transaction."""
        if self._other is None:
            return []
        new = _act("add", self._other, granularity=bitmap.granularity, disabled=True)
        return [new, _merge(self._other, [self._name])]

    def _read(self) -> None:
        """All of the other bitmap was read."""
        self._end()

    def _end(self) -> None:
        if self._other is not None:
            with suppress(CommandError):  # it is not there
                remove(self._monitor, [self._other])
            self._other = None

    # ---- the end ----------------------------------------------------------------------------

    def _unplug(self) -> None:
        if self._carrier is not None:
            _unplug(self._monitor, self._carrier)
            self._carrier = None

    def _leaving(self, *_: object) -> None:
        if not self._process.is_this():
            return
        try:
            self._stack.close()
            self._folder.remove()
            self._unplug()
        finally:
            self._end()

    def _interrupted(self) -> None:
        self._leaving()


class Taken(Extents):
    """The same, and they are not dirty any more: what is written from the instant on is.

    Without ``done``, as after an exception, all is marked again. Kill: the next run marks it again;
    what is persistent is so also after QEMU has ended. Writer: what is written at the instant may
    be taken, and be dirty as well.

    >>> with Taken(monitor, ("disk0", "daily")) as taken:
    ...     for offset, length in taken:            # copy it
    ...         print(offset, length)
    ...     taken.done()                            # once the copy is safe
    983040 65536
    >>> find_node(monitor, "disk0").bitmaps[0].count
    0
    """

    _done = False
    _found: Iterator[tuple[int, int]]

    def _entered(self, nested: bool) -> Taken:  # type: ignore[override]
        self._other = (self._name[0], f"{new_name()}{_CUT}{self._name[1]}")
        self._found = super()._entered(nested)
        return self

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Once."""
        return self._found

    def done(self) -> None:
        """They are forgotten when the block ends.

        :raises StateError: after its end

        >>> with Taken(monitor, ("disk0", "daily")):
        ...     pass                                # without it
        >>> find_node(monitor, "disk0").bitmaps[0].count
        65536
        """
        if self._other is None:
            raise StateError(f"what was taken of '{self._name[1]}' is put back")
        self._done = True

    def _apart(self, bitmap: LiveBitmap) -> list[Action]:
        assert self._other is not None
        return _rotation(self._name, self._other[1], bitmap)

    def _read(self) -> None:
        pass

    def _end(self) -> None:
        if self._other is None:
            return
        there = [(node.name, each.name) for node in nodes(self._monitor) for each in node.bitmaps]
        if self._other in there:
            if self._done:
                remove(self._monitor, [self._other])
            else:
                put_back(self._monitor, self._other, self._name)
        self._other = None


def _areas(monitor: Monitor, name: Name) -> Iterator[tuple[int, int]]:
    """Of our own server."""
    start: int | None = 0
    while start is not None:
        found = monitor.execute(_AREAS, node=name[0], name=name[1], start=start, limit=_PAGE)
        for each in found["areas"]:
            yield each["offset"], each["length"]
        start = found.get("next")


def _unplug(monitor: Monitor, carrier: str) -> None:
    """Close a carrier, which stores its bitmap. Nothing happens if it is not there."""
    if any(each["node-name"] == carrier for each in _infos(monitor)):
        monitor.execute("blockdev-del", node_name=carrier)


# ---- leftovers ------------------------------------------------------------------------------


def tidy(monitor: Monitor) -> list[str]:
    """What runs have left that were killed goes; what :class:`Taken` had taken is put back.

    Never what a run works with that goes on, or another user's. What QEMU does not let go stays for
    the next time.

    :returns: what was done, as sentences
    :raises MonitorError: if QEMU does not answer

    >>> tidy(monitor)
    []
    """
    told = []
    for info in _infos(monitor):
        if _is_carrier(info) and is_left(Path(info.get("file", "")).parent.name):
            with suppress(CommandError):  # another run has done it, or something uses it
                _unplug(monitor, info["node-name"])
                told.append(f"removed node '{info['node-name']}', of a run that was killed")
    for node in nodes(monitor):
        for bitmap in node.bitmaps:
            owner, cut, source = bitmap.name.partition(_CUT)
            if is_left(owner):
                with suppress(CommandError):
                    left = (node.name, bitmap.name)
                    if not cut:
                        remove(monitor, [left])
                        told.append(f"removed bitmap '{left[1]}', of a run that was killed")
                    else:
                        put_back(monitor, left, (node.name, source))
                        told.append(
                            f"put back into bitmap '{source}' of node '{node.name}' what was taken "
                            "by a run that was killed"
                        )
    return told


def _is_carrier(info: dict[str, Any]) -> bool:
    return str(info["node-name"]).startswith(_CARRIER)
