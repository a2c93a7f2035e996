"""The search: it exports a first bundle quickly and better ones while time remains; the best so far is always kept."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean, stdev

import numpy as np

from sparsifiner_edge.errors import BackendError, GateError
from sparsifiner_edge.optimizer.clock import Clock
from sparsifiner_edge.optimizer.fidelity_model import PROBED, FidelityModel
from sparsifiner_edge.optimizer.latency import PlanLatency
from sparsifiner_edge.optimizer.request import SearchRequest
from sparsifiner_edge.optimizer.solve import Solver
from sparsifiner_edge.optimizer.trial import Trial, evenly_by_error
from sparsifiner_edge.optimizer.whole import Attempt, WholeModels
from sparsifiner_edge.pareto import Deployment
from sparsifiner_edge.plan import LayerPlan, falling
from sparsifiner_edge.results import Quantity

FIRST_RATE = 0.14
"""Share of the patches that the first layer of the first plan merges; later layers merge linearly fewer."""
FIRST_AIM = 0.7
"""Share of the allowed error that the first plan aims at, because int8 adds an error too."""
FIRST_TRIES = 3
"""Maximum number of first plans."""
STEEP = 1.7
"""Assumed exponent of the error as a function of the merge rate."""
SPREAD = (0.4, 0.6, 0.8, 1.0, 1.2, 1.6)
"""Multiples of the target error that are evaluated once."""
NEAR = (0.85, 0.95, 1.05)
"""Multiples of the target error that are evaluated in every round."""
ROUNDS = 4
"""Maximum number of rounds."""
SETTLED = 0.02
"""Relative change of the expected answer below which a round is the last."""
CLOSE = 1.2
"""Deployments within this factor of the best are followed."""
MOST_DEPLOYMENTS = 2
"""Maximum number of deployments that are followed."""
DEPLOYMENTS_SHARE = 0.16
"""Share of the whole time for trying deployments."""
FAR = 1.4
"""A backend that is slower than another by this factor is tried in no other precision."""
TRIES = 4
"""Maximum number of plans per deployment that are exported to come close to the bound."""
NEAR_ENOUGH = 0.88
"""Share of the bound that ends these tries."""
JUST = 0.97
"""Share of the bound that the next try aims at."""
LOOSER = 1.3
"""Maximum factor by which the next try may be looser than the last."""
ROOM = 0.98
"""Share of a latency bound to aim at: two measurements of the same model differ."""
DEVIATIONS = 0.7
"""Safety margin below the bound, in standard errors of the mean error, because other images will differ."""
HARDER = 2.0
"""Maximum factor by which held-out images are assumed to be harder: they may be few."""
LEAST_AIM = 1e-3
"""Smallest error to aim for. A latency bound that allows less error allows (almost) the dense model."""
BUNDLE = ("export", "export int8", "evaluating", "timing")
"""Steps that turn a plan into a measured bundle."""
LAST_SHARE = 0.1
"""Share of the whole time for the last measurement."""
PROBES = 3
"""Number of selection images for plans that change a single layer."""


class Search:
    """State of a search: plans evaluated in float32, deployments, and bundles.

    Args:
        request: What is searched for.
        trial: Evaluates plans.
        models: Plans as bundles.
        clock: Time budget.
        few: Number of selection images for all plans but the first, which is evaluated on all images.
        keep: Called with every bundle that is better than the ones before.

    Attributes:
        errors: Errors of each plan by selection image.
        alone: Mean error of each plan that changes one layer.
        latencies: Latency models of the deployments that are followed.
        ms: Times of whole models relative to the reference.
        losses: Error that a deployment's precision adds to that of the plan.
        excluded: Deployments that are not searched, with the reason.
        attempts: Bundles in the order in which they were made.
        current: The best bundle so far.
        remarks: Remarks for the user.
        limit: Limit of the bounded quantity: error, or milliseconds with room for another measurement.
        factor: Ratio of the mean error over all images to that over the selection images.
        spread: Ratio of an error with its safety margin to the mean.
        margin: Factor on errors before they are compared with the bound: `spread`, or the last bundle's ratio of the
            error on held-out images to that on the others (at most `HARDER`), whichever is larger.
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
        self.errors, self.alone = dict[LayerPlan, list[float]](), dict[LayerPlan, float]()
        self.latencies, self.ms = dict[Deployment, PlanLatency](), dict[tuple[LayerPlan, Deployment], Quantity]()
        self.losses, self.excluded, self.attempts = dict[Deployment, float](), dict[Deployment, str](), list[Attempt]()
        self.remarks, self.factor, self.spread, self.margin = list[str](), 1.0, 1.0, 1.0
        self.current: Attempt | None = None
        self.limit = 1 - self.bound.value if self.bound.by_fidelity else ROOM * self.bound.value

    def evaluate(self, plan: LayerPlan, stage: str) -> float:
        """Return the mean error of a plan; known plans are not evaluated again."""
        if plan not in self.errors:
            with self.clock.step("plan", stage):
                self.errors[plan] = self.trial.errors(plan)
        return self.mean(plan)

    def mean(self, plan: LayerPlan) -> float:
        """Return the estimated mean error of an evaluated plan over all images.

        Smaller errors are set to the floor `Trial.least`.
        """
        return max(self.trial.least, self.factor * fmean(self.errors[plan]))

    def model(self, but: LayerPlan | None = None) -> FidelityModel:
        """Fit the fidelity model to everything known except one plan, starting from single layers."""
        selects, patches = self.trial.selects, self.trial.patches
        merge = [self._probe(layer, merge=patches // 4) for layer in range(len(selects))]
        keep = [self._probe(layer, keep=PROBED) if reads else 1.0 for layer, reads in enumerate(selects)]
        model = FidelityModel(merge, keep, patches, self.trial.least)
        known = [plan for plan in self.errors if plan != but]
        return model.fit(known, [self.mean(plan) for plan in known])

    def _probe(self, layer: int, merge: int = 0, keep: float = 1.0) -> float:
        """Return the error of the dense plan with one layer changed."""
        chosen = [each == layer for each in range(len(self.trial.selects))]
        plan = LayerPlan(tuple(merge * each for each in chosen), tuple(keep if each else 1.0 for each in chosen))
        if plan not in self.alone:
            with self.clock.step("probe", f"layer {layer} alone, {'merging' if merge else 'reading'}"):
                self.alone[plan] = fmean(self.trial.errors(plan, PROBES))
        return self.alone[plan]

    def constraint(self, deployment: Deployment, plan: LayerPlan) -> float:
        """Return the bounded quantity of a plan: its error, or its predicted milliseconds."""
        return self._terms(deployment, plan)[not self.bound.by_fidelity]

    def objective(self, deployment: Deployment, plan: LayerPlan) -> float:
        """Return the other quantity, which is minimised."""
        return self._terms(deployment, plan)[self.bound.by_fidelity]

    def _terms(self, deployment: Deployment, plan: LayerPlan) -> tuple[float, float]:
        """Return the error of a plan, including that of the deployment's precision, and the predicted milliseconds."""
        return self.margin * (self.mean(plan) + self.losses[deployment]), self.latencies[deployment].of(plan)

    def best(self, deployment: Deployment, limit: float) -> LayerPlan:
        """Return the best measured plan within a limit; if none is, the one closest to it."""
        within = [plan for plan in self.errors if self.constraint(deployment, plan) <= limit]
        if within:
            return min(within, key=lambda plan: self.objective(deployment, plan))
        return min(self.errors, key=lambda plan: self.constraint(deployment, plan))

    def bounded(self, attempt: Attempt) -> float:
        """Return the bounded quantity of a bundle.

        It is the mean error with a safety margin, or the error on the held-out images if that is larger; or the
        milliseconds.
        """
        if not self.bound.by_fidelity:
            return attempt.ms.value
        spread = stdev(attempt.errors) / len(attempt.errors) ** 0.5
        counted: float = max(fmean(attempt.errors) + DEVIATIONS * spread, fmean(attempt.reserved))
        return counted if counted > self.trial.least else self.trial.least

    def order(self, attempt: Attempt) -> tuple[bool, float]:
        """Return a sort key: bundles that meet the bound first, the best of them first; then the closest."""
        reached, best = self.bounded(attempt), attempt.ms.value if self.bound.by_fidelity else fmean(attempt.errors)
        return (False, best) if reached <= self.limit else (True, reached)

    def ranked(self) -> list[Attempt]:
        """Return the bundles, the best first: those that were measured again at the end, else all."""
        attempts = sorted(self.attempts, key=self.order)
        return [one for one in attempts if one.again] or attempts[:1]

    def try_out(self, plan: LayerPlan, deployment: Deployment) -> Attempt | None:
        """Export, time and evaluate a plan, and keep it if it is the best so far.

        Returns:
            The bundle; None if the deployment was excluded.
        """
        earlier = next((one for one in self.attempts if (one.plan, one.deployment) == (plan, deployment)), None)
        if earlier is not None:
            return earlier
        try:
            errors = self.models.errors(plan, deployment, self.trial)
            ms = self.time(plan, deployment)
        except (GateError, BackendError) as error:
            self.exclude(deployment, error)
            return None
        known = deployment in self.latencies
        predicted = (
            (self.model(but=plan).of(plan) + self.losses[deployment], self.latencies[deployment].of(plan))
            if known
            else (fmean(errors[: self.count]), ms.value)
        )
        attempt = Attempt(plan, deployment, ms, errors[: self.count], errors[self.count :], predicted)
        self.attempts.append(attempt)
        if plan in self.errors:
            lost = max(
                0.0, fmean(attempt.errors[number] for number in self.trial.selection) * self.factor - self.mean(plan)
            )
            self.losses[deployment] = max(lost, self.losses.get(deployment, 0.0))
        if self.bound.by_fidelity:  # Held-out images may be harder.
            ratio = fmean(attempt.reserved) / max(fmean(attempt.errors), self.trial.least)
            self.margin = max(self.spread, min(ratio, HARDER))
        if known and deployment.is_here:
            self.latencies[deployment] = self.latencies[deployment].calibrate(plan, ms.value)
        if min(self.attempts, key=self.order) is attempt:
            self._keep(attempt)
            self.current = attempt
        return attempt

    def split_images(self, plan: LayerPlan) -> None:
        """Choose held-out and selection images by the errors of a plan, so that each set is as hard as all images.

        Also sets the ratio between the mean error over all images and over the selection images.
        """
        lost = self.errors[plan]
        back = evenly_by_error(lost, len(lost) - self.count)
        places = [place for place in range(len(lost)) if place not in back]
        self.trial.arrange([*places, *back])
        paths, lost = self.trial.paths, [lost[place] for place in places]
        self.models.images = paths[: self.count]
        self.request = self.request._replace(images=paths[: self.count], reserved=paths[self.count :])
        self.trial.choose_selection(lost, self.few)
        self.errors = {plan: [lost[number] for number in self.trial.selection]}
        self.factor = max(fmean(lost), self.trial.least) / max(fmean(self.errors[plan]), self.trial.least)
        if self.bound.by_fidelity:
            self.spread = 1 + DEVIATIONS * stdev(lost) / len(lost) ** 0.5 / max(fmean(lost), self.trial.least)
            self.margin = self.spread

    def fits(self, *kinds: str) -> bool:
        """Return True if there is time for these steps before the last measurement."""
        return self.clock.fits(*kinds, reserve=LAST_SHARE)

    def time(self, plan: LayerPlan, deployment: Deployment) -> Quantity:
        """Measure a whole model once.

        Raises:
            GateError: See `WholeModels.ms`.
            BackendError: See `WholeModels.ms`.
        """
        if (plan, deployment) not in self.ms:
            self.ms[plan, deployment] = self.models.ms(plan, deployment)
        return self.ms[plan, deployment]

    def exclude(self, deployment: Deployment, error: GateError | BackendError) -> None:
        """Exclude a deployment that refuses the model or whose precision adds too much error.

        Raises:
            GateError: No other deployment is left.
            BackendError: No other deployment is left.
        """
        self.excluded[deployment] = error.what
        self.latencies.pop(deployment, None)
        if set(self.request.deployments) <= set(self.excluded):
            raise error


def first_plan(search: Search) -> LayerPlan:
    """Find a first plan that only merges, which needs neither predictors nor tables.

    It is evaluated on all images, including held-out ones, and decides which few images evaluate all later plans. A
    latency bound is not considered yet: the plan aims at an error of about .02.
    """
    patches, depth, limit = search.trial.patches, len(search.trial.selects), search.limit
    limit = limit if search.bound.by_fidelity else 0.02
    rate, exponent, errors = FIRST_RATE * patches, STEEP, dict[LayerPlan, float]()
    for _ in range(FIRST_TRIES):
        plan = falling(min(rate, patches / 4), patches, depth)
        search.evaluate(plan, "a first plan")
        measured = search.errors[plan]
        error = max(
            search.trial.least, *(fmean(some) for some in (measured[: search.count], measured[search.count :]) if some)
        )
        if errors and plan not in errors:  # Slope through the last two plans.
            other, before = list(errors.items())[-1]
            slope = np.log(error / before) / np.log(plan.merge[0] / other.merge[0])
            exponent = float(np.clip(slope, 1.0, 2 * STEEP))
        errors[plan] = error
        if FIRST_AIM * 0.8 * limit <= error <= FIRST_AIM * 1.15 * limit:
            break
        rate = plan.merge[0] * float(np.clip((FIRST_AIM * limit / error) ** (1 / exponent), 0.2, 3.0))
    within = [plan for plan, error in errors.items() if error <= 1.2 * FIRST_AIM * limit]
    plan = max(within, key=errors.__getitem__) if within else min(errors, key=errors.__getitem__)
    search.split_images(plan)
    deployments = search.request.deployments
    plain = [
        deployment
        for deployment in deployments
        if (deployment.precision, deployment.compute_precision) == ("fp32", "auto")
    ]
    for deployment in [*plain[:1], *deployments]:
        if search.try_out(plan, deployment) is not None:
            break
    return plan


def choose_deployments(search: Search, plan: LayerPlan) -> list[Deployment]:
    """Return the promising deployments, the fastest first.

    A plan is timed in each, and the dense model in those that remain.
    """
    until, ms = search.clock.elapsed_s + DEPLOYMENTS_SHARE * search.clock.seconds, dict[Deployment, float]()
    for deployment in search.request.deployments:
        slower = [ms[x] / min(ms.values()) for x in ms if x.backend == deployment.backend]
        if slower and min(slower) > FAR:
            search.excluded[deployment] = (
                f"in another precision, {deployment.backend} took {min(slower):.1f} times "
                "as long as the fastest combination"
            )
        elif search.clock.elapsed_s > until and ms:
            if not any(attempt.deployment == deployment for attempt in search.attempts):
                search.excluded[deployment] = "there was no time to try it"
            continue
        if deployment in search.excluded:
            continue
        try:
            ms[deployment] = search.time(plan, deployment).value
        except (GateError, BackendError) as error:
            search.exclude(deployment, error)
    order = sorted(ms, key=ms.__getitem__)
    close = [deployment for deployment in order if ms[deployment] <= CLOSE * ms[order[0]]][:MOST_DEPLOYMENTS]
    nothing = LayerPlan.dense(len(search.trial.selects))
    for deployment in list(close):
        try:
            search.time(nothing, deployment.dense_host)
        except (GateError, BackendError) as error:
            search.exclude(deployment, error)
            close.remove(deployment)
    for number, deployment in enumerate(close):  # The error of a precision is similar in every deployment.
        alike = [
            other for other in close[:number] if other.precision == deployment.precision and other in search.losses
        ]
        if alike:
            search.losses[deployment] = search.losses[alike[0]]
        else:
            search.try_out(plan, deployment)
    return [deployment for deployment in close if deployment not in search.excluded]


def explore(
    search: Search, learn: Callable[[], None], latency_of: Callable[[Deployment], PlanLatency], tile: int
) -> None:
    """Evaluate plans near the expected Pareto front and export the best, until the answer settles or the time is over.

    Args:
        search: State of the search.
        learn: Fits the predictors once the deployments are known; afterwards plans may read fewer keys where
            `Trial.selects` allows it.
        latency_of: Latency model of a deployment from parts, not calibrated yet.
        tile: Query tile of the model.
    """
    plan = first_plan(search)
    deployments, nothing = choose_deployments(search, plan), LayerPlan.dense(len(search.trial.selects))
    learn()
    search.model()
    for deployment in deployments:
        with search.clock.step("parts", f"timing parts of layers in {deployment}"):
            latency = latency_of(deployment)
        if deployment.is_here:
            latency = latency.calibrate(nothing, search.ms[nothing, deployment.dense_host].value)
            latency = latency.calibrate(plan, search.ms[plan, deployment].value)
        search.latencies[deployment] = latency
        if not search.fits("parts", "plan", *BUNDLE):
            break
    if not search.latencies:  # No fast deployment takes the dense model: keep the current answer.
        return
    before = 0.0
    for number in range(ROUNDS):
        best = _round(number, search, tile)
        if not number and search.fits(*BUNDLE, *BUNDLE):  # A better answer soon, from which the rounds learn.
            deployment = _promising(search)[0]
            search.try_out(search.best(deployment, search.limit), deployment)
        if abs(best - before) < SETTLED * best or not search.fits(*len(SPREAD) * ("plan",), *BUNDLE):
            break
        before = best
    for deployment in _promising(search):
        _tighten(search, deployment, tile)


def _round(number: int, search: Search, tile: int) -> float:
    """Evaluate plans around the bound for the promising deployments; returns the expected objective of the best."""
    selects, model = search.trial.selects, search.model()
    solvers = {e: Solver(latency, model, selects, tile) for e, latency in search.latencies.items()}
    aims = {deployment: _aim(search, solver, search.losses[deployment]) for deployment, solver in solvers.items()}
    costs = {deployment: _cost(search, solver, aims[deployment]) for deployment, solver in solvers.items()}
    best = min(costs.values())
    followed = [deployment for deployment in sorted(costs, key=costs.__getitem__) if costs[deployment] <= CLOSE * best]
    chosen = dict.fromkeys(
        solvers[deployment].at_error(aims[deployment] * factor)
        for deployment in followed
        for factor in (NEAR if number else SPREAD)
    )
    for plan in chosen:
        if not plan.is_dense and search.fits("plan", *BUNDLE):
            search.evaluate(plan, f"round {number + 1}")
    return best


def _aim(search: Search, solver: Solver, loss: float) -> float:
    """Return the error that a deployment's best plan should have, without that of its precision."""
    if search.bound.by_fidelity:
        return max(min(LEAST_AIM, search.limit), search.limit / search.margin - loss)
    return max(LEAST_AIM, solver.model.of(solver.at_latency(search.limit)))


def _cost(search: Search, solver: Solver, aim: float) -> float:
    """Return what ranks deployments: milliseconds at a fidelity, or error within a latency."""
    return solver.latency.of(solver.at_error(aim)) if search.bound.by_fidelity else aim


def _promising(search: Search) -> list[Deployment]:
    """Return the deployments, ordered by the expected cost of their best plan."""
    costs = {
        deployment: search.objective(deployment, search.best(deployment, search.limit))
        for deployment in search.latencies
    }
    order = sorted(costs, key=costs.__getitem__)
    return [deployment for deployment in order if costs[deployment] <= CLOSE * costs[order[0]]]


def _tighten(search: Search, deployment: Deployment, tile: int) -> None:
    """Export plans until one just meets the bound.

    The error that precision and further images add, or the time that a whole model takes beyond its prediction, is
    known from the last bundle; the next plan is adjusted by it.
    """
    aim, plan = search.limit, search.best(deployment, search.limit)
    for _ in range(TRIES):
        attempt = search.try_out(plan, deployment) if search.fits(*BUNDLE) else None
        if attempt is None:
            return
        reached = search.bounded(attempt)
        if NEAR_ENOUGH * search.limit <= reached <= search.limit or not search.fits("plan", *BUNDLE):
            return
        aim = min(JUST * search.limit * search.constraint(deployment, plan) / reached, LOOSER * aim)
        solver = Solver(search.latencies[deployment], search.model(), search.trial.selects, tile)
        for factor in (1.0, 0.9, 1.1):
            error = max(LEAST_AIM, factor * aim / search.margin - search.losses[deployment])
            one = solver.at_error(error) if search.bound.by_fidelity else solver.at_latency(factor * aim)
            if not one.is_dense:
                search.evaluate(one, "near the bound")
        before, plan = plan, search.best(deployment, aim)
        if plan == before:
            return
