"""The published recipe's first phase: do predictors keep what their lists hold? Beside the start that did not.

    python benchmarks/published_predictor.py [--start NAME] [-o FOLDER]    # a quarter of an hour for each start

DINOv2 ViT-S/14 at 196 px, preset "paper", as many steps at the recipe's learning rates as five epochs of ImageNet make
with eight processes. The backbone does not learn in that phase and attends to everything, so what its layers see of an
image is computed once; a step sees few images instead of 1,344. Trained on photographs (`accuracy_images.py`), and as
in `distill` each layer goes on with the predictor that held the most of some that were held out. Measured on such as
nothing was chosen by (`split.publication`): the share of attention that lists of a quarter and a tenth of keys hold,
layer by layer, as learnt and as it goes on; and how many lists are those of the NumPy reference, of the rows whose
choice is no matter of rounding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
import torch
from accuracy_images import collect
from fidelity_subject import weights_file
from summary import write_summary
from torch import Tensor

from sparsifiner_edge.artifacts import sha256
from sparsifiner_edge.cli.common import print_table, progress_bar
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.demo import material, split
from sparsifiner_edge.distill.captured import LOSS, BestPredictors, Captured, attention_captured
from sparsifiner_edge.distill.recipe import read_recipe
from sparsifiner_edge.images import evenly, list_images, load_image
from sparsifiner_edge.ops import reference, torch_landmarks
from sparsifiner_edge.ops import torch as ops
from sparsifiner_edge.results import Result, Subject
from sparsifiner_edge.sparse import calibrate
from sparsifiner_edge.sparse.hosts.timm import load_model, preprocessing
from sparsifiner_edge.sparse.source import LoadedModel
from sparsifiner_edge.sparse.student import Student, make_student
from sparsifiner_edge.sparse.weights import normalise

SIZE, KEEPS = 196, (0.25, 0.1)
IMAGES, TOGETHER, JUDGED, COMPARED = 96, 4, 8, 2
IMAGENET, WATCHED = 1_281_167, 5
"""Images of an epoch; the layer that the table shows beside the worst."""
LISTED, MARGIN = (0.25, 0.5, 0.75, 0.9), 1e-6
"""Shares of keys at which lists are compared, where scores and coefficients differ by more."""
STARTS = {"now": (calibrate.UP_START, calibrate.UP_CLASS), "entries of 1": (1.0, 1.0)}


def made(start: tuple[float, float], calibration: Sequence[Tensor]) -> Student:
    """A student whose up-projection starts at these entries."""
    model = load_model(material.DINOV2, weights_file(), SIZE)
    loaded = LoadedModel("timm", material.DINOV2, model, preprocessing(model))
    student = make_student(loaded, SparsityConfig.for_preset("paper", keep=KEEPS[0]))
    with mock.patch.multiple(calibrate, UP_START=start[0], UP_CLASS=start[1]):
        calibrate.calibrate_from_images(student.model, calibration)
    return student


def pixels(paths: Sequence[Path]) -> list[Tensor]:
    """As the model takes them."""
    model = load_model(material.DINOV2, weights_file(), SIZE)
    pre = preprocessing(model)
    return [normalise(torch.from_numpy(load_image(path, SIZE))[None], pre) for path in paths]


def train(student: Student, images: Sequence[Tensor], watched: Sequence[Tensor], progress: Any) -> BestPredictors:
    """The phase, as `distill.train` runs it: AdamW at the recipe's rates and decay, its weight and clipping; and each
    layer's best predictor on images that are watched.
    """
    recipe = read_recipe("imagenet-deit-s")
    phase, layers = recipe.reconstruct, calibrate.sparse_layers(student.model)
    steps = math.ceil(phase.epochs * IMAGENET / (recipe.batch * 8))
    seen: dict[Any, list[Tensor]] = {layer: [] for layer in layers}
    with torch.no_grad(), calibrate.observed(student.model, lambda x, qkv, *_: seen[x].append(qkv), densely=True):
        for image in images:
            student.model(image)
    parameters = [parameter for layer in layers for parameter in layer.select.parameters()]
    optimiser = torch.optim.AdamW(parameters, weight_decay=recipe.predictor_weight_decay)
    generator, draw = torch.Generator().manual_seed(0), np.random.default_rng(0)
    best, start = BestPredictors.of(student.model), held(student, watched)
    for step in range(steps):
        rate = phase.factor((step + 1) / steps) * phase.predictor_learning_rate
        for group in optimiser.param_groups:
            group["lr"] = rate
        some = draw.choice(len(images), TOGETHER, replace=False)
        batch = ((layer, torch.cat([qkv[n] for n in some])) for layer, qkv in seen.items())
        loss = torch.stack([calibrate.selection_loss(layer, qkv, generator) for layer, qkv in batch]).mean()
        (recipe.losses.selection * loss).backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.clip or math.inf)
        optimiser.step()
        optimiser.zero_grad()
        progress(f"loss {float(loss.detach()):.4f}", step + 1, steps)
        if (step + 1) % recipe.check_every == 0 or step + 1 == steps:
            best.take(student.model, start, held(student, watched))
    return best


def held(student: Student, images: Sequence[Tensor]) -> Captured:
    """At each share of keys; every image counts, not the few that a training looks at."""
    budgets = [dataclasses.replace(student.sparsity, keep=keep) for keep in KEEPS]
    each = [attention_captured(student.model, [image], budgets) for image in images]
    return {keep: np.mean([found[keep] for found in each], 0).tolist() for keep in each[0]}


def lists_compared(student: Student, images: Sequence[Tensor]) -> dict[str, dict[str, int]]:
    """By share of keys: rows in all, those that no rounding decides, and of these such as list what the reference does.

    Rounding decides where the last score that counts and the next one, or the last coefficient and the next one, are
    within `MARGIN`.
    """
    found = {f"{keep:g}": {"rows": 0, "decided": 0, "equal": 0} for keep in LISTED}
    choices = [dataclasses.replace(student.sparsity, keep=keep) for keep in LISTED]

    def watch(layer: Any, qkv: Tensor, *_: Any) -> None:
        heads, weights = layer.geometry.heads, [x.detach() for x in layer.select.inputs()]
        settings = {"num_heads": heads, "scale": heads**-0.5, "basis_threshold": student.sparsity.basis_threshold}
        settings |= {"top_coefficients": student.sparsity.top_coefficients}
        scores = reference.landmark_scores(qkv.numpy(), *(x.numpy() for x in weights), **settings)
        ordered = -np.sort(-scores, -1)
        q, k, _ = ops.split_heads(qkv, heads)
        coefficients = (
            torch_landmarks.landmark_coefficients(q, k, *weights[:5], settings["scale"])
            .sort(-1, descending=True)
            .values
        )
        count = settings["top_coefficients"]
        clear = (coefficients[..., count - 1] - coefficients[..., count] > MARGIN).numpy()
        for choice in choices:
            keys = choice.layout(qkv.shape[1] - 1).keys
            lists = torch_landmarks.landmark_key_select(qkv, *weights, keys=keys, **settings).numpy()
            decided = clear & (ordered[..., keys - 1] - ordered[..., keys] > MARGIN)
            row = found[f"{choice.keep:g}"]
            row["rows"] += decided.size
            row["decided"] += int(decided.sum())
            row["equal"] += int((lists == reference.top_keys(scores, keys)).all(-1)[decided].sum())

    with torch.no_grad(), calibrate.observed(student.model, watch, densely=True):
        for image in images:
            student.model(image)
    return found


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/accuracy/pictures"), show_default=True)
@click.option("--start", "starts", type=click.Choice(list(STARTS)), multiple=True, default=list(STARTS))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for published_predictor.json.")
def main(work: Path, starts: tuple[str, ...], output: Path | None) -> None:
    """See the module's documentation."""
    work.parent.mkdir(parents=True, exist_ok=True)
    folder = collect(work)
    calibration, images = pixels(split.calibration()), pixels(evenly(list_images(folder / "train"), IMAGES))
    watched, judged = pixels(list_images(folder / "held-out")), pixels(evenly(split.publication(), JUDGED))
    table, statistics, compared = [], {}, []
    for name in starts:
        student = made(STARTS[name], calibration)
        before = held(student, judged)
        with progress_bar(name) as progress:
            best = train(student, images, watched, progress)
        learnt, lists = held(student, judged), lists_compared(student, judged[:COMPARED])
        best.give(student.model)
        after = held(student, judged)
        statistics[name] = {"before": before, "learnt": learnt, "after": after, "gains": best.gains, "lists": lists}
        for keep in before:
            figures = [f"{each[keep][WATCHED]:.3f}" for each in (before, learnt, after)]
            changes = [np.subtract(each[keep], before[keep]) for each in (learnt, after)]
            table.append([name, keep, *figures, *(f"{x.min():+.3f} (layer {int(x.argmin())})" for x in changes)])
        compared += [[name, keep, *(f"{count:,}" for count in counts.values())] for keep, counts in lists.items()]
    head = ["start", "keep", f"layer {WATCHED}: before", "learnt", "goes on", "worst layer's change: learnt"]
    print_table("attention that lists hold, by the first phase", [*head, f"goes on (required >= -{LOSS})"], table)
    print_table("lists of trained predictors", ["start", "keep", "rows", "decided", "equal"], compared)
    if output:
        subject = Subject(path=material.DINOV2, sha256=sha256(weights_file()))
        method = {"size": SIZE, "images": len(images), "together": TOGETHER, "judged": len(judged)}
        method |= {"watched": len(watched), "compared": COMPARED}
        write_summary(output / "published_predictor.json", Result("comparison", [subject], method, {}, statistics))


if __name__ == "__main__":
    main()
