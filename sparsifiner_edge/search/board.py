"""Latency of plans on a board that is not here: the roofline of `estimate`, as a table of a layer's parts."""

from __future__ import annotations

import dataclasses

import numpy as np

from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.export.export import model_shape
from sparsifiner_edge.plan import LEAST_PATCHES, LayerPlan
from sparsifiner_edge.profiles import roofline
from sparsifiner_edge.profiles.boards.board import Board
from sparsifiner_edge.profiles.roofline import CPU_FIT, GPU_FIT, Cost, Workload
from sparsifiner_edge.search.latency import Anchor, PartTable, PlanLatency, name_of
from sparsifiner_edge.search.plan import SHARES
from sparsifiner_edge.sparse.student import Student

ESTIMATED_SIZES = 24
"""Numbers of tokens in a table."""
MERGED = 8
"""Of so many patches one merges where merging is counted."""


def estimated(student: Student, board: Board, precision: str) -> PlanLatency:
    """Milliseconds on a board at a precision. On a GPU sparse operators are taken to run as function bodies, as
    `estimate` takes them to where a bundle carries no kernels for the board.

    Raises:
        ConfigError: the board has no arithmetic for the precision.
    """
    shape, fit = model_shape(student.model), CPU_FIT if board.kind == "cpu" else GPU_FIT
    base = dataclasses.replace(student.sparsity, keep=1.0, dense_layers=(), merge=())

    def costs(patches: int, sparsity: SparsityConfig) -> list[Cost]:
        one = dataclasses.replace(shape, depth=1, patches=patches)
        gpu = board.kind == "gpu"
        work = Workload(one, sparsity, portable=gpu, merging="bodies" if gpu else "native")
        return roofline.costs(work, board, precision, fit)

    least = max(base.tile, shape.patches // 10, LEAST_PATCHES + 1)  # of which one can merge
    patches = sorted({round(n) for n in np.geomspace(least, shape.patches, ESTIMATED_SIZES)}, reverse=True)
    plain = [costs(count, base) for count in patches]
    rates = [max(0, min(count // MERGED, count - LEAST_PATCHES)) for count in patches]
    merged = [
        costs(count, dataclasses.replace(base, merge=(rate,))) for count, rate in zip(patches, rates, strict=True)
    ]
    attention = {
        name_of(share): [_ms(costs(count, dataclasses.replace(base, keep=share)), *_ATTENTION) for count in patches]
        for share in SHARES
    }
    table = PartTable(
        about={"estimate": board.name, "precision": precision, "kernels": _kernels(board)}, patches=patches,
        projections=[_ms(found, "projections") for found in plain], mlp=[_ms(found, "mlp") for found in plain],
        merging=[_ms(found, "pruning") for found in merged], attention=attention,
    )  # fmt: skip
    whole = PlanLatency(table, shape.patches)
    nothing = LayerPlan.dense(shape.depth)
    return whole.calibrated(Anchor(nothing, whole.of(nothing) + _ms(plain[0], "embedding")))


_ATTENTION = ("predictor", "cells", "attention")


def _kernels(board: Board) -> str:
    return "function bodies" if board.kind == "gpu" else "native"


def _ms(found: list[Cost], *kinds: str) -> float:
    return 1e3 * sum(cost.seconds for cost in found if cost.operator.kind in kinds)
