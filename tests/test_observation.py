"""What is watched beside the latency: power, memory, other programs; and what ends a measurement well all the same."""

import itertools
import os
import signal
import subprocess
import sys
import types

import pytest

from sparsifiner_edge.execution import Execution
from sparsifiner_edge.profiles.figures import ProfileResult
from sparsifiner_edge.profiles.measure import observe as observation
from sparsifiner_edge.profiles.measure.side import make_rules
from sparsifiner_edge.profiles.sensors import PowerSensor
from sparsifiner_edge.results import check_result
from sparsifiner_edge.runtime.child import Child
from tests.plain import profile_bundle
from tests.tiny import make_bundle

WATTS = 10.0


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("observation")
    return {
        "fast": make_bundle(folder / "fast", depth=2, width=256, size=16),
        "slow": make_bundle(folder / "slow", depth=16, width=256, size=16),
    }


flicker = itertools.cycle((0.99, 1.01))
"""A sensor that reads the same to the last digit is taken for frozen."""


def steady():
    return {"VDD_IN": WATTS * next(flicker)}


def made_up(read, averaging_s=0.0):
    return PowerSensor("made up", "VDD_IN", 0.02, read, averaging_s=averaging_s)


def observed(monkeypatch, read, bundle, averaging_s=0.0, **settings):
    def find(on):
        assert on == "cpu"  # where ONNX Runtime's default backend runs: an idle card's power would say nothing
        return made_up(read, averaging_s)

    monkeypatch.setattr(observation, "find_sensor", find)
    result = profile_bundle(bundle, threads=1, layers=False, **settings)
    check_result(result, "it", ProfileResult)
    return result


def test_energy_is_power_times_the_time_of_ones_own_queries(monkeypatch, bundles):
    result = observed(monkeypatch, steady, bundles["slow"], against=bundles["fast"], seconds=0.6)
    statistics = result["statistics"]
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
    assert result["method"]["sensor"]["name"] == "made up"
    assert len(result["method"]["sensor"]["idle_s"]) == 2
    assert len(result["samples"]["power"]["time_s"]) == result["method"]["sensor"]["readings"]
    assert set(result["method"]["conditions"]["subject"]) >= {"before", "during", "looks", "throttled_by"}


def test_a_sensor_that_averages_has_a_longer_baseline_and_wants_longer_windows(monkeypatch, bundles):
    result = observed(monkeypatch, steady, bundles["fast"], averaging_s=0.3, seconds=0.4, against=bundles["slow"])
    assert min(result["method"]["sensor"]["idle_s"]) >= 2 * 0.3 + 1
    energy = result["statistics"]["subject"]["energy"]
    assert "averages over 0.3 s" in energy["gross_j_per_inference"]["unavailable"]


@pytest.mark.parametrize(
    ("asked_for", "on"), [({}, "cpu"), ({"provider": "cuda"}, "gpu"), ({"backend": "tensorrt"}, "gpu")]
)
def test_power_is_read_where_the_backend_runs(monkeypatch, asked_for, on):
    asked = []

    def find(on):
        asked.append(on)
        raise StopIteration

    monkeypatch.setattr(observation, "find_sensor", find)
    side = types.SimpleNamespace(request=types.SimpleNamespace(execution=Execution(**asked_for)))
    with pytest.raises(StopIteration):
        observation.observe([side], make_rules(1), None, power=True)
    assert asked == [on]


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


@pytest.mark.parametrize(
    "read",
    [
        lambda: {"VDD_IN": float("nan")},
        lambda: {},
        lambda: 1 / 0,
    ],
)
def test_garbage_from_a_sensor_leaves_the_latency(monkeypatch, bundles, read):
    result = observed(monkeypatch, read, bundles["fast"], seconds=0.1)
    assert result["statistics"]["subject"]["queries"] > 0
    assert "unavailable" in result["statistics"]["subject"]["energy"]["gross_j_per_inference"]


def test_a_worker_that_dies_after_the_measurement_costs_its_description_alone(monkeypatch, bundles):
    ask = Child.ask

    def dying(self, op, *settings, **arguments):
        if op == "describe":
            os.kill(self.pid, signal.SIGKILL)
        return ask(self, op, *settings, **arguments)

    monkeypatch.setattr(Child, "ask", dying)
    result = profile_bundle(bundles["fast"], seconds=0.05, min_queries=1, threads=1, layers=False, power=False)
    assert result["statistics"]["subject"]["latency_ms"]["p50"]["value"] > 0
    assert "SIGKILL" in result["method"]["runtime"]["subject"]["kernels"]["unavailable"]


def test_without_a_sensor_there_is_a_reason(bundles):
    result = profile_bundle(bundles["fast"], seconds=0.05, min_queries=1, threads=1, layers=False, power=False)
    assert "not asked for" in result["statistics"]["subject"]["energy"]["unavailable"]
    assert "power" not in result["samples"]


def test_a_busy_program_beside_it_is_flagged(bundles):
    code = "print('on', flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as busy:
        try:
            busy.stdout.readline()
            result = profile_bundle(bundles["fast"], seconds=0.4, threads=1, layers=False, power=False)
        finally:
            busy.kill()
    figures = result["statistics"]["subject"]
    flagged = {flag["flag"] for flag in figures["flags"]}
    assert {"other-load", "too-short"} <= flagged
    assert figures["other_cores"] > 0.1
