"""The search itself: plans where the front is expected are measured, until the answer stays as it is."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from statistics import fmean

import numpy as np

from sparsifiner_edge.errors import GateError
from sparsifiner_edge.front import Candidate, Deployment
from sparsifiner_edge.optimizer.fidelity_model import PROBED, FidelityModel
from sparsifiner_edge.optimizer.latency import PlanLatency
from sparsifiner_edge.optimizer.request import Bound
from sparsifiner_edge.optimizer.solve import Solver
from sparsifiner_edge.optimizer.trial import Trial
from sparsifiner_edge.optimizer.whole import WholeModels
from sparsifiner_edge.plan import LayerPlan
from sparsifiner_edge.process import stopping
from sparsifiner_edge.progress import Progress

SPREAD = (0.3, 0.5, 0.7, 0.85, 1.0, 1.2, 1.6, 2.5)
NEAR = (0.9, 0.97, 1.03)
"""Distances that are tried, as multiples of the bound: once, and then in every round."""
ROUNDS = 4
SETTLED = 0.03
"""A round that changes what is expected of the answer by less is the last."""
CLOSE, MOST_ENGINES = 1.15, 3
"""Engines are followed that are within this factor of the best, this many at most."""
ROOM = 0.98
"""Of a bound of time: two measurements of the same differ."""
LEAST_AIM = 1e-3
"""A distance below which nothing is to be gained: what the latency allows is the dense model, or nearly."""


class _StoppedError(Exception):
    """No plan is measured any more."""


class Search:
    """What is known of a student's plans, which are measured in float32 as they come up, and of engines: each is
    calibrated with a plan near the answer as soon as it matters.

    Args:
        bound: of the request. trial: measures plans. whole: measures whole models.
        dense: the dense model at the start, by what runs it. latencies: by engine.

    Attributes:
        distances: of each plan, image by image, in the order of measuring. stop: once set, no other plan is measured.
        losses: by engine, what its precision loses beside what plans do: of the dense model, until a plan near the
            answer is measured in it.
        excluded: engines that are not searched, and why.
        limit: of what is bounded: distance, or milliseconds with room for another measurement.
    """

    def __init__(
        self, bound: Bound, trial: Trial, whole: WholeModels, dense: dict[Deployment, Candidate],
        latencies: dict[Deployment, PlanLatency], excluded: dict[Deployment, str], progress: Progress | None = None,
    ) -> None:  # fmt: skip
        self.bound, self.trial, self.whole, self.dense = bound, trial, whole, dense
        self.latencies, self.excluded, self._calibrated = latencies, excluded, set[Deployment]()
        self.distances, self.stop, self._progress = dict[LayerPlan, list[float]](), threading.Event(), progress
        self.losses = {engine: max(0.0, 1 - dense[engine.dense_host].fidelity) for engine in latencies}
        self.limit = 1 - bound.value if bound.by_fidelity else ROOM * bound.value

    def measure(self, plans: Sequence[LayerPlan], stage: str) -> list[float]:
        """Mean distances; those that are known already are not measured again."""
        for number, plan in enumerate(plans):
            if plan not in self.distances:
                if self.stop.is_set():
                    raise _StoppedError
                self.distances[plan] = self.trial.distances(plan)
            if self._progress:
                self._progress(stage, number + 1, len(plans))
        return [self.mean(plan) for plan in plans]

    def mean(self, plan: LayerPlan) -> float:
        """Distance of a plan that was measured."""
        return fmean(self.distances[plan])

    def shape(self, plan: LayerPlan) -> float:
        """Of the gamma distribution that the distances of single images have; an exponential one's at most."""
        least, spread = self.trial.least, float(np.std(self.distances[plan], ddof=1))
        return min(1.0, (max(self.mean(plan), least) / max(spread, least)) ** 2)

    def model(self, but: LayerPlan | None = None) -> FidelityModel:
        """Fitted to all that is known but one plan, from each layer alone on."""
        selects, patches = self.trial.selects, self.trial.patches
        layers = range(len(selects))
        merging = [_alone(len(selects), layer, merge=patches // 4) for layer in layers]
        merge = self.measure(merging, "each layer alone, merging")
        reading = {layer: _alone(len(selects), layer, keep=PROBED) for layer in layers if selects[layer]}
        keep = dict(zip(reading, self.measure(list(reading.values()), "each layer alone, reading"), strict=True))
        model = FidelityModel(merge, [keep.get(layer, 1.0) for layer in layers], patches, self.trial.least)
        known = [plan for plan in self.distances if not plan.is_dense and plan != but]
        return model.fit(known, [self.mean(plan) for plan in known])

    def constraint(self, engine: Deployment, plan: LayerPlan) -> float:
        """What is bounded: a plan's distance, or its milliseconds as predicted."""
        return self._terms(engine, plan)[not self.bound.by_fidelity]

    def objective(self, engine: Deployment, plan: LayerPlan) -> float:
        """The other of the two, which is to be small."""
        return self._terms(engine, plan)[self.bound.by_fidelity]

    def _terms(self, engine: Deployment, plan: LayerPlan) -> tuple[float, float]:
        """Its distance as measured in float32 with what the precision loses, and its milliseconds as predicted."""
        return self.mean(plan) + self.losses[engine], self.latencies[engine].of(plan)

    def best(self, engine: Deployment, limit: float) -> LayerPlan:
        """Of the plans that were measured and stay within a limit the best; where none does the nearest to it."""
        plans = [plan for plan in self.distances if not plan.is_dense]
        within = [plan for plan in plans if self.constraint(engine, plan) <= limit]
        if within:
            return min(within, key=lambda plan: self.objective(engine, plan))
        return min(plans, key=lambda plan: self.constraint(engine, plan))

    def distance(self, engine: Deployment, plan: LayerPlan) -> float:
        """Of a plan's whole model in an engine."""
        return fmean(self.whole.distances(plan, engine, self.trial))

    def calibrate(self, engine: Deployment, plan: LayerPlan) -> None:
        """Once, by a plan where the answer is expected, beside the dense model, which shows how the machine's
        speed has changed; a board that is not here stays as it is estimated.

        Raises:
            GateError: no engine is left, since each one's precision loses too much.
        """
        if engine in self._calibrated or plan.is_dense:
            return
        (in_float32,) = self.measure([plan], "near the answer")
        if not engine.is_here:
            return
        host, nothing = engine.dense_host, LayerPlan.dense(len(plan.keep))
        try:
            ours, again = self.whole.times([(plan, engine), (nothing, host)])
        except GateError as error:
            self.exclude(engine, error)
            return
        self._calibrated.add(engine)
        ms = ours.value * self.dense[host].predicted_ms / again.value
        self.latencies[engine] = self.latencies[engine].calibrate(plan, ms)
        self.losses[engine] = max(0.0, self.distance(engine, plan) - in_float32)

    def exclude(self, engine: Deployment, error: GateError) -> None:
        """An engine whose precision loses too much.

        Raises:
            GateError: it is the last.
        """
        if len(self.latencies) == 1:
            raise error
        self.excluded[engine] = error.what
        del self.latencies[engine]


def _alone(depth: int, changed: int, merge: int = 0, keep: float = 1.0) -> LayerPlan:
    """The dense plan with one layer changed."""
    layers = range(depth)
    return LayerPlan(
        tuple(merge if layer == changed else 0 for layer in layers),
        tuple(keep if layer == changed else 1.0 for layer in layers),
    )


def explore(search: Search, tile: int, until: float) -> None:
    """Measure plans where the front is expected, until the answer stays as it is.

    Ctrl-C (or SIGTERM) ends it too, once each layer alone is known: of what was found so far answers are chosen.
    until: `time.monotonic()` at which no round is begun any more, nor an engine calibrated.
    """
    search.model()
    before = 0.0
    with stopping() as search.stop, contextlib.suppress(_StoppedError):
        for number in range(ROUNDS):
            best = _round(number, search, tile, until)
            if abs(best - before) < SETTLED * best or time.monotonic() > until:
                break
            before = best


def _round(number: int, search: Search, tile: int, until: float) -> float:
    """Plans around the bound measured in the engines that are near the best; what the best was expected to cost."""
    bound, losses, selects, model = search.bound, search.losses, search.trial.selects, search.model()
    solvers = {e: Solver(latency, model, selects, tile) for e, latency in search.latencies.items()}
    aims = {engine: _aim(solver, bound, losses[engine]) for engine, solver in solvers.items()}
    costs = {engine: _cost(solver, aims[engine], bound, losses[engine]) for engine, solver in solvers.items()}
    best = min(costs.values())
    followed = [e for e in sorted(costs, key=costs.__getitem__)[:MOST_ENGINES] if costs[e] <= CLOSE * best]
    chosen = dict.fromkeys(
        solvers[engine].at_distance(aims[engine] * factor)
        for engine in followed
        for factor in (NEAR if number else SPREAD)
    )
    search.measure([plan for plan in chosen if not plan.is_dense], f"round {number + 1}")
    if time.monotonic() > until:  # A whole model more takes a minute; what is chosen is measured whole anyway.
        return best
    model = search.model()
    for engine in followed:
        search.calibrate(engine, Solver(search.latencies[engine], model, selects, tile).at_distance(aims[engine]))
    return best


def _aim(solver: Solver, bound: Bound, loss: float) -> float:
    """The distance that an engine's best plan is expected at, but for what its precision loses."""
    if bound.by_fidelity:
        return max(min(LEAST_AIM, 1 - bound.value), 1 - bound.value - loss)
    return max(LEAST_AIM, solver.model.of(solver.at_latency(ROOM * bound.value)))


def _cost(solver: Solver, aim: float, bound: Bound, loss: float) -> float:
    """What tells engines apart: milliseconds at a fidelity, distance within a latency."""
    return solver.latency.of(solver.at_distance(aim)) if bound.by_fidelity else aim + loss
