"""`sparsifiner-edge search`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparsifiner_edge.bundle.entries import ON_PROCESSOR
from sparsifiner_edge.cli import common
from sparsifiner_edge.records import Unavailable

if TYPE_CHECKING:
    from sparsifiner_edge.results import Estimate
    from sparsifiner_edge.search.front import Finalist, SearchResult


@click.command(cls=common.SizedCommand)
@click.argument("source", metavar="MODEL|STUDENT")
@click.option("--data", type=common.PATH, required=True, help="Folder of images like those that the model will see.")
@click.option("--at-least", type=float, metavar="FIDELITY", help="The fastest that is as near to the dense model.")
@click.option("--at-most-ms", type=float, metavar="MS", help="The nearest to the dense model that takes no longer.")
@click.option("--metric", type=click.Choice(("patches", "class", "task")), default="patches", show_default=True,
              help="Fidelity: cosine of patch tokens, of the class token, or IoU of a decoder's map.")  # fmt: skip
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
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    type=click.Choice(("fp32", "int8")),
    default=("fp32", "int8"),
    show_default=True,
    help="Repeatable.",
)
@click.option(
    "--minutes",
    type=common.FiniteRange(min=1, max=10_000),
    default=20.0,
    show_default=True,
    help="About how long to look.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**31),
    default=0,
    show_default=True,
    help="Of which images are kept for the check.",
)
@common.trust_option
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
    found = result.statistics
    rows = [_row(finalist) for finalist in found.finalists]
    rows += [["the dense model", backend, "fp32", "1", "", _ms(ms), ""] for backend, ms in found.dense_ms.items()]
    columns = ["merge", "backend", "precision", "fidelity", "predicted", "ms", "predicted"]
    common.print_table("Finalists, measured", columns, rows)
    if isinstance(found.answer, Unavailable):
        click.echo(f"No answer: {found.answer.why}.", err=True)
        return
    click.echo(f"{output / 'bundle'}: merge {found.answer.merge}, keep {found.answer.keep}")
    if not isinstance(found.check, Unavailable):
        low = found.check.fidelity.low
        bound = f"at least {low:.4f}" if isinstance(low, float) else "too few to bound it"
        click.echo(f"On {found.check.images} images kept for this: {found.check.fidelity.value:.4f}, {bound} (95 %).")
    click.echo(f"Next: sparsifiner-edge run {output / 'bundle'} --backend {found.answer.backend} IMAGES/")


def _row(finalist: Finalist) -> list[str]:
    return [
        f"{finalist.merge}; keep {finalist.keep}", finalist.backend, finalist.precision, f"{finalist.fidelity:.4f}",
        f"{finalist.predicted_fidelity:.4f}", _ms(finalist.measured_ms), f"{finalist.predicted_ms:.1f}",
    ]  # fmt: skip


def _ms(ms: Estimate) -> str:
    if isinstance(ms.low, float) and isinstance(ms.high, float):
        return f"{ms.value:.1f} ({ms.low:.1f} to {ms.high:.1f})"
    return f"{ms.value:.1f}"
