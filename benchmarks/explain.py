"""Are explanations true? SaCo on the publication photographs, and pointing at stamps.

    python benchmarks/explain.py faithful STUDENT/ [-o FOLDER]      # beside chance
    python benchmarks/explain.py pointing STUDENT/ [-o FOLDER] [--count 40]

Pointing: the share of stamps (`stamps.py`) on whose true mask the patch lies that the features hang on most. Needs
the packages that `stamps.py` names.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import numpy as np
import stamps
from summary import write_summary

import sparsifiner_edge as se
from sparsifiner_edge.artifacts import STUDENT_FILE, sha256
from sparsifiner_edge.bounds import height_width
from sparsifiner_edge.cli.common import print_table, progress_bar
from sparsifiner_edge.demo import split
from sparsifiner_edge.evaluate.explain import explain_image
from sparsifiner_edge.evaluate.faithfulness import elsewhere
from sparsifiner_edge.explained import MOVED, OURS, RANDOM
from sparsifiner_edge.images import list_images, load_mask
from sparsifiner_edge.profiles import stats
from sparsifiner_edge.records import write_record
from sparsifiner_edge.results import Result, Subject

ORDERS = (OURS, RANDOM, MOVED)
_student = click.argument("student", type=click.Path(exists=True, path_type=Path))
_trust = click.option("--trust", multiple=True, help="A module that the student names.")
_output = click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for the JSON.")


@click.group()
def main() -> None:
    """See the module's documentation."""


@main.command()
@_student
@_trust
@_output
def faithful(student: Path, trust: tuple[str, ...], output: Path | None) -> None:
    """SaCo, image by image; ours less the others with Student's interval."""
    made, samples = se.load_student(student, trust=trust), {order: list[float]() for order in ORDERS}
    with progress_bar("photographs") as progress:
        for number, path in enumerate(split.publication()):
            for order, figure in explain_image(made, path, seed=number).summary.saco.items():
                samples[order].append(figure)
            progress("photographs", number + 1, len(split.publication()))
    _show(student, output, "faithful", samples)


@main.command()
@_student
@_trust
@_output
@click.option("--count", default=40, show_default=True, help="Stamps.")
def pointing(student: Path, trust: tuple[str, ...], output: Path | None, count: int) -> None:
    """Whether the patch that the features hang on most lies on the stamp."""
    made, samples = se.load_student(student, trust=trust), {order: list[float]() for order in ORDERS}
    height, width = height_width(made.img_size)
    rows, columns = made.backbone.grid
    with tempfile.TemporaryDirectory() as name, progress_bar("stamps") as progress:
        folder = Path(name)
        stamps.write(folder, count, max(height, width))
        for number, path in enumerate(list_images(folder / "images")):
            mask = load_mask(folder / "masks" / path.name, made.img_size)
            on_stamp = mask.reshape(rows, height // rows, columns, width // columns).mean((1, 3)) > 0.5
            importance = explain_image(made, path, judge=False).importance
            moved = elsewhere(importance, np.random.default_rng(number))
            samples[OURS].append(float(on_stamp.ravel()[int(importance.argmax())]))
            samples[RANDOM].append(float(on_stamp.mean()))
            samples[MOVED].append(float(on_stamp.ravel()[int(moved.argmax())]))
            progress("stamps", number + 1, count)
    _show(student, output, "pointing", samples)


def _show(student: Path, output: Path | None, measure: str, samples: dict[str, list[float]]) -> None:
    values = {order: np.array(x) for order, x in samples.items()}
    less = {f"ours less {other}": stats.small_sample_mean(values[OURS] - values[other]) for other in (RANDOM, MOVED)}
    row = [f"{x.value:+.3f} ({x.low:+.3f} to {x.high:+.3f})" for x in less.values()]
    means = {order: float(x.mean()) for order, x in values.items()}
    count = len(samples[OURS])
    print_table(f"{count} images", ["", *ORDERS, *less], [[measure, *(f"{x:.3f}" for x in means.values()), *row]])
    if output:
        subject = Subject(role="subject", kind="student", path=student.name, sha256=sha256(student / STUDENT_FILE))
        statistics = means | write_record(less)
        write_summary(
            output / f"explain_{measure}.json", Result("comparison", [subject], {"images": count}, samples, statistics)
        )


if __name__ == "__main__":
    main()
