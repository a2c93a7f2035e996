"""Which plans are measured whole, and which of them is the answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from msgspec.structs import replace

from sparsifiner_edge.config import keep_text, merge_text
from sparsifiner_edge.errors import GateError
from sparsifiner_edge.front import Candidate, Deployment
from sparsifiner_edge.optimizer.explore import CLOSE, MOST_ENGINES, Search
from sparsifiner_edge.optimizer.trial import Trial
from sparsifiner_edge.plan import LayerPlan
from sparsifiner_edge.profiles.stats import quantity, skewed_mean
from sparsifiner_edge.results import Quantity

TRIES = 4
"""Plans of one engine that are exported until one meets the bound."""
Ranked: TypeAlias = list[tuple[LayerPlan, Candidate]]


def rank(search: Search) -> tuple[Ranked, list[Candidate]]:
    """Export and time the best plan of each engine worth it, in turn with the dense model, which comes beside them: of
    those that meet the bound the fastest or most faithful is first; else the nearest to it.

    Raises:
        GateError: every engine's precision loses too much.
    """
    bound, dense, chosen = search.bound, search.dense, dict[Deployment, tuple[LayerPlan, float]]()
    while not chosen:  # with the engines that are left
        chosen = dict(_export(search))
    fastest = min(dense, key=lambda host: dense[host].predicted_ms)
    hosts = list(dict.fromkeys([fastest, *(engine.dense_host for engine in chosen)]))
    nothing = LayerPlan.dense(len(search.trial.selects))
    subjects = [(plan, engine) for engine, (plan, _) in chosen.items()]
    times = search.whole.times([*subjects, *((nothing, host) for host in hosts)])
    rows = [
        (plan, Candidate(
            merge=merge_text(plan.merge), keep=keep_text(plan.short_keep), **engine._asdict(), fidelity=1 - distance,
            predicted_fidelity=1 - search.model(but=plan).of(plan) - search.losses[engine],
            predicted_ms=search.latencies[engine].of(plan), ms=ms,
        ))
        for (engine, (plan, distance)), ms in zip(chosen.items(), times, strict=False)
    ]  # fmt: skip

    def order(row: tuple[LayerPlan, Candidate]) -> tuple[bool, float]:
        one = row[1]
        met = bound.is_met(one.fidelity, one.ms.value)
        return not met, one.ms.value if bound.by_fidelity == met else -one.fidelity

    again = zip(hosts, times[len(subjects) :], strict=True)
    return sorted(rows, key=order), [replace(dense[host], ms=ms) for host, ms in again]


def _export(search: Search) -> Iterator[tuple[Deployment, tuple[LayerPlan, float]]]:
    """By engine worth measuring, the most promising first: its best plan, and the distance of that as a bundle."""
    costs = {e: search.objective(e, search.best(e, search.limit)) for e in search.latencies}
    least = min(costs.values())
    close = [engine for engine in costs if costs[engine] <= max(least, CLOSE * least)]
    for engine in sorted(close, key=costs.__getitem__)[:MOST_ENGINES]:
        try:
            yield engine, _tighten(search, engine)
        except GateError as error:
            search.exclude(engine, error)


def _tighten(search: Search, engine: Deployment) -> tuple[LayerPlan, float]:
    """The plan that meets the bound as a bundle: what int8 and float16 lose on top, or what a whole model takes longer
    than predicted, makes the plan's own limit tighter, a few times at most.
    """
    limit, excess = search.limit, 0.0
    for tried in range(1, TRIES + 1):
        plan = search.best(engine, limit)
        distance = search.distance(engine, plan)
        measured = distance if search.bound.by_fidelity else search.whole.times([(plan, engine)])[0].value
        if measured <= search.limit or tried == TRIES:
            break
        excess = max(excess, measured - search.constraint(engine, plan))
        limit = max(0.0, search.limit - excess)
    return plan, distance


def check(search: Search, plan: LayerPlan, engine: Deployment, reserved: Trial) -> tuple[Quantity, list[float]]:
    """Fidelity of a plan on images that nothing was chosen by, and on each; those that it was judged by tell how images
    differ.
    """
    distances = search.whole.distances(plan, engine, reserved)
    lost = skewed_mean(distances, search.shape(plan))
    low, high = (1 - x if isinstance(x, float) and x < 1 else None for x in (lost.high, lost.low))
    fidelity = quantity(1 - lost.value, low, high, f"1 - distance, {lost.interval}")
    return fidelity, [1 - distance for distance in distances]
