"""Figures with their bounds, and how they are written for people."""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.results import Estimate
from sparsifiner_edge.text import shown

Figure: TypeAlias = Estimate | float | Unavailable | None
_LONG = 10_000
"""Characters that are looked at: the page's own limits are far below."""


class Interval(NamedTuple):
    """A figure with its bounds, None where there is none on that side."""

    value: float
    low: float | None = None
    high: float | None = None

    def times(self, factor: float) -> Interval:
        """In another unit; `factor` is above 0."""
        low, high = (None if bound is None else bound * factor for bound in (self.low, self.high))
        return Interval(self.value * factor, low, high)

    @property
    def reach(self) -> tuple[float, float]:
        """Bounds to draw, the figure itself where a bound is missing."""
        low, high = (self.value if bound is None else bound for bound in (self.low, self.high))
        return min(low, self.value), max(high, self.value)


def exact(figure: Estimate) -> Interval:
    """A figure of a result that has a value."""
    low, high = (None if isinstance(bound, Unavailable) else bound for bound in (figure.low, figure.high))
    return Interval(figure.value, low, high)


def interval(figure: Figure) -> Interval | None:
    """A figure of a result, None where there is none."""
    if figure is None or isinstance(figure, Unavailable):
        return None
    return Interval(float(figure)) if isinstance(figure, (int, float)) else exact(figure)


def clean(text: object, most: int = 80) -> str:
    """Text from a file, fit for a page and a terminal: hidden characters as escapes, at most `most` characters."""
    whole = shown(text, _LONG)
    return whole if len(whole) <= most else whole[: most - 1] + "…"


def plain(value: float) -> str:
    """Three significant digits, thousands separated by commas: 0.0334, 12.3, 1,906."""
    if value == 0 or not 1e-6 < abs(value) < 1e15:
        return "0" if value == 0 else f"{value:.2e}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def with_interval(figure: Interval, to: str = "–", unit: str = "", digits: int | None = None) -> str:
    """A figure and its interval, as `plain` or with so many decimals: "0.334 ms (0.332–0.337)"."""
    value, low, high = ("?" if x is None else plain(x) if digits is None else f"{x:,.{digits}f}" for x in figure)
    value = f"{value} {unit}" if unit else value
    return value if figure.low is None and figure.high is None else f"{value} ({low}{to}{high})"
