"""From the text of `--source` to what it names."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from sparsifiner_edge.errors import ArtifactError, ConfigError, MissingExtraError
from sparsifiner_edge.pictures import list_pictures

VIDEO_SUFFIXES = frozenset(
    {".264", ".avi", ".flv", ".h264", ".h265", ".hevc", ".ivf", ".m2ts", ".m4v", ".mjpeg", ".mjpg", ".mkv", ".mov"}
    | {".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm", ".wmv", ".y4m"}
)
_PASSWORD = re.compile(r"(://[^\s/:@]*):\S*@")
_SECRET = re.compile(
    r"((?:pass(?:word|wd|phrase)?|pwd|token|user-pw|proxy-pw)=)(?:\"[^\"]*\"?|'[^']*'?|(?:\\.|[^\s&])+)", re.IGNORECASE
)
"""Of cameras' addresses and GStreamer's sources; also where a quote was left open."""
KNOWN = "a picture, a folder, a video file, 0 or /dev/video0, rtsp://..., gst:PIPELINE, or test"


class Source(NamedTuple):
    """Where frames come from.

    Attributes:
        kind: "pictures", "file", "rtsp", "gst" or "test".
        location: a path, an address, or a GStreamer pipeline.
        live: only the newest frame counts, and a loss is waited out; else every frame counts, and the end ends the run.
        shown: the location as it may be shown: without a password.
    """

    kind: str
    location: str
    live: bool
    shown: str


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
        return Source("gst", _pipeline(text), True, without_passwords(text))
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text)
    if scheme and scheme[1].lower() in ("rtsp", "rtsps"):
        return Source("rtsp", _address(text), True, without_passwords(text))
    if scheme and scheme[1].lower() != "file":
        raise ConfigError(f"{without_passwords(text)} has an unknown scheme.", f"Give {KNOWN}.")
    path = Path(unquote(text[len("file://") :], errors="surrogateescape") if scheme else text)
    if path.is_file() and path.suffix.lower() in VIDEO_SUFFIXES:
        return Source("file", str(path.absolute()), False, str(path))
    return Source("pictures", str(path), False, str(path))


def require_other_file(path: Path, source: Source, bundle: Path) -> None:
    """Refuse an output that would overwrite what is read.

    Raises:
        ArtifactError: `path` is the source, one of its pictures, or lies in the bundle.
        PictureError: the source does not exist.
    """
    if bundle.is_dir() and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(bundle)):
        raise ArtifactError(f"{path} is in the bundle, which is left as it is.", "Give the output another place.")
    if source.kind not in ("file", "pictures") or not path.is_file():
        return
    if any(path.samefile(read) for read in list_pictures(Path(source.location))):
        what = "the source itself" if Path(source.location).is_file() else "one of the source's pictures"
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


def _pipeline(text: str) -> str:
    try:
        words = shlex.split(text[len("gst:") :])
    except ValueError as error:
        raise ConfigError(f"{without_passwords(text)} is no pipeline: {error}.", "Close every quote.") from error
    if not words:
        raise ConfigError("gst: names no pipeline.", 'Such as --source "gst:v4l2src device=/dev/video0 ! decodebin".')
    return shlex.join(words)


def _address(text: str) -> str:
    try:
        urlsplit(text)
    except ValueError as error:
        raise ConfigError("The source's address cannot be read.", f"Give {KNOWN}.") from error
    return text


def without_passwords(text: str) -> str:
    """Addresses and pipelines in a text as they may be shown.

    Passwords hold any sign, also those that should have been escaped: up to the last @ of a word all is hidden.
    """
    return _SECRET.sub(r"\1***", _PASSWORD.sub(r"\1:***@", text))
