# SPDX-License-Identifier: MIT
"""`pybitmap fleet`: what it prints, and its exit codes."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import Run

pytest.importorskip("click", reason="the command line is an extra: pip install '.[cli]'")
pytest.importorskip("rich", reason="the command line is an extra: pip install '.[cli]'")
pytest.importorskip("duckdb", reason="fleets are an extra: pip install '.[fleet]'")
pytest.importorskip("numpy", reason="fleets are an extra: pip install '.[fleet]'")

import click

from pybitmap import BlockGraph
from pybitmap.cli import cli
from pybitmap.cli.fleet import COMMANDS
from pybitmap.store import LocalStore


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Three disks; one bitmap does not record."""
    path = tmp_path / "sto\x1bre"
    for number in range(3):
        with BlockGraph() as graph:
            node = graph.add_node(f"disk{number}", 1 << 30, LocalStore(path))
            node.add_bitmap("daily", persistent=True, disabled=number == 2)
            node.bitmaps["daily"].set(0, (number + 1) << 20)
    return path


@pytest.fixture
def folder(tmp_path: Path, store: Path, run: Run) -> Path:
    """Its tables."""
    path = tmp_path / "fleet"
    assert run("fleet", "scan", store, "--to", path, "--host", "h", "-j", "1").code == 0
    return path


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("columns", [60, 80])
def test_help_fits_and_has_examples(
    run: Run, monkeypatch: pytest.MonkeyPatch, name: str, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = run("fleet", name, "--help").out
    assert [line for line in shown.splitlines() if len(line) > columns] == []
    assert f"pybitmap fleet {name} " in shown.partition("\n  Examples:\n")[2]
    group = cli.get_command(click.Context(cli), "fleet")
    assert isinstance(group, click.Group)
    command = group.get_command(click.Context(cli), name)
    assert command is not None
    assert (command.help or "").partition("\n\n")[0] == COMMANDS[name][1]
    options = {name for param in command.params for name in param.opts}
    assert {"-q", "-v", "--json"} <= options


def test_what_is_misspelt_is_refused_with_the_nearest(run: Run) -> None:
    for args, words in (
        (["fleet", "skan"], "No such command 'skan'; did you mean 'scan'?"),
        (["fleet", "plan", "x", "--jsn"], "did you mean '--json'?"),
        (["fleet", "--json", "scan"], "Options of a command stand behind its name."),
    ):
        result = run(*args)
        assert (result.code, result.out) == (2, "")
        assert words in result.err


def test_a_scan_says_what_it_found(run: Run, tmp_path: Path, store: Path) -> None:
    done = run("fleet", "scan", store, tmp_path / "no", "--to", tmp_path / "f", "-j", "1")
    assert done.code == 1
    assert done.out == "2 targets\n3 dirty extents, 6 MiB\n      3 ready\n      1 vanished\n"
    assert done.err == (
        f"pybitmap: 1 could not be read; why, says: pybitmap fleet plan {tmp_path / 'f'} full\n"
    )


def test_what_is_listed_and_named_is_counted_once(run: Run, tmp_path: Path, store: Path) -> None:
    (tmp_path / "link").symlink_to(store)
    (tmp_path / "l").write_text("host,path\nh,link\n")
    scan = ("fleet", "scan", "--list", tmp_path / "l", store, "--to", tmp_path / "f", "-j", "1")
    found = run(*scan, "--host", "h", "--json")
    assert json.loads(found.out)["states"] == {"ready": 3}
    found = run(*scan, "--host", "other", "--json")
    assert json.loads(found.out)["states"] == {"ready": 6}


def test_the_questions_are_listed(run: Run, folder: Path) -> None:
    shown = run("fleet", "plan", folder).out
    for name in ("links", "order", "full", "hottest", "granularity", "chains", "states"):
        assert f"\n{name} " in shown
    listed = json.loads(run("fleet", "plan", folder, "--json").out)
    assert {"query": "full", "what it asks": listed[1]["what it asks"]} in listed


@pytest.mark.parametrize("query", [(), ("full",)])
def test_a_folder_without_tables_is_told(run: Run, tmp_path: Path, query: tuple[str, ...]) -> None:
    refused = run("fleet", "plan", tmp_path / "tonigth", *query)
    assert (refused.code, refused.out) == (2, "")
    assert "tonigth' has no tables" in refused.err


def test_an_answer_is_a_table_json_or_csv(run: Run, folder: Path, store: Path) -> None:
    shown = run("fleet", "plan", folder, "order", "--bandwidth", "1M", "--window", "2s")
    assert shown.code == 0
    heading, _, *lines = shown.out.splitlines()
    columns = ["link", "host", "disk", "job", "nbytes", "begins", "ends", "fits"]
    assert heading.split() == columns
    assert [line.split()[-1] for line in lines] == ["yes", "no", "no"]
    assert "\x1b" not in shown.out
    assert "2 MiB" in shown.out
    args = ("fleet", "plan", folder, "order", "--bandwidth", "1M", "--window", "1m")
    found = json.loads(run(*args, "--json").out)
    assert [row["nbytes"] for row in found] == [1 << 20, 2 << 20, 1 << 30]
    assert found[0]["disk"] == f"{store}//disk0"
    rows = list(csv.reader(run(*args, "--csv").out.splitlines()))
    assert rows[0] == list(found[0]) == columns
    assert [row[4] for row in rows[1:]] == [str(row["nbytes"]) for row in found]
    none = run("fleet", "plan", folder, "chains")
    assert (none.code, none.out) == (0, "None.\n")
    assert run("fleet", "plan", folder, "chains", "--json").out == "[\n]\n"


def test_variables_are_set_from_outside(run: Run, folder: Path, tmp_path: Path) -> None:
    args = ("fleet", "plan", folder, "hottest", "--json", "--set")
    assert len(json.loads(run(*args, "rows=2").out)) == 2
    [row, *_] = json.loads(run(*args, "region=1M").out)
    assert (row["length"], row["share"]) == (3 << 20, 1.0)
    for setting, words in (
        ("rows", "'rows' is not NAME=VALUE"),
        ('a"b=1', "is not NAME=VALUE"),
        ("rouws=1", "looks at no variable 'rouws'"),
        ("rows=99999P", "beyond 2^63"),
    ):
        result = run(*args, setting)
        assert (result.code, result.out) == (2, "")
        assert words in result.err
    for window in ("0", "8x", "-1h", "1e400"):
        assert run("fleet", "plan", folder, "order", f"--window={window}").code == 2
    assert run("fleet", "plan", folder, "order", "--bandwidth", "0").code == 2


def test_a_query_can_be_printed_changed_and_asked(run: Run, folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    text = run("fleet", "plan", folder, "full", "--show").out
    (mine / "full.sql").write_text(text.replace("job <> 'increment'", "job = 'full'"))
    found = json.loads(run("fleet", "plan", folder, "full", "--queries", mine, "--json").out)
    assert [row["why"] for row in found] == ["its bitmap does not record"]
    refused = run("fleet", "plan", folder, "nothing", "--show")
    assert refused.code == 1
    assert "queries there: chains" in refused.err


def test_a_union_says_how_many_disks_it_has(run: Run, folder: Path, tmp_path: Path) -> None:
    done = run("fleet", "union", folder, "--to", tmp_path / "u")
    assert done == (0, "3 disks\n", "")
    found = json.loads(run("fleet", "plan", tmp_path / "u", "states", "--json").out)
    assert [(row["state"], row["dirty_bytes"]) for row in found] == [("ready", 6 << 20)]


def test_what_cannot_be_done_is_told(run: Run, tmp_path: Path) -> None:
    for args, words in (
        (
            ["plan", "nothing", "order"],
            "has no tables: pybitmap fleet scan ... --to DIR makes them",
        ),
        (["scan", "--to", "x"], "Give a TARGET, or a --list of them."),
        (["scan", "--list", "nothing", "--to", "x"], "nothing: No such file or directory"),
        (["union", "nothing", "--to", tmp_path / "u"], "has no tables"),
        (["plan", "x", "order", "--csv", "--json"], "Give either --csv or --json."),
    ):
        result = run("fleet", *args)
        assert (result.code, result.out) == (2, "")
        assert words in result.err


@pytest.mark.parametrize("missing", ["duckdb", "numpy"])
@pytest.mark.parametrize(
    "args", [["scan", ".", "--to", "x"], ["union", ".", "--to", "x"], ["plan", "."]]
)
def test_without_the_extra_it_says_what_to_install(
    tmp_path: Path, args: list[str], missing: str
) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from pybitmap.__main__ import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", code, "fleet", *args]
    done = subprocess.run(
        command, capture_output=True, text=True, env=dict(os.environ), cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stderr.endswith(
        f"fleets need {missing}, which is not installed. In a clone of this project: "
        "pip install '.[fleet]'\n"
    )
