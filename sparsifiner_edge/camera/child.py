"""The decoding process: reads a source, sends frames to its parent, and connects again when a live source is lost.

A process of its own because a decoder that hangs can be killed there, one that crashes takes nothing with it, and what
hostile input makes of it may write no file (see `limits`). Started by `capture`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from sparsifiner_edge.camera.backoff import Backoff
from sparsifiner_edge.camera.limits import confine
from sparsifiner_edge.camera.prepare import Fit, display_size, fit_pillow
from sparsifiner_edge.camera.wire import MAX_REASON, send


def main() -> None:
    """Standard input: one JSON object: kind, location, live, fit, fps, patience_s, attempts."""
    request = json.loads(sys.stdin.read())
    parent = os.dup(1)
    os.dup2(2, 1)  # Whatever a library prints must not end up between the messages.
    confine(pipeline=request["kind"] == "gst")
    with contextlib.suppress(ImportError):  # Told as the reason of the first attempt.
        _import_decoder(request["kind"])
    try:
        _serve(request, parent)
    except BrokenPipeError:
        os._exit(0)  # The parent has gone, or has had enough.


def _import_decoder(kind: str) -> None:
    """Before the first attempt, whose time then is its own."""
    if kind in ("file", "rtsp"):
        import av.video.reformatter  # noqa: F401
    elif kind == "test":
        import PIL.Image  # noqa: F401


def _serve(request: dict[str, Any], parent: int) -> None:
    backoff = Backoff()
    backoff.attempts = int(request["attempts"])
    while True:
        send(parent, "state", state="connecting", attempt=backoff.attempts)
        reason = _stream(request, parent, backoff)
        if not request["live"]:
            send(parent, "end", reason=reason)
            return
        wait, reason = backoff.next_s(), reason or "the stream ended"
        send(parent, "state", state="lost", reason=reason, attempt=backoff.attempts, retry_s=round(wait, 3))
        time.sleep(wait)


def _stream(request: dict[str, Any], parent: int, backoff: Backoff) -> str | None:
    """Send frames until the source ends; why it ended if not by itself."""
    try:
        for decoded in _frames(request):
            backoff.reset()
            send(parent, "frame", decoded.pictures, bad_packets=decoded.bad_packets, **decoded.times)
    except BrokenPipeError:
        raise
    # FFmpeg's errors are many; each means the same here: this attempt is over.
    except Exception as error:
        return _said(error)
    return None


def _frames(request: dict[str, Any]) -> Iterator[Any]:
    fit = Fit(*request["fit"])
    if request["kind"] == "test":
        return _test_frames(request["fps"], fit)
    if request["kind"] == "gst":
        from sparsifiner_edge.camera.gstreamer import read_pipeline

        return read_pipeline(request["location"], fit)
    from sparsifiner_edge.camera.libav import read_stream

    return read_stream(request["kind"], request["location"], fit, request["patience_s"])


def _test_frames(fps: float, fit: Fit) -> Iterator[Any]:
    from PIL import Image

    from sparsifiner_edge.camera.libav import Decoded
    from sparsifiner_edge.camera.pattern import paced_pictures

    for number, due, picture in paced_pictures(fps):
        image, at = Image.fromarray(picture), time.monotonic_ns()
        pictures = [fit_pillow(image, fit)]
        if fit.display:
            pictures.append(np.asarray(image.resize(display_size(*image.size, fit.display))))
        times = {"captured_ns": due, "arrived_ns": due, "decoded_ns": at, "ready_ns": time.monotonic_ns()}
        yield Decoded(tuple(pictures), times | {"pts_s": number / fps}, 0)


def _said(error: Exception) -> str:
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(said).split()))[:MAX_REASON]


if __name__ == "__main__":
    main()
