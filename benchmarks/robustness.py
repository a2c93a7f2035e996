"""What corruptions cost sparse models beyond dense ones, beside the rivals: token merging by ToMe's rule and token
pruning (EViT), at about half of the dense multiply-accumulates, all trained by one recipe for as many steps.

    python benchmarks/robustness.py train [--task classes|saliency] [--only NAME] [--work FOLDER]
    python benchmarks/robustness.py measure [--task ..] [--work FOLDER] [-o FOLDER]    # hours; goes on where stopped

`classes`: DINOv2 ViT-S/14 at 224 px, a linear probe of Fashion-MNIST on frozen features, learnt from clean images.
`saliency`: `sparsifiner_edge.demo.saliency` at 518 px, IoU with true masks (stamps on publication photographs). A dense
map needs every token, so nothing is pruned there. Trainings see photographs and Fashion-MNIST's training images, none
that is measured on; "corrupted" trainings see the fifteen of ImageNet-C, and none of a camera's own. Needs the packages
that `accuracy.py` and `stamps.py` name.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import click
import numpy as np
import stamps
import tome
import torch
from accuracy_images import SIZE, collect, collect_fashion, linked, write_photographs
from fashion import fashion_mnist
from fidelity_subject import weights_file
from frontier_points import sum_of_layers
from matplotlib.figure import Figure
from PIL import Image

import sparsifiner_edge as se
from sparsifiner_edge.arrays import Array
from sparsifiner_edge.cli.common import err_console, print_table, progress_bar
from sparsifiner_edge.config import parse_token_keep
from sparsifiner_edge.demo import material, split
from sparsifiner_edge.evaluate import robustness
from sparsifiner_edge.evaluate.extract import Extractor, open_both
from sparsifiner_edge.evaluate.robustness import RobustnessResult
from sparsifiner_edge.images import evenly
from sparsifiner_edge.records import write_record
from sparsifiner_edge.results import Result, read_result, write_result
from sparsifiner_edge.sparse import patch
from sparsifiner_edge.sparse.layer import CarriedTokens
from sparsifiner_edge.sparse.merge import Merging

MODULE, SALIENCY_SIZE = "sparsifiner_edge.demo.saliency", 518
GALLERY, QUERIES, STAMPS, SEVERITY = 600, 120, 15, "3"
"""Images of each task. Severity 3 is what is required; the middle of five."""
STAGES = ("untrained", "trained")
REQUIRED = 1.0
"""Points that ours may lose beyond the dense model, mean of ImageNet-C's fifteen; and aimed at .3."""


class Contender(NamedTuple):
    """One student. sparsify: how it is made. overrides: of the recipe. by_tome: whether tokens merge by ToMe's rule."""

    sparsify: dict[str, Any]
    overrides: tuple[str, ...] = ()
    by_tome: bool = False


def falling(first: int) -> tuple[int, ...]:
    """Rates that fall to 0 in the last of twelve layers."""
    return tome.schedule((first, 1), 12)[0]


CORRUPTED = ("images.corrupted=0.5",)
READ = (0.2, 0.2, 0.5, 1.0)
TASKS: dict[str, dict[str, Contender]] = {
    "classes": {
        "ours": Contender({"keep": 0.25, "merge": falling(29)}),
        "ours, corrupted": Contender({"keep": 0.25, "merge": falling(29)}, CORRUPTED),
        "ToMe": Contender({"keep": 1.0, "merge": falling(30)}, by_tome=True),
        "EViT": Contender({"keep": 1.0, "token_keep": parse_token_keep("3:.52,6:.52,9:.52"), "fuse_tokens": True}),
    },
    "saliency": {
        "ours": Contender({"keep": READ, "cells": 49, "merge": falling(122)}),
        "ours, corrupted": Contender({"keep": READ, "cells": 49, "merge": falling(122)}, CORRUPTED),
        "ToMe": Contender({"keep": 1.0, "merge": falling(140)}, by_tome=True),
    },
}
RECIPES = {
    "classes": (
        "distil.steps=200", "images.smallest_crop=0.8", "images.cut_mix=0", "losses.classes=0.06",
        "losses.patches=0.02", "budgets.keep=[]", "distil.learning_rate=4e-6",
    ),
    "saliency": (
        "batch=2", "distil.steps=50", "distil.learning_rate=3e-6", "clip=0.25", "budgets.keep=[]", "losses.classes=0",
        "images.cut_mix=0", "check_every=25",
    ),
}  # fmt: skip


@contextlib.contextmanager
def remembered(*folders: Path) -> Iterator[None]:
    """Whether what the subject and its teacher give for an image is kept in a folder each, and looked up there."""

    def opened(*arguments: Any) -> tuple[Extractor, Extractor]:
        subject, teacher = (_kept_in(*pair) for pair in zip(folders, open_both(*arguments), strict=True))
        return subject, teacher

    with mock.patch.object(robustness, "open_both", opened):
        yield


def _kept_in(folder: Path, extractor: Extractor) -> Extractor:
    folder.mkdir(parents=True, exist_ok=True)

    def extract(images: Array) -> dict[str, Array]:
        files = [folder / f"{hashlib.sha256(image.tobytes()).hexdigest()[:32]}.npz" for image in images]
        missing = [number for number, file in enumerate(files) if not file.exists()]
        if missing:
            found = {name: x for name, x in extractor.extract(images[missing]).items() if name != "tokens"}
            for place, number in enumerate(missing):
                made = files[number].with_suffix(".part.npz")
                np.savez(made, **{name: x[place] for name, x in found.items()})
                made.replace(files[number])
        rows = [np.load(file) for file in files]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0].files}

    return extractor._replace(extract=extract)


@contextlib.contextmanager
def merging_by(tome_rule: bool) -> Iterator[None]:
    """Whether students merge as ToMe does: tokens in raster order, any partner, several into one."""
    with contextlib.ExitStack() as stack:
        if tome_rule:
            stack.enter_context(mock.patch.object(Merging, "forward", _tome))
            stack.enter_context(mock.patch.object(patch, "hilbert_order", lambda *grid: np.arange(math.prod(grid))))
        yield


def _tome(self: Merging, tokens: CarriedTokens, qkv: torch.Tensor, num_heads: int) -> CarriedTokens:
    x = tokens.values
    sizes = torch.ones_like(x[:, :, 0], dtype=torch.float32) if tokens.sizes is None else tokens.sizes
    keys = qkv.detach().float().unflatten(-1, (3, num_heads, -1))[:, :, 1].mean(2)
    here = torch.arange(x.shape[1]).expand(x.shape[:2])
    merged, total, new = tome.merge(keys, x, sizes[..., None], here, self.merged)
    after = new[:, self.prefix :] - self.prefix
    # A token stands where the last of its sources does.
    source = torch.zeros_like(total[..., 0], dtype=torch.long).scatter(1, new, here)[:, self.prefix :] - self.prefix
    places = after if tokens.places is None else after.gather(1, tokens.places)
    return CarriedTokens(merged, total[..., 0], places, tokens.positions.gather(1, source))


def untrained(work: Path, task: str, name: str) -> Path:
    """The student before its training."""
    made, contender = work / f"{task}-{name}-untrained", TASKS[task][name]
    if not made.exists():
        calibrate = linked(work / "calibration", split.calibration())
        with merging_by(contender.by_tome):
            if task == "classes":
                se.sparsify(
                    material.DINOV2,
                    made,
                    weights=weights_file(),
                    img_size=SIZE,
                    calibrate=calibrate,
                    **contender.sparsify,
                )
            else:
                se.sparsify(f"{MODULE}:saliency", made, calibrate=calibrate, **contender.sparsify)
    return made


def training_images(work: Path, task: str) -> Path:
    """Folders `train` and `held-out`."""
    if task == "classes":
        return collect_fashion(work / "pictures-fashion", collect(work / "pictures"))
    folder = work / "pictures-saliency"
    if not folder.exists():
        made = folder.with_suffix(".part")
        shutil.rmtree(made, ignore_errors=True)
        write_photographs(made, SALIENCY_SIZE)
        made.rename(folder)
    if not (folder / "few").exists():
        linked(folder / "few", evenly(sorted((folder / "held-out").iterdir()), 8))
    return folder


@click.group()
def main() -> None:
    """See the module's documentation."""


_task = click.option("--task", "tasks", type=click.Choice(list(TASKS)), multiple=True, default=list(TASKS))
_only = click.option("--only", multiple=True, help="Names of students.")
_work = click.option("--work", type=click.Path(path_type=Path), default=Path("build/robustness"), show_default=True)


@main.command()
@_task
@_only
@_work
def train(tasks: tuple[str, ...], only: tuple[str, ...], work: Path) -> None:
    """Train the students, one after the other."""
    work.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        pictures = training_images(work, task)
        for name, contender in TASKS[task].items():
            output = work / f"{task}-{name}"
            if output.exists() or (only and name not in only):
                continue
            start = time.monotonic()
            with progress_bar(output.name) as progress, merging_by(contender.by_tome):
                summary = se.distill_student(
                    untrained(work, task, name), pictures / "train", output, trust=[MODULE], progress=progress,
                    overrides=(*RECIPES[task], *contender.overrides),
                    held_out=pictures / ("held-out" if task == "classes" else "few"),
                    resume=(work / f"{output.name}.training" / "checkpoint.pt").exists(),
                )  # fmt: skip
            told = f"{(time.monotonic() - start) / 60:.1f} minutes, {write_record(summary.fidelity)}, {summary.kept}"
            click.echo(f"{output.name}: {told}")


def judged(work: Path, task: str, name: str, stage: str, progress: Any) -> RobustnessResult:
    """A student under every corruption, beside the dense model; kept on disk, as are outputs, for it takes long."""
    contender = TASKS[task][name]
    student = untrained(work, task, name) if stage == "untrained" else work / f"{task}-{name}"
    kept = work / f"{student.name}.json"
    if kept.exists():
        return read_result(kept, RobustnessResult)
    options: dict[str, Any] = {"corruptions": "all", "severity": SEVERITY, "trust": [MODULE], "progress": progress}
    if task == "classes":
        options |= {"metric": "linear", "gallery": class_folders(work, "train", GALLERY), "queries": QUERIES}
        data = class_folders(work, "test", QUERIES)
        options |= {"against": material.DINOV2, "weights": weights_file()}
    else:
        data = work / "stamps" / "images"
        if not data.exists():
            stamps.write(work / "stamps", STAMPS, SALIENCY_SIZE)
        options |= {"metric": "task", "masks": work / "stamps" / "masks", "against": f"{MODULE}:saliency"}
    with merging_by(contender.by_tome), remembered(work / "outputs" / student.name, work / "outputs" / f"{task}-dense"):
        found = se.evaluate_student(student, data, **options)
    assert isinstance(found, RobustnessResult)
    write_result(kept, found)
    return found


def class_folders(work: Path, part: str, count: int) -> Path:
    """Fashion-MNIST as folders of PNGs, one per class."""
    folder = work / f"fashion-{part}"
    if not folder.exists():
        images, made = fashion_mnist(part).first(count), folder.with_suffix(".part")
        for number, label in enumerate(images.labels):
            place = made / f"{label}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images.load(number, 28)).save(place / f"{number:05d}.png")
        made.rename(folder)
    return folder


@main.command()
@_task
@_only
@_work
@click.option("--stage", "stages", type=click.Choice(STAGES), multiple=True, default=STAGES)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for robustness.json, .png.")
def measure(
    tasks: tuple[str, ...], only: tuple[str, ...], work: Path, stages: tuple[str, ...], output: Path | None
) -> None:  # fmt: skip
    """Measure students untrained, and those that were trained."""
    work.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, Any]] = {}
    for task in tasks:
        rows[task] = {}
        for name in [x for x in TASKS[task] if not only or x in only]:
            for stage in stages:
                if stage == "trained" and not (work / f"{task}-{name}").exists():
                    err_console.print(f"{task}, {name}: not trained")
                    continue
                if stage == "untrained" and TASKS[task][name].overrides:
                    continue  # The same as without them.
                with progress_bar(f"{task}, {name}, {stage}") as progress:
                    found = judged(work, task, name, stage, progress)
                student = se.load_student(untrained(work, task, name), trust=[MODULE])
                rows[task][f"{name}, {stage}"] = {"macs": sum_of_layers(student), "found": found}
        show(task, rows[task])
    if output:
        output.mkdir(parents=True, exist_ok=True)
        write_result(output / "robustness.json", _as_result(rows))
        draw(rows, output / "robustness.png")


def _as_result(rows: dict[str, dict[str, Any]]) -> Result:
    """All of them as one result."""
    each = [(f"{task}: {name}", row) for task, found in rows.items() for name, row in found.items()]
    subjects = [subject for _, row in each for subject in row["found"].subjects]
    samples = {label: row["found"].samples for label, row in each}
    statistics = {label: {"macs": row["macs"], **write_record(row["found"].statistics)} for label, row in each}
    method = {
        label: write_record(row["found"].method) | {"images": len(row["found"].method.images)} for label, row in each
    }
    return Result("comparison", subjects, method, samples, statistics)


def show(task: str, rows: dict[str, Any]) -> None:
    """Clean, and what is lost to the fifteen and to a camera's own."""
    table = []
    for name, row in rows.items():
        found: RobustnessResult = row["found"]
        for score, groups in found.statistics.stability.items():
            clean = found.statistics.clean[score]
            extra = [groups[group].extra_lost.times(100) for group in ("common", "camera")]
            table.append([
                name, f"{row['macs'] / 1e9:.1f}", f"{100 * clean['teacher']:.1f}", f"{100 * clean['subject']:.1f}",
                f"{100 * groups['common'].teacher_lost.value:.1f}",
                *(f"{x.value:+.2f} ({x.low:+.2f} to {x.high:+.2f})" for x in extra),
            ])  # fmt: skip
    head = ["", "G MACs", "dense, clean", "clean", "dense loses", "extra loss, ImageNet-C", "extra loss, camera"]
    print_table(f"{task}, severity {SEVERITY}, points of 100; required <= {REQUIRED}", head, table)


def draw(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """The extra loss under each corruption, a panel per task and a row of points per student, with intervals."""
    figure = Figure(figsize=(10, 4 * len(rows)), layout="constrained")
    for axes, (task, found) in zip(figure.subplots(len(rows), squeeze=False)[:, 0], rows.items(), strict=True):
        for number, (name, row) in enumerate(found.items()):
            (groups,) = row["found"].statistics.stability.values()
            names = [*row["found"].method.corruptions, "common", "camera"]
            points = [groups[one].extra_lost.times(100) for one in names]
            spread = [[x.value - x.low for x in points], [x.high - x.value for x in points]]
            places = np.arange(len(names)) + 0.15 * (number - (len(found) - 1) / 2)
            axes.errorbar(places, [x.value for x in points], spread, fmt="o", markersize=3, linewidth=1, label=name)
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.axhline(REQUIRED, color="grey", linewidth=0.8, linestyle=":")
        axes.set_xticks(range(len(names)), [one.replace("_", " ") for one in names], rotation=60, ha="right")
        axes.set_title(f"{task}: points lost beyond the dense model at severity {SEVERITY}", fontsize=10)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
