"""Students that were changed or damaged, and exports that cannot be."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsifiner_edge.artifacts import STUDENT_FILE, WEIGHTS_FILE
from sparsifiner_edge.bundle.store import LABELS_FILE, open_bundle
from sparsifiner_edge.export.export import export_bundle
from sparsifiner_edge.runtime.verify import verify_bundle
from tests.bad_input.damage import edit_json, flip
from tests.commands import assert_refused, call
from tests.models import TINY

Capsys = pytest.CaptureFixture[str]


def export_refused(capsys: Capsys, student: Path, target: Path, *texts: str) -> None:
    assert_refused(call(capsys, "export", student, "-o", target), *texts)
    assert not target.exists()
    assert [p.name for p in target.parent.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        (lambda c: c.pop("schema_version"), ["has no schema_version"]),
        (lambda c: c.update(schema_version="1"), ["has no schema_version"]),
        (lambda c: c.update(schema_version=1), ["schema 1; this version reads 2 alone", "sparsifiner-edge sparsify"]),
        (lambda c: c.update(schema_version=3), ["schema 3; this version reads 2 alone"]),
        (lambda c: c.update(kind="bundle"), ["is not a student"]),
        (lambda c: c.pop("model"), ["model is missing"]),
        (lambda c: c.update(model="resnet18"), ["is a ResNet"]),
        (lambda c: c.update(model="test_vit3"), ["does not fit this model"]),
        (lambda c: c.update(img_size="160"), ['img_size is "160", not int']),
        (lambda c: c.update(img_size=-16), ["image size -16"]),
        (lambda c: c.update(img_size=[96, "160"]), ['img_size[1] is "160", not int']),
        (lambda c: c.update(img_size=[96, -160]), ["image width -160 is not a multiple", "Use 96x16"]),
        (lambda c: c.update(img_size=[96, 64_000]), ["image size 96x64000 is too large"]),
        (lambda c: c.update(num_classes=11), ["head.bias has shape [10]"]),
        (lambda c: c.update(sparsity=None), ["sparsity: it is null, not dict"]),
        (lambda c: c["sparsity"].update(temperature=2), ["unknown sparsity field ['temperature']", "Known fields"]),
        (lambda c: c["sparsity"].update(keep=float("nan")), ["keep is nan"]),
        (lambda c: c["sparsity"].update(dense_layers=[1]), ["unknown sparsity field"]),
        (lambda c: c["sparsity"].update(tile=16.0), ["tile is 16.0, not int"]),
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
        (lambda s: (s / STUDENT_FILE).write_text('{"schema_version": 2,'), ["config.json cannot be read"]),
        (lambda s: (s / STUDENT_FILE).write_text("[" * 100_000), ["config.json cannot be read"]),
        (lambda s: (s / STUDENT_FILE).write_bytes(b"\xff\xfe\x00"), ["config.json cannot be read"]),
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


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["--batch", "0"], ["batch is '0'", "from 1 to", "dynamic"]),
        (["--batch", "abc"], ["batch is 'abc'"]),
        (["--batch", "²"], ["batch is '²'"]),
        (["--batch", "9" * 5000], ["batch is '99"]),
        (["--precision", "int3"], ["--precision", "'int3'"]),
        (["--img-size", "100"], ["100 is not a multiple of the patch size 16"]),
        (["--img-size", "96", "100"], ["image width 100 is not a multiple of the patch size 16"]),
        (["--weights", "w.safetensors"], ["--weights cannot be combined with a student"]),
    ],
)
def test_exports_that_cannot_be(
    arguments: list[str], texts: list[str], tiny_student: Path, tmp_path: Path, capsys: Capsys
) -> None:
    assert_refused(call(capsys, "export", tiny_student, "-o", tmp_path / "bundle", *arguments), *texts)
    assert list(tmp_path.iterdir()) == []


def test_labels_are_one_line_each_in_a_bundle(student: Path, tmp_path: Path) -> None:
    labels = ["two\nlines", "a\rb", "\x1b[31m", "\u202eback", "\u2028", "plain", "é", " ", "\x85", "x" * 900]
    edit_json(student / STUDENT_FILE, lambda c: c.update(labels=labels))
    folder = export_bundle(student, tmp_path / "bundle")
    assert verify_bundle(folder).passed
    written = (folder / LABELS_FILE).read_text(encoding="utf-8").split("\n")
    assert written[:3] == ["two\\x0alines", "a\\x0db", "\\x1b[31m"]
    assert written[10:] == [""]
    assert open_bundle(folder).labels() == written[:10]


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
