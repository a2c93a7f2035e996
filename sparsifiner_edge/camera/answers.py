"""What `run` gives of a frame, and the records that it writes as JSON lines; there what is None is left out."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from sparsifiner_edge.arrays import Array, Pixels
from sparsifiner_edge.fitting import Box, Fitting
from sparsifiner_edge.runtime.stream import Computed


class Class(msgspec.Struct, frozen=True):
    """One class of a classifier's answer."""

    number: int = msgspec.field(name="class")
    label: str
    probability: float


class MapSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A dense map in a few numbers.

    Attributes:
        output: its name. mean, least, greatest: of its values, bars left out.
        area: where all values lie between 0 and 1: share of the box above the threshold. centroid: of that part, x and
            y from 0 (left, top) to 1 of the box; None where there is none.
    """

    output: str
    mean: float
    least: float
    greatest: float
    area: float | None = None
    centroid: tuple[float, float] | None = None


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a model says of an image.

    Attributes:
        top: of a classifier, the best first; empty where a logit is NaN or infinite, or no class reaches the threshold.
        features: of another model; None for those that are NaN or infinite.
        maps: of a model that gives dense maps; empty where a value is NaN or infinite.
        not_finite: how many numbers of all these were, where any was.
        change: of a video's features; see `Model.frame_answer`.
    """

    top: list[Class] | None = None
    features: list[float | None] | None = None
    maps: list[MapSummary] | None = None
    not_finite: int | None = None
    change: float | None = None


class FrameRecord(Answer, frozen=True):
    """A frame's line: what is said of it, and how long that took.

    Attributes:
        source: as it may be shown.
        box: what the model read of it: left, top, width, height in pixels of the frame.
        frame: its number among those that were answered.
        skipped: frames dropped unseen since the one before.
        pts_s: in the stream. monotonic_s: on the monotonic clock, when it was done.
        capture_ms, preprocess_ms, queued_ms, infer_ms, postprocess_ms, end_to_end_ms: see docs/camera.md.
        frame_age_ms: since it was taken; of a live source.
        computed: of the frame, where a stream keeps what did not change.
    """

    source: str
    box: Box
    frame: int
    skipped: int
    pts_s: float | None
    monotonic_s: float
    capture_ms: float
    preprocess_ms: float
    queued_ms: float
    infer_ms: float
    postprocess_ms: float
    end_to_end_ms: float
    frame_age_ms: float | None
    computed: Computed | None = None


class ImageRecord(Answer, frozen=True):
    """A still image's line; one that cannot be read has an error, and no more."""

    source: str
    box: Box | None = None
    preprocess_ms: float | None = None
    infer_ms: float | None = None
    end_to_end_ms: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Answered:
    """An image or a frame, and what the model says of it.

    Attributes:
        index: counts from 0. ms: milliseconds of work on it; what a frame waited is `record.queued_ms`.
        image: what the model saw, uint8 RGB [H,W,3]. outputs: the model's own, batch 1; see `Session.infer`.
        record: its line: classes with their labels, times. fitting: which part of the frame `image` is: see `to_frame`.
        view: the whole frame, where an overlay is drawn. fresh: of a step of a stream, the patches of `image` that were
            computed, bool [rows,columns].
    """

    index: int
    ms: float
    image: Pixels
    outputs: dict[str, Array]
    record: FrameRecord | ImageRecord
    fitting: Fitting
    view: Pixels | None = None
    fresh: Array | None = None


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """How a run went.

    Attributes:
        processed: images or frames answered. dropped: frames of a live source that gave way to a newer one.
        per_s: answers per second, from the first to the last; None of fewer than two.
        median_ms, p95_ms: by the time's name (without _ms), of the last `status.LATEST` answers.
    """

    processed: int
    dropped: int
    per_s: float | None
    median_ms: dict[str, float]
    p95_ms: dict[str, float]
