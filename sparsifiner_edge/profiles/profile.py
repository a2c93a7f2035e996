"""What `sparsifiner-edge profile` measures of a bundle, alone or interleaved with another: one query at a time."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
from msgspec import to_builtins
from msgspec.structs import replace

from sparsifiner_edge.bundle.store import Bundle, open_bundle
from sparsifiner_edge.errors import SparsifinerError
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.profiles import stats
from sparsifiner_edge.profiles.figures import (
    Comparison,
    Figures,
    Method,
    ProfileResult,
    Samples,
    SideSamples,
    Statistics,
)
from sparsifiner_edge.profiles.measure.layers import LayerTimes
from sparsifiner_edge.profiles.measure.observe import Observation, observe, side_figures
from sparsifiner_edge.profiles.measure.side import (
    LOAD_TIMEOUT_S,
    MeasuredSide,
    OnStage,
    Rules,
    make_rules,
    open_side,
    stage_progress,
    start_worker,
)
from sparsifiner_edge.profiles.measure.worker import Load
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.results import Subject
from sparsifiner_edge.runtime.open import check_choices
from sparsifiner_edge.runtime.session import Runtime


def profile_bundle(
    bundle: str | Path,
    backend: str = "onnxruntime",
    *,
    against: str | Path | None = None,
    precision: str = "auto",
    provider: str = "cpu",
    threads: int | None = None,
    kernels: str = "auto",
    seconds: float | None = None,
    min_queries: int | None = None,
    layers: bool = True,
    power: bool = True,
    progress: Progress | None = None,
) -> ProfileResult:
    """Measure a bundle; with `against`, also the ratio between the two (docs/profiling.md).

    Args:
        bundle: the bundle that is judged.
        backend, precision, provider, kernels: see `open_session`; for both bundles.
        against: the bundle to compare with, in turn with the first.
        threads: threads inside one operator; None takes the cores that this process may run on.
        seconds, min_queries: least time measured and least number of queries, per bundle; None takes 10 s and
            64. It takes at most twice `seconds`, or 60 s.
        layers: also time each layer, afterwards and in another process.
        power: also read power, where there is a sensor; False spares the idle baselines.
        progress: called now and then.

    Returns:
        A result of kind "profile", or "comparison" with `against`.

    Raises:
        ArtifactError: not a bundle, altered, or of another version.
        BackendError: unknown backend, the backend rejects the model, or a process died or hung.
        ConfigError: a number is out of range.
    """
    rules = make_rules(seconds, min_queries)
    execution = Execution(backend=backend, precision=precision, provider=provider, kernels=kernels, threads=threads)
    check_choices(execution)
    folders = {"subject": Path(bundle)} | ({"against": Path(against)} if against is not None else {})
    bundles = {role: open_bundle(path) for role, path in folders.items()}
    on_stage = stage_progress(progress, len(bundles) * (rules.seconds + 1.0))
    with contextlib.ExitStack() as stack:
        sides = []
        for role, path in folders.items():
            on_stage(f"loading {path.name}")
            request = Load(bundle=str(path.resolve()), execution=execution)
            sides.append(stack.enter_context(open_side(role, request)))
        seen = observe(sides, rules, on_stage, power)
        described = {side.role: _described(side) for side in sides}
    return _result(bundles, sides, rules, seen, described, on_stage if layers else None)


def _result(
    bundles: dict[str, Bundle],
    sides: list[MeasuredSide],
    rules: Rules,
    seen: Observation,
    described: dict[str, Runtime],
    on_layers: OnStage | None,
) -> ProfileResult:
    """The result of what was measured; where `on_layers` is given, layers are timed first."""
    subjects = [bundle.subject(role) for role, bundle in bundles.items()]
    figures = {side.role: side_figures(side, seen, described[side.role].kernels) for side in sides}
    compared = _compare(sides[0], sides[1], _two_names(subjects)) if len(sides) == 2 else None
    if on_layers is not None:
        for side in sides:
            on_layers(f"timing the layers of {side.role}")
            figures[side.role] = _with_layers(figures[side.role], side)
    samples = {side.role: SideSamples(side.latency_ms) for side in sides}
    return ProfileResult(
        "profile" if compared is None else "comparison",
        subjects,
        _method(sides, rules, seen, described),
        Samples(**samples, power=seen.recording.samples() or None),
        Statistics(**figures, comparison=compared),
    )


def _described(side: MeasuredSide) -> Runtime:
    """What ran. Reading the model once more may fail where memory is short; the figures stand all the same."""
    try:
        return side.worker.ask("describe", LOAD_TIMEOUT_S, Runtime)
    except SparsifinerError as error:
        why = Unavailable(error.what)
        return Runtime(backend=why, version=why, provider=why, device=why, precision=why, kernels=why, threads=why)


def _with_layers(figures: Figures, side: MeasuredSide) -> Figures:
    """Times per layer, from a process of its own; a profiler that fails costs nothing else."""
    p50 = stats.percentile(side.latency_ms, 0.5)
    try:
        with start_worker() as worker:
            found = worker.ask("layers", LOAD_TIMEOUT_S, LayerTimes, **to_builtins(side.request), query_ms=p50)
    except SparsifinerError as error:
        why = Unavailable(error.what)
        return replace(figures, layers=why, layers_total_ms=why)
    return replace(figures, layers=found.layers, layers_total_ms=found.layers_total_ms)


def _method(sides: list[MeasuredSide], rules: Rules, seen: Observation, described: dict[str, Runtime]) -> Method:
    return Method(
        rules=rules,
        input_shapes=sides[0].loaded.input_shapes,
        runtime=described,
        warm_up={side.role: side.warm_up for side in sides},
        block_queries={side.role: len(side.blocks[0]) for side in sides},
        sensor=seen.recording.described(),
        conditions={side.role: seen.recording.conditions(side.windows) for side in sides},
        problems=seen.recording.told(),
        first_in_round=seen.order if len(sides) == 2 else None,
        cut_short=seen.cut_short or None,
    )


def _compare(subject: MeasuredSide, against: MeasuredSide, names: list[str]) -> Comparison:
    ratios = stats.round_ratios(subject.blocks, against.blocks)
    low, high = stats.quantile_interval(ratios, 0.5)
    ratio = float(np.median(ratios))
    verdict = stats.judge(low, high)
    return Comparison(
        ratio=stats.estimate(ratio, low, high, "order statistics of paired rounds, effective sample size"),
        rounds=len(ratios),
        verdict=verdict,
        sentence=_sentence(verdict, names, ratio, low, high),
    )


def _two_names(subjects: list[Subject]) -> list[str]:
    """Two names that differ: the models', else the folders', else by place."""
    for key in ("name", "path"):
        names = [Path(getattr(subject, key)).name for subject in subjects]
        if names[0] != names[1]:
            return names
    return [f"{names[0]} (first)", f"{names[1]} (second)"]


def _sentence(verdict: str, names: list[str], ratio: float, low: float | None, high: float | None) -> str:
    subject, against = names
    if low is None or high is None:
        return f"No difference shown between {subject} and {against}: too few independent rounds; measure longer."
    interval = f"95 % interval {low:.3f} to {high:.3f}"
    if verdict == "no difference shown":
        return f"No difference shown between {subject} and {against}: ratio {ratio:.3f}, {interval}, not beyond +-1 %."
    return f"{subject} is {verdict} than {against}: {ratio:.3f} times its speed, {interval}."
