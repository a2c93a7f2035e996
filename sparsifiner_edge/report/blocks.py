"""Building blocks of a page's sections. Charts give the position of each mark; the template draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from sparsifiner_edge.report.reading import LatencySamples
from sparsifiner_edge.report.values import plain

BINS = 90
"""Number of bins of a histogram."""
SHOWN_SHARE = 0.995
"""Share of the samples that a histogram shows: the last few would take all the space."""
Place: TypeAlias = tuple[float, str]
"""Position on an axis in percent, and its label."""


class Strips(NamedTuple):
    """One histogram per row over a shared axis.

    Attributes:
        title: Title of the chart.
        x_title: Title of the axis.
        rows: Label, points of the histogram's outline in a box of `BINS` x 100, and marks.
        ticks: Ticks of the axis.
    """

    title: str
    x_title: str
    rows: Sequence[tuple[str, str, Sequence[Place]]]
    ticks: Sequence[Place]
    kind: str = "strips"


class Table(NamedTuple):
    """Rows under `head`; the first column is left-aligned, all others right-aligned unless `words`.

    A cell is text, or text and a bar below it, in percent of the largest in its row.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str | tuple[str, float]]]
    title: str = ""
    words: bool = False
    kind: str = "table"


class Note(NamedTuple):
    """A remark.

    Attributes:
        text: The remark.
        missing: True if it is about something that was not measured.
        picture: Data URI of a picture that it captions.
    """

    text: str
    missing: bool = False
    picture: str = ""
    kind: str = "note"


Block: TypeAlias = Strips | Table | Note
Section: TypeAlias = tuple[str, Sequence[Block]]
"""Key of the section's title and introduction in `texts.json`, and its blocks."""


def strips(title: str, x_title: str, sides: Sequence[tuple[str, LatencySamples, dict[str, float]]]) -> Strips:
    """Return histograms of sides (label, samples, marks by name).

    They reach from the smallest sample to the farthest mark or quantile.
    """
    low = min(float(samples.min()) for _, samples, _ in sides)
    ends = [max(float(np.quantile(samples, SHOWN_SHARE)), *marks.values()) for _, samples, marks in sides]
    high = max(*ends, low * 1.01)
    rows = list[tuple[str, str, Sequence[Place]]]()
    for label, samples, marks in sides:
        places = [(_place(x, low, high), f"{name} {plain(x)} ms") for name, x in marks.items()]
        rows.append((label, _outline(samples, low, high), places))
    return Strips(title, x_title, rows, _ticks(low, high))


def course(title: str, x_title: str, rows: Sequence[tuple[str, Sequence[float]]], floors: Sequence[float]) -> Strips:
    """Return charts of values between a floor and 1, frame by frame; all rows have the same length."""
    shown = list[tuple[str, str, Sequence[Place]]]()
    count = len(rows[0][1])
    for (label, values), floor in zip(rows, floors, strict=True):
        parts = [part for part in np.array_split(np.asarray(values, np.float64), BINS) if part.size]
        heights = [4 + 96 * min(max((1 - float(part.mean())) / (1 - floor), 0.0), 1.0) for part in parts]
        steps = " ".join(f"{n},{height:.1f} {n + 1},{height:.1f}" for n, height in enumerate(heights))
        shown.append((label, f"0,100 {steps} {len(parts)},100", []))
    width = min(BINS, count) / BINS
    ticks = [(round(place * width, 2), name) for place, name in _ticks(0, count)]
    return Strips(title, x_title, shown, ticks)


def _place(value: float, low: float, high: float) -> float:
    """Return the position between `low` and `high` in percent, limited to the ends."""
    return round(100 * min(max((value - low) / (high - low), 0.0), 1.0), 2)


def _ticks(low: float, high: float) -> list[Place]:
    """Return about four round values."""
    power = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= (high - low) / 5)
    values = (step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1))
    return [(_place(value, low, high), f"{round(value, 12):,.6g}") for value in values]


def _outline(samples: LatencySamples, low: float, high: float) -> str:
    """Return the points of a histogram's polygon in a box of `BINS` x 100."""
    counts, _ = np.histogram(samples, np.linspace(low, high, BINS + 1))
    heights = 100 - 96 * counts / max(1, int(counts.max()))
    steps = " ".join(f"{number},{height:.0f} {number + 1},{height:.0f}" for number, height in enumerate(heights))
    return f"0,100 {steps} {BINS},100"
