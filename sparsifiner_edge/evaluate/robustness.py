"""Dense beside sparse while images get worse: what each loses under corruptions, and how much of it to sparsity.

Every score is higher where a model does better. A model's loss under a corruption is its score on clean images less
that on the same images corrupted; the *extra loss* is the subject's loss less the dense teacher's, image by image, so
that what sparsity costs on clean images is not counted again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import msgspec
import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.evaluate.judges import COMPARED, Judge, JudgedImage
from sparsifiner_edge.profiles import stats
from sparsifiner_edge.results import Declared, Estimate
from sparsifiner_edge.runtime.session import Runtime

CLEAN, ALL = "clean", "all"
ImageScores: TypeAlias = dict[str, dict[str, dict[str, list[float | None]]]]
"""By score, corruption ("clean": none) and role, one value per image, null where it says nothing of one."""


class Stability(msgspec.Struct, frozen=True, kw_only=True):
    """Means over images of one score under one condition, and what was lost to it; with Student's t intervals.

    Attributes:
        extra_lost: the subject's loss less the teacher's.
    """

    subject: float
    teacher: float
    subject_lost: Estimate
    teacher_lost: Estimate
    extra_lost: Estimate
    images: int


class RobustnessMethod(msgspec.Struct, frozen=True, kw_only=True):
    """How it was compared; runtime by role. `metric`: as asked for; `truth`: what scores are held against."""

    metric: str
    truth: str
    corruptions: list[str]
    severities: list[int]
    images: list[str]
    preprocessing: str
    runtime: dict[str, Runtime]


class RobustnessStatistics(msgspec.Struct, frozen=True):
    """By score, then by corruption and of "all" together; of clean images the means, by role."""

    clean: dict[str, dict[str, float]]
    stability: dict[str, dict[str, Stability]]


class RobustnessResult(Declared, frozen=True):
    """Of kind "robustness"."""

    method: RobustnessMethod
    samples: ImageScores
    statistics: RobustnessStatistics


def corrupted_scores(judge: Judge, seen: Iterable[JudgedImage]) -> ImageScores:
    """What a result holds of images, clean and corrupted."""
    samples: ImageScores = {}
    for image in seen:
        label = CLEAN if image.condition is None else image.condition[0]
        for role, scores in zip(COMPARED, judge.scores(image), strict=True):
            for name, value in scores.items():
                signed = value if value is None or name not in judge.lower else -value
                samples.setdefault(name, {}).setdefault(label, {}).setdefault(role, []).append(signed)
    return samples


def robustness_statistics(
    samples: Mapping[str, Mapping[str, Mapping[str, Sequence[float | None]]]],
) -> RobustnessStatistics:
    """Of samples as in `RobustnessResult`."""
    clean, stability = {}, {}
    for score, by_corruption in samples.items():
        # An image of which a score says nothing under one corruption is left out of all: sums would not be of the same.
        values = {label: np.array([x[role] for role in COMPARED], float) for label, x in by_corruption.items()}
        known = np.all([np.isfinite(x).all(0) for x in values.values()], 0)
        if known.any():
            values = {label: x[:, known] for label, x in values.items()}
            of_clean = values.pop(CLEAN)
            clean[score] = dict(zip(COMPARED, of_clean.mean(1).tolist(), strict=True))
            values[ALL] = np.mean(list(values.values()), 0)
            stability[score] = {label: _stability(of_clean, x) for label, x in values.items()}
    return RobustnessStatistics(clean, stability)


def _stability(clean: Array, corrupted: Array) -> Stability:
    """Of scores [role, image]."""
    lost = clean - corrupted
    subject, teacher = corrupted.mean(1).tolist()
    own, dense, extra = (stats.small_sample_mean(x) for x in (lost[0], lost[1], lost[0] - lost[1]))
    return Stability(
        subject=subject, teacher=teacher, subject_lost=own, teacher_lost=dense, extra_lost=extra, images=lost.shape[1]
    )
