"""What passes between the decoding process and its parent: one request, then messages: a JSON header, and the pixels
that it announces.

Whoever reads trusts nothing: what decodes hostile input may have been taken over by it.
"""

from __future__ import annotations

import json
import time
from typing import Annotated, Literal, NamedTuple, TypeAlias

import msgspec
import numpy as np

from sparsifiner_edge.arrays import Pixels
from sparsifiner_edge.camera.prepare import Fit
from sparsifiner_edge.process import read_message, receive_bytes, write_message
from sparsifiner_edge.text import shown

_MAX_HEADER = 1 << 16
MAX_SIDE = 4096
"""Pixels along a side of anything that is sent."""
MAX_REASON = 300
"""Characters."""
_Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
_Seconds = Annotated[float, msgspec.Meta(ge=-(1 << 34), le=1 << 34)]
"""At most some centuries, which NaN is not."""
_Side = Annotated[int, msgspec.Meta(ge=1, le=MAX_SIDE)]


class Request(msgspec.Struct, frozen=True):
    """What the decoding process shall do: JSON on its standard input.

    Attributes:
        kind, location, live, secrets: see `sources.Source`; of a camera, the relay in its place.
        fit: what the model takes.
        fps: of the test pattern.
        patience_s: for a stream to be opened, and between its packets.
        attempts: that failed before.
        port: of the relay, on this machine.
    """

    kind: str
    location: str
    live: bool
    fit: Fit
    fps: float
    patience_s: float
    attempts: int
    port: int | None
    secrets: tuple[str, ...]


class FrameHeader(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="kind", tag="frame"):
    """A frame: times on the monotonic clock, time in the stream, and the stream's damaged packets so far."""

    captured_ns: _Count
    arrived_ns: _Count
    decoded_ns: _Count
    ready_ns: _Count
    pts_s: _Seconds | None = None
    bad_packets: _Count = 0


class StateHeader(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="kind", tag="state"):
    """What becomes of the source.

    A live one connects, and is lost for `retry_s`; another ends, by itself or for a reason.
    """

    state: Literal["connecting", "lost", "ended"]
    attempt: _Count = 0
    reason: str | None = None
    retry_s: _Seconds = 0.0

    def __post_init__(self) -> None:
        if self.reason is not None and (len(self.reason) > MAX_REASON or not self.reason.isprintable()):
            raise ValueError("a reason that cannot be")


Header: TypeAlias = FrameHeader | StateHeader


class _Announced(msgspec.Struct):
    """The part of each header that is about pixels."""

    shapes: Annotated[list[tuple[_Side, _Side, Literal[3]]], msgspec.Meta(max_length=2)]


_HEADERS, _SHAPES = msgspec.json.Decoder(Header), msgspec.json.Decoder(_Announced)


class DecoderMessage(NamedTuple):
    """What the decoding process says.

    Attributes:
        header: checked; what it says beside its fields is dropped.
        images: of a frame the model's input [H,W,3], and for the overlay the whole frame, made smaller [h,w,3].
    """

    header: Header
    images: list[Pixels]


class ProtocolError(Exception):
    """The other side sent what is no message."""


def send(handle: int, header: Header, images: tuple[Pixels, ...] = ()) -> None:
    """Write one message; waits while the reader is busy."""
    shapes = [image.shape for image in images]
    content = json.dumps(msgspec.to_builtins(header) | {"shapes": shapes}).encode()
    write_message(handle, content, *(np.ascontiguousarray(image).data.cast("B") for image in images))


def receive(handle: int, seconds: float) -> DecoderMessage | None:
    """Read one message; None at the end of the stream.

    Raises:
        StalledError: it did not come whole within `seconds`.
        ProtocolError: it is no message.
    """
    deadline = time.monotonic() + seconds
    try:
        content = read_message(handle, deadline, _MAX_HEADER)
    except ValueError as error:
        raise ProtocolError(str(error)) from error
    if content is None:
        return None
    header, shapes = _parsed(content)
    images = []
    for shape in shapes:
        pixels = receive_bytes(handle, shape[0] * shape[1] * 3, deadline)
        if pixels is None:
            return None
        images.append(np.frombuffer(pixels, np.uint8).reshape(shape))
    return DecoderMessage(header, images)


def _parsed(content: bytearray) -> tuple[Header, list[tuple[int, int, Literal[3]]]]:
    try:
        header, shapes = _HEADERS.decode(content), _SHAPES.decode(content).shapes
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a header that cannot be read: {shown(error, 100)}") from error
    if isinstance(header, FrameHeader) and not shapes:
        raise ProtocolError("a frame without image")
    return header, shapes
