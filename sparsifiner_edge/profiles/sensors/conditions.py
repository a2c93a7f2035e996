"""What a measurement ran under: clocks, temperatures, throttling, power mode."""

from __future__ import annotations

import contextlib
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec.structs import replace

from sparsifiner_edge.machine import NO_CPUFREQ
from sparsifiner_edge.profiles.sensors.base import UnavailableError, read_number, read_text, why
from sparsifiner_edge.profiles.sensors.nvml import THROTTLING, nvml_device, nvml_number
from sparsifiner_edge.records import Known, Unavailable

# Jetson's names of its GPU in devfreq: gpu, gp10b (TX2), gv11b (Xavier), ga10b (Orin), gpu-gpc-0 (Thor).
_GPU = re.compile(r"gpu|g[pvab]1[01]b")
# EMC is Jetson's memory controller: Thor in devfreq, Orin and Xavier through BPMP, Nano in the clock tree.
_EMC = (
    "sys/class/devfreq/bwmgr/cur_freq",
    "sys/kernel/debug/bpmp/debug/clk/emc/rate",
    "sys/kernel/debug/clk/emc/clk_rate",
)
_MODE = re.compile(r"pmode:(\d+)")
_MODE_NAME = re.compile(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>")
_RELEASE = re.compile(r"R(\d+).*?REVISION:\s*([\d.]+)")
_COLDEST_C = -100.0  # A zone that is switched off tells -256.
_KHZ, _HZ, _MILLI = 1e-3, 1e-6, 1e-3
Found = TypeVar("Found")


class Extremes(msgspec.Struct, frozen=True):
    """Of several cores, at one moment."""

    lowest: float
    highest: float


class Range(Extremes, frozen=True):
    """Of one figure, over several moments."""

    median: float


class CurrentPowerMode(msgspec.Struct, frozen=True):
    """Of a Jetson, as nvpmodel names it."""

    id: int
    name: str | Unavailable


class Conditions(msgspec.Struct, frozen=True, kw_only=True):
    """Clocks, temperatures, throttling and power mode at a moment.

    Attributes:
        cpu_mhz: of the cores that are on. emc_mhz: of Jetson's memory. temperature_c: by zone.
        throttled_by: names of what slows the machine down now. throttle_counts: counters that only rise.
        l4t: Jetson's release. nvml: why there is nothing of an NVIDIA card.
        memory_mhz, power_limit_mw: of an NVIDIA card.
    """

    cpu_mhz: Known[Extremes]
    cpu_limit_mhz: float | Unavailable
    governor: str | Unavailable
    gpu_mhz: float | Unavailable
    gpu_limit_mhz: float | Unavailable
    gpu_governor: str | Unavailable
    emc_mhz: float | Unavailable
    temperature_c: Known[dict[str, float]]
    throttled_by: list[str] | Unavailable
    throttle_counts: dict[str, int]
    power_mode: Known[CurrentPowerMode]
    l4t: str | Unavailable
    nvml: Unavailable | None = None
    memory_mhz: int | None = None
    power_limit_mw: int | None = None


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What a measurement ran under.

    Attributes:
        before, after: in full. during: each clock and temperature in between, by name. looks: how many there were.
        throttled_by: at any look, or by a counter that rose. Looks are seconds apart, so a short event that no counter
            counts may be missed.
    """

    before: Conditions
    during: dict[str, Range]
    looks: int
    after: Conditions
    throttled_by: list[str] | Unavailable


def conditions(root: Path = Path("/")) -> Conditions:
    """At this moment.

    Args:
        root: where `sys`, `etc`, `var` and `proc` are; tests give a made-up tree.
    """
    here = Conditions(
        cpu_mhz=_tried(lambda: _cpu_clocks(root)),
        cpu_limit_mhz=_tried(lambda: max(read_number(f / "scaling_max_freq") * _KHZ for f in _cpus(root))),
        governor=_tried(lambda: ", ".join(dict.fromkeys(read_text(f / "scaling_governor") for f in _cpus(root)))),
        gpu_mhz=_tried(lambda: read_number(_gpu(root) / "cur_freq") * _HZ),
        gpu_limit_mhz=_tried(lambda: read_number(_gpu(root) / "max_freq") * _HZ),
        gpu_governor=_tried(lambda: read_text(_gpu(root) / "governor")),
        emc_mhz=_tried(lambda: _emc(root)),
        temperature_c=_tried(lambda: _temperatures(root)),
        throttled_by=_tried(lambda: _cooling(root)),
        throttle_counts=dict(_counts(root)),
        power_mode=_tried(lambda: _power_mode(root)),
        l4t=_tried(lambda: _release(root)),
    )
    try:
        return _with_card(here)
    except UnavailableError as error:
        return replace(here, nvml=Unavailable(why(error)))


def _with_card(here: Conditions) -> Conditions:
    """An NVIDIA card's beside the machine's."""
    with nvml_device() as (nvml, card):
        number = partial(nvml_number, nvml, card)
        clock = number("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM)
        celsius = number("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU)
        # Under its new name, or the old one, which drivers before 535 know alone and CUDA 14 is to drop.
        bits = number("nvmlDeviceGetCurrentClocksEventReasons")
        bits = number("nvmlDeviceGetCurrentClocksThrottleReasons") if bits is None else bits
        here = replace(
            here,
            gpu_mhz=here.gpu_mhz if clock is None else clock,
            memory_mhz=number("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
            power_limit_mw=number("nvmlDeviceGetEnforcedPowerLimit"),
        )
    if celsius is not None:
        zones = here.temperature_c
        here = replace(here, temperature_c=(zones if isinstance(zones, dict) else {}) | {"NVML": float(celsius)})
    if bits is not None:
        slowed = [name for bit, name in THROTTLING.values() if bits & bit]
        known = here.throttled_by
        here = replace(here, throttled_by=(known if isinstance(known, list) else []) + slowed)
    return here


def _tried(read: Callable[[], Found]) -> Found | Unavailable:
    try:
        return read()
    except (OSError, ValueError, UnavailableError) as error:
        return Unavailable(why(error))


def _cpus(root: Path) -> list[Path]:
    folders = sorted((root / "sys/devices/system/cpu/cpufreq").glob("policy*"))
    if not folders:
        raise UnavailableError(NO_CPUFREQ.why)
    return folders


def _cpu_clocks(root: Path) -> Extremes:
    clocks = [read_number(folder / "scaling_cur_freq") * _KHZ for folder in _cpus(root)]
    return Extremes(min(clocks), max(clocks))


def _gpu(root: Path) -> Path:
    folders = sorted(f for f in (root / "sys/class/devfreq").glob("*") if _GPU.search(f.name))
    if not folders:
        raise UnavailableError("no GPU in devfreq")
    return folders[0]


def _emc(root: Path) -> float:
    for name in _EMC:
        with contextlib.suppress(OSError):
            return read_number(root / name) * _HZ
    raise UnavailableError("no memory controller in devfreq or debugfs, which only root may read")


def _thermal(root: Path, pattern: str, file: str) -> Iterator[tuple[str, str, float]]:
    """Folder, type and the number in a file of each thermal zone or cooling device that answers."""
    for folder in sorted((root / "sys/class/thermal").glob(pattern)):
        with contextlib.suppress(OSError, ValueError):
            yield folder.name, read_text(folder / "type"), read_number(folder / file)


def _temperatures(root: Path) -> dict[str, float]:
    """Degrees Celsius by zone. A zone of a unit that is off answers with an error or far below zero: left out."""
    found: dict[str, float] = {}
    for zone, name, value in _thermal(root, "thermal_zone*", "temp"):
        if value * _MILLI > _COLDEST_C:
            found[name if name not in found else f"{name} ({zone})"] = value * _MILLI
    if not found:
        raise UnavailableError("no thermal zone answers, as in most virtual machines")
    return found


def _cooling(root: Path) -> list[str]:
    """Passive cooling at work: Jetson's "cpu-throttle-alert" and the like, x86's "Processor"; not fans."""
    devices = list(_thermal(root, "cooling_device*", "cur_state"))
    if not devices:
        raise UnavailableError("the kernel names no cooling device")
    return [
        kind for _, kind, state in devices if state > 0 and "fan" not in kind.lower() and kind != "intel_powerclamp"
    ]


def _counts(root: Path) -> Iterator[tuple[str, int]]:
    """Counters of throttling: Jetson's over-current events, and each x86 package's thermal events."""
    jetson = (root / "sys/class/hwmon").glob("hwmon*/oc*_event_cnt")
    x86 = (root / "sys/devices/system/cpu").glob("cpu0/thermal_throttle/*_throttle_count")
    for prefix, suffix, paths in (("over-current", "_event_cnt", jetson), ("cpu0", "_throttle_count", x86)):
        for path in sorted(paths):
            with contextlib.suppress(OSError, ValueError):
                yield f"{prefix} {path.name.removesuffix(suffix)}", int(read_number(path))


def _power_mode(root: Path) -> CurrentPowerMode:
    path, conf = root / "var/lib/nvpmodel/status", root / "etc/nvpmodel.conf"
    if not path.exists():
        raise UnavailableError(f"{path} does not exist: not a Jetson, or nvpmodel never ran")
    match = _MODE.search(read_text(path))
    if match is None:
        raise UnavailableError(f"{path} names no mode: {read_text(path)[:40]!r}")
    number = int(match[1])
    return CurrentPowerMode(number, _tried(lambda: _mode_name(conf, number)))


def _mode_name(conf: Path, number: int) -> str:
    for key, name in _MODE_NAME.findall(read_text(conf)):
        if int(key) == number:
            return str(name)
    raise UnavailableError(f"{conf} has no mode {number}")


def _release(root: Path) -> str:
    path = root / "etc/nv_tegra_release"
    match = _RELEASE.search(read_text(path))
    if match is None:
        raise UnavailableError(f"{path} names no release")
    return f"R{match[1]}.{match[2]}"


def summarise_conditions(before: Conditions, during: Sequence[Conditions], after: Conditions) -> Seen:
    """Of looks before, during and after a measurement."""
    series: dict[str, list[float]] = {}
    for look in during:
        for name, value in _numbers(msgspec.to_builtins(look)):
            series.setdefault(name, []).append(value)
    ranges = {name: Range(min(found), max(found), statistics.median(found)) for name, found in series.items()}
    throttled = _throttled([before, *during, after])
    return Seen(before=before, during=ranges, looks=len(during), after=after, throttled_by=throttled)


def _numbers(look: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in look.items():
        if isinstance(value, dict) and name != "throttle_counts":
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and name not in ("id", "cpu_limit_mhz", "gpu_limit_mhz"):
            yield f"{prefix}{name}", float(value)


def _throttled(looks: Sequence[Conditions]) -> list[str] | Unavailable:
    lists = [look.throttled_by for look in looks if isinstance(look.throttled_by, list)]
    counts = [look.throttle_counts for look in looks if look.throttle_counts]
    if not lists and not counts:
        return Unavailable("nothing here tells of throttling")
    names = [name for found in lists for name in found]
    if counts:
        names += [name for name, count in counts[-1].items() if count > counts[0].get(name, count)]
    return list(dict.fromkeys(names))
