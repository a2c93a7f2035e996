"""Measures what a short distillation gives: fidelity on photographs and accuracy on Fashion-MNIST.

    python benchmarks/accuracy.py train [--only edge] [--work FOLDER]     # half an hour to an hour each
    python benchmarks/accuracy.py measure [--work FOLDER] [-o FOLDER]     # up to an hour

Fidelity is measured on photographs that were not used for any choice (and on those that were), accuracy in comparison
with the teacher. The model is DINOv2 ViT-S/14 at 224 px with its real weights. Trainings see no labels and no test
images. They use photographs that Debian packages (`split.training`), complete and in crops, the calibration images, and
some training images of Fashion-MNIST. There are three trainings: `edge`, `merge` (token merging) and `paper` (the
published preset).

Debian packages for training (apt-get install --no-install-recommends):

    gnome-backgrounds lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 mate-backgrounds
    plasma-workspace-wallpapers ukui-wallpapers dataset-fashion-mnist

To measure, also budgie-backgrounds and opencv-doc. Both commands resume where they were stopped.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import tome
from accuracy_images import GALLERY, SIZE, Clothes, collect, distilled, fashion_mnist, linked
from fidelity_subject import weights_file
from summary import brief, said, write_summary

from sparsifiner_edge import Budget, ModelOptions
from sparsifiner_edge.cli.common import err_console, group, print_table
from sparsifiner_edge.demo import material, split
from sparsifiner_edge.evaluate.classes import fit_neighbours, fit_probe
from sparsifiner_edge.evaluate.evaluate import evaluate_student
from sparsifiner_edge.export.export import export_bundle
from sparsifiner_edge.files import hold_lock
from sparsifiner_edge.outcomes import ScoresResult
from sparsifiner_edge.profiles import stats
from sparsifiner_edge.records import write_record
from sparsifiner_edge.results import Result, Subject
from sparsifiner_edge.runtime import open_session
from sparsifiner_edge.sparse.student import load_student, save_student, sparsify

FINER = ((16, 4), (8, 4))
"""Tile and query_pool of additional rows; the sparse model's own are 16 and 8."""
LONG = {
    "518 px": {"keep": (0.05, 0.05, 0.1, 0.5), "merge": tome.schedule((180, 1.5), 12)[0]},
    "518 px, dense from layer 3": {"keep": (0.05, 0.05, 0.1, 1.0), "merge": tome.schedule((190, 1.5), 12)[0]},
}
"""Budgets of `merge` (trained at 224 px) at 518 px: 17.3 and 17.4 G multiply-accumulates.

The first suits the trained model, which has learnt to read fewer keys and spends the savings on tokens, the second the
untrained one. Both were chosen on the development set.
"""
PAIRS = {
    "edge less paper, keep 0.25": ("edge, trained, keep 0.25", "paper, trained, keep 0.25"),
    "paper: trained less untrained": ("paper, trained, keep 0.25", "paper, untrained, keep 0.25"),
    "merge, 518 px: trained less untrained": ("merge, trained, 518 px", "merge, untrained, 518 px"),
    "merge, 518 px: trained less untrained, each as suits it": (
        "merge, trained, 518 px",
        "merge, untrained, 518 px, dense from layer 3",
    ),
}
FASHION: dict[str, tuple[str, dict[str, Any]]] = {
    "keep .10": ("edge", {"keep": 0.1}),
    "keep .25, merge 8": ("merge", {"keep": 0.25, "merge": (8,)}),
}
"""Rows of Fashion-MNIST: the training that each measures, and its budget."""
WORK = click.option("--work", type=click.Path(path_type=Path), default=Path("build/accuracy"), show_default=True)


class Run(NamedTuple):
    """One training: how its sparse model is made, changes to the recipe, and the budgets to measure."""

    sparsify: dict[str, Any]
    overrides: tuple[str, ...]
    budgets: tuple[dict[str, Any], ...]


RUNS = {
    "edge": Run(
        {"keep": 0.25},
        ("precision=bf16",),
        ({"keep": 0.25}, {"keep": 0.1}, {"keep": 0.05}, {"keep": 0.1, "token_keep": ((3, 0.7), (6, 0.7), (9, 0.7))}),
    ),
    "merge": Run(
        {"keep": 0.25, "merge": (8,)},
        # Budgets without merging stabilise the backbone: otherwise mild budgets get worse from step 200 on.
        (
            "budgets="
            + json.dumps(
                [{"keep": keep, "merge": merge} for keep in ("0.1", "0.25", "0.5") for merge in ("0", "8", "20..0")]
            ).replace(":", " ="),
            "precision=bf16",
            "distil.learning_rate=2e-6",
        ),
        ({"keep": 0.25, "merge": (8,)}, {"keep": 1.0, "merge": (8,)}),
    ),
    # As published: predictors are trained first and alone, without mixed images. They have more to learn than the
    # others.
    "paper": Run(
        {"preset": "paper", "keep": 0.25},
        (
            "budgets=[]",
            "images.mixed=0",
            "reconstruct.steps=100",
            "distil.steps=300",
            "distil.learning_rate=1e-5",
            "distil.predictor_learning_rate=0",
        ),
        ({"keep": 0.25},),
    ),
}


def untrained(work: Path, name: str) -> Path:
    """Return the sparse model before its training."""
    made = work / f"{name}-untrained"
    if made.exists():
        return made
    calibrate = linked(work / "calibration", split.images("calibration"))
    options = RUNS[name].sparsify
    return sparsify(material.DINOV2, made, weights=weights_file(), img_size=SIZE, calibrate=calibrate, **options)


@click.group()
def main() -> None:
    """Train models and measure them."""


@main.command()
@WORK
@click.option("--only", type=click.Choice(list(RUNS)), multiple=True, default=list(RUNS))
def train(work: Path, only: tuple[str, ...]) -> None:
    """Train the sparse models."""
    work.mkdir(parents=True, exist_ok=True)
    with hold_lock(work):  # two trainings may be started at once
        pictures = collect(work / "pictures")
    for name in only:
        start, overrides = untrained(work, name), RUNS[name].overrides
        distilled(start, pictures / "train", work / name, pictures / "held-out", overrides=overrides)


def fidelity(work: Path, tell: Any) -> dict[str, Any]:
    """Return the cosine to the teacher: untrained, trained, and with fewer tokens; see `_row`."""
    teacher: dict[str, Any] = {"against": material.DINOV2, "weights": weights_file()}
    rows = {}
    for name, run in RUNS.items():
        for stage, folder in (("untrained", work / f"{name}-untrained"), ("trained", work / name)):
            if not folder.exists():
                continue
            for budget in run.budgets:
                label = f"{name}, {stage}, keep {budget['keep']:g}" + ", tokens .7" * ("token_keep" in budget)
                label += f", merge {budget['merge'][0]}" if "merge" in budget else ""
                tell(label)
                rows[label] = _row(work, folder, **teacher, **budget)
            for tile, query_pool in FINER if name == "edge" else ():
                label = f"{name}, {stage}, keep 0.05, tile {tile}, query_pool {query_pool}"
                tell(label)
                rows[label] = _row(work, finer(work, folder, tile, query_pool), **teacher, keep=0.05)
            for label, budget in LONG.items() if name == "merge" else ():
                tell(f"{name}, {stage}, {label}")
                subject, dense = long_bundle(work, folder, label, **budget), long_bundle(work)
                rows[f"{name}, {stage}, {label}"] = _row(work, subject, against=dense)
    return rows


def finer(work: Path, source: Path, tile: int, query_pool: int) -> Path:
    """Return a sparse model with key lists per `tile` queries, selected by `query_pool` of them, as in exports."""
    student = load_student(source)
    sparsity = dataclasses.replace(student.sparsity, tile=tile, query_pool=query_pool)
    return save_student(dataclasses.replace(student, sparsity=sparsity), work / f"{source.name}-{tile}-{query_pool}")


def long_bundle(work: Path, student: Path | None = None, label: str = "teacher", **budget: Any) -> Path:
    """Return a bundle of a sparse model at 518 px, or of the teacher."""
    made = work / f"bundle-{'' if student is None else student.name}-{label.replace(', ', '-').replace(' ', '-')}"
    weights = weights_file() if student is None else None
    return (
        made
        if made.exists()
        else export_bundle(
            student or material.DINOV2, made, model=ModelOptions(img_size=518, weights=weights), budget=Budget(**budget)
        )
    )


def _row(work: Path, subject: Path, **options: Any) -> dict[str, Any]:
    """Return cosines on the publication set and on the development set."""
    groups = group(options, model=ModelOptions, budget=Budget)
    published = evaluate_student(subject, linked(work / "publication", split.images("publication")), **groups)
    chosen_by = evaluate_student(subject, linked(work / "development", split.images("development")), **groups)
    assert isinstance(published, ScoresResult)
    assert isinstance(chosen_by, ScoresResult)
    of = write_record(published.statistics)
    return {
        "samples": published.samples,
        "patches": of["patches_cosine"]["mean"],
        "classes": of["features_cosine"]["mean"],
        "development": write_record(chosen_by.statistics)["patches_cosine"]["mean"],
    }


def differences(rows: dict[str, Any]) -> dict[str, Any]:
    """Return mean differences of patch cosines, image by image."""
    means = {}
    for label, pair in PAIRS.items():
        if all(name in rows for name in pair):
            first, second = (np.asarray(rows[name]["samples"]["patches_cosine"]) for name in pair)
            means[label] = write_record(stats.small_sample_mean(first - second))
    return means


def fashion_bundle(work: Path, label: str) -> Path:
    """Return the bundle for Fashion-MNIST; its name has the hash of the trained weights, so it cannot be outdated."""
    if label == "teacher":
        source, name, options = material.DINOV2, "teacher", {"weights": weights_file(), "img_size": SIZE}
    else:
        student, options = FASHION[label]
        source = work / student
        digest = json.loads((source / "config.json").read_text())["weights_sha256"]
        name = f"{label.replace(' ', '-').replace(',', '')}-{digest[:8]}"
    made = work / f"bundle-{name}"
    return made if made.exists() else export_bundle(source, made, **group(options, model=ModelOptions, budget=Budget))


def features(bundle: Path, pictures: Clothes, tell: Any) -> Any:
    """Return class features of labelled images, cached on disk."""
    path = bundle.with_name(f"features-{bundle.name}-{pictures.name.split()[-1]}.npy")
    if path.exists():
        return np.load(path)
    rows = []
    with open_session(bundle) as session:
        for number in range(len(pictures)):
            rows.append(session.infer({"image": pictures.load(number, SIZE)[None]})["features"][0])
            if number % 100 == 0:
                tell(f"{bundle.name}: {number} of {len(pictures)}")
    np.save(path.with_suffix(".part.npy"), np.stack(rows))
    path.with_suffix(".part.npy").rename(path)
    return np.stack(rows)


def fashion(work: Path, tell: Any) -> dict[str, Any]:
    """Evaluate neighbours and linear probe on frozen features, for the teacher and the trained models of `FASHION`."""
    gallery, queries = fashion_mnist("train").first(GALLERY), fashion_mnist("test")
    right: dict[str, dict[str, Any]] = {"knn": {}, "linear": {}}
    for label in ("teacher", *(label for label, (student, _) in FASHION.items() if (work / student).exists())):
        bundle = fashion_bundle(work, label)
        known, asked = (features(bundle, pictures, tell) for pictures in (gallery, queries))
        for metric, fit in (("knn", fit_neighbours), ("linear", fit_probe)):
            tell(f"{label}: {metric}")
            right[metric][label] = fit(known, gallery.labels).predict(asked) == queries.labels
    return {
        metric: {
            label: {
                "subject_percent": 100 * float(ours.mean()),
                "teacher_percent": 100 * float(found["teacher"].mean()),
                "difference_points": write_record(stats.small_sample_mean(100.0 * ours - 100.0 * found["teacher"])),
            }
            for label, ours in found.items()
            if label != "teacher"
        }
        for metric, found in right.items()
    }


@main.command()
@WORK
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for accuracy.json.")
def measure(work: Path, output: Path | None) -> None:
    """Measure the trained models."""
    trained = {name: json.loads((work / name / "config.json").read_text()) for name in RUNS if (work / name).exists()}
    if not trained:
        raise click.UsageError(f"nothing is trained in {work}: python benchmarks/accuracy.py train")
    with err_console.status("") as status:
        cosines, accuracies = fidelity(work, status.update), fashion(work, status.update)
    apart = differences(cosines)
    if output:
        subjects = [Subject(path=name, sha256=config["weights_sha256"]) for name, config in trained.items()]
        trainings = {name: brief(config["provenance"]["training"]) for name, config in trained.items()}
        samples = {label: row.pop("samples") for label, row in cosines.items()}
        statistics = {"fidelity": cosines, "differences": apart, "fashion": accuracies}
        result = Result("evaluation", subjects, {"trainings": trainings}, samples, statistics)
        write_summary(output / "accuracy.json", result)
    show(cosines, apart, accuracies)


def show(cosines: dict[str, Any], apart: dict[str, Any], accuracies: dict[str, Any]) -> None:
    rows = [
        [label, *(f"{x[part]['value']:.4f}" for part in ("patches", "development", "classes"))]
        for label, x in cosines.items()
    ]
    title = f"Cosine to the teacher, {len(split.images('publication'))} photographs, 224 px where nothing is said"
    print_table(title, ["", "patches", "the eight", "class"], rows)
    for label, x in apart.items():
        click.echo(f"{label}: {said(x, 4, '+')}")
    for metric, of in accuracies.items():
        rows = [
            [label, f"{x['teacher_percent']:.2f}", f"{x['subject_percent']:.2f}", said(x["difference_points"], 2, "+")]
            for label, x in of.items()
        ]
        columns = ["", "teacher", "student", "difference"]
        print_table(f"Fashion-MNIST, {metric}, percent", columns, rows)


if __name__ == "__main__":
    main()
