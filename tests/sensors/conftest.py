from __future__ import annotations

import sys
from types import SimpleNamespace

import pynvml
import pytest


class FakeNvml:
    """One or more cards; replaces the module `pynvml` with its constants and exceptions.

    An attribute set to an exception is raised.

    Attributes:
        power_mw: Power.
        energy_mj: Energy counter.
        used: Memory in use.
        broken: Raised by every call once set.
    """

    def __init__(self):
        self.cards, self.opened, self.asked = 1, 0, []
        self.power_mw, self.energy_mj, self.used, self.throttle = 70_123, 5_000_000, 1 << 30, 0
        self.broken = None

    def __getattr__(self, name):
        functions = {
            "Name": "NVIDIA GeForce RTX 4070",
            "PowerUsage": self.power_mw,
            "TotalEnergyConsumption": self.energy_mj,
            "Temperature": 61,
            "EnforcedPowerLimit": 200_000,
            "MemoryInfo": SimpleNamespace(used=self.used),
            "CurrentClocksEventReasons": pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND),
            "CurrentClocksThrottleReasons": self.throttle,
            "Count": self.cards,
            "ClockInfo": lambda card, kind: {pynvml.NVML_CLOCK_SM: 2475, pynvml.NVML_CLOCK_MEM: 10501}[kind],
            "HandleByIndex": self._card,
            "HandleByUUID": self._card,
        }
        short = name.removeprefix("nvmlDeviceGet")

        def call(*arguments):
            if self.broken is not None or self.opened < 1:
                raise self.broken or pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
            value = functions[short]
            value = value(*arguments) if callable(value) else value
            if isinstance(value, Exception):
                raise value
            return value

        return call if short in functions else getattr(pynvml, name)

    def _card(self, number):
        self.asked.append(number)
        lacking = isinstance(number, int) and number >= self.cards
        return pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT) if lacking else f"card {number}"

    def nvmlInit(self):
        if self.broken is not None:
            raise self.broken
        self.opened += 1

    def nvmlShutdown(self):
        self.opened -= 1


@pytest.fixture
def nvml(monkeypatch):
    """A card that replaces those of this machine."""
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


@pytest.fixture
def no_nvml(monkeypatch):
    """No nvidia-ml-py."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
