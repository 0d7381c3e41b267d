# SPDX-License-Identifier: MIT
"""Several trackers publish at one instant (tracker.c), explored exhaustively.

As in test_protocol.py, marks and publications are generators that yield one atomic access at a
time, and every state is visited that any interleaving of them can reach.  There are two nodes, a
and b, and sets of each, one after the other:

    published-a, -b    what the node has published: a set, a fork, or nothing
    slot-1, -2         what a writer says it is using
    a0, b0, a1, ...    what the bitmap of a set holds: a bit for each mark
    before-a1, ...     where the fork in the way of that set leads until the turn
    turn-a1, ...       the turn of the forks that are published with that set

A set is freed when another one was published in its place, and its fork and its turn with it.  Its
bitmap stays, but a mark comes to that through the set.  Memory that was freed is not used again:
tracker.c says why that is no trouble.

Two writers mark something, one mark after the other.  Beside them there is a publisher, which looks
at what the old sets hold when a publication has returned.

  (1) A mark that returned is in exactly one of the sets of its node; one that would have to wait,
      and must not, is in none.
  (2) If mark A returned before mark B began, B is not before a publication that A is after.
  (3) What an old set holds does not change after it was looked at.
  (4) Nothing is used after it was freed.
  (5) Every schedule comes to its end, whichever thread runs when: nothing is waited for in vain,
      and no mark waits for anybody.  But where nothing is published marks do wait, by looking again
      and again; then the end can be reached from every state.

Then the protocol is broken on purpose, one rule at a time, and the exploration has to find a
schedule that shows what goes wrong.  `python tests/core/test_turn.py` prints those schedules.  Some
changes look as if they broke it, but do not: those are at the end.

`mirrors:` names functions of csrc, as in test_protocol.py.
"""

from __future__ import annotations

from typing import Any, Callable, NamedTuple

import pytest
from test_protocol import (
    Access,
    Call,
    Counterexample,
    Memory,
    changed,
    fetch_or,
    load,
    store,
    where,
)

A, B = NODES = (0, 1)
NODE_NAMES = "ab"
NOTHING, A0, B0, A1, B1, A2, B2 = range(7)
SETS = range(A0, B2 + 1)
FORK = len(SETS)  # plus a set: the fork in its way
HEAD_NAMES = ["nothing", "a0", "b0", "a1", "b1", "a2", "b2"]
HEAD_NAMES += [f"fork-{HEAD_NAMES[a_set]}" for a_set in SETS]

PUBLISHED, SLOT, FREED, LOOKED_AT, FIRST = 0, 2, 4, 5, 6  # the first of several, of all but two
WORD_NAMES = ["published-a", "published-b", "slot-1", "slot-2", "freed", "looked-at"]
for _name in HEAD_NAMES[A0 : B2 + 1]:
    WORD_NAMES += [_name, f"before-{_name}", f"turn-{_name}"]


def bits(a_set: int) -> int:
    return FIRST + 3 * (a_set - A0)


def before(a_set: int) -> int:
    return FIRST + 3 * (a_set - A0) + 1


def turn(a_set: int) -> int:
    return FIRST + 3 * (a_set - A0) + 2


def home(word: int) -> int:
    """The set with which it is freed."""
    return A0 + (word - FIRST) // 3 if word >= FIRST else NOTHING


def set_of(publication: int, node: int) -> int:
    """Those of publication 0 were there before."""
    return A0 + 2 * publication + node


def publication_of(a_set: int) -> int:
    return (a_set - A0) // 2


def same(word: int, value: int) -> Access:
    """A load, of which nothing is used but whether the word is still this."""
    return ("same", word, value)


def free(a_set: int) -> Access:
    return ("free", FREED, 1 << a_set)


def look(a_set: int) -> Access:
    """At what its bitmap holds, for good."""
    return ("look", LOOKED_AT, 1 << a_set)


def observed(what: str, operand: int, old: int) -> int:
    """What an access tells its call; the less, the fewer states there are to visit."""
    if what == "same":
        return int(old == operand)
    return old if what == "load" else 0


# ---- the protocol --------------------------------------------------------------------------------

Pair = tuple[int, int]  # a set of each node
Plan = tuple[str, ...]  # what each publication names: "ab", "a", "b"; "no a": writes to a wait then
MARKED, REFUSED = range(2)  # what a mark returns; REFUSED: it would have to wait


def mark(slot: int, node: int, bit: int, look_late: bool = False, **options: Any) -> Call:
    """mirrors: hb_mark_write, hb_leave"""
    while True:
        a_set = yield from enter(slot, node, **options)
        if not a_set:
            return REFUSED
        yield fetch_or(bits(a_set), bit)
        if not look_late or (yield same(PUBLISHED + node, a_set)):
            break  # BROKEN if it does not: it is marked already
    yield store(slot, NOTHING)
    return MARKED


def enter(
    slot: int,
    node: int,
    wait: bool = True,
    leave: bool = True,
    check: bool = True,
    turn_first: bool = False,
    own_turn: bool = False,
    go_on: bool = True,
    then_names: tuple[str, ...] = ("set",),
) -> Call:
    """The set to mark in.  Nothing is used before the slot names it and it is still published.

    mirrors: hb_enter, hb_enter_slowly
    """
    while True:
        head = yield load(PUBLISHED + node)
        taken = 0
        if turn_first and head > FORK:
            taken = yield load(turn_of(head, own_turn))  # BROKEN: it may be freed by now
        yield store(slot, head)
        if head and (not check or (yield same(PUBLISHED + node, head))):
            if head <= FORK:
                return head
            if not turn_first:
                taken = yield load(turn_of(head, own_turn))
            a_set = yield load(before(head - FORK))
            if taken:
                a_set = head - FORK  # in C that is in the fork, too, beside `before`
                if not go_on:
                    continue  # BROKEN: it waits for the publisher
                for name in then_names:
                    yield store(slot, a_set if name == "set" else NOTHING)
            if a_set:
                return a_set
            head = NOTHING
        if not head and not wait:
            if leave:
                yield store(slot, NOTHING)
            return NOTHING


def turn_of(fork: int, own_turn: bool = False) -> int:
    a_set = fork - FORK
    return turn(a_set if own_turn else set_of(publication_of(a_set), A))


def wait_for(head: int) -> Call:
    """mirrors: hb_wait_for"""
    for slot in (SLOT, SLOT + 1):
        yield changed(slot, head)
    return 0


def publish(node: int, new: int, old: int, frees: bool = True) -> Call:
    """mirrors: hbtracker_publish"""
    yield store(PUBLISHED + node, new)
    if old:
        yield from wait_for(old)
        if frees:
            yield free(old)
        yield look(old)
    return 0


def publish_all(
    new: Pair,
    old: Pair,
    turn_after: str = "forks",
    wait_after: str = "sets",
    look_after: str = "wait",
    own_turn: bool = False,
    **waiting: bool,
) -> Call:
    """turn_after, wait_after, look_after: when that is done; BROKEN if it is another time.

    mirrors: hbtracker_publish_all
    """
    for done in ("nothing", "fork a", "forks", "set a", "sets", "wait"):
        if done in ("fork a", "forks"):
            node = A if done == "fork a" else B
            yield store(before(new[node]), old[node])
            yield store(PUBLISHED + node, FORK + new[node])
        if done in ("set a", "sets"):
            node = A if done == "set a" else B
            yield store(PUBLISHED + node, new[node])
        if turn_after == done:
            for a_set in new if own_turn else new[:1]:
                yield store(turn(a_set), 1)  # T
        if wait_after == done:
            yield from wait_and_free(new, old, **waiting)
        if look_after == done:
            for a_set in old:
                if a_set:
                    yield look(a_set)
    return 0


def wait_and_free(
    new: Pair, old: Pair, forks: bool = True, sets: bool = True, frees: bool = True
) -> Call:
    for node in NODES:
        if forks:
            yield from wait_for(FORK + new[node])
        if old[node]:
            if sets:
                yield from wait_for(old[node])
            if frees:
                yield free(old[node])
    return 0


def publish_each(plan: Plan, forked: bool = True, frees: bool = True, **options: Any) -> Call:
    """The publisher: what is planned, one after the other."""
    old = A0, B0
    for publication, names in enumerate(plan, 1):
        new = set_of(publication, A), set_of(publication, B)
        if names == "no a":
            new = NOTHING, old[B]
        elif len(names) == 1:
            new = (new[A], old[B]) if names == "a" else (old[A], new[B])
        if names == "ab" and forked:
            yield from publish_all(new, old, frees=frees, **options)
        else:
            for node in NODES:
                if new[node] != old[node]:
                    yield from publish(node, new[node], old[node], frees)
        old = new
    return 0


# ---- exploration ---------------------------------------------------------------------------------


class Thread(NamedTuple):
    """What it calls, one after the other; of a writer, the node that each of these marks."""

    name: str
    calls: tuple[Callable[[], Call], ...]
    nodes: tuple[int, ...] = ()


class Place:
    """Where a thread is; there is one for all the ways that lead there.

    sent: what the call was sent so far, by the first of them.
    access: the next one; None: all calls have returned.
    after: where it is after that, by what the access tells; and what the call returned, if it did.
    """

    def __init__(self, call: int, sent: tuple[int, ...], access: Access | None) -> None:
        self.call = call
        self.sent = sent
        self.access = access
        self.after: dict[int, tuple[Place, int | None]] = {}


class State(NamedTuple):
    """What the threads can do next, and what is wrong then, depends on this and on nothing else.

    earlier: of each thread, the marks that had returned when the one began which it is in.
    """

    memory: Memory
    places: tuple[Place, ...]
    earlier: tuple[int, ...]


class Line(NamedTuple):
    """Of a schedule: thread, access, word, its value before and after."""

    name: str
    what: str
    word: int
    old: int
    new: int


class Step(NamedTuple):
    thread: int
    to: int  # the number of a state


def bit_of(thread: int, call: int) -> int:
    """Each mark has one."""
    return 1 << 2 * thread + call


class Exploration:
    """All states that can be reached, the nearest first.  Raises Counterexample."""

    def __init__(self, threads: list[Thread], plan: Plan) -> None:
        self.threads = threads
        self.plan = plan
        self.places: dict[Any, Place] = {}
        memory = [0] * len(WORD_NAMES)
        memory[PUBLISHED + A], memory[PUBLISHED + B] = A0, B0
        places = tuple(self.begin(i, 0) for i in range(len(threads)))
        self.states = [State(tuple(memory), places, (0,) * len(threads))]
        self.came_from: list[tuple[int, Line] | None] = [None]
        self.steps: list[list[Step]] = []  # from each state

    def visit_all(self) -> None:
        numbers = {self.states[0]: 0}
        for number, state in enumerate(self.states):  # which grows
            steps = []
            for i, place in enumerate(state.places):
                if place.access is None or blocked(place.access, state.memory):
                    continue
                after, line, wrong = self.step(state, i, place.access)
                if wrong:
                    raise Counterexample(self.schedule(number, [line], wrong))
                to = numbers.setdefault(after, len(self.states))
                if to == len(self.states):
                    self.states.append(after)
                    self.came_from.append((number, line))
                steps.append(Step(i, to))
            if not steps and any(place.access for place in state.places):
                raise Counterexample(self.schedule(number, [], "(5) nobody can go on"))
            self.steps.append(steps)

    def step(self, state: State, i: int, access: Access) -> tuple[State, Line, str | None]:
        """One access of thread i: the state after it, its line, and what is wrong with it."""
        memory, places, earlier = state
        what, word, operand = access
        old = memory[word]
        new = old
        if what == "store":
            new = operand
        elif what in ("or", "free", "look"):
            new = old | operand
        if new != old:
            memory = (*memory[:word], new, *memory[word + 1 :])
        place = places[i]
        value = observed(what, operand, old)
        if value not in place.after:
            place.after[value] = self.go_on(i, place, value)
        there, result = place.after[value]
        wrong = None
        if self.threads[i].nodes:
            returned = earlier[i]
            if not place.sent:  # it begins
                returned = self.returned(places)
            wrong = self.wrong_access(i, place.call, access, memory, returned)
            if result is not None:
                wrong = wrong or self.wrong_sets(i, place.call, result, memory)
                returned = 0
            earlier = (*earlier[:i], returned, *earlier[i + 1 :])
        places = (*places[:i], there, *places[i + 1 :])
        line = Line(self.threads[i].name, what, word, old, new)
        return State(memory, places, earlier), line, wrong

    def begin(self, i: int, number: int) -> Place:
        if (i, number) not in self.places:
            calls = self.threads[i].calls
            access = next(calls[number]()) if number < len(calls) else None
            self.places[i, number] = Place(number, (), access)
        return self.places[i, number]

    def go_on(self, i: int, place: Place, value: int) -> tuple[Place, int | None]:
        """A generator cannot be copied: it is run again, as far as this."""
        call = self.threads[i].calls[place.call]()
        sent = (*place.sent, value)
        try:
            access = next(call)
            for told in sent:
                access = call.send(told)
        except StopIteration as end:
            return self.begin(i, place.call + 1), end.value
        there = Place(place.call, sent, access)
        return self.places.setdefault((i, place.call, where(call)), there), None

    def returned(self, places: tuple[Place, ...]) -> int:
        """The bits of the marks that have."""
        return sum(bit_of(i, call) for i, call in self.marks() if call < places[i].call)

    def marks(self) -> list[tuple[int, int]]:
        """All there are: thread and call."""
        return [
            (i, call) for i, thread in enumerate(self.threads) for call in range(len(thread.nodes))
        ]

    def wrong_access(
        self, i: int, call: int, access: Access, memory: Memory, earlier: int
    ) -> str | None:
        """Of a mark; `earlier` than that are those that had returned when it began."""
        what, word, _ = access
        its_set = home(word)
        if not its_set:
            return None
        if memory[FREED] >> its_set & 1:
            return f"(4) {self.show(i, call)} uses {WORD_NAMES[word]}, which is freed"
        if what != "or":
            return None
        if memory[LOOKED_AT] >> its_set & 1:
            return f"(3) {self.show(i, call)} changes {WORD_NAMES[word]}, which was looked at"
        name = NODE_NAMES[self.threads[i].nodes[call]]
        for j, other in self.marks():
            for a_set in sets_with(bit_of(j, other) & earlier, memory):
                between = self.plan[publication_of(its_set) : publication_of(a_set)]
                if any(name in names for names in between):
                    return (
                        f"(2) {self.show(i, call)} is in {HEAD_NAMES[its_set]}, "
                        f"{self.show(j, other)}, which came before, in {HEAD_NAMES[a_set]}"
                    )
        return None

    def wrong_sets(self, i: int, call: int, result: int, memory: Memory) -> str | None:
        """Of a mark that returned."""
        sets = sets_with(bit_of(i, call), memory)
        if len(sets) == (result == MARKED):
            return None
        names = " and ".join(HEAD_NAMES[a_set] for a_set in sets)
        return f"(1) {self.show(i, call)} is in {names or 'no set'}"

    def show(self, i: int, call: int) -> str:
        return f"{self.threads[i].name}'s mark on {NODE_NAMES[self.threads[i].nodes[call]]}"

    def check_that_it_ends(self, marks_wait: bool) -> None:
        back: list[list[Step]] = [[] for _ in self.states]
        for number, steps in enumerate(self.steps):
            for i, to in steps:
                back[to].append(Step(i, number))
        left = not_counted(self.steps, back, one_is_enough=marks_wait)
        if left and marks_wait:
            raise Counterexample(self.schedule(min(left), [], "(5) the end cannot be reached"))
        if left:
            self.show_circle(left & not_counted(back, self.steps))

    def show_circle(self, left: set[int]) -> None:
        """left: the states in circles, and those on the way from one to another."""
        path: dict[int, Line] = {}
        at = min(left)
        while at not in path:
            i, to = next(step for step in self.steps[at] if step.to in left)
            access = self.states[at].places[i].access
            assert access
            path[at] = self.step(self.states[at], i, access)[1]
            at = to
        lines = list(path.values())[list(path).index(at) :]
        names = " and ".join(sorted({line.name for line in lines}))
        wrong = f"(5) {names} can go on like the last {len(lines)} steps for ever"
        raise Counterexample(self.schedule(at, lines, wrong))

    def schedule(self, number: int, last: list[Line], wrong: str) -> str:
        lines = last[::-1]
        at = self.came_from[number]
        while at:
            lines.append(at[1])
            at = self.came_from[at[0]]
        shown = [
            f"  {name:9} {what:7} {WORD_NAMES[word]:11} {show(word, old)} -> {show(word, new)}"
            for name, what, word, old, new in reversed(lines)
        ]
        calls = [
            f"{name} ({', '.join(NODE_NAMES[node] for node in nodes)})"
            for name, _, nodes in self.threads
            if nodes
        ]
        return "\n".join(
            [f"{', '.join(calls)}, publisher ({', '.join(self.plan)}):", *shown, f"=> {wrong}"]
        )


def blocked(access: Access, memory: Memory) -> bool:
    what, word, operand = access
    return what == "changed" and memory[word] == operand


def sets_with(bit: int, memory: Memory) -> list[int]:
    return [a_set for a_set in SETS if memory[bits(a_set)] & bit] if bit else []


def not_counted(
    steps: list[list[Step]], back: list[list[Step]], one_is_enough: bool = False
) -> set[int]:
    """A state counts when all (or one) that it has steps to count; so do those without steps."""
    missing = [min(len(there), 1) if one_is_enough else len(there) for there in steps]
    counted = [number for number, n in enumerate(missing) if not n]
    for number in counted:  # which grows
        for _, earlier in back[number]:
            missing[earlier] -= 1
            if not missing[earlier]:
                counted.append(earlier)
    return set(range(len(steps))).difference(counted)


def show(word: int, value: int) -> str:
    if word in (FREED, LOOKED_AT):
        return ",".join(HEAD_NAMES[a_set] for a_set in SETS if value >> a_set & 1) or "none"
    if word < FIRST or word == before(home(word)):
        return HEAD_NAMES[value]
    return f"{value:04b}" if word == bits(home(word)) else str(value)


# ---- scenarios -----------------------------------------------------------------------------------

AB, BA = (A, B), (B, A)


def writer(i: int, nodes: tuple[int, ...], **options: Any) -> Thread:
    def call(number: int) -> Callable[[], Call]:
        return lambda: mark(SLOT + i, nodes[number], bit_of(i, number), **options)

    return Thread(f"writer {i + 1}", tuple(call(number) for number in range(len(nodes))), nodes)


def explore(
    plan: Plan,
    *nodes: tuple[int, ...],
    marks_wait: bool = False,
    marks: dict[str, Any] | None = None,
    **options: Any,
) -> int:
    """Writers that mark these nodes, beside the publisher; returns the number of states."""
    writers = [writer(i, each, **(marks or {})) for i, each in enumerate(nodes)]
    publisher = Thread("publisher", (lambda: publish_each(plan, **options),))
    exploration = Exploration([*writers, publisher], plan)
    exploration.visit_all()
    exploration.check_that_it_ends(marks_wait)
    return len(exploration.states)


BOTH, THEN_A, THEN_B = ("ab",), ("ab", "a"), ("ab", "b")
AFTER_NOTHING = ("no a", "ab")


# What one publication of both does is the beginning of these.
@pytest.mark.parametrize(("plan", "nodes"), [(THEN_A, BA), (THEN_B, AB)], ids=["a", "b"])
def test_one_instant_and_one_node_after_it(plan: Plan, nodes: Pair) -> None:
    assert explore(plan, AB, nodes) > 50_000


def test_one_instant_after_another() -> None:
    assert explore(("ab", "ab"), AB, BA) > 200_000


def test_one_node_before_the_instant() -> None:
    assert explore(("a", "ab"), AB, BA) > 50_000


def test_marks_that_wait_until_something_is_published() -> None:
    assert explore(AFTER_NOTHING, AB, BA, marks_wait=True) > 50_000


@pytest.mark.parametrize("plan", [AFTER_NOTHING, ("ab", "no a")], ids="-".join)
def test_marks_that_must_not_wait(plan: Plan) -> None:
    assert explore(plan, AB, BA, marks={"wait": False}) > 50_000


# ---- broken on purpose ---------------------------------------------------------------------------


def broken(plan: Plan = BOTH, **options: Any) -> int:
    return explore(plan, AB, (B,), **options)


def broken_one_publication_after_the_other() -> int:
    return broken(forked=False)


def broken_turn_of_each_fork() -> int:
    return broken(own_turn=True, marks={"own_turn": True})


def broken_turn_before_the_last_fork() -> int:
    return broken(turn_after="fork a")


def broken_turn_after_a_new_set() -> int:
    return broken(turn_after="set a")


def broken_look_before_the_turn() -> int:
    return broken(look_after="fork a")


def broken_look_before_the_wait() -> int:
    return broken(look_after="sets", wait_after="wait")


def broken_no_wait(frees: bool = True) -> int:
    return broken(forks=False, sets=False, frees=frees)


def broken_no_wait_nothing_freed() -> int:
    return broken_no_wait(frees=False)


def broken_wait_for_forks_only(frees: bool = True) -> int:
    return broken(sets=False, frees=frees)


def broken_wait_for_forks_only_nothing_freed() -> int:
    return broken_wait_for_forks_only(frees=False)


def broken_wait_for_sets_only(frees: bool = True) -> int:
    return broken(forks=False, frees=frees)


def broken_wait_for_sets_only_nothing_freed() -> int:
    return broken_wait_for_sets_only(frees=False)


def broken_wait_before_the_new_sets() -> int:
    return broken(THEN_B, wait_after="forks")


def broken_no_check(frees: bool = True) -> int:
    return broken(marks={"check": False}, frees=frees)


def broken_no_check_nothing_freed() -> int:
    return broken_no_check(frees=False)


def broken_turn_read_before_the_check() -> int:
    return broken(THEN_A, marks={"turn_first": True})


def broken_slot_names_nothing_then_the_new_set() -> int:
    return broken(THEN_B, marks={"then_names": ("nothing", "set")})


def broken_slot_does_not_name_the_new_set() -> int:
    return broken(THEN_A, marks={"then_names": ("nothing",)})


def broken_check_after_the_mark() -> int:
    return broken(marks={"check": False, "look_late": True})


def broken_wait_for_the_new_set() -> int:
    return broken(marks={"go_on": False})


def broken_slot_kept_by_a_mark_that_must_not_wait() -> int:
    return explore(AFTER_NOTHING, BA, marks={"wait": False, "leave": False})


BROKEN = {
    broken_one_publication_after_the_other: "(2) writer 1's mark on b is in b0",
    broken_turn_of_each_fork: "(2) writer 1's mark on b is in b0",
    broken_turn_before_the_last_fork: "(2) writer 1's mark on b is in b0",
    broken_turn_after_a_new_set: "(2) writer 1's mark on b is in b0",
    broken_look_before_the_turn: "(3) writer 1's mark on a changes a0",
    broken_look_before_the_wait: "(3) writer 1's mark on a changes a0",
    broken_no_wait: "(4) writer 1's mark on a uses a0",
    broken_no_wait_nothing_freed: "(3) writer 1's mark on a changes a0",
    broken_wait_for_forks_only: "(4) writer 1's mark on a uses a0",
    broken_wait_for_forks_only_nothing_freed: "(3) writer 1's mark on a changes a0",
    broken_wait_for_sets_only: "(4) writer 1's mark on a uses a0",
    broken_wait_for_sets_only_nothing_freed: "(3) writer 1's mark on a changes a0",
    broken_wait_before_the_new_sets: "(4) writer 2's mark on b uses before-b1",
    broken_no_check: "(4) writer 1's mark on a uses a0",
    broken_no_check_nothing_freed: "(3) writer 1's mark on a changes a0",
    broken_turn_read_before_the_check: "(4) writer 1's mark on a uses turn-a1",
    broken_slot_names_nothing_then_the_new_set: "(4) writer 2's mark on b uses b1",
    broken_slot_does_not_name_the_new_set: "(4) writer 1's mark on a uses a1",
    broken_check_after_the_mark: "(1) writer 1's mark on a is in a0 and a1",
    broken_wait_for_the_new_set: "(5) writer 1 can go on like the last 5 steps for ever",
    broken_slot_kept_by_a_mark_that_must_not_wait: "(5) nobody can go on",
}


@pytest.mark.parametrize("scenario", BROKEN, ids=lambda f: f.__name__[len("broken_") :])
def test_a_broken_protocol_is_caught(scenario: Callable[[], int]) -> None:
    with pytest.raises(Counterexample) as caught:
        scenario()
    text = str(caught.value)
    print(text)
    assert "=> " + BROKEN[scenario] in text
    assert "writer 1" in text
    assert len(text.splitlines()) > 4


# ---- not broken ----------------------------------------------------------------------------------


def test_the_slot_may_go_on_naming_the_fork() -> None:
    """The publication then waits for that mark, too, though it is in the new set."""
    for plan in (THEN_A, THEN_B):
        assert broken(plan, marks={"then_names": ()}) > 10_000


def test_the_turn_may_be_read_at_any_time_if_nothing_is_freed() -> None:
    assert broken(THEN_A, marks={"turn_first": True}, frees=False) > 10_000


if __name__ == "__main__":
    for found_in in BROKEN:
        try:
            found_in()
        except Counterexample as found:
            print(f"{found_in.__name__}\n{found}\n")
