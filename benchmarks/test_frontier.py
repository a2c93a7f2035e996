"""Tests of the computations of `frontier.py` on points."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # scripts here import each other by name

from frontier import Fronts
from frontier_points import Point

POINTS = {  # name: fidelity, milliseconds of two rounds
    "dense, A | dense": (1.0, (90, 100)),
    "ToMe, A | few": (0.99, (60, 70)),
    "ToMe, A | many": (0.98, (50, 60)),
    "fewer pixels, A | 210 px": (0.95, (10, 10)),
    "MAT, B | many": (0.98, (200, 220)),
    "ours, A | some": (0.99, (40, 50)),
    "ours, A | more": (0.97, (20, 30)),
    "ours, B | some": (0.99, (44, 54)),
    "ours, C | some": (0.99, (60, 70)),
    "ours, D bf16 | some": (0.99, (10, 12)),
}


def fronts(any_precision: bool = False) -> Fronts:
    points = [
        Point(
            *name.split(" | "),
            infer=lambda _: None,
            tokens=0,
            images=np.zeros(1),
            macs=0.0,
            precision="bf16" if "bf16" in name else "fp32",
        )
        for name in POINTS
    ]
    found = {name: {"patches_cosine": [fidelity]} for name, (fidelity, _) in POINTS.items()}
    times = {name: np.array(ms, float)[:, None] for name, (_, ms) in POINTS.items()}
    return Fronts.of(points, found, times, any_precision)


def test_times_between_points() -> None:
    share = (math.log(0.02) - math.log(0.03)) / (math.log(0.01) - math.log(0.03))
    found = fronts()
    assert found.ms("ours, A", 0.98, 0) == pytest.approx(20 + 20 * share)
    assert found.ms("ToMe, A", 0.97) == 55  # Below the worst point, its time counts.
    assert found.ms("fewer pixels, A", 0.98) == math.inf  # The dense model is not the end of this front.
    assert 65 < found.ms("ToMe, A", 0.995) < 95  # It is the end of ToMe's.


def test_a_point_that_is_faster_and_more_faithful_counts() -> None:
    found = fronts()
    found.times["ours, A | more"] += 60
    assert found.ms("ours, A", 0.98) == 45


def test_comparison_is_with_the_best_rival() -> None:
    row = fronts().compare(0.99)
    assert (row["rival"], row["ours"]) == ("ToMe, A", "ours, A")
    assert (row["rival_ms"], row["ours_ms"], row["ratio"]["value"]) == (65, 45, pytest.approx((60 / 40 + 70 / 50) / 2))
    assert row["each_ms"]["dense"] == 95
    assert "unavailable" in row["each_ms"]["fewer pixels"]
    assert fronts(any_precision=True).compare(0.99)["ours"] == "ours, D bf16"


def test_contenders_are_what_came_near_and_the_best_of_each_kind() -> None:
    """MAT's front has no end in its engine, and the third of ours is too slow."""
    rivals = {"dense, A | dense", "ToMe, A | few", "ToMe, A | many"}
    assert set(fronts().contenders(0.99)) == rivals | {"ours, A | some", "ours, A | more", "ours, B | some"}
    assert set(fronts(any_precision=True).contenders(0.99)) == rivals | {"ours, D bf16 | some"}


def test_each_way_that_came_near_is_timed_again() -> None:
    """In few rounds a point may seem slightly faster than the interpolation between its neighbours."""
    both, found = {"ours, A | some", "ours, A | more"}, fronts()
    assert both <= set(found.contenders(0.98))
    found.times["ours, A | more"] += 30
    assert found.ms("ours, A", 0.98) == 45  # By "some" alone; 51 between the two is near.
    assert both <= set(found.contenders(0.98))
    found.times["ours, A | more"] += 30
    assert both - set(found.contenders(0.98)) == {"ours, A | more"}
