"""The token order is a permutation whose runs are compact, on any grid."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsifiner_edge.order import hilbert_order, inverse

sides = st.integers(1, 40)


@settings(max_examples=60, deadline=None)
@given(sides, sides)
def test_permutation_with_short_steps(height: int, width: int) -> None:
    order = hilbert_order(height, width)
    assert sorted(order) == list(range(height * width))
    np.testing.assert_array_equal(order[inverse(order)], np.arange(height * width))
    y, x = np.divmod(order, width)
    steps = np.maximum(np.abs(np.diff(y)), np.abs(np.diff(x)))
    # A curve over an odd grid needs a diagonal step now and then, but never a jump.
    assert steps.size == 0 or steps.max() == 1


@pytest.mark.parametrize("side", [4, 8, 32])
def test_aligned_runs_are_squares_where_the_side_is_a_power_of_two(side: int) -> None:
    y, x = np.divmod(hilbert_order(side, side), side)
    for edge in (edge for edge in (2, 4, 8) if edge <= side):
        for start in range(0, side * side, edge * edge):
            part = slice(start, start + edge * edge)
            assert np.ptp(y[part]) == np.ptp(x[part]) == edge - 1


def test_runs_on_an_odd_grid_are_compact() -> None:
    y, x = np.divmod(hilbert_order(37, 37), 37)
    spans = [max(np.ptp(y[i : i + 16]), np.ptp(x[i : i + 16])) for i in range(0, 37 * 37, 16)]
    assert np.mean(spans) < 5  # A perfect square spans 3, a run along a row 15.
