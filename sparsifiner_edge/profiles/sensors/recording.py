"""Reading a sensor beside a measurement: a thread of its own, in the process that does not measure."""

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
"""Start and end, nanoseconds of CLOCK_MONOTONIC (`time.monotonic_ns()`), which all processes of a machine share."""

_JOIN_S = 5.0


class Recording:
    """What a sensor and the machine told: a thread reads them for as long as its block lasts.

    Args:
        sensor: from `find_sensor`.
        root: where `proc`, `sys`, `etc` and `var` are; for `conditions`.
        conditions_period_s: time between looks at clocks and temperatures.

    Attributes:
        start_ns: of the block.
        times_ns: when each reading arrived, ascending. readings: of `sensor.read`, one for each time.
        idle: the idle baselines, in order.
        looks: time and `conditions`: on entering, now and then, and on leaving.
        problems: what went wrong, with how often.
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
        # Opening NVML may take a second where no daemon keeps the driver awake: once, not at each look.
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
        """Wait, and mark the time as idle: call it before and after the inferences, with the model loaded."""
        start = time.monotonic_ns()
        time.sleep(seconds)
        self.idle.append((start, time.monotonic_ns()))

    def seconds(self) -> Array:
        """When each reading arrived, since the start [n]."""
        return (np.array(self.times_ns, dtype=np.int64) - self.start_ns) / 1e9

    def samples(self) -> dict[str, list[float]]:
        """Every reading: `time_s` since the start, and by rail `<rail>_w` or `<rail>_j`."""
        if not self.readings:
            return {}
        unit = "j" if self.sensor.counts else "w"
        columns = {f"{rail}_{unit}": [reading[rail] for reading in self.readings] for rail in self.readings[0]}
        return {"time_s": self.seconds().tolist(), **columns}

    def describe(self) -> dict[str, Any]:
        """The sensor, seconds of the idle baselines, and how many readings there are; for a result."""
        names = ("name", "total", "period_s", "averaging_s", "not_used")
        idle = [(end - start) / 1e9 for start, end in self.idle]
        return {name: getattr(self.sensor, name) for name in names} | {"idle_s": idle, "readings": len(self.readings)}

    def conditions(self, windows: Sequence[Window]) -> Observation:
        """Before, during (within `windows`) and after. Once the block is left."""
        (_, before), *between, (_, after) = self.looks
        during = [look for moment, look in between if any(start <= moment <= end for start, end in windows)]
        return summarise_conditions(before, during, after)

    def problem_counts(self) -> list[str]:
        """The problems, each with its count."""
        return [text if count == 1 else f"{text} ({count} times)" for text, count in self.problems.items()]

    def _look(self) -> None:
        self.looks.append((time.monotonic_ns(), conditions(self._root)))

    def _run(self) -> None:
        try:
            self._sample()
        except Exception as error:  # A measurement must outlive its sensors.
            self.problems[f"the sampling thread died: {type(error).__name__}: {why(error)}"] += 1

    def _sample(self) -> None:
        deadline, period_s = time.monotonic(), self.sensor.period_s
        next_look = deadline + self._conditions_period_s
        while not self._stop.is_set():
            self._read()
            if time.monotonic() >= next_look:
                self._look()
                next_look = time.monotonic() + self._conditions_period_s
            # Deadlines, so that reading's own time does not stretch the period; after a delay none is caught up on.
            deadline = max(deadline + period_s, time.monotonic())
            self._stop.wait(deadline - time.monotonic())

    def _read(self) -> None:
        """Take one reading."""
        try:
            reading, moment = self.sensor.read(), time.monotonic_ns()
        except (OSError, ValueError, UnavailableError) as error:
            self.problems[why(error)] += 1
            return
        odd = [rail for rail, value in reading.items() if not 0 <= value < math.inf]
        if odd:
            self.problems[f"{', '.join(odd)} below zero, or no number: those readings were dropped"] += 1
        elif reading:
            self.times_ns.append(moment)
            self.readings.append(reading)
