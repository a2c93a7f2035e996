"""Evaluators: how both models' answers to each image, clean or corrupted, are scored."""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.bounds import height_width
from sparsifiner_edge.corruptions import move_mask
from sparsifiner_edge.errors import ConfigError, ImageError
from sparsifiner_edge.evaluate.extract import Extractor
from sparsifiner_edge.evaluate.reading import Feed, read_images
from sparsifiner_edge.fitting import Framing
from sparsifiner_edge.images import SUFFIXES, image_size, load_mask
from sparsifiner_edge.metrics import POSITIONS
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.scoring import (
    MAP_MEASURES,
    MAPS,
    THRESHOLD,
    Outputs,
    Prediction,
    Scores,
    UserMetric,
    alike,
    map_in,
    map_scores,
    matching,
)

COMPARED = ("subject", "teacher")


class EvaluatedImage(NamedTuple):
    """An image and both models' answers to it.

    Attributes:
        number: Number of the image.
        condition: Name and severity of the corruption; None for a clean image.
        subject: Answer of the subject.
        teacher: Answer of the teacher.
        clean: Answer of the teacher to the clean image.
    """

    number: int
    condition: tuple[str, int] | None
    subject: Prediction
    teacher: Prediction
    clean: Prediction


class Evaluator:
    """Base class: scores both models' answers to image files.

    Attributes:
        truth: What the scores are compared with, as text.
        lower: Names of the scores for which lower is better.
    """

    truth: str
    lower: frozenset[str] = frozenset()

    def __init__(self, files: Sequence[Path], framing: Framing) -> None:
        self.files, self.framing = files, framing

    def scores(self, image: EvaluatedImage) -> tuple[Scores, Scores]:
        """Return the scores of the subject and of the teacher."""
        raise NotImplementedError

    def clean(self, image: EvaluatedImage) -> Scores:
        """Return what a result holds of a clean image: a score of each model, and the drop of the subject."""
        scores, (subject, teacher) = Scores(), self.scores(image)
        for name, got in subject.items():
            expected, sign = teacher[name], -1 if name in self.lower else 1
            lost = None if got is None or expected is None else sign * (expected - got)
            scores |= {f"subject_{name}": got, f"teacher_{name}": expected, f"drop_{name}": lost}
        return scores

    def details(self) -> dict[str, Any]:
        """Return what the method of a result says about this evaluator, after all images."""
        return {}


def evaluator_of(
    task: str | None, files: Sequence[Path], framing: Framing, output: str | None, masks: str | Path | None, clean: bool
) -> Evaluator:
    """Return the evaluator for a task: cosines without a task, maps, or a user's metric.

    Args:
        task: Name of the task; None for cosines.
        files: The images.
        framing: How images become pixels.
        output: Output that holds the map; None takes the only one.
        masks: Folder of true masks, named as the images.
        clean: Images are not corrupted.
    """
    if task is None:
        return _FeatureEvaluator(files, framing, clean)
    return (
        _MapEvaluator(files, framing, output, masks, clean) if task == MAPS else _MetricEvaluator(files, framing, task)
    )


def answers(
    evaluator: Evaluator, subject: Extractor, teacher: Extractor, feed: Feed, progress: Progress | None
) -> Iterator[EvaluatedImage]:
    """Yield both models' answers image by image: clean, then under each corruption."""
    conditions = (None, *((name, feed.severity) for name in feed.corruptions))
    for numbers, pixels in read_images(evaluator.files, feed, max(subject.together, teacher.together)):
        pairs = zip(subject.each(pixels), teacher.each(pixels), strict=True)
        for number in numbers:
            clean: Prediction | None = None
            for condition in conditions:
                features, teacher_features = next(pairs)
                answer, expected = Prediction(features, subject.prefix), Prediction(teacher_features, teacher.prefix)
                clean = clean or expected
                yield EvaluatedImage(number, condition, answer, expected, clean)
            if progress:
                progress("images", number + 1, len(evaluator.files))


class _FeatureEvaluator(Evaluator):
    """Scores "features", compared with the dense model's of the clean image, and "patches", compared on the same image.

    Some corruptions move patches, so a clean image would be no reference for them.
    """

    def __init__(self, files: Sequence[Path], framing: Framing, clean: bool) -> None:
        super().__init__(files, framing)
        apart = "features: dense model on the clean image; patches: dense model on the same image"
        self.truth = "dense model on the same image" if clean else apart

    def scores(self, image: EvaluatedImage) -> tuple[Scores, Scores]:
        """Return the scores of the subject and of the teacher.

        Raises:
            ConfigError: The teacher's outputs do not fit the subject's.
        """
        _require_comparable(image.subject.outputs, image.teacher.outputs)
        subject, teacher = (Scores(features=alike("features", x, image.clean)) for x in (image.subject, image.teacher))
        if "tokens" in image.subject.outputs and "tokens" in image.teacher.outputs:
            subject["patches"], teacher["patches"] = alike("patches", image.subject, image.teacher), 1.0
        return subject, teacher

    def clean(self, image: EvaluatedImage) -> Scores:
        """Return the subject's scores of a clean image."""
        return {f"{name}_cosine": value for name, value in self.scores(image)[0].items()}


def _require_comparable(got: Outputs, expected: Outputs) -> None:
    """Refuse a teacher whose outputs do not fit the subject's."""
    for role, outputs in zip(COMPARED, (got, expected), strict=True):
        if "features" not in outputs:
            raise ConfigError(
                f"The {role} outputs {', '.join(outputs)}, but no features.", "Choose another --metric than cosine."
            )
    if POSITIONS in expected:
        raise ConfigError("The teacher prunes tokens.", "Compare with a model that keeps all of them.")
    name = "tokens" if "tokens" in got and "tokens" in expected and POSITIONS not in got else "features"
    if got[name].shape != expected[name].shape:
        what = f"The subject's {name} have shape {list(got[name].shape)}, the teacher's {list(expected[name].shape)}."
        raise ConfigError(what, "Give the model that the subject was made from.")


class _MapEvaluator(Evaluator):
    """Scores dense maps with one channel against true masks.

    Without masks, the reference is the mask of the dense model's map of the clean image, moved as the image is. Bars
    are left out.
    """

    lower = frozenset({"error"})

    def __init__(
        self, files: Sequence[Path], framing: Framing, output: str | None, masks: str | Path | None, clean: bool
    ) -> None:
        super().__init__(files, framing)
        self._folder, self._output, self._measures = masks, output, tuple(MAP_MEASURES) if clean else ("iou",)
        self._masks = [] if masks is None else _masks_of(Path(masks), files)
        self._fitting = functools.lru_cache(1)(lambda number: framing.of(*image_size(files[number])))
        with_masks = "dense model's map; subject, teacher and drop: true masks" if clean else "true masks"
        self.truth = with_masks if self._masks else "dense model's map" + " of the clean image" * (not clean)

    def clean(self, image: EvaluatedImage) -> Scores:
        """Return the scores of a clean image; first the subject's map against the teacher's."""
        subject, teacher = self._maps(image)
        if subject.shape != teacher.shape:
            what = f"The subject's map has shape {list(subject.shape)}, the teacher's {list(teacher.shape)}."
            raise ConfigError(what, "Give the model that the subject was made from.")
        apart = map_scores(subject, teacher, THRESHOLD, self._measures)
        return apart | super().clean(image) if self._masks else apart

    def scores(self, image: EvaluatedImage) -> tuple[Scores, Scores]:
        """Return the scores of the subject and of the teacher."""
        mask = self._true_mask(image.number) if self._masks else self._mask_of(image.clean)
        true = mask if image.condition is None else move_mask(mask, *image.condition, seed=image.number)
        true = self._without_bars(true, image.number)
        subject, teacher = (map_scores(x, true, THRESHOLD, self._measures) for x in self._maps(image))
        return subject, teacher

    def details(self) -> dict[str, Any]:
        """Return what the method of a result says about this evaluator."""
        return {"output": self._output, "masks": None if self._folder is None else str(self._folder)}

    def _maps(self, image: EvaluatedImage) -> tuple[Array, Array]:
        self._output, subject = map_in(image.subject.outputs, self._output, "subject")
        teacher = map_in(image.teacher.outputs, self._output, "teacher")[1]
        return self._without_bars(subject, image.number), self._without_bars(teacher, image.number)

    def _without_bars(self, values: Array, number: int) -> Array:
        return values if self.framing.fit != "letterbox" else self._fitting(number).cut(values)

    def _true_mask(self, number: int) -> Array:
        mask, region = self._masks[number], self.framing.region
        if region is not None or self.framing.fit == "letterbox":
            whole, size = self._fitting(number).frame, image_size(mask)
            apart = abs(size[0] * whole[1] - size[1] * whole[0]) > max(
                *size, *whole
            )  # More than rounding to whole pixels explains.
            if apart or (region is not None and size != whole):
                what = f"{mask} and {self.files[number]} differ in shape, so the region or the bars do not match."
                raise ConfigError(what, "Give masks of the image's size.")
        return load_mask(mask, self.framing)

    def _mask_of(self, clean: Prediction) -> Array:
        name, teacher = map_in(clean.outputs, self._output, "teacher")
        if teacher.min() < 0 or teacher.max() > 1:
            raise ConfigError(
                f"{name} spans {teacher.min():.3g} to {teacher.max():.3g}; a mask requires a map from 0 to 1.",
                "Write a metric of your own: --task package.module:object.",
            )
        return matching(teacher > THRESHOLD, height_width(self.framing.size))


def _masks_of(folder: Path, images: Sequence[Path]) -> list[Path]:
    """Return each image's mask: the image file with the same name and any extension."""
    if not folder.is_dir():
        raise ImageError(f"{folder} does not exist.", "Give a folder of masks.")
    masks = {path.stem: path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES}
    missing = [path.name for path in images if path.stem not in masks]
    if missing:
        raise ImageError(
            f"{folder} holds no mask for {missing[0]}.", "Name each mask like its image, such as 7.png for 7.jpg."
        )
    return [masks[path.stem] for path in images]


class _MetricEvaluator(Evaluator):
    """Scores "score" of a user's metric, one instance per model and condition, so that each sees all images once."""

    def __init__(self, files: Sequence[Path], framing: Framing, task: str) -> None:
        super().__init__(files, framing)
        self.truth = task
        self._metrics = collections.defaultdict[Any, UserMetric](lambda: UserMetric(task))
        self._higher = self._metrics["subject", None].higher_is_better
        self.lower = frozenset() if self._higher else frozenset({"score"})

    def scores(self, image: EvaluatedImage) -> tuple[Scores, Scores]:
        """Return the scores of the subject and of the teacher."""
        subject, teacher = (
            Scores(score=self._metrics[role, image.condition].score(answer.outputs, self.files[image.number]))
            for role, answer in zip(COMPARED, (image.subject, image.teacher), strict=True)
        )
        return subject, teacher

    def details(self) -> dict[str, Any]:
        """Return what the method of a result says about this evaluator."""
        results = {role: self._metrics[role, None].result() for role in COMPARED}
        missing = [role for role, value in results.items() if value is None]
        if missing:
            raise ConfigError(f"The metric's result for the {missing[0]} is None.", "Let result return a number.")
        return {"higher_is_better": self._higher, "results": results}
