"""`sparsifiner-edge estimate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparsifiner_edge.cli.common import json_option, output_option, print_json, print_table

if TYPE_CHECKING:
    from sparsifiner_edge.profiles.estimate import EstimateResult


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option("--board", metavar="NAME", help="A board of this package; see --list.")
@click.option("--board-file", type=click.Path(path_type=Path), help="A board of your own (docs/boards.md), as TOML.")
@click.option("--precision", help="fp32, tf32, fp16 or int8; by default the bundle's.")
@click.option("--power-mode", metavar="NAME|ID", help="As nvpmodel names or numbers it; by default full clocks.")
@click.option("--kernels", default="auto", show_default=True,
              help="auto, native or portable: what is taken to run the sparse operators.")  # fmt: skip
@click.option("--list", "listed", is_flag=True, help="List the boards, and nothing else.")
@json_option
@output_option("Also write the result to this JSON file.", required=False)
def command(
    *,
    bundle: Path | None,
    board: str | None,
    board_file: Path | None,
    precision: str | None,
    power_mode: str | None,
    kernels: str,
    listed: bool,
    as_json: bool,
    output: Path | None,
) -> None:
    """Estimate latency, memory and energy of BUNDLE on a board you do not have. Nothing is measured."""
    from sparsifiner_edge.profiles.boards.board import board_names, load_board, read_board
    from sparsifiner_edge.profiles.boards.table import COLUMNS, board_row
    from sparsifiner_edge.profiles.estimate import estimate_bundle
    from sparsifiner_edge.records import write_record
    from sparsifiner_edge.results import write_result

    if listed:
        boards = [load_board(name) for name in board_names()]
        rows = [board_row(found) for found in boards]
        if as_json:
            print_json([dict(zip(COLUMNS, row, strict=True)) for row in rows])
        else:
            print_table("Boards", COLUMNS[:9], [row[:9] for row in rows])
        return
    if bundle is None:
        raise click.UsageError("Missing argument 'BUNDLE'.")
    if (board is None) == (board_file is None):
        raise click.UsageError("Give either --board or --board-file; --list shows the boards.")
    if output is not None and output.is_dir():
        raise click.BadParameter(f"{output} is a folder; give a file's name.", param_hint="--output")
    device = load_board(board) if board is not None else read_board(board_file or Path())
    result = estimate_bundle(bundle, device, precision=precision, power_mode=power_mode, kernels=kernels)
    if as_json:
        print_json(write_record(result))
    else:
        _print(result)
    if output is not None:
        write_result(output, result)


def _print(result: EstimateResult) -> None:
    found, method = result.statistics, result.method
    rows = [
        [label, *(f"{getattr(figure, bound) * factor:.3g}" for bound in ("value", "low", "high"))]
        for label, figure, factor in (
            ("latency, ms", found.latency_ms, 1.0),
            ("memory, MB", found.memory_bytes, 1e-6),
            ("energy per inference, mJ", found.energy_j, 1e3),
        )
    ]
    name, board = Path(str(result.subjects[0].path)).name, method.board
    print_table(f"ESTIMATE of {name} on {board['title']}", ["", "value", "low", "high"], rows)
    operators = [[o.kind, f"{o.macs / 1e6:.1f}", f"{o.bytes / 1e6:.1f}", f"{o.ms:.3f}", o.bound]
                 for o in found.operators]  # fmt: skip
    print_table("Operators, over all layers", ["", "MACs, M", "moved, MB", "ms", "bound by"], operators)
    click.echo(f"Computed, not measured: {found.latency_ms.method}.")
    click.echo(f"Precision: {method.precision['linear']} in linear layers, {method.precision['other']} elsewhere.")
    click.echo(f"Sparse operators: {method.kernels.assumed}, because {method.kernels.because}.")
    click.echo(f"Fits the board's {board['memory_gb']:g} GB: {found.fits_memory}.")
    if board["unverified"]:
        click.echo(f"Not confirmed by any document: {', '.join(board['unverified'])}.")
