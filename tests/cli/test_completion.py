# SPDX-License-Identifier: MIT
"""What shells complete: as click has it, through the environment, and through bash itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import Complete, Run
from peers import peer

pytest.importorskip("click", reason="the command line is an extra: pip install '.[cli]'")
pytest.importorskip("rich", reason="the command line is an extra: pip install '.[cli]'")

from pybitmap import BlockGraph
from pybitmap.cli.completion import SHELLS
from pybitmap.cli.group import COMMANDS
from pybitmap.store import LocalStore, Qcow2Store


def install(command: Path) -> None:
    """The command, with more patience than a person has, for a machine that is busy."""
    patient = "import pybitmap.cli.completion as c; c.PATIENCE = 600.0"
    run = "from pybitmap.__main__ import main; raise SystemExit(main())"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{patient}; {run}" "$@"\n')
    command.chmod(0o755)


@pytest.fixture
def plain(completed: Complete) -> Complete:
    """The same of words that are no files."""

    def plain(*words: str | Path) -> list[str]:
        found = completed(*words)
        assert all(each.startswith("plain,") for each in found)
        return [each[len("plain,") :] for each in found]

    return plain


@pytest.fixture
def store(tmp_path: Path, run: Run) -> Path:
    path = tmp_path / "store"
    for name in ("vm0/daily", "vm0/weekly", "vm1/daily", "vm1/copying"):
        assert run("add", path, name, "--size", "1M").code == 0
    return path


@pytest.fixture
def image(tmp_path: Path, run: Run) -> Path:
    path = tmp_path / "disk.qcow2"
    command = [peer("qemu-img", "qemu-utils"), "create", "-q", "-f", "qcow2", str(path), "1M"]
    subprocess.run(command, check=True)
    for name in ("daily", "weekly", "two words", "$(touch x)", "a;b"):
        assert run("add", path, name).code == 0
    return path


def contents(path: Path) -> dict[Path, bytes]:
    files = [path] if path.is_file() else sorted(path.iterdir())
    return {file: file.read_bytes() for file in files}


def test_commands_options_and_choices(plain: Complete) -> None:
    assert plain("") == list(COMMANDS)
    assert plain("re") == ["remove", "resize", "repair", "rescue", "restore", "replay"]
    assert set(plain("dump", "x", "--f")) == {"--format", "--force-share"}
    assert plain("dump", "x", "--format", "") == ["json", "csv"]
    assert plain("completion", "") == list(SHELLS)


def test_a_target_is_a_file(completed: Complete) -> None:
    for words in (["info", ""], ["merge", "x", "y", "-b", ""], ["replay", "x", "--expect", ""]):
        assert completed(*words) == ["file,"] or [each[:4] for each in completed(*words)] == [
            "file"
        ]


def test_names_of_a_store(plain: Complete, store: Path) -> None:
    before = contents(store)
    everything = ["vm0/daily", "vm0/weekly", "vm1/daily", "vm1/copying"]
    assert sorted(plain("clear", store, "")) == sorted(everything)
    assert sorted(plain("clear", store, "vm0/daily", "vm0/")) == ["vm0/weekly"]
    assert plain("dump", store, "--node", "vm") == ["vm0", "vm1"]
    assert sorted(plain("remove", store, "--node", "vm1", "")) == ["copying", "daily"]
    assert plain("resize", store, "2M", "--node", "") == ["vm0", "vm1"]
    assert plain("put-back", store, "vm1/copying", "--into", "vm1/d") == ["vm1/daily"]
    assert contents(store) == before


def test_names_of_an_image_that_a_shell_takes_as_they_are(
    plain: Complete, image: Path, store: Path
) -> None:
    before = contents(image)
    assert sorted(plain("dump", image, "")) == ["daily", "weekly"]
    assert plain("merge", image, "weekly", "d") == ["daily"]
    assert plain("merge", image, "weekly", "-b", store, "vm1/c") == ["vm1/copying"]
    assert contents(image) == before


def test_what_is_in_use_is_read_all_the_same(plain: Complete, image: Path, store: Path) -> None:
    with BlockGraph() as graph:
        graph.add_node("vm0", store=LocalStore(store))
        graph.add_node("disk", store=Qcow2Store(image))
        before = contents(store), contents(image)
        assert plain("clear", store, "vm0/w") == ["vm0/weekly"]
        assert plain("clear", image, "w") == ["weekly"]
        assert (contents(store), contents(image)) == before


def test_what_is_broken_or_not_there_completes_to_nothing(
    completed: Complete, image: Path, store: Path, tmp_path: Path
) -> None:
    data = bytearray(image.read_bytes())
    data[100:4096] = b"\xff" * 3996
    image.write_bytes(data)
    (store / "catalog.sqlite").write_bytes(b"not a catalog")
    (store / "lock").unlink()
    pipe, blocked = tmp_path / "pipe", tmp_path / "blocked"
    os.mkfifo(pipe)
    blocked.mkdir()
    os.mkfifo(blocked / "catalog.sqlite")
    before = contents(store)
    for target in (image, store, pipe, blocked, tmp_path, tmp_path / "none", "/dev/zero"):
        assert completed("clear", target, "") == []
        assert completed("clear", target, "--node", "") == []
    assert contents(store) == before


def test_a_store_without_a_lock_file_is_not_given_one(plain: Complete, store: Path) -> None:
    (store / "lock").unlink()
    assert plain("clear", store, "vm0/w") == ["vm0/weekly"]
    assert not (store / "lock").exists()


@pytest.mark.parametrize("instruction", ["", "bash", "bash_other", "other_complete"])
def test_what_no_shell_asks_for_is_refused_in_silence(
    run: Run, monkeypatch: pytest.MonkeyPatch, instruction: str
) -> None:
    monkeypatch.setenv("_PYBITMAP_COMPLETE", instruction)
    assert run("info") == (1, "", "")


def test_what_waits_is_given_up() -> None:
    code = (
        "import pybitmap.cli.completion as module, time, sys;"
        "module._nodes = lambda path: time.sleep(1000);"
        "from pybitmap.__main__ import main; sys.exit(main())"
    )
    line = {"COMP_WORDS": "pybitmap clear x y", "COMP_CWORD": "3"}
    env = {**os.environ, **line, "_PYBITMAP_COMPLETE": "bash_complete"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_one_for_its_shell(run: Run, tmp_path: Path, shell: str) -> None:
    result = run("completion", shell)
    assert (result.code, result.err) == (0, "")
    assert "_PYBITMAP_COMPLETE" in result.out
    program = peer(shell, shell)
    script = tmp_path / "script"
    script.write_text(result.out)
    subprocess.run([program, "-n", script], check=True)


def test_bash_completes_a_line(run: Run, tmp_path: Path, store: Path) -> None:
    bash = peer("bash", "bash")
    script, bin = tmp_path / "script", tmp_path / "bin"
    script.write_text(run("completion", "bash").out)
    bin.mkdir()
    install(bin / "pybitmap")
    ask = (
        f"source {script}; COMP_WORDS=(pybitmap clear {store} vm1/); COMP_CWORD=3;"
        "_pybitmap_completion pybitmap vm1/; printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    env = {**os.environ, "PATH": f"{bin}:{os.environ['PATH']}"}
    done = subprocess.run([bash, "-c", ask], env=env, capture_output=True, text=True)
    assert sorted(done.stdout.split()) == ["vm1/copying", "vm1/daily"], done.stderr


def test_fish_completes_a_line(run: Run, tmp_path: Path, store: Path) -> None:
    fish = peer("fish", "fish")
    script, bin = tmp_path / "script", tmp_path / "bin"
    script.write_text(run("completion", "fish").out)
    bin.mkdir()
    install(bin / "pybitmap")
    ask = f"source {script}; complete -C 'pybitmap clear {store} vm1/'"
    env = {**os.environ, "PATH": f"{bin}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    done = subprocess.run([fish, "-c", ask], env=env, capture_output=True, text=True)
    found = sorted(line.split("\t")[0] for line in done.stdout.splitlines())
    assert found == ["vm1/copying", "vm1/daily"], done.stderr
