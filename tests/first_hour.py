# SPDX-License-Identifier: MIT
"""The first hour of a new user, done as the pages say: ``python tests/first_hour.py``.

A fresh clone of this one, as it is committed, in an empty folder; a new virtual environment; then
what README says on installing, its sessions and commands, the tutorial, and the how-tos that want
nothing but what README installs. What the pages show is compared with what is printed, taken out of
the pages and not out of copies: ``support/pages.py`` says what counts.

Everything lies in a temporary folder, which goes at the end, by Ctrl-C too. Two may run at a time.
It exits 1 if something was not as a page has it, and says what. What wants programs that are not
installed (QEMU's), or another kernel, is left out, and named.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))

import pages  # noqa: E402

#: Whose examples want no peer: no program, machine or rights that README does not install.
HOWTOS = ["live-copy", "survives-kill", "ram-snapshots", "convert", "plot", "fuzzer"]
#: What some of them, or README, say is to be installed for them.
EXTRAS = {"fuzzer": "pip install '.[unicorn]'", "plot": "pip install matplotlib"}
#: Pages that have a session.
SESSIONS = ["concepts", "compare", "compat", "native"]

#: What ram-snapshots wants of the kernel.
_TRACKED = """
import mmap
from pybitmap.trackers import MemoryTracker
MemoryTracker(mmap.mmap(-1, mmap.PAGESIZE)).close()
"""

began = time.monotonic()


def say(what: str) -> None:
    print(f"{time.monotonic() - began:5.1f} s  {what}", flush=True)


def environment_of(folder: Path, environment: Path) -> dict[str, str]:
    """As of a user who has just logged in, with the virtual environment activated."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "PYBITMAP", "PYTEST", "VIRTUAL_ENV", "GIT_"))
    }
    path = f"{environment / 'bin'}{os.pathsep}{kept.get('PATH', os.defpath)}"
    return {**kept, "PATH": path, "VIRTUAL_ENV": str(environment), "TMPDIR": str(folder)}


def installs(readme: Path) -> list[str]:
    """What README says is to be typed to install, with all extras that it names."""
    commands = [
        each.command
        for block in pages.blocks(readme)
        if block.kind == "console"
        for each in pages.typed(block)
        if each.command.startswith("pip install")
    ]
    if len(commands) != 3:
        raise SystemExit(f"README.md has {len(commands)} commands of pip, and not three")
    return commands


def installed(command: str, clone: Path, environment: dict[str, str]) -> list[str]:
    say(command)
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=clone,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    return [f"$ {command}\n{done.stdout}"] if done.returncode else []


def follow(folder: Path) -> list[str]:
    clone, venv, session = folder / "pybitmap", folder / "venv", folder / "session"
    session.mkdir()
    for command in (
        ["git", "clone", "-q", str(ROOT), str(clone)],
        [sys.executable, "-m", "venv", str(venv)],
    ):
        say(shlex.join(command))
        subprocess.run(command, check=True)
    environment, python = environment_of(folder, venv), str(venv / "bin" / "python")
    wrong: list[str] = []
    for line in installs(clone / "README.md"):
        wrong += installed(line, clone, environment)
    if wrong:
        return wrong
    left_out: set[str] = set()

    def there(command: str) -> bool:
        """Is it one to be tried, and are its programs there?"""
        program = shlex.split(command, comments=True)[0]
        if program in ("pip", "make", "cc") or "integrations.nbdkit" in command:
            return False  # seen to above, or in CI, or wants what is not here
        if shutil.which(program, path=environment["PATH"]) is None:
            left_out.add(program)
            return False
        return True

    say("README.md")
    wrong += pages.session(clone / "README.md", python, session, environment)
    wrong += pages.shell(clone / "README.md", clone, environment, there)
    say("the tutorial")
    tutorial = folder / "tutorial"
    tutorial.mkdir()
    wrong += pages.session(clone / "docs" / "tutorial.md", python, tutorial, environment)
    wrong += pages.shell(clone / "docs" / "tutorial.md", tutorial, environment)
    untracked = subprocess.run(
        [python, "-c", _TRACKED], env=environment, cwd=session, capture_output=True, text=True
    ).stderr.strip()
    for name in HOWTOS:
        if name == "ram-snapshots" and untracked:
            say(f"NOT TRIED: docs/howto/{name}.md: {untracked.splitlines()[-1]}")
            continue
        page = clone / "docs" / "howto" / f"{name}.md"
        if name in EXTRAS:
            wrong += installed(EXTRAS[name], clone, environment)
        say(f"docs/howto/{name}.md")
        wrong += pages.session(page, python, session, environment)
        wrong += pages.shell(page, clone, environment)
    for name in SESSIONS:
        say(f"docs/{name}.md")
        own = folder / f"session-{name}"
        own.mkdir()
        wrong += pages.session(clone / "docs" / f"{name}.md", python, own, environment)
    for program in sorted(left_out):
        say(f"NOT TRIED: commands of {program}, which is not installed")
    return wrong


def main() -> int:
    if not (ROOT / ".git").exists():
        print(f"{ROOT} is no clone of git's, so there is nothing to clone anew", file=sys.stderr)
        return 1
    try:
        with tempfile.TemporaryDirectory(prefix="first-hour-") as folder:
            wrong = follow(Path(folder))
    except (OSError, subprocess.SubprocessError) as error:  # git is not there, a command hangs, ...
        wrong = [str(error)]
    for each in wrong:
        print(f"\n{each}", file=sys.stderr)
    say("done" if not wrong else f"{len(wrong)} things are not as the pages have them")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
