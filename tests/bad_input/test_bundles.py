"""Bundles that were changed or damaged, and manifests that speak of no model. Those changed at random: tests.fuzz."""

from __future__ import annotations

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
from tests.bad_input.conftest import edit_json, flip
from tests.commands import assert_refused, call, process
from tests.package.reseal import reseal
from tests.plain import estimate_bundle
from tests.tiny import make_bundle

Capsys = pytest.CaptureFixture[str]
Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.pop("schema_version"), "has no schema_version"),
        (lambda m: m.update(schema_version=2), "schema 2; this version reads 3 alone"),
        (lambda m: m.update(kind="student"), "is not a bundle's manifest"),
        (lambda m: m["files"].pop("model.onnx"), "is not a bundle's manifest"),
        (lambda m: m["files"].update({"model.onnx": None}), "an entry of files is not str"),
        (lambda m: m["preprocessing"].update(resize="stretch"), "preprocessing.resize is"),
        (lambda m: m.update(preprocessing={"size": 5}), "takes image (uint8 [batch, 4, 4, 3])"),
        (lambda m: m.update(preprocessing={"size": [4, 0]}), "preprocessing.size[1] is 0"),
    ],
)
def test_a_bundle_with_another_manifest(change: Change, said: str, bundle: Path, pictures: Path, capsys: Any) -> None:
    edit_json(bundle / BUNDLE_FILE, change)
    assert_refused(call(capsys, "run", bundle, "--source", pictures), said)


def drop_outputs(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    model.graph.output[0].name = model.graph.node[-1].output[0] = "other"
    onnx.save(model, folder / "model.onnx")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda b: (b / BUNDLE_FILE).unlink(), "manifest.json does not exist"),
        (lambda b: flip(b / "model.onnx"), "model.onnx does not match its SHA-256"),
        (lambda b: (b / "model.onnx").unlink(), "model.onnx is missing"),
        (lambda b: (os.truncate(b / "model.onnx", 400), reseal(b)), "model.onnx is not an ONNX file"),
        (lambda b: (drop_outputs(b), reseal(b)), "gives other; needed are logits, features"),
        (lambda b: (shutil.rmtree(b), b.write_text("x")), "is not a folder"),
    ],
)
def test_a_damaged_bundle(
    damage: Callable[[Path], object], said: str, bundle: Path, pictures: Path, capsys: Capsys
) -> None:
    damage(bundle)
    assert_refused(call(capsys, "run", bundle, "--source", pictures), said)
    if "needed are" not in said:
        assert_refused(call(capsys, "evaluate", bundle, "--against", bundle, "--data", pictures))


@pytest.mark.parametrize("entry", ["check", "retiled", "quantisation", "float16"])
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
    (bundle / BUNDLE_FILE).unlink()
    make(bundle / BUNDLE_FILE)
    outcome = process("package", bundle, "--for", "triton", "-o", bundle.parent / "out", timeout=60)
    assert_refused(outcome, "manifest.json", said)
    assert not (bundle.parent / "out").exists()


def test_what_is_no_teacher_or_takes_other_batches_or_sizes(
    tmp_path: Path, bundle: Path, tiny_student: Path, pictures: Path, capsys: Capsys
) -> None:
    four = make_bundle(tmp_path / "four", batch=4, preprocessing={"size": 4})
    assert_refused(call(capsys, "run", four, "--source", pictures), "takes batches of 4", "--batch 1 or dynamic")
    for teacher, said in (("resnet18", "resnet18"), ("nowhere/", "nowhere"), (bundle, "takes 160 px, the teacher 4")):
        outcome = call(capsys, "evaluate", tiny_student, "--data", pictures, "--against", teacher)
        assert_refused(outcome, said)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update(inputs=3), "inputs is 3, not list"),
        (lambda m: m["inputs"][0].update(shape={"0": 1}), 'inputs[0].shape is {"0": 1}, not list'),
        (lambda m: m["inputs"][0].update(shape=[2**40]), "an input's shape is"),
        (lambda m: m.update(ops=[]), "names no operators for its sparse layers"),
        (lambda m: m["shape"].update(depth=10**300), "shape.depth is 1000000"),
        (lambda m: m["inputs"][0].update(shape=[-1, 160, 160, 3]), "inputs[0].shape[0] is -1, not int >= 1"),
        (lambda m: m.update(more=float("inf")), "more is inf"),
    ],
)
def test_a_manifest_of_no_model(change: Change, said: str, counted: Path, tmp_path: Path, capsys: Capsys) -> None:
    assert estimate_bundle(counted, "t4", precision="fp16")["statistics"]["latency_ms"]["value"] > 0
    edit_json(counted / BUNDLE_FILE, change)
    outcome = call(capsys, "estimate", counted, "--board", "t4", "--precision", "fp16", "-o", tmp_path / "e.json")
    assert_refused(outcome, said)
    assert not (tmp_path / "e.json").exists()
