# SPDX-License-Identifier: MIT
"""Names that say whose a thing is, and what of it may go."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pybitmap.tools.leftovers import Folder, is_left, new_name, sweep


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def of_another_process() -> str:
    code = "from pybitmap.tools.leftovers import new_name; print(new_name())"
    return subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()


def changed(name: str, field: int, value: str) -> str:
    fields = name.split("-")
    fields[field] = value
    return "-".join(fields)


def test_names_are_new_each_time() -> None:
    assert len({new_name() for _ in range(100)}) == 100


def test_what_a_process_has_left_is_known_when_it_has_ended() -> None:
    assert not is_left(new_name())
    name = of_another_process()
    assert is_left(name)
    assert not is_left(name + "x")
    assert not is_left("x" + name)
    assert not is_left("pybitmap-")


def test_a_child_that_nobody_has_waited_for_has_ended() -> None:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(write, new_name().encode())
        finally:
            os._exit(0)
    name = os.read(read, 1000).decode()
    try:
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        assert is_left(name)
    finally:
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="it is known on Linux alone")
def test_a_process_that_was_given_the_same_number_is_another_one() -> None:
    assert is_left(changed(new_name(), 5, "1"))


def test_of_what_cannot_be_known_nothing_is_left() -> None:
    name = of_another_process()
    assert not is_left(changed(name, 1, "0" * 8))  # another machine, or user
    assert not is_left(changed(name, 3, "1"))  # another container
    assert is_left(changed(new_name(), 2, "0" * 8))  # before the last start


def test_folders_go_with_their_process_and_no_others(folder: Path) -> None:
    mine, left = Folder(), folder / of_another_process()
    kept = [
        folder / changed(left.name, 1, "0" * 8),
        folder / "pybitmap-of-somebody",
        folder / "file",
    ]
    for each in [left, *kept[:2]]:
        (each / "inside").mkdir(parents=True)
    kept[2].write_text(left.name)
    outside = folder / "outside"
    outside.mkdir()
    (folder / f"{left.name}1").symlink_to(outside)
    (outside / "precious").write_text("")
    mine.make()
    assert not left.exists()
    assert all(each.exists() for each in [mine.path, *kept, outside / "precious"])
    assert mine.path.stat().st_mode & 0o777 == 0o700
    sweep()
    assert mine.path.exists()
    mine.remove()
    mine.remove()
    assert not mine.path.exists()


def test_a_folder_that_is_there_is_not_taken(folder: Path) -> None:
    mine = Folder()
    mine.path.symlink_to(folder)
    with pytest.raises(FileExistsError):
        mine.make()
