"""Recording of a power sensor during a measurement, in a thread of the process that does not run the model."""

from __future__ import annotations

import collections
import contextlib
import math
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.profiles.sensors.conditions import Conditions, Observation, conditions, summarise_conditions
from sparsifiner_edge.profiles.sensors.nvml import open_card
from sparsifiner_edge.profiles.sensors.power import PowerSensor, UnavailableError, why

Window = tuple[int, int]
"""Start and end, in nanoseconds of CLOCK_MONOTONIC (`time.monotonic_ns()`), which all processes of a machine share."""

_JOIN_S = 5.0
"""Seconds to wait for the last reading at the end."""


class Recording:
    """Readings of a power sensor and of the machine's conditions, taken by a thread during a `with` block.

    Args:
        sensor: Result of `find_sensor`.
        root: Folder that contains `proc`, `sys`, `etc` and `var`; for `conditions`.
        conditions_period_s: Time between readings of clocks and temperatures in seconds.

    Attributes:
        sensor: The power sensor.
        start_ns: Start of the block.
        times_ns: Time of arrival of each reading, ascending.
        readings: Results of `sensor.read`, one for each time.
        idle: Idle baselines, in order.
        looks: Time and `conditions`: on entering, at intervals, and on leaving.
        problems: Number of occurrences of each problem.
    """

    def __init__(self, sensor: PowerSensor, root: Path = Path("/"), *, conditions_period_s: float = 2.0) -> None:
        self.sensor, self.start_ns = sensor, time.monotonic_ns()
        self.times_ns, self.readings = list[int](), list[Mapping[str, float]]()
        self.idle, self.looks = list[Window](), list[tuple[int, Conditions]]()
        self.problems = collections.Counter[str]()
        self._root, self._conditions_period_s = root, conditions_period_s
        self._stop, self._card = threading.Event(), contextlib.ExitStack()
        self._thread = threading.Thread(target=self._run, name="power sensor", daemon=True)

    def __enter__(self) -> Recording:
        # Without a daemon that keeps the driver loaded, opening NVML may take a second, so it is opened only once.
        with contextlib.suppress(UnavailableError):
            self._card.enter_context(open_card())
        self._look()
        self.start_ns = time.monotonic_ns()
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._thread.join(_JOIN_S + self.sensor.period_s)
        if self._thread.is_alive():
            self.problems[f"the sensor did not answer for {_JOIN_S:g} s at the end: its last reading is missing"] += 1
        self._look()
        with contextlib.suppress(UnavailableError):
            self._card.close()

    def stay_idle(self, seconds: float) -> None:
        """Wait, and mark the time as idle; call it before and after the inferences, with the model loaded."""
        start = time.monotonic_ns()
        time.sleep(seconds)
        self.idle.append((start, time.monotonic_ns()))

    def seconds(self) -> Array:
        """Return the time of arrival of each reading, in seconds since the start [n]."""
        return (np.array(self.times_ns, dtype=np.int64) - self.start_ns) / 1e9

    def samples(self) -> dict[str, list[float]]:
        """Return all readings: `time_s` since the start, and `<rail>_w` or `<rail>_j` for each rail."""
        if not self.readings:
            return {}
        unit = "j" if self.sensor.counts else "w"
        columns = {f"{rail}_{unit}": [reading[rail] for reading in self.readings] for rail in self.readings[0]}
        return {"time_s": self.seconds().tolist(), **columns}

    def describe(self) -> dict[str, Any]:
        """Return the description of the sensor, seconds of the idle baselines and number of readings, for a result."""
        names = ("name", "total", "period_s", "averaging_s", "not_used")
        idle = [(end - start) / 1e9 for start, end in self.idle]
        return {name: getattr(self.sensor, name) for name in names} | {"idle_s": idle, "readings": len(self.readings)}

    def conditions(self, windows: Sequence[Window]) -> Observation:
        """Return the conditions before, during (within `windows`) and after the block, which must have ended."""
        (_, before), *between, (_, after) = self.looks
        during = [look for moment, look in between if any(start <= moment <= end for start, end in windows)]
        return summarise_conditions(before, during, after)

    def problem_counts(self) -> list[str]:
        """Return the problems, each with its number of occurrences."""
        return [text if count == 1 else f"{text} ({count} times)" for text, count in self.problems.items()]

    def _look(self) -> None:
        """Read clocks, temperatures and throttling."""
        self.looks.append((time.monotonic_ns(), conditions(self._root)))

    def _run(self) -> None:
        """Run the sampling thread."""
        try:
            self._sample()
        except Exception as error:  # A measurement must outlive its sensors.
            self.problems[f"the sampling thread died: {type(error).__name__}: {why(error)}"] += 1

    def _sample(self) -> None:
        """Take readings at a fixed period until the block ends."""
        deadline, period_s = time.monotonic(), self.sensor.period_s
        next_look = deadline + self._conditions_period_s
        while not self._stop.is_set():
            self._read()
            if time.monotonic() >= next_look:
                self._look()
                next_look = time.monotonic() + self._conditions_period_s
            # Deadlines keep the period independent of the time that a reading takes; missed readings are skipped.
            deadline = max(deadline + period_s, time.monotonic())
            self._stop.wait(deadline - time.monotonic())

    def _read(self) -> None:
        """Take one reading."""
        try:
            reading, moment = self.sensor.read(), time.monotonic_ns()
        except (OSError, ValueError, UnavailableError) as error:
            self.problems[why(error)] += 1
            return
        invalid = [rail for rail, value in reading.items() if not 0 <= value < math.inf]
        if invalid:
            self.problems[f"{', '.join(invalid)}: readings below zero or not finite were dropped"] += 1
        elif reading:
            self.times_ns.append(moment)
            self.readings.append(reading)
