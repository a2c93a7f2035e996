"""Bundles that were changed or damaged."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from sparsifiner_edge.artifacts import BUNDLE_FILE
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.errors import ArtifactError
from tests.bad_input.damage import edit_json, flip
from tests.commands import assert_refused, call, process
from tests.seal import seal_bundle
from tests.tiny import make_bundle

Capsys = pytest.CaptureFixture[str]


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
        (lambda m: m.update(schema_version=2), ["schema 2; this version reads 3 alone", "sparsifiner-edge export"]),
        (lambda m: m.update(kind="student"), ["is not a bundle's manifest", "Export the bundle again"]),
        (lambda m: m.pop("files"), ["is not a bundle's manifest"]),
        (lambda m: m["files"].pop("model.onnx"), ["is not a bundle's manifest"]),
        (lambda m: m["files"].update({"model.onnx": None}), ["an entry of files is not str"]),
        (lambda m: m["files"].update({"gone.bin": "0"}), ["gone.bin is missing"]),
        (lambda m: m["files"].update({"x" * 300: "0"}), ["File name too long"]),
        (lambda m: m.pop("preprocessing"), ["preprocessing is missing"]),
        (lambda m: m.update(preprocessing={"size": "4"}), ['preprocessing.size is "4", not int']),
        (
            lambda m: m.update(preprocessing={"size": 5}),
            ["takes image (uint8 [batch, 4, 4, 3])", "[B, 5, 5, 3] is needed"],
        ),
        (lambda m: m.update(preprocessing={"size": [4, 0]}), ["preprocessing.size[1] is 0"]),
        (
            lambda m: m.update(preprocessing={"size": 4, "resize": "centre rectangle, bicubic"}),
            ["preprocessing.resize is 'centre rectangle, bicubic'; known is centre square"],
        ),
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
        (lambda b: (b / BUNDLE_FILE).write_text("{"), ["manifest.json cannot be read", "Export the bundle again"]),
        (lambda b: (b / BUNDLE_FILE).unlink(), ["manifest.json does not exist"]),
        (lambda b: flip(b / "model.onnx"), ["model.onnx does not match its SHA-256"]),
        (lambda b: (b / "model.onnx").unlink(), ["model.onnx is missing"]),
        (
            lambda b: (os.truncate(b / "model.onnx", 400), reseal(b)),
            ["model.onnx is not an ONNX file", "Export the bundle"],
        ),
        (lambda b: ((b / "model.onnx").write_bytes(b""), reseal(b)), ["ONNX Runtime rejects"]),
        (lambda b: (drop_outputs(b), reseal(b)), ["gives other; needed are logits, features"]),
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


@pytest.mark.parametrize("entry", ["check", "retiled", "measured", "quantisation", "float16"])
def test_what_is_for_people_may_lack_anything_and_hold_more(entry: str, tmp_path: Path) -> None:
    more = {entry: {"of a fork": [None]}, "boards": [{}], "provenance": {"teacher": {"x": 1}}}
    manifest = open_bundle(make_bundle(tmp_path / "b", preprocessing={"size": 4}, **more)).manifest
    assert getattr(manifest, entry) is not None
    assert (manifest.boards[0].launches, manifest.provenance) == (0, {"teacher": {"x": 1}})
    with pytest.raises(ArtifactError, match=f"{entry} is 5, not dict"):
        open_bundle(make_bundle(tmp_path / "c", **{entry: 5}))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (os.mkfifo, "is not a regular file"),
        (lambda path: path.symlink_to("/dev/null"), "outside itself"),
        (lambda path: path.symlink_to(path), "cannot be read: Symlink loop"),
        (lambda path: (path.touch(), os.truncate(path, (1 << 26) + 1)), "has more than 67108864 bytes"),
        (lambda path: path.write_text('{"schema_version": ' + "1" * 5000 + "}"), "cannot be read"),
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
    tiny_bundle: Path, tmp_path: Path, pictures: Path
) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "b"))
    (folder / "labels.txt").write_bytes(b"only one \xff\n")
    reseal(folder)
    outcome = process("run", folder, "--source", pictures / "picture0.png")
    assert outcome.code == 0
    assert json.loads(outcome.out)["top"][0]["label"].startswith("class_")
    edit_json(folder / BUNDLE_FILE, lambda m: m["files"].pop("labels.txt"))
    (folder / "labels.txt").write_text("cat\n" * 10)
    assert "cat" not in process("run", folder, "--source", pictures / "picture0.png").out


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
