"""Conditions of a measurement: clocks, temperatures, throttling and power mode."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from sparsifiner_edge.profiles.sensors.nvml import THROTTLING, open_card
from sparsifiner_edge.profiles.sensors.power import UnavailableError, read_number, read_text
from sparsifiner_edge.records import Unavailable

CLOCKS: dict[str, tuple[Any, ...]] = {
    "cpu": (1e-3, "sys/devices/system/cpu/cpufreq/policy*/scaling_cur_freq"),
    # Names of a Jetson's GPU: gpu, gp10b (TX2), gv11b (Xavier), ga10b (Orin), gpu-gpc-0 (Thor).
    "gpu": (1e-6, "sys/class/devfreq/*gpu*/cur_freq", "sys/class/devfreq/*g[pva]1[01]b/cur_freq"),
    # Memory clock of a Jetson: in devfreq on Thor, through BPMP on Orin and Xavier.
    "memory": (1e-6, "sys/class/devfreq/bwmgr/cur_freq", "sys/kernel/debug/bpmp/debug/clk/emc/rate"),
}
"""Factor to MHz and files, by clock; of several files, such as one per core, the highest value counts."""
THROTTLE_COUNTERS = (
    "sys/class/hwmon/hwmon*/oc*_event_cnt",
    "sys/devices/system/cpu/cpu0/thermal_throttle/*_throttle_count",
)
"""Files with counters of throttling: over-current events of a Jetson, and thermal events of an x86 processor."""
_MILLI = 1e-3
_COLDEST_C = -100.0
"""Temperature in °C below which a zone is ignored: a zone that is switched off reports -256."""
_NOT_PASSIVE = re.compile("(?i)fan|intel_powerclamp")
"""Names of cooling devices whose activity is not throttling."""
_Value = TypeVar("_Value")


class Conditions(msgspec.Struct, frozen=True, kw_only=True):
    """Clocks, temperatures, throttling and power mode at one moment, as far as the machine reports them.

    Attributes:
        clocks_mhz: Clocks in MHz, by the keys of `CLOCKS`.
        temperature_c: Temperature in °C by thermal zone.
        throttled_by: Names of the reasons why the machine is throttled now.
        throttle_counts: Counters of throttling events, which only increase.
        power_mode: Name or number of a Jetson's power mode, from nvpmodel.
        power_limit_mw: Power limit of an NVIDIA card in milliwatts.
    """

    clocks_mhz: dict[str, float]
    temperature_c: dict[str, float]
    throttled_by: list[str] | Unavailable
    throttle_counts: dict[str, int]
    power_mode: str | None = None
    power_limit_mw: int | None = None


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """Conditions before and during a measurement.

    Attributes:
        before: All conditions before the measurement.
        during: Clocks (`<name>_mhz`) and temperatures (`temperature_c.<zone>`) at each reading during the measurement.
        throttled_by: Reasons for throttling at any reading, and counters that increased. Readings are seconds apart, so
            a short event without a counter may be missed.
    """

    before: Conditions
    during: dict[str, list[float]]
    throttled_by: list[str] | Unavailable


def conditions(root: Path = Path("/")) -> Conditions:
    """Return the conditions at this moment.

    Args:
        root: Folder that contains `sys`, `etc` and `var`; for tests.
    """
    clocks = {name: [*_read(root, read_number, *files)] for name, (_, *files) in CLOCKS.items()}
    zones = [(name, value * _MILLI) for name, value in _thermal(root, "thermal_zone*", "temp")]
    devices = list(_thermal(root, "cooling_device*", "cur_state"))
    here = Conditions(
        clocks_mhz={name: max(values) * CLOCKS[name][0] for name, values in clocks.items() if values},
        temperature_c={name: celsius for name, celsius in zones if celsius > _COLDEST_C},
        throttled_by=[kind for kind, state in devices if state and not _NOT_PASSIVE.search(kind)]
        if devices
        else Unavailable("the kernel reports no cooling device"),
        throttle_counts=dict(_read(root, lambda file: (file.name, int(read_number(file))), *THROTTLE_COUNTERS)),
        power_mode=_power_mode(root),
    )
    with contextlib.suppress(UnavailableError):
        return _with_card(here)
    return here


def _read(root: Path, read: Callable[[Path], _Value], *patterns: str) -> Iterator[_Value]:
    """Yield the result of `read` for every matching file that can be read.

    Memory clocks and some counters are readable by root only, and a unit that is switched off returns an error.
    """
    for file in (file for pattern in patterns for file in sorted(root.glob(pattern))):
        with contextlib.suppress(OSError, ValueError):
            yield read(file)


def _thermal(root: Path, pattern: str, file: str) -> Iterator[tuple[str, float]]:
    """Yield type and value of each thermal zone or cooling device that responds."""
    return _read(root, lambda f: (read_text(f / "type"), read_number(f / file)), f"sys/class/thermal/{pattern}")


def _with_card(here: Conditions) -> Conditions:
    """Add the clocks, temperature, throttling and power limit of an NVIDIA card."""
    with open_card() as card:
        kinds = {"gpu": card.nvml.NVML_CLOCK_SM, "memory": card.nvml.NVML_CLOCK_MEM}
        clocks = {name: card.number("ClockInfo", kind) for name, kind in kinds.items()}
        celsius = card.number("Temperature", card.nvml.NVML_TEMPERATURE_GPU)
        # Drivers before 535 only know the old name of this function, which CUDA 14 is to remove.
        bits = card.number("CurrentClocksEventReasons")
        bits = card.number("CurrentClocksThrottleReasons") if bits is None else bits
        limit = card.number("EnforcedPowerLimit")
    cooling = here.throttled_by
    slowed = [name for bit, name in THROTTLING.values() if bits and bits & bit]
    return msgspec.structs.replace(
        here,
        clocks_mhz=here.clocks_mhz | {name: float(mhz) for name, mhz in clocks.items() if mhz is not None},
        temperature_c=here.temperature_c | ({} if celsius is None else {"NVML": float(celsius)}),
        throttled_by=cooling if bits is None else (cooling if isinstance(cooling, list) else []) + slowed,
        power_limit_mw=limit,
    )


def _power_mode(root: Path) -> str | None:
    """Return the name of a Jetson's power mode, its number if the name is unknown, or None."""
    status, conf = ("".join(_read(root, read_text, file)) for file in ("var/lib/nvpmodel/status", "etc/nvpmodel.conf"))
    number = re.search(r"pmode:0*(\d+)", status)
    if number is None:
        return None
    name = re.search(rf"<\s*POWER_MODEL\s+ID=0*{number[1]}\s+NAME=(\S+)\s*>", conf)
    return name[1] if name else number[1]


def summarise_conditions(before: Conditions, during: Sequence[Conditions], after: Conditions) -> Observation:
    """Combine readings before, during and after a measurement."""
    series: dict[str, list[float]] = {}
    for look in during:
        clocks = {f"{name}_mhz": mhz for name, mhz in look.clocks_mhz.items()}
        for name, value in (clocks | {f"temperature_c.{z}": c for z, c in look.temperature_c.items()}).items():
            series.setdefault(name, []).append(value)
    lists = [look.throttled_by for look in (before, *during, after) if isinstance(look.throttled_by, list)]
    counts = before.throttle_counts
    names = [name for kinds in lists for name in kinds]
    names += [name for name, count in after.throttle_counts.items() if count > counts.get(name, count)]
    sources = lists or counts
    throttled = list(dict.fromkeys(names)) if sources else Unavailable("nothing here reports throttling")
    return Observation(before=before, during=series, throttled_by=throttled)
