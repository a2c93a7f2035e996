"""The table of boards in docs/boards.md, from their files."""

from __future__ import annotations

from sparsifiner_edge.profiles.boards.board import Board, board_names, load_board

COLUMNS = (
    "board", "SM", "GHz", "fp32", "fp16", "int8", "memory, GB", "GB/s", "W", "power modes", "total power", "JetPack",
)  # fmt: skip
_VALUES = ("sm", "clock_ghz", "fp32_tflops", "fp16_tflops", "int8_tops", "memory_gb", "bandwidth_gb_s", "tdp_w")


def board_row(board: Board) -> list[str]:
    """What the table says of a board; a star after what no document confirmed."""
    return [
        board.name,
        *(_marked(board, name) for name in _VALUES),
        _star(board, "power_modes", ", ".join(f"{mode.id} {mode.name}" for mode in board.power_modes)),
        _star(board, "rails", board.rails.total if board.rails else ""),
        ", ".join(entry.version for entry in board.jetpack) or "-",
    ]


def _marked(board: Board, name: str) -> str:
    value = getattr(board, name)
    return _star(board, name, f"{value:g}" if value else "")


def _star(board: Board, name: str, text: str) -> str:
    return f"{text}*" if text and name in board.unverified else text or "-"


def boards_markdown() -> str:
    """The table, one line per board, by name."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(board_row(load_board(name)) for name in board_names())]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
