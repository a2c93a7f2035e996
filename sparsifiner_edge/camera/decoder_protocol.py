"""Messages from the decoding process to its parent, as MessagePack: frames, and finally why there are no more.

The reader validates everything, because malicious input may have taken over the decoder.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

from sparsifiner_edge.arrays import Pixels
from sparsifiner_edge.bounds import height_width
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.fitting import Framing
from sparsifiner_edge.images import fit_image
from sparsifiner_edge.process import read_message, write_message
from sparsifiner_edge.text import printable

_MOST_BESIDE = 1 << 16
"""Limit of the bytes of a message that are not pixels."""
MAX_REASON = 10_000
"""Longest reason in a message, in characters. It is long so that secrets can be removed before it is cut."""
SHOWN_REASON = 300
"""Longest reason that is shown, in characters."""
VIEW_SIDE = 1280
"""Longest side of a frame in an overlay, in pixels."""
_Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
_Seconds = Annotated[float, Meta(ge=-(1 << 34), le=1 << 34)]
"""A few centuries at most. The limits also reject NaN."""
_Side = Annotated[int, Meta(ge=1, le=1 << 16)]


class Frame(msgspec.Struct, frozen=True, tag_field="kind", tag="frame"):
    """A decoded frame. Times are in nanoseconds on the monotonic clock.

    Attributes:
        pixels: Input of the model, uint8 RGB row by row.
        width: Width of the original frame in pixels.
        height: Height of the original frame in pixels.
        captured_ns: When the frame was captured.
        arrived_ns: When it arrived at the decoder.
        decoded_ns: When it was decoded.
        ready_ns: When it was resized to the input of the model.
        pts_s: Time in the stream in seconds.
        bad_packets: Damaged packets of the stream so far.
        skipped: Frames dropped since the previous one.
        view: Whole frame, uint8 RGB row by row, of the size that `view_size` returns; None unless requested.
        decoder: Description of the decoder.
    """

    pixels: memoryview
    width: _Side
    height: _Side
    captured_ns: _Count
    arrived_ns: _Count
    decoded_ns: _Count
    ready_ns: _Count
    pts_s: _Seconds | None = None
    bad_packets: _Count = 0
    skipped: _Count = 0
    view: memoryview | None = None
    decoder: Annotated[str, Meta(max_length=100)] | None = None

    def image(self, framing: Framing) -> Pixels:
        """Return the input of the model, uint8 RGB [H,W,3]."""
        return np.frombuffer(self.pixels, np.uint8).reshape(*height_width(framing.size), 3)

    def whole(self) -> Pixels | None:
        """Return the whole frame, uint8 RGB [H,W,3], or None if it was not requested."""
        width, height = view_size(self.width, self.height)
        return None if self.view is None else np.frombuffer(self.view, np.uint8).reshape(height, width, 3)


class Wanted(msgspec.Struct, frozen=True):
    """Requested form of each frame.

    Attributes:
        framing: How a frame becomes the input of the model.
        view: Whether the whole frame is requested too, for an overlay.
    """

    framing: Framing
    view: bool = False

    @property
    def centre_alone(self) -> bool:
        """True if only the centre of a frame is requested."""
        return self.framing.is_centre and not self.view


def view_size(width: int, height: int) -> tuple[int, int]:
    """Return width and height of a whole frame in an overlay: at most `VIEW_SIDE` a side."""
    most = max(width, height, VIEW_SIDE)
    return max(1, width * VIEW_SIDE // most), max(1, height * VIEW_SIDE // most)


def frame_of(
    image: Any, wanted: Wanted, times_ns: tuple[int, int, int], pts_s: float | None = None, bad_packets: int = 0
) -> Frame:
    """Return the message for a whole frame.

    Args:
        image: The frame as a Pillow image.
        wanted: Requested form.
        times_ns: When the frame was captured, arrived and was decoded.
        pts_s: Time in the stream in seconds.
        bad_packets: Damaged packets of the stream so far.
    """
    pixels = np.asarray(fit_image(image, wanted.framing)).data
    view = np.asarray(image.resize(view_size(*image.size))).data if wanted.view else None
    return Frame(pixels, image.width, image.height, *times_ns, time.monotonic_ns(), pts_s, bad_packets, view=view)


class End(msgspec.Struct, frozen=True, tag_field="kind", tag="end"):
    """End of the source.

    Attributes:
        reason: Why the source ended; None if it ended normally.
        unfit: True if its frames do not contain the region.
    """

    reason: Annotated[str, Meta(max_length=MAX_REASON)] | None = None
    unfit: bool = False


_MESSAGES = msgspec.msgpack.Decoder(Frame | End)


class ProtocolError(Exception):
    """The decoding process sent an invalid message, or crashed before a message was complete."""


def send(handle: int, message: Frame | End) -> None:
    """Write one message. Blocks while the reader is busy."""
    write_message(handle, msgspec.msgpack.encode(message))


def receive(handle: int, wanted: Wanted, seconds: float) -> Frame | End:
    """Read one message, and check that a frame has the requested form.

    Args:
        handle: File descriptor to read from.
        wanted: Requested form of frames.
        seconds: Time limit.

    Raises:
        StalledError: The message was not complete in time.
        ProtocolError: The message is invalid, or the other side is gone.
    """
    height, width = height_width(wanted.framing.size)
    most = height * width * 3 + VIEW_SIDE**2 * 3 * wanted.view + _MOST_BESIDE
    try:
        content = read_message(handle, time.monotonic() + seconds, most)
        message = None if content is None else _MESSAGES.decode(content)
        if isinstance(message, Frame):
            wanted.framing.of(message.width, message.height)  # Raises if the frame does not contain the region.
    except (ValueError, RecursionError, ConfigError) as error:
        raise ProtocolError(f"the decoder sent an invalid message: {printable(error, 100)}") from error
    if message is None:
        raise ProtocolError("the decoder crashed")
    if isinstance(message, Frame):
        view = view_size(message.width, message.height) if wanted.view else (0, 0)
        sizes = len(message.pixels), 0 if message.view is None else len(message.view)
        if sizes != (height * width * 3, view[0] * view[1] * 3):
            raise ProtocolError("the decoder sent an invalid message: an image of the wrong size")
    return message
