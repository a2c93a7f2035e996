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
    counters = _counters(root / _FOLDER)
    total = tuple(name for name in counters if name.startswith(("package", "dram")))
    if not total:
        raise UnavailableError(f"no package under {root / _FOLDER}/intel-rapl:*, as in most virtual machines")
    try:
        wraps = {name: read_number(zone / "max_energy_range_uj") * _MICRO for name, zone in counters.items()}
        for name in total:
            _joules(counters[name])
    except PermissionError as error:
        raise UnavailableError(f"{why(error)}; as root: chmod a+r {root / _FOLDER}/intel-rapl:*/energy_uj") from error
    return PowerSensor(
        "rapl",
        f"{' + '.join(total)}: the processor alone, no board, disk, or graphics card",
        tuple(counters),
        total,
        _PERIOD_S,
        lambda: _read(counters),
        averaging_s=_REFRESH_S,
        wraps_j=wraps,
    )


def _counters(folder: Path) -> dict[str, Path]:
    """Zones by name, a part behind its package: "package-0", "dram (package-0)"."""
    zones: dict[str, Path] = {}
    for zone in sorted(folder.glob("intel-rapl:*")):
        if not (zone / "energy_uj").exists():
            continue
        name = read_text(zone / "name")
        parent = folder / zone.name.rpartition(":")[0]
        zones[f"{name} ({read_text(parent / 'name')})" if (parent / "name").exists() else name] = zone
    return zones


def _read(counters: dict[str, Path]) -> Reading:
    joules, problems = read_rails({name: partial(_joules, zone) for name, zone in counters.items()})
    return Reading(joules=joules, problems=problems)


def _joules(zone: Path) -> float:
    return read_number(zone / "energy_uj") * _MICRO
