"""Evaluation of streaming inference on a video: error against the dense model, next to that of simple baselines."""

from __future__ import annotations

import base64
import io
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.camera.capture import Capture
from sparsifiner_edge.camera.decoder_protocol import Wanted
from sparsifiner_edge.camera.model import Model
from sparsifiner_edge.camera.service import RunOptions, frames_of, open_model
from sparsifiner_edge.camera.sources import parse_source, require_decoder
from sparsifiner_edge.camera.status import Status
from sparsifiner_edge.config import require
from sparsifiner_edge.errors import ConfigError, ImageError
from sparsifiner_edge.images import list_images, load_image
from sparsifiner_edge.metrics import cosine
from sparsifiner_edge.outcomes import STREAM, StreamMethod, StreamResult
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.runtime.stream import AT_LEAST, Stream
from sparsifiner_edge.scoring import Prediction, alike, map_scores

HELD = (2, 4, 8, 16)
"""Baselines of a stream: the dense model answers every k-th frame, and its answer is held for the frames between."""
MODEL = "every frame by the model"
"""Name of the baseline in which the bundle's own model answers every frame."""
_PICTURE = 320
"""Width of the pictures in pixels."""
_QUALITY = 80
"""JPEG quality of the pictures: their size in a report matters more than fine detail."""
_LEAST_FRAMES = 3
"""Fewest compared frames for a result."""
Samples = dict[str, list[float]]
"""One value per compared frame, by score."""


def evaluate_video(
    bundle: str | Path,
    video: str | Path,
    options: RunOptions | None = None,
    *,
    every: int = 1,
    progress: Progress | None = None,
) -> StreamResult:
    """Run streaming inference on a video, and compare its outputs with those of the dense model on the same frames.

    If the camera moves, all read the aligned frames (see `camera.align`), so that they answer about the same content.

    Args:
        bundle: Bundle exported with --stream.
        video: Video, or a folder of a camera's images in the order of their names.
        options: Used fields: execution, fit, region, at_least, share, stabilise, and frames (stop after
            this many).
        every: Compare one of this many frames; the stream still processes all of them. Values above 1 leave out the
            baselines that hold an answer.
        progress: See `Progress`.

    Returns:
        A result of kind "stream".

    Raises:
        BackendError: The bundle was exported without --stream, or the backend does not support streaming inference.
        ImageError: The video cannot be read, or has too few frames.
        SparsifinerError: The bundle or an option is unusable.

    Example:
        >>> result = evaluate_video("streaming", "images")
        >>> sorted(result.statistics)[:2]
        ['every frame by the model', 'hold every 16th']
    """
    options = options or RunOptions()
    at_least, share, frames = options.at_least, options.share, options.frames
    require(every >= 1, f"every is {every}.", "Give a whole number, at least 1.")
    require(frames is None or frames >= 1, f"frames is {frames}.", "Give a whole number, at least 1.")
    floor = AT_LEAST if at_least is None and share is None else at_least
    with open_model(Path(bundle), options) as model:
        model.follow(floor, share, options.stabilise)
        assert model.stream is not None
        evaluation = _VideoEvaluation(model, model.stream, every)
        for number, image in enumerate(images_of(model, str(video), frames)):
            evaluation.take(image)
            if progress:
                progress("frames", number + 1, frames or 0)
        if evaluation.compared < _LEAST_FRAMES:
            raise ImageError(
                f"{video} has {evaluation.compared} frames to compare; at least {_LEAST_FRAMES} are needed.",
                "Give a longer video, or a smaller `every`.",
            )
        method = StreamMethod(
            video=Path(video).name,
            frames=evaluation.frames,
            every=every,
            share=share,
            at_least=floor,
            preprocessing=str(model.framing),
            runtime=model.runtime,
        )
    subject = open_bundle(Path(bundle)).subject("subject")
    statistics = {way: _figures(samples, floor) for way, samples in evaluation.samples.items()}
    return StreamResult("stream", [subject], method, evaluation.samples, statistics, pictures=evaluation.pictures())


def images_of(model: Model, video: str, most: int | None) -> Iterator[Array]:
    """Yield inputs of the model, uint8 [H,W,3], from the frames of a video or from the images of a folder.

    Args:
        model: Model whose framing is used.
        video: Source; must not be live.
        most: Stop after this many frames; None for all.

    Raises:
        ConfigError: The source is live.
        ImageError: The video cannot be read.
    """
    source = parse_source(video)
    if source.live:
        raise ConfigError(f"{source.shown} is a live source.", "Record a video, and give its file.")
    if source.kind == "images":
        for path in list_images(Path(source.location))[:most]:
            yield load_image(path, model.framing)
        return
    require_decoder(source)
    status, count = Status(source.shown, lambda _event: None), 0
    with Capture(source, Wanted(model.framing), 60.0, status) as capture:
        for frame in frames_of(capture, threading.Event()):
            yield frame.image(model.framing)
            count += 1
            if count == most:
                return
    if capture.failure is not None:
        raise ImageError(f"{source.shown} cannot be read as a video: {capture.failure}", "Replace or repair it.")


class _VideoEvaluation:
    """Comparison of a stream with the dense model and with the baselines, frame by frame.

    Attributes:
        samples: One value per compared frame, by method and score.
        frames: Number of frames so far.
        compared: Number of compared frames so far.
    """

    def __init__(self, model: Model, stream: Stream, every: int) -> None:
        self._model, self._stream, self._every = model, stream, every
        self._dense, self._before = stream.dense(), dict[str, Array]()
        self._held: dict[int, dict[str, Array]] = {}
        self._shown: dict[str, tuple[float, str]] = {}
        self.samples: dict[str, Samples] = {}
        self.frames = self.compared = 0

    def take(self, image: Array) -> None:
        """Process the next frame."""
        began = time.monotonic()
        outputs, image, _, computed, _ = self._model.infer_frame(image)
        ms, number = (time.monotonic() - began) * 1e3, self.frames
        assert computed is not None
        self.frames += 1
        if number % self._every:
            return
        began = time.monotonic()
        wanted = self._dense(image[None])
        dense_ms = (time.monotonic() - began) * 1e3
        for held in HELD if self._every == 1 else ():
            self._held[held] = self._held[held] if number % held else wanted
        before, self._before = self._before, wanted
        if not before:
            return  # The first frame is a full frame and shows nothing.
        self.compared += 1
        moving = np.argsort(-self._errors(before, wanted), kind="stable")[: max(1, self._stream.fresh.size // 10)]
        known = {"tokens": self._stream.final} if computed.by != "fallback" else {}
        if "tokens" not in outputs | known:  # Then no method is scored on tokens, so that all use the same frames.
            wanted = {name: value for name, value in wanted.items() if name != "tokens"}
        extra = {"share": computed.share, "oldest": float(computed.oldest)}
        extra |= {} if computed.error is None else {"estimated": computed.error}
        error = self._add(STREAM, outputs | known, wanted, moving, ms, extra)
        began = time.monotonic()
        own = self._model.infer(image)
        self._add(MODEL, own, wanted, moving, (time.monotonic() - began) * 1e3)
        for held, answer in self._held.items():
            way = f"hold every {held}{'nd' if held == 2 else 'th'}"
            self._add(way, answer, wanted, moving, 0.0 if number % held else dense_ms)
        self._show(image, number, error, computed.share)

    def _errors(self, a: dict[str, Array], b: dict[str, Array]) -> Array:
        """Return 1 - cosine for each patch of two outputs."""
        return 1 - cosine(a["tokens"], b["tokens"])[0, -self._stream.fresh.size :]

    def _add(
        self,
        way: str,
        got: dict[str, Array],
        wanted: dict[str, Array],
        moving: Array,
        ms: float,
        extra: dict[str, float] | None = None,
    ) -> float | None:
        """Add the scores of a method for one frame.

        Args:
            way: Name of the method.
            got: Outputs of the method.
            wanted: Outputs of the dense model.
            moving: Indices of the tenth of the patches that changed most since the previous compared frame.
            ms: Time of the method in milliseconds.
            extra: Further scores.

        Returns:
            Mean error (1 - cosine) of the patches, or None without tokens.
        """
        scores, error = {"ms": ms} | (extra or {}), None
        for name, expected in wanted.items():
            if name not in got or got[name].shape != expected.shape:
                continue
            if name == "tokens":
                errors = self._errors(got, wanted)
                error = float(errors.mean())
                scores |= {"patches": 1 - error, "moving": 1 - float(errors[moving].mean())}
            elif name == "features":
                scores["features"] = alike(name, Prediction(got), Prediction(wanted))
            elif expected.squeeze().ndim == 2:
                measures = map_scores(got[name].squeeze(), expected.squeeze(), self._model.map_threshold)
                scores |= {f"{name}_{kind}": value for kind, value in measures.items() if value is not None}
        for name, value in scores.items():
            self.samples.setdefault(way, {}).setdefault(name, []).append(float(value))
        return error

    def _show(self, image: Array, number: int, error: float | None, share: float) -> None:
        """Keep a picture of the frame if it has the largest error, or the largest share computed, so far."""
        for title, value in (("largest error", error), ("largest share computed", share % 1)):
            if value is not None and value > self._shown.get(title, (-math.inf, ""))[0]:
                self._shown[title] = value, _draw(image, self._stream, f"Frame {number}, {title}: {value:.3f}")

    def pictures(self) -> dict[str, str]:
        """Return JPEG pictures in base64 by title. Computed patches are bright."""
        return dict(shown.split("\n", 1) for _, shown in self._shown.values())


def _draw(image: Array, stream: Stream, title: str) -> str:
    """Return a title, a line break, and the picture as JPEG in base64."""
    height, width = image.shape[:2]
    size = (_PICTURE, max(1, round(_PICTURE * height / width)))
    bright = Image.fromarray(np.where(stream.fresh, 255, 110).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    picture = Image.fromarray(image).resize(size)
    picture.paste((0, 0, 0), mask=bright.point(lambda value: 255 - value))
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG", quality=_QUALITY)
    return f"{title}\n{base64.b64encode(jpeg.getvalue()).decode()}"


def _figures(samples: Samples, floor: float | None) -> dict[str, float]:
    """Return the statistics of one method; see `StreamResult`."""
    figures: dict[str, float] = {}
    for name, values in samples.items():
        x = np.array(values)
        figures[name] = float(x.mean())
        if name == "ms":
            figures["ms_p99"] = float(np.quantile(x, 0.99))
        elif name not in ("share", "oldest", "estimated"):
            figures[f"{name}_least"] = float(x.min())
    if (patches := samples.get("patches")) is not None:
        quarter = max(1, len(patches) // 4)
        figures |= {} if floor is None else {"reached": float((np.array(patches) >= floor).mean())}
        figures |= {
            "patches_frames": float(len(patches)),
            "first_quarter": float(np.mean(patches[:quarter])),
            "last_quarter": float(np.mean(patches[-quarter:])),
        }
    return figures
