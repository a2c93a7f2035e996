"""Any GStreamer pipeline, run by `gst-launch-1.0`: no binding to Python is needed, and a crash of it is not ours.

The pipeline's last element gives video. What makes the centre of its frames the model's input is appended; where
another part is read, or frames are shown, they come whole. A queue of one frame that drops older ones stands between.
GStreamer's own delay before that queue is not seen: a frame's age counts from there.
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
"""Decoders of Jetsons, VA-API, V4L2, NVIDIA's and Intel's desktop GPUs, preferred where an address alone was given."""
_TO_MEMORY = "nvvidconv"
"""Of Jetsons: what a hardware decoder gives is in memory that others cannot read."""
_DECODER = re.compile(rb"[/:](\w[\w-]*dec[\w-]*?)-?\d+\.GstPad:src: caps = video/x-raw")
_ERRORS, _LONGEST = 20, 10_000
"""Errors that are quoted, the last ones; and characters read of a line without end."""
_CAPS = re.compile(
    rb"sparsifiner-frames\.GstPad:(?:src|sink): caps = video/x-raw.* width=\(int\)(\d+), height=\(int\)(\d+)"
    rb"(?:.* pixel-aspect-ratio=\(fraction\)([1-9]\d*)/([1-9]\d*))?"
)
"""What `gst-launch-1.0 -v` says of the frames that pass; now and then of one pad twice, and not of the other."""


def launch_line(pipeline: str, wanted: Wanted, handle: int) -> list[str]:
    """The command that writes RGB images to the file descriptor `handle`: of the model's size, or whole."""
    height, width = height_width(wanted.framing.size)
    both = math.gcd(height, width)
    caps = "video/x-raw,format=RGB,pixel-aspect-ratio=1/1"
    frames = "name=sparsifiner-frames"
    line = "! queue {} leaky=downstream max-size-buffers=1 max-size-bytes=0 max-size-time=0 ! videoconvert ! {}"
    centre = f"aspectratiocrop aspect-ratio={width // both}/{height // both} ! videoscale add-borders=false"
    scaled = f"{centre} ! {caps},width={width},height={height}"
    whole = f"videoscale ! capsfilter {frames} caps={caps}"
    if pipeline.endswith(OF_ADDRESS) and _inspect("--exists", _TO_MEMORY) is not None:
        pipeline += f" ! {_TO_MEMORY} ! video/x-raw"
    tail = line.format(frames, scaled) if wanted.centre_alone else line.format("", whole)
    return ["gst-launch-1.0", "-v", *shlex.split(pipeline), *shlex.split(f"{tail} ! fdsink fd={handle} sync=false")]


def read_pipeline(pipeline: str, wanted: Wanted) -> Iterator[Frame]:
    """Frames of a pipeline until it ends.

    Raises:
        ValueError: GStreamer's own message, which may hold secrets of the pipeline; or whole frames change their size.
        ConfigError: the region is not within its frames.
    """
    ours, theirs = os.pipe()
    if pipeline.endswith(OF_ADDRESS):  # What someone wrote chooses by itself, as it did.
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
    said = (line for line in _lines(launched.stderr) if b"ERROR" in line or b"erroneous" in line)
    # Read all the time: GStreamer would wait for ever for room in a full pipe.
    listeners = [_listen(errors, said)]
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
    """Width and height of frames, each time that they change; into `decoders` the element that decodes them."""
    for line in lines:
        if match := _DECODER.search(line):
            decoders.append(match[1].decode())
        if match := _CAPS.search(line):
            width, height, across, down = (int(part or 1) for part in match.groups())
            yield max(1, round(width * across / down)), height  # In square pixels: GStreamer crops what is shown.


def _inspect(*words: str) -> str | None:
    """What GStreamer says of an element; None if it knows none."""
    if (program := shutil.which("gst-inspect-1.0")) is None:
        return None
    done = subprocess.run([program, *words], capture_output=True, text=True, errors="replace", check=False)
    return None if done.returncode else done.stdout


def describe_decoder(decoder: str) -> str:
    """An element that decodes, in words."""
    hardware = decoder in HARDWARE or "/Hardware" in (_inspect(decoder) or "")
    return f"{decoder} of GStreamer, {'hardware' if hardware else 'software'}"[:100]


def _listen(into: deque[Any], lines: Iterator[Any]) -> threading.Thread:
    listener = threading.Thread(target=into.extend, args=(lines,), name="listener", daemon=True)
    listener.start()
    return listener


def _lines(stream: IO[bytes] | None) -> Iterator[bytes]:
    assert stream is not None
    return iter(functools.partial(stream.readline, _LONGEST), b"")


def _frames(stream: BinaryIO, wanted: Wanted, latest: deque[tuple[int, int]]) -> Iterator[Frame]:
    """Of RGB images in a stream; latest: width and height of the pipeline's own frames, as they are now."""
    first = latest[-1]
    height, width = height_width(wanted.framing.size) if wanted.centre_alone else first[::-1]
    row = -(-width * 3 // 4) * 4  # GStreamer pads rows to four bytes.
    while len(data := stream.read(row * height)) == row * height:
        at = time.monotonic_ns()
        pixels = np.ascontiguousarray(np.frombuffer(data, np.uint8).reshape(height, row)[:, : width * 3])
        if wanted.centre_alone:
            yield Frame(pixels.data, *latest[-1], at, at, at, time.monotonic_ns())
        elif latest[-1] != first:
            raise ValueError("its frames have another size now")
        else:
            yield frame_of(Image.fromarray(pixels.reshape(height, width, 3)), wanted, (at, at, at))
