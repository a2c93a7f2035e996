"""Are explanations true? SaCo, deletion and insertion on the publication photographs, and pointing at stamps.

    python benchmarks/explain.py faithful STUDENT/ [-o FOLDER]      # beside dense rollout, and chance
    python benchmarks/explain.py pointing STUDENT/ [-o FOLDER] [--count 40]
    python benchmarks/explain.py time STUDENT/ [-o FOLDER]          # seconds and page size of one image
    python benchmarks/explain.py cases STUDENT/ -o FOLDER           # docs/explain.md's three, and their picture

Pointing: the share of stamps (`stamps.py`) on whose true mask the patch lies of which most reached the features. Needs
the packages that `stamps.py` names.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import click
import numpy as np
import stamps
from PIL import Image
from summary import write_summary

import sparsifiner_edge as se
from sparsifiner_edge.artifacts import STUDENT_FILE, sha256
from sparsifiner_edge.bounds import height_width
from sparsifiner_edge.cli.common import print_table, progress_bar
from sparsifiner_edge.demo import split
from sparsifiner_edge.evaluate.explain import explain_image, explain_student
from sparsifiner_edge.evaluate.faithfulness import elsewhere
from sparsifiner_edge.explained import DENSE, MOVED, OURS, RANDOM
from sparsifiner_edge.images import list_images, load_mask
from sparsifiner_edge.profiles import stats
from sparsifiner_edge.records import write_record
from sparsifiner_edge.report.explain_page import write_explanation, write_overview
from sparsifiner_edge.results import Result, Subject

ORDERS = (OURS, DENSE, RANDOM, MOVED)
MEASURES = ("saco", "deletion", "insertion")
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
    """SaCo, deletion and insertion, image by image; ours less the others with Student's interval."""
    made = se.load_student(student, trust=trust)
    samples: dict[str, dict[str, list[float]]] = {name: {order: [] for order in ORDERS} for name in MEASURES}
    with progress_bar("photographs") as progress:
        for number, path in enumerate(split.publication()):
            found = explain_image(made, path, seed=number).summary.faithful
            for name in MEASURES:
                for order in ORDERS:
                    samples[name][order].append(getattr(found[order], name))
            progress("photographs", number + 1, len(split.publication()))
    _show(student, output, "explain_faithful", samples)


@main.command()
@_student
@_trust
@_output
@click.option("--count", default=40, show_default=True, help="Stamps.")
def pointing(student: Path, trust: tuple[str, ...], output: Path | None, count: int) -> None:
    """Whether the patch that most of reached the features lies on the stamp."""
    made = se.load_student(student, trust=trust)
    samples: dict[str, dict[str, list[float]]] = {"pointing": {order: [] for order in ORDERS}}
    height, width = height_width(made.img_size)
    rows, columns = made.backbone.grid
    with tempfile.TemporaryDirectory() as name, progress_bar("stamps") as progress:
        folder = Path(name)
        stamps.write(folder, count, max(height, width))
        for number, path in enumerate(list_images(folder / "images")):
            mask = load_mask(folder / "masks" / path.name, made.img_size)
            share = mask.reshape(rows, height // rows, columns, width // columns).mean((1, 3))
            reached = explain_image(made, path, judge=False).reached
            for order in (OURS, DENSE):
                samples["pointing"][order].append(float(share.ravel()[int(reached[order].argmax())] > 0.5))
            samples["pointing"][RANDOM].append(float((share > 0.5).mean()))
            moved = elsewhere(reached[OURS], np.random.default_rng(number))
            samples["pointing"][MOVED].append(float(share.ravel()[int(moved.argmax())] > 0.5))
            progress("stamps", number + 1, count)
    _show(student, output, "explain_pointing", samples)


@main.command("time")
@_student
@_trust
@_output
def seconds(student: Path, trust: tuple[str, ...], output: Path | None) -> None:
    """One image: explained with all layers and its faithfulness, and as a page; what of it is not its faithfulness."""
    made = se.load_student(student, trust=trust)
    explain_image(made, split.development()[0], judge=False)  # What is done once is not timed.
    began = time.perf_counter()
    explain_image(made, split.development()[0], judge=False)
    without = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as name:
        began = time.perf_counter()
        result, explained = explain_student(student, split.development()[0], trust=trust)
        page = write_explanation(explained, result.method, Path(name) / "index.html")
        took, size = time.perf_counter() - began, page.stat().st_size
    click.echo(f"{took:.1f} s, required 10; without faithfulness {without:.1f} s; page {size / 1e6:.2f} MB, required 3")
    if output:
        write_summary(
            output / "explain_time.json",
            Result(
                "comparison",
                [_subject(student)],
                {},
                {},
                {"seconds": took, "without_faithfulness_s": without, "page_bytes": size},
            ),
        )


@main.command()
@_student
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def cases(student: Path, output: Path) -> None:
    """Of three development photographs, of which one has no good explanation, and of one place: a row each."""
    made, rows, pictures = se.load_student(student), [], []
    paths = {path.stem: path for path in split.development()}
    with tempfile.TemporaryDirectory() as name:
        for stem, place in (("coffee", None), ("astronaut", None), ("chelsea", None), ("coffee", (7, 8))):
            found = explain_image(made, paths[stem], place)
            for order, x in found.summary.faithful.items():
                figures = (f"{figure:.3f}" for figure in (x.saco, x.deletion, x.insertion))
                rows.append([stem if place is None else f"{stem}, {place}", order, *figures])
            if place is None:
                pictures.append(np.asarray(Image.open(write_overview(found, Path(name) / f"{stem}.png"))))
    print_table("cases", ["image", "order of", *MEASURES], rows)
    output.mkdir(parents=True, exist_ok=True)
    gap = np.full((6, pictures[0].shape[1], 3), 255, np.uint8)
    strips = np.concatenate([part for strip in pictures for part in (strip, gap)][:-1])
    Image.fromarray(strips).save(output / "explained.jpg", quality=85)


def _show(student: Path, output: Path | None, name: str, samples: dict[str, dict[str, list[float]]]) -> None:
    table, statistics = [], {}
    for measure, found in samples.items():
        values = {order: np.array(x) for order, x in found.items()}
        less = {other: stats.small_sample_mean(values[OURS] - values[other]) for other in ORDERS[1:]}
        statistics[measure] = {order: float(x.mean()) for order, x in values.items()} | {
            f"ours less {other}": x for other, x in less.items()
        }
        table.append([
            measure, *(f"{values[order].mean():.3f}" for order in ORDERS),
            *(f"{x.value:+.3f} ({x.low:+.3f} to {x.high:+.3f})" for x in less.values()),
        ])  # fmt: skip
    count = len(next(iter(samples.values()))[OURS])
    print_table(f"{count} images", ["", *ORDERS, *(f"ours less {other}" for other in ORDERS[1:])], table)
    if output:
        result = Result("comparison", [_subject(student)], {"images": count}, samples, write_record(statistics))
        write_summary(output / f"{name}.json", result)


def _subject(student: Path) -> Subject:
    return Subject(role="subject", kind="student", path=student.name, sha256=sha256(student / STUDENT_FILE))


if __name__ == "__main__":
    main()
