"""Latency of a plan on this machine: times of a layer's parts at some numbers of tokens, measured once, and summed.

Two models measured whole correct a sum: the dense one scales it, and a sparse one tells what it costs to have operators
of ours among a runtime's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.execution import ON_PROCESSOR, Execution, precision_text
from sparsifiner_edge.export.deployed_model import deploy
from sparsifiner_edge.export.piece_times import Piece, piece_times
from sparsifiner_edge.plan import LayerPlan
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.search.pieces import LinearPieces, attention_piece, merging_piece
from sparsifiner_edge.search.plan import SHARES
from sparsifiner_edge.sparse.hosts import backbone_of
from sparsifiner_edge.sparse.student import Student

MEASURED_SIZES = 7
"""Numbers of tokens that are measured, from the image's down to a tenth."""
LEAST_MS = 1e-4
"""What no part takes less than, where shares of its time are reckoned with."""
EACH = 3
"""Merging is measured at every so many of them: its time is nearly linear, its graph slow to make."""


class Deployment(NamedTuple):
    """What runs a model: a backend of the processor, or a board by name.

    Attributes:
        stored: precision of the file. computes: what of it is not int8 is computed in (`execution.PRECISIONS`).
    """

    backend: str
    stored: str
    computes: str = "auto"

    @property
    def is_here(self) -> bool:
        """Whether it is a backend of this machine; else a board, whose latency is estimated."""
        return self.backend in ON_PROCESSOR

    @property
    def execution(self) -> Execution:
        """What its bundles' fidelity is measured in."""
        return Execution(backend=self.backend, precision=self.computes) if self.is_here else Execution()

    @property
    def dense_host(self) -> Deployment:
        """What runs the dense model: in ONNX Runtime bfloat16 is for operators of ours alone."""
        return self._replace(computes="auto") if self.backend == "onnxruntime" else self

    def __str__(self) -> str:
        said = self.stored if self.computes == "auto" else precision_text(self.stored, self.computes)
        return f"{self.backend}, {said}"


class PartTable(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds of a layer's parts; one per entry of patches.

    Attributes:
        about: what it was measured on and with.
        patches: that the parts were measured with, most first.
        projections, mlp, merging: see `pieces`. attention: by share of keys as text, "1" is dense; selection and cells
            included; over tokens with sizes but for the first entry, where none has merged yet.
    """

    about: Any
    patches: list[int]
    projections: list[float]
    mlp: list[float]
    merging: list[float]
    attention: dict[str, list[float]]


class Anchor(NamedTuple):
    """A plan that was measured as a whole model."""

    plan: LayerPlan
    ms: float


class PlanLatency:
    """Milliseconds of plans, from a table and what was measured of whole models.

    A part's time is a constant, so much a token and so much a pair of tokens, none of them negative, fitted to the
    table: what a single entry has by chance would otherwise be what plans are chosen for.

    Args:
        patches: of the image. scale: of the sum of parts: a machine's speed changes, and in a model parts follow one
            another. ours: what a model takes that has operators of ours, beyond these. See `calibrated`.
    """

    def __init__(self, table: PartTable, patches: int, scale: float = 1.0, ours: float = 0.0) -> None:
        self.table, self.patches, self.scale, self.ours = table, patches, scale, ours
        parts = {"projections": table.projections, "mlp": table.mlp, "merging": table.merging, **table.attention}
        self._fits = {name: _fitted(table.patches, values) for name, values in parts.items()}

    def of_part(self, name: str, counts: Any) -> Any:
        """Of "projections", "mlp", "merging", or of attention at a share of keys, at numbers of patches [n]."""
        return self.scale * (_powers(counts) @ self._fits[name])

    def of(self, plan: LayerPlan) -> float:
        """Of a whole model."""
        counts = plan.tokens(self.patches)
        total = float(sum(self.of_part("projections", counts[:-1]) + self.of_part("mlp", counts[1:])))
        for before, rate, share in zip(counts[:-1], plan.merge, plan.keep, strict=True):
            total += float(self.of_part(name_of(share), before))
            total += float(self.of_part("merging", before)) if rate else 0.0
        return total + (0.0 if plan.is_dense else self.ours)

    def calibrated(self, anchor: Anchor) -> PlanLatency:
        """The same, so that this plan takes as long as was measured: the dense one scales, others tell `ours`."""
        if anchor.plan.is_dense:
            return PlanLatency(self.table, self.patches, self.scale * anchor.ms / self.of(anchor.plan), self.ours)
        return PlanLatency(self.table, self.patches, self.scale, self.ours + anchor.ms - self.of(anchor.plan))


def _powers(counts: Any) -> Array:
    counts = np.asarray(counts, float)
    return np.stack([np.ones_like(counts), counts, counts**2], -1)


def _fitted(patches: Sequence[int], values: Sequence[float]) -> Array:
    """Coefficients of 1, n and n^2, none negative, that miss the values least, each by its own share."""
    weight = 1 / np.maximum(np.asarray(values, float), LEAST_MS)
    columns, wanted = _powers(patches) * weight[:, None], np.asarray(values, float) * weight
    found: list[tuple[float, Array]] = []
    for chosen in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)):
        some = np.linalg.lstsq(columns[:, chosen], wanted, rcond=None)[0]
        if (some >= 0).all():
            fit = np.zeros(3)
            fit[list(chosen)] = some
            found.append((float(np.square(columns @ fit - wanted).sum()), fit))
    return min(found, key=lambda row: row[0])[1]


def name_of(share: float) -> str:
    """A share of keys as a table names it."""
    return f"{share:g}"


def measured(student: Student, engine: Deployment, progress: Progress | None = None) -> PartTable:
    """The table of this machine; what was measured before comes from a cache (see `piece_times`).

    Raises:
        MissingExtraError, BackendError: the engine cannot run here.
    """
    backbone = backbone_of(deploy(student).model)
    sparsity, geometry, whole = student.sparsity, backbone.geometry, backbone.patches
    linear = LinearPieces(backbone.layers[0], backbone.width, engine.stored == "int8")
    least = max(sparsity.tile, whole // 10)
    patches = sorted(
        {round(whole * (least / whole) ** (n / (MEASURED_SIZES - 1))) for n in range(MEASURED_SIZES)}, reverse=True
    )
    pieces: dict[tuple[str, int], Piece] = {}
    for count in patches:
        tokens = backbone.prefix + count
        for name in linear.models:
            pieces[name, count] = linear.piece(name, tokens)
        if count in patches[::EACH]:
            pieces["merging", count] = merging_piece(
                geometry, backbone.prefix, sparsity.merge_window, count, backbone.width, whole
            )
        for share in SHARES:
            config = SparsityConfig(**{**_plain(sparsity), "keep": share, "merge": (1,)})
            pieces[name_of(share), count] = attention_piece(geometry, backbone.prefix, count, config, count != whole)
    ours = {key: piece for key, piece in pieces.items() if key[0] in map(name_of, SHARES)}
    found = piece_times(ours, engine.execution, progress)
    found.ms.update(
        piece_times({k: v for k, v in pieces.items() if k not in ours}, engine.dense_host.execution, progress).ms
    )
    names = [name for name in dict.fromkeys(key[0] for key in pieces) if name != "merging"]
    rows = {name: [found.ms[name, count] for count in patches] for name in names}
    few = patches[::EACH][::-1]
    merging = np.interp(patches, few, [found.ms["merging", count] for count in few]).tolist()
    projections, mlp = rows.pop("projections"), rows.pop("mlp")
    about = {**found.about, "ran_on": found.kernels, "precision": engine.stored}
    return PartTable(
        about=about, patches=patches, projections=projections, mlp=mlp, merging=merging, attention=rows
    )  # fmt: skip


def _plain(sparsity: SparsityConfig) -> dict[str, Any]:
    """What a layer's layout depends on."""
    return {name: getattr(sparsity, name) for name in ("tile", "probe", "channels", "cells", "value_power")}
