# SPDX-License-Identifier: MIT
"""The example of the how-to page about snapshots of RAM does what the page says."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
from tracked import need_tracker

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "ram_snapshots.py"


@pytest.fixture(autouse=True)
def tracking() -> None:
    need_tracker()


@pytest.fixture
def example() -> ModuleType:
    spec = spec_from_file_location("ram_snapshots", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_snapshot_is_restored_as_it_was(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLE, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    sizes = [int(size) for size in re.findall(r"increment \d: (\d+) KiB", done.stdout)]
    assert len(sizes) == 3
    assert max(sizes) <= (8 << 10) + 16  # an eighth of the RAM
    assert done.stdout.count("equal") == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000", "0001", "0002", "0003"]


def test_what_could_not_be_written_is_in_the_next_increment(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = example.Machine(seed=1)
    recorder = example.Recorder(tmp_path, machine)
    try:
        machine.ram[5000] = 1
        with monkeypatch.context() as patch:
            patch.setattr(example.os, "replace", no_space)
            with pytest.raises(OSError, match="no space"):
                recorder.increment()
        machine.ram[90_000] = 2
        number, _ = recorder.increment()
        with example.restored(tmp_path, number) as ram:
            assert (ram[5000], ram[90_000]) == (1, 2)
    finally:
        recorder.close()


def no_space(*_: object) -> None:
    raise OSError("no space")
