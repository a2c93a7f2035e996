"""What a result of kind "profile" or "comparison" holds; docs/profiling.md says what each figure means."""

from __future__ import annotations

from typing import Any

import msgspec

from sparsifiner_edge.profiles.flags import Flag
from sparsifiner_edge.profiles.measure.layers import Row
from sparsifiner_edge.profiles.measure.memory import Bytes
from sparsifiner_edge.profiles.measure.side import Rules, WarmUp
from sparsifiner_edge.profiles.sensors.conditions import Observation
from sparsifiner_edge.profiles.sensors.energy import Energy
from sparsifiner_edge.profiles.stats import Latency
from sparsifiner_edge.records import Known, Unavailable
from sparsifiner_edge.results import Quantity, Result
from sparsifiner_edge.runtime.session import Runtime


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """One bundle's.

    Attributes:
        rss_before_load_bytes, peak_memory_bytes: of its process; the peak after all queries.
        device_bytes: that its first inference left taken of the device's memory, as `device_source` tells.
        other_cores: that other programs kept busy meanwhile. layers: where asked for.
    """

    latency_ms: Latency
    throughput_per_s: Quantity
    queries: int
    load_ms: float
    first_inference_ms: float
    rss_before_load_bytes: Bytes
    peak_memory_bytes: Bytes
    device_bytes: Bytes
    device_source: str
    energy: Known[Energy]
    other_cores: float | Unavailable
    flags: list[Flag]
    layers: list[Row] | Unavailable | None = None


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Two sides measured in turn, or estimated for one board.

    Attributes:
        ratio: against's latency over the subject's: above 1 the subject is faster. rounds: that it is the median of;
            None: of an estimate. verdict: "faster", "slower", "no difference shown"; `report.verdict` has it in words.
    """

    ratio: Quantity
    rounds: int | None = None
    verdict: str


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """By role; of two also the comparison."""

    subject: Figures
    against: Figures | None = None
    comparison: Comparison | None = None

    def sides(self) -> list[Figures]:
        """One or two."""
        return [self.subject] if self.against is None else [self.subject, self.against]


class Method(msgspec.Struct, frozen=True, kw_only=True):
    """How it was measured; by role where sides may differ. input_shapes: of uniform random inputs, made once.

    sensor: its name, what its total is made of, its times, why others are `not_used`, `readings`, and seconds of each
    idle baseline. cut_short: why it ended before the rules were met.
    """

    scenario: str = "single stream: one query at a time, from Session.infer's call to its return"
    rules: Rules
    input_shapes: dict[str, list[int]]
    runtime: dict[str, Runtime]
    warm_up: dict[str, WarmUp]
    block_queries: dict[str, int]
    sensor: dict[str, Any]
    conditions: dict[str, Observation]
    problems: list[str]
    cut_short: str | None = None


class ProfileResult(Result, frozen=True):
    """Of kind "profile" or "comparison"; samples by role: `latency_ms` of every query, in blocks of `block_queries`;
    and "power", the sensor's readings by column, where there are any.
    """

    method: Method
    samples: dict[str, dict[str, list[float]]]
    statistics: Statistics
