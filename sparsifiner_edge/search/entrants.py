"""Which plans are measured whole, and which of them is the answer."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.config import keep_text, merge_text
from sparsifiner_edge.errors import GateError
from sparsifiner_edge.files import replaced
from sparsifiner_edge.profiles.stats import small_sample_mean
from sparsifiner_edge.results import Estimate
from sparsifiner_edge.runtime import open_session
from sparsifiner_edge.search.explore import CLOSE, MOST_ENGINES, Bound, Engines, Search
from sparsifiner_edge.search.fidelity_model import FidelityModel
from sparsifiner_edge.search.finalists import Contender, Exports, Stopwatch
from sparsifiner_edge.search.front import Checked, Finalist, Rival
from sparsifiner_edge.search.latency import Deployment
from sparsifiner_edge.search.plan import LayerPlan
from sparsifiner_edge.search.trial import Trial
from sparsifiner_edge.sparse.student import load_student, save_student

TRIES = 3
"""Plans of one engine that are exported until one meets the bound."""


class Entrant(NamedTuple):
    """A plan that is measured whole. distance: of its bundle; predicted: before it was measured."""

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
        self.plans = [seen.plan for seen in search.state.seen if not seen.plan.is_dense]

    def ms(self, engine: Deployment, plan: LayerPlan) -> float:
        """As predicted."""
        return self.engines.latencies[engine].of(plan)

    def best(self, engine: Deployment, distance: float | None = None) -> LayerPlan:
        """What meets the bound, or (where nothing does) is nearest to it; distance: another limit than the bound's."""
        if self.bound.at_most_ms is not None:
            within = [plan for plan in self.plans if self.ms(engine, plan) <= self.bound.at_most_ms]
            if within:
                return min(within, key=self.search.distance)
            return min(self.plans, key=lambda plan: self.ms(engine, plan))
        limit = self.limit if distance is None else distance
        within = [plan for plan in self.plans if self.search.distance(plan) <= limit]
        if within:
            return min(within, key=lambda plan: self.ms(engine, plan))
        return min(self.plans, key=self.search.distance)

    @property
    def limit(self) -> float:
        """The most distance that is asked for."""
        return 1.0 if self.bound.at_least is None else 1 - self.bound.at_least

    def worth_it(self) -> list[Deployment]:
        """The engines worth measuring, the most promising first."""
        latencies = self.engines.latencies
        if self.bound.at_least is None:
            return sorted(latencies, key=lambda engine: self.search.distance(self.best(engine)))[:MOST_ENGINES]
        order = {engine: self.ms(engine, self.best(engine)) for engine in latencies}
        fastest = min(order.values())
        close = [engine for engine in order if order[engine] <= max(fastest, CLOSE * fastest)]
        return sorted(close, key=order.__getitem__)[:MOST_ENGINES]


def entrants(exports: Exports, choice: Shortlist) -> list[Entrant]:
    """Of the engines worth it, the plan that meets the bound as a bundle: what int8 and float16 lose on top makes the
    limit of the plan itself tighter, twice at most.

    Raises:
        GateError: every engine's precision loses too much.
    """
    found: list[Entrant] = []
    for engine in choice.worth_it():
        try:
            found.append(_entrant(exports, choice, engine))
        except GateError as error:
            choice.engines.leave_out(engine, error)
    return found if found else entrants(exports, choice)  # with the engines that are left


def _entrant(exports: Exports, choice: Shortlist, engine: Deployment) -> Entrant:
    limit = choice.limit
    for tried in range(1, TRIES + 1):
        plan = choice.best(engine, limit)
        bundle = exports.of(plan, engine.precision)
        with open_session(bundle, engine.judged_in) as session:
            distance = fmean(choice.search.trial.distances_of(session.infer))
        if distance <= choice.limit or tried == TRIES:
            break
        limit = max(0.0, choice.limit - (distance - choice.search.distance(plan)))
    return Entrant(plan, engine, bundle, distance, choice.model.of(plan), choice.ms(engine, plan))


class Whole(NamedTuple):
    """What was timed as whole models in one run: entrants with their times, the dense model, and rivals."""

    entrants: list[Entrant]
    dense_ms: dict[Deployment, Estimate]
    rivals: list[Rival]


def timed(
    subjects: Sequence[Entrant], exports: Exports, hosts: Sequence[Deployment], rivals: Sequence[Path], trial: Trial,
    stopwatch: Stopwatch,
) -> Whole:  # fmt: skip
    """The entrants beside the dense model in the engines that ran it before, and the user's own bundles in each
    backend of these.
    """
    denses = [Contender(exports.dense(host.precision if host.is_here else "fp32"), host) for host in hosts]
    backends = list(dict.fromkeys(host.backend for host in hosts))
    others = [Contender(path, Deployment(name, _precision(path))) for path in rivals for name in backends]
    judged = [_fidelity(other, trial) for other in others]
    found = stopwatch.times([*(Contender(x.bundle, x.engine) for x in subjects), *denses, *others])
    ours = [entrant._replace(measured=ms) for entrant, ms in zip(subjects, found, strict=False)]
    found = found[len(subjects) :]
    rows = [
        Rival(path=str(other.bundle), backend=other.engine.backend, precision=other.engine.precision, fidelity=value,
              ms=ms)
        for other, value, ms in zip(others, judged, found[len(denses) :], strict=True)
    ]  # fmt: skip
    return Whole(ours, dict(zip(hosts, found, strict=False)), rows)


def _precision(bundle: Path) -> str:
    return open_bundle(bundle).manifest.precision or "fp32"


def _fidelity(rival: Contender, trial: Trial) -> float:
    with open_session(rival.bundle, rival.engine.judged_in) as session:
        trial.require_comparable(session, rival.bundle)
        return 1 - fmean(trial.distances_of(session.infer))


def judged(subjects: Sequence[Entrant], bound: Bound) -> list[Entrant]:
    """The best first: of those that meet the bound the fastest or most faithful; else the nearest to it."""

    def rank(entrant: Entrant) -> tuple[bool, float]:
        met = meets(entrant, bound)
        by_time = (bound.at_least is not None) == met
        return not met, entrant.ms.value if by_time else entrant.distance

    return sorted(subjects, key=rank)


def finalist(entrant: Entrant, start: Path) -> Finalist:
    """As it stands in the result; start: the student that it is exported from."""
    merge, keep = merge_text(entrant.plan.merge), keep_text(entrant.plan.short_keep)
    backend, precision = entrant.engine
    chosen = "" if precision == "fp32" else f" --precision {precision}"
    chosen += " --calibrate IMAGES/" if precision == "int8" else ""
    return Finalist(
        merge=merge, keep=keep, backend=backend, precision=precision, fidelity=1 - entrant.distance,
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
    asked = f"fidelity {bound.at_least}" if bound.at_least is not None else f"{bound.at_most_ms} ms"
    return f"no plan meets {asked}; the nearest has {1 - nearest.distance:.4f} at {nearest.ms.value:.1f} ms"


def checked(winner: Entrant, trial: Trial) -> tuple[Checked, list[float]]:
    """The answer on images that nothing was chosen by."""
    with open_session(winner.bundle, winner.engine.judged_in) as session:
        found = [1 - distance for distance in trial.distances_of(session.infer)]
    return Checked(fidelity=small_sample_mean(found), images=len(found)), found


def keep_answer(winner: Entrant, start: Path, folder: Path, trust: Sequence[str]) -> None:
    """The answer as student and bundle."""
    save_student(
        load_student(start, merge=winner.plan.merge, keep=winner.plan.short_keep, trust=trust), folder / "student"
    )
    with replaced(folder / "bundle") as target:
        shutil.copytree(winner.bundle, target, dirs_exist_ok=True)
