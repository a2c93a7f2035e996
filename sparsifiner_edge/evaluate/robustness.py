"""Dense beside sparse while images get worse: what each loses under corruptions, and how much of it to sparsity.

Every score is higher where a model does better. A model's loss under a corruption is its score on clean images less
that on the same images corrupted; the *extra loss* is the subject's loss less the dense teacher's, image by image, so
that what sparsity costs on clean images is not counted again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.bounds import size_text
from sparsifiner_edge.corruptions import CAMERA, Condition
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.evaluate.classes import METRICS, gallery_for, image_counter, predictor_of
from sparsifiner_edge.evaluate.extract import Extractor, TeacherComparison, open_both, with_roles
from sparsifiner_edge.evaluate.judges import JUDGED, ClassJudge, FeatureJudge, Judge, Task, answers, task_judge
from sparsifiner_edge.evaluate.labelled import labelled
from sparsifiner_edge.images import centre_text, evenly, list_images
from sparsifiner_edge.profiles import stats
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.results import Declared, Estimate
from sparsifiner_edge.runtime.session import Runtime

CLEAN = "clean"


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
    """By score, then "fog 3", "fog" (all its severities), "severity 3" (all corruptions), "common", "camera" (see
    `corruptions`) and "all"; of clean images the means, by role.
    """

    clean: dict[str, dict[str, float]]
    stability: dict[str, dict[str, Stability]]


class RobustnessResult(Declared, frozen=True):
    """Of kind "robustness"; samples: by score, condition and role one value per image, null where there is none."""

    method: RobustnessMethod
    samples: dict[str, dict[str, dict[str, list[float | None]]]]
    statistics: RobustnessStatistics


class RobustnessQuestion(NamedTuple):
    """What is judged: arguments of `evaluate_student`."""

    metric: str
    gallery: str | Path | None
    queries: int | None
    task: Task


def evaluate_robustness(
    compared: TeacherComparison, data: Path | list[Path], asked: RobustnessQuestion,
    conditions: Sequence[Condition], progress: Progress | None,
) -> RobustnessResult:  # fmt: skip
    """See `evaluate_student`. Image by image, clean and then under each."""
    samples: dict[str, dict[str, dict[str, list[float | None]]]] = {}
    with contextlib.ExitStack() as stack:
        subject, teacher = open_both(compared, stack)
        judge = _judge(subject, teacher, data, asked, progress)
        for seen in answers(judge, subject, teacher, conditions, progress, "images under corruptions"):
            label = CLEAN if seen.condition is None else seen.condition.label
            for role, scores in zip(JUDGED, judge.scores(seen), strict=True):
                for name, value in scores.items():
                    signed = value if value is None or name not in judge.lower else -value
                    samples.setdefault(name, {}).setdefault(label, {}).setdefault(role, []).append(signed)
    method = RobustnessMethod(
        metric=asked.task.name if asked.metric == "task" else asked.metric, truth=judge.truth,
        corruptions=list(dict.fromkeys(one.corruption for one in conditions)),
        severities=sorted({one.severity for one in conditions}), images=list(judge.images),
        preprocessing=f"{centre_text(subject.size)}, bicubic to {size_text(subject.size)} px, then corrupted",
        runtime={"subject": subject.runtime, "teacher": teacher.runtime},
    )  # fmt: skip
    return RobustnessResult(
        "robustness", with_roles(subject, teacher), method, samples, robustness_statistics(samples, conditions)
    )


def robustness_statistics(
    samples: Mapping[str, Mapping[str, Mapping[str, Sequence[float | None]]]], conditions: Sequence[Condition]
) -> RobustnessStatistics:
    """Of samples as in `RobustnessResult`."""
    groups: dict[str, list[str]] = {}
    for condition in conditions:
        kind = "camera" if condition.corruption in CAMERA else "common"
        for name in (condition.label, condition.corruption, f"severity {condition.severity}", kind, "all"):
            groups.setdefault(name, []).append(condition.label)
    clean, stability = {}, {}
    for score, found in samples.items():
        # An image of which a score says nothing under one condition is left out of all: sums would not be of the same.
        values = {label: np.array([roles[role] for role in JUDGED], float) for label, roles in found.items()}
        known = np.all([np.isfinite(x).all(0) for x in values.values()], 0)
        values = {label: x[:, known] for label, x in values.items()}
        if known.any():
            clean[score] = dict(zip(JUDGED, values[CLEAN].mean(1).tolist(), strict=True))
            stability[score] = {
                group: _stability(values[CLEAN], np.mean([values[label] for label in labels], 0))
                for group, labels in groups.items()
            }
    return RobustnessStatistics(clean, stability)


def _stability(clean: Array, corrupted: Array) -> Stability:
    """Of scores [role, image]."""
    lost = clean - corrupted
    subject, teacher = corrupted.mean(1).tolist()
    own, dense, extra = (stats.small_sample_mean(x) for x in (lost[0], lost[1], lost[0] - lost[1]))
    return Stability(
        subject=subject, teacher=teacher, subject_lost=own, teacher_lost=dense, extra_lost=extra, images=lost.shape[1]
    )


def _judge(
    subject: Extractor, teacher: Extractor, data: Path | list[Path], asked: RobustnessQuestion,
    progress: Progress | None,
) -> Judge:  # fmt: skip
    if asked.metric in METRICS:
        if isinstance(data, list):
            raise ConfigError(f"{asked.metric} needs a folder of labelled images.", "Give the folder.")
        known = subject.labels if asked.metric == "top1" else ()
        queries = labelled(data, classifier=known).first(asked.queries)
        gallery = gallery_for(asked.metric, asked.gallery, queries)
        count = image_counter(progress, 2 * len(gallery) if gallery else 0)
        learnt = [predictor_of(x, asked.metric, queries, gallery, count) for x in (subject, teacher)]
        return ClassJudge(queries, asked.metric, subject.size, learnt)
    files = data if isinstance(data, list) else list_images(data)
    files = files if asked.queries is None else evenly(files, asked.queries)
    if asked.metric == "cosine":
        return FeatureJudge(files, subject.size)
    return task_judge(asked.task, files, subject.size, ("iou",))
