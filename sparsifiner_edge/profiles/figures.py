"""Contents of a result of kind "profile" or "comparison"; docs/measure.md explains each value."""

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
    """Measurements of one bundle.

    Attributes:
        latency_ms: Latency of one query in milliseconds.
        throughput_per_s: Queries per second.
        queries: Number of recorded queries.
        load_ms: Time to create the session, without importing its package.
        first_inference_ms: Time of the first inference.
        rss_before_load_bytes: Memory of the process before the model was loaded.
        peak_memory_bytes: Peak memory of the process after all queries.
        device_bytes: Device memory that was taken by loading and the first inference.
        device_source: Source of `device_bytes`.
        energy: Energy and power of the inferences.
        other_cores: Number of cores that other programs kept busy in the meantime.
        flags: Reasons why the measurement is unreliable.
        layers: Time per layer, if requested.
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
    """Comparison of two bundles that were measured in turn, or estimated for one board.

    Attributes:
        ratio: Latency of the other bundle divided by that of the subject; above 1, the subject is faster.
        rounds: Number of rounds that `ratio` is the median of; None for an estimate.
        verdict: "faster", "slower" or "no difference shown"; `report.verdict` puts it into words.
    """

    ratio: Quantity
    rounds: int | None = None
    verdict: str


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """Measurements of each bundle, and their comparison if there are two."""

    subject: Figures
    against: Figures | None = None
    comparison: Comparison | None = None

    def sides(self) -> list[Figures]:
        """Return the measurements of one bundle or two."""
        return [self.subject] if self.against is None else [self.subject, self.against]


class Method(msgspec.Struct, frozen=True, kw_only=True):
    """Description of a measurement; dictionaries are by role ("subject", "against"), because the sides may differ.

    Attributes:
        scenario: Load pattern of the queries.
        rules: Conditions under which a side has been measured long enough.
        input_shapes: Shapes of the inputs, uniform random arrays that are created once.
        runtime: Backend, versions and kernels of each side.
        warm_up: Warm-up of each side.
        block_queries: Number of queries per block.
        sensor: Power sensor: name, components of its total, periods, reasons why others are `not_used`, number of
            `readings`, and duration of each idle baseline in seconds.
        conditions: Clocks, temperatures and throttling of each side.
        problems: Problems of the sensor.
        cut_short: Reason why the measurement ended before the rules were met.
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
    """Result of kind "profile" or "comparison".

    Attributes:
        method: Description of the measurement.
        samples: By role, `latency_ms` of every query, in blocks of `block_queries`; under "power", the sensor's
            readings by column, if there are any.
        statistics: Statistics of the samples.
    """

    method: Method
    samples: dict[str, dict[str, list[float]]]
    statistics: Statistics
