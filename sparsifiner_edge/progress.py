"""How long-running work reports its progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float, float], None]
"""Called now and then with (stage, done, total): the current stage, and how much of the total is done, in a unit of the
work's own, such as images, steps or seconds. The total is what is known so far: it may grow, and where the work goes on
though all is done, it takes longer than was foreseen."""


def with_prefix(progress: Progress, prefix: str) -> Progress:
    """The same, with words before every stage."""
    return lambda stage, done, total: progress(prefix + stage, done, total)
