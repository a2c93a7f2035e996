"""The parts that a layer's time is told by."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec.structs import replace

KINDS = ("selection", "attention", "projections", "mlp", "norms", "other")
"""Parts of a layer. selection: KeySelect, LandmarkKeySelect, TokenScore and the pruning that follows it. other: adds,
layer scale, embedding and head."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """Time of a node of the exported file, per query.

    Attributes:
        layer: from 0; None outside the layers. name: of the node. op: its operator. kind: one of `KINDS`.
        ms: ONNX Runtime's median, TensorRT's mean. share: of the total. nodes: that the backend made of it.
    """

    layer: int | None = None
    name: str
    op: str
    kind: str
    nodes: int = 1
    ms: float
    share: float = 0.0


def by_kind(rows: Sequence[Row]) -> dict[str, float]:
    """Milliseconds of each of `KINDS` over all layers, from the rows of a result's `layers`."""
    return {kind: sum((row.ms for row in rows if row.kind == kind), 0.0) for kind in KINDS}


def merge(rows: Sequence[Row]) -> list[Row]:
    """Rows of one layer, name, operator and kind become one, with their number and share; order is kept."""
    groups: dict[tuple[int | None, str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.layer, row.name, row.op, row.kind), []).append(row)
    total = sum(row.ms for row in rows)
    sums = [(group[0], len(group), sum(row.ms for row in group)) for group in groups.values()]
    return [replace(row, nodes=count, ms=ms, share=ms / total if total else 0.0) for row, count, ms in sums]
