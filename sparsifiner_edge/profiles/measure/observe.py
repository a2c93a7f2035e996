"""A measurement under observation: power, clocks, memory and other programs beside it, and the figures of each side."""

from __future__ import annotations

import time
from typing import NamedTuple

from msgspec.structs import asdict

from sparsifiner_edge.machine import available_cores
from sparsifiner_edge.profiles import flags, stats
from sparsifiner_edge.profiles.figures import Figures, Phases
from sparsifiner_edge.profiles.measure.memory import DEVICE_SOURCE, UNIFIED_SOURCE, Memory
from sparsifiner_edge.profiles.measure.resource_usage import ProcessUsage, Usage, busy_s, other_cores, process_usage
from sparsifiner_edge.profiles.measure.side import MeasuredSide, OnStage, measure_blocks, warm_up
from sparsifiner_edge.profiles.rules import Rules
from sparsifiner_edge.profiles.sensors import (
    Energy,
    PowerSensor,
    Recorder,
    Recording,
    Seen,
    energy,
    find_sensor,
    no_sensor,
)  # fmt: skip
from sparsifiner_edge.records import MISSING, Known, Unavailable

_IDLE_S = (0.5, 3.0)
_IDLE_SHARE = 0.3
"""Idle baselines, where there is a power sensor: a share of the measured time, within these bounds."""
_LOOK_S = (0.25, 2.0)
_LOOK_SHARE = 0.1
"""Time between looks at clocks and temperatures, likewise."""


class Observation(NamedTuple):
    """What was seen while sides were measured.

    Attributes:
        rules: what was asked for. order: who was first in each round. recording: the power sensor's and conditions.
        usage: by role.
        cut_short: why it ended before the rules were met; empty where they were.
        on: "cpu" or "gpu", where inferences ran.
    """

    rules: Rules
    order: list[str]
    recording: Recording
    usage: dict[str, Usage]
    cut_short: str
    on: str

    def conditions(self, side: MeasuredSide) -> Seen:
        """Clocks, temperatures and throttling before, during (while this side ran) and after."""
        return self.recording.conditions(side.windows)


def observe(sides: list[MeasuredSide], rules: Rules, on_stage: OnStage, power: bool) -> Observation:
    """Warm every side up and measure it, with a sensor beside it.

    The idle baseline comes before warm-up, so that nothing cools down between warm-up and the first query.
    """
    on = "cpu" if sides[0].request.execution.on_processor else "gpu"
    sensor = find_sensor(on=on) if power else no_sensor({"power": "not asked for"})
    idle_s = _idle_s(sensor, rules)
    look_s = min(max(_LOOK_SHARE * rules.seconds, _LOOK_S[0]), _LOOK_S[1])
    with Recorder(sensor, conditions_period_s=look_s) as recorder:
        if sensor.available:
            on_stage("idling, for the baseline")
            recorder.idle(idle_s)
        for side in sides:
            warm_up(side, on_stage)
        own, busy, start = _usages(sides), busy_s(), time.monotonic()
        order = measure_blocks(sides, rules, on_stage)
        seconds, busy_after, own_after = time.monotonic() - start, busy_s(), _usages(sides)
        for side in sides:
            side.memory.end("steady")
        if sensor.available:
            on_stage("idling, for the baseline")
            recorder.idle(idle_s)
    spent = {role: used.cpu_s - own[role].cpu_s for role, used in own_after.items()}
    others = other_cores(busy, busy_after, sum(spent.values()), seconds)
    usage = {
        side.role: Usage(
            cpu_s=spent[side.role],
            major_faults=own_after[side.role].major_faults - own[side.role].major_faults,
            other_cores=others,
            allowed_cores=available_cores(),
        )
        for side in sides
    }
    return Observation(rules, order, recorder.recording, usage, _cut_short(sides, rules), on)


def _idle_s(sensor: PowerSensor, rules: Rules) -> float:
    """Of a sensor that averages, its average of what was before must be over, and something left to read."""
    seconds = min(max(_IDLE_SHARE * rules.seconds, _IDLE_S[0]), _IDLE_S[1])
    return max(seconds, 2 * sensor.averaging_s + 1) if sensor.averaging_s else seconds


def _usages(sides: list[MeasuredSide]) -> dict[str, ProcessUsage]:
    """Of every worker, and of this process, which samples and waits."""
    return {side.role: side.worker.ask("usage", 60, ProcessUsage) for side in sides} | {"parent": process_usage()}


def _cut_short(sides: list[MeasuredSide], rules: Rules) -> str:
    few = any(side.queries < rules.min_queries for side in sides)
    return f"max_seconds came before {rules.min_queries} queries" if few else ""


def side_figures(side: MeasuredSide, seen: Observation, kernels: str | Unavailable) -> Figures:
    """A side's part of `statistics`, layers apart; `kernels` as its session describes them."""
    latency, recording = side.latency_ms, seen.recording
    parts = {name: stats.percentile(times, 0.5) for name, times in side.parts_ms.items()}
    joules: Known[Energy] = Unavailable(recording.sensor.total.removeprefix(f"{MISSING}: "))
    if recording.sensor.available:
        joules = energy(recording, side.windows, side.queries)
    return Figures(
        **asdict(stats.summarise(latency)),
        import_ms=side.loaded.import_ms,
        load_ms=side.loaded.load_ms,
        rss_before_load_bytes=side.loaded.rss_before_load_bytes,
        first_inference_ms=side.first_ms,
        **asdict(_whole(side)),
        queries=side.queries,
        memory=_phases(side),
        energy=joules,
        usage=seen.usage[side.role],
        parts_ms=parts or None,
        flags=[
            *flags.length_flags(latency, seen.cut_short),
            *flags.warm_up_flags(side.warm_up),
            *flags.spread_flags(latency),
            *flags.part_flags(side.parts_ms),
            *flags.condition_flags(seen.conditions(side), seen.on),
            *flags.power_flags(recording, side.windows),
            *flags.usage_flags(seen.usage[side.role], side.queries),
            *flags.kernel_flags(kernels),
        ],
    )


def _phases(side: MeasuredSide) -> Phases:
    """Memory by phase, and the device's in the steady one."""
    steady = side.memory.phases["steady"]
    device, source = steady.device_bytes, steady.device_source or DEVICE_SOURCE
    if isinstance(steady.unified_bytes, int):
        device, source = steady.unified_bytes, UNIFIED_SOURCE
    return Phases(**side.memory.phases, device_bytes=device, device_source=source)


def _whole(side: MeasuredSide) -> Memory:
    """The whole process's memory at the end, and its greatest peak."""
    phases = side.memory.phases
    steady = phases["steady"]
    peaks = [phase.peak_rss_bytes for phase in phases.values() if isinstance(phase.peak_rss_bytes, int)]
    peak = max(peaks) if peaks else steady.peak_rss_bytes
    return Memory(rss_bytes=steady.rss_bytes, pss_bytes=steady.pss_bytes, peak_rss_bytes=peak)
