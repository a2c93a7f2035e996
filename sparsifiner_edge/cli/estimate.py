"""`sparsifiner-edge estimate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sparsifiner_edge.cli import common


@click.command()
@click.argument("bundle", type=common.PATH, required=False)
@click.option(
    "--board",
    "board",
    metavar="NAME|FILE.toml",
    help="Name of a board (see --list) or a TOML file of your own (docs/jetson.md).",
)
@click.option(
    "--against", type=common.PATH, help="Bundle to compare with: report which is faster on the board, and by how much."
)
@click.option(
    "--jetpack", metavar="6|7|VERSION", help="JetPack version of a Jetson.  [default: the newest for the board]"
)
@click.option(
    "--compute-precision",
    help="Assumed arithmetic of the linear layers: fp32, tf32, fp16 or int8.   [default: int8 for an int8 "
    "file, else fp16 on a GPU]",
)
@click.option(
    "--power-mode",
    metavar="NAME|ID",
    help="Power mode of the board, as nvpmodel names or numbers it.  [default: full clocks]",
)
@click.option("--list", "listed", is_flag=True, help="List the boards and exit.")
@common.json_option
@common.result_option
def command(
    *, bundle: Path | None, board: str | None, listed: bool, as_json: bool, output: Path | None, **options: Any
) -> None:
    """Estimate latency and memory of BUNDLE on a board that you do not have.

    The estimate comes from a model of the board. Nothing is measured.
    """
    from sparsifiner_edge.profiles.estimate import estimate_bundle

    if listed:
        _list_boards(as_json)
        return
    if bundle is None:
        raise click.UsageError("Missing argument 'BUNDLE'.")
    if board is None:
        raise click.UsageError("Missing option '--board'; --list shows the boards.")
    result = estimate_bundle(bundle, board, **options)
    common.print_result(result, as_json, common.print_page, output)


def _list_boards(as_json: bool) -> None:
    from sparsifiner_edge.profiles.boards.board import BOARD_COLUMNS, board_names, board_row, load_board

    rows = [board_row(load_board(name)) for name in board_names()]
    if as_json:
        common.print_json([dict(zip(BOARD_COLUMNS, row, strict=True)) for row in rows])
    else:
        common.print_table("Boards", BOARD_COLUMNS[:9], [row[:9] for row in rows])
