#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Runs the test suites that pyroaring, bitarray and CPython publish, against our interfaces.

    run_peers.py pyroaring test.py              of its repository: BitMap, FrozenBitMap
    run_peers.py pyroaring64 test.py            the same: BitMap64, FrozenBitMap64
    run_peers.py bitarray test_bitarray.py      of its package: the classes that are about flags
    run_peers.py bitarray-util test_util.py     the same; test_bitarray.py lies beside it
    run_peers.py set test_set.py                of CPython's Lib/test: HBitmap where it says set

It prints how many passed and the name of every test that did not; ``docs/compat.md`` says of each
why. Nothing of theirs is in this repository: ``pip download --no-binary :all: --no-deps bitarray``,
a clone of pyroaring's repository, and the ``test`` package of the interpreter have them. What is
changed is put in their place here: the module that they import, and two helpers of bitarray's.
pyroaring's examples that have numbers which are too large for us, and not for a BitMap64, are
rejected.
Exit status: 0 if they ran, whatever failed; 2 if they could not be run.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import unittest
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from pybitmap import HBitmap, RangeError
from pybitmap.compat import bits, roaring
from pybitmap.hbitmap import hinted

Outcomes = dict[str, str]

#: Classes of bitarray's suite that are about flags; of the rest docs/compat.md says why not.
FLAGS = [
    "AllTests",
    "AnyTests",
    "BytesTests",
    "ContainsTests",
    "CountTests",
    "CreateObjectTests",
    "DescriptorTests",
    "GetItemTests",
    "GetMaskTests",
    "GetSequenceTests",
    "GetSliceTests",
    "IndexTests",
    "InvertTests",
    "MiscTests",
    "NumberTests",
    "PickleTests",
    "RichCompareTests",
    "SearchTests",
    "SetAllTests",
    "SetItemTests",
    "SetMaskTests",
    "SetSequenceTests",
    "SetSliceTests",
    "ShiftTests",
    "SpecialMethodTests",
    "To01Tests",
    "ToListTests",
    "ToObjectsTests",
]
FLAGS_UTIL = [
    "BitwiseAnyTests",
    "BitwiseCountTests",
    "CountN_Tests",
    "HexlifyTests",
    "IntegerizationTests",
    "IntervalsTests",
    "ParityTests",
    "SubsetTests",
    "ZerosOnesTests",
]


def module(name: str, **members: Any) -> ModuleType:
    """One that is imported from now on where ``name`` is asked for."""
    made = sys.modules[name] = ModuleType(name)
    vars(made).update(members)
    return made


def loaded(name: str, path: Path) -> ModuleType:
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    made = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


# ---- pyroaring ------------------------------------------------------------------------------


class Reporter:
    """What pytest tells of each test."""

    def __init__(self) -> None:
        self.outcomes: Outcomes = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = report.nodeid.split("::", 1)[1].replace("::", ".")
        if report.when == "call" or not report.passed:
            self.outcomes[name] = report.outcome


def run_pyroaring(path: Path, bitsize: str) -> Outcomes:
    import hypothesis
    import pytest

    @contextmanager
    def within() -> Iterator[None]:
        """For roaring's own: examples with a number that is too large only for us do not count."""
        try:
            yield
        except RangeError as error:
            if bitsize == "64" and "[-" not in str(error):
                hypothesis.reject()
            raise roaring.NoItem(str(error)) from None

    roaring._overflowing = within
    every = list(hypothesis.HealthCheck)
    hypothesis.settings.register_profile("peers", suppress_health_check=every, deadline=None)
    hypothesis.settings.load_profile("peers")
    module("pyroaring", **{name: getattr(roaring, name) for name in roaring.__all__})
    os.environ["ROARING_BITSIZE"] = bitsize
    os.environ.pop("PYTEST_ADDOPTS", None)  # -n: other processes, where pyroaring is pyroaring
    reporter = Reporter()
    options = ["-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", "-c", os.devnull]
    pytest.main([*options, "--rootdir", str(path.parent), str(path)], plugins=[reporter])
    return reporter.outcomes


# ---- bitarray -------------------------------------------------------------------------------


def absent(name: str) -> Any:
    """A class in the place of something that we have not."""

    def fail(self: object, *args: object, **kwargs: object) -> None:
        raise NotImplementedError(f"there is no {name} in pybitmap.compat.bits")

    return type(name, (), {"__init__": fail})


def random_flags(n: int, endian: str | None = "<RAND>") -> bits.bitarray:
    """For their urandom_2, which makes too many and deletes some."""
    endian = random.choice(["little", "big"]) if endian == "<RAND>" else endian
    return bits.bitarray("".join(random.choices("01", k=n)), endian)


def random_bits(n: int, endian: str | None = None) -> bits.bitarray:
    """For their urandom, which we have not."""
    return random_flags(n, endian)


def check_flags(self: Any, a: bits.bitarray) -> None:
    """For their check_obj, which looks at the memory by buffer_info(), too."""
    assert isinstance(a, bits.bitarray)
    assert a.padbits in range(8)
    assert len(a) + a.padbits == 8 * a.nbytes


def bitarray_in_place() -> None:
    there = {name: getattr(bits, name) for name in bits.__all__}
    names = ["decodetree", "decodeiterator", "_bitarray_reconstructor"]
    module(
        "bitarray",
        **{name: absent(name) for name in [*names, "BufferInfo"]},
        bitarray=bits.bitarray,
        frozenbitarray=bits.frozenbitarray,
        bits2bytes=lambda n: -(-n // 8),
        get_default_endian=lambda: "big",
        __version__="",
    )
    module("bitarray._bitarray", sysinfo=lambda what: 8)
    module("bitarray._util", uleb128_encode=absent("uleb128_encode"))
    # What is imported of it and is not there is absent, too.
    module("bitarray.util", **there, urandom=random_bits, __getattr__=absent)


def run_bitarray(path: Path, names: list[str]) -> Outcomes:
    bitarray_in_place()
    suite = loaded("bitarray.test_bitarray", path.parent / "test_bitarray.py")
    vars(suite)["urandom_2"] = random_flags
    vars(suite)["Util"].check_obj = check_flags
    if path.name != "test_bitarray.py":
        suite = loaded("bitarray.test_util", path)
    return run_unittest(suite, names.__contains__)


# ---- set ------------------------------------------------------------------------------------


class Number(int):
    """That of an element. (HBitmap's methods call each other with what they were given.)"""


#: The number of every letter, or whatever a test takes as an element; by number, what it was.
NUMBERS: dict[object, Number] = {}
LETTERS: list[Any] = []


def number(element: object) -> Number:
    """
    :raises TypeError: if it has no hash
    """
    if isinstance(element, Number):
        return element
    if element not in NUMBERS:
        NUMBERS[element] = Number(len(LETTERS))
        LETTERS.append(element)
    return NUMBERS[element]


def numbers(other: Any) -> Any:
    """An operand of theirs as HBitmap takes it."""
    if isinstance(other, HBitmap):
        return other
    if isinstance(other, AbstractSet):
        return frozenset(map(number, other))
    try:
        return map(number, other)
    except TypeError:  # nothing to iterate over
        return other


class Letters(HBitmap):
    """An HBitmap whose elements are what the tests take: letters, mostly."""

    __slots__ = ()

    def __init__(self, elements: Iterable[Any] = (), /) -> None:
        if hasattr(self, "_hb"):
            self.clear()
        else:
            super().__init__(1 << 16)
        self.update(elements)

    def __iter__(self) -> Iterator[Any]:
        return hinted(map(LETTERS.__getitem__, super().__iter__()), lambda: len(self))

    def remove(self, element: Any) -> None:
        try:
            super().remove(numbered_element(element))
        except KeyError:
            raise KeyError(element) from None

    def pop(self) -> Any:
        return LETTERS[super().pop()]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self)})" if self else f"{type(self).__name__}()"


def over_numbers(name: str, convert: Callable[[Any], Any]) -> Callable[..., Any]:
    of_hbitmap = getattr(HBitmap, name)

    def method(self: HBitmap, *others: Any) -> Any:
        return of_hbitmap(self, *map(convert, others))

    method.__name__ = name
    return method


def numbered_element(element: Any) -> int:
    try:
        return number(element)
    except TypeError:
        if isinstance(element, HBitmap):
            return number(frozenset(element))
        raise


# Comparisons iterate over both sides, so they compare letters as they are.
_ELEMENT = ["add", "discard", "__contains__"]
_SETS = [
    *(f"__{kind}{name}__" for kind in ("", "r", "i") for name in ("or", "and", "sub", "xor")),
    *("union", "intersection", "difference", "symmetric_difference", "update"),
    *(f"{name}_update" for name in ("intersection", "difference", "symmetric_difference")),
]
for _name in _ELEMENT:
    setattr(Letters, _name, over_numbers(_name, numbered_element))
for _name in _SETS:
    setattr(Letters, _name, over_numbers(_name, numbers))


def run_set(path: Path) -> Outcomes:
    suite = module("test_set_over_hbitmap", set=Letters)
    exec(compile(path.read_text(), str(path), "exec"), vars(suite))
    # Those are about frozenset, and about elements whose hash is another each time.
    return run_unittest(suite, lambda name: "Frozen" not in name and "Mutating" not in name)


# ---- all ------------------------------------------------------------------------------------


class Result(unittest.TestResult):
    """What unittest tells of each test."""

    def __init__(self) -> None:
        super().__init__()
        self.outcomes: Outcomes = {}
        self.why: dict[str, str] = {}

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self.outcomes[self._name(test)] = "passed"

    def stopTest(self, test: unittest.TestCase) -> None:
        super().stopTest(test)
        for kind, tests in [
            ("failed", [*self.failures, *self.errors]),
            ("skipped", self.skipped),
        ]:
            for each, why in tests:
                name = self._name(getattr(each, "test_case", each))
                self.outcomes[name] = kind
                self.why.setdefault(name, why.strip().splitlines()[-1])

    @staticmethod
    def _name(test: unittest.TestCase) -> str:
        return ".".join(test.id().split(".")[-2:])


def run_unittest(suite: ModuleType, wanted: Callable[[str], bool]) -> Outcomes:
    loader, result = unittest.TestLoader(), Result()
    for name, case in sorted(vars(suite).items()):
        if isinstance(case, type) and issubclass(case, unittest.TestCase) and wanted(name):
            loader.loadTestsFromTestCase(case).run(result)
    for name, outcome in result.outcomes.items():
        if outcome == "failed":
            print(f"{name}: {result.why[name]}", file=sys.stderr)
    return result.outcomes


class Suite(NamedTuple):
    """How one is run."""

    run: Callable[[Path], Outcomes]
    file: str


SUITES = {
    "pyroaring": Suite(lambda path: run_pyroaring(path, "32"), "test.py"),
    "pyroaring64": Suite(lambda path: run_pyroaring(path, "64"), "test.py"),
    "bitarray": Suite(lambda path: run_bitarray(path, FLAGS), "test_bitarray.py"),
    "bitarray-util": Suite(lambda path: run_bitarray(path, FLAGS_UTIL), "test_util.py"),
    "set": Suite(run_set, "test_set.py"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("path", type=Path, help="the file of tests, or its folder")
    args = parser.parse_args()
    suite = SUITES[args.suite]
    path = args.path / suite.file if args.path.is_dir() else args.path
    if not path.is_file():
        print(f"run_peers.py: there is no {path}: see the head of this file", file=sys.stderr)
        return 2
    outcomes = suite.run(path.resolve())
    counts = Counter(outcomes.values())
    if not counts["passed"]:
        print(f"run_peers.py: no test of {path} could be run", file=sys.stderr)
        return 2
    for name, outcome in sorted(outcomes.items()):
        if outcome == "failed":
            print(name)
    ran = counts["passed"] + counts["failed"]
    print(f"{args.suite}: {counts['passed']} of {ran} passed, {counts['skipped']} skipped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
