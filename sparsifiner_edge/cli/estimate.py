"""`sparsifiner-edge estimate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparsifiner_edge.cli import common

if TYPE_CHECKING:
    from sparsifiner_edge.profiles.estimate import EstimateResult


@click.command()
@click.argument("bundle", type=common.PATH, required=False)
@click.option("--board", "board", metavar="NAME|FILE.toml",
              help="A board of this package (see --list), or your own (docs/boards.md).")  # fmt: skip
@click.option("--precision", help="fp32, tf32, fp16 or int8; by default the bundle's.")
@click.option("--power-mode", metavar="NAME|ID", help="As nvpmodel names or numbers it; by default full clocks.")
@click.option("--list", "listed", is_flag=True, help="List the boards, and nothing else.")
@common.json_option
@common.result_option
def command(
    *, bundle: Path | None, board: str | None, listed: bool, as_json: bool, output: Path | None, **options: Any
) -> None:
    """Estimate latency, memory and energy of BUNDLE on a board you do not have. Nothing is measured."""
    from sparsifiner_edge.profiles.estimate import estimate_bundle

    if listed:
        _list_boards(as_json)
        return
    if bundle is None:
        raise click.UsageError("Missing argument 'BUNDLE'.")
    if board is None:
        raise click.UsageError("Missing option '--board'; --list shows the boards.")
    result = estimate_bundle(bundle, board, **options)
    common.print_result(result, as_json, _print, output)


def _list_boards(as_json: bool) -> None:
    from sparsifiner_edge.profiles.boards.board import BOARD_COLUMNS, board_names, board_row, load_board

    rows = [board_row(load_board(name)) for name in board_names()]
    if as_json:
        common.print_json([dict(zip(BOARD_COLUMNS, row, strict=True)) for row in rows])
    else:
        common.print_table("Boards", BOARD_COLUMNS[:9], [row[:9] for row in rows])


def _print(result: EstimateResult) -> None:
    estimate, method = result.statistics, result.method
    rows = [
        [label, *(f"{getattr(figure, bound) * factor:.3g}" for bound in ("value", "low", "high"))]
        for label, figure, factor in (
            ("latency, ms", estimate.latency_ms, 1.0),
            ("memory, MB", estimate.memory_bytes, 1e-6),
            ("energy per inference, mJ", estimate.energy_j, 1e3),
        )
    ]
    name, board = Path(str(result.subjects[0].path)).name, method.board
    common.print_table(f"ESTIMATE of {name} on {board['title']}", ["", "value", "low", "high"], rows)
    click.echo(f"Computed, not measured: {estimate.latency_ms.interval}.")
    click.echo(f"Precision: {method.precision['linear']} in linear layers, {method.precision['other']} elsewhere.")
    click.echo(f"Sparse operators: {method.kernels['assumed']}, because {method.kernels['because']}.")
    click.echo(f"Fits the board's {board['memory_gb']:g} GB: {estimate.fits_memory}.")
    if board["unverified"]:
        click.echo(f"Not confirmed by any document: {', '.join(board['unverified'])}.")
