"""What images say: scores of clean ones, and dense beside sparse while images get worse.

Under corruptions every score is higher where a model does better. A model's loss under a corruption is its score on
clean images less that on the same images corrupted; the *extra loss* is the subject's loss less the dense teacher's,
image by image, so that what sparsity costs on clean images is not counted again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.evaluate.judges import COMPARED, Judge, JudgedImage
from sparsifiner_edge.outcomes import ALL, CLEAN, ImageScores, Score, Stability
from sparsifiner_edge.profiles.stats import small_sample_mean


def clean_scores(judge: Judge, judged: Iterable[JudgedImage]) -> dict[str, list[float | None]]:
    """Samples of a `ScoresResult`."""
    samples: dict[str, list[float | None]] = {}
    for image in judged:
        for name, value in judge.clean(image).items():
            samples.setdefault(name, []).append(value)
    return samples


def score_statistics(samples: Mapping[str, Sequence[float | None]]) -> dict[str, Score]:
    """Of a `ScoresResult`."""
    known = {name: [x for x in values if x is not None] for name, values in samples.items()}
    return {name: Score(small_sample_mean(x), min(x), len(x)) for name, x in known.items() if x}


def corrupted_scores(judge: Judge, judged: Iterable[JudgedImage]) -> ImageScores:
    """Samples of a `RobustnessResult`."""
    samples: ImageScores = {}
    for image in judged:
        label = CLEAN if image.condition is None else image.condition[0]
        for role, scores in zip(COMPARED, judge.scores(image), strict=True):
            for name, value in scores.items():
                signed = value if value is None or name not in judge.lower else -value
                samples.setdefault(name, {}).setdefault(label, {}).setdefault(role, []).append(signed)
    return samples


def stability(samples: ImageScores) -> dict[str, dict[str, Stability]]:
    """Statistics of a `RobustnessResult`."""
    stabilities = {}
    for score, by_corruption in samples.items():
        # An image of which a score says nothing under one corruption is left out of all: sums would not be of the same.
        values = {label: np.array([x[role] for role in COMPARED], float) for label, x in by_corruption.items()}
        known = np.all([np.isfinite(x).all(0) for x in values.values()], 0)
        if known.any():
            values = {label: x[:, known] for label, x in values.items()}
            clean, worse = values[CLEAN], [x for label, x in values.items() if label != CLEAN]
            values[ALL] = np.mean(worse, 0)
            stabilities[score] = {label: _stability(clean, x) for label, x in values.items()}
    return stabilities


def _stability(clean: Array, corrupted: Array) -> Stability:
    """Of scores [role, image]."""
    lost = clean - corrupted
    subject, teacher = corrupted.mean(1).tolist()
    ours, dense, extra = (small_sample_mean(x) for x in (lost[0], lost[1], lost[0] - lost[1]))
    return Stability(
        subject=subject, teacher=teacher, subject_lost=ours, teacher_lost=dense, extra_lost=extra, images=lost.shape[1]
    )
