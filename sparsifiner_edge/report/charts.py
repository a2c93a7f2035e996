"""The page's charts, as matplotlib figures of any width: scatter, strips of a distribution, bars, and stacks."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from sparsifiner_edge.report.blocks import Figure
from sparsifiner_edge.report.rendering import CARD, GRID, INK, MUTED, NOTE, PIXELS_PER_INCH, SERIES
from sparsifiner_edge.report.result_files import LatencySamples
from sparsifiner_edge.report.texts import Texts
from sparsifiner_edge.report.values import Interval, plain, with_interval

BINS = 90
_EDGE = 8.0
_LANE, _STRIP = 42.0, 104.0
"""Pixels: air at either side; heights of a bar with its label, and of a histogram with its labels."""
_THICK = 0.4
"""Of a bar, as a share of its lane."""
_KIND_COLOURS = {"attention": 0, "selection": 1, "norms": 2, "projections": 3, "other": 4, "mlp": 5, "decoder": 6}
"""Kinds of operators keep their colours from chart to chart; choosing keys stands out."""


class ScatterPoint(NamedTuple):
    """One model in the scatter."""

    label: str
    x: Interval
    y: Interval
    colour: int = 0


class Strip(NamedTuple):
    """Samples of one side; `marks`: name -> value, such as p50."""

    label: str
    samples: LatencySamples
    marks: dict[str, float]


class Bar(NamedTuple):
    """A figure with a whisker; `hollow`: an estimate. `colour`: index into the series."""

    label: str
    figure: Interval
    colour: int
    text: str
    hollow: bool = False


class Stack(NamedTuple):
    """Parts of one whole: name -> amount."""

    label: str
    parts: dict[str, float]
    text: str


def colour(index: int) -> str:
    """The colour of series number `index`."""
    return SERIES[index % len(SERIES)]


def width_of(text: str, bold: bool = False) -> float:
    """About how many pixels wide a text is in the reader's font: characters of East Asia are square."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return 13 * (wide + (len(text) - wide) * 0.6) if bold else 12 * (wide + (len(text) - wide) * 0.56)


def shortened(text: str, space: float, bold: bool = False) -> str:
    """The text, shortened to fit into `space` pixels."""
    if width_of(text, bold) <= space:
        return text
    while text and width_of(text + "…", bold) > space:
        text = text[:-1]
    return text + "…"


def _sheet(width: float, height: float) -> Any:
    from matplotlib import figure

    return figure.Figure(figsize=(width / PIXELS_PER_INCH, height / PIXELS_PER_INCH), dpi=PIXELS_PER_INCH)


def _axes(sheet: Any, left: float, top: float, bottom: float, x: tuple[float, float], y: tuple[float, float]) -> Any:
    """Axes with these limits, up to the right edge; places are pixels from the upper left."""
    width, height = sheet.bbox.size
    box = (left / width, 1 - bottom / height, 1 - (left + _EDGE) / width, (bottom - top) / height)
    return sheet.add_axes(box, xlim=x, ylim=y)


def _words(sheet: Any, y: float, text: str, space: float, paint: str = MUTED, bold: bool = False) -> None:
    """Text on a base line at `y`: a label in bold at the left edge, any other at the right edge."""
    width, height = sheet.bbox.size
    look: dict[str, Any] = {"fontsize": 13, "fontweight": "bold"} if bold else {"ha": "right"}
    place = (_EDGE if bold else width - _EDGE) / width, 1 - y / height
    sheet.text(*place, shortened(text, space, bold), color=paint, **look)


def _ticks(axes: Any, width: float) -> None:
    """Grid and round ticks across, as many as there is room for."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    most, (low, high) = 7 if width > 500 else 4, axes.get_xlim()
    steps = (1, 2, 5) if high < 200 * low else (1,)
    log = axes.get_xscale() == "log"
    axes.xaxis.set_major_locator(LogLocator(subs=steps, numticks=most) if log else MaxNLocator(most))
    axes.xaxis.set_major_formatter("{x:,.6g}")
    axes.minorticks_off()
    axes.grid(True)


def scatter(
    points: Sequence[ScatterPoint], x_title: str, y_title: str, width: float, most: float = float("inf")
) -> Any:
    """Points with intervals in both directions; x from 0, so that lengths can be compared; no y tick above `most`."""
    height = 340.0 if width > 500 else 300.0
    sheet = _sheet(width, height)
    low, high = min(p.y.reach[0] for p in points), max(p.y.reach[1] for p in points)
    room = max((high - low) * 0.15, 5e-4 * max(abs(low), abs(high))) or 1.0
    farthest = max(p.x.reach[1] for p in points) * 1.12 or 1.0
    axes = _axes(sheet, 60, 30, height - 46, (0, farthest), (low - room, high + room))
    axes.locator_params(axis="y", nbins=5)
    axes.set_yticks([tick for tick in axes.get_yticks() if low - room <= tick <= min(high + room, most * (1 + 1e-9))])
    _ticks(axes, width)
    sheet.text(_EDGE / width, 1 - 14 / height, shortened(y_title, width - 16), color=MUTED)
    _words(sheet, height - 10, x_title, width - 16)
    taken: list[float] = []
    for point in sorted(points, key=lambda point: -point.y.value):
        _point(axes, point, taken)
    return sheet


def _errors(figure: Interval) -> list[list[float]]:
    """Lengths of a whisker, as matplotlib wants them."""
    low, high = figure.reach
    return [[figure.value - low], [high - figure.value]]


def _point(axes: Any, point: ScatterPoint, taken: list[float]) -> None:
    """The label goes to the side with more room, below those that `taken` lists."""
    place, paint = (point.x.value, point.y.value), colour(point.colour)
    across, level = axes.transData.transform(place)
    row = level + 10
    while any(abs(row - other) < 16 for other in taken):
        row -= 4
    taken.append(row)
    whiskers = {"xerr": _errors(point.x), "yerr": _errors(point.y), "elinewidth": 1.5}
    dot = axes.errorbar(*place, fmt="o", markersize=11, color=paint, **whiskers)[0]
    dot.set_gid(f"{NOTE}{point.label}: {with_interval(point.x)}, {with_interval(point.y)}")
    left, right = across - axes.bbox.x0, axes.bbox.x1 - across
    text = shortened(point.label, max(left, right) - 12, bold=True)
    offset, side = (10 if right > left else -10, row - level), "left" if right > left else "right"
    look = {"ha": side, "color": paint, "fontsize": 13, "fontweight": "bold"}
    axes.annotate(text, place, offset, textcoords="offset points", **look)


def strips(rows: Sequence[Strip], title: str, log_title: str, width: float) -> Any:
    """One histogram a row over a shared axis; it ends at the 99.5 % quantile, logarithmic where values lie apart."""
    low = min(float(row.samples.min()) for row in rows)
    high = max(mark for row in rows for mark in (float(np.quantile(row.samples, 0.995)), *row.marks.values())) * 1.02
    log = high / low > 8
    low = low / 1.03 if log else max(0.0, low - (high - low) * 0.05)
    edges = (np.geomspace if log else np.linspace)(low, high, BINS + 1)
    sheet = _sheet(width, _STRIP * len(rows) + 56)
    for index, row in enumerate(rows):
        top, paint = _STRIP * index, colour(index)
        counts, _ = np.histogram(row.samples, edges)
        axes = _axes(sheet, _EDGE, top + 50, top + 106, (low, high), (0, max(1, int(counts.max())) * 1.1))
        axes.set(xscale="log" if log else "linear", yticks=[])
        _ticks(axes, width)
        axes.tick_params(labelbottom=row is rows[-1])
        axes.stairs(counts, edges, fill=True, color=paint, alpha=0.35)
        axes.stairs(counts, edges, color=paint, linewidth=1.2)
        _marks(axes, row.marks)
        _words(sheet, top + 25, row.label, width - 16, paint, bold=True)
    _words(sheet, _STRIP * len(rows) + 46, log_title if log else title, width - 16)
    return sheet


def _marks(axes: Any, marks: dict[str, float]) -> None:
    free = float("-inf")
    for name, value in marks.items():
        axes.axvline(value, color=INK, linewidth=1.3, linestyle=(0, (3, 2)))
        text = f"{name} {plain(value)}"
        half, place = width_of(text) / 2, float(axes.transData.transform((value, 0))[0])
        middle = min(max(place, axes.bbox.x0 + half), axes.bbox.x1 - half)
        if middle - half > free + 4:  # What has no room stands in the table below the chart.
            offset = (middle - axes.bbox.x0, axes.bbox.height + 5)
            axes.annotate(text, (0, 0), offset, "axes fraction", "offset points", ha="center")
            free = middle + half


def _lanes(rows: Sequence[Bar | Stack], low: float, high: float, width: float, top: float = 0.0) -> tuple[Any, Any]:
    """A figure with labels and texts, and its axes for bars: values across, the number of the row down."""
    height = top + _LANE * len(rows) + 4
    sheet = _sheet(width, height)
    axes = _axes(sheet, _EDGE, top, height - 4, (low, high), (len(rows) - 0.7, -0.7))
    axes.set_axis_off()
    for index, row in enumerate(rows):
        base = top + _LANE * index + 16
        _words(sheet, base, row.label, width - 24 - width_of(row.text), INK, bold=True)
        _words(sheet, base, row.text, width)
    return sheet, axes


def bars(rows: Sequence[Bar], width: float) -> Any:
    """Horizontal bars from 0, each below its label, with the figure and its interval at the right."""
    high = max(row.figure.reach[1] for row in rows) or 1.0
    low = min([0.0, *(row.figure.reach[0] for row in rows)])
    sheet, axes = _lanes(rows, low, high, width)
    axes.barh(range(len(rows)), high - low, _THICK, low, color=GRID)
    for index, row in enumerate(rows):
        look = {"edgecolor": colour(row.colour), "facecolor": CARD, "linestyle": "--", "linewidth": 1.5}
        look = look if row.hollow else {"color": colour(row.colour)}
        axes.barh(index, row.figure.value, _THICK, **look)[0].set_gid(f"{NOTE}{row.label}: {row.text}")
        if row.figure.reach[0] < row.figure.reach[1]:
            whisker = {"color": INK, "elinewidth": 1.6, "capsize": 4, "capthick": 1.6}
            axes.errorbar(row.figure.value, index, xerr=_errors(row.figure), fmt="none", **whisker)
    return sheet


def stacks(rows: Sequence[Stack], kinds: dict[str, str], width: float) -> Any:
    """Horizontal bars of parts on one scale; `kinds`: part -> its name in the legend, in the order of the parts."""
    columns = max(1, int((width - 16) // (max(map(width_of, kinds.values())) + 34)))
    above = 20.0 * -(-len(kinds) // columns) + 8
    sheet, axes = _lanes(rows, 0, max(sum(row.parts.values()) for row in rows) or 1.0, width, above)
    paints = {kind: colour(_KIND_COLOURS.get(kind, number)) for number, kind in enumerate(kinds)}
    _legend(sheet, list(paints.values()), list(kinds.values()), columns)
    for index, row in enumerate(rows):
        done = 0.0
        for kind, amount in ((kind, row.parts[kind]) for kind in kinds if row.parts.get(kind)):
            part = axes.barh(index, amount, _THICK, done, color=paints[kind])[0]
            part.set_gid(f"{NOTE}{row.label}, {kinds[kind]}: {plain(amount)}")
            done += amount
    return sheet


def _legend(sheet: Any, paints: Sequence[str], names: Sequence[str], columns: int) -> None:
    from matplotlib.patches import Patch

    width, height = sheet.bbox.size
    look = {"frameon": False, "labelcolor": MUTED, "borderpad": 0, "borderaxespad": 0, "labelspacing": 0.5}
    shape = {"handlelength": 1, "handleheight": 1, "handletextpad": 0.5, "columnspacing": 1.2}
    place = {"loc": "upper left", "bbox_to_anchor": (_EDGE / width, 1 - 4 / height), "ncols": columns}
    texts = [shortened(name, width - 40).lstrip("_") for name in names]  # matplotlib leaves out what begins with "_".
    sheet.legend([Patch(color=paint) for paint in paints], texts, **look, **place, **shape)


def bar_chart(name: str, title: str, rows: Sequence[Bar], texts: Texts) -> Figure:
    """`bars` for the page."""
    return Figure(name, title, _in_words(rows, texts), partial(bars, rows))


def stack_chart(name: str, title: str, rows: Sequence[Stack], kinds: dict[str, str], texts: Texts) -> Figure:
    """`stacks` for the page."""
    return Figure(name, title, _in_words(rows, texts), partial(stacks, rows, kinds))


def _in_words(rows: Sequence[Bar] | Sequence[Stack], texts: Texts) -> str:
    return texts.listed([f"{row.label}: {row.text}" for row in rows])
