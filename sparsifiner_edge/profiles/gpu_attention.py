"""How sparse attention in our CUDA kernels compares with dense attention on GPUs that are not at hand.

The table is made by `benchmarks/gpu_bound.py --table`: a roofline over the kernels' machine code, six heads of 64 at
tile 64. Nothing of it was measured; `build` on the GPU measures instead.
"""

from __future__ import annotations

import functools
import json
import math
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsifiner_edge.profiles.boards.board import Board

TABLE = Path(__file__).parent / "boards" / "gpu_attention.json"
_HEADS = 6
"""Of the table's layers."""


@functools.cache
def _table() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return found


def times_faster(board: Board, tokens: int, keep: float, lanes: int, *, launches: bool = True) -> float | None:
    """How often a layer's sparse attention, its choice of keys included, fits into the time of dense attention.

    Between the table's sizes, rates and batches it is interpolated, beyond them it is the nearest's.

    Args:
        lanes: batch x heads.
        launches: what launches cost by themselves, of three against one, counts too.

    Returns:
        None for a board that the table has no row of.
    """
    rows = _table()["whole" if launches else "busy"].get(board.name)
    if rows is None:
        return None
    grid = _table()["grid"]
    by_batch = [
        _between(grid["keep"], keep, [_between(grid["tokens"], tokens, row) for row in rates]) for rates in rows
    ]
    return _between(grid["batch"], lanes / _HEADS, by_batch)


def crossing(board: Board, keep: float, lanes: int) -> int | None:
    """The least number of tokens, of the table's, from which on sparse attention is faster; None if there is none."""
    sizes = _table()["grid"]["tokens"]
    slower = [n for n in sizes if (times_faster(board, n, keep, lanes) or 0) < 1]
    return min((n for n in sizes if n > max(slower, default=0)), default=None)


def _between(axis: Sequence[float], at: float, values: Sequence[float]) -> float:
    """By powers of the axis."""
    place = bisect_right(axis, at)
    if place in (0, len(axis)):
        return values[min(place, len(axis) - 1)]
    low, high = axis[place - 1], axis[place]
    share = math.log(at / low) / math.log(high / low)
    return float(values[place - 1] ** (1 - share) * values[place] ** share)
