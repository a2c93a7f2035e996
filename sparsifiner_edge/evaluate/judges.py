"""What `evaluate` judges by: images, and how both models' answers to each are scored, clean or corrupted."""

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
from sparsifiner_edge.judge import (
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
from sparsifiner_edge.metrics import POSITIONS
from sparsifiner_edge.progress import Progress

COMPARED = ("subject", "teacher")


class JudgedImage(NamedTuple):
    """An image as both models saw it.

    Attributes:
        number: of the image. condition: its corruption and how severe that is; None: it is clean.
        subject, teacher: what they answered. clean: what the teacher answered to the clean image.
    """

    number: int
    condition: tuple[str, int] | None
    subject: Prediction
    teacher: Prediction
    clean: Prediction


class Judge:
    """Scores both models' answers to images, which are files.

    Attributes:
        truth: what scores are held against, for people. lower: names of scores that are the better the lower they are.
    """

    truth: str
    lower: frozenset[str] = frozenset()

    def __init__(self, files: Sequence[Path], framing: Framing) -> None:
        self.files, self.framing = files, framing

    def scores(self, image: JudgedImage) -> tuple[Scores, Scores]:
        """The subject's and the teacher's."""
        raise NotImplementedError

    def clean(self, image: JudgedImage) -> Scores:
        """What a result holds of a clean image: a figure of each model, and what the subject lost."""
        scores, (subject, teacher) = Scores(), self.scores(image)
        for name, got in subject.items():
            expected, sign = teacher[name], -1 if name in self.lower else 1
            lost = None if got is None or expected is None else sign * (expected - got)
            scores |= {f"subject_{name}": got, f"teacher_{name}": expected, f"lost_{name}": lost}
        return scores

    def details(self) -> dict[str, Any]:
        """What the method of a result says of it, at the end."""
        return {}


def judge_of(
    task: str | None, files: Sequence[Path], framing: Framing, output: str | None, masks: str | Path | None, clean: bool
) -> Judge:
    """Of cosines, where there is no task; of maps; or by a user's metric.

    Args:
        output: of maps, the name of one; None: the only one there is. masks: folder of true masks, named as the images.
        clean: whether images stay as they are.
    """
    if task is None:
        return _FeatureJudge(files, framing, clean)
    return _MapJudge(files, framing, output, masks, clean) if task == MAPS else _MetricJudge(files, framing, task)


def answers(
    judge: Judge, subject: Extractor, teacher: Extractor, feed: Feed, progress: Progress | None
) -> Iterator[JudgedImage]:
    """Image by image, clean and then under each corruption."""
    conditions = (None, *((name, feed.severity) for name in feed.corruptions))
    for numbers, pixels in read_images(judge.files, feed, max(subject.together, teacher.together)):
        pairs = zip(subject.each(pixels), teacher.each(pixels), strict=True)
        for number in numbers:
            clean: Prediction | None = None
            for condition in conditions:
                features, teacher_features = next(pairs)
                answer, expected = Prediction(features, subject.prefix), Prediction(teacher_features, teacher.prefix)
                clean = clean or expected
                yield JudgedImage(number, condition, answer, expected, clean)
            if progress:
                progress("images", number + 1, len(judge.files))


class _FeatureJudge(Judge):
    """ "features": cosine to the dense model's of the clean image; "patches": to the dense model's of the same image,
    since some corruptions move patches.
    """

    def __init__(self, files: Sequence[Path], framing: Framing, clean: bool) -> None:
        super().__init__(files, framing)
        apart = "features: the dense model's of the clean image; patches: the dense model's of the same image"
        self.truth = "the dense model's" if clean else apart

    def scores(self, image: JudgedImage) -> tuple[Scores, Scores]:
        """See `Judge`.

        Raises:
            ConfigError: the teacher is not one of the subject.
        """
        _require_comparable(image.subject.outputs, image.teacher.outputs)
        subject, teacher = (Scores(features=alike("features", x, image.clean)) for x in (image.subject, image.teacher))
        if "tokens" in image.subject.outputs and "tokens" in image.teacher.outputs:
            subject["patches"], teacher["patches"] = alike("patches", image.subject, image.teacher), 1.0
        return subject, teacher

    def clean(self, image: JudgedImage) -> Scores:
        """See `Judge`: the subject's alone."""
        return {f"{name}_cosine": value for name, value in self.scores(image)[0].items()}


def _require_comparable(got: Outputs, expected: Outputs) -> None:
    """Refuse a teacher that is no teacher of the subject."""
    for role, outputs in zip(COMPARED, (got, expected), strict=True):
        if "features" not in outputs:
            raise ConfigError(f"The {role} gives {', '.join(outputs)}.", "Cosines need features: take another metric.")
    if POSITIONS in expected:
        raise ConfigError("The teacher prunes tokens.", "Compare with a model that keeps all of them.")
    name = "tokens" if "tokens" in got and "tokens" in expected and POSITIONS not in got else "features"
    if got[name].shape != expected[name].shape:
        what = f"The subject's {name} have shape {list(got[name].shape)}, the teacher's {list(expected[name].shape)}."
        raise ConfigError(what, "Give the model that the subject was made from.")


class _MapJudge(Judge):
    """Dense maps, of one channel, against true masks; where there are none against the mask of the dense model's map of
    the clean image, moved as the image. Bars are not judged.
    """

    lower = frozenset({"error"})

    def __init__(
        self, files: Sequence[Path], framing: Framing, output: str | None, masks: str | Path | None, clean: bool
    ) -> None:
        super().__init__(files, framing)
        self._folder, self._output, self._measures = masks, output, tuple(MAP_MEASURES) if clean else ("iou",)
        self._masks = [] if masks is None else _masks_of(Path(masks), files)
        self._fitting = functools.lru_cache(1)(lambda number: framing.of(*image_size(files[number])))
        with_masks = "the dense model's map; subject, teacher and lost: true masks" if clean else "true masks"
        self.truth = with_masks if self._masks else "the dense model's map" + " of the clean image" * (not clean)

    def clean(self, image: JudgedImage) -> Scores:
        """See `Judge`; first the subject's map against the teacher's."""
        subject, teacher = self._maps(image)
        if subject.shape != teacher.shape:
            what = f"The subject's map has shape {list(subject.shape)}, the teacher's {list(teacher.shape)}."
            raise ConfigError(what, "Give the model that the subject was made from.")
        apart = map_scores(subject, teacher, THRESHOLD, self._measures)
        return apart | super().clean(image) if self._masks else apart

    def scores(self, image: JudgedImage) -> tuple[Scores, Scores]:
        """See `Judge`."""
        mask = self._true_mask(image.number) if self._masks else self._mask_of(image.clean)
        true = mask if image.condition is None else move_mask(mask, *image.condition, seed=image.number)
        true = self._without_bars(true, image.number)
        subject, teacher = (map_scores(x, true, THRESHOLD, self._measures) for x in self._maps(image))
        return subject, teacher

    def details(self) -> dict[str, Any]:
        """See `Judge`."""
        return {"output": self._output, "masks": None if self._folder is None else str(self._folder)}

    def _maps(self, image: JudgedImage) -> tuple[Array, Array]:
        self._output, subject = map_in(image.subject.outputs, self._output, "subject")
        teacher = map_in(image.teacher.outputs, self._output, "teacher")[1]
        return self._without_bars(subject, image.number), self._without_bars(teacher, image.number)

    def _without_bars(self, values: Array, number: int) -> Array:
        return values if self.framing.fit != "letterbox" else self._fitting(number).cut(values)

    def _true_mask(self, number: int) -> Array:
        mask, region = self._masks[number], self.framing.region
        if region is not None or self.framing.fit == "letterbox":
            whole, size = self._fitting(number).frame, image_size(mask)
            apart = abs(size[0] * whole[1] - size[1] * whole[0]) > max(*size, *whole)  # More than whole pixels cost.
            if apart or (region is not None and size != whole):
                what = f"{mask} has another size than {self.files[number]}: its region or bars are others."
                raise ConfigError(what, "Give masks of the image's size.")
        return load_mask(mask, self.framing)

    def _mask_of(self, clean: Prediction) -> Array:
        name, teacher = map_in(clean.outputs, self._output, "teacher")
        if teacher.min() < 0 or teacher.max() > 1:
            raise ConfigError(
                f"{name} spans {teacher.min():.3g} to {teacher.max():.3g}; masks are cut from maps from 0 to 1.",
                "Write a metric of your own: --task package.module:object.",
            )
        return matching(teacher > THRESHOLD, height_width(self.framing.size))


def _masks_of(folder: Path, images: Sequence[Path]) -> list[Path]:
    """Each image's mask: the image file of its name, whatever the ending."""
    if not folder.is_dir():
        raise ImageError(f"{folder} does not exist.", "Give a folder of masks.")
    masks = {path.stem: path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES}
    missing = [path.name for path in images if path.stem not in masks]
    if missing:
        raise ImageError(f"{folder} holds no mask for {missing[0]}.", "Name masks as the images, such as 7.jpg, 7.png.")
    return [masks[path.stem] for path in images]


class _MetricJudge(Judge):
    """ "score" of a user's metric: one for each model and condition, so that each sees all images once."""

    def __init__(self, files: Sequence[Path], framing: Framing, task: str) -> None:
        super().__init__(files, framing)
        self.truth = task
        self._metrics = collections.defaultdict[Any, UserMetric](lambda: UserMetric(task))
        self._higher = self._metrics["subject", None].higher_is_better
        self.lower = frozenset() if self._higher else frozenset({"score"})

    def scores(self, image: JudgedImage) -> tuple[Scores, Scores]:
        """See `Judge`."""
        subject, teacher = (
            Scores(score=self._metrics[role, image.condition].score(answer.outputs, self.files[image.number]))
            for role, answer in zip(COMPARED, (image.subject, image.teacher), strict=True)
        )
        return subject, teacher

    def details(self) -> dict[str, Any]:
        """See `Judge`."""
        results = {role: self._metrics[role, None].result() for role in COMPARED}
        missing = [role for role, value in results.items() if value is None]
        if missing:
            raise ConfigError(f"The metric's result for the {missing[0]} is None.", "Let result return a number.")
        return {"higher_is_better": self._higher, "results": results}
