"""A video of the frames, with what the model read of them and its answers drawn into it."""

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
"""Pixels along the longer side: smaller images are enlarged, so that text can be read."""
_CODEC = "libx264"
_FAST = {"preset": "ultrafast", "crf": "23", "tune": "zerolatency", "g": "50"}
_TEXT, _MARGIN, _TEXT_WIDTH = 16, 8, 44
_COLOURS = (255, 40, 0), (0, 140, 255), (60, 220, 60), (255, 200, 0), (200, 60, 255), (0, 220, 220), (255, 120, 180)
"""Of maps, in their order."""
_FRESH, _TINT = (255, 255, 0), 70
"""Colour of patches that were computed, and how strong it is, of 255."""
_UNREAD = 140
"""How dark is what the model does not read, of 255."""


class Overlay:
    """A video of whole frames with the model's answers: what it does not read is darkened, what a stream's step
    computed is tinted, and a map drawn where it is above a threshold. As large as the first frame; times of the file
    are those of the frames. A context manager.

    Args:
        path: .mp4 (in fragments, so that a file cut short still plays) or .mkv.
        threshold: of maps from 0 to 1.
        live: a service goes on without the overlay when the disk or the encoder refuses, counts and reports that; of
            another source the overlay is what was wanted, and its failure is an error.
        status: counts failures.

    Raises:
        ArtifactError: the file cannot be made.
    """

    def __init__(self, path: Path, threshold: float, live: bool, status: Status) -> None:
        self._path, self._live, self._status = path, False, status  # What cannot be begun is an error of any source.
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
        """Add a frame with its record, top left, and `Model.heats`.

        Raises:
            ArtifactError: the disk or the encoder refuses, of a source that is not live.
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
            self._size = tuple(max(2, side * times // 2 * 2) for side in (width, height))  # Encoders take no odd ones.
            self._stream.width, self._stream.height = self._size
        frame = av.VideoFrame.from_ndarray(self._draw(view, answered, lines, heats), format="rgb24")
        self._began = at_s if self._began is None else self._began
        self._last = max(self._last + 1, round((at_s - self._began) * 1000))
        frame.pts, frame.time_base = self._last, Fraction(1, 1000)
        with self._failures():
            self._file.mux(self._stream.encode(frame))

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """FFmpeg's errors are many, and not all of them are the system's. The first alone is raised, or told."""
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
        fitting = answered.fitting
        image, box = Image.fromarray(view).resize(self._size), _box_in(fitting, self._size)
        size = box[2] - box[0], box[3] - box[1]
        if answered.fresh is not None:
            tint = Image.fromarray((fitting.cut(answered.fresh) * _TINT).astype(np.uint8))
            image.paste(_FRESH, box[:2], tint.resize(size, Image.Resampling.NEAREST))
        for number, heat in enumerate(heats):
            values = np.asarray(Image.fromarray(heat.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
            mask = np.where(values > self._threshold, values.clip(0, 1) * 170, 0)
            image.paste(_COLOURS[number % len(_COLOURS)], box[:2], Image.fromarray(mask.astype(np.uint8)))
        if fitting.box[2:] != fitting.frame:
            unread = Image.new("L", self._size, _UNREAD)
            unread.paste(0, box)
            image.paste((0, 0, 0), mask=unread)
        draw, text, font = ImageDraw.Draw(image, "RGBA"), "\n".join(lines), ImageFont.load_default(_TEXT)
        place = (_MARGIN, _MARGIN)
        _, _, right, bottom = draw.multiline_textbbox(place, text, font)
        draw.rectangle((0, 0, right + _MARGIN, bottom + _MARGIN), (0, 0, 0, 150))
        draw.multiline_text(place, text, (255, 255, 255), font)
        return np.asarray(image)


def _box_in(fitting: Fitting, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the box in a picture of the frame; a pixel at least."""
    x, y, width, height = fitting.box
    across, down = size[0] / fitting.frame[0], size[1] / fitting.frame[1]
    column, row = min(round(x * across), size[0] - 1), min(round(y * down), size[1] - 1)
    return column, row, max(column + 1, round((x + width) * across)), max(row + 1, round((y + height) * down))


def text_lines(record: FrameRecord, rate: float) -> list[str]:
    """What is written into a frame."""
    lines = [f"{printable(top.label, _TEXT_WIDTH)}  {top.probability:.0%}" for top in record.top or []]
    if record.change is not None:
        lines.append(f"change {record.change:.3f}")
    for summary in record.maps or []:
        area = f"mean {summary.mean:.3g}" if summary.area is None else f"{summary.area:.0%} of what is read"
        lines.append(f"{printable(summary.output, _TEXT_WIDTH)}  {area}")
    if record.computed is not None:
        lines.append(f"{record.computed.by}: {record.computed.share:.0%} computed")
    age = record.frame_age_ms
    lines.append(f"{rate:.1f} fps   " + (f"model {record.infer_ms:.0f} ms" if age is None else f"age {age:.0f} ms"))
    return lines
