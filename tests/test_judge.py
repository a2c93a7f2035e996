"""The judge of answers: parts by their cosine, maps by their measures, what other outputs have in common."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsifiner_edge.judge import Prediction, alike, correlation, map_scores
from sparsifiner_edge.metrics import POSITIONS

RNG = np.random.default_rng(0)


def answer(patches: int = 6, **more: np.ndarray) -> Prediction:
    return Prediction({"tokens": RNG.normal(size=(1, 2 + patches, 8)), "features": RNG.normal(size=(1, 8)), **more}, 2)


@pytest.mark.parametrize(
    ("part", "rows"), [("class", slice(0, 1)), ("prefix", slice(0, 2)), ("patches", slice(2, None))]
)
def test_parts_are_compared_by_their_cosine(part: str, rows: slice) -> None:
    one, other = answer(), answer()
    a, b = (torch.from_numpy(x.outputs["tokens"][:, rows]) for x in (one, other))
    assert alike(part, one, other) == pytest.approx(float(torch.cosine_similarity(a, b, dim=-1).mean()))
    assert alike("features", one, one) == pytest.approx(1)


def test_of_pruned_patches_those_that_are_left_count() -> None:
    whole, places = answer(), np.array([[4, 1]])
    tokens = whole.outputs["tokens"]
    pruned = Prediction(
        {"tokens": np.concatenate([tokens[:, :2], tokens[:, 2:][:, places[0]]], 1), POSITIONS: places}, 2
    )
    assert alike("patches", pruned, whole) == pytest.approx(1)


def test_an_output_that_is_constant_is_like_another_such_alone() -> None:
    flat, other = np.full((1, 1, 5, 5), 0.1, np.float32), RNG.normal(size=(1, 1, 5, 5)).astype(np.float32)
    assert correlation(flat, 3 * flat) == 1
    assert correlation(flat, other) == 0
    assert correlation(2 * other + 1, other) == pytest.approx(1)


def test_a_map_against_a_mask_of_any_size_and_against_a_map() -> None:
    mask = np.repeat(np.repeat(np.array([[True, False], [False, False]]), 4, 0), 4, 1)
    found = map_scores(np.array([[0.9, 0.2], [0.1, 0.0]]), mask, 0.5)
    assert found == pytest.approx({"error": 0.1, "iou": 1.0, "auroc": 1.0})
    assert set(map_scores(np.array([[2.0]]), np.array([[0.5]]), 0.5)) == {"error"}, "no mask is cut from such maps"
    assert map_scores(np.array([[2.0]]), np.array([[True]]), 0.5, ("iou",)) == {"iou": 1.0}
