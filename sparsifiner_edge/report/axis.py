"""Scales and their ticks."""

from __future__ import annotations

import math
from typing import NamedTuple


class Scale(NamedTuple):
    """Values from `low` to `high` laid out from `start` to `end` pixels; `log`: by their logarithms."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Pixels of a value; what lies beyond an end is put there."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, self.low))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values within the scale."""
        values = _log_ticks(self.low, self.high, most) if self.log else _linear_ticks(self.low, self.high, most)
        return values or [self.low, self.high]


def _linear_ticks(low: float, high: float, most: int) -> list[float]:
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10, 20) if power * m >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for marks in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [m * 10.0**d for d in decades for m in marks if low <= m * 10.0**d <= high]
        if len(found) <= most:
            return found
    return found[:: math.ceil(len(found) / most)]


def tick_texts(ticks: list[float]) -> list[str]:
    """Ticks as text, with the decimals that tell neighbours apart."""
    texts: list[str] = []
    for digits in range(8):
        texts = [f"{tick:,.{digits}f}" for tick in ticks]
        close = all(abs(float(t.replace(",", "")) - v) <= 1e-3 * abs(v) for t, v in zip(texts, ticks, strict=True))
        if close and len(set(texts)) == len(texts):
            return [trimmed(text) for text in texts] if len({len(t.partition(".")[2]) for t in texts}) > 1 else texts
    return [f"{tick:.3g}" for tick in ticks]


def log_texts(ticks: list[float]) -> list[str]:
    """Ticks of a logarithmic scale: each with its own digits."""
    return [f"{tick:,.0f}" if tick >= 10 else f"{tick:.6g}" for tick in ticks]


def trimmed(text: str) -> str:
    """Without zeros that end a decimal fraction."""
    return text.rstrip("0").rstrip(".") if "." in text else text


def padded(low: float, high: float, share: float = 0.08) -> tuple[float, float]:
    """A range with some air on either side; never empty."""
    room = max((high - low) * share, 5e-4 * max(abs(low), abs(high))) or 1.0
    return low - room, high + room
