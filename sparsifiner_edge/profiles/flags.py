"""Reasons why a measurement is unreliable: one flag per reason, with what was observed and what to do.

All thresholds are defined here, with their source.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np

from sparsifiner_edge.ops.kernels import FROM_PYTHON, LACKING, REBUILD
from sparsifiner_edge.profiles.measure.side import WarmUp
from sparsifiner_edge.profiles.sensors.conditions import Observation
from sparsifiner_edge.profiles.stats import Series, percentile, quantile_interval
from sparsifiner_edge.records import Unavailable

SCATTER = 0.10
"""Maximum scatter of the latency, (p90 - p10) / p50.

Our choice: a quiet machine stays below .05, a shared one is well above .1.
"""
TREND = 0.02
"""Maximum change of the median latency from the first to the last third, if their intervals do not overlap.

Our choice: the change that a settled warm-up may show.
"""
LEAST_SECONDS = 3.0
"""Minimum time of all queries in seconds: trtexec's default duration."""
LEAST_QUERIES = 64
"""Minimum number of queries: the smallest number that bounds p90 at 99 %."""
CLOCK = 0.05
"""Maximum relative change of the clock while queries ran. Our choice: p50 changes in proportion to the clock.

It applies to the busiest core, and to the GPU if it runs the inferences.
"""
OTHER_CORES = 0.10
"""Maximum number of cores that other programs keep busy. Our choice: an idle desktop stays below .05."""
_FALLBACKS = {
    LACKING: "Repair the native library: sparsifiner-edge doctor reports what is missing.",
    FROM_PYTHON: REBUILD,
    "not the CUDA kernels": "This is a fallback: build an engine with --backend tensorrt and profile it.",
}
"""Text in the description of a session that reports a fallback, and what to do."""


class Flag(msgspec.Struct, frozen=True):
    """Reason why a measurement is unreliable.

    Attributes:
        flag: Name of the reason.
        what: What was observed.
        do: What to do about it.
    """

    flag: str
    what: str
    do: str


def flags_of(
    latency_ms: Series,
    warm_up: WarmUp,
    conditions: Observation,
    on: str,
    others: float | Unavailable,
    kernels: object,
    cut_short: str | None = None,
) -> list[Flag]:
    """Return the flags of one side of a measurement.

    Args:
        latency_ms: Latency of every query in milliseconds.
        warm_up: Result of the warm-up.
        conditions: Clocks and throttling before, during and after the queries.
        on: Device of the inferences, "cpu" or "gpu"; the clock of a GPU that is not used is ignored.
        others: Number of cores that other programs kept busy.
        kernels: Kernels of the operators, as a session's description reports them.
        cut_short: Reason why the measurement ended before the rules were met.
    """
    values, flags = np.asarray(latency_ms, dtype=np.float64), list[Flag]()
    if short := "; ".join(_too_short(values, cut_short)):
        flags.append(Flag("too-short", short, "Measure longer (--seconds)."))
    if not warm_up.settled:
        what = f"the latency had not settled after {warm_up.seconds:.1f} s and {warm_up.queries} queries of warm-up"
        flags.append(Flag("not-warmed-up", what, "Close other programs, or fix the clocks, and measure again."))
    for what in _unstable(values):
        flags.append(Flag("unstable", what, "Close other programs, let the machine cool, and measure longer."))
    if isinstance(conditions.throttled_by, list) and conditions.throttled_by:
        what = f"slowed down by {', '.join(conditions.throttled_by)}"
        do = "Improve the cooling, choose a higher power mode, or use a stronger power supply."
        flags.append(Flag("throttled", what, do))
    for what in _drifting_clocks(conditions, on):
        do = "Fix the clocks (jetson_clocks, nvidia-smi -lgc, the performance governor), and measure again."
        flags.append(Flag("clock-drift", what, do))
    if isinstance(others, float) and others > OTHER_CORES:
        what = f"other programs kept {others:.2f} of a core busy"
        flags.append(Flag("other-load", what, "Close other programs, and measure again."))
    for part, do in _FALLBACKS.items():
        if part in str(kernels):
            flags.append(Flag("portable-kernels", f"sparse attention ran as {kernels}", do))
    return flags


def _too_short(values: np.ndarray[Any, Any], cut_short: str | None) -> Iterator[str]:
    """Yield a reason for each of: too few seconds, queries or independent samples."""
    seconds = float(values.sum()) / 1000
    if cut_short:
        yield cut_short
    if seconds < LEAST_SECONDS:
        yield f"{seconds:.2g} s of queries, less than {LEAST_SECONDS:.0f} s"
    if len(values) < LEAST_QUERIES:
        yield f"{len(values)} queries, less than {LEAST_QUERIES}"
    if None in quantile_interval(values, 0.5):
        yield "too few independent queries to bound the median"


def _unstable(values: np.ndarray[Any, Any]) -> Iterator[str]:
    """Yield a reason if the latency scatters, and another if it drifts."""
    low, middle, high = (percentile(values, share) for share in (0.1, 0.5, 0.9))
    if high - low > SCATTER * middle:
        yield f"p10 to p90 spans {(high - low) / middle:.0%} of the median"
    third = len(values) // 3
    if third < 20:
        return
    change = float(np.median(values[-third:]) / np.median(values[:third])) - 1
    faster, slower = (values[:third], values[-third:]) if change > 0 else (values[-third:], values[:third])
    low_of_slower, high_of_faster = quantile_interval(slower, 0.5)[0], quantile_interval(faster, 0.5)[1]
    apart = low_of_slower is not None and high_of_faster is not None and low_of_slower > high_of_faster
    if apart and abs(change) > TREND:
        yield f"the last third is {abs(change):.1%} {'slower' if change > 0 else 'faster'} than the first"


def _drifting_clocks(conditions: Observation, on: str) -> Iterator[str]:
    """Yield a reason for each clock that varied too much."""
    clocks = {"cpu_mhz": "the processor's clock"} | ({"gpu_mhz": "the GPU's clock"} if on == "gpu" else {})
    for key, name in clocks.items():
        lowest, highest = (bound(conditions.during.get(key, [0.0])) for bound in (min, max))
        if lowest > 0 and highest / lowest - 1 > CLOCK:
            yield f"{name} varied from {lowest:.0f} to {highest:.0f} MHz while queries ran"
