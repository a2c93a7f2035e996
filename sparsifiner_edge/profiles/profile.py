"""Measure the latency of a bundle, one query at a time, alone or interleaved with another bundle."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.config import require
from sparsifiner_edge.errors import SparsifinerError
from sparsifiner_edge.execution import Execution, execution_of
from sparsifiner_edge.profiles import stats
from sparsifiner_edge.profiles.figures import Comparison, ProfileResult, Statistics
from sparsifiner_edge.profiles.measure.layers import Row
from sparsifiner_edge.profiles.measure.observe import observe
from sparsifiner_edge.profiles.measure.side import (
    LOAD_TIMEOUT_S,
    MeasuredSide,
    load_request,
    make_rules,
    open_side,
    stage_progress,
    start_worker,
)
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.records import Unavailable


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileOptions:
    """Duration and scope of a measurement.

    Attributes:
        seconds: Minimum time measured per bundle in seconds; None takes 10 s. A measurement takes at most six times as
            long.
        min_queries: Minimum number of queries per bundle; None takes 64.
        layers: Also measure the time of each layer, afterwards and in another process.
        power: Also measure power, if there is a sensor; False skips the idle baselines.

    Example:
        >>> ProfileOptions(seconds=2).layers
        True
    """

    seconds: float | None = None
    min_queries: int | None = None
    layers: bool = True
    power: bool = True


def profile_bundle(
    bundle: str | Path,
    execution: Execution | str | None = None,
    *,
    against: str | Path | None = None,
    against_execution: Execution | str | None = None,
    options: ProfileOptions | None = None,
    progress: Progress | None = None,
) -> ProfileResult:
    """Measure a bundle; with `against`, also compare it with another one (docs/measure.md).

    Args:
        bundle: Bundle to measure.
        execution: How to run it: a backend, or a complete `Execution`.
        against: Bundle to compare with, measured in turn with the first; it may be the same bundle.
        against_execution: How to run `against`; None takes `execution`. Each bundle decides for itself what "auto"
            means.
        options: Duration and scope of the measurement.
        progress: Callback for progress reports.

    Returns:
        A result of kind "profile", or "comparison" with `against`.

    Raises:
        ArtifactError: A folder is not a bundle, was altered, or has another schema version.
        BackendError: The backend is unknown or rejects the model, or a process died or hung.
        ConfigError: A number is out of range, or `against_execution` is given without `against`.

    Example:
        >>> result = profile_bundle("bundle", against="dense", options=ProfileOptions(seconds=0.2, layers=False))
        >>> result.statistics.comparison.verdict in ("faster", "slower", "no difference shown")
        True
    """
    execution, options = execution_of(execution), options or ProfileOptions()
    rules = make_rules(options.seconds, options.min_queries)
    what, fix = "against_execution requires a bundle to compare with.", "Name one: --against."
    require(against is not None or against_execution is None, what, fix)
    executions = {"subject": execution, "against": execution_of(against_execution or execution)}
    folders = {"subject": Path(bundle)} | ({"against": Path(against)} if against is not None else {})
    subjects = [open_bundle(path).subject(role) for role, path in folders.items()]
    on_stage = stage_progress(progress, len(subjects) * (rules.seconds + 1.0))
    with contextlib.ExitStack() as stack:
        sides = [
            stack.enter_context(open_side(role, path, executions[role], on_stage)) for role, path in folders.items()
        ]
        figures, method, readings = observe(sides, rules, on_stage, options.power)
    for side in sides if options.layers else ():
        on_stage(f"timing the layers of {side.role}")
        figures[side.role] = replace(figures[side.role], layers=_layers(side))
    comparison = _compare(sides[0], sides[1]) if len(sides) == 2 else None
    samples = {side.role: {"latency_ms": side.latency_ms} for side in sides}
    return ProfileResult(
        "profile" if comparison is None else "comparison",
        subjects,
        method,
        samples | ({"power": readings} if readings else {}),
        Statistics(**figures, comparison=comparison),
    )


def _layers(side: MeasuredSide) -> list[Row] | Unavailable:
    """Return times per layer, measured in a separate process, so that a failing profiler affects nothing else."""
    p50 = stats.percentile(side.latency_ms, 0.5)
    try:
        with start_worker() as worker:
            request = load_request(side.bundle, side.loaded.execution)
            return worker.ask("layers", LOAD_TIMEOUT_S, list[Row], **request, query_ms=p50)
    except SparsifinerError as error:
        return Unavailable(error.what)


def _compare(subject: MeasuredSide, against: MeasuredSide) -> Comparison:
    """Compare two sides that were measured in turn."""
    ratios = stats.round_ratios(subject.blocks, against.blocks)
    low, high = stats.quantile_interval(ratios, 0.5)
    ratio = stats.quantity(float(np.median(ratios)), low, high, "order statistics of paired rounds, effective size")
    return Comparison(ratio=ratio, rounds=len(ratios), verdict=stats.verdict_of(low, high))
