"""NVIDIA cards: what NVML tells, and what it does when a card is lost."""

from __future__ import annotations

import inspect
import time

import pynvml
import pytest

from sparsifiner_edge.profiles.measure.memory import MemoryPhases
from sparsifiner_edge.profiles.sensors import Recorder, find_sensor
from sparsifiner_edge.profiles.sensors.nvml import THROTTLING
from tests.plain import conditions, energy
from tests.sensors.curves import often
from tests.sensors.fake_nvml import FUNCTIONS, FakeNvml

NOT_SUPPORTED = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
LOST = pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_fake_has_the_installed_modules_functions(name):
    real, fake = inspect.signature(getattr(pynvml, name)), inspect.signature(getattr(FakeNvml(), name))
    least = [p for p in real.parameters.values() if p.default is inspect.Parameter.empty]
    assert len(least) <= len(fake.parameters) <= len(real.parameters)


def test_the_fake_has_nothing_that_the_installed_module_lacks():
    public = [name for name in dir(FakeNvml) if name.startswith(("nvml", "NVML"))]
    assert set(FUNCTIONS) <= set(public)
    assert [name for name in public if not hasattr(pynvml, name)] == []


@pytest.mark.parametrize("name", THROTTLING)
def test_throttling_bits_are_those_of_the_installed_module(name):
    assert getattr(pynvml, f"nvmlClocksEventReason{name}") == THROTTLING[name][0]


def test_without_a_driver_the_real_module_is_told_why(monkeypatch):
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: (_ for _ in ()).throw(pynvml.NVMLError(12)))
    assert "NVML Shared Library Not Found" in find_sensor(on="gpu").probes["nvml"]


def test_without_nvidia_ml_py(no_nvml):
    assert 'pip install "sparsifiner-edge[gpu]"' in find_sensor(on="gpu").probes["nvml"]


def test_a_card_with_an_energy_counter(nvml):
    sensor = find_sensor(on="gpu")
    assert (sensor.name, sensor.total_rails) == ("nvml", ("gpu",))
    assert "RTX 4070" in sensor.total
    assert sensor.averaging_s == 0.1
    reading = sensor.read()
    assert reading.watts == {"gpu": pytest.approx(70.123)}
    assert reading.joules == {"gpu": pytest.approx(5000.0)}
    sensor.close()
    assert nvml.opened == 0


def test_a_card_without_one_averages_over_a_second(nvml):
    nvml.energy_mj = NOT_SUPPORTED
    sensor = find_sensor(on="gpu")
    assert sensor.averaging_s == 1.0
    assert sensor.read().joules == {}
    sensor.close()


def test_orin_tells_no_power(nvml):
    nvml.power_mw = nvml.energy_mj = NOT_SUPPORTED
    sensor = find_sensor(on="gpu")
    assert not sensor.available
    assert "tells no power of NVIDIA GeForce RTX 4070: Not Supported" in sensor.probes["nvml"]


@pytest.mark.parametrize(
    ("variable", "asked"),
    [(None, 0), ("1", 1), ("1,0", 1), ("GPU-8f1c", "GPU-8f1c"), ("", 0), ("nonsense", 0)],
)
def test_the_card_is_the_one_that_inferences_see(nvml, monkeypatch, variable, asked):
    nvml.cards = 2
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    sensor = find_sensor(on="gpu")
    assert set(nvml.asked) == {asked}
    assert "one of 2: the first of CUDA_VISIBLE_DEVICES" in sensor.total


def test_a_card_that_is_not_there(nvml, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert "Invalid Argument" in find_sensor(on="gpu").probes["nvml"]


def run(nvml, during=None, seconds=0.5):
    """A recording in which the counter runs at 100 W; `during` is called in its middle."""
    began = time.monotonic()
    nvml.energy_mj = lambda: int((time.monotonic() - began) * 100e3)
    nvml.power_mw = lambda: 100_000 + int(time.monotonic() * 1e6) % 100
    with Recorder(often(find_sensor(on="gpu"))) as recorder:
        recorder.idle(0.3)
        start = time.monotonic_ns()
        time.sleep(seconds / 2)
        if during is not None:
            during()
        time.sleep(seconds / 2)
        end = time.monotonic_ns()
        recorder.idle(0.3)
    return recorder.recording, energy(recorder.recording, [(start, end)], 10)


def test_energy_by_the_counter(nvml):
    recording, figures = run(nvml)
    assert figures["mean_w"] == pytest.approx(100, rel=0.01)
    assert figures["gross_j_per_inference"]["value"] == pytest.approx(figures["window_s"] * 100 / 10, rel=0.01)
    assert figures["problems"] == []
    assert nvml.opened == 0
    assert {"gpu_w", "gpu_j", "time_s"} == set(recording.samples())


def test_a_card_that_is_lost_and_stays_lost(nvml):
    recording, figures = run(nvml, lambda: setattr(nvml, "broken", LOST))
    assert "cover" in figures["gross_j_per_inference"]["unavailable"]
    assert any("GPU is lost" in p for p in figures["problems"])
    assert recording.after.nvml.why == "NVML: GPU is lost"
    assert recording.before.gpu_mhz == 2475


def test_a_card_that_is_reset_and_comes_back_with_its_counter_at_zero(nvml, monkeypatch):
    monkeypatch.setattr("sparsifiner_edge.profiles.sensors.recorder._RETRY_S", 0.05)

    def reset():
        nvml.broken = LOST
        time.sleep(0.1)
        nvml.broken = None
        began = time.monotonic()
        nvml.energy_mj = lambda: int((time.monotonic() - began) * 100e3)

    _, figures = run(nvml, reset, seconds=1.6)
    assert figures["mean_w"] == pytest.approx(100, rel=0.02)
    assert figures["covered"] < 0.97
    assert any("GPU is lost" in p for p in figures["problems"])
    assert any("reset" in p for p in figures["problems"])


def test_conditions_of_a_card(nvml, tmp_path):
    nvml.throttle = pynvml.nvmlClocksEventReasonSwPowerCap | pynvml.nvmlClocksEventReasonGpuIdle
    look = conditions(tmp_path)
    assert look["gpu_mhz"] == 2475
    assert look["memory_mhz"] == 10501
    assert look["power_limit_mw"] == 200_000
    assert look["temperature_c"] == {"NVML": 61.0}
    assert look["throttled_by"] == ["power cap"]


def test_device_memory_by_process(nvml, tmp_path):
    phases = MemoryPhases(4242)
    nvml.processes = [(1, 5), (4242, 800 << 20)]
    assert phases.end("load").device_bytes == 800 << 20
    assert "memories of their own" in phases.phases["load"].unified_bytes.why


@pytest.mark.parametrize("listed", [[], [(4242, None)]])
def test_device_memory_where_the_driver_does_not_name_the_process(nvml, listed):
    phases = MemoryPhases(4242)
    nvml.processes, nvml.used = listed, nvml.used + (300 << 20)
    phase = phases.end("load")
    assert phase.device_bytes == 300 << 20
    assert "card's used memory" in phase.device_source


def test_device_memory_without_a_card(no_nvml):
    assert "nvidia-ml-py" in MemoryPhases(1).end("load").device_bytes.why
