# SPDX-License-Identifier: MIT
"""kill -9 in the midst of a transaction: all of it or nothing, with every write in its place."""

from __future__ import annotations

import random
from pathlib import Path

import preload
import pytest
import scripts
from instant_kill import SETTINGS
from sequences import ROUNDS, build


@pytest.mark.parametrize("name", SETTINGS)
def test_a_killed_transaction_is_done_or_not_at_one_instant(tmp_path: Path, name: str) -> None:
    build(tmp_path)
    seed = random.randrange(2**32)
    with preload.memory_folder(tmp_path) as folder:
        stores = folder / "stores"
        told = scripts.run(
            "instant_kill.py", tmp_path / "writers.so", stores, name, 80 * ROUNDS, seed
        )
    print(told)
    assert " done" in told
