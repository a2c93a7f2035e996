"""How well a model does its task, beside its dense teacher: dense maps, with or without true masks, or a user's own."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.bounds import size_text
from sparsifiner_edge.errors import ConfigError, ImageError
from sparsifiner_edge.evaluate.extract import Extractor, TeacherComparison, open_both, with_roles
from sparsifiner_edge.images import SUFFIXES, centre_text, load_image, load_mask
from sparsifiner_edge.metrics import (
    MAPS,
    TaskMetric,
    answered,
    auroc,
    intersection_over_union,
    mean_absolute_error,
    metric_maker,
)
from sparsifiner_edge.profiles import stats
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.results import Declared, Estimate
from sparsifiner_edge.runtime.session import Runtime

THRESHOLD = 0.5


class Task(NamedTuple):
    """What is judged.

    Attributes:
        name: `MAPS`, or "package.module:object", a user's `TaskMetric` or what makes one.
        output: of a map, its name; None: the only one there is. masks: folder of true masks, named as the images.
        threshold: of maps from 0 to 1, above which a pixel belongs to the mask.
    """

    name: str = MAPS
    output: str | None = None
    masks: Path | None = None
    threshold: float = THRESHOLD


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
    masks = None if task.masks is None else masks_of(task.masks, images)
    own = None if task.name == MAPS else metric_maker(task.name)
    with contextlib.ExitStack() as stack:
        subject, teacher = open_both(compared, stack)
        judge: _Judge = _Maps(task, masks, subject) if own is None else _Own(own(), own())
        for number, path in enumerate(images):
            image = load_image(path, subject.size)[None]
            judge.see(path, subject.extract(image), teacher.extract(image))
            if progress:
                progress("images", number + 1, len(images))
    method = TaskMethod(
        task=task.name, images=[path.name for path in images],
        preprocessing=f"{centre_text(subject.size)}, bicubic to {size_text(subject.size)} px",
        runtime={"subject": subject.runtime, "teacher": teacher.runtime}, **judge.said(),
    )  # fmt: skip
    known = {name: [x for x in values if x is not None] for name, values in judge.samples.items()}
    statistics = {name: TaskFigure(stats.small_sample_mean(x), len(x)) for name, x in known.items() if x}
    return TaskResult("evaluation", with_roles(subject, teacher), method, judge.samples, statistics)


class _Judge:
    """Samples by name, one for each image."""

    def __init__(self) -> None:
        self.samples: dict[str, list[float | None]] = {}

    def see(self, path: Path, got: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
        raise NotImplementedError

    def said(self) -> dict[str, Any]:
        """What the method of a result says of it."""
        raise NotImplementedError

    def add(self, name: str, value: float | None) -> None:
        self.samples.setdefault(name, []).append(value)

    def add_both(self, name: str, got: float | None, expected: float | None, higher_is_better: bool) -> None:
        """A figure of each against what is true, and what the subject lost."""
        self.add(f"subject_{name}", got)
        self.add(f"teacher_{name}", expected)
        lost = None if got is None or expected is None else (expected - got) * (1 if higher_is_better else -1)
        self.add(f"lost_{name}", lost)


class _Maps(_Judge):
    """Dense maps, of one channel."""

    def __init__(self, task: Task, masks: Mapping[Path, Path] | None, subject: Extractor) -> None:
        super().__init__()
        self.task, self.masks, self.size = task, masks, subject.size
        self.output: str | None = task.output

    def see(self, path: Path, got: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
        self.output, own = map_in(got, self.output, "subject")
        _, dense = map_in(expected, self.output, "teacher")
        if own.shape != dense.shape:
            raise ConfigError(
                f"The subject's map has shape {list(own.shape)}, the teacher's {list(dense.shape)}.",
                "Give the model that the subject was made from.",
            )
        self.add("error", mean_absolute_error(own, dense))
        if min(own.min(), dense.min()) >= 0 and max(own.max(), dense.max()) <= 1:
            mask = dense > self.task.threshold
            self.add("iou", intersection_over_union(own > self.task.threshold, mask))
            self.add("auroc", auroc(own, mask))
        if self.masks is not None:
            true = load_mask(self.masks[path], self.size)
            true = matching(true, (own.shape[0], own.shape[1]))
            each = [self._against(true, x) for x in (own, dense)]
            for name, higher in (("error", False), ("iou", True), ("auroc", True)):
                self.add_both(name, each[0][name], each[1][name], higher)

    def _against(self, true: Array, found: Array) -> dict[str, float | None]:
        return {
            "error": mean_absolute_error(found, true),
            "iou": intersection_over_union(found > self.task.threshold, true),
            "auroc": auroc(found, true),
        }

    def said(self) -> dict[str, Any]:
        masks = None if self.task.masks is None else str(self.task.masks)
        return {"output": self.output, "threshold": self.task.threshold, "masks": masks}


class _Own(_Judge):
    """A user's metric, one for each model."""

    def __init__(self, subject: TaskMetric, teacher: TaskMetric) -> None:
        super().__init__()
        self.subject, self.teacher = subject, teacher

    def see(self, path: Path, got: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
        scores = [answered(metric, metric.update, outputs, path) for metric, outputs in
                  ((self.subject, got), (self.teacher, expected))]  # fmt: skip
        self.add_both("score", scores[0], scores[1], bool(self.subject.higher_is_better))

    def said(self) -> dict[str, Any]:
        results = {role: answered(metric, metric.result) for role, metric in
                   (("subject", self.subject), ("teacher", self.teacher))}  # fmt: skip
        missing = [role for role, value in results.items() if value is None]
        if missing:
            raise ConfigError(f"The metric's result for the {missing[0]} is None.", "Let result return a number.")
        return {"higher_is_better": bool(self.subject.higher_is_better), "results": results}


def matching(mask: Array, shape: tuple[int, int]) -> Array:
    """A mask [H,W] at a map's size [h,w], by the nearest pixel."""
    rows, columns = (
        np.minimum(((np.arange(here) + 0.5) * there / here).astype(np.int64), there - 1)
        for there, here in zip(mask.shape, shape, strict=True)
    )
    return np.asarray(mask[rows][:, columns])


def map_in(outputs: Mapping[str, Array], name: str | None, role: str) -> tuple[str, Array]:
    """The one dense map among a model's outputs, or that of a name: its name, and [h,w].

    Raises:
        ConfigError: there is none, there are several and no name, or it has several channels.
    """
    maps = {key: value for key, value in outputs.items() if value.ndim > 2 and key != "tokens"}
    if name is None and len(maps) == 1:
        name = next(iter(maps))
    if name is None or name not in maps:
        raise ConfigError(
            f"The {role} gives {len(maps)} dense maps ({', '.join(outputs)}); which is judged?",
            "Name one: --map NAME.",
        )
    found = np.squeeze(maps[name])
    if found.ndim != 2:
        raise ConfigError(
            f"{name} has shape {list(maps[name].shape)}: no map of one channel.",
            "Write a metric of your own: --task package.module:object.",
        )
    return name, found


def masks_of(folder: Path, images: Sequence[Path]) -> dict[Path, Path]:
    """Each image's mask: the image file of its name, whatever the ending."""
    if not folder.is_dir():
        raise ImageError(f"{folder} does not exist.", "Give a folder of masks.")
    found = {path.stem: path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES}
    missing = [path.name for path in images if path.stem not in found]
    if missing:
        raise ImageError(f"{folder} holds no mask for {missing[0]}.", "Name masks as the images, such as 7.jpg, 7.png.")
    return {path: found[path.stem] for path in images}
