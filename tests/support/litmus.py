# SPDX-License-Identifier: MIT
"""Litmus tests in C: small programs of some threads, and a final state that may be reached or not.

The format is that of herd7 (`C name`, initial values, `P0 (atomic_int *x) { ... }`, `exists`);
`parse` knows the part of it that tests/litmus uses.  rc11.py decides the tests.

A line of a test can say how it is broken, with commas between several ways; each makes one variant
of the test (`broken`):

    // broken: left out                 it is not there; what it would have read is 0
    // broken: memory_order_relaxed     it has that order
    // broken: later                    the next line comes before it
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Callable, NamedTuple, Union

Registers = Mapping[str, int]
Expression = Callable[[Registers], int]
Finals = Mapping[str, int]  # "0:r1" or "x" -> value
Condition = Callable[[Finals], bool]
Change = Callable[[int, int], int]


MODELS = ("rc11", "armv8")  # rc11.py
ORDERS = ("relaxed", "acquire", "release", "acq_rel", "seq_cst")


class LitmusError(ValueError):
    """A test that cannot be read: where, and what was expected."""


def zero(registers: Registers) -> int:
    return 0


# ---- tests ---------------------------------------------------------------------------------------


class Local(NamedTuple):
    register: str
    value: Expression


class If(NamedTuple):
    condition: Expression
    then: Block
    otherwise: Block


class Access(NamedTuple):
    """kind: R, W, U (a read-modify-write), C (a compare-exchange), F (a fence).

    order: also "plain".  change: what U writes, of what it read and of the value.  expected: the
    location whose value C compares with; failure: its order if they differ.
    """

    kind: str
    order: str
    location: str = ""
    register: str = ""
    value: Expression = zero
    change: Change = lambda old, operand: operand
    expected: str = ""
    failure: str = ""


Statement = Union[Local, If, Access]
Block = tuple[Statement, ...]


class Litmus(NamedTuple):
    name: str
    model: str
    initial: dict[str, int]
    threads: tuple[Block, ...]
    filter: Condition
    exists: Condition
    forbidden: bool  # the test says ~exists


TOKEN = re.compile(r"\s*(?:(//[^\n]*|/\*.*?\*/|\(\*.*?\*\))|(\w+)|(==|!=|/\\|\\/|\S))", re.DOTALL)
CALLS: dict[str, tuple[str, Change]] = {
    "atomic_thread_fence": ("F", lambda old, operand: 0),
    "atomic_load_explicit": ("R", lambda old, operand: 0),
    "atomic_store_explicit": ("W", lambda old, operand: operand),
    "atomic_compare_exchange_strong_explicit": ("C", lambda old, operand: operand),
    "atomic_exchange_explicit": ("U", lambda old, operand: operand),
    "atomic_fetch_add_explicit": ("U", lambda old, operand: old + operand),
    "atomic_fetch_sub_explicit": ("U", lambda old, operand: old - operand),
    "atomic_fetch_or_explicit": ("U", lambda old, operand: old | operand),
    "atomic_fetch_and_explicit": ("U", lambda old, operand: old & operand),
    "atomic_fetch_xor_explicit": ("U", lambda old, operand: old ^ operand),
}
OPERATORS: list[dict[str, Change]] = [  # the loosest first
    {"|": lambda a, b: a | b},
    {"^": lambda a, b: a ^ b},
    {"&": lambda a, b: a & b},
    {"==": lambda a, b: int(a == b), "!=": lambda a, b: int(a != b)},
    {"+": lambda a, b: a + b, "-": lambda a, b: a - b},
]


class Parser:
    """By recursive descent."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = self.end = 0  # where it is, and where the next token ends
        self.locations: dict[str, bool] = {}  # of the thread; is it atomic?
        self.registers: set[str] = set()  # of the thread
        self.finals: set[str] = set()  # what conditions may ask for

    def peek(self) -> str:
        """What comes next, behind comments; "" at the end."""
        while found := TOKEN.match(self.text, self.at):
            if not found[1]:
                self.end = found.end()
                return found[2] or found[3]
            self.at = found.end()
        self.end = len(self.text)
        return ""

    def word(self) -> str:
        """Whatever that is."""
        token = self.peek()
        self.at = self.end
        return token

    def take(self, *wanted: str) -> str:
        """One of these."""
        token = self.word()
        if token not in wanted:
            line = self.text.count("\n", 0, self.at) + 1
            here = f"line {line}: {token or 'the end'}"
            raise LitmusError(f"{here}, where there can be {', '.join(wanted) or 'nothing'}")
        return token

    def accept(self, token: str) -> bool:
        if self.peek() != token:
            return False
        self.word()
        return True

    def number(self) -> int:
        sign = -1 if self.accept("-") else 1
        return sign * int(self.word() if self.peek().isdigit() else self.take("a number"))

    def test(self) -> Litmus:
        self.take("C")
        end = self.text.find("\n", self.at)
        name = self.text[self.at : end].strip()
        self.at = end
        model = re.search(r"\bmodel: (\w+)", self.text)
        if model and model[1] not in MODELS:
            raise LitmusError(f"model {model[1]} is not known, only {', '.join(MODELS)}")
        initial = self.initial()
        threads: list[Block] = []
        while re.fullmatch(r"P\d+", self.peek()):
            self.take(f"P{len(threads)}")
            threads.append(self.thread())
            self.finals |= {f"{len(threads) - 1}:{register}" for register in self.registers}
            for location in self.locations:
                initial.setdefault(location, 0)
        self.finals |= set(initial)
        wanted = self.condition() if self.accept("filter") else lambda finals: True
        forbidden = self.accept("~")
        self.take("exists")
        exists = self.condition()
        if self.peek():
            self.take("the end of the test")
        return Litmus(
            name,
            model[1] if model else MODELS[0],
            initial,
            tuple(threads),
            wanted,
            exists,
            forbidden,
        )

    def initial(self) -> dict[str, int]:
        values = {}
        self.take("{")
        while not self.accept("}"):
            brackets = self.accept("[")
            location = self.word()
            if brackets:
                self.take("]")
            self.take("=")
            values[location] = self.number()
            self.accept(";")
        return values

    def thread(self) -> Block:
        self.locations = {}
        self.registers = set()
        self.take("(")
        while not self.accept(")"):
            atomic = self.take("atomic_int", "int") == "atomic_int"
            self.take("*")
            self.locations[self.word()] = atomic
            self.accept(",")
        return self.block()

    def block(self) -> Block:
        if not self.accept("{"):
            return self.statement()
        statements: list[Statement] = []
        while not self.accept("}"):
            statements += self.statement()
        return tuple(statements)

    def statement(self) -> Block:
        if self.accept("if"):
            self.take("(")
            condition = self.expression()
            self.take(")")
            then = self.block()
            return (If(condition, then, self.block() if self.accept("else") else ()),)
        made: Statement
        if self.accept("*"):
            location = self.location(atomic=False)
            self.take("=")
            made = Access("W", "plain", location, value=self.expression())
        elif self.peek() in ("atomic_thread_fence", "atomic_store_explicit"):
            made = self.call("")
        else:
            if self.accept("int"):
                self.registers.add(self.peek())
            register = self.take(*self.registers)
            self.take("=")
            if self.accept("*"):
                made = Access("R", "plain", self.location(atomic=False), register)
            elif self.peek().startswith("atomic_"):
                made = self.call(register)
            else:
                made = Local(register, self.expression())
        self.take(";")
        return (made,)

    def call(self, register: str) -> Access:
        """Of one of the functions of <stdatomic.h>."""
        what = self.take(*CALLS)
        kind, change = CALLS[what]
        location = expected = ""
        value: Expression = zero
        self.take("(")
        if kind != "F":
            location = self.location(atomic=True)
            self.take(",")
        if kind == "C":
            expected = self.location(atomic=False)
            self.take(",")
        if kind in "WUC":
            value = self.expression()
            self.take(",")
        orders = [self.order()]
        if kind == "C":
            self.take(",")
            orders.append(self.order())
        self.take(")")
        return Access(kind, orders[0], location, register, value, change, expected, orders[-1])

    def order(self) -> str:
        return self.take(*(f"memory_order_{order}" for order in ORDERS))[len("memory_order_") :]

    def location(self, atomic: bool) -> str:
        return self.take(*(name for name, kind in self.locations.items() if kind == atomic))

    def expression(self, level: int = 0) -> Expression:
        if level == len(OPERATORS):
            return self.operand()
        left = self.expression(level + 1)
        while self.peek() in OPERATORS[level]:
            left = both(OPERATORS[level][self.word()], left, self.expression(level + 1))
        return left

    def operand(self) -> Expression:
        if self.accept("("):
            inner = self.expression()
            self.take(")")
            return inner
        if self.peek() == "-" or self.peek().isdigit():
            number = self.number()
            return lambda registers: number
        register = self.take(*self.registers)
        return lambda registers: registers[register]

    def condition(self) -> Condition:
        left = self.conjunction()
        while self.accept("\\/"):
            left = either(left, self.conjunction())
        return left

    def conjunction(self) -> Condition:
        left = self.atom()
        while self.accept("/\\"):
            left = each(left, self.atom())
        return left

    def atom(self) -> Condition:
        if self.accept("~"):
            inner = self.atom()
            return lambda finals: not inner(finals)
        if self.accept("("):
            inner = self.condition()
            self.take(")")
            return inner
        name = self.word()
        if self.accept(":"):
            name = f"{name}:{self.word()}"
        if name not in self.finals:
            raise LitmusError(f"a condition asks for {name}, which no thread has")
        equal = self.take("=", "!=") == "="
        value = self.number()
        return lambda finals: (finals[name] == value) == equal


def both(operator: Change, left: Expression, right: Expression) -> Expression:
    return lambda registers: operator(left(registers), right(registers))


def either(left: Condition, right: Condition) -> Condition:
    return lambda finals: left(finals) or right(finals)


def each(left: Condition, right: Condition) -> Condition:
    return lambda finals: left(finals) and right(finals)


def parse(text: str) -> Litmus:
    """LitmusError says what it does not know."""
    return Parser(text).test()


# ---- broken on purpose ---------------------------------------------------------------------------


class Broken(NamedTuple):
    how: str
    text: str


def broken(text: str) -> list[Broken]:
    """The variants that the lines of a test ask for."""
    lines = text.splitlines(keepends=True)
    made = []
    for i, line in enumerate(lines):
        found = re.search(r"\bbroken: ([^*\n]*)", line)
        for how in found[1].split(",") if found else ():
            how = how.strip()
            changed = lines.copy()
            if how == "left out":
                register = re.match(r"\s*(int \w+) = ", line)
                changed[i] = f"{register[1]} = 0;\n" if register else "\n"
            elif how == "later":
                changed[i : i + 2] = [lines[i + 1], line]
            elif how.startswith("memory_order_"):
                code, comment = line.split("//")
                changed[i] = re.sub(r"memory_order_\w+", how, code) + "//" + comment
            else:
                raise LitmusError(f"line {i + 1}: '{how}' is no way to break it")
            made.append(
                Broken(f"line {i + 1} {how}: {line.split('//')[0].strip()}", "".join(changed))
            )
    return made
