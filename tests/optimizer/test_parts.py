"""Tests of the optimizer's parts: measured errors, the family of plans, and the search on laws."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.errors import BackendError, ConfigError, GateError
from sparsifiner_edge.images import list_images, load_image
from sparsifiner_edge.optimizer import search as search_module
from sparsifiner_edge.optimizer.clock import Clock
from sparsifiner_edge.optimizer.family import MOST_SCALE, Shape, everything, sparse_layers
from sparsifiner_edge.optimizer.loading import Source
from sparsifiner_edge.optimizer.outcome import close, outcome
from sparsifiner_edge.optimizer.request import LEAST_HELD_OUT, Bound, OptimizeOptions, SearchRequest
from sparsifiner_edge.optimizer.search import FITTED, WINDOW, Attempt, Search, choose_arithmetic, run
from sparsifiner_edge.optimizer.trial import Trial, evenly_by_error
from sparsifiner_edge.pareto import Deployment, SearchResult
from sparsifiner_edge.plan import LEAST_PATCHES, PATCHES_PER_MERGE, LayerPlan, plan_of
from sparsifiner_edge.profiles.stats import quantity
from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.results import read_result, write_result
from sparsifiner_edge.sparse.hosts import backbone_of
from sparsifiner_edge.sparse.student import Student, dense_twin, sparsify
from sparsifiner_edge.sparse.weights import normalise
from tests import flat
from tests.everything import first
from tests.flat import load_student
from tests.models import student as make_student
from tests.tiny import make_bundle

FACTORIES = "tests.hosts.factories"


def merging(student: Student, rate: int) -> LayerPlan:
    """Return the plan with one merging rate in every layer."""
    return plan_of(SparsityConfig(keep=1, merge=(rate,)), len(student.backbone.layers), student.backbone.patches)


def traits(student: Student) -> tuple[Any, ...]:
    """Return what a plan would change in a model, and its weights."""
    backbone = student.backbone
    layers = [(layer.entering, layer.merging) for layer in backbone.layers]
    attentions = [
        (type(one), getattr(one, "layout", None), getattr(one, "sparsity", None)) for one in backbone.attentions
    ]
    content = b"".join(value.numpy().tobytes() for value in student.model.state_dict().values())
    return backbone.sparsity, layers, attentions, hashlib.sha256(content).digest()


@pytest.fixture
def student(tiny_student: Path) -> Student:
    return load_student(tiny_student)


def test_a_plan_is_evaluated_as_the_student_with_its_budget(
    student: Student, pictures: Path, tiny_student: Path
) -> None:
    paths, before = list_images(pictures), traits(student)
    trial = Trial(student, dense_twin(student).model, paths, "patches")
    plan = LayerPlan((20, 0, 10, 0, 0, 0), (0.2, 1.0, 0.5, 1.0, 1.0, 1.0))
    found = trial.errors(plan, range(3))
    assert trial.errors(LayerPlan.dense(6), range(3)) == [0.0] * 3
    again = load_student(tiny_student, merge=plan.merge, keep=plan.short_keep)
    teacher = dense_twin(load_student(tiny_student)).model
    for path, error in zip(paths, found, strict=True):
        pixels = normalise(torch.from_numpy(load_image(path, 160))[None], again.normalisation)
        with torch.no_grad():
            got, wanted = again.backbone.tokens(pixels), backbone_of(teacher).tokens(pixels)
        cosine = torch.cosine_similarity(got[:, 1:], wanted[:, 1:], dim=-1).mean()
        assert error == pytest.approx(1 - float(cosine), abs=1e-5)
    trial.errors(merging(student, 8), [1])
    assert trial.errors(plan, [2, 0]) == [found[2], found[0]], "a plan in between changes nothing"
    assert traits(student) == before, "a plan is set on a copy"
    trial.arrange([2, 0, 1])
    assert (trial.paths, trial.errors(plan, range(3))) == ([paths[2], *paths[:2]], [found[2], *found[:2]])


def test_images_are_taken_evenly_by_what_is_lost_on_them() -> None:
    assert evenly_by_error([0.5, 0.1, 0.9, 0.3, 0.7], 2) == [1, 2]
    assert evenly_by_error([0.2, 0.1], 2) == [1, 0]


def test_images_that_are_taken_have_about_the_mean_of_all() -> None:
    """Although a few images have most of the error."""
    random, ratios = np.random.default_rng(0), list[float]()
    for _ in range(50):
        errors = np.exp(random.normal(0, 1.2, 36)).tolist()
        taken = evenly_by_error(errors, 7)
        assert len(set(taken)) == 7
        ratios.append(fmean(errors[place] for place in taken) / fmean(errors))
    assert fmean(ratios) == pytest.approx(1, abs=0.05)
    assert np.std(ratios) < 0.15


def test_a_decoders_map_is_evaluated_by_its_overlap(student: Student, tmp_path: Path, pictures: Path) -> None:
    def trial(factory: str) -> tuple[Trial, Student]:
        made = load_student(sparsify(f"{FACTORIES}:{factory}", tmp_path / factory, keep=0.5), trust=[FACTORIES])
        return Trial(made, dense_twin(made).model, list_images(pictures), "maps"), made

    judged, made = trial("Depth")
    assert judged.errors(LayerPlan.dense(len(made.backbone.layers)), range(3)) == [0.0] * 3
    mild, harsh = (np.mean(judged.errors(merging(made, rate), range(3))) for rate in (1, 8))
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
    assert judged.errors(LayerPlan.dense(len(made.backbone.layers)), range(len(paths))) == [0.0] * len(paths)
    plan = merging(made, 20)
    lost = judged.errors(plan, range(len(paths)))
    assert all(0 <= each <= 1 for each in lost)
    assert sum(lost) > 0
    bundle = flat.export_bundle(
        start, tmp_path / "bundle", merge=plan.merge, keep=plan.short_keep, tokens=factory is None, trust=trust
    )
    told = list[str]()
    with flat.open_session(bundle) as session:
        np.testing.assert_allclose(judged.errors_of(session.infer), lost, atol=0.02)
        some = judged.errors_of(session.infer, [2], lambda stage, *_: told.append(stage))
    assert (some, told) == ([pytest.approx(lost[2], abs=0.02)], ["evaluating"])
    for name, words in (
        ("Silent", "A search needs a score"),
        ("Broken", "Broken.update failed"),
        ("Missing", "has no 'Missing'"),
    ):
        with pytest.raises(ConfigError, match=words):
            Trial(load_student(start, trust=trust), teacher, paths, f"tests.hosts.metrics:{name}")


PROFILES = st.lists(st.floats(0, 3), min_size=3, max_size=30)


@given(st.floats(1e-5, 3), PROFILES, st.integers(LEAST_PATCHES, 6000))
def test_a_scale_gives_a_plan_that_the_config_takes(scale: float, profile: list[float], patches: int) -> None:
    depth = len(profile)
    plan = Shape(tuple(profile), (0.1, *(1.0,) * (depth - 1))).plan(scale, patches)
    counts = plan.tokens(patches)
    assert all(0 <= PATCHES_PER_MERGE * rate <= seen for rate, seen in zip(plan.merge, counts, strict=False))
    assert min(counts) >= LEAST_PATCHES
    assert plan_of(plan.config(SparsityConfig(background_tokens=4)), depth, patches) == plan


@pytest.mark.parametrize("depth", [6, 12, 24, 40])
@pytest.mark.parametrize("size", [128, 224, 512])
def test_the_plan_from_which_others_are_derived_fits_every_model(depth: int, size: int) -> None:
    """All its layers merge, and all sparse layers that a plan may have are sparse."""
    made = make_student(img_size=size, depth=depth, embed_dim=32, num_heads=1)
    plan, patches = everything(made), made.backbone.patches
    assert all(rate >= 1 for rate in plan.merge)
    assert [share < 1 for share in plan.keep] == sparse_layers(made)
    assert plan_of(plan.config(made.sparsity), depth, patches) == plan


@given(st.data(), st.integers(3, 24))
def test_neighbours_change_shares_where_they_may(data: st.DataObject, depth: int) -> None:
    usable = data.draw(st.lists(st.booleans(), min_size=depth, max_size=depth))
    keep = tuple(data.draw(st.sampled_from((0.1, 0.2, 1.0))) if each else 1.0 for each in usable)
    shape = Shape(tuple(1 - layer / (depth - 1) for layer in range(depth)), keep)
    found = shape.neighbours(usable)
    assert shape not in found
    for other in found:
        assert all(share == 1 or may for share, may in zip(other.keep, usable, strict=True))
        same = other.keep == keep
        assert same != (other.profile == shape.profile), "merges or keys change, not both"
        assert sum(other.profile) == pytest.approx(sum(shape.profile)), "another power merges as much"


PATCHES, DEPTH = 1369, 12


def spent(plan: LayerPlan, linear: float, dense: float, sparse: float) -> float:
    """Return the milliseconds of a plan: linear work per token, attention per pair of tokens."""
    counts = [count / PATCHES for count in plan.tokens(PATCHES)]
    ms = 0.0
    for share, before, after in zip(plan.keep, counts, counts[1:], strict=False):
        ms += linear * (0.25 * before + 0.75 * after)
        ms += (dense if share == 1 else sparse) * before**2
    return ms


HERE = [Deployment("onnxruntime", "fp32"), Deployment("openvino", "fp32"), Deployment("openvino", "int8")]
"""Deployments, the slowest first: the last is three times as fast as the first."""
SHAPE = Shape(tuple((1 - layer / (DEPTH - 1)) ** 2 for layer in range(DEPTH)), (0.1, 0.2, *(1.0,) * (DEPTH - 2)))


class Laws:
    """Stands for `Subject`: errors are a power of the merged share, times are sums of costs with some noise.

    Args:
        paths: The images; each next one is harder.
        level: Error where all patches merge.
        power: Power of the error.
        exported: Ratio of the error of a plan's own bundle to that of a derived file.
        bundle: A bundle that stands for every model.
    """

    patches, least, calibrating, closing = PATCHES, 1e-7, 2, 0.0

    def __init__(
        self,
        paths: Sequence[Path],
        level: float = 0.1,
        power: float = 1.8,
        exported: float = 1.0,
        bundle: Path | None = None,
    ) -> None:
        self.paths, self.level, self.power, self.exported, self.bundle = list(paths), level, power, exported, bundle
        self.hard = {path: 0.8 + 0.4 * place / (len(paths) - 1) for place, path in enumerate(paths)}
        self.student: Any = SimpleNamespace(img_size=160, name="laws")
        self.sparse_layers = [2 * layer < DEPTH for layer in range(DEPTH)]
        self.refused = dict[Deployment, Exception]()

    def error(self, plan: LayerPlan) -> float:
        sparse = [layer for layer, share in enumerate(plan.keep) if share < 1]
        if not all(self.sparse_layers[layer] for layer in sparse):
            raise GateError(f"One of the layers {sparse} of the file cannot select keys.", "Export the plan again.")
        read = 0.002 * sum((1 - share) ** 4 for share in plan.keep)
        return self.level * (sum(plan.merge) / PATCHES) ** self.power + read * (self.level > 0)

    def errors(self, plan: LayerPlan, deployment: Deployment, places: Sequence[int]) -> list[float]:
        return [self.hard[self.paths[place]] * self.error(plan) for place in places]

    def ms(self, plan: LayerPlan, deployment: Deployment) -> float:
        self.error(plan)  # A layer without predictor cannot be timed either.
        noise = np.random.default_rng(list(plan.merge)).normal(0, 0.01)
        factor = 3 - HERE.index(deployment) if deployment in HERE else 3
        return 10 * factor * spent(plan, 1, 1.5, 0.4) * float(np.exp(noise))

    def arrange(self, places: Sequence[int]) -> None:
        self.paths = [self.paths[place] for place in places]

    def closing_s(self) -> float:
        return self.closing

    def all_errors(self, plan: LayerPlan, deployment: Deployment) -> list[float]:
        if deployment in self.refused:
            raise self.refused[deployment]
        return [self.exported * error for error in self.errors(plan, deployment, range(len(self.paths)))]

    def export(self, plan: LayerPlan, deployment: Deployment) -> None:
        pass

    def exported_ms(self, plan: LayerPlan, deployment: Deployment) -> float:
        return self.ms(plan, deployment)

    def dense_ms(self, deployment: Deployment) -> float:
        return self.ms(LayerPlan.dense(DEPTH), deployment)

    def own_bundle(self, plan: LayerPlan, deployment: Deployment) -> Path:
        assert self.bundle is not None
        return self.bundle

    def errors_of(self, bundle: Path, deployment: Deployment, places: Sequence[int]) -> list[float]:
        return [0.001] * len(places)

    def times(self, bundles: Sequence[tuple[Path, Deployment]]) -> list[Any]:
        return [quantity(5.0 + number, 4.0, 20.0, "by law") for number in range(len(bundles))]


def searching(subject: Any, bound: Bound, keep: Any = None, deployments: Sequence[Deployment] = HERE[:1]) -> Search:
    """Return a search on a law; a third of the images is held out."""
    kept = len(subject.paths) - len(subject.paths) // 3
    images, reserved = subject.paths[:kept], subject.paths[kept:]
    request = SearchRequest(bound, "patches", None, list(deployments), {}, images, reserved, "crop")
    return Search(request, subject, Clock(600), keep or (lambda _: None))


PATHS = [Path(f"{number}.png") for number in range(12)]


@settings(deadline=None)
@given(st.floats(1, 2.8), st.floats(0.04, 0.25), st.sampled_from([0.95, 0.98, 0.99]))
def test_a_shape_is_fitted_to_the_bound_by_a_power_law(power: float, wanted: float, bound: float) -> None:
    dense = SHAPE._replace(keep=(1.0,) * DEPTH)
    subject = Laws(PATHS, 1.0, power)
    search = searching(subject, Bound(bound))
    hard = fmean(subject.hard[PATHS[place]] for place in search.selection)
    subject.level = search.aim / hard / subject.error(dense.plan(wanted, PATCHES))
    scale = search.fit(dense, HERE[0], 0.18)
    assert search.error(dense.plan(scale, PATCHES), HERE[0]) == pytest.approx(search.aim, rel=FITTED)


@pytest.mark.parametrize("most_ms", [240.0, 320.0, 400.0])
def test_a_shape_is_fitted_to_a_latency(most_ms: float) -> None:
    search = searching(Laws(PATHS), Bound(most_ms, by_fidelity=False), deployments=HERE)
    scale = search.fit(SHAPE, HERE[1], 0.18)
    assert search.time(SHAPE.plan(scale, PATCHES), HERE[1]) == pytest.approx(search.aim, rel=FITTED)


@settings(deadline=None)
@given(st.floats(0.6, 1.6), st.floats(1.4, 2.4))
def test_an_answer_is_brought_into_the_window(exported: float, power: float) -> None:
    """A plan's own bundle may lose more or less than the file from which the search measured it."""
    kept = list[Attempt]()
    search = searching(Laws(PATHS, 0.1, power, exported), Bound(0.98), kept.append)
    dense = SHAPE._replace(keep=(1.0,) * DEPTH)
    scale = search.accept(dense, HERE[0], search.fit(dense, HERE[0], 0.18))
    best = min(search.attempts, key=search.order)
    assert WINDOW[0] <= search.bounded(best) / search.limit <= WINDOW[1]
    assert (kept[-1], kept[0]) == (best, search.attempts[0])
    assert dense.plan(scale, PATCHES) == search.attempts[-1].plan
    count = len(search.attempts)
    assert (search.accept(dense, HERE[0], scale), len(search.attempts)) == (scale, count), "it is there already"


@given(st.dictionaries(st.floats(0.02, 0.5), st.floats(0.001, 0.2), min_size=1, max_size=4))
def test_the_next_scale_lies_between_plans_on_both_sides_of_the_bound(measured: dict[float, float]) -> None:
    """The error of single images may jump, so that no exponent fits."""
    search = searching(Laws(PATHS), Bound(0.98))
    scale = search.next_scale(SHAPE, measured)
    below = [at for at, error in measured.items() if error < search.aim]
    above = [at for at, error in measured.items() if error >= search.aim]
    if below and above:
        best = [max(below, key=lambda at: measured[at]), min(above, key=lambda at: measured[at])]
        assert min(best) <= scale <= max(best)
    elif below:
        assert scale >= min(MOST_SCALE, max(below, key=lambda at: measured[at]))
    else:
        assert scale <= min(above, key=lambda at: measured[at])


@pytest.mark.parametrize(("auto_ms", "refused"), [(7.0, False), (7.0, True), (9.9, False), (12.0, False)])
def test_the_arithmetic_is_chosen_by_a_few_answers(auto_ms: float, refused: bool) -> None:
    bf16, auto = Deployment("openvino", "int8", "bf16"), Deployment("openvino", "int8")
    other, plan = Deployment("openvino", "fp32"), SHAPE.plan(0.1, PATCHES)
    subject: Any = Laws(PATHS)
    subject.answer_ms, errors = {bf16: 10.0, auto: auto_ms, other: 1.0}, subject.errors

    def measured(one: LayerPlan, deployment: Deployment, places: Sequence[int]) -> list[float]:
        if refused and deployment == auto:
            raise BackendError("It does not run.", "Choose another.")
        return list(errors(one, deployment, places))

    subject.errors = measured
    search = searching(subject, Bound(0.98), None, [bf16, auto, other])
    wins = auto_ms < 9 and not refused
    assert choose_arithmetic(search, plan, bf16) == (auto if wins else bf16)
    assert (auto in search.excluded) == refused


@pytest.mark.parametrize("exported", [0.05, 8.0])
def test_the_scale_of_the_last_export_is_returned(exported: float) -> None:
    """Also where no export came into the window."""
    search = searching(Laws(PATHS, 0.1, 1.8, exported), Bound(0.98))
    scale = search.accept(SHAPE, HERE[0], 0.1)
    assert SHAPE.plan(scale, PATCHES) == search.attempts[-1].plan


@pytest.fixture
def law_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start a search of `Laws` from `SHAPE`."""
    monkeypatch.setattr(search_module, "family", lambda _: (SHAPE, 0.18))


@pytest.mark.usefixtures("law_family")
@pytest.mark.parametrize("bound", [Bound(0.98), Bound(0.95), Bound(150.0, by_fidelity=False)])
def test_a_search_ends_with_the_best_of_what_it_found(bound: Bound) -> None:
    kept = list[Attempt]()
    subject = Laws(PATHS)
    search = searching(subject, bound, kept.append, HERE)
    run(search)
    assert search.settled
    assert kept[-1] == min(search.attempts, key=search.order)
    orders = [search.order(one) for one in kept]
    assert orders == sorted(orders, reverse=True)
    assert search.bounded(kept[-1]) <= search.limit
    assert kept[-1].deployment == HERE[2], "it is the fastest"
    assert search.dense
    # Images that calibrate are never held out, and each image has one use.
    assert not set(search.request.reserved) & set(PATHS[: subject.calibrating])
    assert sorted([*search.request.images, *search.request.reserved]) == sorted(PATHS)
    if bound.by_fidelity:
        assert kept[-1].ms < kept[0].ms


@pytest.mark.parametrize("layers", [(), (1,), (0, 1, 4)])
def test_layers_without_predictor_are_dense_in_all_plans(
    layers: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A student may have been made with predictors in some layers only."""
    start = SHAPE._replace(keep=tuple(0.2 if layer in layers else 1.0 for layer in range(DEPTH)))
    monkeypatch.setattr(search_module, "family", lambda _: (start, 0.18))
    subject = Laws(PATHS)
    subject.sparse_layers = [layer in layers for layer in range(DEPTH)]
    search = searching(subject, Bound(0.98))
    run(search)
    assert search.settled


@pytest.mark.usefixtures("law_family")
def test_a_precision_that_fails_with_the_plan_itself_leaves_the_others() -> None:
    """A plan's own int8 file may lose too much although the file with everything passed."""
    subject = Laws(PATHS)
    subject.refused = {HERE[2]: GateError("The int8 file has cosine 0.9.", "Export fp32.")}
    search = searching(subject, Bound(0.98), None, HERE)
    run(search)
    assert {one.deployment for one in search.attempts} <= {HERE[0], HERE[1]}
    assert search.bounded(min(search.attempts, key=search.order)) <= search.limit
    assert search.excluded[HERE[2]] == "The int8 file has cosine 0.9."


@pytest.mark.usefixtures("law_family")
@pytest.mark.parametrize("held_out", [LEAST_HELD_OUT, 3])
def test_the_result_says_what_each_change_gains_and_what_is_not_verified(
    folder: Path, tmp_path: Path, held_out: int
) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    subject: Any = Laws(sorted(folder.rglob("*.png"))[: 3 * held_out], bundle=bundle)
    search = searching(subject, Bound(0.98), None, HERE)
    run(search)
    closing, models = close(search), SimpleNamespace(export=lambda *_: bundle)
    source: Any = Source(subject.student, subject.student, "model", ready=True)
    result = outcome(search, closing, models, source, OptimizeOptions(minutes=10))  # type: ignore[arg-type]
    write_result(tmp_path / "front.json", result)
    read = read_result(tmp_path / "front.json", SearchResult)
    front, images = read.statistics, read.method.images
    best = front.finalists[0]
    assert front.answer == best
    assert not isinstance(front.check, Unavailable)
    assert best.fidelity >= 0.98
    assert front.speed_up == pytest.approx(front.dense[0].ms.value / best.ms.value)
    assert [lever.change for lever in front.levers][:3] == ["dense model", "+ merging", "+ sparse attention"]
    last = front.levers[-1].candidate
    assert (last.merge, last.keep, last.deployment, last.ms) == (best.merge, best.keep, best.deployment, best.ms)
    assert front.levers[0].candidate.merge == "0"
    said = [f"The answer was checked on {held_out} held-out images only. Give more --minutes or images."]
    assert front.unverified == said * (held_out < LEAST_HELD_OUT)
    assert (len(images["held_out"]), set(images["selection"]) <= set(images["search"])) == (held_out, True)
    assert {len(values) for values in read.samples.values()} == {held_out}
    points = [point for point in front.points if (point.merge, point.keep) == (best.merge, best.keep)]
    assert any(point.pareto_optimal for point in front.points)
    assert all(point.fidelity == pytest.approx(best.fidelity, abs=0.005) for point in points)


def test_an_answer_without_a_timed_dense_model_is_not_verified(folder: Path, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    subject: Any = Laws(sorted(folder.rglob("*.png")), bundle=bundle)
    search = searching(subject, Bound(0.98))
    search.accept(SHAPE, HERE[0], search.fit(SHAPE, HERE[0], 0.18))
    source: Any = Source(subject.student, subject.student, None, ready=True)
    models: Any = SimpleNamespace(export=lambda *_: bundle)
    search.clock = Clock(0)
    front = outcome(search, close(search), models, source, OptimizeOptions()).statistics
    assert front.unverified == [
        "There was no time to time the dense model, so the gain is unknown. Give more --minutes."
    ]
    assert (front.speed_up, front.levers, front.dense) == (None, [], [])
