"""Tests of profiles of real bundles: latency, memory, energy, comparisons and interrupted measurements."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest

from sparsifiner_edge.bundle.store import bundle_hash
from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.ops import native
from sparsifiner_edge.profiles.figures import ProfileResult
from sparsifiner_edge.profiles.measure import observe as observation
from sparsifiner_edge.profiles.measure.layers import LAYER_KINDS, measure_layers, read_trace
from sparsifiner_edge.profiles.sensors import PowerSensor
from sparsifiner_edge.results import check_result
from sparsifiner_edge.runtime.child import Child
from tests.commands import process
from tests.plain import profile_bundle
from tests.tiny import make_bundle

MB, WATTS = 1 << 20, 10.0
BARE = {"threads": 1, "layers": False, "power": False}
"""Latency and memory only, on one thread."""
BRIEF = {"seconds": 0.05, "min_queries": 1, **BARE}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """`slow` has eight times the MatMuls of `fast`; everything else takes little time."""
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
    assert "not requested" in figures["energy"]["unavailable"]
    assert list(result["samples"]) == ["subject"]
    assert result["method"]["runtime"]["subject"]["threads"] == 1
    assert result["method"]["input_shapes"] == {"image": [1, 16, 16, 3]}
    assert {stage for stage, _, _ in stages} == {"loading fast", "warming up subject", "measuring"}
    assert all(0 <= done <= planned for _, done, planned in stages)


def test_the_faster_bundle_is_found_faster(bundles):
    for seconds in (1.0, 4.0):  # a verdict needs independent rounds, which come late on a busy machine
        result = profile_bundle(bundles["fast"], against=bundles["slow"], seconds=seconds, **BARE)
        comparison = result["statistics"]["comparison"]
        if comparison["verdict"] == "faster":
            break
    assert result["kind"] == "comparison"
    assert comparison["verdict"] == "faster"
    # Eight times the MatMuls, plus a little that both share.
    assert 3 < comparison["ratio"]["low"] <= comparison["ratio"]["value"] <= comparison["ratio"]["high"]
    # If other programs need the core, longer queries are interrupted and shorter ones are not.
    others = {flag["flag"] for flag in result["statistics"]["against"]["flags"]}
    assert comparison["ratio"]["high"] < 12 or "other-load" in others
    kernels = {role: runtime["kernels"] for role, runtime in result["method"]["runtime"].items()}
    assert kernels == {"subject": "none (standard operators)", "against": "function bodies"}


def test_peak_memory_holds_the_weights(tmp_path, bundles):
    heavy = make_bundle(tmp_path / "heavy", ballast_mb=200)
    peak = {}
    for name, folder in (("light", bundles["fast"]), ("heavy", heavy)):
        figures = profile_bundle(folder, seconds=0.1, **BARE)["statistics"]["subject"]
        peak[name] = figures["peak_memory_bytes"]
        assert peak[name] >= figures["rss_before_load_bytes"] > 0
        assert "including other programs" in figures["device_source"]
    # The weights once, at most with the file while it is read.
    assert 190 * MB < peak["heavy"] - peak["light"] < 450 * MB


def test_few_queries_are_said_to_be_few(bundles):
    result = profile_bundle(bundles["slow"], seconds=0.01, min_queries=100_000, **BARE)
    assert "100000 queries" in result["method"]["cut_short"]
    assert 1 <= result["statistics"]["subject"]["queries"] < 100_000


flicker = np.random.default_rng(0)
"""Noise of readings: a sensor that repeats the same digits counts as frozen."""


def steady():
    return {"VDD_IN": WATTS * flicker.normal(1, 0.005)}


def observed(monkeypatch, read, bundle, averaging_s=0.0, **settings):
    def find(on):
        assert on == "cpu"  # the default backend of ONNX Runtime: the power of an idle card would mean nothing
        return PowerSensor("made up", "VDD_IN", 0.02, read, averaging_s=averaging_s)

    monkeypatch.setattr(observation, "find_sensor", find)
    result = profile_bundle(bundle, threads=1, layers=False, **settings)
    check_result(result, "it", ProfileResult)
    return result


def test_energy_is_power_times_the_time_of_ones_own_queries(monkeypatch, bundles):
    result = observed(monkeypatch, steady, bundles["slow"], against=bundles["fast"], seconds=0.6)
    statistics, method = result["statistics"], result["method"]
    for role in ("subject", "against"):
        energy, figures = statistics[role]["energy"], statistics[role]
        gross = energy["gross_j_per_inference"]["value"]
        seconds = sum(result["samples"][role]["latency_ms"]) / 1000
        # A block's window includes the loop around its queries.
        assert 1.0 <= energy["window_s"] / seconds < 1.2
        assert gross == pytest.approx(WATTS * energy["window_s"] / figures["queries"], rel=0.01)
        assert energy["net_j_per_inference"]["value"] == pytest.approx(0.0, abs=0.02 * gross)
    # Each uses its own time, not that of the run: energies differ as latencies do.
    gross = [statistics[role]["energy"]["gross_j_per_inference"]["value"] for role in ("subject", "against")]
    mean = [statistics[role]["latency_ms"]["mean"]["value"] for role in ("subject", "against")]
    assert gross[0] / gross[1] == pytest.approx(mean[0] / mean[1], rel=0.1)
    assert (method["sensor"]["name"], len(method["sensor"]["idle_s"])) == ("made up", 2)
    assert len(result["samples"]["power"]["time_s"]) == method["sensor"]["readings"]
    assert set(method["conditions"]["subject"]) >= {"before", "during", "throttled_by"}


def test_each_side_is_flagged_for_what_ran_it(monkeypatch, bundles):
    flagged = Mock(return_value=[])
    monkeypatch.setattr(observation, "flags_of", flagged)
    monkeypatch.setattr(Execution, "on_processor", property(lambda execution: execution.compute_precision == "auto"))
    sides = {"against": bundles["fast"], "against_execution": Execution(compute_precision="fp32")}
    profile_bundle(bundles["fast"], seconds=0.1, **sides, **BARE)
    assert [call.args[3] for call in flagged.call_args_list] == ["cpu", "gpu"]


def test_a_sensor_that_vanishes_ends_the_energy_alone(monkeypatch, bundles):
    count = itertools.count()

    def vanishing():
        if next(count) > 14:
            raise FileNotFoundError(2, "No such file or directory", "/sys/class/hwmon/hwmon3/in1_input")
        return steady()

    result = observed(monkeypatch, vanishing, bundles["fast"], seconds=0.6)
    figures = result["statistics"]["subject"]
    assert figures["latency_ms"]["p50"]["value"] > 0
    assert any("in1_input: No such file" in problem for problem in result["method"]["problems"])
    assert "cover" in figures["energy"]["gross_j_per_inference"]["unavailable"]


def test_a_worker_that_dies_after_the_measurement_costs_its_description_alone(monkeypatch, bundles):
    ask = Child.ask

    def dying(self, op, *settings, **arguments):
        if op == "describe":
            os.kill(self.pid, signal.SIGKILL)
        return ask(self, op, *settings, **arguments)

    monkeypatch.setattr(Child, "ask", dying)
    result = profile_bundle(bundles["fast"], **BRIEF)
    assert result["statistics"]["subject"]["latency_ms"]["p50"]["value"] > 0
    assert "SIGKILL" in result["method"]["runtime"]["subject"]["kernels"]["unavailable"]


def test_a_busy_program_beside_it_is_flagged(bundles):
    code = "print('on', flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as busy:
        try:
            busy.stdout.readline()
            result = profile_bundle(bundles["fast"], seconds=0.4, **BARE)
        finally:
            busy.kill()
    figures = result["statistics"]["subject"]
    assert {"other-load", "too-short"} <= {flag["flag"] for flag in figures["flags"]}
    assert figures["other_cores"] > 0.1


def test_the_table_shows_both_and_what_ran(bundles):
    run = process("profile", bundles["fast"], "--against", bundles["slow"], "--seconds", "0.5", "--threads", "1")
    assert (run.code, run.err) == (0, "")
    assert all(text in run.out for text in ("p50", "p90", "p99", "throughput", "first inference", "peak memory"))
    rows = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in run.out.splitlines() if "│" in line}
    assert [cell.strip() for cell in rows["kernels"]] == ["none (standard operators)", "function bodies"]
    assert [cell.strip()[0] for cell in rows["threads / cores allowed"]] == ["1", "1"]
    assert rows["backend"][0].strip().startswith("onnxruntime ")
    assert rows["precision"][0].strip() == "fp32"
    assert "other" in rows
    assert "fast: too-short: " in run.out
    assert "speed alone is not enough" in run.out


DEPTH = 6
"""Layers of the tiny model."""


@pytest.fixture(scope="module")
def exported(once, tiny_weights):
    """The same model sparse, with tokens pruned after layer 3, and dense."""
    from sparsifiner_edge.sparse.student import sparsify
    from tests.flat import export_bundle
    from tests.models import TINY

    def make(folder):
        student = sparsify(TINY, folder / "student", weights=tiny_weights, background_tokens=4, token_keep=((3, 0.7),))
        export_bundle(student, folder / "sparse")
        export_bundle(TINY, folder / "dense", weights=tiny_weights)

    folder = once("layers", make)
    return {name: folder / name for name in ("sparse", "dense")}


def measured(bundle, kernels):
    return measure_layers(bundle, Execution(kernels=kernels, threads=1), query_ms=50.0)


@pytest.mark.parametrize("kernels", ["native", "portable"])
def test_selection_stands_apart_from_attention_in_every_layer(exported, kernels):
    if kernels == "native" and native.library_path() is None:
        pytest.skip("no native library")
    rows = measured(exported["sparse"], kernels)
    selections = [row for row in rows if (row.kind, row.op) == ("selection", "KeySelect")]
    attentions = [row for row in rows if (row.kind, row.op) == ("attention", "SparseAttention")]
    assert [row.layer for row in selections] == [row.layer for row in attentions] == list(range(DEPTH))
    # One kernel, or the many nodes of a function body.
    assert all((row.nodes == 1) == (kernels == "native") for row in selections + attentions)
    assert {"Softmax", "TopK", "Gather"} <= {row.op for row in rows if (row.kind, row.layer) == ("selection", 3)}


def test_a_costly_part_is_found_costly(bundles):
    """A file without attention has no layers; MatMuls take most of its time."""
    rows = measured(bundles["slow"], "portable")
    assert sum(row.ms for row in rows if "MatMul" in row.op) > 0.7 * sum(row.ms for row in rows)
    assert all(row.layer is None and row.kind == "other" for row in rows)


def test_a_profile_has_layers_and_a_profiler_that_fails_costs_these_alone(exported, monkeypatch):
    asked = BRIEF | {"layers": True}
    figures = profile_bundle(exported["dense"], **asked)["statistics"]["subject"]
    assert {row["kind"] for row in figures["layers"]} <= set(LAYER_KINDS)
    monkeypatch.setattr("sparsifiner_edge.profiles.profile.LOAD_TIMEOUT_S", 1e-3)
    figures = profile_bundle(exported["dense"], **asked)["statistics"]["subject"]
    assert figures["queries"] > 0
    assert "gave no reply to 'layers'" in figures["layers"]["unavailable"]


RUN = {"cat": "Session", "name": "model_run", "dur": 1000}


@pytest.mark.parametrize("trace", [[], [RUN], [{"cat": "Node", "name": "a_kernel_time", "dur": 1000}]])
def test_a_trace_that_tells_nothing_is_refused(trace):
    with pytest.raises(BackendError, match="trace"):
        read_trace(trace, 1)
