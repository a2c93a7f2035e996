"""Supervision of the decoding process, and access to its newest frame."""

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

FIRST_WAIT_S = 0.25
"""Longest wait after the first failed attempt, in seconds. It doubles with every further attempt."""
MOST_WAIT_S = 2.0
"""Longest wait between two attempts, in seconds."""
_START_S = 20.0
"""Seconds for the process to import its decoder, which is slow on a small board. The connection has its own limit."""


def wait_s(attempts: int) -> float:
    """Return how many seconds to wait after a number of failed attempts.

    The wait doubles with each attempt and is random, so that many cameras do not reconnect in step.
    """
    most = min(MOST_WAIT_S, FIRST_WAIT_S * 2 ** min(attempts - 1, 16)) if attempts else 0.0
    return random.uniform(most / 2, most)  # noqa: S311  (no secret)


def frame_size(source: Source, seconds: float = 20) -> tuple[int, int]:
    """Return width and height of a source's first frame in pixels.

    Args:
        source: Source to read.
        seconds: Time to wait for the first frame.

    Raises:
        ImageError: No frame arrived in time.
        SparsifinerError: The source cannot be read, or its decoder is not installed.
    """
    if source.kind == "images":
        return image_size(list_images(Path(source.location))[0])
    require_decoder(source)
    status, until = Status(source.shown, lambda _event: None), time.monotonic() + seconds
    with Capture(source, Wanted(Framing(1)), seconds, status) as capture:
        while not capture.is_over and time.monotonic() < until:
            if (frame := capture.take(0.1)) is not None:
                return frame.width, frame.height
    reason = capture.failure or status.last_reason or "no frame arrived in time"
    raise ImageError(f"{source.shown} gave no frame: {reason.rstrip('.')}.", "Give an image or a video.")


class Capture:
    """Context manager that runs the decoding process from its own thread, and restarts it when a live source ends.

    It holds one frame. A frame of a live source replaces the one that was not taken; any other source waits until its
    frame is taken.

    Args:
        source: Source to read.
        wanted: Requested form of each frame.
        stall_s: Seconds without a frame after which the process is killed and started again.
        status: Receives every change of state.

    Attributes:
        failure: Why a source that is not live ended, or None if it ended normally. For a live source: why it cannot be
            used at all, because its first frame does not contain the region.
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
        """True if no frame is held and none will follow."""
        return self._ended.is_set() and self._frames.empty()

    def take(self, seconds: float) -> Frame | None:
        """Return the next frame as soon as there is one, or None after `seconds`."""
        with contextlib.suppress(queue.Empty):
            return self._frames.get(timeout=seconds)
        return None

    def _run(self) -> None:
        """Run attempts until the source ends or the capture is stopped."""
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
            self._ended.set()  # First, so that the loop learns that no frame will follow even if the rest fails.
            self._status.enter("ended", self.failure)

    def _attempt(self) -> tuple[str, str | None]:
        """Run one decoding process until it ends, hangs or crashes; return the resulting state and its reason."""
        try:
            with self._start() as process:
                try:
                    assert process.stdout is not None
                    return "lost", self._read(process.stdout.fileno())
                finally:
                    self._kill()
        except StalledError:
            self._status.count("stalls")
            return "stalled", "no frame arrived in time; the decoder was ended (see --stall)"
        except ProtocolError as error:
            self._status.count("crashes", not self._stop.is_set())
            return "lost", str(error)
        except OSError as error:  # The machine is temporarily short of memory or processes.
            return "lost", f"the decoder cannot be started: {error.strerror}"

    def _start(self) -> subprocess.Popen[bytes]:
        """Start a process and send it its request. It imports its decoder while the waiting time passes."""
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
        # An address may contain a password, and every user of the machine can read command-line arguments.
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(json.dumps(request).encode())
        return self._process

    def _kill(self) -> None:
        """Kill the decoding process and its children, if it is running."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _read(self, handle: int) -> str | None:
        """Read frames until the source ends; return the reason, or None if it ended normally."""
        message, bad_packets = receive(handle, self._wanted, _START_S + 2 * self._stall_s), 0
        while not isinstance(message, End):
            self._attempts = 0
            self._status.count("captured")
            self._status.enter("streaming", decoder=message.decoder and printable(message.decoder, SHOWN_REASON))
            self._put(replace(message, skipped=0))
            self._status.count("bad_packets", max(0, message.bad_packets - bad_packets))
            bad_packets = message.bad_packets
            message = receive(handle, self._wanted, self._stall_s)
        # Only before the first frame: later, a camera may have been swapped for another one for a while.
        self._unfit = message.unfit and self._wanted.framing.region is not None and not self._status.counts["captured"]
        return None if message.reason is None else printable(self._source.clean(message.reason), SHOWN_REASON)

    def _put(self, frame: Frame) -> None:
        """Make a frame available, and count the frame that it replaces."""
        while not self._stop.is_set():
            try:
                self._frames.put(frame, timeout=0 if self._source.live else 0.5)
                break
            except queue.Full:
                if self._source.live and (before := self.take(0)) is not None:
                    frame = replace(frame, skipped=before.skipped + 1)
        self._status.count("dropped", frame.skipped > 0)
