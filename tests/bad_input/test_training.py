"""Students, checkpoints and histories that were changed or damaged, trainings that move, and disks that are full."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparsifiner_edge.distill import checkpoint
from sparsifiner_edge.distill.checkpoint import TrainingState
from sparsifiner_edge.distill.data import folder_source
from sparsifiner_edge.distill.distill import distill_student
from sparsifiner_edge.distill.recipe import read_recipe
from sparsifiner_edge.distill.train import Training, make_accelerator
from sparsifiner_edge.errors import ArtifactError, SparsifinerError
from sparsifiner_edge.sparse.student import dense_twin, load_student, save_student
from tests.commands import snapshot
from tests.fuzz.mutate import json_text
from tests.models import student as make_student

SHORT = ("distil.steps=4", "batch=2", "check_every=2", "save_every=2", "images.held_out=2", "ema=0.9")
NORM = "student/norm.weight"


class Stop(Exception):
    pass


def stop_after_three(_stage: str, done: float, _total: float) -> None:
    if done == 3:
        raise Stop


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """A folder with a student `start`, images `data`, and a training of `out` that was stopped, begun from within."""
    place = tmp_path_factory.mktemp("begun")
    save_student(make_student(num_classes=2), place / "start")
    shutil.copytree(folder, place / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        with pytest.raises(Stop):
            distill_student("start", "data", "out", overrides=SHORT, progress=stop_after_three)
    return place


@pytest.fixture(scope="module")
def training(begun: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """What would resume it."""
    plan, found = read_recipe("cpu", SHORT), load_student(begun / "start")
    source, work = folder_source(begun / "data", 2, False, None), tmp_path_factory.mktemp("work")
    return Training(make_accelerator(plan), found, dense_twin(found), source, plan, work)


@pytest.fixture
def saved(begun: Path) -> tuple[TrainingState, dict[str, torch.Tensor]]:
    """The same as read, to be changed."""
    return checkpoint.load(begun / "out.training")


def test_a_training_goes_on_wherever_its_folders_lie(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = Path(shutil.copytree(begun, tmp_path / "elsewhere"))
    monkeypatch.chdir(tmp_path)
    summary = distill_student(moved / "start", "elsewhere/data", moved / "out", overrides=SHORT, resume=True)
    assert summary.steps == 4


FOREIGN = "does not belong to this training"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s, _: setattr(s, "step", 99), "steps do not belong to this training"),
        (lambda s, _: s.each.update({0: [0.5]}), "steps do not belong to this training"),
        (lambda s, _: s.fingerprint.update(seed=7), "began with other seed: 7, now 0"),
        (lambda _, t: t.pop("best/norm.weight"), f"'best/norm.weight' {FOREIGN}"),
        (lambda _, t: t.update({NORM: torch.zeros(3)}), f"{NORM!r} {FOREIGN}"),
        (lambda _, t: t[NORM].fill_(torch.inf), f"{NORM!r} {FOREIGN}"),
        (lambda _, t: t["optimiser/0/exp_avg_sq"].fill_(torch.nan), FOREIGN),
    ],
)
def test_a_checkpoint_of_something_else(
    change: Callable[[TrainingState, dict[str, torch.Tensor]], object], text: str,
    saved: tuple[TrainingState, dict[str, torch.Tensor]], training: Training,
) -> None:  # fmt: skip
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
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # What a full disk does, without one.
    try:
        with pytest.raises(ArtifactError, match=r"checkpoint\.safetensors cannot be written: .*File too"):
            checkpoint.save(tmp_path, TrainingState(), {"x": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert snapshot(tmp_path) == before
