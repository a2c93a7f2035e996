"""Statistics of scores: clean images, and dense compared with sparse under corruptions.

Under corruptions, every score is signed so that higher is better. The drop of a model is its score on clean images
minus its score on the same images corrupted. The *extra drop* is the subject's drop minus the teacher's, image by
image, so that the cost of sparsity on clean images is not counted twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.evaluate.evaluators import COMPARED, EvaluatedImage, Evaluator
from sparsifiner_edge.outcomes import ALL, CLEAN, ImageScores, Score, Stability
from sparsifiner_edge.profiles.stats import small_sample_mean


def clean_scores(evaluator: Evaluator, images: Iterable[EvaluatedImage]) -> dict[str, list[float | None]]:
    """Return the samples of a `ScoresResult`."""
    samples: dict[str, list[float | None]] = {}
    for image in images:
        for name, value in evaluator.clean(image).items():
            samples.setdefault(name, []).append(value)
    return samples


def score_statistics(samples: Mapping[str, Sequence[float | None]]) -> dict[str, Score]:
    """Return the statistics of a `ScoresResult`."""
    known = {name: [x for x in values if x is not None] for name, values in samples.items()}
    return {name: Score(small_sample_mean(x), min(x), len(x)) for name, x in known.items() if x}


def corrupted_scores(evaluator: Evaluator, images: Iterable[EvaluatedImage]) -> ImageScores:
    """Return the samples of a `RobustnessResult`."""
    samples: ImageScores = {}
    for image in images:
        label = CLEAN if image.condition is None else image.condition[0]
        for role, scores in zip(COMPARED, evaluator.scores(image), strict=True):
            for name, value in scores.items():
                signed = value if value is None or name not in evaluator.lower else -value
                samples.setdefault(name, {}).setdefault(label, {}).setdefault(role, []).append(signed)
    return samples


def stability(samples: ImageScores) -> dict[str, dict[str, Stability]]:
    """Return the statistics of a `RobustnessResult`."""
    stabilities = {}
    for score, by_corruption in samples.items():
        # Leave out images whose score is undefined under any corruption: means must cover the same images.
        values = {label: np.array([x[role] for role in COMPARED], float) for label, x in by_corruption.items()}
        known = np.all([np.isfinite(x).all(0) for x in values.values()], 0)
        if known.any():
            values = {label: x[:, known] for label, x in values.items()}
            clean, worse = values[CLEAN], [x for label, x in values.items() if label != CLEAN]
            values[ALL] = np.mean(worse, 0)
            stabilities[score] = {label: _stability(clean, x) for label, x in values.items()}
    return stabilities


def _stability(clean: Array, corrupted: Array) -> Stability:
    """Return the stability of scores [role, image]."""
    drops = clean - corrupted
    subject, teacher = corrupted.mean(1).tolist()
    sparse, dense, extra = (small_sample_mean(x) for x in (drops[0], drops[1], drops[0] - drops[1]))
    return Stability(
        subject=subject,
        teacher=teacher,
        subject_drop=sparse,
        teacher_drop=dense,
        extra_drop=extra,
        images=drops.shape[1],
    )
