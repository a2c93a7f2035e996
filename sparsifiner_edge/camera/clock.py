"""When a frame was taken, on the monotonic clock of this machine.

A stream's timestamps run on the camera's clock. Their offset from this machine's is the least seen within a minute:
whatever is above it is delay, in the network or in a backlog, and is part of the frame's age.
"""

from __future__ import annotations

WINDOW_NS = 30_000_000_000
JUMP_NS = 5_000_000_000


class StreamClock:
    """Turns timestamps of one stream into nanoseconds of the monotonic clock."""

    def __init__(self) -> None:
        self._began = 0
        self._least: list[int] = []

    def captured_ns(self, stamp_ns: int | None, arrived_ns: int) -> int:
        """When the frame that arrived at `arrived_ns` was taken, by the least delay seen; never after its arrival."""
        if stamp_ns is None:
            return arrived_ns
        offset = arrived_ns - stamp_ns
        if not self._least or abs(offset - self._least[-1]) > JUMP_NS:  # A camera's clock was set.
            self._least, self._began = [offset], arrived_ns
        elif arrived_ns - self._began > WINDOW_NS:
            # Two windows: the older one forgets, so that clocks that run apart add nothing to the age.
            self._least, self._began = [*self._least[-1:], offset], arrived_ns
        else:
            self._least[-1] = min(self._least[-1], offset)
        return min(arrived_ns, stamp_ns + min(self._least))
