# SPDX-License-Identifier: MIT
"""The protocol of the core under RC11: no litmus test comes to what it forbids, each does with an
order or a fence less, and together they have all fences of the core.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from litmus import broken, parse
from mirrored import LITMUS, ROOT, functions, mirrored, names_in, remembered, renew
from rc11 import decide

VARIANTS = [(path, variant) for path in LITMUS for variant in broken(path.read_text())]


@pytest.mark.parametrize("path", LITMUS, ids=lambda path: path.stem)
def test_what_is_forbidden_cannot_happen(path: Path) -> None:
    test = parse(path.read_text())
    verdict = decide(test)
    assert test.name == path.stem
    assert test.forbidden
    assert not verdict.reached
    assert not verdict.races
    assert len(verdict.outcomes) > 1


@pytest.mark.parametrize(
    ("path", "variant"),
    VARIANTS,
    ids=[f"{path.stem} {each.how.split(':')[0]}" for path, each in VARIANTS],
)
def test_it_happens_with_less(path: Path, variant: tuple[str, str]) -> None:
    verdict = decide(parse(variant[1]))
    assert verdict.reached or verdict.races, f"{path.stem}, {variant[0]}: nothing goes wrong"


def test_every_test_can_be_broken() -> None:
    assert {path for path, _ in VARIANTS} == set(LITMUS)


# ---- fences --------------------------------------------------------------------------------------


def fences_in_c() -> dict[str, str]:
    """`function#1` is the first in that function; how it is called."""
    return {
        f"{name}#{i}": fence
        for name, function in functions().items()
        for i, fence in enumerate(function.fences(), 1)
    }


def fences_in_litmus() -> dict[str, list[str]]:
    """The lines that mirror each."""
    found: dict[str, list[str]] = {}
    for path in LITMUS:
        names = set(names_in(path.read_text()))
        for line in path.read_text().splitlines():
            for tag in re.findall(r"\w+#\d+", line):
                assert "atomic_thread_fence" in line, f"{path.stem}: {tag} is no fence"
                assert tag.split("#")[0] in names, f"{path.stem} mirrors no function of {tag}"
                found.setdefault(tag, []).append(line)
    return found


def test_every_fence_is_in_a_litmus_test() -> None:
    """And every one that a test names is in the core."""
    missing = sorted(set(fences_in_c()) - set(fences_in_litmus()))
    assert not missing, f"no test in tests/litmus has the fences {', '.join(missing)}"
    more = sorted(set(fences_in_litmus()) - set(fences_in_c()))
    assert not more, f"csrc has no fences {', '.join(more)}"


def test_every_fence_is_needed() -> None:
    """A test says so, and test_it_happens_with_less sees to that."""
    for tag, lines in fences_in_litmus().items():
        assert any("left out" in line for line in lines), tag


def orders_in_c() -> dict[str, list[str]]:
    """How words.h has its fences: as fences of which order, where there is no TSan."""
    text = (ROOT / "csrc" / "words.h").read_text()
    fences = re.findall(r"#define (hb_\w*fence)\(\) (.*)", text)
    orders: dict[str, list[str]] = {}
    for name, what in fences:
        if what == "((void)0)":
            continue
        found = re.fullmatch(r"atomic_thread_fence\(memory_order_(\w+)\)", what)
        assert found or what == "hb_fence()", f"words.h: {name} is {what}, which is no fence"
        orders.setdefault(name, []).append(found[1] if found else "seq_cst")
    assert text.count("#define hb_fence() ((void)0)") == 1
    return orders


def test_fences_have_the_same_order_in_both() -> None:
    """Where C has several (for different machines), the weakest is in a test."""
    orders = orders_in_c()
    assert orders == {
        "hb_fence": ["seq_cst"],
        "hb_read_fence": ["acquire", "seq_cst"],
        "hb_write_fence": ["release"],
    }
    for tag, fence in fences_in_c().items():
        in_litmus = {
            order
            for line in fences_in_litmus()[tag]
            for order in re.findall(r"fence\(memory_order_(\w+)\)", line)
        }
        assert in_litmus <= set(orders[fence]), tag
        assert orders[fence][0] in in_litmus, tag


# ---- what is mirrored ----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "paths"), mirrored().items(), ids=mirrored())
def test_what_is_mirrored_has_not_changed(name: str, paths: list[str]) -> None:
    there = functions()
    assert name in there, f"{' and '.join(paths)} mirror {name}, which is not in csrc any more"
    function = there[name]
    assert function.digest() == remembered().get(name), (
        f"{function.file}: {name} changed, or was not mirrored before: look whether it is still "
        f"as in {' and '.join(paths)}, then renew the digests with: "
        "python tests/support/mirrored.py"
    )


def test_nothing_else_is_remembered() -> None:
    assert set(remembered()) == set(mirrored()), "python tests/support/mirrored.py"


def test_a_change_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the code of a function; not of its comments, or of how it is laid out."""
    source = tmp_path / "csrc" / "protocol.c"
    source.parent.mkdir()
    monkeypatch.setattr("mirrored.ROOT", tmp_path)
    text = (ROOT / "csrc" / "protocol.c").read_text()
    digests = []
    for changed in (
        text,
        text.replace("hb_wait_for_summarising();", "hb_wait_for_summarising( ); /* why */"),
        text.replace("hb_wait_for_summarising();", ""),
    ):
        source.write_text(changed)
        digests.append(functions()["hb_unsummarise_above"].digest())
    assert digests[0] == digests[1] != digests[2]


def test_renewing_is_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mirrored.TABLE", tmp_path / "mirrored.txt")
    assert not remembered()
    renew()
    assert set(remembered()) == set(mirrored())
