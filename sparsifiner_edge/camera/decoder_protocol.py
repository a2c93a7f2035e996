"""What the decoding process tells its parent, as MessagePack: frames, and in the end why there are no more.

Whoever reads trusts nothing: what decodes hostile input may have been taken over by it.
"""

from __future__ import annotations

import time
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from sparsifiner_edge.arrays import Pixels
from sparsifiner_edge.bounds import ImageSize, height_width
from sparsifiner_edge.process import read_message, write_message
from sparsifiner_edge.text import printable

_MOST_BESIDE = 1 << 16
"""Bytes of a message beside a frame's pixels."""
MAX_REASON = 10_000
"""Characters on the way; `SHOWN_REASON` are shown, once what is secret in the whole is out."""
SHOWN_REASON = 300
_Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
_Seconds = Annotated[float, Meta(ge=-(1 << 34), le=1 << 34)]
"""At most some centuries, which NaN is not."""


class Frame(msgspec.Struct, frozen=True, tag_field="kind", tag="frame"):
    """A frame: the model's input, uint8 RGB row by row; times on the monotonic clock, time in the stream, the stream's
    damaged packets so far, and how many frames since the one before were dropped unseen.
    """

    pixels: memoryview
    captured_ns: _Count
    arrived_ns: _Count
    decoded_ns: _Count
    ready_ns: _Count
    pts_s: _Seconds | None = None
    bad_packets: _Count = 0
    skipped: _Count = 0

    def image(self, size: ImageSize) -> Pixels:
        """uint8 [H,W,3]."""
        return np.frombuffer(self.pixels, np.uint8).reshape(*height_width(size), 3)


class End(msgspec.Struct, frozen=True, tag_field="kind", tag="end"):
    """The source ended, by itself or for a reason."""

    reason: Annotated[str, Meta(max_length=MAX_REASON)] | None = None


_MESSAGES = msgspec.msgpack.Decoder(Frame | End)


class ProtocolError(Exception):
    """The other side sent what is no message, or crashed before it was whole."""


def send(handle: int, message: Frame | End) -> None:
    """Write one message; waits while the reader is busy."""
    write_message(handle, msgspec.msgpack.encode(message))


def receive(handle: int, size: ImageSize, seconds: float) -> Frame | End:
    """Read one message, with an image of `size` if it is a frame.

    Raises:
        StalledError: it did not come whole within `seconds`.
        ProtocolError: it is no message, or the other side has gone.
    """
    height, width = height_width(size)
    try:
        content = read_message(handle, time.monotonic() + seconds, height * width * 3 + _MOST_BESIDE)
        message = None if content is None else _MESSAGES.decode(content)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the decoder sent what is no message: {printable(error, 100)}") from error
    if message is None:
        raise ProtocolError("the decoder crashed")
    if isinstance(message, Frame) and len(message.pixels) != height * width * 3:
        raise ProtocolError("the decoder sent what is no message: an image of another size")
    return message
