# SPDX-License-Identifier: MIT
"""Random histories of a disk: each point restores exactly, or is named as broken.

More of them: PYBITMAP_CHAINS=1000.
"""

from __future__ import annotations

import hashlib
import os
import random
from contextlib import suppress
from pathlib import Path

import pytest
from images import MIB
from points import KIB, History, content, random_writes, root_by_the_book

from pybitmap import BitmapError
from pybitmap.tools.backup import Repository, points, prune, restore, verify

SIZES = [512, 64 * KIB, 100 * 512, 300 * 512, 3 * MIB, 3 * MIB + 512, 5 * MIB]
OPTIONS = ["", "cluster_size=512", "cluster_size=2M"]

CHAINS = int(os.environ.get("PYBITMAP_CHAINS", "4"))


def random_history(rng: random.Random, path: Path) -> History:
    history = History(path)
    size = rng.choice(SIZES)
    for _ in range(rng.randrange(2, 6)):
        commands = random_writes(rng, size, rng.randrange(0, 6))
        full = rng.random() < 0.1
        history.point(size, commands, full=full, options=rng.choice(OPTIONS))
        if rng.random() < 0.6:
            size = rng.choice(SIZES)
    return history


@pytest.mark.parametrize("seed", range(CHAINS))
def test_every_point_of_a_random_history_is_restored(memory_path: Path, seed: int) -> None:
    """Before and after some points are taken out; by qemu-img alone, too."""
    rng = random.Random(seed)
    history = random_history(rng, memory_path / "backups")
    target = memory_path / "restored"
    while True:
        for point in points(history.path):
            [copy] = point.copies
            data = history.contents[point.id]
            assert copy.root == root_by_the_book(data)
            assert content(history.path / copy.file) == data
        restore(history.path, to=target, at=rng.choice(points(history.path)).id, force=True)
        assert verify(history.path, full=True).good
        ids = [each.id for each in points(history.path)[:-1]]
        if not ids:
            break
        prune(history.path, points=rng.sample(ids, rng.randrange(1, len(ids) + 1)))


def damage(rng: random.Random, path: Path) -> None:
    data = path.read_bytes()
    kind = rng.randrange(4)
    if kind == 0:
        path.unlink()
    elif kind == 1:
        path.write_bytes(data[: rng.randrange(len(data))])
    else:
        place = rng.randrange(len(data)) if kind == 2 else rng.randrange(min(1024, len(data)))
        bit = 1 << rng.randrange(8)
        path.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])


@pytest.mark.parametrize("seed", range(CHAINS))
def test_no_damage_is_restored_in_silence(memory_path: Path, seed: int) -> None:
    """Of any file but the manifest: a point that verify calls good is restored exactly; one that it
    calls broken is restored exactly, or not at all. After a prune it is the same."""
    rng = random.Random(seed)
    base = random_history(rng, memory_path / "base")
    target = memory_path / "restored"
    files = sorted(each for each in base.path.iterdir() if ".qcow2" in each.name)
    for number in range(3):
        history = base.copy_to(memory_path / f"backups{number}")
        damage(rng, history.path / rng.choice(files).name)
        found = verify(history.path)
        assert not found.good
        for each in found.copies:
            try:
                restore(history.path, to=target, at=each.point.id, force=True)
            except BitmapError:
                assert each.problems, each
            else:
                assert target.read_bytes() == base.contents[each.point.id]
        with suppress(BitmapError):
            prune(history.path, keep=rng.randrange(1, len(found.copies) + 1))
        for each in verify(history.path, full=True).copies:
            data = base.contents[each.point.id]
            assert each.problems or each.sha256 == hashlib.sha256(data).hexdigest()
        assert Repository.open(history.path).leftovers() == []
