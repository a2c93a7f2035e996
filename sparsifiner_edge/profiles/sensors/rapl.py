"""Energy counters of x86 processors (RAPL) in the kernel's powercap tree (see its power/powercap/powercap.rst)."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from sparsifiner_edge.profiles.sensors.base import (
    PowerSensor,
    Reading,
    UnavailableError,
    read_number,
    read_rails,
    read_text,
    why,
)

_FOLDER = Path("sys/class/powercap")
_PERIOD_S = 0.05
_REFRESH_S = 0.001
_MICRO = 1e-6


def find_rapl(root: Path) -> PowerSensor:
    """Packages, and their DRAM where it is counted apart.

    Zones of `intel-rapl-mmio` count the same packages over again, `psys` holds them, `core` and `uncore` are parts of
    them: all of these stay out.
    """
    zones = _zones(root / _FOLDER)
    counters = {name: partial(_joules, zone / "energy_uj") for name, zone in zones.items()}
    if not zones:
        raise UnavailableError(f"no package under {root / _FOLDER}/intel-rapl:*, as in most virtual machines")
    try:
        wraps = {name: _joules(zone / "max_energy_range_uj") for name, zone in zones.items()}
        for count in counters.values():
            count()
    except PermissionError as error:
        raise UnavailableError(f"{why(error)}; as root: chmod a+r {root / _FOLDER}/intel-rapl:*/energy_uj") from error

    def read() -> Reading:
        joules, problems = read_rails(counters)
        return Reading(joules=joules, problems=problems)

    total = f"{' + '.join(zones)}: the processor alone, no board, disk, or graphics card"
    rails = tuple(zones)
    return PowerSensor("rapl", total, rails, rails, _PERIOD_S, read, averaging_s=_REFRESH_S, wraps_j=wraps)


def _zones(folder: Path) -> dict[str, Path]:
    """Zones of the total by name, a part behind its package: "package-0", "dram (package-0)"."""
    zones: dict[str, Path] = {}
    for zone in sorted(folder.glob("intel-rapl:*")):
        name, parent = read_text(zone / "name"), folder / zone.name.rpartition(":")[0]
        if name.startswith(("package", "dram")) and (zone / "energy_uj").exists():
            zones[f"{name} ({read_text(parent / 'name')})" if (parent / "name").exists() else name] = zone
    return zones


def _joules(path: Path) -> float:
    return read_number(path) * _MICRO
