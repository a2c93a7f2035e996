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
    them: all of these stay out of the total.

    Raises:
        UnavailableError: no processor counts its energy here, or only root may read it.
        OSError, ValueError: the tree is not readable.
    """
    zones = _zones(root / _FOLDER)
    counters = {name: partial(_joules, zone / "energy_uj") for name, zone in zones.items()}
    total = tuple(name for name in zones if name.startswith(("package", "dram")))
    if not total:
        raise UnavailableError(f"no package under {root / _FOLDER}/intel-rapl:*, as in most virtual machines")
    try:
        wraps = {name: _joules(zone / "max_energy_range_uj") for name, zone in zones.items()}
        for name in total:
            counters[name]()
    except PermissionError as error:
        raise UnavailableError(f"{why(error)}; as root: chmod a+r {root / _FOLDER}/intel-rapl:*/energy_uj") from error

    def read() -> Reading:
        joules, problems = read_rails(counters)
        return Reading(joules=joules, problems=problems)

    described = f"{' + '.join(total)}: the processor alone, no board, disk, or graphics card"
    return PowerSensor("rapl", described, tuple(zones), total, _PERIOD_S, read, averaging_s=_REFRESH_S, wraps_j=wraps)


def _zones(folder: Path) -> dict[str, Path]:
    """Zones by name, a part behind its package: "package-0", "dram (package-0)"."""
    zones: dict[str, Path] = {}
    for zone in sorted(folder.glob("intel-rapl:*")):
        if (zone / "energy_uj").exists():
            name, parent = read_text(zone / "name"), folder / zone.name.rpartition(":")[0]
            zones[f"{name} ({read_text(parent / 'name')})" if (parent / "name").exists() else name] = zone
    return zones


def _joules(path: Path) -> float:
    return read_number(path) * _MICRO
