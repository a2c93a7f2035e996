"""What a run is doing: counters, state, one JSON line for each change of state, and what systemd is told."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from sparsifiner_edge.camera.answers import FrameRecord

STATES = ("starting", "connecting", "streaming", "lost", "stalled", "ended")
COUNTERS = {
    "captured": "Frames decoded.",
    "processed": "Frames that the model answered.",
    "dropped": "Frames replaced by a newer one before the model was free.",
    "bad_packets": "Damaged packets.",
    "reconnects": "Returns of a source that was lost.",
    "stalls": "Times that the decoder hung and was ended.",
    "crashes": "Times that the decoding process crashed.",
    "lines_dropped": "Records that the reader of the output was too slow for.",
    "output_errors": "Records that could not be written.",
    "overlay_errors": "Times that the overlay could not be written and was given up.",
    "not_finite": "Numbers of answers that were NaN or infinite, and were written as null.",
    "unlike": "Frames unlike those that the model was calibrated on: novelty above 1, or not finite.",
    "repeated": "Frames of exactly the same novelty as the one before: the image stands still.",
}
"""And what each counts."""
WINDOW = 100
"""Frames that are looked back on."""
STILL = 25
"""Frames in a row that are the same when it is told."""


class Recent(NamedTuple):
    """The scores `novelty` of the last frames, replaced as a whole: other threads read it.

    Attributes:
        unlike: of each of the last `WINDOW` frames whether it was above 1. last: the newest score. repeated: frames
            before it, without a gap, that had the same. alarm: half of ten or more frames are unlike, and not yet again
            less than a quarter.
    """

    unlike: tuple[bool, ...] = ()
    last: float | None = None
    repeated: int = 0
    alarm: bool = False

    def after(self, score: float) -> Recent:
        """With one more."""
        unlike = (*self.unlike, score > 1)[-WINDOW:]
        repeated = score == self.last and math.isfinite(score)
        share = sum(unlike) / len(unlike)
        alarm = share >= (0.25 if self.alarm else 0.5) and len(unlike) >= 10
        return Recent(unlike, score, self.repeated + 1 if repeated else 0, alarm)

    @property
    def text(self) -> str:
        """For people."""
        return f"{sum(self.unlike)} of the last {len(self.unlike)} frames unlike what this model was calibrated on"


class Status:
    """Shared by the threads of one run.

    Args:
        source: as it may be shown.
        tell: takes each event; where it raises an OSError the event is lost, and nothing else.
    """

    def __init__(self, source: str, tell: Callable[[object], None]) -> None:
        self.source = source
        self.counts = dict.fromkeys(COUNTERS, 0)
        self.state = "starting"
        self.reason: str | None = None
        self.last_reason: str | None = None
        self.recovered_s: float | None = None
        self._tell = tell
        self._lock = threading.Lock()
        self._lost_at: float | None = None
        self._processed_at: float | None = None
        self.novelty = Recent()
        self.watchers: list[Callable[[FrameRecord], None]] = []
        """Called with each record."""

    def count(self, name: str, by: int = 1) -> None:
        """Add to a counter."""
        with self._lock:
            self.counts[name] += by

    def enter(
        self,
        state: str,
        reason: str | None = None,
        quiet: bool = False,
        attempt: int | None = None,
        retry_s: float | None = None,
    ) -> None:
        """Change the state; told unless nothing changed or `quiet`."""
        lost_s = None
        with self._lock:
            if state == self.state == "streaming":
                return
            self.last_reason = reason or self.last_reason
            if state in ("lost", "stalled") and self._lost_at is None and self.counts["captured"]:
                self._lost_at = time.monotonic()
            if state == "streaming" and self._lost_at is not None:
                self.recovered_s, self._lost_at = time.monotonic() - self._lost_at, None
                self.counts["reconnects"] += 1
                lost_s = round(self.recovered_s, 3)
            self.state, self.reason = state, reason
        if not quiet:
            self.event("state", state=state, reason=reason, attempt=attempt, retry_s=retry_s, lost_s=lost_s)

    def event(self, event: str, **fields: object) -> None:
        """One line; `monotonic_s` is on the clock of the frames' times."""
        known = {name: value for name, value in fields.items() if value is not None}
        line = {"event": event, "source": self.source, "monotonic_s": round(time.monotonic(), 3)} | known
        with contextlib.suppress(OSError):  # Who read the events may have gone; the records have another reader.
            self._tell(line)

    def processed(self, record: FrameRecord) -> None:
        """A frame's answer is ready."""
        self.count("processed")
        self._processed_at = time.monotonic()
        if record.novelty is not None:
            self._look(record.novelty)
        for watcher in self.watchers:
            watcher(record)

    def _look(self, score: float) -> None:
        before, self.novelty = self.novelty, self.novelty.after(score)
        now = self.novelty
        self.count("unlike", score > 1)
        self.count("repeated", now.repeated > 0)
        if now.alarm != before.alarm:
            self.event("unlike" if now.alarm else "like", reason=now.text)
        if now.repeated == STILL:
            self.event("still", reason=f"{STILL} frames in a row are the same")

    def silent_s(self) -> float | None:
        """Seconds since the last answer; None before the first."""
        return None if self._processed_at is None else time.monotonic() - self._processed_at


def notify_systemd(text: str) -> None:
    """Send READY=1, WATCHDOG=1 or STOPPING=1 to the socket that systemd names (sd_notify), if it does."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    address = "\0" + address[1:] if address.startswith("@") else address
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as service:
        service.setblocking(False)
        service.sendto(text.encode(), address)
