"""The parts that a layer's time is told by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

KINDS = ("selection", "attention", "projections", "mlp", "norms", "other")
"""Parts of a layer. selection: KeySelect, LandmarkKeySelect, TokenScore and the pruning that follows it. other: adds,
layer scale, embedding and head."""


def by_kind(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Milliseconds of each of `KINDS` over all layers, from the rows of a result's `layers`."""
    return {kind: sum((float(row["ms"]) for row in rows if row["kind"] == kind), 0.0) for kind in KINDS}


def merge(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one layer, name, operator and kind become one, with `nodes`, how many they were; order is kept."""
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("layer", "name", "op", "kind"))
        if key not in merged:
            merged[key] = {**row, "nodes": 0, "ms": 0.0}
        merged[key]["ms"] += row["ms"]
        merged[key]["nodes"] += 1
    return list(merged.values())
