"""What plans lose, as it is measured, and the parts that latencies are summed from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.export.export import export_bundle
from sparsifiner_edge.export.sessions import file_session
from sparsifiner_edge.images import list_images, load_image
from sparsifiner_edge.ops import torch as ops
from sparsifiner_edge.ops.graph import gets_merged
from sparsifiner_edge.plan import LayerPlan, plan_of
from sparsifiner_edge.runtime import open_session
from sparsifiner_edge.search.pieces import attention_piece, linear_pieces
from sparsifiner_edge.search.trial import Trial
from sparsifiner_edge.sparse.hosts import backbone_of
from sparsifiner_edge.sparse.student import Student, dense_twin, load_student, sparsify
from sparsifiner_edge.sparse.weights import normalise
from tests.everything import first

FACTORIES = "tests.hosts.factories"


def merging(trial: Trial, rate: int) -> LayerPlan:
    """Of one rate in every layer."""
    return plan_of(SparsityConfig(keep=1, merge=(rate,)), len(trial.selects), trial.patches)


@pytest.fixture
def student(tiny_student: Path) -> Student:
    return load_student(tiny_student)


def test_a_plan_is_judged_as_the_student_with_its_budget(student: Student, pictures: Path, tiny_student: Path) -> None:
    paths = list_images(pictures)
    trial = Trial(student, dense_twin(student).model, paths, "patches")
    plan = LayerPlan((20, 0, 10, 0, 0, 0), (0.2, 1.0, 0.5, 1.0, 1.0, 1.0))
    found = trial.distances(plan)
    assert trial.distances(LayerPlan.dense(6)) == [0.0] * 3
    again = load_student(tiny_student, merge=plan.merge, keep=plan.short_keep)
    teacher = dense_twin(load_student(tiny_student)).model
    for path, distance in zip(paths, found, strict=True):
        pixels = normalise(torch.from_numpy(load_image(path, 160))[None], again.normalisation)
        with torch.no_grad():
            got, wanted = again.backbone.tokens(pixels), backbone_of(teacher).tokens(pixels)
        cosine = torch.cosine_similarity(got[:, 1:], wanted[:, 1:], dim=-1).mean()
        assert distance == pytest.approx(1 - float(cosine), abs=1e-5)
    assert trial.distances(plan) == found, "a plan in between changes nothing"


def test_layers_before_the_first_change_are_not_run_again(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder that reads layers in the middle sees what they made."""
    made = load_student(sparsify(f"{FACTORIES}:depth", tmp_path / "student", keep=0.5), trust=[FACTORIES])
    trial, layers = Trial(made, dense_twin(made).model, list_images(pictures), "maps"), made.backbone.layers
    ran: list[int] = []
    for number, layer in enumerate(layers):
        layer.own_attention.register_forward_hook(lambda *_, at=number: ran.append(at))
    depth = len(layers)
    for changed in range(depth):
        plan = LayerPlan(
            *((tuple(value if n == changed else none for n in range(depth))) for value, none in ((9, 0), (0.4, 1.0)))
        )
        found = trial.distances(plan)
        ran.clear()
        assert trial.distances(plan) == found
        assert ran == [*range(changed, depth)] * 3
        with monkeypatch.context() as patch:
            patch.setattr("sparsifiner_edge.search.trial.MOST_REMEMBERED", 0)
            assert trial.distances(plan) == found
        assert "forward" not in vars(layers[0])


def test_a_decoders_map_is_judged_by_its_overlap(student: Student, tmp_path: Path, pictures: Path) -> None:
    def trial(factory: str) -> Trial:
        made = load_student(sparsify(f"{FACTORIES}:{factory}", tmp_path / factory, keep=0.5), trust=[FACTORIES])
        return Trial(made, dense_twin(made).model, list_images(pictures), "maps")

    judged = trial("depth")
    depth = len(judged.selects)
    assert judged.distances(LayerPlan.dense(depth)) == [0.0] * 3
    mild, harsh = (np.mean(judged.distances(merging(judged, rate))) for rate in (1, 8))
    assert 0 < mild < harsh <= 1
    with pytest.raises(ConfigError, match="outputs are: mask, heat"):
        trial("masked")
    with pytest.raises(ConfigError, match="no decoder"):
        Trial(student, dense_twin(student).model, list_images(pictures), "maps")


def test_an_output_of_its_own_with_the_name_of_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'tokens' bears the name of its backbone's"):
        export_bundle(f"{FACTORIES}:tokens_too", tmp_path / "bundle", tokens=True, trust=[FACTORIES])
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(("factory", "metric"), first([(None, "Sure"), ("masked", "Covered")]))
def test_a_metric_of_the_users_own(
    tmp_path: Path, pictures: Path, tiny_student: Path, factory: str | None, metric: str
) -> None:
    start = sparsify(f"{FACTORIES}:{factory}", tmp_path / "start", keep=0.5) if factory else tiny_student
    trust = [FACTORIES] if factory else []
    made = load_student(start, trust=trust)
    teacher, paths = dense_twin(made).model, list_images(pictures)
    judged = Trial(made, teacher, paths, f"tests.hosts.metrics:{metric}")
    assert judged.distances(LayerPlan.dense(len(judged.selects))) == [0.0] * len(paths)
    plan = merging(judged, 20)
    lost = judged.distances(plan)
    assert all(0 <= each <= 1 for each in lost)
    assert sum(lost) > 0
    bundle = export_bundle(
        start, tmp_path / "bundle", merge=plan.merge, keep=plan.short_keep, tokens=factory is None, trust=trust
    )
    with open_session(bundle) as session:
        np.testing.assert_allclose(judged.distances_of(session.infer), lost, atol=0.02)
    for name, words in (
        ("Silent", "A search needs a score"), ("Broken", "Broken.update failed"), ("Missing", "cannot be imported"),
    ):  # fmt: skip
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
        qkv = layer.own_attention.packed(layer.entry_norm(x))
        wanted = x + layer.after_attention(layer.own_attention.joined(x, qkv[..., :64]))
        (got,) = file_session(projections.model).run(None, projections.feed)
        np.testing.assert_allclose(got, wanted.numpy(), atol=1e-4)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_attention_parts_are_the_operators(student: Student, share: float, merged: bool) -> None:
    config = SparsityConfig(keep=share, cells=4, channels=8, merge=(1,))
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
    assert all(gets_merged(piece.model, node) == merged for node in piece.model.graph.node)
