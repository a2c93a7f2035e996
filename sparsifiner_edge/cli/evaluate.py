"""`sparsifiner-edge evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from sparsifiner_edge.bounds import MOST_COUNT, MOST_WORKERS
from sparsifiner_edge.cli import common
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.text import printable

if TYPE_CHECKING:
    from sparsifiner_edge.outcomes import RobustnessResult, ScoresResult, StreamResult
    from sparsifiner_edge.results import Quantity
    from sparsifiner_edge.runtime.session import Runtime


@click.command()
@click.argument("subject", metavar="STUDENT|BUNDLE")
@click.option("--against", metavar="MODEL|BUNDLE", help="The dense teacher; for a student by default its own weights.")
@common.weights_option
@click.option("--data", type=common.PATH, help="An image or a folder; labelled: one folder per class.")
@click.option("--video", metavar="FILE|FOLDER", help="Instead: a camera's frames, which a bundle's stream follows.")
@click.option(
    "--metric",
    type=click.Choice(["cosine", "knn", "linear", "top1", "task"]),
    default="cosine",
    show_default=True,
    help="Cosine of features, or accuracy: of neighbours, of a linear probe, of the "
    "classifier; or a task's own (see --task).",
)
@click.option("--gallery", type=common.PATH, help="For knn and linear: labelled images to learn from.")
@click.option(
    "--queries", type=click.IntRange(1, MOST_COUNT), help="Use at most this many images of --data, evenly taken."
)
@click.option(
    "--task",
    metavar="maps|NAME|package.module:class",
    help="For task: dense maps against the teacher's, or a metric of your own.  [default: maps]",
)
@click.option("--map", "map_name", metavar="NAME", help="For maps: the output that is one, where there are several.")
@click.option("--masks", type=common.PATH, help="For maps: a folder of true masks, named as the images.")
@click.option("--corruptions", metavar="all|NAME,..", help="Judge while images get worse, by these (docs/trust.md).")
@click.option("--severity", type=click.IntRange(1, 5), help="Of corruptions.  [default: 3]")
@click.option(
    "--workers", type=click.IntRange(0, MOST_WORKERS), help="Processes that read images; by default as many as cores."
)
@click.option("--head", type=common.PATH, help="For linear: write the student with this classifier.")
@click.option(
    "--at-least",
    type=common.FiniteRange(0, 1, min_open=True, max_open=True),
    help="Of a stream: fidelity of frames to the dense model.  [default: 0.98]",
)
@click.option(
    "--share",
    type=common.FiniteRange(0, 1, min_open=True),
    help="Of a stream: share of the patches that every frame computes instead.",
)
@click.option("--every", type=click.IntRange(1, MOST_COUNT), help="Of a stream: compare one of so many frames.")
@click.option("--frames", type=click.IntRange(1, MOST_COUNT), help="Of a stream: stop after so many.")
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
def command(
    *, subject: str, data: Path | None, video: str | None, as_json: bool, output: Path | None, **options: Any
) -> None:
    """Compare SUBJECT with its dense teacher, image by image; or a bundle's stream with the dense model, by frames."""
    import sparsifiner_edge as se

    of_streams = {name: options.pop(name) for name in ("at_least", "share", "every", "frames")}
    if video is not None and data is None:
        _video(subject, video, of_streams, options, as_json, output)
        return
    if data is None or video is not None:
        raise ConfigError("What is to be compared?", "Give --data IMAGES, or --video FILE.")
    for name, value in of_streams.items():
        if value is not None:
            raise ConfigError(f"--{name.replace('_', '-')} is for streams.", "Leave it out, or give --video.")
    groups = {"model": se.ModelOptions, "budget": se.Budget, "execution": se.Execution, "options": se.EvaluationOptions}
    with common.progress_bar("images") as progress:
        result = se.evaluate_student(subject, data, progress=progress, **common.group(options, **groups))
    common.print_result(result, as_json, _print, output)


def _video(
    subject: str, video: str, of_streams: dict[str, Any], options: dict[str, Any], as_json: bool, output: Path | None
) -> None:
    """Refuse options that say nothing of a stream, and follow the video."""
    import sparsifiner_edge as se

    context, used = click.get_current_context(), {"backend", "precision", "provider", "kernels", "fit", "region"}
    others = {"subject", "video", "as_json", "output", *of_streams, *used}
    for parameter in context.command.params:
        given = context.get_parameter_source(str(parameter.name)) not in (None, ParameterSource.DEFAULT)
        if given and parameter.name not in others:
            raise ConfigError(f"{parameter.opts[-1]} says nothing of a stream.", "Leave it out, or --video.")
    known = common.group({name: options[name] for name in used & options.keys()}, execution=se.Execution)
    every = of_streams.pop("every") or 1
    with common.progress_bar("frames") as progress:
        followed = se.RunOptions(**of_streams, **known)
        result = se.evaluate_video(subject, video, followed, every=every, progress=progress)
    common.print_result(result, as_json, _print_stream, output)


def _print_stream(result: StreamResult) -> None:
    """A row for each way to answer frames."""
    method, heads = result.method, ("patches", "moving", "patches_least", "reached", "share", "ms", "ms_p99")
    names = [name for name in result.statistics["stream"] if name.endswith(("_iou", "features"))]
    rows = [
        [
            way,
            *(
                f"{figures[name]:.1f}" if name.startswith("ms") else f"{figures[name]:.4f}" if name in figures else "-"
                for name in (*heads, *names)
            ),
        ]
        for way, figures in result.statistics.items()
    ]
    floor = "" if method.at_least is None else f", at least {method.at_least:g}"
    title = f"{printable(method.video)}, {method.frames} frames{floor}"
    common.print_table(title, ["", *(name.replace("_", " ") for name in (*heads, *names))], rows)
    figures = result.statistics["stream"]
    compared = int(figures.get("patches_frames", 0))
    if compared < len(result.samples["stream"]["ms"]):
        click.echo(f"Patches are of {compared} frames; the model, which gives no tokens, answered the others.")
    if "first_quarter" in figures:
        click.echo(f"First quarter of the frames {figures['first_quarter']:.4f}, last {figures['last_quarter']:.4f}.")
    click.echo(f"Cosine to the dense model's of the same frame, {printable(method.preprocessing)}.")
    click.echo(f"Ran on {_ran(method.runtime)}")


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
        click.echo(f"{subject.role}: {printable(subject.path)} on {_ran(method.runtime[str(subject.role)])}")


def _ran(runtime: Runtime) -> str:
    kernels = f", kernels: {runtime.kernels}" if runtime.kernels is not None else ""
    chosen = f". {runtime.chosen}" if runtime.chosen else ""
    return printable(f"{runtime.backend}, {runtime.precision}{kernels}{chosen}", 2000)


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
            rows.append(
                [
                    name,
                    f"{100 * row.teacher:.2f}",
                    f"{100 * row.subject:.2f}",
                    f"{100 * row.teacher_lost.value:.2f}",
                    f"{100 * row.subject_lost.value:.2f}",
                    f"{extra.value:+.2f}",
                    _between(extra, "+.2f"),
                ]
            )
        common.print_table(
            f"{score} of 100, {by_condition['all'].images} images, severity {method.severity}",
            ["", "dense", "sparse", "dense loses", "sparse loses", "extra loss", "95 % interval"],
            rows,
        )
