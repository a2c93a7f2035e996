"""Progress reports of long-running work."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float, float], None]
"""Callback (stage, done, total): the current stage, and how much of the total is done, in the work's own unit.

The total is what is known so far and may grow. Work that continues after the total was reached takes longer than
predicted.
"""


def with_prefix(progress: Progress, prefix: str) -> Progress:
    """Return a callback that puts words before every stage."""
    return lambda stage, done, total: progress(prefix + stage, done, total)
