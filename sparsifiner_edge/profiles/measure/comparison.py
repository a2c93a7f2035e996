"""Two sides measured in turn: the ratio of their latencies, its interval, and what may be said of it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from sparsifiner_edge.profiles import stats
from sparsifiner_edge.profiles.measure.side import MeasuredSide
from sparsifiner_edge.results import Estimate, Subject


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Two sides measured in turn.

    Attributes:
        ratio: against's latency over the subject's: above 1 the subject is faster. rounds: that it is the median of.
        verdict: "faster", "slower", "no difference shown". sentence: with both names.
    """

    ratio: Estimate
    rounds: int
    verdict: str
    sentence: str


def compare(subject: MeasuredSide, against: MeasuredSide, names: list[str]) -> Comparison:
    """The ratio of two sides."""
    ratios = stats.round_ratios(subject.blocks, against.blocks)
    low, high = stats.quantile_interval(ratios, 0.5)
    ratio = float(np.median(ratios))
    verdict = stats.judge(low, high)
    return Comparison(
        ratio=stats.estimate(ratio, low, high, "order statistics of paired rounds, effective sample size"),
        rounds=len(ratios),
        verdict=verdict,
        sentence=_sentence(verdict, names, ratio, low, high),
    )


def two_names(subjects: list[Subject]) -> list[str]:
    """Two names that differ: the models', else the folders', else by place."""
    for key in ("name", "path"):
        names = [Path(getattr(subject, key)).name for subject in subjects]
        if names[0] != names[1]:
            return names
    return [f"{names[0]} (first)", f"{names[1]} (second)"]


def _sentence(verdict: str, names: list[str], ratio: float, low: float | None, high: float | None) -> str:
    subject, against = names
    if low is None or high is None:
        return f"No difference shown between {subject} and {against}: too few independent rounds; measure longer."
    interval = f"95 % interval {low:.3f} to {high:.3f}"
    if verdict == "no difference shown":
        return f"No difference shown between {subject} and {against}: ratio {ratio:.3f}, {interval}, not beyond +-1 %."
    return f"{subject} is {verdict} than {against}: {ratio:.3f} times its speed, {interval}."
