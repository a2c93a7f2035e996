"""Which plans are measured whole, and which of them is the answer."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from sparsifiner_edge.config import keep_text, merge_text
from sparsifiner_edge.errors import GateError
from sparsifiner_edge.files import replaced
from sparsifiner_edge.plan import LayerPlan
from sparsifiner_edge.profiles.stats import estimate, skewed_mean
from sparsifiner_edge.results import Estimate
from sparsifiner_edge.runtime.open import checked_bundle, open_checked
from sparsifiner_edge.search.explore import CLOSE, MOST_ENGINES, Bound, Engines, Search
from sparsifiner_edge.search.fidelity_model import FidelityModel
from sparsifiner_edge.search.finalists import Contender, Exports, Stopwatch
from sparsifiner_edge.search.front import Checked, Finalist
from sparsifiner_edge.search.latency import Deployment
from sparsifiner_edge.search.trial import Trial
from sparsifiner_edge.sparse.student import load_student, save_student

ROOM = 0.98
"""Of a bound of time: two measurements of the same differ."""
TRIES = 4
"""Plans of one engine that are exported until one meets the bound."""


class Entrant(NamedTuple):
    """A plan that is measured whole. distance: of its bundle; predicted: of its distance by all other plans, of its
    time by parts.
    """

    plan: LayerPlan
    engine: Deployment
    bundle: Path
    distance: float
    predicted_distance: float
    predicted_ms: float
    measured: Estimate | None = None

    @property
    def ms(self) -> Estimate:
        """What was measured of it."""
        assert self.measured is not None
        return self.measured


class Shortlist:
    """Which of the plans that were measured is the best in an engine.

    Args:
        search: what was measured. engines: with their latencies. model: that plans were found by. bound: what is asked
            for.
    """

    def __init__(self, search: Search, engines: Engines, model: FidelityModel, bound: Bound) -> None:
        self.search, self.engines, self.model, self.bound = search, engines, model, bound
        self.plans = [plan for plan in search.known if not plan.is_dense]

    def ms(self, engine: Deployment, plan: LayerPlan) -> float:
        """As predicted."""
        return self.engines.latencies[engine].of(plan)

    def distance(self, engine: Deployment, plan: LayerPlan) -> float:
        """As measured in float32, and what the engine's precision loses."""
        return self.search.distance(plan) + self.engines.losses[engine]

    @property
    def most(self) -> float:
        """Of what is bounded: distance, or milliseconds with room for another measurement."""
        if self.bound.at_least is not None:
            return 1 - self.bound.at_least
        assert self.bound.at_most_ms is not None
        return ROOM * self.bound.at_most_ms

    def bounded(self, engine: Deployment, plan: LayerPlan) -> float:
        """What of a plan is bounded: its distance, or its milliseconds as predicted."""
        return self.distance(engine, plan) if self.bound.at_least is not None else self.ms(engine, plan)

    def wanted(self, engine: Deployment, plan: LayerPlan) -> float:
        """The other of the two, which shall be small."""
        return self.ms(engine, plan) if self.bound.at_least is not None else self.distance(engine, plan)

    def best(self, engine: Deployment, most: float) -> LayerPlan:
        """Of what stays within a bound the best; where nothing does the nearest to it."""
        within = [plan for plan in self.plans if self.bounded(engine, plan) <= most]
        if within:
            return min(within, key=lambda plan: self.wanted(engine, plan))
        return min(self.plans, key=lambda plan: self.bounded(engine, plan))

    def worth_it(self) -> list[Deployment]:
        """The engines worth measuring, the most promising first."""
        order = {engine: self.wanted(engine, self.best(engine, self.most)) for engine in self.engines.latencies}
        best = min(order.values())
        close = [engine for engine in order if order[engine] <= max(best, CLOSE * best)]
        return sorted(close, key=order.__getitem__)[:MOST_ENGINES]


def entrants(exports: Exports, choice: Shortlist, stopwatch: Stopwatch) -> list[Entrant]:
    """Of the engines worth it, the plan that meets the bound as a bundle: what int8 and float16 lose on top, or what a
    whole model takes longer than predicted, makes the plan's own bound tighter, a few times at most.

    Raises:
        GateError: every engine's precision loses too much.
    """
    found: list[Entrant] = []
    while not found:  # with the engines that are left
        for engine in choice.worth_it():
            try:
                found.append(_entrant(exports, choice, engine, stopwatch))
            except GateError as error:
                choice.engines.leave_out(engine, error)
    return found


def _entrant(exports: Exports, choice: Shortlist, engine: Deployment, stopwatch: Stopwatch) -> Entrant:
    most, excess = choice.most, 0.0
    for tried in range(1, TRIES + 1):
        plan = choice.best(engine, most)
        bundle = exports.of(plan, engine.stored)
        with open_checked(checked_bundle(bundle), engine.execution) as session:
            distance = fmean(choice.search.trial.distances_of(session.infer))
        in_time = choice.bound.at_least is None
        found = stopwatch.times([Contender(bundle, engine)])[0].value if in_time else distance
        if found <= choice.most or tried == TRIES:
            break
        excess = max(excess, found - choice.bounded(engine, plan))
        most = max(0.0, choice.most - excess)
    predicted = choice.search.predicted(plan) + choice.engines.losses[engine]
    return Entrant(plan, engine, bundle, distance, predicted, choice.ms(engine, plan))


def timed(
    subjects: Sequence[Entrant], exports: Exports, hosts: Sequence[Deployment], stopwatch: Stopwatch
) -> tuple[list[Entrant], dict[Deployment, Estimate]]:
    """The entrants with their times, and the dense model's in the engines given: whole models, in one run."""
    denses = [Contender(exports.dense_for(host), host) for host in hosts]
    found = stopwatch.times([*(Contender(x.bundle, x.engine) for x in subjects), *denses])
    ours = [entrant._replace(measured=ms) for entrant, ms in zip(subjects, found, strict=False)]
    return ours, dict(zip(hosts, found[len(subjects) :], strict=True))


def judged(subjects: Sequence[Entrant], bound: Bound) -> list[Entrant]:
    """The best first: of those that meet the bound the fastest or most faithful; else the nearest to it."""

    def rank(entrant: Entrant) -> tuple[bool, float]:
        met = meets(entrant, bound)
        by_time = (bound.at_least is not None) == met
        return not met, entrant.ms.value if by_time else entrant.distance

    return sorted(subjects, key=rank)


def finalist(entrant: Entrant, start: Path, trust: Sequence[str]) -> Finalist:
    """As it stands in the result; start: the student that it is exported from."""
    merge, keep = merge_text(entrant.plan.merge), keep_text(entrant.plan.short_keep)
    stored = entrant.engine.stored
    chosen = "" if stored == "fp32" else f" --precision {stored}"
    chosen += " --calibrate IMAGES/" if stored == "int8" else ""
    chosen += "".join(f" --trust {name}" for name in trust)
    return Finalist(
        merge=merge, keep=keep, **entrant.engine._asdict(), fidelity=1 - entrant.distance,
        predicted_fidelity=1 - entrant.predicted_distance, predicted_ms=entrant.predicted_ms, ms=entrant.ms,
        command=f"sparsifiner-edge export {start} --merge {merge} --keep {keep}{chosen} -o BUNDLE/",
    )  # fmt: skip


def meets(entrant: Entrant, bound: Bound) -> bool:
    """Whether it is what was asked for, by what was measured."""
    if bound.at_least is not None:
        return 1 - entrant.distance >= bound.at_least
    return bound.at_most_ms is not None and entrant.ms.value <= bound.at_most_ms


def why_unmet(nearest: Entrant, bound: Bound) -> str:
    """For people, where nothing meets the bound."""
    return f"no plan meets {bound.text}; the nearest has {1 - nearest.distance:.4f} at {nearest.ms.value:.1f} ms"


def checked(winner: Entrant, trial: Trial, search: Search) -> tuple[Checked, list[float]]:
    """The answer on images that nothing was chosen by; those that it was judged by tell how images differ."""
    with open_checked(checked_bundle(winner.bundle), winner.engine.execution) as session:
        found = trial.distances_of(session.infer)
    lost = skewed_mean(found, search.shape(winner.plan))
    low, high = (1 - x if isinstance(x, float) and x < 1 else None for x in (lost.high, lost.low))
    fidelity = estimate(1 - lost.value, low, high, f"1 - distance, {lost.interval}")
    return Checked(fidelity=fidelity, images=len(found)), [1 - distance for distance in found]


def keep_answer(winner: Entrant, start: Path, folder: Path, trust: Sequence[str]) -> None:
    """The answer as student and bundle."""
    save_student(
        load_student(start, merge=winner.plan.merge, keep=winner.plan.short_keep, trust=trust), folder / "student"
    )
    with replaced(folder / "bundle") as target:
        shutil.copytree(winner.bundle, target, dirs_exist_ok=True)
