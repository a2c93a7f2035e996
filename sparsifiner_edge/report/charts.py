"""The page's charts, as drawings of any width: scatter, strips of a distribution, bars, and stacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sparsifiner_edge.report.axis import Scale, log_texts, padded, tick_texts
from sparsifiner_edge.report.draw import (
    NORMAL,
    SERIES,
    SMALL,
    Area,
    Box,
    Dot,
    Drawing,
    Line,
    Shape,
    Words,
    fitted,
    width_of,
)  # fmt: skip
from sparsifiner_edge.report.read import Samples
from sparsifiner_edge.report.values import Interval, plain, shown

BINS = 90
_EDGE = 8.0


class Point(NamedTuple):
    """One model in the scatter."""

    label: str
    x: Interval
    y: Interval
    colour: int = 0


class Strip(NamedTuple):
    """Samples of one side; `marks`: name -> value, such as p50."""

    label: str
    samples: Samples
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


def scatter(
    points: Sequence[Point], x_title: str, y_title: str, width: float, label: str, most: float = float("inf")
) -> Drawing:
    """Points with intervals in both directions; x from 0, so that lengths can be compared; no y tick above `most`."""
    height = 340.0 if width > 500 else 300.0
    low, high = padded(min(p.y.reach[0] for p in points), max(p.y.reach[1] for p in points), 0.15)
    y = Scale(low, high, height - 46, 30)
    ticks = [tick for tick in y.ticks(5) if tick <= most * (1 + 1e-9)]
    texts = tick_texts(ticks)
    left = _EDGE + max(width_of(text) for text in texts) + 8
    x = Scale(0, max(p.x.reach[1] for p in points) * 1.12, left, width - _EDGE)
    shapes: list[Shape] = [Words(_EDGE, 14, fitted(y_title, width - 16), "muted")]
    for tick, text in zip(ticks, texts, strict=True):
        shapes += [
            Line([(left, y(tick)), (x.end, y(tick))], "grid"),
            Words(left - 6, y(tick) + 4, text, "muted", "end"),
        ]
    shapes += _x_axis(x, height - 46, 30, x_title, width)
    taken: list[float] = []
    for point in sorted(points, key=lambda point: -point.y.value):
        shapes += _point(point, colour(point.colour), x, y, taken)
    return Drawing(width, height, shapes, label)


def _point(point: Point, paint: str, x: Scale, y: Scale, taken: list[float]) -> list[Shape]:
    """The label goes to the side with more room, below those that `taken` lists."""
    across, down = x(point.x.value), y(point.y.value)
    row = down - 10
    while any(abs(row - other) < 16 for other in taken):
        row += 4
    taken.append(row)
    right = across < (x.start + x.end) / 2
    space = (x.end - across if right else across - x.start) - 12
    place = (across + 10, "start") if right else (across - 10, "end")
    text = fitted(point.label, space, NORMAL, bold=True)
    note = f"{point.label}: {shown(point.x)}, {shown(point.y)}"
    return [
        Line([(x(point.x.reach[0]), down), (x(point.x.reach[1]), down)], paint, 1.5),
        Line([(across, y(point.y.reach[0])), (across, y(point.y.reach[1]))], paint, 1.5),
        Dot(across, down, paint, note=note),
        Words(place[0], row, text, paint, place[1], NORMAL, bold=True),
    ]


def _x_axis(x: Scale, bottom: float, top: float, title: str, width: float) -> list[Shape]:
    ticks = x.ticks(7 if width > 500 else 4)
    texts = log_texts(ticks) if x.log else tick_texts(ticks)
    shapes: list[Shape] = [Words(x.end, bottom + 36, fitted(title, width - 16), "muted", "end")]
    for tick, text in zip(ticks, texts, strict=True):
        anchor = "end" if x(tick) > x.end - 12 else "middle"
        shapes.append(Line([(x(tick), top), (x(tick), bottom)], "grid"))
        shapes.append(Words(x(tick), bottom + 17, text, "muted", anchor))
    return [*shapes, Line([(x.start, bottom), (x.end, bottom)], "muted")]


def strips(rows: Sequence[Strip], title: str, log_title: str, width: float, label: str) -> Drawing:
    """One histogram a row over a shared axis; it ends at the 99.5 % quantile, logarithmic where values lie apart."""
    low = min(float(row.samples.min()) for row in rows)
    high = max(mark for row in rows for mark in (float(np.quantile(row.samples, 0.995)), *row.marks.values())) * 1.02
    log = high / low > 8
    tall = 104.0
    bottom = tall * len(rows) + 12
    x = Scale(low / 1.03 if log else max(0.0, low - (high - low) * 0.05), high, _EDGE, width - _EDGE, log)
    shapes = _x_axis(x, bottom, 22, log_title if log else title, width)
    for index, row in enumerate(rows):
        shapes += _strip(row, colour(index), x, tall * index + 8, tall, width)
    return Drawing(width, bottom + 44, shapes, label)


def _strip(row: Strip, paint: str, x: Scale, top: float, tall: float, width: float) -> list[Shape]:
    edges = np.geomspace(x.low, x.high, BINS + 1) if x.log else np.linspace(x.low, x.high, BINS + 1)
    counts, _ = np.histogram(row.samples, edges)
    floor, most = top + tall - 6, max(1, int(counts.max()))
    outline = [(x(float(edges[0])), floor)]
    for count, left, right in zip(counts, edges, edges[1:], strict=False):
        level = floor - (tall - 56) * float(count) / most
        outline += [(x(float(left)), level), (x(float(right)), level)]
    outline.append((x(float(edges[-1])), floor))
    shapes: list[Shape] = [
        Words(_EDGE, top + 12, fitted(row.label, width - 16, NORMAL, True), paint, "start", NORMAL, True)
    ]
    shapes += [Area(outline, paint, 0.35), Line(outline, paint, 1.2)]
    free = float("-inf")
    for name, value in row.marks.items():
        place = x(value)
        shapes.append(Line([(place, top + 36), (place, floor)], "ink", 1.3, dashed=True))
        text = f"{name} {plain(value)}"
        half = width_of(text) / 2
        middle = min(max(place, _EDGE + half), width - _EDGE - half)
        if middle - half > free + 4:  # What has no room stands in the table below the chart.
            shapes.append(Words(middle, top + 31, text, "ink", "middle"))
            free = middle + half
    return shapes


def bars(rows: Sequence[Bar], width: float, label: str) -> Drawing:
    """Horizontal bars from 0, each below its label, with the figure and its interval at the right."""
    high = max(row.figure.reach[1] for row in rows) or 1.0
    low = min([0.0, *(row.figure.reach[0] for row in rows)])
    x = Scale(low, high, _EDGE, width - _EDGE)
    shapes: list[Shape] = []
    for index, row in enumerate(rows):
        top, paint = 46.0 * index + 4, colour(row.colour)
        room = width - 24 - width_of(row.text)
        shapes.append(Words(_EDGE, top + 12, fitted(row.label, room, NORMAL, True), "ink", "start", NORMAL, True))
        shapes.append(Words(width - _EDGE, top + 12, row.text, "muted", "end"))
        start, end = sorted((x(0.0), x(row.figure.value)))
        shapes.append(Box(x.start, top + 19, x.end - x.start, 16, "grid"))
        shapes.append(Box(start, top + 19, max(1.0, end - start), 16, paint, row.hollow, f"{row.label}: {row.text}"))
        if row.figure.reach[0] < row.figure.reach[1]:
            bounds = [x(bound) for bound in row.figure.reach]
            shapes.append(Line([(bounds[0], top + 27), (bounds[1], top + 27)], "ink", 1.6))
            shapes += [Line([(bound, top + 23), (bound, top + 31)], "ink", 1.6) for bound in bounds]
    return Drawing(width, 46.0 * len(rows) + 4, shapes, label)


def stacks(rows: Sequence[Stack], kinds: dict[str, str], width: float, label: str) -> Drawing:
    """Horizontal bars of parts on one scale; `kinds`: part -> its name in the legend, in the order of the parts."""
    x = Scale(0, max(sum(row.parts.values()) for row in rows) or 1.0, _EDGE, width - _EDGE)
    paints = kind_colours(list(kinds))
    shapes, top = _legend(kinds, paints, width)
    dense = len(rows) > 8
    step, thick = (24.0, 15.0) if dense else (46.0, 18.0)
    names = max(width_of(row.label) for row in rows) + 10 if dense else 0.0
    if dense:
        names = min(names, width * 0.35)
        x = x._replace(start=_EDGE + names, end=width - _EDGE - max(width_of(row.text) for row in rows) - 8)
    for row in rows:
        if dense:
            shapes.append(Words(_EDGE, top + 12, fitted(row.label, names - 6), "ink"))
            shapes.append(Words(width - _EDGE, top + 12, row.text, "muted", "end"))
        else:
            room = width - 24 - width_of(row.text)
            shapes.append(Words(_EDGE, top + 12, fitted(row.label, room, NORMAL, True), "ink", "start", NORMAL, True))
            shapes.append(Words(width - _EDGE, top + 12, row.text, "muted", "end"))
        done, level = 0.0, top if dense else top + 19
        for kind in (kind for kind in kinds if row.parts.get(kind)):
            start, done = x(done), done + row.parts[kind]
            note = f"{row.label}, {kinds[kind]}: {plain(row.parts[kind])}"
            shapes.append(Box(start, level, x(done) - start, thick, paints[kind], note=note))
        top += step
    return Drawing(width, top + 4, shapes, label)


_KIND_COLOURS = {
    "selection": 1,
    "predictor": 1,
    "attention": 0,
    "cells": 2,
    "mlp": 5,
    "projections": 3,
    "norms": 2,
    "other": 4,
}


def kind_colours(kinds: Sequence[str]) -> dict[str, str]:
    """Kinds of operators keep their colours from chart to chart; the choice of keys stands out."""
    known = {kind: _KIND_COLOURS[kind] for kind in kinds if kind in _KIND_COLOURS}
    free = [index for index in range(len(SERIES)) if index not in known.values()] or list(range(len(SERIES)))
    others = [kind for kind in kinds if kind not in known]
    return {kind: colour(index) for kind, index in known.items()} | {
        kind: colour(free[number % len(free)]) for number, kind in enumerate(others)
    }


def _legend(kinds: dict[str, str], paints: dict[str, str], width: float) -> tuple[list[Shape], float]:
    shapes: list[Shape] = []
    across, down = _EDGE, 4.0
    for kind, name in kinds.items():
        text = fitted(name, width - 40)
        wide = 18 + width_of(text, SMALL) + 14
        if across + wide > width and across > _EDGE:
            across, down = _EDGE, down + 20
        shapes += [Box(across, down, 12, 12, paints[kind]), Words(across + 18, down + 11, text, "muted")]
        across += wide
    return shapes, down + 28
