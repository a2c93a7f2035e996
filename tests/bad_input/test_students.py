"""Students that were changed or damaged, and what is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from sparsifiner_edge.artifacts import STUDENT_FILE, WEIGHTS_FILE, sha256
from sparsifiner_edge.bundle.store import LABELS_FILE, open_bundle
from sparsifiner_edge.errors import SparsifinerError
from sparsifiner_edge.export.export import export_bundle
from sparsifiner_edge.runtime.verify import verify_bundle
from sparsifiner_edge.sparse.student import load_student
from tests.bad_input.conftest import edit_json, flip
from tests.commands import assert_refused, call
from tests.models import TINY

Capsys = pytest.CaptureFixture[str]


def export_refused(capsys: Capsys, student: Path, target: Path, *texts: str) -> None:
    assert_refused(call(capsys, "export", student, "-o", target), *texts)
    assert not target.exists()
    assert [p.name for p in target.parent.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(schema_version="1"), "has no schema_version"),
        (lambda c: c.update(schema_version=1), "schema 1; this version reads 2 alone"),
        (lambda c: c.pop("model"), "model is missing"),
        (lambda c: c.update(model="resnet18"), "is a ResNet"),
        (lambda c: c.update(model="vit_giant_patch14_dinov2.lvd142m"), "not a multiple of the patch size 14"),
        (lambda c: c.update(img_size=16 * 2**60), "image size 18446744073709551616 is too large"),
        (lambda c: c.update(num_classes=11), "head.bias has shape [10]"),
        (lambda c: c.update(labels=["a"] * 9 + ["\ud800"]), "labels[9] is"),
        (lambda c: c.update(labels=["a"]), "names 1 labels for 10 classes"),
        (lambda c: c["sparsity"].update(dense_layers=[1]), "sparsity: unknown key dense_layers"),
        (lambda c: c["provenance"].update(x=json.loads("[" * 200 + "]" * 200)), "nested deeper than 64 levels"),
        (lambda c: c.update(weights_sha256=None), "model.safetensors does not match its SHA-256"),
    ],
)
def test_a_student_with_other_settings(change: Callable[[dict[str, Any]], object], said: str, student: Path) -> None:
    edit_json(student / STUDENT_FILE, change)
    with pytest.raises(SparsifinerError) as caught:
        load_student(student)
    assert said in caught.value.what
    assert caught.value.fix


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda s: (s / STUDENT_FILE).write_text("[" * 100_000), "config.json cannot be read"),
        (lambda s: (s / STUDENT_FILE).unlink(), "is not a student"),
        (lambda s: (s / WEIGHTS_FILE).unlink(), "model.safetensors does not exist"),
        (lambda s: flip(s / WEIGHTS_FILE), "model.safetensors does not match its SHA-256"),
    ],
)
def test_a_damaged_student(
    damage: Callable[[Path], object], said: str, student: Path, tmp_path: Path, capsys: Capsys
) -> None:
    damage(student)
    export_refused(capsys, student, tmp_path / "bundle", said)


@pytest.mark.parametrize("kind", [torch.float8_e5m2, torch.int32, torch.complex64, torch.bool])
def test_weights_of_another_kind(kind: torch.dtype, student: Path) -> None:
    state = safetensors.torch.load_file(student / WEIGHTS_FILE)
    state["norm.weight"] = torch.full_like(state["norm.weight"], torch.nan).to(kind)
    safetensors.torch.save_file(state, student / WEIGHTS_FILE)
    edit_json(student / STUDENT_FILE, lambda c: c.update(weights_sha256=sha256(student / WEIGHTS_FILE)))
    with pytest.raises(SparsifinerError, match=r"norm\.weight (is|holds)"):
        load_student(student)


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


def test_selecting_more_keys_than_a_runtime_takes(tmp_path: Path, tiny_weights: Path, capsys: Capsys) -> None:
    student = tmp_path / "student"
    settings = ["--img-size", 1024, "--keep", "0.99"]
    assert call(capsys, "sparsify", TINY, "--weights", tiny_weights, *settings, "-o", student).code == 0
    export_refused(capsys, student, tmp_path / "bundle", "reads 4056 keys per tile", "3840", "smaller --keep")
