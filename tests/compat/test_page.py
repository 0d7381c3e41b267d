# SPDX-License-Identifier: MIT
"""docs/compat.md: its examples, and that it counts what it lists."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

from pybitmap.compat import bits

PAGE = Path(__file__).parents[2] / "docs" / "compat.md"


def test_the_examples_are_right() -> None:
    failed, tried = doctest.testfile(str(PAGE), module_relative=False)
    assert tried > 5
    assert not failed


def test_every_function_is_named() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert [name for name in bits.__all__ if f"{name}`" not in text] == []


def names_in(part: str) -> int:
    """How many tests it lists: in a row or a point, classes that stand before tests each have all
    of them."""
    number = 0
    for line in re.split(r"\n(?=[-|])", part):
        for clause in line.split(";"):
            listed = re.findall(r"`([A-Z]\w+)?\.?(test_\w+)?`", clause.split(" | ")[0])
            classes = sum(1 for cls, test in listed if cls and not test)
            tests = sum(1 for _, test in listed if test)
            number += max(1, classes) * tests
    return number


def test_as_many_failures_are_listed_as_are_counted() -> None:
    text = PAGE.read_text(encoding="utf-8")
    counted = {
        suite: int(of) - int(passed)
        for suite, passed, of in re.findall(
            r"^\| (pyroaring, 32|bitarray\.util|bitarray|CPython).* \| (\d+) \| (\d+)", text, re.M
        )
    }
    _, roaring, bitarray, of_set = re.split(r"^### .*\n", text, flags=re.M)
    listed = [names_in(part.split("Not run")[0]) for part in (roaring, bitarray, of_set)]
    # Of the 64 bits one more is listed than of the 32.
    expected = [
        counted["pyroaring, 32"] + 1,
        counted["bitarray"] + counted["bitarray.util"],
        counted["CPython"],
    ]
    assert listed == expected
