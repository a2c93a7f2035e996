"""Power over time of which the integral is known, and recordings of it without waiting."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sparsifiner_edge.profiles.sensors import PowerSensor, Recording

Array = np.ndarray
SECOND = 1_000_000_000
RAIL = "VDD_IN"


class Power(NamedTuple):
    """Watts at t seconds, and joules from 0 to t."""

    watts: Callable[[Array], Array]
    joules: Callable[[Array], Array]


def constant(level: float) -> Power:
    return Power(lambda t: np.full_like(t, level), lambda t: level * t)


def sine(mean: float, swing: float, period: float) -> Power:
    turn = 2 * np.pi / period
    return Power(lambda t: mean + swing * np.sin(turn * t), lambda t: mean * t + swing / turn * (1 - np.cos(turn * t)))


def steps(bounds: Array, levels: Array) -> Power:
    """So many watts from each of the bounds to the next."""
    energies = np.concatenate([[0.0], np.cumsum(levels * np.diff(bounds))])
    return Power(lambda t: levels[np.searchsorted(bounds, t, "right") - 1], lambda t: np.interp(t, bounds, energies))


def square(low: float, high: float, period: float, seconds: float = 60.0) -> Power:
    """High in the second half of each period."""
    bounds = np.arange(0.0, seconds + period, period / 2)
    return steps(bounds, np.where(np.arange(len(bounds) - 1) % 2, high, low))


def busy_between(idle: float, power: Power, begin: float, end: float) -> Power:
    """`idle` watts but for begin to end seconds."""

    def watts(t: Array) -> Array:
        return np.where((t >= begin) & (t < end), power.watts(t), idle)

    def joules(t: Array) -> Array:
        inside = np.clip(t, begin, end)
        return idle * (t - (inside - begin)) + power.joules(inside) - power.joules(np.full_like(t, begin))

    return Power(watts, joules)


def sensor_of(period_s: float = 0.1, **settings: object) -> PowerSensor:
    return PowerSensor("synthetic", "synthetic", period_s, dict, **settings)


def sample_times(seconds: float, period_s: float, seed: int, jitter: float = 0.3) -> Array:
    """Seconds at which a thread would read: about every period, early or late by up to `jitter` of it."""
    random = np.random.default_rng(seed)
    count = int(seconds / period_s)
    times = (np.arange(count) + random.random() + random.uniform(-jitter, jitter, count)) * period_s
    return np.sort(times[times < seconds])


def record_power(power: Power, times: Array, average_s: float = 0.0) -> Recording:
    """Readings of the moment, or of the mean over the last `average_s` seconds."""
    past = np.maximum(times - average_s, -10.0)
    values = (power.joules(times) - power.joules(past)) / average_s if average_s else power.watts(times)
    return recording(times, [{RAIL: float(v)} for v in values], sensor_of(averaging_s=average_s))


def record_counter(power: Power, times: Array, wrap: float | None = None, start: float = 0.0) -> Recording:
    values = power.joules(times) + start
    values = values % wrap if wrap else values
    sensor = sensor_of(counts=True, wraps_j={RAIL: wrap} if wrap else {}, averaging_s=0.001)
    return recording(times, [{RAIL: float(v)} for v in values], sensor)


def recording(times: Array, readings: list[dict[str, float]], sensor: PowerSensor) -> Recording:
    made = Recording(sensor)
    made.start_ns, made.times_ns, made.readings = 0, [int(t * SECOND) for t in times], readings
    return made


def often(sensor: PowerSensor) -> PowerSensor:
    """The same, worth reading every hundredth of a second."""
    return dataclasses.replace(sensor, period_s=0.01)


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Until something has happened, however busy the machine is."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def window(begin: float, end: float) -> tuple[int, int]:
    return int(begin * SECOND), int(end * SECOND)
