"""Power over time, and its integral over windows: readings joined by straight lines, gaps left open."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]

_GAP_PERIODS = 5.0
_GAP_S = 1.0
# No rail that this package meets carries more: a counter that seems to have gone further was reset, not wrapped.
_MOST_WATTS = 3000.0


class Curve(NamedTuple):
    """Pieces of power over time, arrays [n], ascending and not overlapping; between pieces nothing is known.

    Attributes:
        start, end: seconds.
        first, last: watts at either end; linear between.
        interval_s: usual time between two readings.
        readings: how many there were.
        lost_s: seconds between readings that were too far apart, or across a counter's reset.
        counted: whether it comes from an energy counter: then every piece is a mean.
    """

    start: Array
    end: Array
    first: Array
    last: Array
    interval_s: float
    readings: int
    lost_s: float
    counted: bool


class Integral(NamedTuple):
    """What a curve holds over some windows: joules, seconds covered of seconds asked for, readings inside.

    `mixed_s` seconds of it stand in pieces that cross a window's edge, with no reading inside to tell better.
    """

    joules: float
    covered_s: float
    asked_s: float
    readings: int
    mixed_s: float

    @property
    def watts(self) -> float:
        """Mean power over what is covered."""
        return self.joules / self.covered_s if self.covered_s > 0 else float("nan")

    @property
    def share(self) -> float:
        """Covered share of the windows."""
        return self.covered_s / self.asked_s if self.asked_s > 0 else 0.0


def power_curve(seconds: Array, watts: Array, period_s: float) -> Curve:
    """Of power readings [n] at `seconds` [n], ascending: the trapezoid rule; readings further apart are a gap."""
    steps = np.diff(seconds)
    near = steps <= max(_GAP_PERIODS * period_s, _GAP_S)
    return _curve(seconds, steps, near, watts[:-1], watts[1:], counted=False)


def counter_curve(seconds: Array, joules: Array, wrap_j: float | None) -> Curve:
    """Of an energy counter's readings [n]: mean power between two of them, however far apart.

    A counter that falls has wrapped, when it wraps at all and that explains it; else it was reset: a gap.
    """
    steps, gains = np.diff(seconds), np.diff(joules)
    if wrap_j is not None:
        gains = np.where(gains < 0, gains + wrap_j, gains)
    power = gains / steps
    kept = (gains >= 0) & (power <= _MOST_WATTS)
    return _curve(seconds, steps, kept, power, power, counted=True)


def _curve(seconds: Array, steps: Array, kept: Array, first: Array, last: Array, counted: bool) -> Curve:
    interval = float(np.median(steps)) if len(steps) else 0.0
    lost = float(steps[~kept].sum())
    return Curve(seconds[:-1][kept], seconds[1:][kept], first[kept], last[kept], interval, len(seconds), lost, counted)


def add_curves(curves: Sequence[Curve]) -> Curve:
    """The sum, where all are known. Of counters that are read together: their pieces begin and end alike."""
    total = curves[0]
    for other in curves[1:]:
        _, mine, its = np.intersect1d(total.start, other.start, return_indices=True)
        first, last = total.first[mine] + other.first[its], total.last[mine] + other.last[its]
        lost = max(total.lost_s, other.lost_s)
        total = Curve(total.start[mine], total.end[mine], first, last, total.interval_s, total.readings, lost, True)
    return total


def integrate(curve: Curve, windows: Sequence[tuple[float, float]]) -> Integral:
    """Joules over windows (seconds); what falls into gaps is not counted.

    Work begins and ends in steps, so the reading nearest to a window's edge, within it, holds up to the edge. Joining
    it to the reading outside would mix in the power of what ran there, always the same way. A window with no reading
    inside is interpolated all the same; `mixed_s` counts such seconds.
    """
    found = [_one(curve, begin, finish) for begin, finish in windows]
    joules, covered, mixed = (sum(part[n] for part in found) for n in range(3))
    inside = sum(int(np.sum((curve.start >= begin) & (curve.start < finish))) for begin, finish in windows)
    return Integral(joules, covered, sum(finish - begin for begin, finish in windows), inside, mixed)


def _one(curve: Curve, begin: float, finish: float) -> tuple[float, float, float]:
    """Joules, seconds covered and seconds mixed of one window."""
    lowest = int(np.searchsorted(curve.end, begin, "right"))
    part = slice(lowest, max(lowest, int(np.searchsorted(curve.start, finish, "left"))))
    start, end, first, last = (values[part].copy() for values in curve[:4])
    if not len(start):
        return 0.0, 0.0, 0.0
    crossed = np.array([start[0] < begin, end[-1] > finish])
    within = (start >= begin) & (end <= finish)
    if curve.counted and within.any():
        first[~within] = last[~within] = np.where(start < begin, first[within][0], first[within][-1])[~within]
        crossed[:] = False
    elif not curve.counted:
        ahead, behind = crossed[0] and end[0] <= finish, crossed[1] and start[-1] >= begin
        first[0], last[-1] = last[0] if ahead else first[0], first[-1] if behind else last[-1]
        crossed &= ~np.array([ahead, behind])
    low, high = np.maximum(start, begin), np.minimum(end, finish)
    slope = (last - first) / np.maximum(end - start, 1e-12)
    joules = float(np.sum((first + slope * ((low + high) / 2 - start)) * (high - low)))
    return joules, float(np.sum(high - low)), float(np.sum((high - low)[[0, -1]][crossed]))


def power_at(curve: Curve, moments: Array) -> Array:
    """Watts [m] at `moments` [m] in seconds; in a gap, of the nearest reading."""
    times, watts = np.ravel([curve.start, curve.end], "F"), np.ravel([curve.first, curve.last], "F")
    return np.asarray(np.interp(moments, times, watts))
