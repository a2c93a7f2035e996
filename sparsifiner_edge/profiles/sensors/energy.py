"""Joules per inference out of a recording, with what they may be wrong by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from msgspec.structs import replace

from sparsifiner_edge.profiles.sensors.base import PowerSensor
from sparsifiner_edge.profiles.sensors.curve import (
    Curve,
    Integral,
    Spans,
    counter_curve,
    integrate,
    joined,
    power_at,
    power_curve,
    steps_within,
)
from sparsifiner_edge.profiles.sensors.recorder import Recording, Window
from sparsifiner_edge.profiles.stats import estimate
from sparsifiner_edge.records import Known, Unavailable
from sparsifiner_edge.results import Estimate

_LEAST_COVERED = 0.8
_Z95 = 1.96
_FROZEN_S = 2.0
_FROZEN_READINGS = 20
_READINGS, _REFRESHES = 20, 10
"""Of a sensor, within inferences that are worth an energy: see `least_window_s`."""
_DISAGREEMENT = 0.05
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
    longest = _longest(sensor, spans)
    if longest < _REFRESHES * sensor.averaging_s:
        return f"{longest:.2g} s without a pause, and {sensor.name} averages over {sensor.averaging_s:g} s"
    if _length(spans) < _READINGS * sensor.period_s:
        return f"{_length(spans):.2g} s of queries, and {sensor.name} is read every {sensor.period_s:g} s"
    return ""


class Energy(msgspec.Struct, frozen=True, kw_only=True):
    """What inferences cost.

    Attributes:
        sensor, total: what was read. window_s: how long inferences ran.
        gross_j_per_inference, net_j_per_inference: at 95 %. idle_w: the mean of before and after.
        rails_w: mean of every rail. method: how power was integrated.
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
    rails_w: dict[str, float | Unavailable] = {}
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
    empty = sum(end <= begin for begin, end in windows)
    problems = [f"{empty} of {len(windows)} windows have no length and were left out"] if empty else []
    problems += recording.told()
    refused = _refusal(recording, spans, inferences)
    curve = None if refused else _total(recording)
    if curve is None:
        return _nothing(sensor, inferences, spans, problems, refused or "no readings")
    inside = integrate(curve, spans)
    before, after = _baselines(recording, curve, spans)
    idle = _idle(before, after)
    problems += _frozen(recording)
    if curve.lost_s > 0:
        problems.append(f"no readings, or a counter that was reset, for {curve.lost_s:.3g} s")
    if isinstance(before, _Idle) != isinstance(after, _Idle):
        problems.append("idle power is known on one side of the windows alone: its drift is not in the errors")
    little = _too_little(sensor, spans, inside, curve.counted)
    shared = replace(
        _nothing(sensor, inferences, spans, problems, little),
        method="energy counter" if curve.counted else "trapezoid rule",
        samples=inside.readings,
        covered=inside.share,
        idle_before_w=_watts(before),
        idle_after_w=_watts(after),
        idle_w=_watts(idle),
    )
    if little:
        return shared
    problems += _cross_check(recording, curve, spans, inside)
    gross, net = _per_inference(inside, _error(sensor, curve, spans, inside), idle, inferences)
    return replace(
        shared,
        gross_j_per_inference=gross,
        net_j_per_inference=net,
        mean_w=inside.watts,
        rails_w=_rails(recording, spans, curve.counted),
    )


def _total(recording: Recording) -> Curve | None:
    """Power of the sensor's total over time, in seconds since the recording's start; None without two readings."""
    rails = recording.sensor.total_rails
    return _curve(recording, rails, counted=True) or _curve(recording, rails, counted=False)


def _curve(recording: Recording, rails: Sequence[str], counted: bool) -> Curve | None:
    """Power of the sum of `rails` over time, from their energy counters or their power readings; None without two."""
    moments, values = recording.series(rails, "joules" if counted else "watts")
    if len(moments) < 2:
        return None
    seconds, sensor = (moments - recording.start_ns) / 1e9, recording.sensor
    if counted:
        return counter_curve(seconds, values, np.array([sensor.wraps_j.get(rail, math.nan) for rail in rails]))
    return power_curve(seconds, values.sum(axis=1), sensor.period_s)


def _spans(recording: Recording, windows: Sequence[Window]) -> Spans:
    """The windows that have a length, in seconds since the start, ascending, overlaps merged."""
    start = recording.start_ns
    return joined([((begin - start) / 1e9, (end - start) / 1e9) for begin, end in windows if end > begin])


def _length(spans: Spans) -> float:
    return sum(end - begin for begin, end in spans)


def _longest(sensor: PowerSensor, spans: Spans) -> float:
    """Seconds of the longest window, over pauses of up to a period: the sensor does not see such pauses."""
    return max((end - begin for begin, end in joined(spans, sensor.period_s)), default=0.0)


def _refusal(recording: Recording, spans: Spans, inferences: int) -> str:
    """Why there can be no figure at all; empty where there may."""
    sensor = recording.sensor
    if not sensor.available:
        return "no power sensor answers (`total` says why)"
    if inferences < 1 or not spans:
        return f"{inferences} inferences in {_length(spans):g} s of windows: there is nothing to divide"
    if len(recording.readings) < 2:
        return f"{sensor.name} gave {len(recording.readings)} readings: {'; '.join(recording.told()) or 'too short'}"
    return ""


def _nothing(sensor: PowerSensor, inferences: int, spans: Spans, problems: list[str], reason: str) -> Energy:
    """No figures, for a reason."""
    why = Unavailable(reason)
    return Energy(
        sensor=sensor.name,
        total=sensor.total,
        inferences=inferences,
        window_s=_length(spans),
        gross_j_per_inference=why,
        net_j_per_inference=why,
        mean_w=why,
        idle_w=why,
        idle_before_w=why,
        idle_after_w=why,
        problems=problems,
    )


def _too_little(sensor: PowerSensor, spans: Spans, inside: Integral, counted: bool) -> str:
    if inside.share < _LEAST_COVERED:
        return f"readings of {sensor.name} cover {inside.share:.0%} of the windows' {inside.asked_s:.3g} s"
    longest = _longest(sensor, spans)
    if not counted and longest < sensor.averaging_s:
        return (
            f"{sensor.name} averages over {sensor.averaging_s:g} s, and no window is as long (longest {longest:.3g} s)"
        )
    return ""


def _error(sensor: PowerSensor, curve: Curve, spans: Spans, inside: Integral) -> float:
    """Joules, 95 %: what the integral over all windows may be off by, the sensor's own accuracy apart."""
    edges = np.ravel(joined(spans, max(sensor.period_s, curve.interval_s)))
    delay = curve.interval_s + sensor.averaging_s
    before, after = power_at(curve, edges - delay), power_at(curve, edges + delay)
    # A step of power lies anywhere within an interval, evenly and independently.
    placing = _Z95 / math.sqrt(12) * curve.interval_s * float(np.linalg.norm(after - before))
    # A running average lags by half its time: at the start of a window it still holds what came before, in place of
    # what the end of the window held. Always the same way, so that many windows do not help. A tenth more, since the
    # average also blurs the step that is looked at.
    lost = np.abs(before[::2] - power_at(curve, edges[1::2]))
    lagging = 1.1 * sensor.averaging_s / 2 * float(np.sum(lost))
    # What was not seen, or only together with what ran outside, may have held anything between lowest and highest.
    unseen = (inside.asked_s - inside.covered_s + inside.mixed_s / 2) * float(np.ptp(curve.watts))
    return math.hypot(placing, lagging, unseen, _Z95 * _sampling(curve, spans, inside))


def _sampling(curve: Curve, spans: Spans, inside: Integral) -> float:
    """Standard error in joules, from differences of successive readings, which a slow drift hardly raises."""
    step, count = steps_within(curve, spans)
    if curve.counted:  # Nothing is lost in between; up to each edge the power of the readings within is taken.
        return step * curve.interval_s * math.sqrt(2 * len(spans) / 3)
    return step * inside.covered_s / math.sqrt(2 * (count + 1))


def _baselines(recording: Recording, curve: Curve, spans: Spans) -> tuple[Known[_Idle], Known[_Idle]]:
    """Idle power before and after the windows."""
    # The sensor's average still holds what was before; so do the readings next to the edge.
    settle = recording.sensor.averaging_s + curve.interval_s
    idle = [(begin + settle, end) for begin, end in _spans(recording, recording.idle) if end > begin + settle]
    first, last = spans[0][0], spans[-1][1]
    return _baseline(curve, [s for s in idle if s[1] <= first]), _baseline(curve, [s for s in idle if s[0] >= last])


def _baseline(curve: Curve, spans: Spans) -> Known[_Idle]:
    inside = integrate(curve, spans)
    if not spans or inside.share < _LEAST_COVERED:
        return Unavailable(f"readings cover {inside.covered_s:.3g} of {inside.asked_s:.3g} idle seconds")
    step, count = steps_within(curve, spans)
    return _Idle(inside.watts, _Z95 * step / math.sqrt(2 * (count + 1)))


def _idle(before: Known[_Idle], after: Known[_Idle]) -> Known[_Idle]:
    """The mean of before and after, its error their drift and spread."""
    known = [part for part in (before, after) if isinstance(part, _Idle)]
    if not known:
        return Unavailable("no idle baseline was read, before or after")
    drift = abs(known[0].watts - known[-1].watts) / 2
    error = math.hypot(drift, *(part.error / len(known) for part in known))
    return _Idle(sum(part.watts for part in known) / len(known), error)


def _watts(part: Known[_Idle]) -> float | Unavailable:
    return part.watts if isinstance(part, _Idle) else part


def _per_inference(
    inside: Integral, error: float, idle: Known[_Idle], inferences: int
) -> tuple[Estimate, Known[Estimate]]:
    """Gross and net joules."""
    # Uncovered time is taken at the mean of the covered; what that may be off by is in the error.
    joules = inside.watts * inside.asked_s

    def share(value: float, off: float) -> Estimate:
        return estimate(value / inferences, (value - off) / inferences, (value + off) / inferences, _METHOD)

    gross = share(joules, error)
    if isinstance(idle, Unavailable):
        return gross, idle
    if math.isclose(idle.watts, inside.watts, rel_tol=1e-9):
        frozen = "the sensor read exactly the same, idle and at work: it is frozen, or does not see the work"
        return gross, Unavailable(frozen)
    return gross, share(joules - idle.watts * inside.asked_s, math.hypot(error, idle.error * inside.asked_s))


def _rails(recording: Recording, spans: Spans, counted: bool) -> dict[str, float | Unavailable]:
    """Mean power of every rail within the windows; rails overlap, so they do not add up to the total."""
    rails: dict[str, float | Unavailable] = {}
    for rail in recording.sensor.rails:
        curve = _curve(recording, [rail], counted) or _curve(recording, [rail], not counted)
        inside = integrate(curve, spans) if curve else None
        known = inside is not None and inside.share >= _LEAST_COVERED
        rails[rail] = inside.watts if inside and known else Unavailable("too few readings in the windows")
    return rails


def _cross_check(recording: Recording, curve: Curve, spans: Spans, inside: Integral) -> list[str]:
    """A sensor that counts energy and gives power should agree with itself."""
    power = _curve(recording, recording.sensor.total_rails, counted=False) if curve.counted else None
    other = integrate(power, spans) if power else None
    if other is None or other.share < _LEAST_COVERED or _length(spans) < 10 * recording.sensor.averaging_s:
        return []
    if math.isclose(other.watts, inside.watts, rel_tol=_DISAGREEMENT):
        return []
    return [f"the energy counter gives {inside.watts:.4g} W, the power readings {other.watts:.4g} W"]


def _frozen(recording: Recording) -> list[str]:
    """Power that stays the same to the last digit for long is suspect: a sensor that hangs looks like that."""
    rails = recording.sensor.total_rails
    moments, values = recording.series(rails, "watts")
    if not len(moments):
        moments, values = recording.series(rails, "joules")
    if len(values) < _FROZEN_READINGS:
        return []
    bounds = np.concatenate([[0], np.flatnonzero(np.diff(values, axis=0).any(axis=1)) + 1, [len(values)]])
    longest = int(np.argmax(np.diff(bounds)))
    first, last = int(bounds[longest]), int(bounds[longest + 1]) - 1
    seconds = float(moments[last] - moments[first]) / 1e9
    if last - first + 1 < _FROZEN_READINGS or seconds < _FROZEN_S:
        return []
    return [f"{recording.sensor.name} read exactly the same for {seconds:.3g} s: it may be frozen"]
