import os
import subprocess
import sys

import numpy as np
import pytest

from sparsifiner_edge.bundle.manifest import TensorSpec
from sparsifiner_edge.bundle.store import bundle_hash
from sparsifiner_edge.errors import ArtifactError, BackendError, ConfigError
from sparsifiner_edge.profiles.figures import ProfileResult
from sparsifiner_edge.profiles.measure.worker import fixed_inputs
from sparsifiner_edge.results import check_result
from tests.plain import profile_bundle
from tests.tiny import make_bundle

MB = 1 << 20
BARE = {"threads": 1, "layers": False, "power": False}
"""Latency and memory alone, on one thread."""


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """`slow` has eight times the MatMuls of `fast`, and little else in it costs time."""
    folder = tmp_path_factory.mktemp("profiles")
    return {
        "fast": make_bundle(folder / "fast", depth=2, width=256, size=16),
        "slow": make_bundle(folder / "slow", depth=16, width=256, size=16, function=True),
    }


def test_a_profile_is_a_whole_result(bundles):
    stages = []
    result = profile_bundle(bundles["fast"], seconds=0.3, **BARE, progress=lambda *seen: stages.append(seen))
    check_result(result, "it", ProfileResult)
    assert result["kind"] == "profile"
    assert result["subjects"][0]["sha256"] == bundle_hash(bundles["fast"])
    latency = result["samples"]["subject"]["latency_ms"]
    figures = result["statistics"]["subject"]
    assert sum(latency) >= 300
    assert len(latency) == figures["queries"] >= 64
    assert figures["latency_ms"]["p50"]["value"] == pytest.approx(np.median(latency))
    assert figures["throughput_per_s"]["value"] == pytest.approx(1000 / np.mean(latency))
    assert min(figures["load_ms"], figures["first_inference_ms"]) > 0
    assert result["method"]["runtime"]["subject"]["threads"] == 1
    assert result["method"]["input_shapes"] == {"image": [1, 16, 16, 3]}
    assert {stage for stage, _, _ in stages} == {"loading fast", "warming up subject", "measuring"}
    assert all(0 <= done <= planned for _, done, planned in stages)


def test_the_faster_bundle_is_found_faster(bundles):
    for seconds in (1.0, 4.0):  # a verdict needs independent rounds, which a busy machine gives late
        result = profile_bundle(bundles["fast"], against=bundles["slow"], seconds=seconds, **BARE)
        comparison = result["statistics"]["comparison"]
        if comparison["verdict"] == "faster":
            break
    assert result["kind"] == "comparison"
    assert comparison["verdict"] == "faster"
    # Eight times the MatMuls, beside a little that is the same in both.
    assert 3 < comparison["ratio"]["low"] <= comparison["ratio"]["value"] <= comparison["ratio"]["high"]
    # Where other programs want the core, the longer queries are interrupted and the shorter ones are not.
    others = {flag["flag"] for flag in result["statistics"]["against"]["flags"]}
    assert comparison["ratio"]["high"] < 12 or "other-load" in others
    assert comparison["sentence"].startswith("fast is faster than slow")
    order = result["method"]["first_in_round"]
    assert order.count("subject") == order.count("against") == comparison["rounds"] / 2
    kernels = {role: runtime["kernels"] for role, runtime in result["method"]["runtime"].items()}
    assert kernels == {"subject": "none (standard operators)", "against": "function bodies"}


@pytest.mark.everything
def test_a_bundle_is_not_faster_than_itself(bundles):
    comparisons = [
        profile_bundle(bundles["fast"], against=bundles["fast"], seconds=0.4, **BARE)["statistics"]["comparison"]
        for _ in range(3)
    ]
    # A 95 % interval may miss once in a while; twice in three would be a fault.
    assert sum(c["verdict"] == "no difference shown" for c in comparisons) >= 2
    assert all(0.5 < c["ratio"]["value"] < 2 for c in comparisons)


def test_peak_memory_holds_the_weights(tmp_path, bundles):
    heavy = make_bundle(tmp_path / "heavy", ballast_mb=200)
    peak = {}
    for name, folder in (("light", bundles["fast"]), ("heavy", heavy)):
        figures = profile_bundle(folder, seconds=0.1, **BARE)["statistics"]["subject"]
        memory = figures["memory"]["steady"]
        assert memory["peak_rss_bytes"] >= memory["rss_bytes"] >= memory["pss_bytes"] > 0
        assert memory["peak_rss_bytes"] >= figures["rss_before_load_bytes"]
        peak[name] = memory["peak_rss_bytes"]
        assert "other programs included" in figures["memory"]["device_source"]
    # Once the weights, at most the file beside them while it is read.
    assert 190 * MB < peak["heavy"] - peak["light"] < 450 * MB


def test_inputs_are_the_same_every_time_and_fill_their_range():
    specs = [TensorSpec("image", "uint8", ("batch", 32, 32, 3)), TensorSpec("x", "float16", (2, 5))]
    first, second = fixed_inputs(specs), fixed_inputs(specs)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
    assert first["image"].shape == (1, 32, 32, 3)
    assert first["x"].dtype == np.float16
    assert (first["image"].min(), first["image"].max()) == (0, 255)


@pytest.mark.parametrize("spec", [TensorSpec("a", "uint8", (1, "height", 3)), TensorSpec("a", "int64", (1, 3))])
def test_inputs_that_cannot_be_made_up_are_refused(spec):
    with pytest.raises(BackendError, match="'a'"):
        fixed_inputs([spec])


def test_a_users_file_does_not_take_a_librarys_place(tmp_path, monkeypatch, bundles):
    (tmp_path / "onnxruntime.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)
    assert profile_bundle(os.path.relpath(bundles["fast"]), seconds=0.05, min_queries=1, **BARE)["kind"] == "profile"


def test_few_queries_are_said_to_be_few(bundles):
    result = profile_bundle(bundles["slow"], seconds=0.01, min_queries=100_000, **BARE)
    assert "100000 queries" in result["method"]["cut_short"]
    assert 1 <= result["statistics"]["subject"]["queries"] < 100_000


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"backend": "abacus"}, BackendError, "'abacus'"),
        ({"seconds": 0}, ConfigError, "seconds is 0"),
        ({"min_queries": 0}, ConfigError, "min_queries is 0"),
        ({"against": "nowhere"}, ArtifactError, "nowhere is not a folder"),
    ],
)
def test_bad_settings_are_refused_at_once(bundles, changes, error, message):
    with pytest.raises(error, match=message):
        profile_bundle(bundles["fast"], **changes)


def test_measuring_needs_no_torch():
    code = (
        "import sys\nfor name in ('torch', 'timm', 'onnx'): sys.modules[name] = None\n"
        "import sparsifiner_edge.profiles.measure.worker, sparsifiner_edge.profiles.profile"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_that_the_worker_runs_is_imported_before_it():
    """`python -m` warns where a module's own package imports it first."""
    module = "sparsifiner_edge.profiles.measure.worker"
    code = f"import runpy, sys; import {module.rpartition('.')[0]}; sys.exit({module!r} in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
