"""NVIDIA graphics cards through NVML (nvidia-ml-py): energy counter, power, clocks, temperature, throttling, memory.

Units as in NVIDIA's NVML reference: milliwatts, millijoules since the driver was loaded, megahertz, degrees Celsius.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sparsifiner_edge.profiles.sensors.base import PowerSensor, Reading, UnavailableError
from sparsifiner_edge.records import Unavailable

_PERIOD_S = 0.1
_MILLI = 1e-3
# The counter refreshes about every 100 ms; power is a one-second average on Ampere and later (arXiv 2312.02741).
_REFRESH_S = 0.1
_AVERAGE_S = 1.0
_RAIL = "gpu"
THROTTLING = {
    "SwPowerCap": (0x04, "power cap"),
    "HwSlowdown": (0x08, "hardware slowdown"),
    "SwThermalSlowdown": (0x20, "thermal slowdown (driver)"),
    "HwThermalSlowdown": (0x40, "thermal slowdown (hardware)"),
    "HwPowerBrakeSlowdown": (0x80, "power brake"),
}
"""What slows a card down against the user's will: NVML's name (after nvmlClocksEventReason), its bit, our word."""


def load_nvml() -> Any:
    """The module `pynvml` of nvidia-ml-py.

    Raises:
        UnavailableError: it is not installed.
    """
    try:
        return importlib.import_module("pynvml")
    except ImportError:
        raise UnavailableError('nvidia-ml-py is not installed (pip install "sparsifiner-edge[gpu]")') from None


@contextlib.contextmanager
def nvml_device() -> Iterator[tuple[Any, Any]]:
    """The module and the handle of the card that inferences run on: the first of CUDA_VISIBLE_DEVICES, else card 0.

    Raises:
        UnavailableError: no NVML, no driver, no such card; or NVML fails within the block.
    """
    nvml = load_nvml()
    try:
        nvml.nvmlInit()
        try:
            yield nvml, _handle(nvml)
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
    """A card's energy counter (Volta and later) and its power; Orin's NVML tells neither."""
    with nvml_device() as (nvml, handle):
        name, cards = nvml.nvmlDeviceGetName(handle), int(nvml.nvmlDeviceGetCount())
    counted = bool(_read().joules)
    others = f", one of {cards}: the first of CUDA_VISIBLE_DEVICES, by PCI bus" if cards > 1 else ""
    return PowerSensor(
        "nvml",
        f"{name}: the whole card, nothing of the computer around it{others}",
        (_RAIL,),
        (_RAIL,),
        _PERIOD_S,
        _read,
        averaging_s=_REFRESH_S if counted else _AVERAGE_S,
    )


def _read() -> Reading:
    """Power now, and energy since the driver was loaded. NVML is cheap to open where it is open already."""
    with nvml_device() as (nvml, card):
        power = _ask(nvml, nvml.nvmlDeviceGetPowerUsage, card)
        energy = _ask(nvml, nvml.nvmlDeviceGetTotalEnergyConsumption, card)
        if isinstance(power, Unavailable) and isinstance(energy, Unavailable):
            raise UnavailableError(f"NVML tells no power of {nvml.nvmlDeviceGetName(card)}: {power.why}")
    watts, joules = ({} if isinstance(value, Unavailable) else {_RAIL: value * _MILLI} for value in (power, energy))
    return Reading(watts, joules)


def _ask(nvml: Any, read: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of NVML says, or `Unavailable`."""
    try:
        return read(*arguments)
    except nvml.NVMLError as error:
        return Unavailable(str(error))


def nvml_number(nvml: Any, card: Any, name: str, *arguments: Any) -> int | None:
    """What a function of NVML says of a card; None where NVML, or the card, lacks it."""
    read = getattr(nvml, name, None)
    value = None if read is None else _ask(nvml, read, card, *arguments)
    return None if value is None or isinstance(value, Unavailable) else int(value)
