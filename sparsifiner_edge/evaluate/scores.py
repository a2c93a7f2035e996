"""Answers to clean images beside the dense teacher's: cosines of features, dense maps, a user's own metric."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from sparsifiner_edge.bounds import size_text
from sparsifiner_edge.evaluate.extract import TeacherComparison, open_both, with_roles
from sparsifiner_edge.evaluate.judges import FeatureJudge, Task, answers, task_judge
from sparsifiner_edge.images import centre_text
from sparsifiner_edge.judge import MAP_MEASURES
from sparsifiner_edge.profiles import stats
from sparsifiner_edge.progress import Progress
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
    threshold: float | None = None
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


def evaluate_scores(
    compared: TeacherComparison, images: Sequence[Path], task: Task | None, progress: Progress | None
) -> ScoresResult:
    """See `evaluate_student`. task: None: cosines."""
    samples: dict[str, list[float | None]] = {}
    with contextlib.ExitStack() as stack:
        subject, teacher = open_both(compared, stack)
        size = subject.size
        judge = FeatureJudge(images, size) if task is None else task_judge(task, images, size, tuple(MAP_MEASURES))
        for seen in answers(judge, subject, teacher, (), progress, "images"):
            for name, value in judge.clean(seen).items():
                samples.setdefault(name, []).append(value)
    method = ScoresMethod(
        metric="cosine similarity per image, student or bundle against dense teacher" if task is None else None,
        task=None if task is None else task.name, images=judge.images,
        preprocessing=f"{centre_text(size)}, bicubic to {size_text(size)} px",
        runtime={"subject": subject.runtime, "teacher": teacher.runtime}, **judge.said(),
    )  # fmt: skip
    known = {name: [x for x in values if x is not None] for name, values in samples.items()}
    statistics = {
        name: ScoreFigure(stats.small_sample_mean(x), len(x), min(x) if task is None else None)
        for name, x in known.items() if x
    }  # fmt: skip
    return ScoresResult("evaluation", with_roles(subject, teacher), method, samples, statistics)
