"""Measurement of all sides with power, clocks, memory and other load, and the results of each side."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from sparsifiner_edge.errors import SparsifinerError
from sparsifiner_edge.profiles import stats
from sparsifiner_edge.profiles.figures import Figures, Method
from sparsifiner_edge.profiles.flags import flags_of
from sparsifiner_edge.profiles.measure.memory import PEAK, Bytes, process_bytes
from sparsifiner_edge.profiles.measure.side import LOAD_TIMEOUT_S, MeasuredSide, OnStage, Rules, measure_blocks, warm_up
from sparsifiner_edge.profiles.sensors import Energy, Recording, energy, find_sensor, no_sensor
from sparsifiner_edge.records import MISSING, Known, Unavailable
from sparsifiner_edge.runtime.session import Runtime

_IDLE_SHARE = 0.3
"""Duration of an idle baseline of the power sensor, relative to the measured time."""
_IDLE_S = (0.5, 3.0)
"""Minimum and maximum duration of an idle baseline in seconds."""
_LOOK_SHARE = 0.1
"""Time between readings of clocks and temperatures, relative to the measured time."""
_LOOK_S = (0.25, 2.0)
"""Minimum and maximum time between these readings in seconds."""


def observe(
    sides: list[MeasuredSide], rules: Rules, on_stage: OnStage, power: bool
) -> tuple[dict[str, Figures], Method, dict[str, list[float]]]:
    """Warm up and measure every side, while a sensor is read.

    The idle baseline comes before the warm-up, so that nothing cools down between the warm-up and the first query.

    Args:
        sides: One or two loaded bundles.
        rules: Conditions under which a side has been measured long enough.
        on_stage: Callback for the current stage.
        power: Read a power sensor, if there is one.

    Returns:
        Measurements by role, without times per layer; description of the measurement; readings of the sensor.
    """
    devices = ["cpu" if side.loaded.execution.on_processor else "gpu" for side in sides]
    sensor = (
        find_sensor(on=devices[0])
        if power and len(set(devices)) == 1
        else no_sensor({"power": "not requested, or the bundles run on different devices"})
    )
    with Recording(sensor, conditions_period_s=_share(rules, _LOOK_SHARE, _LOOK_S)) as recording:
        _idle(recording, rules, on_stage)
        for side in sides:
            warm_up(side, on_stage)
        before, busy, start = _processor_s(sides), busy_s(), time.monotonic()
        measure_blocks(sides, rules, on_stage)
        seconds, busy_after, after = time.monotonic() - start, busy_s(), _processor_s(sides)
        peaks = [process_bytes(PEAK, Path(f"/proc/{side.worker.pid}")) for side in sides]
        _idle(recording, rules, on_stage)
    others = other_cores(busy, busy_after, after - before, seconds)
    method = _method(sides, rules, recording)
    figures = {
        side.role: _figures(side, peak, recording, method, others, device)
        for side, peak, device in zip(sides, peaks, devices, strict=True)
    }
    return figures, method, recording.samples()


def _method(sides: list[MeasuredSide], rules: Rules, recording: Recording) -> Method:
    """Return the description of a measurement."""
    few = any(side.queries < rules.min_queries for side in sides)
    return Method(
        rules=rules,
        input_shapes=sides[0].loaded.input_shapes,
        runtime={side.role: _describe(side) for side in sides},
        warm_up={side.role: side.warm_up for side in sides},
        block_queries={side.role: len(side.blocks[0]) for side in sides},
        sensor=recording.describe(),
        conditions={side.role: recording.conditions(side.windows) for side in sides},
        problems=recording.problem_counts(),
        cut_short=f"{rules.max_seconds:g} s passed before {rules.min_queries} queries" if few else None,
    )


def _figures(
    side: MeasuredSide, peak: Bytes, recording: Recording, method: Method, others: float | Unavailable, on: str
) -> Figures:
    """Return the measurements of one side."""
    latency_ms, throughput = stats.summarise(side.latency_ms)
    conditions, kernels = method.conditions[side.role], method.runtime[side.role].kernels
    return Figures(
        latency_ms=latency_ms,
        throughput_per_s=throughput,
        queries=side.queries,
        load_ms=side.loaded.load_ms,
        first_inference_ms=side.loaded.first_ms,
        rss_before_load_bytes=side.loaded.rss_before_load_bytes,
        peak_memory_bytes=peak,
        device_bytes=side.device[0],
        device_source=side.device[1],
        energy=_joules(recording, side),
        other_cores=others,
        flags=flags_of(side.latency_ms, side.warm_up, conditions, on, others, kernels, method.cut_short),
    )


def _share(rules: Rules, share: float, bounds: tuple[float, float]) -> float:
    """Return a share of the measured time in seconds, within bounds."""
    return min(max(share * rules.seconds, bounds[0]), bounds[1])


def _idle(recording: Recording, rules: Rules, on_stage: OnStage) -> None:
    """Record an idle baseline.

    If the sensor averages, the baseline lasts until its average no longer contains earlier load, and for some readings
    more.
    """
    sensor = recording.sensor
    if sensor.available:
        on_stage("measuring idle power")
        seconds = _share(rules, _IDLE_SHARE, _IDLE_S)
        recording.stay_idle(max(seconds, 2 * sensor.averaging_s + 1) if sensor.averaging_s else seconds)


def _processor_s(sides: list[MeasuredSide]) -> float:
    """Return the processor seconds of all workers and of this process, which samples and waits, since they started."""
    return time.process_time() + sum(side.worker.ask("processor_s", 60, float) for side in sides)


def _describe(side: MeasuredSide) -> Runtime:
    """Return the description of the session, or the reason why there is none.

    It reads the model once more, which may fail if memory is short. The measurement is still valid then.
    """
    try:
        return side.worker.ask("describe", LOAD_TIMEOUT_S, Runtime)
    except SparsifinerError as error:
        why = Unavailable(error.what)
        return Runtime(backend=why, version=why, provider=why, device=why, precision=why, kernels=why, threads=why)


def _joules(recording: Recording, side: MeasuredSide) -> Known[Energy]:
    """Return the energy of a side, or the reason why it is unknown."""
    if recording.sensor.available:
        return energy(recording, side.windows, side.queries)
    return Unavailable(recording.sensor.total.removeprefix(f"{MISSING}: "))


_BUSY_FIELDS = (0, 1, 2, 5, 6, 7)
"""Fields of a line of /proc/stat: user, nice, system, irq, softirq and steal (proc(5)); guests are part of user."""


def busy_s(root: Path = Path("/")) -> float | None:
    """Return the processor seconds of all programs since boot, on the cores that this process may use.

    Args:
        root: Folder that contains `proc`; for tests.

    Returns:
        The seconds; None if /proc does not report them.
    """
    try:
        text = (root / "proc/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    lines = dict(re.findall(r"^cpu(\d+) (.+)$", text, re.MULTILINE))
    cores = [lines[str(core)].split() for core in os.sched_getaffinity(0) if str(core) in lines]
    ticks = [int(core[field]) for core in cores for field in _BUSY_FIELDS if field < len(core)]
    return sum(ticks) / os.sysconf("SC_CLK_TCK") if ticks else None


def other_cores(before: float | None, after: float | None, our_s: float, seconds: float) -> float | Unavailable:
    """Return the number of cores that other programs kept busy, among those that this process may use.

    Other virtual machines on the host count as other programs.

    Args:
        before: Result of `busy_s` at the start.
        after: Result of `busy_s` at the end.
        our_s: Processor seconds of all processes of the measurement in between.
        seconds: Time between start and end in seconds.
    """
    if before is None or after is None:
        return Unavailable("/proc/stat is not readable")
    return max(0.0, (after - before - our_s) / seconds)
