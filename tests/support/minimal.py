# SPDX-License-Identifier: MIT
"""The oldest that pyproject.toml allows: ``minimal.py`` prints ``cffi==1.15`` and the like.

Of what builds the package, of what it needs, of the extras `cli` and `backup`, and of what the
tests of these need: arguments for pip, for `make test-minimal`. Runs on any Python, with nothing
installed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).parents[2]

#: By what is in front of their list. Of the extra `test` only what these tests import.
LISTS = ("requires = [", "dependencies = [", "cli = [", "backup = [", "test = [")
TESTS = {"pytest", "pytest-xdist", "hypothesis"}


def lowest(text: str) -> Iterator[str]:
    """The requirements of a pyproject.toml, each with its lower bound for its version.

    :raises ValueError: if one has no lower bound
    """
    for head in LISTS:
        (body,) = re.findall(rf"^{re.escape(head)}(.*?)\]$", text, re.MULTILINE | re.DOTALL)
        for requirement in re.findall(r'"([^"]*)"', body):
            name = re.split(r"[^\w.-]", requirement)[0]
            if head == LISTS[-1] and name not in TESTS:
                continue
            if name == "dirtybitmap":
                continue  # another extra
            bound = re.search(r">=([\d.]+)", requirement)
            if bound is None:
                raise ValueError(f"{requirement} has no lower bound")
            if "== 'PyPy'" not in requirement:
                yield f"{name}=={bound[1]}"


if __name__ == "__main__":
    print(*dict.fromkeys(lowest((PROJECT / "pyproject.toml").read_text())))
