"""Any GStreamer pipeline, run by `gst-launch-1.0`: no binding to Python is needed, and a crash of it is not ours.

The pipeline's last element gives video; what makes it the model's input is appended. A queue of one frame that drops
older ones stands between. GStreamer's own delay before that queue is not seen: a frame's age counts from there.
"""

from __future__ import annotations

import functools
import math
import os
import shlex
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from sparsifiner_edge.bounds import ImageSize, height_width
from sparsifiner_edge.camera.decoder_protocol import Frame
from sparsifiner_edge.process import start_program

_ERRORS, _LONGEST = 20, 10_000
"""Errors that are quoted, the last ones; and characters read of a line without end."""


def launch_line(pipeline: str, size: ImageSize, handle: int) -> list[str]:
    """The command that writes RGB images of the model's size to the file descriptor `handle`."""
    height, width = height_width(size)
    both = math.gcd(height, width)
    caps = f"video/x-raw,format=RGB,width={width},height={height},pixel-aspect-ratio=1/1"
    tail = (
        f"! queue leaky=downstream max-size-buffers=1 max-size-bytes=0 max-size-time=0 ! videoconvert ! "
        f"aspectratiocrop aspect-ratio={width // both}/{height // both} ! videoscale add-borders=false ! {caps} ! "
        f"fdsink fd={handle} sync=false"
    )
    return ["gst-launch-1.0", "-q", *shlex.split(pipeline), *shlex.split(tail)]


def read_pipeline(pipeline: str, size: ImageSize) -> Iterator[Frame]:
    """Frames of a pipeline until it ends.

    Raises:
        ValueError: GStreamer's own message; it may hold secrets of the pipeline.
    """
    ours, theirs = os.pipe()
    launched = start_program(
        launch_line(pipeline, size, theirs), pass_fds=[theirs], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    os.close(theirs)
    errors: deque[bytes] = deque(maxlen=_ERRORS)
    assert launched.stderr is not None
    lines = iter(functools.partial(launched.stderr.readline, _LONGEST), b"")
    said = (line for line in lines if b"ERROR" in line or b"erroneous" in line)
    # Read all the time: GStreamer would wait for ever for room in a full pipe.
    listener = threading.Thread(target=errors.extend, args=(said,), name="remarks", daemon=True)
    listener.start()
    with launched, os.fdopen(ours, "rb", buffering=1 << 20) as pixels:
        try:
            yield from _images(pixels, size)
            launched.wait()
        finally:
            launched.kill()
            listener.join()
    if launched.returncode:
        raise ValueError(errors[0].decode("utf-8", "replace") if errors else "the pipeline failed")


def _images(stream: BinaryIO, size: ImageSize) -> Iterator[Frame]:
    height, width = height_width(size)
    row = -(-width * 3 // 4) * 4  # GStreamer pads rows to four bytes.
    while len(data := stream.read(row * height)) == row * height:
        at = time.monotonic_ns()
        pixels = np.ascontiguousarray(np.frombuffer(data, np.uint8).reshape(height, row)[:, : width * 3])
        yield Frame(pixels.data, at, at, at, time.monotonic_ns())
