# SPDX-License-Identifier: MIT
"""Runs the scripts of this folder: they import what is here and in `tests/support`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def environment(preloaded: Path | None = None) -> dict[str, str]:
    known = os.environ.get("PYTHONPATH", "")
    paths = [*filter(None, known.split(os.pathsep)), str(FOLDER.parent / "support")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if preloaded is not None:
        env["LD_PRELOAD"] = str(preloaded)
    return env


def run(script: str, *arguments: object, preloaded: Path | None = None) -> str:
    """What it prints."""
    done = subprocess.run(
        [sys.executable, str(FOLDER / script), *map(str, arguments)],
        env=environment(preloaded),
        capture_output=True,
        text=True,
        cwd=FOLDER,
        check=False,
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout}{done.stderr}"
    return done.stdout
