"""A measurement under observation: power, clocks, memory and other programs beside it, and the figures of each side."""

from __future__ import annotations

from typing import Any, NamedTuple

from sparsifiner_edge.profiles import flags, stats
from sparsifiner_edge.profiles.rules import Rules, mlperf_figures
from sparsifiner_edge.profiles.sensors import (
    PowerSensor,
    Recorder,
    Recording,
    energy,
    find_sensor,
    least_window_s,
    too_short,
)  # fmt: skip
from sparsifiner_edge.profiles.sensors.conditions import summarise_conditions
from sparsifiner_edge.profiles.sensors.find import no_sensor
from sparsifiner_edge.profiles.sides import Clock, Side, measure, warm_up
from sparsifiner_edge.profiles.usage import process_between, process_usage, snapshot, usage_between
from sparsifiner_edge.results import unavailable

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
        machine: see `usage.usage_between`. processes: by role, see `usage.process_between`.
        cut_short: why it ended before the rules were met; empty where they were.
        on: "cpu" or "gpu", where inferences ran.
    """

    rules: Rules
    order: list[str]
    recording: Recording
    machine: dict[str, Any]
    processes: dict[str, dict[str, Any]]
    cut_short: str
    on: str

    def conditions(self, side: Side) -> dict[str, Any]:
        """Clocks, temperatures and throttling before, during (while this side ran) and after."""
        during = [look for moment, look in self.recording.during if _within(moment, side.windows)]
        return summarise_conditions(self.recording.before, during, self.recording.after)


def _within(moment: int, windows: list[tuple[int, int]]) -> bool:
    return any(start <= moment <= end for start, end in windows)


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
    spent = sum(own_after[role]["cpu_s"] - own[role]["cpu_s"] for role in own)
    machine = usage_between(before, after, spent)
    processes = {side.role: process_between(own[side.role], own_after[side.role], side.queries) for side in sides}
    return Observation(rules, order, recorder.recording, machine, processes, _cut_short(sides, rules), on)


def _runs_on(side: Side) -> str:
    return "cpu" if side.request["backend"] == "onnxruntime" else "gpu"


def _idle_s(sensor: PowerSensor, rules: Rules) -> float:
    """Of a sensor that averages, its average of what was before must be over, and something left to read."""
    seconds = min(max(_IDLE_SHARE * rules.seconds, _IDLE_S[0]), _IDLE_S[1])
    return max(seconds, 2 * sensor.averaging_s + 1) if sensor.averaging_s else seconds


def _usages(sides: list[Side]) -> dict[str, dict[str, Any]]:
    """Of every worker, and of this process, which samples and waits."""
    return {side.role: side.worker.ask("usage", 60) for side in sides} | {"parent": process_usage()}


def _cut_short(sides: list[Side], rules: Rules) -> str:
    few = any(side.queries < rules.min_queries for side in sides)
    many = rules.enough_queries is not None and all(side.queries >= rules.enough_queries for side in sides)
    return f"max_seconds came before {rules.min_queries} queries" if few and not many else ""


def side_figures(side: Side, seen: Observation) -> dict[str, Any]:
    """A side's part of `statistics`; layers apart."""
    latency = side.latency_ms
    once = {name: value for name, value in side.load.items() if name.endswith(("_ms", "_bytes"))}
    figures = stats.summarise(latency) | {"queries": side.queries} | once | _memory(side)
    figures["energy"] = _energy(side, seen.recording)
    figures["usage"] = seen.processes[side.role] | seen.machine
    if side.parts_ms:
        figures["parts_ms"] = {name: stats.percentile(times, 0.5) for name, times in side.parts_ms.items()}
    if seen.rules.name == "mlperf":
        figures["mlperf"] = mlperf_figures(latency, seen.rules)
    figures["flags"] = _flags(side, seen)
    return figures


def _flags(side: Side, seen: Observation) -> list[flags.Flag]:
    return [
        *flags.length_flags(side.latency_ms, seen.cut_short),
        *flags.settling_flags(side.warm_up),
        *flags.spread_flags(side.latency_ms),
        *flags.part_flags(side.parts_ms),
        *flags.condition_flags(seen.conditions(side), seen.on),
        *_power_flags(side, seen.recording),
        *flags.usage_flags(seen.processes[side.role], seen.machine, side.queries),
    ]


def _power_flags(side: Side, recording: Recording) -> list[flags.Flag]:
    sensor = recording.sensor
    return flags.power_flags(too_short(recording, side.windows), least_window_s(sensor)) if sensor.available else []


def _energy(side: Side, recording: Recording) -> dict[str, Any]:
    if not recording.sensor.available:
        return unavailable(recording.sensor.total.removeprefix("unavailable: "))
    return energy(recording, side.windows, side.queries)


def _memory(side: Side) -> dict[str, Any]:
    """The phases, the device's memory in the steady one, and the whole process's figures at the end."""
    phases = side.memory.report()["phases"]
    steady = phases["steady"]
    sources = side.memory.report()["sources"]
    device, source = steady["device_bytes"], steady.get("device_source", sources["device_bytes"])
    if isinstance(steady["unified_bytes"], int):
        device, source = steady["unified_bytes"], sources["unified_bytes"]
    peaks = [phase["peak_rss_bytes"] for phase in phases.values() if isinstance(phase["peak_rss_bytes"], int)]
    whole = {
        "rss_bytes": steady["rss_bytes"],
        "pss_bytes": steady["pss_bytes"],
        "peak_rss_bytes": max(peaks) if peaks else steady["peak_rss_bytes"],
    }
    return whole | {"memory": phases | {"device_bytes": device, "device_source": source}}


def side_samples(side: Side) -> dict[str, Any]:
    """A side's part of `samples`: every latency, in blocks of `block_queries`, and times by part where told."""
    return {"latency_ms": side.latency_ms} | ({"parts_ms": side.parts_ms} if side.parts_ms else {})


def power_samples(seen: Observation) -> dict[str, Any]:
    """The power sensor's readings, where there are any."""
    readings = seen.recording.samples()
    return {"power": readings} if readings else {}
