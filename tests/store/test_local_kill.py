# SPDX-License-Identifier: MIT
"""kill -9 at any time loses no mark, leaves no bitmap inconsistent and no change half done."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

ROUNDS = {"ci": 200, "long": 5000}.get(os.environ.get("HYPOTHESIS_PROFILE", ""), 40)


def test_a_killed_process_leaves_every_mark_and_whole_changes(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    script = Path(__file__).parents[1] / "support" / "local_kill.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "store"), str(ROUNDS), str(seed)],
        capture_output=True,
        text=True,
        cwd=script.parent,
        check=False,
    )
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    print(done.stdout)
    assert ": not yet" in done.stdout  # changes were cut off
