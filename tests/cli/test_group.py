# SPDX-License-Identifier: MIT
"""What all commands have in common: help, suggestions, -q and -v, progress, what they import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import HIDE_CURSOR, Run, cursor_is_visible, spawn, terminal

pytest.importorskip("click", reason="the command line is an extra: pip install '.[cli]'")
pytest.importorskip("rich", reason="the command line is an extra: pip install '.[cli]'")

import click

from pybitmap.cli import cli
from pybitmap.cli.group import COMMANDS


@pytest.fixture
def store(tmp_path: Path, run: Run) -> Path:
    """A local store with two bitmaps."""
    path = tmp_path / "store"
    for name in "ab":
        assert run("add", path, f"n/{name}", "--size", "1M") == (0, "", "")
    return path


# ---- help -----------------------------------------------------------------------------------

EVERY_HELP = [[], *([name] for name in COMMANDS)]


def help_of(run: Run, monkeypatch: pytest.MonkeyPatch, words: list[str], columns: int) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    result = run(*words, "--help")
    assert (result.code, result.err) == (0, "")
    return result.out


@pytest.mark.parametrize("words", EVERY_HELP, ids=" ".join)
@pytest.mark.parametrize("columns", [60, 80])
def test_help_fits(
    run: Run, monkeypatch: pytest.MonkeyPatch, words: list[str], columns: int
) -> None:
    text = help_of(run, monkeypatch, words, columns)
    assert [line for line in text.splitlines() if len(line) > columns] == []
    assert max(map(len, text.splitlines())) > 40, "it was not wrapped by this width"


@pytest.mark.parametrize("words", EVERY_HELP, ids=" ".join)
def test_every_command_has_examples(
    run: Run, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    _, _, examples = help_of(run, monkeypatch, words, 60).partition("\n  Examples:\n")
    assert " ".join(["pybitmap", *words]) in examples


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_says_what_their_help_says(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert command.name == name
    assert " ".join((command.help or "").partition("\n\n")[0].split()) == COMMANDS[name][1]


def test_help_lists_every_command(run: Run) -> None:
    shown = run("--help").out
    for name, (_, words) in COMMANDS.items():
        assert any(line.split() == [name, *words.split()] for line in shown.splitlines())


@pytest.mark.parametrize("name", ["add", "resize", "dump", "replay", "serve"])
def test_who_takes_sizes_says_what_they_are(
    run: Run, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    text = " ".join(help_of(run, monkeypatch, [name], 80).split())
    assert "K, M, G, T, P, E (and KiB, MiB, ...) are powers of 1024, kB, MB, ... powers of" in text
    assert "Sizes are in bytes" not in help_of(run, monkeypatch, ["enable"], 80)


# ---- what is imported -----------------------------------------------------------------------


def imported(*args: str) -> set[str]:
    """The modules that are there when a command has ended."""
    code = (
        "import sys; from pybitmap.__main__ import main; code = main();"
        "print(*sys.modules, sep='\\n', file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


def test_the_version_needs_nothing_but_the_version() -> None:
    plain = {name for name in imported("--version") if name.startswith("pybitmap")}
    assert plain == {"pybitmap", "pybitmap.__main__"}
    slow = {"click", "rich", "importlib.metadata", "_cffi_backend", "sqlite3"}
    assert not slow & imported("--version")


def test_the_list_of_commands_needs_no_command() -> None:
    modules = imported("--help")
    assert "click" in modules
    slow = {"rich", "importlib.metadata", "_cffi_backend", "sqlite3", "pybitmap.cli.bitmaps"}
    assert not slow & modules


# ---- what was meant -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["replya"], "No such command 'replya'; did you mean 'replay'?"),
        (["Info", "x"], "No such command 'Info'; did you mean 'info'?"),
        (["putback"], "No such command 'putback'; did you mean 'put-back'?"),
        (["xyzzy"], "No such command 'xyzzy'."),
        (["info", "--jsn", "x"], "No such option '--jsn'; did you mean '--json'?"),
        (["info", "--JSON", "x"], "No such option '--JSON'; did you mean '--json'?"),
        (["info", "-json", "x"], "No such option '-json'; did you mean '--json'?"),
        (["add", "x", "n/b", "-size=1M"], "No such option '-size'; did you mean '--size'?"),
        (["add", "x", "b", "-granularity", "4K"], "did you mean '--granularity'?"),
        (["replay", "x", "--granularty=4K"], "did you mean '--granularity'?"),
        (["dump", "x", "b", "--quite"], "did you mean '--quiet'?"),
        (["info", "x", "-z"], "No such option '-z'."),
        (["info", "x", "--xyzzy"], "No such option '--xyzzy'."),
        (["--versoin"], "did you mean '--version'?"),
        (["--json", "info", "x"], "Options of a command stand behind its name."),
    ],
)
def test_what_is_misspelt_is_refused_with_the_nearest(
    run: Run, args: list[str], words: str
) -> None:
    result = run(*args)
    assert (result.code, result.out) == (2, "")
    assert result.err.splitlines()[-1].startswith("Error: ")
    assert words in result.err


# ---- -q and -v ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_both(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    options = {name for param in command.params for name in param.opts}
    assert {"-q", "--quiet", "-v", "--verbose"} <= options


def test_quiet_leaves_out_notes_but_not_errors(run: Run, store: Path) -> None:
    assert "read without a lock" in run("info", store, "-U").err
    assert run("info", store, "-U", "-q").err == ""
    assert run("dump", store, "c", "-q").err.startswith(f"pybitmap: {store}: Dirty bitmap 'c' not")
    assert run("info", store, "-q").out == run("info", store).out


def test_verbose_says_what_is_done(run: Run, store: Path) -> None:
    said = run("merge", store, "a", "b", "-v")
    assert (said.code, said.out) == (0, "")
    lines = said.err.splitlines()
    assert lines[0] == f"pybitmap: {store}: local store, to be changed"
    assert lines[-1] == "pybitmap: done"
    assert run("merge", store, "a", "b").err == ""
    failed = run("merge", store, "a", "c", "-v")
    assert "pybitmap: done" not in failed.err
    shown = run("dump", store, "a", "--verbose", "--json")
    assert json.loads(shown.out) == []
    assert shown.err.startswith(f"pybitmap: {store}: local store, to be read\n")


def test_verbose_names_each_part_of_a_work_once(run: Run, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    trace.write_text("write 0 4096\n" * 1000)
    result = run("replay", trace, "-v", "--json")
    assert json.loads(result.out)["requests"] == 1000
    assert result.err == "pybitmap: Reading\npybitmap: Marking\n"


def test_quiet_and_verbose_exclude_each_other(run: Run, store: Path) -> None:
    for args in (["-q", "-v"], ["-v", "-q"]):
        result = run("info", store, *args)
        assert (result.code, result.out) == (2, "")
        assert "Give either -q or -v, not both." in result.err
    assert run("info", store, "-qq").code == 0


# ---- progress -------------------------------------------------------------------------------

#: Instead of Timer: what has passed when it starts. `interval` is checked by the tests.
TIMER = """
from pybitmap.cli import common
class Timer(common.Timer):
    def start(self):
        assert self.interval == 0.5 and self.daemon
        {passed}
    def join(self):
        pass
common.Timer = Timer
"""
AT_ONCE, NEVER = (TIMER.format(passed=passed) for passed in ("self.function()", "pass"))


def test_progress_is_shown_in_a_terminal(run: Run, tmp_path: Path) -> None:
    names = [f"{i}[/red]\x1b[31m" for i in range(6)]  # neither Rich nor the terminal minds
    path = tmp_path / "store"
    for name in names:
        assert run("add", path, name, "--node", "n", "--size", "1M").code == 0
    with terminal("merge", path, *names, before=AT_ONCE) as child:
        assert child.end() == 0
    assert b"Load" in child.shown
    assert b"Stor" in child.shown
    assert b"[31m\x1b" not in child.shown
    assert HIDE_CURSOR in child.shown
    assert cursor_is_visible(child.shown)


@pytest.mark.parametrize("options", [[], ["-q"]])
def test_no_progress_of_what_is_soon_done_or_with_quiet(store: Path, options: list[str]) -> None:
    before = AT_ONCE if options else NEVER
    with terminal("merge", store, "a", "b", *options, before=before) as child:
        assert child.end() == 0
    assert child.shown == b""


def test_no_progress_in_a_terminal_that_cannot_show_it(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dumb = f"import os; os.environ['TERM'] = 'dumb'{AT_ONCE}"
    with terminal("merge", store, "a", "b", before=dumb) as child:
        assert child.end() == 0
    assert child.shown == b""


def test_nothing_on_a_standard_error_that_is_no_terminal(store: Path) -> None:
    for env in ({}, {"FORCE_COLOR": "1"}, {"TTY_INTERACTIVE": "1"}):
        done = spawn("merge", store, "a", "b", env={**os.environ, **env})
        assert done == (0, "", "")
