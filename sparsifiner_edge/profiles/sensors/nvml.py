"""NVIDIA graphics cards through NVML (nvidia-ml-py): energy counter, power, clocks, temperature, throttling, memory.

Units as in NVIDIA's NVML reference: milliwatts, millijoules since the driver was loaded, megahertz, degrees Celsius.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sparsifiner_edge.profiles.sensors.base import PowerSensor, Reading, UnavailableError

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
"""What slows a card down against the user's will: NVML's name (after nvmlClocksEventReason), its bit, and ours."""


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
    """A card's energy counter (Volta and later) and its power.

    Raises:
        UnavailableError: there is no NVML, no card, or it tells neither (as on Orin).
    """
    with nvml_device() as (nvml, handle):
        name = _text(nvml.nvmlDeviceGetName(handle))
        counted = _try(nvml, lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) is not None
        reason = _reason(nvml, lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        if reason and not counted:
            raise UnavailableError(f"NVML tells no power of {name}: {reason}")
        cards = int(nvml.nvmlDeviceGetCount())
    reader = _Reader()
    return PowerSensor(
        "nvml",
        f"{name}: the whole card, nothing of the computer around it",
        (_RAIL,),
        (_RAIL,),
        _PERIOD_S,
        reader.read,
        reader.close,
        averaging_s=_REFRESH_S if counted else _AVERAGE_S,
        notes=_notes(counted, cards),
    )


_RAIL = "gpu"


def _notes(counted: bool, cards: int) -> tuple[str, ...]:
    notes = ["some cards look at their power a quarter of the time (arXiv 2312.02741): measure long, and repeat"]
    if not counted:
        notes.append("power is a running average of about a second on Ampere and later")
    if cards > 1:
        notes.append(f"one of {cards} cards: the first of CUDA_VISIBLE_DEVICES, counted in the order of the PCI bus")
    return tuple(notes)


class _Reader:
    """Holds NVML open between readings, and opens it anew after an error: a card may come back after a reset."""

    def __init__(self) -> None:
        self._open: contextlib.ExitStack | None = None
        self._nvml: Any = None
        self._card: Any = None

    def read(self) -> Reading:
        if self._open is None:
            self._open = contextlib.ExitStack()
            self._nvml, self._card = self._open.enter_context(nvml_device())
        nvml, card = self._nvml, self._card
        reasons: list[str] = []
        watts = _value(nvml, lambda: nvml.nvmlDeviceGetPowerUsage(card), reasons)
        joules = _value(nvml, lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(card), reasons)
        if watts is None and joules is None:
            self.close()
            raise UnavailableError(f"NVML: {'; '.join(dict.fromkeys(reasons))}")
        return Reading(
            {} if watts is None else {_RAIL: watts * _MILLI}, {} if joules is None else {_RAIL: joules * _MILLI}
        )

    def close(self) -> None:
        opened, self._open = self._open, None
        if opened is not None:
            opened.close()


def _value(nvml: Any, read: Callable[[], Any], reasons: list[str]) -> float | None:
    try:
        return float(read())
    except nvml.NVMLError as error:
        reasons.append(str(error))
        return None


def _try(nvml: Any, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except nvml.NVMLError:
        return None


def _reason(nvml: Any, read: Callable[[], Any]) -> str:
    try:
        read()
    except nvml.NVMLError as error:
        return str(error)
    return ""


def _text(name: Any) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)


class CardConditions(NamedTuple):
    """Of an NVIDIA card at a moment; None where it does not say."""

    gpu_mhz: int | None
    memory_mhz: int | None
    gpu_c: int | None
    performance_state: int | None
    power_limit_mw: int | None
    throttled_by: list[str] | None


def nvml_conditions() -> CardConditions:
    """The card's.

    Raises:
        UnavailableError: no NVML or no card.
    """
    with nvml_device() as (nvml, card):
        numbers = (
            _try(nvml, lambda: nvml.nvmlDeviceGetClockInfo(card, nvml.NVML_CLOCK_SM)),
            _try(nvml, lambda: nvml.nvmlDeviceGetClockInfo(card, nvml.NVML_CLOCK_MEM)),
            _try(nvml, lambda: nvml.nvmlDeviceGetTemperature(card, nvml.NVML_TEMPERATURE_GPU)),
            _try(nvml, lambda: nvml.nvmlDeviceGetPerformanceState(card)),
            _try(nvml, lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(card)),
        )
        bits = _throttle_bits(nvml, card)
    throttled = None if bits is None else [name for bit, name in THROTTLING.values() if bits & bit]
    clock, memory, celsius, state, limit = (None if number is None else int(number) for number in numbers)
    return CardConditions(clock, memory, celsius, state, limit, throttled)


def _throttle_bits(nvml: Any, card: Any) -> int | None:
    """Under its new name, or the old one, which drivers before 535 know alone and CUDA 14 is to drop."""
    for name in ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"):
        read = getattr(nvml, name, None)
        bits = None if read is None else _try(nvml, functools.partial(read, card))
        if bits is not None:
            return int(bits)
    return None
