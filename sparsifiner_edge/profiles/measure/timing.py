"""Timing of calls, used for all measurements; `stats.medians_in_turn` evaluates calls that were timed in turn."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable


def call_ms(call: Callable[[], object], runs: int, *, least_s: float = 0.0, warm_up: int = 0) -> list[float]:
    """Return the time of each call in milliseconds, for consecutive calls.

    Args:
        call: Function to time.
        runs: Minimum number of calls.
        least_s: Minimum total time in seconds.
        warm_up: Number of calls before, which are not timed.
    """
    for _ in range(warm_up):
        call()
    times, clock, begin = list[int](), time.perf_counter_ns, time.perf_counter()
    gc.disable()  # A garbage collection during a call would count as time of the model.
    try:
        while len(times) < runs or time.perf_counter() - begin < least_s:
            start = clock()
            call()
            times.append(clock() - start)
    finally:
        gc.enable()
    return [ns / 1e6 for ns in times]
