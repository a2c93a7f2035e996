"""Keeps a decoding process alive, and its newest frame at hand."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import signal
import subprocess
import threading
import time
from pathlib import Path

import msgspec
from msgspec.structs import replace

from sparsifiner_edge.camera.decoder_protocol import SHOWN_REASON, End, Frame, ProtocolError, Wanted, receive
from sparsifiner_edge.camera.sources import Source, require_decoder
from sparsifiner_edge.camera.status import Status
from sparsifiner_edge.errors import ImageError
from sparsifiner_edge.fitting import Framing
from sparsifiner_edge.images import image_size, list_images
from sparsifiner_edge.process import StalledError, start_python
from sparsifiner_edge.text import printable

FIRST_WAIT_S, MOST_WAIT_S = 0.25, 2.0
_START_S = 20.0
"""For the process to import its decoder, which takes seconds on a small board, beside what a connection takes."""


def wait_s(attempts: int) -> float:
    """Seconds to wait after `attempts` failed ones: doubled with each, and random, so that many cameras do not
    return in step.
    """
    most = min(MOST_WAIT_S, FIRST_WAIT_S * 2 ** min(attempts - 1, 16)) if attempts else 0.0
    return random.uniform(most / 2, most)  # noqa: S311  (no secret)


def frame_size(source: Source, seconds: float = 20) -> tuple[int, int]:
    """Width and height of a source's first frame, in pixels; it is an ImageError if none comes in time."""
    if source.kind == "images":
        return image_size(list_images(Path(source.location))[0])
    require_decoder(source)
    status, until = Status(source.shown, lambda _event: None), time.monotonic() + seconds
    with Capture(source, Wanted(Framing(1)), seconds, status) as capture:
        while not capture.is_over and time.monotonic() < until:
            if (frame := capture.take(0.1)) is not None:
                return frame.width, frame.height
    reason = capture.failure or status.last_reason or "nothing came in time"
    raise ImageError(f"{source.shown} gave no frame: {reason.rstrip('.')}.", "Give an image or a video.")


class Capture:
    """Runs the decoding process from a thread of its own, and another where a live source ended. A context manager.

    There is room for one frame: a live source replaces what lies there, another waits until it is taken.

    Args:
        source: what to read.
        wanted: of each frame.
        stall_s: the process is ended and started anew when nothing came for so long.
        status: told about every change.

    Attributes:
        failure: why a source that is not live ended, if not by itself; or why a live one cannot be used at all: its
            first frame does not have the region.
    """

    def __init__(self, source: Source, wanted: Wanted, stall_s: float, status: Status) -> None:
        self.failure: str | None = None
        self._source, self._wanted, self._stall_s, self._status = source, wanted, stall_s, status
        self._frames: queue.Queue[Frame] = queue.Queue(1)
        self._stop, self._ended = threading.Event(), threading.Event()
        self._attempts, self._unfit = 0, False
        self._process: subprocess.Popen[bytes] | None = None
        # The process dies with the thread that started it (see `process`), so one thread starts them all.
        self._thread = threading.Thread(target=self._run, name="capture", daemon=True)

    def __enter__(self) -> Capture:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._kill()
        self._thread.join(5)

    @property
    def is_over(self) -> bool:
        """That no frame lies there, and none will follow."""
        return self._ended.is_set() and self._frames.empty()

    def take(self, seconds: float) -> Frame | None:
        """The frame, as soon as there is one; None after `seconds`."""
        with contextlib.suppress(queue.Empty):
            return self._frames.get(timeout=seconds)
        return None

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                state, reason = self._attempt()
                if self._stop.is_set():
                    break
                if not self._source.live or self._unfit:
                    self.failure = reason
                    break
                self._attempts += 1
                self._status.enter(state, reason or "the stream ended", self._attempts)
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._ended.set()  # First: whatever comes of the rest, the loop learns that no frame will follow.
            self._status.enter("ended", self.failure)

    def _attempt(self) -> tuple[str, str | None]:
        """Start a process and read it until it ends, hangs or crashes; the state that is then, and why."""
        try:
            with self._start() as process:
                try:
                    assert process.stdout is not None
                    return "lost", self._read(process.stdout.fileno())
                finally:
                    self._kill()
        except StalledError:
            self._status.count("stalls")
            return "stalled", "nothing came in time; the decoder was ended (see --stall)"
        except ProtocolError as error:
            self._status.count("crashes", not self._stop.is_set())
            return "lost", str(error)
        except OSError as error:  # The machine is short of memory or processes, for now.
            return "lost", f"the decoder cannot be started: {error.strerror}"

    def _start(self) -> subprocess.Popen[bytes]:
        """A process that knows what to read. While it imports its decoder the time to wait goes by."""
        self._process = start_python(
            "sparsifiner_edge.camera.child",
            {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        if self._stop.wait(wait_s(self._attempts)):
            self._kill()
        self._status.enter("connecting", None, self._attempts)
        wanted = msgspec.to_builtins(self._wanted)
        request = [self._source.kind, self._source.location, wanted, self._stall_s]
        # Not as an argument, which every user of the machine can read: an address may hold a password.
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(json.dumps(request).encode())
        return self._process

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _read(self, handle: int) -> str | None:
        """Frames into the mailbox until the source ends; why it did, if not by itself."""
        message, bad = receive(handle, self._wanted, _START_S + 2 * self._stall_s), 0
        while not isinstance(message, End):
            self._attempts = 0
            self._status.count("captured")
            self._status.enter("streaming", decoder=message.decoder and printable(message.decoder, SHOWN_REASON))
            self._leave(replace(message, skipped=0))
            self._status.count("bad_packets", max(0, message.bad_packets - bad))
            bad = message.bad_packets
            message = receive(handle, self._wanted, self._stall_s)
        # Later another camera may have come in its place, and go again.
        self._unfit = message.unfit and self._wanted.framing.region is not None and not self._status.counts["captured"]
        return None if message.reason is None else printable(self._source.clean(message.reason), SHOWN_REASON)

    def _leave(self, frame: Frame) -> None:
        """A frame, to be taken."""
        while not self._stop.is_set():
            try:
                self._frames.put(frame, timeout=0 if self._source.live else 0.5)
                break
            except queue.Full:
                if self._source.live and (before := self.take(0)) is not None:
                    frame = replace(frame, skipped=before.skipped + 1)
        self._status.count("dropped", frame.skipped > 0)
