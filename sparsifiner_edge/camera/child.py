"""The decoding process: reads a source, sends frames to its parent, and connects again when a live source is lost.

A process of its own because a decoder that hangs can be killed there, one that crashes takes nothing with it, and what
hostile input makes of it may open no file, start no program and talk to nobody but its parent and the relay: what it
needs is imported and open before it is confined (see `confine`), and only then it reads. Started by `capture`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import msgspec
import numpy as np

from sparsifiner_edge.camera.backoff import Backoff
from sparsifiner_edge.camera.confine import confine, limit_resources
from sparsifiner_edge.camera.decoder_protocol import MAX_REASON, FrameHeader, Request, StateHeader, send
from sparsifiner_edge.camera.hide import hide
from sparsifiner_edge.camera.libav import Decoded
from sparsifiner_edge.camera.prepare import Fit, display_size, fit_pillow
from sparsifiner_edge.files import open_regular

Frames: TypeAlias = Callable[[], Iterator[Decoded]]
"""What gives the frames of an attempt."""


def main() -> None:
    """Standard input: a `Request`."""
    starter, request = os.getppid(), msgspec.convert(json.loads(sys.stdin.read()), Request)
    parent = os.dup(1)
    os.dup2(2, 1)  # Whatever a library prints must not end up between the messages.
    if request.kind != "gst":  # A pipeline is the user's own: it caches a registry, may record, and reserves addresses.
        limit_resources()
    with contextlib.ExitStack() as opened:
        frames = _prepared(request, opened, starter)
        try:
            _serve(request, frames, parent)
        except BrokenPipeError:
            os._exit(0)  # The parent has gone, or has had enough.


def _prepared(request: Request, opened: contextlib.ExitStack, starter: int) -> Frames:
    """Import and open all that is needed, then confine the process.

    Returns:
        What gives the frames of an attempt; or raises what went wrong here, as the reason of every attempt.
    """
    try:
        frames = _frames(request, opened)
        if request.kind != "gst":  # A pipeline is the user's own.
            confine(starter, request.port)
    except Exception as error:
        failure = error

        def fail() -> Iterator[Decoded]:
            raise failure.with_traceback(None)

        return fail
    return frames


def _serve(request: Request, frames: Frames, parent: int) -> None:
    backoff = Backoff()
    backoff.attempts = request.attempts
    while True:
        send(parent, StateHeader("connecting", backoff.attempts))
        reason = _stream(frames, parent, backoff)
        reason = None if reason is None else _cut(hide(reason, request.secrets))
        if not request.live:
            send(parent, StateHeader("ended", reason=reason))
            return
        wait, reason = backoff.next_s(), reason or "the stream ended"
        send(parent, StateHeader("lost", backoff.attempts, reason, round(wait, 3)))
        time.sleep(wait)


def _stream(frames: Frames, parent: int, backoff: Backoff) -> str | None:
    """Send frames until the source ends; why it ended if not by itself."""
    try:
        for decoded in frames():
            backoff.reset()
            send(parent, decoded.header, decoded.images)
    except BrokenPipeError:
        raise
    # FFmpeg's errors are many; each means the same here: this attempt is over.
    except Exception as error:
        return _said(error)
    return None


def _frames(request: Request, opened: contextlib.ExitStack) -> Frames:
    kind, location, fit = request.kind, request.location, request.fit
    if kind == "test":
        next(_test_frames(request.fps, fit))  # So that all is imported.
        return lambda: _test_frames(request.fps, fit)
    if kind == "gst":
        from sparsifiner_edge.camera.gstreamer import read_pipeline

        return lambda: read_pipeline(location, fit)
    import_decoder()
    from sparsifiner_edge.camera.libav import read_stream

    source = opened.enter_context(open_regular(Path(location))) if kind == "file" else location
    return lambda: read_stream(source, fit, request.patience_s)


def import_decoder() -> None:
    """All of PyAV: it imports what a stream needs when it meets it, and by then no file can be opened.

    Raises:
        ImportError: it is not installed.
    """
    import av.video.reformatter

    for module in pkgutil.walk_packages(av.__path__, "av."):
        if not module.name.endswith("__main__"):
            with contextlib.suppress(ImportError):  # One that this machine cannot use.
                importlib.import_module(module.name)


def _test_frames(fps: float, fit: Fit) -> Iterator[Decoded]:
    from PIL import Image

    from sparsifiner_edge.camera.pattern import paced_images

    for number, due, pixels in paced_images(fps):
        image, at = Image.fromarray(pixels), time.monotonic_ns()
        images = [fit_pillow(image, fit)]
        if fit.display:
            images.append(np.asarray(image.resize(display_size(*image.size, fit.display))))
        yield Decoded(tuple(images), FrameHeader(due, due, at, time.monotonic_ns(), number / fps))


def _said(error: Exception) -> str:
    if type(error).__name__ == "ExitError":  # How PyAV says that the time is over.
        return "it gave nothing in time"
    what = getattr(error, "what", None) or getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(what).split()).rstrip(".")


def _cut(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)[:MAX_REASON]


if __name__ == "__main__":
    main()
