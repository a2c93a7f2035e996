"""NVIDIA cards: what NVML tells, and what it does when a card is lost."""

from __future__ import annotations

import inspect
import time

import pynvml
import pytest

from sparsifiner_edge.profiles.measure.memory import DeviceMemory
from sparsifiner_edge.profiles.sensors import Recorder, find_sensor
from sparsifiner_edge.profiles.sensors.nvml import THROTTLING
from tests.plain import conditions, energy
from tests.sensors.curves import often
from tests.sensors.fake_nvml import FUNCTIONS, FakeNvml

NOT_SUPPORTED = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
LOST = pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)


def test_the_fake_is_like_the_installed_module():
    for name in FUNCTIONS:
        real, fake = inspect.signature(getattr(pynvml, name)), inspect.signature(getattr(FakeNvml(), name))
        least = [p for p in real.parameters.values() if p.default is inspect.Parameter.empty]
        assert len(least) <= len(fake.parameters) <= len(real.parameters), name
    for name, (bit, _) in THROTTLING.items():
        assert getattr(pynvml, f"nvmlClocksEventReason{name}") == bit


def test_without_a_driver_or_the_module_there_is_a_reason(monkeypatch):
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: (_ for _ in ()).throw(pynvml.NVMLError(12)))
    assert "NVML Shared Library Not Found" in find_sensor(on="gpu").not_used["nvml"]
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    assert 'pip install "sparsifiner-edge[gpu]"' in find_sensor(on="gpu").not_used["nvml"]


def test_a_card_with_an_energy_counter_and_one_without(nvml):
    sensor = find_sensor(on="gpu")
    assert (sensor.name, sensor.counts, sensor.averaging_s) == ("nvml", True, 0.1)
    assert "RTX 4070" in sensor.total
    assert sensor.read() == {"gpu": pytest.approx(5000.0)}
    nvml.energy_mj = NOT_SUPPORTED
    sensor = find_sensor(on="gpu")
    assert (sensor.counts, sensor.averaging_s) == (False, 1.0)
    assert sensor.read() == {"gpu": pytest.approx(70.123)}
    assert nvml.opened == 0


def test_orin_tells_no_power(nvml):
    nvml.power_mw = nvml.energy_mj = NOT_SUPPORTED
    assert "tells no power of NVIDIA GeForce RTX 4070" in find_sensor(on="gpu").not_used["nvml"]


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
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert "Invalid Argument" in find_sensor(on="gpu").not_used["nvml"]


def run(nvml, during=lambda: None, seconds=0.6):
    """A recording in which the counter runs at 100 W; `during` is called in its middle."""
    began = time.monotonic()
    nvml.energy_mj = lambda: int((time.monotonic() - began) * 100e3)
    with Recorder(often(find_sensor(on="gpu"))) as recorder:
        start = time.monotonic_ns()
        time.sleep(seconds / 2)
        during()
        time.sleep(seconds / 2)
        end = time.monotonic_ns()
    return recorder.recording, energy(recorder.recording, [(start, end)], 10)


def test_energy_by_the_counter(nvml):
    recording, figures = run(nvml)
    assert figures["mean_w"] == pytest.approx(100, rel=0.01)
    assert figures["gross_j_per_inference"]["value"] == pytest.approx(figures["window_s"] * 100 / 10, rel=0.01)
    assert recording.told() == []
    assert nvml.opened == 0
    assert set(recording.samples()) == {"gpu_j", "time_s"}


def test_a_card_that_is_lost_and_stays_lost(nvml):
    recording, figures = run(nvml, lambda: setattr(nvml, "broken", LOST))
    assert "cover" in figures["gross_j_per_inference"]["unavailable"]
    assert any("GPU is lost" in problem for problem in recording.told())
    assert [look.clocks_mhz.get("gpu") for _, look in (recording.looks[0], recording.looks[-1])] == [2475.0, None]


def test_a_card_that_is_reset_and_comes_back_with_its_counter_at_zero(nvml):
    def reset():
        nvml.broken = LOST
        time.sleep(0.1)
        nvml.broken = None
        began = time.monotonic()
        nvml.energy_mj = lambda: int((time.monotonic() - began) * 100e3)

    recording, figures = run(nvml, reset, seconds=1.6)
    assert figures["mean_w"] == pytest.approx(100, rel=0.02)
    assert any("GPU is lost" in problem for problem in recording.told())


def test_conditions_of_a_card(nvml, tmp_path):
    nvml.throttle = pynvml.nvmlClocksEventReasonSwPowerCap | pynvml.nvmlClocksEventReasonGpuIdle
    look = conditions(tmp_path)
    assert look["clocks_mhz"] == {"gpu": 2475.0, "memory": 10501.0}
    assert look["power_limit_mw"] == 200_000
    assert look["temperature_c"] == {"NVML": 61.0}
    assert look["throttled_by"] == ["power cap"]


def test_device_memory_is_the_rise_of_the_cards(nvml, tmp_path):
    memory = DeviceMemory(tmp_path)
    nvml.used += 300 << 20
    assert memory.taken() == 300 << 20
    assert "card's used memory" in memory.source
