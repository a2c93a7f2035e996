"""Joules per inference out of a recording, with what they may be wrong by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import msgspec
import numpy as np
from msgspec.structs import replace

from sparsifiner_edge.profiles.sensors.base import PowerSensor
from sparsifiner_edge.profiles.sensors.curve import (
    Array,
    Curve,
    Integral,
    add_curves,
    counter_curve,
    integrate,
    power_at,
    power_curve,
)
from sparsifiner_edge.profiles.sensors.recorder import Recording, Window
from sparsifiner_edge.profiles.stats import estimate
from sparsifiner_edge.records import Known, Unavailable
from sparsifiner_edge.results import Estimate

Spans = list[tuple[float, float]]

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
    sensor, spans = recording.sensor, _spans(recording, windows)[0]
    longest = max((end - begin for begin, end in _joined(spans, sensor.period_s)), default=0.0)
    if longest < _REFRESHES * sensor.averaging_s:
        return f"{longest:.2g} s without a pause, and {sensor.name} averages over {sensor.averaging_s:g} s"
    if _length(spans) < _READINGS * sensor.period_s:
        return f"{_length(spans):.2g} s of queries, and {sensor.name} is read every {sensor.period_s:g} s"
    return ""


class _Baseline(NamedTuple):
    """Idle power in watts, and what it may be off by (95 %)."""

    watts: float
    error: float


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
    spans, problems = _spans(recording, windows)
    problems += recording.told()
    sensor = recording.sensor
    nothing = partial(_nothing, sensor, inferences, _length(spans), problems)
    refused = _refusal(recording, spans, inferences)
    curve = None if refused else total_curve(recording)
    if curve is None or refused:
        return nothing(refused or "no readings")
    problems += _frozen(recording) + _gaps(curve)
    inside, idle = integrate(curve, spans), _idle(recording, curve, spans, problems)
    counted = bool(sensor.total_rails) and rail_curve(recording, sensor.total_rails, True) is not None
    shared = replace(
        nothing(_too_little(sensor, spans, inside, counted)),
        method="energy counter" if counted else "trapezoid rule",
        samples=inside.readings,
        covered=inside.share,
        idle_before_w=_watts(idle.before),
        idle_after_w=_watts(idle.after),
        idle_w=_watts(idle.baseline),
    )
    if _too_little(sensor, spans, inside, counted):
        return shared
    if counted:
        problems += _cross_check(recording, spans, inside)
    gross, net = _per_inference(inside, _gross_error(sensor, curve, spans, inside, counted), idle.baseline, inferences)
    return replace(
        shared,
        gross_j_per_inference=gross,
        net_j_per_inference=net,
        mean_w=inside.watts,
        rails_w=_rails(recording, spans, counted),
    )


def total_curve(recording: Recording) -> Curve | None:
    """Power of the sensor's total over time, in seconds since the recording's start; None without two readings."""
    rails = recording.sensor.total_rails
    curve = rail_curve(recording, rails, counted=True)
    return curve if curve is not None else rail_curve(recording, rails, counted=False)


def rail_curve(recording: Recording, rails: Sequence[str], counted: bool) -> Curve | None:
    """Power of the sum of `rails` over time, from their energy counters or their power readings; None without two."""
    if not counted:
        moments, watts = recording.power(rails)
        curve = power_curve(_seconds(recording, moments), watts, recording.sensor.period_s)
        return curve if len(moments) > 1 else None
    curves = []
    for rail in rails:
        moments, joules = recording.counter(rail)
        if len(moments) < 2:
            return None
        curves.append(counter_curve(_seconds(recording, moments), joules, recording.sensor.wraps_j.get(rail)))
    return add_curves(curves) if curves else None


def _seconds(recording: Recording, moments: Array) -> Array:
    return (moments - recording.start_ns) / 1e9


def _spans(recording: Recording, windows: Sequence[Window]) -> tuple[Spans, list[str]]:
    """The windows in seconds since the start, ascending, overlaps merged; and what was wrong with them."""
    spans: Spans = []
    good = sorted((start, end) for start, end in windows if end > start)
    for start, end in good:
        begin, finish = (start - recording.start_ns) / 1e9, (end - recording.start_ns) / 1e9
        if spans and begin < spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], finish))
        else:
            spans.append((begin, finish))
    empty = len(windows) - len(good)
    return spans, [f"{empty} of {len(windows)} windows have no length and were left out"] if empty else []


def _length(spans: Spans) -> float:
    return sum(end - begin for begin, end in spans)


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


def _nothing(sensor: PowerSensor, inferences: int, window_s: float, problems: list[str], reason: str) -> Energy:
    """No figures, for a reason."""
    why = Unavailable(reason)
    return Energy(
        sensor=sensor.name,
        total=sensor.total,
        inferences=inferences,
        window_s=window_s,
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
    longest = max(end - begin for begin, end in _joined(spans, sensor.period_s))
    if not counted and longest < sensor.averaging_s:
        return (
            f"{sensor.name} averages over {sensor.averaging_s:g} s, and no window is as long (longest {longest:.3g} s)"
        )
    return ""


def _joined(spans: Spans, pause_s: float) -> Spans:
    """Windows with no more than `pause_s` between them as one: the sensor does not see such pauses."""
    joined: Spans = []
    for begin, end in spans:
        if joined and begin - joined[-1][1] <= pause_s:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    return joined


def _gross_error(sensor: PowerSensor, curve: Curve, spans: Spans, inside: Integral, counted: bool) -> float:
    """Joules, 95 %: what the integral over all windows may be off by, the sensor's own accuracy apart."""
    joined = _joined(spans, max(sensor.period_s, curve.interval_s))
    delay = curve.interval_s + sensor.averaging_s
    edges = np.array(joined).ravel()
    steps = np.abs(power_at(curve, edges + delay) - power_at(curve, edges - delay))
    # A step lies anywhere within an interval, evenly and independently.
    placing = _Z95 / math.sqrt(12) * curve.interval_s * math.sqrt(float(np.sum(steps**2)))
    # A running average lags by half its time: at the start of a window it still holds what came before, in place of
    # what the end of the window held. Always the same way, so that many windows do not help. A tenth more, since the
    # average also blurs the step that is looked at.
    lost = np.abs(power_at(curve, edges[::2] - delay) - power_at(curve, edges[1::2]))
    lagging = 1.1 * sensor.averaging_s / 2 * float(np.sum(lost))
    missing = (inside.asked_s - inside.covered_s) * float(np.ptp(curve.first)) if len(curve.first) else 0.0
    mixed = inside.mixed_s * float(np.max(steps, initial=0.0)) / 2
    sampling = _held(curve, spans) if counted else inside.covered_s * _Z95 * _spread(curve, spans)
    return math.hypot(placing, lagging, missing, mixed, sampling)


def _held(curve: Curve, spans: Spans) -> float:
    """Joules, 95 %: a counter's power up to the edges is that of the readings within, for up to an interval each."""
    return _Z95 / math.sqrt(3) * curve.interval_s * _step(curve, spans)[0] * math.sqrt(2 * len(spans))


def _spread(curve: Curve, spans: Spans) -> float:
    """Standard error of the mean power, from differences of successive readings, which a slow drift hardly raises."""
    step, count = _step(curve, spans)
    return step / math.sqrt(2 * (count + 1))


def _step(curve: Curve, spans: Spans) -> tuple[float, int]:
    """Root mean square of the differences between successive readings within the windows, and how many there are."""
    differences = [
        np.diff(curve.first[np.searchsorted(curve.start, begin) : np.searchsorted(curve.start, end)])
        for begin, end in spans
    ]
    steps = np.concatenate(differences) if differences else np.empty(0)
    if not len(steps):
        return (float(np.ptp(curve.first)) if len(curve.first) else 0.0), 0
    return math.sqrt(float(np.mean(steps**2))), len(steps)


class _Idle(NamedTuple):
    """Idle power before and after the windows, and what is taken for it; or why it is not known."""

    before: _Baseline | str
    after: _Baseline | str
    baseline: _Baseline | str


def _watts(part: _Baseline | str) -> float | Unavailable:
    return part.watts if isinstance(part, _Baseline) else Unavailable(part)


def _idle(recording: Recording, curve: Curve, spans: Spans, problems: list[str]) -> _Idle:
    """The baseline is the mean of before and after, its error their drift and spread."""
    first, last = spans[0][0], spans[-1][1]
    idle, _ = _spans(recording, recording.idle)
    # The sensor's average still holds what was before; so do the readings next to the edge.
    settle = recording.sensor.averaging_s + curve.interval_s
    settled = [(begin + settle, end) for begin, end in idle if end > begin + settle]
    before = _idle_mean(curve, [span for span in settled if span[1] <= first])
    after = _idle_mean(curve, [span for span in settled if span[0] >= last])
    known = [part for part in (before, after) if isinstance(part, _Baseline)]
    if not known:
        return _Idle(before, after, "no idle baseline was read, before or after")
    if len(known) == 1:
        problems.append("idle power is known on one side of the windows alone: its drift is not in the errors")
    watts = sum(part.watts for part in known) / len(known)
    drift = abs(known[0].watts - known[-1].watts) / 2
    error = math.hypot(drift, *(part.error / len(known) for part in known))
    return _Idle(before, after, _Baseline(watts, error))


def _idle_mean(curve: Curve, spans: Spans) -> _Baseline | str:
    inside = integrate(curve, spans)
    if not spans or inside.share < _LEAST_COVERED:
        return f"readings cover {inside.covered_s:.3g} of {inside.asked_s:.3g} idle seconds"
    return _Baseline(inside.watts, _Z95 * _spread(curve, spans))


def _per_inference(
    inside: Integral, error: float, idle: _Baseline | str, inferences: int
) -> tuple[Estimate, Known[Estimate]]:
    """Gross and net joules."""
    # Uncovered time is taken at the mean of the covered; what that may be off by is in the error.
    gross = inside.watts * inside.asked_s

    def share(joules: float, off: float) -> Estimate:
        return estimate(joules / inferences, (joules - off) / inferences, (joules + off) / inferences, _METHOD)

    if isinstance(idle, str):
        return share(gross, error), Unavailable(idle)
    if math.isclose(idle.watts, inside.watts, rel_tol=1e-9):
        frozen = "the sensor read exactly the same, idle and at work: it is frozen, or does not see the work"
        return share(gross, error), Unavailable(frozen)
    net = share(gross - idle.watts * inside.asked_s, math.hypot(error, idle.error * inside.asked_s))
    return share(gross, error), net


def _rails(recording: Recording, spans: Spans, counted: bool) -> dict[str, float | Unavailable]:
    """Mean power of every rail within the windows; rails overlap, so they do not add up to the total."""
    rails: dict[str, float | Unavailable] = {}
    for rail in recording.sensor.rails:
        curve = rail_curve(recording, [rail], counted) or rail_curve(recording, [rail], not counted)
        inside = integrate(curve, spans) if curve is not None else None
        known = inside is not None and inside.share >= _LEAST_COVERED
        rails[rail] = inside.watts if inside is not None and known else Unavailable("too few readings in the windows")
    return rails


def _cross_check(recording: Recording, spans: Spans, inside: Integral) -> list[str]:
    """A sensor that counts energy and gives power should agree with itself."""
    curve = rail_curve(recording, recording.sensor.total_rails, counted=False)
    other = integrate(curve, spans) if curve is not None else None
    if other is None or other.share < _LEAST_COVERED or _length(spans) < 10 * recording.sensor.averaging_s:
        return []
    if abs(other.watts - inside.watts) <= _DISAGREEMENT * max(inside.watts, other.watts):
        return []
    return [f"the energy counter gives {inside.watts:.4g} W, the power readings {other.watts:.4g} W"]


def _gaps(curve: Curve) -> list[str]:
    return [f"no readings, or a counter that was reset, for {curve.lost_s:.3g} s"] if curve.lost_s > 0 else []


def _frozen(recording: Recording) -> list[str]:
    """Power that stays the same to the last digit for long is suspect: a sensor that hangs looks like that."""
    rails = recording.sensor.total_rails
    moments, values = recording.power(rails)
    if not len(moments) and rails:
        moments, values = recording.counter(rails[0])
    if len(values) < _FROZEN_READINGS:
        return []
    ends = np.flatnonzero(np.diff(values)) + 1
    bounds = np.concatenate([[0], ends, [len(values)]])
    longest = int(np.argmax(np.diff(bounds)))
    start, stop = int(bounds[longest]), int(bounds[longest + 1]) - 1
    seconds = float(moments[stop] - moments[start]) / 1e9
    if stop - start + 1 < _FROZEN_READINGS or seconds < _FROZEN_S:
        return []
    return [f"{recording.sensor.name} read exactly the same for {seconds:.3g} s: it may be frozen"]
