"""Sources from any GStreamer pipeline, run by `gst-launch-1.0`.

No Python binding is needed, and a crash of GStreamer affects only its own process. The last element of the pipeline
outputs video. These elements are appended: a queue that holds only the newest frame, then a crop and resize of the
frame's centre to the model's input. If another region is read or an overlay is drawn, whole frames are output instead.
The age of a frame counts from the queue: latency of GStreamer before it is invisible.
"""

from __future__ import annotations

import functools
import math
import os
import re
import shlex
import shutil
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import IO, Any, BinaryIO

import numpy as np
from msgspec.structs import replace
from PIL import Image

from sparsifiner_edge.bounds import height_width
from sparsifiner_edge.camera.decoder_protocol import Frame, Wanted, frame_of
from sparsifiner_edge.camera.sources import OF_ADDRESS
from sparsifiner_edge.process import start_program

HARDWARE = (
    *("nvv4l2decoder", "nvjpegdec"),
    *("vah264dec", "vah265dec", "vaav1dec", "vavp9dec", "vajpegdec"),
    *("v4l2slh264dec", "v4l2slh265dec", "v4l2h264dec", "v4l2h265dec"),
    *("nvh264dec", "nvh265dec", "nvav1dec"),
    *("qsvh264dec", "qsvh265dec", "qsvav1dec"),
)
"""Hardware decoders of Jetsons, VA-API, V4L2, and NVIDIA's and Intel's GPUs.

They are preferred if the source is an address rather than a pipeline.
"""
_TO_MEMORY = "nvvidconv"
"""Jetson element that copies decoded frames to system memory; other elements cannot read the decoder's memory."""
_DECODER = re.compile(rb"[/:](\w[\w-]*dec[\w-]*?)-?\d+\.GstPad:src: caps = video/x-raw")
"""Name of the element that outputs decoded video, in the output of `gst-launch-1.0 -v`."""
_ERRORS = 20
"""Error lines that are kept: the most recent ones."""
_LONGEST = 10_000
"""Bytes after which an endless line is cut."""
_CAPS = re.compile(
    rb"sparsifiner-frames\.GstPad:(?:src|sink): caps = video/x-raw.* width=\(int\)(\d+), height=\(int\)(\d+)"
    rb"(?:.* pixel-aspect-ratio=\(fraction\)([1-9]\d*)/([1-9]\d*))?"
)
"""Size of the frames in the output of `gst-launch-1.0 -v`.

Both pads of the element match, because sometimes one pad is reported twice and the other not at all.
"""


def launch_line(pipeline: str, wanted: Wanted, handle: int) -> list[str]:
    """Return the command that writes RGB images to a file descriptor, either of the model's input size or whole frames.

    Args:
        pipeline: Pipeline whose last element outputs video.
        wanted: Requested form of each frame.
        handle: File descriptor to write to.
    """
    height, width = height_width(wanted.framing.size)
    divisor = math.gcd(height, width)
    caps = "video/x-raw,format=RGB,pixel-aspect-ratio=1/1"
    frames = "name=sparsifiner-frames"
    line = "! queue {} leaky=downstream max-size-buffers=1 max-size-bytes=0 max-size-time=0 ! videoconvert ! {}"
    centre = f"aspectratiocrop aspect-ratio={width // divisor}/{height // divisor} ! videoscale add-borders=false"
    scaled = f"{centre} ! {caps},width={width},height={height}"
    whole = f"videoscale ! capsfilter {frames} caps={caps}"
    if pipeline.endswith(OF_ADDRESS) and _inspect("--exists", _TO_MEMORY) is not None:
        pipeline += f" ! {_TO_MEMORY} ! video/x-raw"
    tail = line.format(frames, scaled) if wanted.centre_alone else line.format("", whole)
    return ["gst-launch-1.0", "-v", *shlex.split(pipeline), *shlex.split(f"{tail} ! fdsink fd={handle} sync=false")]


def read_pipeline(pipeline: str, wanted: Wanted) -> Iterator[Frame]:
    """Yield frames of a pipeline until it ends.

    Raises:
        ValueError: The pipeline failed (the message is GStreamer's and may contain secrets of the pipeline), or the
            size of whole frames changed.
        ConfigError: The frames do not contain the region.
    """
    ours, theirs = os.pipe()
    if pipeline.endswith(OF_ADDRESS):  # A pipeline that the user wrote keeps its own choice of decoder.
        os.environ.setdefault("GST_PLUGIN_FEATURE_RANK", ",".join(f"{name}:MAX" for name in HARDWARE))
    launched = start_program(
        launch_line(pipeline, wanted, theirs),
        pass_fds=[theirs],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    os.close(theirs)
    errors: deque[bytes] = deque(maxlen=_ERRORS)
    decoders: deque[str] = deque(maxlen=1)
    sizes = _sizes(_lines(launched.stdout), decoders)
    reported = (line for line in _lines(launched.stderr) if b"ERROR" in line or b"erroneous" in line)
    # Threads keep reading both pipes, because GStreamer blocks when one is full.
    listeners = [_listen(errors, reported)]
    with launched, os.fdopen(ours, "rb", buffering=1 << 20) as pixels:
        try:
            if (first := next(sizes, None)) is not None:
                latest = deque([first], 1)
                listeners.append(_listen(latest, sizes))
                decoder = describe_decoder(decoders[0]) if decoders else None
                yield from (replace(frame, decoder=decoder) for frame in _frames(pixels, wanted, latest))
            launched.wait()
        finally:
            launched.kill()
            for listener in listeners:
                listener.join()
    if launched.returncode:
        raise ValueError(errors[0].decode("utf-8", "replace") if errors else "the pipeline failed")


def _sizes(lines: Iterator[bytes], decoders: deque[str]) -> Iterator[tuple[int, int]]:
    """Yield width and height of frames whenever they change; append the name of the decoding element to `decoders`."""
    for line in lines:
        if match := _DECODER.search(line):
            decoders.append(match[1].decode())
        if match := _CAPS.search(line):
            width, height, across, down = (int(part or 1) for part in match.groups())
            yield max(1, round(width * across / down)), height  # In square pixels, as GStreamer crops.


def _inspect(*words: str) -> str | None:
    """Return the output of `gst-inspect-1.0`, or None if it is missing or does not know the element."""
    if (program := shutil.which("gst-inspect-1.0")) is None:
        return None
    done = subprocess.run([program, *words], capture_output=True, text=True, errors="replace", check=False)
    return None if done.returncode else done.stdout


def describe_decoder(decoder: str) -> str:
    """Describe a decoding element: its name, and whether it is hardware or software."""
    hardware = decoder in HARDWARE or "/Hardware" in (_inspect(decoder) or "")
    return f"{decoder} of GStreamer, {'hardware' if hardware else 'software'}"[:100]


def _listen(into: deque[Any], lines: Iterator[Any]) -> threading.Thread:
    """Collect lines in a background thread."""
    listener = threading.Thread(target=into.extend, args=(lines,), name="listener", daemon=True)
    listener.start()
    return listener


def _lines(stream: IO[bytes] | None) -> Iterator[bytes]:
    """Yield the lines of a stream."""
    assert stream is not None
    return iter(functools.partial(stream.readline, _LONGEST), b"")


def _frames(stream: BinaryIO, wanted: Wanted, latest: deque[tuple[int, int]]) -> Iterator[Frame]:
    """Yield frames from raw RGB images in a stream.

    Args:
        stream: Raw images, of the model's input size or whole.
        wanted: Requested form of each frame.
        latest: Current width and height of the pipeline's own frames, updated in the background.
    """
    first = latest[-1]
    height, width = height_width(wanted.framing.size) if wanted.centre_alone else first[::-1]
    row = -(-width * 3 // 4) * 4  # GStreamer pads rows to four bytes.
    while len(data := stream.read(row * height)) == row * height:
        at = time.monotonic_ns()
        pixels = np.ascontiguousarray(np.frombuffer(data, np.uint8).reshape(height, row)[:, : width * 3])
        if wanted.centre_alone:
            yield Frame(pixels.data, *latest[-1], at, at, at, time.monotonic_ns())
        elif latest[-1] != first:
            raise ValueError("the size of the frames changed")
        else:
            yield frame_of(Image.fromarray(pixels.reshape(height, width, 3)), wanted, (at, at, at))
