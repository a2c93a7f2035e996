"""One bundle under measurement: its worker process, its warm-up, and its blocks of queries, alone or in turn."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import to_builtins

from sparsifiner_edge.bounds import MOST_COUNT, MOST_SECONDS
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.profiles.measure.memory import Bytes, device_bytes
from sparsifiner_edge.profiles.measure.worker import Loaded, QueryBlock
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.runtime.child import Child, start_child

LOAD_TIMEOUT_S = 900.0
"""Seconds that a worker may take to load or describe a bundle."""
_SETTLED = 0.02
"""Maximum relative difference between the medians of the last windows of a settled warm-up."""
_WARM_UP_S = 5.0
"""Approximate maximum duration of the warm-up in seconds."""
_WINDOW_MS = 100.0
"""Approximate duration of a warm-up window in milliseconds."""
_WINDOWS = 3
"""Number of consecutive windows that must agree."""
_BLOCK_MS = 200.0
"""Approximate maximum duration of a block in milliseconds."""
_REWARM_MS = 20.0
"""Minimum duration, in milliseconds, of the unrecorded queries that follow a block of another process.

That process's threads spin for a while, and the caches hold its data.
"""

OnStage = Callable[[str], None]
"""Callback that receives the name of the current stage."""
MIN_BLOCKS = 20
"""Minimum number of blocks: a comparison pairs blocks, and drift is detected across them."""

_SECONDS = 10.0
"""Default minimum time in queries, in seconds."""
_QUERIES = 64
"""Default minimum number of queries."""
_MOST = 6.0
"""Maximum wall time of a side relative to the minimum time; a comparison also runs queries that are not recorded."""


class Rules(msgspec.Struct, frozen=True):
    """Conditions under which a side has been measured long enough.

    Attributes:
        seconds: Minimum time in queries, in seconds.
        min_queries: Minimum number of queries.
        max_seconds: Maximum wall time in seconds, after which the measurement ends in any case.
        blocks: Minimum number of blocks.
    """

    seconds: float
    min_queries: int
    max_seconds: float
    blocks: int = MIN_BLOCKS

    def enough(self, seconds: float, queries: int, blocks: int, wall_s: float = 0.0) -> bool:
        """Return True if a side has been measured long enough.

        Args:
            seconds: Time in queries so far, in seconds.
            queries: Number of queries so far.
            blocks: Number of blocks so far.
            wall_s: Wall time so far in seconds.
        """
        done = seconds >= self.seconds and queries >= self.min_queries and blocks >= self.blocks
        return done or wall_s >= self.max_seconds


def make_rules(seconds: float | None = None, min_queries: int | None = None) -> Rules:
    """Return the rules for a minimum duration and number of queries, with six times the duration as maximum wall time.

    Args:
        seconds: Minimum time in queries, in seconds; None takes 10.
        min_queries: Minimum number of queries; None takes 64.

    Raises:
        ConfigError: A number is out of range.
    """
    if seconds is not None and not 0 < seconds <= MOST_SECONDS:
        raise ConfigError(f"seconds is {seconds}.", f"Give a number above 0, at most {MOST_SECONDS:g}.")
    if min_queries is not None and not 1 <= min_queries <= MOST_COUNT:
        raise ConfigError(f"min_queries is {min_queries}.", f"Give from 1 to {MOST_COUNT}.")
    seconds = seconds or _SECONDS
    return Rules(seconds, min_queries or _QUERIES, _MOST * seconds)


def start_worker() -> contextlib.AbstractContextManager[Child]:
    """Start a worker (see `worker.operations`), which is killed at the end of the `with` block."""
    fix = "If it ran out of memory, close other programs or use a smaller model."
    return start_child("sparsifiner_edge.profiles.measure.worker", "The measuring process", fix)


class WarmUp(msgspec.Struct, frozen=True, kw_only=True):
    """Result of a warm-up.

    Attributes:
        settled: True if the medians of the last windows agreed.
        queries: Number of queries.
        seconds: Duration in seconds.
    """

    settled: bool = False
    queries: int = 0
    seconds: float = 0.0


@dataclasses.dataclass
class MeasuredSide:
    """A bundle in a worker, and its measurements.

    Attributes:
        role: "subject" or "against".
        worker: Worker process.
        bundle: Bundle folder.
        loaded: Report of the worker after loading.
        device: Device memory in bytes that the bundle took, and the source of this value.
        query_ms: Time of a query in milliseconds; before the warm-up, that of the first inference.
        warm_up: Result of the warm-up.
        blocks: Latencies in milliseconds, by block.
        windows: Start and end of each block, in nanoseconds of CLOCK_MONOTONIC.
        seconds: Total latency of the recorded queries in seconds.
        queries: Number of recorded queries.
        wall_s: Wall time of the recorded blocks in seconds, including unrecorded queries.
    """

    role: str
    worker: Child
    bundle: Path
    loaded: Loaded
    device: tuple[Bytes, str]
    query_ms: float
    warm_up: WarmUp = dataclasses.field(default_factory=WarmUp)
    blocks: list[list[float]] = dataclasses.field(default_factory=list)
    windows: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    queries: int = 0
    wall_s: float = 0.0

    @property
    def latency_ms(self) -> list[float]:
        """Latency of every recorded query in milliseconds, in order."""
        return [ms for block in self.blocks for ms in block]

    def run(self, queries: int, rewarm: int = 0) -> QueryBlock:
        """Run one block.

        The timeout allows queries to be a hundred times slower than expected, but ends a hang.

        Args:
            queries: Number of recorded queries.
            rewarm: Number of unrecorded queries before them.
        """
        timeout = 60 + 0.1 * (queries + rewarm) * self.query_ms
        return self.worker.ask("block", timeout, QueryBlock, queries=queries, rewarm=rewarm)

    def record(self, queries: int, rewarm: int) -> None:
        """Run one block and store its measurements."""
        start = time.monotonic()
        latency_ms, window = self.run(queries, rewarm)
        self.blocks.append(latency_ms)
        self.windows.append(window)
        self.seconds += sum(latency_ms) / 1000
        self.queries += queries
        self.wall_s += time.monotonic() - start


def stage_progress(progress: Progress | None, planned_s: float) -> OnStage:
    """Convert a `Progress` callback in seconds to a callback for names of stages.

    Args:
        progress: Callback to convert; None reports nothing.
        planned_s: Planned duration in seconds, from now on.
    """
    start = time.monotonic()

    def on_stage(name: str) -> None:
        done = time.monotonic() - start
        if progress is not None:
            progress(name, done, max(planned_s, done))

    return on_stage


@contextlib.contextmanager
def open_side(role: str, bundle: Path, execution: Execution, on_stage: OnStage) -> Iterator[MeasuredSide]:
    """Load a bundle into a worker of its own and run it once."""
    on_stage(f"loading {bundle.name}")
    with start_worker() as worker:
        before, _ = device_bytes()
        loaded = worker.ask("load", LOAD_TIMEOUT_S, Loaded, **load_request(bundle, execution))
        after, source = device_bytes()  # Read before another side takes device memory.
        taken = max(0, after - before) if isinstance(after, int) and isinstance(before, int) else after
        yield MeasuredSide(role, worker, bundle, loaded, (taken, source), loaded.first_ms)


def load_request(bundle: Path, execution: Execution) -> dict[str, Any]:
    """Return the JSON-serializable arguments that make a worker load a bundle."""
    return {"bundle": str(bundle.resolve()), "execution": to_builtins(execution)}


def warm_up(side: MeasuredSide, on_stage: OnStage, most_s: float = _WARM_UP_S) -> None:
    """Run windows of about 100 ms until the medians of three consecutive windows agree within 2 %.

    Args:
        side: Side to warm up.
        on_stage: Callback for the current stage.
        most_s: Approximate maximum duration in seconds.
    """
    start = time.monotonic()
    side.query_ms = max(side.run(1)[0][0], 1e-3)
    window = max(1, round(_WINDOW_MS / side.query_ms))
    medians: list[float] = []
    settled = False
    while not settled and (time.monotonic() - start < most_s or not medians):
        medians.append(statistics.median(side.run(window)[0]))
        last = medians[-_WINDOWS:]
        settled = len(last) == _WINDOWS and max(last) <= min(last) * (1 + _SETTLED)
        on_stage(f"warming up {side.role}")
    side.warm_up = WarmUp(settled=settled, queries=1 + window * len(medians), seconds=time.monotonic() - start)
    side.query_ms = medians[-1]


def _queries(side: MeasuredSide, rules: Rules) -> int:
    """Return the number of queries in each block of a side."""
    return max(1, round(min(_BLOCK_MS, rules.seconds * 1000 / MIN_BLOCKS) / side.query_ms))


def planned_s(sides: Sequence[MeasuredSide], rules: Rules) -> float:
    """Return the seconds that `measure_blocks` is expected to take, from the queries of the warm-up."""
    queries = [_queries(side, rules) for side in sides]
    needed = [rules.seconds * 1000 / (count * side.query_ms) for side, count in zip(sides, queries, strict=True)]
    blocks = max(rules.blocks, *(math.ceil(each) for each in needed))
    each = [count + math.ceil(_REWARM_MS / side.query_ms) for side, count in zip(sides, queries, strict=True)]
    return blocks * sum(count * side.query_ms for side, count in zip(sides, each, strict=True)) / 1000


def measure_blocks(sides: list[MeasuredSide], rules: Rules, on_stage: OnStage, stage: str = "measuring") -> None:
    """Measure all sides, block by block in turn, until the rules are met."""
    random = np.random.default_rng()
    before: MeasuredSide | None = sides[0] if len(sides) == 1 else None
    while not all(rules.enough(s.seconds, s.queries, len(s.blocks), s.wall_s) for s in sides):
        first = sides[::-1] if random.integers(2) else sides
        for side in (*first, *first[::-1]):  # ABBA or BAAB: each side is first as often as second.
            rewarm = 0 if side is before else math.ceil(_REWARM_MS / side.query_ms)
            side.record(_queries(side, rules), rewarm)
            before = side
            on_stage(stage)
