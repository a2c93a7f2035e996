"""Reading a sensor beside a measurement: a thread of its own, in the process that does not measure."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.profiles.sensors.conditions import Conditions, Seen, conditions, summarise_conditions
from sparsifiner_edge.profiles.sensors.nvml import open_card
from sparsifiner_edge.profiles.sensors.power import PowerSensor, SensorDescription, UnavailableError, why

Window = tuple[int, int]
"""Start and end, nanoseconds of CLOCK_MONOTONIC (`time.monotonic_ns()`), which all processes of a machine share."""

_JOIN_S = 5.0


@dataclasses.dataclass
class Recording:
    """What a `Recorder` saw.

    Attributes:
        sensor: what was read.
        start_ns: of the recorder's block.
        times_ns: when each reading arrived, ascending. readings: of `sensor.read`, one for each time.
        idle: the idle baselines, in order.
        looks: time and `conditions`: on entering, now and then, and on leaving.
        problems: what went wrong, with how often.
    """

    sensor: PowerSensor
    start_ns: int
    times_ns: list[int] = dataclasses.field(default_factory=list)
    readings: list[Mapping[str, float]] = dataclasses.field(default_factory=list)
    idle: list[Window] = dataclasses.field(default_factory=list)
    looks: list[tuple[int, Conditions]] = dataclasses.field(default_factory=list)
    problems: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

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

    def described(self) -> SensorDescription:
        """The sensor, the idle baselines, and how many readings there are."""
        sensor, idle = self.sensor, [(end - start) / 1e9 for start, end in self.idle]
        return SensorDescription(
            name=sensor.name, total=sensor.total, period_s=sensor.period_s, averaging_s=sensor.averaging_s,
            not_used=dict(sensor.not_used), idle_s=idle, readings=len(self.readings),
        )  # fmt: skip

    def conditions(self, windows: Sequence[Window]) -> Seen:
        """Before, during (within `windows`) and after. Once the recorder's block is left."""
        (_, before), *between, (_, after) = self.looks
        during = [look for moment, look in between if any(start <= moment <= end for start, end in windows)]
        return summarise_conditions(before, during, after)

    def told(self) -> list[str]:
        """The problems, each with its count."""
        return [text if count == 1 else f"{text} ({count} times)" for text, count in self.problems.items()]


class Recorder:
    """Reads a sensor in a thread for as long as its block lasts.

    Args:
        sensor: from `find_sensor`.
        root: where `proc`, `sys`, `etc` and `var` are; for `conditions`.
        conditions_period_s: time between looks at clocks and temperatures.
    """

    def __init__(self, sensor: PowerSensor, root: Path = Path("/"), *, conditions_period_s: float = 2.0) -> None:
        self.recording = Recording(sensor, time.monotonic_ns())
        self._sensor, self._root, self._conditions_period_s = sensor, root, conditions_period_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="power sensor", daemon=True)
        self._card = contextlib.ExitStack()

    def __enter__(self) -> Recorder:
        # Opening NVML may take a second where no daemon keeps the driver awake: once, not at each look.
        with contextlib.suppress(UnavailableError):
            self._card.enter_context(open_card())
        self._look()
        self.recording.start_ns = time.monotonic_ns()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(_JOIN_S + self._sensor.period_s)
        if self._thread.is_alive():
            self._tell(f"the sensor did not answer for {_JOIN_S:g} s at the end: its last reading is missing")
        self._look()
        with contextlib.suppress(UnavailableError):
            self._card.close()

    def idle(self, seconds: float) -> None:
        """Wait, and mark the time as idle: call it before and after the inferences, with the model loaded."""
        start = time.monotonic_ns()
        time.sleep(seconds)
        self.recording.idle.append((start, time.monotonic_ns()))

    def _tell(self, problem: str) -> None:
        self.recording.problems[problem] += 1

    def _look(self) -> None:
        self.recording.looks.append((time.monotonic_ns(), conditions(self._root)))

    def _run(self) -> None:
        try:
            self._sample()
        except Exception as error:  # A measurement must outlive its sensors.
            self._tell(f"the sampling thread died: {type(error).__name__}: {why(error)}")

    def _sample(self) -> None:
        deadline, period_s = time.monotonic(), self._sensor.period_s
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
            reading, moment = self._sensor.read(), time.monotonic_ns()
        except (OSError, ValueError, UnavailableError) as error:
            self._tell(why(error))
            return
        odd = [rail for rail, value in reading.items() if not 0 <= value < math.inf]
        if odd:
            self._tell(f"{', '.join(odd)} below zero, or no number: those readings were dropped")
        elif reading:
            self.recording.times_ns.append(moment)
            self.recording.readings.append(reading)
