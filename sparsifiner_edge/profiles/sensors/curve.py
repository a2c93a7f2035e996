"""Power over time, and its integral over windows; gaps stay open."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from sparsifiner_edge.arrays import Array

Spans = list[tuple[float, float]]

_GAP_PERIODS = 5.0
_GAP_S = 1.0
# No rail that this package meets carries more: a counter that seems to have gone further was reset, not wrapped.
_MOST_WATTS = 3000.0


class Curve(NamedTuple):
    """Power in pieces, arrays [n], ascending and not overlapping; between pieces nothing is known.

    Attributes:
        start, end: seconds that a piece stands for.
        since, until: seconds over which it was measured: both the moment of a power reading, or two readings of a
            counter.
        watts: mean of each piece.
        interval_s: usual time between two readings.
        lost_s: seconds between readings that were too far apart, or across a counter's reset.
        counted: whether it comes from an energy counter.
    """

    start: Array
    end: Array
    since: Array
    until: Array
    watts: Array
    interval_s: float
    lost_s: float
    counted: bool


class Integral(NamedTuple):
    """What a curve holds over some windows: joules, seconds covered of seconds asked for, readings inside."""

    joules: float
    covered_s: float
    asked_s: float
    readings: int

    @property
    def watts(self) -> float:
        """Mean power over what is covered."""
        return self.joules / self.covered_s if self.covered_s > 0 else float("nan")

    @property
    def share(self) -> float:
        """Covered share of the windows."""
        return self.covered_s / self.asked_s if self.asked_s > 0 else 0.0


def power_curve(seconds: Array, watts: Array, period_s: float) -> Curve:
    """Of power readings [n] at `seconds` [n], ascending: the trapezoid rule, each reading standing for half the way to
    its neighbours; readings further apart are a gap."""
    steps = np.diff(seconds)
    near = steps <= max(_GAP_PERIODS * period_s, _GAP_S)
    half = np.where(near, steps / 2, 0.0)
    start, end = seconds - np.append(0.0, half), seconds + np.append(half, 0.0)
    return Curve(start, end, seconds, seconds, watts, _usual(steps), float(steps[~near].sum()), False)


def counter_curve(seconds: Array, joules: Array, wraps_j: Array) -> Curve:
    """Of energy counters [n, rails] read at `seconds` [n]: their mean power between two readings, however far apart.

    A counter that falls has wrapped, when it wraps at all (`wraps_j` [rails], else NaN) and that explains it; else it
    was reset: a gap.
    """
    steps, gains = np.diff(seconds), np.diff(joules, axis=0)
    gains = np.where((gains < 0) & np.isfinite(wraps_j), gains + wraps_j, gains)
    kept = np.all((gains >= 0) & (gains <= _MOST_WATTS * steps[:, None]), axis=1)
    start, end, watts = seconds[:-1][kept], seconds[1:][kept], (gains.sum(axis=1) / steps)[kept]
    return Curve(start, end, start, end, watts, _usual(steps), float(steps[~kept].sum()), True)


def _usual(steps: Array) -> float:
    return float(np.median(steps)) if len(steps) else 0.0


def integrate(curve: Curve, windows: Spans) -> Integral:
    """Joules over windows (seconds); what falls into gaps is not counted.

    Work begins and ends in steps, so the piece nearest to a window's edge of those measured within it holds up to the
    edge. A piece measured across the edge would mix in the power of what ran outside, always the same way.
    """
    found = np.array([_one(curve, begin, finish) for begin, finish in windows]).reshape(-1, 3)
    joules, covered, readings = (float(total) for total in found.sum(axis=0))
    return Integral(joules, covered, sum(finish - begin for begin, finish in windows), int(readings))


def _one(curve: Curve, begin: float, finish: float) -> tuple[float, float, int]:
    """Joules, seconds covered and readings inside of one window."""
    part = slice(np.searchsorted(curve.end, begin, "right"), np.searchsorted(curve.start, finish, "left"))
    start, end, since, until, watts = (values[part] for values in curve[:5])
    length = np.minimum(end, finish) - np.maximum(start, begin)
    within = np.flatnonzero((since >= begin) & (until <= finish))
    if len(within):
        watts = watts[np.clip(np.arange(len(watts)), within[0], within[-1])]
    inside = int(np.sum((since >= begin) & (since < finish)))
    return float(watts @ length), float(length.sum()), inside


def parts_of(windows: Spans, least_s: float, most: int) -> list[Spans]:
    """Windows cut into pieces no shorter than `least_s`, neighbours together in at most so many parts."""
    pieces = []
    for begin, end in windows:
        bounds = np.linspace(begin, end, max(1, int((end - begin) / least_s)) + 1).tolist()
        pieces += list(pairwise(bounds))
    edges = np.linspace(0, len(pieces), min(most, len(pieces)) + 1).astype(int)
    return [pieces[first:last] for first, last in pairwise(edges)]


def joined(windows: Sequence[tuple[float, float]], pause_s: float = 0.0) -> Spans:
    """Ascending windows, those with no more than `pause_s` between them as one."""
    found: Spans = []
    for begin, end in sorted(windows):
        if found and begin - found[-1][1] <= pause_s:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found
