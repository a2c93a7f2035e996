"""Augmentations of the published recipes: by timm, drawn from the seed alone, labels mixed as images are."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sparsifiner_edge.distill import checkpoint
from sparsifiner_edge.distill.augment import BatchAugmentation, augmentation, drawn_from, seeded
from sparsifiner_edge.distill.distill import distill_student
from sparsifiner_edge.distill.recipe import Images, read_recipe
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.sparse.student import save_student
from tests.models import student

PUBLISHED = "rand-m9-mstd0.5-inc1"
TINY_RUN = (
    "reconstruct.epochs=0", "reconstruct.steps=2", "distil.epochs=0", "distil.steps=4", "batch=4", "check_every=2",
    "save_every=1", "images.held_out=4", "images.workers=0", "ema=0.5",
)  # fmt: skip


def test_what_is_drawn_follows_from_the_seed_and_leaves_others_alone() -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), str(np.random.get_state(legacy=False)), torch.random.get_rng_state()
    drawn = []
    for seed in (3, 3, 4):
        with drawn_from(seed):
            drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
    after = random.getstate(), str(np.random.get_state(legacy=False)), torch.random.get_rng_state()
    assert drawn[0] == drawn[1]
    assert all(a != b for a, b in zip(drawn[1], drawn[2], strict=True))
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
def test_randaugment(size: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    image = image.resize((160, 120), Image.Resampling.BICUBIC)
    plain, auto = (augmentation(size, Images(auto_augment=policy)) for policy in ("", PUBLISHED))
    changed = 0
    for seed in range(16):
        first, again = seeded(auto, image, seed), seeded(auto, image, seed)
        assert first.dtype == torch.uint8
        assert tuple(first.shape) == (3, *size)
        assert torch.equal(first, again)
        changed += not torch.equal(first, seeded(plain, image, seed))
    assert changed >= 6  # Two operations, each for half of the images; some leave an image as it is.


@pytest.mark.parametrize("policy", ["rand-m10-n9-inc1", "rand-m0-n9", "augmix-m10-w3", "v0", "original"])
def test_every_magnitude(policy: str) -> None:
    """At its end timm asks Pillow for an image of no bits."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    auto = augmentation(32, Images(auto_augment=policy))
    for seed in range(40):
        assert seeded(auto, image, seed).shape == (3, 32, 32)


def test_erasing() -> None:
    images = torch.zeros(200, 3, 32, 32)
    with drawn_from(0):
        erased, labels = BatchAugmentation(Images(erasing=0.25), 0, 200, "cpu")(images.clone(), torch.full((200,), -1))
    touched = (erased != 0).flatten(1).any(1)
    assert 0.15 < float(touched.float().mean()) < 0.35
    assert erased[touched].std() > 0.1
    assert labels is None


@pytest.mark.parametrize(("mixup", "cut"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0), (0.0, 0.0)])
def test_labels_are_mixed_as_images_are(mixup: float, cut: float) -> None:
    """Each image is its class's number everywhere: what stands in a mixture is what its label says."""
    classes, labels = 5, torch.tensor([0, 1, 2, 3])
    images = labels.float()[:, None, None, None].expand(-1, 3, 20, 20)
    augment = BatchAugmentation(Images(mixup=mixup, mixup_cut=cut, smoothing=0.1), classes, 4, "cpu")
    for seed in range(10):
        with drawn_from(seed):
            mixed, shares = augment(images, labels)
        assert shares is not None
        assert shares.shape == (4, classes)
        assert shares.sum(1) == pytest.approx(torch.ones(4))
        true = (shares - 0.1 / classes) / 0.9
        assert mixed.mean((1, 2, 3)).numpy() == pytest.approx((true @ torch.arange(5.0)).numpy(), abs=1e-4)
    assert torch.equal(images[:, 0, 0, 0], labels.float()), "what was given is as it was"


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="mix the same images"):
        BatchAugmentation(Images(cut_mix=0.5, mixup=0.8), 0, 4, "cpu")
    for images in (Images(mixup_cut=0.8), Images(smoothing=0.1)):
        with pytest.raises(ConfigError, match="batch is 3"):
            BatchAugmentation(images, 2, 3, "cpu")
    for policy in ("nonsense", "rand-z3"):
        with pytest.raises(ConfigError, match="timm does not know"):
            augmentation(32, Images(auto_augment=policy))


def test_the_recipe_is_the_published_one() -> None:
    recipe = read_recipe("imagenet-deit-s")
    images = recipe.images
    assert (images.auto_augment, images.erasing, images.mixup, images.mixup_cut) == (PUBLISHED, 0.25, 0.8, 1.0)
    assert (images.smoothing, recipe.weight_decay, recipe.predictor_weight_decay) == (0.1, 0.05, 0.05)
    assert (recipe.clip, recipe.precision, recipe.best) == (0, "no", "top1")


def history(output: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in Path(f"{output}.training", checkpoint.HISTORY).read_text().splitlines()]


@pytest.mark.everything
def test_the_first_class_decides(folder: Path, tmp_path: Path) -> None:
    """Averaged weights and those themselves are judged, and what is kept is the best of both."""
    start = save_student(student(num_classes=2), tmp_path / "start")
    summary = distill_student(
        start, folder, tmp_path / "out", labels=True, recipe="imagenet-deit-s", overrides=TINY_RUN
    )
    assert summary.fidelity.metric.startswith("top-1")
    lines = history(tmp_path / "out")
    averaged = {x["step"]: x["top1"] for x in lines if "top1" in x}
    raw = {x["step"]: x["raw top1"] for x in lines if "raw top1" in x}
    assert list(averaged) == [0, 2, 4, 6]
    assert list(raw) == [2, 4, 6]
    every = [x[0] for found in (averaged, raw) for x in found.values()]
    assert summary.fidelity.best == max(every)
    assert summary.fidelity.start == averaged[0][0]


@pytest.mark.everything
def test_a_mixed_training_that_was_stopped_ends_where_it_would_have(folder: Path, tmp_path: Path) -> None:
    start = save_student(student(num_classes=2), tmp_path / "start")
    options: dict[str, Any] = {"labels": True, "recipe": "imagenet-deit-s", "overrides": TINY_RUN}

    def stop(_stage: str, done: float, _total: float) -> None:
        if done == 3:
            raise KeyboardInterrupt

    distill_student(start, folder, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        distill_student(start, folder, tmp_path / "broken", **options, progress=stop)
    distill_student(start, folder, tmp_path / "broken", **options, resume=True)
    whole, broken = ([x["loss"] for x in history(tmp_path / name) if "loss" in x] for name in ("whole", "broken"))
    assert broken == pytest.approx(whole, abs=1e-5)


@pytest.mark.everything
def test_held_out_images_need_classes_to_decide_by(folder: Path, pictures: Path, tmp_path: Path) -> None:
    start = save_student(student(num_classes=2), tmp_path / "start")
    options: dict[str, Any] = {"labels": True, "recipe": "imagenet-deit-s", "held_out": pictures}
    with pytest.raises(ConfigError, match="outside of the folders of classes"):
        distill_student(start, folder, tmp_path / "out", **options, overrides=TINY_RUN)
    summary = distill_student(start, folder, tmp_path / "out", **options, overrides=(*TINY_RUN, "best=cosine"))
    assert summary.fidelity.metric.startswith("cosine")
