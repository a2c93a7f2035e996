"""The parts of distillation: what is drawn, data sets, losses, recipes."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.distill.augment import augmentation, seeded
from sparsifiner_edge.distill.data import (
    Batch,
    ShuffledBatches,
    batches,
    folder_source,
)
from sparsifiner_edge.distill.fidelity import joint_fidelity
from sparsifiner_edge.distill.losses import Distiller, at_positions
from sparsifiner_edge.distill.optimiser import make_optimiser
from sparsifiner_edge.distill.recipe import Images, Losses, Phase, Recipe, names, read_recipe
from sparsifiner_edge.distill.train import Training, digest, make_accelerator
from sparsifiner_edge.errors import ConfigError, ImageError
from sparsifiner_edge.images import load_image, open_image
from sparsifiner_edge.records import write_record
from sparsifiner_edge.sparse.calibrate import observed, selection_loss, sparse_layers
from sparsifiner_edge.sparse.patch import final_tokens
from sparsifiner_edge.sparse.student import dense_twin
from sparsifiner_edge.sparse.weights import normalise
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


def test_a_class_held_out_is_still_a_class(folder: Path, tmp_path: Path) -> None:
    data = shutil.copytree(folder / "dogs", tmp_path / "data" / "dogs").parent
    (data / "cats").mkdir()
    shutil.copy(folder / "cats" / "01.png", data / "cats")
    source = folder_source(data, 1, labelled=True, held_out=None)
    assert [path.parent.name for path in source.held_out] == ["cats"]
    assert source.classes == ("cats", "dogs")
    assert set(source.labels) == {1}


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_worker_meets_is_told_as_it_is(workers: int, folder: Path, tmp_path: Path) -> None:
    data = shutil.copytree(folder, tmp_path / "data")
    source = folder_source(data, 2, labelled=True, held_out=None)
    for path in data.rglob("*.png"):
        path.write_bytes(b"no image")
    drawn = batches(
        source, augmentation(32, Images()), seed=0, batch=6, first=0, process=0, processes=1, workers=workers
    )
    with pytest.raises(ImageError, match=r"^None of the 10 images can be read\.\n  Look at \S+\.png, for instance\.$"):
        next(drawn)


@pytest.mark.parametrize("size", [32, (24, 40), (40, 24)])
def test_images_of_any_shape(size: Any, folder: Path) -> None:
    path = folder / "dogs" / "00.png"
    image = open_image(path)
    whole = augmentation(size, Images(smallest_crop=1, flip=False))(image)
    assert torch.equal(whole, torch.from_numpy(load_image(path, size)).permute(2, 0, 1))
    drawn = seeded(augmentation(size, Images(smallest_crop=0.99, flip=False)), image, 0)
    assert drawn.shape == whole.shape


@pytest.mark.parametrize("size", [(20, 80), (80, 20), (40, 40)])
def test_random_crops_have_the_shape_of_the_model(size: tuple[int, int]) -> None:
    """A gradient from left to right and one from top to bottom: how much of each a crop holds tells its sides."""
    across, down = np.meshgrid(np.arange(256), np.arange(256))
    image = Image.fromarray(np.stack([across, down, 0 * down], -1).astype(np.uint8))
    shapes = []
    for seed in range(40):
        red, green, _ = seeded(augmentation(size, Images(smallest_crop=0.05, flip=False)), image, seed).int()
        shapes.append(float(np.ptp(red.numpy()) / np.ptp(green.numpy())))
    assert float(np.median(shapes)) == pytest.approx(size[1] / size[0], rel=0.25)


def test_epochs_are_counted_over_all_processes(folder: Path, tmp_path: Path) -> None:
    plan, found = read_recipe("cpu", ("batch=2", "images.held_out=2")), student(num_classes=2)
    source = folder_source(folder, 2, False, None)
    training = Training(make_accelerator(plan), found, dense_twin(found), source, plan, tmp_path)
    training.accelerator = SimpleNamespace(num_processes=4)
    assert training._steps(Phase(steps=0, epochs=8.0)) == 8 * 10 / (2 * 4)


def test_models_are_told_apart_by_their_weights_on_any_number_of_threads() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(512, 512).to(torch.bfloat16)
    threads, found = torch.get_num_threads(), set()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.add(digest(model))
    finally:
        torch.set_num_threads(threads)
    with torch.no_grad():
        model.bias[3] += 1
    assert len(found) == 1
    assert digest(model) not in found


def test_a_folder_is_the_same_by_any_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    named = [folder_source(path, 2, False, None).fingerprint for path in (folder, Path(), Path("cats/.."))]
    assert len(set(named[:2])) == 1
    assert folder_source(folder / "cats", 2, False, None).fingerprint not in named


@pytest.mark.parametrize("preset", ["edge", "paper"])
def test_the_predictor_learns_from_the_students_own_queries(preset: str) -> None:
    sparsity = SparsityConfig.for_preset(preset, keep=0.2, channels=8, **({} if preset == "paper" else {"cells": 4}))
    found = student(sparsity=sparsity)
    qkv: list[tuple[Any, torch.Tensor]] = []
    with observed(found.model, lambda layer, x, *_: qkv.append((layer, x))):
        found.model(images(found.model))
    assert len(qkv) == 6
    layer, values = qkv[2]
    values = values.detach().requires_grad_()
    first = selection_loss(layer, values, torch.Generator().manual_seed(0))
    first.backward()
    assert values.grad is None  # it counts as given
    optimiser = torch.optim.Adam(layer.select.parameters(), 1e-2)
    for _ in range(30):
        optimiser.zero_grad()
        selection_loss(layer, values, torch.Generator().manual_seed(0)).backward()
        optimiser.step()
    assert selection_loss(layer, values, torch.Generator().manual_seed(0)) < 0.9 * first
    assert all(x.observer is None and not x.densely for x in sparse_layers(found.model))


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
    with pytest.raises(ConfigError, match="No loss of patches, tokens"):
        unweighted.total(got)
    only = ours(images(found.model), None, torch.Generator().manual_seed(0), True)
    assert set(only) == {"selection"}
    only["selection"].backward()
    gradients = {name for name, p in ours.student.named_parameters() if p.grad is not None}
    assert gradients == {name for name in gradients if ".select." in name} != set()


def test_pruned_tokens_are_held_against_their_own_places() -> None:
    found = student(sparsity=SparsityConfig(keep=0.5, cells=4, channels=8, token_keep=((1, 0.6), (3, 0.5))))
    tokens, positions = final_tokens(found.model, images(found.model))
    assert positions is not None
    assert tokens.shape == (2, 31, 64)
    wanted = torch.arange(101).float()[None, :, None].expand(2, -1, 64)
    picked = at_positions(wanted, positions, 1)
    assert torch.equal(picked[:, 1:, 0].long() - 1, positions)


def test_recipes() -> None:
    assert names() == ["cpu", "imagenet-deit-s"]
    for name in names():
        assert isinstance(read_recipe(name), Recipe)
    recipe = read_recipe("cpu", ["distil.steps=7", "budgets.keep=[0.3]", "precision=bf16", "distil.learning_rate=2e-6"])
    assert (recipe.distil.steps, recipe.budgets.keep, recipe.precision) == (7, (0.3,), "bf16")
    assert recipe.distil.learning_rate == 2e-6
    assert json.loads(json.dumps(write_record(recipe)))["distil"]["steps"] == 7


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distil.step=7", "unknown key distil.step"), ("batch=0", "batch is 0"),
        ("batch=two", 'batch is "two", not int'),
        ("distil=3", "distil is 3"), ("budgets.keep=[1.5]", "budgets.keep[0] is 1.5, not float < 1"),
        ("precision=fp8", 'precision is "fp8", not str of the form'),
        ("distil.steps", "has no value"), ("batch.x=1", "batch is not a section"),
        ("distil.epochs=2", "both steps and epochs"),
        ("distil.steps=0", "has no training steps"), ("budgets.token_keep=4", "budgets.token_keep is 4, not str"),
        ("budgets.token_keep='4'", "token_keep holds '4'"),
        ('budgets.merge=["x"]', "merge is 'x'"), ("losses.patches=nan", "losses.patches is NaN, not float"),
    ],
)  # fmt: skip
def test_bad_recipes_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        read_recipe("cpu", [override])


def test_what_decides_is_never_trained_on(folder: Path) -> None:
    source = folder_source(folder, 2, False, folder / ".." / folder.name / "cats")
    assert {path.parent.name for path in source.train} == {"dogs"}
    assert len(source.held_out) == 2


def test_a_large_epsilon_spares_weights_whose_gradients_are_small() -> None:
    model = student().model
    moved = {}
    for epsilon in (1e-8, 1.0):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimiser = make_optimiser(model, Recipe(epsilon=epsilon))
        assert {group["lr"] for group in optimiser.param_groups} == {1e-3}
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        optimiser.step()
        moved[epsilon] = {name: float((p - before[name]).abs().max().detach()) for name, p in model.named_parameters()}
    for name, distance in moved[1.0].items():
        if ".select." in name:  # the predictor has Adam's own
            assert distance == pytest.approx(moved[1e-8][name], rel=1e-2)
        else:
            assert distance == pytest.approx(1e-6, rel=0.1)
            assert moved[1e-8][name] == pytest.approx(1e-3, rel=0.1)


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
    assert joint_fidelity([[0.96, 0.92], [0.98, 0.96]]) < start  # a fifth off the large errors, the small ones doubled
    assert joint_fidelity([[0.94, 0.89], [0.995, 0.99]]) > start
    assert joint_fidelity([[0.96, 0.9], [0.99, 0.98]]) == pytest.approx(joint_fidelity([[0.95, 0.9], [0.992, 0.98]]))
    assert joint_fidelity([[1.0], [1.0]]) == pytest.approx(1, abs=1e-5)
    assert math.isnan(joint_fidelity([[0.9, math.nan]]))


def test_mixed_images_hold_a_rectangle_of_their_neighbour(folder: Path, tmp_path: Path) -> None:
    plan, found = read_recipe("cpu", ("batch=2", "images.held_out=2", "images.cut_mix=0.5")), student()
    training = Training(
        make_accelerator(plan), found, dense_twin(found), folder_source(folder, 2, False, None), plan, tmp_path
    )
    size, count = found.img_size, 3
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 3, size, size) * 100
    batch = Batch(images, torch.zeros(count), ("",) * count, ())
    mixed, shares = 0, []
    for seed in range(60):
        torch.manual_seed(seed)
        made = training._inputs(batch)[0]
        plain = normalise(images.permute(0, 2, 3, 1), training.pre)
        other = (made != plain).all(1)  # [B,H,W], alike for the whole batch
        assert torch.equal(other[0], other[1])
        torch.testing.assert_close(torch.where(other[:, None], plain.roll(1, 0), plain), made)
        rows, columns = other[0].any(1), other[0].any(0)
        assert int(other[0].sum()) == int(rows.sum()) * int(columns.sum())  # a rectangle
        mixed += bool(other.any())
        shares.append(float(other[0].float().mean()))
    assert 15 < mixed < 45
    assert max(shares) > 0.5


def test_images_get_worse_as_often_as_asked(pictures: Path) -> None:
    """Each by one of ImageNet-C's corruptions; what is drawn follows from the seed."""
    image = open_image(sorted(pictures.iterdir())[0])
    plain = augmentation(64, Images(smallest_crop=1, flip=False))
    clean = plain(image)
    for share, least, most in ((0.0, 0, 0), (0.5, 10, 30), (1.0, 40, 40)):
        transform = augmentation(64, Images(smallest_crop=1, flip=False, corrupted=share))
        found = [seeded(transform, image, seed) for seed in range(40)]
        assert all(torch.equal(x, seeded(transform, image, seed)) for seed, x in enumerate(found[:3]))
        assert all(x.shape == clean.shape and x.dtype == torch.uint8 for x in found)
        assert least <= sum(not torch.equal(x, clean) for x in found) <= most
