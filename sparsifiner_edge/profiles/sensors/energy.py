"""Joules per inference out of a recording, with an interval over parts of it."""

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
"""Seconds since a recording's start, ascending, apart."""
_LEAST_COVERED = 0.8
_PARTS, _PART_READINGS = 20, 5
"""An interval divides the windows into at most this many parts, of at least this many readings."""
_PAUSE_S = 0.02
"""Blocks of one process follow each other within it; another's, and what is run unrecorded after it, last longer."""
_MOST_WATTS = 3000.0
"""No rail that this package meets carries more: a counter that seems to have gone further was reset, not wrapped."""
_METHOD = (
    "Student's t over the mean power of up to 20 parts of the windows, effective sample size; for net with half "
    "of what the idle baselines differ by; the sensor's own accuracy and averaging are not in it"
)


class Energy(msgspec.Struct, frozen=True, kw_only=True):
    """What inferences cost.

    Attributes:
        sensor, total: what was read. window_s: how long inferences ran. readings: that power was taken from.
        gross_j_per_inference, net_j_per_inference: at 95 %. idle_w: the mean of before and after.
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
    """Readings, arrays [n]: watts, each measured from `since` to `until`, seconds since the recording's start."""

    since: Array
    until: Array
    watts: Array

    def within(self, spans: Spans) -> _Power:
        """Those measured wholly within one of the windows: others hold the power of what ran outside."""
        starts, ends = np.array([*spans, (math.inf, math.inf)]).T
        place = np.searchsorted(starts, self.since, "right") - 1
        whole = (place >= 0) & (self.until <= ends[place])
        return _Power(self.since[whole], self.until[whole], self.watts[whole])

    @property
    def mean_w(self) -> float:
        """By time, where readings last."""
        seconds = self.until - self.since
        return float(np.average(self.watts, weights=seconds if seconds.sum() else None))


def energy(recording: Recording, windows: Sequence[Window], inferences: int) -> Energy:
    """What `inferences` inferences within `windows` cost.

    Gross is all that the sensor's total saw; net is gross minus idle power times the windows' time, that is, what
    a machine that is on anyway spends. Power is the mean of the readings within the windows; of a sensor that counts
    energy itself, of what it counted between two of them.

    Args:
        recording: after its block has ended.
        windows: when the inferences ran, CLOCK_MONOTONIC nanoseconds; windows that overlap count once.
        inferences: how many they were, all windows together.
    """
    power, spans = _power(recording), _spans(recording, windows)
    window_s = sum(end - begin for begin, end in _spans(recording, windows, 0.0))
    inside, (idle, drift) = power.within(spans), _idle(recording, power)
    none = Unavailable(_why_none(recording, spans, window_s, inferences, len(inside.watts)))
    mean_w: Known[float] = none if none.why else inside.mean_w
    gross: Known[Quantity] = none
    net: Known[Quantity] = none
    if isinstance(mean_w, float):
        reach, seconds = _reach(inside, recording), window_s / inferences
        gross = _joules(mean_w, reach, seconds)
        if isinstance(idle, Unavailable):
            net = idle
        elif math.isclose(idle, mean_w, rel_tol=1e-9):
            net = Unavailable("the sensor read exactly the same, idle and at work: it hangs, or does not see the work")
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
    """Windows, those with no more than `pause_s` between them as one; those of no length left out."""
    start, spans = recording.start_ns, list[tuple[float, float]]()
    for begin, end in sorted(((begin - start) / 1e9, (end - start) / 1e9) for begin, end in windows if end > begin):
        if spans and begin - spans[-1][1] <= pause_s:
            spans[-1] = (spans[-1][0], max(spans[-1][1], end))
        else:
            spans.append((begin, end))
    return spans


def _power(recording: Recording) -> _Power:
    """Of the sensor's total. A counter that falls has wrapped, where it wraps at all and that explains it; else it was
    reset, and what lies between is not known.
    """
    sensor, moments = recording.sensor, recording.seconds()
    rails = list(recording.readings[0]) if recording.readings else []
    table = np.array([[reading[rail] for rail in rails] for reading in recording.readings]).reshape(
        len(moments), len(rails)
    )
    since = moments - sensor.averaging_s  # What is read may be as old.
    if not sensor.counts:
        return _Power(since, moments, table.sum(axis=1))
    steps, gains = np.diff(moments), np.diff(table, axis=0)
    gains = np.where(gains < 0, gains + np.array([sensor.wraps_j.get(rail, math.nan) for rail in rails]), gains)
    valid = np.all((gains >= 0) & (gains <= _MOST_WATTS * steps[:, None]), axis=1)
    return _Power(since[:-1][valid], moments[1:][valid], gains.sum(axis=1)[valid] / steps[valid])


def _why_none(recording: Recording, spans: Spans, window_s: float, inferences: int, inside: int) -> str:
    """Why there can be no figure; empty where there is one."""
    sensor, moments = recording.sensor, recording.seconds()
    if inferences < 1 or not spans:
        return f"{inferences} inferences in {window_s:g} s of windows: there is nothing to divide"
    usual = max(sensor.period_s, float(np.median(np.diff(moments)))) if len(moments) > 1 else sensor.period_s
    read = sum(np.count_nonzero((moments >= begin) & (moments <= end)) for begin, end in spans)
    if read * usual < _LEAST_COVERED * window_s:
        return f"readings of {sensor.name} cover {read * usual / window_s:.0%} of the windows' {window_s:.3g} s"
    if not inside:
        longest = max(end - begin for begin, end in spans)
        return (
            f"{sensor.name} averages over {sensor.averaging_s:g} s, and no window is as long (longest {longest:.3g} s)"
        )
    return ""


def _reach(inside: _Power, recording: Recording) -> float | None:
    """Watts, 95 %: how far the mean power of such windows may lie from what it was; None: too few parts to say."""
    least = _PART_READINGS + math.ceil(recording.sensor.averaging_s / recording.sensor.period_s)
    parts = min(_PARTS, len(inside.watts) // least)
    return mean_reach([part.mean() for part in np.array_split(inside.watts, parts)]) if parts else None


def _idle(recording: Recording, power: _Power) -> tuple[Known[float], float]:
    """Mean power of the idle baselines, and half of what the first and the last differ by."""
    inside = [power.within([span]) for span in _spans(recording, recording.idle, 0.0)]
    means = [readings.mean_w for readings in inside if len(readings.watts)]
    if not means:
        return Unavailable("no idle baseline was read, before or after"), 0.0
    return float(np.mean(means)), abs(means[0] - means[-1]) / 2


def _joules(watts: float, reach_w: float | None, seconds: float) -> Quantity:
    """Energy of one inference of `seconds`, its power known to within `reach_w` on either side."""
    low, high = (None if reach_w is None else (watts + way * reach_w) * seconds for way in (-1, 1))
    return quantity(watts * seconds, low, high, _METHOD)
