"""The search itself: a bundle at once, better ones as long as there is time; nothing is lost when it ends."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean, stdev

import numpy as np

from sparsifiner_edge.errors import BackendError, GateError
from sparsifiner_edge.front import Deployment
from sparsifiner_edge.optimizer.clock import Clock
from sparsifiner_edge.optimizer.fidelity_model import PROBED, FidelityModel
from sparsifiner_edge.optimizer.latency import PlanLatency
from sparsifiner_edge.optimizer.request import SearchRequest
from sparsifiner_edge.optimizer.solve import Solver
from sparsifiner_edge.optimizer.trial import Trial, evenly_lost
from sparsifiner_edge.optimizer.whole import Attempt, WholeModels
from sparsifiner_edge.plan import LayerPlan, falling
from sparsifiner_edge.results import Quantity

FIRST_RATE, FIRST_AIM, FIRST_TRIES, STEEP = 0.14, 0.7, 3, 1.7
"""Of the patches, what the first layer of the first plan merges, and ever fewer the next ones; the share of what may be
lost that it aims at, in so many tries, where it loses as a power of its rate: a precision loses something too.
"""
SPREAD = (0.4, 0.6, 0.8, 1.0, 1.2, 1.6)
NEAR = (0.85, 0.95, 1.05)
"""Distances that are tried, as multiples of what is aimed at: once, and then in every round."""
ROUNDS = 4
SETTLED = 0.02
"""A round that changes what is expected of the answer by less is the last."""
CLOSE, MOST_ENGINES = 1.2, 2
"""Engines are followed that are within this factor of the best, this many at most."""
ENGINES_SHARE = 0.16
"""Of all time, that engines may be tried for."""
FAR = 1.4
"""A backend that takes so many times as long as another is tried in no other precision."""
TRIES, NEAR_ENOUGH, JUST, LOOSER = 4, 0.88, 0.97, 1.3
"""Plans of one engine that become bundles until one reaches so much of the bound; what the next one aims at of it, and
how much further than the last at most.
"""
ROOM = 0.98
"""Of a bound of time: two measurements of the same differ."""
DEVIATIONS = 0.7
"""Standard errors of the mean distance that are kept from the bound: images to come are others."""
HARDER = 2.0
"""How many times as much images kept back are taken to lose, at most: they may be few."""
LEAST_AIM = 1e-3
"""A distance below which nothing is to be gained: what the latency allows is the dense model, or nearly."""
BUNDLE, LAST_SHARE = ("export", "export int8", "judging", "timing"), 0.1
"""What a plan takes to become a bundle; of all time, what the last measurement may take."""
PROBES = 3
"""Judges of a plan that changes one layer alone."""


class Search:
    """What is known of a student's plans, which are judged in float32 as they come up, of engines, and of bundles.

    Args:
        request: what for. trial: judges plans. models: as bundles. clock: says what still fits.
        few: how many images judge plans, but for the first, which all judge.
        keep: is given every bundle that is better than what was found before.

    Attributes:
        distances: of each plan, judge by judge. alone: mean of each plan that changes one layer.
        latencies: of engines that are followed, and ms: of whole models, as of the reference.
        losses: by engine, what its precision loses beside what plans do.
        excluded: engines that are not searched, and why. attempts: bundles, as they came; current: the kept.
        remarks: on the way.
        limit: of what is bounded: distance, or milliseconds with room for another measurement.
        factor: of a mean distance over all images, to that over the judges. spread: of one as it counts, to the mean,
            for images differ; margin: the same, or what the last bundle lost on the images kept back.
    """

    def __init__(
        self,
        request: SearchRequest,
        trial: Trial,
        models: WholeModels,
        clock: Clock,
        few: int,
        keep: Callable[[Attempt], None],
    ) -> None:
        self.few = few
        self.request, self.bound, self.trial, self.models, self.clock = request, request.bound, trial, models, clock
        self._keep, self.count = keep, len(request.images)
        self.distances, self.alone = dict[LayerPlan, list[float]](), dict[LayerPlan, float]()
        self.latencies, self.ms = dict[Deployment, PlanLatency](), dict[tuple[LayerPlan, Deployment], Quantity]()
        self.losses, self.excluded, self.attempts = dict[Deployment, float](), dict[Deployment, str](), list[Attempt]()
        self.remarks, self.factor, self.spread, self.margin = list[str](), 1.0, 1.0, 1.0
        self.current: Attempt | None = None
        self.limit = 1 - self.bound.value if self.bound.by_fidelity else ROOM * self.bound.value

    def judge(self, plan: LayerPlan, stage: str) -> float:
        """Its mean distance; what is known already is not measured again."""
        if plan not in self.distances:
            with self.clock.step("plan", stage):
                self.distances[plan] = self.trial.distances(plan)
        return self.mean(plan)

    def mean(self, plan: LayerPlan) -> float:
        """Distance of a plan that was judged, over all images as far as is known; no less than what counts."""
        return max(self.trial.least, self.factor * fmean(self.distances[plan]))

    def model(self, but: LayerPlan | None = None) -> FidelityModel:
        """Fitted to all that is known but one plan, from each layer alone on."""
        selects, patches = self.trial.selects, self.trial.patches
        merge = [self._probe(layer, merge=patches // 4) for layer in range(len(selects))]
        keep = [self._probe(layer, keep=PROBED) if reads else 1.0 for layer, reads in enumerate(selects)]
        model = FidelityModel(merge, keep, patches, self.trial.least)
        known = [plan for plan in self.distances if plan != but]
        return model.fit(known, [self.mean(plan) for plan in known])

    def _probe(self, layer: int, merge: int = 0, keep: float = 1.0) -> float:
        """Of the dense plan with one layer changed."""
        chosen = [each == layer for each in range(len(self.trial.selects))]
        plan = LayerPlan(tuple(merge * each for each in chosen), tuple(keep if each else 1.0 for each in chosen))
        if plan not in self.alone:
            with self.clock.step("probe", f"layer {layer} alone, {'merging' if merge else 'reading'}"):
                self.alone[plan] = fmean(self.trial.distances(plan, PROBES))
        return self.alone[plan]

    def constraint(self, engine: Deployment, plan: LayerPlan) -> float:
        """What is bounded: a plan's distance, or its milliseconds as predicted."""
        return self._terms(engine, plan)[not self.bound.by_fidelity]

    def objective(self, engine: Deployment, plan: LayerPlan) -> float:
        """The other of the two, which is to be small."""
        return self._terms(engine, plan)[self.bound.by_fidelity]

    def _terms(self, engine: Deployment, plan: LayerPlan) -> tuple[float, float]:
        """Its distance in float32, as it counts, with what the precision loses, and its milliseconds as predicted."""
        return self.margin * (self.mean(plan) + self.losses[engine]), self.latencies[engine].of(plan)

    def best(self, engine: Deployment, limit: float) -> LayerPlan:
        """Of the plans that were measured and stay within a limit the best; where none does the nearest to it."""
        within = [plan for plan in self.distances if self.constraint(engine, plan) <= limit]
        if within:
            return min(within, key=lambda plan: self.objective(engine, plan))
        return min(self.distances, key=lambda plan: self.constraint(engine, plan))

    def bounded(self, attempt: Attempt) -> float:
        """What is bounded of a bundle, as it counts: the mean distance and a bit more, for images to come are others,
        or on the images kept back where that is worse; or the milliseconds.
        """
        if not self.bound.by_fidelity:
            return attempt.ms.value
        spread = stdev(attempt.distances) / len(attempt.distances) ** 0.5
        counted: float = max(fmean(attempt.distances) + DEVIATIONS * spread, fmean(attempt.reserved))
        return counted if counted > self.trial.least else self.trial.least

    def order(self, attempt: Attempt) -> tuple[bool, float]:
        """What is better comes first: what meets the bound, and of that the best; else the nearest to it."""
        reached, best = self.bounded(attempt), attempt.ms.value if self.bound.by_fidelity else fmean(attempt.distances)
        return (False, best) if reached <= self.limit else (True, reached)

    def ranked(self) -> list[Attempt]:
        """The best first: of those that were measured again in the end, or the best of all where none was."""
        attempts = sorted(self.attempts, key=self.order)
        return [one for one in attempts if one.again] or attempts[:1]

    def try_out(self, plan: LayerPlan, engine: Deployment) -> Attempt | None:
        """Make a bundle, time and judge it, and keep it if nothing better was found; None: the engine is out."""
        earlier = next((one for one in self.attempts if (one.plan, one.engine) == (plan, engine)), None)
        if earlier is not None:
            return earlier
        try:
            distances = self.models.distances(plan, engine, self.trial)
            ms = self.time(plan, engine)
        except (GateError, BackendError) as error:
            self.exclude(engine, error)
            return None
        known = engine in self.latencies
        predicted = (
            (self.model(but=plan).of(plan) + self.losses[engine], self.latencies[engine].of(plan))
            if known
            else (fmean(distances[: self.count]), ms.value)
        )
        attempt = Attempt(plan, engine, ms, distances[: self.count], distances[self.count :], predicted)
        self.attempts.append(attempt)
        if plan in self.distances:
            lost = max(
                0.0, fmean(attempt.distances[number] for number in self.trial.judges) * self.factor - self.mean(plan)
            )
            self.losses[engine] = max(lost, self.losses.get(engine, 0.0))
        if self.bound.by_fidelity:  # Images kept back may be harder.
            ratio = fmean(attempt.reserved) / max(fmean(attempt.distances), self.trial.least)
            self.margin = max(self.spread, min(ratio, HARDER))
        if known and engine.is_here:
            self.latencies[engine] = self.latencies[engine].calibrate(plan, ms.value)
        if min(self.attempts, key=self.order) is attempt:
            self._keep(attempt)
            self.current = attempt
        return attempt

    def choose_judges(self, plan: LayerPlan) -> None:
        """From what a plan loses on all images: which are kept back, as easy and as hard as the others; which few of
        these stand for them, and how much all lose beside those.
        """
        lost = self.distances[plan]
        back = evenly_lost(lost, len(lost) - self.count)
        places = [place for place in range(len(lost)) if place not in back]
        self.trial.arrange([*places, *back])
        paths, lost = self.trial.paths, [lost[place] for place in places]
        self.models.images = paths[: self.count]
        self.request = self.request._replace(images=paths[: self.count], reserved=paths[self.count :])
        self.trial.choose_judges(lost, self.few)
        self.distances = {plan: [lost[number] for number in self.trial.judges]}
        self.factor = max(fmean(lost), self.trial.least) / max(fmean(self.distances[plan]), self.trial.least)
        if self.bound.by_fidelity:
            self.spread = 1 + DEVIATIONS * stdev(lost) / len(lost) ** 0.5 / max(fmean(lost), self.trial.least)
            self.margin = self.spread

    def fits(self, *kinds: str) -> bool:
        """Whether there is time for these steps before the last measurement."""
        return self.clock.fits(*kinds, reserve=LAST_SHARE)

    def time(self, plan: LayerPlan, engine: Deployment) -> Quantity:
        """Of a whole model, once.

        Raises:
            GateError, BackendError: see `WholeModels.ms`.
        """
        if (plan, engine) not in self.ms:
            self.ms[plan, engine] = self.models.ms(plan, engine)
        return self.ms[plan, engine]

    def exclude(self, engine: Deployment, error: GateError | BackendError) -> None:
        """An engine that refuses the model, or whose precision loses too much.

        Raises:
            GateError, BackendError: no other is left.
        """
        self.excluded[engine] = error.what
        self.latencies.pop(engine, None)
        if set(self.request.engines) <= set(self.excluded):
            raise error


def first_plan(search: Search) -> LayerPlan:
    """A bundle at once: no predictor and no table is needed for a plan that merges alone.

    It is judged by all images, those kept back too, and tells which few of the others judge from then on. Of a bound of
    time it knows nothing yet: it loses a fiftieth, about.
    """
    patches, depth, limit = search.trial.patches, len(search.trial.selects), search.limit
    limit = limit if search.bound.by_fidelity else 0.02
    rate, steep, losses = FIRST_RATE * patches, STEEP, dict[LayerPlan, float]()
    for _ in range(FIRST_TRIES):
        plan = falling(min(rate, patches / 4), patches, depth)
        search.judge(plan, "a first plan")
        of = search.distances[plan]
        lost = max(search.trial.least, *(fmean(some) for some in (of[: search.count], of[search.count :]) if some))
        if losses and plan not in losses:  # As the last two lie.
            other, before = list(losses.items())[-1]
            apart = np.log(lost / before) / np.log(plan.merge[0] / other.merge[0])
            steep = float(np.clip(apart, 1.0, 2 * STEEP))
        losses[plan] = lost
        if FIRST_AIM * 0.8 * limit <= lost <= FIRST_AIM * 1.15 * limit:
            break
        rate = plan.merge[0] * float(np.clip((FIRST_AIM * limit / lost) ** (1 / steep), 0.2, 3.0))
    within = [plan for plan, lost in losses.items() if lost <= 1.2 * FIRST_AIM * limit]
    plan = max(within, key=losses.__getitem__) if within else min(losses, key=losses.__getitem__)
    search.choose_judges(plan)
    engines = search.request.engines
    plain = [engine for engine in engines if (engine.stored, engine.computes) == ("fp32", "auto")]
    for engine in [*plain[:1], *engines]:
        if search.try_out(plan, engine) is not None:
            break
    return plan


def choose_engines(search: Search, plan: LayerPlan) -> list[Deployment]:
    """Engines that are worth it, the fastest first: a plan is timed in each, and the dense model in what is left."""
    until, ms = search.clock.gone + ENGINES_SHARE * search.clock.seconds, dict[Deployment, float]()
    for engine in search.request.engines:
        slower = [ms[x] / min(ms.values()) for x in ms if x.backend == engine.backend]
        if slower and min(slower) > FAR:
            search.excluded[engine] = f"{engine.backend} takes {min(slower):.1f} times as long in another precision"
        elif search.clock.gone > until and ms:
            if not any(attempt.engine == engine for attempt in search.attempts):
                search.excluded[engine] = "there was no time to try it"
            continue
        if engine in search.excluded:
            continue
        try:
            ms[engine] = search.time(plan, engine).value
        except (GateError, BackendError) as error:
            search.exclude(engine, error)
    order = sorted(ms, key=ms.__getitem__)
    close = [engine for engine in order if ms[engine] <= CLOSE * ms[order[0]]][:MOST_ENGINES]
    nothing = LayerPlan.dense(len(search.trial.selects))
    for engine in list(close):
        try:
            search.time(nothing, engine.dense_host)
        except (GateError, BackendError) as error:
            search.exclude(engine, error)
            close.remove(engine)
    for number, engine in enumerate(close):  # What a precision loses is much the same wherever it runs.
        alike = [other for other in close[:number] if other.stored == engine.stored and other in search.losses]
        if alike:
            search.losses[engine] = search.losses[alike[0]]
        else:
            search.try_out(plan, engine)
    return [engine for engine in close if engine not in search.excluded]


def explore(
    search: Search, learn: Callable[[], None], latency_of: Callable[[Deployment], PlanLatency], tile: int
) -> None:
    """Judge plans where the front is expected, and make bundles of the best, until the answer stays as it is or the
    time is over.

    Args:
        learn: lets predictors learn, once engines are known: then plans may read less, where `Trial.selects` says so.
        latency_of: an engine's from parts, not yet calibrated. tile: the student's.
    """
    plan = first_plan(search)
    engines, nothing = choose_engines(search, plan), LayerPlan.dense(len(search.trial.selects))
    learn()
    search.model()
    for engine in engines:
        with search.clock.step("parts", f"timing parts of layers in {engine}"):
            latency = latency_of(engine)
        if engine.is_here:
            latency = latency.calibrate(nothing, search.ms[nothing, engine.dense_host].value)
            latency = latency.calibrate(plan, search.ms[plan, engine].value)
        search.latencies[engine] = latency
        if not search.fits("parts", "plan", *BUNDLE):
            break
    if not search.latencies:  # No engine that is near the best takes the dense model: what is there stays.
        return
    before = 0.0
    for number in range(ROUNDS):
        best = _round(number, search, tile)
        if not number and search.fits(*BUNDLE, *BUNDLE):  # Better soon; and rounds learn from it.
            engine = _promising(search)[0]
            search.try_out(search.best(engine, search.limit), engine)
        if abs(best - before) < SETTLED * best or not search.fits(*len(SPREAD) * ("plan",), *BUNDLE):
            break
        before = best
    for engine in _promising(search):
        _tighten(search, engine, tile)


def _round(number: int, search: Search, tile: int) -> float:
    """Plans around the bound judged for the engines that are near the best; what the best was expected to cost."""
    selects, model = search.trial.selects, search.model()
    solvers = {e: Solver(latency, model, selects, tile) for e, latency in search.latencies.items()}
    aims = {engine: _aim(search, solver, search.losses[engine]) for engine, solver in solvers.items()}
    costs = {engine: _cost(search, solver, aims[engine]) for engine, solver in solvers.items()}
    best = min(costs.values())
    followed = [engine for engine in sorted(costs, key=costs.__getitem__) if costs[engine] <= CLOSE * best]
    chosen = dict.fromkeys(
        solvers[engine].at_distance(aims[engine] * factor)
        for engine in followed
        for factor in (NEAR if number else SPREAD)
    )
    for plan in chosen:
        if not plan.is_dense and search.fits("plan", *BUNDLE):
            search.judge(plan, f"round {number + 1}")
    return best


def _aim(search: Search, solver: Solver, loss: float) -> float:
    """The distance that an engine's best plan is expected at, but for what its precision loses."""
    if search.bound.by_fidelity:
        return max(min(LEAST_AIM, search.limit), search.limit / search.margin - loss)
    return max(LEAST_AIM, solver.model.of(solver.at_latency(search.limit)))


def _cost(search: Search, solver: Solver, aim: float) -> float:
    """What tells engines apart: milliseconds at a fidelity, distance within a latency."""
    return solver.latency.of(solver.at_distance(aim)) if search.bound.by_fidelity else aim


def _promising(search: Search) -> list[Deployment]:
    """Engines by what their best plan is expected to cost."""
    costs = {engine: search.objective(engine, search.best(engine, search.limit)) for engine in search.latencies}
    order = sorted(costs, key=costs.__getitem__)
    return [engine for engine in order if costs[engine] <= CLOSE * costs[order[0]]]


def _tighten(search: Search, engine: Deployment, tile: int) -> None:
    """Plans as bundles until one just meets the bound: what a precision and more images lose on top, or what a whole
    model takes longer than predicted, is known from the last one, and the next is as much tighter, or looser.
    """
    aim, plan = search.limit, search.best(engine, search.limit)
    for _ in range(TRIES):
        attempt = search.try_out(plan, engine) if search.fits(*BUNDLE) else None
        if attempt is None:
            return
        reached = search.bounded(attempt)
        if NEAR_ENOUGH * search.limit <= reached <= search.limit or not search.fits("plan", *BUNDLE):
            return
        aim = min(JUST * search.limit * search.constraint(engine, plan) / reached, LOOSER * aim)
        solver = Solver(search.latencies[engine], search.model(), search.trial.selects, tile)
        for factor in (1.0, 0.9, 1.1):
            distance = max(LEAST_AIM, factor * aim / search.margin - search.losses[engine])
            one = solver.at_distance(distance) if search.bound.by_fidelity else solver.at_latency(factor * aim)
            if not one.is_dense:
                search.judge(one, "near the bound")
        before, plan = plan, search.best(engine, aim)
        if plan == before:
            return
