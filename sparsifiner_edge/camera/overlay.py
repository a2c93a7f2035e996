"""A video of what the model sees, with its answers drawn into it."""

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
from sparsifiner_edge.bounds import ImageSize, height_width
from sparsifiner_edge.camera.answers import FrameRecord
from sparsifiner_edge.camera.status import Status
from sparsifiner_edge.errors import ArtifactError
from sparsifiner_edge.files import io_errors
from sparsifiner_edge.text import printable

_LEAST_SIDE = 480
"""Pixels along the longer side: smaller images are enlarged, so that text can be read."""
_CODEC = "libx264"
_FAST = {"preset": "ultrafast", "crf": "23", "tune": "zerolatency", "g": "50"}
_TEXT, _MARGIN, _TEXT_WIDTH = 16, 8, 44


class Overlay:
    """A video of what the model sees, with its answers; times of the file are those of the frames. A context manager.

    Args:
        path: .mp4 (in fragments, so that a file cut short still plays) or .mkv.
        model_size: of the model's images.
        live: a service goes on without the overlay when the disk or the encoder refuses, counts and reports that; of
            another source the overlay is what was wanted, and its failure is an error.
        status: counts failures.

    Raises:
        ArtifactError: the file cannot be made.
    """

    def __init__(self, path: Path, model_size: ImageSize, live: bool, status: Status) -> None:
        self._path, self._live, self._status = path, False, status  # What cannot be begun is an error of any source.
        height, width = height_width(model_size)
        times = max(1, -(-_LEAST_SIDE // max(height, width)))
        self._size = width * times // 2 * 2, height * times // 2 * 2  # Encoders take no odd ones.
        self._began: float | None = None
        self._last = -1
        self._answered_at: deque[float] = deque(maxlen=26)
        self._lost = False
        options = {"movflags": "frag_keyframe+empty_moov"} if path.suffix.lower() == ".mp4" else {}
        with self._failures():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = cast("Any", av.open(f"file:{path.absolute()}", "w", options=options))
            self._stream = self._file.add_stream(_CODEC, rate=25, options=_FAST)
        self._stream.width, self._stream.height = self._size
        self._stream.pix_fmt, self._stream.codec_context.time_base = "yuv420p", Fraction(1, 1000)
        self._live = live

    def __enter__(self) -> Overlay:
        return self

    def __exit__(self, *_: object) -> None:
        with self._failures(), contextlib.closing(self._file):
            if not self._lost:
                self._file.mux(self._stream.encode(None))

    def write(self, image: Pixels, record: FrameRecord, heat: Array | None, at_s: float) -> None:
        """Add a frame.

        Args:
            image: uint8 RGB [H,W,3], the model's input.
            record: what is written, top left.
            heat: see `Model.heat`.
            at_s: seconds; the first frame's are zero.

        Raises:
            ArtifactError: the disk or the encoder refuses, of a source that is not live.
        """
        if self._lost:
            return
        self._answered_at.append(record.monotonic_s)
        span_s = self._answered_at[-1] - self._answered_at[0]
        lines = text_lines(record, (len(self._answered_at) - 1) / span_s if span_s else 0.0)
        frame = av.VideoFrame.from_ndarray(self._draw(image, lines, heat), format="rgb24")
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

    def _draw(self, pixels: Pixels, lines: list[str], heat: Array | None) -> Pixels:
        image = Image.fromarray(pixels).resize(self._size)
        if heat is not None:
            mask = Image.fromarray((heat * 170).astype(np.uint8)).resize(self._size, Image.Resampling.BILINEAR)
            image.paste((255, 40, 0), mask=mask)
        draw, text, font = ImageDraw.Draw(image, "RGBA"), "\n".join(lines), ImageFont.load_default(_TEXT)
        place = (_MARGIN, _MARGIN)
        _, _, right, bottom = draw.multiline_textbbox(place, text, font)
        draw.rectangle((0, 0, right + _MARGIN, bottom + _MARGIN), (0, 0, 0, 150))
        draw.multiline_text(place, text, (255, 255, 255), font)
        return np.asarray(image)


def text_lines(record: FrameRecord, rate: float) -> list[str]:
    """What is written into a frame."""
    lines = [f"{printable(top.label, _TEXT_WIDTH)}  {top.probability:.0%}" for top in record.top or []]
    if record.change is not None:
        lines.append(f"change {record.change:.3f}")
    for summary in record.maps or []:
        area = f"mean {summary.mean:.3g}" if summary.area is None else f"{summary.area:.0%} of the image"
        lines.append(f"{printable(summary.output, _TEXT_WIDTH)}  {area}")
    age = record.frame_age_ms
    lines.append(f"{rate:.1f} fps   " + (f"model {record.infer_ms:.0f} ms" if age is None else f"age {age:.0f} ms"))
    return lines
