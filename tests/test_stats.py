"""Tests of intervals and verdicts: coverage is as stated, and load of other programs gives no false speed-up."""

import numpy as np
import pytest

from sparsifiner_edge.profiles import stats


def correlated(random, count, memory=0.9):
    """Return a stationary AR(1) series, standard normal at each step."""
    noise = random.normal(size=count) * np.sqrt(1 - memory**2)
    series = np.empty(count)
    series[0] = random.normal()
    for i in range(1, count):
        series[i] = memory * series[i - 1] + noise[i]
    return series


def coverage(interval, truth, draw, trials=400):
    def holds(low, high):
        return (low is None or low <= truth) and (high is None or truth <= high)

    return np.mean([holds(*interval(draw())) for _ in range(trials)])


def median_interval(x):
    return stats.quantile_interval(x, 0.5)


@pytest.mark.parametrize(("share", "count"), [(0.5, 64), (0.9, 1000), (0.99, 1000)])
def test_quantile_intervals_cover_the_truth_of_a_skewed_distribution(share, count):
    random = np.random.default_rng(3)
    rate = coverage(
        lambda x: stats.quantile_interval(x, share), -np.log1p(-share), lambda: random.exponential(size=count)
    )
    assert rate >= 0.93


def mean_interval(values):
    found = stats.mean_of(values, None, "effective sample size")
    return found.low, found.high


def test_intervals_cover_the_truth_of_correlated_samples():
    random = np.random.default_rng(4)
    assert coverage(median_interval, 0.0, lambda: correlated(random, 1000)) >= 0.9
    assert coverage(mean_interval, 0.0, lambda: correlated(random, 1000)) >= 0.9
    # The correction makes the difference.
    assert coverage(lambda x: mean_interval(random.permutation(x)), 0.0, lambda: correlated(random, 1000)) < 0.6


@pytest.mark.parametrize("count", [5, 8, 30])
def test_intervals_of_few_images_cover_the_truth(count):
    random = np.random.default_rng(5)

    def interval(values):
        found = stats.small_sample_mean(values)
        return found.low, found.high

    assert 0.92 <= coverage(interval, 0.0, lambda: random.normal(size=count)) <= 0.99
    assert "too few" in stats.small_sample_mean([1.0, 2.0, 3.0, 4.0]).low.why
    for freedom, value in ((4, 2.776), (7, 2.365), (29, 2.045)):  # Student's table
        assert stats.student_t(freedom) == pytest.approx(value, abs=0.002)


def test_summary_of_known_samples():
    latency, throughput = stats.summarise(np.random.default_rng(0).permutation(np.arange(1.0, 102.0)))
    assert (latency.p50.value, latency.p90.value, latency.mean.value) == (51, 91, 51)
    assert throughput.value == pytest.approx(1000 / 51)
    assert throughput.low < throughput.value < throughput.high
    few = stats.summarise(np.random.default_rng(0).random(64))[0].p99
    assert few.low > 0
    assert "too few" in few.high.why
    assert stats.quantile_interval([1.5, 1.6, 1.4, 1.5, 1.55], 0.5) == (None, None)


def paired_rounds(random, true_ratio, rounds=40):
    """Return blocks of ten queries with a slow machine-wide drift of up to half and independent noise per query."""
    drift = np.exp(0.5 * correlated(random, rounds, 0.95))

    def side(scale):
        return [scale * d * random.lognormal(0, 0.1, 10) for d in drift]

    return stats.round_ratios(side(1.0), side(true_ratio))


def busy_ratios(random, rounds=20):
    """Return ratios of equal bundles next to another program: one takes twice the time for some rounds in a row."""
    return np.exp(np.log(2) * np.sign(correlated(random, rounds, 0.5)) * (random.random(rounds) < 0.7))


def test_ratios_cover_the_truth_while_the_machine_drifts_and_equal_bundles_seldom_get_a_verdict():
    random = np.random.default_rng(8)

    def share_of_verdicts(true_ratio, verdict):
        found = [stats.verdict_of(*median_interval(paired_rounds(random, true_ratio))) for _ in range(300)]
        return np.mean([v == verdict for v in found])

    assert coverage(median_interval, 1.5, lambda: paired_rounds(random, 1.5)) >= 0.92
    busy = [stats.verdict_of(*median_interval(busy_ratios(random))) for _ in range(1000)]
    assert np.mean([v == "no difference shown" for v in busy]) >= 0.95
    assert share_of_verdicts(1.0, "no difference shown") >= 0.97
    assert share_of_verdicts(1.2, "faster") >= 0.95
    assert share_of_verdicts(1 / 1.2, "slower") >= 0.95


def test_a_verdict_needs_the_whole_interval_beyond_one_percent():
    assert (stats.verdict_of(1.02, 1.05), stats.verdict_of(0.9, 0.98)) == ("faster", "slower")
    for interval in ((1.005, 1.05), (0.9, 0.995), (None, None)):
        assert stats.verdict_of(*interval) == "no difference shown"


@pytest.mark.parametrize(("count", "shape"), [(2, 0.6), (4, 1.0), (20, 0.6)])
def test_means_of_few_skewed_samples_cover_the_truth_on_the_far_side(count, shape):
    random = np.random.default_rng(5)

    def interval(samples):
        found = stats.skewed_mean(samples, shape)
        assert found.low < found.value < found.high
        return None, found.high

    assert coverage(interval, shape, lambda: random.gamma(shape, size=count)) >= 0.95


def test_what_slows_a_whole_round_is_taken_out() -> None:
    rounds = np.random.default_rng(0).uniform(1, 3, 15)
    one, two = stats.medians_in_turn([[[3 * x] * 5 for x in rounds], [[2 * x] * 5 for x in rounds]])
    assert one.value / two.value == pytest.approx(1.5)
    assert one.low == pytest.approx(one.value)
    assert stats.median(rounds).value == np.median(rounds)
