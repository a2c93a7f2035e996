"""`evaluate --corruptions`: dense beside sparse, image by image, under corruptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sparsifiner_edge as se
from sparsifiner_edge.corruptions import corrupt, moved
from sparsifiner_edge.evaluate.scores import stability
from sparsifiner_edge.images import load_image, load_mask
from sparsifiner_edge.metrics import cosine, intersection_over_union
from sparsifiner_edge.outcomes import RobustnessResult
from sparsifiner_edge.results import read_result
from sparsifiner_edge.sparse.student import save_student
from sparsifiner_edge.sparse.weights import normalise
from tests.commands import assert_refused, call, process
from tests.models import student as tiny_student

FACTORY, METRICS = "tests.hosts.factories", "tests.hosts.metrics"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_student(tiny_student(), tmp_path_factory.mktemp("robust") / "student")


@pytest.fixture(scope="module")
def mapped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("robust") / "mapped"
    return se.sparsify(f"{FACTORY}:masked", folder, keep=0.5, channels=8, merge=(2,))


def judged(student: Path, pictures: Path, corruptions: str, **options: Any) -> RobustnessResult:
    result = se.evaluate_student(student, pictures, corruptions=corruptions, **options)
    assert isinstance(result, RobustnessResult)
    return result


def test_features_on_the_command_line(plain: Path, pictures: Path, tmp_path: Path) -> None:
    file = tmp_path / "robustness.json"
    done = process("evaluate", plain, "--data", pictures, "--corruptions", "fog,snow", "--severity", "4", "-o", file)
    assert done.code == 0, done
    assert "severity 4" in done.out
    assert "extra loss" in done.out
    result = read_result(file, RobustnessResult)
    assert result.kind == "robustness"
    samples = result.samples["features"]
    assert set(samples) == {"clean", "fog", "snow"}
    # As computed here.
    path = sorted(pictures.iterdir())[1]
    found = se.load_student(plain)
    dense = se.restore_model(se.load_student(plain).model)
    image = load_image(path, found.img_size)
    seen = corrupt(image, "fog", 4, seed=1)

    def features(model: Any, pixels: Any) -> Any:
        x = normalise(torch.from_numpy(pixels)[None], found.normalisation)
        with torch.no_grad():
            return model.forward_head(model.forward_features(x), pre_logits=True).numpy()

    wanted = features(dense, image)
    for role, model in (("subject", found.model), ("teacher", dense)):
        assert samples["fog"][role][1] == pytest.approx(float(cosine(features(model, seen), wanted)[0]), abs=1e-4)
    assert samples["clean"]["teacher"] == pytest.approx([1.0] * 3)
    patches = result.samples["patches"]
    assert all(value == 1 for found in patches.values() for value in found["teacher"])
    assert all(0 < value < 1 for found in patches.values() for value in found["subject"] if value is not None)


def test_a_model_beside_itself_loses_nothing_more(plain: Path, pictures: Path, tmp_path: Path) -> None:
    bundle = se.export_bundle(plain, tmp_path / "bundle", tokens=True)
    result = judged(bundle, pictures, "contrast", against=bundle, severity=5)
    for found in result.statistics.values():
        assert found["all"].extra_lost.value == 0
    lost = result.statistics["features"]["contrast"]
    assert lost.teacher_lost.value == lost.subject_lost.value > 0.001


def test_maps_against_true_masks_and_their_own(mapped: Path, pictures: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    for path in sorted(pictures.iterdir()):
        pixels = np.zeros((60, 80), np.uint8)
        pixels[10:50, 20:45] = 255
        Image.fromarray(pixels).save(masks / f"{path.stem}.png")
    options: dict[str, Any] = {"metric": "task", "map_name": "mask", "trust": [FACTORY]}
    result = judged(mapped, pictures, "elastic_transform,snow", masks=masks, **options)
    assert result.method.truth == "true masks"
    found = se.load_student(mapped, trust=[FACTORY])
    path = sorted(pictures.iterdir())[2]
    seen = corrupt(load_image(path, 160), "elastic_transform", 3, seed=2)
    true = moved(load_mask(masks / f"{path.stem}.png", 160), "elastic_transform", 3, seed=2)
    with torch.no_grad():
        own = found.model(normalise(torch.from_numpy(seen)[None], found.normalisation))["mask"][0].numpy() > 0.5
    assert result.samples["iou"]["elastic_transform"]["subject"][2] == pytest.approx(
        intersection_over_union(own, true), abs=1e-6
    )
    again = judged(mapped, pictures, "snow", severity=1, **options)
    assert again.samples["iou"]["clean"]["teacher"] == [1.0] * 3


def test_a_metric_of_ones_own_and_images_it_says_nothing_of(mapped: Path, pictures: Path) -> None:
    options: dict[str, Any] = {"metric": "task", "task": f"{METRICS}:Brightness", "trust": [FACTORY]}
    result = judged(mapped, pictures, "fog,contrast", **options)
    assert result.samples["score"]["contrast"]["subject"][1] is None
    assert result.statistics["score"]["all"].images == 2


def test_losses_are_told_apart_from_what_clean_images_cost() -> None:
    samples: Any = {
        "iou": {
            "clean": {"subject": [0.8, 0.6, None], "teacher": [0.9, 0.8, 0.5]},
            "fog": {"subject": [0.7, 0.5, 0.1], "teacher": [0.9, 0.7, 0.1]},
            "snow": {"subject": [0.4, 0.2, 0.1], "teacher": [0.8, 0.6, 0.1]},
        }
    }
    rows = stability(samples)["iou"]
    assert (rows["clean"].subject, rows["clean"].teacher) == pytest.approx((0.7, 0.85))
    assert rows["clean"].extra_lost.value == 0
    assert rows["fog"].extra_lost.value == pytest.approx(0.1 - 0.05)
    assert rows["fog"].subject == pytest.approx(0.6)
    assert rows["snow"].teacher_lost.value == pytest.approx(0.85 - 0.7)
    assert rows["all"].extra_lost.value == pytest.approx(np.mean([0.1, 0.4]) - np.mean([0.05, 0.15]))
    assert rows["all"].images == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--corruptions", "mist"], "'mist' is unknown"),
        (["--corruptions", "fog", "--severity", "9"], "--severity"),
        (["--severity", "3"], "A severity is that of corruptions"),
        (["--corruptions", "fog", "--metric", "linear", "--head", "h"], "on clean images"),
        (["--metric", "task", "--corruptions", "fog", "--map", "heat"], "masks are cut from maps from 0 to 1"),
    ],
)
def test_what_is_refused(
    plain: Path, mapped: Path, pictures: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    student = [mapped, "--trust", FACTORY] if "--map" in arguments else [plain]
    assert_refused(call(capsys, "evaluate", *student, "--data", pictures, *arguments), said)
