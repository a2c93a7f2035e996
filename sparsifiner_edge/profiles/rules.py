"""How long a measurement lasts: `quick`, and MLPerf's single stream with its early-stopping estimate."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from sparsifiner_edge.bounds import MOST_COUNT, finite_number
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.profiles.stats import binomial_cdf
from sparsifiner_edge.records import Unavailable

RULES = ("quick", "mlperf")

MLPERF_SECONDS = 600.0
"""MLPerf Inference Rules, table of scenarios: single stream lasts at least 600 s. So does loadgen's mlperf.conf."""
MLPERF_QUERIES = 1024
"""Least queries beside those 600 s (loadgen's `min_query_count` for single stream before early stopping)."""
MLPERF_ENOUGH_QUERIES = 24_576
"""They bound p90 within .5 % at 99 % confidence (MLPerf Inference Rules, "number of queries": 3 * 2^13), and end a fast
model's run before its 600 s; a submission to MLPerf would have to go on."""
MLPERF_PERCENTILE = 0.9
MLPERF_CONFIDENCE = 0.99

MIN_BLOCKS = 20
"""Blocks are what a comparison pairs and what drift is seen in."""

_QUICK_SECONDS, _QUICK_QUERIES, _QUICK_MAX_SECONDS = 10.0, 64, 60.0


class Rules(msgspec.Struct, frozen=True):
    """When a side has been measured enough.

    Attributes:
        name: one of `RULES`.
        seconds: least time in queries. min_queries: least number of them; both must be reached.
        seed: of the order of a comparison.
        max_seconds: most wall time, whatever is reached by then; None: no such bound.
        enough_queries: so many end it before `seconds`; None: nothing does.
        valid: whether `name`'s own numbers stand.
        blocks: least number of them.
    """

    name: str
    seconds: float
    min_queries: int
    seed: int
    max_seconds: float | None = None
    enough_queries: int | None = None
    valid: bool = True
    blocks: int = MIN_BLOCKS

    def enough(self, seconds: float, queries: int, blocks: int, wall_s: float = 0.0) -> bool:
        """Whether a side with so much measured, in so much wall time, is done."""
        done = seconds >= self.seconds and queries >= self.min_queries
        many = self.enough_queries is not None and queries >= self.enough_queries
        late = self.max_seconds is not None and wall_s >= self.max_seconds
        return ((done or many) and blocks >= self.blocks) or late


def make_rules(name: str, seconds: float | None = None, min_queries: int | None = None, seed: int = 0) -> Rules:
    """The rules called `name`, with the numbers that are given in place of their own.

    Raises:
        ConfigError: no such rules, or a number is out of range.
    """
    if name not in RULES:
        raise ConfigError(f"rules is {name!r}.", f"Choose one of: {', '.join(RULES)}.")
    if seconds is not None and finite_number(seconds, "seconds") == 0:
        raise ConfigError(f"seconds is {seconds}.", "Give a number above 0.")
    if min_queries is not None and not 1 <= min_queries <= MOST_COUNT:
        raise ConfigError(f"min_queries is {min_queries}.", f"Give from 1 to {MOST_COUNT}.")
    if name == "mlperf":
        own = seconds is None and min_queries is None
        length = (seconds or MLPERF_SECONDS, min_queries or MLPERF_QUERIES)
        return Rules(name, *length, seed, enough_queries=MLPERF_ENOUGH_QUERIES, valid=own)
    seconds = seconds or _QUICK_SECONDS
    # Twice, because a comparison also spends time on unrecorded queries.
    return Rules(name, seconds, min_queries or _QUICK_QUERIES, seed, max(2 * seconds, _QUICK_MAX_SECONDS))


def early_stopping(latency: Sequence[float], share: float = MLPERF_PERCENTILE) -> tuple[float, int] | None:
    """MLPerf's early-stopping estimate of a percentile: an upper bound with 99 % confidence.

    With n queries, t is the largest number, from 1, for which P(Binomial(n, 1 - share) <= t) < .01; the t-th largest
    latency is the estimate (MLPerf Inference Rules, "early stopping criterion", tolerance 0; as loadgen does).

    Returns:
        The estimate, and the t - 1 queries above it; None where there are too few queries (64 for p90, 662 for p99).
    """
    rare = int((binomial_cdf(len(latency), 1 - share) < 1 - MLPERF_CONFIDENCE).sum())
    t = rare - 1  # The first of them is t = 0.
    if t < 1:
        return None
    return float(np.sort(np.asarray(latency, dtype=np.float64))[-t]), t - 1


class Mlperf(msgspec.Struct, frozen=True, kw_only=True):
    """MLPerf's view of a side: the early-stopping estimate, the queries above it, and which conditions were met."""

    early_stopping_p90_ms: float | Unavailable
    discarded: int | Unavailable
    min_duration_met: bool
    min_queries_met: bool
    enough_queries_met: bool
    early_stopping_met: bool
    valid: bool
    why: str


def mlperf_figures(latency_ms: Sequence[float], rules: Rules) -> Mlperf:
    """For a side's `statistics`."""
    seconds, queries = sum(latency_ms) / 1000, len(latency_ms)
    found = early_stopping(latency_ms)
    met = {
        "min_duration_met": seconds >= MLPERF_SECONDS,
        "min_queries_met": queries >= MLPERF_QUERIES,
        "enough_queries_met": queries >= MLPERF_ENOUGH_QUERIES,
        "early_stopping_met": found is not None,
    }
    valid, why = _verdict(met, rules)
    few = Unavailable(f"{queries} queries are too few for an estimate at {MLPERF_CONFIDENCE:.0%} confidence")
    return Mlperf(
        early_stopping_p90_ms=few if found is None else found[0],
        discarded=few if found is None else found[1],
        **met,
        valid=valid,
        why=why,
    )


def _verdict(met: dict[str, bool], rules: Rules) -> tuple[bool, str]:
    if not rules.valid:
        return False, "not a valid mlperf run: its numbers were replaced"
    if not met["early_stopping_met"]:
        return False, "not a valid mlperf run: too few queries for an early-stopping estimate"
    if met["min_duration_met"] and met["min_queries_met"]:
        return True, f"at least {MLPERF_SECONDS:.0f} s and {MLPERF_QUERIES} queries"
    if met["enough_queries_met"]:
        return True, f"{MLPERF_ENOUGH_QUERIES} queries; a submission to MLPerf would also have to last 600 s"
    return False, "not a valid mlperf run: it ended before its time and number of queries"
