"""Messages from the decoding process: a JSON header, then the pixels that it announces.

Whoever reads trusts nothing: what decodes hostile input may have been taken over by it.
"""

from __future__ import annotations

import json
import os
import select
import struct
import time
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Picture = npt.NDArray[np.uint8]
_LENGTH = struct.Struct("<I")
_MAX_HEADER = 1 << 16
_TIMES = ("captured_ns", "arrived_ns", "decoded_ns", "ready_ns")
MAX_SIDE = 4096
"""Pixels along a side of anything that is sent."""


class Message(NamedTuple):
    """What the decoding process says.

    Attributes:
        kind: "state" (connecting, lost), "frame", or "end".
        fields: the header.
        pictures: the model's input [S,S,3], and for the overlay the whole frame, made smaller [h,w,3].
    """

    kind: str
    fields: dict[str, Any]
    pictures: list[Picture]


class WireError(Exception):
    """The other side sent what is no message."""


class StalledError(Exception):
    """Nothing came within the time allowed."""


def send(handle: int, kind: str, pictures: tuple[Picture, ...] = (), **fields: Any) -> None:
    """Write one message; waits while the reader is busy."""
    shapes = [list(picture.shape) for picture in pictures]
    header = json.dumps({"kind": kind, "shapes": shapes} | fields).encode()
    _write(handle, memoryview(_LENGTH.pack(len(header)) + header))
    for picture in pictures:
        _write(handle, np.ascontiguousarray(picture).data.cast("B"))


def _write(handle: int, data: memoryview) -> None:
    while data:
        data = data[os.write(handle, data) :]


def receive(handle: int, seconds: float) -> Message | None:
    """Read one message; None at the end of the stream.

    Raises:
        StalledError: it did not come whole within `seconds`.
        WireError: it is no message.
    """
    deadline = time.monotonic() + seconds
    prefix = _read(handle, _LENGTH.size, deadline)
    if prefix is None:
        return None
    (length,) = _LENGTH.unpack(prefix)
    if length > _MAX_HEADER:
        raise WireError(f"a header of {length} bytes")
    header = _read(handle, length, deadline)
    if header is None:
        return None
    fields, shapes = _parsed(header)
    pictures = []
    for shape in shapes:
        pixels = _read(handle, shape[0] * shape[1] * 3, deadline)
        if pixels is None:
            return None
        pictures.append(np.frombuffer(pixels, np.uint8).reshape(shape))
    return Message(str(fields["kind"]), fields, pictures)


def _parsed(header: bytearray) -> tuple[dict[str, Any], list[list[int]]]:
    try:
        fields = json.loads(header)
        shapes = [[int(size) for size in shape] for shape in fields["shapes"]]
        fields["kind"]
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise WireError(f"a header that cannot be read: {error}") from error
    if len(shapes) > 2 or any(len(s) != 3 or s[2] != 3 or not all(1 <= x <= MAX_SIDE for x in s) for s in shapes):
        raise WireError(f"pictures of shapes {shapes}")
    if fields["kind"] == "frame" and not (shapes and all(type(fields.get(name)) is int for name in _TIMES)):
        raise WireError("a frame without picture or times")
    return fields, shapes


def _read(handle: int, count: int, deadline: float) -> bytearray | None:
    data = bytearray(count)
    view, poll = memoryview(data), select.poll()
    poll.register(handle, select.POLLIN)
    while view:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise StalledError
        got = os.readv(handle, [view])
        if got == 0:
            return None
        view = view[got:]
    return data
