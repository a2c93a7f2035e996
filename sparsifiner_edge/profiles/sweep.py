"""Latency and throughput of one bundle over numbers of threads and batch sizes, each point in a process of its own."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from msgspec.structs import replace

from sparsifiner_edge.bounds import MOST_BATCH, MOST_THREADS, whole_number
from sparsifiner_edge.bundle.store import Bundle, open_bundle
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.machine import available_cores
from sparsifiner_edge.profiles import flags, stats
from sparsifiner_edge.profiles.figures import Input, SideSamples
from sparsifiner_edge.profiles.measure.side import (
    LOAD_TIMEOUT_S,
    MeasuredSide,
    WarmUp,
    measure_blocks,
    open_side,
    stage_progress,
    warm_up,
)
from sparsifiner_edge.profiles.measure.worker import Load
from sparsifiner_edge.profiles.rules import Rules, make_rules
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.results import Declared
from sparsifiner_edge.runtime.open import check_choices
from sparsifiner_edge.runtime.session import Description

AXES = {"threads": MOST_THREADS, "batch": MOST_BATCH}
"""What can be swept, and the greatest value of each."""
DEFAULT_POINT_S = 3.0
"""Minimum measuring time at each point, where none is given."""


class SweepPoint(stats.Summary, frozen=True, kw_only=True):
    """Latency of a whole batch, and throughput in images per second."""

    threads: int
    batch: int
    queries: int
    flags: list[flags.Flag]


class Sweep(msgspec.Struct, frozen=True):
    """Its points, in order."""

    sweep: list[SweepPoint]


class SweepMethod(msgspec.Struct, frozen=True, kw_only=True):
    """How it was measured; warm_up by point."""

    scenario: str = "single stream: one batch at a time, from Session.infer's call to its return"
    clock: str = "time.perf_counter_ns"
    rules: Rules
    input: Input
    isolation: str = "one process per point, one point after the other"
    runtime: dict[str, Description]
    warm_up: dict[str, WarmUp]
    flag_thresholds: dict[str, float]


class SweepResult(Declared, frozen=True):
    """Of kind "sweep"."""

    method: SweepMethod
    samples: dict[str, SideSamples]
    statistics: Sweep


def sweep_bundle(
    bundle: str | Path,
    axes: Mapping[str, Sequence[int]],
    backend: str = "onnxruntime",
    *,
    threads: int | None = None,
    kernels: str = "auto",
    seconds: float | None = None,
    min_queries: int | None = None,
    progress: Progress | None = None,
) -> SweepResult:
    """Measure a bundle at every combination of `axes`, one after the other.

    Args:
        bundle: a folder made by `sparsifiner-edge export`.
        axes: values by name, of `AXES`: {"threads": [1, 2], "batch": [1, 4]}. A batch other than the bundle's own
            needs one that was exported with a dynamic batch.
        backend: one of `sparsifiner_edge.runtime.BACKENDS`.
        threads: where `axes` has none; None takes the cores that this process may run on.
        kernels: one of `sparsifiner_edge.runtime.KERNEL_CHOICES`.
        seconds, min_queries: minimum at each point; None takes `DEFAULT_POINT_S` and those of the rules "quick".
        progress: called now and then.

    Returns:
        A result of kind "sweep"; `samples` by name such as "threads=2,batch=1".

    Raises:
        ArtifactError: not a bundle, altered, or of another version.
        BackendError: unknown backend, the backend rejects the model, or a process died or hung.
        ConfigError: an axis is unknown or has bad values, or the bundle's batch is fixed at another size.
    """
    rules = make_rules("quick", DEFAULT_POINT_S if seconds is None else seconds, min_queries)
    check_choices(backend, kernels)
    checked = open_bundle(Path(bundle))
    place, points = str(checked.folder.resolve()), _points(axes, threads, checked)
    on_stage = stage_progress(progress, len(points) * (rules.seconds + 2.0))
    rows: list[SweepPoint] = []
    samples: dict[str, SideSamples] = {}
    warm_ups: dict[str, WarmUp] = {}
    for count, batch in points:
        name = f"threads={count},batch={batch}"
        request = Load(bundle=place, backend=backend, threads=count, kernels=kernels, batch=batch)
        on_stage(f"measuring {name}")
        with open_side(name, request) as side:
            warm_up(side, on_stage)
            measure_blocks([side], rules, on_stage, f"measuring {name}")
            description = side.worker.ask("describe", LOAD_TIMEOUT_S, Description)
        rows.append(_row(side, count, batch))
        samples[name], warm_ups[name] = SideSamples(side.latency_ms), side.warm_up
    method = SweepMethod(
        rules=rules,
        input=Input("uniform random, seed 0, made once"),
        runtime={"subject": replace(description, threads=None)},
        warm_up=warm_ups,
        flag_thresholds=flags.THRESHOLDS,
    )
    return SweepResult("sweep", [checked.subject("subject")], method, samples, Sweep(rows))


def _row(side: MeasuredSide, threads: int, batch: int) -> SweepPoint:
    latency, found = side.latency_ms, stats.summarise(side.latency_ms)
    return SweepPoint(
        threads=threads,
        batch=batch,
        latency_ms=found.latency_ms,
        throughput_per_s=found.throughput_per_s.times(batch),
        queries=side.queries,
        flags=[*flags.length_flags(latency), *flags.warm_up_flags(side.warm_up), *flags.spread_flags(latency)],
    )


def parse_axes(texts: Sequence[str]) -> dict[str, list[int]]:
    """Axes from texts such as "threads=1,2".

    Raises:
        ConfigError: not of that form, or an axis comes twice.
    """
    axes: dict[str, list[int]] = {}
    for text in texts:
        name, _, values = text.partition("=")
        try:
            numbers = [whole_number(value, "sweep") for value in values.split(",")]
        except ConfigError:
            raise ConfigError(f"sweep is {text!r}.", "Write it as threads=1,2 or batch=1,2,4.") from None
        if name in axes:
            raise ConfigError(f"sweep names {name!r} twice.", "Give all of its values at once.")
        axes[name] = numbers
    return axes


def _points(axes: Mapping[str, Sequence[int]], threads: int | None, bundle: Bundle) -> list[tuple[int, int]]:
    """Every combination of threads and batch; bad values are rejected before anything is measured."""
    if not axes:
        raise ConfigError("The sweep has no axis.", f"Choose of: {', '.join(AXES)}.")
    for name, values in axes.items():
        if name not in AXES:
            raise ConfigError(f"sweep is over {name!r}.", f"Choose of: {', '.join(AXES)}.")
        if not values or not 1 <= min(values) <= max(values) <= AXES[name]:
            raise ConfigError(f"sweep is over {name} = {list(values)}.", f"Give numbers from 1 to {AXES[name]}.")
    fixed = bundle.manifest.batch
    batches = list(dict.fromkeys(axes.get("batch", [fixed or 1])))
    if fixed is not None and batches != [fixed]:
        raise ConfigError(
            f"{bundle.folder} has a fixed batch of {fixed}, and the sweep asks for {', '.join(map(str, batches))}.",
            "Export it again with --batch dynamic.",
        )
    counts = list(dict.fromkeys(axes.get("threads", [threads or available_cores()])))
    return list(itertools.product(counts, batches))
