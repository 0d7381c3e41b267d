# SPDX-License-Identifier: MIT
"""Two copies of the core in one process: nothing is lost between them in silence.

``csrc/copies.h`` has the way. Every function hands on what another copy has made, as it got it, and
refuses what it does not know: tried with tables of our own, which write down what they are called
with. That nothing is lost is tried with real copies, compiled as modules compile them.
"""

from __future__ import annotations

import ctypes
import errno
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Callable

import pytest
from c_programs import link
from support import beside_malloc, run_python

import pybitmap
from pybitmap import native

pytestmark = pytest.mark.core

CSRC = Path(pybitmap.get_include())
COPY = Path(__file__).parents[1] / "c" / "copy.c"

# ---- every function -------------------------------------------------------------------------

NAMES = list(native.addresses())

#: They are about no thing that somebody has made.
ABOUT_NOTHING = {"hbitmap_thread_init", "hbitmap_alloc", "hbitmap_alloc_on", "hbtracker_alloc"}
#: They do what they do by others of these.
BY_OTHERS = {
    "hbitmap_pin_into",
    "hbitmap_drop_pin",
    "hbitmap_put_back",
    "hbtracker_set_alloc",
    "hbtracker_sets_free",
}
GIVEN_ON = [name for name in NAMES if name not in ABOUT_NOTHING | BY_OTHERS]

THINGS = ("HBitmap", "HBTracker", "HBTrackerSet", "HBWrite")
NUMBERS = {
    "int": ctypes.c_int,
    "unsigned": ctypes.c_uint,
    "bool": ctypes.c_bool,
    "size_t": ctypes.c_size_t,
    "uint64_t": ctypes.c_uint64,
    "int64_t": ctypes.c_int64,
    "void": None,
}


def declarations() -> dict[str, tuple[str, list[str]]]:
    """By name, the result and the parameters of each function, without the parameters' names."""
    found = {}
    for header in ("hbitmap.h", "tracker.h"):
        text = (CSRC / header).read_text(encoding="utf-8")
        text = re.sub(r"/\*.*?\*/", "", text.partition("cdef: begin */")[2], flags=re.DOTALL)
        for result, name, given in re.findall(r"([\w *]+?)\b(hb\w+)\(([^)]*)\);", text):
            words = [" ".join(each.replace("const", "").split()) for each in given.split(",")]
            parameters = [re.sub(r"\w+$", "", word).replace(" ", "") for word in words]
            if words == ["void"]:
                parameters = []
            found[name] = (result.replace("const", "").strip(), parameters)
    return found


DECLARED = declarations()


def c_type(word: str) -> Any:
    return ctypes.c_void_p if "*" in word else NUMBERS[word]


def prototype(name: str, errno_too: bool = False) -> Any:
    result, parameters = DECLARED[name]
    return ctypes.CFUNCTYPE(c_type(result), *map(c_type, parameters), use_errno=errno_too)


class Elsewhere:
    """A thing of another copy, and the table of that, whose functions do nothing but to write down
    what they are called with.

    :param version, magic, functions: of the table, where it is not one like ours
    """

    def __init__(
        self,
        version: int = 1,
        magic: int | None = None,
        functions: int | None = None,
        own: bool = False,
    ) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.answers: dict[str, Any] = {}
        self.kept: list[Any] = []
        size = 16 + 8 * (len(NAMES) if functions is None else functions)
        ours = ctypes.c_uint64.from_address(native.table()).value
        self.table = (ctypes.c_uint64 * (2 + len(NAMES)))(ours if magic is None else magic)
        (ctypes.c_uint32 * 2).from_buffer(self.table, 8)[:] = [version, size]
        for i, name in enumerate(NAMES):
            if own:
                self.table[2 + i] = native.address(name)
            else:
                function = prototype(name)(self._written(name))
                self.kept.append(function)
                self.table[2 + i] = ctypes.cast(function, ctypes.c_void_p).value or 0
        self.thing = (ctypes.c_uint64 * 64)(ctypes.addressof(self.table))
        self.address = ctypes.addressof(self.thing)

    def _written(self, name: str) -> Callable[..., Any]:
        result = DECLARED[name][0]

        def function(*given: Any) -> Any:
            self.calls.append((name, given))
            return self.answers.get(name, None if result == "void" else answer(result))

        return function

    def call(self, name: str) -> tuple[Any, int, tuple[Any, ...]]:
        """What Python's copy answers, errno, and what it was called with."""
        given: list[Any] = []
        for i, word in enumerate(DECLARED[name][1]):
            if word in [f"{thing}*" for thing in THINGS]:
                given.append(self.address)
            elif word == "HBitmapIter*":
                # Of what it iterates over, which stands first in it; or about to be made.
                given.append(self._room(self.address if name != "hbitmap_iter_init" else 0))
            elif "*" in word:
                given.append(self._room(self.address))
            elif word == "bool":
                given.append(True)
            else:
                given.append(1 if word == "size_t" else 1000 + i)
        ctypes.set_errno(0)
        function = prototype(name, errno_too=True)(native.address(name))
        return function(*given), ctypes.get_errno(), tuple(given)

    def _room(self, first: int) -> int:
        room = (ctypes.c_uint64 * 8)(first)
        self.kept.append(room)
        return ctypes.addressof(room)


def answer(result: str) -> Any:
    return True if result == "bool" else 77


@pytest.mark.parametrize("name", GIVEN_ON)
def test_a_thing_of_another_copy_is_handed_on(name: str) -> None:
    elsewhere = Elsewhere()
    found, _, given = elsewhere.call(name)
    assert elsewhere.calls == [(name, given)]
    assert DECLARED[name][0] == "void" or found == answer(DECLARED[name][0])


#: What functions answer that return no error, where they cannot do anything.
NOTHING = {"hbitmap_torn": True, "hbtracker_wait": True}
UNKNOWN = {
    "another version": {"version": 2},
    "no table": {"magic": 1 << 20},
    "an older table": {"functions": 0},
    "its own functions": {"own": True},
}


def refusal(name: str) -> Any:
    result, _ = DECLARED[name]
    if name in NOTHING:
        return NOTHING[name]
    if name.endswith(("intersection_count", "union_count", "difference_count", "copy_areas")):
        return -errno.EXDEV  # as where sizes differ: -EINVAL
    if result == "int64_t":
        return -1
    if "*" in result or result == "void":
        return None
    return -errno.EXDEV if result == "int" else 0


@pytest.mark.parametrize("what", UNKNOWN)
@pytest.mark.parametrize("name", GIVEN_ON)
def test_a_thing_that_is_not_known_is_refused(name: str, what: str) -> None:
    elsewhere = Elsewhere(**UNKNOWN[what])  # type: ignore[arg-type]
    found, code, _ = elsewhere.call(name)
    assert not elsewhere.calls
    assert found == refusal(name)
    assert code == errno.EXDEV


def test_a_set_of_bitmaps_that_are_not_known_is_not_made() -> None:
    found, code, _ = Elsewhere(version=2).call("hbtracker_set_alloc")
    assert found is None
    assert code == errno.EXDEV


@pytest.mark.parametrize("name", sorted(BY_OTHERS - {"hbtracker_set_alloc"}))
def test_what_others_do_is_handed_on_by_these(name: str) -> None:
    elsewhere = Elsewhere()
    called = {
        "hbitmap_pin_into": "hbitmap_pin",
        "hbitmap_drop_pin": "hbitmap_unpin",
        "hbtracker_sets_free": "hbtracker_set_free",
        "hbitmap_put_back": "hbitmap_merge",
    }[name]
    if name == "hbitmap_put_back":
        pair = (ctypes.c_uint64 * 2)(elsewhere.address, elsewhere.address)
        elsewhere.answers["hbitmap_merge"] = 0
        prototype(name)(native.address(name))(ctypes.addressof(pair))
        assert pair[0] == 0
    else:
        elsewhere.call(name)
    assert called in [each for each, _ in elsewhere.calls]


# ---- real copies ----------------------------------------------------------------------------


def compiled(folder: Path, name: str, *flags: str) -> Path:
    options = ["-std=c11", "-O1", "-shared", "-fPIC", "-pthread", f"-I{CSRC}", *flags]
    return link(folder / name, [COPY, *map(Path, pybitmap.get_sources())], *options)


@pytest.fixture(scope="module")
def visible(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As who has no flags compiles it: all its names are everybody's."""
    return compiled(tmp_path_factory.mktemp("copies"), "visible.so")


@pytest.fixture(scope="module")
def hidden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("copies"), "hidden.so", "-fvisibility=hidden")


def test_the_sources_export_nothing_but_their_own_names(visible: Path) -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not installed (Debian package binutils)")
    done = subprocess.run(
        [nm, "-D", "--defined-only", str(visible)], capture_output=True, text=True, check=True
    )
    names = {line.split()[-1] for line in done.stdout.splitlines()}
    assert {"hbitmap_set", "hbtracker_mark"} <= names
    known = "(hb(itmap|tracker|file|kvm|mem|process|unicorn|mask|arrow)|copy)_"
    assert not [name for name in names if not re.match(known, name)]


BEGIN = """
import ctypes, errno, os, shutil
from pybitmap import BlockGraph, HBitmap, _core
MARK, RESET, WRITE = range(3)

def load(path, mode):
    copy = ctypes.CDLL(path, mode)
    copy.copy_start.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64]
    copy.copy_running.restype = ctypes.c_bool
    copy.copy_alloc.restype = copy.copy_tracker.restype = ctypes.c_void_p
    copy.copy_alloc.argtypes = [ctypes.c_uint64]
    copy.copy_tracker.argtypes = [ctypes.c_void_p]
    copy.copy_merge.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    copy.copy_publish.argtypes = [ctypes.c_void_p]
    return copy

copy = load({path!r}, ctypes.{mode})
N = 1 << {log}
"""

EXACTLY_ONE = """
taken, drains = HBitmap(N), 0
hb = HBitmap(N)
rounds = beside = 0
with hb.pin() as address:
    while rounds < {rounds} or beside < 5:
        copy.copy_start(address, MARK, N, {marks})
        seen = HBitmap(N)
        count = 0
        while True:
            last = not copy.copy_running()
            if drains % 2:
                hb.drain(into=taken)
            else:
                taken = hb.drain()
            drains += 1
            count += len(taken)
            assert taken.isdisjoint(seen)
            seen |= taken
            taken.reset_all()
            beside += not last
            if last:
                break
        code = copy.copy_finish()
        assert code == 0, code
        final = hb.drain()
        count += len(final)
        seen |= final
        words = sum(bin(word).count("1") for word in hb.words)
        if (count, len(seen), words) != ({marks}, {marks}, 0):
            print("lost")
            break
        rounds += 1
    else:
        _core.check(hb._hb)
        print("each in one drain")
"""

WAYS = [
    (library, mode) for library in ("visible", "hidden") for mode in ("RTLD_LOCAL", "RTLD_GLOBAL")
]
each_way = pytest.mark.parametrize(("library", "mode"), WAYS)


def program(request: pytest.FixtureRequest, library: str, mode: str, body: str, **more: Any) -> str:
    path = str(request.getfixturevalue(library))
    return run_python((BEGIN + body).format(path=path, mode=mode, **{"log": 18, **more})).strip()


@each_way
def test_each_mark_of_another_copy_is_in_exactly_one_drain(
    request: pytest.FixtureRequest, library: str, mode: str
) -> None:
    found = program(request, library, mode, EXACTLY_ONE, rounds=2, marks=1 << 17, log=17)
    assert found == "each in one drain"


def test_without_a_home_marks_are_lost(tmp_path: Path) -> None:
    """The check proves itself: where copies do not ask whose a bitmap is, it fails."""
    broken = compiled(tmp_path, "broken.so", "-DHB_BREAK_HOME", "-DHB_TEST_DELAY")
    code = (BEGIN + EXACTLY_ONE).format(
        path=str(broken), mode="RTLD_LOCAL", log=18, marks=256, rounds=2000
    )
    assert run_python(code).strip() == "lost"


BESIDE = """
hb = HBitmap(N)
kept = 0
with hb.pin() as address:
    while kept < 5:
        hb.set(0, N)
        copy.copy_start(address, RESET, N, N)
        while copy.copy_running():
            for item in range(0, N, 4097):
                hb.set(item)
            kept += 1
        assert copy.copy_finish() == 0
        _core.check(hb._hb)
        assert sum(bin(word).count("1") for word in hb.words) == len(list(hb)) == len(hb)
print("sound")
"""


@each_way
def test_clears_of_another_copy_lose_no_mark(
    request: pytest.FixtureRequest, library: str, mode: str
) -> None:
    assert program(request, library, mode, BESIDE) == "sound"


NODE = """
node = BlockGraph().add_node("disk", size=512 * N)
daily = node.add_bitmap("daily", granularity=512)
found = HBitmap(N)
pin = node.pin()
copy.copy_start(pin.address, WRITE, N, N)
while copy.copy_running():
    other = node.add_bitmap("other", granularity=4096)
    with daily.freeze() as frozen:
        for offset, nbytes in daily.areas():
            found.set(offset // 512, nbytes // 512)
        frozen.done()
    node.remove_bitmap("other")
    del other, frozen
assert copy.copy_finish() == 0
for offset, nbytes in daily.areas():
    found.set(offset // 512, nbytes // 512)
assert len(found) == N
node.close()
copy.copy_start(pin.address, WRITE, N, N)
assert copy.copy_finish() == -errno.ERANGE
pin.close()
print("all found")
"""


@each_way
def test_writes_of_another_copy_to_a_node_are_all_found(
    request: pytest.FixtureRequest, library: str, mode: str
) -> None:
    assert program(request, library, mode, NODE, log=16) == "all found"


MIXED = """
hb = HBitmap(N)
hb.set(0, N)
mine, theirs = hb.pin(), copy.copy_alloc(N)
assert copy.copy_merge(mine.address, theirs) == -errno.EXDEV
assert copy.copy_merge(mine.address, mine.address) == 0
native = _core.ffi.cast("HBitmap *", theirs)     # our functions on theirs
assert _core.hbitmap_set(native, 5, 10) == 0 and _core.hbitmap_count(native) == 10
assert _core.hbitmap_merge(native, hb._hb, native) == -errno.EXDEV
assert _core.hbitmap_merge(native, native, native) == 0
assert _core.hbitmap_reset(native, 5, 5) == 0 and _core.hbitmap_count(native) == 5

node = BlockGraph().add_node("disk", size=N)
with node.pin() as address:
    assert copy.copy_publish(address) == -errno.EXDEV
    assert node.size == N

bitmap = HBitmap(N)                              # their tracker, over our bitmap
with bitmap.pin() as address:
    tracker = copy.copy_tracker(address)
    assert tracker
    assert _core.lib.hbtracker_mark(_core.ffi.cast("HBTracker *", tracker), 7, 2) == 0
    assert list(bitmap) == [7, 8]
mine.close()
print("refused")
"""


def test_one_copy_at_a_time(request: pytest.FixtureRequest) -> None:
    assert program(request, "hidden", "RTLD_LOCAL", MIXED) == "refused"


FORK = """
hb = HBitmap(N)
pin = hb.pin()
for _ in range(5):
    copy.copy_start(pin.address, MARK, N, N)
    while copy.copy_running():
        hb.reset(0, N // 2)
        break
    pid = os.fork()
    if not pid:
        hb.reset_all()                           # waits for no thread that is not there
        _core.check(hb._hb)
        copy.copy_start(pin.address, MARK, N, N)
        assert copy.copy_finish() == 0 and len(hb) == N
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert copy.copy_finish() == 0
    hb.reset_all()
_core.check(hb._hb)
pin.close()
print("sound")
"""


@beside_malloc
@each_way
def test_a_fork_beside_marks_of_another_copy(
    request: pytest.FixtureRequest, library: str, mode: str
) -> None:
    assert program(request, library, mode, FORK, log=16) == "sound"


THREE = """
shutil.copy({path!r}, {path!r} + ".third")
third = load({path!r} + ".third", ctypes.{mode})
hb = HBitmap(N)
with hb.pin() as address:
    for each in (copy, third):
        each.copy_start(address, MARK, N, N)
    while copy.copy_running() or third.copy_running():
        hb.reset_all()
    assert copy.copy_finish() == third.copy_finish() == 0
_core.check(hb._hb)
theirs, thirds = copy.copy_alloc(N), third.copy_alloc(N)
for each in (copy, third):
    for bitmap in (theirs, thirds):
        each.copy_start(bitmap, MARK, N, N)
        assert each.copy_finish() == 0
        assert _core.hbitmap_count(_core.ffi.cast("HBitmap *", bitmap)) == N
print("sound")
"""


@each_way
def test_a_third_copy(request: pytest.FixtureRequest, library: str, mode: str) -> None:
    """Loaded for all to see, it may have the names of the second, and do with its functions."""
    assert program(request, library, mode, THREE, log=16) == "sound"
