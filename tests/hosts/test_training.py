"""Distillation with the task in it: a decoder's outputs towards the teacher's own, beside tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sparsifiner_edge as se
from sparsifiner_edge.distill.losses import Distiller
from sparsifiner_edge.distill.recipe import Losses, Recipe
from sparsifiner_edge.distill.train import make_optimiser
from sparsifiner_edge.errors import ArtifactError
from sparsifiner_edge.metrics import POSITIONS
from sparsifiner_edge.sparse.outputs import outputs_of
from sparsifiner_edge.sparse.student import dense_twin, load_student
from tests.hosts.factories import Segmenter
from tests.hosts.hugging_face import images

FACTORY = "tests.hosts.factories"


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    folder = tmp_path_factory.mktemp("training") / "student"
    return se.sparsify(f"{FACTORY}:segmenter", folder, keep=0.3, channels=8, merge=(4,), calibrate=pictures)


def test_a_models_tokens_are_those_of_its_backbone() -> None:
    """Whatever it does to pixels before, and whatever reads them after."""
    made = Segmenter()
    x = images((160, 160))
    with torch.no_grad():
        alone, within = made.encoder.forward_features(x), outputs_of(made, x, made.output_names, tokens=True)
        torch.testing.assert_close(within["tokens"], alone)
        assert torch.equal(within["mask"], made(x)[0])
        se.sparsify_model(made, keep=0.3, cells=4, channels=8, token_keep=((1, 0.5),))
        made.__dict__["forward"] = made.encoder.forward
        pruned, own = outputs_of(made, x, ["logits"], tokens=True), outputs_of(made.encoder, x)
    assert pruned["tokens"].shape == (2, 51, 64)
    for name in ("tokens", POSITIONS, "logits"):
        torch.testing.assert_close(pruned[name], own[name])


@pytest.mark.parametrize("frozen", [True, False])
def test_training_brings_the_outputs_nearer(student: Path, frozen: bool) -> None:
    found = load_student(student, trust=[FACTORY])
    weights = Losses(patches=0, classes=0, selection=0, outputs=1)
    distiller = Distiller(found.model, dense_twin(found).model, weights, ("mask", "heat"))
    optimiser = make_optimiser(found.model, Recipe(freeze_decoder=frozen))
    before = {name: parameter.detach().clone() for name, parameter in found.model.named_parameters()}
    values = []
    for step in range(30):
        losses = distiller(images((160, 160)), None, torch.Generator().manual_seed(step), False)
        values.append(float(losses["outputs"].detach().mean()))
        distiller.total(losses).backward()
        optimiser.step()
        optimiser.zero_grad()
    assert values[-1] < 0.8 * values[0]
    moved = {name for name, p in found.model.named_parameters() if not torch.equal(p.detach(), before[name])}
    inside = {name for name in before if name.startswith("encoder.")}
    assert inside & moved
    assert bool(moved - inside) is not frozen


def test_a_training_of_ones_own_model_is_written_as_a_student(tmp_path: Path, student: Path, pictures: Path) -> None:
    settings = ["distil.steps=2", "batch=2", "images.held_out=1", "check_every=1"]
    summary = se.distill_student(student, pictures, tmp_path / "better", overrides=settings, trust=[FACTORY])
    assert 0.5 < summary.start < 1
    assert load_student(tmp_path / "better", trust=[FACTORY]).outputs == ("mask", "heat")
    with pytest.raises(ArtifactError, match="made by the code"):
        se.distill_student(student, pictures, tmp_path / "other", overrides=settings)
