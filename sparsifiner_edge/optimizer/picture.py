"""`front.png`: every evaluated plan, the dense model, and the answer."""

from __future__ import annotations

from pathlib import Path

from sparsifiner_edge.errors import MissingExtraError
from sparsifiner_edge.pareto import Candidate, SearchResult
from sparsifiner_edge.text import printable

PLANS = "#8aa1b8"
DENSE = "#c0392b"
ANSWER = "#1e8449"


def draw_pareto_front(result: SearchResult, path: Path) -> None:
    """Draw 1 - fidelity over milliseconds in the answer's deployment: predicted for plans, measured for the rest.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "report") from error
    front, method = result.statistics, result.method
    answer, fastest = front.finalists[0], min((one.ms.value for one in front.dense), default=None)
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    deployment = str(answer.deployment)
    points = [(p.predicted_ms[deployment], 1 - p.fidelity) for p in front.points if deployment in p.predicted_ms]
    if points:
        ms, lost = zip(*points, strict=True)
        axes.scatter(ms, lost, s=14, color=PLANS, label=f"plans, predicted in {deployment}")
        best: list[tuple[float, float]] = []
        for point in sorted(points):
            if not best or point[1] < best[-1][1]:
                best.append(point)
        axes.step(*zip(*best, strict=True), where="post", color=PLANS, linewidth=1)
    shown = [(one, ANSWER, "answer" if n == 0 else "") for n, one in enumerate(front.finalists)]
    shown += [(one, DENSE, "dense" if n == 0 else "") for n, one in enumerate(front.dense)]
    floor = min([1 - one.fidelity for one in front.finalists] + [lost for _, lost in points]) / 3
    for one, colour, label in shown:
        place = one.ms.value, max(1 - one.fidelity, floor)
        axes.scatter(*place, s=70 if label else 28, color=colour, marker="D" if colour == DENSE else "*", zorder=3)
        if label:
            axes.annotate(f"{label}: {_caption(one)}", place, textcoords="offset points", xytext=(7, 7), color=colour)
    for bound, line in ((method.at_least, axes.axhline), (method.at_most_ms, axes.axvline)):
        if bound is not None:
            line(1 - bound if line == axes.axhline else bound, color="black", linewidth=0.8, linestyle=":")
    times = "" if fastest is None else f": {fastest / answer.ms.value:.2f} times as fast as the dense model"
    axes.set_title(f"{printable(str(result.subjects[0].name), 60)}{times}", fontsize=10)
    axes.set(
        yscale="log",
        xlabel="milliseconds",
        ylabel=f"error: 1 - fidelity ({printable(method.metric, 40)})",
        xlim=(0, None),
    )
    axes.margins(x=0.18)
    if points:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _caption(one: Candidate) -> str:
    return f"{one.ms.value:.1f} ms, {one.deployment}"
