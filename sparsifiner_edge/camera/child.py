"""Decoding process: reads a source once, sends its frames to the parent, and reports why it ended.

It is a separate process because a decoder that hangs can then be killed, and one that crashes, or is taken over by
malicious input, affects nothing else. Everything that it needs is imported and opened before it is confined (see
`confine`); only then it reads the source. `capture` starts it, and starts another one when a live source ends.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from PIL import Image

from sparsifiner_edge.camera.confine import confine
from sparsifiner_edge.camera.decoder_protocol import MAX_REASON, End, Frame, Wanted, frame_of, send
from sparsifiner_edge.camera.gstreamer import read_pipeline
from sparsifiner_edge.camera.pattern import draw_pattern
from sparsifiner_edge.camera.sources import place_of
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.files import open_regular
from sparsifiner_edge.fitting import Framing


def main() -> None:
    """Decode the source requested on standard input, and write its frames to standard output.

    The request is a JSON list with the arguments of `frames_of` except the last. The decoder is imported while the
    process waits for it.
    """
    starter = os.getppid()
    import_decoder()
    kind, location, wanted, patience_s = json.loads(sys.stdin.buffer.read())
    parent = os.dup(1)
    os.dup2(2, 1)  # Output that a library prints must not end up between the messages.
    end = End()
    try:
        for frame in frames_of(kind, location, msgspec.convert(wanted, Wanted), patience_s, starter):
            send(parent, frame)
    # FFmpeg has many kinds of errors. All of them end this attempt.
    except Exception as error:
        end = End(reason_of(error), isinstance(error, ConfigError))
    with contextlib.suppress(BrokenPipeError):  # The parent is gone, or has stopped reading.
        send(parent, end)


def frames_of(kind: str, location: str, wanted: Wanted, patience_s: float, starter: int) -> Iterator[Frame]:
    """Yield the frames of a source until it ends. Confines this process for good before the first frame.

    A GStreamer pipeline is not confined: it is the user's own command line, caches a registry, may record, and needs
    devices.

    Args:
        kind: Kind of the source; see `sources.Source`.
        location: Location of the source; see `sources.Source`.
        wanted: Requested form of each frame.
        patience_s: Seconds to wait for a stream to open, and between its packets.
        starter: Process ID of the parent.
    """
    if kind == "gst":
        yield from read_pipeline(location, wanted)
        return
    with contextlib.ExitStack() as opened:
        port = None
        if kind == "test":
            frames = _test_frames(float(location), wanted)
            next(frames)  # Imports everything that drawing a frame needs.
        else:
            from sparsifiner_edge.camera.libav import read_stream

            file = opened.enter_context(open_regular(Path(location))) if kind == "file" else None
            frames = read_stream(file or location, wanted, patience_s)
            if file is None:
                host, port = place_of(location)
                socket.getaddrinfo(host, port)  # Loads the system's libraries for name resolution.
        confine(starter, port)
        yield from frames


def import_decoder() -> None:
    """Import all of Pillow and, if installed, all of PyAV.

    Both import modules on first use, when the confined process can no longer open files.
    """
    frame_of(Image.new("RGB", (2, 1)), Wanted(Framing(2, "letterbox"), view=True), (0, 0, 0))
    with contextlib.suppress(ImportError):
        import av.video.reformatter

        for module in pkgutil.walk_packages(av.__path__, "av."):
            if not module.name.endswith("__main__"):
                with contextlib.suppress(ImportError):  # A module that this machine cannot use.
                    importlib.import_module(module.name)


def _test_frames(fps: float, wanted: Wanted) -> Iterator[Frame]:
    """Yield the moving pattern, each frame when it is due. Frames that are already overdue are left out."""
    start, number = time.monotonic_ns(), 0
    while True:
        due = start + round(number * 1e9 / fps)
        time.sleep(max(0, due - time.monotonic_ns()) / 1e9)
        at = time.monotonic_ns()
        yield frame_of(Image.fromarray(draw_pattern(number)), wanted, (due, due, at), number / fps)
        number = max(number + 1, int((time.monotonic_ns() - start) * fps / 1e9))


def reason_of(error: Exception) -> str:
    """Return why an attempt ended, on one line."""
    if type(error).__name__ == "ExitError":  # PyAV's error for an exceeded timeout.
        return "it sent nothing in time"
    message = getattr(error, "what", None) or getattr(error, "strerror", None) or str(error) or type(error).__name__
    text = " ".join(str(message).split()).rstrip(".").encode(errors="replace").decode()
    return text[:MAX_REASON]


if __name__ == "__main__":
    main()
