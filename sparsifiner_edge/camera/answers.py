"""Answers of `run`, and the records that it writes as JSON lines. Fields that are None are left out of the JSON."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from sparsifiner_edge.arrays import Array, Pixels
from sparsifiner_edge.fitting import Box, Fitting
from sparsifiner_edge.runtime.stream import Computed


class Class(msgspec.Struct, frozen=True):
    """One class of a classifier's answer.

    Attributes:
        number: Index of the class; `class` in JSON.
        label: Label of the class.
        probability: Softmax probability.
    """

    number: int = msgspec.field(name="class")
    label: str
    probability: float


class MapSummary(msgspec.Struct, frozen=True, kw_only=True):
    """Summary of a dense map, computed without its letterbox bars.

    Attributes:
        output: Name of the output, followed by ".CHANNEL" if it has several channels.
        mean: Mean of the values.
        least: Minimum of the values.
        greatest: Maximum of the values.
        area: Share of the box above the threshold, for maps from 0 to 1; None for other maps.
        centroid: Centre (x, y) of that area, from 0 (left, top) to 1 of the box; None if there is no such area.
    """

    output: str
    mean: float
    least: float
    greatest: float
    area: float | None = None
    centroid: tuple[float, float] | None = None


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of a model for one image.

    Attributes:
        top: Classes of a classifier, the most probable first. Empty if a logit is NaN or infinite, or if no class
            reaches the threshold.
        features: Features of a model without logits; None in place of a value that is NaN or infinite.
        maps: Summaries of a model that outputs dense maps. Empty if a value is NaN or infinite.
        not_finite: Number of values that were NaN or infinite; None if there were none.
        change: How far the features of a video frame moved; see `Model.frame_answer`.
    """

    top: list[Class] | None = None
    features: list[float | None] | None = None
    maps: list[MapSummary] | None = None
    not_finite: int | None = None
    change: float | None = None


class FrameRecord(Answer, frozen=True):
    """JSON line of a frame: its answer and its timing.

    All times but `pts_s` and `monotonic_s` are durations in milliseconds. docs/camera.md defines them.

    Attributes:
        source: Source in a form without secrets; see `Source.shown`.
        box: Part of the frame that the model read: left, top, width and height in pixels. Fractions if the view was
            aligned (see `camera.align`), and partly outside the frame if it was moved beyond its border.
        corners: Corners of that part, clockwise, if the aligned view is turned; then `box` is the box around them.
        frame: Number of the answer, from 0.
        skipped: Frames dropped since the previous answer.
        pts_s: Time in the stream in seconds.
        monotonic_s: When the answer was ready, in seconds on the monotonic clock.
        capture_ms: From capture (camera) or from the start of decoding (file) until the frame was decoded.
        preprocess_ms: Resizing.
        queued_ms: Waiting until the model was free.
        infer_ms: Inference.
        postprocess_ms: From the outputs of the model to the record.
        end_to_end_ms: From arrival to answer, without `queued_ms`.
        frame_age_ms: From capture to answer, including all waiting; only for live sources.
        computed: Kind, share and age of the update; only with streaming inference.
    """

    source: str
    box: tuple[float, float, float, float]
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
    corners: list[tuple[float, float]] | None = None


class ImageRecord(Answer, frozen=True):
    """JSON line of a still image. An image that cannot be read has only `source` and `error`.

    Attributes:
        source: Path of the image.
        box: Part of the image that the model read: left, top, width and height in pixels.
        preprocess_ms: Reading, decoding and resizing.
        infer_ms: Inference.
        end_to_end_ms: From opening the file to the answer.
        error: Why the image cannot be read.
    """

    source: str
    box: Box | None = None
    preprocess_ms: float | None = None
    infer_ms: float | None = None
    end_to_end_ms: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Answered:
    """An image or frame with its answer.

    Attributes:
        index: Number of the answer, from 0.
        ms: Milliseconds of work on it. The time that a frame waited is `record.queued_ms`.
        image: Input of the model, uint8 RGB [H,W,3].
        outputs: Outputs of the model with batch size 1; see `Session.infer`.
        record: JSON line, with labelled classes and times.
        fitting: Geometry between `image` and the frame; see `Fitting.to_frame`.
        view: Whole frame, uint8 RGB [H,W,3], if an overlay is drawn.
        fresh: Patches of `image` that an incremental update computed, bool [rows,columns].
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
    """Figures of a whole run.

    Attributes:
        processed: Answered images or frames.
        dropped: Frames of a live source that were replaced by a newer one.
        per_s: Answers per second, from the first to the last; None for fewer than two.
        median_ms: Median of each time of the last `status.LATEST` answers, by its name without _ms.
        p95_ms: 95th percentile of the same times.
    """

    processed: int
    dropped: int
    per_s: float | None
    median_ms: dict[str, float]
    p95_ms: dict[str, float]
