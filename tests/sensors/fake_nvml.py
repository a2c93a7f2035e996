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

    def __init__(self) -> None:
        self.cards, self.opened, self.asked = 1, 0, list[Any]()
        self.power_mw: Any = 70_123
        self.energy_mj: Any = 5_000_000
        self.used, self.throttle = 1 << 30, 0
        self.broken: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        """Of constants and exceptions the real ones; of functions that are used what they give for a card."""
        values: dict[str, Any] = {
            "Name": "NVIDIA GeForce RTX 4070", "PowerUsage": self.power_mw, "TotalEnergyConsumption": self.energy_mj,
            "Temperature": 61, "EnforcedPowerLimit": 200_000, "MemoryInfo": SimpleNamespace(used=self.used),
            "CurrentClocksEventReasons": pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND),
            "CurrentClocksThrottleReasons": self.throttle, "Count": self.cards,
        }  # fmt: skip
        short = name.removeprefix("nvmlDeviceGet")
        return (lambda *_: self._give(values[short])) if short in values else getattr(pynvml, name)

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

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        self.asked.append(index)
        if index >= self.cards:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return self._give(f"card {index}")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Any:
        self.asked.append(uuid)
        return self._give(f"card {uuid}")

    def nvmlDeviceGetClockInfo(self, card: Any, kind: int) -> int:
        return self._give({pynvml.NVML_CLOCK_SM: 2475, pynvml.NVML_CLOCK_MEM: 10501}[kind])
