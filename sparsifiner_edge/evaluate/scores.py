"""What clean images say: cosines of features, dense maps, a user's own metric, and accuracies, beside the teacher."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.evaluate.judges import Judge, JudgedImage
from sparsifiner_edge.profiles import stats
from sparsifiner_edge.results import Declared, Estimate
from sparsifiner_edge.runtime.session import Runtime


class ScoreFigure(msgspec.Struct, frozen=True):
    """Over images of which it says something: the mean with Student's t interval; of cosines also the least."""

    mean: Estimate
    images: int
    least: float | None = None


class ScoresMethod(msgspec.Struct, frozen=True, kw_only=True):
    """How it was compared or, of a task, judged; runtime by role. results: of a user's metric, by role."""

    metric: str | None = None
    task: str | None = None
    output: str | None = None
    masks: str | None = None
    higher_is_better: bool | None = None
    results: dict[str, float] | None = None
    images: list[str]
    preprocessing: str
    runtime: dict[str, Runtime]


class ScoresResult(Declared, frozen=True):
    """Of kind "evaluation"; samples: one value per image, by name, null where it says nothing of an image.

    "features_cosine" is of the class or pooled feature, "patches_cosine" the mean over patch tokens, of those that are
    left where some are pruned. Of a task "error", "iou" and "auroc" hold the subject's map against the teacher's. With
    masks, or a user's metric, "subject_x" and "teacher_x" hold each against what is true, and "lost_x" is by how much
    the subject does worse.
    """

    method: ScoresMethod
    samples: dict[str, list[float | None]]
    statistics: dict[str, ScoreFigure]


class Accuracies(msgspec.Struct, frozen=True, kw_only=True):
    """In percent, and the mean difference of the pairs with Student's t interval."""

    subject_percent: float
    teacher_percent: float
    difference_points: Estimate
    queries: int


class Answered(msgspec.Struct, frozen=True, kw_only=True):
    """Of each query, whether the predicted class was right: 1 or 0."""

    subject_right: list[int]
    teacher_right: list[int]


class ClassMethod(msgspec.Struct, frozen=True, kw_only=True):
    """How it was compared; runtime by role."""

    metric: str
    queries: str
    gallery: str
    classes: list[str]
    classes_from: str
    preprocessing: str
    runtime: dict[str, Runtime]


class ClassResult(Declared, frozen=True):
    """Of kind "evaluation"."""

    method: ClassMethod
    samples: Answered
    statistics: Accuracies


def clean_scores(
    judge: Judge, seen: Iterable[JudgedImage], least: bool
) -> tuple[dict[str, list[float | None]], dict[str, ScoreFigure]]:
    """Samples and statistics of a `ScoresResult`; least: also the least of each score."""
    samples: dict[str, list[float | None]] = {}
    for image in seen:
        for name, value in judge.clean(image).items():
            samples.setdefault(name, []).append(value)
    known = {name: [x for x in values if x is not None] for name, values in samples.items()}
    return samples, {
        name: ScoreFigure(stats.small_sample_mean(x), len(x), min(x) if least else None)
        for name, x in known.items() if x
    }  # fmt: skip


def accuracies(subject: Sequence[int] | Array, teacher: Sequence[int] | Array) -> Accuracies:
    """Of answers to the same queries, each right or not."""
    right = 100 * np.array([subject, teacher], float)
    return Accuracies(
        subject_percent=float(right[0].mean()), teacher_percent=float(right[1].mean()),
        difference_points=stats.small_sample_mean(right[0] - right[1]), queries=right.shape[1],
    )  # fmt: skip
