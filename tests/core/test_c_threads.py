# SPDX-License-Identifier: MIT
"""The C core's promises to threads, tested from C: short rounds of test_threads, test_tracker.

`make asan` and `make tsan` run these under the sanitizers, with more rounds.
"""

from __future__ import annotations

import sys
from pathlib import Path

import preload
import pytest
from c_programs import build, run, succeed


@pytest.mark.parametrize(
    "flags", [[], ["-O3", "-DHB_MAP_MIN=1", "-DHB_GIVE_BACK_MIN=1"]], ids=["default", "given back"]
)
def test_threads_keep_the_promises(tmp_path: Path, flags: list[str]) -> None:
    output = succeed([build(tmp_path, "test_threads", *flags), "1", "1"])
    facts = ["hot", "once", "asked", "kept", "seek", "count", "growing", "paged", "live", "fork"]
    facts += ["mixed", "truncate"]
    for fact in facts:
        assert f"ok {fact}: " in output


def test_pages_are_left_alone_where_the_system_does_not_do_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither moved nor given back: a mark would be seen twice, or come back after a clear."""
    library = preload.build(tmp_path, "emulated")
    program = build(tmp_path, "test_threads")
    monkeypatch.setenv("LD_PRELOAD", str(library))
    for which in ["qemu", "old-qemu", "old-linux"]:
        monkeypatch.setenv("EMULATED", which)
        assert "ok paged" in succeed([program, "1", "1", "paged"]), which


def test_threads_that_are_held_up_halfway(tmp_path: Path) -> None:
    program = build(tmp_path, "test_threads", "-DHB_TEST_DELAY")
    assert "ok halfway" in succeed([program, "1", "1", "halfway"])
    assert "ok growing" in succeed([program, "1", "1", "growing"])
    assert "ok asked" in succeed([program, "1", "1", "asked"])


@pytest.mark.parametrize(
    ("step", "scenario", "noticed"),
    [
        ("NO_WAIT", "halfway", "test_threads.c:"),
        ("COUNTING", "growing", "were marked"),
        ("COUNT_WAIT", "growing", "were marked"),
        ("UNDISTURBED", "asked", "hbitmap_empty"),
    ],
)
def test_a_step_that_is_left_out_is_noticed(
    tmp_path: Path, step: str, scenario: str, noticed: str
) -> None:
    program = build(tmp_path, "test_threads", "-DHB_TEST_DELAY", f"-DHB_BREAK_{step}")
    done = run([program, "1", "3", scenario])
    assert done.returncode == 1, done.stdout + done.stderr
    assert noticed in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="threads are kept on a processor by Linux")
@pytest.mark.parametrize("flags", [[], ["-DHB_BREAK_NO_SLEEP"]], ids=["as it is", "broken"])
def test_a_wait_at_real_time_priority_lets_the_marker_have_the_processor(
    tmp_path: Path, flags: list[str]
) -> None:
    program = build(tmp_path, "test_priority", "-DHB_TEST_DELAY", *flags)
    for wait in ["clear", "publish"]:
        done = run([program, wait])
        if done.returncode == 77:
            pytest.skip(done.stdout.strip())
        assert done.returncode == (1 if flags else 0), done.stdout + done.stderr
        assert ("of the processor's time" in done.stderr) == bool(flags)


@pytest.mark.parametrize("step", ["KEEP_LOCKS", "UNFINISHED_MARKS"])
def test_a_fork_that_leaves_out_a_step_is_noticed(tmp_path: Path, step: str) -> None:
    flags = ["-DHB_TEST_DELAY", f"-DHB_BREAK_{step}", "-DCHILD_SECONDS=1"]
    program = build(tmp_path, "test_threads", *flags)
    done = run([program, "1", "1", "fork"])
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the child of fork" in done.stderr


def test_bitmaps_come_and_go_beside_writes(tmp_path: Path) -> None:
    output = succeed([build(tmp_path, "test_tracker"), "1", "5"])
    for scenario in ["writes", "facts", "late", "guests", "growth", "instant", "large", "rest"]:
        assert f"ok {scenario}: " in output


def test_writers_that_are_held_up_halfway(tmp_path: Path) -> None:
    program = build(tmp_path, "test_tracker", "-DHB_TEST_DELAY")
    for scenario in ["guests", "instant", "large", "rest"]:
        assert f"ok {scenario}: " in succeed([program, "1", "3", f"{scenario}: "])


@pytest.mark.parametrize("step", ["WAIT", "WAIT_FOR_FORK", "TURN"])
def test_a_publication_that_leaves_out_a_step_is_noticed(tmp_path: Path, step: str) -> None:
    program = build(tmp_path, "test_tracker", "-DHB_TEST_DELAY", f"-DHB_BREAK_NO_{step}")
    done = run([program, "1", "10", "instant"])
    assert done.returncode == 1, done.stdout + done.stderr
    assert "test_tracker.c:" in done.stderr
