# SPDX-License-Identifier: MIT
"""What tests of several files are given.

How much Hypothesis tries: by default little, more with HYPOTHESIS_PROFILE=ci or =long.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import preload
import pytest
from commands import Complete, Result, Run
from hypothesis import HealthCheck, settings

# No deadline: no test here is about how long something takes.
settings.register_profile(
    "default",
    deadline=None,
    max_examples=40,
    stateful_step_count=25,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "ci",
    settings.get_profile("default"),
    max_examples=150,
    stateful_step_count=50,
    print_blob=True,
)
settings.register_profile("long", settings.get_profile("ci"), max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_finish() -> None:
    """What is there before the first test stays: collections need not look at it each time."""
    gc.collect()
    if hasattr(gc, "freeze"):  # not on PyPy
        gc.freeze()


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """As tmp_path, in memory where there is such a file system: for tests that store a lot, and for
    which it does not matter that a sync costs nothing there."""
    with preload.memory_folder(tmp_path) as folder:
        yield folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process; standard output is no terminal."""
    pytest.importorskip("click", reason="the command line is an extra: pip install '.[cli]'")
    from pybitmap.cli import main

    def run(*args: str | Path) -> Result:
        code = main([str(arg) for arg in args])
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def completed(monkeypatch: pytest.MonkeyPatch, run: Run) -> Complete:
    """What bash is given for the last word: ``type,value`` each. Nothing goes to stderr."""
    from pybitmap.cli import completion

    monkeypatch.setattr(completion, "PATIENCE", 600.0)  # it would end this process

    def completed(*words: str | Path) -> list[str]:
        with monkeypatch.context() as patch:
            patch.setenv("_PYBITMAP_COMPLETE", "bash_complete")
            patch.setenv("COMP_WORDS", " ".join(map(str, ["pybitmap", *words])))
            patch.setenv("COMP_CWORD", str(len(words)))
            result = run()
        assert result.err == ""
        return result.out.split()

    return completed
