"""What makes a measurement unreliable: one flag per reason, each with what was seen and what to do.

Every threshold stands here, with where it comes from.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np

from sparsifiner_edge.ops.kernels import LACKING
from sparsifiner_edge.profiles.measure.side import WarmUp
from sparsifiner_edge.profiles.sensors.conditions import Observation
from sparsifiner_edge.profiles.stats import Series, percentile, quantile_interval
from sparsifiner_edge.records import Unavailable

SCATTER = 0.10
"""(p90 - p10) / p50 of the latency. Our choice: a quiet machine stays below .05, a shared one is well above .1."""
TREND = 0.02
"""Medians of the first and the last third, their intervals apart. Our choice: what a settled warm-up may move by."""
LEAST_SECONDS, LEAST_QUERIES = 3.0, 64
"""trtexec's default duration; the least queries that bound p90 at 99 %."""
CLOCK = 0.05
"""Highest over lowest clock of the busiest core, or of the GPU, while queries ran. Our choice: as p50 moves."""
OTHER_CORES = 0.10
"""Cores that other programs kept busy. Our choice: an idle desktop stays below .05."""
_FALLBACKS = {
    LACKING: "Repair the native library: sparsifiner-edge doctor says what it lacks.",
    "not the CUDA kernels": "This is a fallback: build an engine with --backend tensorrt and profile that.",
}
"""What a session says of kernels that it could not use, and what to do."""


class Flag(msgspec.Struct, frozen=True):
    """Why a measurement is unreliable: the reason's name, what was seen, what to do."""

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
    """Of one side.

    Args:
        conditions: before, during and after. on: "cpu" or "gpu", where inferences run (an idle GPU's clock is ignored).
        others: cores that other programs kept busy. kernels: as a session's description says.
        cut_short: why it ended before the rules were met.
    """
    values, flags = np.asarray(latency_ms, dtype=np.float64), list[Flag]()
    if short := "; ".join(_too_short(values, cut_short)):
        flags.append(Flag("too-short", short, "Measure longer (--seconds)."))
    if not warm_up.settled:
        what = f"after {warm_up.seconds:.1f} s and {warm_up.queries} queries of warm-up the latency still moved"
        flags.append(Flag("not-warmed-up", what, "Close other programs, or fix the clocks, and measure again."))
    for what in _unstable(values):
        flags.append(Flag("unstable", what, "Close other programs, let the machine cool, and measure longer."))
    if isinstance(conditions.throttled_by, list) and conditions.throttled_by:
        what = f"slowed down by {', '.join(conditions.throttled_by)}"
        flags.append(Flag("throttled", what, "Cool it, raise its power mode, or take a stronger supply."))
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
    """Too few seconds, queries, or independent samples."""
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
    """That the latency scatters, and that it drifts."""
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
    clocks = {"cpu_mhz": "the processor's clock"} | ({"gpu_mhz": "the GPU's clock"} if on == "gpu" else {})
    for key, name in clocks.items():
        lowest, highest = (bound(conditions.during.get(key, [0.0])) for bound in (min, max))
        if lowest > 0 and highest / lowest - 1 > CLOCK:
            yield f"{name} went from {lowest:.0f} to {highest:.0f} MHz while queries ran"
