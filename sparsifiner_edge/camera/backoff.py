"""How long to wait before trying again."""

from __future__ import annotations

import random

FIRST_S = 0.25
MOST_S = 2.0


class Backoff:
    """Doubles with every failure up to `MOST_S`, and draws from the upper half: many cameras do not return in step.

    The cap, with a connection's own time, keeps a source that is back from waiting 5 s.
    """

    def __init__(self) -> None:
        self.attempts = 0

    def next_s(self) -> float:
        """Seconds to wait now."""
        most = min(MOST_S, FIRST_S * 2 ** min(self.attempts, 16))
        self.attempts += 1
        return random.uniform(most / 2, most)  # noqa: S311  (no secret)

    def reset(self) -> None:
        """A frame came: the next failure is a first one."""
        self.attempts = 0
