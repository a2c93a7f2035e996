"""Parsing of `--source`, and which parts of a source may be shown."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

from sparsifiner_edge.errors import ArtifactError, ConfigError, MissingExtraError
from sparsifiner_edge.files import read_bytes
from sparsifiner_edge.images import list_images

VIDEO_SUFFIXES = frozenset(
    {".264", ".avi", ".flv", ".h264", ".h265", ".hevc", ".ivf", ".m2ts", ".m4v", ".mjpeg", ".mjpg", ".mkv", ".mov"}
    | {".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm", ".wmv", ".y4m"}
)
KNOWN = "an image, a folder, a video file, 0 or /dev/video0, rtsp://..., gst:rtsp://..., gst:PIPELINE, test, or @FILE"
_MAX_SOURCE = 1 << 16
"""Most bytes that are read of the file in `@FILE`."""
_TEST_FPS = "25"
"""Frames per second of the test pattern."""
_ADDRESS = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?:[^/?#]*@)?"
    r"(?P<place>(?P<host>\[[0-9a-f:.%\w]+\]|[^\s:@/?#\[\]\"'<>]+)(?::(?P<port>[0-9]{1,5}))?)(?:[/?#][^@]*)?",
    re.IGNORECASE,
)
"""An address. User and password end at the last @ before the host.

An @ after the host is rejected, because it may belong to a password that is not escaped.
"""
_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"']*")
"""An address within a message."""
OF_ADDRESS = "protocols=tcp+tls tls-validation-flags=0 latency=0 ! application/x-rtp,media=video ! decodebin"
"""Rest of the pipeline for an RTSP address. It accepts the self-signed certificates of cameras, as FFmpeg does."""
_ELEMENT = re.compile(r"[a-z][a-z0-9_-]*")


class Source(NamedTuple):
    """Source of frames.

    Attributes:
        kind: "images", "file", "rtsp", "gst" or "test".
        location: Path, address, GStreamer pipeline, or frames per second of the test pattern.
        live: True: only the newest frame counts, and a lost source is opened again. False: every frame counts, and the
            run ends with the source.
        shown: Form of the source without secrets; see `shown_address`.
    """

    kind: str
    location: str
    live: bool
    shown: str

    def clean(self, message: str) -> str:
        """Return a decoder's message about this source without secrets. It is still to be made printable."""
        words = shlex.split(self.location) if self.kind == "gst" else [self.location]
        known = f"{self.shown} rtspsrc {OF_ADDRESS}" if self.location.endswith(OF_ADDRESS) else self.shown
        secrets = {part for word in words for part in (word, word.partition("=")[2]) if part not in known}
        for secret in sorted(secrets, key=len, reverse=True):
            message = message.replace(secret, "***") if len(secret) > 2 else message
        return _IN_TEXT.sub(lambda match: shown_address(match[0]), message)


def shown_address(text: str) -> str:
    """Return scheme, host and port of an address. Everything else may be a password or a key."""
    match = _ADDRESS.fullmatch(text)
    return f"{match['scheme']}://{match['place']}" if match else text.partition("://")[0] + "://***"


def place_of(address: str) -> tuple[str, int]:
    """Return host and port of an RTSP address.

    Raises:
        ConfigError: The address is invalid. The message does not quote it.
    """
    match = _ADDRESS.fullmatch(address)
    port = int((match and match["port"]) or (322 if address[:5].lower() == "rtsps" else 554))
    if match is None or not address.isprintable() or not 0 < port < 1 << 16:
        raise ConfigError(
            "The address of the camera is invalid.",
            "Give rtsp://user:password@host:port/path, with @ / ? # % and : in user and password as %40 %2F %3F %23 "
            "%25 and %3A, and @ after the host as %40.",
        )
    return match["host"].strip("[]"), port


def parse_source(text: str) -> Source:
    """Parse a source. Opens nothing but the file of `@FILE`, whose first line is the source.

    Raises:
        ConfigError: The scheme is unknown, the address is invalid, or there is no pipeline after `gst:`.
        ArtifactError: FILE cannot be read.
    """
    if text.startswith("@"):  # Keeps passwords off the command line, which every user of the machine can read.
        lines = read_bytes(Path(text[1:]), _MAX_SOURCE).decode(errors="surrogateescape").splitlines()
        if not lines or not lines[0].strip():
            raise ConfigError(f"{text[1:]} has no source in its first line.", "Write a source into that line.")
        text = lines[0]
    if rate := re.fullmatch(r"test(?::([1-9][0-9]{0,2}))?", text):
        return Source("test", rate[1] or _TEST_FPS, True, "test")
    if text.isdecimal() or re.fullmatch(r"/dev/video\d+", text):
        device = f"/dev/video{text}" if text.isdecimal() else text
        # decodebin accepts cameras that output JPEG as well as raw pixels.
        return Source("gst", f"v4l2src device={device} ! decodebin", True, device)
    if text.startswith("gst:"):
        return _pipeline(text)
    scheme = re.match(r"\s*([A-Za-z][A-Za-z0-9+.-]*)(:/{0,2})", text)
    if scheme and scheme[1].lower() in ("rtsp", "rtsps"):
        place_of(text)
        return Source("rtsp", text, True, shown_address(text))
    if scheme and scheme[2] == "://":
        raise ConfigError(f"{scheme[1]}:// is an unknown scheme.", f"Give {KNOWN}.")
    path = Path(text)
    # os.path returns False for a name that is too long; pathlib would raise.
    if os.path.isfile(path) and path.suffix.lower() in VIDEO_SUFFIXES:  # noqa: PTH113
        return Source("file", str(path.absolute()), False, str(path))
    # A path that does not exist may be a mistyped address, which may contain a password.
    shown = str(path) if os.path.exists(path) else re.sub(r".*@|[?#=].*", "***", str(path))  # noqa: PTH110
    return Source("images", str(path), False, shown)


def require_other_file(path: Path, source: Source, bundle: Path) -> None:
    """Refuse an output that would overwrite an input.

    Raises:
        ArtifactError: `path` is the source or one of its images, or lies in the bundle.
    """
    if bundle.is_dir() and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(bundle)):
        raise ArtifactError(f"{path} is in the bundle, which must not change.", "Choose another place for the output.")
    if source.kind in ("file", "images") and path.is_file() and os.path.exists(source.location):  # noqa: PTH110
        for image in list_images(Path(source.location)):
            if path.samefile(image):
                what = f"{path} is an input: the source, or one of its images."
                raise ArtifactError(what, "Give the output another name.")


def require_decoder(source: Source, overlay: bool = False) -> None:
    """Refuse a source whose decoder is not installed, or an overlay if its encoder is not.

    Raises:
        MissingExtraError: PyAV is missing.
        ConfigError: GStreamer's tools are missing.
    """
    if (overlay or source.kind in ("file", "rtsp")) and importlib.util.find_spec("av") is None:
        raise MissingExtraError("av", "camera")
    if source.kind == "gst" and shutil.which("gst-launch-1.0") is None:
        what = f"{source.shown} needs GStreamer, but gst-launch-1.0 is not installed."
        raise ConfigError(what, "Install it: apt-get install gstreamer1.0-tools gstreamer1.0-plugins-good")


def _pipeline(text: str) -> Source:
    """Parse a GStreamer pipeline, or make one for an address.

    Only the names of its elements are shown: the first word, and each word after a link.
    """
    try:
        words = shlex.split(text[len("gst:") :])
    except ValueError as error:
        raise ConfigError(f"The pipeline cannot be read: {error}.", "Close every quote.") from error
    if not words:
        fix = 'Give a pipeline after it, such as --source "gst:v4l2src device=/dev/video0 ! decodebin".'
        raise ConfigError("gst: has no pipeline.", fix)
    if len(words) == 1 and re.match(r"rtsps?://", words[0], re.IGNORECASE):
        place_of(words[0])
        line = f"rtspsrc {shlex.quote(f'location={words[0]}')} {OF_ADDRESS}"
        return Source("gst", line, True, shown_address(words[0]))
    names = [word for before, word in zip(["!", *words], words, strict=False) if before == "!"]
    shown = " ! ".join(name if _ELEMENT.fullmatch(name) else "***" for name in names)
    return Source("gst", shlex.join(words), True, f"gst:{shown}")
