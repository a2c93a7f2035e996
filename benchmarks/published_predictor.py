"""The published recipe's first phase: do predictors keep what their lists hold? Beside the start that did not.

    python benchmarks/published_predictor.py [--start NAME] [-o FOLDER]    # a quarter of an hour for each start

DINOv2 ViT-S/14 at 196 px, preset "paper", as many steps at the recipe's learning rates as five epochs of ImageNet make
with eight processes. The backbone does not learn in that phase and attends to everything, so what its layers see of an
image is computed once; a step sees few images instead of 1,344. Trained on photographs (`accuracy_images.py`), measured
on such as were held out: the share of attention that lists of a quarter and a tenth of the keys hold, layer by layer.
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
from torch import Tensor

from sparsifiner_edge.artifacts import sha256
from sparsifiner_edge.cli.common import print_table, progress_bar
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.demo import material, split
from sparsifiner_edge.distill.captured import LOSS, Captured, attention_captured
from sparsifiner_edge.distill.recipe import read_recipe
from sparsifiner_edge.images import evenly, list_images, load_image
from sparsifiner_edge.results import Result, Subject, write_result
from sparsifiner_edge.sparse import calibrate
from sparsifiner_edge.sparse.hosts.timm import load_model, preprocessing
from sparsifiner_edge.sparse.student import Student, make_student
from sparsifiner_edge.sparse.weights import normalise

SIZE, KEEPS = 196, (0.25, 0.1)
IMAGES, TOGETHER, JUDGED = 96, 4, 8
IMAGENET, WATCHED = 1_281_167, 5
"""Images of an epoch; the layer that the table shows beside the worst."""
STARTS = {"now": (calibrate.UP_START, calibrate.UP_CLASS), "entries of 1": (1.0, 1.0)}


def made(start: tuple[float, float], calibration: Sequence[Tensor]) -> Student:
    """A student whose up-projection starts at these entries."""
    model = load_model(material.DINOV2, weights_file(), SIZE)
    student = make_student(material.DINOV2, model, SparsityConfig.for_preset("paper", keep=KEEPS[0]))
    with mock.patch.multiple(calibrate, UP_START=start[0], UP_CLASS=start[1]):
        calibrate.calibrate_from_images(student.model, calibration)
    return student


def pixels(paths: Sequence[Path]) -> list[Tensor]:
    """As the model takes them."""
    model = load_model(material.DINOV2, weights_file(), SIZE)
    pre = preprocessing(model)
    return [normalise(torch.from_numpy(load_image(path, SIZE))[None], pre) for path in paths]


def train(student: Student, images: Sequence[Tensor], progress: Any) -> None:
    """The phase, as `distill.train` runs it: AdamW at the recipe's rates and decay, its weight and clipping."""
    recipe = read_recipe("imagenet-deit-s")
    phase, layers = recipe.reconstruct, calibrate.sparse_layers(student.model)
    steps = math.ceil(phase.epochs * IMAGENET / (recipe.batch * 8))
    seen: dict[Any, list[Tensor]] = {layer: [] for layer in layers}
    with torch.no_grad(), calibrate.observed(student.model, lambda x, qkv, _: seen[x].append(qkv), densely=True):
        for image in images:
            student.model(image)
    parameters = [parameter for layer in layers for parameter in layer.select.parameters()]
    optimiser = torch.optim.AdamW(parameters, weight_decay=recipe.predictor_weight_decay)
    generator, draw = torch.Generator().manual_seed(0), np.random.default_rng(0)
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


def held(student: Student, images: Sequence[Tensor]) -> Captured:
    """At each share of keys; every image counts, not the few that a training looks at."""
    budgets = [dataclasses.replace(student.sparsity, keep=keep) for keep in KEEPS]
    each = [attention_captured(student.model, [image], budgets) for image in images]
    return {keep: np.mean([found[keep] for found in each], 0).tolist() for keep in each[0]}


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/accuracy/pictures"), show_default=True)
@click.option("--start", "starts", type=click.Choice(list(STARTS)), multiple=True, default=list(STARTS))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for published_predictor.json.")
def main(work: Path, starts: tuple[str, ...], output: Path | None) -> None:
    """See the module's documentation."""
    work.parent.mkdir(parents=True, exist_ok=True)
    folder = collect(work)
    calibration, images = pixels(split.calibration()), pixels(evenly(list_images(folder / "train"), IMAGES))
    judged = pixels(evenly(list_images(folder / "held-out"), JUDGED))
    table, statistics = [], {}
    for name in starts:
        student = made(STARTS[name], calibration)
        before = held(student, judged)
        with progress_bar(name) as progress:
            train(student, images, progress)
        after = held(student, judged)
        statistics[name] = {"before": before, "after": after}
        for keep in before:
            change = np.subtract(after[keep], before[keep])
            figures = f"{before[keep][WATCHED]:.3f}", f"{after[keep][WATCHED]:.3f}"
            table.append([name, keep, *figures, f"{change.min():+.3f} (layer {int(change.argmin())})"])
    head = ["start", "keep", f"layer {WATCHED}: before", "after", f"worst layer's change (required >= -{LOSS})"]
    print_table("attention that lists hold, by the first phase", head, table)
    if output:
        output.mkdir(parents=True, exist_ok=True)
        subject = Subject(path=material.DINOV2, sha256=sha256(weights_file()))
        method = {"size": SIZE, "images": len(images), "together": TOGETHER, "judged": len(judged)}
        write_result(output / "published_predictor.json", Result("comparison", [subject], method, {}, statistics))


if __name__ == "__main__":
    main()
