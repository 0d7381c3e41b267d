# SPDX-License-Identifier: MIT
"""The commands for bitmaps with --qmp: of a machine that runs, with the output of images."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import Complete, Run, heed_signals, serving, spawn
from daemon import Daemon, Disk
from peers import package

pytest.importorskip("click", reason="the command line is an extra: pip install '.[cli]'")
pytest.importorskip("rich", reason="the command line is an extra: pip install '.[cli]'")

from pybitmap.tools.monitor import Monitor

SIZE = 1 << 20
WRITES = [(0, 1), (70000, 1)]
EXTENTS = [{"offset": 0, "length": 4096}, {"offset": 69632, "length": 4096}]


@pytest.fixture(autouse=True)
def _package() -> None:
    package("qemu.qmp")


@pytest.fixture(scope="module")
def module_daemon() -> Iterator[Daemon]:
    with Daemon({"q": Disk(SIZE, cluster_size=4096), "raw": Disk(SIZE)}) as daemon:
        yield daemon


@pytest.fixture
def daemon(
    module_daemon: Daemon, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Daemon:
    """With a bitmap "daily" of q, in which WRITES are dirty."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for node in module_daemon.must("query-named-block-nodes"):
        for each in node.get("dirty-bitmaps", []):
            name = node["node-name"]
            module_daemon.must("block-dirty-bitmap-remove", node=name, name=each["name"])
    assert run("add", "q", "daily", "--qmp", module_daemon.monitor) == (0, "", "")
    module_daemon.write("q", WRITES)
    return module_daemon


def told(daemon: Daemon, run: Run, *words: str) -> dict[str, Any]:
    """What info tells in JSON."""
    result = run("info", *words, "--json", "--qmp", daemon.monitor)
    assert (result.code, result.err) == (0, "")
    found: dict[str, Any] = json.loads(result.out)
    return found


def counts(daemon: Daemon, run: Run, node: str = "q") -> dict[str, int]:
    return {each["name"]: each["count"] for each in told(daemon, run, node)["bitmaps"]}


# ---- info ---------------------------------------------------------------------------------------


def test_info_has_the_json_of_an_image(daemon: Daemon, run: Run) -> None:
    live = told(daemon, run, "q")
    daemon.close_node("q")
    try:
        image = json.loads(run("info", daemon.images["q"], "--json").out)
    finally:
        daemon.open_node("q")
    assert live.pop("target") == "q"
    assert live.pop("format") == "qmp"
    del image["target"], image["format"]
    for each in (image["nodes"], image["bitmaps"]):
        assert each[0].get("name") is None or each is image["bitmaps"]
    assert live["nodes"] == [{"name": "q", "size": SIZE}]
    assert live["bitmaps"] == [{**image["bitmaps"][0], "node": "q"}]
    assert live["bitmaps"][0]["count"] == 8192


def test_info_tells_people(daemon: Daemon, run: Run) -> None:
    version = ".".join(map(str, daemon.version))
    code, out, err = run("info", "q", "--qmp", daemon.monitor)
    assert (code, err) == (0, "")
    assert f"q: node of QEMU {version}" in out
    assert "daily             4K   enabled\n" in out
    out = run("info", "q", "--count", "--qmp", daemon.monitor).out
    assert "8192 (8 KiB)" in out


def test_info_without_a_target_lists_all_nodes(daemon: Daemon, run: Run) -> None:
    run("add", "raw", "t", "--transient", "--disabled", "--qmp", daemon.monitor)
    out = run("info", "--qmp", daemon.monitor).out
    assert "q/daily" in out
    assert "disabled, transient" in out
    assert {"q", "raw"} <= {each["name"] for each in told(daemon, run)["nodes"]}
    assert run("info").code == 2


def test_counts_are_left_out_if_not_wanted(daemon: Daemon, run: Run) -> None:
    result = run("info", "q", "--json", "--no-count", "--qmp", daemon.monitor)
    assert json.loads(result.out)["bitmaps"][0]["count"] is None


# ---- changes ------------------------------------------------------------------------------------


def test_add_as_it_is_told(daemon: Daemon, run: Run) -> None:
    words = ["-g", "64K", "--disabled", "--qmp", daemon.monitor]
    assert run("add", "q", "weekly", *words) == (0, "", "")
    [_, weekly] = told(daemon, run, "q")["bitmaps"]
    assert (weekly["granularity"], weekly["enabled"], weekly["persistent"]) == (65536, False, True)


def test_a_raw_disk_has_transient_ones_only(daemon: Daemon, run: Run) -> None:
    code, out, err = run("add", "raw", "t", "--qmp", daemon.monitor)
    assert (code, out) == (1, "")
    assert "Can't store persistent bitmaps to raw" in err
    assert "--transient" in err
    assert run("add", "raw", "t", "--transient", "--qmp", daemon.monitor) == (0, "", "")


def test_commands_change_what_they_say(daemon: Daemon, run: Run) -> None:
    qmp = ("--qmp", daemon.monitor)
    run("add", "q", "weekly", "--disabled", *qmp)
    assert run("merge", "q", "weekly", "daily", *qmp) == (0, "", "")
    assert run("clear", "q", "daily", *qmp) == (0, "", "")
    assert counts(daemon, run) == {"daily": 0, "weekly": 8192}
    run("add", "raw", "t", "--transient", *qmp)
    assert run("merge", "raw", "t", "weekly", "-b", "q", *qmp) == (0, "", "")
    assert counts(daemon, run, "raw") == {"t": 131072}
    assert run("disable", "q", "daily", *qmp) == (0, "", "")
    assert run("enable", "q", "weekly", *qmp) == (0, "", "")
    assert [each["enabled"] for each in told(daemon, run, "q")["bitmaps"]] == [False, True]
    assert run("remove", "q", "daily", "weekly", *qmp) == (0, "", "")
    assert counts(daemon, run) == {}


def test_remove_stale_removes_what_is_inconsistent(run: Run) -> None:
    with Daemon({"q": Disk(SIZE, cluster_size=4096)}) as daemon:
        for name in ("old", "older"):
            daemon.must("block-dirty-bitmap-add", node="q", name=name, persistent=True)
        daemon.restart()
        daemon.kill()
        daemon.start()
        qmp = ("--qmp", daemon.monitor)
        run("add", "q", "good", *qmp)
        out = run("info", "q", *qmp).out
        assert "Bitmap 'old' is inconsistent: it was in use when QEMU opened" in out
        assert "pybitmap repair" not in out
        code, _, err = run("dump", "q", "old", *qmp)
        assert code == 1
        assert "inconsistent" in err
        code, out, err = run("remove", "q", "--stale", *qmp)
        assert (code, sorted(out.split()), err) == (0, ["old", "older"], "")
        assert list(counts(daemon, run)) == ["good"]
        assert run("remove", "q", "--stale", *qmp) == (0, "", "")


# ---- dump, take ---------------------------------------------------------------------------------


def test_dump_prints_what_it_prints_of_an_image(daemon: Daemon, run: Run) -> None:
    words = [[], ["--json"], ["--format", "csv"], ["-g", "64K"], ["-g", "1M", "--format", "csv"]]
    live = [run("dump", "q", "daily", *each, "--qmp", daemon.monitor) for each in words]
    assert json.loads(live[0].out) == EXTENTS
    daemon.close_node("q")
    try:
        assert live == [run("dump", daemon.images["q"], "daily", *each) for each in words]
    finally:
        daemon.open_node("q")


def test_take_as_another_and_put_back(daemon: Daemon, run: Run) -> None:
    qmp = ("--qmp", daemon.monitor)
    assert run("take", "q", "daily", "--as", "copying", *qmp) == (0, "", "")
    assert counts(daemon, run) == {"daily": 0, "copying": 8192}
    assert json.loads(run("dump", "q", "copying", *qmp).out) == EXTENTS
    assert run("put-back", "q", "copying", "--into", "daily", *qmp) == (0, "", "")
    assert counts(daemon, run) == {"daily": 8192}


def test_take_prints_what_is_clean_then(daemon: Daemon, run: Run) -> None:
    code, out, err = run("take", "q", "daily", "--qmp", daemon.monitor)
    assert (code, json.loads(out), err) == (0, EXTENTS, "")
    assert counts(daemon, run) == {"daily": 0}
    daemon.write("q", [(5000, 1)])
    out = run("take", "q", "daily", "--format", "csv", "--qmp", daemon.monitor).out
    assert out == "offset,length\n4096,4096\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no file here is always full")
def test_what_cannot_be_printed_is_dirty_again(daemon: Daemon, run: Run) -> None:
    with open("/dev/full", "wb") as full:
        done = spawn("take", "q", "daily", "--qmp", daemon.monitor, stdout=full)
    assert done.code == 1
    assert "standard output: No space left on device" in done.err
    assert counts(daemon, run) == {"daily": 8192}


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130), (signal.SIGKILL, -9)],
)
def test_ended_while_it_prints_all_is_dirty_again(
    daemon: Daemon, run: Run, tmp_path: Path, number: int, code: int
) -> None:
    """After SIGKILL, once the next command is there."""
    with Daemon({"q": Disk(64 << 20, cluster_size=4096)}) as daemon:
        qmp = ("--qmp", str(daemon.monitor))
        run("add", "q", "daily", "-g", "512", *qmp)
        # More than a pipe takes.
        run("merge", "q", "daily", "daily", *qmp)
        daemon.write("q", [(at * 8192, 1) for at in range(4000)])
        before = counts(daemon, run)
        with subprocess.Popen(
            [sys.executable, "-m", "pybitmap", "take", "q", "daily", *qmp],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "TMPDIR": str(tmp_path)},
            preexec_fn=heed_signals,
        ) as process:
            assert process.stdout is not None
            assert process.stdout.read(1) == b"["
            process.send_signal(number)
            assert process.wait(60) == code
        assert run("dump", "q", "daily", *qmp, "-q").code == 0
        assert counts(daemon, run) == before
        names = [node["node-name"] for node in daemon.must("query-named-block-nodes")]
        assert not [name for name in names if name.startswith("pybitmap-")]
        assert os.listdir(tmp_path) == []


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["info", "q", "-U"], "--force-share"),
        (["dump", "q", "daily", "--node", "q"], "--node"),
        (["clear", "q", "daily", "--no-lock"], "--no-lock"),
        (["add", "q", "b", "--size", "1M"], "--size"),
    ],
)
def test_options_of_images_are_refused(
    daemon: Daemon, run: Run, words: list[str], option: str
) -> None:
    code, _, err = run(*words, "--qmp", daemon.monitor)
    assert code == 2
    assert f"{option} is for images and local stores, not for --qmp" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["add", "image", "b", "--transient"], "--transient is for --qmp"),
        (["take", "image", "b"], "Missing option '--as'"),
        (["take", "image", "b", "--as", "c", "--json"], "With --as nothing is printed"),
        (["info"], "Missing argument 'TARGET'"),
    ],
)
def test_options_of_machines_are_refused(run: Run, words: list[str], said: str) -> None:
    code, _, err = run(*words)
    assert code == 2
    assert said in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["info", "none"], "Node 'none' not found; nodes and devices:"),
        (["dump", "q", "none"], "Dirty bitmap 'none' not found; bitmaps there: daily"),
        (["add", "q", "daily"], "Bitmap already exists: daily"),
        (["add", "q", "b", "-g", "256"], "Granularity must be power of 2 and at least 512"),
        (["add", "q", ""], "Bitmap name cannot be empty"),
        (["take", "q", "daily", "--as", "daily"], "Bitmap already exists: daily"),
        (["put-back", "q", "daily", "--into", "daily"], "they are to be two"),
        (["remove", "q", "daily", "none"], "Dirty bitmap 'none' not found"),
        (["merge", "q", "daily", "daily", "-b", "none"], "Node 'none' not found"),
    ],
)
def test_what_is_not_done_is_said_and_exits_1(
    daemon: Daemon, run: Run, words: list[str], said: str
) -> None:
    code, out, err = run(*words, "--qmp", daemon.monitor)
    assert (code, out) == (1, "")
    assert said in err
    assert counts(daemon, run) == {"daily": 8192}


def test_nobody_is_there(run: Run, tmp_path: Path) -> None:
    code, _, err = run("info", "--qmp", tmp_path / "none")
    assert code == 1
    assert "no monitor listens there" in err


def test_another_client_is_there(daemon: Daemon, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from pybitmap.cli import live

    monkeypatch.setattr(live, "Monitor", lambda path: Monitor(path, patience=0.2))
    with Monitor(daemon.monitor):
        code, _, err = run("info", "--qmp", daemon.monitor)
    assert code == 1
    assert "another client is on this monitor" in err


def test_without_the_package(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qemu", None)
    code, _, err = run("info", "--qmp", "/none")
    assert code == 1
    assert "pip install qemu.qmp" in err


# ---- our own server -----------------------------------------------------------------------------


def test_of_our_own_server(run: Run, tmp_path: Path) -> None:
    socket = tmp_path / "qmp"
    with serving(socket, "--node", "disk,size=1M") as process:
        assert process.stderr is not None
        assert "listening on" in process.stderr.readline()
        qmp = ("--qmp", socket)
        assert "--transient" in run("add", "disk", "daily", "-g", "4K", *qmp).err
        assert run("add", "disk", "daily", "-g", "4K", "--transient", *qmp) == (0, "", "")
        with Monitor(socket) as monitor:
            for offset, length in WRITES:
                monitor.execute("__org.pybitmap_mark", node="disk", offset=offset, length=length)
        assert "node of pybitmap " in run("info", "disk", *qmp).out
        assert json.loads(run("dump", "disk", "daily", *qmp).out) == EXTENTS
        assert json.loads(run("take", "disk", "daily", *qmp).out) == EXTENTS
        assert json.loads(run("dump", "disk", "daily", *qmp).out) == []


# ---- completion ---------------------------------------------------------------------------------


def test_names_are_completed_from_the_monitor(
    daemon: Daemon, run: Run, completed: Complete
) -> None:
    qmp = ("--qmp", daemon.monitor)
    run("add", "q", "weekly", *qmp)
    assert {"plain,q", "plain,raw"} <= set(completed("dump", *qmp, ""))
    assert completed("dump", *qmp, "ra") == ["plain,raw"]
    assert completed("dump", *qmp, "q", "") == ["plain,daily", "plain,weekly"]
    assert completed("remove", "q", *qmp, "daily", "") == ["plain,weekly"]
    assert completed("merge", "raw", "b", *qmp, "-b", "q", "w") == ["plain,weekly"]
    assert completed("dump", "--qmp", "/none", "") == []
    assert completed("dump", "") == ["file,"]
