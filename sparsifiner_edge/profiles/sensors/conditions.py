"""What a measurement ran under: clocks, temperatures, throttling, power mode."""

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
    # Jetson's names of its GPU: gpu, gp10b (TX2), gv11b (Xavier), ga10b (Orin), gpu-gpc-0 (Thor).
    "gpu": (1e-6, "sys/class/devfreq/*gpu*/cur_freq", "sys/class/devfreq/*g[pva]1[01]b/cur_freq"),
    # Of a Jetson: Thor in devfreq, Orin and Xavier through BPMP.
    "memory": (1e-6, "sys/class/devfreq/bwmgr/cur_freq", "sys/kernel/debug/bpmp/debug/clk/emc/rate"),
}
"""The factor to MHz and files, by clock; of several files, as of cores, the greatest counts."""
THROTTLE_COUNTERS = (
    "sys/class/hwmon/hwmon*/oc*_event_cnt",
    "sys/devices/system/cpu/cpu0/thermal_throttle/*_throttle_count",
)
"""Counters of throttling: Jetson's over-current events, and an x86 package's thermal events."""
_MILLI, _COLDEST_C = 1e-3, -100.0  # A zone that is switched off tells -256.
_NOT_PASSIVE = re.compile("(?i)fan|intel_powerclamp")
_Value = TypeVar("_Value")


class Conditions(msgspec.Struct, frozen=True, kw_only=True):
    """Clocks, temperatures, throttling and power mode at a moment; what a machine does not tell is left out.

    Attributes:
        clocks_mhz: by the keys of `CLOCKS`. temperature_c: by zone.
        throttled_by: names of what slows the machine down now. throttle_counts: counters that only rise.
        power_mode: of a Jetson, as nvpmodel names or numbers it. power_limit_mw: of an NVIDIA card.
    """

    clocks_mhz: dict[str, float]
    temperature_c: dict[str, float]
    throttled_by: list[str] | Unavailable
    throttle_counts: dict[str, int]
    power_mode: str | None = None
    power_limit_mw: int | None = None


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """What a measurement ran under.

    Attributes:
        before: in full. during: clocks (`<name>_mhz`) and temperatures at each look in between.
        throttled_by: at any look, or by a counter that rose. Looks are seconds apart, so a short event that no counter
            counts may be missed.
    """

    before: Conditions
    during: dict[str, list[float]]
    throttled_by: list[str] | Unavailable


def conditions(root: Path = Path("/")) -> Conditions:
    """At this moment.

    Args:
        root: where `sys`, `etc` and `var` are; tests give a made-up tree.
    """
    clocks = {name: [*_read(root, read_number, *files)] for name, (_, *files) in CLOCKS.items()}
    zones = [(name, value * _MILLI) for name, value in _thermal(root, "thermal_zone*", "temp")]
    devices = list(_thermal(root, "cooling_device*", "cur_state"))
    here = Conditions(
        clocks_mhz={name: max(values) * CLOCKS[name][0] for name, values in clocks.items() if values},
        temperature_c={name: celsius for name, celsius in zones if celsius > _COLDEST_C},
        throttled_by=[kind for kind, state in devices if state and not _NOT_PASSIVE.search(kind)]
        if devices
        else Unavailable("the kernel names no cooling device"),
        throttle_counts=dict(_read(root, lambda file: (file.name, int(read_number(file))), *THROTTLE_COUNTERS)),
        power_mode=_power_mode(root),
    )
    with contextlib.suppress(UnavailableError):
        return _with_card(here)
    return here


def _read(root: Path, read: Callable[[Path], _Value], *patterns: str) -> Iterator[_Value]:
    """Of every file that can be read; memory clocks and some counters are root's alone, a unit that is off refuses."""
    for file in (file for pattern in patterns for file in sorted(root.glob(pattern))):
        with contextlib.suppress(OSError, ValueError):
            yield read(file)


def _thermal(root: Path, pattern: str, file: str) -> Iterator[tuple[str, float]]:
    """Type and the number in a file of each thermal zone or cooling device that answers."""
    return _read(root, lambda f: (read_text(f / "type"), read_number(f / file)), f"sys/class/thermal/{pattern}")


def _with_card(here: Conditions) -> Conditions:
    """An NVIDIA card's beside the machine's."""
    with open_card() as card:
        kinds = {"gpu": card.nvml.NVML_CLOCK_SM, "memory": card.nvml.NVML_CLOCK_MEM}
        clocks = {name: card.number("ClockInfo", kind) for name, kind in kinds.items()}
        celsius = card.number("Temperature", card.nvml.NVML_TEMPERATURE_GPU)
        # Under its new name, or the old one, which drivers before 535 know alone and CUDA 14 is to drop.
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
    status, conf = ("".join(_read(root, read_text, file)) for file in ("var/lib/nvpmodel/status", "etc/nvpmodel.conf"))
    number = re.search(r"pmode:0*(\d+)", status)
    if number is None:
        return None
    name = re.search(rf"<\s*POWER_MODEL\s+ID=0*{number[1]}\s+NAME=(\S+)\s*>", conf)
    return name[1] if name else number[1]


def summarise_conditions(before: Conditions, during: Sequence[Conditions], after: Conditions) -> Observation:
    """Of looks before, during and after a measurement."""
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
