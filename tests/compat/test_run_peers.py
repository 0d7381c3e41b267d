# SPDX-License-Identifier: MIT
"""What run_peers.py prints of a suite, by small ones of our own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("run_peers.py")

ROARING = """
import pyroaring
def test_right():
    assert pyroaring.BitMap.__module__.startswith("pybitmap.")  # not the peer's own
class TestIt:
    def test_wrong(self):
        pyroaring.BitMap().no_such_thing()
"""
SET = """
import unittest
class TestIt(unittest.TestCase):
    def test_right(self):
        self.assertEqual(set("abca") & set("bcd"), {"b", "c"})
    def test_wrong(self):
        for part in range(2):
            with self.subTest(part=part):
                self.assertIs(type(set()), frozenset)
"""


def run_peers(suite: str, path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), suite, str(path)]
    # As in CI, where pytest would start others to run it, which import what is installed.
    several = {**os.environ, "PYTEST_ADDOPTS": "-n 1"}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, env=several
    )


@pytest.mark.parametrize(
    ("suite", "name", "text"), [("pyroaring", "test.py", ROARING), ("set", "test_set.py", SET)]
)
def test_the_share_and_every_failure_are_printed(
    suite: str, name: str, text: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    done = run_peers(suite, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == [
        "TestIt.test_wrong",
        f"{suite}: 1 of 2 passed, 0 skipped",
    ]


def test_a_suite_that_is_not_there_or_does_not_run_is_an_error(tmp_path: Path) -> None:
    done = run_peers("set", tmp_path)
    assert (done.returncode, "there is no" in done.stderr) == (2, True)
    (tmp_path / "test_set.py").write_text("")
    done = run_peers("set", tmp_path)
    assert (done.returncode, "no test of" in done.stderr) == (2, True)
