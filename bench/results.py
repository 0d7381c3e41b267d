# SPDX-License-Identifier: MIT
"""Measures everything and writes bench/RESULTS.md and the plots beside it: ``make results``.

The benchmarks in Python run here, those in C where their program was built (``--c-program``, which
prints a JSON line for each row with --json, and sweeps with --sweep size and --sweep density).
What was measured stays in build/results; ``--redraw`` writes the page and the plots from there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from measure import goal_text, peer, shape_name, size_name

Row = dict[str, Any]

HERE = Path(__file__).parent
RAW = HERE.parent / "build" / "results"

#: Not to be told apart by colour only.
MARKERS = "osv^D<>pX*"


#: Where a goal is missed, what stands in its way: the first that is found in the row's title.
WALLS = {
    r"serialize.*0\.1 %": (
        "All words are copied, whatever they hold, since that is the format; pyroaring's bytes "
        "are compressed. bitarray's copy takes what ours does."
    ),
    r"\|.*0\.1 %": (
        "Each dirty bit of a sparse bitmap is in a cache line of its own, and pyroaring packs "
        "them into a fiftieth of the memory. The bare loop over just those words is `merge in "
        "place sparse`."
    ),
    r"a [&^-] b.*0\.1 %|_count.*0\.1 %": (
        "As above: pyroaring reads a fiftieth of the memory. A new bitmap also has fresh pages for "
        "whatever is in it; an intersection of such has hardly any, and the counts have none."
    ),
    r"^items": (
        "pyroaring widens numbers that it has; here they are made of bits, two words of three with "
        "one or two of them. The bare loop of that is `iterate` in C."
    ),
    r"^(deserialize sparse|reset all, dense|merge sparse into a fresh one), alone": (
        "The goal is QEMU's time, see bench/c/bench.c. A copy of the leaf, or a memset, is nearly "
        "all of ours: the rest is the look at which words are not zero, and the summaries."
    ),
    r"^alloc and free of": (
        "The bare loop is one calloc of the leaf; ours has summaries, and a lock."
    ),
    r"drain": (
        "A new bitmap is mapped and an old one unmapped, and pages are moved, whatever they hold."
    ),
    r"beside a thread.*50 %": (
        "Other threads may mark meanwhile, so a word that gains takes a locked instruction; the "
        "bare loop of those is `merge in place dense`. The peers are not for several threads."
    ),
    r"50 %": (
        "Both sides do nothing but read and write these words; what is left is the call and the "
        "allocation."
    ),
    r"areas": (
        "The peers have filled the caches, so here the words come from memory; `areas sparse` "
        "in C has them at hand."
    ),
    r"^set.* clean": (
        "`same accesses` has what a mark must do, inlined: a locked instruction, a look at "
        "level 1 and, for the first mark of a word, two more of them on the way up. That is one "
        "mark in four with 2^24 groups, where no processor foresees which, and nearly each with "
        "2^30. In shared words two threads want the same cache lines."
    ),
    r"^set.* dirty": (
        "A hint, the leaf and level 1 instead of the leaf alone, the check of the range and the "
        "call; `same accesses` has these loads inlined. set_many reads its arrays twice, since "
        "nothing is marked if one of the ranges is outside."
    ),
    r"^tracker of 16.*large": (
        "16 bitmaps have 16 times the memory of the one, and leave the cache; `same memory` is "
        "beside one bitmap that has as much."
    ),
    r"^reset": (
        "Pages are given back to the system, one by one; and a memset of 128 MiB in one goes "
        "past the caches, which one of 32 KiB does not (and takes twice the time)."
    ),
}


# ---- measuring ------------------------------------------------------------------------------


def run(name: str, command: list[str]) -> None:
    """Keeps what the command prints."""
    print("measuring:", " ".join(command), file=sys.stderr, flush=True)
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    (RAW / f"{name}.jsonl").write_text(output)


def measure_all(args: argparse.Namespace) -> None:
    RAW.mkdir(parents=True, exist_ok=True)
    for old in RAW.glob("*.json*"):
        old.unlink()
    rounds = ["--json", "--rounds", str(args.rounds)]
    python = [sys.executable, str(HERE / "run.py"), *rounds]
    run("python", python)
    run("python-thread", [*python, "--thread", "--only", "a |= b", "--only", "drain"])
    if args.large:
        run("python-large", [*python, "--groups", "2^30"])
    if args.c_program:
        run("c", [args.c_program, *rounds])
        if args.large:
            run("c-large", [args.c_program, *rounds, "--groups", "2^30"])
        for sweep in ("size", "density"):
            run(f"c-{sweep}", [args.c_program, *rounds, "--sweep", sweep])
    (RAW / "machine.json").write_text(json.dumps(machine(args.compiler), indent=1))


def read(name: str) -> list[Row]:
    path = RAW / f"{name}.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]


def first_line(*command: str) -> str:
    try:
        lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    except OSError:
        return "unknown"
    return lines[0] if lines else "unknown"


def machine(compiler: str) -> dict[str, str]:
    """What the numbers depend on."""
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else ""
    facts = {
        "processor": f"{model or platform.processor() or 'unknown'}, {os.cpu_count()} cores",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "compiler": first_line(compiler, "--version"),
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
    }
    for name in ("bitarray", "pyroaring", "numpy"):
        module = peer(name)
        facts[name] = module.__version__ if module else "not installed"
    return facts


# ---- the page -------------------------------------------------------------------------------


def table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def python_tables(rows: list[Row]) -> list[str]:
    lines: list[str] = []
    titles = list(dict.fromkeys((row["name"], shape_name(row)) for row in rows))
    for name, shape in titles:
        mine = [row for row in rows if (row["name"], shape_name(row)) == (name, shape)]
        question = (mine[0]["question"] or "").strip().splitlines()[0]
        lines += ["", f"### {name}: {shape}", "", question, ""]
        lines += table(
            ["", f"ns per {mine[0]['unit']}", "x the first", "goal"],
            [
                [
                    row["way"],
                    f"{row['ns']:.3g}" if row["ns"] < 100 else f"{row['ns']:.0f}",
                    f"{row['ratio']:.2f}",
                    "; ".join(map(goal_text, row["goals"])),
                ]
                for row in mine
            ],
        )
    return lines


def c_goal(row: Row) -> str:
    if row["goal_kind"] is None:
        return ""
    kind = {"ratio": "x"}.get(row["goal_kind"], row["goal_kind"])
    return f"at most {row['goal']:g} {kind}" + ("" if row["met"] else ": MISSED")


def c_table(rows: list[Row]) -> list[str]:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.4g}"

    return table(
        ["", "groups", "threads", "per", "ours", "bare loop", "ratio", "goal"],
        [
            [
                row["name"],
                size_name(row["groups"]),
                str(row["threads"]),
                row["unit"],
                number(row["ours"]),
                number(row["bare"]),
                number(row["ratio"]),
                c_goal(row),
            ]
            for row in rows
        ],
    )


def missed(python: list[Row], c: list[Row]) -> list[str]:
    """The missed goals, by what stands in their way."""
    titles = [
        (f"{row['name']}, {shape_name(row)}: {row['way']}", goal_text(goal))
        for row in python
        for goal in row["goals"]
        if not goal["met"]
    ]
    for row in c:
        if row["met"] is False:
            value = row["ratio"] if row["goal_kind"] == "ratio" else row["ours"]
            titles.append(
                (f"{row['name']}, {shape_name(row)}, in C", f"{value:.3g}, {c_goal(row)}")
            )
    by_wall: dict[str, list[str]] = {}
    for title, reached in titles:
        wall = next((text for words, text in WALLS.items() if re.search(words, title)), "")
        by_wall.setdefault(wall, []).append(f"- {title}: {reached.removesuffix(': MISSED')}")
    lines = []
    for wall, rows in by_wall.items():
        lines += ["", wall or "Not explained:", "", *rows]
    return lines


def write_page(plots: list[tuple[str, str]]) -> None:
    facts = json.loads((RAW / "machine.json").read_text())
    python = read("python") + read("python-thread") + read("python-large")
    c = read("c") + read("c-large")
    goals = [goal["met"] for row in python for goal in row["goals"]]
    goals += [row["met"] for row in c if row["met"] is not None]
    lines = [
        "# Results",
        "",
        "Written by `make results`. All ways of a question ran in turn, in one process; times are",
        "medians, ratios are medians of the rounds' ratios, and it is the ratios that count.",
        f"Goals: {len(goals)}, missed: {goals.count(False)}.",
        "",
        *table(["", ""], [[name, value] for name, value in facts.items()]),
    ]
    for path, caption in plots:
        lines += ["", f"![{caption}]({path})"]
    if False in goals:
        lines += ["", "## Missed goals", *missed(python, c)]
    lines += ["", "## From Python", *python_tables(python)]
    if c:
        lines += ["", "## In C, beside the bare loops", "", "Times in ns.", "", *c_table(c)]
    (HERE / "RESULTS.md").write_text("\n".join(lines) + "\n")


# ---- plots ----------------------------------------------------------------------------------


def style(pyplot: Any) -> None:
    pyplot.rcParams.update(
        {
            "svg.hashsalt": "pybitmap",  # the same file from the same numbers
            "svg.fonttype": "path",
            "figure.figsize": (9, 5.5),
            "axes.grid": True,
            "grid.alpha": 0.3,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
        }
    )


def save(pyplot: Any, figure: Any, name: str) -> None:
    figure.savefig(HERE / name, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)


def draw_sweep(pyplot: Any, rows: list[Row], x: str, title: str, label: str, name: str) -> None:
    """A line for each row of the sweep: its time over the bitmap's size or density."""
    figure, axes = pyplot.subplots()
    for number, row_name in enumerate(dict.fromkeys(row["name"] for row in rows)):
        mine = [row for row in rows if row["name"] == row_name]
        axes.plot(
            [row[x] for row in mine],
            [row["ours"] for row in mine],
            marker=MARKERS[number % len(MARKERS)],
            markersize=4,
            label=f"{row_name} (per {mine[0]['unit']})",
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("ns")
    axes.set_title(title)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    save(pyplot, figure, name)


def draw_calls(pyplot: Any, rows: list[Row], name: str) -> None:
    """A bar for each way of each question about one call."""
    questions = ["set a range", "set one", "write", "ask"]
    figure, all_axes = pyplot.subplots(2, 2, figsize=(11, 6.5))
    for axes, question in zip(all_axes.flat, questions):
        mine = [row for row in rows if row["name"] == question][::-1]
        ours = [row["way"].startswith(("HBitmap", "item in HBitmap", "mark_dirty")) for row in mine]
        colours = ["#1f77b4" if yes else "#b0b0b0" for yes in ours]
        bars = axes.barh([row["way"] for row in mine], [row["ns"] for row in mine], color=colours)
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
        axes.margins(x=0.12)
        axes.grid(axis="y", visible=False)
        axes.set_title(question, fontsize=10)
        axes.tick_params(labelsize=8)
        axes.set_xlabel("ns per call", fontsize=8)
    figure.suptitle("One call from Python, mostly where it is dirty already")
    figure.tight_layout()
    save(pyplot, figure, name)


def draw() -> list[tuple[str, str]]:
    """What was drawn: file names and captions."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        print(f"no plots: {error}", file=sys.stderr)
        return []
    style(pyplot)
    draw_calls(pyplot, read("python"), "calls.svg")
    plots = [("calls.svg", "ns per call from Python")]
    sweeps = [
        ("size", "groups", "What grows with the size? 4096 marks all over the bitmap", "groups"),
        ("density", "density", "What grows with the dirt?", "share of groups that are dirty"),
    ]
    for sweep, x, title, label in sweeps:
        rows = read(f"c-{sweep}")
        if rows:
            draw_sweep(pyplot, rows, x, title, label, f"sweep-{sweep}.svg")
            plots.append((f"sweep-{sweep}.svg", title))
    return plots


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--c-program", default="", help="the program that make bench-c runs")
    parser.add_argument("--compiler", default="cc", help="what built it all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--large", action="store_true", help="whole bitmaps of 2^30 groups as well")
    parser.add_argument("--redraw", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if not args.redraw:
        measure_all(args)
    write_page(draw())


if __name__ == "__main__":
    main()
