"""Time budget of a search: no step begins that would not end in time, and long steps end where they report progress."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from sparsifiner_edge.progress import Progress

CLOSING_S = 10.0
"""Seconds before the end that are reserved for writing the result."""
CLOSING_SHARE = 0.09
"""Maximum share of the whole time that is reserved for writing the result."""
SPARE = 1.2
"""Factor by which a step may take longer than the last one of its kind."""


class TimeIsUpError(BaseException):
    """The time is over, or the search was stopped. It is no `Exception`, which third-party code would catch."""


class Clock:
    """Clock that starts when it is made.

    It uses no signals, so that it works in any thread and leaves a host's own alarms alone.

    Args:
        seconds: Seconds for the whole search.
        progress: Callback that receives the stage and the seconds gone.
        stop: Event that ends the search early.

    Attributes:
        seconds: See above.
        reserve_s: Seconds at the end that no step of the search may use, even if it takes longer than expected.
    """

    def __init__(self, seconds: float, progress: Progress | None = None, stop: threading.Event | None = None) -> None:
        self.seconds, self._begun, self._progress, self._stop = seconds, time.monotonic(), progress, stop
        self._took, self._searching, self.reserve_s = dict[str, float](), False, 0.0

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._begun

    @property
    def remaining(self) -> float:
        """Seconds until the result must be written."""
        return self.seconds - self.elapsed_s - min(CLOSING_S, CLOSING_SHARE * self.seconds)

    def tell(self, stage: str, _done: float = 0.0, _total: float = 0.0) -> None:
        """Report the current stage; also a `Progress` callback for work with its own unit.

        Raises:
            TimeIsUpError: The search runs, and its time is over or it was stopped.
        """
        if self._progress:
            self._progress(stage, min(self.elapsed_s, self.seconds), self.seconds)
        is_over = self.remaining <= self.reserve_s or (self._stop is not None and self._stop.is_set())
        if self._searching and is_over:
            raise TimeIsUpError

    @contextlib.contextmanager
    def searching(self) -> Iterator[None]:
        """End the block where it next reports progress when the time is over, it is stopped, or at Ctrl-C.

        Execution continues after the block.
        """
        self._searching = True
        with contextlib.suppress(TimeIsUpError, KeyboardInterrupt):
            try:
                yield
            finally:
                self._searching = False

    @contextlib.contextmanager
    def step(self, kind: str, stage: str) -> Iterator[None]:
        """Run a step of a kind, report its stage, and remember its duration."""
        self.tell(stage)
        begun = time.monotonic()
        yield
        self.note(kind, time.monotonic() - begun)

    def note(self, kind: str, seconds: float) -> None:
        """Note how long a step of a kind takes."""
        self._took[kind] = seconds

    def took(self, *kinds: str) -> float:
        """Return the total duration of the last steps of these kinds in seconds; 0 for kinds that never ran."""
        return sum(self._took.get(kind, 0.0) for kind in kinds)

    def fits(self, *kinds: str, reserve_s: float = 0.0) -> bool:
        """Return True if steps of these kinds fit into the remaining time.

        They are assumed to take a bit more than their last ones.

        Args:
            kinds: Kinds of the steps; one may occur several times.
            reserve_s: Seconds that are kept for something else.
        """
        return SPARE * self.took(*kinds) < self.remaining - reserve_s
