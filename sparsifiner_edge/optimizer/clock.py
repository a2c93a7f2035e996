"""Time budget of a search: a hard end, and the duration of past steps, which predicts what still fits."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from sparsifiner_edge.progress import Progress

CLOSING_S = 10.0
"""Seconds before the end that are reserved for writing the result."""
CLOSING_SHARE = 0.08
"""Maximum share of the whole time that is reserved for writing the result."""
AGAIN_S = 4.0
"""Seconds between two alarms: third-party code may swallow one."""
SOON_S = 0.02
"""Seconds until the next alarm where Python itself would swallow one and print it."""
MOST_SOON = 50
"""Maximum number of such early alarms."""
SPARE = 1.15
"""Factor by which a step may take longer than the last one of its kind."""


class TimeIsUpError(BaseException):
    """The time is over, or the user interrupted. It is no `Exception`, which third-party code would catch."""


class Clock:
    """Clock that starts when it is made.

    Args:
        seconds: Seconds for the whole search.
        progress: Callback that receives the stage and the seconds gone.
    """

    def __init__(self, seconds: float, progress: Progress | None = None) -> None:
        self.seconds, self._begun, self._progress = seconds, time.monotonic(), progress
        self._took, self._over = dict[str, float](), False

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
            TimeIsUpError: The time is over.
        """
        if self._progress:
            self._progress(stage, min(self.elapsed_s, self.seconds), self.seconds)
        if not self._over and self.remaining <= 0:
            self._over = True
            raise TimeIsUpError

    @contextlib.contextmanager
    def step(self, kind: str, stage: str) -> Iterator[None]:
        """Run a step of a kind, report its stage, and remember its duration."""
        self.tell(stage)
        begun = time.monotonic()
        yield
        self._took[kind] = time.monotonic() - begun

    def took(self, *kinds: str) -> float:
        """Return the total duration of the last steps of these kinds in seconds; 0 for kinds that never ran."""
        return sum(self._took.get(kind, 0.0) for kind in kinds)

    def fits(self, *kinds: str, reserve: float = 0.0) -> bool:
        """Return True if steps of these kinds fit into the remaining time.

        They are assumed to take a bit more than their last ones.

        Args:
            kinds: Kinds of the steps.
            reserve: Share of the whole time that is kept for something else.
        """
        return SPARE * self.took(*kinds) < self.remaining - reserve * self.seconds

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """End the block wherever it is when the time is over, or at Ctrl-C or SIGTERM; execution continues after it.

        In any thread but the main one, it ends only at the next step.
        """
        main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGALRM, signal.SIGINT, signal.SIGTERM) if main else ()
        before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}
        inside, soon = True, iter(range(MOST_SOON))

        def ring(_number: int, frame: FrameType | None) -> None:
            if inside and _in_destructor(frame) and next(soon, None) is not None:
                signal.setitimer(signal.ITIMER_REAL, SOON_S, AGAIN_S)
            elif inside:
                self._over = True
                raise TimeIsUpError

        for number in before:
            signal.signal(number, ring)
        if main:
            signal.setitimer(signal.ITIMER_REAL, max(self.remaining, 1e-3), AGAIN_S)
        with contextlib.suppress(TimeIsUpError):
            try:
                yield
            finally:
                inside = False
                if main:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                for number, handler in before.items():
                    signal.signal(number, handler)


def _in_destructor(frame: FrameType | None) -> bool:
    """Return True if an alarm interrupted an object's destructor, which swallows exceptions."""
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None
