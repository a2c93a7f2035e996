"""Tests of input that commands reject, with a remedy and without leftover files.

Covered: sources, sizes, normalisations, metrics and trainings.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import sparsifiner_edge as se
from tests.commands import assert_refused, call, snapshot
from tests.hosts.factories import model, saved
from tests.models import TINY
from tests.once import Once

F, METRICS = "tests.hosts.factories", "tests.hosts.metrics"
EVALUATE = "evaluate {features} --data {folder}"
KNN, TASK = f"{EVALUATE} --metric knn", f"evaluate {{masked}} --trust {F} --data {{pictures}} --metric task"
DISTILL = "distill {student} --data {folder} -o {out}"


@pytest.fixture(scope="module")
def places(
    once: Once, feature_weights: Path, folder: Path, pictures: Path, tiny_student: Path, tiny_bundle: Path
) -> dict[str, Path]:
    """Files of the commands below: sparse models, a bundle, transformers models, images, a folder of one class."""

    def make(place: Path) -> None:
        se.sparsify(TINY, place / "features", weights=feature_weights, background_tokens=4)
        se.sparsify(f"{F}:Masked", place / "masked", keep=0.5, channels=8)
        saved(model("DINOv2"), place / "dinov2")
        saved(model("CLIP"), place / "clip")
        shutil.copytree(folder / "cats", place / "few" / "cats")
        shutil.copytree(place / "few", place / "others")
        shutil.copytree(folder / "dogs", place / "others" / "wolves")

    made = once("refused", make)
    names = {name: made / name for name in ("features", "masked", "dinov2", "clip", "few", "others")}
    return names | {"folder": folder, "pictures": pictures, "student": tiny_student, "bundle": tiny_bundle}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (f"sparsify {F}:fails -o {{out}}", f"{F}:fails failed: RuntimeError: no such checkpoint."),
        (f"sparsify {F}:number -o {{out}}", "returned a int"),
        (f"sparsify {F}:Depth --img-size 154 -o {{out}}", "pixels instead of 154: it has no parameter img_size"),
        (f"sparsify {F}:stubborn --img-size 96 -o {{out}}", "returned a model for 160 pixels instead of 96"),
        (f"sparsify {F}:Segmenter --weights x.pth -o {{out}}", "--weights applies to timm names only"),
        ("sparsify {dinov2} --img-size 150 -o {out}", "150 is not a multiple of the patch size 14. Use 154"),
        ("sparsify {clip} --img-size 96x160 -o {out}", "CLIP supports square images only"),
        (f"export {F}:TokensToo --tokens -o {{out}}", "'tokens', which is the name of its backbone's tokens"),
        (f"sparsify {F}:Inside -o {{out}}", f"{F}:Inside declares no image_mean"),
        (f"export {F}:Inside -o {{out}}", "--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225"),
        (f"evaluate {{bundle}} --against {F}:Inside --data {{pictures}}", "--no-normalise"),
        (f"sparsify {F}:Inside --mean 0,0,0 -o {{out}}", "Give --mean and --std, or --no-normalise alone"),
        (f"export {F}:Inside --mean 0,0,nan --std 1,1,1 -o {{out}}", "mean is ['0', '0', 'nan']"),
        (f"export {F}:Inside --mean 0,0,0 --std 1,0,1 -o {{out}}", "std is ['1', '0', '1']"),
        (f"export {F}:Segmenter --mean 0,0,0 --std 1,1,1 -o {{out}}", f"{F}:Segmenter declares mean 0.485, 0.456,"),
        ("export {student} --no-normalise -o {out}", "a student or bundle has its own"),
        (KNN, "require labelled images"),
        (f"{EVALUATE} --metric top1", "has no logits"),
        (f"{EVALUATE} --gallery {{folder}}", "requires a metric that learns"),
        (f"{KNN} --gallery {{folder}} --head {{out}}", "requires the metric linear"),
        (f"{KNN} --gallery {{folder}} --data {{pictures}}", "outside of class folders"),
        (f"{EVALUATE} --metric knn --gallery {{others}}", "unknown class 'wolves'"),
        (f"{EVALUATE} --metric knn --gallery {{few}}", "no image of 'dogs'"),
        (f"{EVALUATE} --metric top1 --gallery {{folder}}", "uses the classifier itself"),
        (f"{KNN} --gallery {{folder}} --weights {{features}}", "requires the timm model"),
        (f"{TASK} --map mask --masks nowhere", "nowhere does not exist"),
        (f"{TASK} --map mask --masks tests", "holds no mask for picture0.png"),
        (f"{TASK} --task {METRICS}:Broken", "Broken.update failed: KeyError: 'mask'"),
        (f"{TASK} --task {METRICS}:Unmade", "Unmade failed: OSError: no labels here"),
        (f"{TASK} --task {METRICS}:Partial", "has no result"),
        (f"{TASK} --task {METRICS}:Brightness --map mask", "require the task maps"),
        (f"{TASK} --metric cosine --map mask", "require --metric task"),
        (f"{TASK} --corruptions fog --map heat", "a mask requires a map from 0 to 1"),
        (f"{TASK} --corruptions mist", "'mist' is unknown"),
        (f"{TASK} --severity 3", "A severity requires corruptions"),
        (f"{TASK} --corruptions fog --metric linear --head h", "and clean images"),
        (f"{DISTILL} --recipe none", "no recipe 'none'"),
        (f"{DISTILL} --weights w.safetensors", "no teacher is named"),
        (f"{DISTILL} --resume", "no checkpoint to resume from"),
        (f"{DISTILL} --data {{out}}", "does not exist"),
    ],
)
def test_refused(
    line: str, said: str, places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(out=tmp_path / "out", **places) for word in line.split()]
    assert_refused(call(capsys, *words), said)
    assert not snapshot(tmp_path)
