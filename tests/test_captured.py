"""How much attention lists hold: counted, watched while a predictor learns, and a warning where it is lost."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.distill import checkpoint
from sparsifiner_edge.distill.captured import BestPredictors, attention_captured, lost, weights_of_predictors
from sparsifiner_edge.distill.distill import distill_student
from sparsifiner_edge.distill.fidelity import HeldOut, judge_weights
from sparsifiner_edge.errors import ArtifactError
from sparsifiner_edge.images import load_image
from sparsifiner_edge.ops import torch as ops
from sparsifiner_edge.sparse.calibrate import observed, selection_loss, sparse_layers
from sparsifiner_edge.sparse.outputs import seen_by
from sparsifiner_edge.sparse.patch import set_budget
from sparsifiner_edge.sparse.student import Student, dense_twin, load_student, save_student
from sparsifiner_edge.sparse.weights import normalise
from tests.commands import call
from tests.models import images, student

PAPER = SparsityConfig.for_preset("paper", keep=0.25, channels=16)
KINDS = {
    "paper": PAPER,
    "edge": SparsityConfig(keep=0.2, cells=4, channels=8),
    "merging": SparsityConfig(keep=0.2, cells=4, channels=8, merge=(6,)),
    "some dense": SparsityConfig(keep=(0.2, 1.0, 0.2, 0.2, 1.0, 0.3), cells=0, channels=8),
}
PHASES = ("batch=4", "reconstruct.steps=12", "distil.steps=2", "check_every=4", "images.held_out=2", "save_every=50")


@pytest.mark.parametrize("kind", list(KINDS))
@torch.no_grad()
def test_what_is_counted(kind: str) -> None:
    """Query by query, key by key."""
    made = student(sparsity=KINDS[kind])
    image, wanted = images(made.model, batch=1), []

    def count(layer: Any, qkv: torch.Tensor, *_: Any) -> None:
        q, k, _ = ops.split_heads(qkv, layer.geometry.heads)
        lists, prefix, shares = layer.indices(qkv), layer.num_prefix, []
        for head in range(q.shape[1]):
            for query in range(prefix, q.shape[2]):
                row = (layer.geometry.scale * k[0, head] @ q[0, head, query]).softmax(0)
                if layer.prefix_keys:
                    listed = lists[0, head, (query - prefix) // layer.sparsity.tile] + prefix
                    shares.append(row[:prefix].sum() + row[listed].sum())
                else:
                    shares.append(row[lists[0, head, query - prefix]].sum())
        wanted.append(float(torch.stack(shares).mean()))

    (found,) = attention_captured(made.model, [image], [made.sparsity]).values()
    assert made.backbone.sparsity == made.sparsity, "the budget is as it was"
    set_budget(made.model, dataclasses.replace(made.sparsity, merge=()))
    with observed(made.model, count, densely=True):
        made.model(image)
    assert found == pytest.approx(wanted, abs=1e-5)
    assert len(found) == (4 if kind == "some dense" else 6)


def test_a_layer_that_is_dense_in_a_budget_holds_all() -> None:
    made = student(sparsity=KINDS["edge"])
    budget = dataclasses.replace(made.sparsity, keep=(0.2, 1.0, 0.2, 0.2, 0.2, 0.2))
    (found,) = attention_captured(made.model, [images(made.model, batch=1)], [budget]).values()
    assert [share == 1 for share in found] == [False, True, False, False, False, False]


def test_predictors_outlive_a_judgement_within_a_budget_that_does_without_them() -> None:
    made = student(sparsity=KINDS["edge"])
    few = dataclasses.replace(made.sparsity, keep=(0.2, 1.0, 0.2, 0.2, 0.2, 0.2))
    image = images(made.model, batch=1)
    held_out = [HeldOut(image, seen_by(dense_twin(made).model, image))]
    set_budget(made.model, few, keep_predictors=True)
    found = judge_weights(made.model, held_out, [made.sparsity])
    assert made.backbone.sparsity == few
    set_budget(made.model, made.sparsity, keep_predictors=True)  # refused where a layer has lost its own
    assert judge_weights(made.model, held_out, [made.sparsity]) == found


def test_a_model_without_lists_has_none_to_watch() -> None:
    made = student(sparsity=SparsityConfig(keep=1, token_keep=((2, 0.5),)))
    assert attention_captured(made.model, [images(made.model, batch=1)], [made.sparsity]) == {}


def test_more_keys_hold_more() -> None:
    made = student(sparsity=PAPER)
    budgets = [dataclasses.replace(PAPER, keep=keep) for keep in (0.1, 0.25, 0.25, 0.9)]
    few, some, most = attention_captured(made.model, [images(made.model, batch=1)], budgets).values()
    for a, b, c in zip(few, some, most, strict=True):
        assert 0 < a < b < c <= 1 + 1e-6


def test_what_is_lost() -> None:
    before = {"0.1": [0.5, 0.6], "0.25": [0.7, 0.8]}
    assert lost(before, {"0.1": [0.496, 0.7], "0.25": [0.6, 0.79]}) == [
        "keep 0.25: lists of sparse layer 0 held 0.700 of its attention, now 0.600"
    ]
    assert lost({}, before) == []


@torch.no_grad()
def learnt(made: Student, folder: Path) -> float:
    """What predictors lose on whole images."""
    losses, generator = [], torch.Generator().manual_seed(0)
    with observed(made.model, lambda x, qkv, *_: losses.append(float(selection_loss(x, qkv, generator))), densely=True):
        for path in sorted(folder.rglob("*.png")):
            made.model(normalise(torch.from_numpy(load_image(path, made.img_size))[None], made.normalisation))
    return sum(losses)


@pytest.mark.everything
@pytest.mark.parametrize("preset", ["paper", "edge"])
def test_a_dry_run_of_both_phases(preset: str, folder: Path, tmp_path: Path) -> None:
    """With labels, from the documented start: the predictor's loss falls, and its lists hold what they held."""
    config = PAPER if preset == "paper" else KINDS["edge"]
    start = save_student(student(sparsity=config, num_classes=2), tmp_path / "start")
    summary = distill_student(
        start, folder, tmp_path / "out", labels=True, recipe="imagenet-deit-s",
        overrides=(*PHASES, "reconstruct.epochs=0", "distil.epochs=0", "images.workers=0"),
    )  # fmt: skip
    assert summary.warnings == []
    lines = [json.loads(x) for x in (tmp_path / "out.training" / checkpoint.HISTORY).read_text().splitlines()]
    held = {line["step"]: line["captured"] for line in lines if "captured" in line}
    assert list(held) == [0, 4, 8, 12, 14], "at the end of the first phase too"
    assert lost(held[0], held[12]) == []
    # As published, predictors learn in the first phase alone.
    assert [line["step"] for line in lines if "selection" in line] == list(range(1, 13))
    # Steps see other crops, mixed and erased: judged on images as they are.
    before, after = (learnt(load_student(path), folder) for path in (start, tmp_path / "out"))
    assert after < before


@pytest.mark.everything
def test_predictors_that_get_worse_are_put_back_and_told_of(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = save_student(student(sparsity=PAPER, num_classes=0), tmp_path / "start")
    wild = (*PHASES, "reconstruct.predictor_learning_rate=0.5", "explosion=1e9", "losses.logits=0", "ema=0")
    settings = [word for setting in wild for word in ("--set", setting)]
    done = call(capsys, "distill", start, "--data", folder, *settings, "--tensorboard", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    lines = [json.loads(x) for x in (tmp_path / "out.training" / checkpoint.HISTORY).read_text().splitlines()]
    held = {line["step"]: line["captured"] for line in lines if "captured" in line}
    assert lost(held[0], held[8])
    assert lost(held[0], held[12]) == [], "at the end of the phase"
    assert "after step 12, the first phase: lists of sparse layers 0" in done.err
    (events,) = (tmp_path / "out.training" / "tensorboard").iterdir()
    assert b"captured 0.25/5" in events.read_bytes()


def test_of_each_layer_the_best_predictor_counts() -> None:
    made, other, third = (student(sparsity=PAPER) for _ in range(3))
    best = BestPredictors.of(made.model)
    start, now = {"0.1": [0.5] * 6, "0.25": [0.7] * 6}, {"0.1": [0.6] * 6, "0.25": [0.8] * 6}
    now["0.1"][2] = now["0.25"][4] = 0.5  # Of layer 2 no more than at the start, of layer 4 less.
    for model, number in ((other.model, 1.0), (third.model, 2.0)):
        for layer in sparse_layers(model):
            layer.select.up.data.fill_(number)
    best.take(other.model, start, now)
    assert best.gains == pytest.approx([0.1, 0.1, 0, 0.1, 0, 0.1])
    best.take(third.model, start, {"0.1": [0.59] * 5 + [0.65], "0.25": [0.9] * 6})
    assert best.gains == pytest.approx([0.1, 0.1, 0.09, 0.1, 0.09, 0.15])
    best.give(made.model)
    assert [float(layer.select.up.detach()[0, 0]) for layer in sparse_layers(made.model)] == [1, 1, 2, 1, 2, 2]


def test_a_budget_that_does_without_a_layer_s_lists_does_not_judge_them() -> None:
    best = BestPredictors.of(student(sparsity=PAPER).model)
    start = {"0.1,1": [0.5, *[1.0] * 5], "0.25,0.5": [0.7] * 6}
    best.take(student(sparsity=PAPER).model, start, {"0.1,1": [0.6, *[1.0] * 5], "0.25,0.5": [0.9] * 6})
    assert best.gains == pytest.approx([0.1, *[0.2] * 5])


CHANGES: list[dict[str, Any]] = [
    {"predictors": {"gains": [0.0]}}, {"predictors": {"gains": [-1.0] * 6}}, {"predictors": {"gains": [math.nan] * 6}},
    {"predictors": {"weights": {}}}, {"captured": {}}, {"captured": {0: {"0.25": [0.5] * 5}}},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_predictors_of_another_training_are_refused(change: dict[str, Any]) -> None:
    made = student(sparsity=PAPER)
    like, best = weights_of_predictors(made.model), BestPredictors.of(made.model)
    captured = change.get("captured", {0: {"0.25": [0.5] * 6}})
    state = checkpoint.TrainingState(0, {}, {}, 0, {}, set(), captured=captured, predictors=best)
    changed = msgspec.structs.replace(best, **change.get("predictors", {}))
    with pytest.raises(ArtifactError, match="predictors do"):
        checkpoint.require_predictors(msgspec.structs.replace(state, predictors=changed), like)
    sound = msgspec.structs.replace(state, captured={0: {"0.25": [0.5] * 6}})
    checkpoint.require_predictors(sound, like)
