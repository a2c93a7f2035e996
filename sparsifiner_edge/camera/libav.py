"""Sources from video files and RTSP through PyAV (FFmpeg's libraries)."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, BinaryIO

import av
import av.filter
import numpy as np
from av.video.reformatter import VideoReformatter
from msgspec.structs import replace
from PIL import Image

from sparsifiner_edge.arrays import Pixels
from sparsifiner_edge.camera.decoder_protocol import Frame, Wanted, frame_of
from sparsifiner_edge.fitting import BARS, Framing

# Containers of one video: no playlists, because they name other files and addresses, and no images.
_FORMATS = "avi,mov,mp4,matroska,webm,mpegts,mpeg,mpegvideo,h264,hevc,ivf,flv,ogg,asf,m4v,mjpeg,yuv4mpegpipe"
_FILE = {"protocol_whitelist": "none", "format_whitelist": _FORMATS}
_STREAM = {
    "protocol_whitelist": "rtsp,tcp,tls",
    "rtsp_transport": "tcp",  # No packet loss, and works through routers.
    "fflags": "nobuffer",
    "flags": "low_delay",
    "analyzeduration": "500000",
}
_CHUNK = 1 << 18
"""Size of the read buffer in bytes."""
MAX_PIXELS = 40_000_000
"""Largest frame in pixels; 8K has 33 million. The decoder enforces it before it allocates memory."""
MAX_ASPECT = 16
"""Largest ratio of the sides of a frame."""
_JUMP_NS = 5_000_000_000
"""Change of the clock offset, in nanoseconds, from which on the camera's clock counts as set anew."""
_DRIFT = 2_000
"""Clocks may drift apart by one part in this many (30 ms a minute)."""
_BEHIND_S = 0.3
"""Delay in seconds above which a live stream decodes key frames only."""
_CAUGHT_UP_S = 0.1
"""Delay in seconds below which it decodes all frames again."""


def require_size(width: int, height: int) -> None:
    """Refuse frames of a size that no camera has.

    Raises:
        ValueError: A frame is empty, has more than `MAX_PIXELS` pixels, or an aspect ratio above `MAX_ASPECT`.
    """
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise ValueError(f"frames of {width} x {height} px; at most {MAX_PIXELS} px are supported")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"frames of {width} x {height} px; aspect ratios up to {MAX_ASPECT}:1 are supported")


class _Fitter:
    """Crop (without a copy), resize and convert frames to RGB in one FFmpeg graph, rebuilt when the format changes.

    The flag `full_chroma_int` resizes colours as finely as brightness, as Pillow does for images.
    """

    def __init__(self, framing: Framing) -> None:
        self._framing = framing
        self._of: tuple[int, int, str] | None = None
        self._graph: Any = None

    def pixels(self, frame: Any) -> Pixels:
        """Return the input of the model, uint8 RGB [H,W,3], for a decoded frame."""
        fitting = self._framing.of(frame.width, frame.height)
        (x, y, across, down), (column, row, width, height) = fitting.box, fitting.inner
        if self._of != (frame.width, frame.height, frame.format.name):
            self._of, self._graph = (frame.width, frame.height, frame.format.name), av.filter.Graph()
            size = {"width": frame.width, "height": frame.height, "format": frame.format}
            self._graph.link_nodes(
                self._graph.add_buffer(**size, time_base=frame.time_base or Fraction(1, 1000)),
                self._graph.add("crop", f"{across}:{down}:{x}:{y}:exact=1"),
                self._graph.add("scale", f"{width}:{height}:flags=bicubic+full_chroma_int"),
                self._graph.add("format", "pix_fmts=rgb24"),
                self._graph.add("buffersink"),
            ).configure()
        self._graph.push(frame)
        scaled: Pixels = self._graph.pull().to_ndarray()
        if (width, height) == fitting.size:
            return scaled
        pixels = np.full((*fitting.size[::-1], 3), BARS, np.uint8)
        pixels[row : row + height, column : column + width] = scaled
        return pixels


def read_stream(source: BinaryIO | str, wanted: Wanted, patience_s: float) -> Iterator[Frame]:
    """Yield frames until the source ends.

    Args:
        source: Open file of a video, so that no path has to be opened later; or the address of an RTSP stream with user
            and password, which FFmpeg uses for Basic or Digest authentication.
        wanted: Requested form of each frame.
        patience_s: Seconds to wait for a stream to open, and between its packets.

    Raises:
        av.FFmpegError: The source cannot be opened, or was lost.
        OSError: The source cannot be opened, or was lost.
        ValueError: The source contains no video, or one that is not supported.
        ConfigError: The frames do not contain the region.
    """
    live = isinstance(source, str)
    limits = {"max_pixels": str(MAX_PIXELS), "max_streams": "64"} | (_STREAM if live else _FILE)
    # PyAV before 19 needs this option to accept metadata that is not valid text; later versions do not have it.
    old = int(av.__version__.partition(".")[0]) < 19
    opened = functools.partial(av.open, metadata_errors="replace") if old else av.open
    with opened(source, "r", options=limits, timeout=(patience_s, patience_s), buffer_size=_CHUNK) as container:
        if not container.streams.video:
            raise ValueError("it contains no video")
        stream = container.streams.video[0]
        stream.codec_context.thread_type = "SLICE"  # Frame threading would delay frames.
        reader = _Reader(stream, wanted, live)
        for packet in container.demux(stream):
            yield from reader.frames(packet)
        if reader.count == 0:
            raise ValueError(f"it contains no frame that can be decoded ({reader.bad} damaged packets)")


class _StreamClock:
    """Estimate of when a frame was captured, on this machine's monotonic clock in nanoseconds.

    The timestamps of a stream run on the camera's clock. Its offset from this machine's clock is estimated as the
    smallest one seen, which is relaxed as slowly as clocks drift apart. Any offset above it is delay in the network or
    in a backlog, and is part of the age of the frame.
    """

    def __init__(self) -> None:
        self._least: int | None = None
        self._last_ns = 0

    def capture_ns(self, stamp_ns: int | None, arrived_ns: int) -> int:
        """Return the capture time of a frame from its timestamp and arrival time; never after its arrival."""
        if stamp_ns is None:
            return arrived_ns
        offset = arrived_ns - stamp_ns
        if self._least is None or abs(offset - self._least) > _JUMP_NS:
            self._least = offset
        self._least = min(offset, self._least + (arrived_ns - self._last_ns) // _DRIFT)
        self._last_ns = arrived_ns
        return stamp_ns + self._least


class _Reader:
    """Decoder of packets that remembers the arrival times, since frames come out later and in another order."""

    def __init__(self, stream: Any, wanted: Wanted, live: bool) -> None:
        self._stream, self._wanted, self._live = stream, wanted, live
        self._clock = _StreamClock()
        self._fitter, self._scaler = _Fitter(wanted.framing), VideoReformatter()
        self._decoder = f"{stream.codec_context.codec.name} of FFmpeg, software"[:100]
        self._arrived: dict[int | None, int] = {}
        self.bad, self.count = 0, 0

    def frames(self, packet: Any) -> Iterator[Frame]:
        """Yield the frames that a packet completes."""
        arrived = time.monotonic_ns()
        self._arrived[packet.pts] = arrived
        while len(self._arrived) > 64:
            del self._arrived[next(iter(self._arrived))]
        try:
            decoded = packet.decode()
        except av.error.InvalidDataError:  # A damaged packet; decoding recovers at the next key frame.
            self.bad += 1
            return
        for frame in decoded:
            yield self._ready(frame, self._arrived.get(frame.pts, arrived) if self._live else arrived)
            arrived = time.monotonic_ns()  # The next frame of a file is taken up only when this one was accepted.

    def _ready(self, frame: Any, arrived: int) -> Frame:
        """Check, time and resize a decoded frame."""
        at, wanted = time.monotonic_ns(), self._wanted
        require_size(frame.width, frame.height)
        stamp = None if frame.pts is None else int(frame.pts * frame.time_base * 1_000_000_000)
        if stamp is not None and abs(stamp) >= 1 << 63:  # Outside the range of a clock: the file is damaged.
            stamp = None
        captured = self._clock.capture_ns(stamp, arrived) if self._live else arrived
        self._keep_up((at - captured) / 1e9)
        self.count += 1
        times, more = (captured, arrived, at), (None if stamp is None else stamp / 1e9, self.bad)
        if wanted.view:
            whole = Image.fromarray(self._scaler.reformat(frame, format="rgb24").to_ndarray())
            return replace(frame_of(whole, wanted, times, *more), decoder=self._decoder)
        pixels = np.ascontiguousarray(self._fitter.pixels(frame))
        return Frame(pixels.data, frame.width, frame.height, *times, time.monotonic_ns(), *more, decoder=self._decoder)

    def _keep_up(self, behind_s: float) -> None:
        """Decode key frames only while the processor is too slow for the stream."""
        if self._live and (behind_s > _BEHIND_S or behind_s < _CAUGHT_UP_S):
            self._stream.codec_context.skip_frame = "NONKEY" if behind_s > _BEHIND_S else "DEFAULT"
