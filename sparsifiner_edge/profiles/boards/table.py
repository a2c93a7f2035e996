"""The table of boards in docs/boards.md, from their files."""

from __future__ import annotations

from sparsifiner_edge.profiles.boards.board import Board, board_names, load_board

COLUMNS = (
    "board",
    "SM",
    "GHz",
    "fp32",
    "fp16",
    "int8",
    "memory, GB",
    "GB/s",
    "W",
    "power modes",
    "total power",
    "JetPack",
)


def board_row(board: Board) -> list[str]:
    """What the table says of a board; a star after what no document confirmed."""
    return [
        board.name,
        _marked(board, "sm"),
        _marked(board, "clock_ghz"),
        _marked(board, "fp32_tflops"),
        _marked(board, "fp16_tflops"),
        _marked(board, "int8_tops"),
        _marked(board, "memory_gb"),
        _marked(board, "bandwidth_gb_s"),
        _marked(board, "tdp_w"),
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
