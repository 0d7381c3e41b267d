# SPDX-License-Identifier: MIT
"""ServedDisk: a raw disk, its bitmaps in a local store, and QMP, opened and closed together.

What nbdkit's plugin serves; nothing here knows of nbdkit. The rules:

- Each change of data is one ``node.writing(...)``: marked before, marked after, and in whatever is
  frozen in between. A discard is a change: its range is dirty, as QEMU has it.
- Opening opens the disk, then the store, then QMP; closing goes the other way, and syncs the disk
  before the store: a store that was closed in an orderly way must not know of more than the disk.
- What fails while it is opened leaves nothing open.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from errno import ENOENT
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Callable

from ..block.graph import BlockGraph
from ..block.node import BlockNode
from ..errors import BitmapError, InconsistentError, InvalidError, MismatchError
from ..qmp.server import Server
from ..sizes import exact_size, is_granularity, parse_size
from ..store import LocalStore
from ..store.private import check_folder
from .raw_disk import RawDisk

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

_GRANULARITY = ",granularity="


def parse_bitmap(text: str) -> tuple[str, int | None]:
    """``NAME`` or ``NAME,granularity=SIZE``, with SIZE as ``64K``.

    :raises InvalidError: if it is neither

    >>> parse_bitmap("daily"), parse_bitmap("daily,granularity=4K")
    (('daily', None), ('daily', 4096))
    """
    name, found, size = text.rpartition(_GRANULARITY)
    if not found:
        return text, None
    try:
        granularity = parse_size(size)
    except ValueError as error:
        raise InvalidError(f"{text!r}: {error}") from None
    if granularity < 512 or not is_granularity(granularity):
        raise InvalidError(f"{text!r}: a granularity is a power of 2, and 512 at least")
    return name, granularity


@dataclass
class Parameters:
    """What is to be served. Paths are absolute: a server may change its folder.

    >>> asked = Parameters.of(["disk=disk.raw", "store=disk.bitmaps", "bitmap=daily"])
    >>> os.path.basename(asked.disk), os.path.basename(asked.store), asked.node
    ('disk.raw', 'disk.bitmaps', 'disk')
    >>> asked.bitmaps, asked.qmp, asked.read_only
    ({'daily': None}, None, False)
    """

    disk: str = ""
    store: str = ""
    node: str = "disk"
    #: Bitmaps that have to be there, and are made if they are not: granularity, None for any.
    bitmaps: dict[str, int | None] = field(default_factory=dict)
    qmp: str | None = None
    read_only: bool = False

    @classmethod
    def of(cls, words: Iterable[str]) -> Parameters:
        """``key=value``, each. Raises as :meth:`set`.

        >>> Parameters.of(["disk=disk.raw", "bitmap=daily,granularity=4K"]).bitmaps
        {'daily': 4096}
        """
        parameters = cls()
        for word in words:
            key, _, value = word.partition("=")
            parameters.set(key, value)
        return parameters

    def words(self) -> list[str]:
        """What :meth:`of` makes the same of, in whatever folder.

        >>> Parameters.of(["disk=/disk.raw", "store=/disk.bitmaps", "bitmap=daily"]).words()
        ['disk=/disk.raw', 'store=/disk.bitmaps', 'node=disk', 'bitmap=daily']
        """
        found = [f"disk={self.disk}", f"store={self.store}", f"node={self.node}"]
        for name, granularity in self.bitmaps.items():
            size = "" if granularity is None else f"{_GRANULARITY}{exact_size(granularity)}"
            found.append(f"bitmap={name}{size}")
        found += [] if self.qmp is None else [f"qmp={self.qmp}"]
        return [*found, "read-only=true"] if self.read_only else found

    def check(self) -> None:
        """
        :raises InvalidError: if something is missing, or two things contradict each other

        >>> Parameters.of(["disk=disk.raw"]).check()
        Traceback (most recent call last):
        pybitmap.errors.InvalidError: store= is missing or empty: give disk=FILE store=FOLDER, and names that are not empty
        """  # noqa: E501
        for key in ("disk", "store", "node"):
            if not getattr(self, key):
                raise InvalidError(
                    f"{key}= is missing or empty: give disk=FILE store=FOLDER, and names that are "
                    "not empty"
                )

    def set(self, key: str, value: str) -> None:
        """As nbdkit's command line has them.

        :raises InvalidError: for what there is not, and for what is given twice

        >>> parameters = Parameters()
        >>> parameters.set("read-only", "true")
        >>> parameters.read_only
        True
        """
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidError(f"{key}={value!r} is no UTF-8, which nbdkit needs") from None
        if key == "bitmap":
            name, granularity = parse_bitmap(value)
            if not name or name in self.bitmaps:
                raise InvalidError(f"bitmap={value}: give each a name, once")
            self.bitmaps[name] = granularity
        elif key == "read-only":
            if value not in ("true", "false"):
                raise InvalidError(f"read-only={value}: give true or false")
            self.read_only = value == "true"
        elif key in ("disk", "store", "qmp"):
            if not value or getattr(self, key):
                raise InvalidError(f"{key}={value}: give a path, once")
            setattr(self, key, os.path.abspath(value))
        elif key == "node":
            self.node = value
        else:
            raise InvalidError(
                f"{key}= is not known: there are disk=FILE store=FOLDER node=NAME "
                "bitmap=NAME[,granularity=SIZE] qmp=SOCKET read-only=true"
            )


class ServedDisk:
    """
    Writer, kill: as :meth:`pybitmap.BlockNode.writing` and :class:`pybitmap.store.LocalStore` have
    it: no write is missed, and after a kill the marks are exact. Fork: the child is refused, so a
    server opens it when it has become a daemon. Dropped: the store is closed as by a kill, which
    loses nothing; with QMP, whose thread has it, it stays until the process ends. Twin: the locks
    of the store and of the disk refuse it.

    :param parameters: see :class:`Parameters`
    :param report: told in words what is to be known of, and is no error
    :param ended: called, in QMP's thread, when a client has asked for the end (``quit``)
    :raises BitmapError, OSError: if something cannot be opened; nothing is open

    >>> nbytes = Path("disk.raw").write_bytes(bytes(1 << 20))
    >>> asked = Parameters.of(["disk=disk.raw", "store=disk.bitmaps", "bitmap=daily"])
    >>> disk = ServedDisk(asked, report=print)
    bitmap 'daily' is new, and clean: the first copy is one of all the disk
    >>> disk.write(b"new", 5000)
    >>> list(disk.node.bitmaps["daily"].areas())
    [(0, 65536)]
    >>> disk.close()
    """

    def __init__(
        self,
        parameters: Parameters,
        report: Callable[[str], object],
        ended: Callable[[], object] = lambda: None,
    ) -> None:
        parameters.check()
        self.read_only = parameters.read_only
        self._report, self._ended = report, ended
        self._server: Server | None = None
        self._closing = False
        with ExitStack() as stack:
            self.disk = RawDisk(parameters.disk, read_only=self.read_only, report=report)
            stack.callback(self.disk.close)
            # On the way out of an error, too: what was opened is given back in an orderly way.
            self.graph = stack.enter_context(BlockGraph())
            self.node = _add_node(self.graph, parameters, self.disk.size, self.read_only)
            for name in _missing(self.node, parameters):
                self.node.add_bitmap(name, parameters.bitmaps[name], persistent=True)
                report(f"bitmap '{name}' is new, and clean: the first copy is one of all the disk")
            self._report_bitmaps()
            if parameters.qmp is not None:
                self._server = Server(self.graph, parameters.qmp)
                stack.callback(self._server.close)
                self._server.listen()
                self._thread = Thread(target=self._answer, name="pybitmap-qmp", daemon=True)
                self._thread.start()
            stack.pop_all()

    def _report_bitmaps(self) -> None:
        if self.read_only:
            return
        for name, bitmap in self.node.bitmaps.items():
            if not bitmap.recording:
                why = "is inconsistent" if bitmap.inconsistent else "is disabled"
                self._report(f"bitmap '{name}' {why}, and records nothing")

    def _answer(self) -> None:
        assert self._server is not None
        self._server.run()
        if not self._closing:
            self._ended()

    # ---- requests ---------------------------------------------------------------------------

    def read(self, buffer: WriteableBuffer, offset: int) -> None:
        """See :meth:`RawDisk.read`. It waits for no writer.

        >>> nbytes = Path("disk.raw").write_bytes(b"data" * 256)
        >>> disk = ServedDisk(Parameters.of(["disk=disk.raw", "store=disk.bitmaps"]), report=print)
        >>> buffer = bytearray(4)
        >>> disk.read(buffer, 0)
        >>> bytes(buffer)
        b'data'
        >>> disk.close()
        """
        self.disk.read(buffer, offset)

    def write(self, data: ReadableBuffer, offset: int) -> None:
        """Write and mark. What failed on its way, as on a full file system, is marked, too.

        :raises OSError: if it cannot be written as a whole

        >>> nbytes = Path("disk.raw").write_bytes(bytes(1 << 20))
        >>> asked = Parameters.of(["disk=disk.raw", "store=disk.bitmaps", "bitmap=daily"])
        >>> disk = ServedDisk(asked, report=print)
        bitmap 'daily' is new, and clean: the first copy is one of all the disk
        >>> disk.write(b"new", 100_000)
        >>> disk.node.bitmaps["daily"].next_dirty(0)
        65536
        >>> disk.close()
        """
        with self.node.writing(offset, memoryview(data).nbytes):
            self.disk.write(data, offset)

    def zero(self, offset: int, nbytes: int, *, may_trim: bool) -> None:
        """See :meth:`RawDisk.zero`.

        >>> nbytes = Path("disk.raw").write_bytes(b"data" * 65536)
        >>> asked = Parameters.of(["disk=disk.raw", "store=disk.bitmaps", "bitmap=daily"])
        >>> disk = ServedDisk(asked, report=print)
        bitmap 'daily' is new, and clean: the first copy is one of all the disk
        >>> disk.zero(65536, 65536, may_trim=True)
        >>> list(disk.node.bitmaps["daily"].areas())
        [(65536, 65536)]
        >>> disk.close()
        """
        with self.node.writing(offset, nbytes):
            self.disk.zero(offset, nbytes, may_trim=may_trim)

    def trim(self, offset: int, nbytes: int) -> None:
        """See :meth:`RawDisk.trim`.

        >>> nbytes = Path("disk.raw").write_bytes(b"data" * 65536)
        >>> asked = Parameters.of(["disk=disk.raw", "store=disk.bitmaps", "bitmap=daily"])
        >>> disk = ServedDisk(asked, report=print)
        bitmap 'daily' is new, and clean: the first copy is one of all the disk
        >>> disk.trim(65536, 65536)                 # a discard is dirty, as QEMU has it
        >>> list(disk.node.bitmaps["daily"].areas())
        [(65536, 65536)]
        >>> disk.close()
        """
        with self.node.writing(offset, nbytes):
            self.disk.trim(offset, nbytes)

    def extents(self, offset: int, nbytes: int) -> Iterator[tuple[int, int, bool]]:
        """See :meth:`RawDisk.extents`.

        >>> nbytes = Path("disk.raw").write_bytes(b"data" * 1024)
        >>> disk = ServedDisk(Parameters.of(["disk=disk.raw", "store=disk.bitmaps"]), report=print)
        >>> sum(length for offset, length, hole in disk.extents(0, 4096))
        4096
        >>> disk.close()
        """
        return self.disk.extents(offset, nbytes)

    def sync(self) -> None:
        """The data. Bitmaps need no sync: after a kill they are exact, after a crash of the system
        inconsistent, whatever was synced.

        :raises OSError: if the disk has not taken it. What it lost, nobody knows, and a copy may
            have it: so all of it is dirty then

        >>> nbytes = Path("disk.raw").write_bytes(bytes(1 << 20))
        >>> disk = ServedDisk(Parameters.of(["disk=disk.raw", "store=disk.bitmaps"]), report=print)
        >>> disk.write(b"new", 0)
        >>> disk.sync()
        >>> disk.close()
        """
        try:
            self.disk.sync()
        except OSError:
            self.node.mark_dirty(0, self.disk.size)
            raise

    # ---- the end ----------------------------------------------------------------------------

    def close(self) -> None:
        """End QMP, sync the disk, store the bitmaps, close both. What a QMP client has frozen is
        put back. Each of these is done, whatever the others say; the second time nothing is.

        :raises BitmapError, OSError: the first of them that could not be, further ones are
            reported. The bitmaps are as after a kill if it is they that could not be stored

        >>> nbytes = Path("disk.raw").write_bytes(bytes(1 << 20))
        >>> disk = ServedDisk(Parameters.of(["disk=disk.raw", "store=disk.bitmaps"]), report=print)
        >>> disk.close(); disk.close()
        """
        if self._closing:
            return
        self._closing = True
        errors: list[Exception] = []
        for step in (self._close_server, self._sync_last, self._close_graph, self.disk.close):
            try:
                step()
            except (BitmapError, OSError) as error:
                errors.append(error)
        for further in errors[1:]:
            self._report(str(further))
        if errors:
            raise errors[0]

    def _close_server(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._thread.join()
            self._server.close()

    def _sync_last(self) -> None:
        if not self.read_only:
            self.sync()

    def _close_graph(self) -> None:
        try:
            self.graph.close()
        except BitmapError:
            self.node.close(discard=True)
            raise


def checked(parameters: Parameters) -> None:
    """Find what keeps it from being served, as far as that can be without changing anything: for a
    server to say so before it forks, when its user is still there to hear it.

    :raises BitmapError, OSError: as :class:`ServedDisk`

    >>> nbytes = Path("disk.raw").write_bytes(bytes(1 << 20))
    >>> checked(Parameters.of(["disk=disk.raw", "store=disk.bitmaps", "bitmap=daily"]))
    >>> os.path.exists("disk.bitmaps")          # nothing was made
    False
    """
    parameters.check()
    with ExitStack() as stack:
        disk = RawDisk(parameters.disk, read_only=parameters.read_only, report=lambda text: None)
        stack.callback(disk.close)
        graph = stack.enter_context(BlockGraph())
        names = set(parameters.bitmaps)
        missing = list(parameters.bitmaps)
        if parameters.read_only or not LocalStore.vacant(parameters.store):
            node = _add_node(graph, parameters, disk.size, read_only=True)
            missing = _missing(node, parameters)
            names.update(node.bitmaps)
        elif os.path.lexists(parameters.store):  # an empty folder, or a link to nothing
            check_folder(Path(parameters.store), writing=True)
        elif not os.path.isdir(os.path.dirname(parameters.store)):
            raise FileNotFoundError(ENOENT, "there is no folder for the store", parameters.store)
        with BlockGraph() as trial:
            node = trial.add_node(parameters.node, disk.size)
            for name in missing:
                node.add_bitmap(name, parameters.bitmaps[name])
        if not names and parameters.qmp is None:
            raise InvalidError(
                f"node '{parameters.node}' has no bitmap, so no write would be recorded: give "
                "bitmap=NAME, or qmp=SOCKET to add some"
            )
        if parameters.qmp is not None:
            server = Server(graph, parameters.qmp)
            stack.callback(server.close)
            server.listen()


def _add_node(graph: BlockGraph, parameters: Parameters, size: int, read_only: bool) -> BlockNode:
    store, name = parameters.store, parameters.node
    try:
        return graph.add_node(name, size, LocalStore(store), read_only)
    except MismatchError as error:
        raise MismatchError(
            f"{parameters.disk} has another size than its bitmaps are for: {error}. If it is the "
            "right disk, and was resized, resize them, too: "
            "pybitmap resize " + shlex.join([store, exact_size(size), "--node", name])
        ) from None


def _missing(node: BlockNode, parameters: Parameters) -> list[str]:
    """The bitmaps that are asked for and that it has not.

    :raises BitmapError: if it has one that is of no use, or may not have one
    """
    missing = [name for name in parameters.bitmaps if not _has(node, parameters, name)]
    if missing and parameters.read_only:
        raise InvalidError(f"there is no bitmap '{missing[0]}', and read-only adds none")
    return missing


def _has(node: BlockNode, parameters: Parameters, name: str) -> bool:
    """Has the node such a bitmap?

    :raises BitmapError: if it has that name, and is of no use
    """
    bitmap = node.bitmaps.get(name)
    if bitmap is None:
        return False
    if bitmap.inconsistent:
        raise InconsistentError(
            f"bitmap '{name}' does not know what was written ({bitmap.reason}): mark all of it "
            "dirty, so that nothing is missed: pybitmap repair "
            + shlex.join([parameters.store, f"{node.name}/{name}"])
        )
    granularity = parameters.bitmaps[name]
    if granularity not in (None, bitmap.granularity):
        raise MismatchError(
            f"bitmap '{name}' has the granularity {exact_size(bitmap.granularity)}: ask for that "
            "one, or for none"
        )
    return True
