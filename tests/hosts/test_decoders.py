"""Tests of modules that contain a vision transformer: complete export, named outputs, dense maps, sparse layers.

Normalisation is declared, given or recorded, never guessed; class names are kept.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import sparsifiner_edge as se
from sparsifiner_edge.artifacts import STUDENT_FILE
from sparsifiner_edge.bundle.store import Bundle, open_bundle
from sparsifiner_edge.errors import ConfigError, UnsupportedModelError
from sparsifiner_edge.export.deployed_model import DeployedModel
from sparsifiner_edge.export.sessions import file_runner
from sparsifiner_edge.images import Normalisation
from sparsifiner_edge.profiles.measure.layers import node_place
from sparsifiner_edge.runtime.golden import check_golden
from sparsifiner_edge.sparse.hosts import backbone_of
from tests import flat
from tests.commands import call, manifest_of, process
from tests.everything import first
from tests.hosts.factories import (
    MODELS,
    PROCESSOR,
    SIXTEEN,
    Inside,
    Masked,
    Outside,
    Segmenter,
    depth_anything,
    images,
    model,
    saved,
    sharpen,
)
from tests.models import vit

SEEN: Any = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
MERGED = {"keep": 0.4, "background_tokens": 4, "channels": 8, "merge": 4}
OTHERS = [name for name in MODELS if name != "DINOv2"]
EXAMPLE = torch.zeros(1, 3, 160, 160)


def outputs(bundle: Bundle) -> dict[str, Any]:
    """Return names and shapes after checking golden data."""
    with flat.open_session(bundle.folder) as session:
        assert check_golden(session, bundle)
    return {output.name: output.shape for output in bundle.manifest.outputs}


@pytest.mark.parametrize(
    ("name", "settings"),
    first([("DINOv2", MERGED), ("DINOv2", {}), ("SigLIP", {}), *((name, MERGED) for name in OTHERS)]),
)
def test_models_of_transformers(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    made = model(name)
    size = backbone_of(made).image_size
    if settings:
        se.sparsify_model(made, **settings)
    bundle = open_bundle(flat.export_model(made, images(size), tmp_path / "bundle", normalise=SEEN))
    assert list(outputs(bundle)) == ["features", "tokens"]
    shape, plan = bundle.manifest.shape, bundle.manifest.plan
    assert shape is not None
    assert plan is not None
    assert (shape.depth, shape.width, shape.heads) == (4, 64, 2)
    assert plan.merge == ((4,) * 4 if settings else (0,) * 4)
    places = [node_place(node.name) for node in bundle.model().graph.node]
    assert {layer for layer, _, _ in places} == {None, 0, 1, 2, 3}
    assert {"projections", "mlp", "norms"} <= {kind for layer, kind, _ in places if layer == 3}


@pytest.mark.everything
def test_depth_anything(tmp_path: Path) -> None:
    made = se.sparsify_model(depth_anything(), **MERGED)
    bundle = open_bundle(flat.export_model(made, images((140, 140), 1), tmp_path / "bundle", normalise=SEEN))
    assert outputs(bundle) == {"predicted_depth": (1, 140, 140)}
    places = {node.name: node_place(node.name) for node in bundle.model().graph.node}
    assert {kind for layer, kind, _ in places.values() if layer is None} == {"decoder", "other"}
    assert any(name.startswith("decoder.neck.") for name in places)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 140, 140, 3), dtype=np.uint8)
    wanted = DeployedModel(made, Normalisation(*SEEN))(torch.from_numpy(pixels))[0].detach().numpy()
    np.testing.assert_allclose(file_runner(bundle.model())(pixels)["predicted_depth"], wanted, atol=1e-3)


@pytest.mark.parametrize("precision", first(["fp32", "fp16", "int8"]))
def test_a_users_decoder(tmp_path: Path, pictures: Path, precision: str) -> None:
    given = {"calibrate": pictures} if precision == "int8" else {}
    made = se.sparsify_model(Masked(), **MERGED)
    bundle = open_bundle(flat.export_model(made, EXAMPLE, tmp_path / "bundle", precision=precision, **given))
    assert outputs(bundle) == {"mask": (1, 160, 160), "heat": (1, 1, 10, 10)}
    assert (bundle.manifest.name, bundle.manifest.precision) == ("Masked", precision)


@pytest.mark.everything
@pytest.mark.parametrize("batch", ["dynamic", 2])
def test_batches_and_names(tmp_path: Path, batch: int | str) -> None:
    where = tmp_path / "bundle"
    bundle = open_bundle(flat.export_model(Segmenter(), EXAMPLE, where, outputs=["m", "h"], batch=batch, name="mine"))
    assert list(outputs(bundle)) == ["m", "h"]
    assert (bundle.manifest.name, bundle.manifest.sparsity) == ("mine", None)
    assert list(outputs(open_bundle(flat.export_model(Masked(), EXAMPLE, where, outputs=["heat"])))) == ["heat"]


def test_normalisation_is_folded_where_nothing_else_reads_the_pixels() -> None:
    pre = Normalisation(*SEEN)
    assert DeployedModel(vit(), pre).folded
    assert DeployedModel(depth_anything(), pre).folded
    assert not DeployedModel(Inside(), pre).folded


class Failing(Inside):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        return x + other


class Wordy(Inside):
    def forward(self, x: Tensor) -> Any:
        return "a mask", self.encoder(x)


@pytest.mark.parametrize(
    ("make", "settings", "error", "said"),
    [
        (lambda: nn.Linear(2, 2), {}, UnsupportedModelError, "contains 0 vision transformers"),
        (Failing, {}, ConfigError, "Failing failed when it was called"),
        (Wordy, {}, ConfigError, "returns 2 values (str, Tensor)"),
        (Inside, {"normalise": None}, ConfigError, "This Inside declares no image_mean"),
        (Inside, {"normalise": 0.5}, ConfigError, "normalise is 0.5"),
        (Inside, {"normalise": SEEN[:1]}, ConfigError, "normalise is ((0.485, 0.456, 0.406),)"),
        (Masked, {"normalise": None, "outputs": ["masks"]}, ConfigError, "returns no tensor named 'masks'"),
        (Segmenter, {"normalise": None, "outputs": ["a"]}, ConfigError, "has 1 output names: a"),
        (Inside, {"example": EXAMPLE[..., :96, :96]}, ConfigError, "96 pixels, the model 160"),
    ],
)
def test_what_is_refused_writes_nothing(
    tmp_path: Path, make: Any, settings: dict[str, Any], error: type[Exception], said: str
) -> None:
    given = {"example": EXAMPLE, "normalise": False} | settings
    with pytest.raises(error) as caught:
        flat.export_model(make(), given.pop("example"), tmp_path / "bundle", **given)
    assert said in str(caught.value)
    assert not list(tmp_path.iterdir())


HERE = "tests.hosts.factories"
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
GIVEN = ("--mean", "0.4,0.5,0.6", "--std", "0.2,0.25,0.3")
FOLDED = "normalisation in the file: mean 0.4, 0.5, 0.6, std 0.2, 0.25, 0.3, scale 1/255"


def assert_answers(bundle: Path, module: nn.Module, mean: Any, std: Any) -> None:
    """Assert that the file answers pixels like the module answers the normalised input of its caller."""
    image = np.random.default_rng(0).integers(0, 256, (1, 160, 160, 3), dtype=np.uint8)
    x = ((torch.from_numpy(image).float() / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)
    with torch.no_grad():
        wanted = module(x)
    wanted = wanted.logits if hasattr(wanted, "logits") else wanted[0] if isinstance(wanted, tuple) else wanted
    with flat.open_session(bundle) as session:
        (got, *_) = session.infer({"image": image}).values()
    assert np.abs(got - wanted.numpy()).max() < 1e-4 * float(wanted.max() - wanted.min())


@pytest.mark.parametrize(
    ("make", "options", "pixels", "said"),
    first(
        [
            (
                Inside,
                ["--no-normalise"],
                ((0,) * 3, (1,) * 3),
                "no normalisation: the module normalises pixels from 0 to 1 itself",
            ),
            (Outside, GIVEN, (MEAN, STD), FOLDED),
            (
                Segmenter,
                [],
                (Segmenter.image_mean, Segmenter.image_std),
                "normalisation in the file: mean 0.485, 0.456,",
            ),
        ]
    ),
)
def test_a_users_module_answers_as_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Any, options: Any, pixels: Any, said: str
) -> None:
    dense, student, bundle, live = (tmp_path / part for part in ("dense", "student", "bundle", "live"))
    source = f"{HERE}:{make.__name__}"
    assert said in call(capsys, "export", source, *options, "-o", dense).out
    done = call(capsys, "sparsify", source, "--keep", "1", *options, "-o", student)
    assert said in done.out, done
    assert f"export {student} --trust {HERE} " in done.out
    assert call(capsys, "export", student, "--trust", HERE, "-o", bundle).code == 0
    given = None if not options else False if make is Inside else pixels
    flat.export_model(make(), EXAMPLE, live, normalise=given)
    for folder in (dense, bundle, live):
        assert_answers(folder, make(), *pixels)
        folded = manifest_of(folder)["preprocessing"]["folded"]
        assert folded == {"mean": list(pixels[0]), "std": list(pixels[1]), "scale": "1/255"}
    assert json.loads((student / STUDENT_FILE).read_text())["normalisation"] == folded


def test_a_classifier_of_hugging_face_answers_as_itself_and_keeps_its_labels(tmp_path: Path, pictures: Path) -> None:
    names = {0: "car", 1: "red\x1b[31m bus", 2: "<b>cat</b>"}
    torch.manual_seed(0)
    made = transformers.ViTForImageClassification(transformers.ViTConfig(**SIXTEEN, id2label=names)).eval()
    sharpen(made)
    folder, pixels = str(saved(made, tmp_path / "vit")), (PROCESSOR["image_mean"], PROCESSOR["image_std"])
    student = se.sparsify(folder, tmp_path / "student", keep=1)
    assert json.loads((student / STUDENT_FILE).read_text())["labels"] == list(names.values())
    shown = ["car", r"red\x1b[31m bus", "<b>cat</b>"]
    for bundle in (
        flat.export_model(made, EXAMPLE, tmp_path / "live", normalise=pixels),
        flat.export_bundle(folder, tmp_path / "dense"),
        flat.export_bundle(student, tmp_path / "bundle"),
    ):
        assert_answers(bundle, made, *pixels)
        assert open_bundle(bundle).labels() == shown
        assert "labels.txt" in manifest_of(bundle)["files"]
    done = process("run", bundle, "--source", pictures, "--top", "3")
    assert done.code == 0, done
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert {found["label"] for line in lines for found in line["top"]} == set(shown)
    own = flat.export_model(Normalising(made), EXAMPLE, tmp_path / "own", normalise=False)
    assert open_bundle(own).labels() == shown


class Normalising(nn.Module):
    """A user's module around a classifier of transformers."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.classifier(2 * images - 1).logits}


def test_numbers_of_classes_are_no_names(tmp_path: Path) -> None:
    made = transformers.ViTForImageClassification(transformers.ViTConfig(**SIXTEEN, num_labels=3)).eval()
    bundle = flat.export_bundle(str(saved(made, tmp_path / "vit")), tmp_path / "bundle")
    assert open_bundle(bundle).labels() == []
    made.config.id2label = {0: "a", 7: "b", 8: "c"}
    with pytest.raises(ConfigError, match=r"names the classes \[0, 7, 8\], not 0 to 2"):
        flat.export_model(made, EXAMPLE, tmp_path / "b", normalise=False)
    assert open_bundle(flat.export_model(Scores(made), EXAMPLE, tmp_path / "c", normalise=False)).labels() == []


class Scores(Normalising):
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"scores": super().forward(images)["logits"]}


def test_a_teacher_of_the_same_function_expects_what_its_student_does(tmp_path: Path, pictures: Path) -> None:
    student = se.sparsify(f"{HERE}:Inside", tmp_path / "s", keep=0.5, channels=8, background_tokens=4, normalise=False)
    out, few = tmp_path / "better", ("distil.steps=1", "reconstruct.steps=1", "images.held_out=1")
    flat.distill_student(student, pictures, out, teacher=f"{HERE}:Inside", trust=[HERE], overrides=few)
    assert json.loads((out / STUDENT_FILE).read_text())["normalisation"]["std"] == [1, 1, 1]
    with pytest.raises(ConfigError, match=r"declares mean 0\.485"):
        flat.distill_student(student, pictures, out, teacher=f"{HERE}:Segmenter", trust=[HERE], overrides=few)
