"""Tests of the parts of distillation: sampling, data sets, augmentations, losses, recipes, decoder outputs."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sparsifiner_edge as se
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.distill.data import (
    BatchAugmentation,
    ShuffledBatches,
    augmentation,
    batches,
    fixed_seed,
    folder_source,
)
from sparsifiner_edge.distill.losses import Distiller, joint_fidelity
from sparsifiner_edge.distill.recipe import Images, Losses, Recipe, RecipeBudget, names, read_recipe
from sparsifiner_edge.distill.train import make_optimiser
from sparsifiner_edge.errors import ArtifactError, ConfigError
from sparsifiner_edge.plan import plan_of
from sparsifiner_edge.records import write_record
from sparsifiner_edge.sparse.student import dense_twin
from tests import flat
from tests.flat import load_student
from tests.models import images, student


def test_what_is_drawn_follows_from_the_seed_alone(folder: Path) -> None:
    source = folder_source(folder, 2, labelled=True, held_out=None)
    transform = augmentation(32, Images())
    shared: dict[str, Any] = {"seed": 3, "workers": 0}
    whole = batches(source, transform, batch=4, first=0, process=0, processes=1, **shared)
    halves = [batches(source, transform, batch=2, first=0, process=r, processes=2, **shared) for r in range(2)]
    later = batches(source, transform, batch=4, first=3, process=0, processes=1, **shared)
    seen = [next(whole) for _ in range(5)]
    for batch in seen:
        parts = [next(half) for half in halves]
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
        assert parts[0].files + parts[1].files == batch.files
    assert torch.equal(next(later).images, seen[3].images)
    files = [name for batch in seen for name in batch.files]
    assert len(set(files[:10])) == 10  # one pass before the next
    assert sorted(files[:10]) == sorted(map(str, source.train))
    for batch in seen:
        assert [("cats" in name) for name in batch.files] == [label == 0 for label in batch.labels]
    assert not torch.equal(
        ShuffledBatches(source, transform, 3).sample(0)[0], ShuffledBatches(source, transform, 4).sample(0)[0]
    )


def test_classes_are_numbered_as_the_classifier_numbers_them(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name, kind in (("class2", "cats"), ("class10", "dogs")):
        shutil.copytree(folder / kind, data / name)
    orders = {("class10", "class2"): "class10", ("class2", "class10"): "class2", (): "class10", ("a", "b"): "class10"}
    for labels, first in orders.items():
        assert folder_source(data, 2, labelled=True, held_out=folder, classifier=labels).classes[0] == first
    with pytest.raises(ConfigError, match="'class10' is not a class of the classifier"):
        folder_source(data, 2, labelled=True, held_out=folder, classifier=("class2", "class3"))
    one = next((folder / "cats").iterdir())
    assert folder_source(folder, 2, labelled=True, held_out=one).held_out_labels == (), "it has no class"
    source = folder_source(folder, 2, False, folder / ".." / folder.name / "cats")
    assert {path.parent.name for path in source.train} == {"dogs"}, "what decides is never trained on"


def test_losses_are_zero_for_the_teacher_itself() -> None:
    found = student(num_classes=3)
    distiller = Distiller(dense_twin(found).model, dense_twin(found).model, Losses())
    got = distiller(images(found.model), torch.tensor([0, 1]), torch.Generator(), False)
    for name in ("patches", "classes", "tokens", "logits"):
        assert float(got[name].detach().abs().max()) == pytest.approx(0, abs=1e-6)
    assert float(got["labels"].detach()) > 0
    ours = Distiller(found.model, dense_twin(found).model, Losses())
    got = ours(images(found.model), None, torch.Generator().manual_seed(0), False)
    assert set(got) == {"patches", "classes", "tokens", "logits", "selection"}
    assert got["patches"].shape == (2,)
    assert float(got["patches"].detach().min()) > 1e-5
    unweighted = Distiller(found.model, dense_twin(found).model, Losses(patches=0, classes=0, logits=0, selection=0))
    with pytest.raises(ConfigError, match="All losses have weight 0: patches, tokens"):
        unweighted.total(got)
    only = ours(images(found.model), None, torch.Generator().manual_seed(0), True)
    assert set(only) == {"selection"}
    only["selection"].backward()
    gradients = {name for name, p in ours.student.named_parameters() if p.grad is not None}
    assert gradients == {name for name in gradients if ".select." in name} != set()


def test_recipes() -> None:
    assert names() == ["cpu", "imagenet-deit-s"]
    assert all(isinstance(read_recipe(name), Recipe) for name in names())
    recipe = read_recipe("cpu", ["distil.steps=7", 'budgets=[{keep="0.3"}]', "precision=bf16"])
    assert (recipe.distil.steps, recipe.budgets, recipe.precision) == (7, (RecipeBudget(keep="0.3"),), "bf16")
    assert json.loads(json.dumps(write_record(recipe)))["distil"]["steps"] == 7


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distil.step=7", "unknown key distil.step"),
        ("batch=0", "batch is 0"),
        ("distil.steps", "has no value"),
        ("distil.epochs=2", "both steps and epochs"),
        ("distil.steps=0", "has no training steps"),
        ("budgets=[{merge=4}]", "budgets[0].merge is 4, not str"),
    ],
)
def test_bad_recipes_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        read_recipe("cpu", [override])


def test_relative_losses_keep_their_value_and_weigh_by_their_share() -> None:
    side = student()
    slopes, values = {}, {}
    for relative in (False, True):
        distiller = Distiller(side.model, dense_twin(side).model, Losses(relative=relative, tokens=1.0))
        loss = torch.tensor([0.2, 0.01], requires_grad=True)  # of two images
        total = distiller.total({"patches": loss, "tokens": torch.tensor(3.0)})
        total.backward()
        assert loss.grad is not None
        slopes[relative], values[relative] = loss.grad.tolist(), float(total.detach())
    assert slopes[False] == [0.5, 0.5]
    assert slopes[True] == pytest.approx([2.5, 50])
    assert values[True] == pytest.approx(values[False])


def test_a_budget_or_image_counts_by_the_share_of_its_error_that_goes() -> None:
    start = joint_fidelity([[0.95, 0.9], [0.99, 0.98]])
    assert joint_fidelity([[0.96, 0.92], [0.98, 0.96]]) < start  # large errors reduced by a fifth, small ones doubled
    assert joint_fidelity([[0.94, 0.89], [0.995, 0.99]]) > start
    assert joint_fidelity([[0.96, 0.9], [0.99, 0.98]]) == pytest.approx(joint_fidelity([[0.95, 0.9], [0.992, 0.98]]))
    assert joint_fidelity([[1.0], [1.0]]) == pytest.approx(1, abs=1e-5)
    assert math.isnan(joint_fidelity([[0.9, math.nan]]))


def test_budgets_are_those_of_the_student_but_for_what_they_say() -> None:
    sparsity = SparsityConfig(keep=(0.3, 0.2, 1), background_tokens=0, channels=8, merge=(4,))
    plan = plan_of(sparsity, 6, 100)
    assert RecipeBudget().config(sparsity, plan) == sparsity
    few = RecipeBudget(keep="0.1", merge="0").config(sparsity, plan)
    assert (few.keep, few.merge) == ((0.1, 0.1, 1, 1, 1, 1), ()), "layers that are dense have no predictor"
    assert RecipeBudget(keep=".1,.2", merge="20..0").config(sparsity, plan).keep == (0.1, 0.2)
    pruning = SparsityConfig(keep=1, token_keep=((2, 0.7),))
    plan = plan_of(pruning, 6, 100)
    assert RecipeBudget(keep="0.1", token_keep="2:.7").config(pruning, plan) == pruning, "there is no predictor"
    for budget, words in (
        (RecipeBudget(token_keep="2:.5"), "token_keep 2:.5, but the student already prunes"),
        (RecipeBudget(keep="x"), "keep is 'x'"),
        (RecipeBudget(token_keep="4"), "token_keep holds '4'"),
        (RecipeBudget(merge="x"), "merge is 'x'"),
    ):
        with pytest.raises(ConfigError, match=words):
            budget.config(pruning, plan)


def seeded(transform: Any, image: Any, seed: int) -> torch.Tensor:
    with fixed_seed(seed):
        return transform(image)


@pytest.mark.parametrize(("policy", "size"), [("rand-m9-mstd0.5-inc1", (32, 48)), ("augmix-m10-w3", (32, 32))])
def test_policies_at_every_magnitude(policy: str, size: tuple[int, int]) -> None:
    """At maximum magnitude timm asks Pillow for an image of 0 bits; sampling must not affect other images."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    plain, auto = (augmentation(size, Images(auto_augment=name)) for name in ("", policy))
    before = random.getstate(), str(np.random.get_state(legacy=False)), torch.random.get_rng_state()
    pairs = [(seeded(auto, image, seed), seeded(plain, image, seed)) for seed in range(16)]
    after = random.getstate(), str(np.random.get_state(legacy=False)), torch.random.get_rng_state()
    assert all(drawn.dtype == torch.uint8 and drawn.shape == (3, *size) for drawn, _ in pairs)
    assert sum(not torch.equal(*pair) for pair in pairs) >= 6  # some leave an image unchanged
    assert torch.equal(seeded(auto, image, 3), pairs[3][0])
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


def test_labels_are_mixed_as_images_are() -> None:
    """Every pixel of an image is its class number, so a mixed image shows what its label must be."""
    classes, labels = 5, torch.tensor([0, 1, 2, 3])
    images = labels.float()[:, None, None, None].expand(-1, 3, 20, 20)
    augment = BatchAugmentation(Images(mixup=0.8, mixup_cut=1.0, smoothing=0.1), classes, 4, "cpu")
    for seed in range(10):
        with fixed_seed(seed):
            mixed, shares = augment(images, labels)
        assert shares is not None
        assert shares.shape == (4, classes)
        assert shares.sum(1) == pytest.approx(torch.ones(4))
        true = (shares - 0.1 / classes) / 0.9
        assert mixed.mean((1, 2, 3)).numpy() == pytest.approx((true @ torch.arange(5.0)).numpy(), abs=1e-4)
    assert torch.equal(images[:, 0, 0, 0], labels.float()), "what was given is as it was"


def test_augmentations_that_are_refused() -> None:
    for odd in (Images(mixup_cut=0.8), Images(smoothing=0.1)):
        with pytest.raises(ConfigError, match="batch is 3"):
            BatchAugmentation(odd, 2, 3, "cpu")
    for policy in ("nonsense", "rand-z3"):
        with pytest.raises(ConfigError, match="timm does not know"):
            augmentation(32, Images(auto_augment=policy))


FACTORY = "tests.hosts.factories"
PIXELS = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    folder = tmp_path_factory.mktemp("training") / "student"
    return se.sparsify(f"{FACTORY}:Segmenter", folder, keep=0.3, channels=8, merge=(4,), calibrate=pictures)


@pytest.mark.parametrize("frozen", [True, False])
def test_training_brings_the_outputs_nearer(segmenter: Path, frozen: bool) -> None:
    found = load_student(segmenter, trust=[FACTORY])
    weights = Losses(patches=0, classes=0, selection=0, outputs=1)
    distiller = Distiller(found.model, dense_twin(found).model, weights, ("mask", "heat"))
    optimiser = make_optimiser(found.model, Recipe(freeze_decoder=frozen))
    before = {name: parameter.detach().clone() for name, parameter in found.model.named_parameters()}
    values = []
    for step in range(30):
        losses = distiller(PIXELS, None, torch.Generator().manual_seed(step), False)
        values.append(float(losses["outputs"].detach().mean()))
        distiller.total(losses).backward()
        optimiser.step()
        optimiser.zero_grad()
    assert values[-1] < 0.8 * values[0]
    moved = {name for name, p in found.model.named_parameters() if not torch.equal(p.detach(), before[name])}
    inside = {name for name in before if name.startswith("encoder.")}
    assert inside & moved
    assert bool(moved - inside) is not frozen


def test_a_training_of_ones_own_model_is_written_as_a_student(tmp_path: Path, segmenter: Path, pictures: Path) -> None:
    settings = ["distil.steps=2", "batch=2", "images.held_out=1", "check_every=1"]
    summary = flat.distill_student(segmenter, pictures, tmp_path / "better", overrides=settings, trust=[FACTORY])
    assert 0.5 < summary.start < 1
    assert load_student(tmp_path / "better", trust=[FACTORY]).outputs == ("mask", "heat")
    with pytest.raises(ArtifactError, match="runs the code of module"):
        flat.distill_student(segmenter, pictures, tmp_path / "other", overrides=settings)
