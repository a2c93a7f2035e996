"""Tests that top-1 equals timm's own validation image by image, however images are read."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_dataset, create_loader, create_transform, resolve_data_config
from timm.models import _registry, get_pretrained_cfg

from sparsifiner_edge.demo import split
from sparsifiner_edge.errors import ImageError
from sparsifiner_edge.evaluate.reading import feed_of, read_images
from sparsifiner_edge.fitting import Framing
from sparsifiner_edge.images import list_images, load_image, open_image
from sparsifiner_edge.outcomes import ScoresResult
from sparsifiner_edge.results import check_result
from sparsifiner_edge.sparse.student import save_student
from tests import flat
from tests.commands import assert_refused, call
from tests.flat import load_student
from tests.models import TINY, sparse, vit
from tests.once import Once
from tests.plain import evaluate_student

CLASSES = "abcdef"
UNCLOSED = pytest.mark.filterwarnings("ignore::ResourceWarning")
"""timm leaves image files to the garbage collector to close."""
SHAPES = ((500, 375), (333, 501), (97, 61), (640, 151), (163, 160))
"""Width and height: landscape and portrait, larger and smaller than the model's input."""


def photographs(folder: Path) -> Path:
    """Crops of six photographs, a class each: 31 images, one grey and one with a palette."""
    rng = np.random.default_rng(0)
    for name, path in zip(CLASSES, split.images("development"), strict=False):
        (folder / name).mkdir(parents=True)
        whole = open_image(path)
        for number, (width, height) in enumerate(SHAPES):
            across = min(whole.width, round(whole.height * width / height), int(rng.integers(250, 600)))
            down = min(whole.height, max(1, round(across * height / width)))
            left, top = int(rng.integers(whole.width - across + 1)), int(rng.integers(whole.height - down + 1))
            part = whole.crop((left, top, left + across, top + down)).resize((width, height))
            part.save(folder / name / f"{number}.jpg", quality=90)
    Image.open(folder / "a" / "0.jpg").convert("L").save(folder / "a" / "0.jpg")
    Image.open(folder / "b" / "1.jpg").quantize(64).save(folder / "b" / "1.png")
    return folder


@torch.no_grad()
def classifier(folder: Path) -> Any:
    """A dense model whose class weights are the features of one image each, so some other images are right."""
    model = vit(num_classes=len(CLASSES))
    config = resolve_data_config(model=model)
    config.pop("crop_mode")
    transform = create_transform(**config)
    images = torch.stack([transform(open_image(folder / name / "0.jpg")) for name in CLASSES])
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    centred = features - features.mean(0)
    model.head.weight[:] = centred / centred.norm(dim=1, keepdim=True)
    model.head.bias[:] = -(model.head.weight @ features.mean(0))
    return model


@pytest.fixture(scope="module")
def made(once: Once) -> dict[str, Path]:
    def make(folder: Path) -> None:
        model = classifier(photographs(folder / "data"))
        save_file(model.state_dict(), folder / "weights.safetensors")
        save_student(sparse(TINY, model), folder / "student")
        flat.export_bundle(folder / "student", folder / "bundle", batch=4)
        flat.export_bundle(folder / "student", folder / "dynamic", batch="dynamic")

    folder = once("top1", make)
    names = {name: folder / name for name in ("data", "student", "bundle", "dynamic")}
    return names | {"weights": folder / "weights.safetensors"}


@torch.no_grad()
def validated(model: Any, folder: Path) -> list[int]:
    """Return whether timm's validation finds the model right, in the order of file paths."""
    config = resolve_data_config({"input_size": (3, *model.patch_embed.img_size)}, model=model)
    dataset = create_dataset("", root=str(folder))
    loader = create_loader(dataset, batch_size=7, is_training=False, use_prefetcher=False, num_workers=0, **config)
    right = torch.cat([model(images).argmax(1) == labels for images, labels in loader])
    found = dict(zip(dataset.filenames(absolute=True), right.int().tolist(), strict=True))
    return [found[str(path)] for path in list_images(folder)]


def dense(made: dict[str, Path]) -> Any:
    model = vit(num_classes=len(CLASSES))
    model.load_state_dict(load_file(made["weights"]))
    return model


OTHER = {"crop_mode": "border", "crop_pct": 1.0, "mean": (0.485, 0.456, 0.406)}
"""Entries of timm's model configuration, as other timm models have them."""


@UNCLOSED
@pytest.mark.parametrize(
    ("subject", "workers"),
    [("student", 0), ("student", 2), ("bundle", None), ("dynamic", 0), ("another configuration", 0)],
)
def test_it_is_timms_validation_to_the_last_image(
    subject: str, workers: int | None, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Bundles of any batch size agree too, with any number of workers."""
    if another := subject not in made:  # A sparse model keeps its original configuration.
        changed = dataclasses.replace(get_pretrained_cfg(TINY), **OTHER)
        monkeypatch.setitem(_registry._model_pretrained_cfgs, TINY, changed)
    student = save_student(sparse(TINY, dense(made)), tmp_path / "student") if another else made["student"]
    teacher: dict[str, Any] = {"against": TINY, "weights": made["weights"]} if subject in ("bundle", "dynamic") else {}
    seen: list[tuple[float, float]] = []
    result = evaluate_student(
        made.get(subject, student),
        made["data"],
        metric="top1",
        workers=workers,
        **teacher,
        progress=lambda _, done, total: seen.append((done, total)),
    )
    assert seen == [(done, 31) for done in range(1, 32)]
    check_result(result, "test", ScoresResult)
    assert result["samples"]["subject_accuracy"] == validated(load_student(student).model, made["data"])
    assert result["samples"]["teacher_accuracy"] == validated(dense(made), made["data"])
    assert 0.3 < result["statistics"]["teacher_accuracy"]["mean"]["value"] < 1
    assert "preprocessing of timm for test_vit: interpolation bi" in result["method"]["preprocessing"]
    assert f"crop_pct {1 if another else 0.95:g}" in result["method"]["preprocessing"]


def test_without_a_configuration_the_centre_is_taken(made: dict[str, Path]) -> None:
    path = made["data"] / "a" / "1.jpg"
    for model in (None, "Dinov2Model", "mymodels:factory"):
        centre = feed_of(model, Framing((32, 64)))
        assert centre.text == "centre rectangle, bicubic to 32x64 px"
        np.testing.assert_array_equal(centre.load(path), load_image(path, (32, 64)))


def test_a_damaged_image_is_named(made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = shutil.copytree(made["data"], tmp_path / "data")
    bad = data / "d" / "2.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    outcome = call(capsys, "evaluate", made["student"], "--data", data, "--metric", "top1", "--workers", 2)
    assert_refused(outcome, f"{bad} cannot be read as an image", "Replace or remove it")
    Image.new("RGB", (1, 60_000)).save(tmp_path / "thin.png")
    with pytest.raises(ImageError, match="60000x1 pixels, which is too narrow"):
        list(read_images([tmp_path / "thin.png"], feed_of(TINY, Framing(224))._replace(workers=0), 1))
