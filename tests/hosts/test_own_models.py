"""Tests of a user's own module, in the folder of its file: the complete workflow, the user's own call, and mistakes."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparsifiner_edge.export import export
from tests import commands
from tests.commands import assert_refused, call, process, snapshot

MODULE = """
import timm, torch

class Segmenter(torch.nn.Module):
    output_names = ("mask",)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = timm.create_model("test_vit", num_classes=0, dynamic_img_size=False)
        self.head = torch.nn.Conv2d(64, 1, 1)

    def forward(self, pixels):
        pixels = (pixels - 0.4) / 0.3
        return self.head(self.encoder.forward_intermediates(pixels, indices=1, intermediates_only=True)[0])

def segmenter():
    return Segmenter().eval()

def of_classes(classes):
    return segmenter()

def sized(img_size):
    return segmenter()

def predict(image):
    return segmenter()(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)

def bgr(image):
    return {"mask": predict(image[..., ::-1].copy())[0].numpy()}

def cut(image):
    return predict(image)[0, 0, :5]
"""
PLAIN, IMAGENET = "mymodels:segmenter --no-normalise", "--mean .485,.456,.406 --std .229,.224,.225"
EXPORT = "--data images -o out --check mymodels"


@pytest.fixture
def place(
    tmp_path: Path, pictures: Path, tiny_student: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    for name, origin in {"images": pictures, "student": tiny_student, "bundle": tiny_bundle}.items():
        shutil.copytree(origin, tmp_path / name)
    (tmp_path / "mymodels.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    yield tmp_path
    sys.path[:] = before
    for name in ("mymodels", "broken"):
        sys.modules.pop(name, None)


def test_the_whole_way_as_printed(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uses the installed script: `python -m` would find the module anyway."""
    monkeypatch.setattr(commands, "PROGRAM", [Path(sys.executable).with_name("sparsifiner-edge")])
    done = process(*f"sparsify {PLAIN} -o own --calibrate images".split())
    assert "no normalisation: the module normalises" in done.out, done
    (words,) = re.findall("Next: sparsifiner-edge (.* --trust mymodels) -o BUNDLE/", done.out)
    failed = call(capsys, *words.split(), *EXPORT.split()[:-1], "mymodels:bgr")
    assert (failed.code, "mask of the dense model" in failed.err, "given BGR" in failed.err) == (1, True, True), failed
    assert not (place / "out").exists()
    done = process(*words.split(), *f"{EXPORT}:predict".split())
    assert re.search(
        r"predict on 3 images; mask of the dense model differs by \S+ of its range .* least cosine", done.out
    ), done
    assert process("run", "out", "--source", "images").out.count('"mask"') == 3
    assert f"sparsifiner-edge {words} -o BUNDLE/" in process("run", words.split()[1], "--source", "images").err
    content = json.loads((place / "own" / "config.json").read_text())
    content["provenance"]["training"] = {}
    (place / "own" / "config.json").write_text(json.dumps(content))
    monkeypatch.setattr(export, "float_file", pytest.fail)
    trained = call(capsys, *words.split(), "-o", "new", *["--data", "images", "--check", "mymodels:predict"])
    assert_refused(trained, "A trained sparse model cannot be checked")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (f"export mymodels:segmenter {IMAGENET} {EXPORT}:predict", "is given pixels from 0 to 1, it agrees"),
        (f"export {PLAIN} {EXPORT}:bgr", "mask of the file"),
        (f"export {PLAIN} {EXPORT}:cut", "mymodels:cut returns mask [5, 10], the file mask [1, 1, 10, 10]"),
        (f"export {PLAIN} {EXPORT}:of_classes", "mymodels:of_classes failed: RuntimeError: Could not"),
        (f"export {PLAIN} --check mymodels:predict -o out", "Give both: --check module:function --data"),
        ("sparsify mymodls:segmenter -o out", "'mymodls' in PLACE. Did you mean mymodels?"),
        ("sparsify mymodels:segmentr -o out", "mymodels (PLACE/mymodels.py) has no 'segmentr'. Did you mean segmenter"),
        ("sparsify mymodels:of_classes -o out", "mymodels:of_classes requires the arguments: classes."),
        ("sparsify mymodels:sized --like images/picture0.png -o out", "Give --img-size (--like requires a default)"),
        ("sparsify broken:model -o out", "broken cannot be imported: ModuleNotFoundError: No module named 'nothing_of"),
        ("sparsify mymodels.py -o out", "mymodels.py is a file, not a model."),
        ("sparsify student -o out", "student is a student, not a model."),
        ("export ../nothere/ -o out", "../nothere/ does not exist."),
        ("export nothere -o out", "timm has no model 'nothere', and no folder has that name."),
        ("export vit_small_patch14_dinov2.lvd142 -o out", "Did you mean vit_small_patch14_dinov2.lvd142m"),
        ("run student --source images", "is a student, not a bundle. Export it: sparsifiner-edge export student"),
        ("run bundle/model.onnx --source images", "is not a folder. Give its folder: bundle"),
        ("distill bundle --data images -o out", "bundle is a bundle, not a student."),
        ("evaluate images --data images", "images is not a student or bundle."),
    ],
)
def test_slips(line: str, said: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, outcome = snapshot(place), call(capsys, *line.split())
    assert outcome.code == (1 if "Answers differ" in outcome.err else 2)
    assert_refused(outcome._replace(code=2), said.replace("PLACE", str(place)))
    assert {name for name in snapshot(place) if "__pycache__" not in name} == set(before)


def test_a_student_brings_no_code(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    student = place / "student"
    (student / "evil.py").write_text("raise SystemExit('it ran')")
    for module in ("student.evil", "evil"):
        content = json.loads((student / "config.json").read_text()) | {"host": "factory", "model": f"{module}:f"}
        (student / "config.json").write_text(json.dumps(content))
        outcome = call(capsys, "export", student, "--trust", module, "-o", place / "out")
        assert_refused(outcome, f"The code of module '{module}' would be imported from")
        monkeypatch.chdir(student)
