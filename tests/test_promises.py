# SPDX-License-Identifier: MIT
"""Every test that docs/promises.md names is there."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "promises.md"


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`([a-z0-9_/]+\.py)(?:::(\w+))?`", PAGE.read_text(encoding="utf-8"))
    assert len(named) > 30
    for file, test in named:
        assert f"def {test}(" in (TESTS / file).read_text(encoding="utf-8") or not test, test


def test_every_row_names_one() -> None:
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("| ") and not line.startswith("| visitor"):
            assert re.search(r"`[a-z0-9_/]+\.py(::\w+)?`", line), line
