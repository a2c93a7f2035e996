"""From the text of `--source` to what it names, and what of it may be shown."""

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
"""Bytes of a file that holds a source."""
_TEST_FPS = "25"
_ADDRESS = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?:[^/?#]*@)?"
    r"(?P<place>(?P<host>\[[0-9a-f:.%\w]+\]|[^\s:@/?#\[\]\"'<>]+)(?::(?P<port>[0-9]{1,5}))?)(?:[/?#][^@]*)?",
    re.IGNORECASE,
)
"""What is before the last @ of user, password and host is user and password; an @ behind them may be another's part."""
_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"']*")
OF_ADDRESS = "protocols=tcp+tls tls-validation-flags=0 latency=0 ! application/x-rtp,media=video ! decodebin"
"""Of a pipeline that is made of an address, what follows it. A camera's certificate is its own, as for FFmpeg."""
_ELEMENT = re.compile(r"[a-z][a-z0-9_-]*")


class Source(NamedTuple):
    """Where frames come from.

    Attributes:
        kind: "images", "file", "rtsp", "gst" or "test".
        location: a path, an address, a GStreamer pipeline, or the test pattern's frames per second.
        live: only the newest frame counts, and a loss is waited out; else every frame counts, and the end ends the run.
        shown: what may be shown of it; see `shown_address`.
    """

    kind: str
    location: str
    live: bool
    shown: str

    def clean(self, message: str) -> str:
        """A decoder's message about this source, without what `text.printable` leaves out."""
        words = shlex.split(self.location) if self.kind == "gst" else [self.location]
        known = f"{self.shown} rtspsrc {OF_ADDRESS}" if self.location.endswith(OF_ADDRESS) else self.shown
        secrets = {part for word in words for part in (word, word.partition("=")[2]) if part not in known}
        for secret in sorted(secrets, key=len, reverse=True):
            message = message.replace(secret, "***") if len(secret) > 2 else message
        return _IN_TEXT.sub(lambda match: shown_address(match[0]), message)


def shown_address(text: str) -> str:
    """Of an address its scheme, host and port, and no more: all the rest may be a password, or a key."""
    match = _ADDRESS.fullmatch(text)
    return f"{match['scheme']}://{match['place']}" if match else text.partition("://")[0] + "://***"


def place_of(address: str) -> tuple[str, int]:
    """Host and port of an RTSP address.

    Raises:
        ConfigError: it is not one. The message quotes nothing of it.
    """
    match = _ADDRESS.fullmatch(address)
    port = int((match and match["port"]) or (322 if address[:5].lower() == "rtsps" else 554))
    if match is None or not address.isprintable() or not 0 < port < 1 << 16:
        raise ConfigError(
            "The address of the camera cannot be read.",
            "Give rtsp://user:password@host:port/path, with @ / ? # % and : in user and password as %40 %2F %3F %23 "
            "%25 and %3A, and @ behind the host as %40.",
        )
    return match["host"].strip("[]"), port


def parse_source(text: str) -> Source:
    """Read a source; nothing is opened but the file of `@FILE`, whose first line is read in its place.

    Raises:
        ConfigError: an unknown scheme, an invalid address, or no pipeline after `gst:`.
        ArtifactError: FILE cannot be read.
    """
    if text.startswith("@"):  # A command line is seen by every user of the machine.
        lines = read_bytes(Path(text[1:]), _MAX_SOURCE).decode(errors="surrogateescape").splitlines()
        if not lines or not lines[0].strip():
            raise ConfigError(f"{text[1:]} names no source in its first line.", "Write one there.")
        text = lines[0]
    if rate := re.fullmatch(r"test(?::([1-9][0-9]{0,2}))?", text):
        return Source("test", rate[1] or _TEST_FPS, True, "test")
    if text.isdecimal() or re.fullmatch(r"/dev/video\d+", text):
        device = f"/dev/video{text}" if text.isdecimal() else text
        # decodebin: a camera that gives JPEG is taken as well as one that gives pixels.
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
    # os.path says no where a name is too long; the path itself would raise.
    if os.path.isfile(path) and path.suffix.lower() in VIDEO_SUFFIXES:  # noqa: PTH113
        return Source("file", str(path.absolute()), False, str(path))
    # What is not there may be a mistyped address.
    shown = str(path) if os.path.exists(path) else re.sub(r".*@|[?#=].*", "***", str(path))  # noqa: PTH110
    return Source("images", str(path), False, shown)


def require_other_file(path: Path, source: Source, bundle: Path) -> None:
    """Refuse an output that would overwrite what is read.

    Raises:
        ArtifactError: `path` is the source or one of its images, or lies in the bundle.
    """
    if bundle.is_dir() and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(bundle)):
        raise ArtifactError(f"{path} is in the bundle, which is left as it is.", "Give the output another place.")
    if source.kind in ("file", "images") and path.is_file() and os.path.exists(source.location):  # noqa: PTH110
        for read in list_images(Path(source.location)):
            if path.samefile(read):
                what = f"{path} is what is read: the source, or one of its images."
                raise ArtifactError(what, "Give the output another name.")


def require_decoder(source: Source, overlay: bool = False) -> None:
    """Refuse a source whose decoder, or with an overlay an encoder, is not installed.

    Raises:
        MissingExtraError: PyAV is missing.
        ConfigError: GStreamer's tools are missing.
    """
    if (overlay or source.kind in ("file", "rtsp")) and importlib.util.find_spec("av") is None:
        raise MissingExtraError("av", "camera")
    if source.kind == "gst" and shutil.which("gst-launch-1.0") is None:
        what = f"{source.shown} needs GStreamer, and gst-launch-1.0 is not installed."
        raise ConfigError(what, "Install it: apt-get install gstreamer1.0-tools gstreamer1.0-plugins-good")


def _pipeline(text: str) -> Source:
    """Of a pipeline only the names of its elements are shown: each stands first, or behind a link. An address alone
    becomes one.
    """
    try:
        words = shlex.split(text[len("gst:") :])
    except ValueError as error:
        raise ConfigError(f"The pipeline cannot be read: {error}.", "Close every quote.") from error
    if not words:
        raise ConfigError("gst: names no pipeline.", 'Such as --source "gst:v4l2src device=/dev/video0 ! decodebin".')
    if len(words) == 1 and re.match(r"rtsps?://", words[0], re.IGNORECASE):
        place_of(words[0])
        line = f"rtspsrc {shlex.quote(f'location={words[0]}')} {OF_ADDRESS}"
        return Source("gst", line, True, shown_address(words[0]))
    names = [word for before, word in zip(["!", *words], words, strict=False) if before == "!"]
    shown = " ! ".join(name if _ELEMENT.fullmatch(name) else "***" for name in names)
    return Source("gst", shlex.join(words), True, f"gst:{shown}")
