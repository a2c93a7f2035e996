"""Formatting of figures and of text from files."""

from __future__ import annotations

import math
from typing import TypeAlias

from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.results import Quantity
from sparsifiner_edge.text import printable

Figure: TypeAlias = Quantity | float | Unavailable | None
_LONG = 10_000
"""Maximum characters that are looked at, far above the page's own limits."""
_EXACT = Unavailable("it is a count, or a single reading")


def quantity_of(figure: Figure) -> Quantity | None:
    """Return a figure with its bounds; None if there is none."""
    if figure is None or isinstance(figure, Unavailable):
        return None
    return figure if isinstance(figure, Quantity) else Quantity(figure, _EXACT, _EXACT, 0.0, "")


def clean(text: object, most: int = 80) -> str:
    """Make text from a file safe for a page and a terminal, with at most `most` characters."""
    whole = printable(text, _LONG)
    return whole if len(whole) <= most else whole[: most - 1] + "…"


def plain(value: float) -> str:
    """Format three significant digits with thousands separators: 0.0334, 12.3, 1,906; counts stay exact."""
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0 or not 1e-6 < abs(value) < 1e15:
        return "0" if value == 0 else f"{value:.2e}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def with_interval(figure: Quantity, to: str = "–", unit: str = "", digits: int | None = None) -> str:
    """Format a figure and its interval, as `plain` or with `digits` decimals: "0.334 ms (0.332–0.337)"."""
    value, low, high = (
        "?" if isinstance(x, Unavailable) else plain(x) if digits is None else f"{x:,.{digits}f}"
        for x in (figure.value, figure.low, figure.high)
    )
    value = f"{value} {unit}" if unit else value
    return value if low == high == "?" else f"{value} ({low}{to}{high})"
