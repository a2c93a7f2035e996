"""What commands refuse, with what to do and without a trace: sources, sizes, normalisations, metrics and trainings."""

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
    """What lines name: students, a bundle, models of transformers and images; of labelled ones the cats alone, too."""

    def make(place: Path) -> None:
        se.sparsify(TINY, place / "features", weights=feature_weights, cells=4)
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
        (f"sparsify {F}:number -o {{out}}", "made a int"),
        (f"sparsify {F}:Depth --img-size 154 -o {{out}}", "made a model of 140: it takes no img_size"),
        (f"sparsify {F}:stubborn --img-size 96 -o {{out}}", "was asked for 96 pixels and made a model of 160"),
        (f"sparsify {F}:Segmenter --weights x.pth -o {{out}}", "--weights are for timm's names"),
        ("sparsify {dinov2} --img-size 150 -o {out}", "150 is not a multiple of the patch size 14. Use 154"),
        ("sparsify {clip} --img-size 96x160 -o {out}", "CLIP takes squares alone"),
        (f"export {F}:TokensToo --tokens -o {{out}}", "'tokens' bears the name of its backbone's"),
        (f"sparsify {F}:Inside -o {{out}}", f"{F}:Inside does not say what its module"),
        (f"export {F}:Inside -o {{out}}", "--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225"),
        (f"evaluate {{bundle}} --against {F}:Inside --data {{pictures}}", "--no-normalise"),
        (f"sparsify {F}:Inside --mean 0,0,0 -o {{out}}", "Give --mean and --std, or --no-normalise alone"),
        (f"export {F}:Inside --mean 0,0,nan --std 1,1,1 -o {{out}}", "mean is ['0', '0', 'nan']"),
        (f"export {F}:Inside --mean 0,0,0 --std 1,0,1 -o {{out}}", "std is ['1', '0', '1']"),
        (f"export {F}:Segmenter --mean 0,0,0 --std 1,1,1 -o {{out}}", f"{F}:Segmenter declares mean 0.485, 0.456,"),
        ("export {student} --no-normalise -o {out}", "a student or bundle has its own"),
        (KNN, "require labelled images"),
        (f"{EVALUATE} --metric top1", "has no logits"),
        (f"{EVALUATE} --gallery {{folder}}", "require another metric"),
        (f"{KNN} --gallery {{folder}} --head {{out}}", "by the metric linear"),
        (f"{KNN} --gallery {{folder}} --data {{pictures}}", "no folder of their class"),
        (f"{EVALUATE} --metric knn --gallery {{others}}", "unknown class 'wolves'"),
        (f"{EVALUATE} --metric knn --gallery {{few}}", "no image of 'dogs'"),
        (f"{EVALUATE} --metric top1 --gallery {{folder}}", "uses the classifier itself"),
        (f"{KNN} --gallery {{folder}} --weights {{features}}", "none is named"),
        (f"{TASK} --map mask --masks nowhere", "nowhere does not exist"),
        (f"{TASK} --map mask --masks tests", "holds no mask for picture0.png"),
        (f"{TASK} --task {METRICS}:Broken", "Broken.update failed: KeyError: 'mask'"),
        (f"{TASK} --task {METRICS}:Unmade", "Unmade failed: OSError: no labels here"),
        (f"{TASK} --task {METRICS}:Partial", "has no result"),
        (f"{TASK} --task {METRICS}:Brightness --map mask", "are for the task maps"),
        (f"{TASK} --metric cosine --map mask", "require --metric task"),
        (f"{TASK} --corruptions fog --map heat", "masks are cut from maps from 0 to 1"),
        (f"{TASK} --corruptions mist", "'mist' is unknown"),
        (f"{TASK} --severity 3", "A severity is that of corruptions"),
        (f"{TASK} --corruptions fog --metric linear --head h", "on clean images"),
        (f"{DISTILL} --recipe none", "no recipe 'none'"),
        (f"{DISTILL} --weights w.safetensors", "teacher's, and none is named"),
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
