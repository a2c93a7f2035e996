"""Tests of distillation with real trainings of timm's smallest model: learning, resuming and rejected input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.distill import checkpoint
from sparsifiner_edge.errors import ArtifactError, ConfigError, GateError, ImageError
from sparsifiner_edge.records import write_record
from sparsifiner_edge.sparse.student import save_student
from tests.commands import PROGRAM, assert_refused, call, process
from tests.flat import distill_student, load_student
from tests.models import student

BUDGETS = 'budgets=[{keep="0.1"},{keep="0.2"}]'
SHORT = ("distil.steps=6", "batch=2", "check_every=3", "save_every=2", "images.held_out=2", BUDGETS)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_student(student(num_classes=2), tmp_path_factory.mktemp("start") / "student")


def history(output: Path) -> list[dict[str, Any]]:
    lines = (Path(f"{output}.training") / checkpoint.HISTORY).read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(output: Path) -> list[float]:
    return [entry["loss"] for entry in history(output) if "loss" in entry]


class Stop(Exception):
    pass


def stop_after_three(_stage: str, done: float, _total: float) -> None:
    if done == 3:
        raise Stop


def test_a_short_training_improves_and_says_so(folder: Path, tmp_path: Path) -> None:
    few = SparsityConfig(keep=0.05, background_tokens=0, channels=8)
    start = save_student(student(sparsity=few, num_classes=0), tmp_path / "start")
    steps: list[tuple[int, int]] = []
    changes = (*SHORT, "distil.steps=30", "distil.learning_rate=1e-5", "ema=0.0", "budgets=[]")
    summary = distill_student(
        start,
        folder,
        tmp_path / "out",
        overrides=changes,
        progress=lambda _, done, total: steps.append((done, total)),
    )
    assert summary.best is not None
    assert summary.start is not None
    assert steps == [(n, 30) for n in range(1, 31)]
    assert summary.best > summary.start
    trained = load_student(tmp_path / "out")
    assert trained.provenance.training == json.loads(json.dumps(write_record(summary)))
    assert summary.images == 10
    assert not (tmp_path / "out.training" / checkpoint.CHECKPOINT).exists()
    before = load_student(start).model.state_dict()
    after = trained.model.state_dict()
    assert any(not torch.equal(after[k], before[k]) for k in after if ".select." in k)
    assert any(not torch.equal(after[k], before[k]) for k in after if ".select." not in k)


@pytest.mark.everything
def test_never_worse_than_the_start(folder: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsifiner_edge.distill.train.EXPLOSION", 1e9)
    wild = (*SHORT, "distil.learning_rate=0.3", "distil.predictor_learning_rate=1.0")
    summary = distill_student(start, folder, tmp_path / "out", overrides=wild)
    assert summary.kept == "the untrained start"
    before, after = load_student(start).model.state_dict(), load_student(tmp_path / "out").model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.everything
def test_killed_anywhere_it_ends_where_an_unbroken_run_ends(folder: Path, start: Path, tmp_path: Path) -> None:
    # Killed within both phases, with all augmentations.
    drawn = ("images.auto_augment=rand-m9-mstd0.5-inc1", "images.erasing=0.5", "images.mixup=0.8")
    steps = (*SHORT, "reconstruct.steps=7", "distil.steps=6", "ema=0.9", *drawn)
    arguments = ["distill", start, "--data", folder, *(x for s in steps for x in ("--set", s))]
    distill_student(start, folder, tmp_path / "whole", overrides=steps)
    broken = tmp_path / "broken"
    for again, after in (([], 4), (["--resume"], 9)):  # steps without a checkpoint
        command = [*PROGRAM, *map(str, arguments), "-o", str(broken), *again]
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
        path = Path(f"{broken}.training") / checkpoint.HISTORY
        while not (path.is_file() and f'"step": {after}, "loss"' in path.read_text()):
            assert running.poll() is None
            time.sleep(0.005)
        running.send_signal(signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL
    done = process(*arguments, "-o", broken, "--resume")
    assert done.code == 0, done.err
    assert losses(broken) == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)
    assert [e["step"] for e in history(broken)] == [e["step"] for e in history(tmp_path / "whole")]
    resumed, unbroken = (load_student(x).model.state_dict() for x in (broken, tmp_path / "whole"))
    for name, value in unbroken.items():
        torch.testing.assert_close(resumed[name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.everything
def test_two_processes_do_what_one_does(folder: Path, start: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(folder, tmp_path / "data")
    for name in ("dogs/04.png", "dogs/06.png", "dogs/08.png"):  # each process reaches some of them
        (folder / name).write_bytes(b"no image")
    steps = (
        "reconstruct.steps=2",
        "distil.steps=3",
        "check_every=3",
        "images.held_out=2",
        "save_every=3",
        'budgets=[{keep="0.2"}]',
        "images.mixed=0.0",
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *PROGRAM[1:]]
    given = ["distill", start, "--data", folder, *(x for s in steps for x in ("--set", s))]
    for program, name, batch in ((PROGRAM, "one", 4), (launch, "two", 2)):
        command = [*program, *map(str, given), "--set", f"batch={batch}", "-o", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
    trainings = [load_student(tmp_path / x).provenance.training for x in ("two", "one")]
    assert trainings[0]["processes"] == 2
    assert len(trainings[0]["unreadable"]) == 3
    assert trainings[0]["unreadable"] == trainings[1]["unreadable"]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-3)
    two, one = (load_student(tmp_path / x).model.state_dict() for x in ("two", "one"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=2e-4, rtol=2e-3)


def test_no_number_stops_with_step_files_and_checkpoint(folder: Path, start: Path, tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"stopped at step 1: the loss is inf.*\.png") as caught:
        distill_student(start, folder, tmp_path / "out", overrides=(*SHORT, "losses.patches=1e300"))
    assert "checkpoint, of step 0" in caught.value.fix
    assert (tmp_path / "out.training" / checkpoint.CHECKPOINT).is_file()
    assert not (tmp_path / "out").exists()
    distill_student(start, folder, tmp_path / "out", overrides=SHORT, resume=True)
    wrong = load_student(start)
    with torch.no_grad():
        wrong.model.blocks[2].mlp.fc1.weight[:] = 3e38  # every activation overflows
    save_student(wrong, tmp_path / "wrong")
    with pytest.raises(GateError, match="NaN or infinite"):
        distill_student(tmp_path / "wrong", folder, tmp_path / "none", overrides=SHORT)


def test_an_explosion_stops(folder: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsifiner_edge.distill.train.RECENT", 3)
    monkeypatch.setattr("sparsifiner_edge.distill.train.EXPLOSION", 1.2)
    wild = (*SHORT, "distil.learning_rate=1.0", "distil.warmup=0.9", "distil.steps=40", "clip=0.0")
    with pytest.raises(GateError, match=r"stopped at step \d+: the loss is [0-9.]+\."):
        distill_student(start, folder, tmp_path / "out", overrides=wild)


def test_unreadable_images_are_skipped_counted_and_listed(
    folder: Path, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(folder, tmp_path / "data")
    (data / "cats" / "01.png").write_bytes(b"no image")  # validation images
    (data / "cats" / "03.png").write_bytes(b"no image")
    (data / "dogs" / "04.png").write_bytes((data / "dogs" / "06.png").read_bytes()[:300])
    settings = (x for s in SHORT for x in ("--set", s))
    outcome = call(capsys, "distill", start, "--data", data, *settings, "-o", tmp_path / "out", "--json")
    assert outcome.code == 0, outcome.err
    pictures = json.loads(outcome.out)
    assert "01.png" in pictures["held_out"]
    assert [Path(path).name for path in pictures["unreadable"]] == ["01.png", "03.png", "04.png"]
    for path in data.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ImageError):
        distill_student(start, data, tmp_path / "none", overrides=SHORT)


@pytest.mark.everything
def test_labels_teach_and_the_first_class_decides(folder: Path, start: Path, pictures: Path, tmp_path: Path) -> None:
    tiny = ("reconstruct.epochs=0", "reconstruct.steps=2", "distil.epochs=0", "distil.steps=4", "batch=4")
    few = ("check_every=2", "save_every=1", "images.held_out=4", "images.workers=0", "ema=0.5")
    options: dict[str, Any] = {"labels": True, "recipe": "imagenet-deit-s", "overrides": (*tiny, *few)}
    summary = distill_student(start, folder, tmp_path / "out", **options)
    assert sum("labels" in entry for entry in history(tmp_path / "out")) == 4
    assert summary.metric.startswith("top-1")
    judged = {entry["step"]: entry["top1"][0] for entry in history(tmp_path / "out") if "top1" in entry}
    assert list(judged) == [0, 2, 4, 6]
    assert (summary.start, summary.best) == (judged[0], max(judged.values()))
    with pytest.raises(ConfigError, match="outside of class folders"):
        distill_student(start, folder, tmp_path / "x", **options, held_out=pictures)
    with pytest.raises(ConfigError, match="has images outside of class folders"):
        distill_student(start, folder / "cats", tmp_path / "x", labels=True, overrides=SHORT)


def test_what_is_begun_or_damaged_is_no_start(
    folder: Path, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = ["distill", start, "--data", folder, *(x for s in SHORT for x in ("--set", s)), "-o", tmp_path / "out"]
    (tmp_path / "out.training").mkdir()
    saved = tmp_path / "out.training" / checkpoint.CHECKPOINT
    saved.write_bytes(b"no checkpoint")
    assert_refused(call(capsys, *plain), "unfinished training", "--resume")
    assert_refused(call(capsys, *plain, "--resume"), "checkpoint.safetensors is damaged")
    assert saved.read_bytes() == b"no checkpoint"


def test_resuming_something_else_is_refused(folder: Path, start: Path, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        distill_student(start, folder, tmp_path / "out", overrides=SHORT, progress=stop_after_three)
    with pytest.raises(ConfigError, match="differs in images"):
        distill_student(start, folder / "cats", tmp_path / "out", overrides=SHORT, resume=True)
    with pytest.raises(ConfigError, match="differs in steps: it began with 6, now it is 9"):
        distill_student(start, folder, tmp_path / "out", overrides=(*SHORT, "distil.steps=9"), resume=True)
    with pytest.raises(ConfigError, match="differs in precision: it began with no, now it is bf16"):
        distill_student(start, folder, tmp_path / "out", overrides=(*SHORT, "precision=bf16"), resume=True)
    distill_student(start, folder, tmp_path / "out", overrides=SHORT, resume=True)
    with pytest.raises(ArtifactError, match="no checkpoint"):
        distill_student(start, folder, tmp_path / "out", overrides=SHORT, resume=True)
    with pytest.raises(ConfigError, match="was trained"):
        distill_student(tmp_path / "out", folder, tmp_path / "again", overrides=SHORT)


@pytest.mark.everything
def test_two_phases(folder: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses of phase one are a hundredth of phase two's.

    This is not divergence; changes that worsen the model are undone.
    """
    monkeypatch.setattr("sparsifiner_edge.distill.train.RECENT", 3)
    monkeypatch.setattr("sparsifiner_edge.distill.train.EXPLOSION", 3.0)
    wild = ("reconstruct.learning_rate=0.0", "reconstruct.predictor_learning_rate=0.5", "losses.selection=0.001")
    summary = distill_student(start, folder, tmp_path / "out", overrides=(*SHORT, "reconstruct.steps=5", *wild))
    assert summary.steps == 11
    first, _, worse, back, *_ = (entry["fidelity"] for entry in history(tmp_path / "out") if "fidelity" in entry)
    assert worse < min(first, back)
    entries = [set(e) for e in history(tmp_path / "out") if "loss" in e]
    assert all(entry == {"step", "loss", "selection"} for entry in entries[:5])
    assert all("patches" in entry for entry in entries[5:])


@pytest.mark.everything
def test_two_trainings_do_not_share_a_folder(folder: Path, start: Path, tmp_path: Path) -> None:
    refused = []

    def again(_stage: str, done: float, _total: float) -> None:
        if done == 3:
            with pytest.raises(ConfigError, match="Another training writes to") as caught:
                distill_student(start, folder, tmp_path / "out", overrides=SHORT, resume=True)
            refused.append(caught)

    distill_student(start, folder, tmp_path / "out", overrides=SHORT, progress=again)
    assert refused


@pytest.mark.everything
def test_what_merges_and_what_is_pruned_is_learnt_beside_the_whole(folder: Path, tmp_path: Path) -> None:
    start = save_student(student(num_classes=2, img_size=(96, 160)), tmp_path / "start")  # and a rectangle
    every = 'budgets=[{keep="0.1"},{keep="0.2",merge="6"},{keep="0.1",token_keep="1:.7,3:.6"}]'
    summary = distill_student(start, folder, tmp_path / "out", overrides=(*SHORT, "distil.steps=8", every))
    assert [(row.keep, row.merge, len(row.token_keep)) for row in summary.budgets] == [
        (0.1, (), 0),
        (0.2, (6,), 0),
        (0.1, (), 2),
    ]
    trained = load_student(tmp_path / "out")
    assert trained.sparsity == load_student(start).sparsity  # its own budget is unchanged
    assert trained.img_size == (96, 160)
    with pytest.raises(ConfigError, match="merge has 3 rates"):
        distill_student(start, folder, tmp_path / "x", overrides=(*SHORT, 'budgets=[{merge="3,2,1"}]'))
