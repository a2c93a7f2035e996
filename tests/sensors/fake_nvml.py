"""A stand-in for the module `pynvml`: the functions that are used, under their real names, and its real exceptions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pynvml


class FakeNvml:
    """One or more cards. What is set to an exception is raised.

    Attributes:
        power_mw, energy_mj, used: what the functions return; `broken`: raised by every call once set.
    """

    NVMLError = pynvml.NVMLError
    NVMLLibraryMismatchError = pynvml.NVMLLibraryMismatchError
    NVML_CLOCK_SM = pynvml.NVML_CLOCK_SM
    NVML_CLOCK_MEM = pynvml.NVML_CLOCK_MEM
    NVML_TEMPERATURE_GPU = pynvml.NVML_TEMPERATURE_GPU

    def __init__(self, cards: int = 1) -> None:
        self.cards = cards
        self.opened = 0
        self.asked: list[Any] = []
        self.power_mw: Any = 70_123
        self.energy_mj: Any = 5_000_000
        self.used: Any = 1 << 30
        self.throttle: Any = 0
        self.broken: Exception | None = None

    def _give(self, value: Any) -> Any:
        if self.broken is not None:
            raise self.broken
        if self.opened < 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
        if isinstance(value, Exception):
            raise value
        return value() if callable(value) else value

    def nvmlInit(self) -> None:
        if self.broken is not None:
            raise self.broken
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlDeviceGetCount(self) -> int:
        return self._give(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        self.asked.append(index)
        if index >= self.cards:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return self._give(f"card {index}")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Any:
        self.asked.append(uuid)
        return self._give(f"card {uuid}")

    def nvmlDeviceGetName(self, card: Any) -> Any:
        return self._give("NVIDIA GeForce RTX 4070")

    def nvmlDeviceGetPowerUsage(self, card: Any) -> int:
        return self._give(self.power_mw)

    def nvmlDeviceGetTotalEnergyConsumption(self, card: Any) -> int:
        return self._give(self.energy_mj)

    def nvmlDeviceGetClockInfo(self, card: Any, kind: int) -> int:
        return self._give({self.NVML_CLOCK_SM: 2475, self.NVML_CLOCK_MEM: 10501}[kind])

    def nvmlDeviceGetTemperature(self, card: Any, sensor: int) -> int:
        return self._give(61)

    def nvmlDeviceGetEnforcedPowerLimit(self, card: Any) -> int:
        return self._give(200_000)

    def nvmlDeviceGetCurrentClocksEventReasons(self, card: Any) -> int:
        return self._give(pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND))

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, card: Any) -> int:
        return self._give(self.throttle)

    def nvmlDeviceGetMemoryInfo(self, card: Any) -> Any:
        return SimpleNamespace(used=self._give(self.used))
