"""`sparsifiner-edge optimize`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparsifiner_edge.cli import common
from sparsifiner_edge.execution import ON_PROCESSOR
from sparsifiner_edge.records import Unavailable

if TYPE_CHECKING:
    from sparsifiner_edge.front import Candidate, SearchResult

NOTED_DRIFT = 0.1
"""Of the logarithm of the dense model's time."""


@click.command()
@click.argument("source", metavar="MODEL|STUDENT")
@click.option("--data", type=common.PATH, required=True, help="Folder of images like those that the model will see.")
@click.option("--at-least", type=float, metavar="FIDELITY", help="The fastest that is as near to the dense model.")
@click.option("--at-most-ms", type=float, metavar="MS", help="The nearest to the dense model that takes no longer.")
@click.option("--metric", default="patches", show_default=True, metavar="NAME",
              help="Fidelity: patches or class (cosine of these tokens), maps (IoU of a decoder's map), or a metric of "
                   "your own, package.module:class.")  # fmt: skip
@common.weights_option
@common.img_size_option
@click.option("--teacher", metavar="MODEL", help="The dense model of a student that was trained.")
@click.option("--backend", "backends", multiple=True, type=click.Choice(ON_PROCESSOR),
              help="Repeatable; by default all that run here.")  # fmt: skip
@click.option("--computes", multiple=True, type=click.Choice(("auto", "bf16", "fp16")),
              help="What a backend computes in of all that is not int8; auto: as stored. Repeatable; by default all "
                   "that run here.")  # fmt: skip
@click.option("--precision", "precisions", multiple=True, type=click.Choice(("fp32", "int8", "fp16")),
              help="What files store. Repeatable; by default int8, and fp32 or on a board's GPU fp16.")  # fmt: skip
@click.option("--board", metavar="NAME|FILE.toml",
              help="A board that is not here: latency is estimated, as `estimate` does.")  # fmt: skip
@click.option("--minutes", type=common.FiniteRange(min=1, max=10_000), default=20.0, show_default=True,
              help="About how long to look; Ctrl-C ends it earlier, with the best so far.")  # fmt: skip
@common.trust_option
@common.normalise_options
@common.json_option
@common.output_option("Folder for front.json, student/ and bundle/.")
def command(*, source: str, data: Path, output: Path, as_json: bool, **options: Any) -> None:
    """Find the fastest sparse model at a fidelity, or the most faithful within a latency, on this machine."""
    import sparsifiner_edge as se

    groups = common.group(options, model=se.ModelOptions, options=se.OptimizeOptions)
    with common.progress_bar("searching") as progress:
        result = se.optimize(source, data, output, progress=progress, **groups)
    common.print_result(result, as_json, lambda result: _print(result, output))
    if isinstance(result.statistics.answer, Unavailable):
        raise click.exceptions.Exit(1)


def _print(result: SearchResult, output: Path) -> None:
    front, board = result.statistics, result.method.board
    rows = [_row(str(finalist.engine), finalist) for finalist in front.finalists]
    rows += [_row(f"dense: {one.engine}", one) for one in front.dense]
    title = "Finalists, whole models measured" if board is None else f"Finalists, estimated for {board}, not measured"
    common.print_table(title, ["", "fidelity", "predicted", "ms", "predicted"], rows)
    for finalist in front.finalists:  # Not in the table: at 80 columns a plan would cut the figures off.
        click.echo(f"{finalist.engine}: --merge {finalist.merge} --keep {finalist.keep}")
    for engine, why in front.left_out.items():
        click.echo(f"Left out: {engine}: {why}", err=True)
    for one in front.dense:
        factor = one.ms.value / one.predicted_ms
        if abs(math.log(factor)) > NOTED_DRIFT:
            click.echo(
                f"This machine changed its speed meanwhile: the dense model takes {factor:.2f} times as long in "
                f"{one.engine} as at the start. Fix its clocks, or close what else runs, and search again.",
                err=True,
            )
    if isinstance(front.answer, Unavailable):
        click.echo(f"No answer: {front.answer.why}.", err=True)
        return
    click.echo(f"Answer: {output / 'bundle'}, the first of them.")
    if not isinstance(front.check, Unavailable):
        value, low = front.check.value, front.check.low
        bound = f"at least {low:.4f}" if isinstance(low, float) else "too few to bound it"
        click.echo(f"On {len(result.method.images['checked'])} images kept for this: {value:.4f}, {bound} (95 %).")
        if result.method.at_least is not None and value < result.method.at_least:
            click.echo(
                "That is less than was asked for: images differ that much. Ask for more, or give more images.", err=True
            )
    if board is None:
        answer = front.answer
        how = f"--backend {answer.backend}" + (f" --precision {answer.computes}" if answer.computes != "auto" else "")
        click.echo(f"Next: sparsifiner-edge run {output / 'bundle'} {how} --source IMAGES/")
    else:
        click.echo(f"Next: sparsifiner-edge estimate {output / 'bundle'} --board {board}")


def _row(label: str, one: Candidate) -> list[str]:
    """A line of the table; of the dense model nothing was predicted."""
    dense = label.startswith("dense")
    ms = f"{one.ms.value:.1f}"
    if isinstance(one.ms.low, float) and isinstance(one.ms.high, float):
        ms += f" ({one.ms.low:.1f} to {one.ms.high:.1f})"
    predicted = ["", ""] if dense else [f"{one.predicted_fidelity:.4f}", f"{one.predicted_ms:.1f}"]
    return [label, f"{one.fidelity:.4f}", predicted[0], ms, predicted[1]]
