# SPDX-License-Identifier: MIT
"""Every call below LocalStores fails, or is not reached by a kill, during a transaction."""

from __future__ import annotations

import random
from pathlib import Path

import preload
import pytest
import scripts
from local_faults import MODES
from sequences import ROUNDS, build

#: With more rounds all of them.
SOME = [
    ("one", "io"),
    ("two", "io"),
    ("two", "full-from-then-on"),
    ("one", "short"),
    ("one", "kill"),
    ("two", "kill"),
]
ALL = [(setting, mode) for setting in ("one", "two") for mode in (*MODES, "kill")]


@pytest.mark.parametrize(("setting", "mode"), SOME if ROUNDS == 1 else ALL)
def test_a_fault_below_the_stores_leaves_each_write_on_its_side(
    tmp_path: Path, setting: str, mode: str
) -> None:
    library = preload.build(tmp_path)
    build(tmp_path)
    seeds = [random.randrange(2**32) for _ in range(ROUNDS)]
    with preload.memory_folder(tmp_path) as folder:
        writers = tmp_path / "writers.so"
        told = scripts.run(
            "instant_faults.py",
            *(library, writers, folder, setting, mode, *seeds),
            preloaded=library,
        )
    print(told)
