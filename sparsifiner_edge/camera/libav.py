"""Video files and RTSP through PyAV (FFmpeg's libraries)."""

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

# Containers that hold one video: no playlists, which name other files and addresses, and no images.
_FORMATS = "avi,mov,mp4,matroska,webm,mpegts,mpeg,mpegvideo,h264,hevc,ivf,flv,ogg,asf,m4v,mjpeg,yuv4mpegpipe"
_FILE = {"protocol_whitelist": "none", "format_whitelist": _FORMATS}
_STREAM = {
    "protocol_whitelist": "rtsp,tcp,tls",
    "rtsp_transport": "tcp",  # Loses nothing, and passes routers.
    "fflags": "nobuffer",
    "flags": "low_delay",
    "analyzeduration": "500000",
}
_CHUNK = 1 << 18
MAX_PIXELS = 40_000_000
"""Of one frame: 8K is 33 million. Told to the decoder, which refuses more before it allocates."""
MAX_ASPECT = 16
_JUMP_NS, _DRIFT = 5_000_000_000, 2_000
"""A camera's clock that was set; and clocks that drift apart by one part in this many."""
_BEHIND_S, _CAUGHT_UP_S = 0.3, 0.1


def require_size(width: int, height: int) -> None:
    """Refuse what no camera gives.

    Raises:
        ValueError: a frame is empty, above `MAX_PIXELS`, or `MAX_ASPECT` times longer than wide.
    """
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise ValueError(f"frames of {width} x {height} px; at most {MAX_PIXELS} px are taken")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"frames of {width} x {height} px, longer than {MAX_ASPECT} times their width")


class _Fitter:
    """Crops (without a copy), resizes and colours frames in one pass of FFmpeg, made anew where frames change.

    `full_chroma_int`: colours are resized as finely as brightness, as Pillow does it for images.
    """

    def __init__(self, framing: Framing) -> None:
        self._framing = framing
        self._of: tuple[int, int, str] | None = None
        self._graph: Any = None

    def pixels(self, frame: Any) -> Pixels:
        """The model's input, uint8 [H,W,3], of a decoded frame."""
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
    """Frames until the source ends.

    Args:
        source: a video's open file, so that no path need be opened any more; or the address of an RTSP stream, with
            user and password, which FFmpeg proves (Basic, Digest).
        wanted: of each frame.
        patience_s: for a stream to be opened, and between its packets.

    Raises:
        av.FFmpegError, OSError, ValueError: it cannot be opened, was lost, or is no video that can be taken.
        ConfigError: the region is not within its frames.
    """
    live = isinstance(source, str)
    limits = {"max_pixels": str(MAX_PIXELS), "max_streams": "64"} | (_STREAM if live else _FILE)
    # PyAV before 19 raises an error for metadata that are no text, unless told; later ones know no such option.
    old = int(av.__version__.partition(".")[0]) < 19
    opened = functools.partial(av.open, metadata_errors="replace") if old else av.open
    with opened(source, "r", options=limits, timeout=(patience_s, patience_s), buffer_size=_CHUNK) as container:
        if not container.streams.video:
            raise ValueError("it holds no video")
        stream = container.streams.video[0]
        stream.codec_context.thread_type = "SLICE"  # Threads by frame would hold frames back.
        reader = _Reader(stream, wanted, live)
        for packet in container.demux(stream):
            yield from reader.frames(packet)
        if reader.count == 0:
            raise ValueError(f"it holds no frame that can be decoded ({reader.bad} damaged packets)")


class _StreamClock:
    """When a frame was taken, in nanoseconds of this machine's monotonic clock.

    A stream's timestamps run on the camera's clock. Their offset from this machine's is the least seen, which forgets
    as slowly as clocks run apart: whatever is above it is delay, in the network or in a backlog, and is part of the
    frame's age.
    """

    def __init__(self) -> None:
        self._least: int | None = None
        self._last_ns = 0

    def capture_ns(self, stamp_ns: int | None, arrived_ns: int) -> int:
        """When the frame that arrived at `arrived_ns` was taken, by the least delay seen; never after its arrival."""
        if stamp_ns is None:
            return arrived_ns
        offset = arrived_ns - stamp_ns
        if self._least is None or abs(offset - self._least) > _JUMP_NS:
            self._least = offset
        self._least = min(offset, self._least + (arrived_ns - self._last_ns) // _DRIFT)
        self._last_ns = arrived_ns
        return stamp_ns + self._least


class _Reader:
    """Decodes packets; remembers when each arrived, since a decoder gives frames back later and in another order."""

    def __init__(self, stream: Any, wanted: Wanted, live: bool) -> None:
        self._stream, self._wanted, self._live = stream, wanted, live
        self._clock = _StreamClock()
        self._fitter, self._scaler = _Fitter(wanted.framing), VideoReformatter()
        self._decoder = f"{stream.codec_context.codec.name} of FFmpeg, software"[:100]
        self._arrived: dict[int | None, int] = {}
        self.bad, self.count = 0, 0

    def frames(self, packet: Any) -> Iterator[Frame]:
        arrived = time.monotonic_ns()
        self._arrived[packet.pts] = arrived
        while len(self._arrived) > 64:
            del self._arrived[next(iter(self._arrived))]
        try:
            decoded = packet.decode()
        except av.error.InvalidDataError:  # A damaged packet; the next key frame repairs.
            self.bad += 1
            return
        for frame in decoded:
            yield self._ready(frame, self._arrived.get(frame.pts, arrived) if self._live else arrived)
            arrived = time.monotonic_ns()  # A file's frames are taken up one by one, as soon as there is room for them.

    def _ready(self, frame: Any, arrived: int) -> Frame:
        at, wanted = time.monotonic_ns(), self._wanted
        require_size(frame.width, frame.height)
        stamp = None if frame.pts is None else int(frame.pts * frame.time_base * 1_000_000_000)
        if stamp is not None and abs(stamp) >= 1 << 63:  # Of a damaged file; no clock goes there.
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
        """A processor too slow for the stream decodes key frames alone until it has caught up."""
        if self._live and (behind_s > _BEHIND_S or behind_s < _CAUGHT_UP_S):
            self._stream.codec_context.skip_frame = "NONKEY" if behind_s > _BEHIND_S else "DEFAULT"
