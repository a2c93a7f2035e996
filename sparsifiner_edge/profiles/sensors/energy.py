"""Joules per inference out of a recording, with an interval over parts of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from sparsifiner_edge.profiles.sensors.base import PowerSensor
from sparsifiner_edge.profiles.sensors.curve import (
    Curve,
    Integral,
    Spans,
    counter_curve,
    integrate,
    joined,
    parts_of,
    power_curve,
)
from sparsifiner_edge.profiles.sensors.recorder import Recording, Window
from sparsifiner_edge.profiles.stats import MIN_FOR_MEAN, effective_size, estimate, student_t
from sparsifiner_edge.records import Known, Unavailable
from sparsifiner_edge.results import Estimate

_LEAST_COVERED = 0.8
_PARTS, _PART_READINGS = 20, 5
"""An interval is over so many parts of the windows at most, of so many readings at least."""
_READINGS, _REFRESHES = 20, 10
"""Of a sensor, within inferences that are worth an energy: see `least_window_s`."""
_METHOD = (
    "Student's t over the mean power of up to 20 parts of the windows, effective sample size; for net with half "
    "of what the idle baselines differ by; the sensor's own accuracy and averaging are not in it"
)


def least_window_s(sensor: PowerSensor) -> float:
    """How long inferences should run without a pause for `energy` to say much: 20 readings, 10 refreshes."""
    return max(_READINGS * sensor.period_s, _REFRESHES * sensor.averaging_s)


def too_short(recording: Recording, windows: Sequence[Window]) -> str:
    """Why `energy` says little of these windows, too few readings or refreshes; empty where there are enough."""
    sensor, spans = recording.sensor, _spans(recording, windows)
    longest, whole = _longest(sensor, spans), sum(end - begin for begin, end in spans)
    if longest < _REFRESHES * sensor.averaging_s:
        return f"{longest:.2g} s without a pause, and {sensor.name} averages over {sensor.averaging_s:g} s"
    if whole < _READINGS * sensor.period_s:
        return f"{whole:.2g} s of queries, and {sensor.name} is read every {sensor.period_s:g} s"
    return ""


class Energy(msgspec.Struct, frozen=True, kw_only=True):
    """What inferences cost.

    Attributes:
        sensor, total: what was read. window_s: how long inferences ran.
        gross_j_per_inference, net_j_per_inference: at 95 %. idle_w: the mean of before and after.
        method: how power was integrated.
        samples: readings inside the windows; covered: share of the windows that they cover.
    """

    sensor: str
    total: str
    inferences: int
    window_s: float
    gross_j_per_inference: Known[Estimate]
    net_j_per_inference: Known[Estimate]
    mean_w: float | Unavailable
    idle_w: float | Unavailable
    idle_before_w: float | Unavailable
    idle_after_w: float | Unavailable
    method: str | None = None
    samples: int = 0
    covered: float = 0.0
    problems: list[str]


def energy(recording: Recording, windows: Sequence[Window], inferences: int) -> Energy:
    """What `inferences` inferences within `windows` cost.

    Gross is all that the sensor's total saw; net is gross minus idle power times the windows' time, hence what a
    machine that is on anyway spends. Power is integrated by the trapezoid rule between the readings of a window, the
    first and last of which hold up to its edges; of a sensor that counts energy itself, the mean power between two
    readings takes the place of the trapezoid.

    Args:
        recording: of a `Recorder`.
        windows: when the inferences ran, CLOCK_MONOTONIC nanoseconds; windows that overlap count once.
        inferences: how many they were, all windows together.
    """
    sensor, spans = recording.sensor, _spans(recording, windows)
    curve = _curve(recording)
    inside = integrate(curve, spans)
    before, after = _baselines(recording, curve, spans)
    idle, drift = _mean_idle(before, after)
    reason = _why_none(sensor, curve, inside, spans, inferences)
    gross: Known[Estimate] = Unavailable(reason)
    net: Known[Estimate] = Unavailable(reason)
    mean_w: float | Unavailable = Unavailable(reason)
    if not reason:
        mean_w = inside.watts
        reach = _reach(curve, spans, _PART_READINGS * curve.interval_s + sensor.averaging_s)
        gross = _per_inference(inside, 0.0, reach, inferences)
        net = _per_inference(inside, idle, None if reach is None else math.hypot(reach, drift), inferences)
    lost = f"no readings, or a counter that was reset, for {curve.lost_s:.3g} s"
    return Energy(
        sensor=sensor.name,
        total=sensor.total,
        inferences=inferences,
        window_s=inside.asked_s,
        gross_j_per_inference=gross,
        net_j_per_inference=net,
        mean_w=mean_w,
        idle_w=idle,
        idle_before_w=before,
        idle_after_w=after,
        method="energy counter" if curve.counted else "trapezoid rule",
        samples=inside.readings,
        covered=inside.share,
        problems=recording.told() + ([lost] if curve.lost_s > 0 else []),
    )


def _spans(recording: Recording, windows: Sequence[Window]) -> Spans:
    """Windows in seconds since the recording's start, ascending, overlaps joined; those of no length left out."""
    start = recording.start_ns
    return joined([((begin - start) / 1e9, (end - start) / 1e9) for begin, end in windows if end > begin])


def _longest(sensor: PowerSensor, spans: Spans) -> float:
    """Seconds of the longest window, over pauses of up to a period: the sensor does not see such pauses."""
    return max((end - begin for begin, end in joined(spans, sensor.period_s)), default=0.0)


def _curve(recording: Recording) -> Curve:
    """Power of the sensor's total over seconds since the recording's start; from energy counters where it has them."""
    sensor, start = recording.sensor, recording.start_ns
    moments, joules = recording.series(sensor.total_rails, "joules")
    if len(moments) >= 2:
        wraps_j = np.array([sensor.wraps_j.get(rail, math.nan) for rail in sensor.total_rails])
        return counter_curve((moments - start) / 1e9, joules, wraps_j)
    moments, watts = recording.series(sensor.total_rails, "watts")
    return power_curve((moments - start) / 1e9, watts.sum(axis=1), sensor.period_s)


def _why_none(sensor: PowerSensor, curve: Curve, inside: Integral, spans: Spans, inferences: int) -> str:
    """Why there can be no figure; empty where there is one."""
    if inferences < 1 or not spans:
        return f"{inferences} inferences in {inside.asked_s:g} s of windows: there is nothing to divide"
    if inside.share < _LEAST_COVERED:
        return f"readings of {sensor.name} cover {inside.share:.0%} of the windows' {inside.asked_s:.3g} s"
    longest = _longest(sensor, spans)
    if not curve.counted and longest < sensor.averaging_s:
        average = f"{sensor.name} averages over {sensor.averaging_s:g} s"
        return f"{average}, and no window is as long (longest {longest:.3g} s)"
    return ""


def _reach(curve: Curve, spans: Spans, least_s: float) -> float | None:
    """Watts, 95 %: how far the mean power of such windows may lie from what it was; None: too few parts to say."""
    powers = [integrate(curve, part).watts for part in parts_of(spans, least_s, _PARTS)]
    known = np.array([watts for watts in powers if math.isfinite(watts)])
    count = effective_size(known) if len(known) else 0
    if count < MIN_FOR_MEAN:
        return None
    return student_t(count - 1) * float(known.std(ddof=1)) / math.sqrt(count)


def _baselines(recording: Recording, curve: Curve, spans: Spans) -> tuple[Known[float], Known[float]]:
    """Idle power before and after the windows."""
    # The sensor's average still holds what was before; so do the readings next to the edge.
    settle = recording.sensor.averaging_s + curve.interval_s
    idle = [(begin + settle, end) for begin, end in _spans(recording, recording.idle) if end > begin + settle]
    before = [(begin, end) for begin, end in idle if spans and end <= spans[0][0]]
    after = [(begin, end) for begin, end in idle if spans and begin >= spans[-1][1]]
    return _baseline(curve, before), _baseline(curve, after)


def _baseline(curve: Curve, spans: Spans) -> Known[float]:
    inside = integrate(curve, spans)
    if inside.share < _LEAST_COVERED:
        return Unavailable(f"readings cover {inside.covered_s:.3g} of {inside.asked_s:.3g} idle seconds")
    return inside.watts


def _mean_idle(before: Known[float], after: Known[float]) -> tuple[Known[float], float]:
    """The mean of before and after, and half of what they differ by."""
    known = [part for part in (before, after) if isinstance(part, float)]
    if not known:
        return Unavailable("no idle baseline was read, before or after"), 0.0
    return sum(known) / len(known), abs(known[0] - known[-1]) / 2


def _per_inference(inside: Integral, idle_w: Known[float], reach_w: float | None, inferences: int) -> Known[Estimate]:
    """Joules beyond idle power, so many watts to either side."""
    if isinstance(idle_w, Unavailable):
        return idle_w
    if math.isclose(idle_w, inside.watts, rel_tol=1e-9):
        return Unavailable("the sensor read exactly the same, idle and at work: it is frozen, or does not see the work")
    # Uncovered time is taken at the mean of the covered.
    watts, seconds = inside.watts - idle_w, inside.asked_s / inferences
    low, high = (None if reach_w is None else (watts + way * reach_w) * seconds for way in (-1, 1))
    return estimate(watts * seconds, low, high, _METHOD)
