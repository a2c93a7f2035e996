"""Reading figures out of results whose parts may be missing or of another shape, and writing them for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from sparsifiner_edge.bounds import is_number
from sparsifiner_edge.records import MISSING
from sparsifiner_edge.text import shown

MAX_NAME = 80
GREATEST, LEAST = 1e30, 1e-30
"""Nothing measured comes near these: a number beyond them is not shown, and computing with it would leave floats."""
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
        return (
            self.value if self.low is None else min(self.low, self.value),
            self.value if self.high is None else max(self.high, self.value),
        )


def get(content: Any, *path: str) -> Any:
    """What lies at `path`, None where nothing does."""
    for name in path:
        content = content.get(name) if isinstance(content, Mapping) else None
    return content


def mapping(content: Any, *path: str) -> Mapping[str, Any]:
    """The object at `path`, empty where there is none."""
    found = get(content, *path)
    return found if isinstance(found, Mapping) else {}


def rows(content: Any, *path: str) -> list[Mapping[str, Any]]:
    """The objects of the list at `path`, none where there is no list."""
    found = get(content, *path)
    return [row for row in found if isinstance(row, Mapping)] if isinstance(found, list) else []


def number(content: Any) -> float | None:
    """A finite number of a believable size, or None; what is next to nothing is 0."""
    if not is_number(content) or abs(content) > GREATEST:
        return None
    return float(content) if abs(content) >= LEAST else 0.0


def interval(content: Any, *path: str) -> Interval | None:
    """The figure at `path`, bare or as results write it (`low` and `high`, or `error`: half the width), or None."""
    content = get(content, *path)
    if not isinstance(content, Mapping):
        value = number(content)
        return None if value is None else Interval(value)
    value, error = number(content.get("value")), number(content.get("error"))
    if value is None:
        return None
    if error is not None:
        return Interval(value, value - error, value + error)
    return Interval(value, number(content.get("low")), number(content.get("high")))


def reason(content: Any) -> str | None:
    """Why there is no value, where the result says so."""
    why = get(content, MISSING)
    return clean(why, 300) if isinstance(why, str) else None


def clean(text: Any, most: int = MAX_NAME) -> str:
    """Text from a file, fit for a page and a terminal: hidden characters as escapes, at most `most` characters."""
    kept = shown(text, _LONG)
    return kept if len(kept) <= most else kept[: most - 1] + "…"


def plain(value: float) -> str:
    """Three significant digits, thousands separated by commas: 0.0334, 12.3, 1,906."""
    return "0" if value == 0 else _rounded(value, _digits(value, 0.0))


def with_interval(figure: Interval, to: str = "–", unit: str = "", digits: int | None = None) -> str:
    """A figure and its interval with as many decimals as the interval bears, or `digits`: "0.334 ms (0.332–0.337)"."""
    low, high = figure.reach
    digits = _digits(figure.value, high - low) if digits is None else digits
    value = plain(figure.value) if digits is None else _rounded(figure.value, digits)
    value = f"{value} {unit}" if unit else value
    if figure.low is None and figure.high is None:
        return value
    bounds = ["?" if b is None else plain(b) if digits is None else _rounded(b, digits) for b in figure[1:]]
    return f"{value} ({to.join(bounds)})"


def _rounded(value: float, digits: int | None) -> str:
    return f"{value:.2e}" if digits is None else f"{value:,.{digits}f}"


def _digits(value: float, width: float) -> int | None:
    """Decimals: three significant digits, or two of the interval's width where that is more; None: not so written."""
    if value == 0 or not 1e-6 < abs(value) < 1e15:
        return 2 if value == 0 and width > 0.01 else None
    own = 2 - math.floor(math.log10(abs(value)))
    finer = 1 - math.floor(math.log10(width)) if width > 0 else own
    return max(0, min(max(own, finer), own + 3))
