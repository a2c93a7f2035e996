from pathlib import Path

import pytest

from sparsifiner_edge.bundle.manifest import Manifest
from sparsifiner_edge.bundle.store import Bundle
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.profiles import parse_axes
from sparsifiner_edge.profiles.sweep import SweepResult, _points
from sparsifiner_edge.results import check_result
from tests.plain import sweep_bundle
from tests.tiny import make_bundle


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    return {
        "dynamic": make_bundle(folder / "dynamic", depth=4, width=256, size=16),
        "fixed": make_bundle(folder / "fixed", batch=2),
    }


def test_every_point_is_measured(bundles):
    stages = []
    result = sweep_bundle(
        bundles["dynamic"], {"batch": [1, 8]}, threads=1, seconds=0.1, progress=lambda *s: stages.append(s)
    )
    check_result(result, "it", SweepResult)
    rows = result["statistics"]["sweep"]
    assert [(row["threads"], row["batch"]) for row in rows] == [(1, 1), (1, 8)]
    assert result["kind"] == "sweep"
    assert set(result["samples"]) == {"threads=1,batch=1", "threads=1,batch=8"}
    one, eight = rows[0], rows[1]
    # Eight images take longer than one, and there are eight times as many in a query.
    assert eight["latency_ms"]["p50"]["value"] > 2 * one["latency_ms"]["p50"]["value"]
    for row in (one, eight):
        throughput = row["throughput_per_s"]
        assert throughput["value"] == pytest.approx(1000 * row["batch"] / row["latency_ms"]["mean"]["value"])
        assert throughput["low"] < throughput["value"] < throughput["high"]
        assert "too-short" in {flag["flag"] for flag in row["flags"]}
    assert {stage for stage, *_ in stages} > {f"measuring {name}" for name in result["samples"]}


def test_points_are_every_combination_once():
    bundle = Bundle(Path("b"), Manifest(schema_version=3, files={}))
    points = _points({"threads": [1, 2, 1], "batch": [4, 1]}, None, bundle)
    assert points == [(1, 4), (1, 1), (2, 4), (2, 1)]
    assert _points({"batch": [2]}, 3, bundle) == [(3, 2)]


def test_a_fixed_batch_is_swept_over_threads_alone(bundles):
    rows = sweep_bundle(bundles["fixed"], {"threads": [1]}, seconds=0.05, min_queries=1)["statistics"]["sweep"]
    assert [(row["threads"], row["batch"]) for row in rows] == [(1, 2)]
    with pytest.raises(ConfigError, match=r"(?s)fixed batch of 2, and the sweep asks for 1, 2.*--batch dynamic"):
        sweep_bundle(bundles["fixed"], {"batch": [1, 2]})


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({}, "no axis"),
        ({"colour": [1]}, "over 'colour'"),
        ({"threads": []}, r"threads = \[\]"),
        ({"batch": [1, 0]}, r"batch = \[1, 0\]"),
    ],
)
def test_bad_axes_are_refused_before_anything_is_measured(bundles, axes, message):
    with pytest.raises(ConfigError, match=message):
        sweep_bundle(bundles["dynamic"], axes)


def test_axes_are_read_from_text():
    assert parse_axes(["threads=1,2", "batch=4"]) == {"threads": [1, 2], "batch": [4]}
    for texts, message in ((["threads"], "'threads'"), (["batch=a"], "'batch=a'"), (["batch=1", "batch=2"], "twice")):
        with pytest.raises(ConfigError, match=message):
            parse_axes(texts)
