# SPDX-License-Identifier: MIT
"""The pages of docs/: the tutorial as it is printed, sessions, pictures, and what is generated.

README and the how-tos have tests of their own; ``first_hour.py`` follows all of them in a fresh
clone. That the pages can be made, without a warning, is `make docs`.
"""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import os
import re
import sys
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pages
import pytest
import test_docstrings

import pybitmap
from pybitmap import native

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- pages that are followed ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tutorial", "concepts", "compare"])
def test_what_a_page_shows_happens(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = DOCS / f"{name}.md"
    failed, tried = doctest.testfile(
        str(page), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert tried > 3
    assert failed == 0
    commands = [each for each in pages.blocks(page) if each.kind == "console"]
    if commands:
        pytest.importorskip("click")
        pytest.importorskip("rich")
        path = f"{_bin(tmp_path)}{os.pathsep}{os.environ['PATH']}"
        assert pages.shell(page, tmp_path, {**os.environ, "PATH": path}) == []


def _bin(folder: Path) -> Path:
    """Where `python` and `pybitmap` are those of the tests."""
    made = folder / "bin"
    made.mkdir()
    for name, arguments in ("python", ""), ("pybitmap", "-m pybitmap"):
        program = made / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        program.chmod(0o755)
    return made


PAGE = """\
Put this into a file, `hello.py`:

```python
print("hello", 17)
```

```{toctree}
something
```

```console
$ cat hello.py
print("hello", 17)
$ true
```

<!-- numbers differ -->

```console
$ echo hello 4711 && echo more
hello 1
```
"""


def test_a_page_is_followed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert pages.shell(page, tmp_path, os.environ) == []


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("$ true", "$ false"),
        ('print("hello", 17)\n$', 'print("hello", 18)\n$'),
        ("\nhello 1\n", "\nhallo 1\n"),
        ("file, `hello.py`", "file"),
    ],
)
def test_what_is_not_as_the_page_has_it_is_found(tmp_path: Path, right: str, wrong: str) -> None:
    page = tmp_path / "page.md"
    assert right in PAGE
    page.write_text(PAGE.replace(right, wrong))
    assert len(pages.shell(page, tmp_path, os.environ)) == 1


def test_a_session_that_goes_wrong_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for printed, number in ("2", 0), ("3", 1):
        page.write_text(f"```python\n>>> 1 + 1\n{printed}\n\n```\n")
        assert len(pages.session(page, sys.executable, tmp_path, os.environ)) == number


def test_the_first_hour_fails_if_something_is_not_as_a_page_has_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first_hour = loaded(ROOT / "tests" / "first_hour.py")
    if not (ROOT / ".git").exists():
        pytest.skip("no clone of git's")
    for wrong, code in ([], 0), (["README.md:7: $ false"], 1):
        monkeypatch.setattr(first_hour, "follow", lambda folder, wrong=wrong: wrong)
        assert first_hour.main() == code
        assert capsys.readouterr().err.split() == " ".join(wrong).split()
    assert [each.partition("#")[0].strip() for each in first_hour.installs(ROOT / "README.md")] == [
        "pip install .",
        "pip install '.[cli]'",
        "pip install '.[backup,fleet]'",
    ]


PROSE = sorted({*ROOT.glob("*.md"), *DOCS.glob("**/*.md")})


def twice(text: str) -> list[str]:
    """What two branches leave that were merged by machine: headings and long lines of prose, or
    rows, that are there twice, and headings without a blank line before them."""
    found: list[str] = []
    seen: set[str] = set()
    before, code = "", False
    for line in text.splitlines():
        code ^= line.startswith("```")
        heading = line.startswith("#")
        if not code and (heading or len(line) > 60):
            if line in seen or (heading and before):
                found.append(line)
            seen.add(line)
        before = line
    return found


@pytest.mark.parametrize("page", PROSE, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_page_says_a_line_twice(page: Path) -> None:
    assert twice(page.read_text(encoding="utf-8")) == []


def test_a_line_that_is_there_twice_is_found() -> None:
    line = "What a page says, in a line as long as most of its lines are, it says once."
    assert twice(f"# A\n\n{line}\n\n```\n# c\n{line}\n```\n\n## B\n") == []
    assert twice(f"# A\n\n{line}\n\n{line}\n## B\n\n# A\n") == [line, "## B", "# A"]


# ---- pictures ---------------------------------------------------------------------------------


def test_pictures_are_as_they_are_drawn() -> None:
    pictures = loaded(DOCS / "pictures" / "draw.py").PICTURES
    text = "".join(page.read_text("utf-8") for page in (ROOT / "README.md", DOCS / "concepts.md"))
    assert sorted(re.findall(r"\((?:docs/)?pictures/(\w+)\.svg\)", text)) == sorted(pictures)
    for name, draw in pictures.items():
        kept = (DOCS / "pictures" / f"{name}.svg").read_text(encoding="utf-8")
        assert kept == draw(), f"{name}: python docs/pictures/draw.py draws it anew"
        assert ElementTree.fromstring(kept).get("role") == "img"
        assert "prefers-color-scheme: dark" in kept
        assert not re.search(r"<script|href|url\((?!#head\))|@import", kept)


# ---- what is generated ------------------------------------------------------------------------


@pytest.fixture
def extensions(monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("sphinx", reason="the pages are an extra: pip install '.[docs]'")
    monkeypatch.syspath_prepend(str(DOCS / "_ext"))
    return DOCS / "_ext"


def test_the_page_of_the_headers_has_every_function(extensions: Path) -> None:
    c_header = loaded(extensions / "c_header.py")
    page = (DOCS / "reference" / "c.md").read_text()
    headers = re.findall(r"^\.\. c-header:: (\w+\.h)$", page, re.MULTILINE)
    functions: dict[str, str] = {}
    for header in headers:
        for group in c_header.groups((c_header.CSRC / header).read_text()):
            for declaration in group.declarations:
                kind, signature = c_header.directive_of(declaration)
                if kind == "c:function":
                    functions[re.findall(r"(\w+)\(", signature)[0]] = group.comment
    assert set(native.addresses()) <= set(functions)
    assert "Marks every group" in functions["hbitmap_set"]
    assert functions["hbitmap_unpin"] == functions["hbitmap_pin"]


def test_a_drawing_in_a_comment_stays_one(extensions: Path) -> None:
    c_header = loaded(extensions / "c_header.py")
    text = "Words that\ngo on:\n    1 2\n\n    3\n  (a) one\n      more\n  (b) two\nEnd."
    assert list(c_header.blocks(text)) == [
        ["Words that", "go on:"],
        ["    1 2", "", "    3"],
        ["  (a) one", "      more", "  (b) two"],
        ["End."],
    ]


def test_types_of_qmp_are_said_in_words(extensions: Path) -> None:
    qmp_commands = loaded(extensions / "qmp_commands.py")
    schema = qmp_commands.schema
    assert qmp_commands.words(schema.BITMAP) == "{node: string, name: string}"
    assert qmp_commands.words(schema.BITMAPS) == "{bitmaps: list of {node: string, name: string}}"
    assert qmp_commands.words(schema.AREAS).endswith("start?: integer, limit?: integer}")


def test_the_reference_has_whatever_is_public() -> None:
    text = "\n".join(page.read_text() for page in sorted((DOCS / "reference").glob("*.md")))
    named = re.findall(
        r"^\.\. auto(?:class|data|function|exception):: ([\w.]+)$", text, re.MULTILINE
    )
    whole = re.findall(r"^\.\. automodule:: ([\w.]+)$(?!\n   :no-members:)", text, re.MULTILINE)
    things = {id(attrgetter(name.partition(".")[2])(pybitmap)) for name in named}
    missing = []
    for module in map(importlib.import_module, test_docstrings.PUBLIC):
        for name, thing in test_docstrings.offered(module):
            if id(thing) not in things and getattr(thing, "__module__", None) not in whole:
                missing.append(f"{module.__name__}.{name}")
    assert missing == []


def test_every_page_of_docs_is_in_the_index_or_in_a_folder_s() -> None:
    index = (DOCS / "index.md").read_text()
    for page in DOCS.glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in index, page.name
    reference = (DOCS / "reference" / "README.md").read_text()
    for page in (DOCS / "reference").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in reference, page.name
