"""What a result of kind "profile" or "comparison" holds; docs/profiling.md says what each figure means."""

from __future__ import annotations

import msgspec

from sparsifiner_edge.profiles.flags import Flag
from sparsifiner_edge.profiles.measure.layers import Row
from sparsifiner_edge.profiles.measure.memory import Bytes, PhaseMemory
from sparsifiner_edge.profiles.measure.resource_usage import Usage
from sparsifiner_edge.profiles.measure.side import WarmUp
from sparsifiner_edge.profiles.rules import Rules
from sparsifiner_edge.profiles.sensors import Energy
from sparsifiner_edge.profiles.sensors.base import SensorDescription
from sparsifiner_edge.profiles.sensors.conditions import Seen
from sparsifiner_edge.profiles.sensors.recorder import Columns
from sparsifiner_edge.profiles.stats import Summary
from sparsifiner_edge.records import Known, Unavailable
from sparsifiner_edge.results import Declared, Estimate
from sparsifiner_edge.runtime.session import Description


class Phases(msgspec.Struct, frozen=True, kw_only=True):
    """Memory phase by phase, and the device's in the steady one, with its source."""

    load: PhaseMemory
    first_inference: PhaseMemory
    steady: PhaseMemory
    device_bytes: Bytes
    device_source: str


class LayersCompared(msgspec.Struct, frozen=True, kw_only=True):
    """The sum over layers beside the latency measured before."""

    latency_p50_ms: float
    total_over_latency: float


class Figures(Summary, frozen=True, kw_only=True):
    """One bundle's; rss_bytes, pss_bytes, peak_rss_bytes: of the whole process at the end.

    parts_ms: medians by part of a query, where the session gives them. layers: where asked for.
    """

    import_ms: float
    load_ms: float
    rss_before_load_bytes: Bytes
    first_inference_ms: float
    rss_bytes: Bytes
    pss_bytes: Bytes
    peak_rss_bytes: Bytes
    queries: int
    memory: Phases
    energy: Known[Energy]
    usage: Usage
    parts_ms: dict[str, float] | None = None
    flags: list[Flag]
    layers: list[Row] | Unavailable | None = None
    layers_total_ms: float | Unavailable | None = None
    layers_compared: Known[LayersCompared] | None = None


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
    """Every query's latency, in blocks of `block_queries`, and times by part."""

    latency_ms: list[float]
    parts_ms: dict[str, list[float]] | None = None


class Samples(msgspec.Struct, frozen=True, kw_only=True):
    """By role; and the power sensor's readings, where there are any."""

    subject: SideSamples
    against: SideSamples | None = None
    power: Columns | None = None


class Input(msgspec.Struct, frozen=True):
    """What queries are made of; shapes by name."""

    kind: str
    shapes: dict[str, list[int]] | None = None


class Method(msgspec.Struct, frozen=True, kw_only=True):
    """How it was measured; by role where sides may differ. The last three: of two sides, or where cut short."""

    scenario: str = "single stream: one query at a time, from Session.infer's call to its return"
    clock: str = "time.perf_counter_ns"
    rules: Rules
    input: Input
    isolation: str = "one process per bundle"
    load_ms: str = "the session's creation alone, after importing the backend (import_ms)"
    peak_rss_bytes: str = "VmHWM of the whole process: Python, the backend and the model"
    runtime: dict[str, Description]
    warm_up: dict[str, WarmUp]
    block_queries: dict[str, int]
    sensor: SensorDescription
    conditions: dict[str, Seen]
    problems: list[str]
    flag_thresholds: dict[str, float]
    layers: str = "the backend's own profiler, in a process of its own after the latency was measured"
    ratio: str | None = None
    first_in_round: list[str] | None = None
    cut_short: str | None = None


class ProfileResult(Declared, frozen=True):
    """Of kind "profile" or "comparison"."""

    method: Method
    samples: Samples
    statistics: Statistics
