"""Dense beside sparse while images get worse: what each loses under corruptions, and how much of it to sparsity.

Every score is higher where a model does better. A model's loss under a corruption is its score on clean images less
that on the same images corrupted; the *extra loss* is the subject's loss less the dense teacher's, image by image, so
that what sparsity costs on clean images is not counted again.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec
import numpy as np

from sparsifiner_edge.arrays import Array, Pixels
from sparsifiner_edge.bounds import height_width, size_text
from sparsifiner_edge.corruptions import CAMERA, Condition, corrupt, moved
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.evaluate.classes import METRICS, gallery_for, image_counter, predictor_of
from sparsifiner_edge.evaluate.cosine import patches_of, require_comparable
from sparsifiner_edge.evaluate.extract import Extractor, TeacherComparison, open_both, with_roles
from sparsifiner_edge.evaluate.labelled import Labelled, labelled
from sparsifiner_edge.evaluate.task import Task, map_in, masks_of, matching
from sparsifiner_edge.images import centre_text, evenly, list_images, load_image, load_mask
from sparsifiner_edge.metrics import (
    MAPS,
    TaskMetric,
    answered,
    cosine,
    intersection_over_union,
    metric_maker,
)
from sparsifiner_edge.profiles import stats
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.results import Declared, Estimate
from sparsifiner_edge.runtime.session import Runtime

CLEAN = "clean"
JUDGED = ("subject", "teacher")
Scores = dict[str, float | None]


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


class _Judge(Protocol):
    """Scores a model's outputs for one image.

    Attributes:
        truth: what scores are held against, for people. images: what is judged by.
    """

    truth: str
    images: list[str]

    def load(self, number: int) -> Pixels:
        """Image `number`, clean."""

    def begin(self, number: int, clean: Mapping[str, Array]) -> None:
        """Take the teacher's outputs for the clean image `number`."""

    def judge(
        self, number: int, condition: Condition | None, subject: Mapping[str, Array], teacher: Mapping[str, Array]
    ) -> tuple[Scores, Scores]:
        """The subject's scores and the teacher's, of image `number` under a condition, None where it is clean."""


def evaluate_robustness(
    compared: TeacherComparison, data: Path | list[Path], asked: RobustnessQuestion,
    conditions: Sequence[Condition], progress: Progress | None,
) -> RobustnessResult:  # fmt: skip
    """See `evaluate_student`. Image by image, clean and then under each."""
    samples: dict[str, dict[str, dict[str, list[float | None]]]] = {}
    with contextlib.ExitStack() as stack:
        subject, teacher = open_both(compared, stack)
        judge = _judge(subject, teacher, data, asked, progress)
        steps, total = itertools.count(1), len(judge.images) * (len(conditions) + 1)
        for number in range(len(judge.images)):
            image = judge.load(number)
            seen = [image, *(corrupt(image, *condition, seed=number) for condition in conditions)]
            outputs = zip(subject.each(seen), teacher.each(seen), strict=True)
            for condition, (own, dense) in zip((None, *conditions), outputs, strict=True):
                if condition is None:
                    judge.begin(number, dense)
                label = CLEAN if condition is None else condition.label
                for role, scores in zip(JUDGED, judge.judge(number, condition, own, dense), strict=True):
                    for name, value in scores.items():
                        samples.setdefault(name, {}).setdefault(label, {}).setdefault(role, []).append(value)
                if progress:
                    progress("images under corruptions", next(steps), total)
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
    subject: Extractor,
    teacher: Extractor,
    data: Path | list[Path],
    asked: RobustnessQuestion,
    progress: Progress | None,
) -> _Judge:
    if asked.metric in METRICS:
        if isinstance(data, list):
            raise ConfigError(f"{asked.metric} needs a folder of labelled images.", "Give the folder.")
        known = subject.labels if asked.metric == "top1" else ()
        return _Classes(subject, teacher, labelled(data, classifier=known).first(asked.queries), asked, progress)
    files = data if isinstance(data, list) else list_images(data)
    files = files if asked.queries is None else evenly(files, asked.queries)
    if asked.metric == "cosine":
        return _Features(subject, teacher, files)
    return _Maps(subject, files, asked.task) if asked.task.name == MAPS else _Own(subject, files, asked.task)


class _OfFiles:
    """Images that are files."""

    def __init__(self, subject: Extractor, files: Sequence[Path]) -> None:
        self.files, self.size = files, subject.size
        self.images = [path.name for path in files]

    def load(self, number: int) -> Pixels:
        return load_image(self.files[number], self.size)

    def begin(self, number: int, clean: Mapping[str, Array]) -> None:
        pass


class _Features(_OfFiles):
    """ "features": cosine to the dense model's of the clean image; "patches": to the dense model's of the same image,
    since some corruptions move patches.
    """

    truth = "features: the dense model's of the clean image; patches: the dense model's of the same, corrupted image"

    def __init__(self, subject: Extractor, teacher: Extractor, files: Sequence[Path]) -> None:
        super().__init__(subject, files)
        self.prefixes = subject.prefix, teacher.prefix

    def begin(self, number: int, clean: Mapping[str, Array]) -> None:
        del number
        self.clean = clean

    def judge(
        self, number: int, condition: Condition | None, subject: Mapping[str, Array], teacher: Mapping[str, Array]
    ) -> tuple[Scores, Scores]:  # fmt: skip
        del number, condition
        require_comparable(subject, teacher)
        wanted = self.clean["features"]
        own, dense = ({"features": float(cosine(x["features"], wanted).mean())} for x in (subject, teacher))
        if "tokens" in subject and "tokens" in teacher:
            own["patches"] = float(cosine(*patches_of(subject, teacher, self.prefixes)).mean())
            dense["patches"] = 1.0
        return dict(own), dict(dense)


class _Maps(_OfFiles):
    """ "iou" of dense maps: with true masks, or with the dense model's own of the clean image, moved as the image."""

    def __init__(self, subject: Extractor, files: Sequence[Path], task: Task) -> None:
        super().__init__(subject, files)
        self.task, self.masks = task, None if task.masks is None else masks_of(task.masks, files)
        self.truth = "true masks" if self.masks else "the dense model's map of the clean image"

    def begin(self, number: int, clean: Mapping[str, Array]) -> None:
        name, own = map_in(clean, self.task.output, "teacher")
        if own.min() < 0 or own.max() > 1:
            raise ConfigError(
                f"{name} has values from {own.min():.3g} to {own.max():.3g}; masks are cut from maps from 0 to 1.",
                "Write a metric of your own: --task package.module:object.",
            )
        if self.masks is None:
            self.true = matching(own > self.task.threshold, height_width(self.size))
        else:
            self.true = load_mask(self.masks[self.files[number]], self.size)

    def judge(
        self, number: int, condition: Condition | None, subject: Mapping[str, Array], teacher: Mapping[str, Array]
    ) -> tuple[Scores, Scores]:  # fmt: skip
        true = self.true if condition is None else moved(self.true, *condition, seed=number)
        found = [map_in(x, self.task.output, role)[1] for x, role in zip((subject, teacher), JUDGED, strict=True)]
        own, dense = (
            intersection_over_union(x > self.task.threshold, matching(true, (x.shape[0], x.shape[1]))) for x in found
        )
        return {"iou": own}, {"iou": dense}


class _Own(_OfFiles):
    """ "score" of a user's metric, which is asked anew for each condition; fewer is better counts below zero."""

    def __init__(self, subject: Extractor, files: Sequence[Path], task: Task) -> None:
        super().__init__(subject, files)
        self.make, self.truth = metric_maker(task.name), task.name
        self.metrics: dict[tuple[str, Condition | None], TaskMetric] = {}

    def judge(
        self, number: int, condition: Condition | None, subject: Mapping[str, Array], teacher: Mapping[str, Array]
    ) -> tuple[Scores, Scores]:  # fmt: skip
        scores: list[Scores] = []
        for role, outputs in zip(JUDGED, (subject, teacher), strict=True):
            metric = self.metrics.get((role, condition)) or self.metrics.setdefault((role, condition), self.make())
            value = answered(metric, metric.update, outputs, self.files[number])
            scores.append({"score": value if value is None or metric.higher_is_better else -value})
        return scores[0], scores[1]


class _Classes:
    """ "accuracy": of a classifier, or of neighbours or a linear probe that learnt from clean images."""

    def __init__(
        self,
        subject: Extractor,
        teacher: Extractor,
        queries: Labelled,
        asked: RobustnessQuestion,
        progress: Progress | None,
    ) -> None:
        self.queries, self.size, self.truth = queries, subject.size, f"classes, by {asked.metric}"
        self.images = [f"{queries.name} {number}" for number in range(len(queries))]
        gallery = gallery_for(asked.metric, asked.gallery, queries)
        count = image_counter(progress, 2 * len(gallery) if gallery else 0)
        self.predictors = [predictor_of(x, asked.metric, queries, gallery, count) for x in (subject, teacher)]

    def load(self, number: int) -> Pixels:
        return self.queries.load(number, self.size)

    def begin(self, number: int, clean: Mapping[str, Array]) -> None:
        pass

    def judge(
        self, number: int, condition: Condition | None, subject: Mapping[str, Array], teacher: Mapping[str, Array]
    ) -> tuple[Scores, Scores]:  # fmt: skip
        del condition
        scores: list[Scores] = []
        for predictor, outputs in zip(self.predictors, (subject, teacher), strict=True):
            if predictor.output not in outputs:
                raise ConfigError(f"A model gives no {predictor.output}.", "Choose another metric, or a classifier.")
            found = predictor.predict(outputs[predictor.output])[0]
            scores.append({"accuracy": float(found == self.queries.labels[number])})
        return scores[0], scores[1]
