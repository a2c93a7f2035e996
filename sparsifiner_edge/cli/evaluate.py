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
@click.option(
    "--against", metavar="MODEL|BUNDLE", help="Dense model to compare with.  [default: the sparse model's own weights]"
)
@common.weights_option
@click.option(
    "--data", type=common.PATH, help="Image or folder of images; for labelled metrics one subfolder per class."
)
@click.option("--video", metavar="FILE|FOLDER", help="Evaluate a bundle's stream on these frames instead of --data.")
@click.option(
    "--metric",
    type=click.Choice(["cosine", "knn", "linear", "top1", "task"]),
    default="cosine",
    show_default=True,
    help="cosine: cosine of the features. knn, linear, top1: accuracy of nearest neighbours, of a "
    "linear probe, of the classifier. task: the metric that --task names.",
)
@click.option("--gallery", type=common.PATH, help="Folder of labelled images to learn from, for knn and linear.")
@click.option(
    "--queries", type=click.IntRange(1, MOST_COUNT), help="Use at most this many images of --data, evenly spaced."
)
@click.option(
    "--task",
    metavar="maps|NAME|package.module:class",
    help="Metric of --metric task: maps (dense maps compared with the dense model's) or your own.  [default: maps]",
)
@click.option("--map", "map_name", metavar="NAME", help="Name of the output to compare, if the model has several maps.")
@click.option("--masks", type=common.PATH, help="Folder of true masks with the names of the images, for maps.")
@click.option(
    "--corruptions",
    metavar="all|NAME,..",
    help="Also evaluate on corrupted images: all, or a list of names (docs/measure.md).",
)
@click.option("--severity", type=click.IntRange(1, 5), help="Severity of the corruptions.  [default: 3]")
@click.option(
    "--workers",
    type=click.IntRange(0, MOST_WORKERS),
    help="Number of processes that read images.  [default: one per core]",
)
@click.option(
    "--head",
    type=common.PATH,
    help="Write the sparse model, with the linear probe as its classifier, to this folder (for linear).",
)
@click.option(
    "--at-least",
    type=common.FiniteRange(0, 1, min_open=True, max_open=True),
    help="Target fidelity of the stream: estimated mean cosine to the dense model.  [default: 0.98]",
)
@click.option(
    "--share",
    type=common.FiniteRange(0, 1, min_open=True),
    help="Recompute a fixed share of the patches in every frame (replaces --at-least).",
)
@common.stabilise_option
@click.option(
    "--every",
    type=click.IntRange(1, MOST_COUNT),
    help="Compare every N-th frame of the video only; the stream still processes all of them.",
)
@click.option("--frames", type=click.IntRange(1, MOST_COUNT), help="Stop after this many frames of the video.")
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
    """Measure how faithful a sparse model or bundle is to its dense model.

    --data compares them image by image. --video compares a bundle's stream with the dense model frame by frame.
    """
    import sparsifiner_edge as se

    of_streams = {name: options.pop(name) for name in ("at_least", "share", "stabilise", "every", "frames")}
    if video is not None and data is None:
        _video(subject, video, of_streams, options, as_json, output)
        return
    if data is None or video is not None:
        raise ConfigError("Exactly one of --data and --video is required.", "Give --data IMAGES, or --video FILE.")
    for name, value in of_streams.items():
        if value is not None:
            raise ConfigError(f"--{name.replace('_', '-')} requires --video.", "Leave it out, or give --video.")
    groups = {"model": se.ModelOptions, "budget": se.Budget, "execution": se.Execution, "options": se.EvaluationOptions}
    with common.progress_bar("images") as progress:
        result = se.evaluate_student(subject, data, progress=progress, **common.group(options, **groups))
    common.print_result(result, as_json, _print, output)


def _video(
    subject: str, video: str, of_streams: dict[str, Any], options: dict[str, Any], as_json: bool, output: Path | None
) -> None:
    """Refuse options that do not apply to a stream, and evaluate the video."""
    import sparsifiner_edge as se

    context, used = (
        click.get_current_context(),
        {"backend", "compute_precision", "provider", "kernels", "fit", "region"},
    )
    others = {"subject", "video", "as_json", "output", *of_streams, *used}
    for parameter in context.command.params:
        given = context.get_parameter_source(str(parameter.name)) not in (None, ParameterSource.DEFAULT)
        if given and parameter.name not in others:
            raise ConfigError(
                f"{parameter.opts[-1]} cannot be combined with --video.",
                f"Leave out either {parameter.opts[-1]} or --video.",
            )
    of_streams = {name: value for name, value in of_streams.items() if value is not None}
    settings = common.group({name: options[name] for name in used & options.keys()}, execution=se.Execution)
    every = of_streams.pop("every", 1)
    with common.progress_bar("frames") as progress:
        stream_options = se.RunOptions(**of_streams, **settings)
        result = se.evaluate_video(subject, video, stream_options, every=every, progress=progress)
    common.print_result(result, as_json, _print_stream, output)


_STREAM_HEADS = {
    "patches": "mean cosine",
    "moving": "moving tenth",
    "patches_least": "worst frame",
    "reached": "frames at target",
    "share": "share computed",
    "ms_p99": "ms, p99",
}
"""Column heads of the figures of a stream."""


def _print_stream(result: StreamResult) -> None:
    """Print one row per way to answer the frames."""
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
    common.print_table(
        title, ["", *(_STREAM_HEADS.get(name, name.replace("_", " ")) for name in (*heads, *names))], rows
    )
    figures = result.statistics["stream"]
    compared = int(figures.get("patches_frames", 0))
    if compared < len(result.samples["stream"]["ms"]):
        click.echo(
            f"Patches are compared on {compared} frames. "
            "The bundle's ordinary model, which outputs no tokens, answered the others."
        )
    if "first_quarter" in figures:
        click.echo(
            f"Mean patch cosine: {figures['first_quarter']:.4f} in the first quarter of the frames, "
            f"{figures['last_quarter']:.4f} in the last."
        )
    click.echo(f"Cosine to the dense model's output on the same frame, {printable(method.preprocessing)}.")
    click.echo(f"Ran on {_ran(method.runtime)}")


def _print(result: ScoresResult | RobustnessResult) -> None:
    """Print the figures, what was compared, and what ran each model."""
    from sparsifiner_edge.outcomes import ScoresResult

    if isinstance(result, ScoresResult):
        _print_scores(result)
    else:
        _print_robustness(result)
    method = result.method
    click.echo(f"Compared with: {method.truth}. Images: {printable(method.preprocessing)}.")
    if method.gallery is not None:
        click.echo(f"Learnt from {printable(method.gallery)}.")
    for subject in result.subjects:
        click.echo(f"{subject.role}: {printable(subject.path)} on {_ran(method.runtime[str(subject.role)])}")


def _ran(runtime: Runtime) -> str:
    kernels = f", kernels: {runtime.kernels}" if runtime.kernels is not None else ""
    chosen = f". {runtime.chosen}" if runtime.chosen else ""
    return printable(f"{runtime.backend}, {runtime.precision}{kernels}{chosen}", 2000)


def _between(quantity: Quantity, form: str = ".4f") -> str:
    """Format an interval as text."""
    known = isinstance(quantity.low, float) and isinstance(quantity.high, float)
    return f"{quantity.low:{form}} to {quantity.high:{form}}" if known else "too few images"


def _print_scores(result: ScoresResult) -> None:
    """Print one row per figure."""
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
    """Print one row per corruption and score: the drop of each model, in points of 100."""
    method = result.method
    for score, by_condition in result.statistics.items():
        rows = []
        for name in ("clean", *method.corruptions, "all"):
            row = by_condition[name]
            extra = row.extra_drop.times(100)
            rows.append(
                [
                    name,
                    f"{100 * row.teacher:.2f}",
                    f"{100 * row.subject:.2f}",
                    f"{100 * row.teacher_drop.value:.2f}",
                    f"{100 * row.subject_drop.value:.2f}",
                    f"{extra.value:+.2f}",
                    _between(extra, "+.2f"),
                ]
            )
        common.print_table(
            f"{score} in percent, {by_condition['all'].images} images, severity {method.severity}",
            ["", "dense", "sparse", "dense drop", "sparse drop", "extra drop", "95 % interval"],
            rows,
        )
