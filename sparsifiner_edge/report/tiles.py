"""The few figures that stand large below the verdict."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from sparsifiner_edge.report.compare import Comparison, comparisons_in, differences
from sparsifiner_edge.report.read import Side
from sparsifiner_edge.report.sections import Page, accuracy_of, energy_of, peak_of
from sparsifiner_edge.report.values import Interval, get, interval, plain


class Tile(NamedTuple):
    """A large figure, what it is, and what it stands beside."""

    name: str
    value: str
    beside: str


def tiles_of(page: Page) -> list[Tile]:
    """Of the first comparison, else of the first side, where the page shows one context; none otherwise."""
    if len(page.groups) != 1 or differences(page.sides):
        return []
    comparisons = comparisons_in(page.groups[0])
    found = comparisons[0] if comparisons else None
    side = found.subject if found else page.groups[0].sides[0]
    against = found.against if found else None
    tiles = [_speed(page, found)] if found else []
    for name, unit, read in _FIGURES:
        tiles += _tile(page, f"tile.{name}", unit, read(side), read(against) if against else None)
    return tiles + _accuracy(page, side)


def _speed(page: Page, found: Comparison) -> Tile:
    low, high = found.ratio.reach
    return Tile(
        page.texts("tile.speed"),
        f"{found.ratio.value:.2f}×",
        page.texts("tile.interval", low=plain(low), high=plain(high)),
    )


def _tile(page: Page, key: str, unit: str, ours: Interval | None, theirs: Interval | None) -> list[Tile]:
    if ours is None:
        return []
    beside = page.texts("tile.beside", value=f"{plain(theirs.value)} {unit}") if theirs else ""
    return [Tile(page.texts(key), f"{plain(ours.value)} {unit}", beside)]


def _accuracy(page: Page, side: Side) -> list[Tile]:
    for found in page.accuracies:
        value = accuracy_of(found)
        if found.sha == side.sha and found.role == "subject" and value is not None:
            if found.metric == "cosine":
                return [Tile(page.texts("tile.cosine"), f"{value.value:.4f}", page.texts("tile.cosine.beside"))]
            points = interval(found.figures.get("difference_points"))
            beside = page.texts("tile.points", points=f"{points.value:+.2f}") if points else ""
            return [Tile(page.texts("tile.accuracy"), f"{value.value:.1f} %", beside)]
    return []


def _latency(side: Side) -> Interval | None:
    return interval(get(side.figures, "latency_ms", "p50"))


def _millijoules(side: Side) -> Interval | None:
    found = energy_of(side, "net")
    return found and found.times(1e3)


def _megabytes(side: Side) -> Interval | None:
    found = peak_of(side)
    return found and found.times(1e-6)


_FIGURES: tuple[tuple[str, str, Callable[[Side], Interval | None]], ...] = (
    ("latency", "ms", _latency),
    ("energy", "mJ", _millijoules),
    ("memory", "MB", _megabytes),
)
