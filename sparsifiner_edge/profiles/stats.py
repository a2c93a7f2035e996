"""Percentiles, ratios and their intervals. Pure functions of the samples, in any unit."""

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
_NORMAL = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
MARGIN = 0.01
"""Ratios within 1 +- MARGIN are never called a difference: two processes of one model differ by that much."""

MIN_FOR_MEAN = 5
"""Independent samples, such as images, that a mean's interval takes at least."""

_FEW = Unavailable("too few samples to bound it on this side")
Series = Sequence[float] | np.ndarray[Any, Any]


class Latency(msgspec.Struct, frozen=True):
    """Of one query, in ms."""

    p50: Quantity
    p90: Quantity
    p99: Quantity
    mean: Quantity


def percentile(samples: Series, share: float) -> float:
    """Quantile of `samples` at `share` in [0, 1], linear between neighbours (NumPy's default)."""
    return float(np.quantile(np.asarray(samples, dtype=np.float64), share))


def effective_size(series: Series) -> int:
    """How many independent samples say as much about the mean as this series, which may be correlated in time.

    Geyer's initial positive sequence (Statistical Science 7, 1992): autocorrelations are summed in pairs until a pair
    is not positive. Between 1 and len(series).
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
    """P(X <= k), k = 0..trials, of Binomial(trials, share); by logarithms, so that many trials do not underflow."""
    k = np.arange(trials)
    steps = np.log((trials - k) / (k + 1)) + math.log(share / (1 - share))
    logs = trials * math.log1p(-share) + np.concatenate([[0.0], np.cumsum(steps)])
    return np.asarray(np.cumsum(np.exp(logs)))


def quantile_interval(samples: Series, share: float) -> tuple[float | None, float | None]:
    """95 % interval of a quantile from order statistics, which needs no assumption about the distribution.

    The number of samples below the quantile is binomial; correlation in time shrinks the number of trials.

    Returns:
        Low and high; None for a side on which the samples are too few to bound the quantile.
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
    """How far the 95 % interval of the mean goes to either side: Student's t, which holds for few samples, too.

    Args:
        independent: how many of them are; None: `effective_size`. Below `MIN_FOR_MEAN` there is no interval: None.
    """
    count = effective_size(samples) if independent is None else independent
    if count < MIN_FOR_MEAN:
        return None
    return student_t(count - 1) * float(np.std(samples, ddof=1)) / math.sqrt(count)


def mean_of(samples: Series, independent: int | None, method: str) -> Quantity:
    """The mean with its interval; see `mean_reach`."""
    mean, reach = float(np.mean(samples)), mean_reach(samples, independent)
    low, high = (None, None) if reach is None else (mean - reach, mean + reach)
    return quantity(mean, low, high, method)


def small_sample_mean(samples: Series) -> Quantity:
    """Mean of independent samples, such as images."""
    return mean_of(samples, len(samples), f"Student's t, {len(samples)} samples")


def skewed_mean(samples: Series, shape: float) -> Quantity:
    """Mean of few independent samples of something positive and skewed, such as distances of images: as of a gamma
    distribution, whose mean follows from the samples' sum. Student's t interval misses it too often on the far side.

    Args:
        shape: of it, 1 for an exponential one: the inverse of the squared ratio of deviation to mean.
    """
    values = np.asarray(samples, dtype=np.float64)
    mean, freedom = float(values.mean()), 2 * shape * len(values)
    low, high = (mean * freedom / chi_square(freedom, sign) for sign in (1, -1))
    return quantity(mean, low, high, f"gamma of shape {shape:.2f}, {len(values)} samples")


def chi_square(freedom: float, sign: int) -> float:
    """Its .975 quantile, or with a sign of -1 its .025 quantile: Wilson and Hilferty's, which is too small, never too
    large, below a few degrees of freedom.
    """
    z = sign * _NORMAL
    part = 2 / (9 * freedom)
    return freedom * max(1 - part + z * math.sqrt(part), 1e-3) ** 3


def student_t(freedom: int) -> float:
    """The .975 quantile of Student's t: Cornish and Fisher's expansion, good to .002 from 4 degrees of freedom on."""
    z = _NORMAL
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    fourth = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + first / freedom + second / freedom**2 + third / freedom**3 + fourth / freedom**4


def quantity(value: float, low: float | None, high: float | None, method: str) -> Quantity:
    """A value with its interval, whose bounds are None where samples were too few."""
    return Quantity(value, _FEW if low is None else low, _FEW if high is None else high, CONFIDENCE, method)


def summarise(latency_ms: Series) -> tuple[Latency, Quantity]:
    """p50, p90, p99 and mean of the latency in ms, and the throughput in queries per second, with intervals."""

    def quantile(share: float) -> Quantity:
        bounds = quantile_interval(latency_ms, share)
        return quantity(percentile(latency_ms, share), *bounds, "order statistics, effective sample size")

    mean = mean_of(latency_ms, None, "Student's t, effective sample size")
    slow, fast = (1000 / ms if isinstance(ms, float) and ms > 0 else None for ms in (mean.high, mean.low))
    latency = Latency(quantile(0.5), quantile(0.9), quantile(0.99), mean)
    return latency, quantity(1000 / mean.value, slow, fast, mean.interval)


def round_ratios(subject: Sequence[Series], against: Sequence[Series]) -> np.ndarray[Any, Any]:
    """Per round, against's median over the subject's: above 1 where the subject is faster.

    A round holds a block of either side, run back to back: what slows the machine for longer slows both, and cancels.
    The ratio of two bundles is the median over rounds, its interval `quantile_interval(ratios, 0.5)`; a bootstrap over
    rounds missed the truth four times as often as its 95 % allow, beside another program on the machine.
    """
    return np.array([np.median(b) / np.median(a) for a, b in zip(subject, against, strict=True)])


def median(values: Series, method: str = "order statistics of rounds") -> Quantity:
    """Of values by round, with its interval."""
    return quantity(float(np.median(values)), *quantile_interval(values, 0.5), method)


def medians_in_turn(blocks: Sequence[Sequence[Series]]) -> list[Quantity]:
    """Medians of sides that were measured in turn, block by block; what slowed all of a round's blocks is taken out.

    Args:
        blocks: of each side, round by round.
    """
    rounds = min(map(len, blocks))
    medians = np.array([[percentile(block, 0.5) for block in of_side[:rounds]] for of_side in blocks])
    common = np.exp(np.log(medians).mean(0)) if len(blocks) > 1 else np.ones(rounds)
    how = "order statistics of rounds, measured in turn"
    return [median(row, how) for row in medians / common * np.median(common)]


def judge(low: float | None, high: float | None) -> str:
    """ "faster" or "slower" when the whole interval of the ratio lies outside 1 +- `MARGIN`; else no difference."""
    if low is not None and low > 1 + MARGIN:
        return "faster"
    if high is not None and high < 1 - MARGIN:
        return "slower"
    return "no difference shown"
