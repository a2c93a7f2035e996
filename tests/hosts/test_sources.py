"""Tests of models from Hugging Face folders and from a user's functions: sparse model, training, bundle."""

from __future__ import annotations

import functools
import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import sparsifiner_edge as se
from sparsifiner_edge.artifacts import ARCHITECTURE_FILE
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.errors import ArtifactError, ConfigError, WeightsError
from sparsifiner_edge.images import AS_IS
from sparsifiner_edge.sparse.calibrate import sparse_layers
from sparsifiner_edge.sparse.hosts import backbone_of
from sparsifiner_edge.sparse.source import load_source
from sparsifiner_edge.sparse.student import dense_twin
from tests import flat
from tests.commands import assert_refused, call, manifest_of, process, snapshot
from tests.everything import first
from tests.flat import load_student
from tests.hosts.factories import MODELS, PROCESSOR, Segmenter, depth_anything, images, model, saved

HERE = "tests.hosts.factories"


@pytest.fixture
def dinov2(tmp_path: Path) -> Path:
    return saved(model("DINOv2"), tmp_path / "dinov2")


@pytest.mark.parametrize("name", first(MODELS, 3))
def test_a_folder_of_hugging_face(tmp_path: Path, pictures: Path, name: str) -> None:
    made = model(name)
    folder = saved(made, tmp_path / "model")
    student = tmp_path / "student"
    se.sparsify(str(folder), student, keep=0.5, background_tokens=4, channels=8, merge=(2,), calibrate=pictures)
    found = load_student(student)
    assert (found.host, found.name) == ("transformers", type(made).__name__)
    assert found.normalisation.mean == (0.5, 0.4, 0.3)
    assert len(sparse_layers(found.model)) == 4
    x = images(found.backbone.image_size)
    with torch.no_grad():
        assert torch.equal(dense_twin(found).model(x).last_hidden_state, made(x).last_hidden_state)
        assert not torch.equal(found.model(x).last_hidden_state, made(x).last_hidden_state)


@pytest.mark.everything
def test_a_trained_student_of_a_folder(tmp_path: Path, dinov2: Path, pictures: Path) -> None:
    student = se.sparsify(str(dinov2), tmp_path / "student", keep=0.5, channels=8, calibrate=pictures)
    few = ("distil.steps=2", "reconstruct.steps=1", "images.held_out=1")
    flat.distill_student(student, pictures, tmp_path / "better", overrides=few)
    bundle = flat.export_bundle(tmp_path / "better", tmp_path / "bundle")
    assert manifest_of(bundle)["preprocessing"]["folded"]["mean"] == [0.5, 0.4, 0.3]
    assert manifest_of(bundle)["tools"]["transformers"]
    found = flat.evaluate_student(bundle, pictures, against=str(dinov2))
    assert found.statistics["patches_cosine"].images == 3


@pytest.mark.parametrize(
    ("name", "size"), [("DINOv2", (70, 112)), ("ViT", (96, 160)), ("SigLIP", (96, 160)), ("CLIP", 224)]
)
def test_another_size_than_the_configurations(tmp_path: Path, name: str, size: Any) -> None:
    """An exported file computes DINOv2's position embedding; those of the others are resampled at once."""
    folder = saved(model(name), tmp_path / "model")
    student = se.sparsify(str(folder), tmp_path / "student", img_size=size, keep=0.9, background_tokens=4, channels=8)
    found = load_student(student)
    assert found.img_size == size
    x = images(found.backbone.image_size)
    with torch.no_grad():
        got = found.model(x).last_hidden_state
    assert got.shape[1] == found.backbone.patches + found.backbone.prefix
    own = backbone_of(model(name)).image_size[0]
    assert load_student(student, img_size=own).img_size == own
    if name == "DINOv2":
        with torch.no_grad():
            assert torch.cosine_similarity(got, model(name)(x).last_hidden_state, dim=-1).mean() > 0.9
        bundle = open_bundle(flat.export_bundle(student, tmp_path / "bundle"))
        assert not [node for node in bundle.model().graph.node if node.op_type == "Resize"]


def test_an_image_tower_is_taken_out_of_a_model_of_images_and_texts(tmp_path: Path) -> None:
    import transformers

    text = dict.fromkeys(("hidden_size", "intermediate_size"), 16) | {"vocab_size": 40, "num_hidden_layers": 1}
    text["num_attention_heads"] = 1
    config = transformers.CLIPConfig(text_config=text, vision_config=MODELS["CLIP"][1], projection_dim=16)
    folder = saved(transformers.CLIPModel(config), tmp_path / "clip")
    loaded = load_source(str(folder))
    assert loaded.name == "CLIPVisionModel"
    expected = safetensors.torch.load_file(folder / "model.safetensors")
    assert torch.equal(
        loaded.model.state_dict()["embeddings.class_embedding"], expected["vision_model.embeddings.class_embedding"]
    )


def test_a_processor_that_does_not_normalise(tmp_path: Path) -> None:
    folder = saved(model("ViT"), tmp_path / "m", {"do_normalize": False})
    assert load_source(str(folder)).normalisation == AS_IS
    assert se.size_like(saved(model("ViT"), tmp_path / "o", {}), (320, 180)) == (128, 224), "asks nothing of pixels"
    folder = saved(model("ViT"), tmp_path / "n", PROCESSOR | {"do_rescale": False})
    assert load_source(str(folder)).normalisation.mean == pytest.approx((0.5 / 255, 0.4 / 255, 0.3 / 255))


def test_a_users_function(tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = tmp_path / "student"
    se.sparsify(f"{HERE}:Segmenter", student, keep=0.5, channels=8, merge=(2,), calibrate=pictures)
    refused = call(capsys, "export", student, "-o", tmp_path / "bundle")
    assert_refused(refused, f"runs the code of module '{HERE}'", f"--trust {HERE}")
    assert not (tmp_path / "bundle").exists()
    found = load_student(student, trust=[HERE])
    x = images((160, 160))
    with torch.no_grad():
        expected = Segmenter()(x)
        assert torch.equal(dense_twin(found).model(x)[0], expected[0])
        assert torch.nn.functional.cosine_similarity(found.model(x)[1], expected[1], dim=0).mean() > 0.5
    other = load_student(student, img_size=(96, 192), trust=[HERE])
    assert other.model(images((96, 192)))[0].shape == (2, 2, 96, 192)


def test_a_slip_in_a_path_asks_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="models/dinov does not exist"):
        load_source("models/dinov")


def _json(name: str, **changes: Any) -> Any:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


_config, _pixels = (functools.partial(_json, name) for name in ("config.json", "preprocessor_config.json"))


def _weights(change: Any) -> Any:
    def harm(folder: Path) -> None:
        state = safetensors.torch.load_file(folder / "model.safetensors")
        change(state)
        safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return harm


def _pickled(folder: Path) -> None:
    torch.save(safetensors.torch.load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _sharded(folder: Path) -> None:
    """Write an index that names a file elsewhere."""
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"layernorm.weight": "/etc/passwd"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _nested(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "dinov2", "x": ' + "[" * 100_000)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (_sharded, "could not be loaded by transformers"),
        (_pickled, "could not be loaded by transformers"),
        (_weights(lambda state: state.pop("layernorm.weight")), "missing keys layernorm.weight"),
        (_config(hidden_size=32), "do not fit"),
        (_config(auto_map={"AutoModel": "evil.Model"}, model_type="evil"), "could not be loaded by transformers"),
        (_config(num_hidden_layers=2**30), "config.json: num_hidden_layers is 1073741824"),
        (_config(transformers_weights="../other.safetensors"), "transformers_weights is '../other.safetensors'"),
        (_nested, "could not be loaded by transformers"),
        (lambda folder: (folder / "config.json").unlink(), "neither a student nor a folder saved by transformers"),
        (_pixels(image_mean=None), "no image_mean and image_std"),
        (_pixels(image_std=[0, 1, 1]), "std is (0.0, 1.0, 1.0)"),
        (_pixels(rescale_factor=1e-320), "is (inf, inf, inf)"),
        (_weights(lambda state: state["layernorm.weight"].fill_(torch.nan)), "layernorm.weight holds NaN or infinity"),
    ],
)
def test_folders_that_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dinov2: Path, harm: Any, said: str
) -> None:
    harm(dinov2)
    before, most = snapshot(tmp_path), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert_refused(call(capsys, "sparsify", dinov2, "-o", tmp_path / "out"), said)
    assert snapshot(tmp_path) == before
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < most + (1 << 20), "a gigabyte was taken"


@pytest.mark.everything
def test_a_name_on_the_hub_without_a_network(tmp_path: Path) -> None:
    assert_refused(process("sparsify", "facebook/dinov2-small", "-o", tmp_path / "out"), "could not be loaded")


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dinov2: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    outcome = call(capsys, "sparsify", dinov2, "-o", dinov2.parent / "out")
    assert_refused(outcome, "transformers", "[transformers]")


@pytest.mark.parametrize("make", [lambda: model("DINOv2"), depth_anything])
def test_attention_that_a_configuration_names_is_never_fetched(tmp_path: Path, make: Any) -> None:
    folder = saved(make(), tmp_path / "model")
    names = "attn_implementation", "_attn_implementation", "_attn_implementation_internal"
    evil = dict.fromkeys(names, "evil/kernel")
    content = json.loads((folder / "config.json").read_text()) | evil
    if "backbone_config" in content:
        content["backbone_config"] |= evil
    (folder / "config.json").write_text(json.dumps(content))
    student = se.sparsify(str(folder), tmp_path / "student")
    _config(**evil)(student / "architecture")
    for loaded in (load_source(str(folder)).model, load_student(student).model):
        assert backbone_of(loaded).module.config._attn_implementation == "sdpa"


def test_a_students_configuration_is_held_against_its_weights(tmp_path: Path, dinov2: Path) -> None:
    student = se.sparsify(str(dinov2), tmp_path / "student")
    copied = tmp_path / "copy"
    shutil.copytree(student, copied)
    _config(num_hidden_layers=400, hidden_size=4096)((copied / ARCHITECTURE_FILE).parent)
    with pytest.raises(WeightsError, match="does not fit"):
        load_student(copied)
    (copied / ARCHITECTURE_FILE).unlink()
    with pytest.raises(ArtifactError, match="does not exist"):
        load_student(copied)
