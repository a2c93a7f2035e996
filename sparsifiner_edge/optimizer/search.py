"""The search: a plan known to be good, fitted to the bound, then its neighbours and other deployments.

Everything is measured on complete models: the error of a plan in the deployment itself, and its time in turn with a
reference. The best bundle so far is always kept.

The neighbours are few on purpose. The error of a plan varies from image to image so much that a few dozen images cannot
tell plans apart whose times at equal error differ by less than some 3 %: a longer search would only follow noise, and
its answers lose on other images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from sparsifiner_edge.config import keep_text, merge_text
from sparsifiner_edge.errors import BackendError, GateError
from sparsifiner_edge.optimizer.clock import Clock
from sparsifiner_edge.optimizer.family import Shape, family
from sparsifiner_edge.optimizer.request import SearchRequest
from sparsifiner_edge.optimizer.subject import EVALUATING_ALL, TIMING_DENSE, Subject
from sparsifiner_edge.optimizer.trial import evenly_by_error
from sparsifiner_edge.pareto import Deployment, Interim
from sparsifiner_edge.plan import LayerPlan

AIM = 0.94
"""Share of the bound that the answer aims at."""
WINDOW = (0.75, 1.0)
"""Share of the bound that an answer's error may have; a larger margin would give speed away."""
ROOM = 0.98
"""Share of a latency bound to aim at: two measurements of the same model differ."""
FIT_TRIES = 4
"""Maximum number of plans that are measured to bring a shape to the bound."""
FITTED = 0.05
"""Relative distance from the aim at which a shape counts as fitted."""
NEAR = 0.15
"""Relative distance from the aim at which a neighbour is compared."""
STEEP = 1.8
"""Assumed exponent of the error as a function of the scale of the merges."""
FLAT = -0.5
"""Assumed exponent of the time as a function of the scale of the merges."""
ELASTICITY = 0.45
"""Assumed relative fall of the time per relative rise of the error, along a shape."""
SELECTIVE = 0.6
"""Largest share of the images for which evaluating on the selection images alone saves time."""
QUICK_IMAGES = 6
"""Number of images on which deployments are compared."""
EVALUATION_SHARE = 0.01
"""Share of the whole time in which a plan is evaluated; slower models are compared on fewer images."""
MIN_SELECTION = 16
"""Minimum number of selection images, if there are so many."""
DEPLOYMENTS_SHARE = 0.12
"""Share of the whole time for trying deployments."""
FAR = 1.4
"""A backend that is slower than another by this factor is tried in no other precision."""
CLOSE = 3
"""Number of deployments that are tried again with the improved plan."""
DENSE_TIMINGS = 2
"""Timing the dense model is assumed to take as long as this many other timings."""
MOST_DENSE = 3
"""Maximum number of deployments in which the dense model is timed."""
GAIN = 0.03
"""Smallest relative gain of time at equal error for which a change is adopted; smaller ones are noise."""
ACCEPTING = (EVALUATING_ALL,) * 3
"""Kinds of the steps that bring a plan within the bound on all images."""
NEIGHBOUR = (*["evaluating"] * 2, *["timing"] * 3)
"""Kinds of the steps that one neighbour of a shape takes."""
ACCEPT_TRIES = 4
"""Maximum number of plans that are measured on all images to bring an answer within the bound."""


CURVE = (0.7, 1.4, 0.5, 2.0)
"""Scales, relative to the answer's, at which its shape is measured if there is time, to show the trade-off."""


class Attempt(NamedTuple):
    """A plan that was exported and measured on all images.

    Attributes:
        plan: The plan.
        deployment: Where it was measured.
        ms: Milliseconds relative to the reference, or an estimate.
        errors: Error of each image of the search.
        reserved: Errors of the held-out images.
    """

    plan: LayerPlan
    deployment: Deployment
    ms: float
    errors: list[float]
    reserved: list[float]


class Search:
    """State of a search.

    Args:
        request: What is searched for.
        subject: Measures plans.
        clock: Time budget.
        keep: Called with every attempt that is better than the ones before.
        announce: Called with the best attempt when the dense model was timed, and when a better one is found.

    Attributes:
        errors: Errors by plan and deployment on the selection images, or on the first of them.
        all_errors: Errors by plan and deployment on all images.
        ms: Times by plan and deployment.
        excluded: Deployments that are not searched, with the reason.
        attempts: Exported plans, in the order in which they were made.
        dense: Times of the dense model by deployment.
        remarks: Remarks for the user.
        limit: Limit of the bounded quantity: error, or milliseconds with room for another measurement.
        factor: Ratio of the last plan's error on all images to that on the selection images.
        settled: True if the search ended because no change helped any more.
    """

    def __init__(
        self,
        request: SearchRequest,
        subject: Subject,
        clock: Clock,
        keep: Callable[[Attempt], None],
        announce: Callable[[Interim], None] | None = None,
    ) -> None:
        self.request, self.bound, self.subject, self.clock = request, request.bound, subject, clock
        self._keep, self._announce = keep, announce
        self.selection = list(range(len(request.images)))
        self.errors = dict[tuple[LayerPlan, Deployment], list[float]]()
        self.all_errors, self.ms = dict(self.errors), dict[tuple[LayerPlan, Deployment], float]()
        self.excluded, self.attempts, self.dense = dict[Deployment, str](), list[Attempt](), dict[Deployment, float]()
        self.remarks, self.factor, self.settled = list[str](), 1.0, False
        self.limit = 1 - self.bound.value if self.bound.by_fidelity else ROOM * self.bound.value
        self._slope = STEEP if self.bound.by_fidelity else FLAT

    @property
    def aim(self) -> float:
        """Value of the bounded quantity that the search aims at."""
        return AIM * self.limit if self.bound.by_fidelity else self.limit

    def error(self, plan: LayerPlan, deployment: Deployment, most: int | None = None) -> float:
        """Return the mean error of a plan in a deployment, at least the metric's floor.

        Args:
            plan: The plan.
            deployment: The deployment.
            most: Number of selection images to use; None for all.

        Raises:
            GateError: The precision adds too much error.
            BackendError: The deployment does not take the model.
        """
        places = self.selection[:most]
        known = self.errors.get((plan, deployment), [])
        if len(known) < len(places):
            known = self.subject.errors(plan, deployment, places)
            self.errors[plan, deployment] = known
        factor = self.factor if len(known) == len(self.selection) else 1.0
        return max(self.subject.least, factor * fmean(known[: len(places)]))

    def time(self, plan: LayerPlan, deployment: Deployment) -> float:
        """Return the measured milliseconds of a plan in a deployment.

        Raises:
            GateError: See `error`.
            BackendError: See `error`.
        """
        if (plan, deployment) not in self.ms:
            self.ms[plan, deployment] = self.subject.ms(plan, deployment)
        return self.ms[plan, deployment]

    def time_again(self, plan: LayerPlan, deployment: Deployment) -> None:
        """Time a plan once more; its time becomes the mean."""
        self.ms[plan, deployment] = (self.ms[plan, deployment] + self.subject.ms(plan, deployment)) / 2

    def score(self, error: float, ms: float) -> float:
        """Return what is minimised: the logarithm of the time that the plan would take at another error."""
        return math.log(ms) + ELASTICITY * math.log(error)

    def exclude(self, deployment: Deployment, error: GateError | BackendError) -> None:
        """Exclude a deployment that refuses the model or whose precision adds too much error.

        Raises:
            GateError: No other deployment is left.
            BackendError: No other deployment is left.
        """
        self.excluded[deployment] = error.what
        if set(self.request.deployments) <= set(self.excluded):
            raise error

    def fit(self, shape: Shape, deployment: Deployment, scale: float, near: float = FITTED) -> float:
        """Return the scale at which a shape just meets the bound, by the secant of measured plans.

        Args:
            shape: The shape.
            deployment: The deployment.
            scale: Scale to begin with.
            near: Relative distance from the aim that is near enough.
        """
        measured = dict[float, float]()
        while len(measured) < FIT_TRIES and self.fits("evaluating", *["timing"] * (not self.bound.by_fidelity)):
            plan = shape.plan(scale, self.subject.patches)
            value = self.error(plan, deployment) if self.bound.by_fidelity else self.time(plan, deployment)
            if abs(value / self.aim - 1) < near or plan.is_dense or scale in measured:
                break
            measured[scale] = value
            scale = self.next_scale(shape, measured)
        return scale

    def next_scale(self, shape: Shape, measured: Mapping[float, float]) -> float:
        """Return the scale at which a shape is expected to meet the aim.

        It lies between the nearest scales on both sides of the aim if there are any, because the error of single images
        may jump; otherwise it follows from the nearest value.

        Args:
            shape: The shape.
            measured: Values of the bounded quantity by scale, at least one.
        """
        nearest = sorted(measured, key=lambda one: abs(math.log(measured[one] / self.aim)))
        below = [scale for scale in nearest if measured[scale] < self.aim]
        above = [scale for scale in nearest if measured[scale] >= self.aim]
        if below and above:
            one, two = below[0], above[0]
            share = math.log(self.aim / measured[one]) / math.log(measured[two] / measured[one])
            return float(one * (two / one) ** min(max(share, 0.1), 0.9))
        if len(nearest) > 1:
            one, two = nearest[:2]
            slope = math.log(measured[two] / measured[one]) / math.log(two / one)
            typical = STEEP if self.bound.by_fidelity else FLAT
            low, high = sorted((typical / 2, typical * 2))
            self._slope = min(max(slope, low), high)
        factor = (self.aim / measured[nearest[0]]) ** (1 / self._slope)
        return shape.clip(nearest[0] * min(max(factor, 0.3), 3.0), self.subject.patches)

    def fits(self, *kinds: str) -> bool:
        """Return True if there is time for these steps before the closing measurements."""
        return self.clock.fits(*kinds, reserve_s=self.subject.closing_s())

    def fits_change(self, deployment: Deployment, *kinds: str) -> bool:
        """Return True if there is time for these steps, and to accept the changed plan afterwards."""
        return self.fits(*kinds, *ACCEPTING, f"export {deployment.precision}", "timing")

    def accept(self, shape: Shape, deployment: Deployment, scale: float) -> float:
        """Bring a shape within the bound on all images, export it, and keep it if it is the best so far.

        Returns:
            The scale that was exported, or the given one if there was no time.

        Raises:
            GateError: See `error`.
            BackendError: See `error`.
        """
        tried = dict[float, Attempt]()
        while len(tried) < ACCEPT_TRIES:
            if self.attempts and not self.fits(EVALUATING_ALL):
                return scale
            tried[scale] = attempt = self._measure(shape.plan(scale, self.subject.patches), deployment)
            reached = self.bounded(attempt)
            following = self.next_scale(shape, {at: self.bounded(one) for at, one in tried.items()})
            within = WINDOW[0] * self.limit <= reached <= WINDOW[1] * self.limit
            if within or following in tried or not self.fits(EVALUATING_ALL, f"export {deployment.precision}"):
                break
            scale = following
        scale = min(tried, key=lambda one: self._distance(tried[one]))
        self._export(tried[scale])
        return scale

    def _distance(self, attempt: Attempt) -> tuple[bool, float]:
        """Return a sort key: attempts within the bound first, then the closest to it."""
        reached = self.bounded(attempt)
        return reached > self.limit, abs(math.log(reached / self.limit))

    def _measure(self, plan: LayerPlan, deployment: Deployment) -> Attempt:
        """Measure a plan on all images."""
        if (plan, deployment) not in self.all_errors:
            self.note(plan, deployment, self.subject.all_errors(plan, deployment))
        errors, count = self.all_errors[plan, deployment], len(self.request.images)
        if self.bound.by_fidelity:  # If it is not timed: the last plan in this deployment had about this time.
            ms = next((ms for (_, where), ms in reversed(self.ms.items()) if where == deployment), math.inf)
        else:
            ms = self.time(plan, deployment)
        return Attempt(plan, deployment, ms, errors[:count], errors[count:])

    def _export(self, attempt: Attempt) -> None:
        """Export and time a plan, and keep it if it is the best so far."""
        if any((one.plan, one.deployment) == (attempt.plan, attempt.deployment) for one in self.attempts):
            return
        self.subject.export(attempt.plan, attempt.deployment)
        known = attempt.plan, attempt.deployment
        if known not in self.ms and (self.attempts or self.fits("timing")):
            self.ms[known] = self.subject.exported_ms(*known)
        attempt = attempt._replace(ms=self.ms.get(known, attempt.ms))
        self.attempts.append(attempt)
        self.clock.reserve_s = self.subject.closing_s()
        if min(self.attempts, key=self.order) is attempt:
            self._keep(attempt)
            self.announce()

    def announce(self) -> None:
        """Tell the caller the best attempt so far, if the dense model was timed."""
        if self.dense and self._announce:
            best, dense = min(self.attempts, key=self.order), min(self.dense, key=self.dense.__getitem__)
            plan = merge_text(best.plan.merge), keep_text(best.plan.short_keep)
            told = Interim(*plan, best.deployment, 1 - fmean(best.reserved), best.ms, dense, self.dense[dense])
            self._announce(told)

    def bounded(self, attempt: Attempt) -> float:
        """Return the bounded quantity of an attempt.

        It is the larger of the mean errors over all images and over the held-out images; or the milliseconds.
        """
        if not self.bound.by_fidelity:
            return attempt.ms
        return max(self.subject.least, fmean([*attempt.errors, *attempt.reserved]), fmean(attempt.reserved))

    def order(self, attempt: Attempt) -> tuple[bool, float]:
        """Return a sort key: attempts that meet the bound first, the best of them first; then the closest."""
        reached = self.bounded(attempt)
        best = attempt.ms if self.bound.by_fidelity else fmean(attempt.errors)
        return (False, best) if reached <= self.limit else (True, reached)

    def split_images(self, shape: Shape, deployment: Deployment, scale: float) -> float:
        """Choose held-out and selection images by the errors of plans, so that each set is as hard as all images.

        The errors of a plan nearer to the bound count as much as those of the first plan: a few images have most of the
        error, and how much depends on the plan. Images that calibrate are never held out.

        Returns:
            The scale of the nearer plan.
        """
        begun, paths, measured = self.clock.elapsed_s, self.subject.paths, dict[LayerPlan, list[float]]()
        first = shape.plan(scale, self.subject.patches)
        measured[first] = self.subject.errors(first, deployment, range(len(paths)))
        each_s = (self.clock.elapsed_s - begun) / len(paths)
        if self.bound.by_fidelity and self.fits(EVALUATING_ALL):
            scale = self.next_scale(shape, {scale: max(self.subject.least, fmean(measured[first]))})
            nearer = shape.plan(scale, self.subject.patches)
            measured[nearer] = self.subject.errors(nearer, deployment, range(len(paths)))
        means = {plan: max(fmean(errors), self.subject.least) for plan, errors in measured.items()}
        hard = [sum(errors[place] / means[plan] for plan, errors in measured.items()) for place in range(len(paths))]
        count = len(self.request.reserved)
        free = list(range(self.subject.calibrating, len(paths)))
        back = {free[place] for place in evenly_by_error([hard[place] for place in free], count)}
        order = [*(place for place in range(len(paths)) if place not in back), *sorted(back)]
        self.subject.arrange(order)
        kept = len(paths) - count
        self.request = self.request._replace(images=self.subject.paths[:kept], reserved=self.subject.paths[kept:])
        most = int(EVALUATION_SHARE * self.clock.seconds / max(each_s, 1e-9))
        spread = evenly_by_error([hard[place] for place in order[:kept]], min(kept, max(MIN_SELECTION, most)))
        self.selection = [*spread[1::3], *spread[::3], *spread[2::3]]  # So that the first few represent all.
        for plan, errors in measured.items():
            self.note(plan, deployment, [errors[place] for place in order])
        return scale

    def note(self, plan: LayerPlan, deployment: Deployment, errors: list[float]) -> None:
        """Note the errors of a plan on all images."""
        chosen = [errors[place] for place in self.selection]
        self.all_errors[plan, deployment], self.errors[plan, deployment] = errors, chosen
        self.factor = max(fmean(errors), self.subject.least) / max(fmean(chosen), self.subject.least)


def choose_arithmetic(search: Search, plan: LayerPlan, first: Deployment) -> Deployment:
    """Return the best arithmetic for the file and backend of the first deployment, from a few answers each.

    bfloat16 is much faster on some processors and slower on others, which their features do not tell.
    """
    file, scores = (first.backend, first.precision), dict[Deployment, float]()
    same = [one for one in search.request.deployments if (one.backend, one.precision) == file]
    for deployment in same if len(same) > 1 and first.is_here else []:
        try:
            error = search.error(plan, deployment, QUICK_IMAGES)
            scores[deployment] = search.score(error, search.subject.answer_ms[deployment])
        except (GateError, BackendError) as refusal:
            search.exclude(deployment, refusal)
    best = min(scores, key=scores.__getitem__, default=first)
    return best if best != first and scores[best] < scores[first] - GAIN else first


def choose_deployments(search: Search, plan: LayerPlan, first: Deployment) -> list[Deployment]:
    """Return the deployments by the score of a plan, the best first; `first`, which has an answer, is always there."""
    scores, times, until = dict[Deployment, float](), dict[Deployment, float](), math.inf
    for deployment in (first, *(other for other in search.request.deployments if other != first)):
        slower = [times[other] / min(times.values()) for other in times if other.backend == deployment.backend]
        if slower and min(slower) > FAR:
            search.excluded[deployment] = (
                f"in another precision, {deployment.backend} took {min(slower):.1f} times "
                "as long as the fastest combination"
            )
        elif search.clock.elapsed_s + search.clock.took("evaluating", "timing") > until or (
            scores and not search.fits("evaluating", "timing")
        ):
            search.excluded[deployment] = "there was no time to try it"
        else:
            try:
                error = search.error(plan, deployment, QUICK_IMAGES)
                times[deployment] = search.time(plan, deployment)
                scores[deployment] = search.score(error, times[deployment])
            except (GateError, BackendError) as refusal:
                search.exclude(deployment, refusal)
        if scores and until == math.inf:
            until = search.clock.elapsed_s + DEPLOYMENTS_SHARE * search.clock.seconds
    return sorted(scores, key=scores.__getitem__)


def time_dense(search: Search, deployments: Sequence[Deployment]) -> None:
    """Time the dense model where it may be fastest."""
    hosts = dict.fromkeys(deployment.dense_host for deployment in deployments)
    for host in [host for host in hosts if host not in search.dense][: MOST_DENSE - len(search.dense)]:
        if not search.fits(*[TIMING_DENSE] if search.dense else ["timing"] * DENSE_TIMINGS):
            return
        try:
            search.dense[host] = search.subject.dense_ms(host)
        except (GateError, BackendError) as error:
            search.remarks.append(f"The dense model does not run in {host}: {error.what}")


def run(search: Search) -> None:
    """Search until the time is over or no change helps any more.

    The first answer comes from the deployment that is most likely the fastest; the others are compared afterwards.

    Raises:
        GateError: No deployment is left.
        BackendError: No deployment is left.
    """
    shape, scale = family(search.subject.student)
    patches = search.subject.patches
    while not search.attempts:
        first = next(one for one in search.request.deployments if one not in search.excluded)
        try:
            scale = search.split_images(shape, first, scale)
            first = choose_arithmetic(search, shape.plan(scale, patches), first)
            if len(search.selection) < SELECTIVE * len(search.subject.paths):
                scale = search.fit(shape, first, scale)
            scale = search.accept(shape, first, scale)
        except (GateError, BackendError) as refusal:
            search.exclude(first, refusal)
    others_s = DEPLOYMENTS_SHARE * search.clock.seconds
    if search.clock.fits(*["timing"] * DENSE_TIMINGS, reserve_s=search.subject.closing_s() + others_s):
        time_dense(search, [first])
        search.announce()
    try:
        deployments = choose_deployments(search, shape.plan(scale, patches), first)
        while deployments[0] != first and search.fits(EVALUATING_ALL):
            try:
                scale = search.accept(shape, deployments[0], scale)
                break
            except (GateError, BackendError) as refusal:
                search.exclude(deployments.pop(0), refusal)
        time_dense(search, deployments)
        improve(search, shape, scale, deployments)
    except (GateError, BackendError) as refusal:
        search.remarks.append(f"The search ended early: {refusal.what}")


def improve(search: Search, shape: Shape, scale: float, deployments: Sequence[Deployment]) -> None:
    """Try the neighbours of a shape, and other deployments of the best one, as long as that helps."""
    best, tried, helped = deployments[0], {shape.rounded}, True
    while helped and search.fits_change(best, *NEIGHBOUR):
        found = better_shape(search, shape, best, scale, tried)
        helped = found != (shape, scale)
        if helped:
            shape, scale = found[0], search.accept(found[0], best, found[1])
        other = better_deployment(search, shape, best, scale, deployments[:CLOSE])
        if other != best:
            best, helped = other, True
            scale = search.accept(shape, best, scale)
    search.settled = not helped and search.fits_change(best, *NEIGHBOUR)
    for factor in CURVE:
        if not search.fits("evaluating", "timing"):
            return
        plan = shape.plan(shape.clip(factor * scale, search.subject.patches), search.subject.patches)
        search.error(plan, best)
        search.time(plan, best)


def better_shape(
    search: Search, shape: Shape, deployment: Deployment, scale: float, tried: set[Shape]
) -> tuple[Shape, float]:
    """Return the best of a shape and its neighbours, each brought to the bound, and its scale.

    Args:
        search: State of the search.
        shape: The present shape.
        deployment: The deployment.
        scale: Scale of the present shape.
        tried: Shapes that were tried already; the neighbours are added.
    """

    def score(one: Shape, at: float) -> float:
        plan = one.plan(at, search.subject.patches)
        return search.score(search.error(plan, deployment), search.time(plan, deployment))

    best, found = score(shape, scale), (shape, scale)

    def is_better(other: Shape, fitted: float) -> bool:
        """Compare once more with new timings of both if the first ones promise a gain."""
        nonlocal best
        if score(other, fitted) >= best - GAIN:
            return False
        for one, at in (found, (other, fitted)):
            search.time_again(one.plan(at, search.subject.patches), deployment)
        best = score(*found)
        return score(other, fitted) < best - GAIN

    for other in shape.neighbours(search.subject.sparse_layers):
        if other.rounded in tried:
            continue
        if not search.fits_change(deployment, *NEIGHBOUR):
            break
        tried.add(other.rounded)
        fitted = search.fit(other, deployment, scale, NEAR)
        if is_better(other, fitted):
            best, found = score(other, fitted), (other, fitted)
    return found


def better_deployment(
    search: Search, shape: Shape, best: Deployment, scale: float, deployments: Sequence[Deployment]
) -> Deployment:
    """Return the best deployment of a plan."""
    plan, scores = shape.plan(scale, search.subject.patches), dict[Deployment, float]()
    for deployment in (best, *(other for other in deployments if other != best and other not in search.excluded)):
        if not scores or search.fits_change(deployment, "evaluating", "timing"):
            try:
                scores[deployment] = search.score(search.error(plan, deployment), search.time(plan, deployment))
            except (GateError, BackendError) as refusal:
                if deployment == best:
                    raise
                search.exclude(deployment, refusal)
    other = min(scores, key=scores.__getitem__)
    return other if scores[other] < scores[best] - GAIN else best
