"""The closing measurements of a search, and its result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import msgspec

from sparsifiner_edge.bundle.manifest import MODEL_FILE
from sparsifiner_edge.bundle.store import bundle_hash
from sparsifiner_edge.config import keep_text, merge_text
from sparsifiner_edge.errors import BackendError, GateError
from sparsifiner_edge.optimizer.loading import Source
from sparsifiner_edge.optimizer.models import Models
from sparsifiner_edge.optimizer.remarks import remarks_on
from sparsifiner_edge.optimizer.request import LEAST_HELD_OUT, OptimizeOptions
from sparsifiner_edge.optimizer.search import Attempt, Search
from sparsifiner_edge.pareto import Candidate, Deployment, Lever, ParetoFront, Point, SearchMethod, SearchResult
from sparsifiner_edge.plan import LayerPlan
from sparsifiner_edge.profiles.stats import CONFIDENCE, quantity, skewed_mean
from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.results import Quantity, Subject

FINALISTS = 2
"""Number of bundles that are timed at the end."""
BRIEFLY = Unavailable("it was only measured briefly, in turn with a reference")


Model = tuple[LayerPlan, Deployment]
"""A plan in a deployment; the dense plan is the dense model."""


class Timed(NamedTuple):
    """A complete model of the closing measurements.

    Attributes:
        ms: Its time.
        errors: Its error on each held-out image.
        file_bytes: Size of its file.
    """

    ms: Quantity
    errors: list[float]
    file_bytes: int


class Closing(NamedTuple):
    """Closing measurements.

    Attributes:
        ranked: Exported plans, the best first.
        measured: What was measured in turn.
    """

    ranked: Sequence[Attempt]
    measured: dict[Model, Timed]


def close(search: Search) -> Closing:
    """Measure the best bundles, the dense model and the steps between them in turn, as far as there is time."""
    ranked = sorted(search.attempts, key=search.order)[:FINALISTS]
    best, others = ranked[0], [(one.plan, one.deployment) for one in ranked[1:]]
    dense = [(LayerPlan.dense(len(best.plan.keep)), host) for host in _dense_hosts(search, best)]
    steps = [(plan, deployment) for _, plan, deployment in lever_steps(search, best)]
    wanted = list(dict.fromkeys([(best.plan, best.deployment), *dense[:1], *steps, *others, *dense[1:]]))
    try:
        measured = _measure(search, wanted)
    except (BackendError, GateError) as error:  # Several processes at once may be too many.
        search.remarks.append(
            f"The last measurement failed: {error.what} The times are those measured during the search."
        )
        brief = "median, in turn with a reference"
        measured = {
            (one.plan, one.deployment): Timed(Quantity(one.ms, BRIEFLY, BRIEFLY, CONFIDENCE, brief), one.reserved, 0)
            for one in ranked
        }
    ranked = [
        one._replace(ms=measured[one.plan, one.deployment].ms.value)
        for one in ranked
        if (one.plan, one.deployment) in measured
    ]
    return Closing(sorted(ranked, key=search.order), measured)


def _measure(search: Search, wanted: Sequence[Model]) -> dict[Model, Timed]:
    subject, held = search.subject, range(len(search.request.images), len(search.subject.paths))
    bundles, known = dict[Model, Path](), {(one.plan, one.deployment): one.reserved for one in search.attempts}
    errors = dict[Model, list[float]]()
    for plan, where in wanted:
        if bundles and not search.clock.fits("evaluating", "timing"):
            break
        bundles[plan, where] = subject.own_bundle(plan, where)
        errors[plan, where] = known.get((plan, where)) or subject.errors_of(bundles[plan, where], where, held)
    times = subject.times([(bundle, where) for (_, where), bundle in bundles.items()])
    return {
        model: Timed(ms, errors[model], (bundle / MODEL_FILE).stat().st_size)
        for (model, bundle), ms in zip(bundles.items(), times, strict=False)
    }


def _dense_hosts(search: Search, best: Attempt) -> list[Deployment]:
    """Return where the dense model was timed, the fastest first, or where it belongs if it was not timed."""
    return sorted(search.dense, key=search.dense.__getitem__) or [best.deployment.dense_host]


def lever_steps(search: Search, best: Attempt) -> list[tuple[str, LayerPlan, Deployment]]:
    """Return the steps from the dense model to the answer: merging, sparse attention, int8, backend and arithmetic.

    Empty for a board, whose times are estimated.
    """
    if not best.deployment.is_here:
        return []
    hosts = _dense_hosts(search, best)
    start = next((host for host in hosts if (host.precision, host.compute_precision) == ("fp32", "auto")), hosts[0])
    merged, depth = LayerPlan(best.plan.merge, (1.0,) * len(best.plan.keep)), len(best.plan.keep)
    steps = [("dense model", LayerPlan.dense(depth), start)]
    if not merged.is_dense:
        steps.append(("+ merging", merged, start))
    if best.plan != merged:
        steps.append(("+ sparse attention", best.plan, start))
    if best.deployment.precision != start.precision:
        start = start._replace(precision=best.deployment.precision)
        steps.append((f"+ {start.precision}", best.plan, start))
    if best.deployment != start:
        changes = [best.deployment.backend] * (best.deployment.backend != start.backend)
        changes += [best.deployment.compute_precision] * (best.deployment.compute_precision != start.compute_precision)
        steps.append((f"+ {', '.join(changes)}", best.plan, best.deployment))
    return steps


def outcome(search: Search, closing: Closing, models: Models, source: Source, options: OptimizeOptions) -> SearchResult:
    """Return the result of a search."""
    bound, request, best = search.bound, search.request, closing.ranked[0]
    finalists = [_finalist(one, closing.measured[one.plan, one.deployment]) for one in closing.ranked]
    dense = [_row(*model, timed) for model, timed in closing.measured.items() if model[0].is_dense]
    dense.sort(key=lambda one: one.ms.value)
    steps = lever_steps(search, best)
    levers = [
        Lever(change=change, candidate=_row(plan, where, closing.measured[plan, where]))
        for change, plan, where in steps
        if (plan, where) in closing.measured
    ]
    met = search.bounded(best) <= search.limit if bound.by_fidelity else best.ms <= bound.value
    why = f"no plan meets {bound.text}; the nearest has {finalists[0].fidelity:.4f} at {best.ms:.1f} ms"
    remarks = [*search.remarks, *remarks_on(search, best)]
    if dense and dense[0].ms.value <= best.ms:
        remarks.append(
            f"The dense model is at least as fast: {dense[0].ms.value:.1f} ms in {dense[0].deployment}"
            f"{' (estimated)' if request.board else ''}. Use the dense model, or a larger --img-size."
        )
    front = ParetoFront(
        points=_points(search, best),
        finalists=finalists,
        answer=finalists[0] if met else Unavailable(why),
        check=_check(search, best),
        dense=dense,
        levers=levers if len(levers) == len(steps) else [],
        unverified=_unverified(search, dense),
        left_out=request.unavailable | {str(deployment): why for deployment, why in search.excluded.items()},
        remarks=remarks,
    )
    selection = [search.subject.paths[place] for place in search.selection]
    images = {"search": request.images, "selection": selection, "held_out": request.reserved}
    method = SearchMethod(
        metric=request.metric,
        at_least=bound.value if bound.by_fidelity else None,
        at_most_ms=None if bound.by_fidelity else bound.value,
        board=None if request.board is None else request.board.name,
        images={use: [path.name for path in paths] for use, paths in images.items()},
        minutes=options.minutes,
        seconds=round(search.clock.elapsed_s, 1),
        settled=search.settled,
    )
    file = Subject(
        path=source.path or Unavailable("it was in memory"),
        name=source.student.name,
        sha256=bundle_hash(models.export(best.plan, best.deployment.precision)),
    )
    samples = {
        f"{merge_text(one.plan.merge)} | {keep_text(one.plan.short_keep)} | {one.deployment}": [
            1 - error for error in one.reserved
        ]
        for one in closing.ranked
    }
    return SearchResult("search", [file], method, samples, front)


def _unverified(search: Search, dense: Sequence[Candidate]) -> list[str]:
    """Return what keeps the answer from being relied on."""
    reasons = []
    if not dense:
        reasons.append("There was no time to time the dense model, so the gain is unknown. Give more --minutes.")
    count = len(search.request.reserved)
    if count < LEAST_HELD_OUT:
        reasons.append(f"The answer was checked on {count} held-out images only. Give more --minutes or images.")
    return reasons


def _finalist(attempt: Attempt, timed: Timed) -> Candidate:
    row = _row(attempt.plan, attempt.deployment, timed)
    return msgspec.structs.replace(row, fidelity=1 - fmean([*attempt.errors, *attempt.reserved]))


def _row(plan: LayerPlan, deployment: Deployment, timed: Timed) -> Candidate:
    fidelity = 1 - fmean(timed.errors)
    return Candidate(
        merge=merge_text(plan.merge) if any(plan.merge) else "0",
        keep=keep_text(plan.short_keep),
        **deployment._asdict(),
        fidelity=fidelity,
        held_out_fidelity=fidelity,
        ms=timed.ms,
        file_bytes=timed.file_bytes,
    )


def _check(search: Search, best: Attempt) -> Quantity:
    """Return the fidelity of the answer on held-out images; its spread is estimated from all images of the search."""
    least = search.subject.least
    shape = (max(fmean(best.errors), least) / max(stdev(best.errors), least)) ** 2  # Shape of a gamma distribution.
    mean_error = skewed_mean(best.reserved, min(1.0, shape))
    low, high = (1 - x if isinstance(x, float) and x < 1 else None for x in (mean_error.high, mean_error.low))
    return quantity(1 - mean_error.value, low, high, f"1 - error, {mean_error.interval}")


def _points(search: Search, best: Attempt) -> list[Point]:
    """Return the plans that were measured in the answer's deployment on all selection images.

    Their times and errors are scaled so that the answer's are the ones of the closing measurements.
    """
    deployment, known = best.deployment, (best.plan, best.deployment)
    scale = best.ms / search.ms.get(known, best.ms)
    reached = fmean([*best.errors, *best.reserved])
    factor = reached / max(search.subject.least, fmean(search.errors.get(known, best.errors)))
    plans, rows = list[LayerPlan](), list[tuple[float, float]]()
    for (plan, where), errors in search.errors.items():
        if where == deployment and len(errors) == len(search.selection):
            ms = search.ms.get((plan, deployment))
            if ms is not None:
                plans.append(plan)
                rows.append((min(1.0, factor * fmean(errors)), scale * ms))
    points = [
        Point(
            merge=merge_text(plan.merge),
            keep=keep_text(plan.short_keep),
            deployment=str(deployment),
            fidelity=1 - error,
            ms=ms,
            pareto_optimal=not any(a <= error and b <= ms and (a, b) != (error, ms) for a, b in rows),
        )
        for plan, (error, ms) in zip(plans, rows, strict=True)
    ]
    return sorted(points, key=lambda point: -point.fidelity)
