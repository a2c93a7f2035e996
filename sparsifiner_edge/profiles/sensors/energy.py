"""Energy per inference from a recording, with an interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.profiles.sensors.recording import Recording, Window
from sparsifiner_edge.profiles.stats import mean_reach, quantity
from sparsifiner_edge.records import Known, Unavailable
from sparsifiner_edge.results import Quantity

Spans = list[tuple[float, float]]
"""Disjoint time spans as (start, end), ascending, in seconds since the start of a recording."""
_LEAST_COVERED = 0.8
"""Minimum share of the windows that readings must cover."""
_PARTS = 20
"""Maximum number of parts into which the windows are divided for an interval."""
_PART_READINGS = 5
"""Minimum number of readings per part."""
_PAUSE_S = 0.02
"""Maximum pause in seconds between two consecutive blocks of one process.

A block of another process, with the unrecorded queries after it, takes longer.
"""
_MOST_WATTS = 3000.0
"""Maximum power of a rail in watts, more than any supported device draws.

A counter that seems to have advanced faster was reset; it did not wrap.
"""
_METHOD = (
    "Student's t over the mean power of up to 20 parts of the windows, effective sample size; for net energy combined "
    "with half the difference of the idle baselines; excludes the sensor's own accuracy and averaging"
)


class Energy(msgspec.Struct, frozen=True, kw_only=True):
    """Power and energy of inferences.

    Attributes:
        sensor: Name of the sensor.
        total: Components of the sensor's total.
        window_s: Total time of the inferences in seconds.
        readings: Number of readings within the windows.
        gross_j_per_inference: Energy per inference in joules, with a 95 % interval.
        net_j_per_inference: The same without idle power.
        mean_w: Mean power within the windows in watts.
        idle_w: Mean power of the idle baselines in watts.
    """

    sensor: str
    total: str
    window_s: float
    readings: int
    gross_j_per_inference: Known[Quantity]
    net_j_per_inference: Known[Quantity]
    mean_w: float | Unavailable
    idle_w: float | Unavailable


class _Power(NamedTuple):
    """Power readings.

    Attributes:
        since: Start of each reading's interval, in seconds since the start of the recording [n].
        until: End of each reading's interval [n].
        watts: Power during the interval in watts [n].
    """

    since: Array
    until: Array
    watts: Array

    def within(self, spans: Spans) -> _Power:
        """Return the readings whose interval lies within one of the spans; others contain power of other work."""
        starts, ends = np.array([*spans, (math.inf, math.inf)]).T
        place = np.searchsorted(starts, self.since, "right") - 1
        inside = (place >= 0) & (self.until <= ends[place])
        return _Power(self.since[inside], self.until[inside], self.watts[inside])

    @property
    def mean_w(self) -> float:
        """Mean power in watts, weighted by the length of the intervals if they have one."""
        seconds = self.until - self.since
        return float(np.average(self.watts, weights=seconds if seconds.sum() else None))


def energy(recording: Recording, windows: Sequence[Window], inferences: int) -> Energy:
    """Return the energy of the inferences within windows.

    Gross energy is everything that the sensor's total measured. Net energy is gross energy minus idle power times the
    time of the windows: the additional energy of a machine that is switched on anyway. Power is the mean of the
    readings within the windows; for a sensor that counts energy, it follows from consecutive counts.

    Args:
        recording: Recording whose `with` block has ended.
        windows: Start and end of the inferences, in nanoseconds of CLOCK_MONOTONIC; overlapping windows count once.
        inferences: Number of inferences in all windows.
    """
    power, spans = _power(recording), _spans(recording, windows)
    window_s = sum(end - begin for begin, end in _spans(recording, windows, 0.0))
    inside, (idle, drift) = power.within(spans), _idle(recording, power)
    missing = Unavailable(_why_none(recording, spans, window_s, inferences, len(inside.watts)))
    mean_w: Known[float] = missing if missing.why else inside.mean_w
    gross: Known[Quantity] = missing
    net: Known[Quantity] = missing
    if isinstance(mean_w, float):
        reach, seconds = _reach(inside, recording), window_s / inferences
        gross = _joules(mean_w, reach, seconds)
        if isinstance(idle, Unavailable):
            net = idle
        elif math.isclose(idle, mean_w, rel_tol=1e-9):
            net = Unavailable("the sensor read the same idle and under load: it hangs, or does not measure this load")
        else:
            net = _joules(mean_w - idle, None if reach is None else math.hypot(reach, drift), seconds)
    return Energy(
        sensor=recording.sensor.name,
        total=recording.sensor.total,
        window_s=window_s,
        readings=len(inside.watts),
        gross_j_per_inference=gross,
        net_j_per_inference=net,
        mean_w=mean_w,
        idle_w=idle,
    )


def _spans(recording: Recording, windows: Sequence[Window], pause_s: float = _PAUSE_S) -> Spans:
    """Convert windows to spans; windows at most `pause_s` apart are joined, and empty windows are dropped."""
    start, spans = recording.start_ns, list[tuple[float, float]]()
    for begin, end in sorted(((begin - start) / 1e9, (end - start) / 1e9) for begin, end in windows if end > begin):
        if spans and begin - spans[-1][1] <= pause_s:
            spans[-1] = (spans[-1][0], max(spans[-1][1], end))
        else:
            spans.append((begin, end))
    return spans


def _power(recording: Recording) -> _Power:
    """Return the power of the sensor's total.

    A counter that decreases has wrapped, if it can wrap and the result is plausible. Otherwise it was reset, and the
    interval is dropped.
    """
    sensor, moments = recording.sensor, recording.seconds()
    rails = list(recording.readings[0]) if recording.readings else []
    table = np.array([[reading[rail] for rail in rails] for reading in recording.readings]).reshape(
        len(moments), len(rails)
    )
    since = moments - sensor.averaging_s  # A reading may describe power from this long ago.
    if not sensor.counts:
        return _Power(since, moments, table.sum(axis=1))
    steps, gains = np.diff(moments), np.diff(table, axis=0)
    gains = np.where(gains < 0, gains + np.array([sensor.wraps_j.get(rail, math.nan) for rail in rails]), gains)
    valid = np.all((gains >= 0) & (gains <= _MOST_WATTS * steps[:, None]), axis=1)
    return _Power(since[:-1][valid], moments[1:][valid], gains.sum(axis=1)[valid] / steps[valid])


def _why_none(recording: Recording, spans: Spans, window_s: float, inferences: int, inside: int) -> str:
    """Return the reason why there is no energy per inference; empty if there is one."""
    sensor, moments = recording.sensor, recording.seconds()
    if inferences < 1 or not spans:
        return f"{inferences} inferences in {window_s:g} s of windows: too few for an energy per inference"
    usual = max(sensor.period_s, float(np.median(np.diff(moments)))) if len(moments) > 1 else sensor.period_s
    read = sum(np.count_nonzero((moments >= begin) & (moments <= end)) for begin, end in spans)
    if read * usual < _LEAST_COVERED * window_s:
        return f"readings of {sensor.name} cover {read * usual / window_s:.0%} of the windows' {window_s:.3g} s"
    if not inside:
        longest = max(end - begin for begin, end in spans)
        return (
            f"{sensor.name} averages over {sensor.averaging_s:g} s, and all windows are shorter (up to {longest:.3g} s)"
        )
    return ""


def _reach(inside: _Power, recording: Recording) -> float | None:
    """Return the half-width of the 95 % interval of the mean power in watts; None if there are too few parts."""
    least = _PART_READINGS + math.ceil(recording.sensor.averaging_s / recording.sensor.period_s)
    parts = min(_PARTS, len(inside.watts) // least)
    return mean_reach([part.mean() for part in np.array_split(inside.watts, parts)]) if parts else None


def _idle(recording: Recording, power: _Power) -> tuple[Known[float], float]:
    """Return the mean power of the idle baselines, and half the difference between the first and the last, in watts."""
    inside = [power.within([span]) for span in _spans(recording, recording.idle, 0.0)]
    means = [readings.mean_w for readings in inside if len(readings.watts)]
    if not means:
        return Unavailable("no idle baseline was recorded"), 0.0
    return float(np.mean(means)), abs(means[0] - means[-1]) / 2


def _joules(watts: float, reach_w: float | None, seconds: float) -> Quantity:
    """Return the energy of one inference in joules.

    Args:
        watts: Mean power in watts.
        reach_w: Half-width of its interval in watts; None if unknown.
        seconds: Time per inference in seconds.
    """
    low, high = (None if reach_w is None else (watts + sign * reach_w) * seconds for sign in (-1, 1))
    return quantity(watts * seconds, low, high, _METHOD)
