# SPDX-License-Identifier: MIT
"""Plots of a trace of block writes: where the disk is dirty after it, and where it was written to
when. Needs matplotlib: pip install matplotlib

    python examples/plot.py examples/traces/guest-files.trace.gz plot.svg
"""

from __future__ import annotations

import sys
from array import array
from typing import Any

try:
    import matplotlib
except ModuleNotFoundError:
    sys.exit("matplotlib is not installed: pip install matplotlib")

matplotlib.use("Agg")  # no window: files only

import numpy as np
from matplotlib import pyplot

from pybitmap import BitmapError, HBitmap
from pybitmap.trace import Requests, read_trace

GROUP = 4096  # bytes
COLUMNS, ROWS, ROUNDS = 256, 64, 100


def shares(hb: HBitmap, ncells: int) -> tuple[int, Any]:
    """Bytes of a cell, and how much of each of the cells is dirty: 0..1."""
    cell = -(-hb.size // (ncells * hb.group_size)) * hb.group_size
    return cell, np.array([hb.count(n * cell, cell) for n in range(ncells)]) / cell


def main(trace: str, target: str) -> None:
    offsets, lengths = array("Q"), array("Q")

    def take(part: Requests) -> None:
        offsets.extend(part.offsets)
        lengths.extend(part.lengths)

    end = read_trace(trace, take).end
    disk, dirty = HBitmap(end, group_size=GROUP), HBitmap(end, group_size=GROUP)

    # Each round is what was written since the last: a drain takes each mark once, whoever marks.
    rounds = []
    borders = [len(offsets) * n // ROUNDS for n in range(ROUNDS + 1)]
    for first, last in zip(borders, borders[1:]):
        disk.set_many(offsets[first:last], lengths[first:last])
        taken = disk.drain()
        rounds.append(shares(taken, COLUMNS)[1])
        dirty |= taken

    figure, (where, when) = pyplot.subplots(2, figsize=(9, 7), layout="constrained")
    cell, found = shares(dirty, COLUMNS * ROWS)
    image = where.imshow(found.reshape(ROWS, COLUMNS), aspect="auto", vmin=0, vmax=1, cmap="Blues")
    where.set(title=f"dirty: {len(dirty.areas_array())} areas", xlabel=f"cells of {cell >> 10} KiB")
    where.set(ylabel="rows")
    when.imshow(
        np.array(rounds),
        aspect="auto",
        vmin=0,
        vmax=1,
        cmap="Blues",
        extent=(0, end / 2**30, ROUNDS, 0),
    )
    when.set(title="written to", xlabel="offset, GiB", ylabel="round")
    figure.colorbar(image, ax=(where, when), label="share that is dirty")
    figure.savefig(target)
    print(f"{target}: {dirty.count()} bytes dirty in {len(dirty.areas_array())} areas")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except (BitmapError, OSError) as error:  # no such trace, or none that can be read
        sys.exit(str(error))
