"""Messages from the decoding process: a JSON header, then the pixels that it announces.

Whoever reads trusts nothing: what decodes hostile input may have been taken over by it.
"""

from __future__ import annotations

import json
import os
import select
import struct
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Picture = npt.NDArray[np.uint8]
_LENGTH = struct.Struct("<I")
_MAX_HEADER = 1 << 16
_TIMES = ("captured_ns", "arrived_ns", "decoded_ns", "ready_ns")
MAX_SIDE = 4096
"""Pixels along a side of anything that is sent."""
MAX_REASON = 300
"""Characters."""


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_seconds(value: Any) -> bool:
    """A number of at most some centuries, which NaN is not."""
    return type(value) in (int, float) and abs(value) <= 1 << 34


_FIELDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys((*_TIMES, "bad_packets", "attempt"), _is_count),
    "kind": lambda value: value in ("state", "frame", "end"),
    "state": lambda value: value in ("connecting", "lost"),
    "pts_s": lambda value: value is None or _is_seconds(value),
    "retry_s": _is_seconds,
    "reason": lambda value: value is None or (type(value) is str and len(value) <= MAX_REASON and value.isprintable()),
}
"""What a header may say; what else it says is dropped."""


class Message(NamedTuple):
    """What the decoding process says.

    Attributes:
        kind: "state" (connecting, lost), "frame", or "end".
        fields: the header's known fields, each of them checked: counts and times in nanoseconds are integers from 0,
            seconds finite, the reason None or a short printable text.
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
    return Message(fields["kind"], fields, pictures)


def _parsed(header: bytearray) -> tuple[dict[str, Any], list[list[int]]]:
    try:
        said = json.loads(header)
        shapes = [[int(size) for size in shape] for shape in said["shapes"]]
        fields = {name: said[name] for name in _FIELDS if name in said}
        wrong = [name for name, value in fields.items() if not _FIELDS[name](value)]
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise WireError(f"a header that cannot be read: {error}") from error
    if len(shapes) > 2 or any(len(s) != 3 or s[2] != 3 or not all(1 <= x <= MAX_SIDE for x in s) for s in shapes):
        raise WireError(f"pictures of shapes {shapes}")
    if wrong or "kind" not in fields:
        raise WireError(f"a header whose {', '.join(wrong) or 'kind'} cannot be")
    if fields["kind"] == "frame" and not (shapes and all(name in fields for name in _TIMES)):
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
