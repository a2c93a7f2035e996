"""`sparsifiner-edge evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparsifiner_edge.bounds import MOST_COUNT, MOST_WORKERS
from sparsifiner_edge.cli import common
from sparsifiner_edge.text import printable

if TYPE_CHECKING:
    from sparsifiner_edge.outcomes import RobustnessResult, ScoresResult
    from sparsifiner_edge.results import Quantity


@click.command()
@click.argument("subject", metavar="STUDENT|BUNDLE")
@click.option("--against", metavar="MODEL|BUNDLE", help="The dense teacher; for a student by default its own weights.")
@common.weights_option
@click.option("--data", type=common.PATH, required=True,
              help="An image or a folder; labelled: one folder per class.")  # fmt: skip
@click.option("--metric", type=click.Choice(["cosine", "knn", "linear", "top1", "task"]), default="cosine",
              show_default=True, help="Cosine of features, or accuracy: of neighbours, of a linear probe, of the "
                                      "classifier; or a task's own (see --task).")  # fmt: skip
@click.option("--gallery", type=common.PATH, help="For knn and linear: labelled images to learn from.")
@click.option(
    "--queries", type=click.IntRange(1, MOST_COUNT), help="Use at most this many images of --data, evenly taken."
)
@click.option("--task", metavar="maps|NAME|package.module:class",
              help="For task: dense maps against the teacher's, or a metric of your own.  [default: maps]")  # fmt: skip
@click.option("--map", "map_name", metavar="NAME", help="For maps: the output that is one, where there are several.")
@click.option("--masks", type=common.PATH, help="For maps: a folder of true masks, named as the images.")
@click.option("--corruptions", metavar="all|NAME,..", help="Judge while images get worse, by these (docs/trust.md).")
@click.option("--severity", type=click.IntRange(1, 5), help="Of corruptions.  [default: 3]")
@click.option("--workers", type=click.IntRange(0, MOST_WORKERS),
              help="Processes that read images; by default as many as cores.")  # fmt: skip
@click.option("--head", type=common.PATH, help="For linear: write the student with this classifier.")
@common.fit_option
@common.region_option
@common.keep_option
@common.token_keep_option
@common.merge_option
@common.trust_option
@common.normalise_options
@common.execution_options
@common.json_option
@common.result_option
def command(*, subject: str, data: Path, as_json: bool, output: Path | None, **options: Any) -> None:
    """Compare SUBJECT with its dense teacher, image by image."""
    import sparsifiner_edge as se

    groups = {"model": se.ModelOptions, "budget": se.Budget, "execution": se.Execution, "options": se.EvaluationOptions}
    with common.progress_bar("images") as progress:
        result = se.evaluate_student(subject, data, progress=progress, **common.group(options, **groups))
    common.print_result(result, as_json, _print, output)


def _print(result: ScoresResult | RobustnessResult) -> None:
    """The figures; then what was compared, and what ran each."""
    from sparsifiner_edge.outcomes import ScoresResult

    if isinstance(result, ScoresResult):
        _print_scores(result)
    else:
        _print_robustness(result)
    method = result.method
    click.echo(f"Held against: {method.truth}. Images: {printable(method.preprocessing)}.")
    if method.gallery is not None:
        click.echo(f"Learnt from {printable(method.gallery)}.")
    for subject in result.subjects:
        runtime = method.runtime[str(subject.role)]
        kernels = f", kernels: {runtime.kernels}" if runtime.kernels is not None else ""
        ran = f"{runtime.backend}, {runtime.precision}{kernels}{'. ' + runtime.chosen if runtime.chosen else ''}"
        click.echo(f"{subject.role}: {printable(subject.path)} on {printable(ran, 2000)}")


def _between(quantity: Quantity, form: str = ".4f") -> str:
    """An interval in words."""
    known = isinstance(quantity.low, float) and isinstance(quantity.high, float)
    return f"{quantity.low:{form}} to {quantity.high:{form}}" if known else "too few images"


def _print_scores(result: ScoresResult) -> None:
    """One row per figure."""
    method = result.method
    rows = [
        [
            name.replace("_", " "),
            f"{score.mean.value:.4f}",
            _between(score.mean),
            f"{score.least:.4f}",
            str(score.images),
        ]
        for name, score in result.statistics.items()
    ]
    title = f"{method.output or method.metric}, {len(method.images)} images"
    common.print_table(title, ["", "mean", "95 % interval", "least", "images"], rows)
    for role, value in (method.results or {}).items():
        click.echo(f"{role}: {value:.6g} ({'higher' if method.higher_is_better else 'lower'} is better)")


def _print_robustness(result: RobustnessResult) -> None:
    """By score one row per corruption, and one for all: what each model loses, of 100."""
    method = result.method
    for score, by_condition in result.statistics.items():
        rows = []
        for name in ("clean", *method.corruptions, "all"):
            row = by_condition[name]
            extra = row.extra_lost.times(100)
            rows.append([
                name, f"{100 * row.teacher:.2f}", f"{100 * row.subject:.2f}", f"{100 * row.teacher_lost.value:.2f}",
                f"{100 * row.subject_lost.value:.2f}", f"{extra.value:+.2f}", _between(extra, "+.2f"),
            ])  # fmt: skip
        common.print_table(
            f"{score} of 100, {by_condition['all'].images} images, severity {method.severity}",
            ["", "dense", "sparse", "dense loses", "sparse loses", "extra loss", "95 % interval"], rows,
        )  # fmt: skip
