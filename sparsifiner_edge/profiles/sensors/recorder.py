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
from typing import Literal

import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.profiles.sensors.base import PowerSensor, Reading, SensorDescription, UnavailableError, why
from sparsifiner_edge.profiles.sensors.conditions import Conditions, Seen, conditions, summarise_conditions
from sparsifiner_edge.profiles.sensors.nvml import nvml_device
from sparsifiner_edge.records import MISSING

Window = tuple[int, int]
"""Start and end, nanoseconds of CLOCK_MONOTONIC (`time.monotonic_ns()`), which all processes of a machine share."""

Columns = dict[str, list[float | str]]
"""Of a table, by name."""
_RETRY_S = 1.0
_JOIN_S = 5.0


@dataclasses.dataclass
class Recording:
    """What a `Recorder` saw.

    Attributes:
        sensor: what was read.
        start_ns, end_ns: from entering the recorder's block to leaving it.
        times_ns: when each reading arrived, ascending.
        readings: the readings, one for each time.
        idle: the idle baselines, in order.
        before, after: `conditions` on entering and leaving.
        during: time and `conditions`, taken now and then in between.
        problems: what went wrong, with how often.
    """

    sensor: PowerSensor
    start_ns: int
    end_ns: int = 0
    times_ns: list[int] = dataclasses.field(default_factory=list)
    readings: list[Reading] = dataclasses.field(default_factory=list)
    idle: list[Window] = dataclasses.field(default_factory=list)
    before: Conditions | None = None
    during: list[tuple[int, Conditions]] = dataclasses.field(default_factory=list)
    after: Conditions | None = None
    problems: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def series(self, rails: Sequence[str], kind: Literal["watts", "joules"]) -> tuple[Array, Array]:
        """Times [n] in ns and values [n, rails] of the readings that hold all of `rails`."""
        values = [[getattr(reading, kind).get(rail, math.nan) for rail in rails] for reading in self.readings]
        table = np.array(values, dtype=np.float64).reshape(len(values), len(rails))
        known = np.isfinite(table).all(axis=1) & bool(rails)
        return np.array(self.times_ns, dtype=np.int64)[known], table[known]

    def samples(self) -> Columns:
        """Every reading: `time_s` since the start, and by rail `<rail>_w` or `<rail>_j`; a gap is `MISSING`."""
        if not self.readings:
            return {}
        columns: Columns = {"time_s": [(moment - self.start_ns) / 1e9 for moment in self.times_ns]}
        for kind, unit in (("watts", "w"), ("joules", "j")):
            names = {rail: None for reading in self.readings for rail in getattr(reading, kind)}
            for rail in names:
                columns[f"{rail}_{unit}"] = [getattr(r, kind).get(rail, MISSING) for r in self.readings]
        return columns

    def described(self) -> SensorDescription:
        """The sensor, the idle baselines, and how many readings there are."""
        return self.sensor.describe([(end - start) / 1e9 for start, end in self.idle], len(self.readings))

    def conditions(self, windows: Sequence[Window]) -> Seen:
        """Before, during (within `windows`) and after. Once the recorder's block is left."""
        assert self.before is not None
        assert self.after is not None
        during = [look for moment, look in self.during if any(start <= moment <= end for start, end in windows)]
        return summarise_conditions(self.before, during, self.after)

    def told(self) -> list[str]:
        """The problems, each with its count."""
        return [text if count == 1 else f"{text} ({count} times)" for text, count in self.problems.items()]


class Recorder:
    """Reads a sensor in a thread for as long as its block lasts. Give every recorder a sensor of its own: it closes it.

    Args:
        sensor: from `find_sensor`.
        root: where `proc`, `sys`, `etc` and `var` are; for `conditions`.
        conditions_period_s: time between looks at clocks and temperatures.
    """

    def __init__(self, sensor: PowerSensor, root: Path = Path("/"), *, conditions_period_s: float = 2.0) -> None:
        self.recording = Recording(sensor, time.monotonic_ns())
        self._sensor = sensor
        self._root = root
        self._period_s = sensor.period_s
        self._conditions_period_s = conditions_period_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="power sensor", daemon=True)
        self._held = contextlib.ExitStack()
        self._held.callback(sensor.close)

    def __enter__(self) -> Recorder:
        # Opening NVML may take a second where no daemon keeps the driver awake: once, not at each look.
        with contextlib.suppress(UnavailableError):
            self._held.enter_context(nvml_device())
        self.recording.before = conditions(self._root)
        self.recording.start_ns = time.monotonic_ns()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(_JOIN_S + self._period_s)
        if self._thread.is_alive():
            self._tell(f"the sensor did not answer for {_JOIN_S:g} s at the end: its last reading is missing")
        self.recording.end_ns = time.monotonic_ns()
        self.recording.after = conditions(self._root)
        try:
            self._held.close()
        except Exception as failure:  # Whatever a driver does when it is let go of, the figures stand.
            self._tell(f"closing the sensor: {why(failure)}")

    def idle(self, seconds: float) -> None:
        """Wait, and mark the time as idle: call it before and after the inferences, with the model loaded."""
        start = time.monotonic_ns()
        time.sleep(seconds)
        self.recording.idle.append((start, time.monotonic_ns()))

    def _tell(self, problem: str) -> None:
        self.recording.problems[problem] += 1

    def _run(self) -> None:
        try:
            self._sample()
        except Exception as error:  # A measurement must outlive its sensors.
            self._tell(f"the sampling thread died: {type(error).__name__}: {why(error)}")

    def _sample(self) -> None:
        deadline = time.monotonic()
        next_conditions = deadline + self._conditions_period_s
        while not self._stop.is_set():
            wait_s = self._period_s if self._read() else max(self._period_s, _RETRY_S)
            if time.monotonic() >= next_conditions:
                self.recording.during.append((time.monotonic_ns(), conditions(self._root)))
                next_conditions = time.monotonic() + self._conditions_period_s
            # Deadlines, so that reading's own time does not stretch the period; after a delay none is caught up on.
            deadline = max(deadline + wait_s, time.monotonic())
            self._stop.wait(deadline - time.monotonic())

    def _read(self) -> bool:
        """Take one reading; False when the sensor gave none, so that a lost one is not asked at full rate."""
        if not self._sensor.available:
            return True
        try:
            reading = self._sensor.read()
        except (OSError, ValueError, UnavailableError) as error:
            self._tell(why(error))
            return False
        moment = time.monotonic_ns()
        for problem in reading.problems:
            self._tell(problem)
        self.recording.readings.append(Reading(self._checked(reading.watts), self._checked(reading.joules)))
        self.recording.times_ns.append(moment)
        return True

    def _checked(self, values: Mapping[str, float]) -> dict[str, float]:
        """Without values that cannot be."""
        kept = {rail: value for rail, value in values.items() if 0 <= value < math.inf}
        for rail in values.keys() - kept.keys():
            self._tell(f"{rail} reads below zero, or no number: those readings were dropped")
        return kept
