# SPDX-License-Identifier: MIT
"""The same commands to a real qemu-storage-daemon and to us: every answer and every bit the same.

After each step reply, error class, error text, the query's `dirty-bitmaps` and the SHA-256 of every
bitmap are compared. Guest writes go through an NBD export there and `mark_dirty` here. Each side
has raw nodes and qcow2 images; images are closed and opened again, handed to the other side, or
left behind by a kill, and then qemu-img finds nothing wrong with them. Where QEMU is wrong the
machine keeps away, or expects the difference; each such case is a row of `DEFECTS` with a small
test of what we do, and one that QEMU still does it.

PYBITMAP_LOCKSTEP_STEPS says how many steps: `make lockstep N=50000`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from daemon import Crashed, Daemon, Disk, Json, check_images
from hypothesis import HealthCheck, Phase, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from lockstep import (
    ABORTED,
    LONGEST,
    PREFIX,
    TARGET,
    TOO_LONG,
    Ours,
    action,
    as_of,
    command,
    error,
    in_use,
    on_disk,
    same,
    state,
    transaction,
)
from support import set_flag

from pybitmap import ReadonlyError

MIB = 1 << 20
# Of one size are a, b, p and q; c and r end inside a group. Cluster sizes are those that matter for
# the default granularity.
RAW = {"a": Disk(MIB), "b": Disk(MIB), "c": Disk(MIB + 512), "d": Disk(3 << 30)}
QCOW2 = {
    "p": Disk(MIB, cluster_size=65536),
    "q": Disk(MIB, cluster_size=512),
    "r": Disk(MIB + 512, cluster_size=8192),
}
NODES = {**RAW, **QCOW2}

STEPS_PER_EXAMPLE = 50
PROFILE_STEPS = {"ci": 2000, "long": 50000}
STEPS = int(
    os.environ.get("PYBITMAP_LOCKSTEP_STEPS")
    or PROFILE_STEPS.get(os.environ.get("HYPOTHESIS_PROFILE", ""), 400)
)


@pytest.fixture(scope="module")
def running() -> Iterator[Daemon]:
    with Daemon({**NODES, TARGET: Disk(MIB)}) as daemon:
        yield daemon


@pytest.fixture
def daemon(running: Daemon) -> Daemon:
    running.renew()
    return running


@pytest.fixture
def ours(daemon: Daemon) -> Iterator[Ours]:
    made = Ours(daemon)
    yield made
    made.stop(kill=True)


# ---- the machine --------------------------------------------------------------------------------

# Often what is there, sometimes what is not.
nodes = st.sampled_from([*"aaabb", *"pppqqq", "c", "d", "r", "r", "nowhere", ""])
names = st.sampled_from([*("x" * 5), *("y" * 4), "z", "z", "w", LONGEST])
new_names = names | st.sampled_from(["", TOO_LONG, "x", "y", "z"])
granularities = st.sampled_from([512, 1024, 4096, 65536, 1 << 20, 1 << 31]) | st.sampled_from(
    [0, 1, 256, 511, 513, 65535, (1 << 32) - 1, 1 << 32, -1, -512, 1 << 62]
)
good_granularities = st.sampled_from([512, 1024, 4096, 65536, 1 << 20, 1 << 31])

of_a_bitmap = st.fixed_dictionaries({"node": nodes, "name": names})
sources = names | of_a_bitmap
#: The `data` of each type of action, and the arguments of the command of the same name.
DATA: dict[str, st.SearchStrategy[Json]] = {
    "add": st.fixed_dictionaries(
        {"node": nodes, "name": new_names},
        optional={
            "granularity": st.one_of(good_granularities, good_granularities, granularities),
            "disabled": st.booleans(),
            "persistent": st.booleans(),
        },
    ),
    "remove": of_a_bitmap,
    "clear": of_a_bitmap,
    "enable": of_a_bitmap,
    "disable": of_a_bitmap,
    "merge": st.fixed_dictionaries(
        {
            "node": nodes,
            "target": names,
            # No empty list: DEFECTS has that.
            "bitmaps": st.lists(sources, min_size=1, max_size=3),
        }
    ),
}
CHANGES = ("add", "add", "add", "remove", "clear", "enable", "disable", "merge", "merge")
changes = st.sampled_from(CHANGES).flatmap(lambda kind: st.tuples(st.just(kind), DATA[kind]))
actions = changes.map(lambda change: action(change[0], **change[1]))
aborts = st.just(action("abort"))


@st.composite
def some_actions(draw: st.DrawFn) -> list[Json]:
    """1..6, in half of the cases with an abort at any place."""
    drawn = draw(st.lists(actions, min_size=1, max_size=6))
    if draw(st.booleans()):
        drawn[draw(st.integers(0, len(drawn) - 1))] = action("abort")
    return drawn


#: No list, since an empty list of bitmaps to merge is a defect (see DEFECTS).
odd_values = st.sampled_from([None, True, 0, 7, -1, 1.5, 1 << 64, "", "x", "grouped", {}, {"x": 1}])


@st.composite
def malformed(draw: st.DrawFn) -> Json:
    """A command with one mistake: something missing, unknown, or of a wrong type or value."""
    kind, arguments = draw(changes.filter(lambda change: change[0] != "enable"))
    inner: Json = dict(arguments)
    wrong: Json = command(PREFIX + kind, **inner)
    spoilt = [wrong, wrong["arguments"], wrong["arguments"]]
    if draw(st.booleans()):
        step = {"type": PREFIX + kind, "data": inner}
        wrong = transaction(step)
        if draw(st.booleans()):
            wrong["arguments"]["properties"] = {"completion-mode": "individual"}
            spoilt = [wrong["arguments"]["properties"]]
        else:
            spoilt = [wrong["arguments"], step, inner, inner]
    where = draw(st.sampled_from(spoilt))
    key = draw(st.sampled_from([*sorted(where), "unknown"]))
    if draw(st.booleans()) and key in where:
        del where[key]
    else:
        where[key] = draw(odd_values)
    return wrong


@st.composite
def writes(draw: st.DrawFn, size: int) -> list[tuple[int, int]]:
    """1..8 of them: small ones, unaligned ones, over a group's edge, up to the end."""
    found = []
    for _ in range(draw(st.integers(1, 8))):
        near = draw(st.sampled_from([0, 512, 4096, 65536, 1 << 19, size])) % size
        offset = min(max(0, near + draw(st.integers(-1025, 70000))), size - 1)
        nbytes = draw(st.sampled_from([1, 2, 511, 512, 513, 4096, 70000, 300000]))
        found.append((offset, min(nbytes, size - offset)))
    return found


def without_crash(there: set[tuple[str, str]], wanted: list[Json]) -> list[Json]:
    """A transaction's enable that cannot be prepared is a defect (see DEFECTS): disable instead,
    which fails with the same text."""
    there = set(there)
    found = []
    for each in wanted:
        data = each["data"]
        at = (data.get("node", ""), data.get("name", ""))
        if each["type"] == PREFIX + "enable" and at not in there:
            each = action("disable", **data)
        elif each["type"] == PREFIX + "remove":
            there.discard(at)
        elif each["type"] == PREFIX + "add":
            there.add(at)
        found.append(each)
    return found


class Lockstep(RuleBasedStateMachine):
    daemon: ClassVar[Daemon]
    steps: ClassVar[int] = 0
    refused: ClassVar[int] = 0
    ends: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.busy: dict[str, str] = {}  # by node
        self.frozen: str | None = None  # the node
        self.read_only: set[str] = set()
        self.daemon.renew()
        self.ours = self.make()

    def make(self) -> Ours:
        return Ours(self.daemon)

    def both(self, request: Json) -> None:
        """Send it to both; the same answer and the same state afterwards."""
        request = self.without_loss(request)
        several = request.get("execute") == "transaction"
        before = on_disk(self.daemon) if several else {}
        ours = self.ours.execute(request)
        try:
            theirs = self.daemon.execute(request)
        except Crashed:
            self.daemon.restart()
            raise AssertionError(f"QEMU crashed; ours answered {ours} to {request}") from None
        assert as_of(self.daemon.version, ours) == theirs, request
        type(self).refused += "error" in theirs
        self.compare(request)
        if several and "error" in theirs:
            after = on_disk(self.daemon)
            for node, names in before.items():
                # A removal was aborted, but not in QEMU's image: see qemu-differences.md.
                for name in sorted({*names} - {*after[node]}):
                    self.both(command(PREFIX + "remove", node=node, name=name))

    def without_loss(self, request: Any) -> Any:
        """What we refuse, and QEMU before 11.1 does not: nothing persistent is added on a read-only
        node."""
        if self.daemon.version >= (11, 1):
            return request
        if isinstance(request, list):
            return [self.without_loss(each) for each in request]
        if not isinstance(request, dict):
            return request
        lost = request.get("persistent") is True and request.get("node") in [*self.read_only]
        return {
            key: self.without_loss(value)
            for key, value in request.items()
            if not (lost and key == "persistent")
        }

    def compare(self, what: object) -> None:
        type(self).steps += 1
        ours, theirs = state(self.ours), state(self.daemon)
        differing = {
            node: (ours[node], theirs[node]) for node in ours if ours[node] != theirs[node]
        }
        assert not differing, (what, differing)

    def there(self) -> list[tuple[str, str]]:
        """The (node, name) of every bitmap."""
        nodes = self.ours.graph.nodes.values()
        return [(node.name, name) for node in nodes for name in node.bitmaps]

    def usable(self) -> list[tuple[str, str]]:
        """Of these one can be made busy."""
        return [
            (node, name)
            for node, name in self.there()
            if node not in self.busy and not self.ours.bitmap(node, name).inconsistent
        ]

    @initialize(
        added=st.lists(
            st.tuples(
                st.sampled_from("abcdpqr"),
                st.sampled_from("xyz"),
                good_granularities,
                st.booleans(),
            ),
            max_size=6,
        )
    )
    def begin(self, added: list[tuple[str, str, int, bool]]) -> None:
        for node, name, granularity, stored in added:
            arguments = {"granularity": granularity, "persistent": stored and node in QCOW2}
            self.both(command(PREFIX + "add", node=node, name=name, **arguments))

    @rule(change=changes)
    def one_command(self, change: tuple[str, Json]) -> None:
        kind, arguments = change
        self.both(command(PREFIX + kind, **arguments))

    @rule(data=st.data(), change=st.sampled_from(CHANGES))
    @precondition(lambda self: self.there())
    def one_command_on_what_is_there(self, data: st.DataObject, change: str) -> None:
        node, name = data.draw(st.sampled_from(self.there()))
        arguments = {**data.draw(DATA[change]), "node": node}
        arguments["target" if change == "merge" else "name"] = name
        self.both(command(PREFIX + change, **arguments))

    @rule(wrong=malformed())
    def one_malformed_command(self, wrong: Json) -> None:
        self.both(wrong)

    @rule(wanted=some_actions())
    def some_actions_at_once(self, wanted: list[Json]) -> None:
        self.transact(wanted)

    @rule(data=st.data())
    @precondition(lambda self: self.there())
    def some_actions_on_what_is_there(self, data: st.DataObject) -> None:
        """So that more than one or two actions are prepared before one fails."""
        present = st.sampled_from(self.there())
        wanted = []
        for _ in range(data.draw(st.integers(1, 6))):
            kind = data.draw(st.sampled_from(CHANGES))
            arguments = data.draw(DATA[kind])
            node, name = data.draw(present)
            if kind == "merge":
                arguments["target"] = name
                found = data.draw(st.lists(present, min_size=1, max_size=3))
                same = [each for each in found if NODES[each[0]].size == NODES[node].size]
                merged = same or [(node, name)]
                arguments["bitmaps"] = [{"node": n, "name": b} for n, b in merged]
            elif kind != "add":
                arguments["name"] = name
            wanted.append(action(kind, **{**arguments, "node": node}))
        if data.draw(st.booleans()):
            wanted.append(action("abort"))
        self.transact(wanted)

    @rule(data=st.data(), persistent=st.booleans(), aborted=st.booleans())
    @precondition(lambda self: self.usable())
    def move(self, data: st.DataObject, persistent: bool, aborted: bool) -> None:
        """To another node, with all that it is."""
        node, name = data.draw(st.sampled_from(self.usable()))
        size = NODES[node].size
        others = [other for other in NODES if NODES[other].size == size and other != node]
        assume(others)
        other = data.draw(st.sampled_from(others))
        bitmap = self.ours.bitmap(node, name)
        new, old = {"node": other, "name": name}, {"node": node, "name": name}
        kind = {"granularity": bitmap.granularity, "persistent": persistent and other in QCOW2}
        wanted = [
            action("add", **new, **kind, disabled=True),
            action("merge", node=other, target=name, bitmaps=[old]),
            *([action("enable", **new)] if bitmap.enabled else []),
            action("remove", **old),
            *([action("abort")] if aborted else []),
        ]
        self.transact(wanted)

    def transact(self, wanted: list[Json]) -> None:
        free = set(self.there()) - set(self.busy.items())
        self.both(transaction(*without_crash(free, wanted)))

    @rule(data=st.data(), node=st.sampled_from(list(NODES)))
    def guest_writes(self, data: st.DataObject, node: str) -> None:
        written = data.draw(writes(NODES[node].size))
        if node in self.read_only:
            with pytest.raises(ReadonlyError):
                self.ours.write(node, written)
            return
        self.daemon.write(node, written)
        self.ours.write(node, written)
        self.compare((node, written))

    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        """Busy by somebody else's use; here set from the inside."""
        free = self.usable()
        assume(free)
        node, name = data.draw(st.sampled_from(free))
        self.daemon.hold(node, name)
        self.ours.hold(node, name)
        self.busy[node] = name
        self.compare(("hold", node, name))

    @rule(data=st.data())
    @precondition(lambda self: self.busy.keys() - {self.frozen})
    def release(self, data: st.DataObject) -> None:
        node = data.draw(st.sampled_from(sorted(self.busy.keys() - {self.frozen})))
        self.daemon.release(node)
        self.ours.hold(node, self.busy.pop(node), busy=False)
        self.compare(("release", node))

    @rule(data=st.data())
    @precondition(lambda self: self.frozen is None)
    def freeze(self, data: st.DataObject) -> None:
        """A backup reads the bitmap, a successor records."""
        size = self.daemon.nodes[TARGET].size
        free = [
            (node, name)
            for node, name in self.usable()
            if NODES[node].size == size and not self.ours.bitmap(node, name).readonly
        ]
        assume(free)
        node, name = data.draw(st.sampled_from(free))
        self.daemon.freeze(node, name, TARGET)
        self.successor = self.ours.bitmap(node, name).freeze()
        self.frozen, self.busy[node] = node, name
        self.compare(("freeze", node, name))

    @rule(success=st.booleans())
    @precondition(lambda self: self.frozen is not None)
    def thaw(self, success: bool) -> None:
        node, self.frozen = self.frozen, None
        assert node is not None
        self.daemon.thaw(node, success)
        del self.busy[node]
        if success:
            self.successor.done()
        self.successor.close()
        self.compare(("thaw", node, success))

    # ---- closing and opening ---------------------------------------------------------------

    @rule(
        how=st.sampled_from([*["reopen"] * 6, "restart", "kill"]),
        nodes=st.lists(st.sampled_from([*QCOW2]), min_size=1, max_size=2, unique=True),
        read_only=st.sets(st.sampled_from("abpqr"), max_size=2),
        exchanged=st.booleans(),
    )
    def end(self, how: str, nodes: list[str], read_only: set[str], exchanged: bool) -> None:
        """One rule for all three, since they take long."""
        if how == "restart" and self.busy:
            how = "reopen"
        if how == "kill":
            self.kill()
        elif how == "restart":
            self.restart(read_only, exchanged)
        else:
            free = [node for node in nodes if node not in self.busy]
            assume(free)
            self.reopen(free, read_only, exchanged)
        self.ends[how] += 1
        self.compare((how, nodes, read_only, exchanged))

    def reopen(self, nodes: list[str], read_only: set[str], exchanged: bool) -> None:
        for node in nodes:
            self.daemon.close_node(node)
            self.ours.close_node(node)
        self.between(nodes, exchanged)
        for node in nodes:
            self.daemon.open_node(node, read_only=node in read_only)
            self.ours.open_node(node, read_only=node in read_only)
        self.read_only = self.read_only - {*nodes} | read_only & {*nodes}

    def restart(self, read_only: set[str], exchanged: bool) -> None:
        assert self.daemon.stop() == 0
        self.ours.stop()
        self.between([*QCOW2], exchanged)
        self.daemon.start(read_only)
        self.ours.start(read_only)
        self.read_only = read_only

    def kill(self) -> None:
        stored = on_disk(self.daemon)
        self.daemon.kill()
        self.ours.stop(kill=True)
        self.between([*QCOW2], exchanged=False, leaks=True)
        read_only, self.read_only = self.read_only, set()
        self.busy, self.frozen = {}, None
        self.daemon.start()
        self.ours.start()
        for node, name in self.there():
            bitmap = self.ours.bitmap(node, name)
            assert bitmap.inconsistent or node in read_only
            # What was added since the image was opened is not in QEMU's: see qemu-differences.md.
            if name not in stored[node]:
                self.ours.graph.nodes[node].remove_bitmap(name)

    def between(self, nodes: list[str], exchanged: bool, leaks: bool = False) -> None:
        """Both sides have closed these images."""
        ours, theirs = self.ours.images, self.daemon.images
        check_images([side[node] for side in (ours, theirs) for node in nodes], leaks=leaks)
        if exchanged:
            for node in nodes:
                ours[node], theirs[node] = theirs[node], ours[node]

    def teardown(self) -> None:
        self.ours.stop(kill=True)


def run(machine: type[Lockstep], daemon: Daemon, steps: int, **options: Any) -> None:
    machine.daemon = daemon
    machine.steps = machine.refused = 0
    machine.ends = Counter()
    while machine.steps < steps:  # not every step that is drawn is one
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=-(-(steps - machine.steps) // STEPS_PER_EXAMPLE),
                stateful_step_count=STEPS_PER_EXAMPLE,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                **options,
            ),
        )


def test_every_answer_is_qemus(daemon: Daemon) -> None:
    run(Lockstep, daemon, STEPS)
    ends = ", ".join(f"{count} x {how}" for how, count in sorted(Lockstep.ends.items()))
    print(f"{Lockstep.steps} steps in lockstep with QEMU, {Lockstep.refused} refused, {ends}")
    assert Lockstep.steps >= STEPS
    # A machine that only fails, or never does, would prove little.
    assert Lockstep.steps // 10 < Lockstep.refused < Lockstep.steps * 3 // 4


class ForgetsAWrite(Ours):
    def write(self, node: str, writes: list[tuple[int, int]]) -> None:
        super().write(node, writes[:-1])


class AbortDisables(Ours):
    """QEMU's own defect, so to speak."""

    def execute(self, request: Json) -> Json:
        reply = super().execute(request)
        if "error" in reply and request.get("execute") == "transaction":
            for node in self.graph.nodes.values():
                for bitmap in node.bitmaps.values():
                    set_flag(bitmap, "enabled", False)
        return reply


class NeverStores(Ours):
    def close_node(self, node: str, *, kill: bool = False) -> None:
        super().close_node(node, kill=True)


@pytest.mark.parametrize("broken", [ForgetsAWrite, AbortDisables, NeverStores])
def test_the_machine_notices(daemon: Daemon, broken: type[Ours]) -> None:
    class Broken(Lockstep):
        def make(self) -> Ours:
            return broken(self.daemon)

    with pytest.raises(AssertionError, match=r"recording|count|sha256"):
        run(Broken, daemon, 1000, phases=[Phase.generate], database=None, derandomize=True)


# ---- one by one ---------------------------------------------------------------------------------

ADD_X = command(PREFIX + "add", node="a", name="x", granularity=4096)
X = {"node": "a", "name": "x"}
NO_GRAIN = "Granularity must be power of 2 and at least 512"


#: Where QEMU 7.2 is wrong: what is done before (after ADD_X, a write and whether `x` is held), the
#: command, and the answer that is right. Either it crashes, or it answers so and changes something.
DEFECTS: dict[str, tuple[bool, Json, Json, str]] = {
    "a merge of nothing": (
        False,
        command(PREFIX + "merge", node="a", target="x", bitmaps=[]),
        {"return": {}},
        "crash",
    ),
    "a merge of nothing in a transaction": (
        False,
        transaction(action("merge", node="a", target="x", bitmaps=[])),
        {"return": {}},
        "crash",
    ),
    "a transaction enables a missing bitmap": (
        False,
        transaction(action("disable", **X), action("enable", node="a", name="y")),
        error("Dirty bitmap 'y' not found"),
        "crash",
    ),
    "a transaction enables a bitmap of a missing node": (
        False,
        transaction(action("clear", **X), action("enable", node="nowhere", name="y")),
        error("Node 'nowhere' not found"),
        "crash",
    ),
    "a transaction enables a busy bitmap that is enabled": (
        True,
        transaction(action("enable", **X)),
        in_use("x"),
        "disabled",
    ),
    "a transaction enables what it removes": (
        False,
        transaction(action("remove", **X), action("enable", **X)),
        in_use("x"),
        "disabled",
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_of_qemu_is_none_of_ours(daemon: Daemon, ours: Ours, name: str) -> None:
    held, request, right, defect = DEFECTS[name]
    same(daemon, ours, ADD_X)
    daemon.write("a", [(5000, 1)])
    ours.write("a", [(5000, 1)])
    if held:
        daemon.hold("a", "x")
        ours.hold("a", "x")
    before = state(daemon)
    assert ours.execute(request) == right
    assert state(ours) == before

    # A later QEMU may have mended it; then it has to be as we are.
    try:
        assert daemon.execute(request) == right
    except Crashed:
        assert defect == "crash"
        assert daemon.wait_for_crash() < 0
        daemon.restart()
        return
    after = state(daemon)
    if after != before:
        assert defect == "disabled"
        before["a"][0]["recording"] = False
        assert after == before


@pytest.mark.parametrize(
    ("target", "sources", "complaint"),
    [
        ("nope", ["missing"], "Dirty bitmap 'nope' not found"),
        ("held", ["missing", "held"], "Dirty bitmap 'missing' not found"),
        ("held", ["x", "missing"], in_use("held")),
        ("held", [{"node": "b", "name": "busy"}], in_use("held")),
        ("held", [{"node": "c", "name": "big"}], in_use("held")),
        ("x", [{"node": "b", "name": "busy"}, "missing"], in_use("busy")),
        ("x", ["x", {"node": "b", "name": "busy"}, {"node": "c", "name": "big"}], in_use("busy")),
        ("x", ["missing", {"node": "b", "name": "busy"}], "Dirty bitmap 'missing' not found"),
        (
            "x",
            [{"node": "c", "name": "big"}, {"node": "b", "name": "busy"}],
            "Bitmaps are of different sizes (destination size is 1048576, source size is 1049088) "
            "and can't be merged",
        ),
    ],
)
def test_of_several_reasons_not_to_merge_the_same_one_is_named(
    daemon: Daemon, ours: Ours, target: str, sources: list[Any], complaint: str | Json
) -> None:
    """Source after source: is it there, the target's flags, the source's flags, its size."""
    for node, name in (("a", "x"), ("a", "held"), ("b", "busy"), ("c", "big")):
        same(daemon, ours, command(PREFIX + "add", node=node, name=name))
    for node, name in (("a", "held"), ("b", "busy")):
        daemon.hold(node, name)
        ours.hold(node, name)
    expected = error(complaint) if isinstance(complaint, str) else complaint
    arguments = {"node": "a", "target": target, "bitmaps": sources}
    assert same(daemon, ours, command(PREFIX + "merge", **arguments)) == expected
    assert same(daemon, ours, transaction(action("merge", **arguments))) == expected


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"node": "nowhere", "name": ""}, "Bitmap name cannot be empty"),
        ({"node": "a", "name": "", "granularity": 3}, "Bitmap name cannot be empty"),
        (
            {"node": "nowhere", "name": "x", "granularity": 3},
            "Cannot find device='nowhere' nor node-name='nowhere'",
        ),
        ({"node": "a", "name": "x", "granularity": 3, "persistent": True}, NO_GRAIN),
        (
            {"node": "a", "name": "x", "persistent": True},
            "Can't store persistent bitmaps to a: Operation not supported",
        ),
        (
            {"node": "a", "name": TOO_LONG, "persistent": True},
            "Can't store persistent bitmaps to a: Operation not supported",
        ),
        ({"node": "a", "name": TOO_LONG, "granularity": 3}, NO_GRAIN),
        ({"node": "a", "name": TOO_LONG}, f"Bitmap name too long: {TOO_LONG}"),
        ({"node": "a", "name": "x"}, "Bitmap already exists: x"),
    ],
)
def test_of_several_reasons_not_to_add_the_same_one_is_named(
    daemon: Daemon, ours: Ours, arguments: Json, complaint: str
) -> None:
    same(daemon, ours, ADD_X)
    assert same(daemon, ours, command(PREFIX + "add", **arguments)) == error(complaint)
    assert same(daemon, ours, transaction(action("add", **arguments))) == error(complaint)


@pytest.mark.parametrize("success", [False, True])
def test_a_backup_drops_what_it_read_or_nothing(daemon: Daemon, ours: Ours, success: bool) -> None:
    """A successor that takes over is listed as what it is, a bitmap newer than the other."""
    for name in ("x", "later"):
        same(daemon, ours, command(PREFIX + "add", node="a", name=name, granularity=4096))
    for offset in (0, 70000):
        daemon.write("a", [(offset, 5)])
        ours.write("a", [(offset, 5)])
        if offset == 0:
            daemon.freeze("a", "x", TARGET)
            frozen = ours.bitmap("a", "x").freeze()
        assert state(ours) == state(daemon)
    daemon.thaw("a", success)
    if success:
        frozen.done()
    frozen.close()
    here, there = state(ours)["a"], state(daemon)["a"]
    assert [each["name"] for each in here] == (["x", "later"] if success else ["later", "x"])
    assert here == there
    counts = {each["name"]: each["count"] for each in here}
    assert counts == {"x": 4096 if success else 8192, "later": 8192}


@pytest.mark.parametrize("aborted", [False, True])
def test_bitmaps_move_to_another_node_in_one_transaction(
    daemon: Daemon, ours: Ours, aborted: bool
) -> None:
    """The scenario of QEMU's iotest 254, with bitmaps that are not stored: a new node takes over
    the bitmaps of an old one, each with its content and its state."""
    bitmaps = [("bitmap0", 65536, False), ("bitmap1", 512, False), ("bitmap2", 4096, True)]
    for name, granularity, disabled in bitmaps:
        data = {"node": "a", "name": name, "granularity": granularity, "disabled": disabled}
        same(daemon, ours, command(PREFIX + "add", **data))
    # The one that is disabled has content too.
    same(daemon, ours, command(PREFIX + "enable", node="a", name="bitmap2"))
    for offset in (0, 65536 * 3 + 5, (1 << 20) - 1):
        daemon.write("a", [(offset, 1)])
        ours.write("a", [(offset, 1)])
    same(daemon, ours, command(PREFIX + "disable", node="a", name="bitmap2"))
    before = state(ours)
    assert before == state(daemon)
    assert [each["count"] for each in before["a"]] == [12288, 1536, 196608]

    move = []
    for name, granularity, disabled in bitmaps:
        new = {"node": "b", "name": name}
        old = {"node": "a", "name": name}
        move += [
            action("add", **new, granularity=granularity, disabled=True),
            action("merge", node="b", target=name, bitmaps=[old]),
            *([] if disabled else [action("enable", **new)]),
            action("remove", **old),
        ]
    if aborted:
        assert same(daemon, ours, transaction(*move, action("abort"))) == ABORTED
        assert state(ours) == before
    else:
        assert same(daemon, ours, transaction(*move)) == {"return": {}}
        assert state(ours) == {**before, "a": None, "b": before["a"]}

    # Who recorded a write of the guest records the next one, where it is now.
    for node in "ab":
        daemon.write(node, [(1 << 19, 70000)])
        ours.write(node, [(1 << 19, 70000)])
    after = state(ours)
    assert after == state(daemon)
    found = after["a" if aborted else "b"]
    assert [each["count"] for each in found] == [12288, 1536 + 70144, 196608 + 131072]


def test_a_transaction_property_is_refused(daemon: Daemon, ours: Ours) -> None:
    request = transaction(action("clear", **X))
    request["arguments"]["properties"] = {"completion-mode": "grouped"}
    text = f"Action '{PREFIX}clear' does not support transaction property completion-mode = grouped"
    assert ours.execute(request) == error(text)
    assert daemon.execute(request) == as_of(daemon.version, error(text))
