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
"""Time between readings in seconds."""
_MILLI = 1e-3
_REFRESH_S = 0.1
"""Time in seconds after which the energy counter is updated (arXiv 2312.02741)."""
_AVERAGE_S = 1.0
"""Time in seconds over which power is averaged on Ampere and later (arXiv 2312.02741)."""
THROTTLING = {
    "SwPowerCap": (0x04, "power cap"),
    "HwSlowdown": (0x08, "hardware slowdown"),
    "SwThermalSlowdown": (0x20, "thermal slowdown (driver)"),
    "HwThermalSlowdown": (0x40, "thermal slowdown (hardware)"),
    "HwPowerBrakeSlowdown": (0x80, "power brake"),
}
"""Reasons why a card slows down against the user's will.

NVML's name (after nvmlClocksEventReason) -> bit, and the name in results.
"""


class _Card(NamedTuple):
    """Handle of a card.

    Attributes:
        nvml: Module `pynvml` of nvidia-ml-py.
        handle: NVML's handle of the card.
    """

    nvml: Any
    handle: Any

    def number(self, name: str, *arguments: Any) -> int | None:
        """Return the result of an NVML function; None if NVML or the card does not support it.

        Args:
            name: Name of the function without "nvmlDeviceGet".
            arguments: Arguments after the handle.
        """
        read = getattr(self.nvml, f"nvmlDeviceGet{name}", None)
        try:
            return None if read is None else int(read(self.handle, *arguments))
        except self.nvml.NVMLError:
            return None


@contextlib.contextmanager
def open_card() -> Iterator[_Card]:
    """Open the card that runs inferences: the first in CUDA_VISIBLE_DEVICES, else card 0.

    Raises:
        UnavailableError: NVML, the driver or the card is missing, or NVML fails within the `with` block.
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
    """Return the handle of the first card in CUDA_VISIBLE_DEVICES.

    CUDA numbers the cards by speed unless CUDA_DEVICE_ORDER is PCI_BUS_ID, while NVML numbers them by PCI bus. With one
    card, both numbers are the same.
    """
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() or "0"
    if wanted.startswith(("GPU-", "MIG-")):
        return nvml.nvmlDeviceGetHandleByUUID(wanted)
    return nvml.nvmlDeviceGetHandleByIndex(int(wanted) if wanted.isdigit() else 0)


def find_nvml(root: Path) -> PowerSensor:  # noqa: ARG001  NVML has no files
    """Return a card's energy counter (Volta and later) or power as a sensor; Orin's NVML reports neither."""
    with open_card() as card:
        name, cards = card.nvml.nvmlDeviceGetName(card.handle), int(card.nvml.nvmlDeviceGetCount())
        counts = card.number("TotalEnergyConsumption") is not None
    others = f", one of {cards} cards: the first in CUDA_VISIBLE_DEVICES, by PCI bus" if cards > 1 else ""
    function = "TotalEnergyConsumption" if counts else "PowerUsage"

    def read() -> dict[str, float]:  # Opening NVML is cheap if it is open already.
        with open_card() as card:
            value = card.number(function)
            if value is None:
                card.nvml.nvmlDeviceGetName(card.handle)  # Raises NVML's own error if the card was lost.
                raise UnavailableError(f"NVML does not report the power of {name}")
        return {"gpu": value * _MILLI}

    read()
    total = f"{name}: the whole card, without the rest of the computer{others}"
    return PowerSensor("nvml", total, _PERIOD_S, read, counts=counts, averaging_s=_REFRESH_S if counts else _AVERAGE_S)
