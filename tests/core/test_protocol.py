# SPDX-License-Identifier: MIT
"""The leaf/summary protocol of the C core, explored exhaustively.

Markers take no lock.  Clearers (reset, drain) take one, so they exclude each other but run beside
the markers.  Here both are written as generators that yield one atomic access at a time, next to
the rule they model, over a bitmap of three leaf words and three summary levels:

    top      bit 0: is `high` not zero?
    high     bit 0: is `mid0` not zero?     bit 1: is `mid1` not zero?
    mid0     bit 0: is `leaf0` not zero?    bit 1: is `leaf1` not zero?
    mid1     bit 0: is `leaf2` not zero?
    leaf0, leaf1, leaf2    two bits each

A marker whose word `mid` already names is done: then `high` and `top` are set, too.  One that has
to summarise it says so in its slot, sets what is above first, then the bit of `mid`.  Whoever
takes bits of `high` and `top` waits until those who are at that have finished, and looks again.

`explore` visits every state that any interleaving of the accesses can reach (all of them being
sequentially consistent; where they are less in C, tests/litmus says why that is enough) and checks
in each

  (a) once all calls have returned, no summary bit is clear over a word that is not zero;
  (b) a mark that returned before a drain began is in that drain, or was taken by a clear that
      overlapped it; and no mark is ever lost: it was taken or is still there.

  (d) `empty`, which takes the lock only where a clear is under way, says yes only if each mark that
      had returned before it began has been taken.

Then the protocol is broken on purpose, one rule at a time, and the exploration has to find a
schedule that shows what goes wrong.  `python tests/core/test_protocol.py` prints those schedules.

`mirrors:` names the functions of csrc that a generator follows; when one of them changes,
tests/litmus/test_litmus.py says so.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from typing import Any, Callable, NamedTuple

import pytest

LEAF0, LEAF1, LEAF2, MID0, MID1, HIGH, TOP, LOCK, SLOT_A, SLOT_B, HIGH1, UPPER = range(12)
CHANGES = 12
WORD_NAMES = ["leaf0", "leaf1", "leaf2", "mid0", "mid1", "high", "top", "lock", "slot-a", "slot-b"]
WORD_NAMES += ["high1", "upper", "changes"]
LEAVES = (LEAF0, LEAF1, LEAF2)
MIDS = (MID0, MID1)
ABOVE = {LEAF0: (MID0, 1), LEAF1: (MID0, 2), LEAF2: (MID1, 1), MID0: (HIGH, 1), MID1: (HIGH, 2)}
UNDER = {MID0: (LEAF0, LEAF1), MID1: (LEAF2,)}
# The tall shape, see below.
ABOVE_TALL = {
    LEAF0: (MID0, 1),
    LEAF2: (MID1, 1),
    MID0: (HIGH, 1),
    MID1: (HIGH1, 1),
    HIGH: (UPPER, 1),
    HIGH1: (UPPER, 2),
    UPPER: (TOP, 1),
}
WIPED = (LEAF0, LEAF2)  # by what takes all words: leaf1 would be one more of the same
ALL = 0b11  # a leaf word has two bits

Access = tuple[str, int, int]  # what, which word, operand
Call = Generator[Access, int, int]  # is sent what `observed` says; returns the bits it drained
Memory = tuple[int, ...]


def load(word: int) -> Access:
    return ("load", word, 0)


def has(word: int, bits: int) -> Access:
    """A load, of which nothing is used but whether all of `bits` are set."""
    return ("has", word, bits)


def nonzero(word: int) -> Access:
    """A load, of which nothing is used but whether the word is not zero."""
    return ("any", word, 0)


def fetch_or(word: int, bits: int) -> Access:
    """Answers whether all of the bits were set before."""
    return ("or", word, bits)


def fetch_and(word: int, bits: int) -> Access:
    """Answers the old value."""
    return ("and", word, bits)


def store(word: int, value: int) -> Access:
    return ("store", word, value)


def lock() -> Access:
    return ("lock", LOCK, 1)


def unlock() -> Access:
    return ("unlock", LOCK, 0)


def changed(word: int, value: int) -> Access:
    """A load that waits until the word is not `value` any more."""
    return ("changed", word, value)


def observed(what: str, operand: int, old: int) -> int:
    """What an access tells its call; the less, the fewer states there are to visit."""
    if what in ("has", "or"):
        return int(old & operand == operand)
    if what == "any":
        return int(old != 0)
    return old if what in ("load", "and") else 0


# ---- the protocol --------------------------------------------------------------------------------


def mark(
    slot: int,
    word: int,
    bits: int,
    early_exit: bool = False,
    test_first: bool = True,
    **broken: bool,
) -> Call:
    """Leaf first; then the word is named, also when the bit was already set.

    `test_first`: a load decides whether the read-modify-write is needed at all, as in C.

    mirrors: hbitmap_set, hb_mark_word, hb_mark, hb_mark_words
    """
    was_set = yield from set_bits(word, bits, test_first)
    if early_exit and was_set:
        return 0  # BROKEN: whoever set it may not have named the word yet
    yield from summarise(slot, word, **broken)
    return 0


def fill(slot: int, word: int) -> Call:
    """A mark over a whole word stores ones: there is nothing in it to keep.

    mirrors: hb_mark, hb_mark_whole
    """
    if not (yield has(word, ALL)):
        yield store(word, ALL)
    yield from summarise(slot, word)
    return 0


def set_bits(word: int, bits: int, test_first: bool = True) -> Call:
    """mirrors: hb_or, hb_or_bit, hb_mark_part"""
    if test_first and (yield has(word, bits)):
        return 1
    return (yield fetch_or(word, bits))


def summarise(
    slot: int, word: int, mid_first: bool = False, say: bool = True, say_late: bool = False
) -> Call:
    """Set the bit of `mid` above a leaf word; but before, what is above that.

    Whoever finds it set may go: so it is set last.

    mirrors: hb_summarise, hb_summarise_words, hb_summarising_begins, hb_summarising_ends
    """
    mid, bit = ABOVE[word]
    if (yield has(mid, bit)):
        return 0
    # BROKEN: what plain loads may do where the processor lets them pass the store before them
    was_set = 0
    if say_late:
        was_set = yield has(*ABOVE[mid])
    if say:
        yield store(slot, 1)
    if mid_first:
        yield fetch_or(mid, bit)  # BROKEN: others go before `high` and `top` are set
    if not was_set:
        yield from set_bits(*ABOVE[mid])
    yield from set_bits(TOP, 1)
    if not mid_first:
        yield fetch_or(mid, bit)
    if say:
        yield store(slot, 2)
    return 0


def name_locked(word: int) -> Call:
    """The same for whoever holds the lock: nobody takes bits of `high` or `top` meanwhile.

    mirrors: hb_summarise_words
    """
    mid, bit = ABOVE[word]
    if not (yield has(mid, bit)):
        yield from set_bits(*ABOVE[mid])
        yield from set_bits(TOP, 1)
        yield fetch_or(mid, bit)
    return 0


def begin_change(says: bool) -> Call:
    """Take the lock and, where `empty` is about, say so: nobody else asks.

    mirrors: hb_lock, hb_unlock, hb_says_change
    """
    yield lock()
    if says:
        yield from count_change()
    return 0


def count_change() -> Call:
    yield store(CHANGES, (yield load(CHANGES)) + 1)
    return 0


def clear(
    drain: bool,
    bits: tuple[int, int, int] = (ALL, ALL, ALL),
    look_again: bool = True,
    take_by_store: bool = False,
    from_top: bool = True,
    says: bool = False,
    ends_early: bool = False,
    **broken: bool,
) -> Call:
    """Reset and drain, as in C: the leaf words under one word of `mid` after the other.

    1. Clear the leaf words which `mid` names, one by one, and note those that are zero now.  A
       reset of a whole word stores zero, as nobody asks what it took.
    2. ONE fetch_and drops their bits from `mid`.
    3. Look again at each of them: whoever marked it after 1 may have found the bit of `mid` still
       set, before 2.  If it is not zero, summarise it.
    4. If 2 left `mid` zero and 3 named nothing, its bit of `high` goes, at the end, with all such.

    mirrors: hb_clear, hb_clear_piece, hb_clear_word, hb_drain_piece
    """
    yield from begin_change(says)
    taken = 0
    empty = 0
    if not from_top or (yield nonzero(TOP)):
        above = ALL if not from_top else (yield load(HIGH))
        for mid in MIDS:
            if not above & ABOVE[mid][1] or not any(bits[word] for word in UNDER[mid]):
                continue
            named = yield load(mid)
            zero = []
            for word in UNDER[mid]:
                if not named & ABOVE[word][1] or not bits[word]:
                    continue
                old = yield load(word)
                whole = bits[word] == ALL and not drain
                if whole or old & bits[word]:
                    if take_by_store or whole:
                        # BROKEN in a drain: `old` may be out of date
                        yield store(word, old & ~bits[word])
                    else:
                        old = yield fetch_and(word, ~bits[word])
                    taken |= (old & bits[word]) << 2 * word
                if old & ~bits[word] == 0:
                    zero.append(word)
            if zero and (yield from unsummarise(mid, zero, look_again)):
                empty |= ABOVE[mid][1]
    if ends_early:
        yield from count_change()  # BROKEN: it goes on
    if empty:
        yield from drop_high(empty, **broken)
    if says and not ends_early:
        yield from count_change()
    yield unlock()
    return taken


def unsummarise(mid: int, zero: list[int], look_again: bool = True) -> Call:
    """The bits of `mid` over leaf words that were seen zero; is it zero itself then?

    mirrors: hb_unsummarise
    """
    drop = sum(ABOVE[word][1] for word in zero)
    left = (yield fetch_and(mid, ~drop)) & ~drop
    named = False
    for word in zero:
        if look_again and (yield nonzero(word)):
            yield from name_locked(word)
            named = True
    return int(not left and not named)


def drop_high(
    bits: int,
    wait: bool = True,
    look_again: bool = True,
    look_at_high: bool = True,
    wait_first: bool = False,
) -> Call:
    """Bits of `high` over words of `mid` that were seen zero, and what is above, if need be.

    All of them go, then those who are summarising are waited for, then all is looked at again.

    mirrors: hb_unsummarise_above
    """
    if wait_first:
        yield from wait_for_markers()  # BROKEN: others come after that
    left = (yield fetch_and(HIGH, ~bits)) & ~bits
    if not left:
        yield fetch_and(TOP, ~1)
    if wait and not wait_first:
        yield from wait_for_markers()
    for mid in MIDS:
        if look_again and bits & ABOVE[mid][1] and (yield nonzero(mid)):
            yield from set_bits(*ABOVE[mid])
            yield from set_bits(TOP, 1)
    if not left and look_again and look_at_high and (yield nonzero(HIGH)):
        yield from set_bits(TOP, 1)
    return 0


def wait_for_markers() -> Call:
    """mirrors: hb_wait_for_summarising"""
    for slot in (SLOT_A, SLOT_B):
        yield changed(slot, 1)
    return 0


def wipe(summary_first: bool = True, top_before_leaf: bool = False, says: bool = False) -> Call:
    """Empties whole words, whatever they hold: `mid` first, then the leaf.

    A mark whose leaf bit the stores leave alone came after them, so it finds its bit of `mid` gone.
    reset_all of a large bitmap does the levels above before the leaf, too.

    mirrors: hb_empty_pieces, hb_give_back
    """
    yield from begin_change(says)
    if summary_first:
        yield from wipe_mids(top_before_leaf)
    for word in WIPED:
        yield store(word, 0)
    if not summary_first:
        yield from wipe_mids()  # BROKEN: without a second look at the leaf
    elif not top_before_leaf:
        yield from drop_high(ALL)
    if says:
        yield from count_change()
    yield unlock()
    return 0


def wipe_named(exchange: bool = True) -> Call:
    """As `wipe`; but of the leaf only what `mid` named goes, so no name may be overlooked.

    mirrors: hb_empty_pieces
    """
    yield lock()
    named = []
    for mid in MIDS:
        bits = yield load(mid)
        if exchange:
            bits = yield fetch_and(mid, ~ALL)
        else:
            yield store(mid, 0)  # BROKEN: what was named in between is overlooked
        named += [word for word in UNDER[mid] if bits & ABOVE[word][1]]
    for word in named:
        yield store(word, 0)
    yield from drop_high(ALL)
    yield unlock()
    return 0


def wipe_mids(and_above: bool = True) -> Call:
    """mirrors: hb_drop_summaries, hb_drop_summaries_under"""
    for mid in MIDS:
        yield store(mid, 0)
    if and_above:
        yield from drop_high(ALL)
    return 0


def move(trust_summary: bool = False, summary_first: bool = True) -> Call:
    """A drain of all words by their pages: as `wipe`, but each word is taken as it goes.

    What is in the words is taken whether `mid` named it or not: a marker may not have come there.

    mirrors: hb_move_leaf, hb_drain_pages
    """
    yield lock()
    named = 0b111
    if trust_summary:  # BROKEN: what is not named is dropped with its page
        named = (yield load(MID0)) | (yield load(MID1)) << 2
    if summary_first:
        yield from wipe_mids()
    taken = 0
    for word in WIPED:
        value = yield fetch_and(word, ~ALL)
        if named >> word & 1:
            taken |= value << 2 * word
    if not summary_first:
        yield from wipe_mids()  # BROKEN: without a second look at the leaf
    yield unlock()
    return taken


def move_in_vain() -> Call:
    """The same where the pages are not to be had: all words are summarised again.

    mirrors: hb_move_leaf
    """
    yield from begin_change(says=True)
    yield from wipe_mids()
    for word in WIPED:
        if (yield nonzero(word)):
            yield from name_locked(word)
    yield from count_change()
    yield unlock()
    return 0


def overwrite(leaf0: int, leaf1: int, look_again: bool = True) -> Call:
    """Merge into a third bitmap, and deserialize: whole words are stored, then `mid0` follows.

    mirrors: hb_overwrite, hb_overwrite_few, hb_load_words, hb_load_few
    """
    yield lock()
    yield store(LEAF0, leaf0)
    yield store(LEAF1, leaf1)
    for word, value in ((LEAF0, leaf0), (LEAF1, leaf1)):
        if value:
            yield from name_locked(word)
    stale = (yield load(MID0)) & ~((leaf0 != 0) | (leaf1 != 0) << 1)
    zero = [word for word in (LEAF0, LEAF1) if stale & ABOVE[word][1]]
    if zero and (yield from unsummarise(MID0, zero, look_again)):
        yield from drop_high(1)
    yield unlock()
    return 0


def ask_empty(at_begin: bool = True, at_end: bool = True) -> Call:
    """Is there nothing?  A search that finds nothing counts if no change was under way meanwhile.

    (What finds something is right whatever happens.)

    mirrors: hbitmap_empty, hb_search_all, hb_undisturbed
    """
    begin = yield load(CHANGES)
    if (yield nonzero(TOP)) and (yield from search()):
        return 0
    end = begin
    if at_end:  # BROKEN without: one may have begun
        end = yield load(CHANGES)
    if not at_begin:
        begin = end  # BROKEN: one may have been under way, and ended
    if begin % 2 == 0 and end == begin:
        return 1
    yield lock()
    found = yield from search()
    yield unlock()
    return int(not found)


def search() -> Call:
    """From the first leaf word on: what is above is looked at where there is no more below."""
    if (yield nonzero(LEAF0)):
        return 1
    if (yield has(MID0, 2)) and (yield nonzero(LEAF1)):
        return 1
    return int((yield has(HIGH, 2)) and (yield has(MID1, 1)) and (yield nonzero(LEAF2)))


# ---- the tall shape ------------------------------------------------------------------------------
#
# A level more, `upper`, and two words under it: `high` stands over `mid0` and that over `leaf0`,
# `high1` over `mid1` and that over `leaf2`.  What is not shown here, before each of them and
# between them, is zero, so a search comes down to a word by the bits above it.


def set_above(word: int) -> Call:
    """The bit above a word, and all that are above that."""
    while word in ABOVE_TALL:
        word, bit = ABOVE_TALL[word]
        yield from set_bits(word, bit)
    return 0


def mark_tall(slot: int, word: int, bits: int) -> Call:
    yield from set_bits(word, bits)
    mid = ABOVE_TALL[word][0]
    if not (yield has(mid, 1)):
        yield store(slot, 1)
        yield from set_above(mid)
        yield fetch_or(mid, 1)
        yield store(slot, 2)
    return 0


def mark_range(slot: int, bits: int, say: bool = True) -> Call:
    """A mark from `leaf0` to `leaf2`: level by level, then `mid0` and `mid1`.

    mirrors: hb_mark, hb_mark_level, hb_summarise_range
    """
    yield from set_bits(LEAF0, bits)
    yield from set_bits(LEAF2, bits)
    if (yield has(MID0, 1)) and (yield has(MID1, 1)):
        return 0
    if say:
        yield store(slot, 1)
    for word, bit in ((HIGH, 1), (HIGH1, 1), (UPPER, 3), (TOP, 1)):
        yield from set_bits(word, bit)
    yield from set_bits(MID0, 1)
    yield from set_bits(MID1, 1)
    if say:
        yield store(slot, 2)
    return 0


def clear_tall(drain: bool, **broken: bool) -> Call:
    """Reset and drain: what is empty under `high` is seen to when the clear has come to `high1`.

    mirrors: hb_clear, hb_unsummarise
    """
    yield lock()
    taken = 0
    gone = None
    if (yield nonzero(TOP)):
        upper = yield load(UPPER)
        for leaf, high, bit in ((LEAF0, HIGH, 1), (LEAF2, HIGH1, 2)):
            mid = ABOVE_TALL[leaf][0]
            if not upper & bit:
                continue
            if (yield nonzero(high)) and (yield nonzero(mid)):
                if drain:
                    taken |= (yield fetch_and(leaf, ~ALL)) << 2 * leaf
                else:
                    yield store(leaf, 0)
                yield fetch_and(mid, ~1)
                if (yield nonzero(leaf)):
                    yield from set_above(mid)
                    yield fetch_or(mid, 1)
                else:
                    if gone is not None:
                        yield from drop_above(gone, **broken)
                    gone = mid
            upper = yield load(UPPER)
    if gone is not None:
        yield from drop_above(gone, **broken)
    yield unlock()
    return taken


def drop_above(mid: int, wait: bool = True, all_levels: bool = True) -> Call:
    """The bit over a word of level 1, and so on upwards as far as that is empty.

    mirrors: hb_unsummarise_above
    """
    emptied = []
    word = mid
    while word in ABOVE_TALL:
        above, bit = ABOVE_TALL[word]
        emptied.append(word)
        if (yield fetch_and(above, ~bit)) & ~bit:
            break
        word = above
    if wait:
        yield from wait_for_markers()
    for word in emptied if all_levels else emptied[:1]:  # BROKEN: what is between may be set, too
        if (yield nonzero(word)):
            yield from set_above(word)
    return 0


# ---- the exploration -----------------------------------------------------------------------------


Marks = frozenset[tuple[int, int, int]]  # thread, word, bit


class Thread(NamedTuple):
    """One call of one thread: what it runs, and for a marker the word and the bits it marks.

    Of those that drain or ask, one is in the middle of it at a time.
    """

    name: str
    call: Callable[[], Call]
    marks: tuple[int, int] | None = None
    drains: bool = False
    asks: bool = False


class State(NamedTuple):
    """What the threads can do next depends on this and on nothing else.

    A generator cannot be copied; but what it does next follows from the values that it has been
    sent, so those stand for it: the first that were found to bring it where it is.

    owed: marks begun and not taken since, as (thread, word, bit); thread -1 for those there were.
    due: the part of them that the drain which is running has to take before it ends, or that
        somebody has to before whoever asks may hear that there is nothing.
    removed: the bits that this drain has cleared so far.
    """

    memory: Memory
    sent: tuple[tuple[int, ...], ...]
    owed: Marks
    due: Marks
    removed: int


class Counterexample(Exception):
    """A property that does not hold, with the shortest schedule that shows it."""


Line = tuple[str, str, int, int, int]  # thread, access, word, its value before and after


class Finished(NamedTuple):
    drained: int


RETURNED = (-1,)  # in place of the values sent to a call that has returned


def where(call: Any) -> Any:
    """All that the rest of a generator depends on: its place, those it is in, and their names."""
    at = []
    while call is not None:
        frame = call.gi_frame
        names = tuple((name, str(value)) for name, value in sorted(frame.f_locals.items()))
        at.append((frame.f_code, frame.f_lasti, names))
        call = call.gi_yieldfrom
    return tuple(at)


def explore(
    threads: list[Thread], memory: Memory, above: dict[int, tuple[int, int]] | None = None
) -> int:
    """Visit every reachable state; returns how many.  Raises Counterexample."""
    cache: dict[tuple[int, tuple[int, ...]], Any] = {}
    first_sent: dict[Any, tuple[int, ...]] = {}

    def look(i: int, sent: tuple[int, ...]) -> Any:
        key = (i, sent)
        if key not in cache:
            call = threads[i].call()
            try:
                access = next(call)
                for value in sent:
                    access = call.send(value)
                cache[key] = access, first_sent.setdefault((i, where(call)), sent)
            except StopIteration as end:
                cache[key] = Finished(end.value), sent
        return cache[key]

    def upcoming(i: int, sent: tuple[int, ...]) -> Any:
        """The next access of thread i after it was sent these values, or Finished."""
        return Finished(0) if sent == RETURNED else look(i, sent)[0]

    before = frozenset((-1, word, bit) for word in LEAVES for bit in (1, 2) if memory[word] & bit)
    first = State(memory, ((),) * len(threads), before, frozenset(), 0)
    came_from: dict[State, tuple[State, Line] | None] = {first: None}
    queue = deque([first])
    while queue:
        state = queue.popleft()
        running = False
        for i, thread in enumerate(threads):
            access = upcoming(i, state.sent[i])
            if isinstance(access, Finished):
                continue
            running = True
            what, word, operand = access
            if what == "lock" and state.memory[LOCK]:
                continue
            if what == "changed" and state.memory[word] == operand:
                continue
            after, line = step(state, i, thread, what, word, operand)
            done = upcoming(i, after.sent[i])
            # How it got there does not matter.
            sent = RETURNED if isinstance(done, Finished) else look(i, after.sent[i])[1]
            after = after._replace(sent=(*after.sent[:i], sent, *after.sent[i + 1 :]))
            wrong = None
            if (thread.drains and what == "lock") or (thread.asks and not state.sent[i]):
                returned = {
                    j
                    for j in range(len(threads))
                    if isinstance(upcoming(j, after.sent[j]), Finished)
                }
                due = frozenset(m for m in after.owed if m[0] in returned or m[0] == -1)
                after = after._replace(due=due, removed=0)
            elif thread.drains and isinstance(done, Finished):
                left = after.due & after.owed
                if left:
                    wrong = f"(b) the drain passed over {show_marks(left, threads)}"
                elif done.drained != after.removed:
                    wrong = f"lost: drained {done.drained:06b}, but {after.removed:06b} is gone"
                after = after._replace(due=frozenset(), removed=0)
            elif thread.asks and isinstance(done, Finished):
                left = after.due & after.owed
                if done.drained and left:
                    wrong = f"(d) empty, but there is {show_marks(left, threads)}"
                after = after._replace(due=frozenset())
            if after not in came_from or wrong:
                came_from.setdefault(after, (state, line))
                queue.append(after)
            if wrong:
                raise Counterexample(schedule(came_from, state, line, threads, memory, wrong))
        if not running:
            wrong = wrong_at_end(state, threads, above or {**ABOVE, HIGH: (TOP, 1)})
            if wrong:
                raise Counterexample(schedule(came_from, state, None, threads, memory, wrong))
    return len(came_from)


def step(
    state: State, i: int, thread: Thread, what: str, word: int, operand: int
) -> tuple[State, Line]:
    """One access of thread i: the state after it, and the line for the schedule."""
    old = state.memory[word]
    new = old if what in ("load", "has", "any", "changed") else operand
    new = {"or": old | operand, "and": old & operand}.get(what, new)
    memory = (*state.memory[:word], new, *state.memory[word + 1 :])
    sent = (*state.sent[:i], state.sent[i] + (observed(what, operand, old),), *state.sent[i + 1 :])
    owed, removed = state.owed, state.removed
    if thread.marks and not state.sent[i]:  # it begins
        marked, bits = thread.marks
        owed |= {(i, marked, bit) for bit in (1, 2) if bits & bit}
    gone = old & ~new
    if word in LEAVES and gone:
        owed = frozenset(m for m in owed if not (m[1] == word and m[2] & gone))
        if thread.drains:
            removed |= gone << 2 * word
    return State(memory, sent, owed, state.due, removed), (thread.name, what, word, old, new)


def wrong_at_end(
    state: State, threads: list[Thread], levels: dict[int, tuple[int, int]]
) -> str | None:
    """All calls have returned: what is wrong with what they left?"""
    memory = state.memory
    lost = [m for m in state.owed if not memory[m[1]] & m[2]]
    if lost:
        return f"lost: nobody took {show_marks(frozenset(lost), threads)}, and it is not there"
    for word, (above, bit) in levels.items():
        if memory[word] and not memory[above] & bit:
            return (
                f"(a) {WORD_NAMES[word]} is {memory[word]:02b}, "
                f"its bit in {WORD_NAMES[above]} is clear"
            )
    return None


def show_marks(marks: Marks, threads: list[Thread]) -> str:
    return ", ".join(
        f"{WORD_NAMES[word]} bit {bit >> 1} (marked by "
        f"{threads[i].name if i >= 0 else 'somebody before'})"
        for i, word, bit in sorted(marks)
    )


def schedule(
    came_from: dict[State, tuple[State, Line] | None],
    state: State,
    last: Line | None,
    threads: list[Thread],
    memory: Memory,
    wrong: str,
) -> str:
    lines = [last] if last else []
    at = came_from[state]
    while at:
        lines.append(at[1])
        at = came_from[at[0]]
    shown = [
        f"  {name:8} {what:7} {WORD_NAMES[word]:6} {old:02b} -> {new:02b}"
        for name, what, word, old, new in reversed(lines)
    ]
    start = " ".join(f"{name} {word:02b}" for name, word in zip(WORD_NAMES, memory))
    calls = ", ".join(thread.name for thread in threads)
    return "\n".join([f"{calls} on {start}:", *shown, f"=> {wrong}"])


# ---- scenarios -----------------------------------------------------------------------------------


def slot_of(name: str) -> int:
    return SLOT_A if name.endswith("A") else SLOT_B


def marker(name: str, word: int, bits: int, **options: Any) -> Thread:
    return Thread(name, lambda: mark(slot_of(name), word, bits, **options), (word, bits))


def filler(name: str, word: int) -> Thread:
    return Thread(name, lambda: fill(slot_of(name), word), (word, ALL))


def resetter(**options: Any) -> Thread:
    return Thread("reset", lambda: clear(False, **options))


def drainer(**options: Any) -> Thread:
    return Thread("drain", lambda: clear(True, **options), drains=True)


def memory(
    leaves: tuple[int, int, int], mids: tuple[int, int], high: int = 0, top: int = 0
) -> Memory:
    return (*leaves, *mids, high, top, 0, 0, 0, 0, 0, 0)


EMPTY = memory((0, 0, 0), (0, 0))
STARTS: dict[str, Memory] = {
    "empty": EMPTY,
    # Summary bits over zero words are allowed.
    "stale": memory((0, 0, 0), (ALL, 1), ALL, 1),
    "stale above": memory((0, 0, 0), (0, 0), ALL, 1),
    "one dirty": memory((1, 0, 0), (1, 0), 1, 1),
    "other word": memory((0, 1, 0), (2, 0), 1, 1),
    "all": memory((1, 1, 1), (ALL, 1), ALL, 1),
    "far apart": memory((1, 0, 1), (1, 1), ALL, 1),
    "stale far": memory((0, 0, 0), (1, 1), ALL, 1),
}

# Where the two markers go: the bit they mark in the leaf word.
PAIRS = {
    "same bit": ((LEAF0, 1), (LEAF0, 1)),
    "same word": ((LEAF0, 1), (LEAF0, 2)),
    "neighbours": ((LEAF0, 1), (LEAF1, 1)),
    "far": ((LEAF0, 1), (LEAF2, 1)),
}
# Beside two clears of much there are too many states to visit for all of them.
TWO = ("same bit", "far")


def all_pairs(
    *others: Thread,
    starts: tuple[str, ...] = ("empty", "one dirty"),
    pairs: Iterable[str] = PAIRS,
    **options: Any,
) -> int:
    """Every pair of markers beside the others; returns the number of states."""
    return sum(
        explore(
            [marker("mark A", *a, **options), marker("mark B", *b, **options), *others],
            STARTS[start],
        )
        for a, b in (PAIRS[pair] for pair in pairs)
        for start in starts
    )


@pytest.mark.parametrize("start", list(STARTS)[:6])
@pytest.mark.parametrize("pair", PAIRS)
def test_two_markers_reset_and_drain(pair: str, start: str) -> None:
    a, b = PAIRS[pair]
    threads = [marker("mark A", *a), marker("mark B", *b), resetter(), drainer()]
    assert explore(threads, STARTS[start]) > 1000


def test_markers_that_do_not_test_first() -> None:
    assert all_pairs(drainer(), test_first=False) > 1000


def test_two_drains() -> None:
    assert all_pairs(drainer(), drainer(), pairs=TWO) > 1000


@pytest.mark.parametrize(
    "bits", [(1, 0, 0), (2, 0, 0), (ALL, 0, 0), (0, ALL, 0), (1, 1, 0), (2, ALL, 0), (ALL, 0, ALL)]
)
def test_reset_of_a_part(bits: tuple[int, int, int]) -> None:
    assert all_pairs(resetter(bits=bits)) > 1000


def test_reset_that_starts_at_the_middle_level() -> None:
    assert all_pairs(resetter(from_top=False)) > 1000


@pytest.mark.parametrize("start", STARTS)
def test_marks_over_a_whole_word(start: str) -> None:
    threads = [filler("fill A", LEAF0), marker("mark B", LEAF0, 1), drainer()]
    explore(threads, STARTS[start])
    explore([filler("fill A", LEAF0), filler("fill B", LEAF1), drainer()], STARTS[start])


def wiper(**options: Any) -> Thread:
    return Thread("wipe", lambda: wipe(**options))


def mover(**options: Any) -> Thread:
    return Thread("drain", lambda: move(**options), drains=True)


def merger(leaf0: int, leaf1: int, **options: Any) -> Thread:
    return Thread("merge", lambda: overwrite(leaf0, leaf1, **options))


@pytest.mark.parametrize("top_before_leaf", [False, True])
def test_emptying_whole_words(top_before_leaf: bool) -> None:
    wipe_all = wiper(top_before_leaf=top_before_leaf)
    assert all_pairs(wipe_all, drainer(), starts=("far apart",), pairs=TWO) > 1000
    explore([filler("fill A", LEAF0), marker("mark B", LEAF0, 1), wiper(), drainer()], EMPTY)


def named_wiper(**options: Any) -> Thread:
    return Thread("wipe", lambda: wipe_named(**options))


def test_emptying_what_is_named() -> None:
    assert all_pairs(named_wiper(), drainer(), starts=("far apart",), pairs=TWO) > 1000
    explore([filler("fill A", LEAF0), marker("mark B", LEAF0, 1), named_wiper(), drainer()], EMPTY)


@pytest.mark.parametrize("other", [drainer(), mover(), resetter()], ids=lambda t: t.name)
def test_draining_by_pages(other: Thread) -> None:
    assert all_pairs(mover(), other, starts=("stale far", "far apart"), pairs=TWO) > 1000
    explore([filler("fill A", LEAF0), marker("mark B", LEAF0, 1), mover(), other], EMPTY)


@pytest.mark.parametrize("leaves", [(0, 0), (1, 0), (2, ALL)])
def test_overwriting_whole_words(leaves: tuple[int, int]) -> None:
    pairs = ("same bit", "neighbours")
    assert all_pairs(merger(*leaves), drainer(), starts=("stale", "all"), pairs=pairs) > 1000


def asker(**options: Any) -> Thread:
    return Thread("ask", lambda: ask_empty(**options), asks=True)


# One bit of a word is cleared, the other one marked; leaf0 is looked at first by every search.
ASKED = {
    "under mid0": (memory((0, 2, 0), (2, 0), 1, 1), LEAF1),
    "under high": (memory((0, 0, 2), (0, 1), 2, 1), LEAF2),
}


def ask_beside(*clears: Thread, starts: Iterable[str] = ASKED, **options: Any) -> int:
    """Somebody asks, beside these and two markers of a bit: the second relies on the first."""
    states = 0
    for start, word in (ASKED[name] for name in starts):
        markers = [marker("mark A", word, 1), marker("mark B", word, 1)]
        states += explore([*markers, *clears, asker(**options)], start)
    return states


def part_resetter(**options: Any) -> Thread:
    """Clears the bits that nobody marks."""
    return resetter(bits=(0, 2, 2), **{"says": True, **options})


@pytest.mark.parametrize("start", ASKED)
def test_asking_whether_there_is_nothing(start: str) -> None:
    assert ask_beside(part_resetter(), starts=[start]) > 1000


@pytest.mark.parametrize("top_before_leaf", [False, True])
def test_asking_beside_what_empties_whole_words(top_before_leaf: bool) -> None:
    wipe_all = wiper(says=True, top_before_leaf=top_before_leaf)
    assert ask_beside(wipe_all, starts=["under high"]) > 1000


def ask_beside_a_move_in_vain(**options: Any) -> int:
    """It hides also what was marked before it began."""
    start, word = ASKED["under high"]
    mover_in_vain = Thread("move", move_in_vain)
    return explore([marker("mark A", word, 1), mover_in_vain, asker(**options)], start)


def test_asking_beside_a_move_in_vain() -> None:
    assert ask_beside_a_move_in_vain() > 1000


def test_asking_beside_two_clears() -> None:
    start, word = ASKED["under high"]
    threads = [marker("mark A", word, 1), part_resetter(), part_resetter(), asker()]
    assert explore(threads, start) > 1000


def tall(leaf0: int, leaf2: int, stale: int = 0) -> Memory:
    """These two, and what is above them; `stale`: bit i, also over what is zero there."""
    here = [int(bool(leaf0 or stale & 1)), int(bool(leaf2 or stale & 2))]
    upper = here[0] | here[1] << 1
    return (leaf0, 0, leaf2, *here, here[0], int(upper != 0), 0, 0, 0, here[1], upper, 0)


def explore_tall(*threads: Thread, start: Memory) -> int:
    return explore(list(threads), start, ABOVE_TALL)


def tall_marker(name: str, word: int, bits: int) -> Thread:
    return Thread(name, lambda: mark_tall(slot_of(name), word, bits), (word, bits))


def ranger(name: str, word: int, **options: Any) -> Thread:
    """Marks a range; of that, what it marks in `word` is followed."""
    return Thread(name, lambda: mark_range(slot_of(name), 1, **options), (word, 1))


def tall_resetter(**options: Any) -> Thread:
    return Thread("reset", lambda: clear_tall(False, **options))


def tall_drainer() -> Thread:
    return Thread("drain", lambda: clear_tall(True), drains=True)


TALL_STARTS = {
    "empty": tall(0, 0),
    "stale": tall(0, 0, 0b11),
    "one dirty": tall(1, 0),
    "both": tall(1, 1),
}


@pytest.mark.parametrize("start", TALL_STARTS)
@pytest.mark.parametrize("far", [False, True], ids=["same word", "far"])
def test_chains_of_levels(far: bool, start: str) -> None:
    a, b = tall_marker("mark A", LEAF0, 1), tall_marker("mark B", LEAF2 if far else LEAF0, 2)
    threads = (a, b, tall_resetter(), tall_drainer())
    assert explore_tall(*threads, start=TALL_STARTS[start]) > 1000


@pytest.mark.parametrize("start", ["empty", "one dirty"])
def test_ranges_over_chains_of_levels(start: str) -> None:
    for word in (LEAF0, LEAF2):
        a, b = ranger("mark A", word), tall_marker("mark B", word, 1)
        threads = (a, b, tall_resetter(), tall_drainer())
        assert explore_tall(*threads, start=TALL_STARTS[start]) > 1000


# ---- broken on purpose ---------------------------------------------------------------------------


def broken_early_exit() -> int:
    return all_pairs(drainer(), early_exit=True)


def broken_early_exit_without_test() -> int:
    return all_pairs(drainer(), early_exit=True, test_first=False)


def broken_no_second_look() -> int:
    return all_pairs(resetter(look_again=False))


def broken_no_second_look_of_the_drain() -> int:
    return all_pairs(drainer(look_again=False), drainer())


def broken_drain_loads_then_stores() -> int:
    return all_pairs(drainer(take_by_store=True))


def broken_no_wait_for_markers() -> int:
    return all_pairs(resetter(wait=False), drainer())


def broken_wait_before_the_bits_are_taken() -> int:
    return all_pairs(resetter(wait_first=True), drainer())


def broken_markers_that_are_not_waited_for() -> int:
    return all_pairs(resetter(), drainer(), say=False)


def broken_mid_before_what_is_above() -> int:
    return all_pairs(drainer(), mid_first=True)


def broken_no_second_look_at_high() -> int:
    return all_pairs(resetter(look_at_high=False))


def broken_look_above_before_it_is_said() -> int:
    return all_pairs(resetter(), drainer(), say_late=True)


def broken_tall(**options: Any) -> int:
    a, b = tall_marker("mark A", LEAF0, 1), tall_marker("mark B", LEAF2, 1)
    return sum(
        explore_tall(a, b, tall_resetter(**options), tall_drainer(), start=start)
        for start in TALL_STARTS.values()
    )


def broken_tall_no_wait_for_markers() -> int:
    return broken_tall(wait=False)


def broken_tall_look_at_level_1_only() -> int:
    return broken_tall(all_levels=False)


def broken_tall_range_that_is_not_waited_for() -> int:
    a, b = ranger("mark A", LEAF0, say=False), tall_marker("mark B", LEAF0, 1)
    return sum(
        explore_tall(a, b, tall_resetter(), tall_drainer(), start=start)
        for start in TALL_STARTS.values()
    )


def broken_wipe_of_the_leaf_first() -> int:
    return all_pairs(wiper(summary_first=False))


def broken_wipe_that_overlooks_names() -> int:
    return all_pairs(named_wiper(exchange=False))


def broken_overwrite_without_a_second_look() -> int:
    return all_pairs(merger(0, 0, look_again=False))


def broken_move_of_what_is_named() -> int:
    return all_pairs(mover(trust_summary=True))


def broken_move_of_the_leaf_first() -> int:
    return all_pairs(mover(summary_first=False))


def broken_ask_without_a_look_at_changes() -> int:
    return ask_beside(part_resetter(says=False))


def broken_ask_without_a_look_before() -> int:
    return ask_beside(part_resetter(), at_begin=False)


def broken_ask_without_a_look_behind() -> int:
    return ask_beside_a_move_in_vain(at_end=False)


def broken_clear_that_says_too_early_that_it_has_ended() -> int:
    return ask_beside(part_resetter(ends_early=True))


BROKEN = {
    broken_early_exit: "(b) the drain passed over leaf0 bit 0 (marked by mark",
    broken_early_exit_without_test: "(b) the drain passed over leaf0 bit 0 (marked by mark",
    broken_no_second_look: "(a) ",
    broken_no_second_look_of_the_drain: "(b) ",
    broken_drain_loads_then_stores: "lost: ",
    broken_no_wait_for_markers: "(b) the drain passed over leaf",
    broken_wait_before_the_bits_are_taken: "(a) mid",
    broken_markers_that_are_not_waited_for: "(a) mid",
    broken_mid_before_what_is_above: "(b) the drain passed over leaf0 bit",
    broken_no_second_look_at_high: "(a) high",
    broken_look_above_before_it_is_said: "(a) mid",
    broken_tall_no_wait_for_markers: "(b) the drain passed over leaf0 bit 0",
    broken_tall_look_at_level_1_only: "(b) the drain passed over leaf2 bit 0",
    broken_tall_range_that_is_not_waited_for: "(a) mid0",
    broken_wipe_of_the_leaf_first: "(a) leaf",
    broken_wipe_that_overlooks_names: "(a) leaf",
    broken_overwrite_without_a_second_look: "(a) leaf",
    broken_move_of_what_is_named: "lost: drained",
    broken_move_of_the_leaf_first: "(a) leaf",
    broken_ask_without_a_look_at_changes: "(d) empty, but there is leaf",
    broken_ask_without_a_look_before: "(d) empty, but there is leaf",
    broken_ask_without_a_look_behind: "(d) empty, but there is leaf",
    broken_clear_that_says_too_early_that_it_has_ended: "(d) empty, but there is leaf",
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda f: f.__name__[len("broken_") :])
def test_a_broken_protocol_is_caught(broken: Callable[[], int]) -> None:
    with pytest.raises(Counterexample) as caught:
        broken()
    text = str(caught.value)
    print(text)
    assert "=> " + BROKEN[broken] in text
    assert "mark A" in text
    assert len(text.splitlines()) > 4


if __name__ == "__main__":
    for scenario in BROKEN:
        try:
            scenario()
        except Counterexample as found:
            print(f"{scenario.__name__}\n{found}\n")
