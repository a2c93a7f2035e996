"""Latency of a plan on this machine: times of a layer's parts at some numbers of tokens, measured once, and summed.

What a sum leaves out (embedding, head, what a runtime does between parts) is the difference to the dense model measured
whole; `PlanLatency.rest`.
"""

from __future__ import annotations

import contextlib
import hashlib
import statistics
import time
from typing import Any, NamedTuple

import msgspec
import numpy as np

from sparsifiner_edge.artifacts import read_json
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.errors import ArtifactError
from sparsifiner_edge.export.deployed_model import deploy
from sparsifiner_edge.export.sessions import processor_run
from sparsifiner_edge.files import write_text
from sparsifiner_edge.machine import available_cores, environment, machine, package_version
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.records import read_record, write_record
from sparsifiner_edge.runtime.backend import cache_folder
from sparsifiner_edge.search.pieces import INPUT, LinearPieces, Piece, attention_piece, merging_piece
from sparsifiner_edge.search.plan import SHARES, LayerPlan
from sparsifiner_edge.sparse.hosts import backbone_of
from sparsifiner_edge.sparse.student import Student
from sparsifiner_edge.text import dump_json

TABLE_SCHEMA = 1
MEASURED_SIZES = 7
"""Numbers of tokens that are measured, from the image's down to a tenth."""
ROUNDS, LEAST_RUNS, LEAST_S = 3, 3, 0.03
"""Passes over all parts; of each pass and part the least runs, and the least time."""


class Deployment(NamedTuple):
    """What runs a model: a backend of the processor, and the precision of the file."""

    backend: str
    precision: str

    @property
    def plain(self) -> Deployment:
        """The same backend on a file in float32."""
        return Deployment(self.backend, "fp32")

    def __str__(self) -> str:
        return f"{self.backend}, {self.precision}"


class PartTable(msgspec.Struct, frozen=True, kw_only=True):
    """Median milliseconds of a layer's parts; one per entry of patches.

    Attributes:
        about: what it was measured on and with; a table of anything else is measured anew.
        patches: that the parts were measured with, most first.
        projections, mlp, merging: see `pieces`. attention: by share of keys as text, "1" is dense; selection and cells
            included; over tokens with sizes but for the first entry, where none has merged yet.
    """

    schema_version: int = TABLE_SCHEMA
    about: Any
    patches: list[int]
    projections: list[float]
    mlp: list[float]
    merging: list[float]
    attention: dict[str, list[float]]


class PlanLatency:
    """Milliseconds of plans, from a table.

    Attributes:
        rest: what the layers' sum leaves out; see `calibrated`.
    """

    def __init__(self, table: PartTable, rest: float = 0.0) -> None:
        self.table, self.rest = table, rest

    def of_part(self, name: str, counts: Any) -> Any:
        """Of "projections", "mlp", "merging", or of attention at a share of keys, at numbers of patches [n].

        Between entries time per token is taken to be linear, as it is where work grows with the square of the tokens.
        """
        table = self.table
        values = table.attention[name] if name in table.attention else getattr(table, name)
        known, per_token = np.array(table.patches[::-1], float), np.array(values[::-1]) / table.patches[::-1]
        counts = np.asarray(counts, float)
        return np.interp(counts, known, per_token) * counts

    def layer(self, before: int, after: int, share: float) -> float:
        """Of a layer that sees `before` patches and leaves `after`."""
        merging = float(self.of_part("merging", before)) if after != before else 0.0
        parts = (("projections", before), (name_of(share), before), ("mlp", after))
        return merging + sum(float(self.of_part(name, count)) for name, count in parts)

    def of(self, plan: LayerPlan, patches: int) -> float:
        """Of a whole model."""
        counts = plan.counts(patches)
        layers = zip(counts[:-1], counts[1:], plan.keep, strict=True)
        return self.rest + sum(self.layer(before, after, share) for before, after, share in layers)

    def calibrated(self, plan: LayerPlan, patches: int, measured_ms: float) -> PlanLatency:
        """The same, so that this plan takes as long as was measured of its whole model."""
        return PlanLatency(self.table, self.rest + measured_ms - self.of(plan, patches))


def name_of(share: float) -> str:
    """A share of keys as a table names it."""
    return f"{share:g}"


def measured(student: Student, engine: Deployment, progress: Progress | None = None) -> PartTable:
    """The table of this machine, from the cache where it was measured before.

    Raises:
        MissingExtraError, BackendError: the engine cannot run here.
    """
    about = _about(student, engine)
    path = cache_folder() / "latency" / f"{hashlib.sha256(dump_json(about).encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(ArtifactError):
        found = read_record(read_json(path, TABLE_SCHEMA), PartTable, path, "Delete it.")
        if found.about == about:
            return found
    table = _measure(student, engine, about, progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(ArtifactError):  # A full disk costs the next search a minute.
        write_text(path, dump_json(write_record(table)))
    return table


def _about(student: Student, engine: Deployment) -> dict[str, Any]:
    """All that times depend on."""
    backbone, sparsity = student.backbone, student.sparsity
    here = write_record(machine())
    packages = {name: package_version(name) for name in ("sparsifiner-edge", "onnxruntime", "openvino", "torch")}
    model = {
        "grid": list(backbone.grid), "prefix": backbone.prefix, "width": backbone.width,
        "geometry": [backbone.geometry.heads, backbone.geometry.dim], "name": student.name,
        "tile": sparsity.tile, "probe": sparsity.probe, "channels": sparsity.channels, "cells": sparsity.cells,
        "window": sparsity.merge_window,
    }  # fmt: skip
    return {
        "engine": list(engine), "threads": available_cores(), "model": model, "shares": list(SHARES),
        "machine": {name: here[name] for name in ("cpu_model", "logical_cores", "kernel", "board")},
        "packages": write_record(packages), "variables": environment().variables,
    }  # fmt: skip


def _measure(student: Student, engine: Deployment, about: dict[str, Any], progress: Progress | None) -> PartTable:
    backbone = backbone_of(deploy(student).model)
    sparsity, geometry, whole = student.sparsity, backbone.geometry, backbone.patches
    linear = LinearPieces(backbone.layers[0], backbone.width, engine.precision == "int8")
    least = max(sparsity.tile, whole // 10)
    patches = sorted(
        {round(whole * (least / whole) ** (n / (MEASURED_SIZES - 1))) for n in range(MEASURED_SIZES)}, reverse=True
    )
    pieces: dict[tuple[str, int], Piece] = {}
    for count in patches:
        tokens = backbone.prefix + count
        for name in linear.models:
            pieces[name, count] = linear.piece(name, tokens)
        pieces["merging", count] = merging_piece(
            geometry, backbone.prefix, sparsity.merge_window, count, backbone.width, whole
        )
        for share in SHARES:
            config = SparsityConfig(**{**_plain(sparsity), "keep": share, "merge": (1,)})
            pieces[name_of(share), count] = attention_piece(geometry, backbone.prefix, count, config, count != whole)
    times = _times(pieces, engine, progress)
    rows = {name: [times[name, count] for count in patches] for name in dict.fromkeys(key[0] for key in pieces)}
    projections, mlp, merging = (rows.pop(name) for name in ("projections", "mlp", "merging"))
    return PartTable(
        about=about, patches=patches, projections=projections, mlp=mlp, merging=merging, attention=rows
    )  # fmt: skip


def _plain(sparsity: SparsityConfig) -> dict[str, Any]:
    """What a layer's layout depends on."""
    return {name: getattr(sparsity, name) for name in ("tile", "probe", "channels", "cells", "value_power")}


def _times(
    pieces: dict[tuple[str, int], Piece], engine: Deployment, progress: Progress | None
) -> dict[tuple[str, int], float]:
    """Median milliseconds of every part, alone on all cores."""
    found: dict[tuple[str, int], float] = {}
    for number, (key, piece) in enumerate(pieces.items()):
        stored = "int8" if engine.precision == "int8" and INPUT in piece.feed else None
        with processor_run(piece.model, engine.backend, stored) as (run, _):
            run(piece.feed)
            found[key] = _median(run, piece)
        if progress:
            progress(f"timing parts in {engine}", number + 1, len(pieces))
    return found


def _median(run: Any, piece: Piece) -> float:
    samples: list[float] = []
    for _ in range(ROUNDS):
        start, runs = time.perf_counter(), 0
        while runs < LEAST_RUNS or time.perf_counter() - start < LEAST_S:
            before = time.perf_counter_ns()
            run(piece.feed)
            samples.append((time.perf_counter_ns() - before) / 1e6)
            runs += 1
    return statistics.median(samples)
