# SPDX-License-Identifier: MIT
"""QMP commands on a graph: the replies, and that they are those of QEMU."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from daemon import QmpClient
from hypothesis import given
from hypothesis import strategies as st
from lockstep import as_of
from peers import peer

from pybitmap import AbortedError, BlockGraph, NotFoundError, __version__
from pybitmap.qmp import Session, execute, transact
from pybitmap.qmp.commands import COMMANDS, SESSION_COMMANDS
from pybitmap.qmp.schema import SchemaError, Struct, Where

MIB = 1 << 20
SIZES = {"n": MIB, "m": MIB, "big": 2 * MIB, "ro": MIB}

Json = dict[str, Any]


def new_graph() -> BlockGraph:
    graph = BlockGraph()
    for name, size in SIZES.items():
        graph.add_node(name, size, read_only=name == "ro")
    return graph


@pytest.fixture
def graph() -> Iterator[BlockGraph]:
    with new_graph() as graph:
        yield graph


def command(name: str, /, **arguments: Any) -> Json:
    return {"execute": name, "arguments": arguments}


def bitmap(action: str, /, *names: str, **more: Any) -> Json:
    data = dict(zip(("node", "name"), names))
    return command(f"block-dirty-bitmap-{action}", **data, **more)


def merge(node: str, target: str, *sources: Any) -> Json:
    return bitmap("merge", node=node, target=target, bitmaps=list(sources))


def transaction(*actions: Json, **more: Any) -> Json:
    return command(
        "transaction",
        actions=[{"type": each["execute"], "data": each["arguments"]} for each in actions],
        **more,
    )


ABORT = command("abort")
GROUPED = {"completion-mode": "grouped"}


def done(graph: BlockGraph, command: Json) -> Any:
    reply = execute(graph, command)
    assert "return" in reply, reply
    return reply["return"]


def failed(graph: BlockGraph, command: Any) -> str:
    reply = execute(graph, command)
    assert reply["error"]["class"] == "GenericError"
    desc = reply["error"]["desc"]
    assert isinstance(desc, str)
    return desc


def state(graph: BlockGraph) -> Any:
    return done(graph, command("query-named-block-nodes"))


# ---- replies ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ident", [1, None, "x", [1, {"a": []}], 1.5])
def test_id_comes_back(graph: BlockGraph, ident: Any) -> None:
    assert execute(graph, {"execute": "query-block", "id": ident}) == {"return": [], "id": ident}
    assert execute(graph, {"execute": "nothing", "id": ident})["id"] == ident
    assert execute(graph, {"id": ident})["id"] == ident


def test_unknown_command(graph: BlockGraph) -> None:
    assert execute(graph, {"execute": "foo"}) == {
        "error": {"class": "CommandNotFound", "desc": "The command foo has not been found"}
    }


@pytest.mark.parametrize("what", [None, 1, "x", [], [{"execute": "query-block"}]])
def test_not_an_object(graph: BlockGraph, what: Any) -> None:
    assert failed(graph, what) == "QMP input must be a JSON object"


def test_all_commands_are_listed_and_exist(graph: BlockGraph) -> None:
    names = [each["name"] for each in done(graph, command("query-commands"))]
    assert len(names) == len(set(names)) == 22
    for name in names:
        desc = execute(graph, command(name)).get("error", {}).get("desc", "")
        assert "has not been found" not in desc


def test_the_version_is_ours_and_does_not_claim_to_be_that_of_qemu(graph: BlockGraph) -> None:
    version = done(graph, command("query-version"))
    numbers = version["qemu"]
    assert list(numbers) == ["major", "minor", "micro"]
    assert ".".join(map(str, numbers.values())) == __version__
    assert version["package"].startswith(f"pybitmap {__version__}, not QEMU;")


def test_a_machine_that_runs_and_has_no_name(graph: BlockGraph) -> None:
    assert done(graph, command("query-status")) == {"running": True, "status": "running"}
    assert done(graph, command("query-name")) == {}


def test_every_reply_is_what_the_schema_says(graph: BlockGraph) -> None:
    node = graph.find_node("n")
    node.add_bitmap("b", 512)
    node.mark_dirty(0, 1)
    node.mark_dirty(4096, 1)
    this = {"node": "n", "name": "b"}
    arguments: dict[str, Json] = {
        "block-dirty-bitmap-add": {"node": "n", "name": "c"},
        "block-dirty-bitmap-merge": {"node": "n", "target": "b", "bitmaps": ["c"]},
        "block-dirty-bitmap-remove": {"node": "n", "name": "c"},
        "transaction": {"actions": []},
        "__org.pybitmap_mark": {"node": "n", "offset": 0, "length": 1},
        "__org.pybitmap_areas": {**this, "limit": 1},
        "block-dirty-bitmap-clear": {"node": "n", "name": "d"},
    }
    node.add_bitmap("d")
    order = sorted(COMMANDS, key=lambda name: name.endswith("-remove"))
    for name in order:
        each = COMMANDS[name]
        given = arguments.get(name, this if each.arguments.required else {})
        returned = done(graph, command(name, **given))
        each.returns.check(returned, Where())
        if isinstance(each.returns, Struct) and each.returns.required:
            with pytest.raises(SchemaError):  # the check notices
                each.returns.check({}, Where())
    with Session(graph) as session:
        for name in ("freeze", "done", "freeze", "thaw"):
            each_in = SESSION_COMMANDS[f"__org.pybitmap_{name}"]
            reply = session.execute(ours(name, "b"))
            each_in.returns.check(reply["return"], Where())


def schema_of(reply: list[Json]) -> dict[str, Json]:
    by_name = {each["name"]: each for each in reply}
    assert len(by_name) == len(reply)
    return by_name


def test_the_schema_has_every_command_and_every_type_that_it_names(graph: BlockGraph) -> None:
    schema = schema_of(done(graph, command("query-qmp-schema")))
    listed = {each["name"] for each in done(graph, command("query-commands"))}
    named = {name for name, info in schema.items() if info["meta-type"] == "command"}
    assert named == listed
    used = set()
    for info in schema.values():
        for key in ("arg-type", "ret-type", "element-type"):
            used |= {info[key]} if key in info else set()
        if info["meta-type"] in ("object", "alternate"):
            used |= {each["type"] for each in info["members"] + info.get("variants", [])}
    assert used == set(schema) - named
    assert schema["x-debug-block-dirty-bitmap-sha256"]["features"] == ["unstable"]


def test_nodes_and_bitmaps_newest_first(graph: BlockGraph) -> None:
    for name in "abc":
        done(graph, bitmap("add", "m", name))
    nodes = state(graph)
    assert [each["node-name"] for each in nodes] == ["ro", "big", "m", "n"]
    assert [each["ro"] for each in nodes] == [True, False, False, False]
    assert [each["name"] for each in nodes[2]["dirty-bitmaps"]] == ["c", "b", "a"]
    assert "dirty-bitmaps" not in nodes[3]


def areas(graph: BlockGraph, name: str = "b", **more: Any) -> Any:
    return done(graph, command("__org.pybitmap_areas", node="n", name=name, **more))


def test_areas_by_pages(graph: BlockGraph) -> None:
    done(graph, bitmap("add", "n", "b", granularity=512))
    for offset, length in ((1000, 100), (4096, 1), (MIB - 1, 1)):
        done(graph, command("__org.pybitmap_mark", node="n", offset=offset, length=length))
    everything = [(512, 1024), (4096, 512), (MIB - 512, 512)]
    expected = [{"offset": offset, "length": length} for offset, length in everything]
    assert areas(graph) == {"areas": expected}
    assert areas(graph, limit=3) == {"areas": expected}
    assert areas(graph, limit=2) == {"areas": expected[:2], "next": MIB - 512}
    assert areas(graph, start=MIB - 512, limit=2) == {"areas": expected[2:]}
    assert areas(graph, start=1024) == {"areas": [{"offset": 1024, "length": 512}, *expected[1:]]}
    assert areas(graph, start=MIB) == {"areas": []}
    found, start = [], 0
    while start is not None:
        page = areas(graph, start=start, limit=1)
        found += page["areas"]
        start = page.get("next")
    assert found == expected


@pytest.mark.parametrize("wrong", [{"limit": 0}, {"limit": 10_001}, {"start": -1}, {"start": "0"}])
def test_pages_that_there_are_not(graph: BlockGraph, wrong: Json) -> None:
    done(graph, bitmap("add", "n", "b"))
    failed(graph, command("__org.pybitmap_areas", node="n", name="b", **wrong))


THIS = {"bitmaps": [{"node": "n", "name": "b"}]}


def ours(kind: str, *names: str) -> Json:
    bitmaps = [{"node": "n", "name": name} for name in names]
    return command(f"__org.pybitmap_{kind}", bitmaps=bitmaps)


def test_what_is_frozen_goes_only_when_the_client_says_so(graph: BlockGraph) -> None:
    node = graph.find_node("n")
    kept = node.add_bitmap("b")
    node.mark_dirty(0, 1)
    with Session(graph) as session:
        assert session.execute(ours("freeze", "b")) == {"return": {}}
        node.mark_dirty(MIB // 2, 1)
        assert areas(graph) == {"areas": [{"offset": 0, "length": 65536}]}
        assert "in use" in session.execute(ours("freeze", "b"))["error"]["desc"]
        assert session.execute(ours("thaw", "b")) == {"return": {}}
        assert kept.count() == 2 * 65536
        assert session.execute(ours("freeze", "b")) == {"return": {}}
        assert session.execute(ours("done", "b")) == {"return": {}}
        assert kept.count() == 0
        for name in ("done", "thaw"):
            reply = session.execute(ours(name, "b"))
            assert reply["error"]["desc"] == "Bitmap 'b' is not frozen by this client"
        node.mark_dirty(0, 1)
        assert session.execute(ours("freeze", "b")) == {"return": {}}
        with Session(graph) as other:
            reply = other.execute(ours("done", "b"))
            assert reply["error"]["desc"] == "Bitmap 'b' is not frozen by this client"
            assert "in use" in other.execute(ours("freeze", "b"))["error"]["desc"]
    assert (kept.count(), kept.busy) == (65536, False)


def test_of_several_all_are_frozen_and_some_are_done(graph: BlockGraph) -> None:
    node = graph.find_node("n")
    for name in "bcd":
        node.add_bitmap(name)
    node.mark_dirty(0, 1)
    with Session(graph) as session:
        missing = session.execute(ours("freeze", "b", "c", "q"))
        assert "not found" in missing["error"]["desc"]
        assert not any(each.busy for each in node.bitmaps.values())
        assert "twice" in session.execute(ours("freeze", "b", "b"))["error"]["desc"]
        assert session.execute(ours("freeze", "b", "c")) == {"return": {}}
        reply = session.execute(ours("done", "b", "d"))
        assert "not frozen by this client" in reply["error"]["desc"]
        assert node.bitmaps["b"].busy
        assert session.execute(ours("done", "b")) == {"return": {}}
    assert [node.bitmaps[name].count() for name in "bcd"] == [0, 65536, 65536]


@pytest.mark.parametrize("name", ["freeze", "done", "thaw"])
def test_without_a_session_nothing_is_frozen(graph: BlockGraph, name: str) -> None:
    graph.find_node("n").add_bitmap("b")
    assert "needs a session" in failed(graph, command(f"__org.pybitmap_{name}", **THIS))
    assert not graph.nodes["n"].bitmaps["b"].busy


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (-1, 1),
        (0, -1),
        (MIB, 1),
        (0, MIB + 1),
        (1 << 62, 1 << 62),
        (1 << 64, 1),
        ("0", 1),
        (0.0, 1),
    ],
)
def test_bad_marks_change_nothing(graph: BlockGraph, offset: Any, length: Any) -> None:
    done(graph, bitmap("add", "n", "b"))
    failed(graph, command("__org.pybitmap_mark", node="n", offset=offset, length=length))
    assert graph.nodes["n"].bitmaps["b"].count() == 0


def test_mark_of_a_read_only_node(graph: BlockGraph) -> None:
    assert "read-only" in failed(
        graph, command("__org.pybitmap_mark", node="ro", offset=0, length=1)
    )


def test_half_a_surrogate_is_refused(graph: BlockGraph) -> None:
    assert "expected: string" in failed(graph, bitmap("add", "n", "\ud800"))


def test_merge_of_nothing_succeeds(graph: BlockGraph) -> None:
    done(graph, bitmap("add", "n", "b"))
    assert done(graph, merge("n", "b")) == {}


def test_enable_of_a_missing_bitmap_in_a_transaction(graph: BlockGraph) -> None:
    before = state(graph)
    assert (
        failed(graph, transaction(bitmap("add", "n", "b"), bitmap("enable", "n", "q")))
        == "Dirty bitmap 'q' not found"
    )
    assert state(graph) == before


@pytest.mark.parametrize("action", ["add", "remove", "clear", "enable", "disable"])
def test_grouped_is_refused(graph: BlockGraph, action: str) -> None:
    assert failed(graph, transaction(bitmap(action, "n", "b"), properties=GROUPED)) == (
        f"Action 'block-dirty-bitmap-{action}' does not support transaction property"
        " completion-mode = grouped"
    )


def test_a_command_within_a_transaction_of_the_thread(graph: BlockGraph) -> None:
    graph.find_node("n").add_bitmap("b")
    with graph.transaction():
        assert "transaction open" in failed(graph, bitmap("clear", "n", "b"))
        freeze = Session(graph).execute(command("__org.pybitmap_freeze", **THIS))
        assert "transaction open" in freeze["error"]["desc"]


def test_the_move(graph: BlockGraph) -> None:
    done(graph, bitmap("add", "n", "b"))
    done(graph, command("__org.pybitmap_mark", node="n", offset=0, length=1))
    move = [bitmap("add", "m", "b"), merge("m", "b", {"node": "n", "name": "b"})]
    before = state(graph)
    failed(graph, transaction(*move, bitmap("remove", "n", "b"), ABORT))
    assert state(graph) == before
    done(graph, transaction(*move, bitmap("remove", "n", "b")))
    assert list(graph.nodes["n"].bitmaps) == []
    assert graph.nodes["m"].bitmaps["b"].count() == 65536


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["n", "b", "abort", "block-dirty-bitmap-add"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["node", "name", "type", "data", "bitmaps", "actions", "x"]), inner
        )
    ),
    max_leaves=8,
)
NAMES = [each["name"] for each in execute(BlockGraph(), command("query-commands"))["return"]]


@given(
    st.dictionaries(st.sampled_from(["execute", "arguments", "id", "x"]), JSON)
    | st.fixed_dictionaries({"execute": st.sampled_from(NAMES), "arguments": JSON})
    | st.dictionaries(st.integers() | st.none(), JSON)
)
def test_never_raises(what: Any) -> None:
    with new_graph() as graph:
        reply = execute(graph, what)
        assert ("return" in reply) != ("error" in reply)
        assert "internal error" not in str(reply)


# ---- the same as QEMU -------------------------------------------------------------------------

LONG = "a" * 1023
ADD = "block-dirty-bitmap-add"
BAD_FRAMES: list[Any] = [
    {"execute": "foo", "id": {"a": 1}},
    {},
    [],
    "x",
    None,
    {"execute": 1},
    {"execute": "query-block", "arguments": 1},
    {"execute": "query-block", "arguments": None},
    {"execute": "query-block", "arguments": {"x": 1}},
    {"execute": "query-block", "id": None},
    {"execute": "query-block", "foo": 1, "id": 2},
    {"exec-oob": "query-block"},
    {"execute": "foo", "arguments": 5, "id": 9},
    {"arguments": {}},
    {"execute": "query-block", "id": 2**64 - 1},
    {"execute": "query-block", "id": "é\u0001\u007f😀"},
    {"execute": "qmp_capabilities"},
    {"execute": "quit", "arguments": {"x": 1}},
]
NODE_NAME: list[Json] = [
    {},
    {"node": "n"},
    {"name": "b"},
    {"x": 1},
    {"name": 1},
    {"name": 1, "node": 2},
]
GRANULARITIES: list[Any] = ["x", 1.5, 4096.0, None, True, -(2**63) - 1, -(2**63), -1, 0, 256, 511]
GRANULARITIES += [513, 2**32 - 1, 2**32, 2**63, 2**64]
ADDS: list[Json] = [
    *NODE_NAME,
    {"node": 1, "x": 2, "name": "b"},
    {"x": 1, "node": "n", "name": "b"},
    {"node": None, "name": "b"},
    {"node": [], "name": "b"},
    {"node": {}, "name": "b"},
    *({"node": "n", "name": "b", "granularity": value} for value in GRANULARITIES),
    {"node": "n", "name": "b", "persistent": 1},
    {"node": "n", "name": "b", "disabled": "x"},
    {"node": "n", "name": "b", "persistent": 1, "disabled": 1, "granularity": "x"},
    {"node": "n", "name": "b", "persistent": True},
    {"node": "n", "name": "", "granularity": 3},
    {"node": "zz", "name": ""},
    {"node": "zz", "name": "b"},
    {"node": "", "name": "b"},
    {"node": "n", "name": "b", "granularity": 2**31},
    {"node": "n", "name": "b", "granularity": 2**31},
    {"node": "n", "name": "b", "persistent": True},
    {"node": "n", "name": LONG},
    {"node": "n", "name": LONG + "a"},
    {"node": "n", "name": "é" * 512},
    {"node": "n", "name": LONG + "a", "persistent": True},
    {"node": "ro", "name": "r"},
    {"node": "ro", "name": "r2", "persistent": True},
    {"node": "n", "name": "b2", "disabled": True},
    {"node": "n", "name": 'a\n"b'},
    {"node": "n", "name": 'a\n"b'},
    {"node": "big", "name": "x"},
    {"node": "m", "name": "x", "granularity": 512},
]
TOUCHES: list[Json] = [
    *NODE_NAME,
    {"node": "n", "name": "q"},
    {"node": "q", "name": "q"},
    {"node": "", "name": "q"},
    {"node": "n", "name": ""},
    {"node": "n", "name": "b2", "persistent": True},
    {"node": "ro", "name": "r"},
    {"node": "n", "name": "b2"},
]
SOURCES: list[Any] = [
    "x",
    {},
    None,
    [1],
    ["b2", 1],
    [None],
    [{}],
    [{"node": "n"}],
    [{"node": "n", "name": 1}],
    [{"node": 1}],
    [{"node": "n", "name": "b2", "x": 1}],
    [["b2"]],
    [True],
    [1.5],
    ["b"],
    ["b2", "zz"],
    [{"node": "zz", "name": "q"}],
    [{"node": "m", "name": "q"}],
    [{"node": "big", "name": "x"}],
    [{"node": "m", "name": "x"}],
    [{"node": "m", "name": "x"}, "b2", {"node": "big", "name": "x"}],
    ["zz", {"node": "big", "name": "x"}],
    ["b2", {"x": 1}],
]
MERGES: list[Json] = [
    {},
    {"node": "n"},
    {"node": "n", "target": "b"},
    {"node": "n", "name": "b", "bitmaps": ["b"]},
    {"node": "n", "target": "q", "bitmaps": ["zz"]},
    {"node": "q", "target": "q", "bitmaps": ["zz"]},
    {"bitmaps": [1], "node": 1},
    {"bitmaps": ["zz"], "node": "n", "target": "b", "q": 1},
    *({"node": "n", "target": "b", "bitmaps": each} for each in SOURCES),
]
ACTIONS: list[Any] = [
    1,
    [],
    [1],
    [{}],
    [{"type": "foo"}],
    [{"type": "foo", "x": 1}],
    [{"type": 1}],
    [{"type": None}],
    [{"type": "Abort"}],
    [{"type": "", "data": 3}],
    [{"type": "abort"}],
    [{"type": "abort", "data": {}}],
    [{"type": "abort", "data": {"x": 1}}],
    [{"type": "abort", "data": 1}],
    [{"type": "abort", "data": {}, "x": 1}],
    [{"data": {}}],
    [{"type": ADD}],
    *([{"type": ADD, "data": data}] for data in ADDS if data.get("granularity") != 2**31),
    [{"type": ADD, "data": {"node": "n", "name": "t"}}, {"type": "abort", "data": {}}],
    [{"type": ADD, "data": {"node": "n", "name": "t"}}, {"type": "abort", "data": 1}],
    [{"type": ADD, "data": {"zz": 1, "node": "n", "name": "j"}, "q": 1}, 1],
    *([{"type": "block-dirty-bitmap-merge", "data": data}] for data in MERGES),
    *([{"type": "block-dirty-bitmap-clear", "data": data}] for data in TOUCHES),
]
PROPERTIES: list[Any] = [
    {},
    {"completion-mode": "individual"},
    {"completion-mode": "grouped"},
    {"completion-mode": "x"},
    {"completion-mode": 1},
    {"completion-mode": None},
    {"x": 1},
    1,
    None,
]
# Not here: what crashes QEMU 7.2, a merge of nothing and an enable or disable in a transaction that
# fails.
SCRIPT: list[Any] = [
    *BAD_FRAMES,
    *(command(ADD, **each) for each in ADDS),
    command("query-named-block-nodes", flat=True),
    command("query-named-block-nodes", flat=1),
    *(
        command(f"block-dirty-bitmap-{action}", **each)
        for action in ("clear", "enable", "disable")
        for each in TOUCHES
    ),
    *(command("block-dirty-bitmap-merge", **each) for each in MERGES),
    *(command("x-debug-block-dirty-bitmap-sha256", **each) for each in TOUCHES),
    command("transaction"),
    *(command("transaction", actions=each) for each in ACTIONS),
    *(command("transaction", actions=[], properties=each) for each in PROPERTIES),
    command("transaction", actions=1, properties=1),
    command("transaction", actions=[], x=1),
    transaction(bitmap("remove", "n", "b2"), bitmap("add", "n", "b2")),
    transaction(bitmap("remove", "n", "b2"), bitmap("remove", "n", "b2")),
    transaction(bitmap("disable", "n", "b2"), bitmap("clear", "n", "zz")),
    transaction(bitmap("remove", "n", "b2"), ABORT),
    transaction(bitmap("disable", "n", "b2"), bitmap("clear", "n", "b2"), ABORT),
    transaction(
        bitmap("add", "n", "u1"),
        merge("n", "u1", "b2", {"node": "m", "name": "x"}),
        bitmap("disable", "n", "u1"),
        bitmap("enable", "n", "b2"),
        bitmap("clear", "n", "u1"),
    ),
    transaction(bitmap("add", "n", "u2"), bitmap("remove", "n", "u2")),
    transaction(bitmap("add", "n", "b"), properties=GROUPED),
    *(command("block-dirty-bitmap-remove", **each) for each in TOUCHES),
]


class Qemu:
    """A storage daemon with the nodes of SIZES, and a connection to it."""

    def __init__(self, path: Path) -> None:
        blockdevs = [
            word
            for name, size in SIZES.items()
            for word in (
                "--blockdev",
                f"null-co,node-name={name},size={size},read-only={'on' if name == 'ro' else 'off'}",
            )
        ]
        self.process = subprocess.Popen(
            [
                peer("qemu-storage-daemon", "qemu-system-common"),
                *("--chardev", f"socket,path={path},server=on,wait=on,id=c"),
                *("--monitor", "chardev=c"),
                *blockdevs,
            ]
        )
        self.client = QmpClient(path, self.process)
        self.execute = self.client.execute

    def close(self) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def qemu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Qemu]:
    qemu = Qemu(tmp_path_factory.mktemp("qmp") / "s")
    yield qemu
    qemu.close()


def comparable(reply: Json) -> Any:
    """What both have of the nodes."""
    if isinstance(reply.get("return"), list):
        nodes = [
            {
                "node-name": each["node-name"],
                "ro": each["ro"],
                "size": each["image"]["virtual-size"],
                "dirty-bitmaps": each.get("dirty-bitmaps"),
            }
            for each in reply["return"]
        ]
        return {**reply, "return": nodes}
    return reply


def test_replies_are_those_of_qemu(graph: BlockGraph, qemu: Qemu) -> None:
    query = command("query-named-block-nodes")
    for each in SCRIPT:
        ours, theirs = execute(graph, each), qemu.execute(each)
        assert comparable(as_of(qemu.client.version, ours)) == comparable(theirs), each
        assert comparable(execute(graph, query)) == comparable(qemu.execute(query)), each


def assert_part(ours: dict[str, Json], mine: str, theirs: dict[str, Json], yours: str) -> None:
    """What our type has is what QEMU's has; that may have more members, branches and values."""
    my, your = ours[mine], theirs[yours]
    assert my["meta-type"] == your["meta-type"]
    if my["meta-type"] == "builtin":
        assert my["json-type"] == your["json-type"]
    elif my["meta-type"] == "array":
        assert_part(ours, my["element-type"], theirs, your["element-type"])
    elif my["meta-type"] == "enum":
        assert set(my["values"]) <= {each["name"] for each in your["members"]}
    elif my["meta-type"] == "alternate":
        for one, other in zip(my["members"], your["members"]):
            assert_part(ours, one["type"], theirs, other["type"])
        assert len(my["members"]) == len(your["members"])
    else:
        members = {each["name"]: each for each in your["members"]}
        for each in my["members"]:
            other = members[each["name"]]
            if "default" not in other:  # where QEMU may leave out something, we need not
                assert "default" not in each, each
            assert_part(ours, each["type"], theirs, other["type"])
        assert my.get("tag") == your.get("tag")
        branches = {each["case"]: each["type"] for each in your.get("variants", ())}
        for each in my.get("variants", ()):
            assert_part(ours, each["type"], theirs, branches[each["case"]])


def required(schema: dict[str, Json], name: str) -> set[str]:
    """The members of a type that are always there."""
    return {each["name"] for each in schema[name]["members"] if "default" not in each}


def test_arguments_and_replies_are_those_of_qemus_schema(graph: BlockGraph, qemu: Qemu) -> None:
    ours = schema_of(done(graph, command("query-qmp-schema")))
    theirs = schema_of(qemu.execute(command("query-qmp-schema"))["return"])
    ours_only = {"query-status", "query-name"}  # of QEMU's machines, which its daemon is none of
    for name, mine in ours.items():
        if mine["meta-type"] != "command" or name in ours_only or name.startswith("__org."):
            continue
        yours = theirs[name]
        assert (yours["meta-type"], yours.get("features")) == ("command", mine.get("features"))
        assert_part(ours, mine["arg-type"], theirs, yours["arg-type"])
        if name != "query-qmp-schema":  # ours is no union; test_queries_have_the_form_of_qemus
            assert_part(ours, mine["ret-type"], theirs, yours["ret-type"])
        assert required(ours, mine["arg-type"]) == required(theirs, yours["arg-type"])


@pytest.mark.parametrize("name", ["query-version", "query-commands", "query-qmp-schema"])
def test_queries_have_the_form_of_qemus(graph: BlockGraph, qemu: Qemu, name: str) -> None:
    theirs = qemu.execute(command(name))["return"]
    COMMANDS[name].returns.check(theirs, Where())
    wrong = command(name, x=1)
    assert execute(graph, wrong) == qemu.execute(wrong)


def test_status_and_name_are_those_of_a_machine_of_qemus(graph: BlockGraph, tmp_path: Path) -> None:
    path = tmp_path / "s"
    program = peer("qemu-system-x86_64", "qemu-system-x86")
    options = ["-machine", "none", "-display", "none", "-nodefaults", "-monitor", "none"]
    chardev = f"socket,id=c,path={path},server=on,wait=on"
    process = subprocess.Popen(
        [program, *options, "-chardev", chardev, "-mon", "chardev=c,mode=control"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with closing(QmpClient(path, process)) as client:
            status = client.execute(command("query-status"))["return"]
            status.pop("singlestep", None)  # gone in newer versions
            assert status == done(graph, command("query-status"))
            assert client.execute(command("query-name"))["return"] == {}
    finally:
        process.kill()
        process.wait()


def test_sources_of_a_merge_are_judged_one_by_one(graph: BlockGraph, qemu: Qemu) -> None:
    for each in (
        bitmap("add", "n", "o"),
        bitmap("add", "big", "o"),
        merge("n", "o", {"node": "big", "name": "o"}, "zz"),
    ):
        assert execute(graph, each) == qemu.execute(each)


# ---- a list of actions from Python ------------------------------------------


def test_a_list_of_actions_is_all_or_nothing_and_raises() -> None:
    graph = BlockGraph()
    node = graph.add_node("n", 1 << 20)
    add = {"type": "block-dirty-bitmap-add", "data": {"node": "n", "name": "b"}}
    enable = {"type": "block-dirty-bitmap-enable", "data": {"node": "n", "name": "missing"}}
    with pytest.raises(NotFoundError, match=r"^Dirty bitmap 'missing' not found$"):
        transact(graph, [add, enable])
    assert not node.bitmaps
    with pytest.raises(AbortedError, match=r"^Transaction aborted using Abort action$"):
        transact(graph, [add, {"type": "abort", "data": {}}])
    with pytest.raises(SchemaError, match=r"^Parameter 'type' does not accept value 'x'$"):
        transact(graph, [add, {"type": "x", "data": {}}])
    assert not node.bitmaps
    transact(graph, [add])
    assert list(node.bitmaps) == ["b"]
