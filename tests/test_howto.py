# SPDX-License-Identifier: MIT
"""The pages of docs/howto show what happens, and each has its example and its row."""

from __future__ import annotations

import doctest
import re
import subprocess
import sys
from pathlib import Path

import pytest
from peers import package

HOWTO = Path(__file__).resolve().parent.parent / "docs" / "howto"
PAGES = sorted(page for page in HOWTO.glob("*.md") if page.name != "README.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.stem))
def test_what_a_page_shows_happens(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    needs = r"^>>> (?:from|import) (unicorn|numpy|matplotlib)\b"
    for needed in re.findall(needs, page.read_text("utf-8"), re.MULTILINE):
        package(needed)
    failed, _ = doctest.testfile(
        str(page), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.stem))
def test_a_page_has_an_example_what_it_costs_and_a_row(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "../../examples/" in text
    assert re.search(r"^(## |\*\*)What it costs", text, re.MULTILINE)
    assert f"({page.name})" in (HOWTO / "README.md").read_text(encoding="utf-8")


ROOT = HOWTO.parents[1]


def test_the_example_of_plots_draws_a_trace(tmp_path: Path) -> None:
    package("matplotlib")
    plot, trace = ROOT / "examples" / "plot.py", ROOT / "examples/traces/tiny.trace.gz"
    done = subprocess.run(
        [sys.executable, str(plot), str(trace), str(tmp_path / "plot.svg")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "bytes dirty in" in done.stdout
    assert "<svg" in (tmp_path / "plot.svg").read_text(encoding="utf-8")


LINKING = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]


@pytest.mark.parametrize("page", sorted(LINKING), ids=lambda page: str(page.relative_to(ROOT)))
def test_its_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert link.startswith("https://") or (page.parent / link).exists(), link
