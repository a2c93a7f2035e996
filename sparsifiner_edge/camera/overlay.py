"""The video with its answers drawn into it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from sparsifiner_edge.arrays import Array, Pixels
from sparsifiner_edge.bounds import ImageSize
from sparsifiner_edge.camera.answers import FrameRecord
from sparsifiner_edge.camera.model import FULL_CHANGE
from sparsifiner_edge.errors import ArtifactError, ConfigError
from sparsifiner_edge.files import require_file_path
from sparsifiner_edge.images import centre_box

SHOWN = 640
"""Pixels along the longer side of the frames that are asked for."""
_SUFFIXES = (".mkv", ".mp4")
_CODEC = "libx264"
_TEXT, _LINE, _MARGIN = 16, 20, 8
_TEXT_WIDTH = 44


def require_overlay_path(path: Path) -> None:
    """Refuse an overlay file that cannot be one.

    Raises:
        ConfigError: another ending than .mp4 or .mkv, or this FFmpeg has no encoder for it.
        ArtifactError: a folder or a device.
    """
    import av

    if path.suffix.lower() not in _SUFFIXES:
        raise ConfigError(f"The overlay {path} is no video's name.", f"Let it end with {' or '.join(_SUFFIXES)}.")
    require_file_path(path)
    if _CODEC not in av.codecs_available:
        raise ConfigError(
            f"The FFmpeg of PyAV {av.__version__} cannot encode the overlay: it has no {_CODEC}.",
            "Install PyAV's own wheel: pip install --force-reinstall --only-binary av av",
        )


@contextlib.contextmanager
def _as_os_errors() -> Iterator[None]:
    """FFmpeg's errors are many, and not all of them are the system's."""
    import av

    try:
        yield
    except OSError:
        raise
    except (av.error.FFmpegError, ValueError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise OSError(getattr(error, "errno", None) or 0, said) from error


class Overlay:
    """Encodes drawn frames; times of the file are those of the frames.

    Args:
        path: .mp4 (in fragments, so that a file cut short still plays) or .mkv.
        model_size: of the model's images: what of a frame it sees is outlined.

    Raises:
        ArtifactError: the file cannot be made.
    """

    def __init__(self, path: Path, model_size: ImageSize) -> None:
        import av

        require_overlay_path(path)
        self.path, self._model_size = path, model_size
        self._size: tuple[int, int] | None = None
        self._stream: Any = None
        self._began: float | None = None
        self._last = -1
        options = {"movflags": "frag_keyframe+empty_moov"} if path.suffix.lower() == ".mp4" else {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _as_os_errors():
                self._file: Any = av.open(f"file:{path.absolute()}", "w", options=options)
        except OSError as error:
            raise ArtifactError(f"{path} cannot be written: {error.strerror}.", "Choose another place.") from error

    def write(self, image: Pixels, lines: list[str], heat: Array | None, at_s: float) -> None:
        """Add a frame.

        Args:
            image: uint8 RGB [h,w,3]; one of another size than the first is made to fit it.
            lines: text, top left.
            heat: see `Model.heat`.
            at_s: seconds; the first frame's are zero.

        Raises:
            OSError: the disk or the encoder refuses.
        """
        import av

        with _as_os_errors():
            if self._stream is None:
                self._open_stream(image)
            frame = av.VideoFrame.from_ndarray(self._drawn(image, lines, heat), format="rgb24")
            self._began = at_s if self._began is None else self._began
            self._last = max(self._last + 1, round((at_s - self._began) * 1000))
            frame.pts, frame.time_base = self._last, Fraction(1, 1000)
            self._file.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Finish the file.

        Raises:
            OSError: the disk or the encoder refuses.
        """
        with _as_os_errors(), contextlib.closing(self._file):
            if self._stream is not None:
                self._file.mux(self._stream.encode(None))

    def abandon(self) -> None:
        """Give up after an error: release, whatever happens."""
        with contextlib.suppress(Exception):
            self._file.close()

    def _open_stream(self, image: Pixels) -> None:
        height, width = image.shape[:2]
        self._size = width // 2 * 2, height // 2 * 2
        self._stream = self._file.add_stream(_CODEC, rate=25)
        self._stream.width, self._stream.height = self._size
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = Fraction(1, 1000)
        self._stream.options = {"preset": "ultrafast", "crf": "23", "tune": "zerolatency", "g": "50"}

    def _drawn(self, pixels: Pixels, lines: list[str], heat: Array | None) -> Pixels:
        from PIL import Image, ImageDraw, ImageFont

        image = Image.fromarray(pixels)
        if self._size is not None and image.size != self._size:
            image = image.resize(self._size)
        box = centre_box(*image.size, self._model_size)
        if heat is not None:
            image.paste(Image.new("RGB", (box[2] - box[0], box[3] - box[1]), (255, 40, 0)), box[:2], _mask(heat, box))
        draw = ImageDraw.Draw(image, "RGBA")
        draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=(255, 255, 255, 160))
        font = ImageFont.load_default(_TEXT)
        width = max((draw.textlength(line, font=font) for line in lines), default=0)
        draw.rectangle((0, 0, width + 2 * _MARGIN, len(lines) * _LINE + _MARGIN), fill=(0, 0, 0, 150))
        for number, line in enumerate(lines):
            draw.text((_MARGIN, _MARGIN // 2 + number * _LINE), line, fill=(255, 255, 255, 255), font=font)
        return np.asarray(image)


def _mask(heat: Array, box: tuple[int, int, int, int]) -> Any:
    from PIL import Image

    strength = (heat * 170).astype(np.uint8)
    return Image.fromarray(strength).resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.BILINEAR)


def text_lines(record: FrameRecord, rate: float) -> list[str]:
    """What is written into a frame."""
    lines = [f"{_short(top.label)}  {top.probability:.0%}" for top in record.top or []]
    if record.change is not None:
        lines.append(f"change {record.change:.3f} " + "|" * min(20, round(record.change / FULL_CHANGE * 20)))
    for found in record.maps or []:
        area = f"mean {found.mean:.3g}" if found.area is None else f"{found.area:.0%} of the image"
        lines.append(f"{_short(found.output)}  {area}")
    if record.novelty is not None:
        unlike = "   UNLIKE THE CALIBRATION" if record.novelty > 1 else ""
        lines.append(f"novelty {record.novelty:.2f}{unlike}")
    age = record.frame_age_ms
    lines.append(f"{rate:.1f} fps   " + (f"model {record.infer_ms:.0f} ms" if age is None else f"age {age:.0f} ms"))
    return lines


def _short(label: str) -> str:
    shown = "".join(c if c.isprintable() else "?" for c in label)
    return shown if len(shown) <= _TEXT_WIDTH else shown[: _TEXT_WIDTH - 1] + "\u2026"
