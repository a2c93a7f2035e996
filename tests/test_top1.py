"""Top-1 at scale: equal to timm's own validation image by image, however images are read and shared out."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
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
from sparsifiner_edge.errors import ConfigError, ImageError
from sparsifiner_edge.evaluate.classes import ClassResult
from sparsifiner_edge.evaluate.preparation import Preparation, preparation_of
from sparsifiner_edge.evaluate.top1 import read_batches
from sparsifiner_edge.export.export import export_bundle
from sparsifiner_edge.images import list_images, load_image, open_image
from sparsifiner_edge.results import check_result
from sparsifiner_edge.sparse.hosts.timm import load_model
from sparsifiner_edge.sparse.student import load_student, save_student
from tests.commands import assert_refused, call
from tests.models import TINY, sparse, vit
from tests.once import Once
from tests.plain import evaluate_student

CLASSES = "abcdef"
UNCLOSED = pytest.mark.filterwarnings("ignore::ResourceWarning")
"""timm leaves image files to be closed by whoever collects them."""
SHAPES = ((500, 375), (333, 501), (97, 61), (640, 151), (163, 160))
"""Width and height: landscape and portrait, larger and smaller than the model's input."""


def photographs(folder: Path) -> Path:
    """Parts of six photographs, a class each; 31 images, one of them grey and one with a palette."""
    rng = np.random.default_rng(0)
    for name, path in zip(CLASSES, split.development(), strict=False):
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
    """A dense model whose class weights are the features of one image each: it is right about some of the others."""
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
        export_bundle(folder / "student", folder / "bundle", batch=4)
        export_bundle(folder / "student", folder / "dynamic", batch="dynamic")

    folder = once("top1", make)
    names = {name: folder / name for name in ("data", "student", "bundle", "dynamic")}
    return names | {"weights": folder / "weights.safetensors"}


@torch.no_grad()
def validated(model: Any, folder: Path, crop_pct: float | None = None) -> list[int]:
    """Whether timm's validation finds a model right, in the order of the files' paths."""
    asked = {"crop_pct": crop_pct, "input_size": (3, *model.patch_embed.img_size)}
    config = resolve_data_config(asked, model=model)
    dataset = create_dataset("", root=str(folder))
    loader = create_loader(dataset, batch_size=7, is_training=False, use_prefetcher=False, num_workers=0, **config)
    right = torch.cat([model(images).argmax(1) == labels for images, labels in loader])
    found = dict(zip(dataset.filenames(absolute=True), right.int().tolist(), strict=True))
    return [found[str(path)] for path in list_images(folder)]


def dense(made: dict[str, Path]) -> Any:
    model = vit(num_classes=len(CLASSES))
    model.load_state_dict(load_file(made["weights"]))
    return model


OTHER = {
    "own": {},
    "squash": {"crop_mode": "squash", "crop_pct": 0.875, "interpolation": "bilinear"},
    "border": {"crop_mode": "border", "crop_pct": 1.0, "mean": (0.485, 0.456, 0.406)},
}
"""timm's configuration of the model, as other models of timm have it."""


def configured(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    changed = dataclasses.replace(get_pretrained_cfg(TINY), **OTHER[name])
    monkeypatch.setitem(_registry._model_pretrained_cfgs, TINY, changed)


@UNCLOSED
@pytest.mark.parametrize(
    ("configuration", "crop_pct"), [("own", None), ("own", 1.0), ("own", 0.6), ("squash", None), ("border", None)]
)
def test_it_is_timms_validation_to_the_last_image(
    configuration: str, crop_pct: float | None, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    configured(monkeypatch, configuration)
    student = made["student"]
    if "mean" in OTHER[configuration]:  # A student keeps what it was made with.
        student = tmp_path / "student"
        save_student(sparse(TINY, dense(made)), student)
    result = evaluate_student(student, made["data"], metric="top1", crop_pct=crop_pct, batch=4, workers=0)
    check_result(result, "test", ClassResult)
    assert result["samples"]["subject_right"] == validated(load_student(student).model, made["data"], crop_pct)
    assert result["samples"]["teacher_right"] == validated(dense(made), made["data"], crop_pct)
    assert 30 < result["statistics"]["teacher_percent"] < 100
    share = crop_pct or OTHER[configuration].get("crop_pct", 0.95)
    assert "as timm validates test_vit: bi" in result["method"]["preprocessing"]
    assert f"crop_pct {share:g}" in result["method"]["preprocessing"]


@UNCLOSED
@pytest.mark.parametrize("bundle", ["bundle", "dynamic"])
def test_bundles_of_any_batch_answer_as_timm_validates(bundle: str, made: dict[str, Path]) -> None:
    given = {"against": TINY, "weights": made["weights"], "metric": "top1", "batch": 3}
    result = evaluate_student(made[bundle], made["data"], **given)
    assert result["samples"]["subject_right"] == validated(load_student(made["student"]).model, made["data"])
    assert result["samples"]["teacher_right"] == validated(dense(made), made["data"])
    method = result["method"]
    assert method["batch"] == {"subject": 4 if bundle == "bundle" else 3, "teacher": 3}
    assert method["preprocessing"] == method["teacher_preprocessing"]
    assert evaluate_student(made[bundle], made["data"], against=made[bundle], queries=2)["method"]["images"]


@UNCLOSED
def test_a_teacher_of_another_size_is_prepared_for_on_its_own(made: dict[str, Path], tmp_path: Path) -> None:
    small = export_bundle(TINY, tmp_path / "small", weights=made["weights"], img_size=96)
    result = evaluate_student(made["student"], made["data"], metric="top1", against=small, batch=8, workers=0)
    model = load_model(TINY, made["weights"], 96)
    assert result["samples"]["teacher_right"] == validated(model, made["data"])
    assert result["samples"]["subject_right"] == validated(load_student(made["student"]).model, made["data"])
    method = result["method"]
    assert method["preprocessing"].replace("160 px", "96 px") == method["teacher_preprocessing"]


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "crop_pct"), [(64, 0.875), (64, 1.0), ((48, 80), 0.9)])
def test_pixels_are_timms(
    crop_mode: str, interpolation: str, size: Any, crop_pct: float, made: dict[str, Path]
) -> None:
    given = {"crop_pct": crop_pct, "crop_mode": crop_mode, "interpolation": interpolation, "mean": (0.4, 0.5, 0.6)}
    transform = create_transform(size, std=(1, 1, 1), **given)
    for path in list_images(made["data"])[:7]:
        got = torch.from_numpy(Preparation(size, **given).load(path)).permute(2, 0, 1) / 255
        torch.testing.assert_close(got - torch.tensor(given["mean"])[:, None, None], transform(open_image(path)))


@pytest.mark.parametrize("mode", ["center", "border"])
def test_what_is_too_thin_to_be_resized_is_refused(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "thin.png"
    Image.new("RGB", (1, 60_000)).save(path)
    with pytest.raises(ImageError, match="60000x1 pixels: too long and thin"):
        Preparation(224, 0.9, mode).load(path)
    assert Preparation(224, 0.9, "squash").load(path).shape == (224, 224, 3)


def test_without_a_configuration_the_centre_is_taken(made: dict[str, Path]) -> None:
    path = made["data"] / "a" / "1.jpg"
    for model in (None, "Dinov2Model", "mymodels:factory"):
        own = preparation_of(model, (32, 64))
        assert own.text == "centre rectangle, bicubic to 32x64 px"
        np.testing.assert_array_equal(own.load(path), load_image(path, (32, 64)))
    asked = preparation_of(None, 32, 0.5)
    assert asked.text == "as timm validates models: bicubic, crop_pct 0.5, crop_mode center, to 32 px"


def test_batches_and_workers_change_nothing(made: dict[str, Path]) -> None:
    seen: list[tuple[float, float]] = []
    results = [
        evaluate_student(
            made["student"], made["data"], metric="top1", batch=batch, workers=workers,
            progress=lambda _, done, total: seen.append((done, total)),
        )
        for batch, workers in ((1, 0), (7, 2), (20, 2), (None, None))
    ]  # fmt: skip
    assert all(result["samples"] == results[0]["samples"] for result in results)
    assert [x["method"]["workers"] for x in results[:2]] == [0, 2]
    assert results[0]["statistics"]["images_per_second"] > 0
    assert [done for done, _ in seen[31:38]] == [7, 14, 21, 28, 31, 20, 31]
    assert {total for _, total in seen} == {31}


@pytest.mark.everything
def test_two_processes_answer_what_one_does(made: dict[str, Path], tmp_path: Path) -> None:
    given = ["evaluate", made["student"], "--data", made["data"], "--metric", "top1", "--batch", "5", "--json"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    done = subprocess.run(
        [*launch, "sparsifiner_edge", *map(str, given), "-o", str(tmp_path / "result.json")],
        capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["samples"] == evaluate_student(made["student"], made["data"], metric="top1")["samples"]
    assert found["method"]["processes"] == 2
    assert json.loads((tmp_path / "result.json").read_text()) == found


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named(
    workers: int, made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(made["data"], tmp_path / "data")
    bad = data / "d" / "2.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    outcome = call(
        capsys, "evaluate", made["student"], "--data", data, "--metric", "top1", "--workers", workers, "--batch", 4
    )
    assert_refused(outcome, f"{bad} cannot be read as an image", "Replace or remove it")
    Image.new("RGB", (1, 60_000)).save(tmp_path / "thin.png")
    with pytest.raises(ImageError, match="60000x1 pixels"):
        list(read_batches([tmp_path / "thin.png"], [0], [Preparation(224, 0.9)], 1, 0))


def test_what_was_not_asked_for_is_refused(made: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    plain = ["evaluate", made["student"], "--data", made["data"]]
    for value in ("0", "1.5", "nan", "-1", "inf"):
        outcome = call(capsys, *plain, "--metric", "top1", "--crop-pct", value)
        assert_refused(outcome, f"crop_pct is {float(value):g}", "above 0 and at most 1")
    assert_refused(call(capsys, *plain, "--metric", "top1", "--crop-pct", "1e-3"), "crop_pct is 0.001", "8192")
    for option, value in (("--crop-pct", "0.9"), ("--batch", "2"), ("--workers", "0")):
        said = f"{option} {value} is for --metric top1 on clean images; this is"
        assert_refused(call(capsys, *plain, option, value), f"{said} cosine", f"Leave {option} out")
        assert_refused(call(capsys, *plain, "--metric", "top1", "--corruptions", "fog", option, value), said)
    assert_refused(call(capsys, *plain, "--metric", "top1", "--workers", "-1"), "--workers")
    for name, wrong in (("batch", 0), ("workers", 257), ("crop_pct", math.nan)):
        with pytest.raises(ConfigError, match=f"{name} is {wrong}"):
            evaluate_student(made["student"], made["data"], metric="top1", **{name: wrong})


def test_the_command_line_says_how_images_were_prepared(
    made: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = call(capsys, "evaluate", made["student"], "--data", made["data"], "--metric", "top1", "--queries", 9)
    assert outcome.code == 0, outcome.err
    for text in (
        "top 1: 9 of",
        "images: as timm validates test_vit",
        "images a second through both",
        "workers 0, processes 1",
    ):
        assert text in outcome.out
