import numpy as np
import pytest

from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.profiles.figures import ProfileResult
from sparsifiner_edge.profiles.rules import early_stopping, make_rules, mlperf_figures
from sparsifiner_edge.records import write_record
from sparsifiner_edge.results import check_result
from tests.plain import profile_bundle
from tests.tiny import make_bundle


@pytest.mark.parametrize(
    ("queries", "share", "discarded"),
    # What MLPerf's loadgen prints: p90 needs 64 queries and p99 662; of 100 queries it discards 2, of 201 nine.
    [(63, 0.9, None), (64, 0.9, 0), (100, 0.9, 2), (201, 0.9, 9), (661, 0.99, None), (662, 0.99, 0)],
)
def test_early_stopping_agrees_with_loadgen(queries, share, discarded):
    found = early_stopping(list(range(queries)), share)
    assert found == (None if discarded is None else (queries - 1 - discarded, discarded))


@pytest.mark.parametrize("queries", [64, 300])
def test_early_stopping_bounds_the_percentile_with_its_confidence(queries):
    random = np.random.default_rng(0)
    truth = -np.log(0.1)
    bounded = [early_stopping(random.exponential(size=queries))[0] >= truth for _ in range(3000)]
    assert np.mean(bounded) >= 0.985
    if queries == 300:  # It is hardly wider than it need be: two ranks below would not do.
        rank = early_stopping(list(range(queries)))[1] + 1
        below = [np.sort(random.exponential(size=queries))[-rank - 2] >= truth for _ in range(3000)]
        assert np.mean(below) < 0.99


def rules(name="mlperf", seconds=None, min_queries=None):
    return make_rules(name, seconds, min_queries)


@pytest.mark.parametrize(
    ("seconds", "queries", "enough"),
    [(599, 2000, False), (600, 1023, False), (600, 1024, True), (3, 24_575, False), (3, 24_576, True)],
)
def test_mlperf_ends_by_time_and_queries_or_by_many_queries(seconds, queries, enough):
    assert rules().enough(seconds, queries, blocks=1000) is enough


def test_quick_needs_its_time_and_its_queries():
    quick = rules("quick", seconds=1.0)
    assert not quick.enough(0.9, 1000, 1000)
    assert not quick.enough(2.0, 63, 1000)
    assert not quick.enough(2.0, 64, 19)
    assert quick.enough(1.0, 64, 20)
    assert "enough_queries" not in write_record(quick)


@pytest.mark.parametrize(
    ("count", "ms", "given", "valid", "why"),
    [
        (1024, 600.0, {}, True, "600 s and 1024 queries"),
        (24_576, 1.0, {}, True, "24576 queries; a submission to MLPerf would also have to last 600 s"),
        (2000, 1.0, {}, False, "ended before"),
        (2000, 400.0, {"min_queries": 10}, False, "its numbers were replaced"),
        (20, 40_000.0, {}, False, "too few queries"),
    ],
)
def test_an_mlperf_run_says_whether_it_is_valid(count, ms, given, valid, why):
    figures = mlperf_figures([ms] * count, rules(**given))
    assert figures.valid is valid
    assert why in figures.why
    assert figures.early_stopping_met is (count >= 64)
    if count < 64:
        assert "20 queries are too few" in figures.early_stopping_p90_ms.why
    else:
        assert figures.early_stopping_p90_ms == ms


def test_a_shortened_mlperf_run_is_reported_as_not_valid(tmp_path):
    bundle = make_bundle(tmp_path / "b", depth=2, width=64, size=8)
    result = profile_bundle(bundle, rules="mlperf", seconds=0.1, min_queries=64, threads=1, layers=False, power=False)
    check_result(result, "it", ProfileResult)
    figures = result["statistics"]["subject"]
    assert result["method"]["rules"]["valid"] is False
    assert figures["mlperf"]["valid"] is False
    assert figures["queries"] >= 64
    p90 = figures["latency_ms"]["p90"]
    assert p90["value"] <= figures["mlperf"]["early_stopping_p90_ms"] <= max(result["samples"]["subject"]["latency_ms"])
    # 1,000 queries and more: the bound is close to the percentile, not the largest of all.
    assert 0 < figures["mlperf"]["discarded"] < 0.1 * figures["queries"]


def test_mlperf_takes_one_image_a_query(tmp_path):
    bundle = make_bundle(tmp_path / "b", batch=4)
    with pytest.raises(ConfigError, match="subject's batch is fixed at 4"):
        profile_bundle(bundle, rules="mlperf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "slow"}, "rules is 'slow'"),
        ({"seconds": float("inf")}, "seconds is inf"),
        ({"seconds": float("nan")}, "seconds is nan"),
        ({"seconds": -1.0}, "seconds is -1.0"),
        ({"min_queries": 0}, "min_queries is 0"),
    ],
)
def test_rules_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        rules(**changes)
