"""What a search found: every plan with what was predicted and measured, as a result file and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from sparsifiner_edge.config import keep_text, merge_text
from sparsifiner_edge.files import import_matplotlib
from sparsifiner_edge.plan import LayerPlan
from sparsifiner_edge.records import Known
from sparsifiner_edge.results import Declared, Estimate
from sparsifiner_edge.search.latency import Deployment


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """A plan that was looked at.

    Attributes:
        merge, keep: as `export --merge --keep` take them.
        fidelity: mean over the images that were searched with, in float32. predicted_fidelity: by the model as it was
            before that; None of those that it was first fitted to.
        predicted_ms: by engine. on_front: whether no other plan is as faithful and predicted faster in every engine.
    """

    merge: str
    keep: str
    fidelity: float
    predicted_fidelity: float | None = None
    predicted_ms: dict[str, float]
    on_front: bool


class Finalist(msgspec.Struct, frozen=True, kw_only=True):
    """A plan as it was exported, in one engine.

    Attributes:
        backend, stored, computes: see `latency.Deployment`.
        fidelity: of the bundle, mean over the images searched with. predicted_fidelity: by a model that was fitted to
            all plans but this one. ms: median of the whole model, or for a board that
            is not here an estimate of it, as `ms.interval` says.
        command: that exports it again.
    """

    merge: str
    keep: str
    backend: str
    stored: str
    computes: str
    fidelity: float
    predicted_fidelity: float
    predicted_ms: float
    ms: Estimate
    command: str

    @property
    def engine(self) -> str:
        """For people."""
        return str(Deployment(self.backend, self.stored, self.computes))


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    """The answer on images that nothing was searched or calibrated with."""

    fidelity: Estimate
    images: int


class SearchMethod(msgspec.Struct, frozen=True, kw_only=True):
    """How it was searched.

    Attributes:
        board: None: this machine. images: names by use. tables: by engine, what its latencies were measured with.
    """

    metric: str
    task: str | None = None
    at_least: float | None = None
    at_most_ms: float | None = None
    seed: int
    board: str | None = None
    images: dict[str, list[str]]
    solver: str = "dynamic program over layers; price of fidelity bisected"
    tables: dict[str, Any]


class Front(msgspec.Struct, frozen=True, kw_only=True):
    """What was found.

    Attributes:
        points: in the order of fidelity. finalists: the answer first, if there is one.
        dense_ms: the dense model by what runs it: the fastest, and what runs finalists. drift: its time at the end over
            that at the start; more than a tenth off 1, the machine changed its speed, and predictions are of another.
        losses: by engine, the fidelity that its precision loses: of the plan near the answer that was measured whole,
            of the dense model where none was. Predictions count it. dense_fidelity: the dense model's own; of a
            board that is not here only in float32.
        anchors: by engine, the plan whose whole model corrected predictions, and its ms.
        left_out: backends that do not run here, engines whose precision lost too much, and why.
    """

    points: list[Point]
    finalists: list[Finalist]
    answer: Known[Finalist]
    check: Known[Checked]
    dense_ms: dict[str, Estimate]
    drift: dict[str, float]
    losses: dict[str, float]
    dense_fidelity: dict[str, float]
    anchors: dict[str, dict[str, float]]
    left_out: dict[str, str]


class SearchResult(Declared, frozen=True):
    """Of kind "search"; samples: per plan, "merge | keep", the fidelity of each image it was judged by; and "check"."""

    method: SearchMethod
    samples: dict[str, list[float]]
    statistics: Front


def named(plan: LayerPlan) -> str:
    """A plan for people and as a key."""
    return f"{merge_text(plan.merge)} | {keep_text(plan.short_keep)}"


def not_dominated(rows: Sequence[tuple[float, ...]]) -> list[bool]:
    """Whether no other row is smaller or equal in everything and smaller in something."""
    return [
        not any(all(a <= b for a, b in zip(other, row, strict=True)) and other != row for other in rows) for row in rows
    ]


def draw_front(result: SearchResult, path: Path) -> None:
    """front.png: milliseconds against fidelity; lines are predictions, marks with whiskers whole models."""
    import_matplotlib("report")
    from matplotlib.figure import Figure

    found = result.statistics
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axis = figure.subplots()
    for engine in sorted({name for point in found.points for name in point.predicted_ms}):
        line = sorted((p.predicted_ms[engine], p.fidelity) for p in found.points if p.on_front)
        axis.plot(*zip(*line, strict=True), ".-", lw=0.8, ms=4, label=f"predicted, {engine}")
    for one in found.finalists:
        low, high = (bound if isinstance(bound, float) else one.ms.value for bound in (one.ms.low, one.ms.high))
        reach = [[one.ms.value - low], [high - one.ms.value]]
        label = f"{'measured' if result.method.board is None else 'estimated'}, {one.engine}"
        axis.errorbar([one.ms.value], [one.fidelity], xerr=reach, fmt="o", capsize=3, label=label)
    if result.method.at_least is not None:
        axis.axhline(result.method.at_least, color="black", lw=0.8)
    if result.method.at_most_ms is not None:
        axis.axvline(result.method.at_most_ms, color="black", lw=0.8)
    axis.set(xlabel="ms", ylabel=f"fidelity: {result.method.metric}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)
