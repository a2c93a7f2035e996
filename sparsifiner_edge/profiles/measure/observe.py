"""A measurement under observation: power, clocks, memory and other programs beside it, and the figures of each side."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import asdict

from sparsifiner_edge.profiles import flags, stats
from sparsifiner_edge.profiles.figures import Figures, MeasuredMemory
from sparsifiner_edge.profiles.measure.memory import read_memory
from sparsifiner_edge.profiles.measure.side import MeasuredSide, OnStage, Rules, measure_blocks, warm_up
from sparsifiner_edge.profiles.sensors import Energy, PowerSensor, Recorder, Recording, energy, find_sensor, no_sensor
from sparsifiner_edge.records import MISSING, Known, Unavailable

_IDLE_S, _IDLE_SHARE = (0.5, 3.0), 0.3
"""Idle baselines, where there is a power sensor: a share of the measured time, within these bounds."""
_LOOK_S, _LOOK_SHARE = (0.25, 2.0), 0.1
"""Time between looks at clocks and temperatures, likewise."""


class Observation(NamedTuple):
    """What was seen while sides were measured.

    Attributes:
        order: who was first in each round. recording: the power sensor's and conditions.
        memory: by role. other_cores: that other programs kept busy.
        cut_short: why it ended before the rules were met; empty where they were.
        on: "cpu" or "gpu", where inferences ran.
    """

    order: list[str]
    recording: Recording
    memory: dict[str, MeasuredMemory]
    other_cores: float | Unavailable
    cut_short: str
    on: str


def observe(sides: list[MeasuredSide], rules: Rules, on_stage: OnStage, power: bool) -> Observation:
    """Warm every side up and measure it, with a sensor beside it.

    The idle baseline comes before warm-up, so that nothing cools down between warm-up and the first query.
    """
    on = "cpu" if sides[0].request.execution.on_processor else "gpu"
    sensor = find_sensor(on=on) if power else no_sensor({"power": "not asked for"})
    with Recorder(sensor, conditions_period_s=_share(rules, _LOOK_SHARE, _LOOK_S)) as recorder:
        _idle(recorder, sensor, rules, on_stage)
        for side in sides:
            warm_up(side, on_stage)
        before, busy, start = _processor_s(sides), busy_s(), time.monotonic()
        order = measure_blocks(sides, rules, on_stage)
        seconds, busy_after, after = time.monotonic() - start, busy_s(), _processor_s(sides)
        memory = {side.role: _memory(side) for side in sides}
        _idle(recorder, sensor, rules, on_stage)
    others = other_cores(busy, busy_after, after - before, seconds)
    few = any(len(side.latency_ms) < rules.min_queries for side in sides)
    cut_short = f"{rules.max_seconds:g} s came before {rules.min_queries} queries" if few else ""
    return Observation(order, recorder.recording, memory, others, cut_short, on)


def _share(rules: Rules, share: float, bounds: tuple[float, float]) -> float:
    return min(max(share * rules.seconds, bounds[0]), bounds[1])


def _idle(recorder: Recorder, sensor: PowerSensor, rules: Rules, on_stage: OnStage) -> None:
    """Of a sensor that averages, its average of what was before must be over, and something left to read."""
    if sensor.available:
        on_stage("idling, for the baseline")
        seconds = _share(rules, _IDLE_SHARE, _IDLE_S)
        recorder.idle(max(seconds, 2 * sensor.averaging_s + 1) if sensor.averaging_s else seconds)


def _processor_s(sides: list[MeasuredSide]) -> float:
    """Of every worker, and of this process, which samples and waits, since they started."""
    return time.process_time() + sum(side.worker.ask("processor_s", 60, float) for side in sides)


def _memory(side: MeasuredSide) -> MeasuredMemory:
    process, (device_bytes, source) = read_memory(Path(f"/proc/{side.worker.pid}")), side.device
    return MeasuredMemory(steady=process, device_bytes=device_bytes, device_source=source)


def side_figures(side: MeasuredSide, seen: Observation, kernels: object) -> Figures:
    """A side's part of `statistics`, layers apart; `kernels` as its session describes them."""
    latency, recording = side.latency_ms, seen.recording
    joules: Known[Energy] = Unavailable(recording.sensor.total.removeprefix(f"{MISSING}: "))
    if recording.sensor.available:
        joules = energy(recording, side.windows, len(latency))
    return Figures(
        **asdict(stats.summarise(latency)),
        load_ms=side.loaded.load_ms,
        rss_before_load_bytes=side.loaded.rss_before_load_bytes,
        first_inference_ms=side.loaded.first_ms,
        queries=len(latency),
        memory=seen.memory[side.role],
        energy=joules,
        other_cores=seen.other_cores,
        flags=[
            *flags.length_flags(latency, seen.cut_short),
            *flags.warm_up_flags(side.warm_up),
            *flags.spread_flags(latency),
            *flags.condition_flags(recording.conditions(side.windows), seen.on),
            *flags.load_flags(seen.other_cores),
            *flags.kernel_flags(kernels),
        ],
    )


_BUSY_FIELDS = (0, 1, 2, 5, 6, 7)
"""user, nice, system, irq, softirq and steal of a line of /proc/stat (proc(5)); guests are part of user."""


def busy_s(root: Path = Path("/")) -> float | None:
    """Processor seconds since boot, of anything, on the cores that this process may use; None: /proc does not tell.

    Args:
        root: where `proc` is; tests give a made-up tree.
    """
    try:
        text = (root / "proc/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    lines = dict(re.findall(r"^cpu(\d+) (.+)$", text, re.MULTILINE))
    cores = [lines[str(core)].split() for core in os.sched_getaffinity(0) if str(core) in lines]
    ticks = [int(core[field]) for core in cores for field in _BUSY_FIELDS if field < len(core)]
    return sum(ticks) / os.sysconf("SC_CLK_TCK") if ticks else None


def other_cores(before: float | None, after: float | None, own_s: float, seconds: float) -> float | Unavailable:
    """Cores that other programs kept busy, of those that this process may use; other virtual machines count.

    Args:
        before, after: of `busy_s`, `seconds` apart.
        own_s: processor seconds that the measurement itself used in between, all of its processes together.
    """
    if before is None or after is None:
        return Unavailable("/proc/stat is not readable")
    return max(0.0, (after - before - own_s) / seconds)
