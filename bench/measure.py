# SPDX-License-Identifier: MIT
"""How benchmarks are written and measured here.

A benchmark is a function with a question as its docstring; it makes what is to be compared and
returns a :class:`Work`: several ways to do the same. All ways of a question run in turn, round by
round, so what slows the machine down slows all of them; a ratio is the median of the ratios of the
rounds. Time is the thread's own, so what else runs here costs nothing but caches.

In a process with one thread some calls cost less; so NumPy is kept from making more of them, and
:func:`add_thread` makes one for those who want to know what the others pay.
"""

from __future__ import annotations

import json
import os
import statistics
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from time import thread_time_ns
from typing import Any, Callable, NamedTuple


class Goal(NamedTuple):
    """``way`` takes at most ``limit``: times what ``against`` takes, or ns."""

    way: str
    against: str | None
    limit: float


@dataclass
class Work:
    #: What ``units`` counts, and how many of them a run of each way does.
    unit: str
    units: int
    #: What is timed; with ``before``, called with what that returned.
    ways: dict[str, Callable[..., object]]
    goals: list[Goal] = field(default_factory=list)
    #: Not timed, before each run of a way.
    before: dict[str, Callable[[], object]] = field(default_factory=dict)
    #: What each run spends on the loop around the calls; it is subtracted.
    loop: Callable[[], object] | None = None


class Shape(NamedTuple):
    """What a benchmark is about: groups in all, and the share that is dirty at random."""

    groups: int
    density: float | None


class Benchmark(NamedTuple):
    name: str
    shape: Shape
    make: Callable[[Shape], Work]


BENCHMARKS: list[Benchmark] = []

#: Stands for the number of groups that the command line gives.
ANY_SIZE = 0


def benchmark(
    name: str, groups: int = ANY_SIZE, densities: tuple[float | None, ...] = (None,)
) -> Callable[[Callable[[Shape], Work]], Callable[[Shape], Work]]:
    """Adds the benchmark, once for each density."""

    def add(make: Callable[[Shape], Work]) -> Callable[[Shape], Work]:
        BENCHMARKS.extend(Benchmark(name, Shape(groups, density), make) for density in densities)
        return make

    return add


# ---- threads --------------------------------------------------------------------------------

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when NumPy is imported, see peer()


def add_thread() -> None:
    """Another thread, which waits until the program ends."""
    threading.Thread(target=threading.Event().wait, daemon=True).start()


# ---- peers ----------------------------------------------------------------------------------

missing: dict[str, str] = {}


def peer(name: str) -> Any:
    """The module, or None, and then :data:`missing` says why."""
    try:
        return import_module(name)
    except ImportError as error:
        missing[name] = str(error)
        return None


# ---- measuring ------------------------------------------------------------------------------


def _time(work: Work, way: str) -> float:
    call, before = work.ways[way], work.before.get(way)
    args = () if before is None else (before(),)
    begin = thread_time_ns()
    call(*args)
    return thread_time_ns() - begin


def _rounds(work: Work, rounds: int) -> dict[str, list[float]]:
    """ns per unit of each way, round by round."""
    times: dict[str, list[float]] = {way: [] for way in work.ways}
    for number in range(rounds + 1):
        loop = 0.0
        if work.loop is not None:
            begin = thread_time_ns()
            work.loop()
            loop = thread_time_ns() - begin
        # Another one first each time: what one leaves behind, in caches and of freed memory, is
        # there for the next.
        turn = number % len(work.ways)
        for way in [*work.ways][turn:] + [*work.ways][:turn]:
            spent = _time(work, way) - loop
            if number:  # the first round is for the caches
                times[way].append(max(spent, 1.0) / work.units)
    return times


def measure(
    groups: int, rounds: int, only: Iterable[str] = ("",), any_size_only: bool = False
) -> Iterator[dict[str, Any]]:
    """Each way of each benchmark, as what JSON takes."""
    beside = ", beside a thread" if threading.active_count() > 1 else ""
    for name, shape, make in BENCHMARKS:
        if not any(text in name for text in only) or (any_size_only and shape.groups != ANY_SIZE):
            continue
        shape = Shape(shape.groups or groups, shape.density)
        work = make(shape)
        times = _rounds(work, rounds)
        first = next(iter(times))
        for way, mine in times.items():
            goals = []
            for goal in work.goals:
                if goal.way != way or (goal.against is not None and goal.against not in times):
                    continue
                if goal.against is None:
                    value = statistics.median(mine)
                else:
                    value = _ratio(mine, times[goal.against])
                goals.append(
                    {
                        "against": goal.against,
                        "value": value,
                        "limit": goal.limit,
                        "met": value <= goal.limit,
                    }
                )
            yield {
                "name": name + beside,
                "question": make.__doc__,
                "way": way,
                "unit": work.unit,
                "groups": shape.groups,
                "density": shape.density,
                "ns": statistics.median(mine),
                "ratio": _ratio(mine, times[first]),
                "goals": goals,
            }


def _ratio(mine: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(mine, theirs))


# ---- printing -------------------------------------------------------------------------------


def size_name(groups: int) -> str:
    log = groups.bit_length() - 1
    return f"2^{log}" if groups == 1 << log else str(groups)


def shape_name(row: dict[str, Any]) -> str:
    density = "" if row["density"] is None else f", {100 * row['density']:g} % dirty"
    return f"{size_name(row['groups'])} groups{density}"


def goal_text(goal: dict[str, Any]) -> str:
    if goal["against"] is None:
        text = f"{goal['value']:.1f} ns, at most {goal['limit']:g}"
    else:
        text = f"{goal['value']:.2f} x {goal['against']}, at most {goal['limit']:g}"
    return text if goal["met"] else f"{text}: MISSED"


def print_rows(rows: Iterator[dict[str, Any]], as_json: bool) -> bool:
    """Were there any?"""
    last = None
    some = False
    for row in rows:
        some = True
        if as_json:
            print(json.dumps(row), flush=True)
            continue
        title = f"{row['name']} ({shape_name(row)}), ns per {row['unit']}"
        if title != last:
            print(f"\n{title}\n  {(row['question'] or '').strip().splitlines()[0]}")
            last = title
        goals = "; ".join(map(goal_text, row["goals"]))
        print(f"    {row['way']:28} {row['ns']:12.3f} {row['ratio']:8.2f} x  {goals}", flush=True)
    if not as_json:
        for name, why in missing.items():
            print(f"\nwithout {name}: {why}")
    return some
