"""NVIDIA graphics cards through NVML (nvidia-ml-py): energy counter, power, clocks, temperature, throttling, memory.

Units as in NVIDIA's NVML reference: milliwatts, millijoules since the driver was loaded, megahertz, degrees Celsius.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sparsifiner_edge.errors import pip_install
from sparsifiner_edge.profiles.sensors.power import PowerSensor, UnavailableError

_PERIOD_S = 0.1
_MILLI = 1e-3
# The counter refreshes about every 100 ms; power is a one-second average on Ampere and later (arXiv 2312.02741).
_REFRESH_S = 0.1
_AVERAGE_S = 1.0
THROTTLING = {
    "SwPowerCap": (0x04, "power cap"),
    "HwSlowdown": (0x08, "hardware slowdown"),
    "SwThermalSlowdown": (0x20, "thermal slowdown (driver)"),
    "HwThermalSlowdown": (0x40, "thermal slowdown (hardware)"),
    "HwPowerBrakeSlowdown": (0x80, "power brake"),
}
"""What slows a card down against the user's will: NVML's name (after nvmlClocksEventReason), its bit, our word."""


class _Card(NamedTuple):
    """A card's handle, and the module `pynvml` of nvidia-ml-py."""

    nvml: Any
    handle: Any

    def number(self, name: str, *arguments: Any) -> int | None:
        """What a function of NVML, named without "nvmlDeviceGet", says; None where NVML or the card lacks it."""
        read = getattr(self.nvml, f"nvmlDeviceGet{name}", None)
        try:
            return None if read is None else int(read(self.handle, *arguments))
        except self.nvml.NVMLError:
            return None


@contextlib.contextmanager
def open_card() -> Iterator[_Card]:
    """The card that inferences run on: the first of CUDA_VISIBLE_DEVICES, else card 0.

    Raises:
        UnavailableError: no NVML, no driver, no such card; or NVML fails within the block.
    """
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        raise UnavailableError(f"nvidia-ml-py is not installed ({pip_install('gpu')})") from None
    try:
        nvml.nvmlInit()
        try:
            yield _Card(nvml, _handle(nvml))
        finally:
            with contextlib.suppress(nvml.NVMLError):
                nvml.nvmlShutdown()
    except (nvml.NVMLError, getattr(nvml, "NVMLLibraryMismatchError", nvml.NVMLError)) as error:
        raise UnavailableError(f"NVML: {error}") from error


def _handle(nvml: Any) -> Any:
    """CUDA numbers the cards by speed unless CUDA_DEVICE_ORDER is PCI_BUS_ID; with one card both are the same."""
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() or "0"
    if wanted.startswith(("GPU-", "MIG-")):
        return nvml.nvmlDeviceGetHandleByUUID(wanted)
    return nvml.nvmlDeviceGetHandleByIndex(int(wanted) if wanted.isdigit() else 0)


def find_nvml(root: Path) -> PowerSensor:  # noqa: ARG001  NVML has no files
    """A card's energy counter (Volta and later), else its power; Orin's NVML tells neither."""
    with open_card() as card:
        name, cards = card.nvml.nvmlDeviceGetName(card.handle), int(card.nvml.nvmlDeviceGetCount())
        counts = card.number("TotalEnergyConsumption") is not None
    others = f", one of {cards}: the first of CUDA_VISIBLE_DEVICES, by PCI bus" if cards > 1 else ""
    function = "TotalEnergyConsumption" if counts else "PowerUsage"

    def read() -> dict[str, float]:  # NVML is cheap to open where it is open already.
        with open_card() as card:
            value = card.number(function)
            if value is None:
                card.nvml.nvmlDeviceGetName(card.handle)  # A card that was lost says so itself.
                raise UnavailableError(f"NVML tells no power of {name}")
        return {"gpu": value * _MILLI}

    read()
    total = f"{name}: the whole card, nothing of the computer around it{others}"
    return PowerSensor("nvml", total, _PERIOD_S, read, counts=counts, averaging_s=_REFRESH_S if counts else _AVERAGE_S)
