"""Video files and RTSP through PyAV (FFmpeg's libraries)."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from sparsifiner_edge.arrays import Pixels
from sparsifiner_edge.camera.decoder_protocol import FrameHeader
from sparsifiner_edge.camera.prepare import Fit, cropped, display_size, scaled_size

# Containers that hold one video: no playlists, which name other files and addresses, and no images.
_FORMATS = "avi,mov,mp4,matroska,webm,mpegts,mpeg,mpegvideo,h264,hevc,ivf,flv,ogg,asf,m4v,mjpeg,yuv4mpegpipe"
_FILE = {"protocol_whitelist": "none", "format_whitelist": _FORMATS}
_STREAM = {
    "protocol_whitelist": "rtsp,tcp",  # TLS is the relay's.
    "rtsp_transport": "tcp",  # Loses nothing, and passes routers.
    "fflags": "nobuffer",
    "flags": "low_delay",
    "analyzeduration": "500000",
}
_CHUNK = 1 << 18
MAX_PIXELS = 40_000_000
"""Of one frame: 8K is 33 million. Told to the decoder, which refuses more before it allocates."""
MAX_ASPECT = 16
_WINDOW_NS, _JUMP_NS = 30_000_000_000, 5_000_000_000
_BEHIND_S, _CAUGHT_UP_S = 0.3, 0.1
_MAX_BAD_PACKETS = 1000


class Decoded(NamedTuple):
    """A frame, ready for the model.

    Attributes:
        images: see `decoder_protocol.DecoderMessage`.
        header: its times.
    """

    images: tuple[Pixels, ...]
    header: FrameHeader


def require_sane_size(width: int, height: int) -> None:
    """Refuse a frame that no camera gives.

    Raises:
        ValueError: empty, above `MAX_PIXELS`, or more than `MAX_ASPECT` times longer than wide.
    """
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise ValueError(f"frames of {width} x {height} px; at most {MAX_PIXELS} px are taken")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"frames of {width} x {height} px, longer than {MAX_ASPECT} times their width")


def read_stream(source: BinaryIO | str, fit: Fit, patience_s: float) -> Iterator[Decoded]:
    """Frames until the source ends.

    Args:
        source: a video's open file, so that no path need be opened any more; or the address of an RTSP stream.
        fit: what the model takes.
        patience_s: for a stream to be opened, and between its packets.

    Raises:
        av.FFmpegError, OSError, ValueError: it cannot be opened, was lost, or is no video that can be taken.
    """
    import av

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
        reader = _Reader(stream, fit, live)
        for packet in container.demux(stream):
            yield from reader.frames(packet)
        if reader.count == 0:
            raise ValueError(f"it holds no frame that can be decoded ({reader.bad} damaged packets)")


class StreamClock:
    """When a frame was taken, in nanoseconds of this machine's monotonic clock.

    A stream's timestamps run on the camera's clock. Their offset from this machine's is the least seen within a minute:
    whatever is above it is delay, in the network or in a backlog, and is part of the frame's age.
    """

    def __init__(self) -> None:
        self._began = 0
        self._least: list[int] = []

    def captured_ns(self, stamp_ns: int | None, arrived_ns: int) -> int:
        """When the frame that arrived at `arrived_ns` was taken, by the least delay seen; never after its arrival."""
        if stamp_ns is None:
            return arrived_ns
        offset = arrived_ns - stamp_ns
        if not self._least or abs(offset - self._least[-1]) > _JUMP_NS:  # A camera's clock was set.
            self._least, self._began = [offset], arrived_ns
        elif arrived_ns - self._began > _WINDOW_NS:
            # Two windows: the older one forgets, so that clocks that run apart add nothing to the age.
            self._least, self._began = [*self._least[-1:], offset], arrived_ns
        else:
            self._least[-1] = min(self._least[-1], offset)
        return min(arrived_ns, stamp_ns + min(self._least))


class _Reader:
    """Decodes packets; remembers when each arrived, since a decoder gives frames back later and in another order."""

    def __init__(self, stream: Any, fit: Fit, live: bool) -> None:
        from av.video.reformatter import VideoReformatter

        self._stream, self._fit, self._live = stream, fit, live
        self._clock = StreamClock()
        self._model_scaler: Any = VideoReformatter()  # Two, since each keeps what it needs between frames.
        self._display_scaler: Any = VideoReformatter()
        self._arrived: dict[int | None, int] = {}
        self.bad, self.count = 0, 0

    def frames(self, packet: Any) -> Iterator[Decoded]:
        import av

        arrived = time.monotonic_ns()
        self._arrived[packet.pts] = arrived
        while len(self._arrived) > 64:
            del self._arrived[next(iter(self._arrived))]
        try:
            decoded = packet.decode()
        except av.error.InvalidDataError as error:  # A damaged packet; the next key frame repairs.
            self.bad += 1
            if self.bad > _MAX_BAD_PACKETS and not self._live:
                raise ValueError(f"more than {_MAX_BAD_PACKETS} damaged packets") from error
            return
        for frame in decoded:
            yield self._ready(frame, self._arrived.get(frame.pts, arrived))

    def _ready(self, frame: Any, arrived: int) -> Decoded:
        at = time.monotonic_ns()
        stamp = None if frame.pts is None else int(frame.pts * frame.time_base * 1_000_000_000)
        if stamp is not None and abs(stamp) >= 1 << 63:  # Of a damaged file; no clock goes there.
            stamp = None
        captured = self._clock.captured_ns(stamp, arrived) if self._live else arrived
        self._keep_up((at - captured) / 1e9)
        images = self._resized(frame)
        self.count += 1
        pts_s = None if stamp is None else stamp / 1e9
        return Decoded(images, FrameHeader(captured, arrived, at, time.monotonic_ns(), pts_s, self.bad))

    def _resized(self, frame: Any) -> tuple[Pixels, ...]:
        """The model's input, and the frame for the overlay if one is asked for."""
        require_sane_size(frame.width, frame.height)
        width, height = scaled_size(frame.width, frame.height, self._fit.size)
        scaled = self._model_scaler.reformat(frame, width, height, "rgb24", interpolation="BICUBIC").to_ndarray()
        image = cropped(scaled, self._fit.size)
        if not self._fit.display:
            return (image,)
        width, height = display_size(frame.width, frame.height, self._fit.display)
        display = self._display_scaler.reformat(frame, width, height, "rgb24", interpolation="BILINEAR")
        return image, display.to_ndarray()

    def _keep_up(self, behind_s: float) -> None:
        """A processor too slow for the stream decodes key frames alone until it has caught up."""
        if self._live and behind_s > _BEHIND_S:
            self._stream.codec_context.skip_frame = "NONKEY"
        elif self._live and behind_s < _CAUGHT_UP_S:
            self._stream.codec_context.skip_frame = "DEFAULT"
