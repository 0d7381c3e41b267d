# SPDX-License-Identifier: MIT
"""A night of a small fleet: its bitmaps are scanned, the plan is made, and drawn.

python fleet_night.py FOLDER
    makes 40 disks on 8 hosts there, with what a day of writes left dirty; scans them; prints what
    each link has to send, and who needs a full copy; writes the night's plan to FOLDER/night.svg.
    See docs/howto/fleet.md.
"""

from __future__ import annotations

import csv
import random
import sys
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from pybitmap import BlockGraph
from pybitmap.store import LocalStore
from pybitmap.tools import fleet

GIB = 1 << 30
SIZE = 1024 * GIB
WINDOW = 6 * 3600  # seconds
HOSTS = 8
#: Bytes a second; hosts 0 to 5 share two of them.
LINKS = {"rack-a": 120_000_000, "rack-b": 120_000_000, "branch": 10_000_000}


def make(folder: Path) -> None:
    """The disks, and two lists: which disk is on which host, which host sends over which link."""
    choose = random.Random(18)
    with open(folder / "disks.csv", "w", newline="") as disks:
        rows = csv.writer(disks)
        rows.writerow(["host", "path"])
        for number in range(5 * HOSTS):
            path = folder / f"vm{number:02}.bitmaps"
            with BlockGraph() as graph:
                disk = graph.add_node(f"vm{number:02}", SIZE, LocalStore(path))
                daily = disk.add_bitmap("daily", persistent=True, disabled=number in (20, 30))
                for _ in range(choose.choice([5, 20, 60, 150])):  # files that were written
                    daily.set(choose.randrange(SIZE - GIB), choose.randrange(GIB))
            rows.writerow([f"host{number % HOSTS}", path.name])
    with open(folder / "links.csv", "w", newline="") as links:
        rows = csv.writer(links)
        rows.writerow(["host", "link", "bandwidth"])
        for number in range(HOSTS):
            link = "branch" if number >= 6 else ("rack-a", "rack-b")[number % 2]
            rows.writerow([f"host{number}", link, LINKS[link]])


def drawn(jobs: list[dict[str, Any]], window: float) -> str:
    """The plan as a picture: a line for each link, a box for each disk, as wide as it takes."""
    width, left, line, top = 720, 80, 52, 30
    links = sorted({job["link"] for job in jobs})
    shown = 1.33 * window
    height = top + line * len(links) + 52
    boxes = []
    for row, link in enumerate(links):
        y = top + line * row
        middle = y + line / 2
        boxes.append(f'<text x="{left - 10}" y="{middle + 1}" class="name">{escape(link)}</text>')
        later = 0
        for job in (each for each in jobs if each["link"] == link):
            if job["begins"] >= shown or (job["job"] == "full" and not job["fits"]):
                later += 1
                continue
            x = left + width * job["begins"] / shown
            ends = min(job["ends"], shown)
            wide = max(0.8, width * (ends - job["begins"]) / shown - 0.8)
            kind = f"{job['job']} {'fits' if job['fits'] else 'late'}"
            title = f"{job['host']}, {job['disk'].rpartition('/')[2]}: {job['job']}, "
            title += f"{job['nbytes'] / GIB:.1f} GiB, {job['begins']:.0f} s to {job['ends']:.0f} s"
            boxes.append(
                f'<rect x="{x:.1f}" y="{y + 10}" width="{wide:.1f}" height="{line - 24}" '
                f'class="{kind}"><title>{escape(title)}</title></rect>'
            )
        if later:
            words = f"+ {later} full"
            boxes.append(f'<text x="{left + width}" y="{middle + 1}" class="later">{words}</text>')
    bottom = top + line * len(links) + 4
    for hour in range(int(shown // 3600) + 1):
        x = left + width * hour * 3600 / shown
        boxes.append(f'<path d="M{x:.1f} {bottom}v6" class="axis"/>')
        boxes.append(f'<text x="{x:.1f}" y="{bottom + 20}" class="hour">{hour} h</text>')
    x = left + width * window / shown
    boxes.append(f'<path d="M{x:.1f} {top - 8}V{bottom}" class="window"/>')
    boxes.append(f'<text x="{x:.1f}" y="{top - 14}" class="hour">the window ends</text>')
    legend = [("increment fits", "increment"), ("full fits", "full copy"), ("late", "too late")]
    for number, (kind, words) in enumerate(legend):
        at = left + 120 * number
        boxes.append(f'<rect x="{at}" y="{height - 18}" width="12" height="12" class="{kind}"/>')
        boxes.append(f'<text x="{at + 18}" y="{height - 8}" class="key">{words}</text>')
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 20} {height}" \
role="img" aria-labelledby="what" font-family="sans-serif" font-size="13">
<title id="what">A night's plan: on each link one disk after the other</title>
<style>
text {{ fill: #24292f }} .name {{ text-anchor: end; dominant-baseline: middle }}
.hour {{ text-anchor: middle }} .later {{ text-anchor: end; dominant-baseline: middle }}
.axis {{ stroke: #6e7781 }} .window {{ stroke: #24292f; stroke-dasharray: 4 3 }}
.increment {{ fill: #2f81c1 }} .full {{ fill: #c98a1b }} .late {{ fill: #b3b9c0 }}
@media (prefers-color-scheme: dark) {{
text {{ fill: #e6edf3 }} .axis {{ stroke: #8b949e }} .window {{ stroke: #e6edf3 }}
.late {{ fill: #58616b }} }}
</style>
{chr(10).join(boxes)}
</svg>
"""


def main(folder: Path) -> None:
    make(folder)
    report = fleet.scan(fleet.listed(folder / "disks.csv"), folder / "tonight", processes=2)
    print(f"{report.targets} disks, {report.extents} dirty extents")
    known: dict[str, Any] = {"links": folder / "links.csv", "window": WINDOW}
    sums: dict[str, dict[str, float]] = {}
    for row in fleet.plan(folder / "tonight", "links", **known):
        link = sums.setdefault(row["link"], {"increments": 0, "nbytes": 0, "seconds": 0})
        link["increments"] += row["increments"]
        link["nbytes"] += row["increment_bytes"]
        link["seconds"] += row["increment_bytes"] / LINKS[row["link"]]
    for name, link in sums.items():
        print(
            f"{name}: {link['increments']} increments, {link['nbytes'] / GIB:.0f} GiB, "
            f"{link['seconds'] / 3600:.1f} h"
        )
    for row in fleet.plan(folder / "tonight", "full"):
        print(f"{row['disk'].rpartition('/')[2]} needs a full copy: {row['why']}")
    jobs = list(fleet.plan(folder / "tonight", "order", **known))
    print(f"{sum(job['fits'] for job in jobs)} of {len(jobs)} disks are done in {WINDOW // 3600} h")
    (folder / "night.svg").write_text(drawn(jobs, WINDOW), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: python fleet_night.py FOLDER (which is there, and empty)")
    main(Path(sys.argv[1]))
