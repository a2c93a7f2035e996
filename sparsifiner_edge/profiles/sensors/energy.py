"""Joules per inference out of a recording, with what they may be wrong by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

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
    power_curve,
    steps_within,
)
from sparsifiner_edge.profiles.sensors.recorder import Recording, Window
from sparsifiner_edge.profiles.stats import estimate
from sparsifiner_edge.records import Known, Unavailable
from sparsifiner_edge.results import Estimate

_LEAST_COVERED = 0.8
_Z95 = 1.96
_READINGS, _REFRESHES = 20, 10
"""Of a sensor, within inferences that are worth an energy: see `least_window_s`."""
_METHOD = (
    "spread between successive readings, power steps within a reading period (and the sensor's averaging time) of the "
    "windows' edges, missing readings, and for net figures the baselines' spread and drift; the sensor's own accuracy "
    "is not in it"
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


class _Idle(NamedTuple):
    """Idle power in watts, and what it may be off by (95 %)."""

    watts: float
    error: float


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
    idle = _mean_idle(before, after)
    reason = _why_none(sensor, curve, inside, spans, inferences)
    gross: Known[Estimate] = Unavailable(reason)
    net: Known[Estimate] = Unavailable(reason)
    mean_w: float | Unavailable = Unavailable(reason)
    if not reason:
        error, mean_w = _error(sensor, curve, spans, inside), inside.watts
        gross = _per_inference(inside, _Idle(0.0, 0.0), error, inferences)
        net = _per_inference(inside, idle, error, inferences)
    lost = f"no readings, or a counter that was reset, for {curve.lost_s:.3g} s"
    return Energy(
        sensor=sensor.name,
        total=sensor.total,
        inferences=inferences,
        window_s=inside.asked_s,
        gross_j_per_inference=gross,
        net_j_per_inference=net,
        mean_w=mean_w,
        idle_w=_watts(idle),
        idle_before_w=_watts(before),
        idle_after_w=_watts(after),
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


def _error(sensor: PowerSensor, curve: Curve, spans: Spans, inside: Integral) -> float:
    """Joules, 95 %: what the integral over all windows may be off by, the sensor's own accuracy apart."""
    edges = np.ravel(joined(spans, max(sensor.period_s, curve.interval_s)))
    delay = curve.interval_s + sensor.averaging_s
    middles = (curve.since + curve.until) / 2
    before, after, at_edges = (np.interp(edges + late, middles, curve.watts) for late in (-delay, delay, 0.0))
    # A step of power lies anywhere within an interval, evenly and independently.
    placing = _Z95 / math.sqrt(12) * curve.interval_s * float(np.linalg.norm(after - before))
    # A running average lags by half its time: at the start of a window it still holds what came before, in place of
    # what the end of the window held. Always the same way, so that many windows do not help. A tenth more, since the
    # average also blurs the step that is looked at.
    lost = np.abs(before[::2] - at_edges[1::2])
    lagging = 1.1 * sensor.averaging_s / 2 * float(np.sum(lost))
    # What was not seen, or only together with what ran outside, may have held anything between lowest and highest.
    unseen = (inside.asked_s - inside.covered_s + inside.mixed_s / 2) * float(np.ptp(curve.watts))
    # Differences of successive readings, which a slow drift hardly raises. Of a counter nothing is lost in between; up
    # to each edge the power of the readings within is taken.
    step, count = steps_within(curve, spans)
    counted, sampled = curve.interval_s * math.sqrt(2 * len(spans) / 3), inside.covered_s / math.sqrt(2 * (count + 1))
    return math.hypot(placing, lagging, unseen, _Z95 * step * (counted if curve.counted else sampled))


def _baselines(recording: Recording, curve: Curve, spans: Spans) -> tuple[Known[_Idle], Known[_Idle]]:
    """Idle power before and after the windows."""
    # The sensor's average still holds what was before; so do the readings next to the edge.
    settle = recording.sensor.averaging_s + curve.interval_s
    idle = [(begin + settle, end) for begin, end in _spans(recording, recording.idle) if end > begin + settle]
    before = [(begin, end) for begin, end in idle if spans and end <= spans[0][0]]
    after = [(begin, end) for begin, end in idle if spans and begin >= spans[-1][1]]
    return _baseline(curve, before), _baseline(curve, after)


def _baseline(curve: Curve, spans: Spans) -> Known[_Idle]:
    inside = integrate(curve, spans)
    if inside.share < _LEAST_COVERED:
        return Unavailable(f"readings cover {inside.covered_s:.3g} of {inside.asked_s:.3g} idle seconds")
    step, count = steps_within(curve, spans)
    return _Idle(inside.watts, _Z95 * step / math.sqrt(2 * (count + 1)))


def _mean_idle(before: Known[_Idle], after: Known[_Idle]) -> Known[_Idle]:
    """The mean of before and after, its error their drift and spread."""
    known = [part for part in (before, after) if isinstance(part, _Idle)]
    if not known:
        return Unavailable("no idle baseline was read, before or after")
    drift = abs(known[0].watts - known[-1].watts) / 2
    error = math.hypot(drift, *(part.error / len(known) for part in known))
    return _Idle(sum(part.watts for part in known) / len(known), error)


def _watts(part: Known[_Idle]) -> float | Unavailable:
    return part.watts if isinstance(part, _Idle) else part


def _per_inference(inside: Integral, idle: Known[_Idle], error: float, inferences: int) -> Known[Estimate]:
    """Joules beyond idle power, each with its error in joules."""
    if isinstance(idle, Unavailable):
        return idle
    if math.isclose(idle.watts, inside.watts, rel_tol=1e-9):
        return Unavailable("the sensor read exactly the same, idle and at work: it is frozen, or does not see the work")
    # Uncovered time is taken at the mean of the covered; what that may be off by is in the error.
    joules = (inside.watts - idle.watts) * inside.asked_s
    error = math.hypot(error, idle.error * inside.asked_s)
    return estimate(joules / inferences, (joules - error) / inferences, (joules + error) / inferences, _METHOD)
