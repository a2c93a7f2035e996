"""Tests of changed or damaged bundles and sparse models, and of other files. Random changes: tests.fuzz."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import safetensors.torch
import torch

from sparsifiner_edge.artifacts import BUNDLE_FILE, STUDENT_FILE, WEIGHTS_FILE, sha256
from sparsifiner_edge.bundle.store import LABELS_FILE, open_bundle
from sparsifiner_edge.distill import checkpoint
from sparsifiner_edge.distill.checkpoint import TrainingState
from sparsifiner_edge.distill.data import folder_source
from sparsifiner_edge.distill.recipe import read_recipe
from sparsifiner_edge.distill.train import Training, make_accelerator
from sparsifiner_edge.errors import ArtifactError, SparsifinerError
from sparsifiner_edge.sparse.student import dense_twin
from tests.commands import assert_refused, call, process, snapshot
from tests.flat import distill_student, export_bundle, load_student, verify_bundle
from tests.fuzz.mutate import json_text
from tests.made import SHORT, make
from tests.models import TINY
from tests.once import Once
from tests.seal import flip, reseal
from tests.tiny import make_bundle

Capsys = pytest.CaptureFixture[str]
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def student(tmp_path: Path, tiny_student: Path) -> Path:
    return Path(shutil.copytree(tiny_student, tmp_path / "student"))


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.pop("schema_version"), "has no schema_version"),
        (lambda m: m.update(schema_version=3), "schema 3; this version reads only 4"),
        (lambda m: m.update(kind="student"), "is not a bundle's manifest"),
        (lambda m: m["files"].pop("model.onnx"), "is not a bundle's manifest"),
        (lambda m: m["preprocessing"].update(fit="pad"), "preprocessing.fit is"),
        (lambda m: m.update(preprocessing={"size": 5}), "takes image (uint8 [batch, 4, 4, 3])"),
        (lambda m: m.update(preprocessing={"size": [4, 0]}), "preprocessing.size[1] is 0"),
        (lambda m: m["inputs"][0].update(shape={"0": 1}), 'inputs[0].shape is {"0": 1}, not list'),
        (lambda m: m["inputs"][0].update(shape=[-1, 4, 4, 3]), "inputs[0].shape[0] is -1, not int >= 1"),
        (lambda m: m["shape"].update(depth=10**300), "shape.depth is 1000000"),
        (lambda m: m.update(more=float("inf")), "more is inf"),
        (lambda m: m.update(intended={"backend": "os:system\n"}), "intended.backend is"),
        (
            lambda m: m.update(intended={"backend": "openvino", "compute_precision": "int1"}),
            "intended.compute_precision is",
        ),
        (lambda m: m.update(intended={"compute_precision": "bf16"}), "intended.backend is missing"),
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
        (lambda b: (b / BUNDLE_FILE).unlink(), "is not a bundle"),
        (lambda b: flip(b / "model.onnx"), "model.onnx does not match its SHA-256"),
        (lambda b: (b / "model.onnx").unlink(), "model.onnx is missing"),
        (lambda b: (os.truncate(b / "model.onnx", 400), reseal(b)), "model.onnx is not an ONNX file"),
        (lambda b: (drop_outputs(b), reseal(b)), "outputs other; logits, features or a dense map are needed"),
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
        (lambda path: path.symlink_to("/dev/null"), "outside the bundle"),
        (lambda path: path.symlink_to(path), "cannot be read: Symlink loop"),
        (lambda path: (path.touch(), os.truncate(path, (1 << 26) + 1)), "has more than 67108864 bytes"),
        (lambda path: path.write_text('{"schema_version": ' + "1" * 5000 + "}"), "cannot be read"),
    ],
)
def test_a_manifest_that_would_never_end(make: Callable[[Path], object], said: str, bundle: Path) -> None:
    """Runs in a separate process, since a reader of a pipe waits."""
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


def export_refused(capsys: Capsys, student: Path, target: Path, *texts: str) -> None:
    assert_refused(call(capsys, "export", student, "-o", target), *texts)
    assert not target.exists()
    assert [p.name for p in target.parent.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(schema_version=2), "schema 2; this version reads only 3"),
        (lambda c: c.update(model="resnet18"), "is a ResNet"),
        (lambda c: c.update(model="vit_giant_patch14_dinov2.lvd142m"), "not a multiple of the patch size 14"),
        (lambda c: c.update(img_size=16 * 2**60), "image size 18446744073709551616 is too large"),
        (lambda c: c.update(num_classes=11), "head.bias has shape [10]"),
        (lambda c: c.update(labels=["a"] * 9 + ["\ud800"]), "labels[9] is"),
        (lambda c: c["sparsity"].update(dense_layers=[1]), "sparsity: unknown key dense_layers"),
        (lambda c: c["provenance"].update(x=json.loads("[" * 200 + "]" * 200)), "nested deeper than 64 levels"),
        (lambda c: c.update(weights_sha256=None), "model.safetensors does not match its SHA-256"),
    ],
)
def test_a_student_with_other_settings(change: Change, said: str, student: Path) -> None:
    edit_json(student / STUDENT_FILE, change)
    with pytest.raises(SparsifinerError) as caught:
        load_student(student)
    assert said in caught.value.what
    assert caught.value.fix


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda s: (s / STUDENT_FILE).write_text("[" * 100_000), "config.json cannot be read"),
        (lambda s: (s / STUDENT_FILE).unlink(), "is neither a student"),
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
    export_refused(capsys, tiny_bundle, target, "is a bundle, not a student", "Give the student folder")
    export_refused(capsys, tmp_path / "nowhere", target, "nowhere does not exist", "docs/models.md")


@pytest.mark.everything
def test_selecting_more_keys_than_a_runtime_takes(tmp_path: Path, tiny_weights: Path, capsys: Capsys) -> None:
    student = tmp_path / "student"
    settings = ["--img-size", 1024, "--keep", "0.99"]
    assert call(capsys, "sparsify", TINY, "--weights", tiny_weights, *settings, "-o", student).code == 0
    export_refused(capsys, student, tmp_path / "bundle", "reads 4056 keys per tile", "3840", "smaller --keep")


NORM = "student/norm.weight"


@pytest.fixture(scope="module")
def begun(once: Once) -> Path:
    """Folder with a sparse model `start`, images `data`, and an interrupted training of `out`."""
    return once("begun", lambda folder: make(folder, ("training",)))


@pytest.fixture(scope="module")
def training(begun: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """The training that would resume it."""
    plan, found = read_recipe("cpu", SHORT), load_student(begun / "start")
    source, work = folder_source(begun / "data", 2, False, None), tmp_path_factory.mktemp("work")
    return Training(make_accelerator(plan), found, dense_twin(found), source, plan, work)


@pytest.fixture
def saved(begun: Path) -> tuple[TrainingState, dict[str, torch.Tensor]]:
    """The saved checkpoint, loaded anew for each test."""
    return checkpoint.load(begun / "out.training")


def test_a_training_goes_on_wherever_its_folders_lie(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = Path(shutil.copytree(begun, tmp_path / "elsewhere"))
    monkeypatch.chdir(tmp_path)
    summary = distill_student(moved / "start", "elsewhere/data", moved / "out", overrides=SHORT, resume=True)
    assert summary.steps == 6


FOREIGN = "does not belong to this training"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s, _: setattr(s, "step", 99), "steps do not belong to this training"),
        (lambda s, _: setattr(s, "start", None), "steps do not belong to this training"),
        (lambda s, _: s.fingerprint.update(seed=7), "differs in seed: it began with 7, now it is 0"),
        (lambda _, t: t.pop("best/norm.weight"), f"'best/norm.weight' {FOREIGN}"),
        (lambda _, t: t.update({NORM: torch.zeros(3)}), f"{NORM!r} {FOREIGN}"),
        (lambda _, t: t[NORM].fill_(torch.inf), f"{NORM!r} {FOREIGN}"),
        (lambda _, t: t["optimiser/0/exp_avg_sq"].fill_(torch.nan), FOREIGN),
    ],
)
def test_a_checkpoint_of_something_else(
    change: Callable[[TrainingState, dict[str, torch.Tensor]], object],
    text: str,
    saved: tuple[TrainingState, dict[str, torch.Tensor]],
    training: Training,
) -> None:
    change(*saved)
    with pytest.raises(SparsifinerError) as caught:
        training.restore(*saved)
    assert text in caught.value.what


def test_of_a_history_what_is_one_stays(tmp_path: Path) -> None:
    path = tmp_path / checkpoint.HISTORY
    checkpoint.append_history(tmp_path, 1, loss=0.5, logits=float("nan"))
    lines = ["", "x", "[]", "null", "{}", '{"step": "1"}', '{"step": true}', '{"step": 9}', "[" * 100_000, "9" * 5000]
    lines += ['{"step": 1, "loss": NaN}', '{"step": 1e999}', '{"step": 1']
    with path.open("ab") as file:
        file.write("\n".join(lines).encode() + b"\n\xff\xfe\x00\n" + json_text({"step": 10**5000}))
    checkpoint.cut_history(tmp_path, 5)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert kept == [{"step": 1, "loss": 0.5, "logits": None}]


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, TrainingState(), {"x": torch.zeros(10)})
    before, limits = snapshot(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # The effect of a full disk, without one.
    try:
        with pytest.raises(ArtifactError, match=r"checkpoint\.safetensors cannot be written: .*File too"):
            checkpoint.save(tmp_path, TrainingState(), {"x": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert snapshot(tmp_path) == before
