# SPDX-License-Identifier: MIT
"""Which targets are meant: files, stores, backup directories, whole folders, globs, lists.

Names are bytes that anybody may have chosen. They are compared and passed on, and never taken apart
but by the file system.
"""

from __future__ import annotations

import csv
import glob
import os
import socket
import stat
from collections.abc import Iterable, Iterator, Sequence

from ...errors import InvalidError, UnsupportedError
from ...store import probe
from .reading import MANIFEST
from .rows import Target, absolute


def find(
    names: Iterable[str | os.PathLike[str]],
    *,
    host: str | None = None,
    bitmaps: Iterable[str] = (),
    force_share: bool = False,
) -> list[Target]:
    """The targets that are meant, in the order of their paths; each once, however many links lead
    to it, by the path that is the least deep.

    :param names: of images, local stores and backup directories; of folders, in which all that are
        such are meant, however deep; or globs, as ``glob.glob`` has them, if nothing has that name.
        What is not there is a target that has vanished: it is for the scan to say so
    :param host: of all of them; None: this one
    :param bitmaps: names of those that count; none: all
    :param force_share: read them without locks
    :raises InvalidError: if the host has no name, or folders are too deep for a glob

    Folders are walked without following links to others, so that none is walked twice. What cannot
    be looked at, a folder too, and a link that leads nowhere, is a target, which the scan says of.
    Nothing is kept open or changed; what comes or goes meanwhile is found or not.

    >>> [(os.path.basename(target.path), target.host) for target in find(["."], host="h1")]
    [('vm1.bitmaps', 'h1')]
    """
    if host is None:
        host = socket.gethostname()
    if not host:
        raise InvalidError("a host has a name of one character at least")
    names_of = tuple(bitmaps)
    found = {path for name in names for path in _paths(absolute(name), os.fsdecode(name))}
    paths = sorted(found, key=os.fsencode)
    return once([Target(path, host, names_of, force_share) for path in paths])


def listed(
    path: str | os.PathLike[str], *, bitmaps: Iterable[str] = (), force_share: bool = False
) -> list[Target]:
    """The targets of a list: CSV with the columns ``host`` and ``path``, and any others.

    Names with commas, quotes or newlines are quoted as CSV has it; bytes that are no UTF-8 are
    taken as they are. Relative paths start at the folder that the list is in. Each path is one
    target, never a folder or a glob. What a host has twice is meant once, however many links lead
    to it, by the path that is the least deep.

    :raises InvalidError: for a list without these columns, or a row without one of them
    :raises OSError: if it cannot be read

    >>> with open("disks.csv", "w") as file:
    ...     print("host,path", "h1,vm1.bitmaps", sep="\\n", file=file)
    >>> [(os.path.basename(target.path), target.host) for target in listed("disks.csv")]
    [('vm1.bitmaps', 'h1')]
    """
    folder = os.path.dirname(os.path.abspath(os.fsdecode(path)))
    names_of = tuple(bitmaps)
    return once(
        [
            Target(absolute(os.path.join(folder, row["path"])), row["host"], names_of, force_share)
            for _, row in rows_of(path, ("host", "path"))
        ]
    )


def once(targets: Sequence[Target]) -> list[Target]:
    """Of the targets of a host that are one file, that whose path is the least deep: of lists and
    folders together, for example. They keep their order.

    >>> targets = [*find(["."], host="h1"), *find(["vm1.bitmaps"], host="h1")]
    >>> len(targets), len(once(targets))
    (2, 1)
    """
    first: dict[object, Target] = {}
    for each in sorted(targets, key=lambda each: (each.path.count("/"), os.fsencode(each.path))):
        first.setdefault((each.host, _identity(each.path)), each)
    chosen = set(first.values())
    return [each for each in dict.fromkeys(targets) if each in chosen]


def rows_of(
    path: str | os.PathLike[str], columns: Sequence[str]
) -> Iterator[tuple[str, dict[str, str]]]:
    """Of a CSV file with a heading: where each row ends, for messages, and what is in it.

    :param columns: that have to be there, and to have something in them
    :raises InvalidError: if it is no such file
    :raises OSError: if it cannot be read
    """
    name = os.fspath(path)
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        try:
            if not set(columns) <= set(rows.fieldnames or []):
                raise InvalidError(
                    f"{name}: its first line is to name the columns: {','.join(columns)}"
                )
            for row in rows:
                where = f"{name}: line {rows.line_num}"
                for column in columns:
                    if not row[column]:
                        raise InvalidError(f"{where} has no {column}")
                yield where, row
        except csv.Error as error:
            raise InvalidError(f"{name}: line {rows.line_num}: {error}") from None


def _identity(path: str) -> object:
    """The same of all paths to one file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # nothing there, or no name that a file can have
        return path
    return status.st_dev, status.st_ino


def _paths(path: str, pattern: str) -> Iterator[str]:
    if not os.path.lexists(path) and glob.has_magic(pattern):
        try:
            matches = sorted(glob.glob(pattern, recursive=True))
        except RecursionError:
            raise InvalidError(f"'{pattern}': too deep for a glob; name the folder") from None
        if not matches:
            yield path
        for match in matches:
            yield from _paths(absolute(match), glob.escape(match))
    elif os.path.isdir(path) and not _is_target(path):
        yield from _walk(path)
    else:
        yield path


def _walk(folder: str) -> Iterator[str]:
    waiting = [folder]
    while waiting:
        where = waiting.pop()
        try:
            with os.scandir(where) as entries:
                found = [(each.path, each.is_dir(follow_symlinks=False)) for each in entries]
        except OSError:  # the scan says which
            yield where
            continue
        for path, is_folder in found:
            if _is_target(path):
                yield path
            elif is_folder:
                waiting.append(path)


def _is_target(path: str) -> bool:
    try:
        if os.path.isfile(os.path.join(path, MANIFEST)):
            return True
        return probe(path) is not None
    except UnsupportedError:  # an image, which the scan says of that it has no bitmaps
        return True
    except OSError:
        return _may_be_target(path)


def _may_be_target(path: str) -> bool:
    """What cannot be looked at may be one. Of a folder it is told when it is walked."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        return os.path.islink(path)  # which leads nowhere; else it was deleted just now
    except OSError:
        return True
