"""Tests of the optimizer's parts: measured errors, the parts that latencies are summed from, the dynamic program."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.export.sessions import file_session
from sparsifiner_edge.images import list_images, load_image
from sparsifiner_edge.ops import torch as ops
from sparsifiner_edge.ops.graph import has_sizes
from sparsifiner_edge.optimizer.fidelity_model import FidelityModel
from sparsifiner_edge.optimizer.latency import SHARES, PlanLatency, name_of
from sparsifiner_edge.optimizer.pieces import attention_piece, linear_pieces
from sparsifiner_edge.optimizer.solve import Solver, possible_counts
from sparsifiner_edge.optimizer.trial import Trial, evenly_by_error
from sparsifiner_edge.plan import PATCHES_PER_MERGE, LayerPlan, plan_of
from sparsifiner_edge.sparse.hosts import backbone_of
from sparsifiner_edge.sparse.student import Student, dense_twin, sparsify
from sparsifiner_edge.sparse.weights import normalise
from tests import flat
from tests.everything import first
from tests.flat import load_student

FACTORIES = "tests.hosts.factories"


def merging(trial: Trial, rate: int) -> LayerPlan:
    """Return the plan with one merging rate in every layer."""
    return plan_of(SparsityConfig(keep=1, merge=(rate,)), len(trial.selects), trial.patches)


@pytest.fixture
def student(tiny_student: Path) -> Student:
    return load_student(tiny_student)


def test_a_plan_is_evaluated_as_the_student_with_its_budget(
    student: Student, pictures: Path, tiny_student: Path
) -> None:
    paths = list_images(pictures)
    trial = Trial(student, dense_twin(student).model, paths, "patches")
    plan = LayerPlan((20, 0, 10, 0, 0, 0), (0.2, 1.0, 0.5, 1.0, 1.0, 1.0))
    found = trial.errors(plan)
    assert trial.errors(LayerPlan.dense(6)) == [0.0] * 3
    again = load_student(tiny_student, merge=plan.merge, keep=plan.short_keep)
    teacher = dense_twin(load_student(tiny_student)).model
    for path, error in zip(paths, found, strict=True):
        pixels = normalise(torch.from_numpy(load_image(path, 160))[None], again.normalisation)
        with torch.no_grad():
            got, wanted = again.backbone.tokens(pixels), backbone_of(teacher).tokens(pixels)
        cosine = torch.cosine_similarity(got[:, 1:], wanted[:, 1:], dim=-1).mean()
        assert error == pytest.approx(1 - float(cosine), abs=1e-5)
    assert trial.errors(plan) == found, "a plan in between changes nothing"
    trial.arrange([2, 0, 1])
    assert (trial.paths, trial.errors(plan)) == ([paths[2], *paths[:2]], [found[2], *found[:2]])


def test_images_are_taken_evenly_by_what_is_lost_on_them() -> None:
    assert evenly_by_error([0.5, 0.1, 0.9, 0.3, 0.7], 2) == [3, 4]
    assert evenly_by_error([0.2, 0.1], 2) == [1, 0]


def test_layers_before_the_first_change_need_no_second_run(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = load_student(sparsify(f"{FACTORIES}:Depth", tmp_path / "student", keep=0.5), trust=[FACTORIES])
    trial, depth = Trial(made, dense_twin(made).model, list_images(pictures), "maps"), len(made.backbone.layers)
    plans = [LayerPlan(tuple(9 * (n == at) for n in range(depth)), (1.0,) * depth) for at in range(depth)]
    found = [trial.errors(plan) for plan in plans]
    monkeypatch.setattr("sparsifiner_edge.optimizer.trial.MOST_REMEMBERED", 0)
    assert [trial.errors(plan) for plan in plans] == found


def test_a_decoders_map_is_evaluated_by_its_overlap(student: Student, tmp_path: Path, pictures: Path) -> None:
    def trial(factory: str) -> Trial:
        made = load_student(sparsify(f"{FACTORIES}:{factory}", tmp_path / factory, keep=0.5), trust=[FACTORIES])
        return Trial(made, dense_twin(made).model, list_images(pictures), "maps")

    judged = trial("Depth")
    depth = len(judged.selects)
    assert judged.errors(LayerPlan.dense(depth)) == [0.0] * 3
    mild, harsh = (np.mean(judged.errors(merging(judged, rate))) for rate in (1, 8))
    assert 0 < mild < harsh <= 1
    with pytest.raises(ConfigError, match="model outputs: mask, heat"):
        trial("Masked")
    with pytest.raises(ConfigError, match="no decoder"):
        Trial(student, dense_twin(student).model, list_images(pictures), "maps")


@pytest.mark.parametrize(("factory", "metric"), first([(None, "Sure"), ("Masked", "Covered")]))
def test_a_metric_of_the_users_own(
    tmp_path: Path, pictures: Path, tiny_student: Path, factory: str | None, metric: str
) -> None:
    start = sparsify(f"{FACTORIES}:{factory}", tmp_path / "start", keep=0.5) if factory else tiny_student
    trust = [FACTORIES] if factory else []
    made = load_student(start, trust=trust)
    teacher, paths = dense_twin(made).model, list_images(pictures)
    judged = Trial(made, teacher, paths, f"tests.hosts.metrics:{metric}")
    assert judged.errors(LayerPlan.dense(len(judged.selects))) == [0.0] * len(paths)
    plan = merging(judged, 20)
    lost = judged.errors(plan)
    assert all(0 <= each <= 1 for each in lost)
    assert sum(lost) > 0
    bundle = flat.export_bundle(
        start, tmp_path / "bundle", merge=plan.merge, keep=plan.short_keep, tokens=factory is None, trust=trust
    )
    with flat.open_session(bundle) as session:
        np.testing.assert_allclose(judged.errors_of(session.infer), lost, atol=0.02)
    for name, words in (
        ("Silent", "A search needs a score"),
        ("Broken", "Broken.update failed"),
        ("Missing", "has no 'Missing'"),
    ):
        with pytest.raises(ConfigError, match=words):
            Trial(load_student(start, trust=trust), teacher, paths, f"tests.hosts.metrics:{name}")


@torch.no_grad()
def test_linear_parts_compute_what_the_layer_does(student: Student) -> None:
    layer = student.backbone.layers[0]
    pieces = linear_pieces(layer, 64, False, 1, (100, 17))
    for patches in (100, 17):
        mlp, projections = (pieces[name, patches] for name in ("mlp", "projections"))
        x = torch.from_numpy(mlp.feed["image"])
        (got,) = file_session(mlp.model).run(None, mlp.feed)
        np.testing.assert_allclose(got, (x + layer.after_mlp(x)).numpy(), atol=1e-4)
        qkv = layer.packed_attention.pack(layer.entry_norm(x))
        wanted = x + layer.after_attention(layer.packed_attention.join(x, qkv[..., :64]))
        (got,) = file_session(projections.model).run(None, projections.feed)
        np.testing.assert_allclose(got, wanted.numpy(), atol=1e-4)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_attention_parts_are_the_operators(student: Student, share: float, merged: bool) -> None:
    config = SparsityConfig(keep=share, background_tokens=4, channels=8, merge=(1,))
    geometry = student.backbone.geometry
    piece = attention_piece(geometry, 1, 40, config, merged)
    (got,) = file_session(piece.model).run(None, piece.feed)
    assert got.shape == (1, 41, 64)
    sizes = torch.from_numpy(piece.feed["sizes"]) if merged else None
    qkv = torch.from_numpy(piece.feed["qkv"])
    if share == 1:
        wanted = ops.dense_attention(qkv, num_heads=geometry.heads, scale=geometry.scale, sizes=sizes)
        np.testing.assert_allclose(got, wanted.numpy(), atol=1e-4)
    operators = [node.op_type for node in piece.model.graph.node]
    assert operators == (["DenseAttention"] if share == 1 else ["KeySelect", "SparseAttention"])
    assert all(has_sizes(piece.model, node) == merged for node in piece.model.graph.node)


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
    """Return all existing plans."""
    counts = possible_counts(PATCHES, TILE)
    found = []
    for path in itertools.product(counts, repeat=depth):
        before = (PATCHES, *path[:-1])
        rates = tuple(a - b for a, b in zip(before, path, strict=True))
        if all(0 <= rate <= a // PATCHES_PER_MERGE for rate, a in zip(rates, before, strict=True)):
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
            rates.append(int(random.integers(0, left // PATCHES_PER_MERGE)))
            left -= rates[-1]
        plans.append(LayerPlan(tuple(rates), tuple(float(random.choice(SHARES)) for _ in range(6))))
    wanted = [truth.of(plan) for plan in plans]
    before = np.abs(np.log([fidelity.of(plan) for plan in plans]) - np.log(wanted)).mean()
    untold = fidelity.of(plans[0])
    assert fidelity.fit([], []).of(plans[0]) == untold, "where the time was over before any plan was judged"
    fidelity.fit(plans[:40], wanted[:40])
    after = np.abs(np.log([fidelity.of(plan) for plan in plans[40:]]) - np.log(wanted[40:])).mean()
    assert after < 0.05
    assert after < before / 3


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.floats(1e-4, 0.2))
def test_what_is_found_keeps_its_bound_and_the_config_takes_it(seed: int, error: float) -> None:
    solver = Solver(latency(), model(3, seed=seed), [True, False, True], TILE)
    plan = solver.at_error(error)
    assert plan.is_dense or solver.model.of(plan) <= error
    assert plan.keep[1] == 1
    assert solver.latency.of(plan) <= solver.latency.of(LayerPlan.dense(3)) + 1e-9
    if not plan.is_dense:
        config = plan.config(SparsityConfig(keep=0.25, background_tokens=4))
        assert plan_of(config, 3, PATCHES) == plan
    ms = solver.latency.of(plan)
    assert solver.latency.of(solver.at_latency(ms * 1.001)) <= ms * 1.001
