"""Change of patches between frames, and the error that a stream expects of it."""

from __future__ import annotations

import numpy as np
import pytest

from sparsifiner_edge.runtime.change import ChangeMeter
from sparsifiner_edge.runtime.error_estimate import ErrorEstimate

GRID, PATCH, WIDTH = (6, 8), 14, 32
PATCHES = GRID[0] * GRID[1]
ALLOWED = 0.02


def image(contrast: float, noise: float = 0.0, empty_rows: int = 0) -> np.ndarray:
    """Return a picture uint8 [1,H,W,3] with stripes of this contrast, except in its first rows of patches."""
    random = np.random.default_rng(0)
    picture = np.full((GRID[0] * PATCH, GRID[1] * PATCH, 3), 120.0)
    picture[:, (np.arange(GRID[1] * PATCH) // 4) % 2 == 0] += contrast
    picture[: empty_rows * PATCH] = 120.0
    return (picture + random.normal(0, noise, picture.shape)).round().clip(0, 255).astype(np.uint8)[None]


def test_a_still_noisy_scene_does_not_change() -> None:
    random = np.random.default_rng(0)
    scene = random.normal(0, 1, (1, PATCHES, WIDTH)).astype(np.float32)
    meter = ChangeMeter(GRID)
    for number in range(60):
        tokens = scene + random.normal(0, 0.05, scene.shape).astype(np.float32)
        meter.measure(tokens, np.zeros(PATCHES, np.float32))
        if number == 5:
            meter.keep(image(0))
        if number > 5:
            assert meter.moved == 0.0
    meter.measure(tokens, np.zeros(PATCHES, np.float32))  # The camera repeats a frame.
    assert meter.moved == 0.0
    tokens = scene + random.normal(0, 0.05, scene.shape).astype(np.float32)
    tokens[0, 3] = -tokens[0, 3]
    meter.measure(tokens, np.zeros(PATCHES, np.float32))
    assert meter.moved == pytest.approx(1 / PATCHES, rel=0.01)  # One patch, whose change counts as 1 at most.
    meter.keep(image(0))
    assert meter.moved == 0.0


@pytest.mark.parametrize("noise", [0.0, 2.0, 5.0])
def test_empty_patches_are_found_in_noise(noise: float) -> None:
    meter = ChangeMeter(GRID)
    for rows in (0, 2, GRID[0]):
        meter.keep(image(20, noise, rows))
        assert meter.empty == rows / GRID[0]


def test_moved_patches_keep_their_noise() -> None:
    meter = ChangeMeter(GRID)
    source, known = np.roll(np.arange(PATCHES), 1), np.ones(PATCHES, bool)
    known[0] = False
    positions = np.zeros((PATCHES, WIDTH), np.float32)
    random = np.random.default_rng(0)
    scene = random.normal(0, 1, (1, PATCHES, WIDTH)).astype(np.float32)
    meter.measure(scene, np.zeros(PATCHES, np.float32))
    meter.move(source, known, positions)  # The noise is unknown yet.
    scene = scene[:, source] + random.normal(0, 0.01, scene.shape).astype(np.float32)
    meter.measure(scene, np.zeros(PATCHES, np.float32))
    meter.keep(image(0))
    before = meter.noise.copy()
    meter.move(source, known, positions)
    assert np.array_equal(meter.noise[1:], before[source][1:])
    meter.measure(scene[:, source], np.zeros(PATCHES, np.float32))
    assert meter.moved == pytest.approx(1 / PATCHES, rel=1e-3)  # The patch that came into view is new.


def test_the_rate_falls_only_as_far_as_it_was_confirmed() -> None:
    estimate = ErrorEstimate(ALLOWED)
    assert estimate.event(0.01) > ALLOWED  # The first events cause full frames.
    estimate.correct(0.0, 0.0, 0.01)
    assert estimate.event(0.009) <= ALLOWED < estimate.event(0.03)
    estimate.correct(10 * ALLOWED, 0.0, 0.01)
    assert estimate.event(0.005) > ALLOWED
