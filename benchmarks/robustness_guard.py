"""What `run --guard` wins under corruptions: where the score `novelty` is above 1, the dense model's answer counts.

    python benchmarks/robustness_guard.py [--work FOLDER] [-o FOLDER]

Of the students that `robustness.py measure` judged, with the scores it kept in its working folder: nothing is run again
but the layers that `novelty` looks at. Each student has the limit that its training gave it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
from accuracy_images import SIZE
from msgspec.structs import replace
from PIL import Image
from robustness import MODULE, QUERIES, SALIENCY_SIZE, SEVERITY, class_folders
from robustness_rows import in_points
from summary import write_summary

import sparsifiner_edge as se
from sparsifiner_edge.arrays import Array, Pixels
from sparsifiner_edge.cli.common import err_console, print_table, progress_bar
from sparsifiner_edge.corruptions import CAMERA, COMMON, corrupt
from sparsifiner_edge.evaluate.labelled import labelled
from sparsifiner_edge.evaluate.robustness import CLEAN, RobustnessResult
from sparsifiner_edge.images import list_images, load_image
from sparsifiner_edge.novelty import novelty
from sparsifiner_edge.profiles.stats import small_sample_mean
from sparsifiner_edge.records import write_record
from sparsifiner_edge.results import Result, Subject, read_result
from sparsifiner_edge.sparse.novelty import statistics
from sparsifiner_edge.sparse.student import Student

STUDENTS = ("classes-ours", "classes-ours, corrupted", "saliency-ours")


def images_of(work: Path, task: str) -> list[Pixels]:
    """In the order of the kept scores."""
    if task == "saliency":
        return [load_image(path, SALIENCY_SIZE) for path in list_images(work / "stamps" / "images")]
    queries = labelled(class_folders(work, "test", QUERIES)).first(QUERIES)
    return [queries.load(number, SIZE) for number in range(len(queries))]


def scores_of(student: Student, images: list[Pixels], progress: Any) -> dict[str, Array]:
    """By condition, `novelty` of each image."""
    assert student.novelty is not None
    found: dict[str, Array] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number:04d}.png" for number in range(len(images))]
        for place, name in enumerate([CLEAN, *COMMON, *CAMERA]):
            for number, (path, image) in enumerate(zip(paths, images, strict=True)):
                seen = image if name == CLEAN else corrupt(image, name, int(SEVERITY), seed=number)
                Image.fromarray(seen).save(path)
            label = name if name == CLEAN else f"{name} {SEVERITY}"
            found[label] = novelty(student.novelty.density, statistics(student, paths, student.novelty.layer))
            progress("conditions", place + 1, 1 + len(COMMON) + len(CAMERA))
    return found


def guarded(samples: dict[str, dict[str, list[Any]]], scores: dict[str, Array]) -> dict[str, dict[str, Any]]:
    """By condition and kind of it: frames the guard takes, and the extra loss without it and with it."""
    values = {label: np.array([row["subject"], row["teacher"]], float) for label, row in samples.items()}
    taken = {label: scores[label] > 1 for label in values}
    with_guard = {label: np.where(taken[label], x[1], x[0]) for label, x in values.items()}
    labels = [f"{name} {SEVERITY}" for name in (*COMMON, *CAMERA)]
    kinds = {"common": labels[: len(COMMON)], "camera": labels[len(COMMON) :]} | {label: [label] for label in labels}
    found: dict[str, dict[str, Any]] = {}
    for kind, own in kinds.items():
        dense, sparse, helped = (
            np.mean([x[label] for label in own], 0)
            for x in ({k: v[1] for k, v in values.items()}, {k: v[0] for k, v in values.items()}, with_guard)
        )
        lost = values[CLEAN][1] - dense
        found[kind] = {
            "taken": float(np.mean([taken[label].mean() for label in own])),
            "extra_lost": write_record(small_sample_mean(values[CLEAN][0] - sparse - lost)),
            "extra_lost_guarded": write_record(small_sample_mean(with_guard[CLEAN] - helped - lost)),
        }
    return found | {CLEAN: {"taken": float(taken[CLEAN].mean())}}


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/robustness"), show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for robustness_guard.json.")
def main(work: Path, output: Path | None) -> None:
    """See the module's documentation."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    subjects: list[Subject] = []
    samples: dict[str, dict[str, list[float]]] = {}
    for name in STUDENTS:
        if not (work / f"{name}.json").exists():
            err_console.print(f"{name}: not measured in {work}: python benchmarks/robustness.py measure")
            continue
        kept = read_result(work / f"{name}.json", RobustnessResult)
        images, student = images_of(work, name.partition("-")[0]), se.load_student(work / name, trust=[MODULE])
        with progress_bar(name) as progress:
            scores = scores_of(student, images, progress)
        subjects += [replace(subject, path=Path(str(subject.path)).name) for subject in kept.subjects]
        ((_, own),) = kept.samples.items()
        rows[name], samples[name] = guarded(own, scores), {label: x.tolist() for label, x in scores.items()}
    table = [
        [name, kind, f"{row['taken']:.0%}", *(in_points(x) for of, x in row.items() if of != "taken")]
        for name, found in rows.items()
        for kind, row in found.items()
    ]
    head = ["", "", "frames by the dense model", "extra loss", "with the guard"]
    print_table(f"severity {SEVERITY}, points of 100", head, table)
    if output:
        method = {"severity": int(SEVERITY), "guard": "the dense model answers where novelty is above 1"}
        write_summary(
            output / "robustness_guard.json",
            Result("comparison", subjects, method, samples, {"guard": rows}),
        )


if __name__ == "__main__":
    main()
