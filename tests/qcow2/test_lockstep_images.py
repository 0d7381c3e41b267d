# SPDX-License-Identifier: MIT
"""In lockstep with qemu-storage-daemon, case by case: bitmaps that are stored in qcow2 images.

What a flag forbids, which limits there are, what a restart and a kill leave, and the move of
bitmaps to a new overlay. `test_lockstep` has the machine that tries what nobody thought of.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from daemon import Daemon, Disk, Json, check_images
from lockstep import (
    ABORTED,
    PREFIX,
    TARGET,
    TOO_LONG,
    Ours,
    action,
    command,
    error,
    in_use,
    on_disk,
    same,
    state,
    transaction,
)

from pybitmap import StateError

MIB = 1 << 20
NODES = {
    "a": Disk(MIB),
    "p": Disk(MIB, cluster_size=65536),
    "q": Disk(MIB, cluster_size=512),
    "wide": Disk(MIB, cluster_size=2 * MIB),
    # 4 TiB: at 512 bytes a bit a bitmap has 1 GiB, at 1024 it has just what is allowed.
    "huge": Disk(1 << 42, cluster_size=65536),
    "old": Disk(MIB, cluster_size=65536, version=2),
    TARGET: Disk(MIB),
}


@pytest.fixture(scope="module")
def running() -> Iterator[Daemon]:
    with Daemon(NODES) as daemon:
        yield daemon


class Both:
    """The two sides."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon, self.ours = daemon, Ours(daemon)

    def same(self, request: Json, *, theirs: Json | None = None) -> Json:
        return same(self.daemon, self.ours, request, theirs=theirs)

    def must(self, name: str, /, **arguments: Any) -> None:
        assert self.same(command(PREFIX + name, **arguments)) == {"return": {}}

    def write(self, node: str, *writes: tuple[int, int]) -> None:
        self.daemon.write(node, writes)
        self.ours.write(node, [*writes])

    @contextmanager
    def closed(self, *nodes: str, read_only: bool = False) -> Iterator[None]:
        """In between both images are found to be whole."""
        for node in nodes:
            self.daemon.close_node(node)
            self.ours.close_node(node)
        check_images(side.images[node] for side in (self.daemon, self.ours) for node in nodes)
        yield
        for node in nodes:
            self.daemon.open_node(node, read_only=read_only)
            self.ours.open_node(node, read_only=read_only)

    def reopen(self, *nodes: str, read_only: bool = False) -> None:
        with self.closed(*nodes, read_only=read_only):
            pass

    def kill(self) -> None:
        """And open what is left, as it is."""
        self.daemon.kill()
        self.ours.stop(kill=True)
        images = [*self.ours.images.values(), *map(self.daemon.images.get, self.ours.images)]
        check_images([image for image in images if image is not None], leaks=True)
        self.daemon.start()
        self.ours.start()

    def state(self) -> Json:
        ours = state(self.ours)
        assert ours == state(self.daemon)
        return ours

    def names(self, node: str) -> list[str]:
        """The newest first."""
        return [each["name"] for each in self.state()[node] or []]


@pytest.fixture
def both(running: Daemon) -> Iterator[Both]:
    running.renew()
    made = Both(running)
    yield made
    made.ours.stop(kill=True)


# ---- what is stored -----------------------------------------------------------------------------


def test_bitmaps_come_back_from_the_image_of_either_side(both: Both) -> None:
    """Content, flags and order; and how old a bitmap is, which the order on disk is not."""
    for i, granularity in enumerate((512, 4096, 65536, 1 << 20, 1 << 31)):
        for node in "pq":
            arguments = {"granularity": granularity, "disabled": i == 1, "persistent": i != 2}
            both.must("add", node=node, name=f"b{i}", **arguments)
    for node in "pq":
        both.write(node, (0, 1), (70000, 70000), (MIB - 1, 1))
    before = both.state()
    assert both.names("q") == ["b4", "b3", "b2", "b1", "b0"]
    both.reopen("p")
    daemon, ours = both.daemon, both.ours
    with both.closed("q"):
        daemon.images["q"], ours.images["q"] = ours.images["q"], daemon.images["q"]
    for node in "pq":
        assert both.names(node) == ["b0", "b1", "b3", "b4"]
        kept = [each for each in before[node] if each["persistent"]]
        assert both.state()[node] == kept[::-1]
    both.must("remove", node="q", name="b1")
    both.must("add", node="q", name="late", persistent=True)
    both.must("add", node="q", name="b1", persistent=True)
    both.reopen("q")
    assert both.names("q") == ["late", "b1", "b0", "b3", "b4"]
    both.reopen("q")
    assert both.names("q") == ["late", "b1", "b0", "b3", "b4"]


@pytest.mark.parametrize(
    ("node", "granularity"), [("a", 65536), ("q", 4096), ("p", 65536), ("wide", 65536)]
)
def test_the_default_granularity_follows_the_cluster_size(
    both: Both, node: str, granularity: int
) -> None:
    both.must("add", node=node, name="x")
    assert both.state()[node][0]["granularity"] == granularity


def cannot(node: str, name: str, why: str) -> Json:
    return error(f"Can't make bitmap '{name}' persistent in '{node}': {why}")


VERSION_2 = "Cannot store dirty bitmaps in qcow2 v2 files"
NAME_LENGTH = "Name length exceeds maximum (1023 characters)"
EXISTS = error("Bitmap already exists: x")
NO_ADD = error("Cannot add a persistent bitmap to read-only or inactive node 'q'")
TOO_MUCH = "Too much space will be occupied by the bitmap. Use larger granularity"


@pytest.mark.parametrize(
    ("node", "name", "granularity", "reply"),
    [
        ("p", "y", 1 << 31, ABORTED),
        ("huge", "y", 1024, ABORTED),
        ("huge", "y", 512, cannot("huge", "y", TOO_MUCH)),
        ("huge", "x", 512, EXISTS),
        ("huge", TOO_LONG, 512, cannot("huge", TOO_LONG, TOO_MUCH)),
        ("p", TOO_LONG, 512, cannot("p", TOO_LONG, NAME_LENGTH)),
        ("p", "x", 512, EXISTS),
        ("old", "y", 512, cannot("old", "y", VERSION_2)),
        ("old", TOO_LONG, 512, cannot("old", TOO_LONG, VERSION_2)),
        ("old", "x", 512, EXISTS),
    ],
)
def test_what_cannot_be_stored_is_refused(
    both: Both, node: str, name: str, granularity: int, reply: Json
) -> None:
    """And what can be is not: an abort takes it back, since a full one would take long."""
    both.must("add", node=node, name="x", granularity=MIB, persistent=node != "old")
    data = {"node": node, "name": name, "granularity": granularity, "persistent": True}
    assert both.same(transaction(action("add", **data), action("abort"))) == reply


# ---- what a flag forbids ------------------------------------------------------------------------

X = {"node": "q", "name": "x"}
COMMANDS: dict[str, Json] = {
    "clear": X,
    "merge into": {"node": "q", "target": "x", "bitmaps": [{"node": "p", "name": "source"}]},
    "merge from": {"node": "p", "target": "source", "bitmaps": [X]},
    "merge into itself": {"node": "q", "target": "x", "bitmaps": ["x"]},
    "disable": X,
    "enable": X,
    "add": {**X, "persistent": True, "granularity": 4096},
    "add plain": X,
    "remove": X,
}
BUSY = in_use("x")
READONLY = error("Bitmap 'x' is readonly and cannot be modified")
NO_REMOVAL = error("Cannot remove persistent bitmap 'x': no write access to node 'q'")
INCONSISTENT = error("Bitmap 'x' is inconsistent and cannot be used")
CHANGES = ("clear", "merge into", "merge into itself")
USES = ("merge from", "disable", "enable")

#: By what `x` is: what is refused, and how. (`add` is always refused, since `x` is there.)
FORBIDDEN: dict[str, dict[str, Json]] = {
    "consistent": {},
    "held": dict.fromkeys([*CHANGES, *USES, "remove"], BUSY),
    "frozen": dict.fromkeys([*CHANGES, *USES, "remove"], BUSY),
    "readonly": {**dict.fromkeys(CHANGES, READONLY), "remove": NO_REMOVAL},
    "readonly and held": {**dict.fromkeys([*CHANGES, *USES, "remove"], BUSY)},
    "inconsistent": dict.fromkeys([*CHANGES, *USES], INCONSISTENT),
    "readonly and inconsistent": {
        **dict.fromkeys(CHANGES, READONLY),
        **dict.fromkeys(USES, INCONSISTENT),
        "remove": NO_REMOVAL,
    },
    "plain on a read-only node": {},
}


def make(both: Both, what: str) -> None:
    """There is a bitmap `x` of that kind, and another one to merge from and into."""
    read_only = "read" in what
    if "plain" not in what:
        both.must("add", **X, persistent=True, granularity=4096)
        both.write("q", (5000, 1))
        both.reopen("q", read_only=read_only and "inconsistent" not in what)
    if "inconsistent" in what:
        both.kill()
    if read_only:
        both.reopen("q", read_only=True)
    if "plain" in what:
        both.must("add", **X)
    if "held" in what:
        both.daemon.hold("q", "x")
        both.ours.hold("q", "x")
    elif what == "frozen":
        both.daemon.freeze("q", "x", TARGET)
        both.ours.freeze("q", "x")
    both.must("add", node="p", name="source", granularity=512)
    both.write("p", (9000, 1))


@pytest.mark.parametrize("what", FORBIDDEN)
def test_what_a_flag_forbids(both: Both, what: str) -> None:
    make(both, what)
    assert both.state()["q"][0].get("inconsistent", False) == ("inconsistent" in what)
    for name, arguments in COMMANDS.items():
        kind = name.split()[0]
        expected = FORBIDDEN[what].get(name, {"return": {}})
        theirs = None
        if kind == "add":
            expected = EXISTS
            if "read" in what and arguments.get("persistent"):
                expected = NO_ADD
                theirs = EXISTS if both.daemon.version < (11, 1) else None
        defect = kind == "enable" and expected == BUSY  # see DEFECTS of test_lockstep
        if not defect:
            reply = ABORTED if expected == {"return": {}} else expected
            aborted = transaction(action(kind, **arguments), action("abort"))
            assert both.same(aborted, theirs=theirs) == reply, name
        assert both.same(command(PREFIX + kind, **arguments), theirs=theirs) == expected, name


@pytest.mark.parametrize("what", ["held", "readonly", "inconsistent", "readonly and inconsistent"])
def test_no_backup_of_what_must_not_be_cleared(both: Both, what: str) -> None:
    make(both, what)
    backup = {"device": "q", "target": TARGET, "sync": "incremental", "bitmap": "x", "job-id": "j"}
    refused = both.daemon.execute(command("blockdev-backup", **backup))
    with pytest.raises(StateError) as ours, both.ours.bitmap("q", "x").freeze():
        pass
    assert refused == error(str(ours.value))


# ---- what a kill leaves -------------------------------------------------------------------------


def test_after_a_kill_bitmaps_are_inconsistent_until_they_are_removed(both: Both) -> None:
    for name in ("x", "y", "off"):
        both.must("add", node="q", name=name, persistent=True, disabled=name == "off")
    both.reopen("q")
    both.write("q", (0, 1))
    both.must("add", node="q", name="plain")
    both.must("remove", node="q", name="y")
    both.kill()
    for _ in range(2):
        assert [
            (each["name"], each["count"], each["recording"], each["inconsistent"])
            for each in both.state()["q"]
        ] == [("x", 0, False, True), ("off", 0, False, True)]
        both.reopen("q")
    both.must("remove", node="q", name="x")
    both.must("add", node="q", name="x", persistent=True)
    both.reopen("q", "p")
    both.reopen("q", read_only=True)
    assert [("inconsistent" in each) for each in both.state()["q"]] == [False, True]


# ---- where we differ: each is a row of docs/qemu-differences.md ---------------------------------


def test_nothing_persistent_is_added_where_it_would_be_lost(both: Both) -> None:
    both.reopen("q", read_only=True)
    add = command(PREFIX + "add", **X, persistent=True)
    assert both.ours.execute(add) == NO_ADD
    assert both.daemon.execute(add) == (
        {"return": {}} if both.daemon.version < (11, 1) else NO_ADD  # QEMU has learnt it
    )
    both.reopen("q")
    assert both.names("q") == []


@pytest.mark.parametrize("inconsistent", [False, True])
def test_an_aborted_removal_leaves_what_is_stored(both: Both, inconsistent: bool) -> None:
    """QEMU takes it from the image before it knows; after a kill, or if it has no content to be
    stored again, it is gone."""
    for name in ("x", "y"):
        both.must("add", node="q", name=name, persistent=True)
    both.reopen("q")
    if inconsistent:
        both.kill()
    assert both.same(transaction(action("remove", **X), action("abort"))) == ABORTED
    assert on_disk(both.daemon)["q"] == ["y"]
    if inconsistent:
        both.reopen("q")
    else:
        both.kill()
    theirs, ours = state(both.daemon)["q"], state(both.ours)["q"]
    assert [each["name"] for each in theirs] == ["y"]
    assert [(each["name"], each["inconsistent"]) for each in ours] == [("x", True), ("y", True)]


def test_an_aborted_removal_does_not_change_the_order(both: Both) -> None:
    for name in ("x", "y", "z"):
        both.must("add", node="q", name=name, persistent=True)
    both.reopen("q")
    assert both.names("q") == ["x", "y", "z"]
    assert both.same(transaction(action("remove", node="q", name="z"), action("abort"))) == ABORTED
    with both.closed("q"):
        pass
    assert [each["name"] for each in state(both.ours)["q"]] == ["x", "y", "z"]
    assert [each["name"] for each in state(both.daemon)["q"]] == ["z", "x", "y"]


def test_a_kill_leaves_word_of_new_bitmaps(both: Both) -> None:
    """QEMU writes of them when it closes the image; here they are known from the start."""
    both.must("add", **X, persistent=True)
    both.kill()
    assert state(both.daemon)["q"] is None
    (found,) = state(both.ours)["q"]
    assert (found["name"], found["inconsistent"]) == ("x", True)


# ---- QEMU's iotest 254 --------------------------------------------------------------------------


@pytest.mark.parametrize("stored_before", [False, True])
@pytest.mark.parametrize("aborted", [False, True])
def test_bitmaps_move_to_a_new_overlay(aborted: bool, stored_before: bool) -> None:
    """One transaction takes a snapshot, so that the guest's writes go to an overlay, and moves the
    bitmaps of the image below to it: plain, persistent, and persistent but disabled ones."""
    disk = Disk(MIB, cluster_size=65536)
    with Daemon({"base": disk, "top": disk}) as daemon:
        both = Both(daemon)
        granularities = {"bitmap0": 65536, "bitmap1": 512, "bitmap2": 4096}
        for name, granularity in granularities.items():
            persistent = name != "bitmap0"
            arguments = {"granularity": granularity, "persistent": persistent}
            both.must("add", node="base", name=name, **arguments)
        both.write("base", (0, 512), (4 * 65536 + 5, 1))
        both.must("disable", node="base", name="bitmap2")
        if stored_before:
            both.reopen("base")
            both.must("add", node="base", name="bitmap0")
            both.write("base", (65536, 1))
        before = both.state()

        # Until the snapshot nobody uses the overlay, nor has it anything below.
        daemon.close_node("top")
        file = {"driver": "file", "filename": str(daemon.images["top"])}
        daemon.must("blockdev-add", driver="qcow2", node_name="top", file=file, backing=None)
        move = []
        for bitmap in before["base"]:
            old, new = ({"node": node, "name": bitmap["name"]} for node in ("base", "top"))
            given = {key: bitmap[key] for key in ("granularity", "persistent")}
            move.append(action("add", **new, **given, disabled=True))
            move.append(action("merge", node="top", target=bitmap["name"], bitmaps=[old]))
            if bitmap["recording"]:
                move.append(action("enable", **new))
            move.append(action("remove", **old))
        if aborted:
            move.append(action("abort"))
        snapshot = {"type": "blockdev-snapshot", "data": {"node": "base", "overlay": "top"}}
        reply = ABORTED if aborted else {"return": {}}
        assert daemon.execute(transaction(snapshot, *move)) == reply
        assert both.ours.execute(transaction(*move)) == reply

        after = both.state()
        if aborted:
            assert after == before
        else:
            assert after == {"base": None, "top": before["base"][::-1]}

        # The guest writes on through the same door.
        holder = "base" if aborted else "top"
        daemon.write("base", [(1 << 19, 70000)])
        both.ours.write(holder, [(1 << 19, 70000)])
        found = {each["name"]: each for each in both.state()[holder]}
        assert found["bitmap2"]["count"] == 8192
        assert found["bitmap1"]["count"] == 1024 + 70144 + (512 if stored_before else 0)

        # Each side finds them in the image of the other.
        assert daemon.stop() == 0
        both.ours.stop()
        check_images([*daemon.images.values(), *both.ours.images.values()])
        daemon.images, both.ours.images = both.ours.images, daemon.images
        daemon.start()
        both.ours.start()
        stored = {name: each for name, each in found.items() if each["persistent"]}
        for side in (daemon, both.ours):
            assert {each["name"]: each for each in state(side)[holder]} == stored
        if not (aborted and stored_before):  # where QEMU changes the order, see above
            both.state()
        both.ours.stop()
