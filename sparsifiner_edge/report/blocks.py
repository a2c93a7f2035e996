"""What a section of the page is made of; charts say where each mark stands, the template draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sparsifiner_edge.report.reading import LatencySamples
from sparsifiner_edge.report.values import plain

BINS, SHOWN_SHARE = 90, 0.995
"""Of a histogram, and of the samples that it shows: the last few would take all the room."""


class Axis(NamedTuple):
    """A range of values along which marks stand."""

    low: float
    high: float

    def place(self, value: float) -> float:
        """Percent of the way from `low` to `high`; what lies beyond stands at the end."""
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.0
        return round(100 * min(max(share, 0.0), 1.0), 2)

    def ticks(self) -> list[tuple[float, str]]:
        """Some four round values: place in percent, and text."""
        span = self.high - self.low
        if span <= 0:
            return [(0.0, plain(self.low))]
        power = 10 ** math.floor(math.log10(span / 4))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= span / 5)
        values = (step * number for number in range(math.ceil(self.low / step), math.floor(self.high / step) + 1))
        return [(self.place(value), f"{round(value, 12):,.6g}") for value in values]


class Strip(NamedTuple):
    """Samples of one side; `marks`: name -> value, such as p50."""

    label: str
    samples: LatencySamples
    marks: dict[str, float]


class Strips(NamedTuple):
    """One histogram a row over a shared axis."""

    title: str
    rows: Sequence[Strip]
    x_title: str
    kind: str = "strips"

    @property
    def axis(self) -> Axis:
        """From the least sample to the mark or quantile that is farthest."""
        ends = [max(float(np.quantile(row.samples, SHOWN_SHARE)), *row.marks.values()) for row in self.rows]
        low = min(float(row.samples.min()) for row in self.rows)
        return Axis(low, max(*ends, low * 1.01))

    def outline(self, row: Strip) -> str:
        """Of its histogram, the points of a polygon in a box of `BINS` x 100."""
        counts, _ = np.histogram(row.samples, np.linspace(*self.axis, BINS + 1))
        heights = 100 - 96 * counts / max(1, int(counts.max()))
        steps = " ".join(f"{number},{height:.0f} {number + 1},{height:.0f}" for number, height in enumerate(heights))
        return f"0,100 {steps} {BINS},100"


class Picture(NamedTuple):
    """A picture that was given; `source`: a data URI of it."""

    title: str
    source: str
    kind: str = "picture"


class BarCell(NamedTuple):
    """Of a table: text, and percent of the greatest in its row, as a bar below it."""

    text: str
    bar: float


class Table(NamedTuple):
    """Rows under `head`; the first column is on the left, the others right unless `words`."""

    head: Sequence[str]
    rows: Sequence[Sequence[str | BarCell]]
    title: str = ""
    words: bool = False
    kind: str = "table"


class Note(NamedTuple):
    """A remark; `missing`: about something that was not measured."""

    text: str
    missing: bool = False
    kind: str = "note"


Block = Strips | Picture | Table | Note


class Section(NamedTuple):
    """What is below a heading; `name` leads to its title and intro."""

    name: str
    blocks: Sequence[Block]
