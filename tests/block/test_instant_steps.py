# SPDX-License-Identifier: MIT
"""Writes, faults and kills between any two lines of a commit: see instant_steps.py."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from instant_steps import play
from sequences import ROUNDS


@pytest.mark.parametrize("part", range(4))
def test_whatever_fails_each_write_is_on_one_side_of_an_instant(part: int) -> None:
    first = random.randrange(2**32)
    looks = Counter[str]()
    for seed in range(first, first + 7 * ROUNDS):
        wrong, found = play(seed)
        assert wrong is None, wrong
        looks += found
    assert looks["done in a store"], "no kill beside a transaction"
