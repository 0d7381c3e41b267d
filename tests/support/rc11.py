# SPDX-License-Identifier: MIT
"""May this outcome of a litmus test happen, whatever compiler and processor?  RC11 says.

The model (O. Lahav, V. Vafeiadis, J. Kang, C.-K. Hur, D. Dreyer: Repairing Sequential Consistency
in C/C++11, PLDI 2017, section 3): an execution is events with sb (the order of the program), rf
(which write a read reads) and mo (the order of the writes of each location), and is consistent if

    COHERENCE      hb ; eco? is irreflexive
    ATOMICITY      nothing comes in mo between what a read-modify-write reads and what it writes
    SC             psc = psc_base | psc_F is acyclic
    NO-THIN-AIR    sb | rf is acyclic

with hb, eco, psc_base and psc_F as they stand beside the code.  As sb | rf is acyclic, and the rest
holds for each part of an execution that is closed under it, executions are built one event after
the other in such an order, and dropped as soon as they are not consistent (`Search`).

Plain accesses may race, in which C gives no promise at all: the verdict says so.

`model: armv8` in a comment of a test asks for a machine where a store reaches all other threads at
once (`ordered_before`), for the few places that rely on that.

`python tests/support/rc11.py FILE...` says what each test and each of its broken variants can come
to; `--show FILE NUMBER` prints such a variant, for herd7.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from litmus import Access, Block, If, Litmus, Local, broken, parse

# ---- executions ----------------------------------------------------------------------------------
#
# Events have numbers, in the order in which they are added; sets of them are the bits of an int.
# Those that write the initial values come first.


def members(events: int) -> Iterator[int]:
    while events:
        lowest = events & -events
        yield lowest.bit_length() - 1
        events ^= lowest


def union(sets: list[int], events: int) -> int:
    """Of the sets of these events."""
    result = 0
    while events:
        lowest = events & -events
        result |= sets[lowest.bit_length() - 1]
        events ^= lowest
    return result


class Event(NamedTuple):
    thread: int  # -1: initial values
    kind: str  # R, W, F
    order: str
    location: str
    value: int
    rmw: bool = False  # it is half of a read-modify-write


ACQUIRES = ("acquire", "acq_rel", "seq_cst")
RELEASES = ("release", "acq_rel", "seq_cst")
RELEASE_FENCES = [("F", order) for order in RELEASES]


class Execution:
    """What there is of one so far.  `before` relations: what comes before each event."""

    def __init__(self, initial: Mapping[str, int]) -> None:
        self.events: list[Event] = []
        self.last: dict[int, int] = {}  # the last event of each thread
        self.sb: list[int] = []  # before
        self.hb: list[int] = []  # before
        self.fixed: list[int] = []  # the part of scb (before) that later events do not change
        self.apart: list[int] = []  # before in sb, of other locations
        self.behind: list[int] = []  # before in sb of other locations ; hb
        self.rf: dict[int, int] = {}
        self.mo: dict[str, list[int]] = {}
        self.at: dict[str, int] = {}  # all events of a location
        self.sc = 0
        self.sc_fences = 0
        for location, value in initial.items():
            self.add(Event(-1, "W", "plain", location, value))
            self.mo[location] = [len(self.events) - 1]

    def copy(self) -> Execution:
        new = Execution({})
        for name, value in vars(self).items():
            setattr(new, name, value.copy() if isinstance(value, (list, dict)) else value)
        new.mo = {location: writes.copy() for location, writes in self.mo.items()}
        return new

    def add(self, event: Event, source: int = -1) -> int:
        """The next of its thread; source: the write that it reads."""
        number = len(self.events)
        previous = self.last.get(event.thread, -1)
        if event.thread < 0:
            sb = 0
        elif previous < 0:
            sb = sum(1 << i for i, each in enumerate(self.events) if each.thread < 0)
        else:
            sb = self.sb[previous] | 1 << previous
        self.events.append(event)
        self.sb.append(sb)
        if event.thread >= 0:
            self.last[event.thread] = number
        if source >= 0:
            self.rf[number] = source
        hb = sb | union(self.hb, sb) | self.synchronises(number)
        self.hb.append(hb)
        same = self.at.get(event.location, 0)
        if event.location:
            self.at[event.location] = same | 1 << number
        # scb = sb | sb_other ; hb ; sb_other | hb_same | mo | rb, where _same and _other mean the
        # location; all but mo and rb.
        self.apart.append(sb & ~same)
        self.behind.append(union(self.apart, hb))
        self.fixed.append(sb | union(self.behind, sb & ~same) | hb & same)
        if event.order == "seq_cst":
            self.sc |= 1 << number
            if event.kind == "F":
                self.sc_fences |= 1 << number
        return number

    def synchronises(self, number: int) -> int:
        """What comes before it by an sw to it, which is

        sw = [rel] ; ([F] ; sb)? ; rs ; rf ; [R, relaxed at least] ; (sb ; [F])? ; [acq]
        """
        event = self.events[number]
        if event.order not in ACQUIRES or event.kind == "W":
            return 0
        if event.kind == "R":
            reads = [number]
        else:
            reads = [i for i in members(self.sb[number]) if self.events[i].kind == "R"]
        before = 0
        for read in reads:
            if self.events[read].order != "plain":
                before |= self.released(self.rf[read])
        return before

    def released(self, write: int) -> int:
        """What comes before whoever acquires what it reads of this write, with

        rs = [W] ; sb_same? ; [W, relaxed at least] ; (rf ; rmw)*
        """
        before = 0
        while True:
            event = self.events[write]
            if event.order != "plain":
                for first in [*members(self.sb[write]), write]:
                    other = self.events[first]
                    if other.kind == "W" and other.location == event.location:
                        if other.order in RELEASES:
                            before |= self.hb[first] | 1 << first
                        for fence in members(self.sb[first]):
                            if self.events[fence][1:3] in RELEASE_FENCES:
                                before |= self.hb[fence] | 1 << fence
            if not event.rmw:
                return before
            write = self.rf[write - 1]

    def lowest_place(self, thread: int, location: str) -> int:
        """COHERENCE: which place in mo is the first that the next access of the thread may read
        from or come behind.

        What it knows by hb may not come after it in eco: no write, nor the source of a read.
        """
        previous = self.last.get(thread, -1)
        known = (self.hb[previous] | 1 << previous) if previous >= 0 else 0
        return self.lowest_of(known, location)

    def lowest_of(self, known: int, location: str) -> int:
        place = 0
        writes = self.mo[location]
        for event in members(known & self.at[location]):
            write = event if self.events[event].kind == "W" else self.rf[event]
            place = max(place, writes.index(write))
        return place

    def is_coherent(self, read: int) -> bool:
        """Of a read that was added last: what it has just acquired counts, too."""
        location = self.events[read].location
        place = self.mo[location].index(self.rf[read])
        return self.lowest_of(self.hb[read], location) <= place

    def is_updated(self, write: int) -> bool:
        """Has a read-modify-write its place right behind it?"""
        return any(source == write and self.events[read].rmw for read, source in self.rf.items())

    def passed(self) -> tuple[list[int], list[int]]:
        """What comes before each event by mo or rb, and by eco.

        rb = rf^-1 ; mo, eco = (rf | mo | rb)+
        """
        size = len(self.events)
        changed, eco = [0] * size, [0] * size
        readers: dict[int, int] = {}
        for read, source in self.rf.items():
            readers[source] = readers.get(source, 0) | 1 << read
        for writes in self.mo.values():
            so_far = 0
            for write in writes:
                changed[write] = eco[write] = so_far
                mine = readers.get(write, 0)
                for read in members(mine):
                    eco[read] = so_far | 1 << write
                so_far |= 1 << write | mine
        return changed, eco

    def is_sc(self) -> bool:
        """SC: psc is acyclic.

        psc_base = ([SC] | [F, SC] ; hb?) ; scb ; ([SC] | hb? ; [F, SC])
        psc_F    = [F, SC] ; (hb | hb ; eco ; hb) ; [F, SC]
        """
        if not self.sc & (self.sc - 1):
            return True
        changed, eco = self.passed()
        scb = [fixed | more for fixed, more in zip(self.fixed, changed)]
        psc = {}
        for event in members(self.sc):
            fence = self.sc_fences >> event & 1
            ends = scb[event]
            if fence:
                ends |= union(scb, self.hb[event])
            before = ends & self.sc
            if self.sc_fences:
                before |= (ends | union(self.hb, ends)) & self.sc_fences
            if fence:
                by_eco = union(self.hb, union(eco, self.hb[event]))
                before |= (self.hb[event] | by_eco) & self.sc_fences
            psc[event] = before
        return is_acyclic(psc)

    def is_ordered(self) -> bool:
        return is_acyclic(dict(enumerate(ordered_before(self))))

    def races(self) -> bool:
        """Two accesses of a location, one of them plain and one a write, that hb does not order."""
        for number, event in enumerate(self.events):
            for other in members(self.at.get(event.location, 0) & ~self.hb[number]):
                earlier = self.events[other]
                if (
                    other < number
                    and "plain" in (event.order, earlier.order)
                    and "W" in (event.kind, earlier.kind)
                ):
                    return True
        return False


def is_acyclic(before: dict[int, int]) -> bool:
    left = sum(1 << event for event in before)
    while left:
        first = [event for event in members(left) if not before[event] & left]
        if not first:
            return False
        for event in first:
            left &= ~(1 << event)
    return True


def ordered_before(execution: Execution) -> list[int]:
    """What comes before each event on ARMv8, as far as anything here relies on it.

    A store reaches all other threads at once there, so what threads observe of each other (rf, mo
    and rb between them) is one order, together with what instructions keep in order in a thread
    (`is_kept`).
    """
    events = execution.events
    before, _ = execution.passed()
    for read, source in execution.rf.items():
        before[read] |= 1 << source
    for number, event in enumerate(events):
        others = (i for i in members(before[number]) if events[i].thread != event.thread)
        kept = (i for i in members(execution.sb[number]) if is_kept(events[i], event))
        before[number] = sum(1 << i for i in {*others, *kept})
    return before


def is_kept(earlier: Event, later: Event) -> bool:
    """Are these two of one thread in order for all others?  (Arm Architecture Reference Manual,
    B2.3, without dependencies: less than what the architecture promises.)
    """
    if earlier.kind == "F":  # DMB ISH, or DMB ISHLD which is as good here
        return True
    if later.kind == "F":
        return later.order != "acquire" or earlier.kind == "R"  # DMB ISHLD
    return (
        (earlier.kind == "R" and earlier.order in ACQUIRES)
        or (later.kind == "W" and later.order in RELEASES)
        or earlier.order == later.order == "seq_cst"
        or (earlier.rmw and later.rmw and earlier.kind != later.kind and later.kind == "W")
    )


# ---- the search ----------------------------------------------------------------------------------


class State(NamedTuple):
    """Of a thread: what it has still to do, and its registers."""

    rest: Block
    registers: dict[str, int]


class Verdict(NamedTuple):
    """outcomes: all final states (registers and locations) that pass the filter, as text.

    reached: in one of them the condition of `exists` holds.
    """

    reached: bool
    races: bool
    outcomes: frozenset[str]
    executions: int


class Search:
    """Builds every consistent execution once.

    Of all orders in which the events of an execution can be added, the one is built in which at
    each point the first thread goes on that can.  So an event of thread t may be added only if
    those after the last that it needs (the one before it in its thread; the write that it reads)
    are of threads before t: else it would have come sooner.  A write or a fence needs nothing new,
    so it comes at once or never.  A read comes at once, too, or right behind the write it reads.
    """

    def __init__(self, test: Litmus) -> None:
        self.test = test
        self.outcomes: set[str] = set()
        self.reached = False
        self.races = False
        self.executions = 0

    def run(self) -> Verdict:
        states = [settle(State(block, {})) for block in self.test.threads]
        self.extend(Execution(self.test.initial), states)
        return Verdict(self.reached, self.races, frozenset(self.outcomes), self.executions)

    def extend(self, execution: Execution, states: list[State]) -> None:
        running = False
        for thread, state in enumerate(states):
            if not state.rest:
                continue
            running = True
            access = state.rest[0]
            assert isinstance(access, Access)
            above = max(execution.last.get(t, -1) for t in range(thread + 1, len(states) + 1))
            comes_now = above <= execution.last.get(thread, -1)
            if access.kind == "F":
                if comes_now:
                    new = execution.copy()
                    new.add(Event(thread, "F", access.order, "", 0))
                    self.go_on(new, past(states, thread))
                return
            if access.kind == "W":
                if comes_now:
                    self.write(execution, states, thread, access)
                return
            lowest = execution.lowest_place(thread, access.location)
            for source in execution.mo[access.location][lowest:]:
                if comes_now or above <= source:
                    self.read(execution, states, thread, access, source)
            others = (state.rest for other, state in enumerate(states) if other != thread)
            if not any(access.location in writes_of(rest) for rest in others):
                return
        if not running:
            self.finish(execution, states)

    def write(self, execution: Execution, states: list[State], thread: int, access: Access) -> None:
        location = access.location
        value = access.value(states[thread].registers)
        writes = execution.mo[location]
        for place in range(execution.lowest_place(thread, location), len(writes)):
            if execution.is_updated(writes[place]):
                continue  # ATOMICITY: what has its place here is there already
            new = execution.copy()
            number = new.add(Event(thread, "W", access.order, location, value))
            new.mo[location].insert(place + 1, number)
            self.go_on(new, past(states, thread))

    def read(
        self, execution: Execution, states: list[State], thread: int, access: Access, source: int
    ) -> None:
        """A load, or what begins with one."""
        new = execution.copy()
        location, order = access.location, access.order
        old = new.events[source].value
        answer = old
        if access.kind == "C":
            # Nobody else has `expected`: it is as the thread has left it.
            known = new.mo[access.expected][-1]
            expected = new.events[known].value
            new.add(Event(thread, "R", "plain", access.expected, expected), known)
            answer = int(old == expected)
            order = order if answer else access.failure
        update = access.kind == "U" or (access.kind == "C" and answer == 1)
        if update and new.is_updated(source):
            return  # ATOMICITY
        if not new.is_coherent(new.add(Event(thread, "R", order, location, old, update), source)):
            return
        if update:
            value = access.change(old, access.value(states[thread].registers))
            number = new.add(Event(thread, "W", order, location, value, update))
            new.mo[location].insert(new.mo[location].index(source) + 1, number)
        elif access.kind == "C":
            number = new.add(Event(thread, "W", "plain", access.expected, old))
            new.mo[access.expected].append(number)
        self.go_on(new, past(states, thread, **{access.register: answer}))

    def go_on(self, execution: Execution, states: list[State]) -> None:
        if execution.is_sc() and (self.test.model == "rc11" or execution.is_ordered()):
            self.extend(execution, states)

    def finish(self, execution: Execution, states: list[State]) -> None:
        finals: dict[str, int] = defaultdict(int)  # 0: registers that nobody has set
        for thread, state in enumerate(states):
            finals.update({f"{thread}:{name}": value for name, value in state.registers.items()})
        for location, writes in execution.mo.items():
            finals[location] = execution.events[writes[-1]].value
        if self.test.filter(finals):
            self.executions += 1
            self.outcomes.add(" ".join(f"{name}={value}" for name, value in finals.items()))
            self.reached |= self.test.exists(finals)
            self.races |= execution.races()


def past(states: list[State], thread: int, **registers: int) -> list[State]:
    """Behind the next access of a thread, which sets these registers."""
    state = states[thread]
    new = settle(State(state.rest[1:], {**state.registers, **registers}))
    return [*states[:thread], new, *states[thread + 1 :]]


def settle(state: State) -> State:
    """Up to the next access."""
    rest, registers = state
    while rest and not isinstance(rest[0], Access):
        first = rest[0]
        if isinstance(first, Local):
            registers = {**registers, first.register: first.value(registers)}
            rest = rest[1:]
        else:
            rest = (first.then if first.condition(registers) else first.otherwise) + rest[1:]
    return State(rest, registers)


def writes_of(block: Block) -> set[str]:
    """The locations that it may write."""
    found = set()
    for statement in block:
        if isinstance(statement, If):
            found |= writes_of(statement.then) | writes_of(statement.otherwise)
        elif isinstance(statement, Access) and statement.kind in "WUC":
            found |= {statement.location, statement.expected}
    return found


def decide(test: Litmus) -> Verdict:
    """By all its consistent executions, so it takes longer with each write that others may read."""
    return Search(test).run()


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--show"]:
        print(broken(Path(arguments[1]).read_text())[int(arguments[2]) - 1].text, end="")
        return
    for path in arguments:
        text = Path(path).read_text()
        for how, each in [("as it is", text), *broken(text)]:
            verdict = decide(parse(each))
            print(
                f"{path}, {how}: {'reached' if verdict.reached else 'not reached'}, "
                f"{len(verdict.outcomes)} outcomes of {verdict.executions} executions"
                f"{', races' if verdict.races else ''}"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
