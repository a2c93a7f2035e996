"""Bad input: a message that names the value and says what to do, exit code 2, and nothing half-written."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

from sparsifiner_edge.artifacts import BUNDLE_FILE, STUDENT_FILE, WEIGHTS_FILE, new_folder, open_bundle, seal_bundle
from sparsifiner_edge.cli.main import main
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.errors import ArtifactError, SparsifinerError, UnsupportedModelError
from sparsifiner_edge.sparse.patch import make_model_sparse
from tests.commands import PROGRAM, Outcome, assert_refused, call, process, snapshot
from tests.models import TINY, vit
from tests.tiny import make_bundle

Capsys = pytest.CaptureFixture[str]


@pytest.fixture
def sparsify(tmp_path: Path, tiny_weights: Path, capsys: Capsys) -> Callable[..., Outcome]:
    """`sparsify` in this process; afterwards there is no output, and nothing else beside it."""

    def run(*arguments: Any, model: str = TINY, weights: Path = tiny_weights) -> Outcome:
        target = tmp_path / "target"
        target.mkdir()
        outcome = call(capsys, "sparsify", model, "--weights", weights, "-o", target / "student", *arguments)
        assert snapshot(target) == {}
        return outcome

    return run


@pytest.mark.parametrize(
    ("model", "texts"),
    [
        ("vit_smal_patch16_224", ["'vit_smal_patch16_224'", "Did you mean vit_small_patch16_224"]),
        ("nonsense", ["timm has no model 'nonsense'", "list_models"]),
        ("test_vit.no_such_tag", ["test_vit.no_such_tag", "Check the model's name"]),
        ("hf-hub:timm/test_vit.r160_in1k", ["timm has no model 'hf-hub:timm/test_vit.r160_in1k'"]),
        ("", ["timm has no model ''"]),
        ("swin_tiny_patch4_window7_224", ["is a SwinTransformer, not a VisionTransformer", "Choose a ViT"]),
        ("resnet18", ["is a ResNet, not a VisionTransformer", "Choose a ViT"]),
        ("test_vit_relpos", ["is a VisionTransformerRelPos", "Choose a ViT"]),
    ],
)
def test_unknown_and_unsupported_models(model: str, texts: list[str], sparsify: Callable[..., Outcome]) -> None:
    assert_refused(sparsify(model=model), *texts)


def test_a_model_of_another_make_is_refused_with_every_reason() -> None:
    model = timm.create_model(TINY, dynamic_img_size=True, patch_drop_rate=0.5)
    with pytest.raises(UnsupportedModelError, match="dynamic image size") as caught:
        make_model_sparse(model, SparsityConfig(cells=4))
    caught.match("patch dropout")


def test_no_weights_and_no_net(tmp_path: Path) -> None:
    outcome = process("sparsify", "vit_tiny_patch16_224", "-o", tmp_path / "s", env={"HF_HOME": str(tmp_path / "hf")})
    assert_refused(outcome, "The weights of 'vit_tiny_patch16_224' could not be downloaded", "--weights")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["--keep", "0"], ["keep is 0.0, outside (0, 1]", "such as 0.25"]),
        (["--keep", "-1"], ["keep is -1.0"]),
        (["--keep", "1.5"], ["keep is 1.5"]),
        (["--keep", "nan"], ["keep is nan"]),
        (["--keep", "inf"], ["keep is inf"]),
        (["--keep", "half"], ["'half' is not a valid float"]),
        (["--tile", "0"], ["tile is 0"]),
        (["--tile", "-16"], ["tile is -16"]),
        (["--tile", "10", "--probe", "4"], ["tile 10 is not a multiple of probe 4", "divides the tile"]),
        (["--probe", "0"], ["probe is 0"]),
        (["--tile", "128"], ["tile 128 exceeds the 100 patches", "smaller tile"]),
        (["--cells", "101"], ["101 cells exceed the 100 patches", "fewer cells"]),
        (["--cells", "-1"], ["cells is -1"]),
        (["--channels", "33"], ["channels 33 exceed the head dimension 32", "at most 32"]),
        (["--preset", "paper", "--channels", "33"], ["channels 33 exceed the head dimension 32"]),
        (["--preset", "paper", "--tile", "16"], ["tile is 16, but the preset 'paper' has 1"]),
        (["--preset", "paper", "--img-size", "64"], ["needs one class token and 8 landmarks", "2 landmarks"]),
        (["--channels", "0"], ["channels is 0"]),
        (["--dense-layers", "6"], ["dense layer 6 does not exist: the model has 6 layers", "0 to 5"]),
        (["--dense-layers", "1,1"], ["dense layers are (1, 1)", "distinct"]),
        (["--dense-layers", "first"], ["dense layers are 'first'", "such as 0,1"]),
        (["--dense-layers", "-1"], ["dense layers are '-1'"]),
        (["--dense-layers", "²"], ["dense layers are '²'"]),
        (["--img-size", "161"], ["161 is not a multiple of the patch size 16", "Use 160"]),
        (["--img-size", "8"], ["8 is not a multiple of the patch size 16", "Use 16"]),
        (["--img-size", "0"], ["--img-size", "0 is not in the range"]),
        (["--img-size", "-160"], ["--img-size"]),
        (["--preset", "magic"], ["--preset", "'magic'"]),
        (["--calibrate", "nowhere"], ["nowhere does not exist", "folder of pictures"]),
    ],
)
def test_settings_that_do_not_fit(arguments: list[str], texts: list[str], sparsify: Callable[..., Outcome]) -> None:
    assert_refused(sparsify(*arguments), *texts)


class Evil:
    """Unpickling it would write a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def weights_of_another_architecture(path: Path) -> None:
    safetensors.torch.save_file(vit("test_vit3", num_classes=10).state_dict(), path)


def weights_with_other_names(path: Path) -> None:
    safetensors.torch.save_file({f"module.{k}": v for k, v in vit(num_classes=10).state_dict().items()}, path)


def weights_with(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        state = {key: value.clone() for key, value in vit(num_classes=10).state_dict().items()}
        change(state)
        safetensors.torch.save_file(state, path)

    return write


def truncated(path: Path) -> None:
    weights_with(lambda _: None)(path)
    path.write_bytes(path.read_bytes()[:-1000])


def truncated_pth(path: Path) -> None:
    torch.save(vit(num_classes=10).state_dict(), path)
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("name", "write", "texts"),
    [
        ("w.safetensors", lambda p: None, ["does not exist"]),
        ("w.safetensors", lambda p: p.mkdir(), ["does not exist"]),
        ("w.safetensors", lambda p: p.write_bytes(b""), ["cannot be read as weights"]),
        ("w.safetensors", lambda p: p.write_text("Not Found\n" * 100), ["cannot be read as weights"]),
        ("w.safetensors", lambda p: p.write_bytes(struct.pack("<Q", 1 << 62) + b"{}"), ["cannot be read as weights"]),
        ("w.safetensors", truncated, ["cannot be read as weights", "make it again"]),
        ("w.safetensors", weights_of_another_architecture, ["does not fit this model", "the same architecture"]),
        ("w.safetensors", weights_with_other_names, ["does not fit this model", "missing"]),
        ("w.safetensors", weights_with(lambda s: s.pop("cls_token")), ["missing cls_token; left over nothing"]),
        ("w.safetensors", weights_with(lambda s: s.update(more=torch.ones(1))), ["missing nothing; left over more"]),
        ("w.safetensors", weights_with(lambda s: s.update({"head.weight": torch.ones(())})), ["does not fit"]),
        ("w.safetensors", weights_with(lambda s: s.update({"pos_embed": torch.ones(7)})), ["does not fit"]),
        ("w.safetensors", weights_with(lambda s: s.update({"cls_token": torch.ones(3)})), ["cls_token has shape [3]"]),
        ("w.safetensors", weights_with(lambda s: s["norm.bias"].fill_(torch.nan)), ["norm.bias holds NaN"]),
        ("w.pth", lambda p: p.write_text("Not Found"), ["damaged, or a pickle that holds more than tensors"]),
        ("w.pth", lambda p: p.write_bytes(b""), ["cannot be read as weights"]),
        ("w.pth", truncated_pth, ["cannot be read as weights"]),
        ("w.pth", lambda p: torch.save([1, 2], p), ["holds no tensors by name", "state dict"]),
        ("w.pth", lambda p: torch.save(vit(), p), ["holds more than tensors", "best as .safetensors"]),
        ("w.pth", lambda p: torch.save({"model": {"epoch": 3}}, p), ["holds no tensors by name"]),
    ],
)
def test_weights_that_do_not_serve(
    name: str, write: Callable[[Path], object], texts: list[str], tmp_path: Path, sparsify: Callable[..., Outcome]
) -> None:
    path = tmp_path / name
    write(path)
    assert_refused(sparsify(weights=path), str(path), *texts)


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_code_in_a_pickle_is_not_run(save: Any, tmp_path: Path, sparsify: Callable[..., Outcome]) -> None:
    path, marker = tmp_path / "w.pth", tmp_path / "marker"
    save({"cls_token": Evil(marker)}, path)
    assert_refused(sparsify(weights=path), str(path), "nothing in it was run")
    assert not marker.exists()


# Students.


@pytest.fixture
def student(tmp_path: Path, tiny_student: Path) -> Path:
    return Path(shutil.copytree(tiny_student, tmp_path / "student"))


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def export_refused(capsys: Capsys, student: Path, target: Path, *texts: str) -> None:
    assert_refused(call(capsys, "export", student, "-o", target), *texts)
    assert not target.exists()
    assert [p.name for p in target.parent.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        (lambda c: c.pop("schema_version"), ["has no schema_version"]),
        (lambda c: c.update(schema_version="1"), ["has no schema_version"]),
        (lambda c: c.update(schema_version=2), ["schema 2; this version reads up to 1", "Upgrade"]),
        (lambda c: c.update(kind="bundle"), ["is not a student"]),
        (lambda c: c.pop("model"), ["model is null, not str"]),
        (lambda c: c.update(model=["test_vit"]), ['model is ["test_vit"], not str']),
        (lambda c: c.update(model="resnet18"), ["is a ResNet"]),
        (lambda c: c.update(model="test_vit3"), ["does not fit this model"]),
        (lambda c: c.update(img_size="160"), ['img_size is "160", not int']),
        (lambda c: c.update(img_size=True), ["img_size is true, not int"]),
        (lambda c: c.update(img_size=-16), ["image size -16"]),
        (lambda c: c.update(num_classes=1.5), ["num_classes is 1.5, not int"]),
        (lambda c: c.update(num_classes=11), ["head.bias has shape [10]"]),
        (lambda c: c.update(sparsity=None), ["sparsity is null, not dict"]),
        (lambda c: c["sparsity"].update(temperature=2), ["unknown sparsity field ['temperature']", "Known fields"]),
        (lambda c: c["sparsity"].update(keep="0.2"), ["keep is '0.2'"]),
        (lambda c: c["sparsity"].update(keep=float("nan")), ["keep is nan"]),
        (lambda c: c["sparsity"].update(tile=16.0), ["tile is 16.0"]),
        (lambda c: c["sparsity"].update(cells=None), ["cells is None"]),
        (lambda c: c["sparsity"].update(dense_layers=3), ["dense_layers is 3"]),
        (lambda c: c["sparsity"].update(dense_layers=[[1]]), ["dense layers are ([1],)"]),
        (lambda c: c["sparsity"].update(dense_layers=[99]), ["dense layer 99 does not exist"]),
        (lambda c: c["sparsity"].update(value_power="much"), ["value_power is 'much'"]),
        (lambda c: c["sparsity"].update(preset=["edge"]), ["preset is ['edge']"]),
        (lambda c: c["sparsity"].update(landmark_factor=0), ["landmark_factor is 0"]),
        (lambda c: c["sparsity"].update(basis_threshold=float("inf")), ["basis_threshold is inf"]),
        (lambda c: c.update(provenance=None), ["provenance is null, not dict"]),
        (lambda c: c.update(weights_sha256=None), ["model.safetensors does not match its SHA-256"]),
    ],
)
def test_a_student_with_other_settings(
    change: Callable[[dict[str, Any]], object], texts: list[str], student: Path, tmp_path: Path, capsys: Capsys
) -> None:
    edit_json(student / STUDENT_FILE, change)
    export_refused(capsys, student, tmp_path / "bundle", *texts)


@pytest.mark.parametrize(
    ("damage", "texts"),
    [
        (lambda s: (s / STUDENT_FILE).write_text('{"schema_version": 1,'), ["config.json cannot be read"]),
        (lambda s: (s / STUDENT_FILE).write_text("[" * 100_000), ["config.json cannot be read"]),
        (lambda s: (s / STUDENT_FILE).write_bytes(b"\xff\xfe\x00"), ["config.json cannot be read"]),
        (lambda s: (s / STUDENT_FILE).write_text("[]"), ["has no schema_version"]),
        (lambda s: (s / STUDENT_FILE).unlink(), ["is not a student", "sparsify"]),
        (lambda s: (s / WEIGHTS_FILE).unlink(), ["model.safetensors is missing"]),
        (lambda s: flip(s / WEIGHTS_FILE), ["model.safetensors does not match its SHA-256"]),
        (lambda s: os.truncate(s / WEIGHTS_FILE, 1000), ["model.safetensors does not match its SHA-256"]),
    ],
)
def test_a_damaged_student(
    damage: Callable[[Path], object], texts: list[str], student: Path, tmp_path: Path, capsys: Capsys
) -> None:
    damage(student)
    export_refused(capsys, student, tmp_path / "bundle", *texts)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["--batch", "0"], ["batch is '0'", "from 1 to", "dynamic"]),
        (["--batch=-1"], ["batch is '-1'"]),
        (["--batch", "abc"], ["batch is 'abc'"]),
        (["--batch", "1.5"], ["batch is '1.5'"]),
        (["--batch", "²"], ["batch is '²'"]),
        (["--batch", "9" * 5000], ["batch is '99"]),
        (["--precision", "int3"], ["--precision", "'int3'"]),
        (["--img-size", "100"], ["100 is not a multiple of the patch size 16"]),
        (["--weights", "w.safetensors"], ["--weights does not go with a student"]),
    ],
)
def test_exports_that_cannot_be(
    arguments: list[str], texts: list[str], tiny_student: Path, tmp_path: Path, capsys: Capsys
) -> None:
    assert_refused(call(capsys, "export", tiny_student, "-o", tmp_path / "bundle", *arguments), *texts)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_source_of_an_export(tmp_path: Path, tiny_bundle: Path, capsys: Capsys) -> None:
    target = tmp_path / "bundle"
    export_refused(capsys, tiny_bundle, target, "is not a student", "sparsify")
    export_refused(capsys, tmp_path / "nowhere", target, "nowhere", "list_models")
    export_refused(capsys, tiny_bundle / "model.onnx", target, "timm has no model")


def test_selecting_more_keys_than_a_runtime_takes(tmp_path: Path, tiny_weights: Path, capsys: Capsys) -> None:
    student = tmp_path / "student"
    settings = ["--img-size", 1024, "--keep", "0.99"]
    assert call(capsys, "sparsify", TINY, "--weights", tiny_weights, *settings, "-o", student).code == 0
    export_refused(capsys, student, tmp_path / "bundle", "reads 4056 keys per tile", "3840", "smaller --keep")


# Bundles.


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle", preprocessing={"size": 4}, tokens={"prefix": 1})


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit_json(folder / BUNDLE_FILE, change)


def reseal(folder: Path, change: Callable[[dict[str, Any]], object] = lambda _: None) -> None:
    """Hashes that match what lies there now."""
    manifest = json.loads((folder / BUNDLE_FILE).read_text())
    (folder / BUNDLE_FILE).unlink()
    del manifest["files"]
    change(manifest)
    seal_bundle(folder, manifest)


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        (lambda m: m.pop("schema_version"), ["has no schema_version"]),
        (lambda m: m.update(schema_version=7), ["schema 7; this version reads up to 1", "Upgrade"]),
        (lambda m: m.update(kind="student"), ["is not a bundle's manifest", "Export the bundle again"]),
        (lambda m: m.pop("files"), ["is not a bundle's manifest"]),
        (lambda m: m.update(files=["model.onnx"]), ["is not a bundle's manifest"]),
        (lambda m: m["files"].pop("model.onnx"), ["is not a bundle's manifest"]),
        (lambda m: m["files"].update({"model.onnx": None}), ["model.onnx does not match its SHA-256"]),
        (lambda m: m["files"].update({"../x": "0"}), ["names the file '../x' outside itself", "Do not use"]),
        (lambda m: m["files"].update({"/etc/passwd": "0"}), ["'/etc/passwd' outside itself"]),
        (lambda m: m["files"].update({"a\0b": "0"}), ["outside itself"]),
        (lambda m: m["files"].update({"gone.bin": "0"}), ["gone.bin is missing"]),
        (lambda m: m["files"].update({"x" * 300: "0"}), ["File name too long"]),
        (lambda m: m.pop("preprocessing"), ["preprocessing.size is null, not int"]),
        (lambda m: m.update(preprocessing=[4]), ["preprocessing.size is null, not int"]),
        (lambda m: m.update(preprocessing={"size": "4"}), ['preprocessing.size is "4", not int']),
        (lambda m: m.update(preprocessing={"size": 5}), ["'image' got 5 on axis 1"]),
        (lambda m: m.update(preprocessing={"size": -4}), ["preprocessing.size is -4"]),
    ],
)
def test_a_bundle_with_another_manifest(
    change: Callable[[dict[str, Any]], object], texts: list[str], bundle: Path, pictures: Path, capsys: Capsys
) -> None:
    change_manifest(bundle, change)
    assert_refused(call(capsys, "run", bundle, "--source", pictures), *texts)


def drop_outputs(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    model.graph.output[0].name = model.graph.node[-1].output[0] = "other"
    onnx.save(model, folder / "model.onnx")


@pytest.mark.parametrize(
    ("damage", "texts"),
    [
        (lambda b: (b / BUNDLE_FILE).write_text("{"), ["manifest.json cannot be read", "Make it again"]),
        (lambda b: (b / BUNDLE_FILE).unlink(), ["manifest.json does not exist"]),
        (lambda b: flip(b / "model.onnx"), ["model.onnx does not match its SHA-256"]),
        (lambda b: flip(b / "golden.npz"), ["golden.npz does not match its SHA-256"]),
        (lambda b: (b / "model.onnx").unlink(), ["model.onnx is missing"]),
        (lambda b: (os.truncate(b / "model.onnx", 400), reseal(b)), ["ONNX Runtime refuses", "Export the bundle"]),
        (lambda b: ((b / "model.onnx").write_bytes(b""), reseal(b)), ["ONNX Runtime refuses"]),
        (lambda b: ((b / "model.onnx").write_bytes(os.urandom(4096)), reseal(b)), ["ONNX Runtime refuses"]),
        (lambda b: (drop_outputs(b), reseal(b)), ["gives other; needed are logits or features"]),
        (shutil.rmtree, ["is not a folder", "sparsifiner-edge export"]),
        (lambda b: (shutil.rmtree(b), b.write_text("x")), ["is not a folder"]),
    ],
)
@pytest.mark.parametrize("command", ["run", "evaluate"])
def test_a_damaged_bundle(
    command: str, damage: Callable[[Path], object], texts: list[str], bundle: Path, pictures: Path, capsys: Capsys
) -> None:
    damage(bundle)
    if command == "run":
        assert_refused(call(capsys, "run", bundle, "--source", pictures), *texts)
    elif "gives other" not in texts[0]:
        assert_refused(call(capsys, "evaluate", bundle, "--against", bundle, "--data", pictures))


def instead(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (os.mkfifo, "is no plain file"),
        (lambda path: path.symlink_to("/dev/null"), "is no plain file"),
        (lambda path: path.symlink_to(path), "cannot be read: Too many levels of symbolic links"),
        (lambda path: (path.touch(), os.truncate(path, (1 << 26) + 1)), "has more than 67108864 bytes"),
        (lambda path: path.write_text('{"schema_version": ' + "1" * 5000 + "}"), "cannot be read"),
        (lambda path: path.write_text('{"schema_version": 1, "x": ' + "1" * 5000 + "}"), "cannot be read"),
    ],
)
def test_a_manifest_that_would_never_end(make: Callable[[Path], object], said: str, bundle: Path) -> None:
    """In a process of its own, since a reader of a pipe waits."""
    instead(bundle / BUNDLE_FILE, make)
    outcome = process("package", bundle, "--for", "triton", "-o", bundle.parent / "out", timeout=60)
    assert_refused(outcome, "manifest.json", said)
    assert not (bundle.parent / "out").exists()


def test_a_link_out_of_a_bundle(bundle: Path, tmp_path: Path, pictures: Path, capsys: Capsys) -> None:
    (bundle / "model.onnx").rename(tmp_path / "elsewhere.onnx")
    (bundle / "model.onnx").symlink_to(tmp_path / "elsewhere.onnx")
    assert_refused(call(capsys, "run", bundle, "--source", pictures), "'model.onnx' outside itself")


def test_labels_that_the_manifest_does_not_name_or_that_are_too_few(
    tiny_bundle: Path, tmp_path: Path, pictures: Path, capsys: Capsys
) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "b"))
    (folder / "labels.txt").write_bytes(b"only one \xff\n")
    reseal(folder)
    outcome = call(capsys, "run", folder, "--source", pictures / "picture0.png")
    assert outcome.code == 0
    assert json.loads(outcome.out)["top"][0]["label"].startswith("class_")
    edit_json(folder / BUNDLE_FILE, lambda m: m["files"].pop("labels.txt"))
    (folder / "labels.txt").write_text("cat\n" * 10)
    assert "cat" not in call(capsys, "run", folder, "--source", pictures / "picture0.png").out


def test_a_bundle_needs_a_named_teacher(tiny_bundle: Path, pictures: Path, capsys: Capsys) -> None:
    outcome = call(capsys, "evaluate", tiny_bundle, "--data", pictures)
    assert_refused(outcome, "A bundle does not hold its teacher", "--against MODEL")


@pytest.mark.parametrize("arguments", [["--against", "resnet18"], ["--against", "nowhere/"]])
def test_what_is_no_teacher(arguments: list[str], tiny_student: Path, pictures: Path, capsys: Capsys) -> None:
    outcome = call(capsys, "evaluate", tiny_student, "--data", pictures, *arguments)
    assert_refused(outcome, arguments[1].strip("/"))


def test_bundles_that_take_other_batches_or_sizes(
    tmp_path: Path, bundle: Path, tiny_student: Path, pictures: Path, capsys: Capsys
) -> None:
    four = make_bundle(tmp_path / "four", batch=4, preprocessing={"size": 4})
    assert_refused(call(capsys, "run", four, "--source", pictures), "takes batches of 4", "--batch 1 or dynamic")
    outcome = call(capsys, "evaluate", tiny_student, "--against", bundle, "--data", pictures)
    assert_refused(outcome, "The subject takes 160 px, the teacher 4 px")


# Pictures.


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nearly nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def noise(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)


BAD_PICTURES: dict[str, Callable[[Path], object]] = {
    "truncated.png": lambda p: (noise(p), os.truncate(p, 2000)),
    "truncated.jpg": lambda p: (noise(p), os.truncate(p, 1500)),
    "text.png": lambda p: p.write_text("not a picture"),
    "empty.jpg": lambda p: p.write_bytes(b""),
    "bomb.png": lambda p: p.write_bytes(png_of_size(30_000, 30_000)),
    "sizeless.png": lambda p: p.write_bytes(png_of_size(0, 0)),
    "page.html": lambda p: p.write_text("<html>"),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_a_picture_that_cannot_be_read(
    name: str, bundle: Path, tiny_student: Path, tmp_path: Path, capsys: Capsys
) -> None:
    BAD_PICTURES[name](tmp_path / name)
    for command in (["run", bundle, "--source"], ["evaluate", tiny_student, "--data"]):
        outcome = call(capsys, *command, tmp_path / name)
        assert_refused(outcome, f"{tmp_path / name} cannot be read as a picture", "Replace or remove it")


@pytest.mark.parametrize("where", ["missing", "empty", "without"])
def test_folders_without_pictures(
    where: str, bundle: Path, tiny_student: Path, tmp_path: Path, sparsify: Callable[..., Outcome], capsys: Capsys
) -> None:
    folder = tmp_path / where
    if where != "missing":
        folder.mkdir()
    if where == "without":
        (folder / "notes.txt").write_text("no picture")
    said = f"{folder} does not exist" if where == "missing" else f"{folder} holds no picture"
    assert_refused(call(capsys, "run", bundle, "--source", folder), said)
    assert_refused(call(capsys, "evaluate", tiny_student, "--data", folder), said)
    assert_refused(sparsify("--calibrate", folder), said)


def test_one_bad_picture_among_good_ones(bundle: Path, pictures: Path, tmp_path: Path, capsys: Capsys) -> None:
    source, lines = Path(shutil.copytree(pictures, tmp_path / "source")), tmp_path / "lines"
    BAD_PICTURES["text.png"](source / "picture1_bad.png")
    for to_file in (False, True):
        outcome = call(capsys, "run", bundle, "--source", source, *(["--output", lines] if to_file else []))
        assert outcome.code == 2
        assert outcome.err == "error: 1 of 4 pictures could not be read; their lines say why.\n"
        records = [json.loads(line) for line in (lines.read_text() if to_file else outcome.out).splitlines()]
        assert ["error" in record for record in records] == [False, False, True, False]
        assert "picture1_bad.png cannot be read as a picture" in records[2]["error"]


def test_a_bad_picture_stops_calibration(pictures: Path, tmp_path: Path, sparsify: Callable[..., Outcome]) -> None:
    source = Path(shutil.copytree(pictures, tmp_path / "source"))
    BAD_PICTURES["truncated.png"](source / "a.png")
    assert_refused(sparsify("--calibrate", source), f"{source / 'a.png'} cannot be read")


# Outputs.


def occupied(folder: Path, tiny_student: Path, how: str) -> None:
    """Something at `folder` that must survive."""
    if how == "file":
        folder.write_text("mine")
    elif how == "link":
        shutil.copytree(tiny_student, folder.with_name("real"))
        folder.symlink_to("real")
    elif how == "dangling link":
        folder.symlink_to("nowhere")
    elif how == "student and more":
        shutil.copytree(tiny_student, folder)
        (folder / "notes.txt").write_text("mine")
    else:
        folder.mkdir()
        (folder / {"foreign": "thesis.txt", "another's": STUDENT_FILE, "damaged": STUDENT_FILE}[how]).write_text(
            {"foreign": "mine", "another's": '{"kind": "vit"}', "damaged": '{"kind": "student"'}[how]
        )


@pytest.mark.parametrize(
    "how", ["file", "link", "dangling link", "foreign", "another's", "damaged", "student and more"]
)
@pytest.mark.parametrize("command", ["sparsify", "export", "demo"])
def test_an_output_that_is_not_ours_is_left_alone(
    command: str, how: str, tiny_student: Path, tiny_weights: Path, tmp_path: Path, capsys: Capsys
) -> None:
    folder = tmp_path / "target"
    occupied(folder, tiny_student, how)
    before = snapshot(tmp_path)
    start = {
        "sparsify": ["sparsify", TINY, "--weights", tiny_weights],
        "export": ["export", tiny_student],
        "demo": ["demo"],
    }
    assert_refused(call(capsys, *start[command], "-o", folder), str(folder), "hoose another")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("output", [".", "..", "", "thesis.txt/student", "x" * 300])
def test_outputs_that_are_no_place(
    output: str, tiny_weights: Path, tmp_path: Path, monkeypatch: Any, capsys: Capsys
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("thesis.txt").write_text("mine")
    if output == ".":
        Path("thesis.txt").unlink()
    before = snapshot(tmp_path)
    outcome = call(capsys, "sparsify", TINY, "--weights", tiny_weights, "-o", output)
    assert_refused(outcome, output[:40])
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("output", ["/dev/null", "."])
def test_results_do_not_replace_folders_or_devices(
    output: str, bundle: Path, tiny_student: Path, pictures: Path, tmp_path: Path, monkeypatch: Any, capsys: Capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(call(capsys, "run", bundle, "--source", pictures, "--output", output), f"{output} is a folder")
    assert_refused(call(capsys, "evaluate", tiny_student, "--data", pictures, "-o", output), f"{output} is a folder")
    assert not Path("/dev/null").is_file()


def test_a_replaced_folder_survives_a_refused_swap(tmp_path: Path, tiny_student: Path, monkeypatch: Any) -> None:
    folder = Path(shutil.copytree(tiny_student, tmp_path / "student"))
    before = snapshot(tmp_path)
    rename = Path.rename

    def refuse(source: Path, target: Path) -> Path:
        if target == folder and source.name != "old":
            raise PermissionError(13, "Permission denied")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(ArtifactError, match="cannot be written: Permission denied"), new_folder(folder, "student") as f:
        (f / "new").write_text("new")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("error", [MemoryError(), OSError(5, "Input/output error", "disk"), SparsifinerError("a", "b")])
def test_errors_anywhere_become_messages(error: Exception, monkeypatch: Any, tmp_path: Path, capsys: Capsys) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("sparsifiner_edge.camera.stills.run_pictures", fail)
    assert_refused(call(capsys, "run", tmp_path, "--source", tmp_path))


def test_a_bug_stays_a_traceback(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr("sparsifiner_edge.camera.stills.run_pictures", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["run", str(tmp_path), "--source", str(tmp_path)])


# A full disk, a read-only one: real ones, in a mount namespace of their own.


def in_mount(tmp_path: Path, size_kb: int, prepare: str, *arguments: Any) -> tuple[Outcome, list[str]]:
    """Run the command line with `disk/`, a file system of `size_kb`; returns also what `disk/` holds afterwards."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = (
        f'mount -t tmpfs -o size={size_kb}k none "{disk}" || exit 99; cd "{disk}"; {prepare}; cd ..\n'
        '"$@"; code=$?\n'
        f'find "{disk}" -mindepth 1 -type f -exec sha256sum {{}} + > after; find "{disk}" -mindepth 1 >> names\n'
        "exit $code"
    )
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", *PROGRAM, *map(str, arguments)],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    names = (tmp_path / "names").read_text().splitlines() if (tmp_path / "names").exists() else []
    return Outcome(done.returncode, done.stdout, done.stderr), sorted(str(Path(n).relative_to(disk)) for n in names)


def mounts_allowed() -> bool:
    try:
        probe = ["unshare", "-m", "sh", "-c", "mount -t tmpfs none /mnt"]
        return subprocess.run(probe, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


needs_mounts = pytest.mark.skipif(not mounts_allowed(), reason="unshare -m and mount are not permitted here")


def kilobytes(folder: Path) -> int:
    return sum(4 * -(-p.stat().st_size // 4096) for p in folder.iterdir()) + 64


@needs_mounts
@pytest.mark.parametrize(("command", "earlier"), [("sparsify", False), ("sparsify", True), ("export", True)])
def test_a_full_disk_leaves_what_was_there(
    command: str, earlier: bool, tiny_student: Path, tiny_bundle: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    old = tiny_student if command == "sparsify" else tiny_bundle
    # Room for the earlier folder and for half of a new one.
    size = kilobytes(old) * (3 if earlier else 1) // 2
    prepare = f"cp -r {old} target" if earlier else "true"
    start = ["sparsify", TINY, "--weights", tiny_weights] if command == "sparsify" else ["export", tiny_student]
    outcome, names = in_mount(tmp_path, size, prepare, *start, "-o", "disk/target")
    assert_refused(outcome, "disk/target cannot be written: No space left on device", "Free space")
    assert names == (["target", *sorted(f"target/{p.name}" for p in old.iterdir())] if earlier else [])
    if earlier:
        hashes = {line.split()[0] for line in (tmp_path / "after").read_text().splitlines()}
        assert hashes == {open_hash(path) for path in old.iterdir()}


def open_hash(path: Path) -> str:
    return subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]


@needs_mounts
@pytest.mark.parametrize("command", ["profile", "run"])
@pytest.mark.parametrize("state", ["full", "read-only"])
def test_results_on_a_full_or_read_only_disk(
    command: str, state: str, bundle: Path, pictures: Path, tmp_path: Path
) -> None:
    prepare = "echo old > result; " + ("cat /dev/zero > fill 2> /dev/null" if state == "full" else "")
    if state == "read-only":
        prepare += 'mount -o remount,ro "$PWD"'
    start = (
        ["profile", bundle, "--seconds", "0.05", "-o"]
        if command == "profile"
        else ["run", bundle, "--source", pictures, "--output"]
    )
    outcome, names = in_mount(tmp_path, 64, prepare, *start, "disk/result")
    reason = "No space left on device" if state == "full" else "Read-only file system"
    # What was measured is shown all the same: the reader keeps the figures.
    figures = outcome.out if command == "profile" else ""
    assert ("latency p50" in figures) == (command == "profile")
    assert_refused(outcome, f"cannot be written: {reason}", "Free space or choose another place", out=figures)
    assert names == (["fill", "result"] if state == "full" else ["result"])
    assert open_hash_of_text("old\n") in (tmp_path / "after").read_text()


def open_hash_of_text(text: str) -> str:
    done = subprocess.run(["sha256sum"], input=text, capture_output=True, text=True, check=True)
    return done.stdout.split()[0]


@needs_mounts
def test_a_read_only_disk_refuses_a_folder(tiny_weights: Path, tmp_path: Path) -> None:
    outcome, names = in_mount(
        tmp_path, 64, 'mount -o remount,ro "$PWD"', "sparsify", TINY, "--weights", tiny_weights, "-o", "disk/a/b"
    )
    assert_refused(outcome, "disk/a/b cannot be written: Read-only file system")
    assert names == []


# Signals.


def wait_for(condition: Callable[[], object], run: subprocess.Popen[str]) -> bool:
    deadline = time.monotonic() + 120
    while run.poll() is None and time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.002)
    return False


def scratch_folders(target: Path) -> list[Path]:
    return [p for p in target.parent.iterdir() if p.name.startswith(".")]


def importing(pid: int) -> bool:
    """True as soon as torch is loaded: the command is at work."""
    return "libtorch_cpu" in Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.parametrize("moment", ["importing", "working", "writing"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["sparsify", "export"])
def test_a_signal_at_any_moment(
    command: str,
    number: signal.Signals,
    moment: str,
    tiny_student: Path,
    tiny_bundle: Path,
    tiny_weights: Path,
    tmp_path: Path,
) -> None:
    target = tmp_path / "target"
    shutil.copytree(tiny_student if command == "sparsify" else tiny_bundle, target)
    before = snapshot(target)
    start = ["sparsify", TINY, "--weights", str(tiny_weights)] if command == "sparsify" else ["export", tiny_student]
    with subprocess.Popen(
        [*PROGRAM, *map(str, start), "-o", str(target)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert wait_for(lambda: importing(run.pid), run)
        if moment == "writing":
            wait_for(lambda: scratch_folders(target), run)
        elif moment == "working":
            time.sleep(random.uniform(0.5, 3.5 if command == "sparsify" else 7))  # The moment is the point.
        run.send_signal(number)
        out, remarks = run.communicate(timeout=120)
    assert scratch_folders(target) == []
    assert "Traceback" not in remarks
    if run.returncode == 0:  # It was done before.
        assert "written" in out
        assert set(snapshot(target)) == set(before)
        assert command == "sparsify" or open_bundle(target)
    else:
        assert run.returncode == 128 + number, remarks
        # Before it, NumPy may say that its import was cut short.
        assert remarks.endswith("error: interrupted; nothing half-written was left.\n")
        assert out == ""
        assert snapshot(target) == before


def test_a_signal_while_folders_are_swapped_waits(tmp_path: Path, tiny_student: Path) -> None:
    """Swapped whole, then the signal is heard; with an earlier folder in place."""
    folder = Path(shutil.copytree(tiny_student, tmp_path / "student"))
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from sparsifiner_edge.artifacts import new_folder\n"
        "rename = Path.rename\n"
        "def slow(source, target):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    return rename(source, target)\n"
        "Path.rename = slow\n"
        "with new_folder(Path(sys.argv[1]), 'student') as folder:\n"
        "    (folder / 'new').write_text('new')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=False)
    assert "KeyboardInterrupt" in done.stderr
    assert snapshot(tmp_path) == {"student": None, "student/new": b"new"}


def test_nohup_is_respected(bundle: Path, pictures: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from sparsifiner_edge.cli.main import main\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "import sparsifiner_edge.camera.stills as stills\n"
        "run = stills.run_pictures\n"
        "stills.run_pictures = lambda *a: (os.kill(os.getpid(), signal.SIGHUP), run(*a))[1]\n"
        "main(['run', sys.argv[1], '--source', sys.argv[2]])"
    )
    done = subprocess.run([sys.executable, "-c", code, bundle, pictures], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
