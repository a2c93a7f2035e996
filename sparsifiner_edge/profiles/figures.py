"""What a result of kind "profile" or "comparison" holds; docs/profiling.md says what each figure means."""

from __future__ import annotations

import msgspec

from sparsifiner_edge.profiles.flags import Flag
from sparsifiner_edge.profiles.measure.layers import Row
from sparsifiner_edge.profiles.measure.memory import Bytes, Memory
from sparsifiner_edge.profiles.measure.side import Rules, WarmUp
from sparsifiner_edge.profiles.sensors import Energy
from sparsifiner_edge.profiles.sensors.conditions import Seen
from sparsifiner_edge.profiles.sensors.power import SensorDescription
from sparsifiner_edge.profiles.stats import Summary
from sparsifiner_edge.records import Known, Unavailable
from sparsifiner_edge.results import Declared, Estimate
from sparsifiner_edge.runtime.session import Runtime


class MeasuredMemory(msgspec.Struct, frozen=True, kw_only=True):
    """The process's after all queries, and what its first inference left taken of the device's, with its source."""

    steady: Memory
    device_bytes: Bytes
    device_source: str


class Figures(Summary, frozen=True, kw_only=True):
    """One bundle's. other_cores: that other programs kept busy meanwhile. layers: where asked for."""

    load_ms: float
    rss_before_load_bytes: Bytes
    first_inference_ms: float
    queries: int
    memory: MeasuredMemory
    energy: Known[Energy]
    other_cores: float | Unavailable
    flags: list[Flag]
    layers: list[Row] | Unavailable | None = None
    layers_total_ms: float | Unavailable | None = None


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Two sides measured in turn.

    Attributes:
        ratio: against's latency over the subject's: above 1 the subject is faster. rounds: that it is the median of.
        verdict: "faster", "slower", "no difference shown". sentence: with both names.
    """

    ratio: Estimate
    rounds: int
    verdict: str
    sentence: str


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """By role; of two also the comparison."""

    subject: Figures
    against: Figures | None = None
    comparison: Comparison | None = None

    def sides(self) -> list[Figures]:
        """One or two."""
        return [self.subject] if self.against is None else [self.subject, self.against]


class SideSamples(msgspec.Struct, frozen=True):
    """Every query's latency, in blocks of `block_queries`."""

    latency_ms: list[float]


class Samples(msgspec.Struct, frozen=True, kw_only=True):
    """By role; and the power sensor's readings, columns of a table by name, where there are any."""

    subject: SideSamples
    against: SideSamples | None = None
    power: dict[str, list[float]] | None = None


class Method(msgspec.Struct, frozen=True, kw_only=True):
    """How it was measured; by role where sides may differ. input_shapes: of uniform random inputs, made once.

    first_in_round: of two sides. cut_short: why it ended before the rules were met.
    """

    scenario: str = "single stream: one query at a time, from Session.infer's call to its return"
    isolation: str = "one process per bundle"
    rules: Rules
    input_shapes: dict[str, list[int]]
    runtime: dict[str, Runtime]
    warm_up: dict[str, WarmUp]
    block_queries: dict[str, int]
    sensor: SensorDescription
    conditions: dict[str, Seen]
    problems: list[str]
    first_in_round: list[str] | None = None
    cut_short: str | None = None


class ProfileResult(Declared, frozen=True):
    """Of kind "profile" or "comparison"."""

    method: Method
    samples: Samples
    statistics: Statistics
