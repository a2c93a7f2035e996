"""Measures the drop of sparse models on corrupted images beyond that of the dense model, and of rivals.

    python benchmarks/robustness.py train [--task classes|saliency] [--only NAME] [--work FOLDER]
    python benchmarks/robustness.py measure [--task ..] [--work FOLDER] [-o FOLDER]    # hours; resumes where stopped

Rivals are token merging by ToMe's rule and token pruning (EViT), at about half of the dense multiply-accumulates. All
are trained by one recipe for the same number of steps.

`classes`: DINOv2 ViT-S/14 at 224 px, a linear probe of Fashion-MNIST on frozen features, learnt from clean images.
`saliency`: `sparsifiner_edge.demo.saliency` at 518 px, IoU with true masks (stamps on publication photographs). A dense
map needs every token, so nothing is pruned there. `features`: cosines of the models of `classes`, at several budgets,
on the publication photographs. Trainings use photographs and Fashion-MNIST's training images, none of which is
measured. Needs the packages that `accuracy.py` and `stamps.py` name.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import click
import numpy as np
import stamps
import tome
import torch
from accuracy_images import SIZE, collect, collect_fashion, distilled, fashion_mnist, linked, photographs_at
from fidelity_subject import weights_file
from frontier_points import sum_of_layers
from msgspec.structs import replace
from PIL import Image
from summary import write_summary

import sparsifiner_edge as se
from sparsifiner_edge.cli.common import err_console, group, print_table, progress_bar
from sparsifiner_edge.config import parse_token_keep
from sparsifiner_edge.demo import material, split
from sparsifiner_edge.images import evenly
from sparsifiner_edge.outcomes import ALL, CLEAN, RobustnessResult
from sparsifiner_edge.profiles.stats import small_sample_mean
from sparsifiner_edge.records import write_record
from sparsifiner_edge.results import Quantity, Result, read_result, write_result
from sparsifiner_edge.sparse import patch
from sparsifiner_edge.sparse.layer import CarriedTokens
from sparsifiner_edge.sparse.merge import Merging

MODULE, SALIENCY_SIZE = "sparsifiner_edge.demo.saliency", 518
GALLERY, QUERIES, STAMPS, SEVERITY = 600, 120, 30, 3
"""Number of images for each task; severity 3 is the middle of five."""
STAGES = ("untrained", "trained")
RIVALS = ("ToMe", "EViT")
"""Ours are compared with these, image by image."""


class Contender(NamedTuple):
    """One sparse model.

    Attributes:
        sparsify: Settings that make it.
        by_tome: Merge tokens by ToMe's rule.
        of: Model of the classifier that it reuses, with `sparsify` as its budget.
    """

    sparsify: dict[str, Any]
    by_tome: bool = False
    of: str | None = None


def falling(first: int) -> tuple[int, ...]:
    """Return rates that fall to 0 in the last of twelve layers."""
    return tome.schedule((first, 1), 12)[0]


READ = (0.2, 0.2, 0.5, 1.0)
TASKS: dict[str, dict[str, Contender]] = {
    "classes": {
        "ours": Contender({"keep": 0.25, "merge": falling(29)}),
        "ToMe": Contender({"keep": 1.0, "merge": falling(30)}, by_tome=True),
        "EViT": Contender({"keep": 1.0, "token_keep": parse_token_keep("3:.52,6:.52,9:.52")}),
    },
    "saliency": {
        "ours": Contender({"keep": READ, "background_tokens": 49, "merge": falling(122)}),
        "ToMe": Contender({"keep": 1.0, "merge": falling(140)}, by_tome=True),
    },
    "features": {
        "ours": Contender({}, of="ours"),
        "ours, more": Contender({"keep": 0.5, "merge": falling(18)}, of="ours"),
        "ours, less": Contender({"keep": 0.1, "merge": falling(38)}, of="ours"),
        "ToMe": Contender({}, by_tome=True, of="ToMe"),
        "EViT": Contender({}, of="EViT"),
    },
}
TRAINED = ("classes", "saliency")
RECIPES = {
    "classes": (
        "distil.steps=200",
        "images.smallest_crop=0.8",
        "images.mixed=0",
        "losses.classes=0.06",
        "losses.patches=0.02",
        "budgets=[]",
        "distil.learning_rate=4e-6",
    ),
    "saliency": (
        "batch=2",
        "distil.steps=50",
        "distil.learning_rate=3e-6",
        "clip=0.25",
        "budgets=[]",
        "losses.classes=0",
        "images.mixed=0",
        "check_every=25",
    ),
}


@contextlib.contextmanager
def merging_by(tome_rule: bool) -> Iterator[None]:
    """Make models merge as ToMe does: tokens in raster order, any partner, several into one."""
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
    # A token keeps the place of its last source.
    source = torch.zeros_like(total[..., 0], dtype=torch.long).scatter(1, new, here)[:, self.prefix :] - self.prefix
    places = after if tokens.places is None else after.gather(1, tokens.places)
    return CarriedTokens(merged, total[..., 0], places, tokens.positions.gather(1, source))


def untrained(work: Path, task: str, name: str) -> Path:
    """Return the sparse model before its training."""
    made, contender = work / f"{task}-{name}-untrained", TASKS[task][name]
    if not made.exists():
        options = contender.sparsify | {"calibrate": linked(work / "calibration", split.images("calibration"))}
        options |= {"weights": weights_file(), "img_size": SIZE} if task == "classes" else {}
        with merging_by(contender.by_tome):
            se.sparsify(material.DINOV2 if task == "classes" else f"{MODULE}:saliency", made, **options)
    return made


def training_images(work: Path, task: str) -> Path:
    """Return the folder of `train` and `held-out` images."""
    if task == "classes":
        return collect_fashion(work / "pictures-fashion", collect(work / "pictures"))
    folder = photographs_at(work / "pictures-saliency", SALIENCY_SIZE)
    if not (folder / "few").exists():
        linked(folder / "few", evenly(sorted((folder / "held-out").iterdir()), 8))
    return folder


@click.group()
def main() -> None:
    """Train sparse models and rivals, and measure them on corrupted images."""


_task = click.option("--task", "tasks", type=click.Choice(list(TASKS)), multiple=True, default=list(TASKS))
_trained = click.option("--task", "tasks", type=click.Choice(TRAINED), multiple=True, default=TRAINED)
_only = click.option("--only", multiple=True, help="Names of students.")
_work = click.option("--work", type=click.Path(path_type=Path), default=Path("build/robustness"), show_default=True)


@main.command()
@_trained
@_only
@_work
def train(tasks: tuple[str, ...], only: tuple[str, ...], work: Path) -> None:
    """Train the models, one after the other."""
    work.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        pictures = training_images(work, task)
        for name, contender in TASKS[task].items():
            if only and name not in only:
                continue
            start, judges = untrained(work, task, name), pictures / ("held-out" if task == "classes" else "few")
            options = {"overrides": RECIPES[task], "trust": [MODULE]}
            with merging_by(contender.by_tome):
                distilled(start, pictures / "train", work / f"{task}-{name}", judges, **options)


def student_of(work: Path, task: str, name: str, stage: str) -> Path:
    """Return the model's folder."""
    contender = TASKS[task][name]
    if contender.of:
        return student_of(work, "classes", contender.of, stage)
    return work / f"{task}-{name}" if stage == "trained" else untrained(work, task, name)


def judged(work: Path, task: str, name: str, stage: str, progress: Any) -> RobustnessResult:
    """Evaluate a model under every corruption against the dense model; cached on disk, since it takes long."""
    contender, student = TASKS[task][name], student_of(work, task, name, stage)
    label = f"{task}-{name}" + ("-untrained" if stage == "untrained" else "")
    kept = work / f"{label}.json"
    if kept.exists():
        return read_result(kept, RobustnessResult)
    options: dict[str, Any] = {"corruptions": "all", "severity": SEVERITY, "trust": [MODULE], "progress": progress}
    if task == "features":
        data = linked(work / "publication", split.images("publication"))
        options |= {"against": material.DINOV2, "weights": weights_file(), **contender.sparsify}
    elif task == "classes":
        options |= {"metric": "linear", "gallery": class_folders(work, "train", GALLERY), "queries": QUERIES}
        data = class_folders(work, "test", QUERIES)
        options |= {"against": material.DINOV2, "weights": weights_file()}
    else:
        data = work / "stamps" / "images"
        if not data.exists():
            stamps.write(work / "stamps", STAMPS, SALIENCY_SIZE)
        options |= {"metric": "task", "masks": work / "stamps" / "masks", "against": f"{MODULE}:saliency"}
    groups = group(options, model=se.ModelOptions, budget=se.Budget, options=se.EvaluationOptions)
    with merging_by(contender.by_tome):
        found = se.evaluate_student(student, data, **groups)
    assert isinstance(found, RobustnessResult)
    write_result(kept, found)
    return found


def class_folders(work: Path, part: str, count: int) -> Path:
    """Write Fashion-MNIST as folders of PNGs, one per class."""
    folder = work / f"fashion-{part}"
    if not folder.exists():
        images, made = fashion_mnist(part).first(count), folder.with_suffix(".part")
        for number, label in enumerate(images.labels):
            place = made / f"{label}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images.load(number, 28)).save(place / f"{number:05d}.png")
        made.rename(folder)
    return folder


def _stages(contender: Contender) -> tuple[str, ...]:
    """Return the stages to measure: only "trained" for a model reused at another budget."""
    return ("trained",) if contender.of else STAGES


@main.command()
@_task
@_only
@_work
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for the result.")
def measure(tasks: tuple[str, ...], only: tuple[str, ...], work: Path, output: Path | None) -> None:
    """Measure untrained and trained models, and the differences of ours to each rival, image by image."""
    work.mkdir(parents=True, exist_ok=True)
    found: dict[str, RobustnessResult] = {}
    macs: dict[str, float] = {}
    for task, name, stage in [(t, n, s) for t in tasks for n, one in TASKS[t].items() for s in _stages(one)]:
        folder, label = student_of(work, task, name, stage), f"{task}: {name}, {stage}"
        if not folder.exists() or (only and name not in only):
            err_console.print(f"{label}: left out; not asked for, or not trained in {work}")
            continue
        with progress_bar(label) as progress:
            found[label] = judged(work, task, name, stage, progress)
        budget = TASKS[task][name].sparsify if TASKS[task][name].of else {}
        macs[label] = sum_of_layers(se.load_student(folder, budget=se.Budget(**budget), trust=[MODULE]))
    apart = differences(found)
    show(found, macs, apart)
    if output:
        subjects = [replace(x, path=Path(str(x.path)).name) for result in found.values() for x in result.subjects]
        method = {label: {"images": len(x.method.images), "metric": x.method.metric} for label, x in found.items()}
        samples = {label: result.samples for label, result in found.items()}
        statistics = {label: {"macs": macs[label], **write_record(x.statistics)} for label, x in found.items()}
        result = Result("comparison", subjects, method, samples, statistics | {"differences": write_record(apart)})
        write_summary(output / "robustness.json", result, statistics=short(found, macs) | write_record(apart))


def differences(found: dict[str, RobustnessResult]) -> dict[str, Quantity]:
    """Return the extra drop of ours less that of each rival, image by image; untrained for rivals without training."""
    apart = {}
    for label, ours in found.items():
        task, _, name = label.partition(": ")
        for rival in RIVALS if name.startswith("ours") else ():
            names = [one for stage in reversed(STAGES) if (one := f"{task}: {rival}, {stage}") in found]
            for score in ours.samples if names else ():
                less = extra_drop(ours, score) - extra_drop(found[names[0]], score)
                apart[f"{label} less {names[0]}: {score}"] = small_sample_mean(less)
    return apart


def extra_drop(result: RobustnessResult, score: str) -> Any:
    """Return the drop beyond that of the dense model, one value per image."""
    apart = {label: np.subtract(x["subject"], x["teacher"]) for label, x in result.samples[score].items()}
    clean = apart.pop(CLEAN)
    return clean - np.mean(list(apart.values()), 0)


def short(found: dict[str, RobustnessResult], macs: dict[str, float]) -> dict[str, Any]:
    """Return statistics for the summary: all corruptions together, and the extra drop of each."""
    rows = {}
    for label, result in found.items():
        for score, by_name in result.statistics.items():
            each = {name: x.extra_drop for name, x in by_name.items() if name not in (CLEAN, ALL)}
            row = {"macs": macs[label], CLEAN: by_name[CLEAN], ALL: by_name[ALL], "each": each}
            rows[f"{label}: {score}"] = write_record(row)
    return rows


def show(found: dict[str, RobustnessResult], macs: dict[str, float], apart: dict[str, Quantity]) -> None:
    table = []
    for label, result in found.items():
        for score, by_name in result.statistics.items():
            clean, every = by_name[CLEAN], by_name[ALL]
            table.append(
                [
                    f"{label}: {score}",
                    every.images,
                    f"{macs[label] / 1e9:.1f}",
                    f"{100 * clean.teacher:.1f}",
                    f"{100 * clean.subject:.1f}",
                    f"{100 * every.teacher_drop.value:.1f}",
                    in_points(every.extra_drop),
                ]
            )
    head = ["", "images", "G MACs", "dense, clean", "clean", "dense drop", "extra drop"]
    print_table(f"Severity {SEVERITY}, points of 100", head, table)
    print_table(
        "Extra loss of ours less a rival's, image by image", ["", ""], [[k, in_points(x)] for k, x in apart.items()]
    )


def in_points(x: Quantity) -> str:
    """Return percentage points."""
    of_100 = x.times(100)
    return f"{of_100.value:+.2f} ({of_100.low:+.2f} to {of_100.high:+.2f})"


if __name__ == "__main__":
    main()
