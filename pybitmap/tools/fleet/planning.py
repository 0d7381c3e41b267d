# SPDX-License-Identifier: MIT
"""Questions to the tables of a fleet: SQL in files, which a user can copy and change.

A query is a file ``NAME.sql`` in a folder; ``common.sql`` there is read before it, and where there
is none, ours is. The answer is that of its last statement. It says in comments at its head what it
asks. Whoever hands over queries can do with them what SQL can do as this user.

Visitors. Writer, twin: a query sees the tables of one scan, whole, and these are not deleted
meanwhile. Kill, drop, Ctrl-C: nothing is written. Fork: not in the child of one that is in a query.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Union

from ...errors import InvalidError, NotFoundError, StoreError
from ...sizes import parse_size
from ...store.files import reported
from .finding import rows_of
from .folder import reading
from .rows import text_of
from .tables import connected, lay_open, translated

#: What variables of queries can be.
Value = Union[str, int, float, None]

_OURS = Path(__file__).with_name("queries")
_COMMON = "common"
_VARIABLE = re.compile(r"getvariable\(\s*'([^']+)'\s*\)", re.IGNORECASE)


@dataclass(frozen=True)
class Query:
    """A question that can be asked.

    :param about: what it asks, the first line of its comments
    :param variables: that it looks at, and those that common.sql does

    >>> query = queries()["order"]
    >>> query.name, query.path.name, "window" in query.variables
    ('order', 'order.sql', True)
    >>> len(query.about) > 0, "SELECT" in query.text.upper()
    (True, True)
    """

    name: str
    path: Path
    about: str
    variables: frozenset[str]

    @property
    def text(self) -> str:
        """The SQL.

        :raises StoreError: if it cannot be read
        """
        return _read(self.path)


@dataclass(frozen=True)
class Answer:
    """A table.

    :param columns: their names, another each: what a query calls `a` a second time is `a_1`
    :param rows: a tuple of values each

    >>> answer = plan("tonight", "states")
    >>> answer.columns[:3], [row[:3] for row in answer.rows]
    (['state', 'count', 'dirty_bytes'], [('ready', 1, 65536)])
    >>> [row["state"] for row in answer]
    ['ready']
    """

    columns: Sequence[str]
    rows: Sequence[tuple[Any, ...]]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rows, as a dict each."""
        return (dict(zip(self.columns, row)) for row in self.rows)


def queries(folder: str | os.PathLike[str] | None = None) -> dict[str, Query]:
    """Those of a folder, by name; None: ours.

    :raises StoreError: if it cannot be read

    >>> sorted(queries())
    ['chains', 'full', 'granularity', 'hottest', 'links', 'order', 'states']
    """
    where = _OURS if folder is None else Path(folder)
    with reported(f"cannot read '{where}'"):
        paths = sorted(path for path in where.iterdir() if path.suffix == ".sql")
    common = _variables(_common(where))
    found = {}
    for path in paths:
        if path.stem != _COMMON:
            text = _read(path)
            found[path.stem] = Query(path.stem, path, _about(text), _variables(text) | common)
    return found


def plan(
    folder: str | os.PathLike[str],
    query: str,
    *,
    queries: str | os.PathLike[str] | None = None,
    links: str | os.PathLike[str] | None = None,
    **variables: Value,
) -> Answer:
    """Ask the tables of a folder.

    :param query: the name of one
    :param queries: the folder that it is in; None: ours
    :param links: a list of which host sends over which link: CSV with the columns ``host``,
        ``link`` and ``bandwidth``, in bytes a second, with units as other sizes; a host that is not
        in it has a link of its own
    :param variables: for queries, by name: ``bandwidth`` (bytes a second of a link that is not
        listed), ``window`` (seconds), ``bitmap`` (its name, as it is on the disk), and what the
        query says
    :raises NotFoundError: if there are no tables, or no such query
    :raises InvalidError: for a variable that the query does not look at, a bandwidth or a window
        that is none, or a list of links that is none
    :raises StoreError: if the tables cannot be read, or the query is none

    A scan beside it: the answer is of the tables that counted at the begin, all of it. Nothing is
    changed, so a kill, Ctrl-C or a second one leaves nothing.

    >>> for row in plan("tonight", "order", window=8 * 3600):
    ...     print(row["link"], row["job"], row["nbytes"], row["fits"])
    h1 increment 65536 True
    """
    known = _queries(queries)
    if query not in known:
        there = ", ".join(known) or "none"
        raise NotFoundError(f"there is no query '{query}'; queries there: {there}")
    asked = known[query]
    for name in variables:
        if name not in asked.variables and name not in ("bandwidth", "window", "bitmap"):
            there = ", ".join(sorted(asked.variables))
            raise InvalidError(f"query '{query}' looks at no variable '{name}'; at these: {there}")
    values = {name: _checked(name, value) for name, value in variables.items()}
    routes = [] if links is None else _links(links)
    with ExitStack() as stack:
        tables = stack.enter_context(reading(folder))
        spill = stack.enter_context(TemporaryDirectory(prefix="pybitmap-plan-"))
        stack.enter_context(translated(f"query '{query}'"))
        db = connected(Path(spill))
        try:
            lay_open(db, tables)
            db.execute("CREATE TABLE links (host VARCHAR, link VARCHAR, bandwidth BIGINT)")
            if routes:
                db.executemany("INSERT INTO links VALUES (?, ?, ?)", routes)
            for name, value in values.items():
                db.execute(f'SET VARIABLE "{name}" = ?', [value])
            db.execute(_common(asked.path.parent))
            answer = db.execute(asked.text)
            # A text without a statement has no answer at all.
            description = getattr(answer, "description", None)
            if description is None:
                raise InvalidError(f"'{asked.path}' asks nothing: its last statement is no SELECT")
            return Answer(_distinct(each[0] for each in description), answer.fetchall())
        finally:
            db.close()


def _checked(name: str, value: Value) -> Value:
    if value is None:
        return None
    if name == "bitmap":
        return text_of(str(value))  # as the tables have it
    number = None if isinstance(value, str) else value
    if name in ("bandwidth", "window") and not 0 < (number or 0) < math.inf:
        raise InvalidError(f"{name} is {value!r}, and has to be a number above 0")
    return value


def _distinct(names: Iterable[str]) -> list[str]:
    """As DuckDB names the columns of a table that it makes."""
    found: dict[str, None] = {}
    for name in names:
        number = 0
        unique = name
        while unique in found:
            number += 1
            unique = f"{name}_{number}"
        found[unique] = None
    return list(found)


_queries = queries  # of which `plan` has an argument


def _common(folder: Path) -> str:
    path = folder / f"{_COMMON}.sql"
    return _read(path if path.exists() else _OURS / path.name)


def _read(path: Path) -> str:
    with reported(f"cannot read '{path}'"):
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise StoreError(f"cannot read '{path}': it is no UTF-8 ({error.reason})") from None


def _variables(text: str) -> frozenset[str]:
    return frozenset(_VARIABLE.findall(text))


def _about(text: str) -> str:
    for line in text.splitlines():
        words = line.lstrip("- ").strip()
        if not line.startswith("--"):
            break
        if words and not words.startswith("SPDX-"):
            return words
    return ""


def _links(path: str | os.PathLike[str]) -> list[tuple[str, str, int]]:
    found: dict[str, tuple[str, str, int]] = {}
    bandwidths: dict[str, int] = {}
    for where, row in rows_of(path, ("host", "link", "bandwidth")):
        host, link = text_of(row["host"]), text_of(row["link"])
        try:
            bandwidth = parse_size(row["bandwidth"])
        except ValueError as error:
            raise InvalidError(f"{where}: bandwidth: {error}") from None
        if not bandwidth:
            raise InvalidError(f"{where}: over a link of 0 bytes a second nothing is sent")
        if host in found:
            raise InvalidError(f"{where}: host '{host}' is there twice")
        if bandwidths.setdefault(link, bandwidth) != bandwidth:
            raise InvalidError(f"{where}: link '{link}' has another bandwidth above")
        found[host] = (host, link, bandwidth)
    return list(found.values())
