"""What a model expects of pixels: declared, given or recorded, never guessed; and what its classes are called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import sparsifiner_edge as se
from sparsifiner_edge.artifacts import STUDENT_FILE
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.runtime import open_session
from tests.commands import assert_refused, call, manifest_of, process, snapshot
from tests.everything import first
from tests.hosts.factories import Segmenter, inside, outside, segmenter
from tests.hosts.hugging_face import PROCESSOR, SIXTEEN, saved, sharpen

HERE = "tests.hosts.factories"
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
GIVEN = ("--mean", "0.4,0.5,0.6", "--std", "0.2,0.25,0.3")
FOLDED = "folded in: mean 0.4, 0.5, 0.6, std 0.2, 0.25, 0.3, scale 1/255"
CHOICES = ("Declare both on the module", "--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225", "--no-normalise",
           "normalise=(mean, std)", "normalise=False")  # fmt: skip


def assert_answers(bundle: Path, module: nn.Module, mean: Any, std: Any) -> None:
    """The file's answers to pixels are the module's own to what its caller makes of them."""
    image = np.random.default_rng(0).integers(0, 256, (1, 160, 160, 3), dtype=np.uint8)
    x = ((torch.from_numpy(image).float() / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)
    with torch.no_grad():
        wanted = module(x)
    wanted = wanted.logits if hasattr(wanted, "logits") else wanted[0] if isinstance(wanted, tuple) else wanted
    with open_session(bundle) as session:
        (got, *_) = session.infer({"image": image}).values()
    assert np.abs(got - wanted.numpy()).max() < 1e-4 * float(wanted.max() - wanted.min())


@pytest.mark.parametrize(
    ("name", "make", "options", "pixels", "said"),
    first(
        [
            ("inside", inside, ["--no-normalise"], ((0,) * 3, (1,) * 3), "no normalisation: the module does it itself"),
            ("outside", outside, GIVEN, (MEAN, STD), FOLDED),
            ("segmenter", segmenter, [], (Segmenter.image_mean, Segmenter.image_std), "folded in: mean 0.485, 0.456,"),
        ]
    ),
)
def test_a_users_module_answers_as_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, make: Any, options: Any, pixels: Any, said: str
) -> None:
    dense, student, bundle, live = (tmp_path / part for part in ("dense", "student", "bundle", "live"))
    done = call(capsys, "export", f"{HERE}:{name}", *options, "-o", dense)
    assert said in done.out, done
    done = call(capsys, "sparsify", f"{HERE}:{name}", "--keep", "1", *options, "-o", student)
    assert said in done.out, done
    assert f"export {student} --trust {HERE} " in done.out
    assert call(capsys, "export", student, "--trust", HERE, "-o", bundle).code == 0
    given = None if not options else False if name == "inside" else pixels
    se.export_model(make(), torch.zeros(1, 3, 160, 160), live, normalise=given)
    for folder in (dense, bundle, live):
        assert_answers(folder, make(), *pixels)
        folded = manifest_of(folder)["preprocessing"]["folded"]
        assert folded == {"mean": list(pixels[0]), "std": list(pixels[1]), "scale": "1/255"}
    assert json.loads((student / STUDENT_FILE).read_text())["normalisation"] == folded


def test_a_classifier_of_hugging_face_answers_as_itself_and_keeps_its_labels(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {0: "car", 1: "red\x1b[31m bus", 2: "<b>cat</b>"}
    torch.manual_seed(0)
    made = transformers.ViTForImageClassification(transformers.ViTConfig(**SIXTEEN, id2label=names)).eval()
    sharpen(made)
    folder = saved(made, tmp_path / "vit")
    student, bundle, dense, live = (tmp_path / part for part in ("student", "bundle", "dense", "live"))
    assert "mean 0.5, 0.4, 0.3" in call(capsys, "sparsify", folder, "--keep", "1", "-o", student).out
    assert json.loads((student / STUDENT_FILE).read_text())["labels"] == list(names.values())
    assert call(capsys, "export", student, "-o", bundle).code == 0
    assert call(capsys, "export", folder, "-o", dense).code == 0
    pixels = PROCESSOR["image_mean"], PROCESSOR["image_std"]
    se.export_model(made, torch.zeros(1, 3, 160, 160), live, normalise=pixels)
    shown = ["car", r"red\x1b[31m bus", "<b>cat</b>"]
    for made_of in (bundle, dense, live):
        assert_answers(made_of, made, *pixels)
        assert open_bundle(made_of).labels() == shown
        assert "labels.txt" in manifest_of(made_of)["files"]
    done = process("run", bundle, "--source", pictures, "--top", "3")
    assert done.code == 0, done
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert {found["label"] for line in lines for found in line["top"]} == set(shown)


def test_numbers_of_classes_are_no_names(tmp_path: Path) -> None:
    made = transformers.ViTForImageClassification(transformers.ViTConfig(**SIXTEEN, num_labels=3)).eval()
    bundle = se.export_bundle(str(saved(made, tmp_path / "vit")), tmp_path / "bundle")
    assert open_bundle(bundle).labels() == []
    made.config.id2label = {0: "a", 7: "b", 8: "c"}
    with pytest.raises(ConfigError, match=r"names the classes \[0, 7, 8\], not 0 to 2"):
        se.export_model(made, torch.zeros(1, 3, 160, 160), tmp_path / "b", normalise=False)


def test_what_declares_nothing_is_refused(
    tmp_path: Path, pictures: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = f"{HERE}:inside does not say what its module"
    for command in ("sparsify", "export"):
        assert_refused(call(capsys, command, f"{HERE}:inside", "-o", tmp_path / "out"), said, *CHOICES)
    done = call(capsys, "evaluate", tiny_bundle, "--against", f"{HERE}:inside", "--data", pictures)
    assert_refused(done, said, *CHOICES)
    assert not snapshot(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sparsify", f"{HERE}:inside", "--mean", "0,0,0"], "Give --mean and --std, or --no-normalise alone"),
        (["export", f"{HERE}:inside", "--mean", "0,0,nan", "--std", "1,1,1"], "mean is ['0', '0', 'nan']"),
        (["export", f"{HERE}:inside", "--mean", "0,0,0", "--std", "1,0,1"], "std is ['1', '0', '1']"),
        (["export", f"{HERE}:segmenter", *GIVEN], f"{HERE}:segmenter declares mean 0.485, 0.456, 0.406"),
        (["export", "STUDENT", "--no-normalise"], "a student or bundle has its own"),
    ],
)
def test_contradictions_are_refused(
    tmp_path: Path, tiny_student: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    words = [str(tiny_student) if word == "STUDENT" else word for word in arguments]
    assert_refused(call(capsys, *words, "-o", tmp_path / "out"), said)
    assert not snapshot(tmp_path)


@pytest.mark.parametrize(
    ("normalise", "said"),
    [(None, "This Inside does not say"), (0.5, "normalise is 0.5"), ((MEAN,), "normalise is ((0.4, 0.5, 0.6),)")],
)
def test_a_live_module_that_declares_nothing_is_refused(tmp_path: Path, normalise: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        se.export_model(inside(), torch.zeros(1, 3, 160, 160), tmp_path / "bundle", normalise=normalise)
    assert said in str(caught.value)
    assert not snapshot(tmp_path)


def test_a_teacher_of_the_same_function_expects_what_its_student_does(tmp_path: Path, pictures: Path) -> None:
    student = se.sparsify(f"{HERE}:inside", tmp_path / "s", keep=0.5, channels=8, cells=4, normalise=False)
    out, few = tmp_path / "better", ("distil.steps=1", "reconstruct.steps=1", "images.held_out=1")
    se.distill_student(student, pictures, out, teacher=f"{HERE}:inside", trust=[HERE], overrides=few)
    assert json.loads((out / STUDENT_FILE).read_text())["normalisation"]["std"] == [1, 1, 1]
    with pytest.raises(ConfigError, match=r"declares mean 0\.485"):
        se.distill_student(student, pictures, out, teacher=f"{HERE}:segmenter", trust=[HERE], overrides=few)
