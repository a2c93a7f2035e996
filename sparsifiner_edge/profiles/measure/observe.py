"""A measurement under observation: power, clocks, memory and other programs beside it, and the figures of each side."""

from __future__ import annotations

from typing import NamedTuple

from msgspec.structs import asdict

from sparsifiner_edge.profiles import flags, stats
from sparsifiner_edge.profiles.figures import Figures, Phases
from sparsifiner_edge.profiles.measure.memory import SOURCES, Memory
from sparsifiner_edge.profiles.measure.side import Clock, Side, measure, warm_up
from sparsifiner_edge.profiles.measure.usage import (
    ProcessUsage,
    Usage,
    process_usage,
    snapshot,
    usage_between,
    worker_usage,
)
from sparsifiner_edge.profiles.rules import Rules, mlperf_figures
from sparsifiner_edge.profiles.sensors import (
    Energy,
    PowerSensor,
    Recorder,
    Recording,
    Seen,
    energy,
    find_sensor,
    least_window_s,
    no_sensor,
    too_short,
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

    def conditions(self, side: Side) -> Seen:
        """Clocks, temperatures and throttling before, during (while this side ran) and after."""
        return self.recording.conditions(side.windows)


def observe(sides: list[Side], rules: Rules, clock: Clock, power: bool) -> Observation:
    """Warm every side up and measure it, with a sensor beside it.

    The idle baseline comes before warm-up, so that nothing cools down between warm-up and the first query.
    """
    on = _runs_on(sides[0])
    sensor = find_sensor(on=on) if power else no_sensor({"power": "not asked for"})
    idle_s = _idle_s(sensor, rules)
    look_s = min(max(_LOOK_SHARE * rules.seconds, _LOOK_S[0]), _LOOK_S[1])
    with Recorder(sensor, conditions_period_s=look_s) as recorder:
        if sensor.available:
            clock.tell("idling, for the baseline")
            recorder.idle(idle_s)
        for side in sides:
            warm_up(side, clock)
        own, before = _usages(sides), snapshot()
        order = measure(sides, rules, clock)
        after, own_after = snapshot(), _usages(sides)
        for side in sides:
            side.memory.end("steady")
        if sensor.available:
            clock.tell("idling, for the baseline")
            recorder.idle(idle_s)
    spent = sum(own_after[role].cpu_s - own[role].cpu_s for role in own)
    others = usage_between(before, after, spent)
    usage = {s.role: worker_usage(own[s.role], own_after[s.role], others, s.queries) for s in sides}
    return Observation(rules, order, recorder.recording, usage, _cut_short(sides, rules), on)


def _runs_on(side: Side) -> str:
    return "cpu" if side.request.backend == "onnxruntime" else "gpu"


def _idle_s(sensor: PowerSensor, rules: Rules) -> float:
    """Of a sensor that averages, its average of what was before must be over, and something left to read."""
    seconds = min(max(_IDLE_SHARE * rules.seconds, _IDLE_S[0]), _IDLE_S[1])
    return max(seconds, 2 * sensor.averaging_s + 1) if sensor.averaging_s else seconds


def _usages(sides: list[Side]) -> dict[str, ProcessUsage]:
    """Of every worker, and of this process, which samples and waits."""
    return {side.role: side.worker.ask("usage", 60, ProcessUsage) for side in sides} | {"parent": process_usage()}


def _cut_short(sides: list[Side], rules: Rules) -> str:
    few = any(side.queries < rules.min_queries for side in sides)
    many = rules.enough_queries is not None and all(side.queries >= rules.enough_queries for side in sides)
    return f"max_seconds came before {rules.min_queries} queries" if few and not many else ""


def side_figures(side: Side, seen: Observation, kernels: str | Unavailable) -> Figures:
    """A side's part of `statistics`, layers apart; `kernels` as its session describes them."""
    latency, memory = side.latency_ms, _phases(side)
    parts = {name: stats.percentile(times, 0.5) for name, times in side.parts_ms.items()}
    return Figures(
        **asdict(stats.summarise(latency)),
        **asdict(side.loaded.loading),
        **asdict(side.first),
        **asdict(_whole(side)),
        queries=side.queries,
        memory=memory,
        energy=_energy(side, seen.recording),
        usage=seen.usage[side.role],
        parts_ms=parts or None,
        mlperf=mlperf_figures(latency, seen.rules) if seen.rules.name == "mlperf" else None,
        flags=_flags(side, seen) + flags.kernel_flags(kernels),
    )


def _flags(side: Side, seen: Observation) -> list[flags.Flag]:
    return [
        *flags.length_flags(side.latency_ms, seen.cut_short),
        *settling(side),
        *flags.spread_flags(side.latency_ms),
        *flags.part_flags(side.parts_ms),
        *flags.condition_flags(seen.conditions(side), seen.on),
        *_power_flags(side, seen.recording),
        *flags.usage_flags(seen.usage[side.role], side.queries),
    ]


def _power_flags(side: Side, recording: Recording) -> list[flags.Flag]:
    sensor = recording.sensor
    return flags.power_flags(too_short(recording, side.windows), least_window_s(sensor)) if sensor.available else []


def settling(side: Side) -> list[flags.Flag]:
    """Flags of its warm-up."""
    return flags.settling_flags(side.warm_up.settled, side.warm_up.seconds, side.warm_up.queries)


def _energy(side: Side, recording: Recording) -> Known[Energy]:
    if not recording.sensor.available:
        return Unavailable(recording.sensor.total.removeprefix(f"{MISSING}: "))
    return energy(recording, side.windows, side.queries)


def _phases(side: Side) -> Phases:
    """Memory by phase, and the device's in the steady one."""
    steady = side.memory.phases["steady"]
    device, source = steady.device_bytes, steady.device_source or SOURCES["device_bytes"]
    if isinstance(steady.unified_bytes, int):
        device, source = steady.unified_bytes, SOURCES["unified_bytes"]
    return Phases(**side.memory.phases, device_bytes=device, device_source=source)


def _whole(side: Side) -> Memory:
    """The whole process's memory at the end, and its greatest peak."""
    phases = side.memory.phases
    steady = phases["steady"]
    peaks = [phase.peak_rss_bytes for phase in phases.values() if isinstance(phase.peak_rss_bytes, int)]
    peak = max(peaks) if peaks else steady.peak_rss_bytes
    return Memory(rss_bytes=steady.rss_bytes, pss_bytes=steady.pss_bytes, peak_rss_bytes=peak)
