"""What a run is doing: counters, state, one JSON line for each change of state, and messages to systemd."""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable

from sparsifiner_edge.camera.answers import FrameRecord, ImageRecord, Summary

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
}
"""And what each counts."""
TIMES = ("capture", "preprocess", "queued", "infer", "postprocess", "end_to_end", "frame_age")
"""Of a record, without _ms."""
UP_TO_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Limits of the histograms' buckets."""
SUMMED_UP = ("infer", "end_to_end", "queued", "frame_age")
LATEST = 10_000
"""Times of so many answers are kept for the summary: a service runs for months."""


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
        self._first_at = 0.0
        self._latest = {name: deque[float](maxlen=LATEST) for name in SUMMED_UP}
        self.times = {name: [0] * (len(UP_TO_S) + 1) for name in TIMES}
        self.sums_s = dict.fromkeys(TIMES, 0.0)

    def count(self, name: str, by: int = 1) -> None:
        """Add to a counter. A failing output is reported once."""
        with self._lock:
            before = self.counts[name]
            self.counts[name] += by
        if name == "output_errors" and not before:
            self.event("output_failing")

    def enter(
        self, state: str, reason: str | None = None, attempt: int | None = None, decoder: str | None = None
    ) -> None:
        """Change the state, and report it unless nothing changed.

        A night without a camera is no reason to fill a log: after four attempts only some are reported.
        """
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
        if attempt is None or attempt <= 4 or attempt & (attempt - 1) == 0:
            self.event("state", state=state, reason=reason, attempt=attempt, lost_s=lost_s, decoder=decoder)

    def event(self, event: str, **fields: object) -> None:
        """One line; `monotonic_s` is on the clock of the frames' times."""
        known = {name: value for name, value in fields.items() if value is not None}
        line = {"event": event, "source": self.source, "monotonic_s": round(time.monotonic(), 3)} | known
        with contextlib.suppress(OSError):  # Who read the events may have gone; the records have another reader.
            self._tell(line)

    def count_answer(self, record: FrameRecord | ImageRecord) -> None:
        """A frame's or image's answer is ready."""
        self._first_at = self._first_at or time.monotonic()
        self.count("processed")
        self._processed_at = time.monotonic()
        for name, counts in self.times.items():
            if (taken_ms := getattr(record, f"{name}_ms", None)) is not None:
                counts[bisect_left(UP_TO_S, taken_ms / 1000)] += 1
                self.sums_s[name] += taken_ms / 1000
                if name in self._latest:
                    self._latest[name].append(taken_ms)

    def summary(self) -> Summary:
        """How the run went so far."""
        times = {name: sorted(values) for name, values in self._latest.items() if values}
        count, span_s = self.counts["processed"], (self._processed_at or 0.0) - self._first_at
        return Summary(
            processed=count,
            dropped=self.counts["dropped"],
            per_s=round((count - 1) / span_s, 3) if count > 1 and span_s > 0 else None,
            median_ms={name: round(statistics.median(values), 3) for name, values in times.items()},
            p95_ms={name: values[-(-19 * len(values) // 20) - 1] for name, values in times.items()},
        )

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
