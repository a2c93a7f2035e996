"""`sparsifiner-edge optimize`."""

from __future__ import annotations

import functools
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparsifiner_edge.cli import common
from sparsifiner_edge.errors import pip_install
from sparsifiner_edge.execution import ON_PROCESSOR
from sparsifiner_edge.process import stopping
from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.text import printable

if TYPE_CHECKING:
    from sparsifiner_edge.pareto import Candidate, Interim, SearchResult

_STARTED = time.monotonic()
"""Start of the process. `--minutes` includes the time that Python needs to start."""
_METRICS = {"patches": "a patch cosine of", "class": "a class cosine of", "maps": "an IoU of"}
"""Names of the metrics in the headline."""


@click.command()
@click.argument("source", metavar="MODEL|STUDENT")
@click.option("--data", type=common.PATH, required=True, help="Folder of images like those that the model will see.")
@click.option(
    "--at-least",
    type=float,
    metavar="FIDELITY",
    help="Minimum fidelity: find the fastest plan that reaches it.  [default: 0.98]",
)
@click.option(
    "--at-most-ms",
    type=float,
    metavar="MS",
    help="Maximum latency in milliseconds: find the plan with the highest fidelity within it.",
)
@click.option(
    "--metric",
    default="patches",
    show_default=True,
    metavar="NAME",
    help="Fidelity: patches or class (cosine of these tokens), maps (IoU of a dense map), or your "
    "own metric as package.module:class.",
)
@common.weights_option
@common.img_size_option
@click.option("--teacher", metavar="MODEL", help="Dense model to compare with, if the sparse model was trained.")
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=click.Choice(ON_PROCESSOR),
    help="Backend to consider. Repeatable.  [default: all that work here]",
)
@click.option(
    "--compute-precision",
    "compute_precisions",
    multiple=True,
    type=click.Choice(("auto", "bf16", "fp16")),
    help="Compute precision to consider; auto: the weight precision. Repeatable.  [default: all that work here]",
)
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    type=click.Choice(("fp32", "int8", "fp16")),
    help="Weight precision to consider. Repeatable.  [default: int8 and fp32; on the GPU of a board int8 and fp16]",
)
@click.option(
    "--board",
    metavar="NAME|FILE.toml",
    help="Optimize for a board that is not here: latency is estimated, as `estimate` does.",
)
@click.option(
    "--minutes",
    type=common.FiniteRange(min=0.1, max=10_000),
    default=8.0,
    show_default=True,
    help="Hard limit on the run time. Ctrl-C ends the search earlier and keeps the best result so far.",
)
@common.labels_option
@common.fit_option
@common.trust_option
@common.normalise_options
@common.json_option
@common.output_option("New folder for bundle/, student/, front.json, front.png and report.html.")
def command(
    *, source: str, data: Path, output: Path, minutes: float, fit: str | None, as_json: bool, **options: Any
) -> None:
    """Find the fastest sparse model that keeps a fidelity, or the most faithful one within a latency.

    OUTPUT/bundle holds the best bundle so far. The first one is there after one or two minutes.
    """
    with common.progress_bar("starting") as progress, stopping() as stop:
        import sparsifiner_edge as se

        optimize, elapsed_minutes = se.optimize, (time.monotonic() - _STARTED) / 60
        options |= {"minutes": max(0.01, minutes - elapsed_minutes), "fit": fit or "crop"}
        groups = common.group(options, model=se.ModelOptions, options=se.OptimizeOptions)
        better = functools.partial(_print_interim, str(options["metric"]))
        result = optimize(source, data, output, progress=progress, better=better, stop=stop, **groups)
    common.print_result(result, as_json, lambda result: _print(result, output))
    front = result.statistics
    if isinstance(front.answer, Unavailable) or front.unverified:
        raise click.exceptions.Exit(1)


def _print(result: SearchResult, output: Path) -> None:
    front, board, count = result.statistics, result.method.board, len(result.method.images["held_out"])
    for reason in front.unverified:
        click.echo(f"Not verified: {reason}")
    click.echo(printable(headline(result), 300))
    fastest = min((one.ms.value for one in front.dense), default=None)
    rows = [_row(f"dense: {one.deployment}", one, fastest) for one in reversed(front.dense)]
    rows += [_row(f"sparse: {one.deployment}", one, fastest) for one in reversed(front.finalists)]
    title = "Full models, measured in turn" if board is None else f"Estimated for {board}, not measured"
    heads = ["ms", "speed-up", f"fidelity on {count} held out", "MB"]
    common.print_table(title, ["", *heads], rows)
    if front.levers:
        first = front.levers[0].candidate
        steps = [
            _row(f"{lever.change} ({lever.candidate.deployment})", lever.candidate, first.ms.value)
            for lever in front.levers
        ]
        common.print_table("What each change contributes, one after the other", ["", *heads], steps)
    for text in (f"Left out: {deployment}: {why:.160}" for deployment, why in front.left_out.items()):
        click.echo(text, err=True)
    for remark in front.remarks:
        click.echo(printable(remark, 500), err=True)
    _print_next(result, output)


def _print_interim(metric: str, best: Interim) -> None:
    """Print the best model so far."""
    times = f"{best.dense_ms / best.ms:.2f} times faster than the dense model"
    fidelity = f"{_METRICS.get(metric, metric)} {best.fidelity:.3f} ({best.deployment})"
    common.err_console.print(printable(f"So far: {times} at {fidelity}. The search goes on.", 300), markup=False)


def headline(result: SearchResult) -> str:
    """Return the result in one sentence."""
    front, metric = result.statistics, result.method.metric
    if isinstance(front.answer, Unavailable):
        return f"No answer: {front.answer.why}."
    best, times = front.finalists[0], front.speed_up
    fidelity = f"at {_METRICS.get(metric, metric)} {best.held_out_fidelity:.3f} ({best.deployment})"
    estimated = " (estimated)" if result.method.board else ""
    if times is None:
        return f"{best.ms.value:.1f} ms{estimated} {fidelity}."
    return f"{times:.2f} times faster than the dense model{estimated} {fidelity}."


def _print_next(result: SearchResult, output: Path) -> None:
    """Print where the answer is and which commands follow."""
    front, board = result.statistics, result.method.board
    best = front.finalists[0]
    plan = f"--merge {best.merge} --keep {best.keep}, in {best.deployment}"
    if isinstance(front.answer, Unavailable):
        click.echo(f"The nearest plan is {output / 'bundle'}: {plan}", err=True)
        return
    click.echo(f"Answer: {output / 'bundle'}: {plan}")
    if not isinstance(front.check, Unavailable) and isinstance(front.check.low, float):
        click.echo(f"Fidelity on images like the held-out ones: at least {front.check.low:.4f} (95 %).")
    if board is not None:
        click.echo(f"Next: sparsifiner-edge estimate {output / 'bundle'} --board {board}")
        return
    student = output / "start"
    bundle = shlex.quote(str(output / "bundle"))
    click.echo(f"Next: sparsifiner-edge run {bundle} --source IMAGES/     (a video, a camera: --source URL)")
    page = output / "report.html"
    click.echo(f"Page: {page}" if page.is_file() else f"For front.png and report.html: {pip_install('report')}")
    if student.is_dir():
        budgets = f"--data IMAGES/ --budgets {shlex.quote(str(output / 'front.json'))}{common.trust_text(student)}"
        click.echo(f"Train for fidelity: sparsifiner-edge distill {shlex.quote(str(student))} {budgets} -o BETTER/")


def _row(label: str, one: Candidate, fastest: float | None) -> list[str]:
    """Return one row of the table."""
    ms = f"{one.ms.value:.1f}"
    if isinstance(one.ms.low, float) and isinstance(one.ms.high, float):
        ms += f" ({one.ms.low:.1f} to {one.ms.high:.1f})"
    times = "" if fastest is None else f"{fastest / one.ms.value:.2f}"
    return [label, ms, times, f"{one.held_out_fidelity:.4f}", f"{one.file_bytes / 1e6:.0f}"]
