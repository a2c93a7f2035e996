"""What the decoding process tells its parent: messages, each a JSON header, and after that of a frame its pixels.

Whoever reads trusts nothing: what decodes hostile input may have been taken over by it.
"""

from __future__ import annotations

import time
from typing import Annotated, NamedTuple

import msgspec
import numpy as np

from sparsifiner_edge.arrays import Pixels
from sparsifiner_edge.bounds import ImageSize, height_width
from sparsifiner_edge.process import read_message, receive_bytes, write_message
from sparsifiner_edge.text import shown

_MAX_HEADER = 1 << 16
MAX_REASON = 10_000
"""Characters on the way; `SHOWN_REASON` are shown, once what is secret in the whole is out."""
SHOWN_REASON = 300
_Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
_Seconds = Annotated[float, msgspec.Meta(ge=-(1 << 34), le=1 << 34)]
"""At most some centuries, which NaN is not."""


class FrameTimes(msgspec.Struct, frozen=True, tag_field="kind", tag="frame"):
    """A frame: times on the monotonic clock, time in the stream, and the stream's damaged packets so far."""

    captured_ns: _Count
    arrived_ns: _Count
    decoded_ns: _Count
    ready_ns: _Count
    pts_s: _Seconds | None = None
    bad_packets: _Count = 0


class End(msgspec.Struct, frozen=True, tag_field="kind", tag="end"):
    """The source ended, by itself or for a reason."""

    reason: str | None = None

    def __post_init__(self) -> None:
        if self.reason is not None and (len(self.reason) > MAX_REASON or not self.reason.isprintable()):
            raise ValueError("a reason that cannot be")


_HEADERS = msgspec.json.Decoder(FrameTimes | End)


class Frame(NamedTuple):
    """A frame: the model's input, uint8 [H,W,3], its times, and how many since the one before were dropped unseen."""

    image: Pixels
    times: FrameTimes
    skipped: int = 0


class ProtocolError(Exception):
    """The other side sent what is no message, or crashed before it was whole."""


def send(handle: int, message: Frame | End) -> None:
    """Write one message; waits while the reader is busy."""
    if isinstance(message, End):
        write_message(handle, msgspec.json.encode(message))
    else:
        pixels = np.ascontiguousarray(message.image).data.cast("B")
        write_message(handle, msgspec.json.encode(message.times), pixels)


def receive(handle: int, size: ImageSize, seconds: float) -> Frame | End:
    """Read one message, with an image of `size` if it is a frame.

    Raises:
        StalledError: it did not come whole within `seconds`.
        ProtocolError: it is no message, or the other side has gone.
    """
    deadline = time.monotonic() + seconds
    try:
        content = read_message(handle, deadline, _MAX_HEADER)
        header = None if content is None else _HEADERS.decode(content)
        if isinstance(header, End):
            return header
        shape = (*height_width(size), 3)
        pixels = None if header is None else receive_bytes(handle, shape[0] * shape[1] * 3, deadline)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the decoder sent what is no message: {shown(error, 100)}") from error
    if header is None or pixels is None:
        raise ProtocolError("the decoder crashed")
    return Frame(np.frombuffer(pixels, np.uint8).reshape(shape), header)
