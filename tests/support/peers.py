# SPDX-License-Identifier: MIT
"""Programs that tests compare with: used where they are, skipped by name where they are not."""

from __future__ import annotations

import os
import shutil
from importlib import import_module
from typing import Any, NoReturn

import pytest


def peer(name: str, package: str) -> str:
    """The path of a program.  Missing, it skips the test; or fails it, if PYBITMAP_REQUIRE_PEERS=1.

    package: the Debian package that has it.
    """
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if path is None:
        missing(f"{name} is not installed (Debian package {package})")
    return path


def missing(reason: str) -> NoReturn:
    """Skip the test, or fail it if PYBITMAP_REQUIRE_PEERS=1, for what could be installed."""
    if os.environ.get("PYBITMAP_REQUIRE_PEERS") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def package(name: str) -> Any:
    """A module from the package index, of the test extra; skips or fails likewise."""
    try:
        return import_module(name)
    except ImportError:
        missing(f"{name} is not installed: pip install '.[test]'")


def lacking(reason: str) -> NoReturn:
    """Skip for what no package brings: a kernel's feature, hardware, rights. CI repeats these at
    its end.
    """
    pytest.skip(f"NOT TESTED HERE: {reason}")
