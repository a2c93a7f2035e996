"""Power curves of known integral, and recordings of them without waiting."""

from __future__ import annotations

import dataclasses

import numpy as np

from sparsifiner_edge.profiles.sensors import PowerSensor, Recording

SECOND = 1_000_000_000
RAIL = "VDD_IN"


class Power:
    """Piecewise constant power: watts between n + 1 bounds in seconds, levels [n]."""

    def __init__(self, bounds, levels):
        self.bounds, self.levels = np.array(bounds, float), np.array(levels, float)
        self.energies = np.concatenate([[0.0], np.cumsum(self.levels * np.diff(self.bounds))])

    def watts(self, t):
        return self.levels[np.searchsorted(self.bounds, t, "right") - 1]

    def joules(self, t):
        """Return joules from the first bound to t seconds."""
        return np.interp(t, self.bounds, self.energies)


def square(low, high, half):
    """Return a square wave of two levels, each for `half` seconds."""
    return Power(np.arange(301) * half, np.resize([low, high], 300))


def sensor_of(**settings):
    return PowerSensor("synthetic", "synthetic", 0.1, dict, **settings)


def sample_times(seconds, period_s, seed, jitter=0.3):
    """Return reading times of a thread: about every period, early or late by up to `jitter` of it."""
    random = np.random.default_rng(seed)
    count = int(seconds / period_s)
    times = (np.arange(count) + random.random() + random.uniform(-jitter, jitter, count)) * period_s
    return np.sort(times[times < seconds])


def record_power(power, times, average_s=0.0):
    """Record instantaneous power, or its mean over the last `average_s` seconds."""
    mean = (power.joules(times) - power.joules(times - average_s)) / average_s if average_s else power.watts(times)
    return recording(times, [{RAIL: float(v)} for v in mean], sensor_of(averaging_s=average_s))


def record_counter(power, times, wrap=None, start=0.0):
    values = power.joules(times) + start
    values = values % wrap if wrap else values
    sensor = sensor_of(counts=True, wraps_j={RAIL: wrap} if wrap else {}, averaging_s=0.001)
    return recording(times, [{RAIL: float(v)} for v in values], sensor)


def recording(times, readings, sensor):
    made = Recording(sensor)
    made.start_ns, made.times_ns, made.readings = 0, [int(t * SECOND) for t in times], readings
    return made


def often(sensor):
    """Return the same source with readings every hundredth of a second."""
    return dataclasses.replace(sensor, period_s=0.01)


def window(begin, end):
    return int(begin * SECOND), int(end * SECOND)
