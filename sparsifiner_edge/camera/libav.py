"""Video files and RTSP through PyAV (FFmpeg's libraries)."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from sparsifiner_edge.arrays import Pixels
from sparsifiner_edge.camera.clock import StreamClock
from sparsifiner_edge.camera.limits import MAX_PIXELS, require_sane_size
from sparsifiner_edge.camera.prepare import Fit, display_size, scaled_size, to_square
from sparsifiner_edge.camera.wire import FrameHeader

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
_BEHIND_S, _CAUGHT_UP_S = 0.3, 0.1
_MAX_BAD_PACKETS = 1000


class Decoded(NamedTuple):
    """A frame, ready for the model.

    Attributes:
        images: see `wire.Message`.
        header: its times.
    """

    images: tuple[Pixels, ...]
    header: FrameHeader


class Preparer:
    """Resizes frames and keeps FFmpeg's scalers between them."""

    def __init__(self, fit: Fit) -> None:
        from av.video.reformatter import VideoReformatter

        self._fit = fit
        self._model: Any = VideoReformatter()
        self._display: Any = VideoReformatter()

    def __call__(self, frame: Any) -> tuple[Pixels, ...]:
        """The model's input, and the frame for the overlay if one is asked for.

        Raises:
            ValueError: the frame's size is absurd.
        """
        require_sane_size(frame.width, frame.height)
        width, height = scaled_size(frame.width, frame.height, self._fit)
        scaled: Pixels = self._model.reformat(frame, width, height, "rgb24", interpolation="BICUBIC").to_ndarray()
        square = to_square(scaled, self._fit.size)
        if not self._fit.display:
            return (square,)
        width, height = display_size(frame.width, frame.height, self._fit.display)
        return square, self._display.reformat(frame, width, height, "rgb24", interpolation="BILINEAR").to_ndarray()


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


class _Reader:
    """Decodes packets; remembers when each arrived, since a decoder gives frames back later and in another order."""

    def __init__(self, stream: Any, fit: Fit, live: bool) -> None:
        self._stream, self._live = stream, live
        self._prepare, self._clock = Preparer(fit), StreamClock()
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
        images = self._prepare(frame)
        self.count += 1
        pts_s = None if stamp is None else stamp / 1e9
        return Decoded(images, FrameHeader(captured, arrived, at, time.monotonic_ns(), pts_s, self.bad))

    def _keep_up(self, behind_s: float) -> None:
        """A processor too slow for the stream decodes key frames alone until it has caught up."""
        if self._live and behind_s > _BEHIND_S:
            self._stream.codec_context.skip_frame = "NONKEY"
        elif self._live and behind_s < _CAUGHT_UP_S:
            self._stream.codec_context.skip_frame = "DEFAULT"
