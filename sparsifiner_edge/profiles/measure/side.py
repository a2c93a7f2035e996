"""A bundle under measurement: its worker process, its warm-up, and its blocks of queries, alone or in turn."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator
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
_SETTLED = 0.02
_WARM_UP_S = 5.0
_WINDOW_MS = 100.0
_WINDOWS = 3
_BLOCK_MS = 200.0
_REWARM_MS = 20.0
"""At least so long is run and not recorded after another process: its threads spin for a while, and the caches hold its
data."""

OnStage = Callable[[str], None]
"""Called with what is going on."""
MIN_BLOCKS = 20
"""Blocks are what a comparison pairs and what drift is seen in."""

_SECONDS, _QUERIES = 10.0, 64
_MOST = 6.0
"""Times the seconds asked for: a side's most wall time, since comparisons also run what is not recorded."""


class Rules(msgspec.Struct, frozen=True):
    """When a side has been measured enough.

    Attributes:
        seconds: least time in queries. min_queries: least number of them; both must be reached.
        max_seconds: most wall time, whatever is reached by then. blocks: least number of them.
    """

    seconds: float
    min_queries: int
    max_seconds: float
    blocks: int = MIN_BLOCKS

    def enough(self, seconds: float, queries: int, blocks: int, wall_s: float = 0.0) -> bool:
        """Whether a side that has measured this much, in `wall_s` of wall time, is done."""
        done = seconds >= self.seconds and queries >= self.min_queries and blocks >= self.blocks
        return done or wall_s >= self.max_seconds


def make_rules(seconds: float | None = None, min_queries: int | None = None) -> Rules:
    """Ten seconds and 64 queries, or what is given in their place; in at most six times as many seconds.

    Raises:
        ConfigError: a number is out of range.
    """
    if seconds is not None and not 0 < seconds <= MOST_SECONDS:
        raise ConfigError(f"seconds is {seconds}.", f"Give a number above 0, at most {MOST_SECONDS:g}.")
    if min_queries is not None and not 1 <= min_queries <= MOST_COUNT:
        raise ConfigError(f"min_queries is {min_queries}.", f"Give from 1 to {MOST_COUNT}.")
    seconds = seconds or _SECONDS
    return Rules(seconds, min_queries or _QUERIES, _MOST * seconds)


def start_worker() -> contextlib.AbstractContextManager[Child]:
    """A fresh worker (see `worker.operations`), killed when the block ends, however it ends."""
    fix = "If it ran out of memory, close other programs or take a smaller model."
    return start_child("sparsifiner_edge.profiles.measure.worker", "The measuring process", fix)


class WarmUp(msgspec.Struct, frozen=True, kw_only=True):
    """How warm-up went: whether the medians of windows settled, and what was run."""

    settled: bool = False
    queries: int = 0
    seconds: float = 0.0


@dataclasses.dataclass
class MeasuredSide:
    """A bundle in a worker, and what was measured of it.

    Attributes:
        role: "subject" or "against".
        worker: its process. bundle: what it loaded.
        loaded: what loading reported. device: bytes that it took of the device's memory, and who tells.
        warm_up: how warm-up went. query_ms: a query's time, the first one's before it.
        blocks: latencies in ms, block by block. windows: start and end of each block, CLOCK_MONOTONIC nanoseconds.
        seconds, queries: how much was recorded. wall_s: how long that took, unrecorded queries included.
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
        """Every query's latency, in order."""
        return [ms for block in self.blocks for ms in block]

    def run(self, queries: int, rewarm: int = 0) -> QueryBlock:
        """Run one block. A hundredfold slowdown is still waited for; a hang is not."""
        timeout = 60 + 0.1 * (queries + rewarm) * self.query_ms
        return self.worker.ask("block", timeout, QueryBlock, queries=queries, rewarm=rewarm)

    def record(self, queries: int, rewarm: int) -> None:
        """Run one block and keep it."""
        start = time.monotonic()
        latency_ms, window = self.run(queries, rewarm)
        self.blocks.append(latency_ms)
        self.windows.append(window)
        self.seconds += sum(latency_ms) / 1000
        self.queries += queries
        self.wall_s += time.monotonic() - start


def stage_progress(progress: Progress | None, planned_s: float) -> OnStage:
    """From names of stages to a `Progress` in seconds, of about `planned_s` from now on."""
    start = time.monotonic()

    def on_stage(name: str) -> None:
        done = time.monotonic() - start
        if progress is not None:
            progress(name, done, max(planned_s, done))

    return on_stage


@contextlib.contextmanager
def open_side(role: str, bundle: Path, execution: Execution, on_stage: OnStage) -> Iterator[MeasuredSide]:
    """A bundle loaded into a worker of its own and run once."""
    on_stage(f"loading {bundle.name}")
    with start_worker() as worker:
        before, _ = device_bytes()
        loaded = worker.ask("load", LOAD_TIMEOUT_S, Loaded, **load_request(bundle, execution))
        held, source = device_bytes()  # Before another side takes any.
        taken = max(0, held - before) if isinstance(held, int) and isinstance(before, int) else held
        yield MeasuredSide(role, worker, bundle, loaded, (taken, source), loaded.first_ms)


def load_request(bundle: Path, execution: Execution) -> dict[str, Any]:
    """The request that makes a worker load a bundle, JSON-ready."""
    return {"bundle": str(bundle.resolve()), "execution": to_builtins(execution)}


def warm_up(side: MeasuredSide, on_stage: OnStage, most_s: float = _WARM_UP_S) -> None:
    """Run windows of about 100 ms until three medians in a row lie within 2 %, for about `most_s` at most."""
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


def measure_blocks(sides: list[MeasuredSide], rules: Rules, on_stage: OnStage, stage: str = "measuring") -> None:
    """Fill every side's blocks."""
    block_ms = min(_BLOCK_MS, rules.seconds * 1000 / MIN_BLOCKS)
    random = np.random.default_rng()
    before: MeasuredSide | None = sides[0] if len(sides) == 1 else None
    while not all(rules.enough(s.seconds, s.queries, len(s.blocks), s.wall_s) for s in sides):
        first = sides[::-1] if random.integers(2) else sides
        for side in (*first, *first[::-1]):  # ABBA or BAAB: each side is first as often as second.
            rewarm = 0 if side is before else math.ceil(_REWARM_MS / side.query_ms)
            side.record(max(1, round(block_ms / side.query_ms)), rewarm)
            before = side
            on_stage(stage)
