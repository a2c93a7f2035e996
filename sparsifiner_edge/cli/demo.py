"""`sparsifiner-edge demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparsifiner_edge.cli import common
from sparsifiner_edge.records import Unavailable

if TYPE_CHECKING:
    from sparsifiner_edge.demo.demo import DemoResult


@click.command()
@click.option("-o", "--output", type=common.PATH, default=Path("demo"), show_default=True,
              help="Folder for students, bundles, result and images.")  # fmt: skip
@click.option("--minutes", type=click.FloatRange(1, 600), default=8, show_default=True,
              help="Of the search; in more of them it looks at more images.")  # fmt: skip
@common.json_option
def command(*, output: Path, minutes: float, as_json: bool) -> None:
    """A saliency model on DINOv2 ViT-S/14 at 518 px, untrained: the fastest at .98, searched for, beside dense."""
    try:
        from sparsifiner_edge.demo.demo import run_demo
    except ModuleNotFoundError as error:
        if str(error.name).startswith("sparsifiner_edge"):
            raise  # A fault of this package, which no other mends.
        from sparsifiner_edge.errors import MissingExtraError

        raise MissingExtraError(str(error.name), "demo") from error
    with common.progress_bar("starting") as progress:
        result = run_demo(output, progress, minutes)
    common.print_result(result, as_json, lambda found: _print(found, output))


def _print(result: DemoResult, output: Path) -> None:
    # A row for each figure: beside each other they are cut off at 80 columns.
    columns = [
        [
            found.merge, found.keep, f"{found.fidelity:.4f}", f"{found.error:.4f}", f"{found.iou:.3f}",
            f"{found.tokens_left_share:.0%}", f"{found.macs_share:.0%}",
            f"{found.dense_p50_ms:.1f}", f"{found.sparse_p50_ms:.1f}", f"{found.speed_ratio.value:.2f}",
            f"{_number(found.speed_ratio.low)} to {_number(found.speed_ratio.high)}",
        ]
        for found in result.statistics.values()
    ]  # fmt: skip
    names = (
        "merged, by layer", "keys read, by layer", "patch cosine, as searched", "map's error, eight photographs",
        "IoU, eight photographs", "tokens left", "MACs", "dense ms", "sparse ms", "speed ratio", "95 % interval",
    )  # fmt: skip
    common.print_table(
        "Saliency with DINOv2 ViT-S/14, 518 px, untrained; ONNX Runtime on this CPU",
        ["", *result.statistics],
        [list(row) for row in zip(names, *columns, strict=True)],
    )
    click.echo(f"Kernels: {result.method.kernels}.")
    for sentence in result.method.verdicts:
        click.echo(sentence)
    click.echo(f"{output}/report.html shows it, {output}/maps.png the maps side by side; bundles and result.json too.")


def _number(value: float | Unavailable) -> str:
    return f"{value:.2f}" if isinstance(value, float) else "?"
