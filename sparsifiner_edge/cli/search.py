"""`sparsifiner-edge search`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparsifiner_edge.cli import common
from sparsifiner_edge.execution import ON_PROCESSOR
from sparsifiner_edge.records import Unavailable

if TYPE_CHECKING:
    from sparsifiner_edge.results import Estimate
    from sparsifiner_edge.search.front import Finalist, SearchResult

TOLD_DRIFT = 0.1
"""Of the logarithm of the dense model's time."""


@click.command(cls=common.SizedCommand)
@click.argument("source", metavar="MODEL|STUDENT")
@click.option("--data", type=common.PATH, required=True, help="Folder of images like those that the model will see.")
@click.option("--at-least", type=float, metavar="FIDELITY", help="The fastest that is as near to the dense model.")
@click.option("--at-most-ms", type=float, metavar="MS", help="The nearest to the dense model that takes no longer.")
@click.option("--metric", type=click.Choice(("patches", "class", "task")), default="patches", show_default=True,
              help="Fidelity: cosine of patch tokens, of the class token, or a task's (see --task).")  # fmt: skip
@click.option("--task", metavar="maps|package.module:class",
              help="For task: a decoder's map, by IoU, or a metric of your own.  [default: maps]")  # fmt: skip
@common.weights_option
@common.img_size_option("model")
@click.option("--teacher", metavar="MODEL", help="The dense model of a student that was trained.")
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=click.Choice(ON_PROCESSOR),
    help="Repeatable; by default all that run here.",
)
@click.option("--computes", multiple=True, type=click.Choice(("auto", "bf16", "fp16")),
              help="What a backend computes in of all that is not int8; auto: as stored. Repeatable; by default all "
                   "that run here.")  # fmt: skip
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    type=click.Choice(("fp32", "int8", "fp16")),
    help="What files store. Repeatable; by default int8 and fp32, on a board's GPU int8 and fp16.",
)
@click.option("--board", metavar="NAME|FILE.toml",
              help="A board that is not here: latency is estimated, as `estimate` does.")  # fmt: skip
@click.option(
    "--minutes",
    type=common.FiniteRange(min=1, max=10_000),
    default=20.0,
    show_default=True,
    help="About how long to look; Ctrl-C ends it earlier, with the best so far.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**31),
    default=0,
    show_default=True,
    help="Of which images are kept for the check.",
)
@common.trust_option
@common.normalise_options
@common.json_option
@common.output_option("Folder for front.json, front.png, student/ and bundle/.")
def command(*, source: str, data: Path, output: Path, as_json: bool, **options: Any) -> None:
    """Find the fastest sparse model at a fidelity, or the most faithful within a latency, on this machine."""
    import sparsifiner_edge

    with common.progress_bar("searching") as progress:
        result = sparsifiner_edge.search_model(source, data, output, progress=progress, **options)
    common.print_result(result, as_json, lambda found: _print(found, output))
    if isinstance(result.statistics.answer, Unavailable):
        raise click.exceptions.Exit(1)


def _print(result: SearchResult, output: Path) -> None:
    found, board = result.statistics, result.method.board
    rows = [_row(finalist) for finalist in found.finalists]
    for engine, dense in found.dense_ms.items():
        own = found.dense_fidelity.get(engine)
        rows.append([f"dense: {engine}", "" if own is None else f"{own:.4f}", "", _ms(dense), ""])
    title = "Finalists, whole models measured" if board is None else f"Finalists, estimated for {board}, not measured"
    common.print_table(title, ["", "fidelity", "predicted", "ms", "predicted"], rows)
    for finalist in found.finalists:  # Not in the table: at 80 columns a plan would cut the figures off.
        click.echo(f"{finalist.engine}: --merge {finalist.merge} --keep {finalist.keep}")
    for engine, why in found.left_out.items():
        click.echo(f"Left out: {engine}: {why}", err=True)
    for engine, factor in found.drift.items():
        if abs(math.log(factor)) > TOLD_DRIFT:
            click.echo(
                f"This machine changed its speed meanwhile: the dense model takes {factor:.2f} times as long in "
                f"{engine} as at the start. Fix its clocks, or close what else runs, and search again.",
                err=True,
            )
    if isinstance(found.answer, Unavailable):
        click.echo(f"No answer: {found.answer.why}.", err=True)
        return
    click.echo(f"Answer: {output / 'bundle'}, the first of them.")
    if not isinstance(found.check, Unavailable):
        low = found.check.fidelity.low
        bound = f"at least {low:.4f}" if isinstance(low, float) else "too few to bound it"
        click.echo(f"On {found.check.images} images kept for this: {found.check.fidelity.value:.4f}, {bound} (95 %).")
        if result.method.at_least is not None and found.check.fidelity.value < result.method.at_least:
            click.echo(
                "That is less than was asked for: images differ that much. Ask for more, or give more images.", err=True
            )
    if board is None:
        answer = found.answer
        how = f"--backend {answer.backend}" + (f" --precision {answer.computes}" if answer.computes != "auto" else "")
        click.echo(f"Next: sparsifiner-edge run {output / 'bundle'} {how} --source IMAGES/")
    else:
        click.echo(f"Next: sparsifiner-edge estimate {output / 'bundle'} --board {board}")


def _row(finalist: Finalist) -> list[str]:
    return [
        finalist.engine, f"{finalist.fidelity:.4f}", f"{finalist.predicted_fidelity:.4f}",
        _ms(finalist.ms), f"{finalist.predicted_ms:.1f}",
    ]  # fmt: skip


def _ms(ms: Estimate) -> str:
    if isinstance(ms.low, float) and isinstance(ms.high, float):
        return f"{ms.value:.1f} ({ms.low:.1f} to {ms.high:.1f})"
    return f"{ms.value:.1f}"
