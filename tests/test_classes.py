"""Accuracy beside the teacher: neighbours, linear probe, classifier."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sparsifiner_edge.camera.model import Model
from sparsifiner_edge.camera.service import run_images
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.evaluate.scores import score_statistics
from sparsifiner_edge.export.export import export_bundle
from sparsifiner_edge.outcomes import ScoresResult
from sparsifiner_edge.results import check_result
from sparsifiner_edge.sparse.student import load_student, save_student
from tests.commands import assert_refused, call, manifest_of
from tests.models import student, vit
from tests.once import Once
from tests.plain import evaluate_student

COLOURS = {"blue": (20, 40, 220), "green": (30, 200, 40), "red": (220, 30, 20)}


def colours(folder: Path, count: int, seed: int) -> Path:
    """Images of three classes that any model can tell apart."""
    rng = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.clip(rng.normal(colour, 30, (48, 48, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def made(once: Once) -> dict[str, Path]:
    def make(folder: Path) -> None:
        save_file(vit(num_classes=0).state_dict(), folder / "weights.safetensors")
        save_student(student(num_classes=0), folder / "student")
        export_bundle(folder / "student", folder / "bundle")
        colours(folder / "gallery", 15, 0)
        colours(folder / "queries", 4, 1)

    folder = once("classes", make)
    names = {name: folder / name for name in ("student", "bundle", "gallery", "queries")}
    return names | {"weights": folder / "weights.safetensors"}


@pytest.fixture(scope="module")
def probed(once: Once, made: dict[str, Path]) -> Path:
    """A classifier made of the student and a linear probe, and what the probe found."""

    def probe(folder: Path) -> None:
        given = {"metric": "linear", "gallery": made["gallery"], "head": folder / "head"}
        found = evaluate_student(made["student"], made["queries"], **given)
        (folder / "probe.json").write_text(json.dumps(found))

    return once("probed", probe)


def share(result: dict[str, Any], role: str = "subject") -> float:
    """Of its answers that are right."""
    return float(result["statistics"][f"{role}_accuracy"]["mean"]["value"])


@pytest.mark.parametrize("metric", ["knn", "linear"])
def test_what_is_easy_is_found_by_student_bundle_and_teacher(metric: str, made: dict[str, Path]) -> None:
    seen: list[tuple[int, int]] = []
    for subject, against in (("student", {}), ("bundle", {"against": "test_vit", "weights": made["weights"]})):
        result = evaluate_student(
            made[subject], made["queries"], metric=metric, gallery=made["gallery"], **against,
            progress=lambda _, done, total: seen.append((done, total)),
        )  # fmt: skip
        check_result(result, "test", ScoresResult)
        assert share(result) == share(result, "teacher") == 1
        assert result["statistics"]["lost_accuracy"]["mean"]["value"] == 0
        assert len(result["samples"]["subject_accuracy"]) == 12
        assert result["method"]["gallery"] == f"45 of {made['gallery']}"
    assert (45, 45) in seen
    assert seen[-1] == (12, 12)


def test_a_head_makes_a_classifier_that_exports_with_its_labels(
    made: dict[str, Path], probed: Path, tmp_path: Path
) -> None:
    head, probe = probed / "head", json.loads((probed / "probe.json").read_text())
    found = load_student(head)
    assert found.labels == tuple(COLOURS)
    assert found.model.num_classes == 3
    own = evaluate_student(head, made["queries"], metric="top1")
    assert own["samples"]["subject_accuracy"] == probe["samples"]["subject_accuracy"]
    assert own["method"]["classes"] == list(COLOURS)
    bundle = export_bundle(head, tmp_path / "bundle")
    assert (bundle / "labels.txt").read_text().split() == list(COLOURS)
    assert manifest_of(bundle)["outputs"][0]["shape"] == [1, 3]
    with Model(bundle) as model:
        (record,) = run_images(model, made["queries"] / "green" / "1.png")
    assert record.top is not None
    assert record.top[0].label == "green"


def test_labels_decide_which_class_a_folder_is(made: dict[str, Path], probed: Path, tmp_path: Path) -> None:
    """A classifier's own order, which is not the alphabet's."""
    wanted = share(evaluate_student(probed / "head", made["queries"], metric="top1"))
    found = load_student(probed / "head")
    turned = [2, 0, 1]
    with torch.no_grad():
        found.model.head.weight[:] = found.model.head.weight[turned].clone()
        found.model.head.bias[:] = found.model.head.bias[turned].clone()
    labels = tuple(found.labels[number] for number in turned)
    other = save_student(dataclasses.replace(found, labels=labels), tmp_path / "turned")
    bundle = export_bundle(other, tmp_path / "bundle")
    for subject, options in ((other, {}), (bundle, {"against": str(bundle)})):
        got = evaluate_student(subject, made["queries"], metric="top1", **options)
        assert share(got) == wanted > 0.6
        assert got["method"]["classes"] == list(labels)
    strange = save_student(dataclasses.replace(found, labels=("a", "b", "c")), tmp_path / "strange")
    assert evaluate_student(strange, made["queries"], metric="top1")["method"]["classes"] == list(COLOURS)
    mixed = save_student(dataclasses.replace(found, labels=(*labels[:2], "c")), tmp_path / "mixed")
    with pytest.raises(ConfigError, match="is not a class of the classifier"):
        evaluate_student(mixed, made["queries"], metric="top1")
    for name in COLOURS:
        shutil.copytree(made["queries"] / name, tmp_path / "four" / f"n{name}")
    shutil.copytree(tmp_path / "four" / "nred", tmp_path / "four" / "npink")
    with pytest.raises(ConfigError, match="knows 3 classes, the images have 4"):
        evaluate_student(other, tmp_path / "four", metric="top1")


def test_the_interval_is_paired() -> None:
    rng = np.random.default_rng(0)
    teacher = (rng.random(2000) < 0.7).astype(float)
    subject = np.where(np.arange(2000) < 10, 0, teacher)
    found = score_statistics({"lost_accuracy": (teacher - subject).tolist(), "none": [None]})
    mean = found["lost_accuracy"].mean
    assert mean.value == pytest.approx(teacher[:10].sum() / 2000)
    assert mean.high - mean.low < 0.01  # unpaired it would be .04
    assert "none" not in found


def test_bad_input_is_refused(made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, knn = ["evaluate", made["student"], "--data", made["queries"]], ["--metric", "knn"]
    gallery, other = ["--gallery", made["gallery"]], colours(tmp_path / "other", 1, 2)
    (other / "red").rename(other / "pink")
    few = shutil.copytree(other, tmp_path / "few")
    shutil.rmtree(few / "pink")
    for arguments, said in (
        (knn, "require labelled images"),
        (["--metric", "top1"], "has no logits"),
        (gallery, "require another metric"),
        ([*gallery, *knn, "--head", tmp_path / "h"], "by the metric linear"),
        ([*gallery, *knn, "--data", made["queries"] / "red"], "no folder of their class"),
        ([*knn, "--gallery", other], "unknown class 'pink'"),
        ([*knn, "--gallery", few], "no image of 'red'"),
        ([*gallery, "--metric", "top1"], "uses the classifier itself"),
        ([*gallery, *knn, "--weights", made["weights"]], "none is named"),
    ):
        assert_refused(call(capsys, *plain, *arguments), said)
    with pytest.raises(ConfigError, match="metric is"):
        evaluate_student(made["student"], made["queries"], metric="top5")
    config = json.loads((made["student"] / "config.json").read_text())
    config["labels"] = ["one"]
    spoiled = save_student(load_student(made["student"]), tmp_path / "spoiled")
    (spoiled / "config.json").write_text(json.dumps(config))
    assert_refused(call(capsys, "export", spoiled, "-o", tmp_path / "b"), "1 labels for 0 classes")
