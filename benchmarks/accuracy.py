"""What a short distillation gives: fidelity on photographs that nothing was chosen by (and on those it was), accuracy
on Fashion-MNIST, beside the teacher.

    python benchmarks/accuracy.py train [--only edge] [--work FOLDER]     # half an hour to an hour each
    python benchmarks/accuracy.py measure [--work FOLDER] [-o FOLDER]     # up to an hour
    python benchmarks/accuracy.py classifier [--work FOLDER] -o BUNDLE    # a classifier of Fashion-MNIST, to run

DINOv2 ViT-S/14 at 224 px with its real weights. Trainings see no label and none of the test images: photographs that
Debian packages (`split.training`), whole and in crops, the calibration images, and some training images of
Fashion-MNIST. Four trainings: `edge`, `merge` (tokens merge), `paper` (the published preset), and `tokens`, which goes
on from `edge` with
tokens pruned at three layers and many more images of Fashion-MNIST, as one trains for the images that will be seen:

    apt-get install --no-install-recommends gnome-backgrounds lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 \\
        mate-backgrounds plasma-workspace-wallpapers ukui-wallpapers dataset-fashion-mnist \\
        budgie-backgrounds opencv-doc    # to measure on

Both parts go on where they were stopped.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import tome
from accuracy_fashion import LARGEST_DROP, fashion, fashion_bundle, features, student_of
from accuracy_images import GALLERY, SIZE, collect, collect_fashion, linked
from fashion import fashion_mnist
from fidelity_subject import weights_file
from summary import brief, read_raw, write_summary

from sparsifiner_edge.cli.common import err_console, print_table, progress_bar
from sparsifiner_edge.config import parse_token_keep
from sparsifiner_edge.demo import material, split
from sparsifiner_edge.distill.distill import distill_student
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.evaluate.classes import fit_probe, write_head
from sparsifiner_edge.evaluate.evaluate import evaluate_student
from sparsifiner_edge.evaluate.scores import ScoresResult
from sparsifiner_edge.export.export import export_bundle
from sparsifiner_edge.files import locked
from sparsifiner_edge.profiles import stats
from sparsifiner_edge.records import write_record
from sparsifiner_edge.results import Result, Subject
from sparsifiner_edge.sparse.student import load_student, save_student, sparsify

TOKENS = "3:.7,6:.7,9:.7"
PRUNED = {"keep": 0.1, "token_keep": parse_token_keep(TOKENS)}
"""Of the student `tokens`."""
KEEPS = (0.25, 0.1, 0.05)
FINER = ((16, 4), (8, 4))
"""Tile and probe of further rows: the student's own are 16 and 8."""
LONG = {
    "518 px": {"keep": (0.05, 0.05, 0.1, 0.5), "merge": tome.schedule((180, 1.5), 12)[0]},
    "518 px, dense from layer 3": {"keep": (0.05, 0.05, 0.1, 1.0), "merge": tome.schedule((190, 1.5), 12)[0]},
}
"""What the student `merge`, which learns at 224 px, does at 518 px, 17.3 and 17.4 G multiply-accumulates: what suits it
trained, as it has learnt to read less and spends on tokens what that saves, and untrained. By the development set."""
REQUIRED = {
    "merge, trained, keep 0.25, merge 8": (0.99, 0.994),
    "edge, trained, keep 0.25": (0.994, 0.997),
    "edge, trained, keep 0.1": (0.981, 0.988),
    "edge, trained, keep 0.05": (0.965, 0.978),
    "edge, trained, keep 0.05, tile 16, probe 4": (0.965, 0.978),
    "edge, trained, keep 0.05, tile 8, probe 4": (0.965, 0.978),
}
"""Cosine of the patches to the teacher: required, aimed at. At 518 px the student `merge` must be better than untrained
by more than the interval, and aims at .985."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        sparsify: how its student is made sparse. overrides: what differs from the recipe.
        after: the trained student that it goes on from, instead, with `sparsify` as changes.
    """

    sparsify: dict[str, Any]
    overrides: tuple[str, ...]
    after: str = ""


RUNS = {
    "edge": Run({"keep": 0.25}, (f"budgets.token_keep={TOKENS}", "budgets.pruned=0.15", "precision=bf16")),
    "merge": Run(
        {"keep": 0.25, "merge": (8,)},
        # Budgets that merge nothing hold the backbone: without them the mild ones get worse from step 200 on.
        (
            "budgets.keep=[0.1,0.25,0.5]",
            'budgets.merge=["0","8","20..0"]',
            "precision=bf16",
            "distil.learning_rate=2e-6",
        ),
    ),
    # As published: predictors learn first and alone, and no mixed images. It has more to learn than the others.
    "paper": Run(
        {"preset": "paper", "keep": 0.25},
        (
            "budgets.keep=[0.25]",
            "images.cut_mix=0",
            "reconstruct.steps=100",
            "distil.steps=300",
            "distil.learning_rate=1e-5",
            "distil.predictor_learning_rate=0",
        ),
    ),
    "tokens": Run(
        PRUNED,
        # What will be asked is whole images and their class tokens.
        (
            "budgets.keep=[0.1]",
            "precision=bf16",
            "distil.steps=1000",
            "images.smallest_crop=0.8",
            "images.cut_mix=0",
            "losses.classes=0.06",
            "losses.patches=0.02",
        ),
        after="edge",
    ),
}


def untrained(work: Path, name: str) -> Path:
    """The student before its training."""
    made, run = work / f"{name}-untrained", RUNS[name]
    if made.exists():
        return made
    if run.after:
        if not (work / run.after).exists():
            raise ConfigError(f"{name} goes on from the trained {run.after}.", f"Train that first: --only {run.after}.")
        return changed(work / run.after, made, **run.sparsify)
    calibrate = linked(work / "calibration", split.calibration())
    return sparsify(material.DINOV2, made, weights=weights_file(), img_size=SIZE, calibrate=calibrate, **run.sparsify)


def changed(source: Path, target: Path, **changes: Any) -> Path:
    """A student with other settings."""
    student = load_student(source)
    return save_student(dataclasses.replace(student, sparsity=dataclasses.replace(student.sparsity, **changes)), target)


@click.group()
def main() -> None:
    pass


@main.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/accuracy"), show_default=True)
@click.option("--only", type=click.Choice(list(RUNS)), multiple=True, default=list(RUNS))
@click.option("--set", "overrides", multiple=True, help="As of `sparsifiner-edge distill`.")
def train(work: Path, only: tuple[str, ...], overrides: tuple[str, ...]) -> None:
    """Train the students."""
    work.mkdir(parents=True, exist_ok=True)
    with locked(work):  # two trainings may be started at once
        pictures = collect(work / "pictures")
    for name in only:
        output, run = work / name, RUNS[name]
        if output.exists():
            continue
        given, teacher = pictures, {}
        if run.after:  # trained weights are no longer the teacher's
            with locked(work):
                given = collect_fashion(work / "pictures-fashion", pictures)
            teacher = {"teacher": material.DINOV2, "weights": weights_file()}
        start = time.monotonic()
        with progress_bar(name) as progress:
            summary = distill_student(
                untrained(work, name),
                given / "train",
                output,
                held_out=given / "held-out",
                overrides=(*run.overrides, *overrides),
                resume=(work / f"{name}.training" / "checkpoint.pt").exists(),
                progress=progress,
                **teacher,
            )
        minutes = (time.monotonic() - start) / 60
        click.echo(f"{name}: {minutes:.1f} minutes, {json.dumps(write_record(summary.fidelity))}, kept {summary.kept}")


def finer(work: Path, source: Path, tile: int, probe: int) -> Path:
    """A student whose lists are shared by `tile` queries, and chosen by means of `probe` of them, as exports can be."""
    return changed(source, work / f"{source.name}-tile{tile}-probe{probe}", tile=tile, probe=probe)


def fidelity(work: Path, tell: Any) -> dict[str, Any]:
    """Cosine to the teacher: untrained, trained, and with fewer tokens; see `_row`."""
    teacher: dict[str, Any] = {"against": material.DINOV2, "weights": weights_file()}
    rows = {}
    for name in RUNS:
        for stage, folder in (("untrained", work / f"{name}-untrained"), ("trained", work / name)):
            if not folder.exists():
                continue
            for budget in _budgets(name):
                pruned = ", tokens .7" if "token_keep" in budget or name == "tokens" else ""
                pruned += f", merge {budget['merge'][0]}" if "merge" in budget else ""
                label = f"{name}, {stage}, keep {budget['keep']:g}{pruned}"
                tell(label)
                rows[label] = _row(work, folder, **teacher, **budget)
            for tile, probe in FINER if name == "edge" else ():
                label = f"{name}, {stage}, keep 0.05, tile {tile}, probe {probe}"
                tell(label)
                rows[label] = _row(work, finer(work, folder, tile, probe), **teacher, keep=0.05)
            for budget in LONG if name == "merge" else ():
                label = f"{name}, {stage}, {budget}"
                tell(label)
                rows[label] = _row(work, long_bundle(work, folder, budget), against=long_bundle(work))
    return rows


def long_bundle(work: Path, student: Path | None = None, budget: str = "") -> Path:
    """A student at 518 px, or the teacher."""
    options: dict[str, Any] = {"img_size": 518}
    if student is None:
        made, options["weights"] = work / "bundle-518-teacher", weights_file()
    else:
        digest = json.loads((student / "config.json").read_text())["weights_sha256"]
        made, options = (
            work / f"bundle-{budget.replace(', ', '-').replace(' ', '-')}-{digest[:8]}",
            options | LONG[budget],
        )
    return made if made.exists() else export_bundle(student or material.DINOV2, made, **options)


def _budgets(name: str) -> list[dict[str, Any]]:
    if name == "edge":
        return [*({"keep": keep} for keep in KEEPS), {"keep": 0.1, "token_keep": parse_token_keep(TOKENS)}]
    if name == "merge":
        return [{"keep": 0.25, "merge": (8,)}, {"keep": 1.0, "merge": (8,)}]
    return [{"keep": 0.25 if name == "paper" else PRUNED["keep"]}]


def _row(work: Path, subject: Path, **options: Any) -> dict[str, Any]:
    """Cosines on the publication set, and on the development set beside them."""
    found = evaluate_student(subject, linked(work / "publication", split.publication()), **options)
    chosen_by = evaluate_student(subject, linked(work / "development", split.development()), **options)
    assert isinstance(found, ScoresResult)
    assert isinstance(chosen_by, ScoresResult)
    of = write_record(found.statistics)
    return {
        "samples": found.samples, "patches": of["patches_cosine"]["mean"], "classes": of["features_cosine"]["mean"],
        "development": write_record(chosen_by.statistics)["patches_cosine"]["mean"],
    }  # fmt: skip


PAIRS = {
    "edge less paper, keep 0.25": ("edge, trained, keep 0.25", "paper, trained, keep 0.25"),
    "paper: trained less untrained": ("paper, trained, keep 0.25", "paper, untrained, keep 0.25"),
    "merge, 518 px: trained less untrained": ("merge, trained, 518 px", "merge, untrained, 518 px"),
    "merge, 518 px: trained less untrained, each as suits it": (
        "merge, trained, 518 px",
        "merge, untrained, 518 px, dense from layer 3",
    ),
}


def differences(rows: dict[str, Any]) -> dict[str, Any]:
    """Of patches, image by image: their means."""
    found = {}
    for label, pair in PAIRS.items():
        if all(name in rows for name in pair):
            first, second = (np.asarray(rows[name]["samples"]["patches_cosine"]) for name in pair)
            found[label] = write_record(stats.small_sample_mean(first - second))
    return found


@main.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/accuracy"), show_default=True)
@click.option("--fashion/--no-fashion", "with_fashion", default=True, help="Leave out Fashion-MNIST.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for accuracy.json.")
def measure(work: Path, with_fashion: bool, output: Path | None) -> None:
    """Measure what was trained; what `raw` of the folder says of other trainings stays there."""
    if not any((work / name).exists() for name in RUNS):
        raise click.UsageError(f"nothing is trained in {work}: python benchmarks/accuracy.py train")
    with err_console.status("") as status:
        cosines = fidelity(work, status.update)
        accuracies = fashion(work, status.update) if with_fashion else {}
    trained = {name: json.loads((work / name / "config.json").read_text()) for name in RUNS if (work / name).exists()}
    trainings = {name: config["provenance"]["training"] for name, config in trained.items()}
    weights = {name: config["weights_sha256"] for name, config in trained.items()}
    if output and (earlier := read_raw(output / "accuracy.json")):
        others = [name for name in earlier.method["trainings"] if name not in trained]
        kept = {label: row for label, row in earlier.statistics["fidelity"].items() if label.split(",")[0] in others}
        cosines |= {label: {"samples": earlier.samples[label], **row} for label, row in kept.items()}
        for metric, rows in earlier.statistics["fashion"].items():
            accuracies[metric] = {x: y for x, y in rows.items() if student_of(x) in others} | accuracies.get(metric, {})
        trainings |= {name: earlier.method["trainings"][name] for name in others}
        weights |= {str(one.path): str(one.sha256) for one in earlier.subjects if one.path in others}
    apart = differences(cosines)
    if output:
        subjects = [Subject(path=name, sha256=digest) for name, digest in weights.items()]
        method = {"trainings": trainings, "required": REQUIRED, "largest drop": LARGEST_DROP}
        samples = {label: row["samples"] for label, row in cosines.items()}
        rows = {label: {k: v for k, v in row.items() if k != "samples"} for label, row in cosines.items()}
        found = {"fidelity": rows, "differences": apart, "fashion": accuracies}
        short = method | {"trainings": {name: brief(training) for name, training in trainings.items()}}
        result = Result("evaluation", subjects, method, samples, found)
        write_summary(output / "accuracy.json", result, method=short)
    show(cosines, apart, accuracies)


def show(cosines: dict[str, Any], apart: dict[str, Any], accuracies: dict[str, Any]) -> None:
    rows = [
        [
            label,
            f"{x['patches']['value']:.4f}",
            f"{x['development']['value']:.4f}",
            f"{x['classes']['value']:.4f}",
            _goals(REQUIRED.get(label)),
        ]
        for label, x in cosines.items()
    ]
    title = f"Cosine to the teacher, {len(split.publication())} photographs, 224 px where nothing is said"
    print_table(title, ["", "patches", "the eight", "class", "patches required, aimed at"], rows)
    for label, x in apart.items():
        click.echo(f"{label}: {x['value']:+.4f} ({x['low']:+.4f} to {x['high']:+.4f})")
    for metric, found in accuracies.items():
        rows = [
            [label, f"{x['teacher_percent']:.2f}", f"{x['subject_percent']:.2f}", _points(x["difference_points"]),
             _goals(LARGEST_DROP[label])]
            for label, x in found.items()
        ]  # fmt: skip
        columns = ["", "teacher", "student", "difference", "largest drop allowed, aimed at"]
        print_table(f"Fashion-MNIST, {metric}, percent", columns, rows)


@main.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/accuracy"), show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the bundle.")
def classifier(work: Path, output: Path) -> None:
    """Export a real classifier: the trained student, keep .10, with a linear head of Fashion-MNIST, and labels."""
    gallery = fashion_mnist("train").first(GALLERY)
    with err_console.status("") as status:
        known = features(fashion_bundle(work, "keep .10"), gallery, status.update)
        status.update("linear probe")
        head = write_head(
            load_student(work / "edge", keep=0.1),
            fit_probe(known, gallery.labels),
            gallery.classes,
            work / "classifier",
        )
        export_bundle(head, output)
    click.echo(output)


def _goals(pair: tuple[float, float] | None) -> str:
    return f"{pair[0]:g}, {pair[1]:g}" if pair else ""


def _points(estimate: dict[str, Any]) -> str:
    return f"{estimate['value']:+.2f} ({estimate['low']:+.2f} to {estimate['high']:+.2f})"


if __name__ == "__main__":
    main()
