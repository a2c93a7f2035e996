"""What `evaluate` and `explain` find, as types: result files, and the arrays that a page shows."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, TypeAlias

import msgspec

from sparsifiner_edge.arrays import Array, Pixels
from sparsifiner_edge.results import Quantity, Result
from sparsifiner_edge.runtime.session import Runtime

CLEAN, ALL = "clean", "all"
"""Conditions beside the names of corruptions: none of them, and all together."""
OURS, RANDOM, MOVED = "ours", "random", "moved"
"""What is judged; and beside it what knows nothing of the image: patches in any order, and ours at another place."""
STREAM = "stream"
"""The way to answer a video's frames that is judged; others stand beside it."""
ImageScores: TypeAlias = dict[str, dict[str, dict[str, list[float | None]]]]
"""By score, condition and role, one value per image, null where it says nothing of one."""


class EvaluationMethod(msgspec.Struct, frozen=True, kw_only=True):
    """How a model was compared with its teacher, or judged; runtime by role.

    Attributes:
        metric: as asked for; of a task its name. truth: what scores are held against, for people.
        images: names. gallery, classes: what predicts classes learnt from, and their names in the order that labels
            count. output, masks: of a task that is maps. higher_is_better, results: of a user's metric, by role.
        corruptions, severity: of a `RobustnessResult`.
    """

    metric: str
    truth: str
    images: list[str]
    preprocessing: str
    runtime: dict[str, Runtime]
    gallery: str | None = None
    classes: list[str] | None = None
    output: str | None = None
    masks: str | None = None
    higher_is_better: bool | None = None
    results: dict[str, float] | None = None
    corruptions: tuple[str, ...] = ()
    severity: int | None = None


class Score(msgspec.Struct, frozen=True):
    """Over images of which it says something: the mean with Student's t interval, and the least."""

    mean: Quantity
    least: float
    images: int


class ScoresResult(Result, frozen=True):
    """Of kind "evaluation"; samples: one value per image, by name, null where it says nothing of an image.

    "features_cosine" is of the class or pooled feature, "patches_cosine" the mean over patch tokens, of those that are
    left where some are pruned. Of maps "error", "iou" and "auroc" hold the subject's against the teacher's. With masks,
    classes, or a user's metric, "subject_x" and "teacher_x" hold each against what is true, and "lost_x" is by how much
    the subject does worse; "x" of classes is "accuracy", 1 where the answer is right.
    """

    method: EvaluationMethod
    samples: dict[str, list[float | None]]
    statistics: dict[str, Score]


class Stability(msgspec.Struct, frozen=True, kw_only=True):
    """Means over images of one score under one condition, and what was lost to it; with Student's t intervals.

    Attributes:
        extra_lost: the subject's loss less the teacher's.
    """

    subject: float
    teacher: float
    subject_lost: Quantity
    teacher_lost: Quantity
    extra_lost: Quantity
    images: int


class RobustnessResult(Result, frozen=True):
    """Of kind "robustness"; statistics: by score and condition, of which the clean one loses nothing."""

    method: EvaluationMethod
    samples: ImageScores
    statistics: dict[str, dict[str, Stability]]


class StreamMethod(msgspec.Struct, frozen=True, kw_only=True):
    """What a stream followed, and how; of a fixed share there is no fidelity that it kept to.

    Attributes:
        frames: of the video. every: of so many one was compared.
    """

    video: str
    frames: int
    every: int
    preprocessing: str
    runtime: Runtime
    at_least: float | None = None
    share: float | None = None


class StreamResult(Result, frozen=True):
    """Of kind "stream"; samples: by way to answer frames and score, one value a frame, of those that it says something
    of; statistics: their means, by the same names, with "_least" the least and "ms_p99".

    "patches" is the mean cosine of a frame's patches to the dense model's of the same frame, "moving" that of the tenth
    whose dense output differs most from the frame's before; "features" the cosine of a feature, and "x_iou" of a map x
    the overlap of masks. "share" of the patches was computed, "oldest" is for how many frames one was not, "estimated"
    what the stream itself thought to lose. "reached": share of the frames whose patches are at the fidelity asked for,
    where one was; "patches_frames": how many frames patches are of: without an output of tokens none that the model
    answered; "first_quarter" and "last_quarter" of the frames tell a drift.

    Attributes:
        pictures: by title a JPEG in base64, bright where patches were computed.
    """

    method: StreamMethod
    samples: dict[str, dict[str, list[float]]]
    statistics: dict[str, dict[str, float]]
    pictures: dict[str, str] = msgspec.field(default_factory=dict)


class LayerSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A layer in figures.

    Attributes:
        tokens: patches' tokens on entry. merged: that become one with another. keys: that each tile reads; None: all.
    """

    layer: int
    tokens: int
    merged: int
    keys: int | None = None


class ImageSummary(msgspec.Struct, frozen=True, kw_only=True):
    """An image in figures.

    Attributes:
        saco: by "ours", "random" and "moved". better: whether ours is above chance and both others.
    """

    image: str
    layers: list[LayerSummary]
    saco: dict[str, float]
    better: bool


class ExplainMethod(msgspec.Struct, frozen=True, kw_only=True):
    """How it was explained.

    Attributes:
        groups: of patches, for what is claimed. filled: what stands for patches that are taken away.
    """

    groups: int
    filled: str
    preprocessing: str
    images: list[str]


class ExplainResult(Result, frozen=True):
    """Of kind "explanation"; samples: by image and order, what the answer lost without each group, the first first."""

    method: ExplainMethod
    samples: dict[str, dict[str, list[float]]]
    statistics: dict[str, ImageSummary]


class Explained(NamedTuple):
    """An image for a page.

    Attributes:
        merged: of each layer, the token that stands for each patch, in raster order [P].
        read: of each layer, how many heads read each token, mean over tiles [N].
        importance: of each patch how much the answer hangs on it [rows,columns], its sum is 1.
        drops: see `samples` of the result.
    """

    path: Path
    image: Pixels
    merged: list[Array]
    read: list[Array]
    importance: Array
    summary: ImageSummary
    drops: dict[str, list[float]]
