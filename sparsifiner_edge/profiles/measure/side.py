"""One bundle under measurement: its worker, its warm-up, and its blocks of queries, alone or in turn with another's."""

from __future__ import annotations

import dataclasses
import statistics
import time

import msgspec
import numpy as np
from msgspec.structs import asdict

from sparsifiner_edge.profiles.measure.client import Worker
from sparsifiner_edge.profiles.measure.memory import MemoryPhases
from sparsifiner_edge.profiles.measure.worker import First, Load, Loaded, QueryBlock
from sparsifiner_edge.profiles.rules import MIN_BLOCKS, Rules
from sparsifiner_edge.progress import Progress

LOAD_TIMEOUT_S = 900.0
_SETTLED = 0.02
_WARM_UP_S = 5.0
_WINDOW_MS = 100.0
_WINDOWS = 3
_BLOCK_MS = 200.0
# After the other process ran, its threads still spin for some milliseconds and the caches hold its data.
_REWARM_MS = 20.0


class WarmUp(msgspec.Struct, frozen=True, kw_only=True):
    """How warm-up went: whether the medians of windows settled, and what was run."""

    settled: bool
    queries: int
    seconds: float
    window_queries: int
    window_medians_ms: list[float]


COLD = WarmUp(settled=False, queries=0, seconds=0.0, window_queries=0, window_medians_ms=[])


@dataclasses.dataclass
class MeasuredSide:
    """A bundle in a worker, and what was measured of it.

    Attributes:
        role: "subject" or "against"; of a sweep the point.
        worker: its process. request: what it was asked to load.
        loaded, first: what loading and the first inference reported. memory: its phases so far.
        warm_up: how warm-up went; `COLD` before. query_ms: a query's time after it.
        blocks: latencies in ms, block by block. windows: start and end of each block, CLOCK_MONOTONIC nanoseconds.
        parts_ms: times by part of each query, where the session gives them.
        seconds, queries: how much was recorded.
    """

    role: str
    worker: Worker
    request: Load
    loaded: Loaded
    first: First
    memory: MemoryPhases
    warm_up: WarmUp = COLD
    query_ms: float = 0.0
    blocks: list[list[float]] = dataclasses.field(default_factory=list)
    windows: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    parts_ms: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    queries: int = 0

    @property
    def latency_ms(self) -> list[float]:
        """Every query's latency, in order."""
        return [ms for block in self.blocks for ms in block]

    @property
    def rewarm(self) -> int:
        """Queries that are run and not recorded after the other side had its turn."""
        return int(_REWARM_MS / self.query_ms)

    def run(self, queries: int, rewarm: int = 0) -> QueryBlock:
        """Run one block. A hundredfold slowdown is still waited for; a hang is not."""
        timeout = 60 + 0.1 * (queries + rewarm) * (self.query_ms or self.first.first_inference_ms)
        return self.worker.ask("block", timeout, QueryBlock, queries=queries, rewarm=rewarm)

    def record(self, queries: int, rewarm: int) -> None:
        """Run one block and keep it."""
        block = self.run(queries, rewarm)
        self.blocks.append(block.latency_ms)
        self.seconds += sum(block.latency_ms) / 1000
        self.queries += queries
        self.windows.append(block.window_ns)
        for name, times in block.parts_ms.items():
            self.parts_ms.setdefault(name, []).extend(times)


class TimedProgress:
    """Progress in seconds, done and planned over the whole measurement, for a bar with the time left."""

    def __init__(self, progress: Progress | None, planned_s: float) -> None:
        self._progress = progress or (lambda *_: None)
        self._start = time.monotonic()
        self._planned = planned_s

    def plan(self, seconds_left: float) -> None:
        """How long it takes from here on."""
        self._planned = time.monotonic() - self._start + seconds_left

    def stage(self, name: str) -> None:
        """Report what is going on."""
        done = time.monotonic() - self._start
        self._progress(name, done, max(self._planned, done))


def load_side(role: str, worker: Worker, request: Load) -> MeasuredSide:
    """Load a bundle into a fresh worker and run it once, following its memory."""
    memory = MemoryPhases(worker.pid)
    loaded = worker.ask("load", LOAD_TIMEOUT_S, Loaded, **asdict(request))
    memory.end("load")
    first = worker.ask("first", LOAD_TIMEOUT_S, First)
    memory.end("first_inference")
    return MeasuredSide(role, worker, request, loaded, first, memory)


def warm_up(side: MeasuredSide, progress: TimedProgress) -> None:
    """Run windows of about 100 ms until three medians in a row lie within 2 %, for about 5 s at most."""
    start = time.monotonic()
    side.query_ms = max(side.run(1).latency_ms[0], 1e-3)
    window = max(1, round(_WINDOW_MS / side.query_ms))
    medians: list[float] = []
    settled = False
    while not settled and (time.monotonic() - start < _WARM_UP_S or not medians):
        medians.append(statistics.median(side.run(window).latency_ms))
        last = medians[-_WINDOWS:]
        settled = len(last) == _WINDOWS and max(last) <= min(last) * (1 + _SETTLED)
        progress.stage(f"warming up {side.role}")
    side.warm_up = WarmUp(
        settled=settled,
        queries=1 + window * len(medians),
        seconds=time.monotonic() - start,
        window_queries=window,
        window_medians_ms=medians,
    )
    side.query_ms = medians[-1]


def measure_blocks(sides: list[MeasuredSide], rules: Rules, progress: TimedProgress) -> list[str]:
    """Fill every side's blocks; returns who was first in each round, such as ["subject", "against"]."""
    block_ms = min(_BLOCK_MS, rules.seconds * 1000 / MIN_BLOCKS)
    sizes = {side.role: max(1, round(block_ms / side.query_ms)) for side in sides}
    rewarm = {side.role: side.rewarm if len(sides) > 1 else 0 for side in sides}
    random = np.random.default_rng(rules.seed)
    order: list[str] = []
    wall = dict.fromkeys(sizes, 0.0)
    progress.plan(sum(rules.expected_s(side.query_ms) * (1 + rewarm[side.role] / sizes[side.role]) for side in sides))
    while not all(_enough(side, wall[side.role], rules) for side in sides):
        first = sides[::-1] if random.integers(2) else sides
        for turn in (first, first[::-1]):  # ABBA or BAAB: each side is first as often as second.
            for side in turn:
                start = time.monotonic()
                side.record(sizes[side.role], rewarm[side.role])
                wall[side.role] += time.monotonic() - start
                progress.stage("measuring")
            order.append(turn[0].role)
    return order


def _enough(side: MeasuredSide, wall_s: float, rules: Rules) -> bool:
    done = rules.enough(side.seconds, side.queries, len(side.blocks))
    return done or (rules.max_seconds is not None and wall_s >= rules.max_seconds)
