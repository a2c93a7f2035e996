"""`front.png`: the plans that were measured, the dense model, the bound and the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsifiner_edge.errors import MissingExtraError
from sparsifiner_edge.pareto import SearchResult
from sparsifiner_edge.text import printable

PLANS = "#9fb3c8"
FRONT = "#4a6785"
DENSE = "#c0392b"
ANSWER = "#1e8449"
LEAST_ERROR = 3e-4
"""Smallest error on the axis; the dense model lies there."""


def draw_pareto_front(result: SearchResult, path: Path) -> None:
    """Draw the error (1 - fidelity) over milliseconds.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "report") from error
    front, method = result.statistics, result.method
    answer = front.finalists[0]
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
    points = [(point.ms, max(1 - point.fidelity, LEAST_ERROR)) for point in front.points]
    if points:
        ms, errors = zip(*points, strict=True)
        axes.scatter(ms, errors, s=16, color=PLANS, label=f"plans tried in {answer.deployment}")
        best = sorted((p.ms, max(1 - p.fidelity, LEAST_ERROR)) for p in front.points if p.pareto_optimal)
        axes.plot(*zip(*best, strict=True), color=FRONT, linewidth=1.2, label="Pareto front")
    for bound, line in ((method.at_least, axes.axhline), (method.at_most_ms, axes.axvline)):
        if bound is not None:
            value = 1 - bound if line == axes.axhline else bound
            line(value, color="black", linewidth=0.9, linestyle=":", label=f"bound: {bound:g}")
    for number, one in enumerate(front.dense):
        label = f"dense: {one.ms.value:.1f} ms, {one.deployment}" if not number else None
        place = one.ms.value, max(1 - one.held_out_fidelity, LEAST_ERROR)
        axes.scatter(*place, s=60 if label else 24, color=DENSE, marker="D", zorder=3, label=label)
    place = answer.ms.value, max(1 - answer.fidelity, LEAST_ERROR)
    label = f"answer: {answer.ms.value:.1f} ms, {answer.deployment}"
    axes.scatter(*place, s=130, color=ANSWER, marker="*", zorder=4, label=label)
    axes.set_title(printable(_title(result), 90), fontsize=11)
    axes.set(yscale="log", xlabel="milliseconds per image", ylabel=f"error: 1 - {_metric(method.metric)}")
    axes.set_xlim(0, 1.06 * max(ms for ms, _ in [*points, place, *((one.ms.value, 0) for one in front.dense)]))
    axes.grid(visible=True, which="major", color="#e5e8eb", linewidth=0.7)
    axes.set_axisbelow(True)
    _legend(axes)
    figure.savefig(path, dpi=130)


def _metric(name: str) -> str:
    names = {"patches": "cosine of the patch tokens", "class": "cosine of the class token", "maps": "IoU of the maps"}
    return names.get(name, printable(name, 40))


def _title(result: SearchResult) -> str:
    name, times = str(result.subjects[0].name), result.statistics.speed_up
    return name if times is None else f"{name}: {times:.2f} times faster than dense"


def _legend(axes: Any) -> None:
    """Place the legend where it hides the fewest points."""
    axes.legend(fontsize=8, loc="best", framealpha=0.9)
