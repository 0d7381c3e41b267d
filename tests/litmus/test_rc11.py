# SPDX-License-Identifier: MIT
"""The checker of litmus tests proves itself: on tests whose verdicts are known, and against the
definitions of RC11 taken literally, as relations that are sets of pairs.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import permutations, product
from pathlib import Path

import pytest
from litmus import Access, Litmus, LitmusError, broken, parse
from rc11 import ACQUIRES, RELEASES, Event, decide

CLASSIC = sorted((Path(__file__).parent / "classic").glob("*.litmus"))


# ---- tests that everybody knows ------------------------------------------------------------------


@pytest.mark.parametrize("path", CLASSIC, ids=lambda path: path.stem)
def test_a_classic_has_its_known_verdict(path: Path) -> None:
    """Where it says ~exists, the outcome is allowed with one order or fence less."""
    text = path.read_text()
    test = parse(text)
    verdict = decide(test)
    assert verdict.reached == (not test.forbidden)
    assert verdict.executions
    assert not verdict.races
    for how, variant in broken(text):
        verdict = decide(parse(variant))
        assert verdict.reached or verdict.races, how


def test_the_classics_are_all_there() -> None:
    names = {path.stem for path in CLASSIC}
    assert names >= {"SB", "MP", "LB", "IRIW", "2+2W", "WRC", "RWC+acq", "RMW", "ISA2"}
    assert names >= {"CoRR", "CoRR2", "CoWW", "CoWR", "CoRW", "CoRW1"}


STATES = {"SB": 4, "SB+fences": 3, "MP": 4, "LB": 3, "IRIW": 16, "IRIW+sc": 15, "CoRR": 3}


@pytest.mark.parametrize(("name", "states"), STATES.items(), ids=STATES)
def test_there_are_as_many_outcomes_as_there_should_be(name: str, states: int) -> None:
    text = (CLASSIC[0].parent / f"{name}.litmus").read_text()
    assert len(decide(parse(text)).outcomes) == states


# ---- RC11, literally -----------------------------------------------------------------------------

Relation = set[tuple[int, int]]


def then(*relations: Relation) -> Relation:
    """r ; s ; ..."""
    result, *others = relations
    for other in others:
        after: dict[int, list[int]] = {}
        for a, b in other:
            after.setdefault(a, []).append(b)
        result = {(a, c) for a, b in result for c in after.get(b, ())}
    return result


def closure(relation: Relation) -> Relation:
    result = relation
    while more := then(result, relation) - result:
        result = result | more
    return result


def acyclic(relation: Relation) -> bool:
    return all(a != b for a, b in closure(relation))


class Candidate:
    """An execution of threads without branches, consistent or not."""

    def __init__(self, events: list[Event], sb: Relation, rmw: Relation, rf: Relation) -> None:
        self.events, self.sb, self.rmw, self.rf = events, sb, rmw, rf
        self.same = {(i, i) for i in range(len(events))}
        atomic = self.only("RW", ("relaxed", *ACQUIRES, "release"))
        rs = then(
            self.only("W"),
            self.or_same(self.located(sb)),
            then(self.only("W"), atomic),
            self.or_same(closure(then(rf, rmw))),
        )
        sw = then(
            self.only("RWF", RELEASES),
            self.or_same(then(self.only("F"), sb)),
            rs,
            rf,
            then(self.only("R"), atomic),
            self.or_same(then(sb, self.only("F"))),
            self.only("RWF", ACQUIRES),
        )
        # A half of a read-modify-write is a release or an acquire by its own kind only.
        sw = {(a, b) for a, b in sw if events[a].kind in "WF" and events[b].kind in "RF"}
        self.hb = closure(sb | sw)

    def only(self, kinds: str, orders: tuple[str, ...] = ()) -> Relation:
        return {
            (i, i)
            for i, event in enumerate(self.events)
            if event.kind in kinds and (not orders or event.order in orders)
        }

    def or_same(self, relation: Relation) -> Relation:
        return relation | self.same

    def located(self, relation: Relation) -> Relation:
        return {
            (a, b) for a, b in relation if self.events[a].location == self.events[b].location != ""
        }

    def is_consistent(self, mo: Relation) -> bool:
        sb, hb, rf = self.sb, self.hb, self.rf
        rb = then({(b, a) for a, b in rf}, mo) - self.same
        eco = closure(rf | mo | rb)
        if (
            any(a == b for a, b in then(hb, self.or_same(eco)))
            or self.rmw & then(rb, mo)
            or not acyclic(sb | rf)
        ):
            return False
        apart = sb - self.located(sb)
        scb = sb | then(apart, hb, apart) | self.located(hb) | mo | rb
        sc, fences = self.only("RWF", ("seq_cst",)), self.only("F", ("seq_cst",))
        some = self.or_same(hb)
        base = then(sc | then(fences, some), scb, sc | then(some, fences))
        return acyclic(base | then(fences, hb | then(hb, eco, hb), fences))


def candidates(test: Litmus) -> Iterator[tuple[Candidate, Relation, str]]:
    """All of them, with mo and the outcome."""
    events = [Event(-1, "W", "plain", location, 0) for location in test.initial]
    accesses: list[Access | None] = [None] * len(events)
    sb: Relation = set()
    rmw: Relation = set()
    for thread, block in enumerate(test.threads):
        earlier = list(range(len(test.initial)))
        for access in block:
            assert isinstance(access, Access)
            for kind in {"U": "RW"}.get(access.kind, access.kind):
                number = len(events)
                events.append(Event(thread, kind, access.order, access.location, 0))
                accesses.append(access)
                sb |= {(other, number) for other in earlier}
                earlier.append(number)
                if access.kind == "U" and kind == "W":
                    rmw.add((number - 1, number))
    writes = {
        location: [i for i, e in enumerate(events) if e.kind == "W" and e.location == location]
        for location in test.initial
    }
    reads = [i for i, event in enumerate(events) if event.kind == "R"]
    orders = [
        ({pair for order in choice for pair in pairs(order)}, [order[-1] for order in choice])
        for choice in product(*(orders_of(*writes[location]) for location in test.initial))
    ]
    for sources in product(*(writes[events[read].location] for read in reads)):
        rf = set(zip(sources, reads))
        if not acyclic(sb | rf):
            continue
        values = values_of(accesses, dict(zip(reads, sources)), rmw)
        candidate = Candidate(events, sb, rmw, rf)
        for mo, last in orders:
            finals = [
                f"{events[read].thread}:{load.register}={values[read]}"
                for read in reads
                if (load := accesses[read])
            ]
            finals += [f"{name}={values[write]}" for name, write in zip(test.initial, last)]
            yield candidate, mo, " ".join(finals)


def orders_of(first: int, *others: int) -> list[tuple[int, ...]]:
    return [(first, *order) for order in permutations(others)]


def pairs(order: tuple[int, ...]) -> Relation:
    return {(a, b) for i, a in enumerate(order) for b in order[i + 1 :]}


def values_of(
    accesses: list[Access | None], source: dict[int, int], rmw: Relation
) -> dict[int, int]:
    """What each event reads or writes.  (Values do not depend on registers here.)"""
    updates = {b: a for a, b in rmw}

    def value(number: int) -> int:
        access = accesses[number]
        if access is None:
            return 0
        if number in source:
            return value(source[number])
        if number in updates:
            return access.change(value(updates[number]), access.value({}))
        return access.value({})

    return {number: value(number) for number in range(len(accesses))}


def random_test(rng: random.Random) -> str:
    """Two or three threads that do something with x and y."""
    orders = {
        "load": ["relaxed", "acquire", "seq_cst"],
        "store": ["relaxed", "release", "seq_cst"],
        "fetch_add": ["relaxed", "acquire", "release", "acq_rel", "seq_cst"],
        "fence": ["acquire", "release", "acq_rel", "seq_cst", "seq_cst"],
    }
    text = "C random\n{}\n"
    value = 0
    lengths = rng.choice([[2, 2], [3, 2], [3, 3], [4, 3], [1, 2, 2], [2, 2, 2], [1, 3, 2]])
    updates = 0
    for thread, length in enumerate(lengths):
        text += f"P{thread} (atomic_int *x, atomic_int *y) {{\n"
        for i in range(length):
            what = rng.choice(["load", "load", "store", "store", "fence", "fetch_add"])
            if what == "fetch_add" and updates == 2:
                what = "load"
            updates += what == "fetch_add"
            location = rng.choice("xy")
            order = f"memory_order_{rng.choice(orders[what])}"
            value += 1
            text += {
                "load": f"int r{i} = atomic_load_explicit({location}, {order});\n",
                "store": f"atomic_store_explicit({location}, {value}, {order});\n",
                "fetch_add": f"int r{i} = atomic_fetch_add_explicit({location}, 10, {order});\n",
                "fence": f"atomic_thread_fence({order});\n",
            }[what]
        text += "}\n"
    return text + "exists (x = 0)\n"


@pytest.mark.parametrize("seed", range(20))
def test_the_search_finds_what_the_definitions_allow(seed: int) -> None:
    """All of it, nothing else, and each execution once."""
    rng = random.Random(seed)
    for _ in range(5):
        text = random_test(rng)
        test = parse(text)
        allowed = [out for execution, mo, out in candidates(test) if execution.is_consistent(mo)]
        verdict = decide(test)
        assert {outcome_set(out) for out in verdict.outcomes} == set(map(outcome_set, allowed)), (
            text
        )
        assert verdict.executions == len(allowed), text


def outcome_set(outcome: str) -> frozenset[str]:
    return frozenset(outcome.split())


# ---- what cannot be read -------------------------------------------------------------------------

GOOD = """C good
{ x = 0; }
P0 (atomic_int *x, int *y) {
  int r0 = atomic_load_explicit(x, memory_order_relaxed);  // broken: left out
  *y = r0 + 1;
}
exists (0:r0 = 0 /\\ y = 1)
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("memory_order_relaxed", "memory_order_consume", "line 4: memory_order_consume, where"),
        ("atomic_load_explicit(x", "atomic_load_explicit(y", "line 4: y, where there can be x"),
        ("*y = r0", "*x = r0", "line 5: x, where there can be y"),
        ("int *y", "atomic_int *y", "line 5: y, where there can be nothing"),
        ("*y = r0", "*y = r1", "line 5: r1, where there can be"),
        ("atomic_load_explicit(x", "atomic_init(x", "line 4: atomic_init, where there can be"),
        ("exists (0:r0", "exists (1:r0", "asks for 1:r0, which no thread has"),
        ("exists (0:r0", "exists (0:r1", "asks for 0:r1, which no thread has"),
        ("P0", "P1", "line 3: P1, where there can be P0"),
        ("C good", "C good (* model: alpha *)", "model alpha is not known, only rc11, armv8"),
        (")\n", ")\nP1", "line 8: P1, where there can be the end"),
        ("broken: left out", "broken: somehow", "line 4: 'somehow' is no way to break it"),
    ],
)
def test_what_cannot_be_read_is_said(old: str, new: str, message: str) -> None:
    assert decide(parse(GOOD)).reached
    text = new.join(GOOD.rsplit(old, 1)) if old == ")\n" else GOOD.replace(old, new, 1)
    with pytest.raises(LitmusError) as caught:
        (parse(text), broken(text))
    assert message in str(caught.value)
