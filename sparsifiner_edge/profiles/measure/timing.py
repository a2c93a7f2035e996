"""How long calls take: the one way to time them. What several that took turns say is `stats.medians_in_turn`."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable


def call_ms(call: Callable[[], object], runs: int, *, least_s: float = 0.0, warm_up: int = 0) -> list[float]:
    """Milliseconds of each call, one after the other.

    Args:
        runs, least_s: at least this many runs, and this many seconds. warm_up: calls before, not timed.
    """
    for _ in range(warm_up):
        call()
    times, clock, begun = list[int](), time.perf_counter_ns, time.perf_counter()
    gc.disable()  # A collection inside one call would be Python's, not the model's.
    try:
        while len(times) < runs or time.perf_counter() - begun < least_s:
            start = clock()
            call()
            times.append(clock() - start)
    finally:
        gc.enable()
    return [ns / 1e6 for ns in times]
