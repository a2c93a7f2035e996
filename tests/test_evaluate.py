"""Tests of evaluation against the dense teacher, and of explanations.

Evaluation: cosines, and accuracy by nearest neighbours, linear probe and classifier. Explanations: the keys that layers
read, merged tokens, faithfulness, the command and its page.
"""

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
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file

import sparsifiner_edge as se
from sparsifiner_edge.camera.service import RunOptions, run
from sparsifiner_edge.demo import material, split
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.evaluate.explain import look
from sparsifiner_edge.evaluate.faithfulness import faithfulness, groups_of, importance_of, saco
from sparsifiner_edge.export.check import smooth_images
from sparsifiner_edge.fitting import BARS
from sparsifiner_edge.outcomes import ExplainResult, ScoresResult
from sparsifiner_edge.plan import plan_of
from sparsifiner_edge.records import read_record
from sparsifiner_edge.results import check_result
from sparsifiner_edge.sparse.student import save_student, sparsify
from tests import flat
from tests.commands import assert_refused, call, manifest_of, process
from tests.flat import load_student
from tests.models import KINDS, TINY, student, vit
from tests.once import Once
from tests.plain import evaluate_student

COLOURS = {"blue": (20, 40, 220), "green": (30, 200, 40), "red": (220, 30, 20)}


def means(result: dict[str, Any]) -> dict[str, float]:
    check_result(result, "test", ScoresResult)
    return {name: found["mean"]["value"] for name, found in result["statistics"].items()}


def test_student_and_bundle_agree_however_the_teacher_is_given(exported: Path, folder: Path) -> None:
    named: dict[str, Any] = {"against": TINY, "weights": exported / "weights.safetensors"}
    results = [
        evaluate_student(exported / "student", folder),
        evaluate_student(exported / "student", folder, **named),
        evaluate_student(exported / "bundle", folder, **named),
        evaluate_student(exported / "bundle", folder, against=exported / "dense"),
    ]
    for result in results:
        assert result["statistics"]["patches_cosine"]["images"] == 12
        assert means(result) == pytest.approx(means(results[0]), abs=1e-3)
    assert 0.5 < means(results[0])["patches_cosine"] < 0.99999
    assert results[3]["method"]["runtime"]["subject"]["kernels"].startswith("native, ")
    assert results[3]["method"]["runtime"]["teacher"]["kernels"] == "none (standard operators)"
    itself = evaluate_student(exported / "dense", folder, **named)
    assert means(itself) == pytest.approx({"features_cosine": 1, "patches_cosine": 1}, abs=1e-6)


def test_rectangles(exported: Path, folder: Path, tmp_path: Path) -> None:
    size, weights = (96, 160), tmp_path / "w.safetensors"
    one = student(img_size=size)
    save_student(one, tmp_path / "student")
    save_file(vit(img_size=size).state_dict(), weights)
    bundle = flat.export_bundle(tmp_path / "student", tmp_path / "bundle", tokens=True)
    own = evaluate_student(tmp_path / "student", folder)
    other = evaluate_student(bundle, folder, against="test_vit", weights=weights)
    assert own["method"]["preprocessing"] == other["method"]["preprocessing"]
    assert own["method"]["preprocessing"] == "centre rectangle, bicubic to 96x160 px"
    assert means(other) == pytest.approx(means(own), abs=1e-3)
    assert 0.5 < means(own)["patches_cosine"] < 0.99999
    with pytest.raises(ConfigError, match="The subject takes 96x160 px, the teacher 160 px"):
        evaluate_student(bundle, folder, against=exported / "dense")
    (record,) = (answered.record for answered in run(bundle, str(folder / "dogs" / "02.png")))
    # 180 x 170: the middle 108 rows match the model's aspect ratio
    with Image.open(folder / "dogs" / "02.png") as image:
        middle = image.crop((0, 31, 180, 139)).resize((160, 96), Image.Resampling.BICUBIC)
    with flat.open_session(bundle) as session:
        logits = session.infer({"image": np.asarray(middle)[None]})["logits"][0]
    assert record.top is not None
    assert record.top[0].number == logits.argmax()
    assert record.top[0].probability == pytest.approx(np.exp(logits.max()) / np.exp(logits).sum(), abs=1e-4)


def test_a_bundle_remembers_how_images_are_fitted(exported: Path, folder: Path, tmp_path: Path) -> None:
    """The bundle's fit is the default and can be overridden, on an image of 180 x 170 pixels."""
    bundle = flat.export_bundle(exported / "student", tmp_path / "bundle", fit="letterbox")
    whole, stretched = "whole between bars, bicubic to 160 px", "whole, stretched, bicubic to 160 px"
    for fit, said in ((None, whole), ("stretch", stretched), ("crop", "centre square, bicubic to 160 px")):
        found = evaluate_student(bundle, folder, against=exported / "dense", queries=1, fit=fit)
        assert found["method"]["preprocessing"] == said
    (answered,) = run(bundle, str(folder / "dogs" / "02.png"))
    assert (answered.record.box, answered.fitting.inner) == ((0, 0, 180, 170), (0, 4, 160, 151))
    assert (answered.image[:4] == BARS).all()
    (answered,) = run(bundle, str(folder / "dogs" / "02.png"), RunOptions(fit="crop", region=(10, 0, 90, 60)))
    assert answered.record.box == (25, 0, 60, 60)
    for wrong in ({"fit": "pad"}, {"region": (0, 0, 0, 5)}, {"region": (1, 2, 3)}):
        with pytest.raises(ConfigError):
            se.EvaluationOptions(**wrong)


def colours(folder: Path, count: int, seed: int) -> Path:
    """Images of three classes that any model can separate."""
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
        flat.export_bundle(folder / "student", folder / "bundle")
        colours(folder / "gallery", 15, 0)
        colours(folder / "queries", 4, 1)

    folder = once("classes", make)
    names = {name: folder / name for name in ("student", "bundle", "gallery", "queries")}
    return names | {"weights": folder / "weights.safetensors"}


@pytest.fixture(scope="module")
def probed(once: Once, made: dict[str, Path]) -> Path:
    """A classifier made of the sparse model and a linear probe, and the probe's accuracy."""

    def probe(folder: Path) -> None:
        given = {"metric": "linear", "gallery": made["gallery"], "head": folder / "head"}
        found = evaluate_student(made["student"], made["queries"], **given)
        (folder / "probe.json").write_text(json.dumps(found))

    return once("probed", probe)


def share(result: dict[str, Any], role: str = "subject") -> float:
    """Return the share of correct answers."""
    return float(result["statistics"][f"{role}_accuracy"]["mean"]["value"])


@pytest.mark.parametrize("metric", ["knn", "linear"])
def test_what_is_easy_is_found_by_student_bundle_and_teacher(metric: str, made: dict[str, Path]) -> None:
    for subject, against in (("student", {}), ("bundle", {"against": TINY, "weights": made["weights"]})):
        result = evaluate_student(made[subject], made["queries"], metric=metric, gallery=made["gallery"], **against)
        check_result(result, "test", ScoresResult)
        assert share(result) == share(result, "teacher") == 1
        assert result["statistics"]["drop_accuracy"]["mean"]["value"] == 0
        assert len(result["samples"]["subject_accuracy"]) == 12
        assert result["method"]["gallery"] == f"45 of {made['gallery']}"


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
    bundle = flat.export_bundle(head, tmp_path / "bundle")
    assert (bundle / "labels.txt").read_text().split() == list(COLOURS)
    assert manifest_of(bundle)["outputs"][0]["shape"] == [1, 3]
    (record,) = (answered.record for answered in run(bundle, str(made["queries"] / "green" / "1.png")))
    assert record.top is not None
    assert record.top[0].label == "green"


def test_labels_decide_which_class_a_folder_is(made: dict[str, Path], probed: Path, tmp_path: Path) -> None:
    """The class order of the classifier is used, not the alphabetical one."""
    wanted = share(evaluate_student(probed / "head", made["queries"], metric="top1"))
    found = load_student(probed / "head")
    turned = [2, 0, 1]
    with torch.no_grad():
        found.model.head.weight[:] = found.model.head.weight[turned].clone()
        found.model.head.bias[:] = found.model.head.bias[turned].clone()
    labels = tuple(found.labels[number] for number in turned)
    other = save_student(dataclasses.replace(found, labels=labels), tmp_path / "turned")
    got = evaluate_student(other, made["queries"], metric="top1")
    assert share(got) == wanted > 0.6
    assert got["method"]["classes"] == list(labels)
    strange = save_student(dataclasses.replace(found, labels=("a", "b", "c")), tmp_path / "strange")
    assert evaluate_student(strange, made["queries"], metric="top1")["method"]["classes"] == list(COLOURS)
    for number, name in enumerate([*COLOURS, "red"]):
        shutil.copytree(made["queries"] / name, tmp_path / "four" / f"{number}")
    with pytest.raises(ConfigError, match="knows 3 classes, the images have 4"):
        evaluate_student(other, tmp_path / "four", metric="top1")


@pytest.mark.everything
def test_untrained_fidelity(tmp_path: Path) -> None:
    """Real weights, real photographs: what `benchmarks/fidelity.py` reports at 518 px, checked at 224 px."""
    save_numpy(material.dinov2_state(), weights := tmp_path / "dinov2.safetensors")
    calibration = tmp_path / "calibration"
    calibration.mkdir()
    for path in split.images("calibration"):
        shutil.copy(path, calibration)

    def patches(name: str, calibrate: Path | None = None) -> float:
        made = sparsify(
            material.DINOV2,
            tmp_path / name,
            weights=weights,
            img_size=224,
            keep=0.25,
            background_tokens=16,
            calibrate=calibrate,
        )
        found = means(evaluate_student(made, split.images("development")))
        assert found["features_cosine"] > 0.98
        return found["patches_cosine"]

    calibrated = patches("calibrated", calibration)
    assert calibrated >= 0.988
    assert calibrated > patches("from_weights") + 0.001


@pytest.mark.parametrize(
    ("kind", "size"), [*((kind, 160) for kind in KINDS if kind not in ("dense", "pruned")), ("merging", (96, 160))]
)
def test_what_is_read_and_merged_is_what_the_layers_did(kind: str, size: Any) -> None:
    """Each head's key list has the length of the layout; a merged token is read for all its patches."""
    made = student(sparsity=KINDS[kind], img_size=size)
    layers, patches = look(made, smooth_images(made.img_size)[0]), made.backbone.patches
    merges = plan_of(KINDS[kind], len(layers), patches).merge
    for number, (token, read, layer) in enumerate(layers):
        assert (layer.tokens, layer.merged) == (patches - sum(merges[:number]), merges[number])
        assert token.shape == (patches,)
        assert set(token.tolist()) == set(range(layer.tokens))
        assert (layer.keys is None) == (kind == "some dense" and number in (1, 4))
        if layer.keys is None:
            assert (read == 1).all()
        elif kind != "paper":  # The class token is in it too.
            assert read.sum() == pytest.approx(made.backbone.geometry.heads * layer.keys)
        assert read.shape == (layer.tokens,)


@pytest.mark.parametrize("kind", ["edge", "paper", "merging"])
def test_what_one_patch_reads_is_a_part_of_what_all_read(kind: str) -> None:
    made = student(sparsity=KINDS[kind])
    image, patches = smooth_images(made.img_size)[0], made.backbone.patches
    every = look(made, image)
    ones = [look(made, image, patch) for patch in range(patches)]
    for layer, (_, read, summary) in enumerate(every):
        by_patch = [one[layer][1] for one in ones]
        if kind != "paper":  # The class token is in it too.
            assert all(one.sum() == pytest.approx(made.backbone.geometry.heads * summary.keys) for one in by_patch)
        assert ((read > 0) == (sum(by_patch) > 0)).all()


@pytest.mark.parametrize(("kind", "said"), [("dense", "is dense"), ("pruned", "prunes")])
def test_what_has_no_explanation(kind: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        look(student(sparsity=KINDS[kind]), smooth_images(160)[0])


def test_saco() -> None:
    """SaCo is 1 if attributions match the effect of removal, -1 if they contradict it, and always between."""
    random = np.random.default_rng(0)
    for count in range(2, 12):
        claimed = random.random(count)
        assert saco(claimed, claimed) == pytest.approx(1)
        assert saco(claimed, -claimed) == pytest.approx(-1)
        assert -1 <= saco(claimed, random.random(count)) <= 1
    assert saco(np.ones(4), np.arange(4.0)) == 0


def left(pixels: torch.Tensor) -> torch.Tensor:
    """Return the answer of a model that sees only the left half."""
    return pixels[0, :, :80].reshape(10, 16, 5, 16, 3).mean((1, 3)).flatten() - 128


def test_an_explanation_that_is_true_and_one_that_is_false() -> None:
    """Attributing to the visible half is right, to the other half wrong; gradients are right."""
    image = smooth_images(160)[0]
    half = np.concatenate([np.linspace(1, 2, 50).reshape(10, 5), np.zeros((10, 5))], 1)
    (right, drop), (wrong, _) = (faithfulness(left, image, values) for values in (half, half[:, ::-1]))
    assert right > 0.5 > 0 > wrong
    assert drop.shape == (groups_of((10, 10)),) == (10,)
    assert groups_of((37, 37)) == 5  # An answer takes long there.
    assert drop[:5].min() > drop[5:].max() == pytest.approx(0)
    found = importance_of(left, image, (10, 10))
    assert found.sum() == pytest.approx(1)
    assert (found[:, 5:] == 0).all()
    assert faithfulness(left, image, found)[0] > 0.8


def test_the_command(pictures: Path, tmp_path: Path, capsys: Any) -> None:
    """Its result and the page in both languages, with the size of six layers; names are escaped."""
    made = save_student(student(sparsity=KINDS["merging"], num_classes=0), tmp_path / "student")
    evil, page = tmp_path / "images" / "<script>x.png", tmp_path / "page.html"
    evil.parent.mkdir()
    for path, target in zip(sorted(pictures.iterdir()), (evil.with_name("0.png"), evil), strict=False):
        shutil.copy(path, target)
    asked = ("explain", made, "--data", evil.parent, "-o")
    done = process(*asked, page, "--json")
    assert done.code == 0, done.err
    result = read_record(json.loads(done.out), ExplainResult, "test", "")
    assert result.kind == "explanation"
    assert result.method.images == ["0.png", evil.name]
    assert list(result.statistics) == list(result.samples) == ["0 0.png", f"1 {evil.name}"]
    for found in result.statistics.values():
        assert set(found.saco) == {"ours", "random", "moved"}
        assert found.better == (found.saco["ours"] > max(0, found.saco["random"], found.saco["moved"]))
        assert [layer.tokens for layer in found.layers] == [100, 88, 80, 80, 80, 80]
        assert [layer.merged for layer in found.layers] == [12, 8, 0, 0, 0, 0]
    assert "Tokens that the model read" in page.read_text("utf-8")
    done = call(capsys, *asked, page, "--lang", "ja")
    assert done.code == 0, done.err
    assert "SaCo test of the explanations" in done.out
    text = page.read_text("utf-8")
    assert "モデルが読んだもの" in text
    assert "<script" not in text
    assert "http" not in text.replace("http-equiv", "")
    assert text.count("data:image/jpeg") == 2
    assert len(text) < 400_000
    assert_refused(call(capsys, *asked, tmp_path), "is a folder")
    assert call(capsys, "explain", tmp_path, *asked[2:], tmp_path / "none.html").code == 2
    assert not (tmp_path / "none.html").exists()
