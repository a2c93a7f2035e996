"""What the decoding process tells its parent, as MessagePack: frames, and in the end why there are no more.

Whoever reads trusts nothing: what decodes hostile input may have been taken over by it.
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
"""Bytes of a message beside a frame's pixels."""
MAX_REASON = 10_000
"""Characters on the way; `SHOWN_REASON` are shown, once what is secret in the whole is out."""
SHOWN_REASON = 300
VIEW_SIDE = 1280
"""Most pixels along a side of a frame that is shown."""
_Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
_Seconds = Annotated[float, Meta(ge=-(1 << 34), le=1 << 34)]
"""At most some centuries, which NaN is not."""
_Side = Annotated[int, Meta(ge=1, le=1 << 16)]


class Frame(msgspec.Struct, frozen=True, tag_field="kind", tag="frame"):
    """A frame: the model's input, uint8 RGB row by row; times on the monotonic clock, time in the stream, the stream's
    damaged packets so far, and how many frames since the one before were dropped unseen; the frame's own size, and
    where it is to be shown the whole, at `view_size`; what decodes, in words.
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
        """uint8 [H,W,3]."""
        return np.frombuffer(self.pixels, np.uint8).reshape(*height_width(framing.size), 3)

    def whole(self) -> Pixels | None:
        """The whole frame, uint8 [H,W,3], where that is wanted."""
        width, height = view_size(self.width, self.height)
        return None if self.view is None else np.frombuffer(self.view, np.uint8).reshape(height, width, 3)


class Wanted(msgspec.Struct, frozen=True):
    """What a decoder makes of a frame: the model's input, and where it is to be shown the whole."""

    framing: Framing
    view: bool = False

    @property
    def centre_alone(self) -> bool:
        """That nothing else of a frame is wanted."""
        return self.framing.is_centre and not self.view


def view_size(width: int, height: int) -> tuple[int, int]:
    """Width and height of a whole frame as it is shown: at most `VIEW_SIDE` a side."""
    most = max(width, height, VIEW_SIDE)
    return max(1, width * VIEW_SIDE // most), max(1, height * VIEW_SIDE // most)


def frame_of(
    image: Any, wanted: Wanted, times_ns: tuple[int, int, int], pts_s: float | None = None, bad_packets: int = 0
) -> Frame:
    """Of a whole frame as a Pillow image, and the times until it was decoded."""
    pixels = np.asarray(fit_image(image, wanted.framing)).data
    view = np.asarray(image.resize(view_size(*image.size))).data if wanted.view else None
    return Frame(pixels, image.width, image.height, *times_ns, time.monotonic_ns(), pts_s, bad_packets, view=view)


class End(msgspec.Struct, frozen=True, tag_field="kind", tag="end"):
    """The source ended, by itself or for a reason; `unfit`: its frames do not have the region."""

    reason: Annotated[str, Meta(max_length=MAX_REASON)] | None = None
    unfit: bool = False


_MESSAGES = msgspec.msgpack.Decoder(Frame | End)


class ProtocolError(Exception):
    """The other side sent what is no message, or crashed before it was whole."""


def send(handle: int, message: Frame | End) -> None:
    """Write one message; waits while the reader is busy."""
    write_message(handle, msgspec.msgpack.encode(message))


def receive(handle: int, wanted: Wanted, seconds: float) -> Frame | End:
    """Read one message, with what is wanted if it is a frame.

    Raises:
        StalledError: it did not come whole within `seconds`.
        ProtocolError: it is no message, or the other side has gone.
    """
    height, width = height_width(wanted.framing.size)
    most = height * width * 3 + VIEW_SIDE**2 * 3 * wanted.view + _MOST_BESIDE
    try:
        content = read_message(handle, time.monotonic() + seconds, most)
        message = None if content is None else _MESSAGES.decode(content)
        if isinstance(message, Frame):
            wanted.framing.of(message.width, message.height)  # That it has the region.
    except (ValueError, RecursionError, ConfigError) as error:
        raise ProtocolError(f"the decoder sent what is no message: {printable(error, 100)}") from error
    if message is None:
        raise ProtocolError("the decoder crashed")
    if isinstance(message, Frame):
        view = view_size(message.width, message.height) if wanted.view else (0, 0)
        sizes = len(message.pixels), 0 if message.view is None else len(message.view)
        if sizes != (height * width * 3, view[0] * view[1] * 3):
            raise ProtocolError("the decoder sent what is no message: an image of another size")
    return message
