"""Models from Hugging Face's folders and from a user's own functions: student, training, bundle."""

from __future__ import annotations

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
from sparsifiner_edge.errors import ArtifactError, WeightsError
from sparsifiner_edge.images import AS_IS
from sparsifiner_edge.sparse.calibrate import sparse_layers
from sparsifiner_edge.sparse.hosts import backbone_of
from sparsifiner_edge.sparse.source import load_source
from sparsifiner_edge.sparse.student import dense_twin, load_student
from tests.commands import assert_refused, call, manifest_of, process, snapshot
from tests.everything import first
from tests.hosts.factories import Segmenter
from tests.hosts.hugging_face import MODELS, PROCESSOR, depth_anything, images, model, saved

HERE = "tests.hosts.factories"


@pytest.fixture
def dinov2(tmp_path: Path) -> Path:
    return saved(model("DINOv2"), tmp_path / "dinov2")


@pytest.mark.parametrize("name", first(MODELS, 3))
def test_a_folder_of_hugging_face(tmp_path: Path, pictures: Path, name: str) -> None:
    made = model(name)
    folder = saved(made, tmp_path / "model")
    student = se.sparsify(
        str(folder), tmp_path / "student", keep=0.5, cells=4, channels=8, merge=(2,), calibrate=pictures
    )
    found = load_student(student)
    assert (found.kind, found.name) == ("transformers", type(made).__name__)
    assert found.normalisation.mean == (0.5, 0.4, 0.3)
    assert len(sparse_layers(found.model)) == 4
    x = images(found.backbone.image_size)
    with torch.no_grad():
        assert torch.equal(dense_twin(found).model(x).last_hidden_state, made(x).last_hidden_state)
        assert not torch.equal(found.model(x).last_hidden_state, made(x).last_hidden_state)


@pytest.mark.everything
def test_from_folder_to_bundle_on_the_command_line(
    tmp_path: Path, dinov2: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, better, bundle, dense = (tmp_path / name for name in ("student", "better", "bundle", "dense"))
    done = process("sparsify", dinov2, "--keep", ".5", "--set", "channels=8", "--calibrate", pictures, "-o", student)
    assert done.code == 0, done
    done = process("distill", student, "--data", pictures, "--set", "distil.steps=2", "--set", "images.held_out=1",
                   "--set", "reconstruct.steps=1", "-o", better)  # fmt: skip
    assert done.code == 0, done
    assert (better / "architecture" / "config.json").is_file()
    assert call(capsys, "export", better, "-o", bundle).code == 0
    assert call(capsys, "export", dinov2, "-o", dense).code == 0
    assert manifest_of(bundle)["preprocessing"]["folded"]["mean"] == [0.5, 0.4, 0.3]
    assert manifest_of(bundle)["tools"]["transformers"]
    done = call(capsys, "evaluate", bundle, "--against", dinov2, "--data", pictures, "--json")
    assert done.code == 0, done
    assert json.loads(done.out)["statistics"]["patches_cosine"]["images"] == 3
    assert process("profile", bundle, "--against", dense, "--seconds", "0.2", "--json").code == 0


def test_another_size_than_the_configurations(tmp_path: Path, dinov2: Path) -> None:
    size = (70, 112)
    student = se.sparsify(str(dinov2), tmp_path / "student", img_size=size, keep=0.9, cells=4, channels=8)
    found = load_student(student)
    assert found.img_size == size
    x = images(found.backbone.image_size)
    with torch.no_grad():
        expected = model("DINOv2")(x).last_hidden_state
        got = found.model(x).last_hidden_state
    assert torch.cosine_similarity(got, expected, dim=-1).mean() > 0.9
    bundle = open_bundle(se.export_bundle(student, tmp_path / "bundle"))
    assert bundle.manifest.preprocessing is not None
    assert not [node for node in bundle.model().graph.node if node.op_type == "Resize"]
    assert load_student(student, img_size=140).img_size == 140


@pytest.mark.parametrize(("name", "size"), [("ViT", (96, 160)), ("SigLIP", (96, 160)), ("CLIP", 224)])
def test_position_embeddings_of_one_size_are_resampled(tmp_path: Path, name: str, size: Any) -> None:
    folder = saved(model(name), tmp_path / "model")
    found = load_student(se.sparsify(str(folder), tmp_path / "s", img_size=size, keep=0.9, cells=4, channels=8))
    assert found.img_size == size
    tokens = found.model(images(found.backbone.image_size)).last_hidden_state
    assert tokens.shape[1] == found.backbone.patches + found.backbone.prefix
    assert load_student(tmp_path / "s", img_size=160).img_size == 160


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
    folder = saved(model("ViT"), tmp_path / "n", PROCESSOR | {"do_rescale": False})
    assert load_source(str(folder)).normalisation.mean == pytest.approx((0.5 / 255, 0.4 / 255, 0.3 / 255))


def test_a_users_function(tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student, bundle = tmp_path / "student", tmp_path / "bundle"
    done = process("sparsify", f"{HERE}:segmenter", "--keep", ".5", "--set", "channels=8", "--merge", "2",
                   "--calibrate", pictures, "-o", student)  # fmt: skip
    assert done.code == 0, done
    assert_refused(call(capsys, "export", student, "-o", bundle), f"made by the code of '{HERE}'", f"--trust {HERE}")
    assert not bundle.exists()
    assert call(capsys, "export", student, "--trust", HERE, "-o", bundle).code == 0
    outputs = {output["name"]: output["shape"] for output in manifest_of(bundle)["outputs"]}
    assert outputs == {"mask": [1, 2, 160, 160], "heat": [1, 1, 10, 10]}
    found = load_student(student, trust=[HERE])
    x = images((160, 160))
    with torch.no_grad():
        expected = Segmenter()(x)
        assert torch.equal(dense_twin(found).model(x)[0], expected[0])
        assert torch.nn.functional.cosine_similarity(found.model(x)[1], expected[1], dim=0).mean() > 0.5
    other = load_student(student, img_size=(96, 192), trust=[HERE])
    assert other.model(images((96, 192)))[0].shape == (2, 2, 96, 192)
    assert call(capsys, "export", f"{HERE}:depth", "-o", tmp_path / "depth").code == 0
    assert manifest_of(tmp_path / "depth")["preprocessing"]["folded"]["std"] == [0.25] * 3


def test_a_slip_in_a_path_asks_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match="models/dinov does not exist"):
        load_source("models/dinov")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sparsify", f"{HERE}:fails"], f"{HERE}:fails failed: RuntimeError: no such checkpoint."),
        (["sparsify", f"{HERE}:number"], "made a int"),
        (["sparsify", f"{HERE}:depth", "--img-size", "154"], "made a model of 140: it takes no img_size"),
        (["sparsify", f"{HERE}:stubborn", "--img-size", "96"], "was asked for 96 pixels and made a model of 160"),
        (["sparsify", f"{HERE}:segmenter", "--weights", "x.pth"], "--weights are for timm's names"),
    ],
)
def test_functions_that_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert_refused(call(capsys, *arguments, "-o", tmp_path / "out"), said)
    assert not snapshot(tmp_path)


def _without(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def _config(**changes: Any) -> Any:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _pickled(folder: Path) -> None:
    torch.save(safetensors.torch.load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _text(name: str, text: str) -> Any:
    return lambda folder: (folder / name).write_text(text)


def _pixels(**changes: Any) -> Any:
    return _text("preprocessor_config.json", json.dumps(PROCESSOR | changes))


def _weights(change: Any) -> Any:
    def harm(folder: Path) -> None:
        state = safetensors.torch.load_file(folder / "model.safetensors")
        change(state)
        safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return harm


def _sharded(folder: Path) -> None:
    """An index that names a file elsewhere."""
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"layernorm.weight": "/etc/passwd"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (_sharded, "could not be loaded by transformers"),
        (_without("config.json"), "nor a folder that transformers has saved"),
        (_without("model.safetensors"), "could not be loaded by transformers"),
        (_pickled, "could not be loaded by transformers"),
        (_weights(lambda state: state.pop("layernorm.weight")), "missing keys layernorm.weight"),
        (_config(hidden_size=32), "do not fit"),
        (_config(auto_map={"AutoModel": "evil.Model"}, model_type="evil"), "could not be loaded by transformers"),
        (_config(num_hidden_layers=2**30), "config.json: num_hidden_layers is 1073741824"),
        (_config(hidden_size=2**20), "numbers, they are"),
        (_config(transformers_weights="../other.safetensors"), "transformers_weights is '../other.safetensors'"),
        (_text("config.json", '{"model_type": "dinov2", "x": ' + "[" * 100_000), "could not be loaded by transformers"),
        (_text("preprocessor_config.json", "{}"), "no image_mean and image_std"),
        (_pixels(image_std=[0, 1, 1]), "std is (0.0, 1.0, 1.0)"),
        (_pixels(rescale_factor=1e-320), "is (inf, inf, inf)"),
        (_weights(lambda state: state["layernorm.weight"].fill_(torch.nan)), "layernorm.weight holds NaN or infinity"),
    ],
)  # fmt: skip
def test_folders_that_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dinov2: Path, harm: Any, said: str
) -> None:
    harm(dinov2)
    before, most = snapshot(tmp_path), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert_refused(call(capsys, "sparsify", dinov2, "-o", tmp_path / "out"), said)
    assert snapshot(tmp_path) == before
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < most + (1 << 20), "a gigabyte was taken"


def test_sizes_that_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], dinov2: Path) -> None:
    out = tmp_path / "out"
    refused = call(capsys, "sparsify", dinov2, "--img-size", "150", "-o", out)
    assert_refused(refused, "150 is not a multiple of the patch size 14", "Use 154")
    clip = saved(model("CLIP"), tmp_path / "clip")
    refused = call(capsys, "sparsify", clip, "--img-size", "96x160", "-o", out)
    assert_refused(refused, "CLIP takes squares alone")


@pytest.mark.everything
def test_a_name_on_the_hub_without_a_network(tmp_path: Path) -> None:
    assert_refused(process("sparsify", "facebook/dinov2-small", "-o", tmp_path / "out"), "could not be loaded")


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dinov2: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    outcome = call(capsys, "sparsify", dinov2, "-o", dinov2.parent / "out")
    assert_refused(outcome, "transformers", "sparsifiner-edge[transformers]")


@pytest.mark.parametrize("make", [lambda: model("DINOv2"), depth_anything])
def test_attention_that_a_configuration_names_is_never_fetched(tmp_path: Path, make: Any) -> None:
    folder = saved(make(), tmp_path / "model")
    evil = dict.fromkeys(
        ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"), "evil/kernel"
    )
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
