# SPDX-License-Identifier: MIT
"""kill -9 at any time loses no mark in silence, and leaves no change half done.

In a LocalStore no bitmap is inconsistent then; in images those that were open are.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import preload
import pytest
from peers import peer

ROUNDS = {"ci": 200, "long": 5000}.get(os.environ.get("HYPOTHESIS_PROFILE", ""), 40)


@pytest.mark.parametrize("kind", ["local", "qcow2"])
def test_a_killed_process_leaves_every_mark_and_whole_changes(tmp_path: Path, kind: str) -> None:
    seed = random.randrange(2**32)
    script = Path(__file__).parents[1] / "support" / "store_kill.py"
    if kind == "qcow2":
        peer("qemu-img", "qemu-utils")
    with preload.memory_folder(tmp_path) as folder:
        done = subprocess.run(
            [sys.executable, str(script), kind, str(folder / "places"), str(ROUNDS), str(seed)],
            capture_output=True,
            text=True,
            cwd=script.parent,
            check=False,
        )
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    print(done.stdout)
    assert ": not yet" in done.stdout  # changes were cut off
    assert " 0 bitmaps exact" not in done.stdout
