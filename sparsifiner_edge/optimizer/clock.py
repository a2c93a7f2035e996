"""The time that a search has: a hard end, and what its steps have taken so far, which tells what still fits."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from sparsifiner_edge.progress import Progress

CLOSING_S, CLOSING_SHARE = 10.0, 0.08
"""Seconds before the end, and share of all at most, that what was found is written in."""
AGAIN_S = 4.0
"""Between two alarms: code of others may swallow one."""
SOON_S, MOST_SOON = 0.02, 50
"""Until the next where Python itself would swallow it, and print it; and how often that may be."""
SPARE = 1.15
"""A step may take so many times as long as the last of its kind."""


class TimeIsUpError(BaseException):
    """The time is over, or someone wants it to be. No `Exception`, which code of others would take for its own."""


class Clock:
    """Counts from when it is made.

    Args:
        seconds: that all may take. progress: is told the stage, and the seconds gone of these.
    """

    def __init__(self, seconds: float, progress: Progress | None = None) -> None:
        self.seconds, self._begun, self._progress = seconds, time.monotonic(), progress
        self._took, self._over = dict[str, float](), False

    @property
    def gone(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self._begun

    @property
    def remaining(self) -> float:
        """Seconds until what was found is to be written."""
        return self.seconds - self.gone - min(CLOSING_S, CLOSING_SHARE * self.seconds)

    def tell(self, stage: str, _done: float = 0.0, _total: float = 0.0) -> None:
        """What goes on; a `Progress` too, for work that counts something of its own.

        Raises:
            TimeIsUpError: nothing may go on.
        """
        if self._progress:
            self._progress(stage, min(self.gone, self.seconds), self.seconds)
        if not self._over and self.remaining <= 0:
            self._over = True
            raise TimeIsUpError

    @contextlib.contextmanager
    def step(self, kind: str, stage: str) -> Iterator[None]:
        """A step of a kind, told by its stage, whose time is remembered."""
        self.tell(stage)
        begun = time.monotonic()
        yield
        self._took[kind] = time.monotonic() - begun

    def took(self, *kinds: str) -> float:
        """Seconds of the last steps of these kinds together; what was never taken counts nothing."""
        return sum(self._took.get(kind, 0.0) for kind in kinds)

    def fits(self, *kinds: str, reserve: float = 0.0) -> bool:
        """Whether steps of these kinds are over in time if they take as long as their last ones did, and a bit more.

        reserve: share of all time that is for something else.
        """
        return SPARE * self.took(*kinds) < self.remaining - reserve * self.seconds

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """What runs inside ends when the time is over, wherever it is, and at Ctrl-C or SIGTERM; what follows goes on.
        In another thread than the main one it ends at its next step alone.
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
    """Whether what an alarm met is an object's end, which swallows all that is raised."""
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None
