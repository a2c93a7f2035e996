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

from sparsifiner_edge.camera.confine import confine
from sparsifiner_edge.camera.decoder_protocol import MAX_REASON, End, Frame, Wanted, frame_of, send
from sparsifiner_edge.camera.gstreamer import read_pipeline
from sparsifiner_edge.camera.pattern import draw_pattern
from sparsifiner_edge.camera.sources import place_of
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.files import open_regular
from sparsifiner_edge.fitting import Framing


def main() -> None:
    """Standard input: JSON, the arguments of `frames_of` but the last; until it comes, which may be a while, all is
    imported.
    """
    starter = os.getppid()
    import_decoder()
    kind, location, wanted, patience_s = json.loads(sys.stdin.buffer.read())
    parent = os.dup(1)
    os.dup2(2, 1)  # Whatever a library prints must not end up between the messages.
    end = End()
    try:
        for frame in frames_of(kind, location, msgspec.convert(wanted, Wanted), patience_s, starter):
            send(parent, frame)
    # FFmpeg's errors are many; each means the same here: this attempt is over.
    except Exception as error:
        end = End(reason_of(error), isinstance(error, ConfigError))
    with contextlib.suppress(BrokenPipeError):  # The parent has gone, or has had enough.
        send(parent, end)


def frames_of(kind: str, location: str, wanted: Wanted, patience_s: float, starter: int) -> Iterator[Frame]:
    """Frames of the source, until it ends. Before the first this process is confined, for good.

    A GStreamer pipeline is the user's own command line, and is not: it caches a registry, may record, needs devices.

    Args:
        kind, location: see `sources.Source`.
        wanted: of each frame.
        patience_s: for a stream to be opened, and between its packets.
        starter: the process that started this one.
    """
    if kind == "gst":
        yield from read_pipeline(location, wanted)
        return
    with contextlib.ExitStack() as opened:
        port = None
        if kind == "test":
            frames = _test_frames(float(location), wanted)
            next(frames)  # So that all is imported.
        else:
            from sparsifiner_edge.camera.libav import read_stream

            file = opened.enter_context(open_regular(Path(location))) if kind == "file" else None
            frames = read_stream(file or location, wanted, patience_s)
            if file is None:
                host, port = place_of(location)
                socket.getaddrinfo(host, port)  # So that the system's libraries for names are loaded.
        confine(starter, port)
        yield from frames


def import_decoder() -> None:
    """All of PyAV, where it is installed, and of Pillow: both import what they need when they meet it, and by then no
    file can be opened.
    """
    frame_of(Image.new("RGB", (2, 1)), Wanted(Framing(2, "letterbox"), view=True), (0, 0, 0))
    with contextlib.suppress(ImportError):
        import av.video.reformatter

        for module in pkgutil.walk_packages(av.__path__, "av."):
            if not module.name.endswith("__main__"):
                with contextlib.suppress(ImportError):  # One that this machine cannot use.
                    importlib.import_module(module.name)


def _test_frames(fps: float, wanted: Wanted) -> Iterator[Frame]:
    """The moving pattern, each frame when it is due; those that nobody was there for are left out."""
    start, number = time.monotonic_ns(), 0
    while True:
        due = start + round(number * 1e9 / fps)
        time.sleep(max(0, due - time.monotonic_ns()) / 1e9)
        at = time.monotonic_ns()
        yield frame_of(Image.fromarray(draw_pattern(number)), wanted, (due, due, at), number / fps)
        number = max(number + 1, int((time.monotonic_ns() - start) * fps / 1e9))


def reason_of(error: Exception) -> str:
    """Why an attempt ended, on one line."""
    if type(error).__name__ == "ExitError":  # How PyAV says that the time is over.
        return "it gave nothing in time"
    what = getattr(error, "what", None) or getattr(error, "strerror", None) or str(error) or type(error).__name__
    text = " ".join(str(what).split()).rstrip(".").encode(errors="replace").decode()
    return text[:MAX_REASON]


if __name__ == "__main__":
    main()
