"""Percentiles, ratios and their intervals: pure functions of the samples, in any unit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import msgspec
import numpy as np

from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.results import Quantity

CONFIDENCE = 0.95
"""Confidence of all intervals."""
_NORMAL = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
"""The .975 quantile of the normal distribution."""
MARGIN = 0.01
"""Minimum difference: ratios within 1 +- MARGIN are never reported as a difference.

Two processes that run the same model differ by that much.
"""

MIN_FOR_MEAN = 5
"""Minimum number of independent samples, such as images, for the interval of a mean."""

_FEW = Unavailable("too few samples to bound it on this side")
"""Bound of an interval that the samples cannot determine."""
Series = Sequence[float] | np.ndarray[Any, Any]
"""Samples in the order in which they were taken."""


class Latency(msgspec.Struct, frozen=True):
    """Latency of one query in milliseconds: percentiles and mean."""

    p50: Quantity
    p90: Quantity
    p99: Quantity
    mean: Quantity


def percentile(samples: Series, share: float) -> float:
    """Return the quantile of `samples` at `share` in [0, 1], with linear interpolation (NumPy's default)."""
    return float(np.quantile(np.asarray(samples, dtype=np.float64), share))


def effective_size(series: Series) -> int:
    """Return the number of independent samples that would determine the mean as well as this series.

    The series may be correlated in time. Geyer's initial positive sequence (Statistical Science 7, 1992):
    autocorrelations are summed in pairs until a pair is not positive. The result is between 1 and len(series).
    """
    values = np.asarray(series, dtype=np.float64)
    count = len(values)
    centred = values - values.mean()
    variance = float(centred @ centred)
    if count < 4 or variance == 0:
        return count
    spectrum = np.fft.rfft(centred, n=2 * count)
    correlation = np.fft.irfft(np.abs(spectrum) ** 2)[:count] / variance
    pairs = correlation[0 : count - count % 2 : 2] + correlation[1::2]
    stop = int(np.argmax(pairs <= 0)) if (pairs <= 0).any() else len(pairs)
    inflation = max(1.0, 2 * float(pairs[:stop].sum()) - 1)
    return max(1, int(count / inflation))


def binomial_cdf(trials: int, share: float) -> np.ndarray[Any, Any]:
    """Return P(X <= k) for k = 0..trials of Binomial(trials, share).

    The terms are computed as logarithms, so that many trials do not underflow.
    """
    k = np.arange(trials)
    steps = np.log((trials - k) / (k + 1)) + math.log(share / (1 - share))
    logs = trials * math.log1p(-share) + np.concatenate([[0.0], np.cumsum(steps)])
    return np.asarray(np.cumsum(np.exp(logs)))


def quantile_interval(samples: Series, share: float) -> tuple[float | None, float | None]:
    """Return the 95 % interval of a quantile from order statistics, without an assumption about the distribution.

    The number of samples below the quantile is binomial; correlation in time reduces the number of trials.

    Args:
        samples: Samples in the order in which they were taken.
        share: Quantile, in (0, 1).

    Returns:
        Low and high bound; None for a side that the samples are too few to bound.
    """
    values = np.asarray(samples, dtype=np.float64)
    trials = effective_size(values <= np.quantile(values, share))
    cdf = binomial_cdf(trials, share)
    tail = (1 - CONFIDENCE) / 2
    below = int(np.searchsorted(cdf, tail, side="right"))  # rank l: P(X < l) <= tail
    above = int(np.searchsorted(cdf, 1 - tail, side="left")) + 1  # rank u: P(X >= u) <= tail
    ordered = np.sort(values)
    scale = len(values) / trials
    low = float(ordered[max(0, math.floor(below * scale) - 1)]) if below >= 1 else None
    high = float(ordered[min(len(values) - 1, math.ceil(above * scale) - 1)]) if above <= trials else None
    return low, high


def mean_reach(samples: Series, independent: int | None = None) -> float | None:
    """Return the half-width of the 95 % interval of the mean, by Student's t, which also holds for few samples.

    Args:
        samples: Samples in the order in which they were taken.
        independent: Number of independent samples among them; None takes `effective_size`.

    Returns:
        The half-width; None for fewer than `MIN_FOR_MEAN` independent samples.
    """
    count = effective_size(samples) if independent is None else independent
    if count < MIN_FOR_MEAN:
        return None
    return student_t(count - 1) * float(np.std(samples, ddof=1)) / math.sqrt(count)


def mean_of(samples: Series, independent: int | None, method: str) -> Quantity:
    """Return the mean with its interval; see `mean_reach`."""
    mean, reach = float(np.mean(samples)), mean_reach(samples, independent)
    low, high = (None, None) if reach is None else (mean - reach, mean + reach)
    return quantity(mean, low, high, method)


def small_sample_mean(samples: Series) -> Quantity:
    """Return the mean of independent samples, such as images, with its interval."""
    return mean_of(samples, len(samples), f"Student's t, {len(samples)} samples")


def skewed_mean(samples: Series, shape: float) -> Quantity:
    """Return the mean of a few independent, positive, skewed samples, such as errors per image, with its interval.

    The samples are taken to follow a gamma distribution, whose mean follows from their sum. The interval of Student's t
    would too often be too low.

    Args:
        samples: The samples.
        shape: Shape of the gamma distribution, the inverse of the squared ratio of standard deviation to mean; 1 for an
            exponential distribution.
    """
    values = np.asarray(samples, dtype=np.float64)
    mean, freedom = float(values.mean()), 2 * shape * len(values)
    low, high = (mean * freedom / chi_square(freedom, sign) for sign in (1, -1))
    return quantity(mean, low, high, f"gamma of shape {shape:.2f}, {len(values)} samples")


def chi_square(freedom: float, sign: int) -> float:
    """Return the .975 quantile of the chi-square distribution, or the .025 quantile if `sign` is -1.

    Approximation of Wilson and Hilferty. Below a few degrees of freedom it is too small, never too large.
    """
    z = sign * _NORMAL
    part = 2 / (9 * freedom)
    return freedom * max(1 - part + z * math.sqrt(part), 1e-3) ** 3


def student_t(freedom: int) -> float:
    """Return the .975 quantile of Student's t distribution.

    Expansion of Cornish and Fisher, accurate to .002 from 4 degrees of freedom on.
    """
    z = _NORMAL
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    fourth = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + first / freedom + second / freedom**2 + third / freedom**3 + fourth / freedom**4


def quantity(value: float, low: float | None, high: float | None, method: str) -> Quantity:
    """Return a value with its interval; a bound of None means that there were too few samples."""
    return Quantity(value, _FEW if low is None else low, _FEW if high is None else high, CONFIDENCE, method)


def summarise(latency_ms: Series) -> tuple[Latency, Quantity]:
    """Return percentiles and mean of the latency, and the throughput in queries per second, with intervals.

    Args:
        latency_ms: Latency of every query in milliseconds.
    """

    def quantile(share: float) -> Quantity:
        bounds = quantile_interval(latency_ms, share)
        return quantity(percentile(latency_ms, share), *bounds, "order statistics, effective sample size")

    mean = mean_of(latency_ms, None, "Student's t, effective sample size")
    slow, fast = (1000 / ms if isinstance(ms, float) and ms > 0 else None for ms in (mean.high, mean.low))
    latency = Latency(quantile(0.5), quantile(0.9), quantile(0.99), mean)
    return latency, quantity(1000 / mean.value, slow, fast, mean.interval)


def round_ratios(subject: Sequence[Series], against: Sequence[Series]) -> np.ndarray[Any, Any]:
    """Return, per round, the median latency of `against` divided by that of `subject`: above 1, the subject is faster.

    A round consists of one block of each side, run back to back, so that anything that slows the machine down for
    longer affects both sides and cancels. The ratio of two bundles is the median over the rounds, with the interval
    `quantile_interval(ratios, 0.5)`. A bootstrap over rounds missed the true ratio four times as often as a 95 %
    interval may, while another program ran on the machine.

    Args:
        subject: Latencies of the subject, by round.
        against: Latencies of the other bundle, by round.
    """
    return np.array([np.median(b) / np.median(a) for a, b in zip(subject, against, strict=True)])


def median(values: Series, method: str = "order statistics of rounds") -> Quantity:
    """Return the median of one value per round, with its interval."""
    return quantity(float(np.median(values)), *quantile_interval(values, 0.5), method)


def medians_in_turn(blocks: Sequence[Sequence[Series]]) -> list[Quantity]:
    """Return the median of each side, for sides that were measured in turn, block by block.

    A slowdown that affected all blocks of a round is removed.

    Args:
        blocks: Samples of each side, by round.
    """
    rounds = min(map(len, blocks))
    medians = np.array([[percentile(block, 0.5) for block in side[:rounds]] for side in blocks])
    common = np.exp(np.log(medians).mean(0)) if len(blocks) > 1 else np.ones(rounds)
    method = "order statistics of rounds, measured in turn"
    return [median(row, method) for row in medians / common * np.median(common)]


def verdict_of(low: float | None, high: float | None) -> str:
    """Return "faster" or "slower" if the interval of a ratio lies outside 1 +- `MARGIN`, else "no difference shown"."""
    if low is not None and low > 1 + MARGIN:
        return "faster"
    if high is not None and high < 1 - MARGIN:
        return "slower"
    return "no difference shown"
