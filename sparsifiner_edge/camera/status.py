"""Status of a run: counters, state, one JSON line per change of state, and notifications to systemd."""

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
"""States of a source, as the metrics report them."""
COUNTERS = {
    "captured": "Decoded frames.",
    "processed": "Frames that the model answered.",
    "dropped": "Frames replaced by a newer one before the model was free.",
    "bad_packets": "Damaged packets.",
    "reconnects": "Times that a lost source came back.",
    "stalls": "Times that the decoder hung and was ended.",
    "crashes": "Times that the decoding process crashed.",
    "lines_dropped": "Records dropped because the reader of the output was too slow.",
    "output_errors": "Records that could not be written.",
    "overlay_errors": "Times that the overlay could not be written and was given up.",
    "not_finite": "Values of answers that were NaN or infinite, and were written as null.",
}
"""Meaning of each counter."""
TIMES = ("capture", "preprocess", "queued", "infer", "postprocess", "end_to_end", "frame_age")
"""Durations in a record, without _ms."""
UP_TO_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Upper limits of the histograms' buckets in seconds."""
SUMMED_UP = ("infer", "end_to_end", "queued", "frame_age")
"""Durations in the summary of a run."""
LATEST = 10_000
"""Number of answers whose durations are kept for the summary. A service runs for months and cannot keep all."""


class Status:
    """Status of one run, shared by its threads.

    Args:
        source: Source in a form without secrets.
        tell: Called with each event. If it raises an OSError, the event is lost and the run goes on.

    Attributes:
        source: Source in a form without secrets.
        counts: Counters, by the names in `COUNTERS`.
        state: Current state, one of `STATES`.
        reason: Reason of the current state.
        last_reason: Latest reason of any state.
        recovered_s: Duration of the last outage in seconds; None if there was none.
        times: Histogram counts of each duration in `TIMES`.
        sums_s: Sum of each duration in seconds.
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
        """Add to a counter. The first failure of the output is also reported as an event."""
        with self._lock:
            before = self.counts[name]
            self.counts[name] += by
        if name == "output_errors" and not before:
            self.event("output_failing")

    def enter(
        self, state: str, reason: str | None = None, attempt: int | None = None, decoder: str | None = None
    ) -> None:
        """Change the state, and report it if it changed.

        To keep logs short during a long outage, only the first four attempts are reported, then those with a power of
        two as their number.

        Args:
            state: New state, one of `STATES`.
            reason: Reason for it.
            attempt: Number of failed attempts to open the source.
            decoder: Description of the decoder.
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
        """Report an event as one line; its `monotonic_s` is on the same clock as the times of frames."""
        known = {name: value for name, value in fields.items() if value is not None}
        line = {"event": event, "source": self.source, "monotonic_s": round(time.monotonic(), 3)} | known
        with contextlib.suppress(OSError):  # The reader of the events may be gone. The records have another reader.
            self._tell(line)

    def count_answer(self, record: FrameRecord | ImageRecord) -> None:
        """Count the answer for a frame or image, and its durations."""
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
        """Return the figures of the run so far."""
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
        """Return the seconds since the last answer, or None before the first."""
        return None if self._processed_at is None else time.monotonic() - self._processed_at


def notify_systemd(text: str) -> None:
    """Send a message to systemd (sd_notify) if it started this process.

    Args:
        text: READY=1, WATCHDOG=1 or STOPPING=1.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    address = "\0" + address[1:] if address.startswith("@") else address
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as service:
        service.setblocking(False)
        service.sendto(text.encode(), address)
