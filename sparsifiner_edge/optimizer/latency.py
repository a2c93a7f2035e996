"""Latency of a plan on this machine, as a sum of measured times of a layer's parts.

Two whole models correct the sum: the dense one scales it, and a sparse one shows the cost of our operators inside a
runtime's graph.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.export.deployed_model import deploy
from sparsifiner_edge.export.export import model_shape
from sparsifiner_edge.ops.triton.schedule import LEAST_CAPABILITY
from sparsifiner_edge.optimizer.pieces import LINEAR, attention_piece, linear_pieces, merging_piece, piece_times
from sparsifiner_edge.pareto import Deployment
from sparsifiner_edge.plan import LEAST_PATCHES, LayerPlan
from sparsifiner_edge.profiles import roofline
from sparsifiner_edge.profiles.boards.board import Board
from sparsifiner_edge.profiles.estimate import why_no_kernels
from sparsifiner_edge.profiles.roofline import CPU_FIT, GRAPH_FIT, Cost, Workload
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.sparse.hosts import backbone_of
from sparsifiner_edge.sparse.student import Student

SHARES = (0.05, 0.1, 0.2, 0.35, 0.5, 1.0)
"""Shares of the keys that a layer of a plan may read; 1 is dense."""
MEASURED_SIZES = 5
"""Number of token counts that are measured, from the image's down to a tenth."""
LEAST_MS = 1e-4
"""Minimum time of a part, where relative errors of its time are computed."""
EACH = 2
"""Merging is measured at one in this many token counts: its time is nearly linear and its graph is slow to make."""


class PlanLatency:
    """Predicts milliseconds of plans from the times of a layer's parts and of whole models.

    The time of a part is a constant, a cost per token and one per pair of tokens, none negative, fitted to the
    measurements: otherwise plans would be chosen for the noise of single entries.

    Args:
        patches: Numbers of patches at which the parts were measured, the image's own first.
        parts: Milliseconds of each part at each entry of `patches`. Parts are "projections", "mlp" and "merging" (see
            `pieces`), and attention, with key selection and background tokens, under the name of its share of keys (see
            `name_of`). Below the image's own number of patches, attention has token sizes as an input.
        scale: Factor on the sum: a machine's speed changes, and in a model the parts follow one another.
        ours: Extra time of a model with our operators; see `calibrate`.
    """

    def __init__(
        self, patches: Sequence[int], parts: Mapping[str, Sequence[float]], scale: float = 1.0, ours: float = 0.0
    ) -> None:
        self.measured, self.parts, self.scale, self.ours = patches, parts, scale, ours
        self._fits = {name: _fit(patches, values) for name, values in parts.items()}

    def of_part(self, name: str, counts: Any) -> Any:
        """Return the time of a part at numbers of patches [n]."""
        return self.scale * (_powers(counts) @ self._fits[name])

    def of(self, plan: LayerPlan) -> float:
        """Return the time of a whole model."""
        counts = plan.tokens(self.measured[0])
        total = float(sum(self.of_part("projections", counts[:-1]) + self.of_part("mlp", counts[1:])))
        for before, rate, share in zip(counts[:-1], plan.merge, plan.keep, strict=True):
            total += float(self.of_part(name_of(share), before))
            total += float(self.of_part("merging", before)) if rate else 0.0
        return total + (0.0 if plan.is_dense else self.ours)

    def calibrate(self, plan: LayerPlan, ms: float) -> PlanLatency:
        """Return a model that predicts the measured time for a plan.

        The dense plan sets `scale`, any other sets `ours`.
        """
        scale, ours = self.scale, self.ours
        if plan.is_dense:
            scale *= ms / self.of(plan)
        else:
            ours += ms - self.of(plan)
        return PlanLatency(self.measured, self.parts, scale, ours)


def _powers(counts: Any) -> Array:
    counts = np.asarray(counts, float)
    return np.stack([np.ones_like(counts), counts, counts**2], -1)


def _fit(patches: Sequence[int], values: Sequence[float]) -> Array:
    """Return non-negative coefficients of 1, n and n^2 with the smallest relative errors."""
    weight = 1 / np.maximum(np.asarray(values, float), LEAST_MS)
    columns, wanted = _powers(patches) * weight[:, None], np.asarray(values, float) * weight
    fits: list[tuple[float, Array]] = []
    for chosen in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)):
        some = np.linalg.lstsq(columns[:, chosen], wanted, rcond=None)[0]
        if (some >= 0).all():
            fit = np.zeros(3)
            fit[list(chosen)] = some
            fits.append((float(np.square(columns @ fit - wanted).sum()), fit))
    return min(fits, key=lambda row: row[0])[1]


def name_of(share: float) -> str:
    """Return the name of the part for attention at a share of keys."""
    return f"{share:g}"


def measure_latency(
    student: Student, deployment: Deployment, reads: bool = True, progress: Progress | None = None
) -> PlanLatency:
    """Measure on this machine (see `piece_times`); `reads`: plans may read less than all keys.

    Raises:
        MissingExtraError: The deployment is not installed.
        BackendError: The deployment cannot run here.
    """
    backbone, sparsity = backbone_of(deploy(student).model), student.sparsity
    geometry, prefix, whole = backbone.geometry, backbone.prefix, backbone.patches
    least = max(sparsity.tile, whole // 10)
    steps = [round(whole * (least / whole) ** (n / (MEASURED_SIZES - 1))) for n in range(MEASURED_SIZES)]
    patches = sorted(set(steps), reverse=True)
    few = patches[::EACH][::-1]
    dense = linear_pieces(backbone.layers[0], backbone.width, deployment.precision == "int8", prefix, patches)
    dense |= {
        ("merging", n): merging_piece(geometry, prefix, sparsity.merge_window, n, backbone.width, whole) for n in few
    }
    shares = SHARES if reads else SHARES[-1:]
    layers = {share: dataclasses.replace(sparsity, keep=share, merge=(1,)) for share in shares}
    ours = {
        (name_of(share), n): attention_piece(geometry, prefix, n, layer, n != whole)
        for n in patches
        for share, layer in layers.items()
    }
    ms = piece_times(ours, deployment.execution, progress) | piece_times(
        dense, deployment.dense_host.execution, progress
    )
    parts = {name: [ms[name, n] for n in patches] for name in (*map(name_of, shares), *LINEAR)}
    parts = {
        name_of(share): parts[name_of(SHARES[-1])] for share in SHARES
    } | parts  # Shares that were not measured are dense.
    parts["merging"] = np.interp(patches, few, [ms["merging", n] for n in few]).tolist()
    return PlanLatency(patches, parts)


ESTIMATED_SIZES = 24
"""Number of token counts at which parts are estimated."""
MERGED = 8
"""One patch in this many merges where merging is estimated."""


def takes_kernels(board: Board | None, stored: str = "fp16") -> bool:
    """Return True if files of a precision can carry kernels for a board.

    Its GPU and JetPack must be supported, and Triton must work.
    """
    if board is None or board.sm < LEAST_CAPABILITY or stored == "fp32" or why_no_kernels(board.release(None)):
        return False
    return importlib.util.find_spec("triton") is not None


def estimate_latency(student: Student, board: Board, precision: str) -> PlanLatency:
    """Estimate latency on a board. On a GPU without kernels, sparse operators run as function bodies.

    Raises:
        ConfigError: The board has no arithmetic for the precision.
    """
    shape, gpu = model_shape(student.model), board.kind == "gpu"
    runs = ("kernels" if takes_kernels(board, precision) else "bodies") if gpu else "native"
    base = dataclasses.replace(student.sparsity, keep=1.0, merge=())

    def costs(patches: int, sparsity: SparsityConfig) -> list[Cost]:
        one = dataclasses.replace(shape, depth=1, patches=patches)
        work = Workload(one, sparsity, kernels=runs)
        return roofline.costs(work, board, precision, GRAPH_FIT if gpu else CPU_FIT)

    def merging(patches: int) -> list[Cost]:
        rate = max(0, min(patches // MERGED, patches - LEAST_PATCHES))
        return costs(patches, dataclasses.replace(base, merge=(rate,)))

    least = max(base.tile, shape.patches // 10, LEAST_PATCHES + 1)  # so that one token can merge
    patches = sorted({round(n) for n in np.geomspace(least, shape.patches, ESTIMATED_SIZES)}, reverse=True)
    plain = [costs(count, base) for count in patches]
    parts = {name: [_ms(layer, name) for layer in plain] for name in ("projections", "mlp")}
    parts["merging"] = [_ms(merging(count), "pruning") for count in patches]
    for share in SHARES:
        layers = (costs(count, dataclasses.replace(base, keep=share)) for count in patches)
        parts[name_of(share)] = [_ms(layer, "predictor", "background", "attention") for layer in layers]
    latency, nothing = PlanLatency(patches, parts), LayerPlan.dense(shape.depth)
    return latency.calibrate(nothing, latency.of(nothing) + _ms(plain[0], "embedding"))


def _ms(costs: list[Cost], *kinds: str) -> float:
    return 1e3 * sum(cost.seconds for cost in costs if cost.operator.kind in kinds)
