"""Tests of NVIDIA cards: the values of NVML, and its behaviour when a card is lost."""

from __future__ import annotations

import time

import pynvml
import pytest

from sparsifiner_edge.errors import pip_install
from sparsifiner_edge.profiles.measure.memory import device_bytes
from sparsifiner_edge.profiles.sensors import Recording, find_sensor
from sparsifiner_edge.profiles.sensors.nvml import THROTTLING
from tests.plain import conditions, energy
from tests.sensors.curves import often

NOT_SUPPORTED = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
LOST = pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)


def test_without_a_driver_or_the_module_there_is_a_reason(monkeypatch):
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: (_ for _ in ()).throw(pynvml.NVMLError(12)))
    assert "NVML Shared Library Not Found" in find_sensor(on="gpu").not_used["nvml"]
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    assert pip_install("gpu") in find_sensor(on="gpu").not_used["nvml"]


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
    nvml.power_mw = NOT_SUPPORTED  # As on Orin.
    assert "does not report the power of NVIDIA GeForce RTX 4070" in find_sensor(on="gpu").not_used["nvml"]


@pytest.mark.parametrize(("variable", "asked"), [(None, 0), ("1,0", 1), ("GPU-8f1c", "GPU-8f1c"), ("nonsense", 0)])
def test_the_card_is_the_one_that_inferences_see(nvml, monkeypatch, variable, asked):
    nvml.cards = 2
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    sensor = find_sensor(on="gpu")
    assert set(nvml.asked) == {asked}
    assert "one of 2 cards: the first in CUDA_VISIBLE_DEVICES" in sensor.total
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert "Invalid Argument" in find_sensor(on="gpu").not_used["nvml"]


def test_a_card_that_is_lost(nvml):
    began = time.monotonic()
    nvml.energy_mj = lambda _: int((time.monotonic() - began) * 100e3)  # 100 W
    with Recording(often(find_sensor(on="gpu"))) as recording:
        start = time.monotonic_ns()
        time.sleep(0.8)
        nvml.broken = LOST
        time.sleep(0.8)
        end = time.monotonic_ns()
    figures = energy(recording, [(start, end)], 10)
    assert any("GPU is lost" in problem for problem in recording.problem_counts())
    assert set(recording.samples()) == {"gpu_j", "time_s"}
    assert "cover" in figures["gross_j_per_inference"]["unavailable"]
    clocks = [look.clocks_mhz.get("gpu") for _, look in (recording.looks[0], recording.looks[-1])]
    assert clocks == [2475.0, None]


def test_conditions_and_memory_of_a_card(nvml, tmp_path):
    nvml.throttle = pynvml.nvmlClocksEventReasonSwPowerCap | pynvml.nvmlClocksEventReasonGpuIdle
    look = conditions(tmp_path)
    assert look["clocks_mhz"] == {"gpu": 2475.0, "memory": 10501.0}
    assert look["power_limit_mw"] == 200_000
    assert look["temperature_c"] == {"NVML": 61.0}
    assert look["throttled_by"] == ["power cap"]
    for name, (bit, _) in THROTTLING.items():
        assert getattr(pynvml, f"nvmlClocksEventReason{name}") == bit
    assert device_bytes(tmp_path) == (1 << 30, "increase of the card's used memory (NVML), including other programs")
