"""The search itself: plans where the front is expected are measured, until the answer stays as it is."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np

from sparsifiner_edge.errors import GateError
from sparsifiner_edge.plan import LayerPlan
from sparsifiner_edge.process import stopping
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.search.fidelity_model import PROBED, FidelityModel, Sensitivities
from sparsifiner_edge.search.latency import Anchor, Deployment, PlanLatency
from sparsifiner_edge.search.solve import Solver
from sparsifiner_edge.search.trial import Trial

SPREAD = (0.3, 0.5, 0.7, 0.85, 1.0, 1.2, 1.6, 2.5)
NEAR = (0.9, 0.97, 1.03)
"""Distances that are tried, as multiples of the bound: once, and then in every round."""
ROUNDS = 4
SETTLED = 0.03
"""A round that changes what is expected of the answer by less is the last."""
CLOSE, MOST_ENGINES = 1.15, 3
"""Engines are followed that are within so much of the best, so many at most."""
LEAST_AIM = 1e-3
"""A distance below which nothing is to be gained: what the latency allows is the dense model, or nearly."""


class Bound(NamedTuple):
    """What is asked for: one of the two."""

    at_least: float | None
    at_most_ms: float | None

    @property
    def text(self) -> str:
        """For people."""
        return f"fidelity {self.at_least}" if self.at_least is not None else f"{self.at_most_ms:.4g} ms"


class Tried(NamedTuple):
    """A plan and its distances, image by image; predicted: their mean, before."""

    plan: LayerPlan
    distances: list[float]
    predicted: float | None = None


class _StoppedError(Exception):
    """No plan is measured any more."""


class Search:
    """Plans of one student, measured on images as they come up.

    Attributes:
        known: what was measured, in that order. stop: once set, no other plan is measured.
    """

    def __init__(self, trial: Trial, progress: Progress | None) -> None:
        self.trial, self.progress = trial, progress
        self.known, self.stop = dict[LayerPlan, Tried](), threading.Event()

    def measure(self, plans: Sequence[LayerPlan], stage: str, model: FidelityModel | None = None) -> list[float]:
        """Mean distances; those that are known already are not measured again."""
        for number, plan in enumerate(plans):
            if plan not in self.known:
                if self.stop.is_set():
                    raise _StoppedError
                predicted = None if model is None else model.of(plan)
                self.known[plan] = Tried(plan, self.trial.distances(plan), predicted)
            if self.progress:
                self.progress(stage, number + 1, len(plans))
        return [self.distance(plan) for plan in plans]

    def distance(self, plan: LayerPlan) -> float:
        """Mean of a plan that was measured."""
        return fmean(self.known[plan].distances)

    def shape(self, plan: LayerPlan) -> float:
        """Of the gamma distribution that the distances of single images have; an exponential one's at most."""
        distances, least = self.known[plan].distances, self.trial.judge.least
        return min(1.0, (max(fmean(distances), least) / max(float(np.std(distances, ddof=1)), least)) ** 2)

    def predicted(self, plan: LayerPlan) -> float:
        """Its distance by a model that is fitted to all others that are known."""
        return self.model(but=plan).of(plan)

    def model(self, but: LayerPlan | None = None) -> FidelityModel:
        """Fitted to all that is known but one plan, from each layer alone on."""
        selects, patches = self.trial.selects, self.trial.patches
        depth, alone = len(selects), LayerPlan.dense(len(selects))
        merged = [_with(alone, layer, merge=patches // 4) for layer in range(depth)]
        merge = self.measure(merged, "each layer alone, merging")
        reading = [_with(alone, layer, keep=PROBED) for layer in range(depth) if selects[layer]]
        found = iter(self.measure(reading, "each layer alone, reading"))
        keep = [next(found) if own else 1.0 for own in selects]
        model = FidelityModel(Sensitivities(np.array(merge), np.array(keep)), patches, self.trial.judge.least)
        known = [seen for seen in self.known.values() if not seen.plan.is_dense and seen.plan != but]
        return model.fitted([seen.plan for seen in known], [fmean(seen.distances) for seen in known])


def _with(plan: LayerPlan, layer: int, merge: int | None = None, keep: float | None = None) -> LayerPlan:
    """A plan with one layer changed."""
    merges, shares = list(plan.merge), list(plan.keep)
    merges[layer] = merges[layer] if merge is None else merge
    shares[layer] = shares[layer] if keep is None else keep
    return LayerPlan(tuple(merges), tuple(shares))


MeasureWhole = Callable[[Deployment, LayerPlan], tuple[float, float]]
"""Of a plan's whole model: its distance, and milliseconds on the machine as it was when the search began."""


class Engines:
    """Latencies of the engines that are searched, each calibrated with a model measured whole as soon as it matters.

    Args:
        latencies: by engine. whole: measures a plan's whole model; see `MeasureWhole`.
        losses: by engine, the distance of the dense model in it: what its precision loses adds to what plans do.

    Attributes:
        losses: as given, until a plan near the answer is measured in the engine: then what that loses.
        anchors: what was measured. left_out: engines that are not searched any more, and why.
    """

    def __init__(
        self, latencies: dict[Deployment, PlanLatency], losses: dict[Deployment, float], whole: MeasureWhole
    ) -> None:
        self.latencies, self.losses, self.left_out, self._whole = latencies, losses, dict[Deployment, str](), whole
        self.anchors = dict[Deployment, Anchor]()

    def calibrate(self, engine: Deployment, plan: LayerPlan, distance: float) -> None:
        """Once, by a plan where the answer is expected. distance: of it in float32.

        Raises:
            GateError: no engine is left, since each one's precision loses too much.
        """
        if engine in self.anchors or plan.is_dense or not engine.is_here:
            return
        try:
            found, measured_ms = self._whole(engine, plan)
        except GateError as error:
            self.leave_out(engine, error)
            return
        self.anchors[engine] = Anchor(plan, measured_ms)
        self.latencies[engine] = self.latencies[engine].calibrated(self.anchors[engine])
        self.losses[engine] = max(0.0, found - distance)

    def leave_out(self, engine: Deployment, error: GateError) -> None:
        """An engine whose precision loses too much.

        Raises:
            GateError: it is the last.
        """
        if len(self.latencies) == 1:
            raise error
        self.left_out[engine] = error.what
        del self.latencies[engine]


def explore(search: Search, engines: Engines, bound: Bound, tile: int, until: float) -> FidelityModel:
    """Measure plans where the front is expected, until the answer stays as it is; returns the model that it ends with.

    Ctrl-C (or SIGTERM) ends it too, once each layer alone is known: of what was found so far answers are chosen.
    until: `time.monotonic()` at which no round is begun any more.
    """
    model, before = search.model(), 0.0
    with stopping() as search.stop, contextlib.suppress(_StoppedError):
        for number in range(ROUNDS):
            best = _round(number, search, engines, bound, tile, model)
            model = search.model()
            if abs(best - before) < SETTLED * best or time.monotonic() > until:
                break
            before = best
    return search.model()


def _round(
    number: int, search: Search, engines: Engines, bound: Bound, tile: int, model: FidelityModel
) -> float:  # fmt: skip
    """Plans around the bound measured in the engines that are near the best; what the best was expected to cost."""
    selects = search.trial.selects
    solvers = {e: Solver(latency, model, selects, tile) for e, latency in engines.latencies.items()}
    aims = {engine: _aim(solver, bound, engines.losses[engine]) for engine, solver in solvers.items()}
    costs = {e: _cost(solver, aims[e], bound, engines.losses[e]) for e, solver in solvers.items()}
    best = min(costs.values())
    followed = [e for e in sorted(costs, key=costs.__getitem__)[:MOST_ENGINES] if costs[e] <= CLOSE * best]
    plans = dict.fromkeys(
        solvers[engine].at_distance(aims[engine] * factor)
        for engine in followed
        for factor in (NEAR if number else SPREAD)
    )
    search.measure([plan for plan in plans if not plan.is_dense], f"round {number + 1}", model)
    model = search.model()
    for engine in followed:
        plan = Solver(engines.latencies[engine], model, selects, tile).at_distance(aims[engine])
        if engine not in engines.anchors and not plan.is_dense:
            engines.calibrate(engine, plan, *search.measure([plan], "near the answer", model))
    return best


def _aim(solver: Solver, bound: Bound, loss: float) -> float:
    """The distance that an engine's best plan is expected at, but for what its precision loses."""
    if bound.at_least is not None:
        most = 1 - bound.at_least
        return max(min(LEAST_AIM, most), most - loss)
    assert bound.at_most_ms is not None
    return max(LEAST_AIM, solver.model.of(solver.at_latency(bound.at_most_ms)))


def _cost(solver: Solver, aim: float, bound: Bound, loss: float) -> float:
    """What tells engines apart: milliseconds at a fidelity, distance within a latency."""
    return solver.latency.of(solver.at_distance(aim)) if bound.at_least is not None else aim + loss
