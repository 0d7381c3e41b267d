# SPDX-License-Identifier: MIT
"""After a crash of the system a bitmap is exact, or inconsistent, and changes are whole.

What a process did to the files of a LocalStore was logged (local_crash.py). The model of a disk: a
sync of a file makes its content durable, a sync of a directory its names; of what came since, any
subset may have arrived, in sectors of 512 bytes. For every point of the log such disks are made,
and opened by a system that was started anew.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

import preload
import pytest

from pybitmap import InvalidError, StoreError
from pybitmap.store import LocalStore, Purpose, Wanted, local
from pybitmap.store.base import Switches

SECTOR = 512
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "")
#: Random disks for each point of the log, besides none and all of what is not synced; and of how
#: many points one is looked at.
DISKS, EVERY = {"ci": (2, 1), "long": (40, 1)}.get(PROFILE, (1, 3))

State = dict[str, Any]
Pick = Callable[[], bool]


@dataclass
class File:
    durable: bytes = b""
    #: Since the last sync: (offset, data), or (new length, None).
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)

    def now(self, pick: Pick = lambda: True) -> bytes:
        data = bytearray(self.durable)
        for offset, new in self.pending:
            if new is not None:
                for at in range(0, len(new), SECTOR):
                    if pick():
                        end = offset + at + len(new[at : at + SECTOR])
                        data.extend(bytes(max(0, end - len(data))))
                        data[offset + at : end] = new[at : at + SECTOR]
            elif pick():
                data = data[:offset].ljust(offset, b"\0")
        return bytes(data)


@dataclass
class Disk:
    files: list[File] = field(default_factory=list)
    #: Which file has which name: for certain, and what has changed since.
    durable: dict[str, int | None] = field(default_factory=dict)
    pending: list[tuple[str, int | None]] = field(default_factory=list)  # None: it goes

    def names(self, pick: Pick = lambda: True) -> dict[str, int]:
        names = dict(self.durable)
        names.update((name, number) for name, number in self.pending if pick())
        return {name: number for name, number in names.items() if number is not None}

    def take(self, kind: str, name: str, number: int, data: bytes | None) -> None:
        if kind in ("create", "mkdir"):
            self.files.append(File())
            self.pending.append((name, len(self.files) - 1))
        elif kind == "unlink":
            self.pending.append((name, None))
        elif kind == "sync" and name in (".", "store"):
            inside = [change for change in self.pending if ("/" in change[0]) == (name != ".")]
            self.durable.update(inside)
            self.pending = [change for change in self.pending if change not in inside]
        else:
            file = self.files[self.names()[name]]
            if kind == "sync":
                file.durable, file.pending = file.now() if data is None else data, []
            elif kind == "write":
                file.pending.append((number, data))
            elif kind == "truncate" or len(file.now()) < number:  # or allocate
                file.pending.append((number, None))

    def write(self, folder: Path, pick: Pick) -> None:
        shutil.rmtree(folder / "store", ignore_errors=True)
        names = self.names(pick)
        if "store" in names:
            (folder / "store").mkdir()
            for name, number in names.items():
                if name != "store":
                    (folder / name).write_bytes(self.files[number].now(pick))


def records(log: bytes) -> Iterator[tuple[str, str, int, bytes | None]]:
    at = 0
    while at < len(log):
        end = log.index(b"\n", at)
        kind, name, number, nbytes = log[at:end].decode().split(" ")
        at = end + 1 + int(nbytes)
        yield kind, name, int(number), log[end + 1 : at] if int(nbytes) else None


def found(path: Path) -> State:
    """What a program finds that opens the store: as the notes have it."""
    state: State = {}
    if not path.exists():
        return state
    store = LocalStore(path)
    for node in ("one", "two"):
        try:
            volume = store.open(node, None, read_only=False)
        except InvalidError:  # the store does not know its size
            continue
        bitmaps: dict[str, Any] = {}
        for each in volume.load():
            bitmaps[each.name] = None
            if each.content is None:
                assert each.reason
            else:
                assert each.reason is None
                bitmaps[each.name] = [list(area) for area in each.content.areas()]
                each.content.set(0)
        state[node] = [volume.size, bitmaps]
        # And it goes on with it.
        volume.make(4096).set(0)
        Switches({volume: Wanted(volume.size, [])}, Purpose.CLOSE).switch()
        volume.close()
    return state


def fits(state: State, node: str, wanted: State) -> bool:
    """A node that was never stored has nothing, whatever its size."""
    have, want = state.get(node), wanted.get(node)
    if have is None or want is None:
        return not (have or [0, {}])[1] and not (want or [0, {}])[1]
    return bool(have == want) or (not want[1] and not have[1])


def check(state: State, before: State, after: State, whole: bool) -> None:
    for node in ("one", "two"):
        assert fits(state, node, before) or fits(state, node, after), (state, before, after)
    if whole:
        assert any(
            all(fits(state, node, each) for node in ("one", "two")) for each in (before, after)
        )


@pytest.fixture
def log(tmp_path: Path) -> list[tuple[str, str, int, bytes | None]]:
    library = preload.build(tmp_path)
    with preload.memory_folder(tmp_path) as folder:
        preload.run(library, "local_crash.py", folder, tmp_path / "log")
    return list(records((tmp_path / "log").read_bytes()))


def test_a_crash_at_any_point_leaves_nothing_silently_wrong(
    log: list[tuple[str, str, int, bytes | None]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local, "_boot", lambda: "another-boot")
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    disk, before = Disk(), {}
    notes = [json.loads(data) for kind, _, _, data in log if kind == "note" and data]
    upcoming = iter(notes)
    note = next(upcoming)
    ndisks = 0
    with preload.memory_folder(tmp_path) as folder:
        for i, (kind, name, number, data) in enumerate(log):
            if kind == "note":
                before, note = note["state"], next(upcoming, note)
                continue
            disk.take(kind, name, number, data)
            if i % EVERY != rng.randrange(EVERY):
                continue
            shares = [0.0, 1.0, *(rng.choice([0.1, 0.5, 0.9]) for _ in range(DISKS))]
            for share in shares:
                disk.write(folder, lambda: rng.random() < share)  # noqa: B023
                ndisks += 1
                try:
                    check(found(folder / "store"), before, note["state"], note["whole"])
                except (AssertionError, StoreError) as error:
                    error.args = (
                        f"seed {seed}, record {i} ({kind} {name}) of step '{note['step']}', "
                        f"{share:.0%} of what was not synced: {error}",
                    )
                    raise
    print(f"{len(log)} records, {ndisks} disks")
    assert ndisks > 100
