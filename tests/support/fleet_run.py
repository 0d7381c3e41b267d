# SPDX-License-Identifier: MIT
"""A scan in a process of its own, to be killed: ``fleet_run.py FOLDER NOTES COUNT``.

It prints ``done N`` whenever a result is kept. Readers write their process's number to NOTES, and
the one of the target ``hang`` never comes back. Readers that die stand here, too: what unpickles
them has to be able to import this.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from concurrent.futures import Executor, Future
from functools import partial
from pathlib import Path
from typing import Any, Callable

from fleets import made

from pybitmap.tools import fleet
from pybitmap.tools.fleet import Result, Target


def named(*names: str) -> list[Target]:
    """Targets of a fleet that is made up; of these names, which mean something to readers here."""
    return [Target(f"/made/sparse/1/{number}", name) for number, name in enumerate(names)]


def noting(notes: Path, target: Target) -> Result:
    """A reader that leaves its number, and hangs at the target `hang`."""
    (notes / str(os.getpid())).touch()
    while target.host == "hang":
        time.sleep(60)
    return made(target)


def dying(notes: Path, target: Target) -> Result:
    """A reader whose process dies: at the target `once` the first time, at `always` each time."""
    with open(notes / f"{target.host}-{target.path.rpartition('/')[2]}", "a") as note:
        note.write(f"{os.getpid()}\n")
    mark = notes / "died"
    if target.host == "always" or (target.host == "once" and not mark.exists()):
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return made(target)


class AtOnce(Executor):
    """Runs tasks when they are submitted, and knows how many that were."""

    def __init__(self) -> None:
        self.submitted = 0

    def submit(self, function: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        self.submitted += 1
        future: Future[Any] = Future()
        future.set_result(function(*args, **options))
        return future


def main(folder: str, notes: str, count: str) -> None:
    def progress(what: str, done: int, total: int | None) -> None:
        print("done", done, flush=True)

    targets = named(*["h"] * int(count), "hang", *["h"] * 5)
    fleet.scan(targets, folder, reader=partial(noting, Path(notes)), processes=2, progress=progress)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
