"""Video of the frames, with the answers and the part that the model read drawn into it."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sparsifiner_edge.arrays import Array, Pixels
from sparsifiner_edge.camera.answers import Answered, FrameRecord
from sparsifiner_edge.camera.status import Status
from sparsifiner_edge.errors import ArtifactError
from sparsifiner_edge.files import io_errors
from sparsifiner_edge.fitting import Fitting
from sparsifiner_edge.text import printable

_LEAST_SIDE = 480
"""Least length of the longer side in pixels: smaller frames are enlarged so that the text is legible."""
_CODEC = "libx264"
_FAST = {"preset": "ultrafast", "crf": "23", "tune": "zerolatency", "g": "50"}
"""Encoder options: little processor time and delay, a key frame every 50 frames."""
_TEXT = 16
"""Font size in pixels."""
_MARGIN = 8
"""Space around the text in pixels."""
_TEXT_WIDTH = 44
"""Longest label in characters."""
_COLOURS = (255, 40, 0), (0, 140, 255), (60, 220, 60), (255, 200, 0), (200, 60, 255), (0, 220, 220), (255, 120, 180)
"""RGB colours of the maps, in order."""
_FRESH = (255, 255, 0)
"""RGB colour of recomputed patches."""
_TINT = 70
"""Opacity of that colour, of 255."""
_UNREAD = 140
"""Opacity of the black over the part that the model does not read, of 255."""


class Overlay:
    """Context manager that writes a video of whole frames with the model's answers.

    The part that the model does not read is darkened, recomputed patches are tinted, and maps are drawn where they are
    above a threshold. The video has the size of the first frame, and the timestamps of the frames.

    Args:
        path: File to write: .mp4 (fragmented, so that a file cut short still plays) or .mkv.
        threshold: Threshold of maps from 0 to 1.
        live: Whether the source is live. If the disk or the encoder fails, a live source goes on without the overlay,
            and counts and reports the failure; for other sources it is an error.
        status: Counts and reports failures.

    Raises:
        ArtifactError: The file cannot be created.
    """

    def __init__(self, path: Path, threshold: float, live: bool, status: Status) -> None:
        # Not live yet: a file that cannot be created is an error for any source.
        self._path, self._live, self._status = path, False, status
        self._threshold, self._size = threshold, (0, 0)
        self._began: float | None = None
        self._last = -1
        self._answered_at: deque[float] = deque(maxlen=26)
        self._lost = False
        options = {"movflags": "frag_keyframe+empty_moov"} if path.suffix.lower() == ".mp4" else {}
        with self._failures():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = cast("Any", av.open(f"file:{path.absolute()}", "w", options=options))
            self._stream = self._file.add_stream(_CODEC, rate=25, options=_FAST)
        self._stream.pix_fmt, self._stream.codec_context.time_base = "yuv420p", Fraction(1, 1000)
        self._live = live

    def __enter__(self) -> Overlay:
        return self

    def __exit__(self, *_: object) -> None:
        with self._failures(), contextlib.closing(self._file):
            if self._began is not None and not self._lost:
                self._file.mux(self._stream.encode(None))

    def write(self, answered: Answered, heats: list[Array]) -> None:
        """Add a frame.

        Args:
            answered: The frame with its record, which is written into its upper left corner.
            heats: Maps to draw; see `Model.heats`.

        Raises:
            ArtifactError: The disk or the encoder failed, and the source is not live.
        """
        if self._lost:
            return
        view, record, age_ms = answered.view, answered.record, getattr(answered.record, "frame_age_ms", None)
        assert view is not None
        assert isinstance(record, FrameRecord)
        at_s = record.pts_s or 0.0 if age_ms is None else record.monotonic_s - age_ms / 1000
        self._answered_at.append(record.monotonic_s)
        span_s = self._answered_at[-1] - self._answered_at[0]
        lines = text_lines(record, (len(self._answered_at) - 1) / span_s if span_s else 0.0)
        if self._began is None:
            height, width = view.shape[:2]
            times = max(1, -(-_LEAST_SIDE // max(height, width)))
            # Encoders require even sides.
            self._size = tuple(max(2, side * times // 2 * 2) for side in (width, height))
            self._stream.width, self._stream.height = self._size
        frame = av.VideoFrame.from_ndarray(self._draw(view, answered, lines, heats), format="rgb24")
        self._began = at_s if self._began is None else self._began
        self._last = max(self._last + 1, round((at_s - self._began) * 1000))
        frame.pts, frame.time_base = self._last, Fraction(1, 1000)
        with self._failures():
            self._file.mux(self._stream.encode(frame))

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Turn errors of FFmpeg and of the system into ArtifactError. Only the first one is raised or reported."""
        try:
            with io_errors(self._path):
                try:
                    yield
                except (av.error.FFmpegError, ValueError) as error:
                    raise OSError(0, getattr(error, "strerror", None) or str(error)) from error
        except ArtifactError as error:
            if self._lost:
                return
            self._lost = True
            if not self._live:
                raise
            self._status.count("overlay_errors")
            self._status.event("overlay_lost", reason=error.what)

    def _draw(self, view: Pixels, answered: Answered, lines: list[str], heats: list[Array]) -> Pixels:
        """Return the frame with maps, tints and text drawn into it."""
        fitting = answered.fitting
        image = Image.fromarray(view).resize(self._size)
        if answered.fresh is not None:
            tint = _placed(fitting.cut(answered.fresh) * _TINT, fitting, self._size, Image.Resampling.NEAREST)
            image.paste(_FRESH, mask=_as_mask(tint))
        for number, heat in enumerate(heats):
            values = _placed(heat, fitting, self._size, Image.Resampling.BILINEAR)
            mask = np.where(values > self._threshold, values.clip(0, 1) * 170, 0)
            image.paste(_COLOURS[number % len(_COLOURS)], mask=_as_mask(mask))
        if fitting.box[2:] != fitting.frame or fitting.affine is not None:
            read = _placed(np.ones((1, 1)), fitting, self._size, Image.Resampling.NEAREST)
            image.paste((0, 0, 0), mask=_as_mask((1 - read) * _UNREAD))
        draw, text, font = ImageDraw.Draw(image, "RGBA"), "\n".join(lines), ImageFont.load_default(_TEXT)
        place = (_MARGIN, _MARGIN)
        _, _, right, bottom = draw.multiline_textbbox(place, text, font)
        draw.rectangle((0, 0, right + _MARGIN, bottom + _MARGIN), (0, 0, 0, 150))
        draw.multiline_text(place, text, (255, 255, 255), font)
        return np.asarray(image)


def _placed(values: Array, fitting: Fitting, size: tuple[int, int], resampling: Image.Resampling) -> Array:
    """Return a map [h,w] of what the model read, where it lies in a frame of this size, [rows,columns]; 0 elsewhere."""
    picture = Image.fromarray(np.asarray(values, np.float32))
    if fitting.affine is None:
        box, placed = _box_in(fitting, size), Image.new("F", size)
        placed.paste(picture.resize((box[2] - box[0], box[3] - box[1]), resampling), box[:2])
        return np.asarray(placed)
    rows, columns = values.shape
    (x, y), (beside_x, beside_y), _, (below_x, below_y) = fitting.corners
    # From pixels of the map to pixels of the frame; the transformation needs the inverse.
    across, down = size[0] / fitting.frame[0], size[1] / fitting.frame[1]
    forward = np.array(
        [
            [(beside_x - x) / columns * across, (below_x - x) / rows * across, x * across],
            [(beside_y - y) / columns * down, (below_y - y) / rows * down, y * down],
            [0, 0, 1],
        ]
    )
    back = np.linalg.inv(forward)[:2].reshape(-1)
    return np.asarray(picture.transform(size, Image.Transform.AFFINE, tuple(back), resampling))


def _as_mask(opacity: Array) -> Image.Image:
    """Return a mask from opacities up to 255, [rows,columns]."""
    return Image.fromarray(opacity.astype(np.uint8))


def _box_in(fitting: Fitting, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of the box in a resized frame; it is at least one pixel large."""
    x, y, width, height = fitting.box
    across, down = size[0] / fitting.frame[0], size[1] / fitting.frame[1]
    column, row = min(round(x * across), size[0] - 1), min(round(y * down), size[1] - 1)
    return column, row, max(column + 1, round((x + width) * across)), max(row + 1, round((y + height) * down))


def text_lines(record: FrameRecord, rate: float) -> list[str]:
    """Return the lines of text that are drawn into a frame."""
    lines = [f"{printable(top.label, _TEXT_WIDTH)}  {top.probability:.0%}" for top in record.top or []]
    if record.change is not None:
        lines.append(f"change {record.change:.3f}")
    for summary in record.maps or []:
        area = f"mean {summary.mean:.3g}" if summary.area is None else f"{summary.area:.0%} of the box"
        lines.append(f"{printable(summary.output, _TEXT_WIDTH)}  {area}")
    if record.computed is not None:
        lines.append(f"{record.computed.by}: {record.computed.share:.0%} computed")
    age = record.frame_age_ms
    lines.append(f"{rate:.1f} fps   " + (f"model {record.infer_ms:.0f} ms" if age is None else f"age {age:.0f} ms"))
    return lines
