"""What makes a measurement unreliable: one flag per reason, each with what was seen and what to do.

Every threshold stands in `THRESHOLDS`, with where it comes from.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from sparsifiner_edge.profiles.measure.side import WarmUp
from sparsifiner_edge.profiles.sensors.conditions import Seen
from sparsifiner_edge.profiles.stats import Series, percentile, quantile_interval
from sparsifiner_edge.records import Unavailable

THRESHOLDS: dict[str, float] = {
    # (p90 - p10) / p50 of the latency. Our choice: a quiet machine stays below .05, a shared one is well above .1.
    "spread": 0.10,
    # Medians of the first and the last third, their intervals apart. Our choice: what a settled warm-up may move by.
    "trend": 0.02,
    # Seconds: trtexec's default duration. Queries: the least that bound p90 at 99 %.
    "seconds": 3.0,
    "queries": 64,
    # Highest over lowest clock of the busiest core, or of the GPU, while queries ran. Our choice: as p50 moves.
    "clock": 0.05,
    # Cores that other programs kept busy. Our choice: an idle desktop stays below .05.
    "other_cores": 0.10,
}


class Flag(msgspec.Struct, frozen=True):
    """Why a measurement is unreliable: the reason's name, what was seen, what to do."""

    flag: str
    what: str
    do: str


def spread_flags(latency_ms: Series) -> list[Flag]:
    """ "unstable" where the latency scatters, and where it drifts."""
    values = np.asarray(latency_ms, dtype=np.float64)
    low, middle, high = (percentile(values, share) for share in (0.1, 0.5, 0.9))
    spread, trend = (high - low) / middle, _trend(values)
    seen = [f"p10 to p90 spans {spread:.0%} of the median"] if spread > THRESHOLDS["spread"] else []
    seen += [trend] if trend is not None else []
    return [Flag("unstable", what, "Close other programs, let the machine cool, and measure longer.") for what in seen]


def _trend(values: np.ndarray[Any, Any]) -> str | None:
    third = len(values) // 3
    if third < 20:
        return None
    first, last = values[:third], values[-third:]
    change = float(np.median(last) / np.median(first)) - 1
    slower = change > 0
    low_of_high = quantile_interval(last if slower else first, 0.5)[0]
    high_of_low = quantile_interval(first if slower else last, 0.5)[1]
    apart = low_of_high is not None and high_of_low is not None and low_of_high > high_of_low
    if not apart or abs(change) <= THRESHOLDS["trend"]:
        return None
    return f"the last third is {abs(change):.1%} {'slower' if slower else 'faster'} than the first"


def length_flags(latency_ms: Series, cut_short: str | None = None) -> list[Flag]:
    """ "too-short" where there are too few seconds, queries, or independent samples."""
    values = np.asarray(latency_ms, dtype=np.float64)
    seconds = float(values.sum()) / 1000
    reasons = [cut_short] if cut_short else []
    if seconds < THRESHOLDS["seconds"]:
        reasons.append(f"{seconds:.2g} s of queries, less than {THRESHOLDS['seconds']:.0f} s")
    if len(values) < THRESHOLDS["queries"]:
        reasons.append(f"{len(values)} queries, less than {THRESHOLDS['queries']:.0f}")
    if None in quantile_interval(values, 0.5):
        reasons.append("too few independent queries to bound the median")
    return [Flag("too-short", "; ".join(reasons), "Measure longer (--seconds).")] if reasons else []


def warm_up_flags(warm_up: WarmUp) -> list[Flag]:
    """ "not-warmed-up" where warm-up ended before the latency settled."""
    if warm_up.settled:
        return []
    what = f"after {warm_up.seconds:.1f} s and {warm_up.queries} queries of warm-up the latency still moved"
    return [Flag("not-warmed-up", what, "Close other programs, or fix the clocks, and measure again.")]


def kernel_flags(kernels: object) -> list[Flag]:
    """ "portable-kernels" where function bodies stand in for kernels that could not be used.

    Args:
        kernels: as a session's description says.
    """
    fixes = {
        "(the native library": "Repair the native library: sparsifiner-edge doctor says what it lacks.",
        "not the CUDA kernels": "This is a fallback: build an engine with --backend tensorrt and profile that.",
    }
    fix = next((fixes[part] for part in fixes if part in kernels), None) if isinstance(kernels, str) else None
    return [Flag("portable-kernels", f"sparse attention ran as {kernels}", fix)] if fix else []


def load_flags(other_cores: float | Unavailable) -> list[Flag]:
    """ "other-load" where other programs ran beside the measurement."""
    if isinstance(other_cores, Unavailable) or other_cores <= THRESHOLDS["other_cores"]:
        return []
    what = f"other programs kept {other_cores:.2f} of a core busy"
    return [Flag("other-load", what, "Close other programs, and measure again.")]


def condition_flags(conditions: Seen, on: str) -> list[Flag]:
    """ "throttled" and "clock-drift", from `sensors.conditions` before, during and after.

    Args:
        on: "cpu" or "gpu", where inferences run; the clock of an idle GPU does not matter.
    """
    found = []
    throttled = conditions.throttled_by
    if isinstance(throttled, list) and throttled:
        what = f"slowed down by {', '.join(throttled)}"
        found.append(Flag("throttled", what, "Cool it, raise its power mode, or take a stronger supply."))
    clocks = {"cpu_mhz": "the processor's clock"} | ({"gpu_mhz": "the GPU's clock"} if on == "gpu" else {})
    for key, name in clocks.items():
        clock = conditions.during.get(key, [0.0])
        lowest, highest = min(clock), max(clock)
        if lowest > 0 and highest / lowest - 1 > THRESHOLDS["clock"]:
            what = f"{name} went from {lowest:.0f} to {highest:.0f} MHz while queries ran"
            do = "Fix the clocks (jetson_clocks, nvidia-smi -lgc, the performance governor), and measure again."
            found.append(Flag("clock-drift", what, do))
    return found
