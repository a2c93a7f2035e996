"""The dynamic program against trying everything, and the two models that it works with."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.plan import LARGEST_MERGE, LayerPlan, plan_of
from sparsifiner_edge.search.fidelity_model import FidelityModel
from sparsifiner_edge.search.latency import SHARES, PlanLatency, name_of
from sparsifiner_edge.search.solve import Solver, possible_counts

PATCHES, TILE = 24, 16
COUNTS = range(PATCHES, 7, -1)


def times(counts: Sequence[int] = COUNTS) -> dict[str, list[float]]:
    """Linear parts grow with the tokens, dense attention with their square, sparse attention in between."""
    parts = {"projections": [0.3 * n for n in counts], "mlp": [0.6 * n for n in counts]}
    parts["merging"] = [0.05 * n for n in counts]
    return parts | {name_of(share): [0.02 * n * n * share**0.5 for n in counts] for share in SHARES}


def latency(**calibration: float) -> PlanLatency:
    return PlanLatency(COUNTS, times(), **calibration)


def model(depth: int = 3, patches: int = PATCHES, seed: int = 0) -> FidelityModel:
    random = np.random.default_rng(seed)
    merge = random.uniform(0.001, 0.05, depth)
    return FidelityModel(merge, random.uniform(0.0005, 0.02, depth), patches)


def everything(depth: int) -> list[LayerPlan]:
    """All plans there are."""
    counts = possible_counts(PATCHES, TILE)
    found = []
    for path in itertools.product(counts, repeat=depth):
        before = (PATCHES, *path[:-1])
        rates = tuple(a - b for a, b in zip(before, path, strict=True))
        if all(0 <= rate <= a // LARGEST_MERGE for rate, a in zip(rates, before, strict=True)):
            found += [LayerPlan(rates, keep) for keep in itertools.product(SHARES, repeat=depth)]
    return found


@pytest.mark.parametrize("price", [0.01, 100.0, 3000.0, 1e6])
def test_no_plan_is_better_at_a_price(price: float) -> None:
    ms, fidelity = latency(scale=1.1, ours=2.0), model(2)

    def cost(plan: LayerPlan) -> float:
        counts = np.array(plan.tokens(PATCHES))
        lost = sum(
            float(fidelity.merging(layer, counts[layer : layer + 1], counts[layer + 1 : layer + 2])[0])
            + float(fidelity.reading(layer, share, counts[layer : layer + 1])[0])
            for layer, share in enumerate(plan.keep)
        )
        return ms.of(plan) + price * lost

    found = Solver(ms, fidelity, [True, True], TILE).at_price(price)
    assert cost(found) == pytest.approx(min(map(cost, everything(2))))


def test_fitting_finds_layers_that_lose_more_than_alone() -> None:
    truth, fidelity = model(6, 400), model(6, 400)
    for name, value in (("steep", 0.4), ("size", 0.8), ("left", -0.5)):
        truth.parameters[name] += value
    truth.parameters["merge"][2] += 0.6
    random = np.random.default_rng(1)
    plans = []
    for _ in range(60):
        left, rates = 400, []
        for _ in range(6):
            rates.append(int(random.integers(0, left // LARGEST_MERGE)))
            left -= rates[-1]
        plans.append(LayerPlan(tuple(rates), tuple(float(random.choice(SHARES)) for _ in range(6))))
    wanted = [truth.of(plan) for plan in plans]
    before = np.abs(np.log([fidelity.of(plan) for plan in plans]) - np.log(wanted)).mean()
    fidelity.fitted(plans[:40], wanted[:40])
    after = np.abs(np.log([fidelity.of(plan) for plan in plans[40:]]) - np.log(wanted[40:])).mean()
    assert after < 0.05
    assert after < before / 3


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.floats(1e-4, 0.2))
def test_what_is_found_keeps_its_bound_and_the_config_takes_it(seed: int, distance: float) -> None:
    solver = Solver(latency(), model(3, seed=seed), [True, False, True], TILE)
    plan = solver.at_distance(distance)
    assert plan.is_dense or solver.model.of(plan) <= distance
    assert plan.keep[1] == 1
    assert solver.latency.of(plan) <= solver.latency.of(LayerPlan.dense(3)) + 1e-9
    if not plan.is_dense:
        config = plan.config(SparsityConfig(keep=0.25, cells=4))
        assert plan_of(config, 3, PATCHES) == plan
    ms = solver.latency.of(plan)
    assert solver.latency.of(solver.at_latency(ms * 1.001)) <= ms * 1.001
