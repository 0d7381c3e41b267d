# SPDX-License-Identifier: MIT
"""`pybitmap backup`: how disks are named, what is told, what a signal leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from backing_up import M, Raw, new_image, nothing_left, of, settled
from commands import Run, heed_signals
from machines import Machine, content, write
from peers import package, peer

click = pytest.importorskip("click", reason="the command line is an extra: pip install '.[cli]'")

from pybitmap.cli.backup_run import source_of  # noqa: E402
from pybitmap.tools.backup import Source, backup  # noqa: E402
from pybitmap.tools.backup.jobs import Task, finish  # noqa: E402
from pybitmap.tools.monitor import Monitor  # noqa: E402

package("qemu.qmp")
peer("qemu-storage-daemon", "qemu-system-common")


@pytest.fixture
def folder(memory_path: Path) -> Path:
    return memory_path


@pytest.fixture
def machine(folder: Path) -> Iterator[Machine]:
    with Machine({"a": new_image(folder, "a"), "b": new_image(folder, "b")}) as made:
        yield made


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("vda", Source("vda")),
        ("#block123", Source("#block123")),
        ("sda=#block123", Source("#block123", "sda")),
        ("d=/x/y.raw,store=/s", Source("/x/y.raw", "d", "/s")),
        ("/x/y.raw,store=/s,node=a,b", Source("/x/y.raw", "", "/s", "a,b")),
        ("/x/a=b.qcow2", Source("/x/a=b.qcow2")),
        ("y.raw,store=s=t", Source("y.raw", "", "s=t")),
    ],
)
def test_a_source_is_read_as_it_is_meant(text: str, source: Source) -> None:
    assert source_of(text) == source


@pytest.mark.parametrize("text", ["", "a=", ",store=x", "x,store=", "x,store=y,node="])
def test_what_names_no_disk_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        source_of(text)


def test_what_is_there_is_a_place_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("x=y", "x,store=y"):
        Path(name).touch()
        assert source_of(name) == Source(name)
        assert source_of(f"d={name}") == Source(name, "d")


def test_it_says_what_it_has_copied_and_why_in_full(
    run: Run, machine: Machine, folder: Path
) -> None:
    to = folder / "to"
    words = ["backup", "a", "two=b", "--qmp", machine.qmp, "--to", to]
    first = run(*words)
    assert (first.code, first.out) == (0, "")
    assert "a: 0 B" not in first.err
    assert "full: there is no copy of it yet" in first.err
    second = run(*words, "--json", "--speed", "1G", "-g", "4K")
    assert second.code == 0
    told = json.loads(second.out)
    assert [each["disk"] for each in told["copies"]] == ["a", "two"]
    assert all(each["parent"] and not each["reason"] for each in told["copies"])
    assert (told["failed"], told["notes"]) == ({}, [])
    assert machine.bitmaps("a")[told["copies"][0]["bitmap"]]["granularity"] == 4096
    assert run(*words, "-q").err == ""
    assert "backup: instant" in run(*words, "-v").err


def test_what_it_made_is_verified_and_restored_by_the_other_commands(
    run: Run, folder: Path
) -> None:
    a, raw, to = new_image(folder, "a"), Raw(folder, "r"), folder / "to"
    for number in range(3):
        write(a, f"write -P {number + 1} {number}M 100k", format="qcow2")
        raw.write(number + 1, number * M, 1000)
        words = ["backup", a, f"r={raw.path},store={raw.store},node=vm", "--to", to]
        assert run(*words).code == 0
    assert run("verify", to, "--full").code == 0
    assert run("restore", to, "--disk", "a.qcow2", "--to", folder / "out").code == 0
    assert (folder / "out").read_bytes() == content(a)
    assert run("prune", to, "--keep", "1").code == 0
    assert run("restore", to, "--disk", "r", "--to", folder / "out2").code == 0
    assert (folder / "out2").read_bytes() == raw.path.read_bytes()
    write(a, "write -P 9 0 1M", format="qcow2")
    told = json.loads(run("backup", a, "--to", to, "--incremental", "--json").out)
    assert content(to / told["copies"][0]["file"]) == content(a)


def test_what_is_not_done_is_exit_code_1_and_says_why(
    run: Run, machine: Machine, folder: Path
) -> None:
    to = folder / "to"
    refused: list[tuple[list[str | Path], str]] = [
        (["a", "--incremental", "--qmp", machine.qmp], "in full: there is no copy"),
        (["c", "--qmp", machine.qmp], "no disk 'c'"),
        ([folder / "a.qcow2"], "--qmp"),
        ([folder / "a.qcow2", "--qmp", machine.qmp], "no instant in common"),
        (["a", "--qmp", folder / "none"], "none"),
        ([folder / "missing"], "No such file"),
    ]
    for words, why in refused:
        result = run("backup", *words, "--to", to)
        assert (result.code, result.out) == (1, ""), words
        assert why in result.err
    assert run("backup", "--to", to).code == 2


@pytest.mark.parametrize(
    ("live", "number"),
    [(True, signal.SIGTERM), (False, signal.SIGINT), (False, signal.SIGHUP)],
)
def test_a_signal_puts_all_back(folder: Path, number: int, live: bool) -> None:
    to, path = folder / "to", new_image(folder, "a", 16 * M)
    write(path, "write -P 1 0 16M", format="qcow2")
    with Machine({"a": path}) as machine:
        if not live:
            machine.stop()
        words = ["a", "--qmp", str(machine.qmp)] if live else [str(path)]
        first = backup([words[0]], to, qmp=machine.qmp if live else None)
        assert first.failed == {}
        command = ["backup", *words, "--full", "-v", "--speed", "1M", "--to", str(to)]
        process = subprocess.Popen(
            [sys.executable, "-m", "pybitmap", *command],
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=heed_signals,
        )
        assert process.stderr is not None
        for line in process.stderr:
            if "Copying a" in line:
                break
        os.kill(process.pid, number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130, said
        nothing_left(to, 1)
        if live:
            settled(machine, first, "a")
        else:
            machine.start()
        machine.write("a", "write -P 2 0 64k")
        done = backup(["a" if live else Source("a", "a.qcow2")], to, qmp=machine.qmp)
        [copy] = done.point.copies
        assert copy.parent == first.point.id
        assert content(to / copy.file) == of(machine, "a")


def test_a_guest_that_cannot_be_frozen_is_not_backed_up(
    run: Run, machine: Machine, folder: Path
) -> None:
    to = folder / "to"
    words = ["backup", "a", "--qmp", machine.qmp, "--to", to]
    result = run(*words, "--freeze", folder / "none")
    assert result.code == 1
    assert "none" in result.err
    assert machine.bitmaps("a") == {}
    assert machine.jobs() == []
    nothing_left(to, 0)


def test_a_disk_that_is_left_out_is_exit_code_1_and_the_others_are_listed(
    run: Run, machine: Machine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.write("a", "write -P 1 0 1M")

    def failing(monitor: Monitor, task: Task) -> str | None:
        return "it is worn out" if task.plan.disk.name == "a" else finish(monitor, task)

    monkeypatch.setattr("pybitmap.tools.backup.run.finish", failing)
    result = run("backup", "a", "b", "--qmp", machine.qmp, "--to", folder / "to", "--json")
    assert result.code == 1
    assert "disk 'a' was left out: it is worn out" in result.err
    told = json.loads(result.out)
    assert told["failed"] == {"a": "it is worn out"}
    assert [each["disk"] for each in told["copies"]] == ["b"]
    assert machine.bitmaps("a") == {}
    assert machine.jobs() == []
