"""How long a measurement lasts."""

from __future__ import annotations

import msgspec

from sparsifiner_edge.bounds import MOST_COUNT, finite_number
from sparsifiner_edge.errors import ConfigError

MIN_BLOCKS = 20
"""Blocks are what a comparison pairs and what drift is seen in."""

_SECONDS, _QUERIES, _MAX_SECONDS = 10.0, 64, 60.0


class Rules(msgspec.Struct, frozen=True):
    """When a side has been measured enough.

    Attributes:
        seconds: least time in queries. min_queries: least number of them; both must be reached.
        seed: of the order of a comparison.
        max_seconds: most wall time, whatever is reached by then; None: no such bound.
        blocks: least number of them.
    """

    seconds: float
    min_queries: int
    seed: int
    max_seconds: float | None = None
    blocks: int = MIN_BLOCKS

    def enough(self, seconds: float, queries: int, blocks: int, wall_s: float = 0.0) -> bool:
        """Whether a side with so much measured, in so much wall time, is done."""
        done = seconds >= self.seconds and queries >= self.min_queries
        late = self.max_seconds is not None and wall_s >= self.max_seconds
        return (done and blocks >= self.blocks) or late


def make_rules(seconds: float | None = None, min_queries: int | None = None, seed: int = 0) -> Rules:
    """Ten seconds and 64 queries, or what is given in their place; in at most twice that time, or a minute.

    Raises:
        ConfigError: a number is out of range.
    """
    if seconds is not None and finite_number(seconds, "seconds") == 0:
        raise ConfigError(f"seconds is {seconds}.", "Give a number above 0.")
    if min_queries is not None and not 1 <= min_queries <= MOST_COUNT:
        raise ConfigError(f"min_queries is {min_queries}.", f"Give from 1 to {MOST_COUNT}.")
    seconds = seconds or _SECONDS
    # Twice, because a comparison also spends time on unrecorded queries.
    return Rules(seconds, min_queries or _QUERIES, seed, max(2 * seconds, _MAX_SECONDS))
