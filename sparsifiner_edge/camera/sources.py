"""From the text of `--source` to what it names."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from sparsifiner_edge.camera.hide import (
    hide,
    secrets_of_address,
    secrets_of_pipeline,
    show_address,
    show_path,
    show_pipeline,
)
from sparsifiner_edge.camera.rtsp import parse_address
from sparsifiner_edge.errors import ArtifactError, ConfigError, MissingExtraError
from sparsifiner_edge.images import list_images

VIDEO_SUFFIXES = frozenset(
    {".264", ".avi", ".flv", ".h264", ".h265", ".hevc", ".ivf", ".m2ts", ".m4v", ".mjpeg", ".mjpg", ".mkv", ".mov"}
    | {".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm", ".wmv", ".y4m"}
)
KNOWN = "an image, a folder, a video file, 0 or /dev/video0, rtsp://..., gst:PIPELINE, or test"


class Source(NamedTuple):
    """Where frames come from.

    Attributes:
        kind: "images", "file", "rtsp", "gst" or "test".
        location: a path, an address, or a GStreamer pipeline.
        live: only the newest frame counts, and a loss is waited out; else every frame counts, and the end ends the run.
        shown: the location as it may be shown: without a password, and without all that may be one.
        secrets: what was left out, for messages of decoders, which know no such care; see `hide`.
    """

    kind: str
    location: str
    live: bool
    shown: str
    secrets: tuple[str, ...] = ()

    def hide(self, message: str) -> str:
        """A message about this source, without its secrets."""
        return hide(message, self.secrets)


def parse_source(text: str) -> Source:
    """Read a source; nothing is opened.

    Raises:
        ConfigError: an unknown scheme, an address that is none, or no pipeline after `gst:`.
    """
    if text == "test":
        return Source("test", "", True, "test")
    if text.isdecimal() or re.fullmatch(r"/dev/video\d+", text):
        device = f"/dev/video{text}" if text.isdecimal() else text
        # decodebin: a camera that gives JPEG is taken as well as one that gives pixels.
        return Source("gst", f"v4l2src device={device} ! decodebin", True, device)
    if text.startswith("gst:"):
        return _pipeline(text)
    scheme = re.match(r"\s*([A-Za-z][A-Za-z0-9+.-]*)(:/{0,2})", text)
    if scheme and scheme[1].lower() in ("rtsp", "rtsps"):
        return _camera(text)
    if scheme and scheme[2] == "://" and scheme[1].lower() != "file":
        raise ConfigError(f"{scheme[1]}:// is an unknown scheme.", f"Give {KNOWN}.")
    path = Path(unquote(text[len("file://") :], errors="surrogateescape") if scheme and scheme[2] == "://" else text)
    # os.path says no where a name is too long; the path itself would raise.
    if os.path.isfile(path) and path.suffix.lower() in VIDEO_SUFFIXES:  # noqa: PTH113
        return Source("file", str(path.absolute()), False, str(path))
    shown = str(path) if os.path.exists(path) else show_path(str(path))  # noqa: PTH110
    return Source("images", str(path), False, shown)


def require_other_file(path: Path, source: Source, bundle: Path) -> None:
    """Refuse an output that would overwrite what is read.

    Raises:
        ArtifactError: `path` is the source, one of its images, or lies in the bundle.
        ImageError: the source does not exist.
    """
    if bundle.is_dir() and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(bundle)):
        raise ArtifactError(f"{path} is in the bundle, which is left as it is.", "Give the output another place.")
    if source.kind not in ("file", "images") or not path.is_file():
        return
    if any(path.samefile(read) for read in list_images(Path(source.location))):
        what = "the source itself" if Path(source.location).is_file() else "one of the source's images"
        raise ArtifactError(f"{path} is {what}.", "Give the output another name.")


def require_decoder(source: Source) -> None:
    """Refuse a source whose decoder is not installed.

    Raises:
        MissingExtraError: PyAV is missing.
        ConfigError: GStreamer's tools are missing.
    """
    if source.kind in ("file", "rtsp") and importlib.util.find_spec("av") is None:
        raise MissingExtraError("av", "camera")
    if source.kind == "gst" and shutil.which("gst-launch-1.0") is None:
        raise ConfigError(
            f"{source.shown} needs GStreamer, and gst-launch-1.0 is not installed.",
            "Install it: apt-get install gstreamer1.0-tools gstreamer1.0-plugins-good",
        )


def _pipeline(text: str) -> Source:
    try:
        words = shlex.split(text[len("gst:") :])
    except ValueError as error:
        raise ConfigError(f"The pipeline cannot be read: {error}.", "Close every quote.") from error
    if not words:
        raise ConfigError("gst: names no pipeline.", 'Such as --source "gst:v4l2src device=/dev/video0 ! decodebin".')
    return Source("gst", shlex.join(words), True, f"gst:{show_pipeline(words)}", secrets_of_pipeline(words))


def _camera(text: str) -> Source:
    try:
        parse_address(text)
    except ValueError as error:
        raise ConfigError(
            f"The address of the camera cannot be read: {error}.",
            "Give rtsp://user:password@host:port/path, with @ / ? # % and : in user and password as %40 %2F %3F %23 "
            "%25 and %3A.",
        ) from None  # The text is in no traceback either.
    return Source("rtsp", text, True, show_address(text), secrets_of_address(text))
