# SPDX-License-Identifier: MIT
"""A scan: targets read by an executor, their results kept, and tables made of them.

What was found at a target is a file of its own from the moment it is known. So a run that ends
before its time, by whatever way, is taken up by the next with the same targets; nothing is counted
twice, or left out. The tables come last, and at once.

Visitors. Writer: see reading.py. Kill, Ctrl-C, an executor that broke: the old tables count, and
the results that are there are taken by the next run. Fork: the child can change nothing. Drop: a
generator or a pool of ours that is dropped ends its processes. Twin: a second scan to the same
folder is refused, also from a progress that is called by the first.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

from ...errors import CorruptError, ExecutorError, InvalidError
from ...store.base import Progress
from .folder import Folder, StoredResult
from .reading import Reader, keyed, read
from .rows import Extents, Result, State, Target, failed
from .running import answers
from .tables import Writer, check_name

#: Seconds for which the results of a run that did not come to its end are taken.
MAX_AGE = 12 * 3600.0


@dataclass(frozen=True)
class Report:
    """What came of a scan.

    :param targets: how many there were
    :param resumed: of these, how many an earlier run had read
    :param states: how many rows of each state
    :param dirty_bytes: of all bitmaps
    :param extents: of all

    >>> from concurrent.futures import ThreadPoolExecutor
    >>> from pybitmap.tools.fleet import State, find, scan
    >>> with ThreadPoolExecutor() as executor:
    ...     report = scan(find(["vm1.bitmaps", "vm2.bitmaps"]), "today", executor=executor)
    >>> report.targets, report.resumed, report.states[State.READY], report.unread
    (2, 0, 1, 1)
    >>> report.dirty_bytes, report.extents
    (65536, 1)
    """

    targets: int
    resumed: int
    states: Mapping[State, int]
    dirty_bytes: int
    extents: int

    @property
    def unread(self) -> int:
        """Rows of what could not be read."""
        return sum(count for state, count in self.states.items() if not state.was_read)


def scan(
    targets: Iterable[Target],
    into: str | os.PathLike[str],
    *,
    reader: Reader = read,
    executor: Executor | None = None,
    processes: int | None = None,
    progress: Progress | None = None,
    fresh: bool = False,
    max_age: float = MAX_AGE,
) -> Report:
    """Read the bitmaps of many targets into the tables of a folder, which replace those there.

    :param targets: see :func:`~pybitmap.tools.fleet.find` and :func:`~pybitmap.tools.fleet.listed`
    :param into: the folder; it may be there, empty or of an earlier scan
    :param reader: what reads a target, for targets of other kinds: a function that can be pickled;
        what it raises is the reason of a row
    :param executor: that runs the reading, in processes that see the targets by the same paths;
        None: processes of our own. Then the caller's program is a file or a module that can be
        imported again without doing its work again
    :param processes: how many of our own; None: as many as there are processors
    :param progress: called with what is being done, and how many targets of how many are; it may
        raise to stop the run
    :param fresh: forget what a run that did not come to its end has read
    :param max_age: else take what of it is not older, in seconds
    :raises InvalidError: if the folder is something else, or no number of processes is above 0
    :raises LockedError: if another scan writes there
    :raises ExecutorError: if the executor broke; the next run goes on
    :raises StoreError: if the tables cannot be written; the next run goes on

    A target that cannot be read is a row with the reason, and :attr:`Report.unread` counts it.
    A program that writes to a target keeps its lock, so that is such a row. A kill, Ctrl-C or an
    error at any moment: the old tables count, and the next run takes up what was read.

    >>> from concurrent.futures import ThreadPoolExecutor
    >>> from pybitmap.tools.fleet import find
    >>> with ThreadPoolExecutor() as executor:      # without one: processes
    ...     scan(find(["vm1.bitmaps"]), "today", executor=executor).dirty_bytes
    65536
    """
    if processes is not None and processes < 1:
        raise InvalidError(f"{processes} processes read nothing: one at least")
    todo = dict.fromkeys(targets)
    with Folder(into) as folder:
        check_name(folder.path)
        tell = folder.told(progress)
        if fresh:
            folder.forget()
        missing = _missing(folder, todo, max_age)
        resumed = len(todo) - len(missing)
        function = partial(keyed, reader)
        running = answers(function, missing, _died, executor=executor, processes=processes)
        _read(folder, running, resumed, len(todo), tell)
        report = _tabulate(folder, list(todo), resumed, tell)
        folder.forget()
    return report


def _missing(folder: Folder, targets: Iterable[Target], max_age: float) -> list[Target]:
    """Those of which there is no result that is young enough."""
    oldest = time.time() - max_age
    return [each for each in targets if not _is_young(folder.stored(each.key), oldest)]


def _read(
    folder: Folder,
    running: Generator[tuple[str, Result], None, None],
    done: int,
    total: int,
    progress: Progress,
) -> None:
    """Until there is a result of each."""
    progress("reading targets", done, total)
    try:
        for key, result in running:
            folder.store(key, result)
            done += 1
            progress("reading targets", done, total)
    except ExecutorError as error:
        raise ExecutorError(
            f"{error}; {done} of {total} targets are read, and kept in '{folder.path}': "
            "run the same again for the others"
        ) from error
    finally:
        running.close()


def _is_young(stored: StoredResult | None, oldest: float) -> bool:
    if stored is None:
        return False
    try:
        when = os.stat(stored.path).st_mtime
    except FileNotFoundError:
        return False
    return oldest <= when <= time.time() + 60


def _died(target: Target) -> tuple[str, Result]:
    reason = "the process that read it died, twice: a crash, or a lack of memory"
    return target.key, failed(target, State.DIED, reason, time.time())


def _tabulate(folder: Folder, targets: list[Target], resumed: int, progress: Progress) -> Report:
    states: Counter[State] = Counter()
    dirty_bytes = extents = 0
    places: list[tuple[int, int]] = []  # of each row: its target, and which of its rows it is
    with folder.replacing() as new, Writer(new) as writer:
        for number, target in enumerate(targets):
            stored = _stored(folder, target)
            for index, disk in enumerate(stored.disks):
                writer.add(disk)
                places.append((number, index))
                states[disk.state] += 1
                dirty_bytes += disk.dirty_bytes or 0
                extents += disk.extents or 0
            writer.add_chains(stored.chains)
        for state in writer.know_epochs():
            states[state] += 1

        done = 0

        def contents(members: Iterable[int]) -> Iterator[tuple[int, Extents]]:
            nonlocal done
            before, stored = -1, None
            for member in members:
                number, index = places[member]
                if stored is None or number != before:
                    before, stored = number, _stored(folder, targets[number])
                yield member, _content(stored, index)
                done += 1
                progress("writing tables", done, states[State.READY])

        for partition in writer.partitions():
            writer.write(partition, contents(partition.members))
        writer.finish()
    return Report(len(targets), resumed, dict(states), dirty_bytes, extents)


def _stored(folder: Folder, target: Target) -> StoredResult:
    stored = folder.stored(target.key)
    if stored is None:
        raise CorruptError(
            f"'{folder.path}': what was read of '{target.text}' is damaged or was removed: run the "
            "same again"
        )
    return stored


def _content(stored: StoredResult, index: int) -> Extents:
    try:
        content = stored.content(index)
        assert content is not None, "a row that is READY has extents"
        return content.unpacked()
    except ValueError as error:
        stored.path.unlink()
        raise CorruptError(
            f"'{stored.path}': what was read of '{stored.disks[index].disk}' is damaged ({error}): "
            "run the same again"
        ) from error
