"""Result types of `evaluate` and `explain`."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, TypeAlias

import msgspec

from sparsifiner_edge.arrays import Array, Pixels
from sparsifiner_edge.results import Quantity, Result
from sparsifiner_edge.runtime.session import Runtime

CLEAN = "clean"
"""Condition without corruption."""
ALL = "all"
"""Mean over all corruptions."""
OURS = "ours"
"""Explanation that is evaluated."""
RANDOM = "random"
"""Baseline: the patches in random order."""
MOVED = "moved"
"""Baseline: the explanation shifted to another place of the image."""
STREAM = "stream"
"""Name of the stream among the ways to answer a video's frames."""
ImageScores: TypeAlias = dict[str, dict[str, dict[str, list[float | None]]]]
"""Score -> condition -> role -> one value per image; null if the score is undefined for an image."""


class EvaluationMethod(msgspec.Struct, frozen=True, kw_only=True):
    """Method of an evaluation.

    Attributes:
        metric: Metric as requested; for a task its name.
        truth: Reference of the scores, as text.
        images: Names of the images.
        runtime: Backend and precision that ran, by role.
        gallery: Images that a class predictor was fitted on.
        classes: Names of the classes in the order of the labels.
        output: Output that holds the map, for dense maps.
        masks: Folder of true masks, for dense maps.
        higher_is_better: Direction of a user's metric.
        results: Results of a user's metric by role.
        corruptions: Names of the corruptions of a `RobustnessResult`.
        severity: Severity of the corruptions.
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
    """Mean over images with a Student's t interval, and the lowest value."""

    mean: Quantity
    least: float
    images: int


class ScoresResult(Result, frozen=True):
    """Result of kind "evaluation"; samples hold one value per image by name, null where it is undefined.

    - "features_cosine": cosine of the class or pooled feature.
    - "patches_cosine": mean over patch tokens; the remaining ones if some are pruned.
    - "error", "iou", "auroc": map of the subject compared with the teacher's.
    - "subject_x", "teacher_x": each model compared with the truth (masks, classes) or scored by a user's metric. For
      classes "x" is "accuracy", 1 for a right answer.
    - "drop_x": how much worse the subject is than the teacher.
    """

    method: EvaluationMethod
    samples: dict[str, list[float | None]]
    statistics: dict[str, Score]


class Stability(msgspec.Struct, frozen=True, kw_only=True):
    """Means over images of one score under one condition, and the drop from clean images, with Student's t intervals.

    Attributes:
        extra_drop: Drop of the subject minus drop of the teacher.
    """

    subject: float
    teacher: float
    subject_drop: Quantity
    teacher_drop: Quantity
    extra_drop: Quantity
    images: int


class RobustnessResult(Result, frozen=True):
    """Result of kind "robustness"; statistics by score and condition. The clean condition has no drop."""

    method: EvaluationMethod
    samples: ImageScores
    statistics: dict[str, dict[str, Stability]]


class StreamMethod(msgspec.Struct, frozen=True, kw_only=True):
    """Method of a stream's evaluation. With a fixed share there is no target fidelity.

    Attributes:
        frames: Number of frames of the video.
        every: One of this many frames was compared.
    """

    video: str
    frames: int
    every: int
    preprocessing: str
    runtime: Runtime
    at_least: float | None = None
    share: float | None = None


class StreamResult(Result, frozen=True):
    """Result of kind "stream".

    Samples hold one value per frame, by way to answer frames and by score; statistics hold their means by the same
    names, the lowest as "x_least", and "ms_p99". Scores:

    - "patches": mean cosine of a frame's patches to the dense model's.
    - "moving": the same for the tenth whose dense output differs most from the previous frame.
    - "features": cosine of a feature.
    - "x_iou": overlap of the masks of a map x.
    - "share": share of the patches that was computed.
    - "oldest": frames since the oldest patch was computed.
    - "estimated": error that the stream itself estimated.
    - "reached": share of the frames at the target fidelity, if there was one.
    - "patches_frames": number of frames with patches; without an output of tokens, fallback frames have none.
    - "first_quarter", "last_quarter": means over these frames, which show a drift.

    Attributes:
        pictures: JPEG in base64 by title, bright where patches were computed.
    """

    method: StreamMethod
    samples: dict[str, dict[str, list[float]]]
    statistics: dict[str, dict[str, float]]
    pictures: dict[str, str] = msgspec.field(default_factory=dict)


class LayerSummary(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of one layer.

    Attributes:
        tokens: Patch tokens on entry.
        merged: Tokens that merge with another.
        keys: Keys that each tile reads; None for all.
    """

    layer: int
    tokens: int
    merged: int
    keys: int | None = None


class ImageSummary(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of one image.

    Attributes:
        saco: SaCo by "ours", "random" and "moved".
        better: True if the SaCo of "ours" is above 0 and above both baselines.
    """

    image: str
    layers: list[LayerSummary]
    saco: dict[str, float]
    better: bool


class ExplainMethod(msgspec.Struct, frozen=True, kw_only=True):
    """Method of an explanation.

    Attributes:
        groups: Number of groups of patches in the test of the explanation.
        filled: Content that replaces removed patches.
    """

    groups: int
    filled: str
    preprocessing: str
    images: list[str]


class ExplainResult(Result, frozen=True):
    """Result of kind "explanation"; samples hold, by image and order, the drop without each group of patches."""

    method: ExplainMethod
    samples: dict[str, dict[str, list[float]]]
    statistics: dict[str, ImageSummary]


class Explained(NamedTuple):
    """Explanation of one image, for a page.

    Attributes:
        merged: For each layer, the token that represents each patch, in raster order [P].
        read: For each layer, how many heads read each token, mean over tiles [N].
        importance: Importance of each patch for the answer [rows,columns]; its sum is 1.
        drops: See `samples` of the result.
    """

    path: Path
    image: Pixels
    merged: list[Array]
    read: list[Array]
    importance: Array
    summary: ImageSummary
    drops: dict[str, list[float]]
