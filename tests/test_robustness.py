"""`evaluate --corruptions`: dense beside sparse, image by image, under corruptions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sparsifiner_edge as se
from sparsifiner_edge.corruptions import Condition, corrupt, moved
from sparsifiner_edge.evaluate.robustness import RobustnessResult, robustness_statistics
from sparsifiner_edge.images import load_image, load_mask
from sparsifiner_edge.metrics import cosine, intersection_over_union
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


def outputs(model: Any, found: se.Student, pixels: Any) -> Any:
    with torch.no_grad():
        return model(normalise(torch.from_numpy(pixels)[None], found.normalisation))


def test_features_on_the_command_line(plain: Path, pictures: Path, tmp_path: Path) -> None:
    file = tmp_path / "robustness.json"
    done = process(
        "evaluate", plain, "--data", pictures, "--corruptions", "fog,rotation", "--severity", "2,4", "-o", file
    )
    assert done.code == 0, done
    assert "severity 2, 4" in done.out
    assert "extra loss" in done.out
    result = read_result(file, RobustnessResult)
    assert result.kind == "robustness"
    samples = result.samples["features"]
    assert set(samples) == {"clean", "fog 2", "fog 4", "rotation 2", "rotation 4"}
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
        assert samples["fog 4"][role][1] == pytest.approx(float(cosine(features(model, seen), wanted)[0]), abs=1e-4)
    assert samples["clean"]["teacher"] == pytest.approx([1.0] * 3)
    patches = result.samples["patches"]
    assert all(value == 1 for found in patches.values() for value in found["teacher"])
    assert all(0 < value < 0.9999 for found in patches.values() for value in found["subject"] if value is not None)


def test_a_model_beside_itself_loses_nothing_more(plain: Path, pictures: Path, tmp_path: Path) -> None:
    bundle = se.export_bundle(plain, tmp_path / "bundle", tokens=True)
    result = se.evaluate_student(bundle, pictures, against=bundle, corruptions="contrast", severity="5")
    assert isinstance(result, RobustnessResult)
    for found in result.statistics.stability.values():
        assert found["all"].extra_lost.value == 0
    lost = result.statistics.stability["features"]["contrast 5"]
    assert lost.teacher_lost.value == lost.subject_lost.value > 0.001


def test_maps_against_true_masks_and_their_own(mapped: Path, pictures: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    for path in sorted(pictures.iterdir()):
        pixels = np.zeros((60, 80), np.uint8)
        pixels[10:50, 20:45] = 255
        Image.fromarray(pixels).save(masks / f"{path.stem}.png")
    options: dict[str, Any] = {"metric": "task", "map_name": "mask", "trust": [FACTORY]}
    result = se.evaluate_student(mapped, pictures, masks=masks, corruptions="rotation,snow", severity="3", **options)
    assert isinstance(result, RobustnessResult)
    assert result.method.truth == "true masks"
    found = se.load_student(mapped, trust=[FACTORY])
    path = sorted(pictures.iterdir())[2]
    seen = corrupt(load_image(path, 160), "rotation", 3, seed=2)
    true = moved(load_mask(masks / f"{path.stem}.png", 160), "rotation", 3, seed=2)
    own = outputs(found.model, found, seen)["mask"][0].numpy() > 0.5
    assert result.samples["iou"]["rotation 3"]["subject"][2] == pytest.approx(
        intersection_over_union(own, true), abs=1e-6
    )
    again = se.evaluate_student(mapped, pictures, corruptions="snow", severity="1", **options)
    assert isinstance(again, RobustnessResult)
    assert again.samples["iou"]["clean"]["teacher"] == [1.0] * 3


def test_a_metric_of_ones_own_and_images_it_says_nothing_of(mapped: Path, pictures: Path) -> None:
    result = se.evaluate_student(
        mapped,
        pictures,
        metric="task",
        task=f"{METRICS}:Brightness",
        trust=[FACTORY],
        corruptions="rain",
        severity="1,2",
    )
    assert isinstance(result, RobustnessResult)
    assert result.samples["score"]["rain 2"]["subject"][1] is None
    assert result.statistics.stability["score"]["all"].images == 2


def test_classes_learnt_from_clean_images(plain: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("gallery", 15), ("queries", 3)):
        for name, colour in (("blue", (20, 40, 220)), ("red", (220, 30, 20))):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(rng.normal(colour, 30, (48, 48, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{number}.png")
    result = se.evaluate_student(
        plain, tmp_path / "queries", metric="knn", gallery=tmp_path / "gallery", corruptions="contrast", severity="5"
    )
    assert isinstance(result, RobustnessResult)
    assert result.statistics.clean["accuracy"] == {"subject": 1.0, "teacher": 1.0}
    assert set(result.samples["accuracy"]["contrast 5"]["subject"]) <= {0.0, 1.0}
    assert result.statistics.stability["accuracy"]["all"].images == 6


def test_losses_are_told_apart_from_what_clean_images_cost() -> None:
    conditions = [Condition("fog", 1), Condition("fog", 3), Condition("snow", 3)]
    samples = {
        "iou": {
            "clean": {"subject": [0.8, 0.6, None], "teacher": [0.9, 0.8, 0.5]},
            "fog 1": {"subject": [0.7, 0.5, 0.1], "teacher": [0.9, 0.7, 0.1]},
            "fog 3": {"subject": [0.4, 0.2, 0.1], "teacher": [0.8, 0.6, 0.1]},
            "snow 3": {"subject": [0.6, 0.4, 0.1], "teacher": [0.7, 0.5, 0.1]},
        }
    }
    found = robustness_statistics(samples, conditions)
    rows = found.stability["iou"]
    assert found.clean["iou"] == pytest.approx({"subject": 0.7, "teacher": 0.85})
    assert rows["fog 1"].extra_lost.value == pytest.approx(0.1 - 0.05)
    assert rows["fog"].subject == pytest.approx(0.45)
    assert rows["severity 3"].subject_lost.value == pytest.approx(0.7 - 0.4)
    assert rows["severity 3"].teacher_lost.value == pytest.approx(0.85 - 0.65)
    assert rows["all"].extra_lost.value == pytest.approx(np.mean([0.1, 0.4, 0.2]) - np.mean([0.05, 0.15, 0.25]))
    assert rows["all"].images == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--corruptions", "mist"], "'mist' is unknown"),
        (["--corruptions", "fog", "--severity", "9"], "severity is '9'"),
        (["--severity", "3"], "A severity is that of corruptions"),
        (["--corruptions", "fog", "--metric", "knn"], "require labelled images"),
        (["--corruptions", "fog", "--metric", "linear", "--head", "h"], "on clean images"),
    ],
)
def test_what_is_refused(
    plain: Path, pictures: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    data = pictures.parent if "--metric" in arguments else pictures
    assert_refused(call(capsys, "evaluate", plain, "--data", data, *arguments), said)


def test_a_result_is_json(plain: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, "evaluate", plain, "--data", pictures, "--corruptions", "pixelate", "--severity", "1", "--json")
    assert done.code == 0, done
    result = json.loads(done.out)
    assert result["statistics"]["stability"]["features"]["all"]["images"] == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--map", "heat"], "masks are cut from maps from 0 to 1"),
        (["--map", "mask", "--threshold", "nan"], "threshold is nan"),
        (["--task", f"{METRICS}:Brightness", "--map", "mask"], "are for the task maps"),
        (["--map", "mask", "--gallery", "nowhere"], "require"),
    ],
)
def test_what_a_task_is_refused_for(
    mapped: Path, pictures: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    asked = ["evaluate", mapped, "--trust", FACTORY, "--data", pictures, "--metric", "task", "--corruptions", "fog"]
    assert_refused(call(capsys, *asked, *arguments), said)
