"""Profiles of real bundles: latency, memory, energy beside them, and what ends a measurement well all the same."""

import itertools
import os
import signal
import subprocess
import sys
import types

import numpy as np
import pytest

from sparsifiner_edge.bundle.manifest import TensorSpec
from sparsifiner_edge.bundle.store import bundle_hash
from sparsifiner_edge.errors import ArtifactError, BackendError, ConfigError
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.profiles.figures import ProfileResult
from sparsifiner_edge.profiles.measure import observe as observation
from sparsifiner_edge.profiles.measure.side import make_rules
from sparsifiner_edge.profiles.measure.worker import fixed_inputs
from sparsifiner_edge.profiles.sensors import PowerSensor
from sparsifiner_edge.results import check_result
from sparsifiner_edge.runtime.child import Child
from tests.plain import profile_bundle
from tests.tiny import make_bundle

MB, WATTS = 1 << 20, 10.0
BARE = {"threads": 1, "layers": False, "power": False}
"""Latency and memory alone, on one thread."""
BRIEF = {"seconds": 0.05, "min_queries": 1, **BARE}


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
    assert "not asked for" in figures["energy"]["unavailable"]
    assert list(result["samples"]) == ["subject"]
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
    kernels = {role: runtime["kernels"] for role, runtime in result["method"]["runtime"].items()}
    assert kernels == {"subject": "none (standard operators)", "against": "function bodies"}


def test_peak_memory_holds_the_weights(tmp_path, bundles):
    heavy = make_bundle(tmp_path / "heavy", ballast_mb=200)
    peak = {}
    for name, folder in (("light", bundles["fast"]), ("heavy", heavy)):
        figures = profile_bundle(folder, seconds=0.1, **BARE)["statistics"]["subject"]
        peak[name] = figures["peak_rss_bytes"]
        assert peak[name] >= figures["rss_before_load_bytes"] > 0
        assert "other programs included" in figures["device_source"]
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
    for spec in (TensorSpec("a", "uint8", (1, "height", 3)), TensorSpec("a", "int64", (1, 3))):
        with pytest.raises(BackendError, match="'a'"):
            fixed_inputs([spec])


def test_a_users_file_does_not_take_a_librarys_place(tmp_path, monkeypatch, bundles):
    (tmp_path / "onnxruntime.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)
    assert profile_bundle(os.path.relpath(bundles["fast"]), **BRIEF)["kind"] == "profile"


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


@pytest.mark.parametrize(
    "code",
    [
        "for name in ('torch', 'timm', 'onnx'): sys.modules[name] = None\n"
        "import sparsifiner_edge.profiles.measure.worker, sparsifiner_edge.profiles.profile",
        # `python -m` warns where a module's own package imports it first.
        "import sparsifiner_edge.profiles.measure as m; sys.exit(f'{m.__name__}.worker' in sys.modules)",
    ],
)
def test_measuring_needs_no_torch_and_its_package_imports_no_worker(code):
    subprocess.run([sys.executable, "-c", f"import sys\n{code}"], check=True)


flicker = np.random.default_rng(0)
"""A sensor that reads the same to the last digit is taken for frozen."""


def steady():
    return {"VDD_IN": WATTS * flicker.normal(1, 0.005)}


def observed(monkeypatch, read, bundle, averaging_s=0.0, **settings):
    def find(on):
        assert on == "cpu"  # where ONNX Runtime's default backend runs: an idle card's power would say nothing
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
        # The window of a block holds the loop around its queries too.
        assert 1.0 <= energy["window_s"] / seconds < 1.2
        assert gross == pytest.approx(WATTS * energy["window_s"] / figures["queries"], rel=0.01)
        assert energy["net_j_per_inference"]["value"] == pytest.approx(0.0, abs=0.02 * gross)
    # Each has its own time, not the whole run's: their energies differ as their latencies do.
    gross = [statistics[role]["energy"]["gross_j_per_inference"]["value"] for role in ("subject", "against")]
    mean = [statistics[role]["latency_ms"]["mean"]["value"] for role in ("subject", "against")]
    assert gross[0] / gross[1] == pytest.approx(mean[0] / mean[1], rel=0.1)
    assert (method["sensor"]["name"], len(method["sensor"]["idle_s"])) == ("made up", 2)
    assert len(result["samples"]["power"]["time_s"]) == method["sensor"]["readings"]
    assert set(method["conditions"]["subject"]) >= {"before", "during", "throttled_by"}


def test_a_sensor_that_averages_has_a_longer_baseline_and_wants_longer_windows(monkeypatch, bundles):
    result = observed(monkeypatch, steady, bundles["fast"], averaging_s=0.3, seconds=0.4, against=bundles["slow"])
    assert min(result["method"]["sensor"]["idle_s"]) >= 2 * 0.3 + 1
    energy = result["statistics"]["subject"]["energy"]
    assert "averages over 0.3 s" in energy["gross_j_per_inference"]["unavailable"]


@pytest.mark.parametrize("asked_for", [{"provider": "cuda"}, {"backend": "tensorrt"}])
def test_power_is_read_where_the_backend_runs(monkeypatch, asked_for):
    asked = []

    def find(on):
        asked.append(on)
        raise StopIteration

    monkeypatch.setattr(observation, "find_sensor", find)
    with pytest.raises(StopIteration):
        observation.observe([types.SimpleNamespace(execution=Execution(**asked_for))], make_rules(1), None, power=True)
    assert asked == ["gpu"]


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
