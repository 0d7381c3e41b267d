# SPDX-License-Identifier: MIT
"""What commands for bitmaps work on with --qmp: the nodes of a machine that runs."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import click

from ..errors import BitmapError, InvalidError, UnsupportedError
from ..offline import Name
from ..store import StoredBitmap, StoredNode
from ..store.base import Progress
from ..tools import live
from ..tools.monitor import CommandError, Monitor
from .common import Refused, note, tell, words
from .targets import Target


class Live(Target):
    """A node of a machine, or all of them; what is done there as tools/live.py has it."""

    format = "qmp"

    def __init__(self, monitor: Monitor, name: str | None) -> None:
        self._monitor = monitor
        self.path = monitor.path if name is None else name
        version = ".".join(map(str, monitor.version))
        ours = monitor.package.startswith("pybitmap")
        self.kind = f"node of {'pybitmap' if ours else 'QEMU'} {version} at {monitor.path}"
        if name is None:
            self.kind = self.kind[len("node of ") :]
        self._name = name

    @property
    def repairable(self) -> bool:
        return False

    def keeps(self, bitmap: StoredBitmap) -> bool:
        return isinstance(bitmap, live.LiveBitmap) and bitmap.persistent

    def nodes(self) -> Sequence[StoredNode]:
        """
        :raises MonitorError: if it does not answer
        :raises NotFoundError: if there is no such node
        """
        if self._name is None:
            return live.nodes(self._monitor)
        return [live.find_node(self._monitor, self._name)]

    def node(self, name: str | None) -> str:
        raise UnsupportedError(f"{self.path}: a machine has the sizes of its disks: block_resize")

    def place(self, name: str, node: str | None, size: int | None) -> Name:
        [found] = self.nodes()
        return found.name, name

    def beside(self, name: str) -> Live:
        """Another node of the same machine."""
        return Live(self._monitor, name)

    def add(self, name: str, *, granularity: int | None, disabled: bool, persistent: bool) -> None:
        place = self.place(name, None, None)
        try:
            live.add(
                self._monitor,
                place,
                granularity=granularity,
                disabled=disabled,
                persistent=persistent,
            )
        except CommandError as error:
            if "persistent" not in str(error.text):
                raise
            raise UnsupportedError(
                f"{error}; one that ends with the machine: --transient"
            ) from error

    def remove(self, names: Collection[Name]) -> None:
        live.remove(self._monitor, names)

    def clear(self, names: Collection[Name]) -> None:
        live.clear(self._monitor, names)

    def enable(self, names: Collection[Name], enabled: bool) -> None:
        live.enable(self._monitor, names, enabled)

    def merge(self, name: Name, sources: Collection[Name]) -> None:
        live.merge(self._monitor, name, sources)

    def take(self, name: Name, other: str) -> None:
        live.take(self._monitor, name, other)

    def put_back(self, name: Name, into: Name) -> None:
        live.put_back(self._monitor, name, into)

    def extents(self, name: Name, progress: Progress, granularity: int) -> live.Extents:
        return live.Extents(self._monitor, name, progress, granularity)

    def taken(self, name: Name, progress: Progress, granularity: int) -> live.Taken:
        return live.Taken(self._monitor, name, progress, granularity)

    def _named(self, name: str, nodes: Iterable[StoredNode]) -> StoredNode:
        raise InvalidError(f"{self.path}: TARGET is the node already")


@contextlib.contextmanager
def machine(
    socket: str, name: str | None, refused: Mapping[str, object], *, changing: bool = True
) -> Iterator[Live]:
    """What is at a monitor; what goes wrong with it is a refusal.

    :param refused: options that mean nothing there, and what was given for them
    :param changing: what runs have left that were killed goes
    """
    for option, given in refused.items():
        if given not in (None, False, ()):
            raise click.UsageError(f"{option} is for images and local stores, not for --qmp.")
    try:
        with Monitor(socket) as monitor:
            target = Live(monitor, name)
            tell(f"{target.path}: {target.kind}, to be {'changed' if changing else 'read'}")
            if changing:
                for what in live.tidy(monitor):
                    note(f"{socket}: {what}")
            yield target
    except BrokenPipeError:
        raise
    except (BitmapError, OSError) as error:
        raise Refused(words(error)) from error
