"""The decoding process: reads a source once, sends its frames to the parent, and says why it ended.

A process of its own because a decoder that hangs can be killed there, and one that crashes, or is taken over by what a
stranger sent, takes nothing with it: what it needs is imported and open before it is confined (see `confine`), and only
then it reads. Started by `capture`, which starts another where a live source ended.
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

from sparsifiner_edge.bounds import ImageSize
from sparsifiner_edge.camera.confine import confine
from sparsifiner_edge.camera.decoder_protocol import MAX_REASON, Decoded, End, FrameTimes, Request, send
from sparsifiner_edge.camera.gstreamer import read_pipeline
from sparsifiner_edge.camera.libav import read_stream
from sparsifiner_edge.camera.pattern import paced_images
from sparsifiner_edge.camera.prepare import fit_pillow
from sparsifiner_edge.camera.sources import place_of
from sparsifiner_edge.files import open_regular


def main() -> None:
    """Standard input: a `Request`; until it comes, which may be a while, all is imported."""
    starter = os.getppid()
    import_decoder()
    request = msgspec.convert(json.loads(sys.stdin.buffer.read()), Request)
    parent = os.dup(1)
    os.dup2(2, 1)  # Whatever a library prints must not end up between the messages.
    reason = None
    try:
        for frame in decoded_frames(request, starter):
            send(parent, frame)
    # FFmpeg's errors are many; each means the same here: this attempt is over.
    except Exception as error:
        reason = reason_of(error)
    with contextlib.suppress(BrokenPipeError):  # The parent has gone, or has had enough.
        send(parent, End(reason))


def decoded_frames(request: Request, starter: int) -> Iterator[Decoded]:
    """Frames of the source, until it ends. Before the first this process, child of `starter`, is confined, for good.

    A GStreamer pipeline is the user's own command line, and is not: it caches a registry, may record, needs devices.
    """
    kind, location, size = request.kind, request.location, request.size
    if kind == "gst":
        yield from read_pipeline(location, size)
        return
    with contextlib.ExitStack() as opened:
        port = None
        if kind == "test":
            frames = _test_frames(float(location), size)
            next(frames)  # So that all is imported.
        elif kind == "file":
            frames = read_stream(opened.enter_context(open_regular(Path(location))), size, request.patience_s)
        else:
            frames = read_stream(location, size, request.patience_s)
            host, port = place_of(location)
            socket.getaddrinfo(host, port)  # So that the system's libraries for names are loaded.
        confine(starter, port)
        yield from frames


def import_decoder() -> None:
    """All of PyAV, where it is installed: it imports what a stream needs when it meets it, and by then no file can be
    opened.
    """
    with contextlib.suppress(ImportError):
        import av.video.reformatter

        for module in pkgutil.walk_packages(av.__path__, "av."):
            if not module.name.endswith("__main__"):
                with contextlib.suppress(ImportError):  # One that this machine cannot use.
                    importlib.import_module(module.name)


def _test_frames(fps: float, size: ImageSize) -> Iterator[Decoded]:
    for number, due, pixels in paced_images(fps):
        at = time.monotonic_ns()
        image = fit_pillow(Image.fromarray(pixels), size)
        yield Decoded(image, FrameTimes(due, due, at, time.monotonic_ns(), number / fps))


def reason_of(error: Exception) -> str:
    """Why an attempt ended, on one line, of printable characters."""
    if type(error).__name__ == "ExitError":  # How PyAV says that the time is over.
        return "it gave nothing in time"
    what = getattr(error, "what", None) or getattr(error, "strerror", None) or str(error) or type(error).__name__
    text = " ".join(str(what).split()).rstrip(".")
    return "".join(c if c.isprintable() else "?" for c in text)[:MAX_REASON]


if __name__ == "__main__":
    main()
