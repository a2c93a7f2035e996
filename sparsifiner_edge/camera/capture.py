"""Keeps a decoding process alive, and its newest frame at hand."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
from typing import NamedTuple

from msgspec import to_builtins
from msgspec.structs import replace

from sparsifiner_edge.arrays import Pixels
from sparsifiner_edge.bounds import height_width
from sparsifiner_edge.camera.backoff import Backoff
from sparsifiner_edge.camera.decoder_protocol import (
    FrameHeader,
    ProtocolError,
    Request,
    StateHeader,
    receive,
)
from sparsifiner_edge.camera.prepare import Fit
from sparsifiner_edge.camera.relay import Relay
from sparsifiner_edge.camera.sources import Source
from sparsifiner_edge.camera.status import Status
from sparsifiner_edge.process import StalledError, start_python

_START_S = 20.0
"""Before its first message the process imports its decoder, which takes seconds on a small board."""


class Frame(NamedTuple):
    """A frame for the model.

    Attributes:
        image: uint8 [H,W,3].
        shown: the frame for the overlay, uint8 [h,w,3], or None.
        times: of the decoding process.
        skipped: frames since the one before that were dropped unseen.
    """

    image: Pixels
    shown: Pixels | None
    times: FrameHeader
    skipped: int


class Mailbox:
    """Room for one frame. A live source replaces what lies there; another waits until it is taken."""

    def __init__(self, live: bool) -> None:
        self._live = live
        self._changed = threading.Condition()
        self._frame: Frame | None = None
        self._skipped = 0
        self.closed = False

    def put(self, header: FrameHeader, images: list[Pixels]) -> bool:
        """Leave a frame; True if that dropped another."""
        image, *rest = images
        with self._changed:
            while self._frame is not None and not self._live and not self.closed:
                self._changed.wait(0.5)
            if self.closed:
                return False
            dropped = self._frame is not None
            self._skipped += dropped
            self._frame = Frame(image, rest[0] if rest else None, header, self._skipped)
            self._changed.notify_all()
        return dropped

    def take(self, seconds: float) -> Frame | None:
        """The frame, as soon as there is one; None after `seconds`, or at once when there will be none."""
        with self._changed:
            if self._frame is None and not self.closed:
                self._changed.wait(seconds)
            frame, self._frame = self._frame, None
            if frame is not None:
                self._skipped = 0
                self._changed.notify_all()
        return frame

    def close(self) -> None:
        """No frame will follow; one that lies there can still be taken."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()


class Capture:
    """Runs the decoding process from a thread of its own.

    Args:
        source: what to read.
        fit: what the model takes.
        fps: of the test pattern.
        stall_s: the process is ended and started anew when nothing came for so long.
        status: told about every change.
        allow_redirect: of an RTSP camera to other hosts, without user and password; see `Relay`.
    """

    def __init__(
        self, source: Source, fit: Fit, fps: float, stall_s: float, status: Status, allow_redirect: bool = False
    ) -> None:
        self.mailbox = Mailbox(source.live)
        self.failure: str | None = None
        self._source, self._fit, self._fps, self._stall_s, self._status = source, fit, fps, stall_s, status
        self._allow_redirect = allow_redirect
        self._relay: Relay | None = None
        self._stop = threading.Event()
        self._backoff = Backoff()
        self._process: subprocess.Popen[bytes] | None = None
        # The process dies with the thread that started it (see `process`), so one thread starts them all.
        self._thread = threading.Thread(target=self._run, name="capture", daemon=True)

    def __enter__(self) -> Capture:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self.mailbox.close()
        self._kill()
        self._thread.join(5)
        if self._relay is not None:
            self._relay.close()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                ended = self._one_process()
                if ended or not self._source.live:
                    break
                self._stop.wait(self._backoff.next_s())
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"
            raise
        finally:
            self.mailbox.close()  # First: whatever comes of the rest, the loop learns that no frame will follow.
            self._status.enter("ended", self.failure)

    def _one_process(self) -> bool:
        """Start the process and read it until it ends, hangs or crashes; True when the source came to its end."""
        attempt = self._backoff.attempts
        self._status.enter("connecting", quiet=_is_old(attempt), attempt=attempt)
        try:
            process = self._started()
        except OSError as error:  # The machine is short of memory or processes, for now.
            self._crashed(f"the decoder cannot be started: {error.strerror}")
            return False
        assert process.stdout is not None
        try:
            return self._read(process.stdout.fileno())
        except StalledError:
            self._status.count("stalls")
            self._gone("stalled", f"nothing came for {self._stall_s:g} s; the decoder was ended")
        except ProtocolError as error:
            self._crashed(f"the decoder sent {error}")
        finally:
            self._kill()
            process.stdout.close()
            process.wait()
        return False

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _started(self) -> subprocess.Popen[bytes]:
        source = self._source
        if source.kind == "rtsp" and self._relay is None:
            self._relay = Relay(source.location, self._stall_s, self._allow_redirect)
        request = Request(
            source.kind, source.location, source.live, self._fit, self._fps, self._stall_s, self._backoff.attempts,
            None, source.secrets,
        )  # fmt: skip
        if self._relay is not None:  # The camera's own address, and so its password, stays here.
            request = replace(request, location=self._relay.url, port=self._relay.port, secrets=())
        self._process = start_python(
            "sparsifiner_edge.camera.child", {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        # Not as an argument, which every user of the machine can read: a pipeline may hold a password.
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(json.dumps(to_builtins(request)).encode())
        return self._process

    def _read(self, handle: int) -> bool:
        allowed, bad = _START_S, 0
        while not self._stop.is_set():
            message = receive(handle, allowed)
            if message is None:
                if not self._stop.is_set():
                    self._crashed("the decoder crashed")
                return False
            header = message.header
            if isinstance(header, FrameHeader):
                allowed = self._stall_s
                self._frame(header, message.images)
                self._status.count("bad_packets", max(0, header.bad_packets - bad))
                bad = header.bad_packets
            elif header.state == "ended":
                if self._source.live:
                    raise ProtocolError("the end of a live source")
                self.failure = self._reason(header.reason)
                return True
            else:
                # Connecting has time limits of its own; those of the watchdog only come after them.
                allowed = 2 * self._stall_s + 5
                self._state(header)
        return True

    def _frame(self, header: FrameHeader, images: list[Pixels]) -> None:
        if images[0].shape != (*height_width(self._fit.size), 3):
            raise ProtocolError(f"an image of shape {images[0].shape}")
        self._backoff.reset()
        self._status.count("captured")
        self._status.enter("streaming")
        if self.mailbox.put(header, images):
            self._status.count("dropped")

    def _state(self, header: StateHeader) -> None:
        """As the process says; a connection that it tries again and again is told as such."""
        if header.state == "connecting" and self._status.state == "connecting":
            return
        self._backoff.attempts = max(self._backoff.attempts, header.attempt)  # A process that follows counts on.
        reason, quiet = self._reason(header.reason), _is_old(header.attempt)
        self._status.enter(header.state, reason, quiet, header.attempt, header.retry_s or None)

    def _reason(self, said: str | None) -> str | None:
        """The relay's, which saw the camera itself; else the decoder's. Neither may show a secret."""
        reason = (self._relay and self._relay.reason) or said
        return None if reason is None else self._source.hide(reason)

    def _crashed(self, reason: str) -> None:
        self._status.count("crashes")
        self._gone("lost", reason)

    def _gone(self, state: str, reason: str) -> None:
        if self._source.live:
            attempt = self._backoff.attempts + 1
            self._status.enter(state, reason, _is_old(attempt), attempt=attempt)
        else:
            self.failure = reason


def _is_old(attempt: int) -> bool:
    """A night without a camera is no reason to fill a log: after four attempts only some are told."""
    return attempt > 4 and attempt & (attempt - 1) != 0
