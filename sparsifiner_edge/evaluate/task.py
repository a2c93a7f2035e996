"""How well a model does its task, beside its dense teacher: dense maps, with or without true masks, or a user's own."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from sparsifiner_edge.bounds import size_text
from sparsifiner_edge.evaluate.extract import TeacherComparison, open_both, with_roles
from sparsifiner_edge.evaluate.judges import Task, clean_samples, task_judge
from sparsifiner_edge.images import centre_text
from sparsifiner_edge.judge import MAP_MEASURES
from sparsifiner_edge.profiles import stats
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.results import Declared, Estimate
from sparsifiner_edge.runtime.session import Runtime


class TaskFigure(msgspec.Struct, frozen=True):
    """Over images: the mean with Student's t interval. Images for which it says nothing are left out."""

    mean: Estimate
    images: int = msgspec.field(name="pictures")


class TaskMethod(msgspec.Struct, frozen=True, kw_only=True):
    """How it was judged; runtime by role. results: of a user's metric, by role."""

    task: str
    output: str | None = None
    threshold: float | None = None
    masks: str | None = None
    higher_is_better: bool | None = None
    results: dict[str, float] | None = None
    images: list[str] = msgspec.field(name="pictures")
    preprocessing: str
    runtime: dict[str, Runtime]


class TaskResult(Declared, frozen=True):
    """Of kind "evaluation"; samples: one value per image, by name, null where it says nothing of an image.

    "error", "iou" and "auroc" hold the subject's map against the teacher's. With masks, or a user's metric, "subject_x"
    and "teacher_x" hold each against what is true, and "lost_x" is by how much the subject does worse.
    """

    method: TaskMethod
    samples: dict[str, list[float | None]]
    statistics: dict[str, TaskFigure]


def evaluate_task(
    compared: TeacherComparison, images: Sequence[Path], task: Task, progress: Progress | None
) -> TaskResult:
    """See `evaluate_student`."""
    with contextlib.ExitStack() as stack:
        subject, teacher = open_both(compared, stack)
        judge = task_judge(task, images, subject.size, tuple(MAP_MEASURES))
        samples = clean_samples(judge, subject, teacher, progress)
    method = TaskMethod(
        task=task.name, images=judge.images,
        preprocessing=f"{centre_text(subject.size)}, bicubic to {size_text(subject.size)} px",
        runtime={"subject": subject.runtime, "teacher": teacher.runtime}, **judge.said(),
    )  # fmt: skip
    known = {name: [x for x in values if x is not None] for name, values in samples.items()}
    statistics = {name: TaskFigure(stats.small_sample_mean(x), len(x)) for name, x in known.items() if x}
    return TaskResult("evaluation", with_roles(subject, teacher), method, samples, statistics)
