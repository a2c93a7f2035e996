"""What `frontier.py` makes of points."""

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
}


@pytest.fixture
def fronts() -> Fronts:
    points = [
        Point(*name.split(" | "), infer=lambda _: None, tokens=0, images=np.zeros(1), macs=0.0) for name in POINTS
    ]
    found = {name: {"patches_cosine": [fidelity]} for name, (fidelity, _) in POINTS.items()}
    times = {name: np.array(ms, float)[:, None] for name, (_, ms) in POINTS.items()}
    return Fronts.of(points, found, times, any_precision=True)


def test_times_between_points(fronts: Fronts) -> None:
    share = (math.log(0.02) - math.log(0.03)) / (math.log(0.01) - math.log(0.03))
    assert fronts.ms("ours, A", 0.98, 0) == pytest.approx(20 + 20 * share)
    assert fronts.ms("ToMe, A", 0.97) == 55  # Below the worst, what that one takes.
    assert fronts.ms("fewer pixels, A", 0.98) == math.inf  # The dense model is not the end of its front.
    assert 65 < fronts.ms("ToMe, A", 0.995) < 95  # Of ToMe's it is.


def test_comparison_is_with_the_best_rival(fronts: Fronts) -> None:
    row = fronts.compare(0.99)
    assert (row["rival"], row["ours"]) == ("ToMe, A", "ours, A")
    assert (row["rival_ms"], row["ours_ms"], row["ratio"]["value"]) == (65, 45, pytest.approx((60 / 40 + 70 / 50) / 2))
    assert row["each_ms"]["dense"] == 95
    assert "unavailable" in row["each_ms"]["fewer pixels"]


def test_contenders_are_what_came_near_and_the_best_of_each_kind(fronts: Fronts) -> None:
    near = set(fronts.contenders(0.99))
    assert near == set(POINTS) - {"ToMe, A | many", "ours, A | more", "fewer pixels, A | 210 px", "MAT, B | many"}
